"""Which acts on which tensors go through loops of C: those of many rules and tensors together, in few calls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from restrain.engine.backends import compiler
from restrain.engine.backends.statements import body, changed_by, numbers_of, stages
from restrain.engine.core import alike
from restrain.engine.ops import Lot, Lowered, Step, Tensors, length_in, rows_of

LONG = 1 << 18  # entries of a row; longer ones go otherwise, as a row belongs to one thread
TENSOR = 1 << 12  # what a tensor costs without a loop of C, in entries


@dataclass(frozen=True)
class Call:
    """What one loop does, and to which members."""

    kinds: tuple[torch.dtype, ...]
    text: Any  # statements on entries, or on rows
    changed: tuple[int, ...]
    lots: list[tuple[Lot, Lowered]] = field(default_factory=list)
    members: list[Tensors] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of rows; none for entries

    def work(self) -> int:
        """Entries, and what tensors cost beside them."""
        return sum(tensors[0].numel() for tensors in self.members) + TENSOR * len(self.members)

    def run(self) -> bool:
        """Do it, if it can be compiled."""
        make = compiler.loop if isinstance(self.text, str) else compiler.rows
        loop = make(self.kinds, self.text, len(self.numbers) // len(self.members), self.changed)
        if loop is not None:
            loop(self.members, self.numbers, self.lengths)
        return loop is not None


class Calls:
    """What loops of C are to do around one step."""

    def __init__(self) -> None:
        self._calls: dict[Any, Call] = {}

    def __iter__(self) -> Any:
        return iter(self._calls.values())

    def take(self, lot: Lot, lowered: Lowered) -> Sequence[Tensors]:
        """Take the members that a loop can take; gives the others, but for those without entries."""
        first = lot.members[0]
        kinds = tuple([t.dtype for t in first])
        if not first[0].is_cpu or not all(kind in compiler.TYPES for kind in kinds):
            return lot.members
        text: Any = _text(lowered, lot.by_entry)
        rounds = not lot.by_entry and kinds[0].itemsize < 4 and text is not None and len(text) > 1  # between stages
        if text is None or rounds:
            return lot.members
        keep = None if lot.by_entry else rows_of(lot.acts, first[0])
        fit, left, lengths = lot.members, list[Tensors](), _lengths(lot.members, keep)
        if lengths is None:
            found = [(tensors, _length(tensors, keep)) for tensors in lot.members]
            fit = [tensors for tensors, length in found if length is not None]
            left = [tensors for tensors, length in found if length is None and tensors[0].numel()]
            lengths = [length for _, length in found if length is not None]
        if fit:
            self._add(kinds, text, Lot(lot.acts, lot.given, fit), lowered, lengths)
        return left

    def _add(self, kinds: tuple[torch.dtype, ...], text: Any, lot: Lot, lowered: Lowered, lengths: list[int]) -> None:
        key = (kinds, text, changed := changed_by(lowered))
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = Call(kinds, text, changed)
        call.lots.append((lot, lowered))
        call.members.extend(lot.members)
        call.numbers.extend(numbers_of(lowered) * len(lot.members))
        call.lengths.extend(lengths)


def _text(lowered: Lowered, by_entry: bool) -> Any:
    """The statements, which are the same for steps that are equal."""
    try:
        return _written(tuple([(step, len(own)) for step, own in lowered]), by_entry)
    except TypeError:  # a setting that can't be hashed
        return None


@functools.lru_cache(256)
def _written(steps: tuple[tuple[Step, int], ...], by_entry: bool) -> Any:
    lowered = [(step, (0.0,) * count) for step, count in steps]
    if not by_entry:
        return stages(lowered)
    found = body(lowered)
    return None if found is None else found[0]


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory of tensors is what they say."""
    return set(map(type, tensors)) <= {Tensor, Parameter} and not any(map(Tensor.is_neg, tensors))


def _lengths(members: Sequence[Tensors], keep: tuple[int, ...] | None) -> list[int] | None:
    """What `_length` says of each, where all are contiguous and have entries, as is the rule; else None."""
    every = list(chain.from_iterable(members))
    first, *others = [list(map(Tensor.numel, role)) for role in zip(*members, strict=True)]
    simple = _plain(every) and all(map(Tensor.is_contiguous, every)) and min(first) > 0
    if not simple or keep not in (None, (), (0,)) or any(sizes != first for sizes in others):
        return None
    if keep is None:
        return [0] * len(first)
    found = [size // len(tensors[0]) for size, tensors in zip(first, members, strict=True)] if keep else first
    return found if max(found) <= LONG else None


def _length(tensors: Tensors, keep: tuple[int, ...] | None) -> int | None:
    """The length of a member's rows, 0 where entries are for themselves; None if these or the rows don't lie flat."""
    first = tensors[0]
    if not (_plain(tensors) and first.numel() and all(t.numel() == first.numel() for t in tensors)):
        return None
    if keep is not None:
        length = length_in(tensors, keep)
        return None if length is None or length > LONG else length
    return 0 if alike(tensors) else None
