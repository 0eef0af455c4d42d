"""Rules at the step, and optimizers that weren't given to attach."""

import copy

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import OptimizerError

RULE = rs.L1().on("weight", how="proximal")
MISSED = r"'weight' was moved by a \w+ that wasn't given to rs.attach.*reg.detach\(\), then rs.attach"


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("another", [lambda model, optimizer: sgd(model), lambda model, optimizer: copied(optimizer)])
def test_another_optimizer_is_an_error(another):
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    reg = rs.attach(model, RULE, optimizer)
    new = another(model, optimizer)
    with pytest.raises(OptimizerError, match=MISSED):
        step(model, new)
    reg.detach()
    rs.attach(model, reg.plan, new)
    step(model, new)


def copied(optimizer):
    """A copy for the same parameters, as a sweep may make."""
    return copy.deepcopy(optimizer, {id(p): p for group in optimizer.param_groups for p in group["params"]})


class Around(torch.optim.Optimizer):
    """Sharpness-aware minimisation and others hold another optimizer that makes the step."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self):
        self.base.step()


@pytest.mark.parametrize("given", [lambda outer: outer, lambda outer: outer.base])
def test_an_optimizer_inside_another(given):
    model = nn.Linear(3, 2)
    outer = Around(model.parameters())
    rs.attach(model, rs.MaxNorm(0.1).on("weight"), given(outer))
    for _ in range(3):
        step(model, outer)
        assert model.weight.norm(dim=1).max() < 0.1001


def test_an_optimizer_of_other_parameters_is_none_of_ours():
    model = nn.Linear(3, 2)
    mine, other = torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    rs.attach(model, RULE, mine)
    for _ in range(3):
        step(model, mine)
        other.step()
    model.weight.requires_grad_(False)
    for _ in range(3):
        step(model, sgd(model))
