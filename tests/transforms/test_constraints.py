"""Constraints beyond the matrix: every size and dtype, tangents, ties, what is refused."""

from math import inf

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PenaltyError, TransformError
from restrain.named_tensors import Location

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# Every size and dtype


def rounding(dtype, size=1):
    return 9 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 50, 20_000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_sums_of_any_size(dtype, size, scale):
    w = (normal(3, size) * scale).to(dtype)
    for constraint in (rs.Simplex(0.7, per=0), rs.L1Ball(0.7, per=0)):
        z = constraint.project(w)
        assert torch.equal(constraint.project(z), z)
        sums = z.double().abs().sum(1)
        assert (sums <= 0.7 * (1 + rounding(dtype))).all()
        if isinstance(constraint, rs.Simplex) and not (dtype == torch.float16 and size > 50):  # too small for it
            assert (sums >= 0.7 * (1 - rounding(dtype))).all()
            assert (z >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (60, 50), (7, 3, 3, 3)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
def test_matrices_of_any_size(dtype, shape, scale):
    w = (normal(*shape) * scale).to(dtype)
    few = min(shape[0], w[0].numel())
    for constraint in (rs.Orthogonal(), rs.SpectralBall(0.8), rs.NuclearBall(0.8), rs.LowRank(2)):
        z = constraint.project(w)
        assert torch.equal(constraint.project(z), z)
        s = torch.linalg.svdvals(z.double().flatten(1))
        near = rounding(dtype, few**0.5)
        if constraint == rs.Orthogonal():
            assert ((s - 1).abs() <= near).all()
        elif constraint == rs.SpectralBall(0.8):
            assert s[0] <= 0.8 * (1 + near)
        elif constraint == rs.NuclearBall(0.8):
            assert s.sum() <= 0.8 * (1 + near)
        else:
            assert (s[2:] <= near * s[0]).all()


@pytest.mark.parametrize("wide", [False, True])
def test_orthogonal_of_deficient_rank(wide):
    w = normal(4, 6) if wide else normal(6, 4)
    w[1] = w[0]
    w[2] = 0
    for matrix in (w, w * 0, w * 1e-30):
        z = rs.Orthogonal().project(matrix)
        gram = z @ z.T if wide else z.T @ z
        torch.testing.assert_close(gram, torch.eye(4, dtype=gram.dtype))


def test_inside_nothing_changes():
    w = normal(4, 4, dtype=torch.float32)
    inside = {
        rs.Box(-9, 9): w,
        rs.L1Ball(50.0): w,
        rs.SpectralBall(20.0): w,
        rs.NuclearBall(50.0): w,
        rs.LowRank(4): w,
        rs.LowRank(1): w[:1].T @ w[1:2],
        rs.TopK(16): w,
        rs.NM(1, 2): w * torch.tensor([0, 1, 0, 1]),
        rs.Symmetric(): w @ w.T,
        rs.Orthogonal(): torch.linalg.qr(w).Q,
        rs.Simplex(per="out"): w.softmax(1),
        rs.Signs(w.sign()): w,
        rs.MinMaxNorm(0.1, 9): w,
    }
    for constraint, point in inside.items():
        assert torch.equal(constraint.project(point), point), constraint


def test_extremes_neither_overflow_nor_vanish():
    w = torch.tensor([[3.0, 4.0], [1.0, -2.0]])
    for scale in (1e-38, 1e37):
        torch.testing.assert_close(rs.MinMaxNorm(1, 1).project(w * scale)[0], torch.tensor([0.6, 0.8]))
        assert rs.Simplex(per=0).project(w * scale).sum(1).allclose(torch.ones(2))
        assert rs.L1Ball(1.0).project(w * scale).isfinite().all()
    assert torch.equal(rs.Symmetric().project(torch.full((2, 2), 3e38)), torch.full((2, 2), 3e38))


# Which entries stay


def test_exactly_k_of_equal_entries():
    w = torch.tensor([1.0, -1.0, 1.0, 0.5, -1.0])
    assert rs.TopK(2).project(w).tolist() == [1, -1, 0, 0, 0]
    assert rs.TopK(2).project(w.flip(0)).tolist() == [-1, 0, 1, 0, 0]
    assert rs.TopK(3).project(torch.ones(2, 2)).tolist() == [[1, 1], [1, 0]]
    assert rs.NM(2, 4).project(torch.ones(1, 8)).tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert rs.TopK(3).project(torch.tensor([0.0, 2.0, 0.0])).tolist() == [0, 2, 0]


@pytest.mark.parametrize(("k", "count"), [(0.25, 3), (0.01, 1), (0.5, 5), (0.99, 10), (3, 3), (50, 10)])
def test_k_as_a_fraction(k, count):
    assert rs.TopK(k).project(normal(10)).count_nonzero() == count
    assert rs.TopK(k, per="in").project(normal(10, 4)).count_nonzero(0).tolist() == [count] * 4


def bound(constraint, module, attribute="weight"):
    return constraint.bound_to(Location(getattr(module, attribute), attribute, module, attribute))


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Linear(8, 3), 1),
        (nn.Conv2d(8, 4, 3), 1),
        (nn.Conv2d(8, 4, 3, groups=2), 1),
        (nn.ConvTranspose1d(4, 6, 3), 0),
    ],
    ids=["linear", "conv", "groups", "transposed"],
)
def test_n_of_m_along_the_input(layer, dim):
    z = bound(rs.NM(1, 4), layer).project(layer.weight.detach())
    kept = z.movedim(dim, -1).reshape(-1, 4)
    assert (kept.count_nonzero(1) == 1).all()
    largest = layer.weight.detach().movedim(dim, -1).reshape(-1, 4).abs().amax(1)
    assert torch.equal(kept.abs().amax(1), largest)


def test_n_of_m_must_divide():
    with pytest.raises(TransformError, match=r"4 consecutive entries don't divide the 6 .*'weight'.*dim="):
        bound(rs.NM(2, 4), nn.Linear(6, 4))
    with pytest.raises(TransformError, match="don't divide"):
        rs.NM(2, 4).project(torch.ones(4, 6))


def test_signs_of_each_entry():
    w = torch.tensor([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
    assert rs.Signs([[1, -1, 0], [0, 0, -1]]).project(w).tolist() == [[0, 0, -3], [4, -5, 0]]
    assert rs.Signs([[1], [-1]]).project(w).tolist() == [[0, 2, 0], [0, -5, 0]]
    assert torch.equal(rs.Signs(1).project(w), rs.NonNegative().project(w))


def test_a_rate_pulls_only_so_far():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.6, 0.8]])
    found = rs.MinMaxNorm(1, 2, rate=0.5).project(w)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([3.5, 0.75, 1.0]))
    for _ in range(60):
        found = rs.MinMaxNorm(1, 2, rate=0.5).project(found)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([2.0, 1.0, 1.0]))


# Tangents, against the derivative of the projection: P(w + t v) = w + t tangent(w, v) + o(t)

POINTS = {
    "nonnegative": (rs.NonNegative(), lambda w: w.clamp_min(0)),
    "box": (rs.Box(-0.3, 0.5), lambda w: w.clamp(-0.3, 0.5)),
    "box of one point": (rs.Box(0.5, 0.5), lambda w: w.clamp(0.5, 0.5)),
    "signs": (rs.Signs([1, 0, -1, 1]), lambda w: rs.Signs([1, 0, -1, 1]).project(w)),
    "fixed": (rs.Fixed([True, False, False, True], 0.0), lambda w: w * torch.tensor([0, 1, 1, 0])),
    "on and in the ball": (rs.MaxNorm(1.2), rs.MaxNorm(1.2).project),
    "unit": (rs.UnitNorm("in"), rs.UnitNorm("in").project),
    "both bounds": (rs.MinMaxNorm(1.5, 2.0), rs.MinMaxNorm(1.5, 2.0).project),
    "rows": (rs.Orthogonal(), rs.Orthogonal().project),
    "columns": (rs.Orthogonal("in"), rs.Orthogonal("in").project),
    "more rows": (rs.Orthogonal(), lambda w: torch.linalg.qr(w.mT).Q),
    "spectral": (rs.SpectralBall(1.1), rs.SpectralBall(1.1).project),
    "inside": (rs.SpectralBall(99), lambda w: w),
    "rank": (rs.LowRank(2), rs.LowRank(2).project),
    "less than the rank": (rs.LowRank(2), rs.LowRank(1).project),
    "symmetric": (rs.Symmetric(), lambda w: w[:3, :3] + w[:3, :3].mT),
    "top": (rs.TopK(5), rs.TopK(5).project),
    "less than k": (rs.TopK(2, per="row"), rs.TopK(1, per="row").project),
    "n of m": (rs.NM(2, 4), rs.NM(1, 4).project),
}
REAL_ONLY = {"nonnegative", "box", "box of one point", "signs"}


def tangent_fault(constraint, w, v, t=1e-7):
    slope = (constraint.project(w + t * v) - w) / t
    return float((constraint.tangent(w, v) - slope).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("case", POINTS)
def test_tangent_is_the_derivative_of_the_projection(case, dtype):
    constraint, feasible = POINTS[case]
    if dtype.is_complex and case in REAL_ONLY:
        pytest.skip("real tensors only")
    for seed in range(3):
        w = feasible(normal(3, 4, dtype=dtype, seed=seed))
        for v in (normal(*w.shape, dtype=dtype, seed=9), w.clone(), -w):
            assert constraint.has_tangent
            assert tangent_fault(constraint, w, v) < 1e-5
            once = constraint.tangent(w, v)
            torch.testing.assert_close(constraint.tangent(w, once), once, atol=1e-9, rtol=1e-9)


def test_tangent_oracle():
    class Wrong(rs.UnitNorm, register=False):
        def tangent(self, w, v):
            return v

    w = rs.UnitNorm().project(normal(3, 4))
    assert tangent_fault(Wrong(), w, w) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_at_what_a_projection_gives(dtype):
    for constraint in (rs.MaxNorm(0.3), rs.UnitNorm(), rs.Box(-0.1, 0.1), rs.SpectralBall(0.3), rs.Orthogonal()):
        w = constraint.project((100 * normal(5, 4)).to(dtype))  # all of it is at the bound
        z = constraint.tangent(w, w)  # outward
        assert z.dtype == dtype
        assert z.double().norm() <= rounding(dtype, 2) * w.double().norm()


# What is refused


@pytest.mark.parametrize(
    "make",
    [
        *[lambda box=box: rs.Box(*box) for box in ((1, 0), (inf, inf), (float("nan"), 1), ("0", 1), (-inf, -inf))],
        *[lambda args=args: rs.MinMaxNorm(*args) for args in ((-1, 1), (2, 1), (0, 0), (0, inf), (0, 1, 0), (0, 1, 2))],
        *[lambda cls=cls: cls(0) for cls in (rs.Simplex, rs.L1Ball, rs.SpectralBall, rs.NuclearBall, rs.LowRank)],
        *[lambda cls=cls: cls(float("nan")) for cls in (rs.Simplex, rs.L1Ball, rs.SpectralBall, rs.TopK)],
        *[lambda k=k: rs.TopK(k) for k in (0, -1, 1.0, 2.5, 0.0, True, "3")],
        *[lambda args=args: rs.NM(*args) for args in ((0, 4), (4, 4), (2.0, 4), (True, 4))],
        *[lambda pattern=pattern: rs.Signs(pattern) for pattern in (2, [0.5], [[1], [1, 1]], "up", None, True)],
        *[lambda mask=mask: rs.Fixed(mask) for mask in (2, [[True], [True, False]], "zeros", None)],
        lambda: rs.Fixed(True, float("nan")),
        lambda: rs.LowRank(1.5),
    ],
)
def test_refuses_settings(make):
    with pytest.raises(TransformError, match=r"= (is|are|holds) "):
        make()


@pytest.mark.parametrize("rows", ["rows", 1.0, (), (0.5,), None, True])
def test_refuses_rows(rows):
    with pytest.raises(PenaltyError, match=r"rows= is one of 'out'.*some dims such as \(0, 1\)"):
        rs.Orthogonal(rows)


@pytest.mark.parametrize(
    "constraint",
    [rs.Box(0, 1), rs.Simplex(), rs.Signs(1), rs.NonNegative()],
    ids=lambda constraint: type(constraint).__name__,
)
def test_complex_numbers_have_no_order(constraint):
    with pytest.raises(TransformError, match="complex"):
        constraint.project(torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "constraint", [rs.Box(0, 1), rs.L1Ball(1.0), rs.Orthogonal(), rs.TopK(1), rs.UnitNorm(), rs.Symmetric()], ids=repr
)
def test_integers_are_refused(constraint):
    with pytest.raises(TransformError, match=r"floating-point numbers, got torch\.int64"):
        constraint.project(torch.ones(2, 2, dtype=torch.int64))


def test_shapes_that_do_not_fit():
    with pytest.raises(TransformError, match=r"square matrix, got a tensor of shape \(2, 3\)"):
        rs.Symmetric().project(torch.ones(2, 3))
    with pytest.raises(PenaltyError, match="two axes or more"):
        rs.Orthogonal().project(torch.ones(3))
    with pytest.raises(TransformError, match=r"pattern of shape \(2,\) doesn't fit a tensor of shape \(2, 3\)"):
        rs.Signs([1, -1]).project(torch.ones(2, 3))
    with pytest.raises(TransformError, match="values="):
        rs.Fixed(True).project(torch.ones(2))
    with pytest.raises(TransformError, match="bool tensor"):
        bound(rs.Fixed(lambda w: w), nn.Linear(2, 2))


def test_masks_given_as_tensors_are_copies_and_equal_lists():
    for mask in (torch.tensor([[True, False], [False, True]]), torch.tensor([[1.0, 0], [0, 1]]), torch.tensor(True)):
        rule, lists = rs.Fixed(mask, 5.0), rs.Fixed(mask.tolist(), 5.0)
        assert rule == lists
        assert hash(rule) == hash(lists)
        assert repr(rule) == repr(lists)
        wanted = torch.where(mask.bool(), 5.0, torch.zeros(2, 2))
        mask.zero_()
        assert torch.equal(rule.project(torch.zeros(2, 2)), wanted)
        assert torch.equal(rs.Fixed(mask, 5.0).project(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("constraint", [rs.Simplex(), rs.L1Ball(1.0), rs.NuclearBall(1.0)])
def test_no_formula_for_the_tangent(constraint):
    assert not constraint.has_tangent
    with pytest.raises(TransformError, match=r"no formula for its tangent; these have one: Box, .*UnitNorm"):
        constraint.tangent(torch.ones(2, 2), torch.ones(2, 2))


def test_nan_stays_nan():
    w = torch.full((3, 3), torch.nan)
    for constraint in (rs.Orthogonal(), rs.SpectralBall(1), rs.NuclearBall(1), rs.LowRank(1), rs.Simplex(), rs.TopK(1)):
        assert constraint.project(w).isnan().all()
