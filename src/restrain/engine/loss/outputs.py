"""Penalties on the outputs of layers: how their values and gradients are computed.

Where output and value come of one autograd function, the penalty's gradient joins that of all that comes later where
the two meet: in one pass that reads the tensor and the incoming gradient, and writes the sum. The value has a graph of
its own; it may be differentiated without what comes later, and what comes later without it.
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

_BLOCK = 1 << 18  # entries, whose gradients stay in the cache until they are added
LOOPS_AT_PLACES = 1 << 15  # entries of an output from which on compiled loops are taken: each run does the same
_KEPT = 32  # sizes of batches


class AtPlace:
    """A penalty on the outputs of layers, averaged over the batch; what is known of it is kept from call to call."""

    def __init__(self, penalty: Penalty, compile: Compile = "auto") -> None:
        self.penalty, self.compile = penalty, compile
        self._fixed = penalty.entrywise and all(isinstance(strength, float) for strength, _ in penalty.leaves())
        self._slope = _slope(penalty) if self._fixed else None
        self._jobs: dict[Any, PenaltySum | None] = {}

    def value(self, h: Tensor, dim: int | None) -> Tensor:
        """`penalty.over_batch(h, dim)`."""
        job = self._known(h, dim)
        return self.penalty.over_batch(h, dim) if job is None else applied(job, None, h)

    def of_relu(self, h: Tensor, dim: int | None) -> tuple[Tensor, float] | None:
        """The value, in two factors, where `h` comes of a ReLU and the penalty is an L1: the first is a plain sum.

        Its gradient is one at the zeros, too, where ReLU lets none through. Nothing is kept for the backward, so that
        `h` may be overwritten.
        """
        if self._slope is None or (node := h.grad_fn) is None or node.name() != "ReluBackward0":
            return None
        if not (torch.is_grad_enabled() and plain(h) and simple(h)) or transformed():
            return None
        return h.sum(), self._slope / (1 if dim is None else batch_size(h, dim))

    def by_signs(self, h: Tensor, dim: int | None) -> Tensor | None:
        """The value where the penalty is an L1 of real entries, and the code is compiled."""
        if self._slope is None or h.is_complex():
            return None
        value: Tensor = Absolute.apply(h)[0] * (self._slope / (1 if dim is None else batch_size(h, dim)))  # type: ignore[no-untyped-call]
        return value

    def through(self, h: Tensor, dim: int | None, copy: bool) -> tuple[Tensor, Tensor, float] | None:
        """What goes on in the place of `h` (equal to it, or a copy), and the value; None where that isn't known.

        The gradient of the value joins that of what goes on in one pass, where the two meet.
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
    """Whether our function may say that it changes `h`; a checkpoint compares what is kept, which must be h itself."""
    return simple(h) and h.is_cpu and dense(h) and not (h.is_leaf or is_view(h) or packs())


def _slope(penalty: Penalty) -> float | None:
    """a where the penalty is a Σ|x|."""
    parts = penalty.leaves()
    if not all(leaf.operations is not None and leaf.elastic is not None for _, leaf in parts):
        return None
    l1, l2, _ = penalty.split()
    return None if l2 else float(l1)


class Through(torch.autograd.Function):
    """`Through.apply(job, h, copy)` is h (or a copy, where a later op overwrites it in place) and the value."""

    @staticmethod
    def forward(ctx: Any, job: PenaltySum, h: Tensor, copy: bool) -> tuple[Tensor, Tensor]:
        ctx.job = job
        ctx.save_for_backward(h)
        ctx.set_materialize_grads(False)
        return h.clone() if copy else h.view_as(h), job.value((h,))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        if factor is None:  # the value isn't in what is differentiated
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
    """Σ|x| of a block, whose signs are written."""
    signs.copy_(torch.sgn(x, out=scratch.like(x)))
    return torch.abs(x, out=scratch.like(x)).sum()


def _blocks(x: Tensor) -> Sequence[Tensor]:
    blocks: Sequence[Tensor] = flattened(x).split(_BLOCK)
    return blocks


def _joins(x: Tensor, y: Tensor) -> bool:
    """Whether y is a plain tensor, with its entries in memory as those of x are."""
    if type(y) is not Tensor or y.layout != torch.strided or x.device != y.device:
        return False
    return alike((x, y))


def _added(job: PenaltySum, x: Tensor, factor: Tensor, given: Tensor) -> Tensor:
    """given + factor · gradient, in new memory: who else holds what is given isn't known."""
    if x.numel() <= _BLOCK or not x.is_cpu:
        return job.gradients((x,), factor)[0].add_(given)
    out = fresh(x)
    for part, plus, o in zip(_blocks(x), _blocks(given), _blocks(out), strict=True):
        torch.add(job.gradients((part,), factor)[0], plus, out=o)
    return out
