"""One rule by each `how=`: how far it ends from the minimiser of loss + penalty, and what clipping does to it.

    python benchmarks/how.py

The data of metric.py, in float64 and full batches. Ridge is the squares' penalty, whose minimiser is a formula; the
lasso's is scikit-learn's. The learning rate falls to 1e-3 of its first value, so that none is blamed for too long a
step.
"""

import torch
from metric import STRENGTH, lasso
from torch import nn, optim

import restrain as rs

HOWS = ("loss", "gradient", "decoupled", "proximal")
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.3),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.1),
}


def trained(penalty, how, name, problem, steps=1500, clip=None):
    """The weights that a rule of this penalty ends at."""
    gram, correlation, _ = problem
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = OPTIMIZERS[name](model.parameters())
    rate = optim.lr_scheduler.ExponentialLR(optimizer, 1e-3 ** (1 / steps))
    with rs.attach(model, penalty.on("*", how=how), optimizer) as reg:
        for _ in range(steps):
            model.w.grad = gram @ model.w.detach() - correlation
            if how == "loss":
                reg.penalty().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rate.step()
    return model.w.detach()


def ridge_minimiser(problem):
    """argmin of ½ mean squared error + STRENGTH Σw²."""
    gram, correlation, _ = problem
    return torch.linalg.solve(gram + 2 * STRENGTH * torch.eye(50, dtype=torch.float64), correlation)


def far(w, other):
    return float((w - other).abs().max())


def main():
    problem = lasso()
    minima = {"ridge": ridge_minimiser(problem), "lasso": torch.tensor(problem[2])}
    penalties = {"ridge": STRENGTH * rs.L2(), "lasso": STRENGTH * rs.L1()}
    print("largest distance of a weight from the minimiser; zeros of 50\n")
    print(f"{'':22}" + "".join(f"{how:>18}" for how in HOWS))
    for task, minimum in minima.items():
        for name in OPTIMIZERS:
            ends = [trained(penalties[task], how, name, problem) for how in HOWS]
            cells = [f"{far(w, minimum):11.1e} ({int((w == 0).sum()):3})" for w in ends]
            print(f"{task + ', ' + name:22}" + "".join(f"{cell:>18}" for cell in cells))
    print(
        "\nridge by Adam after 20 steps, the data's gradient clipped to length 1 before each: distance from how='loss'"
    )
    ends = {how: trained(penalties["ridge"], how, "Adam", problem, steps=20, clip=1.0) for how in HOWS}
    print("  ".join(f"{how} {far(w, ends['loss']):.1e}" for how, w in ends.items()))


if __name__ == "__main__":
    main()
