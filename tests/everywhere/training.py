"""The plain run: one process, eager, float64, whole batches. And the pieces that other ways of running are made of."""

import os
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

DEVICE = os.environ.get("RESTRAIN_TEST_DEVICE", "cpu")  # `make test-cuda` says cuda
STEPS, SAMPLES = 3, 8
PROGRESS = []  # the optimizer's steps since a cell began: a refusal after one comes too late


class Net(nn.Module):
    """What every plan of `kinds` fits; its `block` may be checkpointed."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)

    def block(self, x):
        return self.act(self.first(x))

    def forward(self, x):
        return self.head(self.block(x))


def fresh(make=Net, dtype=torch.float64, seed=7):
    """A new model, always with the same weights."""
    torch.manual_seed(seed)
    return make().to(DEVICE, dtype)


def batch(step, dtype=torch.float64):
    """The samples of a step and their classes."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 4, dtype=torch.float64, generator=generator)
    return x.to(DEVICE, dtype), torch.randint(3, (SAMPLES,), generator=generator).to(DEVICE)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


class Several:
    """Optimizers that step together."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def __iter__(self):
        return iter(self.optimizers)

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


@dataclass
class Run:
    """A model in training and what is attached to it; `call` is what is called, `parts` the micro-batches of a step.

    Of several ranks, each has its share of the micro-batches.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    reg: object
    call: object = None
    parts: int = 1
    rank: int = 0
    ranks: int = 1
    losses: list = field(default_factory=list)
    values: list = field(default_factory=list)  # a step: of each rule, averaged over the micro-batches

    def loss(self, x, y):
        """Data loss and penalties of one forward."""
        out = (self.model if self.call is None else self.call)(x)
        return self.reg.loss(F.cross_entropy(out, y))

    def backward(self, step):
        """All micro-batches of a step, each drawing its noise from a state of its own."""
        total, values = 0.0, []
        x, y = batch(step, next(self.model.parameters()).dtype)
        xs, ys = x.chunk(self.ranks * self.parts), y.chunk(self.ranks * self.parts)
        for part in range(self.rank * self.parts, (self.rank + 1) * self.parts):
            seed(step, part)
            loss = self.loss(xs[part], ys[part]) / self.parts
            loss.backward()
            total += loss.item()
            values.append(list(self.reg.values().values()))
        self.losses.append(total)
        self.values.append([sum(of_parts) / self.parts for of_parts in zip(*values, strict=True)])

    def step(self, step):
        self.optimizer.zero_grad()
        self.backward(step)
        self.optimizer.step()
        PROGRESS.append(step)

    def steps(self, count=STEPS, start=0):
        for step in range(start, start + count):
            self.step(step)
        return self

    def result(self):
        """What two ways of running are compared by. Detaches."""
        self.reg.detach()
        weights = [p.detach().clone() for p in self.model.parameters()]
        return {"weights": weights, "losses": self.losses, "values": self.values}


def seed(step, part=0):
    torch.manual_seed(1000 * step + part)


def attached(kind, model, optimizer=adam, **options):
    """A run of this model with the rules of a kind attached."""
    opt = optimizer(model.parameters())
    torch.manual_seed(5)  # of the rules' own draws at attach
    reg = rs.attach(model, kind.make(), opt)
    if learned := list(reg.parameters()):
        opt.add_param_group({"params": learned})
    return Run(model, opt, reg, **options)


def plain(kind, make=Net, optimizer=adam, parts=1, steps=STEPS):
    """The result of the plain run; the reference of every cell."""
    return attached(kind, fresh(make), optimizer, parts=parts).steps(steps).result()
