"""Why a proximal rule needs the optimizer's own metric: one lasso, every optimizer, three ways.

    python benchmarks/metric.py [--steps 4000] [--figure metric.png]

200 samples, 50 features, of which 8 matter; scikit-learn's coordinate descent, to a tolerance of 1e-14, is the
reference. Full batches in float64, so that only the method can err. The ways: a proximal rule, in the optimizer's
metric; a soft threshold by the learning rate after the step, as one writes it by hand; the penalty in the loss.
"""

import argparse
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import Lasso
from torch import nn, optim

import restrain as rs
from restrain.errors import RestrainWarning

STRENGTH = 0.1
WAYS = ("metric", "learning rate", "loss")

# Known metrics. Centered RMSprop divides by a variance, which a steady gradient hasn't: so an eps that counts.
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.3),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, momentum, fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD, dampened": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5),
    "ASGD": lambda p: optim.ASGD(p, lr=0.3, lambd=0),
    "Adam": lambda p: optim.Adam(p, lr=0.05),
    "Adam, foreach": lambda p: optim.Adam(p, lr=0.05, foreach=True),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.05, fused=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0),
    "AMSGrad": lambda p: optim.Adam(p, lr=0.05, amsgrad=True, betas=(0.9, 0.99)),
    "NAdam": lambda p: optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: optim.RAdam(p, lr=0.05),
    "Adamax": lambda p: optim.Adamax(p, lr=0.05),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.02),
    "RMSprop, centered": lambda p: optim.RMSprop(p, lr=0.01, centered=True, eps=0.05),
    "RMSprop, momentum": lambda p: optim.RMSprop(p, lr=0.005, alpha=0.97, momentum=0.8),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.5),
    "Adadelta": lambda p: optim.Adadelta(p, lr=2.0),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.1, weight_decay=0),
}


class Lion(optim.Optimizer):
    """Chen and others (2023), algorithm 2: a stranger, whose metric must be measured."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            slow, slower = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(mean.lerp(p.grad, 1 - slow).sign(), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - slower)


class StrangeAdam(optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


class StrangeSGD(optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


MEASURED = {
    "momentum, as a stranger": lambda p: StrangeSGD(p, lr=0.02, momentum=0.9),
    "Adam, as a stranger": lambda p: StrangeAdam(p, lr=0.02),
    "Lion": lambda p: Lion(p, lr=0.003),
    "Muon": lambda p: optim.Muon(p, lr=0.01, weight_decay=0),
}


@dataclass
class Row:
    optimizer: str
    way: str
    error: float  # the largest distance to scikit-learn's coefficients
    zeros: int
    same_zeros: bool
    path: list[float]  # the error every 20 steps


def lasso(samples=200, features=50, relevant=8, seed=0):
    """Gram matrix and correlations over the number of samples, and scikit-learn's coefficients."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(samples, features)), np.zeros(features)
    w[:relevant] = 2 * rng.normal(size=relevant)
    y = x @ w + 0.5 * rng.normal(size=samples)
    solution = Lasso(STRENGTH, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y).coef_
    return torch.tensor(x.T @ x / samples), torch.tensor(x.T @ y / samples), solution


def lasso_by(name, way, steps, problem=None, enough=0.0):
    """The lasso by one optimizer, in one way; it may stop early where the error is small enough."""
    gram, correlation, solution = problem or lasso()
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros((5, 10) if name == "Muon" else 50, dtype=torch.float64))
    optimizer = {**OPTIMIZERS, **MEASURED}[name](model.parameters())
    reg = None
    if way != "learning rate":
        rule = STRENGTH * rs.L1().on("w", how="proximal" if way == "metric" else "loss")
        reg = rs.attach(model, rule, optimizer)
    path = []
    for step in range(steps):
        w = model.w.detach().flatten()
        model.w.grad = (gram @ w - correlation).view_as(model.w)
        if way == "loss":
            reg.penalty().backward()
        optimizer.step()
        if way == "learning rate":
            threshold = STRENGTH * optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                model.w.copy_(model.w - model.w.clamp(-threshold, threshold))
        if step % 20 == 19:
            path.append(float(abs(model.w.detach().flatten().numpy() - solution).max()))
            if path[-1] < enough:
                break
    if reg is not None:
        reg.detach()
    w = model.w.detach().flatten().numpy()
    same = bool(((w == 0) == (solution == 0)).all())
    return Row(name, way, float(abs(w - solution).max()), int((w == 0).sum()), same, path)


def results(steps=4000, ways=WAYS, optimizers=(*OPTIMIZERS, *MEASURED)):
    """A `Row` for each optimizer and way."""
    problem = lasso()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)  # that the metric of strangers is measured
        return [lasso_by(name, way, steps, problem) for name in optimizers for way in ways]


def figure(rows, path):
    """The error over the steps, a panel for each way."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, len(WAYS), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, way, title in zip(
        axes, WAYS, ("proximal, in the optimizer's metric", "threshold = learning rate", "in the loss"), strict=True
    ):
        for row in (row for row in rows if row.way == way and row.optimizer in OPTIMIZERS):
            axis.semilogy(range(20, 20 * len(row.path) + 1, 20), row.path, lw=0.9)
        axis.set(title=title, xlabel="step")
    axes[0].set_ylabel("largest error of a coefficient")
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--figure", help="where to draw the errors")
    given = parser.parse_args()
    rows = results(given.steps)
    print(f"lasso, {given.steps} steps; scikit-learn has {(lasso()[2] == 0).sum()} zeros of 50; error and zeros by\n")
    print(f"{'optimizer':26}" + "".join(f"{way:>22}" for way in WAYS))
    for start in range(0, len(rows), len(WAYS)):
        cells = "".join(
            f"{row.error:14.1e} {row.zeros:3} ({'=' if row.same_zeros else '-'})" for row in rows[start : start + 3]
        )
        print(f"{rows[start].optimizer:26}{cells}")
    if given.figure:
        figure(rows, given.figure)
