"""Groups by blocks and by lists of indices: each group is judged as a tensor of its own."""

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.axes import Grouping, checked, group_norms, grouping
from restrain.errors import PenaltyError
from restrain.named_tensors import Location

LISTS = [[4, 0], [2], [6, 1, 5]]  # 3 and 7 are in no group
GROUPS = {  # per= for a tensor of shape (8, 6), with a list of index tuples for each group
    "lists": (LISTS, [(group,) for group in LISTS]),
    "lists of columns": ({"in": [[0, 5], [3]]}, [(slice(None), [0, 5]), (slice(None), [3])]),
    "lists of a dim": ((-1, [[1], [0, 2, 4]]), [(slice(None), [1]), (slice(None), [0, 2, 4])]),
    "blocks": (
        (4, 2),
        [(slice(i, i + 4), slice(j, j + 2)) for i in (0, 4) for j in (0, 2, 4)],
    ),
    "blocks of rows": ((2,), [(slice(i, i + 2),) for i in (0, 2, 4, 6)]),
}
MEMBERS = {
    "lasso": rs.GroupLasso,
    "linf": rs.GroupLInf,
    "exclusive": rs.ExclusiveLasso,
    "sparse": lambda per: rs.SparseGroupLasso(0.1, 0.3, per),
}
each_groups = pytest.mark.parametrize("groups", GROUPS)
each_member = pytest.mark.parametrize("member", MEMBERS)


def one_by_one(penalty, members, w, what):
    """What is done to each group alone, as a tensor of one row; entries in no group stay."""
    result = w.clone()
    for index in members:
        result[index] = what(penalty, w[index].reshape(1, -1), index).reshape(w[index].shape)
    return result


@each_groups
@each_member
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_groups_are_as_tensors_of_their_own(member, groups, dtype):
    per, members = GROUPS[groups]
    penalty, alone = MEMBERS[member](per), MEMBERS[member](0)
    w = torch.randn(8, 6, dtype=dtype)
    w[members[0]] = 0
    parts = [w[index].reshape(1, -1) for index in members]
    left = w.clone()
    for index in members:
        left[index] = 0
    outside = 0.1 * left.abs().sum() if member == "sparse" else 0  # L1 counts all entries
    torch.testing.assert_close(penalty(w), sum(alone(part) for part in parts) + outside)
    slope = one_by_one(alone, members, w * 0, lambda p, x, i: p.gradient(w[i].reshape(1, -1)))
    slope = slope + 0.1 * left.sgn() if member == "sparse" else slope
    torch.testing.assert_close(penalty.gradient(w), slope)
    torch.testing.assert_close(torch.autograd.grad(penalty(x := w.clone().requires_grad_()), x)[0], slope)
    steps = 10 ** (-2 * torch.rand(8, 6, dtype=torch.float64))
    for step, of in ((0.3, lambda i: 0.3), (steps, lambda i: steps[i].reshape(1, -1))):
        start = rs.L1().prox(w, 0.1 * step) if member == "sparse" else w
        kind = 0.3 * rs.GroupLasso(0) if member == "sparse" else alone
        expected = one_by_one(kind, members, start, lambda p, x, i, of=of: p.prox(x, of(i)))
        torch.testing.assert_close(penalty.prox(w, step), expected)


@each_groups
def test_constraints_of_groups(groups):
    per, members = GROUPS[groups]
    w = torch.randn(8, 6)
    w[members[0]] = 0
    for constraint, alone in ((rs.MaxNorm(1.3, per), rs.MaxNorm(1.3, 0)), (rs.UnitNorm(per), rs.UnitNorm(0))):
        z = constraint.project(w)
        torch.testing.assert_close(z, one_by_one(alone, members, w, lambda p, x, i: p.project(x)))
        assert torch.equal(constraint.project(z), z)


def test_the_oracle_notices_wrong_groups():
    w = torch.randn(8, 6)
    expected = one_by_one(rs.GroupLasso(0), GROUPS["lists"][1], w, lambda p, x, i: p.prox(x, 0.3))
    assert not torch.allclose(rs.GroupLasso([[4, 0], [2], [6, 1, 7]]).prox(w, 0.3), expected)


def test_entries_in_no_group_stay_even_where_they_are_nan():
    w = torch.randn(8, 3)
    w[3] = torch.nan
    w[7] = -0.0
    for penalty in (rs.GroupLasso(LISTS), rs.GroupLInf(LISTS), rs.ExclusiveLasso(LISTS)):
        assert penalty(w).isfinite()
        for z in (penalty.prox(w, 0.3), penalty.prox(w, torch.rand(8, 3)), rs.MaxNorm(0.1, LISTS).project(w)):
            assert z[3].isnan().all()
            assert z[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
        assert penalty.gradient(w)[[3, 7]].eq(0).all()


def test_half_types():
    w = torch.randn(8, 6, dtype=torch.bfloat16)
    for per in (LISTS, (4, 2)):
        for penalty in (rs.GroupLasso(per), rs.GroupLInf(per), rs.ExclusiveLasso(per)):
            z = penalty.prox(w, 0.2)
            assert torch.equal(z, penalty.prox(w.float(), 0.2).bfloat16())


def test_compiled():
    torch._dynamo.reset()

    def everything(w):
        return [rs.GroupLasso(LISTS)(w), rs.GroupLasso(LISTS).prox(w, 0.2), rs.GroupLInf(LISTS)(w)] + [
            constraint.project(w) for constraint in (rs.UnitNorm(LISTS), rs.MaxNorm(1.0, (4, 2)))
        ]

    w = torch.randn(8, 6)
    torch.testing.assert_close(torch.compile(everything, fullgraph=True, backend="aot_eager")(w), everything(w))
    torch._dynamo.reset()


# What per= may be


@pytest.mark.parametrize(
    ("per", "kept"),
    [
        ([[0, 1], [2]], ((0, 1), (2,))),
        ({"in": [[0], [1, 2]]}, ("in", ((0,), (1, 2)))),
        (["in", [[0], [1, 2]]], ("in", ((0,), (1, 2)))),  # as a file holds it
        ((1, [(0,)]), (1, ((0,),))),
        ([4, 2], (4, 2)),
        (np.array_split(np.arange(5), 2), ((0, 1, 2), (3, 4))),
        (np.int64(1), 1),
        ([range(3)], ((0, 1, 2),)),
    ],
    ids=str,
)
def test_what_is_given_is_kept_as_tuples(per, kept):
    for member in (rs.GroupLasso(per), rs.ExclusiveLasso(per), rs.SparseGroupLasso(1, 1, per), rs.MaxNorm(1.0, per)):
        assert member.per == kept
        assert type(member.per) is type(kept)
        assert hash(member) == hash(type(member)(**{**vars(member), "per": kept}))
        assert eval(repr(member), vars(rs)) == member
    assert checked(kept) == kept


@pytest.mark.parametrize(
    ("per", "told"),
    [
        ([[0, 1], [1, 2]], "index 1 twice, and groups can't overlap"),
        ([[0, 0]], "index 0 twice"),
        ([[0], []], "none of them empty"),
        ([[0], [-1]], "whole numbers from 0"),
        ([[0], [1.0]], "whole numbers from 0"),
        ([[0], [True]], "whole numbers from 0"),
        ([[0, 1], 2], "block sizes"),
        ([], "block sizes"),
        ((4, 0), "block sizes"),
        ((4, -1), "block sizes"),
        ({}, "block sizes"),
        ({"rows": [[0]]}, "'row', 'column'"),
        ({"in": [[0]], "out": [[0]]}, "lists of indices"),
        ("4,4", "got '4,4'"),
        (True, "got True"),
    ],
    ids=str,
)
def test_refuses(per, told):
    for member in (rs.GroupLasso, rs.GroupLInf, rs.UnitNorm):
        with pytest.raises(PenaltyError, match=told):
            member(per)


def test_none_is_the_whole_tensor_of_constraints_alone():
    with pytest.raises(PenaltyError, match="got None"):
        rs.GroupLasso(None)
    w = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    for member in (rs.MaxNorm(1.0, per=None), rs.UnitNorm(per=None), rs.MinMaxNorm(0.5, 1.0, per=None)):
        torch.testing.assert_close(member.project(w), w / 5)


@pytest.mark.parametrize(
    ("per", "shape", "told"),
    [
        ((4, 4), (8, 6), r"shape \(8, 6\), as 4 doesn't divide 6"),
        ((2, 2, 2), (8, 6), "3 dims"),
        ([[0, 8]], (8, 6), "the index 8 of dim 0, which has 8"),
        ({"in": [[6]]}, (8, 6), "the index 6 of 'in', which has 6"),
        ((2, [[0]]), (8, 6), "per=2"),
        ({"in": [[0]]}, (8,), "two axes"),
        ([[0]], (), "per=0"),
    ],
    ids=str,
)
def test_refuses_tensors_that_groups_do_not_fit(per, shape, told):
    with pytest.raises(PenaltyError, match=told):
        rs.GroupLasso(per)(torch.ones(shape))
    with pytest.raises(PenaltyError, match=told):
        rs.MaxNorm(1.0, per).project(torch.ones(shape))


def test_lists_know_the_layout_of_layers():
    lists = {"in": [[0, 3], [1]]}
    for layer in (nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(4, 6)):
        bound = rs.GroupLasso(lists).bound_to(Location(layer.weight, owner=layer, attribute="weight"))
        x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
        assert isinstance(bound.per, Grouping)
        with torch.no_grad():
            layer.bias.zero_()
            layer.weight.copy_(bound.prox(layer.weight, 1e3))  # inputs 0, 3 and 1 are off
        assert torch.equal(layer(x), layer(x.index_fill(1, torch.tensor([0, 1, 3]), 0)))
        assert layer(x).any()


def test_sizes_and_norms_are_those_of_the_groups():
    groups = grouping(LISTS, (8, 6))
    norms = group_norms(torch.ones(8, 6), groups)
    assert groups.sizes(norms).flatten().tolist() == [12, 18, 6, 1, 12, 18, 18, 1]
    assert groups.once(norms).flatten().square().round().tolist() == [12, 6, 18]
    assert groups.once(groups.max(torch.arange(48.0).view(8, 6))).flatten().tolist() == [29, 17, 41]
    with pytest.raises(PenaltyError, match="give per= by name"):
        rs.axes.group_size(groups)


def test_plans_keep_groups(tmp_path):
    plan = rs.Plan.of(
        [
            1e-3 * rs.GroupLasso({"in": [[0, 1], [2]]}).on("fc*"),
            rs.MaxNorm(2.0, per=(4, 4)).on(rs.weights),
            (0.1 * rs.ExclusiveLasso([[0, 1], [2]]) + rs.SLOPE((2.0, 1.0)) + rs.FusedLasso(0.1, 0.2, "in")).on("*"),
            (0.1 * rs.SLOPE(q=0.1) + rs.TotalVariation(0)).on("*"),
        ]
    )
    for suffix in ("json", "yaml", "toml"):
        path = tmp_path / f"plan.{suffix}"
        plan.save(path)
        assert rs.Plan.load(path).rules == plan.rules
    assert plan.to_dict()["rules"][0]["what"]["per"] == ["in", [[0, 1], [2]]]
    by_hand = {"what": {"name": "group_lasso", "per": {"in": [[0, 1], [2]]}}, "strength": "1e-3", "on": "fc*"}
    assert rs.Plan.of(by_hand).rules == plan.rules[:1]


# On outputs


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(
    ("per", "shape", "batch"),
    [(1, (4, 3, 5), 0), ((1, [[2, 0], [1]]), (4, 3, 5), 0), ((0, [[2, 0]]), (3, 4, 5), 1), ((1, 2), (4, 6), 0)],
    ids=str,
)
def test_groups_of_each_sample(member, per, shape, batch):
    h = torch.randn(shape, dtype=torch.float64)
    penalty = MEMBERS[member](per)
    expected = torch.stack([penalty(x.unsqueeze(batch)) for x in h.unbind(batch)]).mean()
    torch.testing.assert_close(penalty.over_batch(h, batch), expected)
    value = penalty.over_batch(torch.zeros([0 if d == batch else n for d, n in enumerate(shape)]), batch)
    assert value == 0


@pytest.mark.parametrize(
    ("per", "told"),
    [
        ((0, [[0, 1]]), "dim 0 is the batch axis"),
        ((2, 2), "needs a 1 at the batch axis"),
        ([[0, 1]], r"per=\(1, \[\[0, 1\]"),
        ({"in": [[0, 1]]}, "dim of the output"),
    ],
    ids=str,
)
def test_refuses_groups_across_samples(per, told):
    with pytest.raises(PenaltyError, match=told):
        rs.GroupLInf(per).over_batch(torch.ones(4, 2))


def test_competing_features_at_a_place():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    reg = rs.attach(model, 0.1 * rs.ExclusiveLasso((1, [[0, 1], [2, 3]])).on(rs.outputs("1")))
    h = model(torch.randn(5, 3))
    expected = 0.1 * (h[:, :2].abs().sum(1).square() + h[:, 2:].abs().sum(1).square()).mean()
    torch.testing.assert_close(reg.loss(torch.zeros(())), expected)
