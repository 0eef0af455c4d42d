"""Transforms beyond the matrix: extremes, gradients through them, and what is refused."""

from math import inf

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.axes import Grouping
from restrain.errors import PenaltyError, SelectionError, TransformError
from restrain.named_tensors import Location

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    "make",
    [
        *[lambda std=std: rs.GaussianNoise(std) for std in (-0.1, inf, float("nan"), "1", True, None)],
        *[lambda rate=rate: rs.Dropout(rate) for rate in (-0.1, 1, 1.5, float("nan"), "0.5", False)],
        *[lambda radius=radius: rs.MaxNorm(radius) for radius in (0, -1, inf, float("nan"), "3", True)],
    ],
)
def test_refuses_settings(make):
    with pytest.raises(TransformError, match="= is "):
        make()


@pytest.mark.parametrize("make", [lambda: rs.MaxNorm(1, per="rows"), lambda: rs.UnitNorm(per=1.0)])
def test_refuses_axes(make):
    with pytest.raises(PenaltyError, match="per= is one of"):
        make()


def test_has_no_strength():
    for scale in (lambda t: 2 * t, lambda t: t * 2, lambda t: np.float64(2) * t):
        for transform in (rs.GaussianNoise(0.1), rs.MaxNorm(1)):
            with pytest.raises(TransformError, match=r"write the amount into it, as in GaussianNoise\(0.2\)"):
                scale(transform)


@pytest.mark.parametrize("noise", [rs.GaussianNoise(0.1), rs.Dropout(0.1)])
def test_token_ids_take_no_noise(noise):
    with pytest.raises(TransformError, match="embedding"):
        noise(torch.arange(3))


def test_types_that_cannot_be():
    with pytest.raises(TransformError, match="complex"):
        rs.Dropout(0.5)(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TransformError, match="complex"):
        rs.NonNegative().project(torch.ones(2, dtype=torch.complex64))


def test_acts_where_it_can():
    assert rs.Dropout(0.1).on(rs.outputs("a")).how == "forward"
    assert rs.MaxNorm(1.0).on("a").how == "project"
    with pytest.raises(SelectionError, match=r"rs\.inputs\(\)"):
        rs.Dropout(0.1).on("a")
    with pytest.raises(SelectionError, match="parameters"):
        rs.NonNegative().on(rs.outputs("a"))


def test_bases_need_their_method():
    for base in (rs.Constraint, rs.Noise):
        with pytest.raises(TypeError, match="abstract"):
            base()


def test_nonnegative_gives_no_negative_zero():
    z = rs.NonNegative().project(torch.tensor([-0.0, -3.0, 2.0]))
    assert not z.signbit().any()
    assert rs.NonNegative().project(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 50, 100_000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_projections_are_idempotent_and_feasible(dtype, size, scale):
    eps = torch.finfo(dtype).eps
    for dim, shape in ((0, (3, size)), (1, (size, 3))):
        w = (torch.randn(shape) * scale).to(dtype)
        for constraint in (rs.MaxNorm(0.7, per=dim), rs.UnitNorm(per=dim)):
            z = constraint.project(w)
            assert torch.equal(constraint.project(z), z)
            lengths = z.double().square().sum(1 - dim).sqrt()
            limit = 0.7 if isinstance(constraint, rs.MaxNorm) else 1
            assert (lengths <= limit * (1 + 9 * eps)).all()
            if isinstance(constraint, rs.UnitNorm):
                assert (lengths >= 1 - 9 * eps).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_projections_neither_overflow_nor_vanish(scale):
    w = torch.tensor([[3.0, 4.0]]) * scale
    torch.testing.assert_close(rs.UnitNorm().project(w), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(rs.MaxNorm(1e-3).project(w), w if scale < 1 else torch.tensor([[6e-4, 8e-4]]))
    if scale > 1:
        assert torch.equal(rs.MaxNorm(6 * scale).project(w), w)
        torch.testing.assert_close(rs.MaxNorm(scale).project(w), torch.tensor([[0.6, 0.8]]) * scale)


def test_max_norm_is_the_identity_inside():
    w = torch.randn(5, 4)
    w = torch.cat([w / w.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True) * 0.3])  # on the ball, and in it
    assert torch.equal(rs.MaxNorm(1.0).project(w), w)


@pytest.mark.parametrize("size", [1, 3, 7, 1_000_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_norm_of_zeros_is_constant(size, dtype):
    z = rs.UnitNorm(0).project(torch.zeros(2, size, dtype=dtype))
    assert torch.equal(z, torch.full((2, size), size**-0.5, dtype=dtype))
    assert torch.equal(rs.UnitNorm(0).project(z), z)


@pytest.mark.parametrize("constraint", [rs.MaxNorm(0.8), rs.UnitNorm("in")])
def test_projections_are_differentiable(constraint):
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(constraint.project, w)


def test_axes_are_resolved_by_bound_to():
    conv = nn.ConvTranspose2d(4, 6, 3)
    for constraint in (rs.MaxNorm(0.1, per="out"), rs.UnitNorm(per="out")):
        bound = constraint.bound_to(Location(conv.weight, owner=conv, attribute="weight"))
        assert bound.per == Grouping((4, 6, 3, 3), (1,))
        z = bound.project(conv.weight)
        length = 0.1 if isinstance(constraint, rs.MaxNorm) else 1.0
        torch.testing.assert_close(z.transpose(0, 1).flatten(1).norm(dim=1), torch.full((6,), length))
    assert rs.NonNegative().bound_to(Location(torch.empty(3))) == rs.NonNegative()


def test_noise_follows_the_global_generator():
    x = torch.ones(50)
    for noise in (rs.GaussianNoise(0.5), rs.Dropout(0.5)):
        torch.manual_seed(3)
        first, second = noise(x), noise(x)
        torch.manual_seed(3)
        assert torch.equal(noise(x), first)
        assert not torch.equal(first, second)
    assert torch.equal(rs.GaussianNoise(0.0)(x), x)
    assert torch.equal(rs.Dropout(0.0)(x), x)
