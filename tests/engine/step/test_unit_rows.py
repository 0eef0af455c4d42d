"""A prox of units under Adam in loops of rows: as by the formula, which the other tests hold to a reference."""

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.engine.ops import joint
from restrain.engine.step import together

UNITS = {"0.weight": "out", "0.bias": 0, "1.weight": 0, "3.weight": (5, 4)}
UNEVEN = {"0.weight": [[0, 3], [1], [5]], "0.bias": [[0, 3], [1], [5]]}  # of two sizes, one filter in no unit
COLUMNS = {"0.weight": "in", "3.weight": [[k] for k in (4, 0)]}


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5)).to(dtype)


def stepped(
    units, penalty=rs.GroupLasso, make=torch.optim.Adam, dtype=torch.float64, strength=0.02, hole=False, **more
):
    """A model after three steps."""
    net = model(dtype)
    optimizer = make(net.parameters(), lr=0.1, **more)
    rs.attach(net, (strength * penalty(per=rs.units(units))).on(how="proximal"), optimizer)
    draw = torch.Generator().manual_seed(1)
    for step in range(3):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype)
        if hole and step == 2:
            with torch.no_grad():
                net[0].weight[3, 0, 0, 0] = torch.nan
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.fixture
def calls(monkeypatch):
    """What the loops answered at each step."""
    found, rows = [], together._shrink_rows

    def noted(*given):
        found.append(rows(*given))
        return found[-1]

    monkeypatch.setattr(together, "_shrink_rows", noted)
    return found


def by_formula(monkeypatch, *given, **more):
    with monkeypatch.context() as patch:
        patch.setattr(together, "_shrink_rows", lambda *_: False)
        return stepped(*given, **more)


@pytest.mark.parametrize("part", [1, 40, 1 << 18])
@pytest.mark.parametrize("units", [UNITS, UNEVEN, COLUMNS], ids=["units", "lists", "columns"])
def test_units_in_parts_are_those_of_the_formula(units, part, calls, monkeypatch):
    monkeypatch.setattr(joint, "_PART", part)
    found, expected = stepped(units), by_formula(monkeypatch, units)
    assert calls == [True] * 3
    for name, w in expected.items():
        torch.testing.assert_close(found[name], w, rtol=1e-9, atol=1e-12)
    others = by_formula(monkeypatch, units, strength=0.03)
    assert any(not torch.allclose(found[name], w) for name, w in others.items())
    dead = by_formula(monkeypatch, units, strength=3.0)
    again = stepped(units, strength=3.0)
    assert all(torch.equal(again[name] == 0, w == 0) for name, w in dead.items())
    assert int((dead["0.weight"] == 0).sum()) >= 36


def test_a_unit_with_nan_stays_as_the_step_made_it(calls, monkeypatch):
    found, expected = stepped(UNITS, hole=True), by_formula(monkeypatch, UNITS, hole=True)
    assert calls[-1]
    for name, w in expected.items():
        torch.testing.assert_close(found[name], w, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert int(found["0.weight"].isnan().sum()) == 1


@pytest.mark.filterwarnings("ignore:.*lost to rounding")
@pytest.mark.parametrize(
    "given",
    [
        {"make": torch.optim.Adamax},
        {"penalty": lambda per: rs.GroupLasso(per=per) + rs.L1()},
        {"penalty": rs.GroupLInf},
        {"dtype": torch.bfloat16},
        {"make": lambda ps, lr: torch.optim.Adam([{"params": [p], "lr": lr * (k + 1)} for k, p in enumerate(ps)])},
        {"make": torch.optim.SGD},
    ],
    ids=["another metric", "a sum", "another length", "half", "two rates", "one step for all"],
)
def test_what_the_loops_are_not_for_is_left_to_the_formula(given, calls, monkeypatch):
    found, expected = stepped(UNITS, **given), by_formula(monkeypatch, UNITS, **given)
    assert calls == [False] * 3
    assert all(torch.equal(found[name], w) for name, w in expected.items())
