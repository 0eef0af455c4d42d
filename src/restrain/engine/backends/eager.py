"""Backend of plain torch, by operations that write into existing memory.

At the step, small tensors are gathered in one buffer, changed there together, and copied back.
Large tensors are processed in blocks that stay in the cache with all intermediate results: blocks
of entries, or of rows if groups are rows. Values and gradients of sums use the same blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends.backend import Backend, Decider, Parts, Sums
from restrain.engine.core import BLOCK, flattened, in_blocks, scratch, simple
from restrain.engine.ops import Batch, Gradient, Lowered, Tensors, as_rows, carry_out, lengths, rows_of
from restrain.operations import Absolute, Huber, Length, Logarithm, Operation, Square
from restrain.penalties.base import times
from restrain.penalties.shrink import at_least_float32
from restrain.torch_private import flatten, foreach_copy_, foreach_mul, unflatten

SMALL = 1 << 13  # entries up to which a tensor is gathered with others
FORMULA_BLOCK = 1 << 16  # entries per block, for formulas that allocate temporaries

Kernel = Callable[[Sequence[Tensor], int], bool]
"""Carry out instructions on a member's tensors, as rows of a nonzero length; False: impossible."""


class Eager(Backend):
    """Instructions and operations as torch operations."""

    def __init__(self) -> None:
        self._layouts: dict[Any, _Layout] = {}

    def sums(self, parts: Parts, like: Tensor) -> Sums | None:
        pieces = _pieces(parts, like)
        return None if pieces is None else _Sums(pieces)

    def carry_out(self, batches: Sequence[Batch], decider: Decider) -> list[Batch]:
        left = []
        for batch in batches:
            if batch.lowered is None:
                left.append(batch)
                continue
            if not batch.lowered:  # nothing to do
                continue
            others, by_length = ([], {0: [(one, one) for one in batch.members]}) if batch.by_entry else _rows(batch)
            for length, pairs in by_length.items():
                flat = [rows for _, rows in pairs]
                kernel = self._kernel(batch.lowered, flat, length, decider) if flat else None
                if kernel is not None:
                    self._stretches(batch.lowered, flat, length, kernel)
                else:
                    others += [tensors for tensors, _ in pairs]
            if others:
                left.append(batch.of(others))
        return left

    def _kernel(self, lowered: Lowered, members: Sequence[Tensors], length: int, decider: Decider) -> Kernel | None:
        """Return a kernel of instructions for tensors like these; None: for the next backend."""

        def run(tensors: Sequence[Tensor], length: int) -> bool:
            rows = [t.view(-1, length) for t in tensors] if length else None
            count = max(BLOCK // length, 1) if length else 0
            blocks = in_blocks(tensors) if rows is None else zip(*[t.split(count) for t in rows], strict=True)
            for block in blocks:
                carry_out(lowered, block)
            return True

        return run

    def _stretches(self, lowered: Lowered, members: Sequence[Tensors], length: int, kernel: Kernel) -> None:
        """Run a kernel on each large tensor, and on buffers of gathered small tensors."""
        kinds = tuple([(t.dtype, t.device) for t in members[0]])
        key = (kinds, tuple([tensors[0].shape for tensors in members]))
        if key not in self._layouts:
            if len(self._layouts) > 32:  # sets of tensors keep changing
                self._layouts.clear()
            self._layouts[key] = _layout(members)
        for number in self._layouts[key].alone:
            kernel(members[number], length)
        for gathered in self._layouts[key].gathered:
            gathered.fill(members)
            kernel(gathered.buffers, length)
            gathered.empty(members, lowered)


def repeated(batch: Batch) -> Callable[[Lowered], None] | None:
    """Return the changes of a batch as a function of their instructions; None unless by entry."""
    if not batch.by_entry or batch.lowered is None:
        return None
    members, layout = batch.members, _layout(batch.members)

    def run(lowered: Lowered) -> None:
        for number in layout.alone:
            for block in in_blocks(members[number]):
                carry_out(lowered, block)
        for gathered in layout.gathered:
            gathered.fill(members)
            carry_out(lowered, gathered.buffers)
            gathered.empty(members, lowered)

    return run


def _rows(batch: Batch) -> tuple[list[Tensors], dict[int, list[tuple[Tensors, Tensors]]]]:
    """Return the members that aren't rows in memory; the others, by row length, with rows."""
    keep = rows_of(batch.changes, batch.members[0][0])
    others, found = list[Tensors](), dict[int, list[tuple[Tensors, Tensors]]]()
    for tensors in batch.members:
        rows = None if keep is None else as_rows(tensors, keep)
        if rows is None:
            others.append(tensors)
        else:
            found.setdefault(rows[0].shape[1], []).append((tensors, rows))
    return others, found


@dataclass(frozen=True)
class _Gathered:
    """Buffers for some of the small members."""

    numbers: list[int]
    buffers: Tensors
    views: list[list[Tensor]]  # of each buffer, with the members' shapes

    def fill(self, members: Sequence[Tensors]) -> None:
        """Copy the members into the buffers."""
        for role, views in enumerate(self.views):
            foreach_copy_(views, [members[number][role] for number in self.numbers])

    def empty(self, members: Sequence[Tensors], lowered: Lowered) -> None:
        """Copy back the tensors that the instructions have changed."""
        for role in {int(isinstance(step, Gradient)) for step, _ in lowered}:
            foreach_copy_([members[number][role] for number in self.numbers], self.views[role])


@dataclass(frozen=True)
class _Layout:
    """Indices of members processed alone, and buffers for the others."""

    alone: list[int]
    gathered: list[_Gathered]


def _layout(members: Sequence[Tensors]) -> _Layout:
    sizes = [tensors[0].numel() for tensors in members]
    small = [number for number, size in enumerate(sizes) if 0 < size <= SMALL]
    alone = [number for number, size in enumerate(sizes) if size > SMALL or (size and len(small) == 1)]
    return _Layout(alone, list(_gather(members, small)) if len(small) > 1 else [])


def _gather(members: Sequence[Tensors], small: Sequence[int]) -> Iterator[_Gathered]:
    """Yield buffers for runs of small members, each with at most `BLOCK` entries."""
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


# Values and gradients


@dataclass
class _Piece:
    """An operation on a flat tensor or a block of it, without temporaries."""

    strength: Any
    width = 1  # block sizes are multiples of this: the size of a group
    block = BLOCK

    def value(self, x: Tensor) -> Tensor:
        """Return the value, without the strength."""
        raise NotImplementedError

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        """Write factor · gradient into `out`, without the strength."""
        raise NotImplementedError


class _Absolute(_Piece):
    def value(self, x: Tensor) -> Tensor:
        return torch.abs(x, out=scratch.like(x)).sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.sgn(x, out=out).mul_(factor)


class _Squares(_Piece):
    def value(self, x: Tensor) -> Tensor:
        return torch.mul(x, x, out=scratch.like(x)).sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.mul(x, 2 * factor, out=out)


@dataclass
class _Huber(_Piece):
    """Σ c (|x| - c / 2), c = min(|x|, delta)."""

    delta: float

    def value(self, x: Tensor) -> Tensor:
        size = torch.abs(x, out=scratch.like(x))
        cut = torch.clamp(size, max=self.delta, out=scratch.like(x, 1))
        return size.add_(cut, alpha=-0.5).mul_(cut).sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.clamp(x, -self.delta, self.delta, out=out).mul_(factor)


@dataclass
class _Logarithms(_Piece):
    """Σ log(1 + |x| / epsilon)."""

    epsilon: float

    def value(self, x: Tensor) -> Tensor:
        return torch.abs(x, out=scratch.like(x)).div_(self.epsilon).log1p_().sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        size = torch.abs(x, out=scratch.like(x)).add_(self.epsilon)
        torch.sgn(x, out=out).div_(size).mul_(factor)


@dataclass
class _Lengths(_Piece):
    """√width Σ‖row‖₂ over rows of `width` entries."""

    width: int

    def value(self, x: Tensor) -> Tensor:
        total: Tensor = lengths(x.view(-1, self.width)).sum() * self.width**0.5
        return total

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        rows = x.view(-1, self.width)
        norms = lengths(rows)
        torch.div(rows, norms.masked_fill_(norms == 0, 1), out=out.view(-1, self.width))
        out.mul_(factor * self.width**0.5)


@dataclass
class _Entries(_Piece):
    """Any other operation, and any other dtype."""

    operation: Any
    block = FORMULA_BLOCK

    def value(self, x: Tensor) -> Tensor:
        return self.operation.total(at_least_float32(x))  # type: ignore[no-any-return]

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.mul(self.operation.slope(at_least_float32(x)), factor, out=out)


_PIECES: dict[type[Operation], Callable[[Any, Any], _Piece]] = {
    Absolute: lambda strength, one: _Absolute(strength),
    Square: lambda strength, one: _Squares(strength),
    Huber: lambda strength, one: _Huber(strength, one.delta),
    Logarithm: lambda strength, one: _Logarithms(strength, one.epsilon),
}


def _pieces(parts: Parts, like: Tensor) -> list[_Piece] | None:
    """Return the pieces of a sum of penalties on tensors like this one; None if not declared."""
    pieces: list[_Piece] = []
    for strength, leaf in parts:
        if leaf.operations is None:
            return None
        for factor, one in leaf.operations:
            whole = strength if factor == 1 else strength * factor
            if isinstance(one, Length):
                pieces.append(_Lengths(whole, like.numel() // max(like.shape[0], 1)))
            elif type(one) in _PIECES and simple(like):
                pieces += [_PIECES[type(one)](whole, one)] * bool(factor)
            else:
                pieces.append(_Entries(whole, one))
    return pieces or [_Squares(0.0)]  # all factors are zero


class _Sums(Sums):
    """Sums by torch operations on concatenated tensors, or on blocks of large ones."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        self._block = min([piece.block for piece in pieces])

    def value(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        if len(set(weights)) == 1:
            value = self._of(_joined(tensors))
            return value if weights[0] == 1 else value * weights[0]
        return torch.stack([self._of(flattened(x)) * weight for x, weight in zip(tensors, weights, strict=True)]).sum()

    def _of(self, flat: Tensor) -> Tensor:
        parts = self._cut(flat)
        if len(parts) == 1:
            sums = [piece.value(flat) for piece in self._pieces]
        else:  # all pieces of a block while it is in the cache
            found = [[piece.value(part) for piece in self._pieces] for part in parts]
            sums = [torch.stack(of_parts).sum() for of_parts in zip(*found, strict=True)]
        total, *others = [times(piece.strength, value) for piece, value in zip(self._pieces, sums, strict=True)]
        for other in others:
            total = total + other
        return total

    def _cut(self, flat: Tensor) -> Sequence[Tensor]:
        """Return blocks of a flat tensor that fit the processor's cache; the whole on a GPU."""
        if flat.numel() <= self._block or flat.device.type != "cpu":
            return (flat,)
        width = max([piece.width for piece in self._pieces])
        parts: Sequence[Tensor] = flat.split(max(self._block // width, 1) * width)
        return parts

    def gradients(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        factor: Tensor,
        into: Sequence[Tensor],
        *,
        add: bool = False,
    ) -> None:
        assert not add
        if len(tensors) == 1:
            self._put(flattened(tensors[0]), factor if weights[0] == 1 else factor * weights[0], flattened(into[0]))
            return
        flat = _joined(tensors)
        out = torch.empty_like(flat)
        same = len(set(weights)) == 1
        self._put(flat, factor * weights[0] if same and weights[0] != 1 else factor, out)
        found = unflatten(out, tensors)
        foreach_copy_(list(into), found if same else foreach_mul(found, weights))

    def _put(self, flat: Tensor, factor: Tensor, out: Tensor) -> None:
        factors = [times(piece.strength, factor) for piece in self._pieces]
        for x, o in zip(self._cut(flat), self._cut(out), strict=True):
            self._pieces[0].gradient(x, factors[0], o)
            for piece, own in zip(self._pieces[1:], factors[1:], strict=True):
                more = scratch.like(x, 2)
                piece.gradient(x, own, more)
                o.add_(more)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return flattened(tensors[0])
    return flatten(tensors)
