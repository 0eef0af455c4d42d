"""Schedules: their values, their algebra, and that attached rules follow them."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

import restrain as rs
from restrain.errors import PenaltyError, PlanError, TransformError

s = rs.schedules


def halving(step):
    return 0.5**step


EDGES = [  # schedule, {step: value}
    (s.Linear(0, 1e-3, steps=4), {0: 0, 1: 2.5e-4, 3: 7.5e-4, 4: 1e-3, 5: 1e-3, 10**9: 1e-3}),
    (s.Linear(0.3, 0.1, steps=2, begin=3), {0: 0.3, 3: 0.3, 4: 0.2, 5: 0.1, 6: 0.1}),
    (s.Cosine(1.0, 0.2, steps=4), {0: 1.0, 1: 0.2 + 0.4 * (1 + 0.5**0.5), 2: 0.6, 4: 0.2, 9: 0.2}),
    (s.Exponential(1e-4, 1e-2, steps=4), {0: 1e-4, 1: 10**-3.5, 2: 1e-3, 4: 1e-2, 5: 1e-2}),
    (s.Cubic(1.0, 0.2, steps=4), {0: 1.0, 1: 0.2 + 0.8 * 0.75**3, 2: 0.3, 4: 0.2, 9: 0.2}),
    (s.WarmUp(4), {0: 0, 1: 0.25, 4: 1, 9: 1}),
    (s.Steps([0.3, 0.2, 0.1], milestones=[2, 5]), {0: 0.3, 1: 0.3, 2: 0.2, 4: 0.2, 5: 0.1, 99: 0.1}),
    (s.Function(halving), {0: 1, 3: 0.125}),
    (2 * s.WarmUp(4) * s.Linear(1, 0, steps=8), {0: 0, 2: 0.75, 8: 0}),
    (s.Linear(0, 1, steps=1), {0: 0, 1: 1}),
]


@pytest.mark.parametrize(("schedule", "expected"), EDGES, ids=repr)
def test_values_at_the_edges(schedule, expected):
    for step, value in expected.items():
        assert schedule.at(step) == pytest.approx(value, rel=1e-14, abs=0)


def test_epochs_count_where_the_unit_says_so():
    schedule = s.WarmUp(2, unit="epoch") * s.Linear(0, 1, steps=10)
    assert schedule.at(5, 1) == 0.25
    assert schedule.at(5, 7) == 0.5


strengths = st.floats(1e-6, 1e6)


@given(
    st.sampled_from([s.Linear, s.Cosine, s.Exponential, s.Cubic]),
    strengths,
    strengths,
    st.integers(1, 1000),
    st.integers(0, 9),
    st.integers(0, 2000),
)
def test_ramps_are_monotone_and_stay_between_their_ends(kind, start, end, steps, begin, t):
    schedule = kind(start, end, steps=steps, begin=begin)
    a, b = schedule.at(t), schedule.at(t + 1)
    low, high = min(start, end), max(start, end)
    assert low * (1 - 1e-12) <= min(a, b) <= max(a, b) <= high * (1 + 1e-12)
    assert (b - a) * (end - start) >= -1e-12 * high * high
    assert schedule.at(begin) == start
    assert schedule.at(begin + steps) == end


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: s.Linear(-1, 1, steps=3), "start= is a finite number, zero or more; got -1"),
        (lambda: s.Linear(0, float("inf"), steps=3), "end="),
        (lambda: s.Linear(0, True, steps=3), "end="),
        (lambda: s.Cosine(0, 1, steps=0), "steps= is a whole number, at least 1; got 0"),
        (lambda: s.Cosine(0, 1, steps=1.5), "steps="),
        (lambda: s.Exponential(0, 1, steps=3), "above zero"),
        (lambda: s.WarmUp(3, unit="batch"), "unit= is 'step' or 'epoch'"),
        (lambda: s.Steps([1, 2], milestones=[5, 6]), "one more"),
        (lambda: s.Steps([1, 2, 3], milestones=[6, 6]), "growing"),
        (lambda: s.Steps(1, milestones=[6]), "values= of Steps is a list"),
        (lambda: s.Function(3), "takes a function"),
        (lambda: -1 * s.WarmUp(3), "a strength is a finite number"),
        (
            lambda: rs.ElasticNet(s.WarmUp(3), 0.1),
            r"it multiplies a penalty, as in schedules.WarmUp\(steps=3\) \* rs.L1",
        ),
        (lambda: (s.WarmUp(3) * rs.L1())(torch.ones(2)), "attach a rule"),
        (lambda: (s.WarmUp(3) * rs.L1()).prox(torch.ones(2)), "attach a rule"),
        (lambda: (rs.L2() + s.WarmUp(3) * rs.L1()).gradient(torch.ones(2)), "attach a rule"),
    ],
)
def test_what_cannot_be(make, words):
    with pytest.raises(PenaltyError, match=words):
        make()


def test_a_transform_has_no_strength():
    with pytest.raises(TransformError, match="no strength"):
        s.WarmUp(3) * rs.Dropout(0.1)


SCALED = [
    s.Linear(0, 1e-3, steps=5, unit="epoch") * rs.L1(),
    1e-3 * s.WarmUp(500) * rs.L1(),
    s.WarmUp(500) * (1e-3 * s.Cosine(1, 0, steps=9)) * rs.L1() + 0.1 * rs.L2(),
    s.Steps([1, 0], milestones=[3]) * (rs.L1() + 0.1 * rs.GroupLasso()),
    rs.Target(zeros=0.9, start=1e-3) * rs.L1(),
]


@pytest.mark.parametrize("penalty", SCALED, ids=repr)
def test_copied_pickled_printed_and_written(penalty):
    rule = penalty.on("*.weight")
    for twin in (
        copy.deepcopy(penalty),
        pickle.loads(pickle.dumps(penalty)),
        eval(repr(penalty), vars(rs)),
        rs.Plan.from_dict(rs.Plan.of(rule).to_dict()).rules[0].what,
    ):
        assert twin == penalty
        assert hash(twin) == hash(penalty)


def test_the_algebra_of_strengths():
    ramp = s.Linear(0, 1, steps=2)
    assert ramp * rs.L1() == rs.L1() * ramp
    assert 2 * (ramp * rs.L1()) == (2 * ramp) * rs.L1() == ramp * (2 * rs.L1())
    assert 1.0 * ramp == ramp == (2 * ramp) / 2
    assert torch.tensor(0.5).numpy()[()] * ramp == 0.5 * ramp
    assert ramp * rs.L1().on("w") == (ramp * rs.L1()).on("w")
    assert ramp * rs.L1() != s.Linear(0, 1, steps=3) * rs.L1()


def test_text_forms(tmp_path):
    form = {"linear": {"start": 0, "end": "1e-3", "steps": 1000}}
    plan = rs.Plan.from_dict(
        {
            "rules": [
                {"what": "l1", "strength": form, "on": "*"},
                {"what": "l2", "strength": {"times": ["1e-3", {"warmup": {"steps": 5}}, form]}},
                {"what": "l1", "strength": {"target": {"active": 0.1}}, "on": {"outputs": "relu"}},
            ]
        }
    )
    ramp = s.Linear(0, 1e-3, steps=1000)
    whats = [ramp * rs.L1(), 1e-3 * s.WarmUp(5) * ramp * rs.L2(), rs.Target(active=0.1) * rs.L1()]
    assert [rule.what for rule in plan] == whats
    for name in ("plan.json", "plan.toml", "plan.yaml"):
        plan.save(tmp_path / name)
        assert rs.Plan.load(tmp_path / name) == plan


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        ({"lineer": {"start": 0}}, "linear, cosine, cubic, exponential, warmup, steps, learningrate, target, times"),
        ({"linear": {"start": 0}}, "missing"),
        ({"linear": {"start": 0, "end": 1, "steps": 0}}, "steps= is a whole number"),
        ({"linear": 3}, "a number, or a dict"),
        ({"times": []}, "a number, or a dict"),
        ({"target": {"zeros": 2}}, "below 1"),
        ("much", "got strength='much'"),
    ],
)
def test_text_forms_that_are_none(strength, words):
    with pytest.raises(PlanError, match=words):
        rs.Plan.of({"what": "l1", "strength": strength})


@pytest.mark.parametrize("schedule", [s.Function(halving), 0.1 * s.Function(lambda t: t)])
def test_a_function_cannot_be_written(schedule):
    with pytest.raises(PlanError, match="it is code"):
        rs.Plan.of(schedule * rs.L1().on("w")).to_dict()


# Attached


def data():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def weights_after(schedule, rule, optimizer_class, steps=6, *, by_hand=False, **options):
    """The weights after training under schedule * rule; by hand, a plain number is attached anew for each step."""
    model, x = network(), data()
    optimizer = optimizer_class(model.parameters(), lr=0.1, **options)
    reg = None if by_hand else rs.attach(model, schedule * rule, optimizer)
    for step in range(steps):
        held = rs.attach(model, schedule.at(step) * rule, optimizer) if by_hand else reg
        held.loss(model(x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if by_hand:
            held.detach()
    return [p.detach() for p in model.parameters()]


@dataclass(frozen=True)
class Size(rs.NetworkPenalty, register=False):
    """All that it is given, squared."""

    def __call__(self, parameters, outputs):
        return sum(t.square().sum() for t in (*parameters.values(), *outputs.values()))


RULES = {
    "loss": (rs.L1() + 0.5 * rs.GroupLasso()).on("*.weight"),
    "mean": rs.L2().on("*.weight", reduce="mean"),
    "gradient": (rs.L1() + 0.5 * rs.Norm(2)).on("*.weight", how="gradient"),
    "proximal": rs.L1().on("*.weight", how="proximal"),
    "joined": (0.1 * rs.L1() + rs.L2() + 0.3 * rs.GroupLasso()).on("*.weight", how="proximal"),
    "outputs": (rs.L1() + 0.1 * rs.L2()).on(rs.outputs("1")),
    "network": Size().on("*.weight", outputs=rs.outputs("1")),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_attached_rules_follow_a_schedule(rule, optimizer):
    schedule = 0.05 * s.WarmUp(4)
    found = weights_after(schedule, rule, optimizer)
    torch.testing.assert_close(found, weights_after(schedule, rule, optimizer, by_hand=True), rtol=1e-6, atol=1e-7)
    wrong = weights_after(0.05 * s.WarmUp(5), rule, optimizer, by_hand=True)
    assert max(float((a - b).abs().max()) for a, b in zip(found, wrong, strict=True)) > 5e-5


def test_members_of_a_sum_move_by_themselves():
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ramp = s.Linear(1, 0, steps=2)
    what = ramp * rs.L1() + s.WarmUp(2) * rs.L2() + ramp * rs.Norm(2)
    reg = rs.attach(model, 0.1 * what.on("weight", how="proximal", name="w"), optimizer)
    assert list(reg.strengths().values()) == [1, 0]
    for step, (down, up) in enumerate([(1, 0), (0.5, 0.5), (0, 1), (0, 1)]):
        w = model.weight.detach() - 0.1 * (x := torch.randn(1, 3))
        joined = 0.1 * (down * rs.L1() + up * rs.L2() + down * rs.Norm(2))
        assert reg.values()["w"] == pytest.approx(joined(model.weight).item()), step
        (model.weight * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach(), joined.prox(w, 0.1))


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_reads_the_strength_and_is_not_compiled_again(backend):
    model, x = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = rs.Target(active=0.3, every=2) * rs.L1()
    what = s.Function(lambda step: step / 7) * rs.L1() + s.WarmUp(1) * rs.L2()  # through 0.0 and 1.0
    reg = rs.attach(model, [what.on(rs.outputs("1"), name="h"), target.on(rs.outputs("1"), name="a")], optimizer)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(20):
        h = torch.relu(model[0](x)).detach()
        expected = {
            "h": (step / 7 * h.abs().sum() + (step > 0) * h.square().sum()) / 8,
            "a": reg.strengths()["a"] * h.abs().sum() / 8,
        }
        weight = model[0].weight.detach().clone()
        loss = reg.loss(compiled(x).square().mean())
        assert reg.values() == pytest.approx({key: float(value) for key, value in expected.items()})
        loss.backward()
        with torch.enable_grad():
            h = torch.relu(model[0](x))
            plain = model[2](h).square().mean() + (step / 7 + reg.strengths()["a"]) * h.abs().sum() / 8
            plain = plain + (step > 0) * h.square().sum() / 8
        (slope,) = torch.autograd.grad(plain, model[0].weight)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model[0].weight.detach(), weight - 0.01 * slope)
    assert counters["stats"]["unique_graphs"] == 1
    assert reg.strengths()["a"] > 5e-5


@dataclass(frozen=True)
class Inverse(rs.Penalty, register=False):
    """Infinite at zero, and so is its slope."""

    def __call__(self, w):
        return (1 / w).sum()


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_strength_of_zero_does_nothing(how):
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, s.Linear(0, 0, steps=3) * Inverse().on("weight", how=how, name="w"), optimizer)
    loss = reg.loss(model(torch.ones(1, 3)).sum())
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), -0.1))
    assert reg.values() == {"w": 0}
    if how == "loss":
        reg.penalty().backward()


def test_without_an_optimizer_given_the_steps_count_too_and_epochs_are_told():
    model = nn.Linear(3, 1)
    reg = rs.attach(
        model, [s.WarmUp(4) * rs.L1().on("weight", name="a"), s.WarmUp(2, "epoch") * rs.L2().on("weight", name="b")]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        reg.loss(model(torch.ones(1, 3)).sum()).backward()
        optimizer.step()
    assert reg.strengths() == {"a": 0.75, "b": 0}
    reg.next_epoch()
    assert reg.strengths() == {"a": 0.75, "b": 0.5}
    state = reg.state_dict()
    reg.detach()
    again = rs.attach(model, reg.plan)
    again.load_state_dict(state)
    assert again.strengths() == {"a": 0.75, "b": 0.5}


def test_a_function_that_gives_no_strength_is_named_with_the_step():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, s.Function(lambda step: 1.0 - step) * rs.L1().on("weight"), optimizer)
    reg.loss(model(torch.ones(1, 3)).sum()).backward()
    optimizer.step()
    reg.loss(model(torch.ones(1, 3)).sum()).backward()
    with pytest.raises(PenaltyError, match=r"<lambda>\) gives -1.0 at step 2"):
        optimizer.step()


def test_the_plan_keeps_the_schedule_and_the_table_tells_the_strength():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ramp = s.Linear(0, 1, steps=4)
    reg = rs.attach(model, ramp * rs.L1().on("*.weight", how="gradient", name="w"), optimizer)
    for _ in range(2):
        model(data()).sum().backward()
        optimizer.step()
    assert reg.plan.to_dict()["rules"][0]["strength"] == {"linear": {"start": 0.0, "end": 1.0, "steps": 4}}
    first, second = [what.strength for _, what in reg._bounds[0].parameters]
    assert first is second
    assert first.shape == ()
    table = str(reg)
    assert " 0.5 " in table
    assert "w: its strength schedules.Linear(start=0.0, end=1.0, steps=4) is now 0.5" in table
    twin = copy.deepcopy(reg)
    assert twin.plan == reg.plan
