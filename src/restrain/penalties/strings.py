"""Taut strings: the shortest line through a tube around the running sums of a sequence.

The slopes of that line are the prox of the total variation (tube: running sums ± step) and, with a tube that is open
above, the nearest nonincreasing sequence (isotonic regression). Only torch's vector operations are used, on all
sequences at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from restrain.penalties.shrink import exact

_EPS = 8 * 2.0**-52  # rounding errors that count as none, relative to the sums


@dataclass
class _Knots:
    """Where strings bend, in an array of all sequences one after the other."""

    at: Tensor  # whether there is a knot behind an entry; the last entry of each sequence has one
    side: Tensor  # 1 at the upper side of the tube, -1 at the lower one, 0 elsewhere and at the end of a sequence


def taut_slopes(y: Tensor, radius: float | Tensor = inf) -> Tensor:
    """The slopes of the taut strings of the rows of y, within `radius` of their running sums.

    They are argmin_x ½‖x - y‖² + radius Σ|x_{i+1} - x_i|. For an infinite radius: the nearest nonincreasing
    sequence, whose string is the least concave majorant of the running sums. A row with an entry that isn't finite
    becomes NaN. Differentiable, also in the radius.
    """
    if not y.numel():
        return y.clone()
    bad = ~y.isfinite().all(1, keepdim=True)
    x = torch.where(bad, 0, exact(y))
    one_sided = not isinstance(radius, Tensor) and radius == inf
    with torch.no_grad():
        tube = (0.0, inf) if one_sided else 2 * (float(torch.as_tensor(radius).detach()),)
        knots = _knots(x, *tube)
        starts, ids = _blocks(knots.at)
        lengths = _sums(torch.ones_like(knots.side), ids, starts)
        jumps = knots.side - knots.side.roll(1)
    flat = x.flatten() if one_sided else x.flatten() + radius * jumps
    slopes = (_sums(flat, ids, starts) / lengths)[ids].reshape(y.shape)
    return torch.where(bad, torch.nan, slopes)


def _knots(y: Tensor, below: float, above: float) -> _Knots:
    """The knots of the strings through the tubes from `below` under the running sums to `above` over them.

    Of a line between two known knots, the points farthest outside of the tube, above and below, are knots too: the
    string must touch the tube there, or it would have an extremum in free air. So each round splits every block at
    these points, until all lines stay inside: as in quickhull, a number of rounds like the logarithm of the length.
    """
    knots = _Knots(torch.zeros(y.numel(), dtype=torch.bool, device=y.device), torch.zeros_like(y).flatten())
    knots.at[y.shape[1] - 1 :: y.shape[1]] = True
    entries, values = torch.arange(y.numel(), device=y.device), y.flatten()
    while len(entries):
        over, under, split = _farthest(entries, values, knots, below, above)
        upper, lower = entries[over], entries[under]
        knots.at[upper], knots.side[upper] = True, 1.0
        knots.at[lower], knots.side[lower] = True, -1.0
        entries, values = entries[split], values[split]  # settled blocks are done with
    return knots


def _farthest(
    entries: Tensor, values: Tensor, knots: _Knots, below: float, above: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are farthest over and under the tube in their block, and which are in a block with such."""
    last = knots.at[entries]
    starts, ids = _blocks(last)
    ends = last.nonzero()[:, 0]
    lengths = (ends - starts + 1).to(values)
    # where the string passes, relative to the running sums: at knots known (before entry 0 the index is -1, of a 0)
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
    """Where blocks start, and of each entry the number of its block, from which entries are the last of one."""
    first = last.roll(1)
    first[:1] = True
    return first.nonzero()[:, 0], first.cumsum(0) - 1


def _sums(values: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
    """Sums over blocks."""
    return values.new_zeros(len(starts)).index_add(0, ids, values)
