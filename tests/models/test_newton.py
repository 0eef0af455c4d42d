"""Newton's steps of linear problems: derivatives by autograd, minima with and without them."""

import numpy as np
import pytest
import torch

import restrain as rs
from restrain.models import linear
from restrain.models.linear import Linear
from restrain.models.newton import Support, knows, polished

DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((40, 9))
NUMBERS = DRAW.standard_normal((40, 3))
CLASSES = DRAW.integers(3, size=40)
PENALTIES = [
    0.1 * rs.L1() + 0.2 * rs.L2(),
    rs.GroupLasso(per="in"),
    rs.GroupLasso(per={"in": [[0, 1, 2], [3, 8], [5, 6]]}),  # features 4 and 7 are in no group
    0.1 * rs.SparseGroupLasso(0.3, 0.5, per="in") + 0.2 * rs.L2(),
]


def problem(classes):
    return Linear.of(X, CLASSES if classes else NUMBERS, 3 if classes else 0)


def sparse(per_feature):
    torch.manual_seed(0)
    w = torch.randn(3, 9, dtype=torch.float64)
    w[:, [1, 8]] = 0
    if not per_feature:
        w[0, 2] = w[2, 5] = 0
    return w, torch.randn(3, dtype=torch.float64)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_derivatives_are_those_of_autograd(penalty, classes):
    of = problem(classes)
    w, b = sparse(isinstance(penalty, rs.GroupLasso))
    support = Support(of, penalty, w, b)
    both = torch.cat([support.v, b])

    def value(both):
        filled = torch.zeros_like(w).masked_scatter(support.mask, both[: len(support.v)])
        return of.loss(filled, both[len(support.v) :]) + penalty(filled)

    slope = torch.autograd.functional.jacobian(value, both)
    bend = torch.autograd.functional.hessian(value, both)
    if classes:  # a constant added to all outputs changes nothing; so that the matrix can be inverted
        bend[-3:, -3:] += 1 / 3
    assert support.value(support.v, b) == pytest.approx(float(value(both)))
    np.testing.assert_allclose(support.slope(support.v, b), slope, atol=1e-12)
    np.testing.assert_allclose(support.bend(support.v, b), bend, atol=1e-12)
    wrong = Support(of, 1.1 * penalty, w, b).slope(support.v, b)
    assert (wrong - slope).abs().max() > 1e-3


@pytest.mark.parametrize("classes", [False, True])
def test_steps_from_near_end_at_the_minimum(classes):
    of, penalty = problem(classes), 0.05 * rs.GroupLasso(per="in")
    ((w, b),) = of.path(rs.GroupLasso(per="in"), [0.05])
    assert 0 < (w != 0).any(0).sum() < 9
    near, c = torch.where(w == 0, 0, w + 0.02 * w.abs().max() * torch.randn_like(w)), b + 0.1
    found = polished(of, penalty, near, c, 1e-12)
    np.testing.assert_allclose(found[0], w, atol=1e-7)
    far = torch.where(w == 0, 0, -w)
    back = polished(of, 0.05 * (rs.GroupLasso(per="in") + rs.L1()), far, c, 1e-12)
    assert back is None  # signs would change


@pytest.mark.parametrize("penalty", [rs.GroupLasso(per="in"), rs.SparseGroupLasso(0.3, 0.5, per="in")], ids=str)
@pytest.mark.parametrize("classes", [False, True])
def test_paths_are_those_of_proximal_gradient(penalty, classes, monkeypatch):
    of = problem(classes)
    strengths = of.greatest(penalty) * np.geomspace(1, 1e-2, 6)
    calls = []
    monkeypatch.setattr(linear, "polished", lambda *given: calls.append(1) or polished(*given))
    quick = of.path(penalty, strengths)
    assert calls
    monkeypatch.setattr(linear, "knows", lambda penalty: False)
    calls.clear()
    slow = of.path(penalty, strengths)
    assert not calls
    for (w, b), (v, c) in zip(quick, slow, strict=True):
        np.testing.assert_allclose(w, v, atol=1e-6)
        np.testing.assert_allclose(b - b.mean() * classes, c - c.mean() * classes, atol=1e-6)
        assert ((w == 0) == (v == 0)).all()


def test_what_is_known():
    assert knows(2 * rs.GroupLasso() + rs.L1())
    assert not knows(rs.GroupLInf())
    assert not knows(rs.GroupLasso() + rs.NuclearNorm())
