"""Derivatives along a direction by the graph of a forward, against Jacobians by reverse mode; when that isn't taken."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from jacobians import each_jacobian, equal
from jacobians import made as made_net
from restrain.penalties import estimators, tangents
from restrain.penalties.estimators import Batch


class Of(nn.Module):
    """A function of what two layers make of the input."""

    def __init__(self, function):
        super().__init__()
        self.function, self.left, self.right = function, nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.function(self.left(x), self.right(x))


class Frozen(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.requires_grad_(False)


ACTIVATIONS = [
    torch.tanh, torch.sigmoid, torch.relu, F.gelu, partial(F.gelu, approximate="tanh"), F.silu, F.hardtanh, F.mish,
    partial(F.elu, alpha=0.7), partial(F.leaky_relu, negative_slope=0.2), partial(F.softplus, beta=2), F.hardswish,
    F.logsigmoid, partial(F.softmax, dim=1), partial(F.softmax, dim=0), torch.exp, torch.sin, torch.cos, torch.neg,
    torch.clone, partial(F.relu, inplace=True),
]  # fmt: skip
TWO = [
    torch.add, partial(torch.add, alpha=0.3), torch.sub, partial(torch.sub, alpha=0.3), torch.mul,
    lambda h, g: h + g[:1].detach(), lambda h, g: h[:1].detach() - g, lambda h, g: 3 - g, lambda h, g: h * 2.5,
    lambda h, g: h * g.detach().sin(), lambda h, g: h / g.detach().exp(), lambda h, g: h / 7 + g,
    lambda h, g: h.unsqueeze(1) + g, lambda h, g: h.mul_(g.exp()), lambda h, g: h.add_(g), lambda h, g: h.exp() * h,
    lambda h, g: h + h + g, lambda h, g: F.dropout(h, 0.5),
]  # fmt: skip
NETS = {
    **{f"activation {i}": (lambda f=f: Of(lambda h, g: f(h) + g), (5, 4)) for i, f in enumerate(ACTIVATIONS)},
    **{f"two {i}": (lambda f=f: Of(f), (5, 4)) for i, f in enumerate(TWO)},
    "deep": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2)), (5, 4)),
    "frozen": (lambda: nn.Sequential(Frozen(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), Frozen(6, 2)), (5, 4)),
    "in time": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)), (3, 5, 4)),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 3, stride=2, bias=False), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(),
            nn.Linear(6, 2),
        ),
        (3, 2, 12, 12),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, dilation=2), nn.Tanh(),
            nn.MaxPool2d(3, 2, 1),
        ),
        (2, 2, 5, 4),
    ),
    "signals": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), (3, 2, 6)),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double()
    return net, torch.randn(shape, dtype=torch.float64)


def along(net, x, u):
    """Ju, of the whole batch, by reverse mode; dropout as it was."""
    torch.manual_seed(1)
    jacobian = torch.autograd.functional.jacobian(net, x, create_graph=True)
    return (jacobian * u).flatten(-x.dim()).sum(-1)


def names(tensor):
    return {node.name() for node in tangents._upwards([tensor.grad_fn])}


def forward(name):
    """The inputs and outputs of a forward, u and Ju, by reverse mode and in dropout's own draw."""
    net, x = made(name)
    u = torch.randn_like(x)
    torch.manual_seed(1)
    jacobian = torch.autograd.functional.jacobian(net, x, create_graph=True)
    x.requires_grad_()
    torch.manual_seed(1)
    return net, x, net(x), u, (jacobian * u).flatten(-x.dim()).sum(-1)


def gradients(net, value):
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", NETS)
def test_as_by_reverse_mode(name, monkeypatch):
    net, x, y, u, expected = forward(name)
    monkeypatch.setattr(estimators, "signs", lambda like, generator: u)
    (found,), _ = tangents.pushed_by_graph([Batch.of(y, 0)], [Batch.of(x, 0)])
    torch.testing.assert_close(found.tensor, expected)
    scale = torch.randn_like(y)
    wanted = gradients(net, (expected.square() * scale).sum())
    torch.testing.assert_close(gradients(net, (found.tensor.square() * scale).sum()), wanted)


def test_each_rule_is_tried():
    tried = {node.name() for name in NETS for node in tangents._upwards([forward(name)[2].grad_fn])}
    assert set(tangents._RULES) <= tried


@pytest.mark.parametrize(
    "unknown",
    [
        nn.LayerNorm(3), nn.PReLU(), torch.atan, lambda h: 1 / h, lambda h: h @ h.t(), lambda h: h.split(1, 1)[1],
        lambda h: torch.addmm(h, h, torch.eye(3), alpha=2), lambda h: torch.cat([h, h]), lambda h: h.t(),
    ],
)  # fmt: skip
def test_what_is_not_known_is_left_alone(unknown):
    x = torch.randn(4, 3, requires_grad=True)
    assert tangents.pushed_by_graph([Batch.of(x * 1, 0)], [Batch.of(x, 0)]) is not None
    assert tangents.pushed_by_graph([Batch.of(unknown(x * 1), 0)], [Batch.of(x, 0)]) is None


def test_an_input_that_the_graph_does_not_lead_to():
    x = torch.randn(4, 3, requires_grad=True)
    outputs = (nn.Linear(3, 2)(x.detach()), x, torch.ones(4, 2))
    assert all(tangents.pushed_by_graph([Batch.of(y, 0)], [Batch.of(x, 0)]) is None for y in outputs)


# Attached


class Changing(nn.Module):
    """Whose way of computing changes; of one input and one output, so that random signs change nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.way = nn.Linear(1, 6), nn.Linear(6, 1), lambda h, x: h

    def forward(self, x):
        return self.second(self.way(self.first(x).tanh(), x))


def step(model, x, reg=None):
    """The gradient of the regularised loss, ours or by the Jacobian of each sample."""
    if reg is not None:
        loss = reg.loss(model(x).square().mean())
    else:
        loss = model(x).square().mean() + 0.5 * each_jacobian(model, x).square().sum() / len(x)
    return loss.detach(), list(gradients(model, loss))


def test_inputs_need_no_gradient_where_they_are_only_multiplied():
    model, x = Changing().double(), torch.randn(5, 1, dtype=torch.float64)
    seen = []
    model.first.register_forward_hook(lambda m, args, out: seen.append(args[0].requires_grad))
    with rs.attach(model, 0.5 * rs.JacobianNorm(estimator="jvp").on()) as reg:
        for _ in range(3):
            found = step(model, x, reg)
        assert reg.table().endswith("estimator jvp, 1 random direction")
        assert seen == [True, False, False]  # a look at a model that isn't known takes one
    equal(found, step(model, x))


def test_a_parameter_that_is_frozen_on_the_way():
    """Nothing tells it from a constant made of the input; so the input has to be in the graph."""
    model, x = Changing().double(), torch.randn(5, 1, dtype=torch.float64)
    with rs.attach(model, 0.5 * rs.JacobianNorm(estimator="jvp").on()) as reg:
        for number in range(5):
            model.first.bias.requires_grad_(number < 2)
            equal(step(model, x, reg), step(model, x))
        assert "second forward" not in reg.table()
        model.way = WAYS["unknown"]
        step(model, x, reg)
        assert "estimator jvp, by a second forward" in reg.table()


WAYS = {
    "unknown": lambda h, x: h.atan(),
    "past the graph": lambda h, x: h + x.sin(),  # where x needs no gradient, this is a constant to the graph
    "a factor past the graph": lambda h, x: h * x.sin(),
    "past the graph in a bias": lambda h, x: torch.addmm(x.sin() * torch.ones(6), h, torch.eye(6).double()),
    "into a parameter": lambda h, x: torch.addmm(x.sin() * nn.Parameter(torch.ones(6)), h, torch.eye(6).double()),
    "never": lambda h, x: torch.ones_like(h) * h.detach(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settled", [False, True])
def test_a_model_that_does_something_else(way, settled):
    model, x = Changing().double(), torch.randn(5, 1, dtype=torch.float64)
    with rs.attach(model, 0.5 * rs.JacobianNorm(estimator="jvp").on()) as reg:
        for _ in range(2 if settled else 0):
            step(model, x, reg)
        model.way = WAYS[way]
        for _ in range(2):
            equal(step(model, x, reg), step(model, x))


def test_the_same_directions_as_in_a_second_forward():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4)
    rule = rs.JacobianNorm(estimator="jvp", projections=2)
    with rs.attach(model, rule.on()) as reg:
        for _ in range(2):  # the input in the graph, and out of it
            model(x)
            torch.manual_seed(1)
            found = reg.penalty()
            torch.manual_seed(1)
            torch.testing.assert_close(found, rule(model, x))


def test_places_that_depend_on_each_other():
    model, x = made_net()
    wrt = rs.inputs() | rs.outputs("first")
    found = {}
    for estimator in ("jvp", "vjp"):
        torch.manual_seed(2)
        with rs.attach(model, rs.JacobianNorm(estimator=estimator, wrt=wrt, projections=400).on()) as reg:
            model(x)
            found[estimator] = reg.penalty().detach()
    torch.testing.assert_close(found["jvp"], found["vjp"], rtol=0.2, atol=0)
