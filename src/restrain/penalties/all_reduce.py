"""Sums over the processes of a distributed training, for penalties of batch statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """Sum of a tensor over n processes; backward multiplies the gradient by n.

    That is right if every process's loss holds the same function of the sum, and gradients are
    averaged over processes, as in DDP. Backward then needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()


def several_processes() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def over_processes(own: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, differentiable once."""
    if not several_processes():
        return own
    return _Sum.apply(own)  # type: ignore[no-untyped-call, no-any-return]
