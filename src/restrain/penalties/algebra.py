"""Algebra of penalties: `strength * p`, `p / number` and `p + q` are penalties of the same kind.

A kind is a base class with the operators of `Algebra`: `Penalty` (of a tensor), `NetworkPenalty`,
`OnDerivatives`. `_forms` returns its subclasses of `Multiple` and `Total`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from restrain.errors import PenaltyError
from restrain.rules import How, What
from restrain.schedule import Strength, checked_divisor, checked_number

K = TypeVar("K", bound="Algebra[Any]")


def checked_factor(strength: Any) -> Any:
    """Return a strength: a number as a float, a moving strength or its tensor unchanged.

    Raises:
        PenaltyError: the strength is none of these.
    """
    return strength if isinstance(strength, (Strength, Tensor)) else checked_number("a strength", strength)


def refuse_tensor(strength: Any) -> None:
    """Refuse a tensor as the factor or divisor of a penalty.

    Raises:
        PenaltyError: it is a tensor.
    """
    if isinstance(strength, Tensor):
        raise PenaltyError(
            "a strength is a number, not a tensor: write float(strength), or a schedule or target for one that moves"
        )


class Algebra(What, ABC, Generic[K], register=False):
    """Base of the kinds of penalties: products with strengths, sums of the same kind."""

    __array_ufunc__ = None  # NumPy scalars leave `c * penalty` to us
    apart: ClassVar[str] = ""
    """Why a penalty of this kind can't be added to another kind, for the error message."""

    @abstractmethod
    def _forms(self) -> tuple[type[Multiple[K]], type[Total[K]] | None]:
        """Return the classes of this kind's multiples and sums; None if it has no sums."""

    def _rescaled(self, change: Callable[[Any], Any]) -> K:
        return self._forms()[0](change(1.0), self)  # type: ignore[return-value, arg-type]

    def _terms(self) -> tuple[K, ...]:
        return (self,)  # type: ignore[return-value]

    def __mul__(self, strength: float | Strength) -> K:
        refuse_tensor(strength)
        if not isinstance(strength, (Real, Strength)):
            return NotImplemented
        factor = checked_factor(strength)
        return self._rescaled(lambda own: factor * own)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> K:
        refuse_tensor(divisor)
        if not isinstance(divisor, Real):
            return NotImplemented
        number = checked_divisor(divisor)
        return self._rescaled(lambda own: own / number)

    def __add__(self, other: K) -> K:
        multiple, total = self._forms()
        if total is not None and isinstance(other, Algebra) and other._forms()[0] is multiple:
            return total((*self._terms(), *other._terms()))  # type: ignore[return-value]
        if self.apart and isinstance(other, What):
            raise PenaltyError(f"{self!r} {self.apart} and can't be added to {other!r}: write a rule for each")
        return NotImplemented

    def __radd__(self, other: Any) -> K:
        if isinstance(other, int) and other == 0:  # sum([p, q]) begins with 0
            return self  # type: ignore[return-value]
        return self + other  # type: ignore[no-any-return]


class Combination(Algebra[K], register=False):
    """Base of penalties made of other penalties of their kind."""

    @property
    @abstractmethod
    def members(self) -> tuple[K, ...]:
        """The penalties that this penalty combines."""

    @abstractmethod
    def mapped(self, change: Callable[[K], K]) -> Any:
        """Return the same combination of the changed members."""

    def moments(self, at_places: bool) -> tuple[How, ...]:
        first, *others = [member.moments(at_places) for member in self.members]
        return tuple(how for how in first if all(how in other for other in others))

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> Any:
        return self.mapped(lambda member: member.with_strengths(live))


@dataclass(frozen=True, repr=False)
class Multiple(Combination[K], register=False):
    """strength · penalty, the result of `strength * penalty`."""

    strength: float | Strength | Tensor
    penalty: K

    def __post_init__(self) -> None:
        checked_factor(self.strength)

    def __repr__(self) -> str:
        s = self.strength  # a tensor holds a moving strength: show its current value
        inner = f"({self.penalty!r})" if isinstance(self.penalty, Total) else repr(self.penalty)
        return f"{f'{float(s):g}' if isinstance(s, Tensor) else repr(s)} * {inner}"

    def _rescaled(self, change: Callable[[Any], Any]) -> Any:
        return dataclasses.replace(self, strength=change(self.strength))

    @property
    def members(self) -> tuple[K, ...]:
        return (self.penalty,)

    def mapped(self, change: Callable[[K], K]) -> Any:
        return dataclasses.replace(self, penalty=change(self.penalty))

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> Any:
        strength = live(self.strength) if isinstance(self.strength, Strength) else self.strength
        return dataclasses.replace(self, strength=strength, penalty=self.penalty.with_strengths(live))


@dataclass(frozen=True, repr=False)
class Total(Combination[K], register=False):
    """p + q + ..., the result of `p + q`."""

    terms: tuple[K, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))

    def _terms(self) -> tuple[K, ...]:
        return self.terms

    @property
    def members(self) -> tuple[K, ...]:
        return self.terms

    def mapped(self, change: Callable[[K], K]) -> Any:
        return dataclasses.replace(self, terms=tuple(map(change, self.terms)))
