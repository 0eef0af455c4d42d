"""Attached rules go along: the smaller network trains on under them as the large one does with dead units at zero."""

import copy

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.compaction import attached
from restrain.errors import CompactionError, RestrainWarning

DEAD = [1, 2, 5]
LIVE = [0, 3, 4]


def mlp():
    """4 → 6 → 5 → 2 in float64; three of the six are zero, with their columns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    kill(model)
    return model


def kill(model):
    with torch.no_grad():
        model[0].weight[DEAD] = 0
        model[0].bias[DEAD] = 0
        model[2].weight[:, DEAD] = 0


def trained(model, optimizer, reg, steps, seed, dead=True):
    """An ordinary loop; with `dead`, the units are held at zero by hand."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=draws, dtype=torch.float64)
        optimizer.zero_grad()
        reg.loss((model(x) - x[:, :2].sin()).square().mean()).backward()
        optimizer.step()
        if dead:
            kill(model)


def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double()


WEIGHTS = torch.rand(6, 4, generator=torch.Generator().manual_seed(4)).double()
PLANS = {
    "a schedule": rs.schedules.Linear(0.0, 0.1, steps=25) * rs.L2().on("*.weight"),
    "proximal": (0.02 * rs.L1()).on("*.weight", how="proximal"),
    "weights of entries": 0.02 * rs.Weighted(rs.L1(), WEIGHTS).on("0.weight", how="proximal"),
    "weights by name": 0.1 * rs.Weighted(rs.L1(), {"0.weight": WEIGHTS, "0.bias": [1.0] * 6}).on("0.*"),
    "weights by a function": 0.01 * rs.Weighted(rs.L1(), lambda w: 1 / (w.abs() + 0.1)).on("0.weight"),
    "a reference": 0.3 * rs.Distance().on("*.weight", how="decoupled"),
    "a moving reference": 0.3 * rs.Distance(decay=0.8).on("*.bias", how="gradient"),
    "units": (0.002 * rs.GroupLasso(per=rs.units({"0.weight": "out", "0.bias": 0}))).on(how="proximal"),
    "lists": (0.02 * rs.GroupLasso(per=[[0, 3], [1, 5], [2], [4]])).on("0.weight", how="loss", every=2),
    "a constraint": rs.MaxNorm(0.4, per="out").on("0.weight"),
    "signs": rs.Signs([[1], [1], [1], [-1], [0], [-1]]).on("0.weight"),
    "fixed": rs.Fixed([[0, 0, 0, 0], [0, 0, 0, 1]] * 3).on("0.weight"),
    "activations": 0.1 * rs.L1().on(rs.outputs("3")),
}  # fmt: skip


def begun(name):
    """A network, its optimizer and its rules after seven steps."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    reg = rs.attach(model, PLANS[name], optimizer, track=5)
    trained(model, optimizer, reg, 7, 0)
    return model, optimizer, reg


def matches(small, large):
    """The parameters of the small network are those of the large one without the dead units."""
    found = []
    for one, many in zip(small.parameters(), large.parameters(), strict=True):
        part = many[LIVE] if many.shape[0] == 6 else many[:, LIVE] if many.shape[-1] == 6 else many
        found.append(torch.allclose(one, part, rtol=1e-9, atol=1e-11))
    return all(found)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", PLANS)
def test_the_small_network_trains_on_as_the_large_one_with_dead_units_at_zero(name, inplace):
    large, other, beside = begun(name)
    trained(large, other, beside, 20, 1)
    model, optimizer, reg = begun(name)
    result = rs.compact(model, x(), optimizer, inplace=inplace)
    assert (result.attachment is reg) == inplace
    assert result.model[0].weight.shape == (3, 4)
    trained(result.model, result.optimizer, result.attachment, 20, 1, dead=False)
    assert matches(result.model, large)
    assert result.attachment.history["step"] == [5, 10, 15, 20, 25]
    assert result.attachment.history["data_loss"][:1] == beside.history["data_loss"][:1]
    assert result.attachment.strengths() == beside.strengths()


@pytest.mark.parametrize("name", ["a schedule", "weights by a function", "a reference", "a moving reference"])
def test_without_the_state_it_would_not(name, monkeypatch):
    monkeypatch.setattr(
        attached, "continued", lambda reg, model, plan, opt, state: rs.attach(model, plan, opt, track=5)
    )
    large, other, beside = begun(name)
    trained(large, other, beside, 20, 1)
    model, optimizer, _ = begun(name)
    result = rs.compact(model, x(), optimizer)
    trained(result.model, result.optimizer, result.attachment, 20, 1, dead=False)
    assert not matches(result.model, large)


def test_it_can_be_compacted_again_under_the_same_rules():
    model, optimizer, reg = begun("a reference")
    first = rs.compact(model, x(), optimizer)
    with torch.no_grad():
        first.model[0].weight[1], first.model[0].bias[1] = 0, 0
    second = rs.compact(first.model, x(), first.optimizer)
    assert second.model[0].weight.shape == (2, 4)
    kept = second.attachment.state_dict()["kept"]
    whole = reg.state_dict()["kept"]
    key = next(key for key in whole if key.endswith("2.weight"))
    torch.testing.assert_close(kept[key]["kept"], whole[key]["kept"][:, [0, 4]])


class Descent(torch.optim.Optimizer):
    """Gradient descent of which restrain has no formula, so that its metric is measured."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad


def test_measured_metrics_and_averages_of_activations_are_cut_alike():
    model = mlp()
    optimizer = Descent(model.parameters())
    plan = [0.01 * rs.L1().on("0.weight", how="proximal"), rs.KLSparsity(0.3, momentum=0.9).on(rs.outputs("1"))]
    with pytest.warns(RestrainWarning, match="measured"):
        reg = rs.attach(model, plan, optimizer)  # and compact doesn't say it again
    for _ in range(3):
        optimizer.zero_grad()
        reg.loss(model(x()).square().mean()).backward()
        optimizer.step()
        kill(model)
    result = rs.compact(model, x(), optimizer)
    before, after = reg.state_dict(), result.attachment.state_dict()
    ((_, one),), ((_, other),) = before["metrics"], after["metrics"]
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], torch.Tensor):
            torch.testing.assert_close(other[key], one[key][LIVE])
    ((key, many),), ((_, few),) = before["kept"].items(), after["kept"].items()
    torch.testing.assert_close(few["total"], many["total"][..., LIVE])
    assert reg.rules[1].key in key


# Settings


def told(what, **more):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, what.on(**more) if not isinstance(what, list) else what, optimizer)
    kill(model)
    return rs.compact(model, x(), optimizer)


UNITS = rs.units({"0.weight": "out", "0.bias": 0, "2.weight": "in"})


@pytest.mark.parametrize(
    ("what", "where", "now"),
    [
        (rs.TopK(0.5, budget="all"), ["0.weight", "2.weight"], rs.TopK(27, budget="all")),
        (rs.TopK(0.5), "0.weight", rs.TopK(12)),
        (rs.TopGroups(0.5, per="out"), "0.weight", rs.TopGroups(3, per="out")),
        (rs.TopGroups(0.5, per=UNITS), None, rs.TopGroups(3, per=UNITS.named(mlp()))),
        (rs.TopGroups(3, per=UNITS), None, rs.TopGroups(3, per=UNITS.named(mlp()))),
        (rs.MaxNorm(9.0, per=[[0, 3], [1, 2], [4, 5]]), "0.weight", rs.MaxNorm(9.0, per=(0, [[0, 1], [2]]))),
        (rs.MaxNorm(9.0, per={"in": [[0, 3], [1, 4]]}), "2.weight", rs.MaxNorm(9.0, per=(1, [[0, 1], [2]]))),
        (rs.MaxNorm(9.0, per=(3, 4)), "0.weight", rs.MaxNorm(9.0, per=(0, [[0], [1, 2]]))),
        (rs.MaxNorm(9.0, per=(6, 2)), "0.weight", rs.MaxNorm(9.0, per=(3, 2))),
        (rs.MaxNorm(9.0, per="in"), "2.weight", rs.MaxNorm(9.0, per="in")),
    ],
)
def test_settings_name_the_remaining_entries(what, where, now):
    result = told(what, where=where)
    (rule,) = result.attachment.plan
    assert rule.what == now


def test_units_keep_their_lists():
    """A layer behind a flattened image: several columns a filter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double()
    per = rs.units({"0.weight": "out", "0.bias": 0, "3.weight": (2, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, (1e-6 * rs.GroupLasso(per=per)).on(how="proximal"), optimizer)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, -1.0
    result = rs.compact(model, torch.randn(2, 1, 4, 4).double(), optimizer)
    (rule,) = result.attachment.plan
    assert rule.what.penalty.per == rs.units({"0.weight": "out", "0.bias": 0, "3.weight": (2, 4)})
    with torch.no_grad():
        value = sum(
            torch.cat([result.model[0].weight[i].flatten(), result.model[0].bias[i : i + 1],
                       result.model[3].weight[:, 4 * i : 4 * i + 4].flatten()]).norm() * 18**0.5
            for i in range(3)
        )  # fmt: skip
    assert abs(result.attachment.values()[rule.label] - 1e-6 * float(value)) < 1e-12


# What can't go along


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (rs.TopGroups(rs.schedules.Cubic(1.0, 0.9, steps=10), per="out").on("0.weight"), "moves as a fraction"),
        (rs.TopK(0.45, per="in").on(["0.weight", "2.weight"]), "another setting for each"),
        ((rs.Target(zeros=0.5) * rs.L1()).on("0.weight", how="proximal"), "a fraction of entries"),
        ((1e-3 * rs.TotalVariation(0)).on("0.weight"), "compares neighbours in '0.weight'"),
        (rs.NM(1, 2, dim=0).on("0.weight"), "compares neighbours"),
        (rs.MaxNorm(9.0, per=(3, 2)).on("0.weight"), "blocks along several axes"),
        (rs.MaxNorm(9.0, per=[[1, 2]]).on("0.weight"), "none of its groups"),
        (rs.UnitNorm(per="out").on("4.weight", how="parametrize"), "computes the weight"),
        (rs.UnitNorm(per="in").on("0.weight"), "a constraint doesn't hold for '0.weight' any more"),
        (rs.KLSparsity(0.3, momentum=0.9).on(rs.inputs("2")), "inputs of a layer"),
    ],
)
def test_what_cant_go_along_is_told(plan, why):
    model = mlp()
    with torch.no_grad():
        model[0].weight[DEAD] = 0.3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    with torch.no_grad():
        model[2].weight[:, DEAD] = 0  # nothing reads the units
    if isinstance(plan.what, rs.KLSparsity):
        reg.loss(model(x()).square().mean()).backward()
        optimizer.step()
        kill(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactionError, match=f"{why}.*rules=False") as caught:
        rs.compact(model, x(), optimizer, inplace=True)
    assert "can't go along" in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    result = rs.compact(model, x(), optimizer, rules=False)
    assert result.attachment is None
    assert result.model[0].weight.shape == (3, 4)


def test_rules_go_with_their_optimizer():
    model = mlp()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    reg = rs.attach(model, 0.1 * rs.L2().on("*.weight"), optimizer)
    assert rs.compact(model, x()).attachment is None
    with pytest.raises(CompactionError, match="another optimizer"):
        rs.compact(model, x(), other)
    second = rs.attach(model, 0.1 * rs.L1().on("*.bias"), optimizer)
    with pytest.raises(CompactionError, match="2 attachments"):
        rs.compact(model, x(), optimizer)
    second.detach()
    result = rs.compact(model, x(), optimizer)
    assert result.attachment.model is result.model
    assert result.attachment.plan == reg.plan
    reg.detach()
    assert rs.compact(model, x(), optimizer).attachment is None


def test_declared_rules_are_counted_once():
    model = mlp()
    rs.regularized(model[2], weight=0.1 * rs.L2())
    reg = rs.attach(model)
    result = rs.compact(model, x())
    value = 0.1 * result.model[2].weight.detach().square().sum().item()
    assert list(result.attachment.values().values()) == pytest.approx([value])
    assert list(reg.values().values()) == pytest.approx([value])


FUNCTIONS = [rs.TopK(3), rs.BatchTopK(3), rs.JumpReLU(0.3, 0.1)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_units_at_activation_functions_stay(function, inplace):
    """With constants (biases) that the function lets through, cuts, or lets win; others go, and outputs stay."""
    model = mlp()
    with torch.no_grad():
        model[0].bias[DEAD] = torch.tensor([0.1, 5.0, -1.0]).double()
        model[0].weight[:, 3] = 0
        model[2].weight[:2] = 0  # constant behind the function; the third only without the function
        model[2].weight[2] = 0
        model[2].weight[2:, 1] = 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, function.on(rs.outputs("0")), optimizer)
    model.train()(x())
    reference = model.eval()(x())
    result = rs.compact(model, x(), optimizer, inplace=inplace)
    assert list(result.model[0].weight.shape) == [6, 4]
    assert list(result.model[2].weight.shape) == [3, 6]
    torch.testing.assert_close(result.model.eval()(x()), reference, rtol=0, atol=1e-12)
    assert "acts on it, at the outputs of '0'" in str(result.report)
    result.attachment.detach()
    assert (result.model(x()) - reference).abs().max() > 1e-3
    free = rs.compact(model, x(), rules=False) if not inplace else None
    assert free is None or len(free.model[0].weight) < 6
    reg.detach()


def test_activation_functions_that_dont_go_along_are_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        rs.attach(model, rs.TopK(2).on(rs.outputs("1")), optimizer),
        pytest.raises(CompactionError, match="isn't given"),
    ):
        rs.compact(model, x())
    model[1] = nn.Identity()
    with (
        rs.attach(model, rs.TopK(2).on(rs.outputs("1"))),
        pytest.raises(CompactionError, match="isn't in the exported"),
    ):
        rs.compact(model, x())
    with rs.attach(model, rs.TopK(2).on(rs.inputs("2"))), pytest.raises(CompactionError, match="isn't known"):
        rs.compact(model, x())
