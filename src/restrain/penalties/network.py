"""Penalties on the whole network: functions of named parameters and outputs together, and their algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from restrain.errors import PenaltyError, SelectionError
from restrain.penalties.checks import at_hand, checked_factor, is_off, nothing, shown, times
from restrain.rules import How, What
from restrain.schedule import Strength


class NetworkPenalty(What, ABC, register=False):
    """Base of penalties that see the whole network. It acts in the loss only.

    A subclass needs only `__call__(self, parameters, outputs)`; then it can be scaled and added to others of
    its kind. `.on(where, outputs=rs.outputs(...))` says which parameters and outputs it is given.

    >>> class Energy(rs.NetworkPenalty):
    ...     def __call__(self, parameters, outputs):
    ...         return sum(h.square().mean() for h in outputs.values())
    >>> (0.5 * Energy())({}, {"relu": torch.tensor([1.0, 3.0])})
    tensor(2.5000)
    """

    __array_ufunc__ = None  # NumPy's numbers leave `c * penalty` to us
    takes_outputs = True

    takes_frozen: bool = False
    """Whether it is given frozen parameters, too."""

    @abstractmethod
    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The value, a differentiable 0-d tensor.

        Args:
            parameters: the selected parameters by name, without frozen ones (but see `takes_frozen`).
            outputs: the selected layers' outputs by the layers' names; of a second call of "relu" by
            "relu#2".
        """

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse, when a rule is attached, parameters that it can't take.

        Raises:
            SelectionError, PenaltyError: so it is.
        """

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} sees the whole network: .on(...) takes its parameters, and its outputs go into "
                "outputs=, "
                "as in .on(rs.weights, outputs=rs.outputs('relu*'))"
            )
        return ("loss",)

    def __mul__(self, strength: Any) -> NetworkPenalty:
        if not isinstance(strength, (Real, Strength)):
            return NotImplemented
        if isinstance(self, ScaledNetwork):
            return ScaledNetwork(checked_factor(strength) * self.strength, self.penalty)
        return ScaledNetwork(checked_factor(strength), self)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> NetworkPenalty:
        if isinstance(other, NetworkPenalty):
            return NetworkSum((*_terms(self), *_terms(other)))
        if isinstance(other, What):
            raise PenaltyError(
                f"{self!r} is a function of the whole network, {other!r} isn't: they can't be added; write a "
                "rule for each"
            )
        return NotImplemented

    def __radd__(self, other: Any) -> NetworkPenalty:
        return self if isinstance(other, int) and other == 0 else self + other  # sum([p, q]) begins with 0


def _terms(penalty: NetworkPenalty) -> tuple[NetworkPenalty, ...]:
    return penalty.terms if isinstance(penalty, NetworkSum) else (penalty,)


@dataclass(frozen=True, repr=False)
class ScaledNetwork(NetworkPenalty, register=False):
    """strength · penalty; made by `strength * penalty`."""

    strength: float | Strength | Tensor
    penalty: NetworkPenalty

    def __repr__(self) -> str:
        inner = f"({self.penalty!r})" if isinstance(self.penalty, NetworkSum) else repr(self.penalty)
        return f"{shown(self.strength)} * {inner}"

    @property
    def takes_frozen(self) -> bool:  # type: ignore[override]
        return self.penalty.takes_frozen

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        if is_off(self.strength):
            return nothing(next(iter((*parameters.values(), *outputs.values())), torch.zeros(())))
        return times(at_hand(self.strength, self), self.penalty(parameters, outputs))

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        self.penalty.check(parameters)

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> NetworkPenalty:
        strength = live(self.strength) if isinstance(self.strength, Strength) else self.strength
        return ScaledNetwork(strength, self.penalty.with_strengths(live))


@dataclass(frozen=True, repr=False)
class NetworkSum(NetworkPenalty, register=False):
    """The sum of penalties on the same network; made by `p + q`."""

    terms: tuple[NetworkPenalty, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))

    @property
    def takes_frozen(self) -> bool:  # type: ignore[override]
        return any(term.takes_frozen for term in self.terms)

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        value, *others = [term(parameters, outputs) for term in self.terms]
        for other in others:
            value = value + other.to(value.device)
        return value

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        for term in self.terms:
            term.check(parameters)

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> NetworkPenalty:
        return NetworkSum(tuple(term.with_strengths(live) for term in self.terms))
