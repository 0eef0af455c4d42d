"""Instructions for groups that are rows: the lengths of some rows, then the rows while they are in cache.

Rows are the groups of one index of a dim, or of a whole tensor, where each lies in one stretch of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from restrain.axes import Grouping
from restrain.engine.core import dense
from restrain.operations import LengthInterval
from restrain.penalties import Penalty
from restrain.penalties.shrink import at_least_float32
from restrain.transforms.base import slack

_PART = 4096  # entries of which squares are summed one after the other, without loss of precision


def lengths(rows: Tensor) -> Tensor:
    """The Euclidean length of each row, without temporaries; squares may overflow or vanish."""
    parts = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in rows.split(_PART, 1)]
    length: Tensor = parts[0]
    return length if len(parts) == 1 else torch.linalg.vector_norm(torch.cat(parts, 1), dim=1, keepdim=True)


@dataclass(frozen=True)
class Lengths:
    """Σ ‖row‖₂ of a matrix of rows."""

    def slope(self, rows: Tensor) -> Tensor:
        """Each row divided by its length; zero where that is zero."""
        size = lengths(rows)
        return rows * torch.where(size == 0, 0, 1 / size)


@dataclass(frozen=True)
class ShrinkRows:
    """Each row shortened by a number, at most to zero; a row with NaN stays as it is."""

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Sequence[Any]) -> Tensor:
        compiled = isinstance(numbers[0], Tensor)  # which sums many squares side by side, and knows no parts
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True) if compiled else lengths(w)
        scale = (1 - numbers[0] / size).clamp_min_(0)
        w = w.mul_(torch.where(scale.isnan(), 1, scale))
        if compiled or w.device.type != "cpu" or not bool(scale.all()):
            w = w.add_(0.0)  # -0.0 becomes +0.0
        return w


@dataclass(frozen=True)
class FitRows:
    """Each row scaled so that its length is between `low` and `high`; by `constraint` where a square isn't exact."""

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
    """The instruction of a constraint on the lengths of rows; None if it is another one."""
    interval = constraint.interval
    return FitRows(interval.low, interval.high, constraint) if isinstance(interval, LengthInterval) else None


def row_dims(what: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dims whose indices number the groups of a penalty or constraint; None if these aren't all the same rows.

    What acts by entry has no groups, and goes with any.
    """
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    found = {dims for leaf in leaves if not leaf.by_entry for dims in _dims(leaf, shape)}
    return found.pop() if len(found) == 1 else None


def _dims(leaf: Any, shape: tuple[int, ...]) -> Iterator[tuple[int, ...] | None]:
    """Those of each of its operations on groups, or of its interval; None where groups aren't rows."""
    if isinstance(leaf, Penalty):
        declared = [one for _, one in leaf.operations or ((1.0, None),) if one is None or not one.by_entry]
    else:
        declared = [leaf.interval]
    for one in declared:
        per: Any = Grouping(shape, ()) if getattr(one, "per", "") is None else getattr(one, "per", "")
        rows = isinstance(per, Grouping) and per.lists is None and per.shape == shape and len(per.keep) < 2
        yield per.keep if rows else None


def length_of(groups: Any) -> int:
    """The number of entries of each group."""
    return prod([groups.shape[dim] for dim in groups.reduced])


def length_in(tensors: Sequence[Tensor], keep: tuple[int, ...]) -> int | None:
    """The length of rows, one for each index of `keep`, if the memory of the tensors is such rows; else None."""
    first = tensors[0]
    count = first.shape[keep[0]] if keep else 1
    length = first.numel() // max(count, 1)
    if length and keep in ((), (0,)) and all(t.is_contiguous() for t in tensors):
        return length
    if not length or any(t.stride() != first.stride() for t in tensors) or not dense(first):
        return None
    return None if count > 1 and first.stride(keep[0]) != length else length


def as_rows(tensors: Sequence[Tensor], keep: tuple[int, ...]) -> tuple[Tensor, ...] | None:
    """The memory of tensors as rows, one for each index of `keep`; None where it isn't."""
    length = length_in(tensors, keep)
    if length is None:
        return None
    return tuple([t.as_strided((t.numel() // length, length), (length, 1)) for t in tensors])


def put(w: Tensor, new: Tensor) -> None:
    """w = new, but where that isn't finite and w is: one NaN of a group or matrix would make all of it NaN."""
    if w.device.type == "cpu" and isfinite(float((new.abs() if new.is_complex() else at_least_float32(new)).sum())):
        w.copy_(new)
        return
    w.copy_(torch.where(new.isfinite() | ~w.isfinite(), new, w))
