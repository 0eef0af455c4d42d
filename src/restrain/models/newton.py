"""Newton's method for linear problems under elastic nets and group lassos, also together.

A proximal gradient step says which entries aren't zero. There loss + penalty is smooth, and a step
with its Hessian follows, shortened until the objective falls; entries and groups that would cross
zero stop there. Near the minimum the zeros are right and the steps are Newton's. The proximal steps
alone already lower the objective, so the method converges from anywhere (Bareilles, Iutzeler and
Malick 2023, "Newton acceleration on manifolds identified by proximal gradient methods").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from restrain.models.objectives import Form, Loss, OnSupport

_ROUNDS, _HALVINGS = 100, 40
_LARGEST = 3000  # entries of a Hessian
_FEW = 30  # entries that may join the support at once, or as many as are in it
_ROUNDING = 1e-13  # of the objective, by which it may rise


def minimised(loss: Loss, form: Form, w: Any, b: Any, tolerance: float) -> tuple[Any, Any] | None:
    """Return the (weights, intercepts) that minimise loss + penalty; None if that takes too long.

    Args:
        loss: the loss.
        form: the penalty.
        w, b: where to begin: flat weights, intercepts.
        tolerance: of the proximal map, max |w - prox(w - t ∇)| / t, and of the intercepts' slope.
    """
    t = 1 / max(loss.bound + 2 * form.l2, 1e-300)
    for _ in range(_ROUNDS):
        slope, of_intercepts = loss.gradient(w, b)
        moved = form.prox(w - t * (slope + 2 * form.l2 * w), t)
        if max(np.abs(w - moved).max(initial=0) / t, np.abs(of_intercepts).max(initial=0)) <= tolerance:
            return w, b
        support = np.flatnonzero(_kept(form, w, moved) | form.free)
        if len(support) > _LARGEST:
            return None
        found = _step(loss.on(support), form.on(support), moved[support], b)
        if found is None:
            return None
        w = np.zeros_like(w)
        w[support], b = found
    return None


def _kept(form: Form, w: Any, moved: Any) -> Any:
    """Return the mask of entries that aren't zero; of those that join, only the longest ones."""
    on, was = moved != 0, w != 0
    new, sizes = np.flatnonzero(on & ~was), form.sizes(moved)
    most = max(_FEW, int(np.count_nonzero(was)))
    if len(new) <= most:
        return on
    return on & (was | (sizes >= np.partition(sizes[new], -most)[-most]))


def _step(loss: OnSupport, form: Form, v: Any, b: Any) -> tuple[Any, Any] | None:
    """Return where a Newton step on the support leads; None if its matrix is singular."""
    slope = loss.slope(v, b)
    slope[: len(v)] += form.slope(v)
    step = loss.solved(v, b, form.bend(v), slope)
    if step is None:
        return None
    value = loss.value(v, b) + form.value(v)
    for halving in range(_HALVINGS):
        share = 0.5**halving
        u, c = form.stopped(v - share * step[: len(v)], v), b - share * step[len(v) :]
        if loss.value(u, c) + form.value(u) <= value + _ROUNDING * abs(value):
            return u, c
    return v, b
