"""Projection of parameters on constraints after a step, and of momentum on the tangent space.

Under an optimizer with a step size for each entry, the projection measures distances by these steps
(`in_metric`), or the gradient is projected on the tangent space before the step (`in_tangent`).
Otherwise step and projection would balance at a point that isn't the constrained minimiser.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.engine.distributed import acting, local, total
from restrain.engine.ops import Metric, put
from restrain.engine.step.intersections import APART, Found, nearest
from restrain.errors import HowError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.penalties.shrink import at_least_float32
from restrain.rules import Rule
from restrain.transforms.base import Constraint

_MOMENTA = ("momentum_buffer", "exp_avg")  # averages of gradients in torch's optimizer states

Timed = Sequence[tuple[Rule, Constraint]]


def single(timed: Timed) -> bool:
    """Return True if one projection is all: a single constraint that leaves momentum unchanged."""
    return len(timed) == 1 and timed[0][0].momentum != "tangent"


def in_tangent(rule: Rule, constraint: Constraint, by_metric: bool) -> bool:
    """Return True if gradients are projected on the set's tangent space before the step.

    Args:
        rule: the rule of the constraint.
        constraint: the constraint, bound to a parameter.
        by_metric: True if the optimizer has a step size for each entry.
    """
    if rule.gradient is not None:
        return rule.gradient == "tangent"
    return by_metric and rule.metric == "optimizer" and constraint.by_tangent


def in_metric(rule: Rule, constraint: Constraint, by_metric: bool) -> bool:
    """Return True if the projection after a step is in the metric of the optimizer's steps.

    The arguments are those of `in_tangent`.
    """
    if not by_metric or rule.metric != "optimizer" or constraint.separable or not constraint.has_metric:
        return False
    return not (constraint.by_tangent and in_tangent(rule, constraint, by_metric))


@torch.no_grad()
def hold(name: str, p: Tensor, timed: Timed, state: Mapping[str, Any], metric: Metric | None = None) -> Found | None:
    """Project a parameter after a step, and its momentum on the tangent space if rules ask for it.

    Entries that the step made NaN or infinite don't spread to other entries of their group.

    Args:
        name: the parameter's name.
        p: the parameter.
        timed: (rule, constraint) pairs that are due.
        state: the optimizer's state of the parameter.
        metric: the optimizer's metric, if projections use it.

    Returns:
        The result of `nearest`; None if this process has no part of the parameter.
    """
    tangent = any(rule.momentum == "tangent" for rule, _ in timed)
    kept = [state[key] for key in _MOMENTA if tangent and isinstance(state.get(key), Tensor)]
    kept = [average for average in kept if average.shape == p.shape]
    moments = () if metric is None else metric.moments
    found = None
    for acts, (w, *others), _ in acting([constraint for _, constraint in timed], p, *moments, *kept):
        steps = None if metric is None else metric.steps(*others[: len(moments)])
        by = [in_metric(rule, constraint, metric is not None) for rule, constraint in timed]
        found = nearest(w, acts, steps, by)
        put(w, found.point)
        if found.apart > APART:
            warnings.warn(_no_common_point(name, timed), RestrainWarning, stacklevel=level_of_caller())
        for average in others[len(moments) :]:
            for (rule, _), constraint in zip(timed, acts, strict=True):
                if rule.momentum == "tangent":
                    put(average, -constraint.tangent(w, -average))  # the step is -average
    return found


@torch.no_grad()
def hold_from_now(works: Sequence[tuple[Tensor, str, Timed]]) -> dict[str, list[str]]:
    """Project parameters when rules are attached, and return notes for the table by rule label.

    Rules that start at a later step aren't applied.

    Raises:
        HowError: constraints on a parameter have no common point, or a parameter isn't finite.
    """
    for p, name, project in works:
        if project and p.requires_grad and not bool(p.isfinite().all()):
            raise HowError(f"{name!r}, which {project[0][1]!r} is to hold for, has NaN or infinite entries")
    moved: dict[str, list[tuple[float, str]]] = {}
    notes: dict[str, list[str]] = {}
    for p, name, project in works:
        timed = [(rule, constraint) for rule, constraint in project if rule.start == 0]
        if not timed or not p.requires_grad:
            continue
        before, way, sure = _moved(p, name, timed)
        for rule, _ in timed:
            moved.setdefault(rule.label, []).append((way / before if before else way and float("inf"), name))
            if not sure:
                notes.setdefault(rule.label, []).append(not_nearest(name, timed))
    for label, ways in moved.items():
        ways = sorted((way for way in ways if way[0] > 1e-5), reverse=True)
        if ways:
            most = f"most {ways[0][1]!r}, by {100 * ways[0][0]:.2g} % of its length"
            text = f"{label}: attaching moved {len(ways)} of {len(moved[label])} tensors, {most}"
            notes.setdefault(label, []).insert(0, text)
    return notes


def _moved(p: Tensor, name: str, timed: Timed) -> tuple[float, float, bool]:
    """Project a parameter, and return (length before, distance moved, True if surely nearest)."""
    old, found = at_least_float32(local(p)).clone(), None
    for acts, (w,), _ in acting([constraint for _, constraint in timed], p):
        found = nearest(w, acts)
        if found.apart <= APART:
            w.copy_(found.point)
    new = at_least_float32(local(p))
    squares = [float((old.abs() ** 2).sum()), float(((old - new).abs() ** 2).sum())]
    flags = [float(found is not None and found.apart > APART), float(found is not None and not found.sure)]
    before, way, apart, unsure = total([*squares, *flags], p)
    if apart:
        raise HowError(_no_common_point(name, timed))
    return math.sqrt(before), math.sqrt(way), not unsure


def not_nearest(name: str, timed: Timed) -> str:
    """Return the note for a point of several convex sets that may not be the nearest point."""
    return (
        f"{name!r} is in {', '.join(repr(constraint) for _, constraint in timed)}, but perhaps not at the "
        "nearest point of them: their projections converge too slowly"
    )


def _no_common_point(name: str, timed: Timed) -> str:
    return (
        f"no value of {name!r} satisfies these together, as far as could be found: "
        f"{', '.join(repr(constraint) for _, constraint in timed)}. Leave one out, or let the sets overlap"
    )
