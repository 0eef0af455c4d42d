"""Strength over time: schedules, and targets that a controller reaches. Public as `rs.schedules` and `rs.Target`.

A schedule or target multiplies a penalty as a number does. Once its rule is attached, the strength is a 0-d tensor
that is refilled after each real step of the optimizer, so nothing that was compiled is compiled again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, prod
from numbers import Real
from typing import Any, ClassVar, Literal

from restrain.errors import PenaltyError
from restrain.fields import call_text, is_number, is_whole

Unit = Literal["step", "epoch"]


class Strength(ABC):
    """Base of the strengths that move: number × strength and strength × strength are such again."""

    __array_ufunc__ = None  # NumPy's numbers leave `c * strength` to us
    prefix: ClassVar[str] = "schedules."  # of its name in `rs`

    def __mul__(self, other: float | Strength) -> Strength:
        if not isinstance(other, (Real, Strength)):
            return NotImplemented
        number, members = other.parts if isinstance(other, Strength) else (checked_number("a strength", other), ())
        return _product(number * self.parts[0], (*self.parts[1], *members))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Strength:
        if not isinstance(divisor, Real):
            return NotImplemented
        number, members = self.parts
        return _product(number / checked_divisor(divisor), members)

    def __repr__(self) -> str:
        return call_text(self, self.prefix)

    @property
    def parts(self) -> tuple[float, tuple[Strength, ...]]:
        """The number and the other strengths that it is a product of."""
        return 1.0, (self,)

    @abstractmethod
    def at(self, step: int, epoch: int = 0) -> float:
        """The strength at a step in an epoch, both counted from zero.

        Raises:
            PenaltyError: it isn't a finite number, zero or more; or a target's, which only a training tells.
        """


class Schedule(Strength):
    """Base of schedules: a strength for each step or epoch.

    >>> schedule = 2 * rs.schedules.Linear(0, 1e-3, steps=1000)
    >>> [schedule.at(step) for step in (0, 500, 2000)]
    [0.0, 0.001, 0.002]
    """

    unit: Unit

    @abstractmethod
    def value(self, t: int) -> float:
        """The strength at a step or, where `unit` is "epoch", in an epoch."""

    def at(self, step: int, epoch: int = 0) -> float:
        t = epoch if self.unit == "epoch" else step
        found = self.value(t)
        if not _is_strength(found):
            raise PenaltyError(
                f"{self!r} gives {found!r} at {self.unit} {t}; a strength is a finite number, zero or more"
            )
        return float(found)


@dataclass(frozen=True, repr=False)
class Times(Strength):
    """A product of strengths; made by `*`."""

    number: float
    members: tuple[Strength, ...]

    def __repr__(self) -> str:
        return " * ".join([repr(self.number)] * (self.number != 1) + [repr(member) for member in self.members])

    @property
    def parts(self) -> tuple[float, tuple[Strength, ...]]:
        return self.number, self.members

    def at(self, step: int, epoch: int = 0) -> float:
        return self.number * prod(member.at(step, epoch) for member in self.members)


def _product(number: float, members: tuple[Strength, ...]) -> Strength:
    return members[0] if number == 1 and len(members) == 1 else Times(number, members)


@dataclass(frozen=True, repr=False)
class _Ramp(Schedule):
    """From `start` to `end` in `steps` steps or epochs, counted from `begin`; constant before and after.

    Args:
        start, end: strengths.
        steps: how many steps (epochs, where `unit` says so) it takes.
        begin: the step or epoch at which it begins.
        unit: "step" or "epoch".

    Raises:
        PenaltyError: a setting that can't be.
    """

    start: float
    end: float
    steps: int
    begin: int = 0
    unit: Unit = "step"

    def __post_init__(self) -> None:
        _check_strengths(self, "start", "end")
        _check_count("steps", self.steps, 1)
        _check_count("begin", self.begin, 0)
        _check_unit(self.unit)

    def value(self, t: int) -> float:
        part = (t - self.begin) / self.steps
        return self.start if part <= 0 else self.end if part >= 1 else self.between(part)

    @abstractmethod
    def between(self, part: float) -> float:
        """The strength after that part of the way, above zero and below one."""


@dataclass(frozen=True, repr=False)
class Linear(_Ramp):
    """start + (end - start) t / steps, then `end`.

    >>> [rs.schedules.Linear(0, 0.8, steps=4).at(step) for step in (0, 1, 4, 9)]
    [0.0, 0.2, 0.8, 0.8]
    """

    def between(self, part: float) -> float:
        return self.start + (self.end - self.start) * part


@dataclass(frozen=True, repr=False)
class Cosine(_Ramp):
    """end + (start - end) (1 + cos(π t / steps)) / 2, then `end`: slow at both ends.

    Source: Loshchilov and Hutter (2017), SGDR, eq. 5, without restarts.

    >>> rs.schedules.Cosine(1, 0, steps=10).at(5)
    0.5
    """

    def between(self, part: float) -> float:
        return self.end + (self.start - self.end) * (1 + round(cos(pi * part), 15)) / 2


@dataclass(frozen=True, repr=False)
class Exponential(_Ramp):
    """start (end / start)^(t / steps), then `end`: the same ratio from each step to the next.

    Raises:
        PenaltyError: a start or an end of zero, which no ratio leads to.

    >>> rs.schedules.Exponential(1e-4, 1e-2, steps=2).at(1)
    0.001
    """

    def __post_init__(self) -> None:
        _Ramp.__post_init__(self)
        if not (self.start and self.end):
            raise PenaltyError(f"Exponential goes from one strength above zero to another; got {self!r}")

    def between(self, part: float) -> float:
        return float(self.start ** (1 - part) * self.end**part)


@dataclass(frozen=True, repr=False)
class WarmUp(Schedule):
    """t / steps, then one: to be multiplied, as in `1e-3 * rs.schedules.WarmUp(500)`.

    Args:
        steps: the step (epoch, where `unit` says so) from which on it is one.
        unit: "step" or "epoch".

    >>> schedule = rs.schedules.WarmUp(500) * rs.schedules.Cosine(1e-3, 0, steps=9500, begin=500)
    >>> schedule.at(250), schedule.at(500), schedule.at(10_000)
    (0.0005, 0.001, 0.0)
    """

    steps: int
    unit: Unit = "step"

    def __post_init__(self) -> None:
        _check_count("steps", self.steps, 1)
        _check_unit(self.unit)

    def value(self, t: int) -> float:
        return min(t / self.steps, 1.0)


@dataclass(frozen=True, repr=False)
class Steps(Schedule):
    """The first of `values`, and from each of `milestones` on the next.

    Args:
        values: strengths, one more than milestones.
        milestones: steps or epochs, growing.
        unit: "step" or "epoch".

    >>> [rs.schedules.Steps([1e-3, 1e-4], milestones=[100]).at(step) for step in (99, 100)]
    [0.001, 0.0001]
    """

    values: tuple[float, ...]
    milestones: tuple[int, ...]
    unit: Unit = "step"

    def __post_init__(self) -> None:
        for name in ("values", "milestones"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise PenaltyError(f"{name}= of Steps is a list; got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "values", tuple(checked_number("values", value) for value in self.values))
        for milestone in self.milestones:
            _check_count("milestones", milestone, 1)
        growing = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not growing or len(self.values) != len(self.milestones) + 1:
            raise PenaltyError(f"Steps needs growing milestones and one more of values than of these; got {self!r}")
        _check_unit(self.unit)

    def value(self, t: int) -> float:
        return self.values[bisect_right(self.milestones, t)]


@dataclass(frozen=True, repr=False)
class Function(Schedule):
    """f(t), of a function from the number of the step or epoch to a strength. It can't be written to a file.

    >>> rs.schedules.Function(lambda step: 0.1 / (1 + step)).at(9)
    0.01
    """

    f: Callable[[int], float]
    unit: Unit = "step"

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise PenaltyError(f"Function takes a function from a step to a strength; got {self.f!r}")
        _check_unit(self.unit)

    def value(self, t: int) -> float:
        return self.f(t)

    def __repr__(self) -> str:
        name = getattr(self.f, "__qualname__", type(self.f).__name__)
        return f"schedules.Function({name}{'' if self.unit == 'step' else ', unit=' + repr(self.unit)})"


@dataclass(frozen=True, repr=False)
class Target(Strength):
    """The strength at which something measured has the value that is asked for, found while training.

    Exactly one of these is given:

    * `zeros`: the share of exact zeros among the entries of the rule's parameters; for how="proximal".
    * `norm`: √Σ|w|² over all entries of the rule's parameters.
    * `active`: the share of entries |h| > `above` of the rule's outputs, averaged over samples, calls and places.
    * `gradient_share`: ‖g‖ / (‖g‖ + ‖r‖), g the gradient of the rule and r that of all else, over the rule's
      parameters, right after a step.

    A controller moves the logarithm of the strength by PI control: every so many steps by the rate times the error
    (in parts of a norm, or of p (1 - p) of a share p; cut at ±1), and by `damping` times the error's change. The rate
    is halved when the error changes its sign and grows back while it doesn't, which damps what lags behind.

    Args:
        zeros, active, gradient_share: above 0, below 1.
        norm: above 0.
        start: the strength at first.
        low, high: its bounds; staying at one of them off the target is warned of once.
        every: steps from one measurement to the next.
        smoothing: part of the last measurement that is kept in the next, from 0 to below 1.
        gain: greatest rate; 0.25 changes a strength by at most 28 % a measurement.
        damping: of the error's change.
        above: from which size on an output is active.

    Raises:
        PenaltyError: none or several of them, or a setting that can't be.

    Source: dual ascent of Gallego-Posada and others (2022), eq. 5, made PI as by Sohrabi and others (2024), on the
    logarithm; the rates of Riedmiller and Braun (1993).

    >>> rs.Target(zeros=0.9, start=1e-3) * rs.L1()
    Target(zeros=0.9, start=0.001) * L1()
    """

    zeros: float | None = None
    norm: float | None = None
    active: float | None = None
    gradient_share: float | None = None
    start: float = 1e-4
    low: float = 1e-8
    high: float = 1e4
    every: int = 10
    smoothing: float = 0.5
    gain: float = 0.25
    damping: float = 0.75
    above: float = 0.0

    prefix = ""

    def __post_init__(self) -> None:
        asked = [name for name in KINDS if getattr(self, name) is not None]
        if len(asked) != 1:
            raise PenaltyError(
                f"a target is one of {', '.join(f'{name}=' for name in KINDS)}; got {' and '.join(asked) or 'none'}"
            )
        if not (_is_strength(self.goal) and self.goal > 0 and (self.kind == "norm" or self.goal < 1)):
            limits = "above 0" if self.kind == "norm" else "above 0 and below 1"
            raise PenaltyError(f"{self.kind}= of a target is a number {limits}; got {self.goal!r}")
        _check_strengths(self, "start", "low", "high", "smoothing", "gain", "damping", "above")
        if not 0 < self.low <= self.start <= self.high:
            raise PenaltyError(
                f"a target needs 0 < low <= start <= high; got {self.low:g}, {self.start:g} and {self.high:g}"
            )
        if not (self.gain > 0 and self.smoothing < 1):
            raise PenaltyError(
                f"a target needs gain= above 0 and smoothing= below 1; got {self.gain:g} and {self.smoothing:g}"
            )
        _check_count("every", self.every, 1)

    @property
    def kind(self) -> str:
        """What is measured."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def goal(self) -> float:
        """What it should be."""
        return getattr(self, self.kind)  # type: ignore[no-any-return]

    def at(self, step: int, epoch: int = 0) -> float:
        raise PenaltyError(f"the strength of {self!r} is found while training: attach its rule (reg.strengths() tells)")

    def error(self, measured: float) -> float:
        """How far the strength is from enough: above zero where it is too weak, from -1 to 1."""
        missing = (self.goal - measured) / (self.goal if self.kind == "norm" else self.goal * (1 - self.goal))
        return max(-1.0, min(1.0, missing if self.kind in ("zeros", "gradient_share") else -missing))


KINDS = ("zeros", "norm", "active", "gradient_share")


# Checks


def _is_strength(number: Any) -> bool:
    return is_number(number) and float(number) >= 0


def checked_number(name: str, number: Any) -> float:
    """A number as a float.

    Raises:
        PenaltyError: it isn't a finite real number, zero or more.
    """
    if not _is_strength(number):
        raise PenaltyError(f"{name} is a finite number, zero or more; got {number!r}")
    return float(number)


def checked_divisor(divisor: Any) -> float:
    """Return the divisor of a strength as a float.

    Raises:
        PenaltyError: it isn't a finite real number above zero.
    """
    if not (_is_strength(divisor) and divisor > 0):
        raise PenaltyError(f"a strength is divided by a finite number above zero; got {divisor!r}")
    return float(divisor)


def _check_strengths(strength: Strength, *names: str) -> None:
    for name in names:
        object.__setattr__(strength, name, checked_number(f"{name}=", getattr(strength, name)))


def _check_count(name: str, count: Any, low: int) -> None:
    if not is_whole(count, low):
        raise PenaltyError(f"{name}= is a whole number, at least {low}; got {count!r}")


def _check_unit(unit: Any) -> None:
    if unit not in ("step", "epoch"):
        raise PenaltyError(f"unit= is 'step' or 'epoch', got {unit!r}")
