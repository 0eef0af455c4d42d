"""A child of rules.py: Keras's regularizers and constraint on the backend of KERAS_BACKEND, against the torch loop."""

import json
import os
import sys

import keras
import torch
from lists import LISTS, RULES, STRENGTH, model_of, tiny
from measure import cores, paired, ratios, spread, times

MEMBERS = {
    "L1": keras.regularizers.L1(STRENGTH),
    "L2": keras.regularizers.L2(STRENGTH),
    "elastic net": keras.regularizers.L1L2(STRENGTH / 2, STRENGTH / 2),
}


def by_torch(member, ps):
    """A job: value and gradient."""
    return lambda: sum(member(p) for p in ps).backward()


def by_jax(member, ps):
    """The same, compiled, as Keras's own training step is."""
    import jax

    arrays = [jax.numpy.asarray(p.detach().numpy()) for p in ps]
    function = jax.jit(jax.value_and_grad(lambda ws: sum(member(w) for w in ws)))
    return lambda: jax.block_until_ready(function(arrays))


def constraint(ps):
    """A job: Keras's max-norm of every matrix, eager, as its optimizers apply it."""
    member = keras.constraints.MaxNorm(0.5, axis=1)
    if keras.backend.backend() == "jax":
        import jax

        arrays = [jax.numpy.asarray(p.detach().flatten(1).numpy()) for p in ps]
        function = jax.jit(lambda ws: [member(w) for w in ws])
        return lambda: jax.block_until_ready(function(arrays))

    def run():
        with torch.no_grad():
            for p in ps:
                p.copy_(member(p.flatten(1)).view_as(p))

    return run


def main(quick):
    torch.set_num_threads(min(2, cores()))
    make, found = by_jax if os.environ["KERAS_BACKEND"] == "jax" else by_torch, {}
    for title, shapes in LISTS.items():
        model = model_of(tiny(shapes) if quick else shapes)
        ps = list(model.parameters())
        weights = [p for p in ps if p.dim() > 1]
        for name, member in {**MEMBERS, "max-norm": None}.items():
            hand = RULES["L1" if member is None else name].loop
            jobs = {"loop": lambda hand=hand, ps=ps: (STRENGTH * hand(ps)).backward()}
            jobs["keras"] = constraint(weights) if member is None else make(member, ps)
            seconds = paired(jobs, 2 if quick else 9, budget=5)
            over = times(ratios(seconds, "loop", "keras")) if member is not None else ""
            found[f"{title}|{name}"] = [spread(seconds["keras"], 1e3), over]
    print(json.dumps({"found": found}))


if __name__ == "__main__":
    main("--quick" in sys.argv)
