"""Penalties on derivatives: against the Jacobian of each sample, taken one by one; in every way that a model runs."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import restrain as rs
from jacobians import ESTIMATORS, each_jacobian, gradients
from restrain.errors import CaptureError


def frobenius(f, x):
    return each_jacobian(f, x).square().sum() / len(x)


class Recurrent(nn.Module):
    """A tuple as output, whose second member is a state of shape (layers, batch, units)."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        y, (h, _) = self.lstm(x)
        return self.head(y), h


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Twice(nn.Module):
    """A layer that is called twice, and two members of a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x):
        h = self.act(self.first(x))
        return {"ids": torch.arange(len(x)), "y": self.last(self.act(self.first(h)))}


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))


def convolutional():
    layers = (nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 3))


def wide():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 20), nn.Sigmoid())


# name: (model, shape of a sample, rule, the function whose Jacobian it is and where, of the model)
PROBLEMS = {
    "code": (mlp, (4,), rs.Contractive().on(rs.outputs("3")), lambda m: m[:4]),
    "closed form": (mlp, (4,), rs.Contractive().on(rs.outputs("1")), lambda m: m[:2]),
    "closed form by via": (
        mlp,
        (4,),
        rs.Contractive().on(rs.outputs("0", via=torch.sigmoid)),
        lambda m: lambda x: m[0](x).sigmoid(),
    ),
    "linear": (
        mlp,
        (4,),
        rs.Contractive(wrt=rs.inputs("2")).on(rs.outputs("2")),
        lambda m: m[2],
        lambda m: m[:2],
    ),
    "between layers": (
        mlp,
        (4,),
        rs.JacobianNorm(of=rs.outputs("4"), wrt=rs.outputs("0")).on(),
        lambda m: m[1:],
        lambda m: m[0],
    ),
    "at one place": (
        mlp,
        (4,),
        rs.JacobianNorm(wrt=rs.outputs("0")).on(rs.outputs("0", via=torch.tanh)),
        lambda m: torch.tanh,
        lambda m: m[0],
    ),
    "two places": (
        mlp,
        (4,),
        rs.JacobianNorm().on(rs.outputs("0") | rs.outputs("3")),
        lambda m: lambda x: torch.cat([m[0](x), m[:4](x)], 1),
    ),
    "by columns": (wide, (2,), rs.JacobianNorm().on(rs.outputs()), lambda m: m),
    "images": (convolutional, (2, 6, 6), rs.JacobianNorm().on(rs.outputs()), lambda m: m),
    "feature maps": (
        convolutional,
        (2, 6, 6),
        rs.JacobianNorm(wrt=rs.outputs("1")).on(rs.outputs("3")),
        lambda m: m[2:4],
        lambda m: m[:2],
    ),
    "time": (Recurrent, (5, 3), rs.JacobianNorm().on(rs.outputs("head")), lambda m: lambda x: m(x)[0]),
    "state": (
        Recurrent,
        (5, 3),
        rs.JacobianNorm().on(rs.outputs(index=1, batch_dim=1)),
        lambda m: lambda x: m(x)[1].squeeze(0),
    ),
    "attention": (Attention, (3, 8), rs.JacobianNorm().on(rs.outputs("head")), lambda m: m),
    "a layer called twice": (
        Twice,
        (4,),
        rs.JacobianNorm().on(rs.outputs("act", calls="sum")),
        lambda m: lambda x: torch.cat([m.act(m.first(x)), m.act(m.first(m.act(m.first(x))))], 1),
    ),
    "a dict": (Twice, (4,), rs.JacobianNorm().on(rs.outputs(index="y")), lambda m: lambda x: m(x)["y"]),
}


def first_tensor(y):
    return y["y"] if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y


def problem(name, count=3):
    make, shape, rule, function, *before = PROBLEMS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(count, *shape, dtype=torch.float64)
    return model, x, rule, function(model), before[0](model)(x) if before else x


def estimated(rule, estimator, projections=1):
    """The rule by another estimator."""
    return dataclasses.replace(rule, what=dataclasses.replace(rule.what, estimator=estimator, projections=projections))


def by_hand(name, strength=0.3):
    """The regularised loss, its gradient, and the penalty, from the Jacobian of each sample."""
    model, x, _, function, point = problem(name)
    with sdpa_kernel(SDPBackend.MATH):
        penalty = strength * frobenius(function, point)
        loss = first_tensor(model(x)).square().mean() + penalty
    return loss.detach(), gradients(model, loss), penalty.item()


@pytest.mark.parametrize(("estimator", "projections"), [("exact", 1), ("auto", 10_000)], ids=["exact", "auto"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_and_gradient_are_those_of_each_samples_jacobian(name, estimator, projections):
    model, x, rule, _, _ = problem(name)
    loss, expected, penalty = by_hand(name)
    with rs.attach(model, 0.3 * estimated(rule, estimator, projections)) as reg, sdpa_kernel(SDPBackend.MATH):
        found = reg.loss(first_tensor(model(x)).square().mean())
        torch.testing.assert_close(found.detach(), loss)
        torch.testing.assert_close(gradients(model, found), expected)
        assert "estimator exact" in reg.table()
        assert list(reg.values().values()) == pytest.approx([penalty])
    assert not x.requires_grad
    assert x.grad is None


def test_the_reference_notices_a_wrong_strength():
    model, x, rule, _, _ = problem("code")
    with rs.attach(model, 0.301 * estimated(rule, "exact")) as reg:
        found = reg.loss(model(x).square().mean())
        with pytest.raises(AssertionError):
            torch.testing.assert_close(gradients(model, found), by_hand("code")[1])


def test_closed_forms_are_taken_where_they_hold():
    for name in PROBLEMS:
        model, x, rule, _, _ = problem(name)
        with rs.attach(model, rule) as reg:
            reg.loss(first_tensor(model(x)).square().mean())
            assert ("in closed form" in reg.table()) == (name in ("closed form", "closed form by via", "linear"))


# Estimators


def samples(name, estimator, n, strength=1.0):
    """n estimates of the penalty and its gradient, a row each."""
    model, x, rule, _, _ = problem(name)
    rows = []
    with rs.attach(model, strength * estimated(rule, estimator)) as reg, sdpa_kernel(SDPBackend.MATH):
        for _ in range(n):
            model(x)
            value = reg.penalty()
            rows.append(torch.cat([value.reshape(1), *(g.flatten() for g in gradients(model, value))]).detach())
    return torch.stack(rows)


def deviation(rows, expected):
    """The greatest deviation of the means, in standard errors."""
    error = rows.std(0) / len(rows) ** 0.5
    return float(((rows.mean(0) - expected).abs() / (error + 1e-7 * expected.abs() + 1e-9)).max())


def truth(name):
    model, _, _, function, point = problem(name)
    with sdpa_kernel(SDPBackend.MATH):
        value = frobenius(function, point)
    return torch.cat([value.reshape(1), *(g.flatten() for g in gradients(model, value))]).detach()


@pytest.mark.parametrize("estimator", ["vjp", "jvp", "difference"])
@pytest.mark.parametrize(("name", "n"), [("code", 200), ("between layers", 200), ("images", 100), ("time", 60)])
def test_estimates_of_value_and_gradient_are_unbiased(name, n, estimator):
    rows = samples(name, estimator, n)
    assert rows[:, 0].std() > 0
    assert deviation(rows, truth(name)) < 4.8  # of up to 300 numbers, each beyond it with a probability of 2e-6


def test_the_bound_notices_a_wrong_estimate():
    assert deviation(samples("code", "vjp", 800, strength=1.1), truth("code")) > 4.8


@pytest.mark.parametrize("estimator", ["vjp", "difference"])
def test_more_directions_deviate_less(estimator):
    _, x, rule, function, _ = problem("code")
    whats = [estimated(rule, estimator, projections).what for projections in (1, 36)]
    few, many = (torch.stack([what(function, x).detach() for _ in range(30)]).std().item() for what in whats)
    assert few / many == pytest.approx(6, rel=0.4)


def test_signs_are_exact_where_the_jacobian_is_diagonal():
    x = torch.randn(5, 3, dtype=torch.float64)
    for estimator in ESTIMATORS:
        value = rs.JacobianNorm(estimator=estimator)(torch.tanh, x)
        torch.testing.assert_close(value, (1 - x.tanh() ** 2).square().sum() / 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_is_near_enough_at_any_size_of_input(dtype):
    for size in (1e-4, 1.0, 1e4):
        x = size * torch.randn(6, 4, dtype=dtype)
        found = rs.JacobianNorm(estimator="difference")(lambda h, size=size: (h / size).sin() * size, x)
        torch.testing.assert_close(found, (x / size).cos().square().sum() / 6, rtol=3e-4, atol=0)
    zero = rs.JacobianNorm(estimator="difference")(lambda h: 2 * h, torch.zeros(6, 4, dtype=dtype))
    torch.testing.assert_close(zero, torch.tensor(16.0, dtype=dtype))


# Gradients


def critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1)).double(), torch.randn(5, 4).double()


def lengths(model, x):
    """The length of the gradient of each sample's summed outputs."""
    return torch.stack([torch.func.grad(lambda one: model(one).sum())(one).norm() for one in x])


@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
def test_gradient_penalty(target):
    model, x = critic()
    expected = (lengths(model, x) - target).square().mean()
    with rs.attach(model, 10 * rs.GradientPenalty(target).on()) as reg:
        loss = reg.loss(model(x).mean())
        torch.testing.assert_close(loss, model(x).mean() + 10 * expected)
        torch.testing.assert_close(gradients(model, loss), gradients(model, model(x).mean() + 10 * expected))
    torch.testing.assert_close(rs.GradientPenalty(target)(model, x), expected)


def test_gradient_penalty_sums_outputs_and_takes_any_places():
    model, x = mlp().double(), torch.randn(5, 4).double()
    with rs.attach(model, rs.GradientPenalty(1.0, wrt=rs.outputs("1")).on(rs.outputs("3"))) as reg:
        model(x)
        found = reg.penalty()
    torch.testing.assert_close(found, (lengths(model[2:4], model[:2](x)) - 1).square().mean())


def test_the_gradient_of_a_norm_at_zero_is_zero():
    model, x = nn.Linear(4, 1), torch.randn(5, 4)
    nn.init.zeros_(model.weight)
    for target in (0.0, 1.0):
        (found,) = torch.autograd.grad(rs.GradientPenalty(target)(model, x), model.weight)
        assert found.eq(0).all()


@pytest.mark.parametrize("estimator", ["jvp", "difference"])
def test_a_squared_gradient_by_directions_is_unbiased(estimator):
    model, x = critic()
    values = [rs.GradientPenalty(estimator=estimator)(model, x).detach() for _ in range(150)]
    assert deviation(torch.stack(values).unsqueeze(1), lengths(model, x).square().mean().detach()) < 4.8


@pytest.mark.parametrize("place", [None, "0"])
def test_double_backpropagation(place):
    model, x, y = mlp().double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    head, h = (model, x) if place is None else (model[1:], model[0](x))
    each = [torch.func.grad(lambda one, c=c: F.cross_entropy(head(one), c))(one) for one, c in zip(h, y, strict=True)]
    expected = torch.stack(each).square().sum(1).mean()
    rule = rs.GradientPenalty(of="loss").on(None if place is None else rs.outputs(place))
    with rs.attach(model, 0.5 * rule) as reg:
        loss = F.cross_entropy(model(x), y)
        total = reg.loss(loss)
        torch.testing.assert_close(total, loss + 0.5 * expected)
        torch.testing.assert_close(gradients(model, total), gradients(model, loss + 0.5 * expected))
        model(x)
        assert reg.penalty() == 0  # which has no loss to differentiate
    found = rs.GradientPenalty(of="loss")(lambda x: F.cross_entropy(model(x), y), x)
    if place is None:
        torch.testing.assert_close(found, expected)


# Functions


class Squares(torch.autograd.Function):
    """Which can neither be batched nor taken in forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_operations_that_cannot_be_batched():
    x = torch.randn(4, 3, dtype=torch.float64)
    for estimator in ("exact", "vjp", "difference"):
        found = rs.JacobianNorm(estimator=estimator)(Squares.apply, x)
        torch.testing.assert_close(found, (2 * x).square().sum() / 4)
    with pytest.raises(CaptureError, match="use estimator='difference'"):
        rs.JacobianNorm(estimator="jvp")(Squares.apply, x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_batches_and_no_grad(estimator):
    model, penalty = nn.Linear(3, 2), rs.JacobianNorm(estimator=estimator)
    assert penalty(model, torch.zeros(0, 3)) == 0
    assert penalty(model, torch.zeros(4, 3)).requires_grad
    with torch.no_grad():
        assert not penalty(model, torch.zeros(4, 3)).requires_grad
    with rs.attach(model, rs.JacobianNorm(estimator=estimator).on()) as reg:
        model(torch.zeros(0, 3))
        assert reg.penalty() == 0
