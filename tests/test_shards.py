"""Two gloo processes that share the parameters by FSDP2 train as one process with whole parameters does."""

import os
import re
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import restrain as rs
from restrain.engine import shards
from restrain.errors import HowError, NotCollectedError, OptimizerError, PenaltyError, RestrainWarning

RANKS, STEPS = 2, 4
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})
ADAM = (torch.optim.Adam, {"lr": 0.05})


class Net(nn.Module):
    """Layers whose shards are uneven (5 rows), empty on one rank (1 row), and of FSDP's root (the head)."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.thin, self.head = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1), nn.Linear(6, 3)

    def forward(self, x):
        h = self.relu(self.first(x))
        return self.head(torch.cat([h, self.thin(h)], 1))


class Spread(rs.Penalty):
    """A user's penalty, of which nothing is known."""

    def __call__(self, w):
        return w.var()


ENTRYWISE = 0.1 * rs.L1() + 0.05 * rs.L2()
GROUPED = 0.1 * rs.GroupLasso(per="out")
CROSSING = 0.1 * rs.GroupLasso(per="in")
SPECTRAL = 0.1 * rs.NuclearNorm()
WEIGHTED = 0.1 * rs.Weighted(rs.L1(), lambda w: 1 / w.abs())
MOVING = 0.1 * rs.Distance(decay=0.5)
W = "*.weight"
PLANS = {
    "loss": [(0.1 * rs.L1() + rs.LogSum()).on("*"), GROUPED.on(W), CROSSING.on(W), SPECTRAL.on("first.weight")],
    "loss of the whole": [WEIGHTED.on("*"), MOVING.on(W), 0.1 * Spread().on("head.*"), rs.SparseGroupLasso().on(W)],
    "loss, mean": [0.1 * rs.L2().on("*", reduce="mean"), 0.2 * rs.Huber().on(W, every=2, start=1)],
    "network": [0.1 * rs.Tie("first", "head", transposed=True).on(["first.bias", "head.bias"], optional=True)],
    "gradient": [p.on(W, how="gradient") for p in (ENTRYWISE, GROUPED, CROSSING, SPECTRAL, WEIGHTED, MOVING)],
    "decoupled": [p.on(W, how="decoupled") for p in (ENTRYWISE, GROUPED, CROSSING)],
    "proximal": [ENTRYWISE.on("*", how="proximal")],
    "proximal by group": [(GROUPED + 0.02 * rs.L1()).on(W, how="proximal")],
    "proximal across": [CROSSING.on(W, how="proximal"), rs.NonNegative().on("head.weight")],
    "proximal weighted": [WEIGHTED.on(W, how="proximal"), 0.1 * rs.L1().on("head.bias", how="proximal", reduce="mean")],
    "constraints": [
        rs.NonNegative().on("*.bias"),
        rs.Box(-0.2, 0.2).on("thin.weight", momentum="tangent"),
        rs.UnitNorm(per="out").on("first.weight", momentum="tangent"),
        rs.MaxNorm(0.3, per="in").on("head.weight", momentum="tangent"),
        rs.Box(-0.2, 0.3).on("head.weight"),
    ],
    "constraints of matrices": [rs.SpectralBall(0.5).on("head.weight"), rs.TopK(6).on("first.weight")],
    "outputs": [0.1 * rs.L1().on(rs.outputs("relu")), 0.1 * rs.Decorrelation().on(rs.outputs("first"))],
    "moving": [
        rs.schedules.WarmUp(3) * rs.L2().on(W),
        rs.Target(zeros=0.3, every=1, start=0.05) * rs.L1().on(W, how="proximal"),
        rs.Target(norm=0.5, every=1, start=0.05) * rs.L2().on("*.bias", how="gradient"),
        rs.Target(gradient_share=0.1, every=1, start=0.05) * CROSSING.on("head.weight", how="gradient"),
    ],
}
PLANS["network"] = [0.1 * rs.Tie("first.weight", "thin.weight", penalty=rs.L2()).on(["first.weight", "thin.weight"])]
CASES = [(plan, "SGD") for plan in PLANS if plan != "network"] + [
    (plan, "Adam") for plan in PLANS if plan.startswith(("proximal", "outputs")) or plan == "decoupled"
]


class Pair(rs.NetworkPenalty):
    """Of two parameters whose gradients are one tensor."""

    def __call__(self, parameters, outputs):
        a, b = parameters.values()
        return (a.sum(0) + b.sum(0)[:4]).square().sum() + sum(p.sum() for p in parameters.values())


PLANS["network"] = [0.1 * Pair().on(["first.weight", "head.weight"])]
CASES.append(("network", "SGD"))


def shard(model, **options):
    for layer in (model.first, model.thin, model):
        fully_shard(layer, **options)
    return model


def full(t):
    return shards.whole(t.detach()).clone()


def train(plan, optimizer, rank=0, ranks=1, before=False):
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
    reg = rs.attach(model, plan) if before else None
    if ranks > 1:
        shard(model)
    cls, options = {"SGD": SGD, "Adam": ADAM}[optimizer]
    step = cls(model.parameters(), **options)
    reg = reg or rs.attach(model, plan, step)
    seen = [list(reg.values().values())]
    for _ in range(STEPS):
        step.zero_grad()
        loss = reg.loss(F.cross_entropy(model(x), y))
        assert type(loss) is torch.Tensor
        penalty = (loss - F.cross_entropy(model(x), y)).detach()
        loss.backward()
        step.step()
        seen.append([float(penalty)])
    model.eval()
    measured = [] if any(b.watches for b in reg._bounds) else [tuple(vars(m).values()) for m in reg.measure().values()]
    seen += [list(reg.values().values()), list(reg.strengths().values()), *map(list, measured)]
    notes = [note for bound in reg._bounds for note in bound.notes]
    reg.detach()
    return {name: full(p) for name, p in model.named_parameters()}, seen, notes
