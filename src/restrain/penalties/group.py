"""Norms as penalties: of a tensor as a whole, or summed over groups of its entries."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from restrain.axes import (
    Grouped,
    Grouping,
    Per,
    check_place,
    checked,
    group_norms,
    grouping,
    grouping_at,
    grouping_of_samples,
)
from restrain.errors import NoProxError, PenaltyError
from restrain.fields import is_number
from restrain.named_tensors import Location
from restrain.operations import Length, Terms
from restrain.penalties.base import OfRows, Penalty, Tensors, batch_size, in_float32
from restrain.penalties.shrink import at_least_float32, cut_groups, share_groups, shrink_entries, shrink_groups
from restrain.rules import How


@dataclass(frozen=True)
class Norm(OfRows):
    """(Σ|x|^p)^(1/p), the p-norm of a whole tensor (no power of it); for p = inf the largest |x|.

    The prox is known for p = 1, 2 and inf: it makes the tensor zero as a whole (p = 2), or its
    largest entries equal (p = inf). On outputs the value is the mean of the samples' norms.

    Raises:
        PenaltyError: p is below one, where there is no norm.

    Source of the proxes: Parikh and Boyd (2014), section 6.5.

    >>> rs.Norm(2)(torch.tensor([3.0, -4.0])), rs.Norm(float("inf"))(torch.tensor([3.0, -4.0]))
    (tensor(5.), tensor(4.))
    """

    p: float

    shrinks = True
    takes_mask = True

    def __post_init__(self) -> None:
        if not (isinstance(self.p, float) and self.p == inf) and not (is_number(self.p) and self.p >= 1):
            raise PenaltyError(f"Norm(p) needs a number p of one or more, or inf; got {self.p!r}")

    @property
    def elastic(self) -> tuple[float, float] | None:
        """(1, 0) for p = 1, as of `L1`; else None."""
        return (1.0, 0.0) if self.p == 1 else None

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        """Whether there is a prox, which then also takes a step for each entry."""
        return self.has_prox

    @property
    def has_prox(self) -> bool:
        return self.p in (1, 2, inf)

    def over_rows(self, rows: Tensor) -> Tensor:
        return _norms(rows, self.p).sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        if self.p == 1:
            return shrink_entries(w, step, 1.0, 0.0)
        if self.p == 2:
            return shrink_groups(w, Grouping((w.numel(),), ()), 1.0, step)
        if self.p == inf:
            return cut_groups(w, Grouping((w.numel(),), ()), step)
        raise NoProxError(f"{self!r} has no known prox; Norm(1), Norm(2) and Norm(inf) have one")


def _norms(rows: Tensor, p: float) -> Tensor:
    """Return the p-norm of each row, with a zero gradient at zero."""
    if p == 1 or not rows.numel():
        return rows.abs().sum(1)
    if p == 2:
        return group_norms(rows, Grouping(tuple(rows.shape), (0,)))
    size = rows.abs()
    peak = size.amax(1, keepdim=True)
    if p == inf:
        return peak
    # Divided by the largest entry, powers neither overflow nor vanish
    unit = torch.where((peak == 0) | peak.isinf(), 1, peak).detach()
    powers = (size / unit).pow(p).sum(1, keepdim=True)
    zero = powers == 0
    return torch.where(zero, 0.0, unit * torch.where(zero, 1.0, powers).pow(1 / p))


class GroupPenalty(Grouped, Penalty, register=False):  # type: ignore[override]
    """Base of penalties Σ_g f(x_g) over groups g of entries; `per` says how entries are grouped.

    On outputs, `per` is a dim of the layer's output (or blocks, or lists of indices of a dim). Then
    each sample has groups of its own, and the values are averaged over the samples.

    Raises:
        PenaltyError: `per` is no grouping, or a tensor doesn't have its axis, blocks or indices.
    """

    per: Per
    groupwise = True
    shrinks = True
    alone = True  # acts on each group alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "per", checked(self.per))

    @abstractmethod
    def over(self, w: Tensor, groups: Grouping) -> Tensor:
        """Return Σ_g f(x_g) of a tensor that is float32 or wider."""

    def __call__(self, w: Tensors) -> Tensor:
        return self.over(w, grouping(self.per, w.shape))

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        self.moments(at_places=True)
        h = h if mask is None else self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        groups = grouping_of_samples(self.per, tuple(h.shape), dim)
        return in_float32(lambda x: self.over(x, groups) / max(size, 1), h)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            check_place(self.per)
        return Penalty.moments(self, at_places)

    def bound_to(self, at: Location) -> Penalty:
        return dataclasses.replace(self, per=grouping_at(self.per, at))  # type: ignore[type-var]


@dataclass(frozen=True)
class GroupLasso(GroupPenalty):
    """Σ_g √n_g ‖x_g‖₂ over groups g of n_g entries; how="proximal" makes whole groups exactly zero.

    The gradient is zero where a group's squares sum to zero.

    Args:
        per: what one group is, by the meaning of the axis, as a dim, a block, or lists of indices
            (see `axes`): "out" groups the weights into a unit or filter, "in" the weights out of an
            input or channel, "head" the weights of a head of nn.MultiheadAttention, (4, 4) the
            weights of a block, {"in": [[0, 1], [2, 3, 4]]} the weights of several inputs.

    Raises:
        PenaltyError: a tensor doesn't have the axis, blocks or indices of `per`.

    Source: Yuan and Lin (2006), eq. 2.1 with K = n_g I, and eq. 2.4 for the prox.

    >>> w = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    >>> (0.5 * rs.GroupLasso(per="row")).prox(w)
    tensor([[2.5757, 3.4343],
            [0.0000, 0.0000]])
    """

    per: Per = "out"

    keywords = ("group_lasso",)

    @property
    def operations(self) -> Terms:  # type: ignore[override]
        """The formula as an operation of groups."""
        return ((1.0, Length(self.per)),)

    def over(self, w: Tensor, groups: Grouping) -> Tensor:
        return Length(groups).total(w)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        groups = grouping(self.per, w.shape)
        return shrink_groups(w, groups, groups.sizes(at_least_float32(w.detach())) ** 0.5, step)


@dataclass(frozen=True)
class GroupLInf(GroupPenalty):
    """Σ_g max |x_g|; how="proximal" makes the largest |x| of a group equal, or the group zero.

    All groups weigh the same, whatever their size. For groups of n entries each, a strength n · c
    compares with c · L1().

    Args:
        per: what one group is; see `GroupLasso`.

    Source: Turlach, Venables and Wright (2005); Duchi and Singer (2009) for the prox.

    >>> w = torch.tensor([[3.0, -4.0, 0.5], [0.1, 0.2, 0.0]])
    >>> rs.GroupLInf(per="row").prox(w, 2.0)
    tensor([[ 2.5000, -2.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000]])
    """

    per: Per = "out"

    keywords = ("group_linf",)

    def over(self, w: Tensor, groups: Grouping) -> Tensor:
        return groups.once(groups.max(groups.view(w).abs())).sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return cut_groups(w, grouping(self.per, w.shape), step)


@dataclass(frozen=True)
class ExclusiveLasso(GroupPenalty):
    """Σ_g (Σ|x_g|)²; entries of a group compete: few of each stay, but no group becomes zero.

    Args:
        per: what one group is; see `GroupLasso`.

    Source: Zhou, Jin and Hoi (2010); Kowalski (2009) for the prox (of half the value, there called
    the elitist lasso).

    >>> rs.ExclusiveLasso(per="row").prox(torch.tensor([[3.0, -4.0, 0.5], [0.1, 0.2, 0.0]]), 0.5)
    tensor([[ 0.6667, -1.6667,  0.0000],
            [ 0.0000,  0.1000,  0.0000]])
    """

    per: Per = "out"

    keywords = ("exclusive_lasso",)

    def over(self, w: Tensor, groups: Grouping) -> Tensor:
        return groups.once(groups.sum(groups.view(w).abs())).square().sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return share_groups(w, grouping(self.per, w.shape), step)
