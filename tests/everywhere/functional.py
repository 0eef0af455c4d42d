"""torch.func: other parameters, gradients as functions, per-sample gradients, ensembles; evaluation in between."""

import contextlib
import copy
from dataclasses import dataclass, field

import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

import restrain as rs
from everywhere.column import column
from everywhere.training import PROGRESS, STEPS, Run, adam, attached, batch, fresh, plain, seed

GROUP = "torch.func, and evaluation in between"
PROBES = "which nothing can leave. Penalties on derivatives aren't known there"
NOT_HELD = "but no given optimizer holds"


@dataclass
class Functional(Run):
    """Trains `parameters`, which are put in the place of the model's own at each call."""

    parameters: dict = field(default_factory=dict)

    def loss(self, x, y):
        out = functional_call(self.model, self.parameters, (x,))
        return self.reg.loss(F.cross_entropy(out, y))

    def result(self):
        own = [p.detach().clone() for p in self.model.parameters()]
        torch.testing.assert_close(own, [p.detach() for p in fresh().parameters()])  # not touched
        weights = [p.detach() for p in self.parameters.values()]
        self.reg.detach()
        return {"weights": weights, "losses": self.losses, "values": self.values}


AT_STEPS = (
    "parameter-penalty-as-gradient",
    "decoupled-decay",
    "cautious-decay",
    "proximal-penalty",
    "proximal-group-penalty",
    "projection",
    "norms-held",
    "sharpness",
    "embeddings-and-views",  # new directions at each step
    "units-across-tensors",
    "target",
)
UNHELD = dict.fromkeys(AT_STEPS, NOT_HELD)


@column(
    "`functional_call` with other parameters, which the optimizer holds",
    GROUP,
    fast=True,
    refuses=UNHELD,
    senseless={"parametrisation": "the other parameters would be stored ones of a parametrised model"},
)
def other_parameters(kind):
    model = fresh()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = adam(parameters.values())
    torch.manual_seed(5)
    reg = rs.attach(model, kind.make(), optimizer)
    return Functional(model, optimizer, reg, parameters=parameters).steps().result(), plain(kind)


class ByGrad(Run):
    """The gradient is taken by torch.func.grad of a function that has reg.loss in it."""

    def backward(self, step):
        x, y = batch(step)
        seed(step)
        parameters = dict(self.model.named_parameters())
        gradients, value = self.gradients(parameters, x, y)
        for name, p in parameters.items():
            p.grad = gradients[name]
        self.losses.append(value.item())
        self.values.append(list(self.reg.values().values()))

    def pure(self, parameters, x, y):
        out = functional_call(self.model, parameters, (x,))
        return self.reg.loss(F.cross_entropy(out, y))

    def gradients(self, parameters, x, y):
        return grad_and_value(self.pure)(parameters, x, y)


@column("`torch.func.grad` of a loss with `reg.loss` in it", GROUP, fast=True, refuses={"Jacobian-penalty": PROBES})
def by_grad(kind):
    return ByGrad(**vars(attached(kind, fresh()))).steps().result(), plain(kind)


class PerSample(ByGrad):
    randomness = "different"

    def gradients(self, parameters, x, y):
        def sample(parameters, x, y):
            return self.pure(parameters, x[None], y[None])

        each = vmap(grad_and_value(sample), (None, 0, 0), randomness=self.randomness)
        gradients, values = each(parameters, x, y)
        assert all(g.shape == (len(x), *parameters[name].shape) for name, g in gradients.items())
        return {name: g.mean(0) for name, g in gradients.items()}, values.mean()


class PerSampleWithOneDraw(PerSample):
    randomness = "same"


@column(
    "per-sample gradients: `vmap` of `grad` over the batch, then their mean",
    GROUP,
    fast=True,
    refuses={"Jacobian-penalty": PROBES, "embeddings-and-views": "got a single sample: use batches of two or more"},
)
def per_sample(kind):
    """Statistics of a batch are those of single samples; noise on weights is drawn once, as in the plain run."""
    run = PerSampleWithOneDraw if kind.name == "weight-noise" else PerSample
    return run(**vars(attached(kind, fresh()))).steps().result(), plain(kind, parts=8 if kind.of_batch else 1)


SEEDS = (7, 8, 9)


def ensemble(kind, inside=True):
    models = [fresh(seed=number) for number in SEEDS]
    parameters, buffers = stack_module_state(models)
    optimizer = adam(parameters.values())
    base = copy.deepcopy(models[0])
    torch.manual_seed(5)
    reg = rs.attach(base, kind.make(), optimizer)
    losses = []

    def member(parameters, buffers, x, y):
        loss = F.cross_entropy(functional_call(base, (parameters, buffers), (x,)), y)
        return reg.loss(loss) if inside else loss

    for step in range(STEPS):
        optimizer.zero_grad()
        seed(step)
        each = vmap(member, (0, 0, None, None), randomness="same")(parameters, buffers, *batch(step))
        (each.sum() if inside else reg.loss(each.sum())).backward()
        optimizer.step()
        losses.append(each.detach())
        PROGRESS.append(step)
    reg.detach()
    return [list(p.detach()) for p in parameters.values()], list(torch.stack(losses).T)


def alone(kind):
    runs = [attached(kind, fresh(seed=number)).steps() for number in SEEDS]
    weights = [list(parts) for parts in zip(*(run.result()["weights"] for run in runs), strict=True)]
    return weights, [torch.tensor(run.losses, dtype=torch.float64) for run in runs]


STACKED = UNHELD | {"Jacobian-penalty": PROBES}
UNSTACKED = {"parametrisation": "stacked before the rules are attached, the weights aren't parametrised"}


@column(
    "ensembles: `stack_module_state` and `vmap`, `reg.loss` in each member",
    GROUP,
    fast=True,
    refuses=STACKED,
    senseless=UNSTACKED,
)
def ensembles(kind):
    return ensemble(kind), alone(kind)


def looking(quietly, evaluating):
    """A run that looks at the model between forward and loss, and between steps."""

    class Looking(Run):
        def loss(self, x, y):
            out = self.model(x)
            state = torch.get_rng_state()
            self.look(x)
            torch.set_rng_state(state)
            return self.reg.loss(F.cross_entropy(out, y))

        def step(self, step):
            self.look(batch(step + 100)[0])
            super().step(step)
            self.look(batch(step + 100)[0])

        def look(self, x):
            before = self.contents()
            self.model.train(not evaluating)
            with quietly():
                self.reg.loss(F.cross_entropy(self.model(x + 1), batch(0)[1]))
            self.model.train()
            assert before == self.contents()

        def contents(self):
            return [(n, {r: len(kept) for r, kept in f.records.items()}) for n, f in self.reg._forwards.pending.items()]

    return Looking


def looked(kind, quietly, evaluating=False):
    run = looking(quietly, evaluating)(**vars(attached(kind, fresh())))
    return run.steps().result(), plain(kind)


@column("forwards in training mode under `no_grad` between forward and loss and between steps", GROUP, fast=True)
def under_no_grad(kind):
    return looked(kind, torch.no_grad)


@column("the same under `inference_mode`", GROUP, fast=True)
def under_inference_mode(kind):
    return looked(kind, torch.inference_mode)


@column("the same in `eval()`, with gradients", GROUP, fast=True)
def in_evaluation(kind):
    return looked(kind, contextlib.nullcontext, evaluating=True)
