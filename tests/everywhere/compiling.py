"""torch.compile around the model, the optimizer's step, and the whole step."""

import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from everywhere.column import column
from everywhere.running import checkpointed
from everywhere.training import Run, attached, batch, fresh, plain, seed

GROUP = "Compiled"
SAMPLE = ("parameter-penalty-in-the-loss", "output-penalty")
DRAWS = torch._inductor.config.patch(fallback_random=True)  # inductor draws eager's numbers then


def compiled(model, way, backend):
    """The model compiled; what is to be called."""
    if way == "model.compile()":
        model.compile(backend=backend, fullgraph=True)
        return model
    return torch.compile(model, backend=backend, fullgraph=True)


def graphs(count=1):
    """Sees that something was compiled, and without a break."""
    assert counters["stats"]["unique_graphs"] >= count
    assert not counters["graph_break"]


@DRAWS
def model_compiled(kind, way, backend, after=False, model=None):
    torch.compiler.reset()
    counters.clear()
    model = fresh() if model is None else model
    call = compiled(model, way, backend)
    if after:
        call(batch(0)[0]).sum().backward()
        model.zero_grad()
    run = attached(kind, model, call=call).steps()
    graphs()
    return run.result(), plain(kind)


def add(way, backend, after):
    def run(kind):
        return model_compiled(kind, way, backend, after)

    run.__name__ = f"{'in_place' if way == 'model.compile()' else 'compiled'}_{backend}" + "_before_attach" * after
    moment = "compiled and called before attach" if after else "attached before the first call"
    column(f"`{way}`, {backend}, fullgraph, {moment}", GROUP, fast=SAMPLE if (way, backend) in FAST else ())(run)


FAST = {("torch.compile(model)", "aot_eager")}

for way in ("torch.compile(model)", "model.compile()"):
    for backend in ("aot_eager", "inductor"):
        for after in (False, True):
            add(way, backend, after)


LEFT_INSIDE = {"embeddings-and-views": "an error of Dynamo: no output leaves a compiled checkpoint for a later penalty"}


@column(
    "`torch.compile(model)`, aot_eager, fullgraph, with non-reentrant checkpoints inside", GROUP, senseless=LEFT_INSIDE
)
def compiled_checkpoint(kind):
    return model_compiled(kind, "torch.compile(model)", "aot_eager", model=fresh(checkpointed(False)))


@column("the same with inductor", GROUP, senseless=LEFT_INSIDE)
def compiled_checkpoint_inductor(kind):
    return model_compiled(kind, "torch.compile(model)", "inductor", model=fresh(checkpointed(False)))


class WholeStep(Run):
    """Forward, `reg.loss` and backward in one compiled function; values are read outside of it."""

    backend = "aot_eager"
    stepping = False

    def backward(self, step):
        if self.call is None:
            self.call = torch.compile(self.whole, backend=self.backend)
        x, y = batch(step)
        seed(step)
        self.losses.append(self.call(x, y).item())
        self.values.append(list(self.reg.values().values()))

    def whole(self, x, y):
        loss = self.reg.loss(F.cross_entropy(self.model(x), y))
        loss.backward()
        if self.stepping:
            self.optimizer.step()
        return loss.detach()

    def step(self, step):
        self.optimizer.zero_grad()
        self.backward(step)
        if not self.stepping:
            self.optimizer.step()


class WholeStepAndOptimizer(WholeStep):
    stepping = True


@DRAWS
def whole(kind, run, backend):
    torch.compiler.reset()
    counters.clear()
    made = run(**vars(attached(kind, fresh())))
    made.backend = backend
    made.steps()
    assert counters["stats"]["unique_graphs"]
    found, expected = made.result(), plain(kind)
    if made.stepping:  # the values are read after the step
        return [[result["weights"], result["losses"]] for result in (found, expected)]
    return found, expected


@column("forward, `reg.loss` and backward in one compiled function, aot_eager", GROUP, fast=SAMPLE)
def whole_step(kind):
    return whole(kind, WholeStep, "aot_eager")


@column("the same with the optimizer's step in it; compiled, it rounds to float32 in places", GROUP, rounding=1e-5)
def whole_step_and_optimizer(kind):
    return whole(kind, WholeStepAndOptimizer, "aot_eager")


class CompiledStep(Run):
    backend = "aot_eager"

    def step(self, step):
        if self.call is None:
            self.call = torch.compile(self.optimizer.step, backend=self.backend)
        self.optimizer.zero_grad()
        call, self.call = self.call, None
        self.backward(step)
        self.call = call
        self.call()


@column("`torch.compile(optimizer.step)`", GROUP, fast=("proximal-penalty",), rounding=1e-5)
def compiled_optimizer(kind):
    torch.compiler.reset()
    counters.clear()
    run = CompiledStep(**vars(attached(kind, fresh()))).steps()
    assert counters["stats"]["unique_graphs"]
    return run.result(), plain(kind)
