"""torch.func around a model with rules: whose parameters are penalised, and what can't leave a transform."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import restrain as rs
from restrain.errors import CaptureError, OptimizerError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)


def others(model, by=2.0):
    return {name: (by * p).detach().requires_grad_() for name, p in model.named_parameters()}


def test_penalties_are_those_of_the_parameters_that_the_last_forward_used():
    model = net()
    reg = rs.attach(model, 0.1 * rs.L1().on("*.weight"))
    own, parameters = 0.1 * rs.L1()([model[0].weight, model[2].weight]), others(model)

    def added():
        return reg.loss(torch.zeros((), dtype=torch.float64))

    functional_call(model, parameters, (X,))
    torch.testing.assert_close(added(), 2 * own)
    added().backward()
    torch.testing.assert_close(parameters["0.weight"].grad, 0.1 * parameters["0.weight"].detach().sign())
    assert model[0].weight.grad is None
    functional_call(model, {"0.weight": torch.zeros(3, 4, dtype=torch.float64)}, (X,))  # a part of them
    torch.testing.assert_close(added(), 0.1 * rs.L1()(model[2].weight))
    with torch.no_grad():
        functional_call(model, parameters, (X,))
        torch.testing.assert_close(added(), 2 * own)
    model(X)
    torch.testing.assert_close(added(), own)
    functional_call(model, parameters, (X,))
    torch.optim.SGD([nn.Parameter(torch.zeros(()))]).step()  # one of another model doesn't end it
    torch.testing.assert_close(added(), 2 * own)
    torch.optim.SGD(model.parameters()).step()
    torch.testing.assert_close(added(), own)


def test_parameters_that_are_replaced_for_good_are_no_others():
    model = net()
    reg = rs.attach(model, 0.1 * rs.L1().on("*.weight"))
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()}, assign=True)
    for _ in range(2):
        reg.loss(model(X).mean())
    assert not reg._forwards.overridden._of_forward
    model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()}, assign=True)
    found = reg.values()["0.1 * L1() on '*.weight'"]
    assert found == pytest.approx((0.1 * rs.L1()([model[0].weight, model[2].weight])).item())


def test_inner_steps_of_meta_learning():
    model = net()
    reg = rs.attach(model, [0.1 * rs.L2().on("*.weight"), 0.3 * rs.L1().on(rs.outputs("1"))])

    def inner(loss_of):
        own = dict(model.named_parameters())
        found = torch.autograd.grad(loss_of(own), list(own.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(own.items(), found, strict=True)}
        return torch.autograd.grad(loss_of(fast), list(own.values()))

    def by_hand(parameters):
        h = torch.tanh(X @ parameters["0.weight"].T + parameters["0.bias"])
        out = h @ parameters["2.weight"].T + parameters["2.bias"]
        decay = parameters["0.weight"].square().sum() + parameters["2.weight"].square().sum()
        return out.square().mean() + 0.1 * decay + 0.3 * h.abs().sum() / len(X)

    found = inner(lambda parameters: reg.loss(functional_call(model, parameters, (X,)).square().mean()))
    torch.testing.assert_close(found, inner(by_hand))


@pytest.mark.parametrize("rule", [0.3 * rs.L1().on(rs.outputs("1")), 0.3 * rs.Contractive().on(rs.outputs("1"))])
def test_what_only_a_transform_has_seen_is_an_error(rule):
    model = net()
    reg = rs.attach(model, rule)
    reg.loss(model(X).square().mean()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    each = vmap(model)(X[:, None])  # the loss comes too late
    with pytest.raises(CaptureError, match=r"inside a transform of torch\.func"):
        reg.loss(each.square().mean())
    vmap(grad(lambda x: model(x).sum()))(X[:, None])  # a look between two plain forwards
    reg.loss(model(X).square().mean()).backward()
    vmap(grad(lambda x: model(x).sum()))(X[:, None])  # ... and after the loss
    reg.loss(model(X).square().mean()).backward()


def test_values_inside_a_transform_are_told_outside():
    model = net()
    reg = rs.attach(model, 0.3 * rs.L1().on(rs.outputs("1"), name="code"))
    vmap(lambda x: reg.loss(model(x[None]).sum()))(X)
    assert reg.values()["code"] == pytest.approx(0.3 * model[1](model[0](X)).abs().sum(1).mean().item())


def test_steps_of_other_parameters_are_not_counted():
    models = [net(), net()]
    stacked, _ = stack_module_state(models)
    optimizer = torch.optim.SGD(stacked.values(), lr=0.1)
    rs.attach(models[0], 0.1 * rs.L2().on("*.weight"), optimizer).detach()
    for rule in (rs.schedules.WarmUp(10) * rs.L2().on("*.weight"), rs.L2().on("*.weight", every=2)):
        with pytest.raises(OptimizerError, match="none would be counted"):
            rs.attach(models[0], rule, optimizer)
