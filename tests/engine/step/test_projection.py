"""Constraints in training: when they hold, several on one tensor, what stays fixed, and the momentum."""

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from layouts import explained
from restrain.engine.step.intersections import nearest
from restrain.errors import HowError, PlanError, RestrainWarning, TransformError


def holder(*shape, seed=0, dtype=torch.float64):
    """A module with one parameter `w`."""
    module = nn.Module()
    w = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    module.register_parameter("w", nn.Parameter(w))
    return explained(module)


def pull(model, optimizer, target=0.7):
    """A step of ½ Σ (w - target)²."""
    model.w.grad = model.w.detach() - target
    optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


EVERY = {
    "Box": rs.Box(-0.2, 0.1),
    "MinMaxNorm": rs.MinMaxNorm(0.5, 0.6),
    "Simplex": rs.Simplex(per="in"),
    "L1Ball": rs.L1Ball(1.0),
    "Orthogonal": rs.Orthogonal(),
    "SpectralBall": rs.SpectralBall(0.5),
    "NuclearBall": rs.NuclearBall(0.5),
    "LowRank": rs.LowRank(1),
    "TopK": rs.TopK(3),
    "TopGroups": rs.TopGroups(2),
    "NM": rs.NM(1, 2),
    "Symmetric": rs.Symmetric(),
    "Fixed": rs.Fixed([True, False, True, False], 0.3),
    "Signs": rs.Signs([1, -1, 0, 1]),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.Adam(m.parameters())], ids=["SGD", "Adam"])
def test_holds_at_attach_and_after_every_step(name, make):
    constraint, model = EVERY[name], holder(4, 4, dtype=torch.float32)
    optimizer = make(model)
    reg = rs.attach(model, constraint.on("w"), optimizer)
    for _ in range(5):
        assert torch.equal(constraint.project(model.w), model.w)
        pull(model, optimizer)
    assert torch.equal(constraint.project(model.w), model.w)
    reg.detach()


def test_every_and_start():
    model, box = holder(4), rs.Box(0, 0.1)
    optimizer, before = sgd(model), model.w.detach().clone()
    reg = rs.attach(model, box.on("w", start=2, every=3), optimizer)
    assert torch.equal(model.w, before)
    assert "attaching moved" not in reg.table()
    held = []
    for _ in range(9):
        pull(model, optimizer)
        held.append(torch.equal(box.project(model.w), model.w))
    assert held == [False, False, True] * 3


@pytest.mark.parametrize("skip", ["rate", "gradient", "scaler"])
def test_not_after_a_step_that_is_none(skip):
    model = holder(4)
    optimizer = sgd(model)
    rs.attach(model, rs.Box(0, 0.1).on("w"), optimizer)
    with torch.no_grad():
        model.w.fill_(5.0)
    if skip == "gradient":
        optimizer.step()
    elif skip == "rate":
        optimizer.param_groups[0]["lr"] = 0.0
        pull(model, optimizer)
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((model.w * torch.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model.w.eq(5).all()


def test_attaching_says_what_it_moved():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.1, 0.0]]))
        model[1].weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.MaxNorm(1.0).on("*", name="short"), optimizer)
    assert "short: attaching moved 1 of 2 tensors, most '0.weight', by 80 % of its length" in reg.table()
    assert "attaching" not in rs.attach(model, rs.MaxNorm(1.0).on("*", name="short"), optimizer).table()


# Several on one tensor


def is_nearest(w, z, project, count=400):
    """Whether (w - z) · (y - z) ≤ 0 for points y of the sets: so it is at the nearest of a convex set only."""
    points = [project(z + torch.randn_like(z) * 10.0 ** (i % 4 - 2)) for i in range(count)]
    return max(float(((w - z) * (y - z)).sum()) for y in points) < 1e-9 * float(w.square().sum())


PAIRS = {
    "a cone and a ball": (rs.NonNegative(), rs.MaxNorm(1.0), lambda y: rs.MaxNorm(1.0).project(y.clamp_min(0))),
    "two bounds": (rs.Box(-1, 0.4), rs.Simplex(per="row"), None),
    "symmetric, in a box": (rs.Symmetric(), rs.Box(-0.3, 0.2), lambda y: (y + y.T).div(2).clamp(-0.3, 0.2)),
    "fixed, and of length one at most": (rs.Fixed([True, False, False, False], 0.3), rs.MaxNorm(1.0), None),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("flip", [False, True])
def test_convex_sets_in_any_order_give_the_nearest_point_of_both(pair, flip):
    first, second, project = PAIRS[pair]
    constraints = [second, first] if flip else [first, second]
    for seed in range(3 if project else 1):
        w = holder(4, 4, seed=seed).w.detach() * 2
        found = nearest(w, constraints)
        z = found.point
        assert found.apart == 0
        assert found.sure
        for constraint in constraints:
            torch.testing.assert_close(constraint.project(z), z, atol=1e-9, rtol=1e-9)
        assert is_nearest(w, z, project or (lambda y: nearest(y, constraints).point), 400 if project else 20)


FAR = [  # from sets that are small against the way, where Dykstra's algorithm alone stalls
    (rs.Box(-0.09, 0.14), rs.L1Ball(0.44, per="out")),
    (rs.MaxNorm(0.04, per="out"), rs.MaxNorm(0.08, per=None), rs.NonNegative()),
    (rs.SpectralBall(0.14), rs.MaxNorm(0.3, per=None)),
    (rs.Fixed([True, False, False, True], 0.0), rs.Symmetric(), rs.L1Ball(0.35, per="out")),
    (rs.Box(-0.04, 0.05), rs.Fixed([True, False, False, True], 0.0)),
    (rs.NonNegative(), rs.L1Ball(0.4), rs.SpectralBall(0.04)),
]


@pytest.mark.parametrize("constraints", FAR, ids=repr)
def test_small_sets_far_away_give_their_nearest_point(constraints):
    w = holder(4, 4).w.detach() * 10
    found = nearest(w, constraints)
    assert found.sure
    for constraint in constraints:
        torch.testing.assert_close(constraint.project(found.point), found.point, atol=1e-9, rtol=1e-9)
        if constraint.separable:
            assert torch.equal(constraint.project(found.point), found.point)
    assert is_nearest(w, found.point, lambda y: nearest(y, constraints).point, 20)


def test_a_point_that_may_not_be_the_nearest_is_said(monkeypatch):
    monkeypatch.setattr("restrain.engine.step.intersections._SPLIT", 50)
    monkeypatch.setattr("restrain.engine.step.intersections._SURE", 0.0)
    monkeypatch.setattr("restrain.engine.step.intersections._tolerance", lambda w: 0.0)
    model = holder(4, 4)
    optimizer = sgd(model)
    plan = [rs.NonNegative().on("w"), rs.SpectralBall(0.7).on("w")]
    reg = rs.attach(model, plan, optimizer)
    assert "perhaps not at the nearest point" in reg.table()
    model.w.grad = 20 * holder(4, 4, seed=1).w.detach()
    with pytest.warns(RestrainWarning, match=r"'w' is in NonNegative.*perhaps not at the nearest point"):
        optimizer.step()
    optimizer.step()  # once is enough
    assert (model.w >= 0).all()


def test_a_step_to_nan_does_not_spread_between_several_sets():
    model = holder(4, 4)
    optimizer = sgd(model)
    rs.attach(model, [rs.NonNegative().on("w"), rs.MaxNorm(0.5, per="out").on("w")], optimizer)
    model.w.grad = torch.zeros(4, 4, dtype=torch.float64)
    model.w.grad[0, 0] = torch.nan
    optimizer.step()
    assert int(model.w.isnan().sum()) == 1


def test_one_after_the_other_would_not_be_nearest():
    w = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    found = nearest(w, [rs.MaxNorm(1.0), rs.NonNegative()]).point
    naive = rs.NonNegative().project(rs.MaxNorm(1.0).project(w))
    assert found.tolist() == [[1.0, 0.0]]
    assert naive[0, 0] == pytest.approx(0.6)
    assert not is_nearest(w, naive, lambda y: rs.MaxNorm(1.0).project(y.clamp_min(0)))


def test_the_simplex_with_an_upper_bound():
    w = holder(40).w.detach()
    z = nearest(w, [rs.Simplex(), rs.Box(high=0.15)]).point
    low, high = -5.0, 5.0
    for _ in range(100):  # for the threshold that gives the sum
        middle = (low + high) / 2
        low, high = (middle, high) if (w - middle).clamp(0, 0.15).sum() > 1 else (low, middle)
    torch.testing.assert_close(z, (w - low).clamp(0, 0.15), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "constraints",
    [
        (rs.TopK(2, per="in"), rs.UnitNorm("in")),
        (rs.UnitNorm(), rs.NonNegative(), rs.NM(1, 2)),
        (rs.LowRank(1), rs.Symmetric()),
        (rs.MinMaxNorm(1, 2, rate=0.5), rs.NonNegative()),
        (rs.Fixed([True, False, False, False], 9.0), rs.TopK(2, per="row")),
    ],
    ids=repr,
)
def test_other_sets_take_turns_until_all_hold(constraints):
    found = nearest(holder(4, 4).w.detach(), constraints)
    z, apart = found.point, found.apart
    assert apart == 0
    for constraint in constraints:
        torch.testing.assert_close(constraint.project(z), z, atol=1e-9, rtol=1e-9)


def test_in_training_both_hold():
    model = holder(4, 4, dtype=torch.float16)
    optimizer = sgd(model)
    rs.attach(model, [rs.MaxNorm(1.0).on("w"), rs.NonNegative().on("w")], optimizer)
    for _ in range(5):
        assert (model.w >= 0).all()
        assert (model.w.double().norm(dim=1) <= 1.001).all()
        pull(model, optimizer, 3.0)


@pytest.mark.parametrize("pair", [(rs.Box(1, 2), rs.Signs(-1)), (rs.Box(2, 3), rs.UnitNorm())], ids=["convex", "not"])
def test_sets_without_a_common_point(pair):
    model = holder(3, 3)
    optimizer = sgd(model)
    rules = [constraint.on("w") for constraint in pair]
    with pytest.raises(HowError, match=r"no value of 'w' satisfies these together.*Box\("):
        rs.attach(model, rules, optimizer)
    assert not optimizer._optimizer_step_post_hooks
    rs.attach(model, [constraint.on("w", start=1) for constraint in pair], optimizer)
    pull(model, optimizer)
    with pytest.warns(RestrainWarning, match="no value of 'w'"):
        pull(model, optimizer)


# Fixed entries


def test_fixed_entries_keep_the_values_of_the_beginning(tmp_path):
    model = holder(3, 4)
    optimizer = sgd(model, momentum=0.9)
    before = model.w.detach().clone()
    reg = rs.attach(model, rs.Fixed(lambda w: w > 0).on("w"), optimizer)
    for _ in range(5):
        pull(model, optimizer)
    fixed = before > 0
    assert torch.equal(model.w[fixed], before[fixed])
    assert (model.w[~fixed] != before[~fixed]).all()
    with pytest.raises(PlanError, match="it holds a function"):
        reg.plan.to_dict()
    torch.save([model.state_dict(), reg.state_dict()], tmp_path / "state")

    other = holder(3, 4, seed=1)
    again = rs.attach(other, rs.Fixed(lambda w: w > 0).on("w"), optimizer_of_other := sgd(other))
    weights, kept = torch.load(tmp_path / "state")
    other.load_state_dict(weights)
    again.load_state_dict(kept)
    pull(other, optimizer_of_other)
    assert torch.equal(other.w[fixed], before[fixed])


def test_fixed_zeros_of_a_pruned_layer():
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    reg = rs.attach(layer, rs.Fixed(layer.weight == 0).on("weight"), optimizer := torch.optim.Adam(layer.parameters()))
    layer(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert layer.weight[:, ::2].eq(0).all()
    assert layer.weight[:, 1::2].ne(0).all()
    reg.detach()
    layer.double()
    layer(torch.randn(8, 6).double()).square().sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rs.attach(layer, rs.Fixed(layer.weight == 0).on("weight"), optimizer)
    optimizer.step()
    assert layer.weight[:, ::2].eq(0).all()


def test_patterns_must_fit_at_attach():
    model = holder(3, 4)
    for constraint in (rs.Fixed([True, False]), rs.Fixed(True, [1.0, 2.0]), rs.Signs([1, 0])):
        with pytest.raises(TransformError, match=r"doesn't fit a tensor of shape \(3, 4\)"):
            rs.attach(model, constraint.on("w"), sgd(model))
    with pytest.raises(TransformError, match="square"):
        rs.attach(model, rs.Symmetric().on("w"), sgd(model))


def test_large_patterns_are_short_in_tables():
    mask = rs.Fixed(torch.ones(30, 40, dtype=torch.bool))
    assert repr(mask) == "Fixed(<30 × 40>)"
    assert mask == rs.Fixed(torch.ones(30, 40, dtype=torch.bool)) != rs.Fixed(torch.zeros(30, 40, dtype=torch.bool))
    assert len({mask, rs.Fixed(np.ones((30, 40), dtype=bool))}) == 1


# Plans


@pytest.mark.parametrize(
    "constraint",
    [
        *EVERY.values(),
        rs.MinMaxNorm(0.0, 2.0, rate=0.5, per="in"),
        rs.Orthogonal(rows=(0, 2)),
        rs.TopK(0.1, per="out"),
        rs.Simplex(2.0),
    ],
    ids=repr,
)
def test_plans_with_constraints(constraint, tmp_path):
    momentum = "tangent" if constraint.has_tangent else "keep"
    plan = rs.Plan.of([constraint.on("*.weight", momentum=momentum)])
    for ending in ("yaml", "json", "toml"):
        plan.save(tmp_path / f"plan.{ending}")
        assert rs.Plan.load(tmp_path / f"plan.{ending}") == plan
    assert ("momentum='tangent'" in repr(plan.rules[0])) == constraint.has_tangent


# Momentum


def test_momentum_in_the_tangent_of_the_nonnegative_numbers():
    model, w = holder(6), holder(6).w.detach().numpy().clip(0)
    optimizer, average = sgd(model, momentum=0.9), 0.0
    rs.attach(model, rs.NonNegative().on("w", momentum="tangent"), optimizer)
    for step in range(12):
        target = -1.0 if step < 6 else 1.0
        pull(model, optimizer, target)
        average = 0.9 * average + (w - target)
        w = np.maximum(w - 0.1 * average, 0)
        average = np.where(w <= 0, np.minimum(average, 0), average)
        np.testing.assert_allclose(model.w.detach().numpy(), w, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[model.w]["momentum_buffer"].numpy(), average, atol=1e-12)
    assert (w > 0).all()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    **{
        name: lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01)
        for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
    },
}


@pytest.mark.parametrize("momentum", ["keep", "tangent"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_of_unit_vectors_is_across_them(name, momentum):
    model = holder(3, 4)
    optimizer = OPTIMIZERS[name](model.parameters())
    rs.attach(model, rs.UnitNorm().on("w", momentum=momentum), optimizer)
    for _ in range(3):
        pull(model, optimizer)
    state = optimizer.state[model.w]
    average = state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]
    along = (average * model.w.detach()).sum(1).abs()
    assert average.abs().sum() > 1e-3
    assert (along < 1e-14).all() == (momentum == "tangent")


def test_momentum_of_fixed_entries_is_nothing():
    model = holder(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    rules = [rs.Fixed([[True, False]]).on("w", momentum="tangent"), rs.Box(-9, 9).on("w", momentum="tangent")]
    rs.attach(model, rules, optimizer)
    pull(model, optimizer, 3.0)
    assert (optimizer.state[model.w]["exp_avg"] == 0).tolist() == [[True, False]] * 2


def test_momentum_that_cannot_be():
    for rule in (
        lambda: rs.Simplex().on("w", momentum="tangent"),
        lambda: rs.L1().on("w", momentum="tangent"),
        lambda: rs.Dropout(0.1).on(rs.outputs("w"), momentum="tangent"),
    ):
        with pytest.raises(PlanError, match="momentum='tangent' goes with"):
            rule()
    with pytest.raises(PlanError, match="'keep' or 'tangent'"):
        rs.UnitNorm().on("w", momentum="drop")
    model = holder(2, 2)
    for optimizer in (sgd(model), torch.optim.Rprop(model.parameters()), torch.optim.Adagrad(model.parameters())):
        with pytest.warns(RestrainWarning, match="keeps none as it is set"):
            rs.attach(model, rs.UnitNorm().on("w", momentum="tangent"), optimizer).detach()
