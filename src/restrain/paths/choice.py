"""The choice of a point by its scores: points near the best one, and the simplest of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from restrain.errors import PlanError


def within_one_error(scores: Tensor) -> Tensor:
    """Return the mask of the points within one standard error of a best one.

    A point is if the mean of the paired differences d = best - point is at most sd(d) / √n, over n
    samples or folds.

    Args:
        scores: the scores of each point (points, samples), higher is better.

    Raises:
        PlanError: there is one sample, of which no error is known.

    Source: Breiman and others (1984), section 3.4.3, there without pairs.
    """
    samples = scores.shape[1]
    if samples < 2:
        raise PlanError(f"a standard error is of two scores or more a point (samples or folds); got {samples}")
    means, near = scores.mean(1), torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for best in (means == means.max()).nonzero()[:, 0]:
        differences = scores[best] - scores
        near |= differences.mean(1) <= differences.std(1) / math.sqrt(samples)
    return near


def simplicity(selected: float, strength: float) -> tuple[float, float]:
    """Return the key that sorts points: the fewest groups first, then the greatest strength."""
    return selected, -strength
