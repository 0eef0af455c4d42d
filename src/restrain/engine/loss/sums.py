"""Weighted sum of a penalty on several tensors, as one autograd function without an inner graph.

Its backward computes the gradients from the tensors alone, by a backend, in one pass that reads and
writes each tensor once. Compilation, torch.func and forward mode use the penalty's formula instead.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine.backends import Parts, Sums
from restrain.engine.core import dense, fresh
from restrain.engine.loss.accumulate import at_the_end, give, reached, takes, unobserved
from restrain.penalties import Penalty
from restrain.penalties.base import times
from restrain.penalties.shrink import at_least_float32
from restrain.torch_private import batched, run_last, transformed


def eager() -> bool:
    """True outside of compilation, torch.func, forward mode, tracing and modes."""
    return not (torch.compiler.is_compiling() or transformed())


def plain(x: Tensor) -> bool:
    """True for a non-empty strided tensor of class Tensor or Parameter."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.numel() > 0


def in_one_stretch(x: Tensor) -> bool:
    """True if C loops can read the entries in memory order (dense, on the CPU)."""
    return x.is_cpu and (x.is_contiguous() or dense(x)) and not x.is_neg()


@dataclass
class PenaltySum:
    """Σ weight · penalty(tensor) over some tensors, with the penalty as bound to each."""

    whats: list[Penalty]
    weights: list[float]
    parts: Parts  # leaves of the first penalty, with their strengths at the forward
    sums: Sums  # backend

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of the values."""
        return self.sums.value(tensors, self.weights)

    def gradients(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """Return factor · gradient for each tensor, in new memory."""
        if self.sums.adds and not all(map(in_one_stretch, tensors)):  # changed by hooks of saved tensors
            return self.by_formula(tensors, factor)
        found = [fresh(x) for x in tensors]
        self.sums.gradients(tensors, self.weights, factor, found)
        return found

    def adds(self, tensors: Sequence[Tensor], factor: Tensor, nodes: Sequence[Any]) -> bool:
        """Arrange to add the gradients in place at the end of the backward; return False if unsafe.

        `nodes` are the leaf nodes of the parameters.
        """
        ends = reached(nodes) if self.sums.adds and all(map(in_one_stretch, tensors)) else None
        if ends is not None:
            at_the_end(functools.partial(self._add, tensors, factor, ends))
        return ends is not None

    def _add(self, tensors: Sequence[Tensor], factor: Tensor, ends: Sequence[Tensor]) -> None:
        ways: tuple[list[Any], list[Any]] = ([], [])
        for x, weight, p in zip(tensors, self.weights, ends, strict=True):
            ways[takes(p.grad, x)].append((x, weight, p))
        for add, of_way in enumerate(ways):
            if of_way:
                xs, weights, own = zip(*of_way, strict=True)
                into = [p.grad for p in own] if add else [fresh(x) for x in xs]
                self.sums.gradients(xs, weights, factor, into, add=bool(add))
                if not add:
                    for p, found in zip(own, into, strict=True):
                        give(p, found)

    def differentiable(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """Return factor · gradient for each tensor, with a graph for higher derivatives."""
        with torch.enable_grad():
            of_each = [times(strength, leaf(x)) * weight for x, strength, leaf, weight in self._each(tensors)]
            total = functools.reduce(operator.add, of_each)
        found: Sequence[Tensor] = torch.autograd.grad(total, tensors, factor, create_graph=True, materialize_grads=True)
        return found

    def by_formula(self, tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
        """Return factor · gradient for each tensor by the formula, for factors batched by vmap."""
        found: dict[int, Tensor] = {}
        for x, strength, leaf, weight in self._each(tensors):
            more = leaf.gradient(at_least_float32(x)) * (times(strength, factor) * weight)
            found[id(x)] = found[id(x)] + more if id(x) in found else more
        return [found[id(x)].to(x.dtype) for x in tensors]

    def _each(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Any, Penalty, float]]:
        for x, what, weight in zip(tensors, self.whats, self.weights, strict=True):
            for (strength, _), (_, leaf) in zip(self.parts, what.leaves(), strict=True):
                yield x, strength, leaf, weight


def gradients(job: PenaltySum, tensors: Sequence[Tensor], factor: Tensor, fast: bool) -> Sequence[Tensor]:
    """Return factor · gradient for each tensor: with a graph, by the backend, or by the formula."""
    if torch.is_grad_enabled():
        return job.differentiable(tensors, factor)
    return (job.gradients if fast else job.by_formula)(tensors, factor)


def applied(job: PenaltySum, value: Tensor | None, *tensors: Tensor, last: bool = False) -> Tensor:
    """Return the job's value as one autograd function of the tensors.

    `value`, if given, already contains the job's value and is returned instead, with the gradients
    of this job added to its graph. With `last`, the backward runs after all other ready nodes.
    """
    if torch.is_grad_enabled() and tensors[0].requires_grad:
        result: Tensor = _Total.apply(job, value, *tensors)  # type: ignore[no-untyped-call]
        if last and all(
            map(unobserved, tensors)
        ):  # autograd then adds each gradient while it is in the cache, and its memory is reused
            run_last(result.grad_fn)
        return result
    with torch.no_grad():
        return job.value(tensors) if value is None else value


class _Total(torch.autograd.Function):
    """Value of a job, or a given total that contains it; the backward does the job's gradients."""

    @staticmethod
    def forward(ctx: Any, job: PenaltySum, value: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(*tensors)
        return job.value(tensors) if value is None else value

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        others = factor if ctx.needs_input_grad[1] else None
        fast, tensors = eager() and not batched(factor), ctx.saved_tensors
        ends = [node for node, _ in ctx.next_functions[-len(tensors) :]]
        if fast and not torch.is_grad_enabled() and ctx.job.adds(tensors, factor, ends):
            return None, others, *[None] * len(tensors)
        return None, others, *gradients(ctx.job, tensors, factor, fast)
