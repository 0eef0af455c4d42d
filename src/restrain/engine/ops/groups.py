"""Rules on groups that are rows, as steps of kernels: the lengths of some rows, then the rows while they are in cache.

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
from restrain.penalties import GroupLasso, Penalty
from restrain.penalties.shrink import at_least_float32
from restrain.transforms import MaxNorm, MinMaxNorm, UnitNorm
from restrain.transforms.base import slack

_PART = 4096  # entries of which squares are summed one after the other, without loss of precision


def lengths(rows: Tensor) -> Tensor:
    """The Euclidean length of each row, without temporaries; squares may overflow or vanish."""
    parts = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in rows.split(_PART, 1)]
    length: Tensor = parts[0]
    return length if len(parts) == 1 else torch.linalg.vector_norm(torch.cat(parts, 1), dim=1, keepdim=True)


@dataclass(frozen=True)
class Lengths:
    """Σ ‖row‖₂, as one of the penalties of a step."""

    def gradient(self, rows: Tensor) -> Tensor:
        """Each row divided by its length; zero where that is zero."""
        size = lengths(rows)
        return rows * torch.where(size == 0, 0, 1 / size)


@dataclass(frozen=True)
class ShrinkRows:
    """Each row shortened by a number, at most to zero; a row with NaN stays as it is."""

    parts = ()

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

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it calls."""
        return (type(self.constraint),)

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
    """The step of a constraint on the lengths of rows; None if it is another one."""
    if isinstance(constraint, MaxNorm):
        return FitRows(0.0, float(constraint.max_norm), constraint)
    if isinstance(constraint, UnitNorm):
        return FitRows(1.0, 1.0, constraint)
    if isinstance(constraint, MinMaxNorm) and constraint.rate == 1:
        return FitRows(float(constraint.low), float(constraint.high), constraint)
    return None


def kept(what: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dims whose indices number the groups of a penalty or constraint; None if these aren't all the same rows.

    What acts by entry has no groups, and goes with any.
    """
    found = {groups if isinstance(groups, str) else groups.keep for groups in _groups(what, shape)}
    return found.pop() if len(found) == 1 and "other" not in found else None  # type: ignore[return-value]


def _groups(what: Any, shape: tuple[int, ...]) -> Iterator[Any]:
    for leaf in [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]:
        if isinstance(leaf, Penalty) and leaf.entrywise and leaf.uniform:
            continue
        if not isinstance(leaf, GroupLasso) and fit_of(leaf) is None:
            yield "other"
            continue
        per: Any = leaf.per  # type: ignore[union-attr]
        groups = Grouping(shape, ()) if per is None else per
        simple = isinstance(groups, Grouping) and groups.lists is None and groups.shape == shape
        yield groups if simple and len(groups.keep) < 2 else "other"


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
