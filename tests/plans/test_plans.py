"""Plans as text, dicts and files: what is written is read back as the same rules."""

import re
from dataclasses import dataclass
from math import inf

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import PlanError

Plan = rs.Plan


@dataclass(frozen=True)
class PlansHuber(rs.Penalty):
    """A user's penalty with settings of several kinds."""

    width: float = 1.0
    power: int = 2
    quiet: bool = False
    kind: str = "soft"

    def __call__(self, w):
        return F.huber_loss(w, torch.zeros_like(w), reduction="sum", delta=self.width) * self.power


class PlansPlain(rs.Penalty):
    """A user's penalty without settings."""

    def __call__(self, w):
        return w.square().square().sum()


class PlansEnergy(rs.NetworkPenalty):
    """A user's penalty on the whole network."""

    def __call__(self, parameters, outputs):
        return sum(h.square().mean() for h in outputs.values()) * len(parameters)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)
        self.fc1, self.fc2, self.relu = nn.Linear(9, 4), nn.Linear(4, 2), nn.ReLU()
        self.gru = nn.GRU(2, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(self.conv(x)).flatten(1)
        h = self.relu(self.fc2(self.relu(self.fc1(h))))
        return self.gru(h[:, None])[0]


def values_of(plan, x):
    """The plan as bound to a model, and the values of its rules there after a forward."""
    torch.manual_seed(0)
    net = Net()
    with rs.attach(net, plan, torch.optim.SGD(net.parameters(), lr=0.1)) as reg:
        torch.manual_seed(1)
        net(x)
        reg.penalty()
        return reg.plan, reg.values()


def assert_same(plan, other):
    """That two plans are the same data, bind to the same names and have the same values."""
    assert plan.to_dict() == other.to_dict()
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2))
    (bound, values), (bound_other, values_other) = values_of(plan, x), values_of(other, x)
    assert bound.to_dict() == bound_other.to_dict()
    assert values == values_other


WHERE = {
    "glob": "fc*.weight",
    "names": rs.selections.Names(("fc1.weight", "fc2.bias")),
    "a list of globs": ["fc1.*", "conv.weight"],
    "role": rs.weights,
    "type": nn.Linear,
    "types": nn.Linear | nn.Conv1d,
    "regex": re.compile(r"fc\d\.w"),
    "and": rs.weights & nn.Linear,
    "or": rs.norms | rs.glob("gru*") | rs.biases,
    "minus": rs.weights - "fc1.*" - re.compile("gru"),
    "nested": (rs.weights | rs.biases) & (rs.glob("fc*") - "fc2.bias"),
}

PLACES = {
    "the model's own output": rs.outputs(),
    "the model's own input": rs.inputs(),
    "glob": rs.outputs("fc*"),
    "inputs": rs.inputs("relu"),
    "type": rs.outputs(nn.Linear),
    "a list": rs.outputs(["fc1", "norm"]),
    "regex": rs.outputs(re.compile("^fc")),
    "joined names": rs.outputs(rs.glob("fc*") - "fc1"),
    "via": rs.outputs("fc1", via=torch.tanh),
    "via F": rs.outputs("fc1", via=F.relu),
    "index": rs.outputs("gru", index=1, batch_dim=1),
    "batch_dim": rs.outputs("conv", batch_dim=0),
    "calls": rs.outputs("relu", calls="sum"),
    "or": rs.outputs("fc1") | rs.inputs("fc1") | rs.outputs("relu", via=torch.tanh),
    "and": rs.outputs("fc*") & rs.outputs("*2"),
    "minus": rs.outputs(nn.Linear) - rs.outputs("fc1"),
}

WHAT = {
    "plain": rs.L1(),
    "scaled": 1e-3 * rs.L2(),
    "sum": 0.1 * rs.L1() + rs.L2() + 0.25 * rs.Norm(2),
    "scaled sum": 2.0 * (0.1 * rs.L1() + 0.5 * rs.GroupLasso("in")),
    "sum of scaled sums": 2.0 * (rs.L1() + rs.L2()) + 3.0 * rs.Norm(3),
    "elastic net": rs.ElasticNet(0.1, 0.2),
    "norm inf": 0.1 * rs.Norm(inf),
    "groups by name": rs.GroupLasso(per="column"),
    "groups by dim": rs.GroupLasso(per=1),
    "groups by negative dim": rs.GroupLasso(per=-1),
    "a user's dataclass": 0.5 * PlansHuber(width=0.5, power=3, quiet=True, kind="hard"),
    "a user's class": 0.5 * PlansPlain(),
}

RULES = {
    **{f"on {name}": 0.1 * rs.L1().on(where) for name, where in WHERE.items()},
    **{f"at {name}": 0.1 * rs.L2().on(place) for name, place in PLACES.items()},
    **{f"does {name}": what.on("fc*.weight") for name, what in WHAT.items()},
    "groups of outputs": rs.GroupLasso(per=1).on(rs.outputs("norm")),
    "constraint": rs.MaxNorm(1.5, per="in").on(rs.weights),
    "constraint by dim": rs.MaxNorm(1.5, per=0).on("fc*.weight"),
    "unit norm": rs.UnitNorm().on("fc1.weight"),
    "noise": rs.GaussianNoise(0.1).on(rs.inputs()),
    "dropout": rs.Dropout(0.25).on(rs.outputs("relu")),
    "network": PlansEnergy().on("fc*", outputs=rs.outputs("relu")),
    "network scaled": (0.5 * PlansEnergy()).on(rs.weights, outputs=rs.outputs("fc*")),
    "network sum": (0.5 * PlansEnergy() + PlansEnergy()).on("fc*", outputs=rs.outputs("fc1", via=None)),
    "options": rs.L1().on("*", how="proximal", name="mine: «1»", every=3, optional=True),
    "mean": rs.L2().on("fc*", how="gradient", reduce="mean"),
    "optional": rs.L2().on("missing*", optional=True),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_survive_being_written(name):
    plan = Plan.of(RULES[name])
    data = plan.to_dict()
    again = Plan.of(data)
    assert again.to_dict() == data
    assert Plan.from_dict(data).to_dict() == data
    assert_same(plan, again)


@pytest.mark.parametrize("suffix", ["yaml", "yml", "toml", "json"])
def test_rules_survive_being_saved(tmp_path, suffix):
    plan = Plan.of(list(RULES.values()))
    path = tmp_path / f"plan.{suffix}"
    plan.save(path)
    assert Plan.load(str(path)).to_dict() == plan.to_dict()
    assert_same(Plan.load(path), plan)


def test_the_oracle_notices_a_changed_rule():
    for other in (0.2 * rs.L1().on("fc*"), 0.1 * rs.L1().on("fc*", name="x"), 0.1 * rs.L1().on("fc1*")):
        with pytest.raises(AssertionError):
            assert_same(Plan.of(0.1 * rs.L1().on("fc*")), Plan.of(other))


def test_what_is_read_back_is_of_the_types_that_were_written():
    what = {name: Plan.of(Plan.of(w.on("*")).to_dict()).rules[0].what for name, w in WHAT.items()}
    assert repr(what.pop("a user's class")) == "0.5 * PlansPlain()"
    assert what == {name: WHAT[name] for name in what}
    setting = what["a user's dataclass"].penalty.power
    assert isinstance(setting, int), "range(3.0) would fail in the user's formula"


# Generated plans

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
STRENGTHS = st.floats(0, 1e30, allow_nan=False)
AXES = st.sampled_from(["out", "in", "filter", "channel", "head", "row", "column"]) | st.integers(-3, 3)
LEAVES = (
    st.just(rs.L1())
    | st.just(rs.L2())
    | st.just(PlansPlain())
    | st.builds(rs.Norm, st.floats(1, 1e30) | st.just(inf) | st.integers(1, 9))
    | st.builds(rs.GroupLasso, AXES)
    | st.builds(rs.ElasticNet, STRENGTHS, STRENGTHS)
    | st.builds(PlansHuber, STRENGTHS, st.integers(0, 9), st.booleans(), st.text(max_size=5))
)
PENALTIES = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(lambda c, p: c * p, st.floats(0, 1e9), inner) | st.lists(inner, min_size=2, max_size=3).map(sum)
    ),
    max_leaves=5,
)


def joined(leaves):
    def pair(operation, left, right):
        return {"and": left & right, "or": left | right, "minus": left - right}[operation]

    operations = st.sampled_from(["and", "or", "minus"])
    return st.recursive(leaves, lambda inner: st.builds(pair, operations, inner, inner), max_leaves=4)


SELECTIONS = joined(
    NAMES.map(rs.glob)
    | st.lists(NAMES, min_size=1, max_size=3).map(lambda names: rs.selections.Names(tuple(names)))
    | st.sampled_from([rs.weights, rs.biases, rs.norms, rs.embeddings])
    | st.sampled_from([nn.Linear, nn.Linear | nn.Conv2d]).map(rs.selections.as_where)
    | NAMES.map(re.escape).map(re.compile).map(rs.selections.as_where)
)
PLACES_MADE = joined(
    st.builds(
        lambda make, which, **options: make(which, **options),
        st.sampled_from([rs.outputs, rs.inputs]),
        st.none() | SELECTIONS,
        via=st.sampled_from([None, torch.relu, torch.tanh, torch.sigmoid, F.gelu, F.relu, F.softplus]),
        index=st.none() | st.integers(-2, 5) | NAMES,
        batch_dim=st.none() | st.integers(-2, 2),
        calls=st.sampled_from(["mean", "sum"]),
    )
)
OPTIONS = {"name": st.none() | st.text(max_size=5), "every": st.integers(1, 10**6), "optional": st.booleans()}
RULES_MADE = (
    st.builds(
        lambda what, where, **o: what.on(where, **o),
        PENALTIES,
        SELECTIONS,
        how=st.sampled_from(["loss", "gradient", "proximal"]),
        **OPTIONS,
    )
    | st.builds(lambda where, **o: rs.L1().on(where, reduce="mean", **o), PLACES_MADE, **OPTIONS)
    | st.builds(lambda n, where, **o: rs.MaxNorm(n, 1).on(where, **o), st.floats(0.1, 9), SELECTIONS)
    | st.builds(lambda std, where: rs.GaussianNoise(std).on(where), st.floats(0, 9), PLACES_MADE)
    | st.builds(lambda c, where, out: (c * PlansEnergy()).on(where, outputs=out), STRENGTHS, SELECTIONS, PLACES_MADE)
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(RULES_MADE, max_size=3), st.sampled_from(["yaml", "toml", "json"]))
def test_any_plan_survives_being_written(tmp_path_factory, rules, suffix):
    plan = Plan.of(rules)
    data = plan.to_dict()
    again = Plan.of(data)
    assert again.to_dict() == data
    assert [repr(rule.what) for rule in again] == [repr(rule.what) for rule in plan]
    path = tmp_path_factory.mktemp("plans") / f"plan.{suffix}"
    plan.save(path)
    assert Plan.load(path).to_dict() == data


# Text, and what a person writes in a file


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("l2", rs.L2().on()),
        ("L2", rs.L2().on(rs.weights)),
        ("l1:0.01", 0.01 * rs.L1().on()),
        ("l1 : 1e-4", 1e-4 * rs.L1().on()),
        ("group_lasso:2", 2.0 * rs.GroupLasso().on()),
        ("plansplain:0.5", 0.5 * PlansPlain().on()),
        ({"what": "l1", "strength": "1e-4", "on": "fc*"}, 1e-4 * rs.L1().on("fc*")),
        ({"what": {"name": "elastic_net", "l1": "1e-4", "l2": 1}}, rs.ElasticNet(1e-4, 1).on()),
        ({"what": {"name": "norm", "p": ".inf"[1:]}}, rs.Norm(inf).on()),
        ({"what": {"sum": ["l1", {"what": "l2", "strength": "2"}]}}, (rs.L1() + 2.0 * rs.L2()).on()),
        ({"what": {"sum": ["l1", {"name": "norm", "p": 2}]}}, (rs.L1() + rs.Norm(2)).on()),
        ({"what": "l1", "on": ["a", "b"]}, rs.L1().on(rs.selections.Names(("a", "b")))),
        ({"what": "l1", "on": [{"role": "biases"}, "a*"]}, rs.L1().on([rs.biases, "a*"])),
        ({"what": "l1", "on": {"outputs": ""}}, rs.L1().on(rs.outputs())),
        ({"what": "l1", "on": {"outputs": None}}, rs.L1().on(rs.outputs())),
        ({"what": "l1", "on": {"type": "Linear"}}, rs.L1().on(nn.Linear)),
        ({"what": "nonnegative", "on": {"type": ["Linear", "GRU"]}}, rs.NonNegative().on(nn.Linear | nn.GRU)),
    ],
    ids=str,
)
def test_forms_that_a_person_writes(given, expected):
    assert Plan.of(given).to_dict() == Plan.of(expected).to_dict()


def test_plans_of_all_kinds_of_things():
    rule = 0.1 * rs.L2().on("a")
    one = Plan.of(rule)
    assert len(Plan.of(None)) == len(Plan.of([])) == len(Plan()) == 0
    assert Plan.of(one) is one
    nested = Plan.of(["l1", [rule, {"what": "l2"}], one, one.to_dict(), (r for r in [rule])])
    assert [r.what for r in nested] == [rs.L1(), rule.what, rs.L2(), rule.what, rule.what, rule.what]
    more = one + ["l1", "l2"]  # noqa: RUF005
    assert [r.what for r in more] == [rule.what, rs.L1(), rs.L2()]
    assert one.rules == (rule,), "adding makes a new plan"


YAML = """
rules:
  - what: l1
    strength: 1e-4
    on: "fc*.weight"
    how: proximal
  - {what: {name: dropout, rate: 3e-1}, on: {outputs: 0}}
  - {what: {name: grouplasso, per: 1}, strength: 2, on: {minus: [{role: weights}, "0.*"]}, every: 2}
"""


def test_numbers_as_yaml_reads_them(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(YAML)
    first, second, third = Plan.load(path)
    assert first == 1e-4 * rs.L1().on("fc*.weight", how="proximal")
    assert second == rs.Dropout(0.3).on(rs.outputs("0")), "the layer 0, which YAML reads as a number"
    assert third.what == 2.0 * rs.GroupLasso(per=1)
    assert third.every == 2


# A bound plan


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_bound_plan_is_written_with_names(tmp_path, suffix):
    net = Net()
    rules = [
        0.1 * rs.L1().on(lambda name, p: p.dim() == 2 and "fc" in name),
        0.2 * rs.L2().on([net.fc1, net.conv.bias]),
        rs.L1().on(rs.outputs(lambda name, module: isinstance(module, nn.Linear))),
        rs.L2().on(rs.outputs(net) | rs.inputs(net.fc2)),
        rs.L2().on("missing*", optional=True),
    ]
    with pytest.raises(PlanError, match=r"can't be written.*reg\.plan"):
        Plan.of(rules).to_dict()
    with rs.attach(net, rules) as reg:
        reg.plan.save(tmp_path / f"plan.{suffix}")
    read = Plan.load(tmp_path / f"plan.{suffix}")
    where = [rule["on"] for rule in read.to_dict()["rules"]]
    assert where == [
        ["fc1.weight", "fc2.weight"],
        ["conv.bias", "fc1.weight", "fc1.bias"],
        {"outputs": ["fc1", "fc2"]},
        {"or": [{"outputs": ""}, {"inputs": ["fc2"]}]},
        "missing*",
    ]
    assert [rule.what for rule in read] == [rule.what for rule in rules]
    assert_same(read, Plan.of(reg.plan))
