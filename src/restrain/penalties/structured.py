"""Penalties of structure within a tensor: total variation, sorted L1, sums with a name."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from restrain.axes import Grouped, Per, checked, checked_dim, grouping, grouping_at
from restrain.errors import NoProxError, PenaltyError
from restrain.fields import is_iterable, is_number
from restrain.named_tensors import Location
from restrain.penalties.base import OfRows, Penalty, Tensors, batch_size, checked_strength, unchecked_prox
from restrain.penalties.entrywise import L1
from restrain.penalties.group import GroupLasso
from restrain.penalties.shrink import as_step, at_least_float32, exact, is_zero, one_step, unsigned_zeros
from restrain.rules import How

_EPS = 8 * 2.0**-52  # rounding errors below this, relative to the sums, count as zero


@dataclass
class _Knots:
    """Knots of the taut strings, in one flat array of all sequences."""

    at: Tensor  # True for a knot after the entry; always after the last of a sequence
    side: Tensor  # 1: knot at the tube's upper side; -1: lower; 0: neither, or end


def taut_slopes(y: Tensor, radius: float | Tensor = inf) -> Tensor:
    """Return argmin_x ½‖x - y‖² + radius Σ|x_{i+1} - x_i| per row of y: slopes of taut strings.

    The taut string is the shortest path within `radius` of the running sums of a row. For an
    infinite radius: the nearest nonincreasing sequence, whose string is the least concave majorant
    of the running sums. A row with an entry that isn't finite becomes NaN. Differentiable, also in
    the radius.
    """
    if not y.numel():
        return y.clone()
    bad = ~y.isfinite().all(1, keepdim=True)
    x = torch.where(bad, 0, exact(y))
    one_sided = not isinstance(radius, Tensor) and radius == inf
    with torch.no_grad():
        tube = (0.0, inf) if one_sided else 2 * (float(torch.as_tensor(radius, device="cpu").detach()),)
        knots = _knots(x, *tube)
        starts, ids = _blocks(knots.at)
        lengths = _sums(torch.ones_like(knots.side), ids, starts)
        jumps = knots.side - knots.side.roll(1)
    flat = x.flatten() if one_sided else x.flatten() + radius * jumps
    slopes = (_sums(flat, ids, starts) / lengths)[ids].reshape(y.shape)
    return torch.where(bad, torch.nan, slopes)


def _knots(y: Tensor, below: float, above: float) -> _Knots:
    """Return knots of the taut strings, at most `below` under and `above` over the running sums.

    Between two known knots, the points where the straight line leaves the tube farthest, above and
    below, are knots too: the string must touch the tube there, or it would have an extremum where
    nothing holds it. Each round splits every block at these points, until all lines stay inside the
    tube: as in quickhull, the number of rounds grows like the logarithm of the length.
    """
    knots = _Knots(torch.zeros(y.numel(), dtype=torch.bool, device=y.device), torch.zeros_like(y).flatten())
    knots.at[y.shape[1] - 1 :: y.shape[1]] = True
    entries, values = torch.arange(y.numel(), device=y.device), y.flatten()
    while len(entries):
        over, under, split = _farthest(entries, values, knots, below, above)
        upper, lower = entries[over], entries[under]
        knots.at[upper], knots.side[upper] = True, 1.0
        knots.at[lower], knots.side[lower] = True, -1.0
        entries, values = entries[split], values[split]  # drop settled blocks
    return knots


def _farthest(
    entries: Tensor, values: Tensor, knots: _Knots, below: float, above: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks of entries: farthest over the tube in a block, farthest under, to be split."""
    last = knots.at[entries]
    starts, ids = _blocks(last)
    ends = last.nonzero()[:, 0]
    lengths = (ends - starts + 1).to(values)
    # offset of the string from the running sums at knots; index -1, before entry 0, has side 0
    left, right = below * knots.side[entries[starts] - 1], below * knots.side[entries[ends]]
    rest = values - (_sums(values, ids, starts) / lengths)[ids]
    run = rest.cumsum(0)
    run -= (run[starts] - rest[starts])[ids]
    place = torch.arange(1, len(entries) + 1, device=entries.device) - starts[ids]
    line = left[ids] + ((right - left) / lengths)[ids] * place - run
    tolerance = _EPS * (_sums(values.abs(), ids, starts) + left.abs() + right.abs())
    high, low = torch.where(last, -inf, line), torch.where(last, inf, line)
    top = torch.full_like(lengths, -inf).scatter_reduce(0, ids, high, "amax")
    bottom = torch.full_like(lengths, inf).scatter_reduce(0, ids, low, "amin")
    over, under = top > above + tolerance, bottom < -below - tolerance
    return over[ids] & (high == top[ids]), under[ids] & (low == bottom[ids]), (over | under)[ids]


def _blocks(last: Tensor) -> tuple[Tensor, Tensor]:
    """Return each block's start and each entry's block number, given the mask of last entries."""
    first = last.roll(1)
    first[:1] = True
    return first.nonzero()[:, 0], first.cumsum(0) - 1


def _sums(values: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
    """Return the sum of each block."""
    return values.new_zeros(len(starts)).index_add(0, ids, values)


@dataclass(frozen=True)
class TotalVariation(Penalty):
    """Σ |x_{i+1} - x_i| along one dim, summed over the others: favours piecewise constant lines.

    The prox is exact for every line, by the taut string: neighbours become exactly equal. Complex
    tensors have no prox; their differences count by modulus. On outputs, `dim` is a dim of the
    output, for instance time.

    Args:
        dim: the dim along which neighbours are compared: a number or, for parameters, a name such
            as "in" (see `axes`).

    Raises:
        PenaltyError: a tensor without this dim; the batch axis of an output.
        NoProxError: the prox of a complex tensor.

    Source: Rudin, Osher and Fatemi (1992); Davies and Kovac (2001) for the taut string.

    >>> rs.TotalVariation().prox(torch.tensor([0.0, 0.2, 0.1, 5.0, 5.2]), 0.3)
    tensor([0.2000, 0.2000, 0.2000, 4.9500, 4.9500])
    """

    dim: int | str = -1

    keywords = ("total_variation", "tv")
    soft_after = True

    def __post_init__(self) -> None:
        checked_dim(self.dim)

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
        return unsigned_zeros(z.to(x.dtype).to(w.dtype))

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
        """Return `dim` as a number, for a tensor of the given shape or the parameter `at`.

        Raises:
            PenaltyError: there is no such dim, or the name means no single dim.
        """
        if isinstance(self.dim, int):
            if not -len(shape) <= self.dim < len(shape):
                raise PenaltyError(f"dim={self.dim} needs a tensor with that dim, got one of shape {tuple(shape)}")
            return self.dim % len(shape)
        groups = grouping(self.dim, shape) if at is None else grouping_at(self.dim, at)
        if groups.shape != tuple(shape) or len(groups.own) != 1:
            raise PenaltyError(f"dim={self.dim!r} is no single dim of a tensor of shape {tuple(shape)}: give a number")
        return groups.own[0]


class Named(Penalty, register=False):
    """Base of penalties that are a sum of others under one name."""

    @property
    @abstractmethod
    def parts(self) -> Penalty:
        """The sum that this penalty stands for."""

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        """True if the prox of the sum takes a step for each entry."""
        return self.parts.groupwise

    @property
    def has_prox(self) -> bool:
        return self.parts.has_prox

    def __call__(self, w: Tensors) -> Tensor:
        return self.parts(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self.parts.gradient(w)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return unchecked_prox(self.parts, w, step)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return self.parts.over_batch(h, dim, mask)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        return self.parts.moments(at_places)

    def leaves(self) -> list[tuple[float, Penalty]]:
        return self.parts.leaves()


@dataclass(frozen=True)
class SparseGroupLasso(Grouped, Named):  # type: ignore[override]
    """l1 Σ|x| + group Σ_g √n_g ‖x_g‖₂: whole groups become zero, and entries within the others.

    The same as `l1 * L1() + group * GroupLasso(per)`. Simon and others write strength · ((1 - α)
    Σ_g √n_g ‖x_g‖₂ + α Σ|x|). The prox is a soft threshold, then the prox of the groups.

    Args:
        l1: the strength for entries.
        group: the strength for groups.
        per: the entries that form a group; see `GroupLasso`.

    Raises:
        PenaltyError: a strength that isn't finite, zero or more; a tensor without these groups.

    Source: Simon and others (2013), eq. 3.

    >>> w = torch.tensor([[3.1, 4.1, 0.1], [0.2, 0.4, 0.3]])
    >>> rs.SparseGroupLasso(l1=0.1, group=0.5, per="row").prox(w)
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

    The same as `l1 * L1() + tv * TotalVariation(dim)`. The prox is that of the total variation,
    then a soft threshold.

    Args:
        l1: the strength for entries.
        tv: the strength for differences.
        dim: the dim along which neighbours are compared; see `TotalVariation`.

    Raises:
        PenaltyError: a strength that isn't finite, zero or more; a tensor without this dim.

    Source: Tibshirani and others (2005); Friedman and others (2007), section 4, for the prox.

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


@dataclass(frozen=True)
class SLOPE(OfRows):
    """Σ_i weights_i |x|_(i), |x|_(1) ≥ |x|_(2) ≥ ... the sorted sizes: the sorted L1 norm, or OWL.

    Large entries are penalised more than small ones, and entries of similar size become equal in
    size. Equal weights give `L1`, weights (1, 0, 0, ...) `Norm(inf)`, linearly decreasing weights
    OSCAR. On outputs: the value of each sample, averaged over the batch.

    Args:
        weights: one number per entry of the tensor, zero or more, in nonincreasing order.
        q: instead of weights, the target false discovery rate for orthogonal features: with n
            entries and noise of standard deviation one, weight i is the quantile 1 - i q / (2 n) of
            the normal distribution.

    Raises:
        PenaltyError: both or neither of weights and q; invalid values; a tensor with another number
            of entries.

    Source: Bogdan and others (2015), also for q; Zeng and Figueiredo (2014) for OWL.

    >>> rs.SLOPE(weights=(2.0, 1.0, 0.5)).prox(torch.tensor([3.0, 4.0, -0.2]))
    tensor([2., 2., 0.])
    """

    weights: tuple[float, ...] = ()
    q: float = 0.0

    keywords = ("owl",)
    shrinks = True

    def __post_init__(self) -> None:
        weights = tuple(self.weights) if is_iterable(self.weights) else (self.weights,)
        numbers = [w for w in weights if is_number(w) and w >= 0]
        if len(numbers) < len(weights) or any(b > a for a, b in pairwise(numbers)):
            raise PenaltyError(f"weights= are finite numbers, zero or more, the greatest first; got {self.weights!r}")
        object.__setattr__(self, "weights", tuple([float(w) for w in numbers]))
        given = not is_number(self.q) or self.q != 0
        if given and not (is_number(self.q) and 0 < self.q < 1):
            raise PenaltyError(f"q= is a rate between 0 and 1; got {self.q!r}")
        if given == bool(weights):
            raise PenaltyError("SLOPE takes either weights= or q=, as in SLOPE(q=0.1)")

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        x = at_least_float32(w)
        t = as_step(one_step(step, self), x)
        if is_zero(t):
            return w.clone()
        size, order = exact(x).abs().flatten().sort(descending=True)
        kept = taut_slopes((size - t * self._weights(size))[None])[0].clamp_min(0)
        z: Tensor = exact(x).sgn() * torch.zeros_like(size).scatter(0, order, kept).reshape(w.shape)
        return unsigned_zeros(z.to(x.dtype).to(w.dtype))

    def over_rows(self, rows: Tensor) -> Tensor:
        size = rows.abs().sort(dim=1, descending=True).values
        return (size * self._weights(size)).sum()

    def _weights(self, size: Tensor) -> Tensor:
        """Return the weights for rows of this size, in its dtype and on its device."""
        n = size.shape[-1]
        if self.q:
            ranks = torch.arange(1, n + 1, dtype=torch.float64, device=size.device)
            weights: Tensor = -torch.special.ndtri(ranks * (self.q / (2 * max(n, 1))))
        else:
            if n != len(self.weights):
                raise PenaltyError(f"SLOPE has {len(self.weights)} weights, for a tensor of {n} entries: it needs {n}")
            weights = torch.tensor(self.weights, dtype=torch.float64, device=size.device)
        return weights.to(size)
