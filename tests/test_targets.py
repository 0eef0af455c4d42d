"""Targets: that the controller reaches them, from far below and far above, and goes on where it was."""

import warnings

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, PenaltyError, RestrainWarning


def lasso(start, make=torch.optim.SGD, **options):
    """90 of 100 weights of a linear regression zero, by proximal steps on all data."""
    x = torch.randn(120, 100)
    y = x[:, :30] @ torch.linspace(0.2, 2, 30)[:, None] + 0.5 * torch.randn(120, 1)
    model = nn.Linear(100, 1, bias=False)
    optimizer = make(model.parameters(), **options)
    rule = rs.Target(zeros=0.9, start=start, every=5) * rs.L1().on("weight", how="proximal", name="rule")
    return model, optimizer, rule, lambda: (model(x) - y).square().mean(), lambda: 1 - model.weight.count_nonzero() / 100


def network(*sizes, activation=nn.Tanh):
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def norm(start, how="loss", make=torch.optim.Adam, lr=0.01):
    """Two thirds of the norm that the weights would have."""
    x = torch.randn(100, 10)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2]
    model = network(10, 20, 1)
    rule = rs.Target(norm=2.0, start=start) * rs.L2().on("*.weight", how=how, name="rule")
    length = lambda: torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).norm()  # noqa: E731
    return model, make(model.parameters(), lr=lr), rule, lambda: (model(x) - y).square().mean(), length


def active(start):
    """A tenth of the code of an autoencoder active."""
    x = torch.randn(200, 6) @ torch.randn(6, 12)
    model = network(12, 40, 12, activation=nn.ReLU)
    rule = rs.Target(active=0.1, start=start) * rs.L1().on(rs.outputs("1"), name="rule")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    share = lambda: (model[0](x) > 0).double().mean()  # noqa: E731
    return model, optimizer, rule, lambda: (model(x) - x).square().mean(), share


def gradient_share(start):
    """A fifth of the gradient's length from the penalty, on batches drawn anew (at a minimum it would be a half)."""
    x = torch.randn(200, 10)
    y = torch.sin(2 * x[:, :1]) + 0.3 * torch.randn(200, 1)
    model = network(10, 20, 1)
    rule = rs.Target(gradient_share=0.2, start=start) * rs.L2().on("*.weight", name="rule")
    shares = []

    def loss():
        rows = torch.randint(200, (32,))
        found = (model(x[rows]) - y[rows]).square().mean()
        if loss.measured:
            shares.append(reg_of(model).measure(found)["rule"].share)
        return found

    loss.measured = False

    def mean():
        return torch.tensor(shares).mean()

    return model, torch.optim.Adam(model.parameters(), lr=0.003), rule, loss, mean


TARGETS = {
    "zeros-sgd": (lambda start: lasso(start, lr=0.05), 900, 0.9),
    "zeros-momentum": (lambda start: lasso(start, lr=0.01, momentum=0.9), 900, 0.9),
    "zeros-adam": (lambda start: lasso(start, torch.optim.Adam, lr=0.02), 900, 0.9),
    "norm-loss": (norm, 1500, 2.0),
    "norm-gradient": (lambda start: norm(start, "gradient", torch.optim.SGD, 0.05), 1500, 2.0),
    "active": (active, 1500, 0.1),
}


def train(reg, optimizer, loss, steps):
    for _ in range(steps):
        reg.loss(loss()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("start", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_reached(name, start):
    make, steps, goal = TARGETS[name]
    model, optimizer, rule, loss, measured = make(start)
    reg = rs.attach(model, rule, optimizer)
    import time; t=time.time(); tr=[]
    for _ in range(10):
        train(reg, optimizer, loss, steps//10); tr.append(round(float(measured()),4))
    print(name, start, time.time()-t, tr, reg.strengths())
    assert float(measured()) == pytest.approx(goal, rel=0.02)
