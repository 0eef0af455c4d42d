"""Tensors that get their entries back after a block, whatever happens in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Copy tensors, and write their entries back after the block."""
    kept = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, before in kept:
                t.copy_(before)
