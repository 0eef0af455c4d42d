"""Penalties of structure within a tensor: of neighbours, and sums that go by a name of their own."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from restrain.axes import Per, checked, grouping, grouping_at
from restrain.errors import NoProxError, PenaltyError
from restrain.penalties.base import Penalty, Tensors
from restrain.penalties.checks import batch_size, checked_strength
from restrain.penalties.entrywise import L1
from restrain.penalties.group import GroupLasso
from restrain.penalties.shrink import as_step, at_least_float32, is_zero, one_step
from restrain.penalties.strings import taut_slopes
from restrain.rules import How
from restrain.sites import Location


@dataclass(frozen=True)
class TotalVariation(Penalty):
    """Σ |x_{i+1} - x_i| along one dim, summed over all lines in that dim: it favours piecewise constant lines.

    The prox is exact for every line, by the taut string: neighbours become exactly equal. There is none for complex
    tensors, whose differences count by their modulus. On outputs, for instance along time, `dim` is a dim of the
    output.

    Args:
        dim: the dim along which neighbours are compared, or the axis by its meaning, such as "in" (see `axes`).

    Raises:
        PenaltyError: a tensor that has no such dim.

    Source: Rudin, Osher and Fatemi (1992); Davies and Kovac (2001) for the taut string.

    >>> rs.TotalVariation().prox(torch.tensor([0.0, 0.2, 0.1, 5.0, 5.2]), 0.3)
    tensor([0.2000, 0.2000, 0.2000, 4.9500, 4.9500])
    """

    dim: int | str = -1

    keywords = ("total_variation", "tv")
    soft_after = True

    def __post_init__(self) -> None:
        if not isinstance(checked(self.dim), int | str):
            raise PenaltyError(f"dim= is a dim such as 0, or an axis by name such as 'in'; got {self.dim!r}")

    def __call__(self, w: Tensors) -> Tensor:
        dim = self.dim_of(w.shape)
        count = max(w.shape[dim] - 1, 0)
        differences: Tensor = w.narrow(dim, w.shape[dim] - count, count) - w.narrow(dim, 0, count)
        return differences.abs().sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        if w.is_complex():
            raise NoProxError(f"{self!r} has no known prox for complex tensors: use how='loss' or how='gradient'")
        x, dim = at_least_float32(w), self.dim_of(w.shape)
        t = as_step(one_step(step, self), x)
        if is_zero(t):
            return w.clone()
        lines = x.movedim(dim, -1)
        slopes = taut_slopes(lines.flatten(0, -2) if w.dim() > 1 else lines[None], t)
        z: Tensor = slopes.reshape(lines.shape).movedim(-1, dim)
        return z.to(x.dtype).to(w.dtype) + 0.0  # -0.0 becomes +0.0

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        self.moments(at_places=True)
        if dim is not None and batch_size(h, dim) and self.dim_of(h.shape) == dim % h.dim():
            raise PenaltyError(
                f"{self!r} is along the batch axis of an output of shape {tuple(h.shape)}, whose samples are no "
                "neighbours: give another dim=, such as 1 for time in (batch, time, features)"
            )
        return Penalty.over_batch(self, h, dim, mask)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places and isinstance(self.dim, str):
            raise PenaltyError(f"on outputs, dim= is a dim of the output, not {self.dim!r}: write for instance dim=1")
        return Penalty.moments(self, at_places)

    def bound_to(self, at: Location) -> Penalty:
        return dataclasses.replace(self, dim=self.dim_of(at.tensor.shape, at))

    def dim_of(self, shape: tuple[int, ...], at: Location | None = None) -> int:
        """The dim that `dim` means for a tensor of that shape, of a model's parameter or of none."""
        if isinstance(self.dim, int):
            if not -len(shape) <= self.dim < len(shape):
                raise PenaltyError(f"dim={self.dim} needs a tensor with that dim, got one of shape {tuple(shape)}")
            return self.dim % len(shape)
        groups = grouping(self.dim, shape) if at is None else grouping_at(self.dim, at)
        if groups.shape != tuple(shape) or len(groups.keep) != 1:
            raise PenaltyError(f"dim={self.dim!r} is no single dim of a tensor of shape {tuple(shape)}: give a number")
        return groups.keep[0]


class Named(Penalty, register=False):
    """Base of penalties that are a sum of others, under one name."""

    @property
    @abstractmethod
    def parts(self) -> Penalty:
        """The sum."""

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        """Whether that of the sum takes a step for each entry."""
        return self.parts.groupwise

    @property
    def has_prox(self) -> bool:
        return self.parts.has_prox

    def __call__(self, w: Tensors) -> Tensor:
        return self.parts(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self.parts.gradient(w)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return self.parts.prox(w, step)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return self.parts.over_batch(h, dim, mask)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        return self.parts.moments(at_places)

    def leaves(self) -> list[tuple[float, Penalty]]:
        return self.parts.leaves()


@dataclass(frozen=True)
class SparseGroupLasso(Named):
    """l1 Σ|x| + group Σ_g √n_g ‖x_g‖₂: whole groups become zero, and entries within the others.

    The same as `l1 * L1() + group * GroupLasso(per)`. Simon and others write strength · ((1 - α) Σ_g √n_g ‖x_g‖₂ +
    α Σ|x|).

    Args:
        l1: the strength for entries.
        group: the strength for groups.
        per: what one group is; see `GroupLasso`.

    Raises:
        PenaltyError: a strength that isn't a finite number, zero or more; a tensor that has no such groups.

    Source: Simon and others (2013), eq. 3; the prox is a soft threshold, then that of the groups.

    >>> rs.SparseGroupLasso(l1=0.1, group=0.5, per="row").prox(torch.tensor([[3.1, 4.1, 0.1], [0.2, 0.4, 0.3]]))
    tensor([[2.4804, 3.3072, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """

    l1: float
    group: float
    per: Per = "out"

    keywords = ("sparse_group_lasso",)
    shrinks = True

    def __post_init__(self) -> None:
        checked_strength(self.l1)
        checked_strength(self.group)
        object.__setattr__(self, "per", checked(self.per))

    @property
    def parts(self) -> Penalty:
        return self.l1 * L1() + self.group * GroupLasso(self.per)

    def bound_to(self, at: Location) -> Penalty:
        return dataclasses.replace(self, per=grouping_at(self.per, at))


@dataclass(frozen=True)
class FusedLasso(Named):
    """l1 Σ|x| + tv Σ |x_{i+1} - x_i| along one dim: neighbours become equal, and most of them zero.

    The same as `l1 * L1() + tv * TotalVariation(dim)`.

    Args:
        l1: the strength for entries.
        tv: the strength for differences.
        dim: the dim along which neighbours are compared; see `TotalVariation`.

    Raises:
        PenaltyError: a strength that isn't a finite number, zero or more; a tensor that has no such dim.

    Source: Tibshirani and others (2005); Friedman and others (2007), section 4, for the prox: that of the total
    variation, then a soft threshold.

    >>> rs.FusedLasso(l1=0.5, tv=0.3).prox(torch.tensor([0.0, 0.2, 0.1, 5.0, 5.2]))
    tensor([0.0000, 0.0000, 0.0000, 4.4500, 4.4500])
    """

    l1: float
    tv: float
    dim: int | str = -1

    keywords = ("fused_lasso",)

    def __post_init__(self) -> None:
        checked_strength(self.l1)
        checked_strength(self.tv)
        TotalVariation(self.dim)

    @property
    def parts(self) -> Penalty:
        return self.l1 * L1() + self.tv * TotalVariation(self.dim)

    def bound_to(self, at: Location) -> Penalty:
        return dataclasses.replace(self, dim=TotalVariation(self.dim).dim_of(at.tensor.shape, at))
