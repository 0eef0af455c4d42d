"""Certificates and paths of units across tensors, against NumPy: prox-gradient map, group lasso by FISTA, dual norm."""

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, NoProxError
from restrain.paths import greatest

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((80, 6)), RNG.standard_normal((80, 6))
Y = (A[:, :2] + B[:, :2]).sum(1, keepdims=True) @ np.ones((1, 2)) + 0.1 * RNG.standard_normal((80, 2))
LEFT, RIGHT, TARGET = map(torch.from_numpy, (A, B, Y))
PER = rs.units({"left.weight": "in", "right.weight": "in"})
SIZE = 4  # entries of a unit: two outputs in two tensors


class Both(nn.Module):
    """Two linear layers whose outputs are added; a unit is an input of both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Linear(6, 2, bias=False).double() for _ in range(2))

    def forward(self):
        return self.left(LEFT) + self.right(RIGHT)


def loss_of(model):
    return (model() - TARGET).square().mean()


def rows(model):
    """The units as rows of a NumPy matrix."""
    return torch.cat([model.left.weight, model.right.weight]).detach().numpy().T.copy()


def slope(w):
    x = np.concatenate([A, B], 1)
    flat = np.concatenate([w.T[:2].T, w.T[2:].T])  # (12 inputs, 2 outputs)
    g = 2 * x.T @ (x @ flat - Y) / Y.size
    return np.concatenate([g[:6], g[6:]], 1)


def shrunk(z, threshold):
    lengths = np.linalg.norm(z, axis=1, keepdims=True)
    return z * np.maximum(1 - threshold / np.maximum(lengths, 1e-300), 0)


def best(strength, l2=0.0, positive=False, steps=20_000):
    """The minimiser by FISTA in NumPy."""
    x = y = np.zeros((6, SIZE))
    t, theta = 0.5, 1.0
    for _ in range(steps):
        z = y - t * (slope(y) + 2 * l2 * y)
        new = shrunk(np.maximum(z, 0) if positive else z, t * strength * SIZE**0.5)
        following = (1 + (1 + 4 * theta**2) ** 0.5) / 2
        y, x, theta = new + (theta - 1) / following * (new - x), new, following
    return x


def test_the_residual_is_that_of_the_prox_gradient_map():
    model, strength, t = Both(), 0.1, 0.05
    reg = rs.attach(model, (strength * rs.GroupLasso(per=PER)).on(how="loss", name="units"))
    with torch.no_grad():
        for layer in (model.left, model.right):
            layer.weight[:, [1, 4]] = 0
    w = rows(model)
    z = shrunk(w - t * slope(w), t * strength * SIZE**0.5)
    cert = reg.certificate(lambda: loss_of(model), step=t)
    assert cert.residual == cert.rules["units"].residual == pytest.approx(np.abs((w - z) / t).max(), rel=1e-12)
    assert cert.rules["units"].tensors == pytest.approx(
        {"left.weight": np.abs((w - z) / t)[:, :2].max(), "right.weight": np.abs((w - z) / t)[:, 2:].max()}
    )
    (back,) = cert.rules["units"].returning
    excess = np.linalg.norm(slope(w), axis=1) - strength * SIZE**0.5
    expected = [unit for unit in (1, 4) if excess[unit] > 0]
    assert expected
    assert (back.name, back.groups[:, 0].tolist()) == ("left.weight + right.weight", expected)
    np.testing.assert_allclose(back.excess, excess[expected], rtol=1e-9)
    alone = rs.attach(model, (strength * rs.GroupLasso(per="in")).on("*.weight", how="loss"))
    other = alone.certificate(lambda: loss_of(model), step=t)
    assert abs(other.residual - cert.residual) > 1e-3  # the test of the test: groups of each tensor are others


@pytest.mark.parametrize("more", ["alone", "L2 in the loss", "a cone", "L1 in the sum"])
def test_polishing_ends_at_the_minimiser(more):
    model, strength = Both(), 0.3
    what = strength * rs.GroupLasso(per=PER)
    plan = {
        "alone": [what.on(how="proximal")],
        "L2 in the loss": [what.on(how="loss"), 0.2 * rs.L2().on("*.weight", name="l2")],
        "a cone": [what.on(how="proximal"), rs.NonNegative().on("*.weight", name="cone")],
        "L1 in the sum": [(what + 0.02 * rs.L1()).on(how="loss")],
    }[more]
    reg = rs.attach(model, plan, torch.optim.SGD(model.parameters(), lr=0.1))
    cert = reg.certificate(lambda: loss_of(model), polish=True, tolerance=1e-9, steps=5000)
    assert cert.residual <= 1e-9
    w = rows(model)
    if more == "L1 in the sum":  # the certificate of the minimiser by the subdifferential
        g = slope(w)
        soft = np.sign(g) * np.maximum(np.abs(g) - 0.02, 0)
        zero = ~w.any(1)
        assert 0 < zero.sum() < 6
        assert (np.linalg.norm(soft[zero], axis=1) <= strength * SIZE**0.5 + 1e-8).all()
        lengths = np.linalg.norm(w[~zero], axis=1, keepdims=True)
        inner = g[~zero] + strength * SIZE**0.5 * w[~zero] / lengths
        assert np.where(w[~zero] != 0, np.abs(inner + 0.02 * np.sign(w[~zero])), np.abs(inner) - 0.02).max() < 1e-8
        return
    expected = best(strength, l2=0.2 * (more == "L2 in the loss"), positive=more == "a cone")
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-7)
    assert 0 < (~expected.any(1)).sum() < 6
    assert list(cert.rules) == [rule.key for rule in reg.rules]
    assert not cert.left_out


def test_what_isnt_known_is_told():
    model = Both()
    units = (0.1 * rs.GroupLasso(per=PER)).on(how="loss", name="units")
    for others, why in {
        0.1 * rs.L1().on("left.weight", name="l1"): "the sum of units and",
        rs.MaxNorm(9.0).on("left.weight", name="norm"): "within",
        rs.TopK(9).on("right.weight", name="top"): "isn't convex",
    }.items():
        reg = rs.attach(model, [units, others], torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(NoProxError, match=f"there is no rule to certify.*{why}"):
            reg.certificate(lambda: loss_of(model))
        reg.detach()
    reg = rs.attach(model, rs.TopGroups(3, per=PER).on(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(NoProxError, match="isn't convex"):
        reg.certificate(lambda: loss_of(model))
    reg.detach()
    reg = rs.attach(model, [units, 0.1 * rs.L1().on("left.weight", name="l1")])
    with pytest.raises(HowError, match=r"'left\.weight' is under a penalty of units"):
        reg.penalised()


def test_overlapping_units_act_by_their_gradient():
    """Rows and columns of the middle layer belong to units of two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    per = rs.units({"0.weight": "out", "2.weight": "in"}, {"2.weight": "out", "4.weight": "in"})
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    reg = rs.attach(model, [(0.1 * rs.GroupLasso(per=per)).on(how="loss", name="units"), rs.L1().on("*.bias")])
    cert = reg.certificate(lambda: model(x).square().mean())
    assert "share entries" in cert.left_out["units"]
    total = reg.loss(model(x).square().mean())
    (gradient,) = torch.autograd.grad(total, [model[2].weight])
    assert cert.free >= float(gradient.abs().max()) * (1 - 1e-9)
    with pytest.raises(HowError, match=r"'2\.weight' belong to several units"):
        reg.penalised()


# Paths


def fit(model, reg, optimizer=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    reg.use(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        reg.loss(loss_of(model)).backward()
        optimizer.step()


RULE = rs.GroupLasso(per=PER).on(how="proximal")


def test_the_greatest_strength_is_the_dual_norm_of_units():
    model = Both()
    found = rs.path(model, RULE, fit, loss=loss_of, score=lambda m: -loss_of(m), points=4, ratio=0.05, random_state=0)
    dual = np.linalg.norm(slope(np.zeros((6, SIZE))), axis=1).max() / SIZE**0.5
    assert found.greatest.found == "dual norm"
    assert found.points[-1].strength == pytest.approx(dual, rel=1e-6)
    assert found.points[-1].selected == 0
    for point in found.points:
        expected = best(point.strength, steps=3000)
        np.testing.assert_allclose(rows(found.model(point)), expected, atol=1e-6)
        assert point.selected == expected.any(1).sum()
        assert point.groups == 6
        chosen = found.selected(point)["left.weight + right.weight"]
        assert chosen.tolist() == np.flatnonzero(expected.any(1)).tolist()


def test_the_refit_keeps_units_that_are_zero():
    found = rs.path(
        Both(), RULE, fit, loss=loss_of, score=lambda m: -loss_of(m), strengths=[0.4], refit=True, random_state=0
    )
    w, support = rows(found.model(found.points[0])), best(0.4, steps=3000).any(1)
    assert 0 < support.sum() < 6
    x = np.concatenate([A[:, support], B[:, support]], 1)
    flat = np.linalg.lstsq(x, Y, rcond=None)[0]
    n = support.sum()
    np.testing.assert_allclose(w[support], np.concatenate([flat[:n], flat[n:]], 1), atol=1e-5)
    assert not w[~support].any()


def test_units_of_a_hidden_layer_have_a_saddle_at_the_origin():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    per = rs.units({"0.weight": "out", "0.bias": 0, "2.weight": "in"})
    rule = rs.GroupLasso(per=per).on(how="proximal")

    def loss():
        return (model(LEFT) - TARGET).square().mean()

    assert greatest.by_dual_norm(model, [rule], [], loss) is None
    rows_only = rs.GroupLasso(per=rs.units({"0.weight": "out", "0.bias": 0})).on(how="proximal")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    before = model[2].weight.detach().numpy().copy()
    found = greatest.by_dual_norm(model, [rows_only], [], loss)
    assert np.array_equal(before, model[2].weight.detach().numpy())  # its gradient is zero where tanh(0) goes in
    error = model[2].bias.detach().numpy() - Y
    hidden = 2 * error @ before / Y.size  # tanh'(0) = 1
    gradient = np.concatenate([hidden.T @ A, hidden.sum(0)[:, None]], 1)
    assert found == pytest.approx(np.linalg.norm(gradient, axis=1).max() / 7**0.5, rel=1e-6)
