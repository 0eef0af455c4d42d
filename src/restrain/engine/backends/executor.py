"""Dispatch of batches and sums to the backends, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends.backend import Backend, Compile, Decider, Parts, Sums
from restrain.engine.backends.c import C
from restrain.engine.backends.eager import Eager
from restrain.engine.backends.formula import Formula
from restrain.engine.backends.inductor import Inductor
from restrain.engine.ops import Batch, Tensors

ORDER: tuple[type[Backend], ...] = (C, Inductor, Eager, Formula)

_c, _eager = C(), Eager()


def sums_of(parts: Parts, like: Tensor, work: float, least: float, compile: Compile) -> Sums | None:
    """Return code for a sum of penalties: compiled for `least` entries of work or more, else torch.

    None if no backend supports it.
    """
    found = _c.sums(parts, like) if Decider(compile).calls(work, least) else None
    return _eager.sums(parts, like) if found is None else found


class Executor:
    """Applies changes around an optimizer step; its backends keep buffers from step to step."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile
        self._backends = [backend() for backend in ORDER]

    def __call__(self, batches: Iterable[Batch], steps: int = 0) -> None:
        """Change the first tensor of each member in place, or its gradient.

        Args:
            batches: tensors and their changes; no tensor is in two batches.
            steps: the number of steps like this one taken before.
        """
        left = [batch.of(alike) for batch in batches for alike in _alike(batch.members) if alike]
        for backend in self._backends:
            left = backend.carry_out(left, Decider(self.compile, steps)) if left else left


_dtype = attrgetter("dtype")


def _alike(members: Sequence[Tensors]) -> Iterator[Sequence[Tensors]]:
    """Yield the members grouped by the dtypes and devices of their tensors."""
    every = list(chain.from_iterable(members))
    if len(set(map(_dtype, every))) <= 1 and len(set(map(torch.Tensor.get_device, every))) <= 1:
        yield members
        return
    alike: dict[Any, list[Tensors]] = {}
    for tensors in members:
        alike.setdefault(tuple([(t.dtype, t.device) for t in tensors]), []).append(tensors)
    yield from alike.values()
