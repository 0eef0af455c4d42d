"""What each mechanism for speed gains: jobs with it and without it, taking turns; one by one, and all that go together.

    python benchmarks/ablations.py [--quick] [--out folder] [--only "folding"]

A mechanism is taken away by a patch of the function that decides for it, so that what it leaves does the work. Time is
that of the process on one thread, which other processes disturb least. A number is time without / time with, the
median of paired rounds: 1.05 means that the mechanism saves 5 % of the time without it; below 1 it costs time.
"""

import contextlib
import gc
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from lists import LISTS, RATE, STRENGTH, model_of, tiny
from measure import Section, options, paired, ratios
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.engine.backends import c, eager, inductor
from restrain.engine.loss import outputs, parameters, sums
from restrain.engine.step import folded
from restrain.penalties import derivative

SOURCE = Path(rs.__file__).parent


def nothing(*_args, **_kwargs):
    """In the place of a function that may answer None: I don't know how."""
    return None


def no(*_args, **_kwargs):
    return False


def hand_on(_self, batches, _decider):
    """In the place of a backend's `carry_out`: all is left to the next."""
    return list(batches)


@dataclass(frozen=True)
class Mechanism:
    """A mechanism: where it stands, and what takes it away."""

    files: tuple
    patches: tuple
    jobs: tuple
    lines: int | None = None  # where it is a part of a file
    found: dict = field(default_factory=dict)

    def length(self):
        return self.lines or sum(len((SOURCE / name).read_text("utf-8").splitlines()) for name in self.files)

    def private_names(self):
        """How many capabilities of `torch_private` the files import."""
        text = "".join((SOURCE / name).read_text("utf-8") for name in self.files)
        found = re.findall(r"from restrain\.torch_private import \(?([\w\s,]+)", text)
        return len({name for names in found for name in re.findall(r"\w+", names.partition("\n\n")[0])})


STEPS = ("L1 at the step", "MCP at the step", "max-norm at the step")
LOSS = ("L1 in the loss", "group lasso in the loss")
WHOLE = ("Adam, L1 proximal",)
WAITING = ("Adam, cautious decay", "Adam, Hyperball")
NETWORK = ("MLP, L1 on outputs", "CNN, L1 on outputs")
DERIVED = ("Jacobian norm, jvp",)

FOLDING = ((folded.Folding, "__call__", nothing),)
LOOPS = ((c.C, "sums", nothing), (c.C, "carry_out", hand_on), *FOLDING)
KERNELS = ((inductor.Inductor, "carry_out", hand_on),)
BLOCKS = ((eager.Eager, "carry_out", hand_on), (parameters, "_key", nothing))
LEAVES = ((sums, "unobserved", no), (parameters, "unobserved", no), (sums, "reached", nothing))
MECHANISMS = {
    "loops of C, with folding": Mechanism(
        (
            "engine/backends/c.py",
            "engine/backends/c_compiler.py",
            "engine/backends/c_updates.py",
            "engine/step/folded.py",
        ),
        LOOPS,
        (*STEPS, *LOSS, *WHOLE),
    ),
    "folding": Mechanism(("engine/step/folded.py", "engine/backends/c_updates.py"), FOLDING, (*WHOLE, WAITING[0])),
    "folding of Hyperball": Mechanism(("engine/backends/c_held.py",), FOLDING, WAITING[1:]),
    "kernels of inductor": Mechanism(("engine/backends/inductor.py",), KERNELS, (*STEPS, *WHOLE)),
    "kernels of inductor, where no loop of C is made": Mechanism(
        ("engine/backends/inductor.py",), KERNELS, (*STEPS, *WHOLE)
    ),
    "blocks and gathering (eager)": Mechanism(
        ("engine/backends/eager.py",),
        BLOCKS,
        (*STEPS, *LOSS, *WHOLE),
    ),
    "blocks and gathering (eager), where no loop of C is made": Mechanism(
        ("engine/backends/eager.py",),
        BLOCKS,
        (*STEPS, *LOSS, *WHOLE),
    ),
    "gradients added in place (loss/accumulate)": Mechanism(("engine/loss/accumulate.py",), LEAVES, LOSS),
    "output and value of one function (loss/outputs)": Mechanism(
        ("engine/loss/outputs.py",),
        ((outputs.AtPlace, "through", nothing), (outputs.AtPlace, "of_relu", nothing)),
        NETWORK,
    ),
    "tangents by the graph (penalties/tangents)": Mechanism(
        ("penalties/tangents.py",), ((derivative.DerivativePenalty, "of_tangents", nothing),), DERIVED
    ),
}
ALWAYS = {name: (*LOOPS, *KERNELS * ("eager" in name)) for name in MECHANISMS if "no loop" in name}


class Switch:
    """Puts patches in force, one set at a time."""

    def __init__(self):
        self._stack = contextlib.ExitStack()

    def __call__(self, patches):
        self._stack.close()
        self._stack = contextlib.ExitStack()
        for owner, name, other in patches:
            self._stack.enter_context(mock.patch.object(owner, name, other))


# ------------------------------------------------------------------ jobs: each is made and run under the same patches


def at_step(penalty, on, shapes):
    """Rules around a step of SGD, without the step."""
    model = model_of(shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer.register_step_pre_hook(nothing)  # so that nothing is folded
    how = "project" if isinstance(penalty, rs.MaxNorm) else "proximal"
    rs.attach(model, (penalty if how == "project" else STRENGTH * penalty).on(on, how=how), optimizer, compile=True)
    found = optimizer._optimizer_step_post_hooks
    optimizer.model = model
    return lambda: [hook(optimizer, (), {}) for hook in tuple(found.values())]


def in_loss(penalty, on, shapes):
    model = model_of(shapes)
    reg = rs.attach(model, STRENGTH * penalty.on(on))
    return lambda: reg.penalty().backward() or model


def whole(rule, shapes):
    """Steps of fused Adam with a rule."""
    model = model_of(shapes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    rs.attach(model, rule, optimizer, compile=True)
    optimizer.model = model
    return optimizer.step


def network(layers, x):
    """A training step with an L1 on the outputs of all ReLUs."""
    torch.manual_seed(0)
    net, y = nn.Sequential(*layers()), torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    reg = rs.attach(net, STRENGTH * rs.L1().on(rs.outputs(nn.ReLU)), optimizer)

    def step():
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(net(x), y)).backward()
        optimizer.step()

    return step


def mlp():
    return [nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)]


def cnn():
    made = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()]
    return [*made, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(64, 10)]


def jacobian():
    net = nn.Sequential(nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 10))
    reg, x = rs.attach(net, STRENGTH * rs.JacobianNorm(estimator="jvp").on()), torch.randn(64, 784)
    return lambda: reg.loss(net(x).square().mean()).backward()


def made(name, shapes):
    """The job of this name over a list."""
    jobs = {
        "L1 at the step": lambda: at_step(rs.L1(), "*", shapes),
        "MCP at the step": lambda: at_step(rs.MCP(), "*", shapes),
        "max-norm at the step": lambda: at_step(rs.MaxNorm(0.5, "row"), "w*", shapes),
        "L1 in the loss": lambda: in_loss(rs.L1(), "*", shapes),
        "group lasso in the loss": lambda: in_loss(rs.GroupLasso("row"), "w*", shapes),
        "Adam, L1 proximal": lambda: whole(STRENGTH * rs.L1().on("*", how="proximal"), shapes),
        "Adam, cautious decay": lambda: whole(STRENGTH * rs.L2().on("*", how="decoupled", cautious=True), shapes),
        "Adam, Hyperball": lambda: whole(rs.Hyperball().on("w*"), shapes),
        "MLP, L1 on outputs": lambda: network(mlp, torch.randn(64, 784)),
        "CNN, L1 on outputs": lambda: network(cnn, torch.randn(64, 3, 32, 32)),
        "Jacobian norm, jvp": jacobian,
    }
    return jobs[name]()


def compared(name, shapes, variants, rounds, budget):
    """{variant: seconds} of one job; the first time of each variant decides what it uses, and isn't counted."""
    switch, jobs = Switch(), {}
    for label, patches in variants.items():
        switch(patches)
        jobs[label] = made(name, shapes)
        jobs[label]()
    seconds = paired(jobs, rounds, budget, before=lambda label: switch(variants[label]), clock=time.process_time)
    switch(())
    gc.collect()
    return seconds


def row_of(job, base, patches, quick):
    """Time without / time with of one job: a number for each list, or one for a training step."""
    lists = [None] if job in NETWORK + DERIVED else [tiny(s) if quick else s for s in LISTS.values()]
    variants = {"with": base, "without": (*base, *patches)}
    found = [compared(job, shapes, variants, 2 if quick else 9, 1 if quick else 3) for shapes in lists]
    gains = [ratios(seconds, "without", "with")[1] for seconds in found]
    return [None] * len(LISTS) + gains if len(gains) == 1 else [*gains, None]


def over_lists(section, quick, only):
    """A line for each mechanism and job, a column for each list; and one for all mechanisms that gain less than 5 %."""
    rows, small = [], []
    for title, mechanism in MECHANISMS.items():
        if only not in title:
            continue
        gains = {job: row_of(job, ALWAYS.get(title, ()), mechanism.patches, quick) for job in mechanism.jobs}
        if max(gain for found in gains.values() for gain in found if gain) < 1.05:
            small.append(title)
        for job, found in gains.items():
            rows.append([title, str(mechanism.length()), str(mechanism.private_names()), job, *cells(found)])
            print(*rows[-1], sep=" | ", flush=True)
    section.table(
        "Time without / time with", ["mechanism", "lines", "private names", "job", *LISTS, "a training step"], rows
    )
    note = "None." if not small else f"Together: {'; '.join(small)}."
    if len(small) > 1:
        patches = [patch for title in small for patch in MECHANISMS[title].patches]
        jobs = dict.fromkeys(job for title in small for job in MECHANISMS[title].jobs)
        rows = [[job, *cells(row_of(job, (), patches, quick))] for job in jobs]
        section.table("All that gain less than 5 % by themselves", ["job", *LISTS, "a training step"], rows, note)
    else:
        section.text += f" Mechanisms that gain less than 5 % in every job: {note}"


def cells(gains):
    return ["" if gain is None else f"{gain:.2f}" for gain in gains]


# ------------------------------------------------------------------ the models' updates


def fit(rows, sizes, rules, compile):
    """Seconds of a fit of the keyword models; the best of three."""
    torch.manual_seed(0)
    x = torch.randn(rows, sizes[0]).numpy()
    y = (x[:, 0] > 0).astype(int)
    found = []
    for _ in range(3):
        model = rs.Classifier(
            hidden=sizes[1:],
            normalize=False,
            epochs=EPOCHS[rows],
            batch_size=64,
            random_state=0,
            compile=compile,
            **rules,
        )
        began = time.process_time()
        model.fit(x, y)
        found.append(time.process_time() - began)
    return min(found)


EPOCHS = {400: 100, 2000: 40, 10_000: 5}
TABLES = {"400 × 10": (400, (10, 32)), "2,000 × 20": (2000, (20, 64)), "10,000 × 784": (10_000, (784, 100))}
KEYWORDS = {"no rule": {}, "weight_l2": {"weight_l2": 1e-4}, "hidden_dropout": {"hidden_dropout": 0.2}}


def fits(section, quick):
    rows = []
    for title, (count, sizes) in list(TABLES.items())[: 1 if quick else None]:
        for name, rules in KEYWORDS.items():
            found = {how: fit(count, sizes, rules, how) for how in (False, "auto", True)}
            cells = [f"{found[how]:.2f}" for how in found]
            rows.append([title, name, *cells, f"{found[False] / found['auto']:.2f}"])
    head = ["table", "rule", "compile=False, s", '"auto", s', "True, s", "False / auto"]
    note = "Processor seconds of a whole fit, the compiler's included; the best of three."
    section.table("The models' updates: plain, recorded, compiled by inductor", head, rows, note)


def main():
    given = options(__doc__, ("--only", {"default": "", "help": "a part of the mechanism's name"}))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    section = Section(__file__, "What each mechanism gains", "One thread.")
    over_lists(section, given.quick, given.only)
    if given.only in "the models' updates":
        fits(section, given.quick)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
