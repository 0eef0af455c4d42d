"""Lowered steps as one compiled kernel, which reads and writes each entry once.

A kernel belongs to steps, dtypes and a kind of device, and is made once in a process. Sizes, strengths, learning rates
and the metric's numbers are its inputs, so that no schedule and no shape has it made anew. It is made by inductor
itself, without Dynamo: no guards are looked at, `torch.compiler.reset()` doesn't concern it, and a call costs
microseconds. Where that fails, as it does without a C++ compiler, there is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.engine.ops import Lowered, Shrink, ShrinkRows, Step, quickly
from restrain.torch_private import standalone_compile

_ENTRIES, _ROWS = (70001,), (307, 233)  # sizes of examples: multiples of nothing, so that nothing is taken for granted

_kernels: dict[Any, Callable[..., Any] | None] = {}


def kernel(lowered: Lowered, tensors: Sequence[Tensor]) -> Callable[..., Any] | None:
    """What does these steps in place to tensors like these, of one dim or rows, called with them and `packed` numbers.

    None if there is no such kernel.
    """
    steps = tuple([(step, len(numbers)) for step, numbers in lowered])
    key = (steps, tuple([t.dtype for t in tensors]), tensors[0].device, torch.get_num_threads())
    try:
        known = key in _kernels
    except TypeError:  # a person's penalty that can't be hashed
        return None
    if not known:
        _kernels[key] = _made(steps, tensors)
    return _kernels[key]


def compiles(lowered: Lowered) -> bool:
    """Whether steps of which some are on rows may be in one kernel."""
    kinds = {type(step) for step, _ in lowered}
    return ShrinkRows in kinds and kinds <= {Shrink, ShrinkRows}


def packed(lowered: Lowered, w: Tensor) -> Tensor:
    """The numbers of the steps, as their kernel takes them."""
    numbers = [number for _, own in lowered for number in own]
    return torch.tensor(numbers, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)


def _made(steps: Sequence[tuple[Step, int]], tensors: Sequence[Tensor]) -> Callable[..., Any] | None:
    if not all(part.__module__.startswith("restrain.") for step, _ in steps for part in step.parts):
        return None  # a person's penalty may keep something from call to call, which would stand still in a kernel

    def run(*inputs: Tensor) -> tuple[()]:
        *blocks, numbers = inputs
        counted = iter(range(len(numbers)))
        quickly([(step, [numbers[next(counted)] for _ in range(count)]) for step, count in steps], blocks)
        return ()

    sizes = _ROWS if any(isinstance(step, ShrinkRows) for step, _ in steps) else _ENTRIES
    examples: list[Any] = [torch.ones(sizes, dtype=t.dtype, device=t.device) for t in tensors]
    examples.append(packed([(step, (1.0,) * count) for step, count in steps], examples[0]))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            from torch.fx.experimental.proxy_tensor import make_fx

            graph = make_fx(run, tracing_mode="symbolic")(*examples)
            made = standalone_compile(graph, examples)
            made(*examples)
    except Exception:  # whatever stands in the way: the same is done without
        return None
    return made
