"""Memory of tensors: layout, blocks that fit the cache, and reused buffers.

On a CPU, getting new memory from the system costs more than the computation.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 19  # entries


def dense(x: Tensor) -> bool:
    """True if the entries fill one contiguous range of memory, in any order (as channels_last)."""
    return torch.ops.aten.is_non_overlapping_and_dense(x)  # type: ignore[no-any-return]


def alike(tensors: Sequence[Tensor]) -> bool:
    """True if all tensors have the same dense memory layout (for tensors of one shape)."""
    first = tensors[0]
    return all(t.is_contiguous() for t in tensors) or (
        all(t.stride() == first.stride() for t in tensors) and dense(first)
    )


def simple(x: Tensor) -> bool:
    """True for float32 and float64, in which sums are precise enough."""
    return x.dtype in (torch.float32, torch.float64)


def flattened(x: Tensor) -> Tensor:
    """Return the entries in one dim, in memory order if x is dense; a view where possible."""
    return x.as_strided((x.numel(),), (1,)) if not x.is_contiguous() and dense(x) else x.reshape(-1)


def fresh(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same shape, with the same strides if x is dense."""
    known = x.is_contiguous() or dense(x)
    out = torch.empty_like(x) if known else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.nbytes >= _LARGE and out.is_cpu and type(out) is Tensor:
        _in_huge_pages(out)
    return out


_LARGE = 1 << 25  # bytes from which on malloc takes memory from the system and returns it each time


@functools.cache
def _madvise() -> Any:
    """Return the function madvise of Linux, or None."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def _in_huge_pages(t: Tensor) -> None:
    """Advise the system to use pages of 2 MiB for a new tensor; it may ignore that.

    Getting the memory in pages of 4 KiB takes four times as long.
    """
    page = 1 << 21
    start = -(-t.data_ptr() // page) * page
    length = (t.data_ptr() + t.nbytes - start) // page * page
    if (madvise := _madvise()) is not None and length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(14))  # MADV_HUGEPAGE


_PARTS = 64  # cached views of buffers


class Scratch(threading.local):
    """Buffers for intermediate results of a block, kept per thread and dtype on the CPU."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, int], Tensor] = {}
        self.parts: dict[tuple[torch.dtype, int, int], Tensor] = {}  # views of `held`, by size

    def like(self, x: Tensor, number: int = 0) -> Tensor:
        """Return a buffer of the size and dtype of the flat tensor x, with undefined entries.

        Buffers of different `number` don't overlap.
        """
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
                return held[:size]  # a tensor subclass made by a mode isn't kept
            self.held[x.dtype, number] = held
        if len(self.parts) == _PARTS:
            self.parts.clear()
        with torch.inference_mode(False):
            part = self.parts[x.dtype, number, size] = held.detach()[:size]
        return part


scratch = Scratch()


def in_blocks(tensors: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    """Return matching blocks of the tensors; whole tensors if small or without common layout."""
    whole = stretches(tensors) if tensors[0].numel() > BLOCK else None
    return [tensors] if whole is None else zip(*[t.split(BLOCK) for t in whole], strict=True)


def stretches(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return flat views of the tensors in memory order; None without a common dense layout."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if any(t.stride() != first.stride() for t in tensors) or not dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]
