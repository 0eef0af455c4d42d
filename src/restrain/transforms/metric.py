"""Projections in a diagonal metric: argmin over a set of Σ |z - x|² / t, a step t for each entry.

Optimizers such as Adam have a step size for each entry. A point where the optimizer's step and the
projection balance is the constrained minimiser only if the projection measures distances by the
same step sizes, as a prox does. Each projection solves an equation with one unknown for each
group, in float64, by Newton's iteration from the side on which it is monotone. For convex sets
without an equation of this kind (balls of singular values, a user's set), `by_iteration` repeats
the Euclidean projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restrain.axes import Grouping
from restrain.penalties.shrink import exact
from restrain.transforms.iteration import Projection, length, split

_LEAST = 1e-12  # least step relative to the greatest of its group; of unmoved entries it is zero
_NEAR = 1e-6  # tolerance of an iteration: a change relative to the distance from the set
_ROUNDS = 100  # no random group with steps spread over 20 decades needed more than 30


def relative(t: Tensor, groups: Grouping) -> Tensor:
    """Return steps divided by the greatest of their group, at least `_LEAST`; ones if all are zero.

    The projection only depends on the ratios of the steps within a group.
    """
    most = groups.max(t)
    return torch.where(most > 0, t / torch.where(most > 0, most, 1), 1).clamp_min(_LEAST)


def weights_of(t: Tensor) -> Tensor:
    """Return 1 / t in float64, with steps t relative to the greatest step."""
    return 1 / relative(exact(t), Grouping(tuple(t.shape), ()))


def by_iteration(w: Tensor, t: Tensor, project: Projection) -> Tensor:
    """Return the point of a convex set that is nearest in the metric of the steps `t`.

    It takes ten to thirty Euclidean projections `project`, more if the steps differ more.
    """
    x = exact(w)
    begin = project(x)
    if not bool(x.isfinite().all()) or not bool((begin != x).any()):
        return begin.to(w.dtype)
    near = _NEAR * float(length(x - begin) / length(x))
    return split(x, [project], begin, near, _ROUNDS, weights_of(t))[0].to(w.dtype)


def fit_lengths(x: Tensor, t: Tensor, groups: Grouping, target: Tensor) -> Tensor:
    """Return the vectors of lengths `target` nearest to the groups of `x`, in the metric of `t`.

    z = x / (1 + λ t), where λ > -1 / max t solves ‖x / (1 + λ t)‖ = target. The inverse of the norm
    is concave and grows with λ, so Newton's iteration for it stays below the root once it is below,
    and converges quadratically (Moré and Sorensen 1983). It starts at the least λ for which no
    single entry is longer than `target`, which is below the root.

    Args:
        x: the entries in the viewed shape; zero groups stay zero.
        t: the step of each entry, in the viewed shape.
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
    """Return max(x - θ t, 0) of each row, with θ such that the row adds up to `total`.

    The result is the nearest point of the simplex in the metric of the steps `t`. The sum is convex
    and falls with θ, so Newton's iteration from a θ below the root grows to it in a finite number
    of steps (Michelot 1986).
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
    return z * (total / z.sum(-1, keepdim=True))  # corrects rounding


def symmetric(x: Tensor, t: Tensor) -> Tensor:
    """Return the symmetric matrix nearest to a square matrix in the metric of the steps `t`.

    An entry and its mirror image become their mean, each weighted by the step of the other.
    """
    both = t + t.mT
    share = torch.where(both > 0, t / torch.where(both > 0, both, 1), 0.5)
    return torch.where(x == x.mT, x, x * share.mT + x.mT * share)
