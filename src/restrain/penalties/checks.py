"""Checks of what penalties are given."""

from __future__ import annotations

from math import inf, isfinite
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


def checked_setting(name: str, number: float, low: float, high: float = inf, *, closed: bool = False) -> None:
    """Refuse a setting that isn't a finite number above `low` (or that, if `closed`) and below `high`.

    Raises:
        PenaltyError: so it is.
    """
    inside = isinstance(number, Real) and not isinstance(number, bool) and isfinite(number)
    if not inside or not (low < number < high or (closed and number == low)):
        least = f" {'from' if closed else 'above'} {low:g}" if isfinite(low) else ""
        most = f"{' and' if least else ''} below {high:g}" if isfinite(high) else ""
        raise PenaltyError(f"{name}= is a finite number{least}{most}; got {number!r}")


def batch_size(h: Tensor, dim: int) -> int:
    """The length of the batch axis of `h`.

    Raises:
        PenaltyError: `h` has no such axis.
    """
    if not -h.dim() <= dim < h.dim():
        raise PenaltyError(f"an output of shape {tuple(h.shape)} has no batch axis {dim}: say which by batch_dim=")
    return h.shape[dim]


def checked_axis(name: str, axis: Any) -> int | None:
    """An axis, or None for the usual one.

    Raises:
        PenaltyError: it is something else.
    """
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
        raise PenaltyError(f"{name}= is an axis of the output, such as 1 or -1; got {axis!r}")
    return axis
