"""Nearest point in the intersection of several sets, by their projections P_i.

For convex sets there are two fixed-point iterations, whose fixed points are the solution.

* Dykstra's has a correction y_i for each set; the point is x = w - Σ y_i. A round updates each
  y_i = r - P_i(r) with r = w - Σ_{j≠i} y_j, so that y_i is normal to the set i at x (Boyle and
  Dykstra 1986). It is fast if few sets are active, and may stall if w is far from small sets
  (Bauschke and others 2020).
* Douglas and Rachford's (`split`) doesn't stall, and needs only the Euclidean projections for any
  diagonal metric.

Both converge slowly if sets meet at a small angle, and are extrapolated (`fixed_point`). They end
when a round changes no more than 1e-12 of the length (1e-9 for float32 and narrower).

Projections on other sets alternate until none of them moves the point.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from restrain.penalties.shrink import exact
from restrain.transforms.base import Constraint, slack
from restrain.transforms.iteration import Projection, fixed_point, length, ratio, split
from restrain.transforms.metric import weights_of

_ROUNDS, _DYKSTRA, _SPLIT = 200, 30, 1000  # most rounds of alternation, and of the two iterations
_SURE = 1e-6  # a relative change in the last round below which the point counts as the nearest
APART = 1e-3  # a relative distance of two sets above rounding and slow convergence


@dataclass(frozen=True)
class Found:
    """Result of a search for a point in several sets."""

    point: Tensor
    apart: float = 0.0  # the distance to the farthest set, relative to the point's length
    sure: bool = True  # False if the sets are convex, and the point may not be the nearest


def nearest(
    w: Tensor, constraints: Sequence[Constraint], steps: float | Tensor | None = None, by: Sequence[bool] = ()
) -> Found:
    """Return a point that satisfies all constraints; the nearest point if all are convex.

    Separable constraints (bounds, masks) hold exactly. Cones are projected on first: one projection
    on a cone, then one on a ball around zero, already give the nearest point of both.

    Args:
        w: the point to project.
        constraints: the sets.
        steps: the optimizer's steps, if distances are measured by them.
        by: for each constraint, True if its projection is in the metric of the steps.
    """
    by = by or [False] * len(constraints)
    if len(constraints) == 1:
        return Found(_projection(constraints[0], by[0], steps)(w))
    ordered = sorted(zip(constraints, by, strict=True), key=lambda way: not way[0].cone)
    x, wide = exact(w.detach()), exact(steps) if isinstance(steps, Tensor) else steps
    projections = [_projection(*way, wide) for way in ordered]
    if not bool(x.isfinite().all()):  # no iteration converges then
        return Found(functools.reduce(lambda at, project: project(at), projections, x).to(w.dtype))
    if all(constraint.convex for constraint in constraints):
        found = _nearest_of_convex(x, ordered, _tolerance(w), wide if any(by) else None)
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


def _tolerance(w: Tensor) -> float:
    """Return the relative change in a round below which an iteration has converged."""
    return 1e-12 if w.dtype.itemsize >= 8 and w.dtype != torch.complex64 else 1e-9


def _nearest_of_convex(
    w: Tensor, ordered: Sequence[tuple[Constraint, bool]], tolerance: float, steps: float | Tensor | None
) -> Found:
    """Return the nearest point of convex sets, in the metric of the steps if there are any."""
    every = [constraint for constraint, _ in ordered]
    plain = _joined(every, None)
    own = plain if steps is None else _joined(every, steps)
    for project in own:  # if a set lies within the others, one projection suffices
        x = project(w)
        if _apart(x, plain) <= tolerance:
            return _checked(Found(x), every)
    left = float("inf")
    if steps is None or all(constraint.has_formula for constraint in every):
        zeros = w.new_zeros((len(own), *w.shape))
        x, left = fixed_point(lambda state: _dykstra(w, state, own), zeros, tolerance, _DYKSTRA)
    if left > tolerance:
        weights = weights_of(steps) if isinstance(steps, Tensor) and steps.dim() else 1.0
        x, left = split(w, plain, x, tolerance, _SPLIT, weights)
    found = Found(x) if left <= tolerance else Found(x, _apart(x, plain), left <= _SURE)
    return _checked(found, every)


def _checked(found: Found, constraints: Sequence[Constraint]) -> Found:
    """Return a result with its distance from separable sets, if these have no common point."""
    apart = _apart(found.point, [constraint.project for constraint in constraints if constraint.separable])
    return replace(found, apart=apart) if apart > APART else found


def _joined(constraints: Sequence[Constraint], steps: float | Tensor | None) -> list[Projection]:
    """Return the projections, with separable sets joined to one.

    Clamping to one interval after the other is the projection on their intersection.
    """
    separable = [constraint.project for constraint in constraints if constraint.separable]
    others = [_projection(one, steps is not None, steps) for one in constraints if not one.separable]
    if not separable:
        return others
    return [lambda x: functools.reduce(lambda at, project: project(at), separable, x), *others]


def _dykstra(w: Tensor, state: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, Tensor, float]:
    """Run a round of Dykstra's from corrections `state`; return (new state, point, change)."""
    new, x = state.clone(), w - state.sum(0)
    for i, project in enumerate(projections):
        shifted = x + new[i]
        x = project(shifted)
        new[i] = shifted - x
    return new, x, ratio(new - state, torch.maximum(length(w), length(x)))


def _in_turn(w: Tensor, projections: Sequence[Projection], tolerance: float) -> Found:
    """Return a point of sets that needn't be convex, by alternating projections."""
    x = w
    for _ in range(_ROUNDS):
        moved, begin = torch.zeros((), device=w.device), x
        for project in projections:
            before, x = x, project(x)
            moved = torch.maximum(moved, length(x - before))
        limit = max(tolerance, slack(w)) * float(length(x))
        if float(moved) <= limit:
            return Found(x)
        if float(length(x - begin)) <= limit:  # the projections cycle
            break
    return Found(x, _apart(x, projections))


def _apart(x: Tensor, projections: Sequence[Projection]) -> float:
    return max([ratio(project(x) - x, length(x)) for project in projections], default=0.0)
