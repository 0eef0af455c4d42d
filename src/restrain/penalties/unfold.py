"""Unfold tensors into matrices; functions of the singular values.

`rows=` names the axes of a tensor that index the rows of its matrix; the others index the columns.
A name or a dim is read as `per=` (see `axes`): "out" makes each unit or filter a row. A tuple of
dims makes a row of each index of these dims.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from restrain.axes import NAMES, Grouping, Per, checked, grouping, grouping_at
from restrain.errors import PenaltyError
from restrain.fields import is_whole
from restrain.layouts import knows
from restrain.named_tensors import Location
from restrain.penalties.shrink import at_least_float32, unsigned_zeros

Rows: TypeAlias = Per | tuple[int, ...]


def checked_rows(rows: Any) -> Rows:
    """Return `rows`; a list of dims, as read from files, becomes a tuple.

    Raises:
        PenaltyError: it is neither a known name, nor a dim, nor a sequence of dims.
    """
    if isinstance(rows, list | tuple):
        dims = tuple(rows)
        if dims and all(map(is_whole, dims)):
            return dims
    elif isinstance(rows, Grouping) or is_whole(rows) or (isinstance(rows, str) and rows in NAMES):
        return checked(rows)
    raise PenaltyError(
        f"rows= is one of {', '.join(map(repr, NAMES))}, a dim such as 0, or some dims such as (0, 1); got {rows!r}"
    )


def unfolding(rows: Rows, shape: tuple[int, ...], at: Location | None = None) -> Grouping:
    """Return the rows of the tensor's matrix as groups of entries; in the layout of `at` if given.

    Raises:
        PenaltyError: the tensor has fewer than two axes, or lacks an axis of `rows`.

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
        return grouping(rows, shape) if at is None else grouping_at(rows, at)
    dims = tuple(dim % len(shape) for dim in rows if -len(shape) <= dim < len(shape))
    if len(dims) != len(rows) or len(set(dims)) != len(dims):
        raise PenaltyError(f"rows={rows} needs a tensor with these dims, each named once; got shape {shape}{whose}")
    return Grouping(shape, dims, said=rows)


def unfolding_at(rows: Rows, at: Location, transposable: bool = False) -> Grouping:
    """Return the rows of a model's parameter as groups; see `unfolding`.

    Of a matrix of unknown layout, the first axis where it doesn't matter which axis the rows are.
    """
    shape = tuple(at.tensor.shape)
    if transposable and len(shape) == 2 and rows in ("out", "in") and at.axes is None and not knows(at.owner):
        return Grouping(shape, (0,), said=rows)
    return unfolding(rows, shape, at)


def of_one_matrix(groups: Grouping) -> Grouping:
    """Return the groups for one of the matrices that a tensor stacks."""
    dims = [dim for dim in range(len(groups.shape)) if dim not in groups.stack]
    keep = tuple([dims.index(dim) for dim in groups.own])
    return Grouping(tuple([groups.shape[dim] for dim in dims]), keep, groups.lists, groups.said)


def by_matrix(change: Callable[..., Tensor], groups: Grouping, *tensors: Tensor) -> Tensor:
    """Return the tensor of the matrices change(matrix, ...), of the matrices of tensors."""
    first, last = groups.stack, tuple(range(len(groups.stack)))
    moved = [t.movedim(first, last) for t in tensors]
    stacks = [t.flatten(0, len(first) - 1) for t in moved]
    if not len(stacks[0]):
        return tensors[-1].clone()
    changed = torch.stack([change(*matrices) for matrices in zip(*stacks, strict=True)])
    return changed.reshape(moved[0].shape).movedim(last, first)


def matrices(w: Tensor, groups: Grouping) -> Tensor:
    """Return the stacked matrices of a tensor along one leading axis."""
    return w.movedim(groups.stack, tuple(range(len(groups.stack)))).flatten(0, len(groups.stack) - 1)


def to_matrix(w: Tensor, groups: Grouping) -> Tensor:
    """Return the matrix with a row for each group.

    Raises:
        PenaltyError: groups given by lists of indices, which may differ in size.
    """
    if groups.lists is not None:
        raise PenaltyError("lists of indices make no matrix here: give per= by a name, a dim or a block")
    within = groups.reduced
    sizes = [prod([groups.shape[dim] for dim in dims]) for dims in (groups.keep, within)]
    return groups.view(w).permute((*groups.keep, *within)).reshape(sizes)


def from_matrix(matrix: Tensor, groups: Grouping, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of the given shape whose matrix this is: the inverse of `to_matrix`."""
    order = (*groups.keep, *groups.reduced)
    back = [order.index(dim) for dim in range(len(order))]
    return matrix.reshape([groups.shape[dim] for dim in order]).permute(back).reshape(shape)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values, the greatest first; all NaN if an entry isn't finite."""
    finite = matrix.isfinite().all()  # LAPACK raises on NaN and infinity
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, matrix, 0)), torch.nan)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and Vᴴ of the thin SVD; s is NaN if an entry of the matrix isn't finite."""
    finite = matrix.isfinite().all()
    u, s, vh = torch.linalg.svd(torch.where(finite, matrix, 0), full_matrices=False)
    return u, torch.where(finite, s, torch.nan), vh


def change_singular_values(w: Tensor, groups: Grouping, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return U change(s) Vᴴ of a tensor U s Vᴴ, in its dtype; its exact entries if s stays."""
    x = at_least_float32(w)
    if not w.numel():
        return w.clone()
    u, s, vh = svd(to_matrix(x, groups))
    changed = change(s)
    z = unsigned_zeros(from_matrix((u * changed) @ vh, groups, tuple(w.shape)))
    return torch.where((changed == s).all(), x, z).to(w.dtype)


class Spectrum(Protocol):
    """Function f of the singular values s, with its derivatives."""

    def mapped(self, s: Tensor) -> Tensor:
        """Return f(s)."""

    def slopes(self, s: Tensor, f: Tensor) -> Tensor:
        """Return the limit of (f_i - f_j) / (s_i - s_j) for s_i → s_j."""

    def pulled(self, s: Tensor, f: Tensor, v: Tensor) -> Tensor:
        """Return the transposed Jacobian of f at s, times v."""


class SpectralMap(torch.autograd.Function):
    """`SpectralMap.apply(matrix, spectrum)`: U f(s) Vᴴ, differentiable at equal singular values.

    There the derivative of torch's SVD isn't finite, but that of U f(s) Vᴴ is: in the basis of U
    and V it multiplies the symmetric part of a perturbation by (f_i - f_j) / (s_i - s_j), the
    antisymmetric part by (f_i + f_j) / (s_i + s_j), and components outside the column spaces of U
    and V by f / s. There is no second derivative.

    Source: Lewis and Sendov (2005), nonsmooth analysis of singular values, part II, for the real
    case.
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
    """Return the part of this derivative in the spaces of U and V; `along` is its real diagonal."""
    finfo = torch.finfo(s.dtype)
    apart, total = s[:, None] - s, s[:, None] + s
    near = apart.abs() <= 100 * finfo.eps * s.amax()
    by_difference = torch.where(near, (slope[:, None] + slope) / 2, (f[:, None] - f) / torch.where(near, 1, apart))
    none = total <= finfo.tiny
    by_sum = torch.where(none, (slope[:, None] + slope) / 2, (f[:, None] + f) / torch.where(none, 1, total))
    even, odd = (inner + inner.mH) / 2, (inner - inner.mH) / 2
    mixed = by_difference * even + by_sum * odd
    return mixed + torch.diag((along - by_difference.diagonal() * even.diagonal().real).to(mixed.dtype))
