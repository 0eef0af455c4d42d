"""Constraints on the number of nonzero entries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import floor, inf
from typing import Self

import torch
from torch import Tensor

from restrain.axes import Dim, Grouping, checked_dim, grouping, grouping_at
from restrain.errors import TransformError
from restrain.fields import is_whole, renamed
from restrain.named_tensors import Location
from restrain.penalties.unfold import from_matrix, to_matrix
from restrain.transforms.base import Constraint, wide
from restrain.transforms.sets import ByGroup, MaybePer


def largest(size: Tensor, k: int) -> Tensor:
    """Return the mask of the k largest numbers of each row (first among equals) and of NaN."""
    if k >= size.shape[-1]:
        return torch.ones_like(size, dtype=torch.bool)
    least = size.kthvalue(size.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above, equal = size > least, size == least
    left = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= left)) | size.isnan()


@dataclass(frozen=True)
class TopK(ByGroup):
    """At most k nonzero entries in every group: the k largest |x| stay, the others become zero.

    Among equally large entries the first stay, in the order of the indices. This is the nearest
    tensor: the squares of the removed entries are the least.

    Args:
        k: the number of entries, one or more; or a fraction between 0 and 1 of a group's entries,
            rounded to the nearest number and at least one.
        per: the entries that form a group: an axis by its meaning or a dim (see `axes`); None for
            the whole tensor.

    Raises:
        TransformError: a `k` that is neither.
        PenaltyError: a tensor without this axis.

    Source: Blumensath and Davies (2009), iterative hard thresholding.

    >>> rs.TopK(2).project(torch.tensor([3.0, -4.0, 1.0, 3.0]))
    tensor([ 3., -4.,  0.,  0.])
    """

    k: float
    per: MaybePer = None

    keywords = ("top_k",)
    cone = True

    def __post_init__(self) -> None:
        if not is_whole(self.k, 1) and not (isinstance(self.k, float) and 0 < self.k < 1):
            raise TransformError(f"k= is a whole number, one or more, or a fraction between 0 and 1; got {self.k!r}")
        ByGroup.__post_init__(self)

    def project(self, w: Tensor) -> Tensor:
        return self._keep(wide(w).abs(), w)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        # nonzero entries may move, and as many others as are missing to k
        return self._keep(torch.where(w != 0, inf, wide(v).abs()), v)

    def _keep(self, size: Tensor, w: Tensor) -> Tensor:
        if not w.numel():
            return w.clone()
        groups = self.groups(w)
        rows = to_matrix(size, groups)
        n = rows.shape[-1]
        k = int(self.k) if self.k >= 1 else max(floor(self.k * n + 0.5), 1)
        return torch.where(from_matrix(largest(rows, k), groups, tuple(w.shape)), w, 0)


@renamed(along="dim")
@dataclass(frozen=True)
class NM(Constraint):
    """At most n of m consecutive entries are nonzero: the n largest |x| of each m stay.

    Among equally large entries the first stay. GPUs multiply faster by weights with 2 of 4 along
    the input.

    Args:
        n: the greatest number of nonzero entries.
        m: the number of consecutive entries.
        dim: the dim along which entries are consecutive, or an axis by its meaning, such as "in"
            (see `axes`).

    Raises:
        TransformError: numbers without 1 ≤ n < m; an axis whose length m doesn't divide.
        PenaltyError: a tensor without this axis.

    Source: Mishra and others (2021); Zhou and others (2021).

    >>> rs.NM(2, 4).project(torch.tensor([[1.0, -2.0, 3.0, -4.0, 4.0, 3.0, 2.0, 1.0]]))
    tensor([[ 0.,  0.,  3., -4.,  4.,  3.,  0.,  0.]])
    """

    n: int
    m: int
    dim: Dim = "in"

    cone = True

    def __post_init__(self) -> None:
        if not (is_whole(self.n, 1) and is_whole(self.m, 1) and self.n < self.m):
            raise TransformError(f"n= and m= are whole numbers with 1 ≤ n < m; got n={self.n!r}, m={self.m!r}")
        checked_dim(self.dim)

    def project(self, w: Tensor) -> Tensor:
        return self._keep(wide(w).abs(), w)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return self._keep(torch.where(w != 0, inf, wide(v).abs()), v)

    def bound_to(self, at: Location) -> Self:
        groups = grouping_at(self.dim, at)
        self._length(groups, at.name)
        return dataclasses.replace(self, dim=groups)

    def _length(self, groups: Grouping, name: str = "") -> int:
        length = groups.shape[groups.own[-1]]
        if length % self.m:
            raise TransformError(
                f"{self.m} consecutive entries don't divide the {length} along dim={self.dim!r} of a tensor of shape "
                f"{groups.shape}{f' ({name!r})' if name else ''}: leave it out, or say dim="
            )
        return length

    def _keep(self, size: Tensor, w: Tensor) -> Tensor:
        groups = grouping(self.dim, w.shape)
        self._length(groups)
        if not w.numel():
            return w.clone()
        moved = groups.view(size).movedim(groups.own[-1], -1)
        kept = largest(moved.reshape(-1, self.m), self.n).reshape(moved.shape).movedim(-1, groups.own[-1])
        return torch.where(kept.reshape(w.shape), w, 0)
