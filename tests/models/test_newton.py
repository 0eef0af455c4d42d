"""Newton's method for linear problems: derivatives by autograd, minima by conditions and by other ways."""

import numpy as np
import pytest
import torch

import restrain as rs
from restrain.models import linear, newton, objectives
from restrain.models.linear import Linear
from restrain.models.newton import minimised
from restrain.models.objectives import CrossEntropy, Form, Squares, knows

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


def loss_of(of):
    x, y = of.x.numpy(), of.y.numpy()
    return CrossEntropy(x, y, 10.0) if of.classes else Squares(x, y, 10.0)


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
    support = np.flatnonzero(w.numpy())
    form, own = Form.of(penalty, (3, 9)), loss_of(of).on(support)
    v, free = w.numpy().ravel()[support], b.numpy() if classes else np.zeros(0)
    both, at = torch.cat([torch.from_numpy(v), b]) if classes else torch.from_numpy(v), form.on(support)

    def value(both):
        filled = torch.zeros_like(w).masked_scatter(w != 0, both[: len(v)])
        return of.loss(filled, both[len(v) :] if classes else torch.zeros(3)) + penalty(filled)

    slope = torch.autograd.functional.jacobian(value, both).numpy()
    bend = torch.autograd.functional.hessian(value, both).numpy()
    if classes:  # a constant added to all outputs changes nothing; so that the matrix can be inverted
        bend[-3:, -3:] += 1 / 3
    assert own.value(v, free) + at.value(v) == pytest.approx(float(value(both)))
    assert form.value(w.numpy().ravel()) == pytest.approx(float(penalty(w)))
    mine = own.slope(v, free)
    mine[: len(v)] += at.slope(v)
    np.testing.assert_allclose(mine, slope, atol=1e-12)
    whole = loss_of(of).gradient(w.numpy().ravel(), free)[0][support]
    np.testing.assert_allclose(whole + at.slope(v), slope[: len(v)], atol=1e-12)
    side = bend @ DRAW.standard_normal(len(slope))  # some matrices are singular
    np.testing.assert_allclose(bend @ own.solved(v, free, at.bend(v), side), side, atol=1e-6)
    wrong = form.times(1.1).on(support).slope(v) - at.slope(v)
    assert np.abs(wrong).max() > 1e-3


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_the_form_has_the_prox_of_the_penalty(penalty):
    w = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    form = Form.of(penalty, (3, 9))
    shrunk = 1 / (1 + 2 * 0.4 * form.l2)  # Σw² counts as smooth
    expected = penalty.prox(w, 0.4).numpy().ravel()
    np.testing.assert_allclose(form.prox(w.numpy().ravel() * shrunk, 0.4 * shrunk), expected, atol=1e-12)
    assert not form.prox(np.zeros(27), 0.4).any()


def test_wide_systems_are_solved_by_samples_to_the_same_steps():
    """Ten samples, 40 features in groups of four: by Woodbury's identity, and by the whole matrix."""
    x, y = DRAW.standard_normal((10, 40)), DRAW.standard_normal((10, 1))
    for penalty in (rs.GroupLasso(per={"in": [list(range(k, k + 4)) for k in range(0, 32, 4)]}) + 0.1 * rs.L2(),):
        form, own = Form.of(penalty, (1, 40)), Squares(x, y, 10.0).on(np.arange(40))
        v, side = DRAW.standard_normal(40), DRAW.standard_normal(40)
        bend = form.bend(v)
        hessian = 2 / 10 * x.T @ x
        bend.add_to(hessian)
        expected = np.linalg.solve(hessian, side)
        np.testing.assert_allclose(own._by_samples(bend, side), expected, rtol=1e-8)
        np.testing.assert_allclose(own.solved(v, np.zeros(0), bend, side), expected, rtol=1e-8)
        doubled = Form.of(2 * penalty, (1, 40)).bend(v)
        assert np.abs(own._by_samples(doubled, side) - expected).max() > 1e-2


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_minima_are_found_from_anywhere(penalty, classes):
    """At the minimum a proximal step of torch's moves nothing, from near, far and zero."""
    of = problem(classes)
    form, loss = Form.of(0.05 * penalty, (3, 9)), loss_of(of)
    ends = []
    for begin in (np.zeros(27), 10 * DRAW.standard_normal(27), np.repeat([1e3, 0, 0], 9)):
        w, b = minimised(loss, form, begin, DRAW.standard_normal(3) if classes else np.zeros(0), 1e-11)
        gradient = loss.gradient(w, b)[0]
        at = torch.from_numpy(w).reshape(3, 9)
        moved = (0.05 * penalty).prox(at - 0.1 * torch.from_numpy(gradient).reshape(3, 9), 0.1)
        assert (moved - at).abs().max() < 1e-11
        if classes:  # a constant for all outputs of a feature in no group changes nothing
            w = w - np.tile(w.reshape(3, 9).mean(0) * form.free[:9], 3)
        ends.append(w)
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-8)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-8)
    assert np.abs(minimised(loss, form.times(1.1), ends[0], b, 1e-11)[0] - ends[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("penalty", "classes"), [*((one, False) for one in PENALTIES[1:]), *((one, True) for one in PENALTIES)]
)
def test_paths_are_those_of_proximal_gradient(penalty, classes, monkeypatch):
    of = problem(classes)
    strengths = of.greatest(penalty) * np.geomspace(1, 1e-2, 6)
    if np.isnan(strengths).any():
        strengths = np.geomspace(1, 1e-2, 6)
    calls = []
    monkeypatch.setattr(linear, "minimised", lambda *given: calls.append(1) or minimised(*given))
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


def test_too_many_entries_are_left_to_proximal_gradient(monkeypatch):
    of, penalty = problem(False), rs.GroupLasso(per="in")
    strengths = of.greatest(penalty) * np.geomspace(1, 1e-2, 3)
    usual = of.path(penalty, strengths)
    monkeypatch.setattr(newton, "_LARGEST", 5)
    for (w, _), (v, _) in zip(of.path(penalty, strengths), usual, strict=True):
        np.testing.assert_allclose(w, v, atol=1e-6)


def test_singular_systems_get_a_ridge():
    hessian, slope = np.ones((3, 3)), np.array([1.0, 1.0, 1.0])
    np.testing.assert_allclose(np.ones((3, 3)) @ objectives._solved(hessian, slope), slope, rtol=1e-2)
    assert objectives._solved(np.array([[0.0, 5.0], [5.0, 0.0]]), np.ones(2)) is None


def test_what_is_known():
    assert knows(2 * rs.GroupLasso() + rs.L1())
    assert not knows(rs.GroupLInf())
    assert not knows(rs.GroupLasso() + rs.NuclearNorm())
    assert not knows(rs.GroupLasso("in") + rs.GroupLasso("out"))

    class Own(rs.GroupLasso, register=False):
        pass

    assert not knows(Own())
