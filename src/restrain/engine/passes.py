"""How acts are carried out on many tensors, by the way that is fastest for each.

* Small tensors are copied into one buffer, in which the act is done to all at once, and back.
* Large ones are gone through in blocks that stay in the cache with all that is computed of them: of entries where each
  is for itself, of rows where groups are of rows.
* Or a compiled kernel takes a whole tensor, where there is a compiler and as many steps are taken as make it pay.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from restrain.engine.fused import kernel, packed
from restrain.engine.kernels import Act, Given, Gradient, Lowered, lower, quickly, slowly
from restrain.engine.shards import of_rows
from restrain.errors import RestrainWarning

BLOCK = 1 << 18  # entries
SMALL = 1 << 13  # entries of a tensor that is copied beside others
WORTH = 2 * 10**10  # entries × steps, after which what a kernel saves has made up for the seconds that compiling takes

Compile: TypeAlias = "bool | Literal['auto']"
Tensors: TypeAlias = "tuple[Tensor, ...]"  # the weights, and their gradient or moments


class Passes:
    """Carries out acts; keeps buffers from step to step."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile
        self._gathered: dict[Any, list[_Gathered]] = {}
        self._said = False

    def __call__(self, acts: Sequence[Act], given: Given, members: Sequence[Tensors], steps: int = 0) -> None:
        """Do the acts in place to the first of each member's tensors, or to its gradient.

        Args:
            acts: one after the other.
            given: the numbers, which are the same for all members.
            members: the weights, then the gradient if the acts are before a step, else the moments of the metric.
            steps: how many have been done like it.
        """
        alike: dict[Any, list[Tensors]] = {}
        for tensors in members:
            if tensors[0].numel():
                alike.setdefault(tuple([(t.dtype, t.device, t.layout) for t in tensors]), []).append(tensors)
        for group in alike.values():
            lowered = lower(acts, given, group[0][0])
            if lowered is None:
                for tensors in group:
                    self._slowly(acts, given, tensors, steps)
            elif lowered:
                self._quickly(lowered, group, steps)

    def _quickly(self, lowered: Lowered, members: list[Tensors], steps: int) -> None:
        compiled = self._compiled(lowered, members, steps)
        small = [tensors for tensors in members if tensors[0].numel() <= SMALL]
        large = [tensors for tensors in members if tensors[0].numel() > SMALL] if len(small) > 1 else members
        for tensors in large:
            _one(lowered, tensors, compiled)
        if len(small) > 1:
            for gathered in self._gathering(small):
                gathered.fill(small)
                _one(lowered, gathered.buffers, compiled)
                gathered.empty(small, lowered)

    def _compiled(self, lowered: Lowered, members: list[Tensors], steps: int) -> Any:
        """The kernel and its numbers, if it is time for one and it can be had."""
        if self.compile is False:
            return None
        if self.compile == "auto" and steps * sum(tensors[0].numel() for tensors in members) < WORTH:
            return None
        run = kernel(lowered, members[0])
        if run is None and self.compile is True and not self._said:
            self._said = True
            warnings.warn(
                "compile=True, but rules at the optimizer's step can't be compiled here (is there a C++ compiler?): "
                "they are done without, with the same result",
                RestrainWarning,
                stacklevel=2,
            )
        return None if run is None else (run, packed(lowered, members[0][0]))

    def _slowly(self, acts: Sequence[Act], given: Given, tensors: Tensors, steps: int) -> None:
        w = tensors[0]
        if all(act.by_entry for act in acts):
            for block in _blocks(tensors):
                slowly(acts, given, block)
            return
        rows = max(BLOCK * w.shape[0] // w.numel(), 1) if w.dim() > 1 else 1
        if w.dim() > 1 and rows < w.shape[0]:
            found = {count: _by_rows(acts, w, count) for count in {rows, w.shape[0] % rows or rows}}
            own = {count: cut for count, cut in found.items() if cut is not None}
            if len(own) == len(found):
                for block in zip(*[t.split(rows) for t in tensors], strict=True):
                    slowly(own[len(block[0])], given, block)
                return
        if len(acts) == 1:
            slowly(acts, given, tensors)
            return
        for act in acts:
            self((act,), given, [tensors], steps)

    def _gathering(self, members: list[Tensors]) -> list[_Gathered]:
        key = (tuple([(t.dtype, t.device) for t in members[0]]), tuple([tensors[0].shape for tensors in members]))
        if key not in self._gathered:
            if len(self._gathered) > 32:  # of sets of tensors that have changed again and again
                self._gathered.clear()
            self._gathered[key] = list(_gather(members))
        return self._gathered[key]


def _one(lowered: Lowered, tensors: Tensors, compiled: Any) -> None:
    """The steps on one tensor."""
    flat = _flat(tensors) if compiled else None
    if flat is not None:
        run, numbers = compiled
        run(*flat, numbers)
        return
    for block in _blocks(tensors):
        quickly(lowered, block)


def _blocks(tensors: Tensors) -> Iterable[Tensors]:
    """Each tensor in blocks of the same entries; in one part where it can't be cut."""
    flat = _flat(tensors) if tensors[0].numel() > BLOCK else None
    return [tensors] if flat is None else zip(*[t.split(BLOCK) for t in flat], strict=True)


def _flat(tensors: Tensors) -> list[Tensor] | None:
    """The tensors as stretches of memory; None where their entries don't lie alike, each filling one."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if any(t.stride() != first.stride() for t in tensors) or not torch.ops.aten.is_non_overlapping_and_dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _by_rows(acts: Sequence[Act], w: Tensor, rows: int) -> list[Act] | None:
    """What does to some rows what the acts do to all; None where one takes more than rows."""
    found = [of_rows(act.what, tuple(w.shape), rows) for act in acts]
    return None if None in found else [replace(act, what=own) for act, own in zip(acts, found, strict=True)]


@dataclass
class _Gathered:
    """Buffers for small tensors: those of a stretch of the members."""

    span: slice
    buffers: Tensors
    views: list[list[Tensor]]  # of each buffer, in the members' shapes

    def fill(self, members: list[Tensors]) -> None:
        """Copy the members in."""
        for number, views in enumerate(self.views):
            torch._foreach_copy_(views, [tensors[number] for tensors in members[self.span]])

    def empty(self, members: list[Tensors], lowered: Lowered) -> None:
        """Copy what the steps have changed back."""
        changed = {int(isinstance(step, Gradient)) for step, _ in lowered}
        for number in changed:
            torch._foreach_copy_([tensors[number] for tensors in members[self.span]], self.views[number])


def _gather(members: list[Tensors]) -> Iterator[_Gathered]:
    """Buffers for stretches of the members that together have no more entries than a block."""
    ends, begin = list(accumulate(tensors[0].numel() for tensors in members)), 0
    common = [torch.empty(min(BLOCK, ends[-1]), dtype=t.dtype, device=t.device) for t in members[0]]
    while begin < len(members):
        before = ends[begin - 1] if begin else 0
        end = bisect_right(ends, before + BLOCK)
        shapes = [tensors[0].shape for tensors in members[begin:end]]
        buffers = tuple([t[: ends[end - 1] - before] for t in common])
        parts = [t.split([shape.numel() for shape in shapes]) for t in buffers]
        views = [[one.view(shape) for one, shape in zip(split, shapes, strict=True)] for split in parts]
        yield _Gathered(slice(begin, end), buffers, views)
        begin = end
