"""Projections in a diagonal metric: argmin over a set of Σ |z - x|² / t, with a step t for each entry.

Optimizers such as Adam move each entry by a step of its own. A point where such a step and a
projection balance is the constrained minimiser only if the projection measures distances by the
same steps, as for a prox. Each projection is one equation in one unknown a group, solved by Newton's
iteration from the side on which it is monotone, in float64. Convex sets without such an equation
(balls of singular values, a user's set) are projected on by an iteration of their own projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restrain.axes import Grouping
from restrain.penalties.shrink import exact
from restrain.transforms.iteration import Projection, length, split

_LEAST = 1e-12  # a step relative to the greatest of its group; of an entry that no step has moved yet it is zero
_NEAR = 1e-6  # of an iteration: a change relative to the way from the set
_ROUNDS = 100  # no random group with steps spread over 20 decades needed more than 30


def relative(t: Tensor, groups: Grouping) -> Tensor:
    """Return the steps of each group divided by the greatest, at least `_LEAST`; ones where all are zero.

    The projection depends on the ratios of the steps within a group only.
    """
    most = groups.max(t)
    return torch.where(most > 0, t / torch.where(most > 0, most, 1), 1).clamp_min(_LEAST)


def weights_of(t: Tensor) -> Tensor:
    """Return one over the steps, relative to the greatest step; in float64."""
    return 1 / relative(exact(t), Grouping(tuple(t.shape), ()))


def by_iteration(w: Tensor, t: Tensor, project: Projection) -> Tensor:
    """Return the point of a convex set that is nearest in the metric of the steps, by its Euclidean projection.

    It takes some ten to thirty projections, the more the steps differ.
    """
    x = exact(w)
    begin = project(x)
    if not bool(x.isfinite().all()) or not bool((begin != x).any()):
        return begin.to(w.dtype)
    near = _NEAR * float(length(x - begin) / length(x))
    return split(x, [project], begin, near, _ROUNDS, weights_of(t))[0].to(w.dtype)


def fit_lengths(x: Tensor, t: Tensor, groups: Grouping, target: Tensor) -> Tensor:
    """Return the vectors of lengths `target` nearest to the groups of `x`, in the metric of the steps `t`.

    z = x / (1 + λ t), where λ > -1 / max t solves ‖x / (1 + λ t)‖ = target. One over that norm is concave
    and grows with λ; hence Newton's iteration for it, once below the root, stays below and converges
    quadratically (Moré and Sorensen 1983). No single entry may be longer than `target`, which gives a λ below.

    Args:
        x: the groups in the viewed shape; zero ones stay zero.
        t: their steps, likewise.
        groups: the groups.
        target: the length of each group, above zero, with reduced dims of size one.
    """
    x, t, target = exact(x), relative(exact(t), groups), exact(target)
    peak = groups.max(x.abs())
    unit = torch.where(peak == 0, 1, peak)
    x, target = x / unit, torch.where(peak == 0, 1, target / unit)
    size = x.abs()
    at = groups.max(((size / target - 1) / t + 1).clamp_min(_LEAST)) - 1
    for _ in range(_ROUNDS):
        left = size / (1 + at * t)
        square = groups.sum(left.square())
        slope = groups.sum(left.square() * (t / (1 + at * t)))
        at = at + ((square.sqrt() / target - 1) * square / torch.where(slope > 0, slope, 1)).clamp_min(0)
        if bool((square.sqrt() <= target * (1 + 8 * torch.finfo(x.dtype).eps)).all()):
            break
    z = x / (1 + at * t)
    length = groups.sum(z.square()).sqrt()
    return z * (target / torch.where(length > 0, length, 1)) * unit


def cut_to_sum(x: Tensor, t: Tensor, total: float) -> Tensor:
    """Return max(x - θ t, 0) of each row, with the θ for which the row adds up to `total`.

    That is the nearest point of the simplex in the metric of the steps `t`. The sum is convex and falls with θ, so that
    Newton's iteration from a θ below the root grows to it in a finite number of steps (Michelot 1986).
    """
    t = relative(t, Grouping(tuple(t.shape), (0,)))
    on = torch.ones_like(x, dtype=torch.bool)
    for _ in range(_ROUNDS):
        level = (torch.where(on, x, 0).sum(-1, keepdim=True) - total) / torch.where(on, t, 0).sum(-1, keepdim=True)
        fewer = on & (x > level * t)
        if bool((fewer == on).all()):
            break
        on = torch.where(fewer.any(-1, keepdim=True), fewer, on)
    z = (x - level * t).clamp_min(0)
    return z * (total / z.sum(-1, keepdim=True))  # a factor of one, but for rounding


def symmetric(x: Tensor, t: Tensor) -> Tensor:
    """Return the symmetric matrix nearest to a square one in the metric of the steps `t`.

    An entry and its mirror image become their mean, each weighted by the step of the other.
    """
    both = t + t.mT
    share = torch.where(both > 0, t / torch.where(both > 0, both, 1), 0.5)
    return torch.where(x == x.mT, x, x * share.mT + x.mT * share)
