"""Strengths that change over time: schedules, and targets reached by a controller.

Public as `rs.schedules` and `rs.Target`. A schedule or target multiplies a penalty like a number.
Once its rule is attached, the strength is a 0-d tensor updated after each optimizer step, so that
nothing is recompiled.
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
from restrain.fields import call_text, is_number, is_whole, shown_number

Unit = Literal["step", "epoch"]


class Strength(ABC):
    """Base of schedules and targets; their products, also with numbers, are strengths too."""

    __array_ufunc__ = None  # so that NumPy scalars leave `c * strength` to __rmul__
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
        """Return the factors of the product: a number, and strengths that aren't products."""
        return 1.0, (self,)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Return (least, greatest) of the strengths over all steps; None if they aren't known."""
        return None

    @abstractmethod
    def at(self, step: int, epoch: int = 0) -> float:
        """Return the strength at a step in an epoch, both counted from zero.

        Raises:
            PenaltyError: the strength isn't a finite number, zero or more; or it is a target, whose
                strength is known only while training.
        """


class Schedule(Strength):
    """Base of schedules: a strength as a function of the step or epoch.

    >>> schedule = 2 * rs.schedules.Linear(0, 1e-3, steps=1000)
    >>> [schedule.at(step) for step in (0, 500, 2000)]
    [0.0, 0.001, 0.002]
    """

    unit: Unit

    @abstractmethod
    def value(self, t: int) -> float:
        """Return the strength at step t, or in epoch t if `unit` is "epoch"."""

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
    """Product of a number and strengths, made by `*`."""

    number: float
    members: tuple[Strength, ...]

    def __repr__(self) -> str:
        return " * ".join([repr(self.number)] * (self.number != 1) + [repr(member) for member in self.members])

    @property
    def parts(self) -> tuple[float, tuple[Strength, ...]]:
        return self.number, self.members

    @property
    def bounds(self) -> tuple[float, float] | None:
        found = [member.bounds for member in self.members]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found):
            return None
        return self.number * prod(low for low, _ in known), self.number * prod(high for _, high in known)

    def at(self, step: int, epoch: int = 0) -> float:
        return self.number * prod(member.at(step, epoch) for member in self.members)


def _product(number: float, members: tuple[Strength, ...]) -> Strength:
    return members[0] if number == 1 and len(members) == 1 else Times(number, members)


@dataclass(frozen=True, repr=False)
class _Ramp(Schedule):
    """Base of ramps from `start` to `end`, constant before and after.

    Args:
        start, end: strengths.
        steps: length of the ramp in steps, or in epochs if `unit` is "epoch".
        begin: step or epoch at which the ramp begins.
        unit: "step" or "epoch".

    Raises:
        PenaltyError: a setting isn't allowed.
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

    @property
    def bounds(self) -> tuple[float, float] | None:
        return min(self.start, self.end), max(self.start, self.end)

    def value(self, t: int) -> float:
        part = (t - self.begin) / self.steps
        return self.start if part <= 0 else self.end if part >= 1 else self.between(part)

    @abstractmethod
    def between(self, part: float) -> float:
        """Return the strength after a fraction of the ramp, 0 < part < 1."""


@dataclass(frozen=True, repr=False)
class Linear(_Ramp):
    """Linear ramp: start + (end - start) t / steps, then `end`.

    >>> [rs.schedules.Linear(0, 0.8, steps=4).at(step) for step in (0, 1, 4, 9)]
    [0.0, 0.2, 0.8, 0.8]
    """

    def between(self, part: float) -> float:
        return self.start + (self.end - self.start) * part


@dataclass(frozen=True, repr=False)
class Cosine(_Ramp):
    """Cosine ramp, slow at both ends: end + (start - end) (1 + cos(π t / steps)) / 2, then `end`.

    Source: Loshchilov and Hutter (2017), SGDR, eq. 5, without restarts.

    >>> rs.schedules.Cosine(1, 0, steps=10).at(5)
    0.5
    """

    def between(self, part: float) -> float:
        return self.end + (self.start - self.end) * (1 + round(cos(pi * part), 15)) / 2


@dataclass(frozen=True, repr=False)
class Exponential(_Ramp):
    """Geometric ramp, with a constant ratio: start (end / start)^(t / steps), then `end`.

    Raises:
        PenaltyError: start or end is zero.

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
class Cubic(_Ramp):
    """Cubic ramp, fast at first: end + (start - end) (1 - t / steps)³, then `end`.

    As the fraction that a constraint keeps, it removes many weights while most are redundant, and
    fewer and fewer later: `rs.TopK(rs.schedules.Cubic(1.0, 0.1, steps=1000))`.

    Source: Zhu and Gupta (2017), "To prune, or not to prune", eq. 1, for the fraction removed; the
    fraction kept, one minus it, follows the same formula.

    >>> [rs.schedules.Cubic(1.0, 0.5, steps=4).at(step) for step in (0, 2, 4)]
    [1.0, 0.5625, 0.5]
    """

    def between(self, part: float) -> float:
        return self.end + (self.start - self.end) * (1 - part) ** 3


@dataclass(frozen=True, repr=False)
class WarmUp(Schedule):
    """Factor t / steps, then 1: for products such as `1e-3 * rs.schedules.WarmUp(500)`.

    Args:
        steps: step (or epoch, by `unit`) from which on the factor is 1.
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

    @property
    def bounds(self) -> tuple[float, float] | None:
        return 0.0, 1.0

    def value(self, t: int) -> float:
        return min(t / self.steps, 1.0)


@dataclass(frozen=True, repr=False)
class Steps(Schedule):
    """Piecewise constant schedule: values[0], and values[i + 1] from milestones[i] on.

    Args:
        values: strengths, one more than milestones.
        milestones: increasing steps or epochs.
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

    @property
    def bounds(self) -> tuple[float, float] | None:
        return min(self.values), max(self.values)

    def value(self, t: int) -> float:
        return self.values[bisect_right(self.milestones, t)]


@dataclass(frozen=True, repr=False)
class Function(Schedule):
    """Schedule f(t), with f a function from step or epoch to strength. Can't be written to a file.

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
class LearningRate(Strength):
    """Factor (γ / γ_max)^power that follows the learning rate γ of the optimizer's step.

    Decoupled decay by a strength λ shrinks a weight by γ λ at each step. With power 1 this is
    corrected decay, γ² λ / γ_max, for weights whose scale the network ignores, where plain decay
    ends a schedule with growing gradients; with power -1 it is independent decay, γ_max λ, whatever
    the learning rate. For how="decoupled", "gradient" and "proximal".

    Args:
        power: 1 for corrected, -1 for independent decay.
        peak: γ_max; by default the `max_lr` or `initial_lr` that a scheduler has put into the
            parameter group, or else its learning rate before the first step.

    Raises:
        PenaltyError: an invalid setting; a learning rate above the peak; a rule on parameter groups
            with different ratios.

    Source: Defazio (2025), Why gradients rapidly increase near the end of training, arXiv
    2506.02285, AdamC; Loshchilov and Hutter (2019), AdamW, for independent decay.

    >>> 0.1 * rs.schedules.LearningRate() * rs.L2().on(rs.weights, how="decoupled")
    (0.1 * schedules.LearningRate(power=1.0) * L2()).on(rs.weights, how='decoupled')
    """

    power: float = 1.0
    peak: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.power):
            raise PenaltyError(f"power= is a finite number, such as 1 or -1; got {shown_number(self.power)}")
        if self.peak is not None and not (is_number(self.peak) and self.peak > 0):
            raise PenaltyError(f"peak= is a learning rate above zero; got {shown_number(self.peak)}")

    def at(self, step: int, epoch: int = 0) -> float:
        raise PenaltyError(f"{self!r} is known at a rate, not at a step: attach a rule with it")

    def at_rate(self, rate: float, greatest: float) -> float:
        """Return the factor at a learning rate, given the greatest one.

        Raises:
            PenaltyError: the rate is above the greatest, or not above zero.
        """
        if not 0 < rate <= greatest * (1 + 1e-9):
            raise PenaltyError(
                f"{self!r}: a learning rate of {rate:g} is above peak={greatest:g}: write the greatest rate of the "
                f"schedule, rs.schedules.LearningRate(peak={rate:g})"
            )
        return float((min(rate / greatest, 1.0)) ** self.power)


@dataclass(frozen=True, repr=False)
class Target(Strength):
    """Strength that a controller adjusts in training until a measured quantity has a given value.

    Give exactly one target:

    * `zeros`: fraction of exact zeros among the entries of the rule's parameters; needs
      how="proximal".
    * `norm`: √Σ|w|² over all entries of the rule's parameters.
    * `active`: fraction of entries |h| > `above` in the rule's activations, averaged over samples,
      calls and activations.
    * `gradient_share`: ‖g‖ / (‖g‖ + ‖r‖) right after a step, with g the rule's gradient and r the
      remaining gradient of the rule's parameters.

    The controller is PI control of the logarithm of the strength: at each measurement it adds
    rate × error + damping × change of the error. The error is relative to the wanted norm, or to
    p (1 - p) for a wanted fraction p, and clipped to ±1. The rate is halved when the error changes
    sign, down to gain / 4, and otherwise grows by 10 % up to `gain`; this damps oscillations when
    the quantity lags behind the strength.

    Args:
        zeros, active, gradient_share: above 0 and below 1.
        norm: above 0.
        start: initial strength.
        low, high: bounds of the strength; warns once if it stays at a bound off the target.
        every: steps from one measurement to the next.
        smoothing: weight of earlier measurements in the exponential average, in [0, 1).
        gain: greatest rate; at 0.25 the rate changes a strength by at most 28 % per measurement.
        damping: weight of the error's change.
        above: magnitude above which an activation counts as active.

    Raises:
        PenaltyError: none or several targets are given, or a setting isn't allowed.

    Source: dual ascent of Gallego-Posada and others (2022), eq. 5, with PI control as in Sohrabi
    and others (2024), on the logarithm; rate adaptation of Riedmiller and Braun (1993).

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
        """Return the name of the measured quantity."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def goal(self) -> float:
        """Return the wanted value."""
        return getattr(self, self.kind)  # type: ignore[no-any-return]

    def at(self, step: int, epoch: int = 0) -> float:
        raise PenaltyError(f"the strength of {self!r} is found while training: attach its rule (reg.strengths() tells)")

    def error(self, measured: float) -> float:
        """Return the error of a measured value, in [-1, 1]; positive if the strength is too low."""
        missing = (self.goal - measured) / (self.goal if self.kind == "norm" else self.goal * (1 - self.goal))
        return max(-1.0, min(1.0, missing if self.kind in ("zeros", "gradient_share") else -missing))


KINDS = ("zeros", "norm", "active", "gradient_share")


# Checks


def _is_strength(number: Any) -> bool:
    return is_number(number) and float(number) >= 0


def checked_number(name: str, number: Any) -> float:
    """Return a strength as a float; `name` stands for it in the error.

    Raises:
        PenaltyError: the number isn't finite and real, zero or more.
    """
    if not _is_strength(number):
        raise PenaltyError(f"{name} is a finite number, zero or more; got {shown_number(number)}")
    return float(number)


def checked_divisor(divisor: Any) -> float:
    """Return the divisor of a strength as a float.

    Raises:
        PenaltyError: the divisor isn't finite, real and above zero.
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
