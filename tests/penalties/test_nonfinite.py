"""NaN and infinite numbers: refused when attached, and at a step kept from spreading to finite weights."""

from math import inf, nan

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, PenaltyError

SPREADING = [
    rs.MaxNorm(0.1),
    rs.UnitNorm(),
    rs.Simplex(),
    rs.L1Ball(0.5),
    rs.Orthogonal(),
    rs.SpectralBall(0.1),
    rs.LowRank(1),
    rs.Symmetric(),
]
GROUPS = [rs.GroupLasso(), rs.SparseGroupLasso(0.1, 0.1), rs.NuclearNorm(), rs.SLOPE(q=0.1), rs.TotalVariation()]


def made(bad=0.0):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[1, 2] += bad
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)


def step_with_a_bad_entry(layer, optimizer, bad):
    layer(torch.randn(8, 4)).square().mean().backward()
    layer.weight.grad[1, 2] = bad
    optimizer.step()
    others = torch.arange(16).reshape(4, 4) != 6
    assert layer.weight[others].isfinite().all()


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("how", ["project", "parametrize"])
@pytest.mark.parametrize("constraint", [rs.NonNegative(), *SPREADING], ids=str)
def test_a_constraint_on_what_is_not_finite_is_refused(constraint, how, bad):
    layer, optimizer = made(bad)
    before = layer.weight.detach().clone()
    with pytest.raises(HowError, match=r"'weight', which .*NaN or infinite"):
        rs.attach(layer, constraint.on("weight", how=how), optimizer)
    torch.testing.assert_close(layer.weight, before, equal_nan=True, rtol=0, atol=0)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("constraint", SPREADING, ids=str)
def test_a_projection_does_not_spread_what_a_step_made_nan(constraint, bad):
    layer, optimizer = made()
    momentum = "tangent" if constraint.has_tangent else None
    rs.attach(layer, constraint.on("weight", **({"momentum": momentum} if momentum else {})), optimizer)
    step_with_a_bad_entry(layer, optimizer, bad)
    assert optimizer.state[layer.weight]["momentum_buffer"].isfinite().sum() == 15


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("penalty", GROUPS, ids=str)
def test_a_prox_does_not_spread_it(penalty, bad):
    layer, optimizer = made()
    rs.attach(layer, 0.1 * penalty.on("weight", how="proximal"), optimizer)
    step_with_a_bad_entry(layer, optimizer, bad)


def test_a_decay_does_not_spread_it():
    layer, optimizer = made()
    rs.attach(layer, 0.1 * rs.GroupLasso().on("weight", how="decoupled"), optimizer)
    step_with_a_bad_entry(layer, optimizer, nan)
    layer.weight.grad.zero_()
    optimizer.state[layer.weight]["momentum_buffer"].zero_()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert layer.weight.isfinite().sum() == 15
    assert (layer.weight[0] != before[0]).all()  # the other groups decay
    torch.testing.assert_close(layer.weight[1], before[1], equal_nan=True)


@pytest.mark.parametrize("to", [nan, torch.full((4, 4), inf), lambda w: w / 0, {"weight": torch.tensor(nan)}])
def test_a_reference_must_be_finite(to):
    with pytest.raises(PenaltyError, match="finite reference; the given ones for 'weight'"):
        rs.attach(made()[0], rs.Distance(to=to).on("weight"))
    with pytest.raises(PenaltyError, match="the values at attach for 'weight'"):
        rs.attach(made(nan)[0], rs.Distance().on("weight"))


@pytest.mark.parametrize("penalty", [rs.Hoyer(), rs.Orthogonality(normalized=True, power=1)], ids=str)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1e20])
def test_measures_without_a_scale_have_a_finite_gradient_at_any(penalty, size):
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert penalty.gradient(w * size).isfinite().all()
    if size > 1e-40:
        torch.testing.assert_close(penalty(w * size), penalty(w))
        torch.testing.assert_close(penalty.gradient(w * size) * size, penalty.gradient(w), rtol=1e-4, atol=1e-5)
