"""Constraints whose k moves: the right fraction at each step, by one clock, saved, written and refused."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import TransformError

s = rs.schedules
CUBIC = s.Cubic(1.0, 0.2, steps=6)
WANTED = torch.tensor(np.random.default_rng(0).normal(size=(4, 5)))


def holder(optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False).double()
    return layer, optimizer(layer.parameters(), **({"lr": 0.3} | options))


def pull(layer, optimizer, times=1):
    optimizer.zero_grad()
    for _ in range(times):
        (0.5 * (layer.weight - WANTED).square().sum() / times).backward()
    optimizer.step()


def kept_of(fraction, n):
    return max(math.floor(fraction * n + 0.5), 1)


def entries(w, fraction):
    """The largest entries, sorted; the first of equal ones."""
    order = np.argsort(-np.abs(w).ravel(), kind="stable")[: kept_of(fraction, w.size)]
    z = np.zeros(w.size)
    z[order] = w.ravel()[order]
    return z.reshape(w.shape)


def rows(w, fraction):
    order = np.argsort(-(w**2).sum(1), kind="stable")[: kept_of(fraction, len(w))]
    z = np.zeros_like(w)
    z[order] = w[order]
    return z


def columns(w, fraction):
    return rows(w.T, fraction).T


KINDS = {"entries": (rs.TopK, {}, entries), "rows": (rs.TopGroups, {"per": "out"}, rows)}
KINDS["columns"] = (rs.TopGroups, {"per": "in"}, columns)


def by_hand(keep, schedule, steps, w):
    """Projected gradient descent in NumPy; the step t projects to the fraction at t."""
    w = keep(w, schedule.at(0))
    found = []
    for step in range(steps):
        w = keep(w - 0.3 * (w - WANTED.numpy()), schedule.at(step))
        found.append(w)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_keeps_the_fraction_of_its_time(kind):
    make, options, keep = KINDS[kind]
    layer, optimizer = holder()
    start = layer.weight.detach().numpy().copy()
    rs.attach(layer, make(CUBIC, **options).on("weight"), optimizer)
    expected = by_hand(keep, CUBIC, 9, start)
    for right in expected:
        pull(layer, optimizer)
        np.testing.assert_allclose(layer.weight.detach().numpy(), right, rtol=0, atol=1e-12)
    # the test of the test: another schedule is seen
    other = by_hand(keep, s.Linear(1.0, 0.2, steps=6), 9, start)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(expected, other, strict=True))


def test_the_fraction_removed_is_that_of_zhu_and_gupta():
    first, last, begin, length = 0.1, 0.85, 7, 40
    schedule = s.Cubic(1 - first, 1 - last, steps=length, begin=begin)
    for t in range(begin, begin + length + 1):
        removed = last + (first - last) * (1 - (t - begin) / length) ** 3
        assert 1 - schedule.at(t) == pytest.approx(removed, abs=1e-14)


def test_schedules_multiply():
    layer, optimizer = holder()
    rs.attach(layer, rs.TopK(0.5 * CUBIC).on("weight"), optimizer)
    assert layer.weight.count_nonzero() == 10


def test_accumulated_backwards_are_one_step():
    counts = []
    for times in (1, 4):
        layer, optimizer = holder()
        rs.attach(layer, rs.TopK(CUBIC).on("weight"), optimizer)
        for _ in range(4):
            pull(layer, optimizer, times)
        counts.append(int(layer.weight.count_nonzero()))
    assert counts == [kept_of(CUBIC.at(3), 20)] * 2


def test_a_skipped_step_is_none():
    layer, optimizer = holder()
    reg = rs.attach(layer, rs.TopK(CUBIC, per=None).on("weight", name="k"), optimizer)
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = 0.0
        pull(layer, optimizer)
        assert reg.strengths() == {"k": 1.0}
        optimizer.param_groups[0]["lr"] = 0.3
    pull(layer, optimizer)
    assert reg.strengths() == {"k": pytest.approx(CUBIC.at(1))}


def test_epochs_count_where_the_unit_says_so():
    layer, optimizer = holder()
    reg = rs.attach(layer, rs.TopGroups(s.Linear(1.0, 0.25, steps=3, unit="epoch")).on("weight"), optimizer)
    found = []
    for _ in range(4):
        pull(layer, optimizer)
        pull(layer, optimizer)
        found.append(int(layer.weight.any(1).sum()))
        reg.next_epoch()
    assert found == [4, 3, 2, 1]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("compile", [True, False])
def test_a_saved_state_goes_on(make, compile):
    def attached():
        layer, optimizer = holder(make, lr=0.1)
        plan = [rs.TopK(CUBIC).on("weight", name="k"), 1e-3 * rs.L2().on("weight", how="decoupled")]
        return layer, optimizer, rs.attach(layer, plan, optimizer, compile=compile)

    layer, optimizer, reg = attached()
    for _ in range(3):
        pull(layer, optimizer)
    states = copy.deepcopy([layer.state_dict(), optimizer.state_dict(), reg.state_dict()])
    for _ in range(3):
        pull(layer, optimizer)
    again, second, other = attached()
    again.load_state_dict(states[0]), second.load_state_dict(states[1]), other.load_state_dict(states[2])
    assert other.strengths() == {"k": pytest.approx(CUBIC.at(3))}
    for _ in range(3):
        pull(again, second)
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("rule", [rs.TopK(CUBIC), rs.TopGroups(0.5 * CUBIC, per="in")], ids=repr)
def test_it_is_copied_pickled_compared_and_written(rule):
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule != type(rule)(0.5)
    assert hash(copy.deepcopy(rule)) == hash(rule)
    assert eval(repr(rule), {**vars(rs), "TopK": rs.TopK}) == rule
    plan = rs.Plan.of(rule.on("weight"))
    assert rs.Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()
    assert rs.Plan.from_dict(plan.to_dict()).rules[0].what == rule
    layer, optimizer = holder()
    reg = rs.attach(layer, plan, optimizer)
    assert reg.plan.rules[0].what == rule
    assert "its setting" in str(reg)


def test_a_plan_file_has_schedules(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "rules:\n  - {what: {name: top_groups, k: {cubic: {start: 1.0, end: 1e-1, steps: 100}}}, on: weight}\n"
    )
    assert rs.Plan.load(path).rules[0].what == rs.TopGroups(s.Cubic(1.0, 0.1, steps=100))


def test_a_function_of_the_step_is_checked_when_it_is_used():
    layer, optimizer = holder()
    rs.attach(layer, rs.TopK(s.Function(lambda step: 0.5 - 0.25 * step)).on("weight"), optimizer)
    pull(layer, optimizer)
    pull(layer, optimizer)
    with pytest.raises(TransformError, match="gives the fraction 0 at this step; it has to be above 0, up to 1"):
        pull(layer, optimizer)


def test_a_removed_weight_comes_back_if_it_grows():
    layer, optimizer = holder()
    with torch.no_grad():
        layer.weight.copy_(WANTED.flip(0))
    rs.attach(layer, rs.TopK(s.Linear(0.5, 0.25, steps=2)).on("weight"), optimizer)
    at_start = layer.weight.detach() != 0
    for _ in range(200):
        pull(layer, optimizer)
    came_back = (layer.weight != 0) & ~at_start
    assert came_back.any()
    assert layer.weight.count_nonzero() == 5


def test_parametrised_it_follows_without_a_new_graph():
    layer, optimizer = holder(lr=1e-3)
    torch._dynamo.reset()
    rs.attach(layer, rs.TopK(CUBIC).on("weight", how="parametrize"), optimizer)
    call = torch.compile(layer, backend="eager", fullgraph=True)
    for step in range(8):
        optimizer.zero_grad()
        call(torch.eye(5).double()).square().sum().backward()
        assert layer.weight.count_nonzero() == kept_of(CUBIC.at(step), 20)
        optimizer.step()


def test_a_keyword_of_the_models():
    x = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")
    net = rs.Regressor(hidden=(8,), top_k=s.Cubic(1.0, 0.25, steps=4), epochs=6, batch_size=20, random_state=0)
    net.fit(x, x[:, 0])
    assert [int(p.count_nonzero()) for p in net.module_.parameters() if p.dim() > 1] == [10, 2]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: rs.TopK(rs.Target(zeros=0.9)), "a target adjusts the strength of a penalty"),
        (lambda: rs.TopK(CUBIC * rs.Target(zeros=0.9)), "a target adjusts the strength of a penalty"),
        (lambda: rs.TopK(s.LearningRate()), "a schedule of the step; a target adjusts .* and so does LearningRate"),
        (lambda: rs.TopK(s.Linear(1.0, 0.0, steps=5)), r"above 0 and up to 1 at each step; .* goes from 0 to 1"),
        (lambda: rs.TopGroups(s.Linear(20, 5, steps=5)), r"goes from 5 to 20. A number of entries is written as"),
        (lambda: rs.TopGroups(2 * CUBIC), "goes from 0.4 to 2"),
        (lambda: rs.TopGroups(s.WarmUp(5)), "goes from 0 to 1"),
        (lambda: rs.TopGroups(s.Steps([0.5, 0], [3])), "goes from 0 to 0.5"),
        (lambda: rs.TopGroups(1.0), "a whole number, one or more, a fraction between 0 and 1, or a schedule"),
        (lambda: rs.TopGroups(0), "a whole number, one or more"),
        (lambda: rs.TopK(2, budget="both"), "budget= is 'each' or 'all', got 'both'"),
        (lambda: rs.TopK(2, per="out", budget="all"), r"takes no per=; got per='out'.*rs.TopGroups\(k, per"),
        (lambda: rs.TopK(CUBIC).project(WANTED), r"attach a rule with it, or .* rs.TopK\(schedule.at\(100\)\)"),
    ],
)
def test_refusals(make, told):
    with pytest.raises(TransformError, match=told):
        make()


# Groups


def lists_of(w, lists, k):
    """Groups of rows, by brute force over all choices of k of them: the nearest result."""
    from itertools import combinations

    free = [i for i in range(len(w)) if all(i not in own for own in lists)]
    best = None
    for chosen in combinations(lists, min(k, len(lists))):
        z = np.zeros_like(w)
        z[[*free, *[i for own in chosen for i in own]]] = w[[*free, *[i for own in chosen for i in own]]]
        if best is None or ((z - w) ** 2).sum() < ((best - w) ** 2).sum():
            best = z
    return best


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("lists", [[[0, 2], [1], [3, 4, 6]], [[5], [0, 1, 2]]], ids=str)
def test_groups_of_different_sizes_and_entries_in_no_group(lists, k):
    w = np.random.default_rng(k).normal(size=(7, 3))
    found = rs.TopGroups(k, per=lists).project(torch.tensor(w)).numpy()
    np.testing.assert_array_equal(found, lists_of(w, lists, k))
    by_column = rs.TopGroups(k, per=("in", lists)).project(torch.tensor(w.T.copy())).numpy()
    np.testing.assert_array_equal(by_column, lists_of(w, lists, k).T)


def test_blocks_experts_and_ties():
    w = torch.arange(16.0).reshape(4, 4)
    assert rs.TopGroups(1, per=(2, 2)).project(w)[:2].count_nonzero() == 0
    assert rs.TopGroups(1, per="row").project(torch.ones(3, 2)).tolist() == [[1, 1], [0, 0], [0, 0]]
    model = nn.ParameterDict({"experts": nn.Parameter(torch.randn(3, 4, 2).double())})
    rs.layout("experts", "expert out in")
    rs.attach(model, rs.TopGroups(2, per="expert").on("experts"), torch.optim.SGD(model.parameters(), 0.1))
    assert model["experts"].flatten(1).any(1).sum() == 2


def test_nan_does_not_spread_and_is_kept():
    w = torch.tensor([[1.0, float("nan")], [2.0, 0.0], [3.0, 0.0]])
    found = rs.TopGroups(1, per="row").project(w)
    assert found[0, 0] == 1
    assert found[0, 1].isnan()
    assert not found[1].any()
