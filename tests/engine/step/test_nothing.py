"""Rules of strength zero at the optimizer's step: they change nothing, and cost nothing after the first step."""

import pytest
import torch
from torch import nn

import restrain as rs

PENALTIES = [rs.L1(), rs.GroupLasso(per="in"), rs.L2(), rs.L1() + rs.GroupLasso(per="out"), rs.MCP()]


def trained(plan, make, steps=4):
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    optimizer = make(model.parameters(), lr=0.1)
    reg = None if plan is None else rs.attach(model, plan, optimizer)
    x = torch.randn(steps, 8, 5, dtype=torch.float64)
    for batch in x:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return model.weight.detach(), {} if reg is None else reg.values()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("how", ["proximal", "decoupled"])
def test_strength_zero_is_no_rule(penalty, how, make):
    alone, _ = trained(None, make)
    found, values = trained((0.0 * penalty).on("weight", how=how, name="none"), make)
    assert torch.equal(found, alone)
    assert values == {"none": 0.0}
    assert not torch.equal(trained((0.1 * penalty).on("weight", how=how), make)[0], alone)


def test_beside_another_rule_only_that_acts():
    plan = [(0.0 * rs.L1()).on("weight", how="proximal"), (0.2 * rs.GroupLasso(per="in")).on("weight", how="proximal")]
    found, _ = trained(plan, torch.optim.Adam)
    assert torch.equal(found, trained(plan[1:], torch.optim.Adam)[0])


def test_a_prox_is_called_at_the_first_step_only(monkeypatch):
    calls, prox = [], rs.NuclearNorm.prox
    monkeypatch.setattr(rs.NuclearNorm, "prox", lambda *given: calls.append(1) or prox(*given))
    trained((0.0 * rs.NuclearNorm()).on("weight", how="proximal"), torch.optim.SGD)
    assert len(calls) == 1
    trained((0.1 * rs.NuclearNorm()).on("weight", how="proximal"), torch.optim.SGD)
    assert len(calls) == 5


def test_what_a_step_refuses_it_refuses_at_strength_zero_too():
    model = nn.Conv2d(2, 4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    reg = rs.attach(model, (0.0 * rs.Decorrelation()).on("weight", how="decoupled"), optimizer)
    model(torch.randn(1, 2, 5, 5)).sum().backward()
    with pytest.raises(rs.errors.PenaltyError, match="which axis"):
        optimizer.step()
    reg.detach()


def test_a_strength_that_moves_from_zero_acts():
    alone, _ = trained(None, torch.optim.SGD)
    moving = rs.schedules.Linear(0.0, 1.0, steps=4)
    found, _ = trained((moving * rs.L1()).on("weight", how="proximal"), torch.optim.SGD)
    assert not torch.equal(found, alone)
