"""Start and every, and what rules keep from step to step."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PlanError


@pytest.mark.parametrize(("every", "start", "turns"), [(1, 0, [0, 1, 2, 3, 4, 5]), (2, 1, [1, 3, 5]), (3, 4, [4])])
@pytest.mark.parametrize("how", ["loss", "gradient", "proximal"])
def test_a_rule_acts_from_its_start_on(how, every, start, turns):
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.5 * rs.L2().on("weight", how=how, every=every, start=start), optimizer)
    acted = []
    for step in range(6):
        before = model.weight.detach().clone()
        reg.loss(0 * model(torch.ones(1, 3)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        acted += [step] * (not torch.equal(before, model.weight))
    assert acted == turns


@pytest.mark.parametrize("start", [-1, 0.5, True])
def test_a_start_that_is_none(start):
    with pytest.raises(PlanError, match="start="):
        rs.L1().on("weight", start=start)


def test_a_start_is_for_steps():
    with pytest.raises(PlanError, match="each forward"):
        rs.Dropout(0.1).on(rs.inputs(), start=3)


@dataclass(frozen=True)
class Lag(rs.Penalty, register=False):
    """The squared distance to the weight as it was after the last step."""

    last: torch.Tensor | None = None

    def bound_to(self, at):
        return Lag(at.tensor.detach().clone())

    def state(self):
        return {"last": self.last}

    def stepped(self, w):
        self.last.copy_(w)

    def __call__(self, w):
        return (w - self.last).square().sum()


def test_what_rules_keep_is_brought_up_to_date_saved_and_loaded():
    def start():
        model = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, rs.attach(model, 0.5 * Lag().on("weight"), optimizer)

    model, optimizer, reg = start()
    for _ in range(3):
        before = model.weight.detach().clone()
        reg.loss(model(torch.ones(1, 3)).sum()).backward()
        assert reg.values() == {"0.5 * Lag() on 'weight'": 0.0}
        optimizer.step()
        assert not torch.equal(before, model.weight)
    (kept,) = reg.state_dict()["kept"].values()
    assert torch.equal(kept["last"], model.weight)
    _, _, other = start()
    other.load_state_dict(reg.state_dict())
    (loaded,) = other.state_dict()["kept"].values()
    assert torch.equal(loaded["last"], model.weight)
    assert loaded["last"] is not kept["last"]
