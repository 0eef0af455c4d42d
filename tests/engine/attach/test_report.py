"""What an attachment tells: values, shares of the gradient, the table, the plan, and what it has counted."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import NotCollectedError, PenaltyError, PlanError
from saving import saved


class ReportCube(rs.Penalty):
    """A user's penalty: a sum of cubes of absolute values."""

    def __init__(self, times=1.0):
        self.times = times

    def __call__(self, w):
        return self.times * w.abs().pow(3).sum()


class ReportEnergy(rs.NetworkPenalty):
    """A user's penalty on the whole network."""

    def __call__(self, parameters, outputs):
        return sum(h.square().mean() for h in outputs.values()) * sum(p.sum() for p in parameters.values())


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n=7):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, dtype=torch.float64, generator=g), torch.randint(3, (n,), generator=g)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


RULES = {
    "l1": 0.1 * rs.L1().on("*.weight"),
    "l2, proximal": 0.2 * rs.L2().on("0.*", how="proximal"),
    "mean": 2.0 * rs.L1().on("*.weight", reduce="mean", how="gradient"),
    "sum": (0.1 * rs.L1() + rs.L2()).on("2.weight"),
    "scaled sum": 3.0 * (0.1 * rs.L1() + rs.L2()).on("2.weight"),
    "group": 0.5 * rs.GroupLasso("in").on("0.weight"),
    "mine": 0.1 * ReportCube(2.0).on("2.bias"),
    "activations": 0.3 * rs.L2().on(rs.outputs("1")),
    "mean of activations": 0.7 * rs.L1().on(rs.outputs("[01]"), reduce="mean"),
    "input": rs.Norm(2).on(rs.inputs("2")),
    "network": (0.5 * ReportEnergy()).on("2.*", outputs=rs.outputs("[01]")),
    "noise": rs.GaussianNoise(0.0).on(rs.inputs()),
    "constraint": rs.MaxNorm(100.0).on("0.weight"),
}


def by_hand(model, x):
    """Strength × value of every penalty of RULES, in NumPy."""
    w0, b0, w2, b2 = (p.detach().numpy() for p in model.parameters())
    a = x.numpy() @ w0.T + b0
    h = np.tanh(a)
    n = len(x)
    return {
        "l1": 0.1 * (np.abs(w0).sum() + np.abs(w2).sum()),
        "l2, proximal": 0.2 * ((w0**2).sum() + (b0**2).sum()),
        "mean": 2.0 * (np.abs(w0).mean() + np.abs(w2).mean()) / 2,
        "sum": 0.1 * np.abs(w2).sum() + (w2**2).sum(),
        "scaled sum": 0.3 * np.abs(w2).sum() + 3 * (w2**2).sum(),
        "group": 0.5 * np.sqrt(6) * np.sqrt((w0**2).sum(0)).sum(),
        "mine": 0.1 * 2.0 * (np.abs(b2) ** 3).sum(),
        "activations": 0.3 * (h**2).sum() / n,
        "mean of activations": 0.7 * (np.abs(a).mean() + np.abs(h).mean()) / 2,
        "input": np.sqrt((h**2).sum(1)).mean(),
        "network": 0.5 * ((a**2).mean() + (h**2).mean()) * (w2.sum() + b2.sum()),
    }


def attached(names=RULES):
    model = make()
    rules = [rs.Rule(**{**vars(RULES[name]), "name": name}) for name in names]
    optimizer = sgd(model)
    return model, optimizer, rs.attach(model, rules, optimizer)


# Values


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("noise", "constraint")])
def test_values_are_strength_times_value(name):
    (model, _, reg), (x, y) = attached([name]), data()
    reg.loss(F.cross_entropy(model(x), y))
    assert reg.values() == {name: pytest.approx(by_hand(model, x)[name], rel=1e-12)}


def test_values_of_all_rules_in_their_order():
    (model, _, reg), (x, y) = attached(), data()
    reg.loss(F.cross_entropy(model(x), y))
    assert list(reg.values()) == [name for name in RULES if name not in ("noise", "constraint")]
    assert reg.values() == pytest.approx(by_hand(model, x), rel=1e-12)
    assert reg.values() != pytest.approx(by_hand(model, 1.001 * x), rel=1e-12), "the oracle notices"
    assert all(type(value) is float for value in reg.values().values())


def test_penalties_on_activations_have_no_value_before_the_first_forward():
    (model, _, reg), (x, y) = attached(), data()
    on_activations = {"activations", "mean of activations", "input", "network"}
    for _ in range(2):
        assert {name for name, value in reg.values().items() if value != value} == on_activations
        model(x)  # is not yet collected
    reg.loss(F.cross_entropy(model(x), y))
    assert all(value == value for value in reg.values().values())


def test_values_of_parameters_are_of_now_and_those_of_activations_of_the_last_collection():
    (model, optimizer, reg), (x, y) = attached(), data()
    reg.loss(F.cross_entropy(model(x), y)).backward()
    before = by_hand(model, x)
    optimizer.step()
    after = by_hand(model, x)
    last = {name: before[name] for name in ("activations", "mean of activations", "input", "network")}
    with torch.no_grad():
        model.eval()
        model(9 * x)
    assert reg.values() == pytest.approx({**after, **last}, rel=1e-12)


def test_each_rule_has_a_key_of_its_own():
    model = make()
    rules = [rs.L2().on("0.*"), rs.L2().on("0.*"), rs.L1().on("*", name="a"), rs.L1().on("2.*", name="a")]
    rules += [rs.L2().on("0.weight", name="a #2"), rs.L2().on("0.*"), rs.L1().on(rs.outputs("1"), name="a")]
    reg = rs.attach(model, rules)
    keys = list(reg.values())
    assert keys == ["L2() on '0.*'", "L2() on '0.*' #2", "a", "a #2", "a #2 #2", "L2() on '0.*' #3", "a #3"]
    expected = [rs.L2()(model[0].parameters())] * 2 + [rs.L1()(model.parameters())]
    expected += [rs.L1()(model[2].parameters()), rs.L2()(model[0].weight), expected[0]]
    values = list(reg.values().values())
    assert values[:-1] == pytest.approx([float(value.detach()) for value in expected])
    assert [rule.name for rule in reg.plan] == keys


def test_keys_of_a_users_own_penalty_are_the_same_in_every_process():
    model = make()
    reg = rs.attach(model, [ReportCube().on("0.weight"), (0.5 * ReportCube(3.0)).on("0.weight")])
    assert not any(re.search("0x[0-9a-f]{6}", key) for key in reg.values()), "an address is no name"
    assert len(set(reg.values())) == 2
    assert str(reg).count("ReportCube") == 2


def test_frozen_parameters_have_no_part_in_the_values():
    (model, _, reg), (x, _) = attached(["l1", "mean", "sum"]), data()
    model[2].weight.requires_grad_(False)
    size = np.abs(model[0].weight.detach().numpy())
    assert reg.values() == pytest.approx({"l1": 0.1 * size.sum(), "mean": 2 * size.mean(), "sum": 0.0})
    measured = reg.measure(model(x).sum())
    assert measured["sum"].gradient == 0.0


# Shares of the gradient


def differentiable(model, x):
    """The terms of some of RULES with their graphs, written out."""
    a = model[0](x)
    h = torch.tanh(a)
    w0, w2 = model[0].weight, model[2].weight
    return {
        "l1": 0.1 * (w0.abs().sum() + w2.abs().sum()),
        "l2, proximal": 0.2 * (w0.square().sum() + model[0].bias.square().sum()),
        "activations": 0.3 * h.square().sum() / len(x),
        "network": 0.5 * (a.square().mean() + h.square().mean()) * (w2.sum() + model[2].bias.sum()),
    }, model[2](h)


def norm_by_hand(model, term):
    gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True, allow_unused=True)
    return float(sum(g.square().sum() for g in gradients if g is not None).sqrt())


@pytest.mark.parametrize("with_data", [False, True])
def test_measure_gives_norms_and_shares_of_gradients(with_data):
    names = ["l1", "l2, proximal", "activations", "network", "noise", "constraint"]
    (model, _, reg), (x, y) = attached(names), data()
    loss = F.cross_entropy(model(x), y)
    measured = reg.measure(loss) if with_data else reg.measure()
    terms, out = differentiable(model, x)
    if with_data:
        terms["data"] = F.cross_entropy(out, y)
    norms = {name: norm_by_hand(model, term) for name, term in terms.items()}
    assert list(measured) == list(terms), "noise and constraints have no gradient to share"
    for name, one in measured.items():
        assert one.value == pytest.approx(float(terms[name].detach()), rel=1e-12)
        assert one.gradient == pytest.approx(norms[name], rel=1e-12)
        assert one.share == pytest.approx(norms[name] / sum(norms.values()), rel=1e-12)
    assert sum(one.share for one in measured.values()) == pytest.approx(1.0)
    assert all(p.grad is None for p in model.parameters())


def test_the_graph_stays_usable_after_measure():
    names = ["l1", "activations", "network"]
    (model, optimizer, reg), (x, y) = attached(names), data()
    loss = F.cross_entropy(model(x), y)
    assert reg.measure(loss) == reg.measure(loss)
    reg.loss(loss).backward()
    got = [p.grad for p in model.parameters()]
    terms, out = differentiable(model, x)
    by_hand_loss = F.cross_entropy(out, y) + sum(terms[name] for name in names)
    torch.testing.assert_close(got, list(torch.autograd.grad(by_hand_loss, list(model.parameters()))))
    with pytest.raises(PenaltyError, match=r"between the loss and backward\(\)"):
        reg.measure()
    optimizer.step()
    assert reg.measure()["activations"].gradient != reg.measure()["activations"].gradient, "nan: none since"


def test_measure_leaves_out_a_look_at_a_batch_before():
    (model, _, reg), (x, y) = attached(["activations"]), data()
    model(100 * x)  # a look in training mode, which the loss doesn't depend on
    loss = F.cross_entropy(model(x), y)
    measured = reg.measure(loss)["activations"]
    expected = by_hand(model, x)["activations"]
    assert measured.value == pytest.approx(expected)
    assert float((reg.loss(loss) - loss).detach()) == pytest.approx(expected)


def test_measure_is_no_collection():
    model, (x, y) = make(), data()
    reg = rs.attach(model, [RULES["l1"], RULES["activations"]], optimizer := sgd(model))
    loss = F.cross_entropy(model(x), y)
    reg.measure(loss)
    loss.backward()
    with pytest.raises(NotCollectedError):
        optimizer.step()


def test_measure_where_no_parameter_has_a_gradient():
    model, (x, y) = make(), data()
    x.requires_grad_()
    reg = rs.attach(model, rs.L2().on(rs.inputs(), name="inputs"))
    assert reg.measure(F.cross_entropy(model(x), y))["inputs"].gradient == 0.0, "it depends on x alone"
    model.requires_grad_(False)
    measured = reg.measure(F.cross_entropy(model(x), y))
    assert measured["inputs"].gradient == measured["data"].gradient == 0.0
    assert measured["inputs"].value == pytest.approx(float(x.detach().square().sum() / len(x)))


def test_a_rule_that_is_called_data_is_not_the_data():
    model, (x, y) = make(), data()
    reg = rs.attach(model, 0.1 * rs.L1().on("*.weight", name="data"))
    loss = F.cross_entropy(model(x), y)
    gradients = sorted(one.gradient for one in reg.measure(loss).values())
    l1 = differentiable(model, x)[0]["l1"]
    assert gradients == pytest.approx(sorted([norm_by_hand(model, l1), norm_by_hand(model, loss)]))


def test_measure_counts_tied_parameters_once():
    model = make().append(nn.Linear(4, 6))
    model[3].weight = model[0].weight
    reg = rs.attach(model, rs.L2().on("0.weight", name="l2"))
    w = model[0].weight.detach()
    assert reg.measure()["l2"].gradient == pytest.approx(float(2 * w.square().sum().sqrt()))


# The table


def cells(line):
    return re.split(r"\s{2,}", line)


def test_the_table_has_a_line_a_rule():
    (model, _, reg), (x, y) = attached(), data()
    reg.loss(F.cross_entropy(model(x), y))
    head, *lines = reg.table(values=True).splitlines()
    assert cells(head) == ["rule", "how", "strength", "tensors", "elements", "where", "value"]
    rows = {cells(line)[0]: cells(line)[1:] for line in lines}
    assert list(rows) == list(RULES)
    assert rows["l1"][:5] == ["loss", "0.1", "2", "42", "0.weight, 2.weight"]
    assert rows["l2, proximal"][:5] == ["proximal", "0.2", "2", "30", "0.weight, 0.bias"]
    assert rows["scaled sum"][:5] == ["loss", "3", "1", "18", "2.weight"]
    assert rows["activations"][:5] == ["loss", "0.3", "1", "-", "1"]
    assert rows["input"][:4] == ["loss", "1", "1", "-"]
    assert rows["network"][:2] == ["loss", "0.5"], "its strength, as of any other penalty"
    assert rows["noise"] == ["forward", "-", "1", "-", "(the model)", "-"]
    assert rows["constraint"] == ["project", "-", "1", "24", "0.weight", "-"]
    for name, value in by_hand(model, x).items():
        assert float(rows[name][-1]) == pytest.approx(value, rel=1e-5)


def test_printing_an_attachment_shows_the_table():
    model = nn.Sequential(*[nn.Linear(50, 50) for _ in range(9)])
    model[3].requires_grad_(False)
    reg = rs.attach(model, [1e-4 * rs.L2().on("*.weight"), rs.L1().on("missing", optional=True)])
    first, second, third, note = str(reg).splitlines()
    assert str(reg) == reg.table()
    assert cells(second)[:5] == ["0.0001 * L2() on '*.weight'", "loss", "0.0001", "9", "20,000"]
    assert cells(second)[5] == "0.weight, 1.weight, 2.weight, 3.weight, … 5 more"
    assert cells(third)[:4] == ["L1() on 'missing'", "loss", "1", "0"]
    assert note == "left out while frozen: 3.weight"
    assert "value" not in first
    assert repr(reg) == "<Attachment of 2 rules to Sequential>"


# What it has counted

EVERY = [
    0.1 * rs.L1().on("0.weight", every=3),
    0.2 * rs.L2().on("2.weight", how="proximal", every=2),
    0.1 * rs.L2().on("0.bias", how="gradient", every=4),
    0.1 * rs.L2().on(rs.outputs("1"), every=2),
    rs.UnitNorm().on("2.weight", every=5),
    0.1 * ReportCube().on("2.bias", every=3),
]


def train(model, optimizer, reg, steps):
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(model(x), y)).backward()
        optimizer.step()


@pytest.mark.parametrize(("before", "way"), [(0, "json"), (1, "torch"), (4, "json"), (5, "torch")])
def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(before, way):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    reg = rs.attach(model, EVERY, optimizer)
    train(model, optimizer, reg, before)
    other = make()
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.1)
    last = 0.1 * ReportCube().on("2.bias", every=3)  # made anew, as another process would
    again = rs.attach(other, [*EVERY[:-1], last], other_optimizer)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(saved(way, reg.state_dict()))
    assert again.state_dict() == reg.state_dict()
    train(model, optimizer, reg, 7)
    train(other, other_optimizer, again, 7)
    torch.testing.assert_close(list(other.parameters()), list(model.parameters()), rtol=0, atol=0)
    assert again.state_dict() == reg.state_dict()
    assert reg.state_dict()["steps"] == reg.state_dict()["optimizer_steps"][0] == before + 7


def test_a_counter_that_starts_anew_makes_a_difference():
    model, other = make(), make()
    optimizer, other_optimizer = sgd(model), sgd(other)
    reg = rs.attach(model, EVERY, optimizer)
    train(model, optimizer, reg, 4)
    other.load_state_dict(model.state_dict())
    train(other, other_optimizer, rs.attach(other, EVERY, other_optimizer), 7)
    train(model, optimizer, reg, 7)
    assert not torch.allclose(other[0].weight, model[0].weight)


def test_a_state_of_other_rules_is_refused():
    model = make()
    reg = rs.attach(model, EVERY, optimizer := sgd(model))
    good = reg.state_dict()
    wrong = [
        (rs.attach(make(), RULES["l1"]).state_dict(), "other rules"),
        ({**good, "rules": good["rules"][::-1]}, "other rules"),
        ({**good, "optimizer_steps": [0, 0]}, "other rules"),
        ({**good, "version": 2}, "of version 2, and this library reads up to version 1: pip install"),
        ({}, "isn't whole, it lacks version"),
        (None, "expected a state as reg.state_dict"),
    ]
    train(model, optimizer, reg, 2)
    for state, said in wrong:
        with pytest.raises(PlanError, match=said):
            reg.load_state_dict(state)
    assert reg.state_dict()["steps"] == 2, "a refused state changes nothing"
    reg.load_state_dict(good)
    assert reg.state_dict() == good


def test_the_plan_of_an_attachment_can_be_attached_again():
    (model, _, reg), (x, y) = attached(), data()
    reg.loss(F.cross_entropy(model(x), y))
    values = reg.values()
    reg.detach()
    again = rs.attach(model, reg.plan, sgd(model))
    again.loss(F.cross_entropy(model(x), y))
    assert again.values() == pytest.approx(values, rel=1e-12)
    assert str(again) == str(reg)
