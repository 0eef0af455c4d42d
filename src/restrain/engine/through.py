"""A tensor on its way through a model, and the value of a penalty on it, by one autograd function.

So the penalty's gradient joins that of all that comes later where the two meet: in one pass that reads the tensor and
the incoming gradient, and writes the sum. The value has a graph of its own; it may be differentiated without what comes
later, and what comes later without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from restrain.engine.blocks import dense, flattened, fresh

_BLOCK = 1 << 18  # entries, whose gradients stay in the cache until they are added


class Job(Protocol):
    """A penalty that is a sum over entries; `_Job` of `inloss`."""

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Its value."""

    def gradients(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """factor · gradient for each tensor, each in memory of its own."""

    def differentiable(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """The same with a graph."""

    def by_formula(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """The same for factors that transform what is done with them."""


class Through(torch.autograd.Function):
    """`Through.apply(job, h, copy, fast)` is h (or a copy, where a later op overwrites it in place) and the value.

    `fast()` tells whether plain eager code runs.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, h: Tensor, copy: bool, fast: Callable[[], bool]) -> tuple[Tensor, Tensor]:
        ctx.job, ctx.fast = job, fast
        ctx.save_for_backward(h)
        ctx.set_materialize_grads(False)
        return h.clone() if copy else h.view_as(h), job.value((h,))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        if factor is None:  # the value isn't in what is differentiated
            return None, gradient, None, None
        (h,) = ctx.saved_tensors
        fast = ctx.fast() and not (batched(factor) or (gradient is not None and batched(gradient)))
        if gradient is not None and fast and not torch.is_grad_enabled() and _alike(h, gradient):
            return None, _added(ctx.job, h, factor, gradient), None, None
        (own,) = gradients(ctx.job, (h,), factor, fast)
        return None, own if gradient is None else gradient + own, None, None


def gradients(job: Job, tensors: Sequence[Tensor], factor: Tensor, fast: bool) -> Sequence[Tensor]:
    """factor · gradient for each tensor, in whatever way it is asked for."""
    if torch.is_grad_enabled():
        return job.differentiable(tensors, factor)
    return (job.gradients if fast else job.by_formula)(tensors, factor)


def batched(gradient: Tensor) -> bool:
    """Whether it is many, by autograd.grad(is_grads_batched=True)."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient))


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether entries that belong together stand at the same places in memory, without gaps."""
    if type(y) is not Tensor or y.layout != torch.strided or x.dtype != y.dtype or x.device != y.device:
        return False
    return (x.is_contiguous() and y.is_contiguous()) or (x.stride() == y.stride() and dense(x))


def _added(job: Job, x: Tensor, factor: Tensor, given: Tensor) -> Tensor:
    """given + factor · gradient, in new memory: who else holds what is given isn't known."""
    if x.numel() <= _BLOCK or not x.is_cpu:
        return job.gradients((x,), factor)[0].add_(given)
    out = fresh(x)
    for part, plus, o in zip(*(flattened(t).split(_BLOCK) for t in (x, given, out)), strict=True):
        torch.add(job.gradients((part,), factor)[0], plus, out=o)
    return out
