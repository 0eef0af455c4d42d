"""Stability selection: what is selected on most halves of the data, and how much of it is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restrain.errors import PlanError
from restrain.extras import needing
from restrain.fields import brief, is_number, is_whole


@dataclass(frozen=True, eq=False)
class Stability:
    """How often each feature was selected on halves of the data; made by `stability_selection`.

    Args:
        frequencies: the part of the 2 · pairs halves on which a feature was selected (strengths,
            features).
        mean_selected: q, the mean number of features that a half selected at any strength.
        pairs: the number of pairs of halves.
        threshold: the frequency from which a feature is stable, above 1/2.
    """

    frequencies: Tensor
    mean_selected: float
    pairs: int
    threshold: float

    @property
    def greatest(self) -> Tensor:
        """The greatest frequency of each feature over the strengths."""
        return self.frequencies.amax(0)

    @property
    def stable(self) -> Tensor:
        """The indices of features whose greatest frequency is at least the threshold."""
        return (self.greatest >= self.threshold - 1e-12).nonzero()[:, 0]

    @property
    def bound(self) -> float:
        """q² / ((2 threshold - 1) p): most stable features to expect that a half rarely selects.

        Rarely: with a probability of at most q / p, for p features, as by chance. It holds for any
        way of selecting.

        Source: Shah and Samworth (2013), theorem 1; Meinshausen and Bühlmann (2010), theorem 1.
        """
        return self.mean_selected**2 / ((2 * self.threshold - 1) * self.frequencies.shape[1])

    @property
    def unimodal_bound(self) -> float:
        """A smaller bound, if the parts of pairs that select a feature twice have one mode.

        C q² / p with C = 1 / (2 (2π - 1 - 1/2B)) up to a threshold π of 3/4, and
        4 (1 - π + 1/2B) / (1 + 1/B) above, for B pairs; inf where the theorem says nothing.

        Source: Shah and Samworth (2013), theorem 2.
        """
        p, at, half = self.frequencies.shape[1], self.threshold, 1 / (2 * self.pairs)
        rate = self.mean_selected / p
        if rate > 1 / math.sqrt(3) or at <= 0.5 + min(rate**2, half + 0.75 * rate**2):
            return math.inf
        factor = 4 * (1 - at + half) / (1 + 2 * half) if at > 0.75 else 1 / (2 * (2 * at - 1 - half))
        return factor * rate**2 * p


def stability_selection(
    select: Callable[[Any], Any],
    samples: int,
    *,
    pairs: int = 50,
    threshold: float = 0.75,
    random_state: int | None = None,
    n_jobs: int | None = None,
) -> Stability:
    """Select on both halves of the samples, for many random pairs of halves, and count.

    Halves have ⌊samples / 2⌋ rows, and those of a pair have none in common. They are drawn here, so
    that processes don't matter.

    Args:
        select: `select(rows)` fits on these rows (a NumPy array of indices) and returns which
            features it selects: a mask (features,), or one for each strength (strengths, features).
        samples: the number of samples.
        pairs: the number of pairs.
        threshold: the frequency from which a feature is stable, above 1/2 and at most 1.
        random_state: the seed; None draws one from torch's generator.
        n_jobs: processes, or None for what `joblib.parallel_config` says.

    Raises:
        PlanError: invalid settings, or `select` returns something else than masks of one shape.

    Source: Meinshausen and Bühlmann (2010); in complementary pairs: Shah and Samworth (2013).

    >>> found = stability_selection(lambda rows: torch.tensor([True, 0 in rows]), 10, pairs=5)
    >>> found.frequencies, found.stable, found.mean_selected
    (tensor([[1.0000, 0.5000]], dtype=torch.float64), tensor([0]), 1.5)
    """
    _check(samples, pairs, threshold, random_state)
    with needing("models", "stability selection"):
        from joblib import Parallel, delayed

    seed = int(torch.randint(2**31, (), device="cpu")) if random_state is None else random_state
    draw, half = torch.Generator(device="cpu").manual_seed(seed), samples // 2
    orders = [torch.randperm(samples, generator=draw, device="cpu").numpy() for _ in range(pairs)]
    halves = [rows for order in orders for rows in (order[:half], order[half : 2 * half])]
    masks = [_mask(found) for found in Parallel(n_jobs=n_jobs)([delayed(select)(rows) for rows in halves])]
    shapes = sorted({tuple(mask.shape) for mask in masks})
    if len(shapes) > 1:
        raise PlanError(f"select(rows) returns masks of one shape, whatever the rows; got the shapes {shapes}")
    found = torch.stack(masks)
    return Stability(found.double().mean(0), float(found.any(1).sum(1).double().mean()), pairs, float(threshold))


def _mask(given: Any) -> Tensor:
    """Return a mask (strengths, features) of what `select` gave.

    Raises:
        PlanError: it isn't a mask.
    """
    try:
        found = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros((), device="cpu")
    if found.dtype != torch.bool or found.dim() not in (1, 2) or not found.numel():
        raise PlanError(
            "select(rows) returns a mask, True for selected features, (features,) or (strengths, features), as in "
            f"coef != 0; got {type(given).__name__} {brief(given)}"
        )
    return found.reshape(-1, found.shape[-1])


def _check(samples: Any, pairs: Any, threshold: Any, seed: Any) -> None:
    if not is_whole(samples, 2):
        raise PlanError(f"samples is the number of samples, at least 2; got {brief(samples)}")
    if not is_whole(pairs, 1):
        raise PlanError(f"pairs= is a whole number, at least 1; got {brief(pairs)}")
    if not is_number(threshold) or not 0.5 < threshold <= 1:
        raise PlanError(f"threshold= is above 0.5 and at most 1; got {brief(threshold)}")
    if seed is not None and not is_whole(seed, 0):
        raise PlanError(f"random_state= is a whole number or None; got {brief(seed)}")
