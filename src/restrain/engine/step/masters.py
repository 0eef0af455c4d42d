"""Detection of optimizers that update master copies of the weights and overwrite the parameters.

These optimizers (with float32 copies of half-precision weights) undo the changes that rules make to
a parameter. They are recognised by a step: a tensor of the optimizer was equal to the parameter,
rules changed the parameter but not the tensor, and after the next step both are equal again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from restrain.engine.step.worklist import Member
from restrain.errors import OptimizerError
from restrain.named_tensors import is_sharded

_DEPTH = 4  # of containers within attributes
_Pair: TypeAlias = tuple[str, Tensor, Tensor]  # (name of a parameter, the parameter, its copy)


class Masters:
    """Watch of one optimizer, until a step has shown whether it updates copies.

    Args:
        optimizer: the optimizer; torch's own aren't watched, as they read the parameters.
        needed: False if rules change no weights.
    """

    def __init__(self, optimizer: Optimizer, needed: bool) -> None:
        strange = not inspect.unwrap(type(optimizer).step).__module__.startswith("torch.optim")
        # Before the first step, and before the second, when the optimizer has its state
        self._looks = 2 if needed and strange else 0
        self._name = type(optimizer).__name__
        self._pairs: list[_Pair] = []
        self._apart: list[_Pair] = []  # pairs that rules have made different

    @property
    def watches(self) -> bool:
        """True until it is known whether the optimizer updates copies."""
        return bool(self._looks or self._pairs)

    def look(self, optimizer: Optimizer, members: Sequence[Member]) -> None:
        """Find copies of the parameters that rules are about to change."""
        if not self._looks:
            return
        self._looks -= 1
        works = [(work.handle.name, p) for work, p, _ in members if work.changes_weights]
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        shapes = {p.shape for _, p in works if not is_sharded(p)}
        found = [t for t in _tensors(optimizer) if id(t) not in own and t.shape in shapes]
        self._pairs = [(name, p, t) for name, p in works for t in found if _equal(p, t)]

    def changed(self) -> None:
        """Record the pairs that rules have made different; other pairs show nothing at the step."""
        self._apart = [pair for pair in self._pairs if not _equal(*pair[1:])]

    def check(self) -> None:
        """Check, after a step, that it hasn't undone the changes made by rules.

        Raises:
            OptimizerError: a parameter was overwritten by its copy.
        """
        apart, self._apart = self._apart, []
        for name, p, copy in apart:
            if _equal(p, copy):
                raise OptimizerError(
                    f"{self._name} steps a copy of {name!r} and writes it over the parameter, so what rules do to that "
                    "at the step is lost: use how='loss' or how='gradient', for a constraint how='parametrize', or an "
                    "optimizer of the parameters themselves, under torch.autocast"
                )
        if apart:  # the optimizer reads the parameters
            self._pairs = []


def _equal(p: Tensor, copy: Tensor) -> bool:
    return p.shape == copy.shape and p.device == copy.device and torch.equal(p.detach(), copy.detach().to(p.dtype))


def _tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the plain tensors that an optimizer holds in its attributes and its state."""
    yield from _within(list(vars(optimizer).values()), _DEPTH)


def _within(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not is_sharded(value) and value.layout is torch.strided:
            yield value
    elif depth and isinstance(value, dict | list | tuple):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _within(member, depth - 1)
