"""Entrywise penalties and lengths of rows, computed in blocks that stay in the cache, with no tensors made on the way.

Each works on a flat tensor, or on any block of it, by ops that write into memory that is there already: getting new
memory from the system costs a CPU more than the computation does.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from restrain.penalties import GroupLasso, Huber, LogSum, Penalty
from restrain.penalties.shrink import at_least_float32

BLOCK = 1 << 19  # entries
FORMULA_BLOCK = 1 << 16  # entries, for formulas that make tensors on their way

Parts: TypeAlias = list[tuple[Any, Penalty]]
"""The penalties that one is a sum of, each with its strength, a number or a tensor."""


def dense(x: Tensor) -> bool:
    """Whether the entries fill one stretch of memory, in whatever order (channels_last does)."""
    return torch.ops.aten.is_non_overlapping_and_dense(x)  # type: ignore[no-any-return]


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether entries of the same place lie alike in the memory of all, without gaps."""
    first = tensors[0]
    return all(t.is_contiguous() for t in tensors) or (
        all(t.stride() == first.stride() for t in tensors) and dense(first)
    )


def simple(x: Tensor) -> bool:
    """Whether it is real, and precise enough to be computed with."""
    return x.dtype in (torch.float32, torch.float64)


def flattened(x: Tensor) -> Tensor:
    """Its entries in one dim, in whatever order; in its own memory if they fill one stretch of it."""
    return x.as_strided((x.numel(),), (1,)) if not x.is_contiguous() and dense(x) else x.reshape(-1)


def fresh(x: Tensor) -> Tensor:
    """A tensor of the same shape, and of the same strides if entries fill a stretch of memory."""
    known = x.is_contiguous() or dense(x)
    out = torch.empty_like(x) if known else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.nbytes >= _LARGE and out.is_cpu and type(out) is Tensor:
        _in_huge_pages(out)
    return out


_LARGE = 1 << 25  # bytes; from here on malloc takes memory from the system, and gives it back, each time


@functools.cache
def _madvise() -> Any:
    """The system's function, where there is one."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def _in_huge_pages(t: Tensor) -> None:
    """Ask the system for pages of 2 MiB for the memory of a new tensor: 4 KiB each are four times as slow to get.

    It is advice: where it isn't taken, nothing changes.
    """
    page = 1 << 21
    start = -(-t.data_ptr() // page) * page
    length = (t.data_ptr() + t.nbytes - start) // page * page
    if (madvise := _madvise()) is not None and length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(14))  # MADV_HUGEPAGE


_PARTS = 64  # of the memory for blocks that are remembered


class Scratch(threading.local):
    """Memory for what is computed of a block.

    A CPU's is kept, of each thread and dtype: memory that is new costs more than the computation does.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, int], Tensor] = {}
        self.parts: dict[tuple[torch.dtype, int, int], Tensor] = {}  # of these, as were wanted before

    def like(self, x: Tensor, number: int = 0) -> Tensor:
        """A tensor of the size of a flat one, with anything in it; one of each number."""
        if not x.is_cpu or x.numel() > BLOCK:
            return torch.empty_like(x)
        size = x.numel()
        part = self.parts.get((x.dtype, number, size))
        return self._part(x, number, size) if part is None else part

    def _part(self, x: Tensor, number: int, size: int) -> Tensor:
        held = self.held.get((x.dtype, number))
        if held is None:
            with torch.inference_mode(False):
                held = torch.empty(BLOCK, dtype=x.dtype, device=x.device)
            if type(held) is not Tensor:
                return held[:size]  # what a mode makes of it
            self.held[x.dtype, number] = held
        if len(self.parts) == _PARTS:
            self.parts.clear()
        with torch.inference_mode(False):
            part = self.parts[x.dtype, number, size] = held.detach()[:size]
        return part


scratch = Scratch()


@dataclass
class Piece:
    """A part of a penalty on a flat tensor, or on any block of it."""

    strength: Any
    width = 1  # blocks are of whole groups of so many entries
    block = BLOCK

    def value(self, x: Tensor) -> Tensor:
        """Without the strength."""
        raise NotImplementedError

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        """out = factor · gradient."""
        raise NotImplementedError


class _Absolute(Piece):
    def value(self, x: Tensor) -> Tensor:
        return torch.abs(x, out=scratch.like(x)).sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.sgn(x, out=out).mul_(factor)


class _Squares(Piece):
    def value(self, x: Tensor) -> Tensor:
        return torch.mul(x, x, out=scratch.like(x)).sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.mul(x, 2 * factor, out=out)


@dataclass
class _Huber(Piece):
    """Σ c (|x| - c / 2), where c is |x| cut at delta."""

    delta: float

    def value(self, x: Tensor) -> Tensor:
        size = torch.abs(x, out=scratch.like(x))
        cut = torch.clamp(size, max=self.delta, out=scratch.like(x, 1))
        return size.add_(cut, alpha=-0.5).mul_(cut).sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.clamp(x, -self.delta, self.delta, out=out).mul_(factor)


@dataclass
class _Logarithms(Piece):
    """Σ log(1 + |x| / epsilon)."""

    epsilon: float

    def value(self, x: Tensor) -> Tensor:
        return torch.abs(x, out=scratch.like(x)).div_(self.epsilon).log1p_().sum()

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        size = torch.abs(x, out=scratch.like(x)).add_(self.epsilon)
        torch.sgn(x, out=out).div_(size).mul_(factor)


@dataclass
class _Lengths(Piece):
    """√width Σ‖row‖, of the tensor's rows."""

    width: int

    def _norms(self, x: Tensor) -> Tensor:
        squares = torch.mul(x, x, out=scratch.like(x))
        return squares.view(-1, self.width).sum(1, keepdim=True).sqrt_()

    def value(self, x: Tensor) -> Tensor:
        length: Tensor = self._norms(x).sum() * self.width**0.5
        return length

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        norms = self._norms(x)
        scale = (factor * self.width**0.5) / norms.masked_fill_(norms == 0, torch.inf)
        torch.mul(x.view(-1, self.width), scale, out=out.view(-1, self.width))


@dataclass
class _Entries(Piece):
    """Any other function of each entry, and any other dtype."""

    leaf: Any
    block = FORMULA_BLOCK

    def value(self, x: Tensor) -> Tensor:
        return self.leaf.entries(at_least_float32(x)).sum()  # type: ignore[no-any-return]

    def gradient(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        torch.mul(self.leaf.slopes(at_least_float32(x)), factor, out=out)


def pieces_of(parts: Parts, x: Tensor) -> list[Piece]:
    """What computes these parts on tensors like this one."""
    pieces: list[Piece] = []
    for strength, leaf in parts:
        if isinstance(leaf, GroupLasso):
            pieces.append(_Lengths(strength, x.numel() // x.shape[0]))
        elif isinstance(leaf, Huber) and simple(x):
            pieces.append(_Huber(strength, leaf.delta))
        elif isinstance(leaf, LogSum) and simple(x):
            pieces.append(_Logarithms(strength, leaf.epsilon))
        elif leaf.elastic is None or not any(leaf.elastic) or not simple(x):
            pieces.append(_Entries(strength, leaf))
        else:
            one, two = leaf.elastic
            pieces += [_Absolute(strength * one)] * bool(one) + [_Squares(strength * two)] * bool(two)
    return pieces
