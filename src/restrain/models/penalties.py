"""Penalties of the keyword models on changes over time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from restrain.penalties import Penalty
from restrain.penalties.base import Tensors


@dataclass(frozen=True)
class RecurrentState(Penalty, register=False):
    """Mean over batch and transitions of ‖hₜ₊₁ - hₜ‖², h of shape (batch, time, units); zero for a single step.

    Args:
        per_unit: the mean over units too, as theanets computes it.

    Source: Krueger and Memisevic (2015), where it is the alternative to the norm stabiliser.
    """

    per_unit: bool = False

    def __call__(self, w: Tensors) -> Tensor:
        """The mean for one sequence, of shape (time, units), or the sum of those of several."""
        change: Tensor = w.diff(dim=-2).square().sum() / max(w.shape[-2] - 1, 1)
        return change / w.shape[-1] if self.per_unit else change


@dataclass(frozen=True)
class RecurrentNorm(Penalty, register=False):
    """Mean over batch and transitions of (‖hₜ₊₁‖² - ‖hₜ‖²)², h of shape (batch, time, units).

    Source: Krueger and Memisevic (2015), eq. 1, with squared lengths, which are smooth at zero.
    """

    def __call__(self, w: Tensors) -> Tensor:
        """The mean for one sequence, of shape (time, units), or the sum of those of several."""
        lengths: Tensor = w.square().sum(-1)
        value: Tensor = lengths.diff(dim=-1).square().sum() / max(w.shape[-2] - 1, 1)
        return value
