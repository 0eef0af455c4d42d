"""Sums over the processes of a distributed training, and means of gradients, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from restrain.errors import PenaltyError


def _summed(own: Tensor) -> Tensor:
    total = own.clone()
    dist.all_reduce(total)
    return total


# One operation to the compiler: inductor (torch 2.13) gives wrong sums where a graph holds several
# all-reduces of its own making.
_summed_opaquely = torch.library.custom_op("restrain::sum_over_processes", _summed, mutates_args=())
_summed_opaquely.register_fake(torch.empty_like)


class _Sum(torch.autograd.Function):
    """Sum of a tensor over n processes; backward multiplies the gradient by n.

    That is right if every process's loss holds the same function of the sum, and gradients are
    averaged over processes, as in DDP. Backward then needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _summed_opaquely(own) if torch.compiler.is_compiling() else _summed(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()


def several_processes() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_several(rows: int, everywhere: bool, penalty: object) -> None:
    """Check that a statistic has two samples, where that is seen without looking at a mask.

    Raises:
        PenaltyError: there is one, in all processes.
    """
    if rows == 1 and not (everywhere and several_processes()):
        raise PenaltyError(
            f"{penalty!r} is a statistic over samples, got a single sample: use batches of two or more (drop_last=True)"
        )


def over_processes(own: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, differentiable once."""
    if not several_processes():
        return own
    return _Sum.apply(own)  # type: ignore[no-untyped-call, no-any-return]


class _Averaged(torch.autograd.Function):
    """A tensor that is equal on all processes; backward averages its gradient over them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        mean = gradient / dist.get_world_size()
        dist.all_reduce(mean)
        return mean


def averaged_gradient(own: Tensor) -> Tensor:
    """Return a parameter whose gradient is the mean over processes, as DDP makes it for others."""
    if not several_processes():
        return own
    return _Averaged.apply(own)  # type: ignore[no-untyped-call, no-any-return]
