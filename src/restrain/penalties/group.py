"""Penalties of lengths: of a tensor as a whole, or of groups of its entries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import inf, isnan, prod, sqrt
from numbers import Real

import torch
from torch import Tensor

from restrain.axes import Grouping, Per, checked, group_norms, group_size, grouping, grouping_at
from restrain.errors import NoProxError, PenaltyError
from restrain.penalties.base import Penalty, Tensors, in_float32
from restrain.penalties.checks import batch_size
from restrain.penalties.shrink import at_least_float32, one_step, shrink_entries, shrink_groups, shrink_peak
from restrain.rules import How
from restrain.sites import Location


@dataclass(frozen=True)
class Norm(Penalty):
    """(Σ|x|^p)^(1/p), the norm itself (not a power of it) of a whole tensor; for p = inf the largest |x|.

    Its prox is known for p = 1, 2 and inf: by it the tensor becomes zero as a whole (p = 2), or its largest
    entries become equal (p = inf). On outputs it is the norm of each sample, averaged.

    Raises:
        PenaltyError: p below one, which is no norm.

    Source of the proxes: Parikh and Boyd (2014), section 6.5.

    >>> rs.Norm(2)(torch.tensor([3.0, -4.0])), rs.Norm(float("inf"))(torch.tensor([3.0, -4.0]))
    (tensor(5.), tensor(4.))
    """

    p: float

    shrinks = True
    takes_mask = True

    def __post_init__(self) -> None:
        if not isinstance(self.p, Real) or isinstance(self.p, bool) or isnan(self.p) or self.p < 1:
            raise PenaltyError(f"Norm(p) needs a number p of one or more, or inf; got {self.p!r}")

    @property
    def elastic(self) -> tuple[float, float] | None:  # type: ignore[override]
        """That of `L1` for p = 1."""
        return (1.0, 0.0) if self.p == 1 else None

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        """Whether its prox takes a step for each entry: for p = 1 and 2."""
        return self.p in (1, 2)

    @property
    def has_prox(self) -> bool:
        return self.p in (1, 2, inf)

    def __call__(self, w: Tensors) -> Tensor:
        return _norms(w.reshape(1, -1), self.p).sum()

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        h = h if mask is None else self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        samples = h.movedim(dim, 0).reshape(size, prod(h.shape) // max(size, 1))
        return in_float32(lambda x: _norms(x, self.p).sum() / max(size, 1), samples)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        if self.p == 1:
            return shrink_entries(w, step, 1.0, 0.0)
        if self.p == 2:
            return shrink_groups(w, Grouping((w.numel(),), ()), 1.0, step)
        if self.p == inf:
            return shrink_peak(w, one_step(step, self))
        raise NoProxError(f"{self!r} has no known prox; Norm(1), Norm(2) and Norm(inf) have one")


def _norms(rows: Tensor, p: float) -> Tensor:
    """The norm of each row, with a zero gradient at zero."""
    if p == 1 or not rows.numel():
        return rows.abs().sum(1)
    if p == 2:
        return group_norms(rows, Grouping(tuple(rows.shape), (0,)))
    size = rows.abs()
    peak = size.amax(1, keepdim=True)
    if p == inf:
        return peak
    unit = torch.where(peak == 0, 1, peak).detach()  # so that powers neither overflow nor vanish
    powers = (size / unit).pow(p).sum(1, keepdim=True)
    zero = powers == 0
    return torch.where(zero, 0.0, unit * torch.where(zero, 1.0, powers).pow(1 / p))


@dataclass(frozen=True)
class GroupLasso(Penalty):
    """Σ_g √n_g ‖x_g‖₂ over groups g of n_g entries: with how="proximal", whole groups become exactly zero.

    On outputs, `per` is a dim of the layer's output: the groups are of each sample, and the values are
    averaged. A group whose squares sum to zero counts as zero, and so has the gradient zero.

    Args:
        per: what one group is, by the meaning of the axis or as a dim (see `axes`): "out" groups the weights
        into a
            unit or filter, "in" those out of an input or channel, "head" those of a head of
            nn.MultiheadAttention.

    Raises:
        PenaltyError: a tensor that has no such axis.

    Source: Yuan and Lin (2006), eq. 2.1 with K = n_g I, and eq. 2.4 for the prox.

    >>> w = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    >>> (0.5 * rs.GroupLasso(per="row")).prox(w)
    tensor([[2.5757, 3.4343],
            [0.0000, 0.0000]])
    """

    per: Per = "out"

    keywords = ("group_lasso",)
    groupwise = True
    shrinks = True

    def __post_init__(self) -> None:
        checked(self.per)

    def __call__(self, w: Tensors) -> Tensor:
        groups = grouping(self.per, w.shape)
        return sqrt(group_size(groups)) * group_norms(w, groups).sum()

    def gradient(self, w: Tensor) -> Tensor:
        groups = grouping(self.per, w.shape)
        x = groups.view(at_least_float32(w.detach()))
        norms = group_norms(x, groups)
        zero = norms == 0
        unit = torch.where(zero, 0, x / torch.where(zero, 1, norms))
        return (sqrt(group_size(groups)) * unit).reshape(w.shape).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        groups = grouping(self.per, w.shape)
        return shrink_groups(w, groups, sqrt(group_size(groups)), step)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        self.moments(at_places=True)
        h = h if mask is None else self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        batch, (unit,) = dim % h.dim(), grouping(self.per, h.shape).keep
        groups = Grouping(tuple(h.shape), tuple(sorted({batch, unit})))
        weight = sqrt(group_size(groups)) / max(size, 1)
        return in_float32(lambda x: weight * group_norms(x, groups).sum(), h)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places and not isinstance(self.per, int):
            raise PenaltyError(
                f"on outputs, per= is a dim of the output, not {self.per!r}: write for instance per=1 for "
                "the channels "
                "of (batch, channel, height, width)"
            )
        return Penalty.moments(self, at_places)

    def bound_to(self, at: Location) -> GroupLasso:
        return dataclasses.replace(self, per=grouping_at(self.per, at))
