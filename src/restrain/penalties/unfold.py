"""Tensors as matrices, and functions of their singular values.

`rows=` says which axes of a tensor are the rows of its matrix; the others are the columns. A name or a dim is read as
`per=` is (see `axes`): "out" makes every unit or filter a row. A tuple of dims makes a row of each index of them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from restrain.axes import NAMES, Grouping, Per, checked, grouping
from restrain.errors import PenaltyError
from restrain.fields import is_whole
from restrain.named_tensors import Location
from restrain.penalties.shrink import at_least_float32

Rows: TypeAlias = Per | tuple[int, ...]


def checked_rows(rows: Any) -> Rows:
    """`rows` itself; a list of dims, as files have it, as a tuple.

    Raises:
        PenaltyError: it is neither a known name, nor a dim, nor some of them.
    """
    if isinstance(rows, list | tuple):
        dims = tuple(rows)
        if dims and all(map(is_whole, dims)):
            return dims
    elif isinstance(rows, Grouping) or is_whole(rows) or rows in NAMES:
        return checked(rows)
    raise PenaltyError(
        f"rows= is one of {', '.join(map(repr, NAMES))}, a dim such as 0, or some dims such as (0, 1); got {rows!r}"
    )


def unfolding(rows: Rows, shape: tuple[int, ...], at: Location | None = None) -> Grouping:
    """The groups of entries that are the rows of the tensor's matrix; in the layout of `at`, if that is known.

    Raises:
        PenaltyError: the tensor has fewer than two axes, or not the ones that `rows` names.

    >>> unfolding((0, -3), (8, 4, 3, 3)).keep
    (0, 1)
    """
    shape = tuple(shape)
    if isinstance(rows, Grouping):
        return rows
    whose = f" ({at.name!r})" if at is not None and at.name else ""
    if len(shape) < 2:
        raise PenaltyError(
            f"a matrix is made of a tensor with two axes or more, got one of shape {shape}{whose}: select rs.weights"
        )
    if not isinstance(rows, tuple):
        return grouping(rows, shape) if at is None else grouping(rows, shape, at.owner, at.attribute, at.heads)
    dims = tuple(dim % len(shape) for dim in rows if -len(shape) <= dim < len(shape))
    if len(dims) != len(rows) or len(set(dims)) != len(dims):
        raise PenaltyError(f"rows={rows} needs a tensor with these dims, each named once; got shape {shape}{whose}")
    return Grouping(shape, dims, said=rows)


def unfolding_at(rows: Rows, at: Location) -> Grouping:
    """The rows of a parameter of a model; see `unfolding`."""
    return unfolding(rows, tuple(at.tensor.shape), at)


def to_matrix(w: Tensor, groups: Grouping) -> Tensor:
    """The matrix with a row for each group.

    Raises:
        PenaltyError: groups by lists of indices, whose sizes may differ.
    """
    if groups.lists is not None:
        raise PenaltyError("lists of indices make no matrix here: give per= by a name, a dim or a block")
    within = groups.reduced
    sizes = [prod([groups.shape[dim] for dim in dims]) for dims in (groups.keep, within)]
    return groups.view(w).permute((*groups.keep, *within)).reshape(sizes)


def from_matrix(matrix: Tensor, groups: Grouping, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that shape whose matrix it is."""
    order = (*groups.keep, *groups.reduced)
    back = [order.index(dim) for dim in range(len(order))]
    return matrix.reshape([groups.shape[dim] for dim in order]).permute(back).reshape(shape)


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values, the greatest first; all NaN where an entry isn't finite."""
    finite = matrix.isfinite().all()  # LAPACK would raise
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, matrix, 0)), torch.nan)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and Vᴴ of the thin decomposition; s is NaN where an entry of the matrix isn't finite."""
    finite = matrix.isfinite().all()
    u, s, vh = torch.linalg.svd(torch.where(finite, matrix, 0), full_matrices=False)
    return u, torch.where(finite, s, torch.nan), vh


def change_singular_values(w: Tensor, groups: Grouping, change: Callable[[Tensor], Tensor]) -> Tensor:
    """U change(s) Vᴴ of a tensor U s Vᴴ, in its dtype; the tensor as it is where no singular value changes."""
    x = at_least_float32(w)
    if not w.numel():
        return w.clone()
    u, s, vh = svd(to_matrix(x, groups))
    changed = change(s)
    z = from_matrix((u * changed) @ vh, groups, tuple(w.shape)) + 0.0  # -0.0 becomes +0.0
    return torch.where((changed == s).all(), x, z).to(w.dtype)


class Spectrum(Protocol):
    """A function f of the singular values s."""

    def mapped(self, s: Tensor) -> Tensor:
        """f."""

    def slopes(self, s: Tensor, f: Tensor) -> Tensor:
        """The limit of (f_i - f_j) / (s_i - s_j) for s_i → s_j."""

    def pulled(self, s: Tensor, f: Tensor, v: Tensor) -> Tensor:
        """The transposed Jacobian of f, times v."""


class SpectralMap(torch.autograd.Function):
    """`SpectralMap.apply(matrix, spectrum)` is U f(s) Vᴴ, with a gradient also where singular values coincide.

    The derivative of torch's own decomposition isn't finite there, that of U change(s) Vᴴ is: in the basis of U and V
    it multiplies the symmetric part of a movement by (f_i - f_j) / (s_i - s_j), the antisymmetric one by
    (f_i + f_j) / (s_i + s_j), and what leaves these spaces by f / s. It has no second derivative.

    Source: Lewis and Sendov (2005), nonsmooth analysis of singular values, part II, for the real case.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, spectrum: Spectrum) -> Tensor:
        u, s, vh = svd(matrix)
        f = spectrum.mapped(s)
        ctx.save_for_backward(u, s, vh, f)
        ctx.spectrum = spectrum
        return (u * f) @ vh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, s, vh, f = ctx.saved_tensors
        slope = ctx.spectrum.slopes(s, f).to(s.dtype)
        inner = u.mH @ gradient @ vh.mH
        along = ctx.spectrum.pulled(s, f, inner.diagonal().real)
        result = u @ _within(inner, s, f, slope, along) @ vh
        tiny = torch.finfo(s.dtype).tiny
        ratio = torch.where(s > tiny, f / s.clamp_min(tiny), slope)
        beside, below = gradient @ vh.mH - u @ inner, u.mH @ gradient - inner @ vh
        return result + (beside * ratio) @ vh + u @ (ratio[:, None] * below), None


def _within(inner: Tensor, s: Tensor, f: Tensor, slope: Tensor, along: Tensor) -> Tensor:
    """The part of that derivative within the spaces of U and V; `along` is its real diagonal."""
    finfo = torch.finfo(s.dtype)
    apart, total = s[:, None] - s, s[:, None] + s
    near = apart.abs() <= 100 * finfo.eps * s.amax()
    by_difference = torch.where(near, (slope[:, None] + slope) / 2, (f[:, None] - f) / torch.where(near, 1, apart))
    none = total <= finfo.tiny
    by_sum = torch.where(none, (slope[:, None] + slope) / 2, (f[:, None] + f) / torch.where(none, 1, total))
    even, odd = (inner + inner.mH) / 2, (inner - inner.mH) / 2
    mixed = by_difference * even + by_sum * odd
    return mixed + torch.diag((along - by_difference.diagonal() * even.diagonal().real).to(mixed.dtype))
