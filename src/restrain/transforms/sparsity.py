"""Constraints on the number of nonzero entries, or of nonzero groups of entries."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, inf
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from restrain.axes import Dim, Grouping, Per, checked_dim, group_norms, grouping, grouping_at
from restrain.errors import TransformError
from restrain.fields import brief, is_one_of, is_whole, renamed
from restrain.named_tensors import Location
from restrain.penalties.unfold import from_matrix, to_matrix
from restrain.rules import How
from restrain.schedule import Schedule, Strength
from restrain.transforms.activation import AtLayer, checked_code, hits_at, hits_of, sizes, taken
from restrain.transforms.base import Constraint, wide
from restrain.transforms.layout import Layout
from restrain.transforms.sets import ByGroup, MaybePer


def largest(size: Tensor, k: int) -> Tensor:
    """Return the mask of the k largest numbers of each row (first among equals) and of NaN."""
    if k >= size.shape[-1]:
        return torch.ones_like(size, dtype=torch.bool)
    least = size.kthvalue(size.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above, equal = size > least, size == least
    left = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= left)) | size.isnan()


def first_in_order(size: Tensor, k: Tensor) -> Tensor:
    """Return the mask of `largest` for a k that is a 0-d tensor, without reading it."""
    order = size.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < k) | size.isnan()


class Kept(ByGroup, register=False):
    """Base of constraints that keep the k largest of some candidates, and set the others to zero.

    `k` is a number of candidates, a fraction of them, or a schedule of the fraction.
    """

    k: Any
    budget: Any

    cone = True

    def __post_init__(self) -> None:
        if isinstance(self.k, Strength):
            _check_schedule(self.k)
        elif not (
            (isinstance(self.k, Tensor) and self.k.numel() == 1)
            or is_whole(self.k, 1)
            or (isinstance(self.k, float) and 0 < self.k < 1)
        ):
            raise TransformError(
                "k= is a whole number, one or more, a fraction between 0 and 1, or a schedule of the fraction; "
                f"got {self.k!r}"
            )
        if not is_one_of(self.budget, ("each", "all")):
            raise TransformError(f"budget= is 'each' or 'all', got {brief(self.budget)}")
        ByGroup.__post_init__(self)

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """True if it acts on several tensors together."""
        return self.budget == "all" or self.over_units

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> Self:
        return dataclasses.replace(self, k=live(self.k)) if isinstance(self.k, Strength) else self  # type: ignore[type-var]

    def kept(self, size: Tensor) -> Tensor:
        """Return the mask of the candidates that stay, for each row of their sizes.

        Raises:
            TransformError: the schedule's fraction isn't above 0 and at most 1; or it has no step,
                as the constraint isn't attached.
        """
        n = size.shape[-1]
        if isinstance(self.k, Tensor) and torch.compiler.is_compiling():
            return first_in_order(size, (self.k.to(size.device) * n + 0.5).floor().clamp_min(1))
        return largest(size, self.number_of(n))

    def number_of(self, n: int) -> int:
        """Return how many of n candidates stay.

        Raises:
            TransformError: see `kept`.
        """
        return min(self.k if is_whole(self.k) else max(floor(self._fraction() * n + 0.5), 1), n)

    def _fraction(self) -> float:
        if isinstance(self.k, Strength):
            raise TransformError(
                f"{self!r} changes with the steps of a training: attach a rule with it, or take it at one step, as in "
                f"rs.{type(self).__name__}(schedule.at(100))"
            )
        fraction = float(self.k)
        if not 0 < fraction <= 1:
            raise TransformError(
                f"the schedule of k= gives the fraction {fraction:g} at this step; it has to be above 0, up to 1"
            )
        return fraction

    @abstractmethod
    def candidates(self, w: Tensor) -> Tensor:
        """Return the sizes of the candidates of a whole tensor, as one row."""

    @abstractmethod
    def keep(self, w: Tensor, mask: Tensor) -> Tensor:
        """Return the tensor with zeros where `mask`, a row of the candidates, is false."""

    @staticmethod
    def project_together(bound: Sequence[Kept], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the nearest tensors with at most k candidates of all of them that aren't zero.

        Args:
            bound: the constraint bound to each tensor.
            tensors: the tensors.
        """
        sizes = [one.candidates(w) for one, w in zip(bound, tensors, strict=True)]
        dtype = torch.promote_types(sizes[0].dtype, torch.float32)
        mask = bound[0].kept(torch.cat([size.to(sizes[0].device, dtype) for size in sizes]))
        masks = mask.split([len(size) for size in sizes])
        return [one.keep(w, part.to(w.device)) for one, w, part in zip(bound, tensors, masks, strict=True)]


def _check_schedule(k: Strength) -> None:
    """Check that a schedule is one of steps, and a fraction where its values are known.

    Raises:
        TransformError: it isn't.
    """
    if not all(isinstance(part, Schedule) for part in k.parts[1]):
        raise TransformError(
            f"k= takes a number or a schedule of the step; a target adjusts the strength of a penalty, and so does "
            f"LearningRate, got {k!r}: write a fraction, rs.schedules.Cubic(1.0, 0.1, steps=1000), or "
            "rs.Target(zeros=...) * rs.L1() with how='proximal'"
        )
    if k.bounds is not None and not (k.bounds[0] > 0 and k.bounds[1] <= 1):
        raise TransformError(
            f"a schedule of k= is the fraction that is kept, above 0 and up to 1 at each step; {k!r} goes from "
            f"{k.bounds[0]:g} to {k.bounds[1]:g}. A number of entries is written as a whole number, without a schedule"
        )


@dataclass(frozen=True)
class TopK(Kept):
    """At most k nonzero entries in every group: the k largest |x| stay, the others become zero.

    Among equally large entries the first stay, in the order of the indices. This is the nearest
    tensor: the squares of the removed entries are the least. On weights, a removed entry still has
    a gradient: it comes back at a step that makes it larger than an entry that was kept.

    On `rs.outputs("relu")` or `rs.inputs(...)` it is an activation function, in evaluation as well:
    of each token, the k units with the largest |x| stay, along the last axis of (tokens, units) or
    (batch, time, units). The gradient is that of the entries that stay, and of equal entries stay
    those that torch.topk takes. The TopK of sparse autoencoders follows a ReLU.

    Args:
        k: the number of entries, one or more; or a fraction between 0 and 1 of a group's entries,
            rounded to the nearest number and at least one; or a schedule of this fraction, from
            `rs.schedules`, for gradual removal.
        per: the entries that form a group: an axis by its meaning or a dim (see `axes`); None for
            the whole tensor, and on outputs for each token.
        budget: "all": the k largest entries of all tensors of the rule together stay, not of each.

    Raises:
        TransformError: a `k` of another kind; a schedule that leaves the range above 0 up to 1;
            `budget="all"` with `per`; on outputs one of these, or other axes than named above.
        PenaltyError: a tensor without this axis.

    Source: Blumensath and Davies (2009), iterative hard thresholding; gradually, Zhu and Gupta
    (2017); on outputs, Makhzani and Frey (2014), Gao and others (2024), arXiv 2406.04093, eq. 2.

    >>> rs.TopK(2).project(torch.tensor([3.0, -4.0, 1.0, 3.0]))
    tensor([ 3., -4.,  0.,  0.])
    """

    k: float | Strength | Tensor
    per: MaybePer = None
    budget: Literal["each", "all"] = "each"

    keywords = ("top_k",)

    def __post_init__(self) -> None:
        Kept.__post_init__(self)
        if self.budget == "all" and self.per is not None:
            raise TransformError(
                f"budget='all' is one budget for all entries, so it takes no per=; got per={self.per!r}: leave one of "
                "them out, or keep whole groups by rs.TopGroups(k, per=..., budget='all')"
            )

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            return Kept.moments(self, at_places)
        if self.budget == "all" or self.per is not None:
            raise TransformError(
                f"{self!r}: on outputs the k largest of each token stay, so leave per= and budget= out; for a budget "
                "of all tokens of a batch there is rs.BatchTopK(k)"
            )
        return ("forward",)

    def bound_in_layer(self, layer: nn.Module, kind: str, device: torch.device) -> AtLayer:
        """Return the activation function of one layer's outputs or inputs, with its state."""
        return _TopKAtLayer(self, True)

    def project(self, w: Tensor) -> Tensor:
        return self._keep(wide(w).abs(), w)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        # nonzero entries may move, and as many others as are missing to k
        return self._keep(torch.where(w != 0, inf, wide(v).abs()), v)

    def candidates(self, w: Tensor) -> Tensor:
        return wide(w).abs().flatten()

    def keep(self, w: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.reshape(w.shape), w, 0)

    def _keep(self, size: Tensor, w: Tensor) -> Tensor:
        if not w.numel():
            return w.clone()
        groups = self.groups(w)
        mask = self.kept(to_matrix(size, groups))
        return torch.where(from_matrix(mask, groups, tuple(w.shape)), w, 0)


class _TopKAtLayer(AtLayer, register=False):
    """`TopK` of each token of a layer's tensor."""

    of: TopK

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        checked_code(self.of, x)
        units = x.shape[-1]
        if isinstance(self.of.k, Tensor) and torch.compiler.is_compiling():  # its value isn't known
            y = torch.where(self.of.kept(sizes(x)), x, 0)
            hits, tokens = hits_of(y)
        else:
            indices = sizes(x).topk(self.of.number_of(units), -1, sorted=False).indices
            y, values = taken(x, indices)
            hits, tokens = hits_at(indices, values, units), x.numel() // max(units, 1)
        if layout.training:
            self.counts.add(hits, tokens)
        return y


@dataclass(frozen=True)
class TopGroups(Kept):
    """At most k groups that aren't zero: the k of largest ‖x_g‖₂ stay, the others become zero.

    Among groups of equal length the first stay. This is the nearest tensor. Groups of different
    sizes are compared by their lengths as they are. A removed group still has a gradient: it comes
    back at a step that makes it longer than a group that was kept. Entries in no group are left
    alone.

    Args:
        k: the number of groups, one or more; or a fraction between 0 and 1 of the groups, rounded
            to the nearest number and at least one; or a schedule of this fraction, from
            `rs.schedules`, for gradual removal.
        per: what one group is; see `rs.GroupLasso`.
        budget: "all": the k largest groups of all tensors of the rule together stay, not of each.

    Raises:
        TransformError: a `k` of another kind; a schedule that leaves the range above 0 up to 1.
        PenaltyError: a tensor doesn't have the axis, blocks or indices of `per`.

    Source: Baraniuk and others (2010), model-based hard thresholding, for blocks; gradually, Zhu
    and Gupta (2017).

    >>> rs.TopGroups(1, per="row").project(torch.tensor([[3.0, 4.0], [0.1, 6.0]]))
    tensor([[0.0000, 0.0000],
            [0.1000, 6.0000]])
    """

    k: float | Strength | Tensor
    per: Per = "out"
    budget: Literal["each", "all"] = "each"

    keywords = ("top_groups",)
    alone = False  # groups compete

    def project(self, w: Tensor) -> Tensor:
        return self.keep(w, self.kept(self.candidates(w))) if w.numel() else w.clone()

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        # groups that aren't zero may move, and as many others as are missing to k
        size = torch.where(self.candidates(w) != 0, inf, self.candidates(v))
        return self.keep(v, self.kept(size)) if v.numel() else v.clone()

    def candidates(self, w: Tensor) -> Tensor:
        groups = self.groups(w)
        return groups.once(group_norms(wide(w), groups)).flatten()

    def keep(self, w: Tensor, mask: Tensor) -> Tensor:
        groups = self.groups(w)
        return groups.restore(torch.where(groups.spread(mask), groups.view(w), 0), w)


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
