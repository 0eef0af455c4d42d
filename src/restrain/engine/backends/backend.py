"""Base class of backends, and the decision which backend computes.

A backend computes sums of penalties (values and gradients) and instructions around an optimizer
step, given as data by `ops` and `restrain.operations`. Backends run in the order C → inductor →
eager torch → formulas. Each leaves to the next the work that it doesn't support or that isn't worth
compiling; the formulas support everything and are the reference. A new backend is one file with a
subclass of `Backend`, and an entry in `ORDER` of `executor`.
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
"""Terms of a sum of penalties: (strength, penalty), with a number or 0-d tensor as strength."""


class Sums(ABC):
    """A weighted sum of penalties on tensors of the same dtype, device and strides."""

    adds: bool = False
    """True if `gradients` supports `add=True`."""

    @abstractmethod
    def value(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return Σ weight · value over the tensors, at least in float32."""

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
        """Write factor · weight · gradient of each tensor into `into`, or add it if `add`.

        The tensors in `into` have the same strides."""


@dataclass(frozen=True)
class Decider:
    """Decision whether a backend compiles code, by `compile=` and the amount of work.

    Args:
        compile: True: compile at once. "auto": once the work so far outweighs compiling. False:
            never.
        steps: the number of steps like this one taken before.
    """

    compile: Compile
    steps: int = 0

    def makes(self, work: float, cost: float) -> bool:
        """Return True if code is worth compiling, given work per step and cost in the same unit."""
        return self.compile is True or (self.compile == "auto" and self.steps * work >= cost)

    def calls(self, work: float, least: float) -> bool:
        """Return True if one call on this much work is worth compiling code for."""
        return self.compile is not False and work >= least


class Backend(ABC):
    """A way of computing sums of penalties and changes of tensors."""

    def sums(self, parts: Parts, like: Tensor) -> Sums | None:
        """Return code for a sum of penalties on tensors like this one; None if not supported."""
        return None

    @abstractmethod
    def carry_out(self, batches: Sequence[Batch], decider: Decider) -> list[Batch]:
        """Apply the changes of batches in place; return the batches left to the next backend."""
