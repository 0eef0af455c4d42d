"""Rules on one tensor join the loss as one penalty: value and gradient are those of their sum, written by hand."""

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.penalties.base import joined

WARM = rs.schedules.WarmUp(steps=3)
SUMS = {
    "equal ones": ([rs.L1(), 0.3 * rs.L1(), 0.2 * rs.L2()], lambda p, t: 1.3 * p.abs().sum() + 0.2 * p.square().sum()),
    "one that moves": ([rs.L1(), 0.3 * WARM * rs.L1()], lambda p, t: (1 + 0.3 * WARM.at(t)) * p.abs().sum()),
    "several, of which one moves": (
        [rs.L1() + rs.Norm(2), 0.1 * rs.L2(), 0.3 * WARM * rs.L1()],
        lambda p, t: (1 + 0.3 * WARM.at(t)) * p.abs().sum() + p.norm() + 0.1 * p.square().sum(),
    ),
    "a moving sum": (
        [WARM * (rs.L1() + rs.L2()), rs.L1(), rs.L1()],
        lambda p, t: 2 * p.abs().sum() + WARM.at(t) * (p.abs() + p.square()).sum(),
    ),
    "no closed form": ([rs.Norm(3), 0.5 * rs.Norm(3)], lambda p, t: 1.5 * p.norm(3)),
}


def trained(loss_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer, x, found = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(6, 4, dtype=torch.float64), []
    loss = loss_of(model, optimizer)
    for step in range(5):
        optimizer.zero_grad()
        value = loss(model(x).square().mean(), step)
        value.backward()
        found += [value.detach(), *[p.grad.clone() for p in model.parameters()]]
        optimizer.step()
    return found


@pytest.mark.parametrize("name", SUMS)
def test_the_sum_is_that_of_the_rules(name):
    penalties, formula = SUMS[name]

    def ours(model, optimizer):
        reg = rs.attach(model, [one.on("*.weight", name=str(i)) for i, one in enumerate(penalties)], optimizer)
        return lambda data, step: reg.loss(data)

    def by_hand(model, optimizer):
        return lambda data, step: data + sum(formula(p, step) for p in model.parameters() if p.dim() == 2)

    for a, b in zip(trained(ours), trained(by_hand), strict=True):
        torch.testing.assert_close(a, b)


def test_the_comparison_notices_a_strength_that_stands_still():
    still = 0.3 * WARM.at(0) * rs.L1()
    moving = trained(lambda model, o: lambda data, step: data + SUMS["one that moves"][1](model[0].weight, step))
    other = trained(lambda model, o: lambda data, step: data + (rs.L1() + still)(model[0].weight))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(moving, other)


def test_what_changes_afterwards_is_seen():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    reg = rs.attach(model, [rs.L1().on("*.weight"), rs.L2().on("*.weight"), rs.L1().on("1.weight", reduce="mean")])

    def expected():
        ws = [layer.weight for layer in model if layer.weight.requires_grad]
        rest = model[1].weight.abs().mean() if model[1].weight.requires_grad else 0
        return sum((w.abs() + w.square()).sum() for w in ws) + rest

    torch.testing.assert_close(reg.penalty(), expected())
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(reg.penalty(), expected())
    model[0].weight = nn.Parameter(torch.ones(2, 3))
    torch.testing.assert_close(reg.penalty(), expected())


def test_rules_without_strength_add_nothing():
    model = nn.Linear(3, 2)
    reg = rs.attach(model, [(0.0 * rs.L1()).on("weight"), (0.0 * rs.L2()).on("weight")])
    reg.penalty().backward()
    assert float(reg.penalty().detach()) == 0
    assert not model.weight.grad.any()


def test_joined_penalties_are_few():
    many = [0.01 * rs.L1(), *[0.1 * rs.ElasticNet(1.0, 2.0)] * 50, *[rs.Huber(0.5)] * 20]
    assert len(joined(many).leaves()) == 2
    w = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(joined(many)(w), sum(one(w) for one in many))
