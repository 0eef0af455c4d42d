"""Dispatch of batches and sums to the backends, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends import c, eager, inductor
from restrain.engine.backends.backend import Backend, Compile, Decider, Parts, Sums
from restrain.engine.backends.c import C
from restrain.engine.backends.eager import Eager
from restrain.engine.backends.formula import Formula
from restrain.engine.backends.inductor import Inductor
from restrain.engine.ops import Batch, Change, Lowered, StepScalars, Tensors, lower

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


class Repeated:
    """The same changes of the same tensors at many steps, with other scalars at each.

    It does what an `Executor` does, but finds backends, code and addresses once: the tensors must
    keep their memory.

    Args:
        parts: (changes, members), where the members have one dtype and device.
        compile: as in `Executor`.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Change], Sequence[Tensors]]], compile: Compile) -> None:
        self.parts, self.compile = parts, compile
        self._executor = Executor(compile)
        self._calls: dict[Any, list[_Repeated]] = {}  # by the instructions

    def prepared(self, scalars: Sequence[StepScalars], steps: int) -> list[Callable[[], object]]:
        """Return the calls that do the changes of a step in place, by the scalars of each part."""
        lowered = [
            lower(changes, own, members[0][0]) for (changes, members), own in zip(self.parts, scalars, strict=True)
        ]
        key = tuple([None if one is None else tuple([(step, len(own)) for step, own in one]) for one in lowered])
        decider, left, found = Decider(self.compile, steps), list[int](), list[Callable[[], object]]()
        try:
            calls = self._calls.get(key)
        except TypeError:  # a user's penalty that can't be hashed
            calls, left = [], list(range(len(lowered)))
        if calls is None:
            calls = self._calls[key] = self._made(scalars)
        for call in calls:
            ways = call.ways(lowered, decider)
            found += ways
            left += [] if ways else call.parts
        if left:
            batches = [self._batch(number, scalars[number]) for number in left]
            found.append(lambda: self._executor(batches, steps))
        return found

    def _batch(self, number: int, scalars: StepScalars) -> Batch:
        changes, members = self.parts[number]
        return Batch(changes, scalars, members)

    def _made(self, scalars: Sequence[StepScalars]) -> list[_Repeated]:
        batches = [self._batch(number, own) for number, own in enumerate(scalars)]
        calls = c.repeated(batches)
        done = {number for call in calls for number in call.parts}
        found = [_Repeated(call.parts, batches, call) for call in calls]
        left = [number for number, batch in enumerate(batches) if number not in done and batch.lowered != []]
        return found + [_Repeated([number], batches) for number in left]


class _Repeated:
    """The way of some parts: a loop of C once that pays, before that torch."""

    def __init__(self, parts: Sequence[int], batches: Sequence[Batch], call: c.RepeatedCall | None = None) -> None:
        self.parts, self._call, self._tried = parts, call, False
        self._loop: Callable[..., object] | None = None
        found = [(number, eager.repeated(batches[number])) for number in parts]
        self._eager = [(number, run) for number, run in found if run is not None]
        self._entries = sum(tensors[0].numel() for number in parts for tensors in batches[number].members)

    def ways(self, lowered: Sequence[Lowered | None], decider: Decider) -> list[Callable[[], object]]:
        """Return the calls for the parts' instructions; none where an executor is needed."""
        if self._call is not None and decider.makes(self._call.work, self._call.cost):
            if not self._tried:
                self._tried, self._loop = True, self._call.loop()
            return [] if self._loop is None else [partial(self._loop, self._call.numbers(lowered))]
        if decider.makes(self._entries, inductor.COST) or len(self._eager) < len(self.parts):
            return []
        return [partial(run, own) for number, run in self._eager if (own := lowered[number]) is not None]


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
