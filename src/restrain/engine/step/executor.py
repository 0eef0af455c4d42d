"""How acts are carried out on many tensors, by the way that is fastest for each.

* On a CPU with a C compiler, a loop of C goes over all entries or rows of all tensors, once as many steps are taken as
  make up for compiling it (`loops`). Everything else, and what comes before, is done as follows.
* Small tensors are copied into one buffer, in which the act is done to all at once, and back.
* Large ones are gone through in blocks that stay in the cache with all that is computed of them: of entries where each
  is for itself, of rows where groups are of rows.
* Or a kernel of inductor takes a whole tensor, where there is a compiler and as many steps are taken as make it pay.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from restrain.engine.backends import Calls, compiles, kernel, packed
from restrain.engine.core import dense
from restrain.engine.distributed import of_rows
from restrain.engine.ops import Act, Gradient, Lot, Lowered, Tensors, as_rows, lower, quickly, rows_of, slowly
from restrain.errors import RestrainWarning
from restrain.torch_private import foreach_copy_

BLOCK = 1 << 19  # entries
SMALL = 1 << 13  # entries of a tensor that is copied beside others
WORTH_C = 10**9  # entries × steps: when a loop of C makes up for compiling it (0.1 s, and 100 ps are saved an entry)
WORTH = 2 * 10**10  # entries × steps: an estimate of when a kernel of inductor makes up for the seconds that it takes

_dtype = attrgetter("dtype")

Compile: TypeAlias = "bool | Literal['auto']"


class Passes:
    """Carries out acts; keeps buffers from step to step."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile
        self._sizes: dict[Any, _Sizes] = {}
        self._said = False

    def __call__(self, lots: Iterable[Lot], steps: int = 0) -> None:
        """Do the acts in place to the first of each member's tensors, or to its gradient.

        Args:
            lots: of different members.
            steps: how many have been done like it.
        """
        calls = Calls()
        for lot in lots:
            for members in _alike(lot.members):
                self._take(calls, Lot(lot.acts, lot.given, members), steps)
        for call in calls:
            if (self.compile is not True and steps * call.work() < WORTH_C) or not call.run():
                for lot, lowered in call.lots:
                    self._lowered(lot, lowered, steps)

    def _take(self, calls: Calls, lot: Lot, steps: int) -> None:
        """Do what a loop of C can't do, and keep the rest for one."""
        lowered = lower(lot.acts, lot.given, lot.members[0][0])
        if lowered is None:
            for tensors in lot.members:
                self._slowly(lot, tensors, steps)
        elif lowered:
            left = lot.members if self.compile is False else calls.take(lot, lowered)
            self._lowered(Lot(lot.acts, lot.given, left), lowered, steps)

    def _lowered(self, lot: Lot, lowered: Lowered, steps: int) -> None:
        """What was lowered, without loops of C."""
        if lot.members and lot.by_entry:
            self._quickly(lowered, lot.members, steps)
        elif lot.members:
            self._on_rows(lot, lowered, steps)

    def _quickly(self, lowered: Lowered, members: Sequence[Tensors], steps: int, length: int = 0) -> None:
        """What was lowered for entries, or for rows of a length."""
        sizes = self._of_sizes(members)
        compiled = None
        if not length or compiles(lowered):
            compiled = self._compiled(lowered, members[0], steps * sizes.entries)
        for number in sizes.alone:
            _one(lowered, members[number], compiled, length)
        for gathered in sizes.gathered:
            gathered.fill(members)
            _one(lowered, gathered.buffers, compiled, length)
            gathered.empty(members, lowered)

    def _on_rows(self, lot: Lot, lowered: Lowered, steps: int) -> None:
        """What was lowered for rows, to members whose memory is rows, those of one length at once."""
        keep, fit = rows_of(lot.acts, lot.members[0][0]), dict[int, list[Tensors]]()
        for tensors in lot.members:
            rows = None if keep is None else as_rows(tensors, keep)
            if rows is None:
                self._slowly(lot, tensors, steps)
            else:
                fit.setdefault(rows[0].shape[1], []).append(rows)
        for length, alike in fit.items():
            self._quickly(lowered, alike, steps, length)

    def _of_sizes(self, members: Sequence[Tensors]) -> _Sizes:
        kinds = tuple([(t.dtype, t.device) for t in members[0]])
        key = (kinds, tuple([tensors[0].shape for tensors in members]))
        if key not in self._sizes:
            if len(self._sizes) > 32:  # of sets of tensors that have changed again and again
                self._sizes.clear()
            self._sizes[key] = _sizes(members)
        return self._sizes[key]

    def _compiled(self, lowered: Lowered, like: Tensors, done: int) -> Any:
        """The kernel and its numbers, if it is time for one and it can be had."""
        if self.compile is False or (self.compile == "auto" and done < WORTH):
            return None
        run = kernel(lowered, like)
        if run is None and self.compile is True and not self._said:
            self._said = True
            warnings.warn(
                "compile=True, but rules at the optimizer's step can't be compiled here (is there a C++ compiler?): "
                "they are done without, with the same result",
                RestrainWarning,
                stacklevel=2,
            )
        return None if run is None else (run, packed(lowered, like[0]))

    def _slowly(self, lot: Lot, tensors: Tensors, steps: int) -> None:
        w, acts, given = tensors[0], lot.acts, lot.given
        if not w.numel():
            return
        if lot.by_entry:
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
            self([Lot((act,), given, [tensors])], steps)


def _alike(members: Sequence[Tensors]) -> Iterable[Sequence[Tensors]]:
    """The members by dtypes and device."""
    every = list(chain.from_iterable(members))
    if len(set(map(_dtype, every))) == 1 and len(set(map(Tensor.get_device, every))) == 1:
        return [members]
    alike: dict[Any, list[Tensors]] = {}
    for tensors in members:
        alike.setdefault(tuple([(t.dtype, t.device) for t in tensors]), []).append(tensors)
    return alike.values()


def _one(lowered: Lowered, tensors: Tensors, compiled: Any, length: int = 0) -> None:
    """The steps on one tensor; of rows, if they have a length."""
    rows = tuple([t.view(-1, length) for t in tensors]) if length else None
    whole = (rows or _flat(tensors)) if compiled else None
    if whole is not None:
        run, numbers = compiled
        run(*whole, numbers)
        return
    count = max(BLOCK // length, 1) if length else 0
    blocks = _blocks(tensors) if rows is None else zip(*[t.split(count) for t in rows], strict=True)
    for block in blocks:
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
    if any(t.stride() != first.stride() for t in tensors) or not dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _by_rows(acts: Sequence[Act], w: Tensor, rows: int) -> list[Act] | None:
    """What does to some rows what the acts do to all; None where one takes more than rows."""
    found = [of_rows(act.what, tuple(w.shape), rows) for act in acts]
    return None if None in found else [replace(act, what=own) for act, own in zip(acts, found, strict=True)]


@dataclass(frozen=True)
class _Gathered:
    """Buffers for some of the members, all of them small."""

    numbers: list[int]
    buffers: Tensors
    views: list[list[Tensor]]  # of each buffer, in the members' shapes

    def fill(self, members: Sequence[Tensors]) -> None:
        """Copy the members in."""
        for role, views in enumerate(self.views):
            foreach_copy_(views, [members[number][role] for number in self.numbers])

    def empty(self, members: Sequence[Tensors], lowered: Lowered) -> None:
        """Copy what the steps have changed back."""
        for role in {int(isinstance(step, Gradient)) for step, _ in lowered}:
            foreach_copy_([members[number][role] for number in self.numbers], self.views[role])


@dataclass(frozen=True)
class _Sizes:
    """Which of the members go alone, and which are gathered."""

    entries: int
    alone: list[int]
    gathered: list[_Gathered]


def _sizes(members: Sequence[Tensors]) -> _Sizes:
    sizes = [tensors[0].numel() for tensors in members]
    small = [number for number, size in enumerate(sizes) if 0 < size <= SMALL]
    alone = [number for number, size in enumerate(sizes) if size > SMALL or (size and len(small) == 1)]
    return _Sizes(sum(sizes), alone, list(_gather(members, small)) if len(small) > 1 else [])


def _gather(members: Sequence[Tensors], small: Sequence[int]) -> Iterator[_Gathered]:
    """Buffers for stretches of the small ones that together have no more entries than a block."""
    ends, begin = list(accumulate(members[number][0].numel() for number in small)), 0
    common = [torch.empty(min(BLOCK, ends[-1]), dtype=t.dtype, device=t.device) for t in members[0]]
    while begin < len(small):
        before = ends[begin - 1] if begin else 0
        end = bisect_right(ends, before + BLOCK)
        shapes = [members[number][0].shape for number in small[begin:end]]
        buffers = tuple([t[: ends[end - 1] - before] for t in common])
        parts = [t.split([shape.numel() for shape in shapes]) for t in buffers]
        views = [[one.view(shape) for one, shape in zip(split, shapes, strict=True)] for split in parts]
        yield _Gathered(list(small[begin:end]), buffers, views)
        begin = end
