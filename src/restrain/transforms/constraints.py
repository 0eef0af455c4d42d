"""Constraints: projections of parameters on a set, which hold after every step."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from restrain.axes import Grouping, Per, checked, group_norms, group_size, grouping, grouping_at
from restrain.errors import RestrainWarning, TransformError
from restrain.penalties.shrink import at_least_float32
from restrain.sites import Location
from restrain.transforms.base import Constraint, checked_number


@dataclass(frozen=True)
class NonNegative(Constraint):
    """Every entry ≥ 0: negative ones become zero.

    As a parametrisation w = softplus(v) = log(1 + exp v) > 0, which never is exactly zero; where the weight is zero or
    negative at attach, it begins at a hundredth of the weight's root mean square (at least 1e-4), with a warning.

    Raises:
        TransformError: a complex tensor, which has no order.

    >>> rs.NonNegative().project(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    keywords = ("non_negative",)
    decays_to = "log 2 = 0.693"

    def project(self, w: Tensor) -> Tensor:
        return _real(w).clamp_min(0) + 0.0  # -0.0 becomes +0.0

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return F.softplus(_real(v), threshold=40)  # from there on log(1 + exp v) is v in float64, too

    def to_free(self, w: Tensor) -> Tensor:
        outside = _real(w) <= 0
        if outside.any():
            least = max(0.01 * float(w.square().mean().sqrt()), 1e-4)
            warnings.warn(
                f"{int(outside.sum())} of {w.numel()} entries are zero or negative; how='parametrize' keeps them "
                f"above zero by softplus, so they begin at {least:.3g}. For exact zeros use how='project'",
                RestrainWarning,
                stacklevel=2,
            )
            w = torch.where(outside, least, w)
        return w + torch.log(-torch.expm1(-w))


@dataclass(frozen=True)
class MaxNorm(Constraint):
    """‖x_g‖₂ ≤ max_norm for every group g: longer ones are scaled down to that length.

    Norms up to max_norm (1 + 4 eps) of the tensor's dtype count as inside, where nothing is changed.

    Args:
        max_norm: the greatest length, above zero.
        per: what one group is, by the meaning of the axis or as a dim (see `axes`).

    Raises:
        TransformError: a `max_norm` that isn't a finite number above zero.
        PenaltyError: a tensor that has no such axis.

    Source: Srebro and others (2005); Srivastava and others (2014), section 5.1, with dropout.

    >>> rs.MaxNorm(1.0, per="row").project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """

    max_norm: float
    per: Per = "out"

    keywords = ("max_norm",)

    def __post_init__(self) -> None:
        checked_number("max_norm", self.max_norm, "a finite number above zero", 0, inf, closed=False)
        checked(self.per)

    def project(self, w: Tensor) -> Tensor:
        groups = grouping(self.per, w.shape)
        x = groups.view(at_least_float32(w))
        unit, norms = _lengths(x, groups)
        inside = unit * norms <= self.max_norm * (1 + 4 * torch.finfo(w.dtype).eps)
        # entries first divided by the greatest, so that no square overflows or vanishes
        scaled = x / unit * (self.max_norm / torch.where(norms == 0, 1, norms))
        return torch.where(inside, groups.view(w), scaled.to(w.dtype)).reshape(w.shape)

    def bound_to(self, at: Location) -> MaxNorm:
        return dataclasses.replace(self, per=grouping_at(self.per, at))


@dataclass(frozen=True)
class UnitNorm(Constraint):
    """‖x_g‖₂ = 1 for every group g: each is scaled to that length.

    Norms within 8 eps of one, of the tensor's dtype, count as one, and nothing is changed there. A group of
    zeros, from which all unit vectors are equally far, becomes the one with n equal entries 1 / √n. As a
    parametrisation w_g = v_g / ‖v_g‖₂, through which only the change of direction has a gradient.

    Args:
        per: what one group is, by the meaning of the axis or as a dim (see `axes`).

    Raises:
        PenaltyError: a tensor that has no such axis.

    >>> rs.UnitNorm(per="row").project(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.7071, 0.7071]])
    """

    per: Per = "out"

    keywords = ("unit_norm",)

    def __post_init__(self) -> None:
        checked(self.per)

    def project(self, w: Tensor) -> Tensor:
        groups = grouping(self.per, w.shape)
        directions, norms = _directions(groups.view(at_least_float32(w)), groups)
        inside = (norms - 1).abs() <= 8 * torch.finfo(w.dtype).eps
        return torch.where(inside, groups.view(w), directions.to(w.dtype)).reshape(w.shape)

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return directions(v, grouping(self.per, v.shape))

    def bound_to(self, at: Location) -> UnitNorm:
        return dataclasses.replace(self, per=grouping_at(self.per, at))


def directions(v: Tensor, groups: Grouping) -> Tensor:
    """Each group divided by its length; equal entries 1 / √n where it is zero."""
    return _directions(groups.view(at_least_float32(v)), groups)[0].to(v.dtype).reshape(v.shape)


def _directions(x: Tensor, groups: Grouping) -> tuple[Tensor, Tensor]:
    """The direction and the length of each group, in the viewed shape."""
    unit, norms = _lengths(x, groups)
    zero = norms == 0
    return torch.where(zero, max(group_size(groups), 1) ** -0.5, x / unit / torch.where(zero, 1, norms)), unit * norms


def _real(w: Tensor) -> Tensor:
    if w.is_complex():
        raise TransformError(f"a complex tensor ({w.dtype}) has no sign: NonNegative needs a real one")
    return w


def _lengths(x: Tensor, groups: Grouping) -> tuple[Tensor, Tensor]:
    """u and n with u · n the norm of each group: u is its greatest |entry| (one where that is zero)."""
    peak = groups.max(x.abs()).detach()
    unit = torch.where(peak == 0, 1, peak)
    return unit, group_norms(x / unit, groups)
