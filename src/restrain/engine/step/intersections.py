"""The nearest point of several sets, by their projections P_i.

Convex sets: two fixed-point iterations, whose fixed points are the solution.

* Dykstra's: corrections y_i, which sum up to the way from the point x to the start w. A round gives
  each set its turn: y_i = r - P_i(r) with r = w - Σ_{j≠i} y_j. So y_i is normal to the set i at x
  (Boyle and Dykstra 1986). It is quick where few sets cut the way, and may stall where w is far
  from small sets (Bauschke and others 2020).
* Douglas and Rachford's: a copy v_i of the point for each set. A round is v_i += x - P_i(v_i), where
  x minimises ½‖x - w‖² + ρ/2 Σ‖x - 2 P_i(v_i) + v_i‖². With ρ the ratio of the way to the length of
  the point it doesn't stall.

Both converge slowly where sets meet at a small angle. So rounds are extrapolated from the last few
(Anderson 1965); an extrapolation that isn't nearer to a fixed point is taken back (Zhang,
O'Donoghue and Boyd 2020). A round that changes nothing, to 1e-12 of the length (1e-9 for float32
and less), ends the iteration.

Other sets: their projections take turns until none moves anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from restrain.penalties.shrink import exact
from restrain.transforms.base import Constraint, slack

_ROUNDS, _DYKSTRA, _SPLITTING = 200, 30, 1000  # of turns, and of the two iterations
_PLAIN = 3  # rounds before the first extrapolation: a cone and a ball around zero need two
_MEMORY, _LARGE = 8, 1 << 20  # rounds that are remembered; of tensors with more entries fewer are
_SURE = 1e-6  # a relative change in the last round below which the nearest point is as good as found
APART = 1e-3  # a relative distance of two sets that isn't rounding or slow convergence

Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """A point of several sets."""

    point: Tensor
    apart: float = 0.0  # the distance to the set that is farthest, relative to the length
    sure: bool = True  # False if the sets are convex, and the point may not be the nearest one


def nearest(
    w: Tensor, constraints: Sequence[Constraint], steps: float | Tensor | None = None, by: Sequence[bool] = ()
) -> Found:
    """Return a point that satisfies all constraints; the nearest one if all are convex.

    Separable constraints (bounds, masks) hold exactly. Sets that are cones come first: then the
    projections of a cone and of a ball around zero, each done once, give the nearest point already.

    Args:
        w: where to start.
        constraints: the sets.
        steps: the optimizer's steps, where distances are measured by them.
        by: of each constraint, whether its projection is in the metric of the steps.
    """
    ways = list(zip(constraints, by or [False] * len(constraints), strict=True))
    if len(constraints) == 1:
        return Found(_projection(*ways[0], steps)(w))
    convex = all(constraint.convex for constraint in constraints)
    if convex and not all(own or constraint.separable for constraint, own in ways):
        ways = [(constraint, False) for constraint in constraints]  # one metric for all
    ways.sort(key=lambda way: not way[0].cone)
    x = exact(w.detach())
    wide = exact(steps) if isinstance(steps, Tensor) else steps
    projections = [_projection(*way, wide) for way in ways]
    if not bool(x.isfinite().all()):  # nothing converges then
        for project in projections:
            x = project(x)
        return Found(x.to(w.dtype))
    if convex:
        found = _nearest_of_convex(x, _joined(ways, projections), _tolerance(w))
        apart = _apart(found.point, projections)  # of intervals without a common point only one holds
        found = replace(found, apart=apart) if apart > APART else found
    else:
        found = _in_turn(x, projections, _tolerance(w))
    point = found.point.to(w.dtype)
    for constraint in constraints:
        point = constraint.project(point) if constraint.separable else point
    return Found(point, found.apart, found.sure)


def _projection(constraint: Constraint, by_steps: bool, steps: float | Tensor | None) -> Projection:
    if by_steps and steps is not None:
        return lambda x: constraint.project_by(x, steps)
    return constraint.project


def _joined(ways: Sequence[tuple[Constraint, bool]], projections: Sequence[Projection]) -> list[Projection]:
    """Return the projections with those on separable sets as one: intervals can be cut to one after the other."""
    separable = [project for (constraint, _), project in zip(ways, projections, strict=True) if constraint.separable]
    others = [project for (constraint, _), project in zip(ways, projections, strict=True) if not constraint.separable]
    if not separable:
        return others

    def cut(x: Tensor) -> Tensor:
        for project in separable:
            x = project(x)
        return x

    return [cut, *others]


def _tolerance(w: Tensor) -> float:
    """Return the relative change in a round that counts as none."""
    return 1e-12 if w.dtype.itemsize >= 8 and w.dtype != torch.complex64 else 1e-9


def _nearest_of_convex(w: Tensor, projections: Sequence[Projection], tolerance: float) -> Found:
    """Return the nearest point of convex sets."""
    for project in projections:  # where one set lies in the others, rounds would need long to find out
        x = project(w)
        if _apart(x, projections) <= tolerance:
            return Found(x)
    zeros = w.new_zeros((len(projections), *w.shape))
    x, left = _fixed_point(lambda state: _dykstra(w, state, projections), zeros, tolerance, _DYKSTRA)
    if left > tolerance:
        rate = min(max(float(_length(w - x)) / (float(_length(x)) or 1.0), 0.1), 1e4)
        begin = torch.stack([x] * len(projections))
        x, left = _fixed_point(lambda state: _splitting(w, state, projections, rate), begin, tolerance, _SPLITTING)
    return Found(x) if left <= tolerance else Found(x, _apart(x, projections), left <= _SURE)


def _fixed_point(
    turn: Callable[[Tensor], tuple[Tensor, Tensor, float]], state: Tensor, tolerance: float, rounds: int
) -> tuple[Tensor, float]:
    """Return the point of the last round, and its change, which is at most `tolerance` unless rounds ran out.

    Args:
        turn: a round: gives the new state, the point there, and how far both are from standing still.
        state: where to begin.
        tolerance: the change that counts as none.
        rounds: the greatest number of rounds.
    """
    history: list[tuple[Tensor, Tensor]] = []  # (change, result) of rounds
    best, left = None, float("inf")
    for count in range(rounds):
        result, x, size = turn(state)
        if size <= tolerance:
            return x, size
        if best is not None and size > 2 * left:  # the extrapolation was none
            state, history, best = best, [], None
            continue
        best, left = result, size
        history = [*history, (result - state, result)][-(_MEMORY if x.numel() < _LARGE else 3) :]
        state = result if count < _PLAIN else _extrapolated(history)
    return x, size


def _dykstra(w: Tensor, state: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, Tensor, float]:
    """Give each set its turn, from the corrections `state`."""
    new, x = state.clone(), w - state.sum(0)
    for i, project in enumerate(projections):
        shifted = x + new[i]
        x = project(shifted)
        new[i] = shifted - x
    return new, x, _ratio(new - state, torch.maximum(_length(w), _length(x)))


def _splitting(
    w: Tensor, state: Tensor, projections: Sequence[Projection], rate: float
) -> tuple[Tensor, Tensor, float]:
    """Give all sets their turn at once, and take the point that is best for all (Douglas and Rachford)."""
    inside = torch.stack([project(one) for project, one in zip(projections, state, strict=True)])
    x = (w + rate * (2 * inside - state).sum(0)) / (1 + rate * len(projections))
    size = max(rate, 1) * _ratio(x - inside, torch.maximum(_length(w), _length(x)))
    return state + x - inside, inside[-1], size


def _extrapolated(history: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the combination of the results of rounds whose combined change is least."""
    change, result = history[-1]
    if len(history) < 2:
        return result
    changes = torch.stack([change - old for old, _ in history[:-1]]).flatten(1)
    results = torch.stack([result - old for _, old in history[:-1]])
    gram = changes.conj() @ changes.mT
    gram.diagonal().add_(1e-14 * gram.diagonal().real.sum() + torch.finfo(gram.real.dtype).tiny)
    weights = torch.linalg.solve(gram, changes.conj() @ change.flatten())
    return result - torch.tensordot(weights, results, 1)


def _in_turn(w: Tensor, projections: Sequence[Projection], tolerance: float) -> Found:
    """Return a point of sets of any kind."""
    x = w
    for _ in range(_ROUNDS):
        moved, begin = torch.zeros((), device=w.device), x
        for project in projections:
            before, x = x, project(x)
            moved = torch.maximum(moved, _length(x - before))
        limit = max(tolerance, slack(w)) * float(_length(x))
        if float(moved) <= limit:
            return Found(x)
        if float(_length(x - begin)) <= limit:  # they go round in a circle
            break
    return Found(x, _apart(x, projections))


def _apart(x: Tensor, projections: Sequence[Projection]) -> float:
    return max(_ratio(project(x) - x, _length(x)) for project in projections)


def _ratio(change: Tensor, length: Tensor) -> float:
    return float(_length(change)) / (float(length) or 1.0)


def _length(x: Tensor) -> Tensor:
    return x.abs().square().sum().sqrt()
