"""Penalties on the outputs of layers: which way their values and gradients go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restrain.engine.core import dense, simple
from restrain.engine.loss.parameters import Job, applied, by_blocks, in_one_stretch, job_at, plain
from restrain.engine.loss.passing import Absolute, AbsoluteThrough, Through
from restrain.penalties import Penalty
from restrain.penalties.base import batch_size
from restrain.penalties.entrywise import Entrywise
from restrain.torch_private import is_view, packs, transformed

LOOPS_AT_PLACES = 1 << 15  # entries of an output from which on compiled loops are taken: each run does the same
_KEPT = 32  # sizes of batches


class AtPlace:
    """A penalty on the outputs of layers, averaged over the batch; what is known of it is kept from call to call."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty
        self._fixed = penalty.entrywise and all(isinstance(strength, float) for strength, _ in penalty.leaves())
        self._slope = _slope(penalty) if self._fixed else None
        self._jobs: dict[Any, Job | None] = {}

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
            h, value = AbsoluteThrough.apply(h, by_blocks)  # type: ignore[no-untyped-call]
            return h, value, self._slope / (1 if dim is None else batch_size(h, dim))
        return *Through.apply(job, h, copy, by_blocks), 1.0  # type: ignore[no-untyped-call]

    def _known(self, h: Tensor, dim: int | None) -> Job | None:
        if not (self._fixed and plain(h) and by_blocks()):
            return None
        size = 1 if dim is None else batch_size(h, dim)
        known = h.dtype, size, h.numel() >= LOOPS_AT_PLACES and in_one_stretch(h)
        if known not in self._jobs:
            if len(self._jobs) == _KEPT:
                self._jobs.clear()
            self._jobs[known] = job_at(h, self.penalty, 1 / size, known[-1])
        return self._jobs[known]


def _may_be_overwritten(h: Tensor) -> bool:
    """Whether our function may say that it changes `h`; a checkpoint compares what is kept, which must be h itself."""
    return simple(h) and h.is_cpu and dense(h) and not (h.is_leaf or is_view(h) or packs())


def _slope(penalty: Penalty) -> float | None:
    """a where the penalty is a Σ|x|."""
    parts = penalty.leaves()
    if not all(type(leaf).__module__ == Entrywise.__module__ and leaf.elastic is not None for _, leaf in parts):
        return None
    l1, l2, _ = penalty.split()
    return None if l2 else float(l1)
