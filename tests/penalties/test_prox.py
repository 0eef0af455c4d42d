"""Proximal operators beyond the matrix: of sums, in hard metrics, differentiated, as a solver."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import ElasticNet, Lasso

import references as ref
import restrain as rs
from restrain.axes import Grouping
from restrain.errors import NoProxError, PenaltyError
from restrain.penalties.shrink import shrink_groups

numbers = st.floats(0, 2, allow_subnormal=False)
norms = [
    ("none", None),
    ("rows", rs.GroupLasso()),
    ("columns", rs.GroupLasso("in")),
    ("whole", rs.Norm(2)),
    ("peak", rs.Norm(inf)),
]
values = {
    "none": lambda x: 0,
    "rows": ref.group_lasso(0),
    "columns": ref.group_lasso(1),
    "whole": ref.norm(2),
    "peak": ref.norm(inf),
}


@given(
    a=numbers,
    c=numbers,
    b=numbers,
    which=st.sampled_from(norms),
    seed=st.integers(0, 10**6),
    by_entry=st.booleans(),
)
def test_prox_of_any_sum(a, c, b, which, seed, by_entry):
    name, norm = which
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(4, 3)) * 10.0 ** rng.integers(-1, 2)
    penalty = a * rs.L1() + c * rs.L2()
    if norm is not None:
        penalty = b * norm + penalty
    by_entry = by_entry and penalty.groupwise
    step = 10.0 ** rng.uniform(-4, 0, size=w.shape) if by_entry else rng.uniform(0.01, 2)
    z = penalty.prox(torch.tensor(w), torch.tensor(step) if by_entry else step).numpy()
    value = ref.weighted((a, ref.l1), (c, ref.l2), (b, values[name]))
    assert ref.prox_excess(value, w, step, z, seed) < 1e-14


def test_prox_of_sums_is_refused_where_none_is_known():
    class Slanted(rs.Penalty, register=False):
        def __call__(self, w):
            return w.sum()

        def prox(self, w, step=1.0):
            return w - step

    w = torch.tensor([[1.0, -2.0]])
    expected = torch.tensor([[0.8, -2.2]]) / 1.4  # (w - step) / (1 + 2 step)
    torch.testing.assert_close((Slanted() + rs.L2()).prox(w, 0.2), expected)
    for penalty in (Slanted() + rs.L1(), rs.GroupLasso() + rs.GroupLasso("in"), rs.Norm(3) + rs.L2()):
        assert not penalty.has_prox
        with pytest.raises(NoProxError, match="no prox is known for the sum of"):
            penalty.prox(w)


def test_a_prox_is_a_new_tensor():
    w = torch.randn(3, 4)
    for penalty in (rs.ElasticNet(0, 0), 0 * rs.GroupLasso(), 0 * rs.L2() + 0 * rs.L1()):
        z = penalty.prox(w)
        assert torch.equal(z, w)
        assert z.data_ptr() != w.data_ptr()


def test_equal_penalties_join_in_a_prox():
    w, group = torch.randn(3, 4), rs.GroupLasso()
    torch.testing.assert_close((group + 0.5 * group).prox(w, 0.1), (1.5 * group).prox(w, 0.1))
    torch.testing.assert_close((rs.L1() + rs.Norm(1)).prox(w, 0.1), (2 * rs.L1()).prox(w, 0.1))


@pytest.mark.parametrize("step", [-0.1, inf, float("nan"), torch.ones(3), torch.ones(2, 1)])
def test_refuses_steps(step):
    for penalty in (rs.L1(), rs.GroupLasso(), rs.L1() + rs.GroupLasso(), 0.5 * rs.L2()):
        with pytest.raises(PenaltyError, match="step="):
            penalty.prox(torch.ones(2, 3), step)


def test_one_metric_for_all_is_one_step():
    w = torch.randn(5, 7, dtype=torch.float64)
    for penalty in (rs.GroupLasso(), rs.GroupLasso("in"), rs.Norm(2), 0.3 * rs.L1() + rs.GroupLasso()):
        torch.testing.assert_close(penalty.prox(w, torch.full_like(w, 0.2)), penalty.prox(w, 0.2))
        torch.testing.assert_close(penalty.prox(w, torch.tensor(0.2)), penalty.prox(w, 0.2))


def test_group_prox_leaves_entries_without_a_step():
    w, step = torch.randn(4, 6), torch.rand(4, 6) * 3
    step[:, ::2] = 0
    z = rs.GroupLasso().prox(w, step)
    assert torch.equal(z[:, ::2], w[:, ::2])
    assert not torch.equal(z[:, 1::2], w[:, 1::2])
    w[:, ::2] = 0
    assert rs.GroupLasso().prox(w, 100 * step).eq(0).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_group_prox_in_blocks_is_the_same(dim):
    w, step = torch.randn(700, 400), torch.rand(700, 400)
    z = rs.GroupLasso(dim).prox(w, step)
    parts = zip(w.split(10, dim), step.split(10, dim), strict=True)
    one_by_one = torch.cat(
        [shrink_groups(p, Grouping(tuple(p.shape), (dim,)), w.shape[1 - dim] ** 0.5, s) for p, s in parts],
        dim,
    )
    torch.testing.assert_close(z, one_by_one)


@given(seed=st.integers(0, 10**6))
def test_group_prox_solves_its_equation_in_hard_metrics(seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=8) * 10.0 ** (rng.uniform(0, 3) * rng.normal(size=8))
    t = 10.0 ** (-10 * rng.uniform(size=8)) * 10.0 ** rng.normal()
    if seed % 3 == 0:  # next to the edge of being zero
        w *= (1 + 10.0 ** -rng.uniform(1, 12)) / np.linalg.norm(w / t)
    z = shrink_groups(torch.tensor(w), Grouping((8,), ()), 1.0, torch.tensor(t)).numpy()
    length = np.linalg.norm(z)
    expected = w * length / (length + t) if length else 0 * w
    np.testing.assert_allclose(z, expected, atol=1e-12 * np.abs(w).max(), rtol=1e-6)
    assert (length == 0) == (np.linalg.norm(w / t) <= 1)


@pytest.mark.parametrize(
    "penalty",
    [rs.L1(), 0.3 * rs.L2(), rs.GroupLasso(), 0.2 * rs.L1() + 0.3 * rs.GroupLasso("in"), rs.Norm(inf)],
)
@pytest.mark.parametrize("by_entry", [False, True])
def test_prox_is_differentiable(penalty, by_entry):
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    step = torch.rand(3, 4, dtype=torch.float64) * 0.3 if by_entry else torch.tensor(0.2, dtype=torch.float64)
    if not by_entry or penalty.entrywise or penalty.groupwise:
        assert torch.autograd.gradcheck(penalty.prox, (w, step.requires_grad_()))


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_proximal_gradient_finds_scikit_learns_solution(l2):
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(60, 20)), np.zeros(20)
    true[:4] = [3, -2, 1, 1]
    y = x @ true + 0.1 * rng.normal(size=60)
    model = (
        ElasticNet(alpha=0.1 + 2 * l2, l1_ratio=0.1 / (0.1 + 2 * l2), fit_intercept=False, tol=1e-12)
        if l2
        else Lasso(0.1, fit_intercept=False, tol=1e-12)
    )
    expected = model.fit(x, y).coef_
    w, step = torch.zeros(20, dtype=torch.float64), 60 / np.linalg.norm(x, 2) ** 2
    x, y = torch.tensor(x), torch.tensor(y)
    for _ in range(2000):
        w = rs.ElasticNet(0.1, l2).prox(w - step * x.T @ (x @ w - y) / 60, step)
    np.testing.assert_allclose(w.numpy(), expected, atol=1e-9)
    assert ((w == 0).numpy() == (expected == 0)).all()
    assert (w == 0).sum() > 10


def test_norms_without_a_prox_say_so():
    with pytest.raises(NoProxError, match=r"Norm\(2\)"):
        rs.Norm(3).prox(torch.ones(2))
    with pytest.raises(NoProxError, match="one number for all"):
        rs.SLOPE(q=0.1).prox(torch.ones(2), torch.ones(2))
