"""Sums over the processes of a distributed training, for penalties that are statistics of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """The sum of every process's tensor; its gradient is the number of processes times the own one.

    That is right where every process's loss holds the same value of that sum, and gradients are averaged over
    processes, as DDP does. Backward then needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()


def over_processes(own: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable once; the tensor itself where there is one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    return _Sum.apply(own)  # type: ignore[no-untyped-call, no-any-return]
