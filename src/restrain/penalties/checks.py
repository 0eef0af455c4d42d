"""Checks of what penalties are given."""

from __future__ import annotations

from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor

from restrain.errors import PenaltyError


def checked_strength(strength: Any) -> float:
    """A strength as a float.

    Raises:
        PenaltyError: it isn't a finite real number, zero or more.
    """
    number = float(strength) if isinstance(strength, Real) and not isinstance(strength, bool) else -1.0
    if not (number >= 0 and isfinite(number)):
        raise PenaltyError(f"a strength is a finite number, zero or more; got {strength!r}")
    return number


def checked_setting(name: str, number: float, low: float, high: float) -> None:
    """Refuse a setting that isn't a finite number between `low` and `high`, both excluded.

    Raises:
        PenaltyError: so it is.
    """
    if not isinstance(number, Real) or isinstance(number, bool) or not (isfinite(number) and low < number < high):
        between = f"between {low:g} and {high:g}" if isfinite(high) else f"above {low:g}" if isfinite(low) else ""
        raise PenaltyError(f"{name}= is a finite number{' ' * bool(between)}{between}; got {number!r}")


def batch_size(h: Tensor, dim: int) -> int:
    """The length of the batch axis of `h`.

    Raises:
        PenaltyError: `h` has no such axis.
    """
    if not -h.dim() <= dim < h.dim():
        raise PenaltyError(f"an output of shape {tuple(h.shape)} has no batch axis {dim}: say which by batch_dim=")
    return h.shape[dim]
