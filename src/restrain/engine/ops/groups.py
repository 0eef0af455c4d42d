"""Instructions for groups that are rows: compute lengths, then change the rows in the cache.

Rows are groups, each contiguous in memory: the indices of one dim, or the whole tensor as one
group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from restrain.axes import Grouping, group_norms
from restrain.engine.core import dense
from restrain.operations import LengthInterval
from restrain.penalties import Penalty
from restrain.penalties.shrink import at_least_float32, in_range, shrink_groups, unsign_zeros_
from restrain.transforms.base import slack

_PART = 4096  # entries whose squares are summed sequentially, without loss of precision


def lengths(rows: Tensor) -> Tensor:
    """Return the Euclidean length of each row.

    Only rows whose squares could overflow or vanish are computed by `group_norms`, with
    temporaries.
    """
    if torch.compiler.is_compiling() or type(rows) is not Tensor or not rows.is_cpu or not rows.numel():
        return group_norms(rows, _by_row(rows))
    length = _by_parts(rows)
    least, greatest = length.aminmax()
    if not (float(least) > 1e-12 and float(greatest) < 1e15):
        again = ~((length > 1e-12) & (length < 1e15)).squeeze(1)
        some = rows[again]
        length[again] = group_norms(some, _by_row(some))
    return length


def norm_of(w: Tensor) -> Tensor:
    """Return the Euclidean norm of all entries, in float32 or wider, without a copy of the tensor.

    It is infinite if a square overflows.
    """
    return _by_parts(w.reshape(1, -1)).squeeze()


def _by_parts(rows: Tensor) -> Tensor:
    """Return the length of each row, by those of its parts.

    torch sums the squares of a row one after another in the precision of the result: of 38 million
    entries in float32 the norm is wrong by 8e-4.
    """
    wide, whole = torch.promote_types(rows.dtype, torch.float32), rows.shape[1] // _PART * _PART
    rest: Tensor = vector_norm(rows[:, whole:], dim=1, keepdim=True, dtype=wide)
    if not whole:
        return rest
    parts = vector_norm(rows[:, :whole].unflatten(1, (-1, _PART)), dim=2, dtype=wide)
    length: Tensor = vector_norm(torch.cat([parts, rest], 1), dim=1, keepdim=True)
    return length


def _by_row(rows: Tensor) -> Grouping:
    return Grouping(tuple(rows.shape), (0,))


@dataclass(frozen=True)
class Lengths:
    """Operation Σ ‖row‖₂ of a matrix."""

    def slope(self, rows: Tensor) -> Tensor:
        """Return each row divided by its length; zero rows stay zero."""
        size = lengths(rows)
        return rows / torch.where(size == 0, 1, size)


@dataclass(frozen=True)
class ShrinkRows:
    """Shorten each row by a number, at most to zero; a row with NaN stays unchanged."""

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Sequence[Any]) -> Tensor:
        compiled = isinstance(numbers[0], Tensor)
        size = lengths(w)
        cut = numbers[0] if compiled else torch.full((), float(in_range(numbers[0], w)), dtype=w.dtype, device=w.device)
        scale = (1 - cut / size).clamp_min_(0)  # a tensor over a tensor: an inverse may be beyond all numbers
        w = w.mul_(torch.where(scale.isnan(), 1, scale))
        if compiled or w.device.type != "cpu" or not bool(scale.all()):
            w = unsign_zeros_(w)
        return w


@dataclass(frozen=True)
class RootedShrinkRows:
    """Prox of Σ‖row‖₂ with a step for each entry, cut / (√second · root + eps).

    A row with NaN stays unchanged.
    """

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Sequence[Any]) -> Tensor:
        root, eps, cut = numbers
        new = shrink_groups(w, _by_row(w), 1.0, cut / others[0].sqrt().mul_(root).add_(eps))
        return torch.where(new.isfinite(), new, w)


@dataclass(frozen=True)
class FitRows:
    """Scale each row to a length between `low` and `high`.

    If squares over- or underflow, `constraint` is used instead.
    """

    low: float
    high: float
    constraint: Any

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Sequence[Any]) -> Tensor:
        size = lengths(w)
        least, greatest = map(float, size.aminmax())
        near = slack(w)
        if self.low * (1 - near) <= least and greatest <= self.high * (1 + near):
            return w
        if not (least > 1e-12 and greatest < 1e15):
            put(w, replace(self.constraint, per=Grouping(tuple(w.shape), (0,))).project(w))
            return w
        inside = (size >= self.low * (1 - near)) & (size <= self.high * (1 + near))
        return w.mul_(torch.where(inside, 1, size.clamp(self.low, self.high) / size))


def fit_of(constraint: Any) -> FitRows | None:
    """Return the instruction of a constraint on row lengths; None for other constraints."""
    interval = constraint.interval
    return FitRows(interval.low, interval.high, constraint) if isinstance(interval, LengthInterval) else None


def row_dims(what: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the dims whose indices number the groups; None unless all groups are the same rows.

    Penalties that act by entry have no groups, and fit any.
    """
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    found = {dims for leaf in leaves if not leaf.by_entry for dims in _dims(leaf, shape)}
    return found.pop() if len(found) == 1 else None


def _dims(leaf: Any, shape: tuple[int, ...]) -> Iterator[tuple[int, ...] | None]:
    """Yield the row dims of each operation on groups, or of the interval; None if not rows."""
    if isinstance(leaf, Penalty):
        declared = [one for _, one in leaf.operations or ((1.0, None),) if one is None or not one.by_entry]
    else:
        declared = [leaf.interval]
    for one in declared:
        per: Any = Grouping(shape, ()) if getattr(one, "per", "") is None else getattr(one, "per", "")
        rows = isinstance(per, Grouping) and per.lists is None and per.shape == shape and len(per.keep) < 2
        yield per.keep if rows else None


def length_of(groups: Any) -> int:
    """Return the number of entries of each group."""
    return prod([groups.shape[dim] for dim in groups.reduced])


def length_in(tensors: Sequence[Tensor], keep: tuple[int, ...]) -> int | None:
    """Return the length of rows, one per index of `keep`; None if memory isn't such rows."""
    first = tensors[0]
    count = first.shape[keep[0]] if keep else 1
    length = first.numel() // max(count, 1)
    if length and keep in ((), (0,)) and all(t.is_contiguous() for t in tensors):
        return length
    if not length or any(t.stride() != first.stride() for t in tensors) or not dense(first):
        return None
    return None if count > 1 and first.stride(keep[0]) != length else length


def as_rows(tensors: Sequence[Tensor], keep: tuple[int, ...]) -> tuple[Tensor, ...] | None:
    """Return views of tensors as rows, one per index of `keep`; None if memory isn't such rows."""
    length = length_in(tensors, keep)
    if length is None:
        return None
    return tuple([t.as_strided((t.numel() // length, length), (length, 1)) for t in tensors])


def put(w: Tensor, new: Tensor) -> None:
    """Set w = new except where only `new` isn't finite: NaN in an entry must not fill its group."""
    if w.device.type == "cpu" and isfinite(float((new.abs() if new.is_complex() else at_least_float32(new)).sum())):
        w.copy_(new)
        return
    w.copy_(torch.where(new.isfinite() | ~w.isfinite(), new, w))
