"""Values and gradients of penalties on layer outputs.

If one autograd function returns both output and value, its backward adds the penalty's gradient to
the incoming gradient in one pass. Output and value can still be differentiated separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends import Compile
from restrain.engine.core import alike, dense, flattened, fresh, scratch, simple
from restrain.engine.loss.parameters import sum_at
from restrain.engine.loss.sums import PenaltySum, applied, eager, gradients, in_one_stretch, plain
from restrain.penalties import Penalty
from restrain.penalties.base import batch_size
from restrain.penalties.shrink import at_least_float32
from restrain.torch_private import batched, is_view, packs, transformed

_BLOCK = 1 << 18  # entries whose gradients stay in the cache until they are added
LOOPS_AT_PLACES = 1 << 15  # entries of an output from which on compiled loops are used: each run does the same
_KEPT = 32  # cached sums, by dtype and batch size


class AtPlace:
    """Penalty on layer outputs, averaged over the batch; caches its `PenaltySum` between calls."""

    def __init__(self, penalty: Penalty, compile: Compile = "auto") -> None:
        self.penalty, self.compile = penalty, compile
        self._fixed = penalty.entrywise and all(isinstance(strength, float) for strength, _ in penalty.leaves())
        self._slope = _slope(penalty) if self._fixed else None
        self._jobs: dict[Any, PenaltySum | None] = {}

    def value(self, h: Tensor, dim: int | None) -> Tensor:
        """Return `penalty.over_batch(h, dim)`, with batch dim `dim` (None: no batch)."""
        job = self._known(h, dim)
        return self.penalty.over_batch(h, dim) if job is None else applied(job, None, h)

    def of_relu(self, h: Tensor, dim: int | None) -> tuple[Tensor, float] | None:
        """Return (Σh, factor) of the value for an L1 on the output h of a ReLU, else None.

        The gradient of Σh is 1 at zeros too, where ReLU's backward blocks it. Nothing is saved for
        the backward, so h may be overwritten.
        """
        if self._slope is None or (node := h.grad_fn) is None or node.name() != "ReluBackward0":
            return None
        if not (torch.is_grad_enabled() and plain(h) and simple(h)) or transformed():
            return None
        return h.sum(), self._slope / (1 if dim is None else batch_size(h, dim))

    def by_signs(self, h: Tensor, dim: int | None) -> Tensor | None:
        """Return the value of an L1 of real entries, for compiled code; else None."""
        if self._slope is None or h.is_complex():
            return None
        value: Tensor = Absolute.apply(h)[0] * (self._slope / (1 if dim is None else batch_size(h, dim)))  # type: ignore[no-untyped-call]
        return value

    def through(self, h: Tensor, dim: int | None, copy: bool) -> tuple[Tensor, Tensor, float] | None:
        """Return (output, value, factor), or None if the penalty isn't supported.

        The output replaces h: equal to it, or with `copy` safe from later in-place operations. The
        value is value × factor. Its gradient is added to that of the output in one pass.
        """
        if not (torch.is_grad_enabled() and h.requires_grad) or (job := self._known(h, dim)) is None:
            return None
        if copy and self._slope is not None and _may_be_overwritten(h):
            h, value = AbsoluteThrough.apply(h)  # type: ignore[no-untyped-call]
            return h, value, self._slope / (1 if dim is None else batch_size(h, dim))
        return *Through.apply(job, h, copy), 1.0  # type: ignore[no-untyped-call]

    def _known(self, h: Tensor, dim: int | None) -> PenaltySum | None:
        if not (self._fixed and plain(h) and eager()):
            return None
        size = 1 if dim is None else batch_size(h, dim)
        known = h.dtype, size, h.numel() >= LOOPS_AT_PLACES and in_one_stretch(h)
        if known not in self._jobs:
            if len(self._jobs) == _KEPT:
                self._jobs.clear()
            self._jobs[known] = sum_at(h, self.penalty, 1 / size, known[-1], self.compile)
        return self._jobs[known]


def _may_be_overwritten(h: Tensor) -> bool:
    """True if an autograd function may mark h as changed in place; checkpoints compare h itself."""
    return simple(h) and h.is_cpu and dense(h) and not (h.is_leaf or is_view(h) or packs())


def _slope(penalty: Penalty) -> float | None:
    """Return a if the penalty is a Σ|x|, else None."""
    parts = penalty.leaves()
    if not all(leaf.operations is not None and leaf.elastic is not None for _, leaf in parts):
        return None
    l1, l2, _ = penalty.split()
    return None if l2 else float(l1)


class Through(torch.autograd.Function):
    """`Through.apply(job, h, copy)` returns h and the value; a copy of h may be overwritten."""

    @staticmethod
    def forward(ctx: Any, job: PenaltySum, h: Tensor, copy: bool) -> tuple[Tensor, Tensor]:
        ctx.job = job
        ctx.save_for_backward(h)
        ctx.set_materialize_grads(False)
        return h.clone() if copy else h.view_as(h), job.value((h,))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        if factor is None:  # the value isn't differentiated
            return None, gradient, None
        (h,) = ctx.saved_tensors
        fast = eager() and not (batched(factor) or (gradient is not None and batched(gradient)))
        if (
            gradient is not None
            and fast
            and not torch.is_grad_enabled()
            and h.dtype == gradient.dtype
            and _joins(h, gradient)
        ):
            return None, _added(ctx.job, h, factor, gradient), None
        (own,) = gradients(ctx.job, (h,), factor, fast)
        return None, own if gradient is None else gradient + own, None


class Absolute(torch.autograd.Function):
    """Σ|x| with the signs saved, a byte each, so that a later op may overwrite x in place."""

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
    """x and Σ|x|, for an x that a later op overwrites in place; like `Through`, but saves signs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.empty_like(x, dtype=torch.int8)
        sums = [_signs(*pair) for pair in zip(_blocks(x), _blocks(signs), strict=True)]
        ctx.save_for_backward(signs)
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        return x, sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, factor: Tensor | None) -> Tensor | None:
        if factor is None:
            return gradient
        (signs,) = ctx.saved_tensors
        fast = not torch.is_grad_enabled() and eager() and signs.is_cpu and not batched(factor)
        if gradient is None or not (fast and not batched(gradient) and _joins(signs, gradient)):
            own: Tensor = signs.to(factor.dtype) * factor
            return own if gradient is None else gradient + own
        out, number = fresh(gradient), factor.item()
        for part, plus, o in zip(_blocks(signs), _blocks(gradient), _blocks(out), strict=True):
            torch.add(plus, scratch.like(plus).copy_(part), alpha=number, out=o)
        return out


def _signs(x: Tensor, signs: Tensor) -> Tensor:
    """Return Σ|x| of a block, and write its signs."""
    signs.copy_(torch.sgn(x, out=scratch.like(x)))
    return torch.abs(x, out=scratch.like(x)).sum()


def _blocks(x: Tensor) -> Sequence[Tensor]:
    blocks: Sequence[Tensor] = flattened(x).split(_BLOCK)
    return blocks


def _joins(x: Tensor, y: Tensor) -> bool:
    """True if y is a plain dense tensor with the memory layout and device of x."""
    if type(y) is not Tensor or y.layout != torch.strided or x.device != y.device:
        return False
    return alike((x, y))


def _added(job: PenaltySum, x: Tensor, factor: Tensor, given: Tensor) -> Tensor:
    """Return given + factor · gradient in new memory, as others may hold `given`."""
    if x.numel() <= _BLOCK or not x.is_cpu:
        return job.gradients((x,), factor)[0].add_(given)
    out = fresh(x)
    for part, plus, o in zip(_blocks(x), _blocks(given), _blocks(out), strict=True):
        torch.add(job.gradients((part,), factor)[0], plus, out=o)
    return out
