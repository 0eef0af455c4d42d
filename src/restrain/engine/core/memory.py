"""Memory of tensors: how entries lie in it, blocks that stay in the cache, and buffers that are kept.

Getting new memory from the system costs a CPU more than the computation does.
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


def in_blocks(tensors: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    """Each tensor in blocks of the same entries; in one part where it can't be cut."""
    whole = stretches(tensors) if tensors[0].numel() > BLOCK else None
    return [tensors] if whole is None else zip(*[t.split(BLOCK) for t in whole], strict=True)


def stretches(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors as stretches of memory; None where their entries don't lie alike, each filling one."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if any(t.stride() != first.stride() for t in tensors) or not dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]
