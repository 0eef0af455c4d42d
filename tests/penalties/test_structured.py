"""Sorted penalties and total variation, against definitions, special cases and peers."""

from math import inf
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression
from torch import nn

import references as ref
import restrain as rs
from restrain.errors import HowError, NoProxError, PenaltyError
from restrain.named_tensors import Location
from restrain.penalties.structured import taut_slopes


def dual_fault(y, x, radius):
    """By how much x fails to be the prox of radius · total variation at y, line by line.

    The running sums of y - x are the dual variable: within ± radius, and at that bound wherever x jumps.
    """
    z = np.cumsum(y - x, axis=1)
    jumps = np.diff(x, axis=1)
    outside = np.maximum(np.abs(z) - radius, 0).max(initial=0)
    wrong = np.abs(z[:, :-1] + radius * np.sign(jumps))[jumps != 0].max(initial=0)
    return max(outside, wrong, np.abs(z[:, -1]).max(initial=0))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), kind=st.sampled_from(["noise", "walk", "steps", "tails"]))
def test_total_variation_is_exact(seed, n, kind):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(5, n))
    if kind == "walk":
        y = np.cumsum(y, axis=1)
    elif kind == "steps":
        y = np.round(y)
    elif kind == "tails":
        y = y * 10.0 ** rng.uniform(-3, 3, size=y.shape)
    radius = 10.0 ** rng.uniform(-3, 2)
    x = rs.TotalVariation().prox(torch.tensor(y), radius).numpy()
    assert dual_fault(y, x, radius) < 1e-13 * (np.abs(y).sum(1).max() + radius)
    assert np.unique(x[0]).size == 1 + (np.diff(x[0]) != 0).sum() or kind != "noise"


def test_the_oracle_notices_a_wrong_prox():
    y = np.random.default_rng(0).normal(size=(5, 60))
    x = rs.TotalVariation().prox(torch.tensor(y), 0.51).numpy()
    assert dual_fault(y, x, 0.5) > 1e-3
    assert dual_fault(y, y, 0.5) == 0.5  # as if no string were taut


@pytest.mark.parametrize("radius", [0.01, 1.0, 1e3])
def test_long_lines(radius):
    for y in (torch.randn(20, 2000, dtype=torch.float64), torch.randn(1, 30_000, dtype=torch.float64).cumsum(1)):
        x = taut_slopes(y, radius)
        assert dual_fault(y.numpy(), x.numpy(), radius) < 1e-9
    equal = torch.full((3, 1000), 0.1)
    assert torch.equal(rs.TotalVariation().prox(equal, radius), equal)  # rounding is no jump


@pytest.mark.parametrize(("dim", "shape"), [(0, (7,)), (-1, (3, 7)), (0, (7, 3)), (1, (2, 7, 3)), (-2, (2, 7, 3))])
def test_total_variation_along_any_dim(dim, shape):
    w, penalty = torch.randn(shape), rs.TotalVariation(dim)
    lines = w.movedim(dim, -1).reshape(-1, 7)
    torch.testing.assert_close(penalty(w), sum(rs.TotalVariation()(line) for line in lines))
    expected = torch.stack([rs.TotalVariation().prox(line, 0.4) for line in lines])
    torch.testing.assert_close(penalty.prox(w, 0.4).movedim(dim, -1).reshape(-1, 7), expected)


def test_lines_end_where_they_end():
    w = torch.randn(4, 1)
    assert rs.TotalVariation()(w) == 0
    torch.testing.assert_close(rs.TotalVariation().prox(w, 9.0), w)
    torch.testing.assert_close(rs.TotalVariation().prox(torch.randn(3, 8), 1e6).std(1), torch.zeros(3))


def test_a_line_with_nan_leaves_the_others_alone():
    w = torch.randn(4, 9)
    expected = rs.TotalVariation().prox(w, 0.3)
    w[1, 3], w[2, 0] = torch.nan, inf
    z = rs.TotalVariation().prox(w, 0.3)
    assert z[1:3].isnan().all()
    torch.testing.assert_close(z[[0, 3]], expected[[0, 3]])


def test_complex_differences_count_by_modulus():
    w = torch.tensor([0, 3 + 4j, 3])
    assert rs.TotalVariation()(w) == 5 + 4
    with pytest.raises(NoProxError, match="complex"):
        rs.TotalVariation().prox(w)


def test_axes_by_name():
    layer = nn.ConvTranspose1d(4, 6, 3)
    for penalty in (rs.TotalVariation("in"), rs.FusedLasso(0.1, 0.2, "in")):
        bound = penalty.bound_to(Location(layer.weight, owner=layer, attribute="weight"))
        assert bound.dim == 0
        assert penalty.bound_to(Location(torch.ones(4, 6))).dim == 1
    grouped = nn.Conv1d(4, 6, 3, groups=2)
    with pytest.raises(PenaltyError, match="no single dim"):
        rs.TotalVariation("in").bound_to(Location(grouped.weight, owner=grouped, attribute="weight"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: rs.TotalVariation((4, 4)), "dim= is a dim"),
        (lambda: rs.TotalVariation("time"), "an axis by name such as 'in'"),
        (lambda: rs.TotalVariation(2)(torch.ones(2, 2)), "dim=2 needs"),
        (lambda: rs.TotalVariation()(torch.tensor(1.0)), "dim=-1 needs"),
        (lambda: rs.TotalVariation("in").on(rs.outputs("fc")), "dim=1"),
        (lambda: rs.TotalVariation(0).over_batch(torch.ones(2, 3), 0), "batch axis"),
        (lambda: rs.FusedLasso(-1, 1), "strength"),
        (lambda: rs.FusedLasso(1, 1, "time"), "an axis by name such as 'in'"),
        (lambda: rs.SparseGroupLasso(1, inf), "strength"),
        (lambda: rs.SLOPE(), "either weights= or q="),
        (lambda: rs.SLOPE((1.0,), q=0.1), "either weights= or q="),
        (lambda: rs.SLOPE((1.0, 2.0)), "the greatest first"),
        (lambda: rs.SLOPE((1.0, -1.0)), "zero or more"),
        (lambda: rs.SLOPE((inf, 1.0)), "finite"),
        (lambda: rs.SLOPE(("a", "b")), "finite"),
        (lambda: rs.SLOPE(1.0)(torch.ones(3)), "1 weights, for a tensor of 3"),
        (lambda: rs.SLOPE(q=1.0), "between 0 and 1"),
        (lambda: rs.SLOPE(q="0.1"), "between 0 and 1"),
        (lambda: rs.SLOPE((2.0, 1.0)).prox(torch.ones(3)), "2 weights, for a tensor of 3 entries"),
    ],
)
def test_refuses(make, told):
    with pytest.raises(PenaltyError, match=told):
        make()


# Sorted L1


def test_slope_between_its_special_cases():
    w = torch.randn(12, dtype=torch.float64)
    for slope, same in (
        (rs.SLOPE((0.7,) * 12), 0.7 * rs.L1()),
        (rs.SLOPE((1.0, *[0.0] * 11)), rs.Norm(inf)),
    ):
        torch.testing.assert_close(slope(w), same(w))
        for step in (0.1, 1.0, 30.0):
            torch.testing.assert_close(slope.prox(w, step), same.prox(w, step))


@given(seed=st.integers(0, 10**6))
def test_slope_is_the_minimizer(seed):
    rng = np.random.default_rng(seed)
    w = np.round(rng.normal(size=(3, 4)) * 2, int(rng.integers(0, 4)))  # with ties
    weights = np.sort(rng.uniform(size=12) * (rng.uniform(size=12) < 0.7))[::-1]
    penalty = rs.SLOPE(weights) + 0.1 * rs.L1() + 0.05 * rs.L2()
    value = ref.weighted((1, ref.sorted_l1(weights)), (0.1, ref.l1), (0.05, ref.l2))
    step = rng.uniform(0.01, 3)
    z = penalty.prox(torch.tensor(w), step).numpy()
    assert ref.prox_excess(value, w, step, z, seed) < 1e-14


def test_weights_of_benjamini_and_hochberg():
    w = torch.zeros(1000, dtype=torch.float64)
    w[0], w[1] = 1.0, 1e-3
    expected = NormalDist().inv_cdf(1 - 0.1 / 2000) + 1e-3 * NormalDist().inv_cdf(1 - 0.2 / 2000)
    assert abs(rs.SLOPE(q=0.1)(w) - expected) < 1e-12
    assert rs.SLOPE(q=1e-300)(torch.ones(2)).isfinite()


def test_slope_at_a_hundred_thousand_entries():
    w = torch.randn(100_000, dtype=torch.float64)
    weights = -torch.special.ndtri(torch.arange(1, 100_001, dtype=torch.float64) * 1e-6 / 2)
    order = w.abs().argsort(descending=True)
    kept = isotonic_regression((w.abs()[order] - 0.1 * weights).numpy(), increasing=False).clip(0)
    expected = torch.empty_like(w)
    expected[order] = torch.tensor(kept.copy())
    torch.testing.assert_close(rs.SLOPE(q=0.1).prox(w, 0.1), expected * w.sgn(), rtol=1e-12, atol=1e-12)


def test_slope_of_samples():
    h = torch.randn(4, 3, 2)
    for penalty in (rs.SLOPE(q=0.2), rs.SLOPE((3.0, 2.0, 1.0, 1.0, 0.5, 0.0))):
        torch.testing.assert_close(penalty.over_batch(h), torch.stack([penalty(x) for x in h]).mean())
    assert rs.SLOPE(q=0.2).over_batch(torch.ones(0, 3)) == 0


# Sums with a name, and as rules


def test_named_sums_are_the_sums():
    w = torch.randn(4, 5, dtype=torch.float64)
    for named, parts in (
        (rs.SparseGroupLasso(0.1, 0.2, "in"), 0.1 * rs.L1() + 0.2 * rs.GroupLasso("in")),
        (rs.FusedLasso(0.1, 0.2, 0), 0.1 * rs.L1() + 0.2 * rs.TotalVariation(0)),
    ):
        for a, b in ((named, parts), (0.5 * named + rs.L2(), 0.5 * parts + rs.L2())):
            torch.testing.assert_close(a(w), b(w))
            torch.testing.assert_close(a.gradient(w), b.gradient(w))
            torch.testing.assert_close(a.prox(w, 0.4), b.prox(w, 0.4))
            assert (a.groupwise, a.has_prox) == (b.groupwise, b.has_prox)


def test_a_soft_threshold_comes_after_a_total_variation():
    w = np.random.default_rng(0).normal(size=(3, 4)) * 2
    value = ref.weighted((0.4, ref.l1), (0.3, ref.l2), (0.7, ref.total_variation(-1)))
    penalty = rs.FusedLasso(0.3, 0.7) + 0.1 * rs.L1() + 0.3 * rs.L2()
    assert ref.prox_excess(value, w, 0.9, penalty.prox(torch.tensor(w), 0.9).numpy()) < 1e-14
    assert not (rs.TotalVariation(0) + rs.TotalVariation(1)).has_prox
    assert not (rs.TotalVariation(0) + rs.GroupLasso() + rs.L1()).has_prox


def test_piecewise_constant_weights_by_training():
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(80, 30)), np.repeat([0.0, 2.0, 0.0], 10)
    y = x @ true + 0.1 * rng.normal(size=80)
    model = nn.Linear(30, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reg = rs.attach(model, rs.FusedLasso(0.05, 0.2, "in").on("weight", how="proximal"), optimizer)
    inputs, targets = torch.tensor(x), torch.tensor(y)[:, None]
    for _ in range(400):
        optimizer.zero_grad()
        reg.loss((model(inputs) - targets).square().mean() / 2).backward()
        optimizer.step()
    w = model.weight.detach()[0]
    assert w[:10].eq(0).all()
    assert w[20:].eq(0).all()
    assert len(w[10:20].unique()) == 1
    assert abs(w[15] - 2) < 0.2
    assert list(reg.values().values())[0] > 0  # noqa: RUF015


@pytest.mark.parametrize("penalty", [rs.TotalVariation(), rs.FusedLasso(0.1, 0.1), rs.SLOPE(q=0.1)])
def test_adaptive_optimizers_are_refused(penalty):
    model = nn.Linear(4, 3)
    with pytest.raises(HowError, match=r"moves each entry by a step of its own.*Use SGD"):
        rs.attach(model, penalty.on("weight", how="proximal"), torch.optim.Adam(model.parameters()))
    with pytest.raises(NoProxError, match="one number for all"):
        penalty.prox(torch.ones(3, 4), torch.ones(3, 4))


def test_changes_over_time_at_a_place():
    model = nn.Sequential(nn.GRU(3, 4, batch_first=True))
    reg = rs.attach(model, 0.1 * rs.TotalVariation(1).on(rs.outputs("0", index=0)))
    h, _ = model(torch.randn(5, 7, 3))
    expected = 0.1 * h.diff(dim=1).abs().sum() / 5
    torch.testing.assert_close(reg.loss(torch.zeros(())), expected)


@pytest.mark.parametrize(
    "prox",
    [
        lambda w, t: rs.TotalVariation(0).prox(w, t),
        lambda w, t: rs.SLOPE((1.0, 0.7, 0.5, 0.3, 0.2, 0.1)).prox(w, t),
        lambda w, t: rs.FusedLasso(0.1, 0.5).prox(w, t),
    ],
)
def test_proxes_are_differentiable(prox):
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prox, (w, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)))


# Peers


@pytest.mark.slow
def test_slope_is_skglms():
    skglm = pytest.importorskip("skglm.penalties")
    weights = np.linspace(1.5, 0.1, 200)
    w = torch.randn(200, dtype=torch.float64)
    theirs, ours = skglm.SLOPE(weights, alpha=0.7), 0.7 * rs.SLOPE(weights)
    assert abs(theirs.value(w.numpy()) - ours(w)) < 1e-10
    for step in (0.1, 1.0, 3.0):
        np.testing.assert_allclose(ours.prox(w, step).numpy(), theirs.prox_vec(w.numpy(), step), atol=1e-13)


@pytest.mark.slow
def test_total_variation_and_rows_are_pyproximals():
    pyproximal = pytest.importorskip("pyproximal")
    w = torch.randn(40, dtype=torch.float64).cumsum(0)
    theirs = pyproximal.TV(dims=(40,), sigma=0.8, niter=20_000, rtol=1e-14)
    ours = 0.8 * rs.TotalVariation()
    assert abs(theirs(w.numpy()) - ours(w)) < 1e-10
    z = ours.prox(w, 0.9)
    np.testing.assert_allclose(z.numpy(), theirs.prox(w.numpy(), 0.9).ravel(), atol=1e-4)  # an iteration of theirs
    rows = torch.randn(3, 4, dtype=torch.float64)
    plain = pyproximal.L21(ndim=4, sigma=0.5)  # columns of a (4, 3) array, without our root of the size
    ours = 0.5 / 4**0.5 * rs.GroupLasso("row")
    assert abs(plain(rows.T.numpy().ravel()) - ours(rows)) < 1e-12
    np.testing.assert_allclose(ours.prox(rows, 0.6).numpy(), plain.prox(rows.T.numpy().ravel(), 0.6).reshape(4, 3).T)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: rs.FusedLasso(s, 2 * s),
        lambda s: s * rs.FusedLasso(0.1, 0.2),
        lambda s: rs.SparseGroupLasso(s, 2 * s, per=0),
        lambda s: s * rs.SparseGroupLasso(0.1, 0.2, per=0),
    ],
)
def test_further_strengths_in_compiled_code(make):
    """From the second on, torch.compile takes a number of Python for one that changes."""
    torch.compiler.reset()
    made = torch.compile(lambda w, s: make(s)(w), fullgraph=True, backend="aot_eager")
    given = torch.compile(lambda w, penalty: penalty(w), fullgraph=True, backend="aot_eager")
    w = torch.randn(4, 6)
    for s in (0.1, 0.2, 0.3):
        torch.testing.assert_close(made(w, s), make(s)(w))
        torch.testing.assert_close(given(w, make(s)), make(s)(w))
