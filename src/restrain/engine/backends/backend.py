"""What a backend is, and the one decider of which backend computes.

A backend computes what `ops` and `restrain.operations` say as data: the value and gradient of sums of penalties, and
the instructions around an optimizer's step. The order is C → inductor → eager torch → the formulas themselves, which
know everything and are the reference. What a backend doesn't know, or what isn't worth its making, it leaves to the
next. A new backend is one file with a subclass of `Backend`, and its place in `ORDER` of this package's front door.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from restrain.engine.ops import Batch

Compile: TypeAlias = "bool | Literal['auto']"

Parts: TypeAlias = list[tuple[Any, Any]]
"""The penalties that one is a sum of, each with its strength, a number or a tensor."""


class Sums(ABC):
    """A weighted sum of penalties on tensors that are alike in dtype, device and strides."""

    adds: bool = False
    """Whether `gradients` may add to what `into` holds."""

    @abstractmethod
    def value(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The sum of the values, each multiplied by its weight; in float32 at least."""

    @abstractmethod
    def gradients(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        factor: Tensor,
        into: Sequence[Tensor],
        *,
        add: bool = False,
    ) -> None:
        """Write factor · weight · gradient of each into tensors of the same strides, or add it to them."""


@dataclass(frozen=True)
class Decider:
    """Decides which backend computes, by `compile=` and by the work.

    Args:
        compile: True: code is made at once. "auto": as soon as the work makes up for making it. False: never.
        steps: how many steps like this one have been taken.
    """

    compile: Compile
    steps: int = 0

    def makes(self, work: float, cost: float) -> bool:
        """Whether to make code for an amount of work a step, at a cost in the same unit."""
        return self.compile is True or (self.compile == "auto" and self.steps * work >= cost)

    def calls(self, work: float, least: float) -> bool:
        """Whether to call code that makes up for being made by its first call on so much work."""
        return self.compile is not False and work >= least


class Backend(ABC):
    """A way of computing."""

    def sums(self, parts: Parts, like: Tensor) -> Sums | None:
        """What computes a sum of penalties on tensors like this one; None where that isn't known here."""
        return None

    @abstractmethod
    def carry_out(self, batches: Sequence[Batch], decider: Decider) -> list[Batch]:
        """Carry the changes of batches out in place, and return what is left to the next backend."""
