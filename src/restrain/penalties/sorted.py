"""Sorted penalties, whose weights go by rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from restrain.errors import PenaltyError
from restrain.fields import is_number
from restrain.penalties.rows import OfRows
from restrain.penalties.shrink import as_step, at_least_float32, exact, is_zero, one_step
from restrain.penalties.strings import taut_slopes


@dataclass(frozen=True)
class SLOPE(OfRows):
    """Σ_i weights_i |x|_(i), where |x|_(1) ≥ |x|_(2) ≥ ... are the sorted sizes: the sorted L1 norm, or OWL.

    Large entries are penalised more than small ones, and entries of like size become equal in size. Equal weights give
    `L1`, (1, 0, 0, ...) gives `Norm(inf)`, linear ones OSCAR. On outputs it is the value of each sample, averaged.

    Args:
        weights: one for each entry of the tensor, none above the one before, zero or more.
        q: instead of weights, the rate of false discoveries that they control for orthogonal features: with n entries
            and noise of deviation one, weight i is the quantile 1 - i q / (2 n) of the normal distribution.

    Raises:
        PenaltyError: neither of the two or both, or what they can't be; a tensor with another number of entries.

    Source: Bogdan and others (2015), also for q; Zeng and Figueiredo (2014) for OWL.

    >>> rs.SLOPE(weights=(2.0, 1.0, 0.5)).prox(torch.tensor([3.0, 4.0, -0.2]))
    tensor([2., 2., 0.])
    """

    weights: tuple[float, ...] = ()
    q: float = 0.0

    keywords = ("owl",)
    shrinks = True

    def __post_init__(self) -> None:
        weights = tuple(self.weights) if isinstance(self.weights, Iterable) else (self.weights,)
        numbers = [w for w in weights if is_number(w) and w >= 0]
        if len(numbers) < len(weights) or any(b > a for a, b in pairwise(numbers)):
            raise PenaltyError(f"weights= are finite numbers, zero or more, the greatest first; got {self.weights!r}")
        object.__setattr__(self, "weights", tuple([float(w) for w in numbers]))
        given = self.q != 0
        if given and not (is_number(self.q) and 0 < self.q < 1):
            raise PenaltyError(f"q= is a rate between 0 and 1; got {self.q!r}")
        if given == bool(weights):
            raise PenaltyError("SLOPE takes either weights= or q=, as in SLOPE(q=0.1)")

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        x = at_least_float32(w)
        t = as_step(one_step(step, self), x)
        if is_zero(t):
            return w.clone()
        size, order = exact(x).abs().flatten().sort(descending=True)
        kept = taut_slopes((size - t * self._weights(size))[None])[0].clamp_min(0)
        z: Tensor = exact(x).sgn() * torch.zeros_like(size).scatter(0, order, kept).reshape(w.shape)
        return z.to(x.dtype).to(w.dtype) + 0.0  # -0.0 becomes +0.0

    def over_rows(self, rows: Tensor) -> Tensor:
        size = rows.abs().sort(dim=1, descending=True).values
        return (size * self._weights(size)).sum()

    def _weights(self, size: Tensor) -> Tensor:
        """The weights of a row, as precise as it is and where it is."""
        n = size.shape[-1]
        if self.q:
            ranks = torch.arange(1, n + 1, dtype=torch.float64)
            weights: Tensor = -torch.special.ndtri(ranks * (self.q / (2 * max(n, 1))))
        else:
            if n != len(self.weights):
                raise PenaltyError(f"SLOPE has {len(self.weights)} weights, for a tensor of {n} entries: it needs {n}")
            weights = torch.tensor(self.weights, dtype=torch.float64)
        return weights.to(size)
