"""Iterative projections: extrapolated fixed points; nearest points in an intersection of sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PLAIN = 3  # rounds before the first extrapolation: a cone and a ball around zero need two
_MEMORY, _LARGE = 8, 1 << 20  # rounds remembered, by tensors of fewer entries than `_LARGE`

Projection = Callable[[Tensor], Tensor]
Turn = Callable[[Tensor], tuple[Tensor, Tensor, float]]


def fixed_point(turn: Turn, state: Tensor, tolerance: float, rounds: int) -> tuple[Tensor, float]:
    """Iterate `turn` to a fixed point, and return (point, change) of the last round.

    The change is at most `tolerance`, unless rounds ran out. The next state is extrapolated from
    the last few rounds (Anderson 1965); an extrapolation that isn't nearer to a fixed point is
    undone (Zhang, O'Donoghue and Boyd 2020).

    Args:
        turn: one round, from a state to (new state, its point, size of the change).
        state: the initial state.
        tolerance: the change below which the iteration has converged.
        rounds: the greatest number of rounds.
    """
    history: list[tuple[Tensor, Tensor]] = []  # (change, result) of rounds
    best, left = None, float("inf")
    for count in range(rounds):
        result, x, size = turn(state)
        if size <= tolerance:
            return x, size
        if best is not None and size > 2 * left:  # the extrapolation led away
            state, history, best = best, [], None
            continue
        best, left = result, size
        history = [*history, (result - state, result)][-(_MEMORY if x.numel() < _LARGE else 3) :]
        state = result if count < _PLAIN else _extrapolated(history)
    return x, size


def _extrapolated(history: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the affine combination of past results whose combined change is least."""
    change, result = history[-1]
    if len(history) < 2:
        return result
    changes = torch.stack([change - old for old, _ in history[:-1]]).flatten(1)
    results = torch.stack([result - old for _, old in history[:-1]])
    gram = changes.conj() @ changes.mT
    gram.diagonal().add_(1e-14 * gram.diagonal().real.sum() + torch.finfo(gram.real.dtype).tiny)
    weights = torch.linalg.solve(gram, changes.conj() @ change.flatten())
    combined: Tensor = result - torch.tensordot(weights, results, 1)
    return combined


def split(
    w: Tensor,
    projections: Sequence[Projection],
    begin: Tensor,
    tolerance: float,
    rounds: int,
    weights: Tensor | float = 1.0,
) -> tuple[Tensor, float]:
    """Return argmin Σ weight |x - w|² over an intersection of convex sets, and the last change.

    Douglas and Rachford's splitting, with a copy v_i of the point for each set. A round is
    v_i += x - P_i(v_i), where x minimises ½ Σ weight |x - w|² + ρ/2 Σ‖x - 2 P_i(v_i) + v_i‖². The
    result is in the last set; the change says how far it may be from the other sets. ρ is the
    geometric mean of the weights times ‖w - begin‖ / ‖begin‖, within limits.

    Args:
        w: the point to project.
        projections: the Euclidean projection on each set.
        begin: a point near the solution.
        tolerance: the change, relative to the lengths of w and x, below which it has converged.
        rounds: the greatest number of rounds.
        weights: the weight of each entry, above zero.
    """
    mean = float(weights.log().mean().exp()) if isinstance(weights, Tensor) else weights
    far = max(float(length(w - begin)) / (float(length(begin)) or 1.0), 0.1)
    rate = mean * min(far, 1e4)

    def turn(state: Tensor) -> tuple[Tensor, Tensor, float]:
        inside = torch.stack([project(one) for project, one in zip(projections, state, strict=True)])
        x = (weights * w + rate * (2 * inside - state).sum(0)) / (weights + rate * len(projections))
        size = max(rate / mean, 1) * ratio(x - inside, torch.maximum(length(w), length(x)))
        return state + x - inside, inside[-1], size

    return fixed_point(turn, torch.stack([begin] * len(projections)), tolerance, rounds)


def length(x: Tensor) -> Tensor:
    """Return the Euclidean norm of all entries of a tensor."""
    return x.abs().square().sum().sqrt()


def ratio(change: Tensor, whole: Tensor) -> float:
    """Return ‖change‖ / whole, or ‖change‖ if `whole` is zero."""
    return float(length(change)) / (float(whole) or 1.0)
