"""Constraints end at the constrained minimiser under any metric (A3), and at the nearest point of several sets (A6)."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from faults.helpers import right_or_refused, sgd

# The sets in NumPy, each by its projection.


def onto_simplex(x, total=1.0):
    ordered = np.sort(x.ravel())[::-1]
    above = (np.cumsum(ordered) - total) / np.arange(1, x.size + 1)
    return np.maximum(x - above[np.nonzero(ordered > above)[0][-1]], 0)


def onto_l1_ball(x, radius=1.0):
    return x if np.abs(x).sum() <= radius else np.sign(x) * onto_simplex(np.abs(x), radius)


def onto_rows(x, radius):
    return x * np.minimum(1, radius / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300))


def onto_norm(x, radius=1.0):
    return x * min(1, radius / max(np.linalg.norm(x), 1e-300))


def with_values(x, change):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return u * change(s) @ v


SETS = {
    "nonnegative": (rs.NonNegative(), lambda x: np.maximum(x, 0)),
    "box": (rs.Box(-0.2, 0.3), lambda x: np.clip(x, -0.2, 0.3)),
    "rows": (rs.MaxNorm(0.4, per="out"), lambda x: onto_rows(x, 0.4)),
    "small rows": (rs.MaxNorm(0.02, per="out"), lambda x: onto_rows(x, 0.02)),
    "columns": (rs.MaxNorm(0.4, per="in"), lambda x: onto_rows(x.T, 0.4).T),
    "norm": (rs.MaxNorm(0.7, per=None), lambda x: onto_norm(x, 0.7)),
    "l1": (rs.L1Ball(1.0), lambda x: onto_l1_ball(x, 1.0)),
    "simplex": (rs.Simplex(1.0), lambda x: onto_simplex(x, 1.0)),
    "symmetric": (rs.Symmetric(), lambda x: (x + x.T) / 2),
    "spectral": (rs.SpectralBall(0.7), lambda x: with_values(x, lambda s: np.minimum(s, 0.7))),
    "small spectral": (rs.SpectralBall(0.05), lambda x: with_values(x, lambda s: np.minimum(s, 0.05))),
    "nuclear": (rs.NuclearBall(1.0), lambda x: with_values(x, lambda s: onto_l1_ball(s, 1.0))),
}


# A3: under an optimizer with a metric of its own

ROUND, LONG = np.array([1.0, 1.0, 1.0, 1.0]), np.array([4.0, 0.5, 1.0, 2.0])
AIM = np.array([3.0, 0.5, -0.2, 1.0])
KINDS = {
    "MaxNorm": (rs.MaxNorm(1.0, per=None), lambda x: onto_norm(x)),
    "UnitNorm": (rs.UnitNorm(per=None), lambda x: x / np.linalg.norm(x)),
    "L1Ball": (rs.L1Ball(1.0), lambda x: onto_l1_ball(x)),
    "Simplex": (rs.Simplex(1.0), lambda x: onto_simplex(x)),
    "Box": (rs.Box(-0.1, 0.6), lambda x: np.clip(x, -0.1, 0.6)),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.2),
}


def minimiser(project, curve, aim=AIM):
    """Return argmin of Σ curve (p - aim)² / 2 over a set by gradient projection, in float64."""
    found = project(np.full_like(aim, 0.3))
    for _ in range(20_000):
        found = project(found - 0.1 * curve * (found - aim))
    return found


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.full((4,), 0.3, dtype=torch.float64))


def minimised(constraint, make, curve, steps=600):
    model = Vector()
    optimizer = make(model.parameters())
    rs.attach(model, constraint.on("p"), optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(1 - k / steps, 1e-4))
    curve, aim = torch.tensor(curve), torch.tensor(AIM)
    for _ in range(steps):
        optimizer.zero_grad()
        (curve * (model.p - aim) ** 2).sum().div(2).backward()
        optimizer.step()
        schedule.step()
    return model.p.detach()


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in OPTIMIZERS])
def test_the_constrained_minimiser_is_reached(kind, name):
    constraint, project = KINDS[kind]
    found = minimised(constraint, OPTIMIZERS[name], LONG)
    torch.testing.assert_close(found, torch.tensor(minimiser(project, LONG)), rtol=0, atol=2e-3)


def test_the_constrained_minimiser_on_the_sphere_is_the_direction_of_the_aim():
    right = torch.tensor(AIM / np.linalg.norm(AIM))  # .935, .156, -.062, .312
    for constraint in (rs.MaxNorm(1.0, per=None), rs.UnitNorm(per=None)):
        found = minimised(constraint, OPTIMIZERS["Adam"], ROUND)
        torch.testing.assert_close(found, right, rtol=0, atol=2e-3)


def regression(name, epochs=60):
    """Fit rows of length at most one by minibatches; return the mean squared error over all samples."""
    draws = np.random.default_rng(0)
    inputs = draws.normal(size=(512, 6)) * np.array([3.0, 1.0, 0.3, 2.0, 0.5, 1.0])
    outputs = inputs @ draws.normal(size=(6, 3)) * 2 + draws.normal(size=(512, 3))
    x, y = torch.tensor(inputs), torch.tensor(outputs)
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double()
    optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name](model.parameters(), lr=0.01)
    rs.attach(model, rs.MaxNorm(1.0, per="out").on("weight"), optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(1 - k / epochs, 1e-3))
    for _ in range(epochs):
        for batch in torch.randperm(512).split(32):
            optimizer.zero_grad()
            (model(x[batch]) - y[batch]).square().mean().backward()
            optimizer.step()
        schedule.step()
    weight = np.zeros((3, 6))
    for _ in range(5000):
        weight = onto_rows(weight - 1e-2 * (inputs @ weight.T - outputs).T @ inputs / 512, 1.0)
    return (model(x) - y).square().mean().item(), np.square(inputs @ weight.T - outputs).mean()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_regression_with_bounded_rows_has_the_least_error(name):
    found, least = regression(name)
    assert least <= found + 1e-9  # the reference is the minimum
    assert found < 1.01 * least


# A6: several convex sets at once


def nearest(projections, x, tolerance=1e-11):
    """Return the nearest point of several sets, by Dykstra's algorithm.

    It ends at the conditions of optimality: x and normals n that add up to the way there, x = project(x + n) for each.
    """
    normals, size = [np.zeros_like(x) for _ in projections], max(np.abs(x).max(), 1)
    for count in range(300_000):
        for number, project in enumerate(projections):
            moved = x + normals[number]
            x = project(moved)
            normals[number] = moved - x
        if count % 8 == 0:
            left = [np.abs(project(x + n) - x).max() for project, n in zip(projections, normals, strict=True)]
            if max(left) < tolerance * size:
                return x
    raise AssertionError("the reference hasn't converged")


def held(constraints, weight):
    """Return the weight after rules are attached to it."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(weight))
    rs.attach(model, [constraint.on("weight") for constraint in constraints], sgd(model))
    return model.weight.detach().numpy().copy()


PAIRS = [
    ("nonnegative", "box"),
    ("nonnegative", "rows"),
    ("nonnegative", "symmetric"),
    ("nonnegative", "l1"),
    ("nonnegative", "nuclear"),
    ("box", "l1"),
    ("box", "simplex"),
    ("rows", "l1"),
    ("rows", "spectral"),
    ("simplex", "spectral"),
    ("symmetric", "l1"),
    ("symmetric", "spectral"),
    ("spectral", "nuclear"),
    ("nonnegative", "spectral"),
    ("box", "rows"),
    ("box", "norm"),
    ("box", "spectral"),
    ("rows", "columns"),
    ("rows", "symmetric"),
    ("columns", "symmetric"),
    ("small rows", "symmetric"),
    ("nonnegative", "small spectral"),
]


APART = {("small rows", "simplex"), ("simplex", "small spectral")}  # have no point in common
OTHERS = [pair for pair in itertools.combinations(SETS, 2) if pair not in APART and pair not in PAIRS]


@pytest.mark.parametrize(
    "pair", [*PAIRS, *(pytest.param(pair, marks=pytest.mark.slow) for pair in OTHERS)], ids=" and ".join
)
def test_two_convex_sets_give_their_nearest_point(pair):
    constraints, projections = zip(*(SETS[name] for name in pair), strict=True)
    for seed in range(3):
        weight = np.random.default_rng(seed).normal(size=(4, 4)) * (0.3, 1.0, 3.0)[seed]
        right = nearest(projections, weight)
        found = held(constraints, weight)
        far = np.abs(right - weight).max()
        assert np.abs(found - right).max() < 1e-6 * max(far, 1), f"seed {seed}"


@pytest.mark.parametrize(
    "constraints",
    [
        (rs.NonNegative(), rs.NuclearBall(1.0)),
        (rs.NonNegative(), rs.SpectralBall(0.05)),
        (rs.MaxNorm(0.02, per="out"), rs.Symmetric()),
    ],
    ids=["nuclear", "spectral", "symmetric"],
)
def test_sets_that_hold_zero_are_not_refused(constraints):
    model = nn.Linear(64, 64)
    rs.attach(model, [constraint.on("weight") for constraint in constraints], sgd(model))
    weight = model.weight.detach()
    for constraint in constraints:
        torch.testing.assert_close(constraint.project(weight), weight, rtol=0, atol=1e-5)
    assert (weight != 0).any()  # zero alone would be far from the nearest point


def test_no_entry_is_negative_beside_a_set_of_matrices():
    model = nn.Linear(64, 64)
    optimizer = sgd(model)
    rs.attach(model, [rs.NonNegative().on("weight"), rs.SpectralBall(0.7).on("weight")], optimizer)
    for _ in range(2):
        assert int((model.weight < 0).sum()) == 0
        assert torch.linalg.matrix_norm(model.weight.detach().double(), 2) <= 0.7 * (1 + 1e-4)
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "other",
    [rs.SpectralBall(0.7), rs.NuclearBall(1.0), rs.MaxNorm(0.1)],
    ids=repr,
)
def test_fixed_entries_are_exactly_zero_beside_another_set(other):
    model, mask = nn.Linear(16, 16), torch.rand(16, 16) < 0.5
    rs.attach(model, [rs.Fixed(mask, 0.0).on("weight"), other.on("weight")], sgd(model))
    assert int((model.weight[mask] != 0).sum()) == 0
    torch.testing.assert_close(other.project(model.weight.detach()), model.weight.detach(), rtol=0, atol=1e-5)


def test_sets_that_have_no_point_in_common_are_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(rs.errors.RestrainError, match="weight"):
        rs.attach(model, [rs.Box(1.0, 2.0).on("weight"), rs.MaxNorm(0.5, per=None).on("weight")], sgd(model))


def test_a_third_set_joins_the_other_two():
    names = ("nonnegative", "rows", "symmetric")
    constraints, projections = zip(*(SETS[name] for name in names), strict=True)
    weight = np.random.default_rng(0).normal(size=(4, 4))
    right = torch.tensor(nearest(projections, weight))
    right_or_refused(lambda: held(constraints, weight), right, names="weight", rtol=0, atol=1e-6)
