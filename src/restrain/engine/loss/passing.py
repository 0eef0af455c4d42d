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

from restrain.engine.core import alike, flattened, fresh, scratch
from restrain.penalties.shrink import at_least_float32
from restrain.torch_private import batched

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
        if (
            gradient is not None
            and fast
            and not torch.is_grad_enabled()
            and h.dtype == gradient.dtype
            and _joins(h, gradient)
        ):
            return None, _added(ctx.job, h, factor, gradient), None, None
        (own,) = gradients(ctx.job, (h,), factor, fast)
        return None, own if gradient is None else gradient + own, None, None


class Absolute(torch.autograd.Function):
    """Σ|x|, for which the signs are kept, a byte each; so a later op may overwrite x in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return at_least_float32(x).abs().sum(), x.sgn().to(torch.int8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, factor: Tensor, nothing: Any) -> Tensor:
        (signs,) = ctx.saved_tensors
        gradient: Tensor = (signs.to(factor.dtype) * factor).to(ctx.dtype)
        return gradient


class AbsoluteThrough(torch.autograd.Function):
    """x itself on its way, which a later op will overwrite in place, and Σ|x|; as `Through`, but the signs are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fast: Callable[[], bool]) -> tuple[Tensor, Tensor]:
        ctx.fast = fast
        signs = torch.empty_like(x, dtype=torch.int8)
        sums = [_signs(*pair) for pair in zip(_blocks(x), _blocks(signs), strict=True)]
        ctx.save_for_backward(signs)
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        return x, sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        if factor is None:
            return gradient, None
        (signs,) = ctx.saved_tensors
        fast = not torch.is_grad_enabled() and ctx.fast() and signs.is_cpu and not batched(factor)
        if gradient is None or not (fast and not batched(gradient) and _joins(signs, gradient)):
            own = signs.to(factor.dtype) * factor
            return own if gradient is None else gradient + own, None
        out, number = fresh(gradient), factor.item()
        for part, plus, o in zip(_blocks(signs), _blocks(gradient), _blocks(out), strict=True):
            torch.add(plus, scratch.like(plus).copy_(part), alpha=number, out=o)
        return out, None


def _signs(x: Tensor, signs: Tensor) -> Tensor:
    """Σ|x| of a block, whose signs are written."""
    signs.copy_(torch.sgn(x, out=scratch.like(x)))
    return torch.abs(x, out=scratch.like(x)).sum()


def _blocks(x: Tensor) -> Sequence[Tensor]:
    blocks: Sequence[Tensor] = flattened(x).split(_BLOCK)
    return blocks


def gradients(job: Job, tensors: Sequence[Tensor], factor: Tensor, fast: bool) -> Sequence[Tensor]:
    """factor · gradient for each tensor, in whatever way it is asked for."""
    if torch.is_grad_enabled():
        return job.differentiable(tensors, factor)
    return (job.gradients if fast else job.by_formula)(tensors, factor)


def _joins(x: Tensor, y: Tensor) -> bool:
    """Whether y is a plain tensor, with its entries in memory as those of x are."""
    if type(y) is not Tensor or y.layout != torch.strided or x.device != y.device:
        return False
    return alike((x, y))


def _added(job: Job, x: Tensor, factor: Tensor, given: Tensor) -> Tensor:
    """given + factor · gradient, in new memory: who else holds what is given isn't known."""
    if x.numel() <= _BLOCK or not x.is_cpu:
        return job.gradients((x,), factor)[0].add_(given)
    out = fresh(x)
    for part, plus, o in zip(_blocks(x), _blocks(given), _blocks(out), strict=True):
        torch.add(job.gradients((part,), factor)[0], plus, out=o)
    return out
