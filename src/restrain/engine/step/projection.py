"""Constraints on a parameter: one by its projection, several together; the optimizer's momentum within the set.

Several convex sets: Dykstra's algorithm, which gives the nearest point that is in all of them, whatever their order.
Otherwise the projections take turns until none moves anything: a point of all sets, not always the nearest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.engine.distributed import acting, local, total
from restrain.engine.ops import put
from restrain.errors import HowError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.penalties.shrink import at_least_float32
from restrain.rules import Rule
from restrain.transforms.base import Constraint, slack

_ROUNDS = 200
_APART = 1e-3  # a relative distance of two sets that isn't rounding or slow convergence
_MOMENTA = ("momentum_buffer", "exp_avg")  # running averages of gradients, in the states of torch's optimizers

Timed = Sequence[tuple[Rule, Constraint]]


def nearest(w: Tensor, constraints: Sequence[Constraint]) -> tuple[Tensor, float]:
    """A point that satisfies all constraints, and how far from one of them it is, relative to its length.

    That is zero where all are satisfied. Sets that are cones come first: then the projections of a cone and of a ball
    around zero, each done once, give the nearest point already.
    """
    if len(constraints) == 1:
        return constraints[0].project(w), 0.0
    ordered = sorted(constraints, key=lambda constraint: not constraint.cone)
    x = at_least_float32(w.detach())
    by_turns = _dykstra if all(constraint.convex for constraint in constraints) else _in_turn
    found, apart = by_turns(x, ordered)
    return found.to(w.dtype), apart


def _dykstra(w: Tensor, constraints: Sequence[Constraint]) -> tuple[Tensor, float]:
    """Boyle and Dykstra (1986); ended as Birgin and Raydan (2005) say, when the corrections stand still."""
    x, corrections = w, [torch.zeros_like(w) for _ in constraints]
    for _ in range(_ROUNDS):
        change = torch.zeros((), device=w.device)
        for i, constraint in enumerate(constraints):
            shifted = x + corrections[i]
            x = constraint.project(shifted)
            change = change + _length(shifted - x - corrections[i]).square()
            corrections[i] = shifted - x
        if float(change.sqrt()) <= slack(w) * float(torch.maximum(_length(w), _length(x))):
            return x, 0.0
    return x, _apart(x, constraints)


def _in_turn(w: Tensor, constraints: Sequence[Constraint]) -> tuple[Tensor, float]:
    x = w
    for _ in range(_ROUNDS):
        moved, begin = torch.zeros((), device=w.device), x
        for constraint in constraints:
            before, x = x, constraint.project(x)
            moved = torch.maximum(moved, _length(x - before))
        limit = slack(w) * float(_length(x))
        if float(moved) <= limit:
            return x, 0.0
        if float(_length(x - begin)) <= limit:  # they go round in a circle
            break
    return x, _apart(x, constraints)


def _apart(x: Tensor, constraints: Sequence[Constraint]) -> float:
    worst = max(float(_length(constraint.project(x) - x)) for constraint in constraints)
    return worst / (float(_length(x)) or 1.0)


def _length(x: Tensor) -> Tensor:
    return x.abs().square().sum().sqrt()


def single(timed: Timed) -> bool:
    """Whether it is one constraint that leaves the momentum alone: then its projection is all that is done."""
    return len(timed) == 1 and timed[0][0].momentum != "tangent"


@torch.no_grad()
def hold(name: str, p: Tensor, timed: Timed, state: Mapping[str, Any]) -> None:
    """After a step: project a parameter, and take out of its momentum what leaves the sets of rules that say so.

    Entries that the step made NaN or infinite don't spread to others of their group.
    """
    tangent = any(rule.momentum == "tangent" for rule, _ in timed)
    kept = [state[key] for key in _MOMENTA if tangent and isinstance(state.get(key), Tensor)]
    kept = [average for average in kept if average.shape == p.shape]
    for acts, (w, *averages), _ in acting([constraint for _, constraint in timed], p, *kept):
        found, apart = nearest(w, acts)
        put(w, found)
        if apart > _APART:
            warnings.warn(_no_common_point(name, timed), RestrainWarning, stacklevel=level_of_caller())
        for average in averages:
            for (rule, _), constraint in zip(timed, acts, strict=True):
                if rule.momentum == "tangent":
                    put(average, -constraint.tangent(w, -average))  # a step goes against the average


@torch.no_grad()
def hold_from_now(works: Sequence[tuple[Tensor, str, Timed]]) -> dict[str, list[str]]:
    """Project parameters when rules are attached, but for rules that start later; {rule: what to say in the table}.

    Raises:
        HowError: constraints on one parameter without a common point, or one that isn't finite.
    """
    for p, name, project in works:
        if project and p.requires_grad and not bool(p.isfinite().all()):
            raise HowError(f"{name!r}, which {project[0][1]!r} is to hold for, has NaN or infinite entries")
    moved: dict[str, list[tuple[float, str]]] = {}
    for p, name, project in works:
        timed = [(rule, constraint) for rule, constraint in project if rule.start == 0]
        if not timed or not p.requires_grad:
            continue
        before, way = _moved(p, name, timed)
        for rule, _ in timed:
            moved.setdefault(rule.label, []).append((way / before if before else way and float("inf"), name))
    notes = {}
    for label, ways in moved.items():
        ways = sorted((way for way in ways if way[0] > 1e-5), reverse=True)
        if ways:
            most = f"most {ways[0][1]!r}, by {100 * ways[0][0]:.2g} % of its length"
            notes[label] = [f"{label}: attaching moved {len(ways)} of {len(moved[label])} tensors, {most}"]
    return notes


def _moved(p: Tensor, name: str, timed: Timed) -> tuple[float, float]:
    """Project a parameter; its length before, and how far it was moved."""
    old, worst = at_least_float32(local(p)).clone(), 0.0
    for acts, (w,), _ in acting([constraint for _, constraint in timed], p):
        found, worst = nearest(w, acts)
        if worst <= _APART:
            w.copy_(found)
    new = at_least_float32(local(p))
    squares = [float(_length(old)) ** 2, float(_length(old - new)) ** 2, float(worst > _APART)]
    before, way, apart = (math.sqrt(square) for square in total(squares, p))
    if apart:
        raise HowError(_no_common_point(name, timed))
    return before, way


def _no_common_point(name: str, timed: Timed) -> str:
    return (
        f"no value of {name!r} satisfies these together, as far as could be found: "
        f"{', '.join(repr(constraint) for _, constraint in timed)}. Leave one out, or let the sets overlap"
    )
