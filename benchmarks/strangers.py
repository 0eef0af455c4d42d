"""How far from the optimum rules at the step end under optimizers that restrain doesn't know.

    pip install prodigyopt pytorch-optimizer schedulefree bitsandbytes
    python benchmarks/strangers.py [--steps 3000]

200 samples, 8 features, least squares in float64 by full batches, the learning rate falling to zero; weights of one
row, or two as Muon needs a matrix. The optimum is that of projected and proximal gradient descent to rounding. A number
is the distance to it over its length. Under a metric that differs by entry but has no formula here, the step of each
entry is measured; optimizers that mix entries (Shampoo, SOAP, Muon) have no such metric.
"""

import argparse
import importlib
import warnings

import torch
from torch import nn

import restrain as rs
from restrain.errors import RestrainError

GENERATOR = torch.Generator().manual_seed(0)
SCALES = torch.tensor([1, 0.5, 2, 1, 1, 0.3, 1, 1.5], dtype=torch.float64)
WEIGHTS = torch.tensor([[1, -2, 0, 0.5, 0, 0, 3, 0], [0, 1, 0, 0, 2, 0, 0, -1]], dtype=torch.float64)
X = torch.randn(200, 8, generator=GENERATOR, dtype=torch.float64) * SCALES
Y = X @ WEIGHTS.T + 0.5 * torch.randn(200, 2, generator=GENERATOR, dtype=torch.float64)
STRENGTH = 0.2


def soft(w, step):
    return w.sign() * (w.abs() - STRENGTH * step).clamp_min(0)


def within(w, step):
    return w / w.norm(dim=1, keepdim=True).clamp_min(1)


RULES = {
    "L1, gradient": (lambda: (STRENGTH * rs.L1()).on("weight", how="gradient"), soft),
    "L1, proximal": (lambda: (STRENGTH * rs.L1()).on("weight", how="proximal"), soft),
    "Box(0, 1)": (lambda: rs.Box(0, 1).on("weight"), lambda w, step: w.clamp(0, 1)),
    "MaxNorm(1)": (lambda: rs.MaxNorm(1.0, per="out").on("weight"), within),
}


def optimum(move):
    """The minimum of ½‖y - w x‖² / samples and the rule, by (proximal) gradient descent."""
    gram, w = X.T @ X / len(X), torch.zeros_like(WEIGHTS)
    step = 1 / torch.linalg.eigvalsh(gram)[-1]
    for _ in range(20_000):
        w = move(w - step * (w @ gram - Y.T @ X / len(X)), step)
    return w


def of(package, name, **settings):
    """A maker of an optimizer of a package; its error says that the package is missing."""

    def make(parameters):
        return getattr(importlib.import_module(package), name)(parameters, **settings)

    return make


def around(name, **settings):
    """A maker of a wrapper of Adam, of pytorch_optimizer."""

    def make(parameters):
        package = importlib.import_module("pytorch_optimizer")
        if name == "SAM":
            return package.SAM(parameters, torch.optim.Adam, **settings)
        return getattr(package, name)(torch.optim.Adam(parameters, lr=0.05), **settings)

    return make


OPTIMIZERS = {
    "Adam, which is known": of("torch.optim", "Adam", lr=0.05),
    "Muon": of("torch.optim", "Muon", lr=0.05, weight_decay=0.0),
    "Lion": of("pytorch_optimizer", "Lion", lr=0.01),
    "Prodigy": of("prodigyopt", "Prodigy", lr=1.0),
    "AdaBelief": of("pytorch_optimizer", "AdaBelief", lr=0.05),
    "Adan": of("pytorch_optimizer", "Adan", lr=0.05),
    "Shampoo": of("pytorch_optimizer", "Shampoo", lr=0.1),
    "SOAP": of("pytorch_optimizer", "SOAP", lr=0.05),
    "bitsandbytes AdamW": of("bitsandbytes.optim", "AdamW32bit", lr=0.05, weight_decay=0.0),
    "SAM (rho 0) around Adam": around("SAM", rho=0.0, lr=0.05),
    "Lookahead around Adam": around("Lookahead"),
    "schedule-free AdamW": of("schedulefree", "AdamWScheduleFree", lr=0.05),
}


def fit(make, rule, steps, size=200):
    """The weights after training by batches of a size, drawn by torch's generator."""
    model = nn.Linear(8, 2, bias=False).double()
    nn.init.constant_(model.weight, 0.25)
    optimizer = make(list(model.parameters()))
    reg = rs.attach(model, rule, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]

    def closure():
        optimizer.zero_grad()
        rows = slice(None) if size == len(X) else torch.randperm(len(X))[:size]
        loss = reg.loss((model(X[rows]) - Y[rows]).square().sum() / (2 * size))
        loss.backward()
        return loss

    free = "ScheduleFree" in type(optimizer).__name__
    for mode in ("train", "eval") if free else (None,):
        getattr(optimizer, mode)() if mode else None
        for step in range(steps if mode != "eval" else 0):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate if free else rate * (1 - step / steps) ** 2 + 1e-12
            closure()
            optimizer.step(*[closure] * (type(optimizer).__name__ == "SAM"))
    return model.weight.detach()


def cell(make, rule, expected, steps):
    try:
        found = fit(make, rule, steps)
    except RestrainError as error:
        return f"refused: {str(error)[:60]}"
    except Exception as error:  # of another package
        return f"{type(error).__name__}: {str(error)[:60]}"
    return f"{(found - expected).norm() / expected.norm():.0e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", default="", help="a part of the optimizer's name")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    expected = {title: optimum(move) for title, (_, move) in RULES.items()}
    print("optimizer", *RULES, sep=" | ")
    for name, make in OPTIMIZERS.items():
        if given.only in name:
            cells = [cell(make, rule(), expected[title], given.steps) for title, (rule, _) in RULES.items()]
            print(name, *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
