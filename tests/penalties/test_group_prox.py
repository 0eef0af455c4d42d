"""Proxes of groups in hard metrics, against peers, and as what a training solves."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import restrain as rs
from restrain.axes import Grouping
from restrain.penalties.shrink import cut_groups, share_groups

LISTS = [[4, 0], [2], [6, 1, 5]]

# Cutting and sharing in hard metrics


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0, 1, 4, 8]))
def test_cutting_and_sharing_solve_their_equations(seed, spread):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 9)) * 10.0 ** (rng.uniform(0, 2) * rng.normal(size=(3, 9)))
    t = 10.0 ** (rng.normal() - spread * rng.uniform(size=(3, 9)))
    groups = Grouping((3, 9), (0,))
    z = cut_groups(torch.tensor(w), groups, torch.tensor(t)).numpy()
    for x, found, step in zip(w, z, t, strict=True):  # the sum of (|x| - |z|) / t is one, or all is zero
        level = np.abs(found).max()
        np.testing.assert_allclose(np.abs(found), np.minimum(np.abs(x), level), rtol=1e-14)
        taken = (np.maximum(np.abs(x) - level, 0) / step).sum()
        noise = (np.abs(x).max() / step).max() * 1e-14 * 9
        assert taken < 1 + 1e-9 + noise
        assert level == 0 or taken > 1 - 1e-9 - noise
    z = share_groups(torch.tensor(w), groups, torch.tensor(t)).numpy()
    for x, found, step in zip(w, z, t, strict=True):
        expected = np.sign(x) * np.maximum(np.abs(x) - 2 * step * np.abs(found).sum(), 0)
        np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(x).max())


def test_a_long_tail_takes_few_rounds():
    for w in (2.0 ** -torch.arange(900, dtype=torch.float64), 1 / torch.arange(1, 100_000, dtype=torch.float64)):
        for t in (1e-6, 0.3, 1.9):
            size = w.sort(descending=True).values
            level = ((size.cumsum(0) - t) / torch.arange(1, len(w) + 1)).amax().clamp_min(0)
            torch.testing.assert_close(rs.Norm(inf).prox(w, t), w.clamp_max(level), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "penalty", [rs.GroupLInf(), rs.ExclusiveLasso("in"), rs.GroupLasso([[0, 2]]), rs.GroupLInf([[0, 2], [1]])]
)
@pytest.mark.parametrize("by_entry", [False, True])
def test_proxes_are_differentiable(penalty, by_entry):
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    step = torch.rand(3, 4, dtype=torch.float64) * 0.3 if by_entry else torch.tensor(0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(penalty.prox, (w, step.requires_grad_()))


# Peers


def test_group_lasso_is_not_ridge():
    """Without the root, as in wenwei202/caffe#36, it is a sum of squares, which is never zero."""
    w = torch.tensor([[0.3, 0.4], [3.0, 4.0]])
    assert rs.GroupLasso()(2 * w) == 2 * rs.GroupLasso()(w)  # of degree one
    assert rs.GroupLasso().prox(w, 0.5)[0].eq(0).all()
    assert rs.GroupLasso()(w) != rs.L2()(w)
    w.zero_().requires_grad_()
    rs.GroupLasso(LISTS[:1])(torch.cat([w, w, w])).backward()
    assert w.grad.eq(0).all()  # not NaN


@pytest.mark.slow  # numba compiles for ten seconds
def test_group_lasso_is_skglms():
    skglm = pytest.importorskip("skglm.penalties")
    from skglm.utils.data import grp_converter

    w = torch.randn(8, dtype=torch.float64)
    lists = [[4, 0], [2], [6, 1, 5], [3, 7]]
    indices, pointer = grp_converter(lists, 8)
    weights = np.sqrt([len(group) for group in lists])
    plain = skglm.WeightedGroupL2(0.7, weights, pointer, indices)
    sparse = skglm.WeightedL1GroupL2(0.7, weights, np.full(8, 0.5), pointer, indices)
    for theirs, ours in (
        (plain, 0.7 * rs.GroupLasso(lists)),
        (sparse, 0.7 * rs.SparseGroupLasso(l1=0.5, group=1.0, per=lists)),
    ):
        assert abs(theirs.value(w.numpy()) - ours(w)) < 1e-12
        z = ours.prox(w, 0.6).numpy()
        for number, group in enumerate(lists):
            start, stop = pointer[number : number + 2]
            assert (indices[start:stop] == group).all()
            found = theirs.prox_1group(w.numpy()[group], 0.6, number)
            np.testing.assert_allclose(z[group], found, atol=1e-14)


# Solved by a step's proxes


def violation(x, y, w, lists, strength):
    """By how much the conditions of Karush, Kuhn and Tucker fail for ½ mean |x w - y|² + strength · group lasso."""
    slope = x.T @ (x @ w - y) / len(x)
    worst = 0.0
    for group in lists:
        weight, norm = strength * len(group) ** 0.5, np.linalg.norm(w[group])
        if norm:
            worst = max(worst, np.linalg.norm(slope[group] + weight * w[group] / norm))
        else:
            worst = max(worst, np.linalg.norm(slope[group]) - weight)
    left = sorted(set(range(len(w))) - {i for group in lists for i in group})
    return max(worst, np.abs(slope[left]).max(initial=0))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam"])
@pytest.mark.parametrize(
    "lists", [[[4, 0], [2], [6, 1, 5], [8, 9, 10, 11]], [[2 * i, 2 * i + 1] for i in range(6)]], ids=["lists", "pairs"]
)
def test_training_solves_the_group_lasso(kind, lists):
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(60, 12)), np.zeros(12)
    true[[4, 0, 3]] = [2, -1, 1]
    y = x @ true + 0.1 * rng.normal(size=60)
    model = nn.Linear(12, 1, bias=False).double()
    optimizer = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.03, eps=1e-3),
    }[kind](model.parameters())
    per = (1, 2) if lists[0] == [0, 1] else {"in": lists}
    reg = rs.attach(model, 0.2 * rs.GroupLasso(per).on("weight", how="proximal"), optimizer)
    inputs, targets = torch.tensor(x), torch.tensor(y)[:, None]
    for _ in range(1500):
        optimizer.zero_grad()
        reg.loss((model(inputs) - targets).square().mean() / 2).backward()
        optimizer.step()
    w = model.weight.detach().numpy()[0]
    assert violation(x, y, w, lists, 0.2) < 1e-10
    zero = [bool((w[group] == 0).all()) for group in lists]
    assert True in zero
    assert False in zero
    assert violation(x, y, w + 1e-6, lists, 0.2) > 1e-8  # the oracle
