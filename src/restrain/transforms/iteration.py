"""Projections by iteration: fixed points, extrapolated; the nearest point of convex sets in any diagonal metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PLAIN = 3  # rounds before the first extrapolation: a cone and a ball around zero need two
_MEMORY, _LARGE = 8, 1 << 20  # rounds that are remembered; of tensors with more entries fewer are

Projection = Callable[[Tensor], Tensor]
Turn = Callable[[Tensor], tuple[Tensor, Tensor, float]]


def fixed_point(turn: Turn, state: Tensor, tolerance: float, rounds: int) -> tuple[Tensor, float]:
    """Return the point of the last round, and its change, at most `tolerance` unless rounds ran out.

    Rounds are extrapolated from the last few (Anderson 1965); an extrapolation that isn't nearer to
    a fixed point is taken back (Zhang, O'Donoghue and Boyd 2020).

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
    """Return argmin Σ weight |x - w|² over convex sets, and the change of the last round.

    Douglas and Rachford's splitting, with a copy v_i of the point for each set. A round is
    v_i += x - P_i(v_i), where x minimises ½ Σ weight |x - w|² + ρ/2 Σ‖x - 2 P_i(v_i) + v_i‖². The point
    returned is in the last set; how far it may be from the others is the change. ρ is the mean of the
    weights times the ratio of the way to the length of the point.

    Args:
        w: where to start.
        projections: of the sets, in the Euclidean sense.
        begin: a point near the solution.
        tolerance: the change that counts as none, relative to the lengths of w and x.
        rounds: the greatest number of rounds.
        weights: of each entry, above zero.
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
    """Return the Euclidean length of a tensor."""
    return x.abs().square().sum().sqrt()


def ratio(change: Tensor, whole: Tensor) -> float:
    """Return the length of a change divided by a length; the length of the change where that is zero."""
    return float(length(change)) / (float(whole) or 1.0)
