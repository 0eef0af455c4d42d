"""Checks of what penalties are given."""

from __future__ import annotations

from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from restrain.errors import PenaltyError
from restrain.fields import is_number, is_whole
from restrain.schedule import Strength, checked_number


def checked_strength(strength: Any) -> float:
    """A strength as a float.

    Raises:
        PenaltyError: it isn't a finite real number, zero or more.
    """
    if isinstance(strength, Strength):
        raise PenaltyError(
            f"{strength!r} moves, so it multiplies a penalty, as in {strength!r} * rs.L1(); write a number here"
        )
    return checked_number("a strength", strength)


def checked_factor(strength: Any) -> Any:
    """What a penalty can be multiplied by: a number as a float, a strength that moves, or the tensor of one.

    Raises:
        PenaltyError: it is none of these.
    """
    return strength if isinstance(strength, (Strength, Tensor)) else checked_number("a strength", strength)


def refuse_tensor(strength: Any) -> None:
    """Refuse a tensor that someone multiplies a penalty by.

    Raises:
        PenaltyError: so it is.
    """
    if isinstance(strength, Tensor):
        raise PenaltyError(
            "a strength is a number, not a tensor: write float(strength), or a schedule or target for one that moves"
        )


def at_hand(strength: Any, penalty: object) -> Any:
    """The strength itself: a number, or the tensor that holds one that moves.

    Raises:
        PenaltyError: one that moves, of a penalty that isn't attached to a model.
    """
    if isinstance(strength, Strength):
        raise PenaltyError(
            f"the strength of {penalty!r} moves with the steps of a training: attach a rule with it, or take it at one "
            "step, as in schedule.at(100) * rs.L1()"
        )
    return strength


def times(strength: Any, value: Tensor) -> Tensor:
    """strength · value, in the value's own dtype."""
    result: Tensor = value * (strength.to(value.dtype) if isinstance(strength, Tensor) else strength)
    return result


def is_off(strength: Any) -> bool:
    """Whether it is a strength that moves and is zero now: then nothing need be computed."""
    return isinstance(strength, Tensor) and not torch.compiler.is_compiling() and not strength


def nothing(w: Tensor) -> Tensor:
    """Zero, with a graph to `w`."""
    return w.flatten()[:0].abs().sum()


def shown(strength: Any) -> str:
    """A strength as text; of the tensor of one that moves, what it is now."""
    return f"{float(strength):g}" if isinstance(strength, Tensor) else repr(strength)


def checked_setting(name: str, number: float, low: float, high: float = inf, *, closed: bool = False) -> None:
    """Refuse a setting that isn't a finite number above `low` (or that, if `closed`) and below `high`.

    Raises:
        PenaltyError: so it is.
    """
    if not is_number(number) or not (low < number < high or (closed and number == low)):
        least = f" {'from' if closed else 'above'} {low:g}" if isfinite(low) else ""
        most = f"{' and' if least else ''} below {high:g}" if isfinite(high) else ""
        raise PenaltyError(f"{name}= is a finite number{least}{most}; got {number!r}")


def checked_flag(name: str, flag: Any) -> None:
    """Refuse a setting that isn't true or false.

    Raises:
        PenaltyError: so it is.
    """
    if not isinstance(flag, bool):
        raise PenaltyError(f"{name}= is True or False, got {flag!r}")


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
    if axis is None or is_whole(axis):
        return axis
    raise PenaltyError(f"{name}= is an axis of the output, such as 1 or -1; got {axis!r}")
