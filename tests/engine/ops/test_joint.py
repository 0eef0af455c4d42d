"""Units changed in place, tensor by tensor, are those of the gathered matrix."""

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.engine.binding import bind
from restrain.engine.ops import joint as joint_file


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5)).to(dtype)


UNITS = {"0.weight": "out", "0.bias": 0, "1.weight": 0, "3.weight": (5, 4)}
UNEVEN = {"0.weight": [[0, 3], [1], [5]], "0.bias": [[0, 3], [1], [5]]}  # blocks of two sizes, one filter in no unit
PLANS = {
    "prox": (0.4 * rs.GroupLasso(per=rs.units(UNITS))).on(how="proximal"),
    "prox of lists": (0.4 * rs.GroupLasso(per=rs.units(UNEVEN))).on(how="proximal"),
    "a budget": rs.TopGroups(2, per=rs.units(UNITS)).on(),
    "a budget of lists": rs.TopGroups(1, per=rs.units(UNEVEN)).on(),
    "one budget of two sets": rs.TopGroups(
        5, per=rs.units({"0.weight": "out"}, {"3.weight": "out", "3.bias": 0}), budget="all"
    ).on(),
}  # fmt: skip


def bound(name, net):
    return bind([PLANS[name]], net)[0].joint


def tensors(net, names):
    return {name: p.detach().clone() for name, p in net.named_parameters() if name in names}


def holes(given):
    """A unit of zeros, one with NaN."""
    given["0.weight"][1], given["0.bias"][1] = 0, 0
    if "3.weight" in given:
        given["3.weight"][:, 4:8] = 0
    if "1.weight" in given:
        given["1.weight"][1] = 0
    given["0.weight"][3, 0, 0, 0] = torch.nan
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PLANS)
def test_in_place_is_as_gathered(name, dtype):
    net = model(dtype)
    joint = bound(name, net)
    names = [handle.name for handle in joint.handles]
    own = holes(tensors(net, names)) if "budget" not in name else tensors(net, names)
    steps = dict.fromkeys(names, 0.5)
    expected = joint.shrunk(own, steps) if "prox" in name else joint.projected(own)
    found = {key: w.clone() for key, w in own.items()}
    assert joint.shorten(found, steps, "prox") if "prox" in name else joint.keep(found)
    for key, w in expected.items():
        right = torch.where(w.isfinite() | ~own[key].isfinite(), w, own[key])  # as `put` does
        torch.testing.assert_close(found[key], right, equal_nan=True)
        assert not bool((torch.signbit(found[key]) & (found[key] == 0) & (own[key] != 0)).any())
    assert any(not torch.equal(found[key], own[key]) for key in own)
    if "prox" in name:
        other = {key: w.clone() for key, w in own.items()}
        assert joint.shorten(other, dict.fromkeys(names, 0.6), "prox")
        assert any(not torch.allclose(other[key], expected[key], equal_nan=True) for key in own)


def test_a_decay_is_as_gathered():
    net = model()
    joint = bind([(0.4 * rs.GroupLasso(per=rs.units(UNITS))).on(how="decoupled")], net)[0].joint
    own = tensors(net, UNITS)
    rates = dict.fromkeys(own, 0.1)
    expected, found = joint.decayed(own, rates), {key: w.clone() for key, w in own.items()}
    assert joint.shorten(found, rates, "decay")
    for key, w in expected.items():
        torch.testing.assert_close(found[key], w)


@pytest.mark.parametrize("units", [UNITS, UNEVEN], ids=["units", "lists"])
def test_a_gradient_is_as_gathered(units):
    net = model()
    joint = bind([(0.4 * rs.GroupLasso(per=rs.units(units))).on(how="gradient")], net)[0].joint
    own = tensors(net, units)
    own["0.weight"][1], own["0.bias"][1] = 0, 0
    found = {key: torch.ones_like(w) for key, w in own.items()}
    assert joint.add_slopes(own, found, torch.tensor(2.0))
    for key, w in joint.gradients(own).items():
        torch.testing.assert_close(found[key], 1 + 2 * w)
    own["0.weight"][0] = torch.nan
    assert not joint.add_slopes(own, found, None)


@pytest.mark.parametrize("case", ["steps", "moments", "half", "strides", "long", "infinite", "sum"])
def test_what_it_isnt_for_is_left_as_it_is(case, monkeypatch):
    net = model(torch.bfloat16 if case == "half" else torch.float32)
    if case == "sum":
        plan = (0.4 * rs.GroupLasso(per=rs.units(UNITS)) + 0.1 * rs.L1()).on(how="proximal")
        joint = bind([plan], net)[0].joint
    else:
        joint = bound("prox", net)
    own = tensors(net, UNITS)
    steps = dict.fromkeys(own, 0.5)
    if case == "steps":
        steps["0.bias"] = 0.0
    if case == "moments":
        steps["0.weight"] = torch.full_like(own["0.weight"], 0.5)
    if case == "strides":
        own["3.weight"] = own["3.weight"].t().contiguous().t()
    if case == "long":
        monkeypatch.setattr(joint_file, "LONGEST", 2)
    if case == "infinite":
        own["0.bias"][0] = torch.inf
    before = {key: w.clone() for key, w in own.items()}
    assert not joint.shorten(own, steps, "prox")
    assert all(torch.equal(own[key], w) for key, w in before.items())


def test_lengths_that_overflow_or_vanish():
    net = model()
    joint = bound("prox", net)
    own = tensors(net, UNITS)
    for w in own.values():
        w.mul_(1e-25)
    assert joint.shorten(own, dict.fromkeys(own, 0.5), "prox")
    assert not any(bool(w.any()) for w in own.values())
    for w in own.values():
        w.add_(1e25)
    expected = joint.shrunk(own, dict.fromkeys(own, 0.5))
    if joint.shorten(own, dict.fromkeys(own, 0.5), "prox"):
        assert all(torch.equal(own[key], w) for key, w in expected.items())
