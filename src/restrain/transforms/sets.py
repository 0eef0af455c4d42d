"""Constraints on groups of entries: bounds on their length, sum, or sum of absolute values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import inf
from typing import Any, Self

import torch
from torch import Tensor

from restrain.axes import Grouped, Grouping, Per, all_in_range, checked, group_norms, grouping, grouping_at, squared
from restrain.fields import is_number
from restrain.named_tensors import Location
from restrain.operations import LengthInterval
from restrain.penalties.shrink import exact, unsign_zeros_, unsigned_zeros
from restrain.penalties.unfold import from_matrix, to_matrix
from restrain.rules import How
from restrain.transforms.base import Constraint, checked_number, slack, wide
from restrain.transforms.metric import cut_to_sum, fit_lengths

MaybePer = Per | None


class ByGroup(Grouped, Constraint, register=False):  # type: ignore[override]
    """Base of constraints on each group of entries; with `per=None` the whole tensor is a group."""

    per: Any
    alone = True  # acts on each group alone

    def __post_init__(self) -> None:
        if self.per is not None:
            object.__setattr__(self, "per", checked(self.per))

    @property
    def has_tangent(self) -> bool:  # type: ignore[override]
        """True if `tangent` has a formula; none is known for several tensors together."""
        return not self.joint and type(self).tangent is not Constraint.tangent

    def moments(self, at_places: bool) -> tuple[How, ...]:
        found = Constraint.moments(self, at_places)
        return ("project",) if self.joint else found

    def groups(self, w: Tensor) -> Grouping:
        """Return the groups of a tensor."""
        return Grouping(tuple(w.shape), ()) if self.per is None else grouping(self.per, w.shape)

    def bound_to(self, at: Location) -> Self:
        return self if self.per is None else dataclasses.replace(self, per=grouping_at(self.per, at))  # type: ignore[type-var]


@dataclass(frozen=True)
class MaxNorm(ByGroup):
    """‖x_g‖₂ ≤ max_norm for every group g: longer groups are scaled down to that length.

    Groups that exceed `max_norm` only by rounding count as inside and stay unchanged (see `slack`).

    Args:
        max_norm: the greatest length, above zero.
        per: the entries that form a group: an axis by its meaning, a dim, a block or lists of
            indices (see `axes`); None for the whole tensor.

    Raises:
        TransformError: `max_norm` isn't a finite number above zero.
        PenaltyError: the tensor doesn't have the axis of `per`.

    Source: Srebro and others (2005); Srivastava and others (2014), section 5.1, with dropout.

    >>> rs.MaxNorm(1.0, per="row").project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """

    max_norm: float
    per: MaybePer = "out"

    keywords = ("max_norm",)
    convex = True

    def __post_init__(self) -> None:
        checked_number("max_norm", self.max_norm, "a finite number above zero", 0, inf, closed=False)
        ByGroup.__post_init__(self)

    @property
    def interval(self) -> LengthInterval:  # type: ignore[override]
        """The bounds of lengths."""
        return LengthInterval(0.0, float(self.max_norm), self.per)

    def project(self, w: Tensor) -> Tensor:
        return _fit(w, self.groups(w), 0, self.max_norm)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _fit_by(self, w, step, 0, self.max_norm)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return _without_radial(w, v, self.groups(w), 0, self.max_norm)


@dataclass(frozen=True)
class UnitNorm(ByGroup):
    """‖x_g‖₂ = 1 for every group g: each group is scaled to length 1.

    Norms that are 1 up to rounding count as 1, and their groups stay unchanged (see `slack`). A
    group of zeros, equally far from all unit vectors, becomes n equal entries 1 / √n. As a
    parametrisation it is w_g = v_g / ‖v_g‖₂, where only the direction of v_g has a gradient.

    Args:
        per: the entries that form a group: an axis by its meaning, a dim, a block or lists of
            indices (see `axes`); None for the whole tensor.

    Raises:
        PenaltyError: a tensor without this axis.

    >>> rs.UnitNorm(per="row").project(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.7071, 0.7071]])
    """

    per: MaybePer = "out"

    keywords = ("unit_norm",)
    by_tangent = True

    @property
    def interval(self) -> LengthInterval:  # type: ignore[override]
        """The bounds of lengths."""
        return LengthInterval(1.0, 1.0, self.per)

    def project(self, w: Tensor) -> Tensor:
        return _fit(w, self.groups(w), 1, 1)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _fit_by(self, w, step, 1, 1)

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return directions(v, self.groups(v))

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return _without_radial(w, v, self.groups(w), 1, 1)


@dataclass(frozen=True)
class MinMaxNorm(ByGroup):
    """low ≤ ‖x_g‖₂ ≤ high for every group g: groups outside are scaled to the nearer bound.

    A group of zeros becomes equal entries with norm `low`. With a rate r < 1 the new length is
    r · bound + (1 - r) · length, as in Keras: a partial correction at each step instead of a
    projection, so that lengths may be out of bounds for a while. If the tensor also has another
    constraint, the bounds hold after each step.

    Args:
        low: the least length, zero or more.
        high: the greatest length, above zero and not below `low`.
        rate: the fraction of the way to the bound at each step, in (0, 1].
        per: the entries that form a group: an axis by its meaning, a dim, a block or lists of
            indices (see `axes`); None for the whole tensor.

    Raises:
        TransformError: invalid bounds or rate.
        PenaltyError: a tensor without this axis.

    >>> x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]])
    >>> rs.MinMaxNorm(1.0, 2.0, per="row").project(x)
    tensor([[1.2000, 1.6000],
            [0.6000, 0.8000],
            [0.6000, 0.8000]])
    """

    low: float = 0.0
    high: float = 1.0
    rate: float = 1.0
    per: MaybePer = "out"

    keywords = ("min_max_norm",)

    def __post_init__(self) -> None:
        checked_number("low", self.low, "a finite number, zero or more", 0, inf, closed=True)
        checked_number("high", self.high, "a finite number above zero", 0, inf, closed=False)
        checked_number("high", self.high, f"low={self.low!r} or more", self.low, inf, closed=True)
        if not is_number(self.rate) or self.rate != 1:
            checked_number("rate", self.rate, "a number above zero, up to one", 0, 1, closed=False)
        ByGroup.__post_init__(self)

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """True without a lower bound and with rate 1."""
        return self.low == 0 and self.rate == 1

    @property
    def interval(self) -> LengthInterval | None:  # type: ignore[override]
        """The bounds of lengths; None if rate < 1, which is no projection."""
        return LengthInterval(float(self.low), float(self.high), self.per) if self.rate == 1 else None

    def project(self, w: Tensor) -> Tensor:
        return _fit(w, self.groups(w), self.low, self.high, self.rate)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        return self.project(w) if self.rate != 1 else _fit_by(self, w, step, self.low, self.high)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return _without_radial(w, v, self.groups(w), self.low, self.high)


def directions(v: Tensor, groups: Grouping) -> Tensor:
    """Return each group divided by its length; equal entries 1 / √n for a group of zeros."""
    x = groups.view(wide(v))
    unit, norms = _lengths(x, groups)
    equal = groups.sizes(norms) ** -0.5
    return groups.restore(torch.where(norms == 0, equal, x / unit / torch.where(norms == 0, 1, norms)).to(v.dtype), v)


def _lengths(x: Tensor, groups: Grouping) -> tuple[Tensor, Tensor]:
    """Return (u, n) with u · n the norm of each group; u is its greatest |x|, or 1 for zeros."""
    peak = groups.max(x.abs()).detach()
    unit = torch.where(peak == 0, 1, peak)
    return unit, group_norms(x / unit, groups)


def _fit(w: Tensor, groups: Grouping, low: float, high: float, rate: float = 1.0) -> Tensor:
    """Return groups scaled to a length in [low, high], or a fraction `rate` of the way there."""
    x = groups.view(wide(w))
    if rate == 1 and (length := _plain_lengths(x, groups)) is not None:
        inside = (length >= low * (1 - slack(w))) & (length <= high * (1 + slack(w)))
        moved = (x * torch.where(inside, 1, length.clamp(low, high) / length)).to(w.dtype)
        return unsign_zeros_(groups.restore(moved, w))
    unit, norms = _lengths(x, groups)
    length = unit * norms
    inside = (length >= low * (1 - slack(w))) & (length <= high * (1 + slack(w)))
    target = length.clamp(low, high)
    if rate != 1:
        target = rate * target + (1 - rate) * length
    # Divided by the greatest entry first, so that no square overflows or vanishes
    scaled = x / unit * (target / torch.where(norms == 0, 1, norms))
    scaled = torch.where(norms == 0, target * groups.sizes(norms) ** -0.5, scaled)
    return unsigned_zeros(groups.restore(torch.where(inside, groups.view(w), scaled.to(w.dtype)), w))


def _fit_by(said: ByGroup, w: Tensor, step: float | Tensor, low: float, high: float) -> Tensor:
    """Return groups scaled to lengths in [low, high], nearest in the metric of the steps."""
    if not isinstance(step, Tensor) or not step.dim() or w.is_complex() or not w.numel():
        return said.project(w)
    groups = said.groups(w)
    x, t = groups.view(wide(w)), groups.view(step)
    unit, norms = _lengths(x, groups)
    length = exact(unit) * exact(norms)
    inside = (length >= low * (1 - slack(w))) & (length <= high * (1 + slack(w)))
    if bool(inside.all()):
        return w.clone()
    z = fit_lengths(x, t, groups, torch.where(inside, length, length.clamp(low, high))).to(w.dtype)
    if bool((length == 0).any()):  # a group of zeros has no direction: as in the Euclidean metric
        z = torch.where(length == 0, groups.view(said.project(w)), z)
    return groups.restore(torch.where(inside, groups.view(w), z), w)


def _plain_lengths(x: Tensor, groups: Grouping) -> Tensor | None:
    """Return group lengths without scaling; None if a square might overflow or vanish."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return None
    squares = groups.sum(squared(x))
    return squares.sqrt() if all_in_range(squares) else None


def _without_radial(w: Tensor, v: Tensor, groups: Grouping, low: float, high: float) -> Tensor:
    """Return `v` without growth of groups of length `high`, or shrinkage of groups of length `low`.

    Only the radial part of a movement changes the length of a group.
    """
    x, y = groups.view(wide(w)), groups.view(wide(v))
    length = _plain_lengths(x, groups)
    if length is not None:
        outward, size = x, length  # a multiple of the unit vector, and its length
    else:
        unit, norms = _lengths(x, groups)
        length = unit * norms
        outward, size = x / unit / torch.where(norms == 0, 1, norms), torch.ones_like(norms)
    along = groups.sum((outward.conj() * y).real) / size
    longest, shortest = length >= high * (1 - 2 * slack(w)), length <= low * (1 + 2 * slack(w))
    blocked = (longest & (along > 0)) | (shortest & (along < 0))
    removed = torch.where(blocked, along / size, 0).to(outward.dtype)
    return groups.restore(torch.addcmul(y, removed, outward, value=-1).to(v.dtype), v)


@dataclass(frozen=True)
class Simplex(ByGroup):
    """x ≥ 0 and Σ x = total in every group: the nearest point of the simplex, often sparse.

    x becomes max(x - θ, 0), with θ such that the sum is `total`. Groups whose sum is right up to
    rounding stay unchanged.

    Args:
        total: the sum of a group, above zero.
        per: the entries that form a group: an axis by its meaning or a dim (see `axes`); None for
            the whole tensor.

    Raises:
        TransformError: `total` isn't a finite number above zero; a complex tensor.
        PenaltyError: a tensor without this axis.

    Source: Held, Wolfe and Crowder (1974); Duchi and others (2008), figure 1.

    >>> rs.Simplex(per="row").project(torch.tensor([[0.6, 0.8, -1.0], [0.2, 0.3, 0.5]]))
    tensor([[0.4000, 0.6000, 0.0000],
            [0.2000, 0.3000, 0.5000]])
    """

    total: float = 1.0
    per: MaybePer = None

    convex = True

    def __post_init__(self) -> None:
        checked_number("total", self.total, "a finite number above zero", 0, inf, closed=False)
        ByGroup.__post_init__(self)

    def project(self, w: Tensor) -> Tensor:
        return self.project_by(w, 1.0)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        wide(w, real="so no entry of it is nonnegative: Simplex needs a real one")
        if not w.numel():
            return w.clone()
        groups = self.groups(w)
        x = exact(to_matrix(wide(w), groups))
        sums = x.sum(-1, keepdim=True)
        inside = (x >= 0).all(-1, keepdim=True) & ((sums - self.total).abs() <= slack(w) * self.total)
        z = unsigned_zeros(torch.where(inside, x, _onto_simplex(x, step, groups, self.total)))
        return from_matrix(z, groups, tuple(w.shape)).to(w.dtype)


@dataclass(frozen=True)
class L1Ball(ByGroup):
    """Σ |x| ≤ radius in every group: larger groups are soft-thresholded, at one height per group.

    Of complex entries the modulus counts.

    Args:
        radius: the greatest sum of absolute values, above zero.
        per: the entries that form a group: an axis by its meaning or a dim (see `axes`); None for
            the whole tensor.

    Raises:
        TransformError: `radius` isn't a finite number above zero.
        PenaltyError: a tensor without this axis.

    Source: Duchi and others (2008), section 4.

    >>> rs.L1Ball(2.0).project(torch.tensor([3.0, -2.0, 0.5]))
    tensor([ 1.5000, -0.5000,  0.0000])
    """

    radius: float
    per: MaybePer = None

    keywords = ("l1_ball",)
    convex = True

    def __post_init__(self) -> None:
        checked_number("radius", self.radius, "a finite number above zero", 0, inf, closed=False)
        ByGroup.__post_init__(self)

    def project(self, w: Tensor) -> Tensor:
        return self.project_by(w, 1.0)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        wide(w)
        if not w.numel():
            return w.clone()
        groups = self.groups(w)
        x = exact(to_matrix(wide(w), groups))
        size = x.abs()
        inside = size.sum(-1, keepdim=True) <= self.radius * (1 + slack(w))
        z = unsigned_zeros(torch.where(inside, x, x.sgn() * _onto_simplex(size, step, groups, self.radius)))
        return from_matrix(z, groups, tuple(w.shape)).to(w.dtype)


def _onto_simplex(x: Tensor, step: float | Tensor, groups: Grouping, total: float) -> Tensor:
    """Return each row projected onto the simplex, in the metric of steps that differ by entry."""
    if not isinstance(step, Tensor) or not step.dim() or step.is_complex():
        return to_simplex(x, total)
    return cut_to_sum(x, exact(to_matrix(step, groups)), total)


def to_simplex(x: Tensor, total: float) -> Tensor:
    """Return each row projected onto nonnegative entries of sum `total`."""
    x = (x - x.amax(-1, keepdim=True)).clamp_min(-total)  # changes only entries that become zero
    ordered = x.sort(-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device)
    level = ((ordered.cumsum(-1) - total) / counts).amax(-1, keepdim=True)
    z = (x - level).clamp_min(0)
    return z * (total / z.sum(-1, keepdim=True))  # 1 up to rounding
