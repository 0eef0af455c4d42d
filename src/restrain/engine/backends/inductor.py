"""Instructions as one kernel compiled by inductor, which reads and writes each entry once.

A kernel belongs to instructions, dtypes, a device and a number of threads, and is compiled once per
process. Sizes, strengths, learning rates and the metric's scalars are its inputs, so that no
schedule and no shape recompiles it. It is compiled by inductor without Dynamo: there are no guards,
`torch.compiler.reset()` doesn't affect it, and a call costs microseconds. If compiling fails, as
without a C++ compiler, there is no kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends.backend import Decider, Parts, Sums
from restrain.engine.backends.eager import Eager, Kernel
from restrain.engine.core import stretches
from restrain.engine.ops import (
    Decay,
    Gradient,
    Instruction,
    Lowered,
    Prox,
    Shrink,
    ShrinkRows,
    Tensors,
    carry_out,
)
from restrain.errors import RestrainWarning
from restrain.fields import level_of_caller
from restrain.penalties import Penalty
from restrain.torch_private import standalone_compile
from restrain.versions import untested

COST = 2 * 10**10  # entries × steps: estimate of the work that outweighs the seconds of compiling
# sizes without small factors: inductor assumes no divisibility
_ENTRIES, _ROWS = (70001,), (307, 233)

_kernels: dict[Any, Callable[..., Any] | None] = {}


class Inductor(Eager):
    """Kernels on whole tensors; unsupported batches are left to the next backend."""

    def __init__(self) -> None:
        super().__init__()
        self._said = False

    def sums(self, parts: Parts, like: Tensor) -> Sums | None:
        return None

    def _kernel(self, lowered: Lowered, members: Sequence[Tensors], length: int, decider: Decider) -> Kernel | None:
        if length and not _compiles_rows(lowered):
            return None
        if not decider.makes(sum(tensors[0].numel() for tensors in members), COST):
            return None
        made = kernel(lowered, members[0])
        if made is None:
            self._warn(decider)
            return None
        numbers = _packed(lowered, members[0][0])

        def run(tensors: Sequence[Tensor], length: int) -> bool:
            whole = [t.view(-1, length) for t in tensors] if length else stretches(tensors)
            if whole is None:  # no common dense layout
                carry_out(lowered, tensors)
            else:
                made(*whole, numbers)
            return True

        return run

    def _warn(self, decider: Decider) -> None:
        if decider.compile is True and not self._said:
            self._said = True
            warnings.warn(
                "compile=True, but rules at the optimizer's step can't be compiled here (is there a C++ compiler?): "
                "they are done without, with the same result",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )


def kernel(lowered: Lowered, tensors: Sequence[Tensor]) -> Callable[..., Any] | None:
    """Return a kernel that carries out instructions in place on tensors like these, or None.

    It is called with the tensors and the scalars from `_packed`.
    """
    if not all(_is_fixed(step) for step, _ in lowered):
        return None
    steps = tuple([(step, len(numbers)) for step, numbers in lowered])
    key = (steps, tuple([t.dtype for t in tensors]), tensors[0].device, torch.get_num_threads())
    try:
        known = key in _kernels
    except TypeError:  # a user's penalty that can't be hashed
        return None
    if not known:
        _kernels[key] = _made(steps, tensors)
    return _kernels[key]


def _is_fixed(step: Instruction) -> bool:
    """Return True if all penalties called declare their operations.

    Others may have a state, which would be constant in a kernel.
    """
    called: list[Any] = []
    if isinstance(step, Gradient | Decay):
        called = list((step.sum if isinstance(step, Decay) else step).others)
    elif isinstance(step, Prox):
        called = [step.other]
    return all(one.operations is not None for one in called if isinstance(one, Penalty))


def _compiles_rows(lowered: Lowered) -> bool:
    """Return True if instructions, some of them on rows, can be compiled into one kernel."""
    kinds = {type(step) for step, _ in lowered}
    return ShrinkRows in kinds and kinds <= {Shrink, ShrinkRows}


def _packed(lowered: Lowered, w: Tensor) -> Tensor:
    """Return the scalars of the instructions as one tensor, an input of the kernel."""
    numbers = [number for _, own in lowered for number in own]
    return torch.tensor(numbers, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)


def _made(steps: Sequence[tuple[Instruction, int]], tensors: Sequence[Tensor]) -> Callable[..., Any] | None:
    def run(*inputs: Tensor) -> tuple[()]:
        *blocks, numbers = inputs
        counted = iter(range(len(numbers)))
        carry_out([(step, [numbers[next(counted)] for _ in range(count)]) for step, count in steps], blocks)
        return ()

    sizes = _ROWS if any(isinstance(step, ShrinkRows) for step, _ in steps) else _ENTRIES
    examples: list[Any] = [torch.ones(sizes, dtype=t.dtype, device=t.device) for t in tensors]
    examples.append(_packed([(step, (1.0,) * count) for step, count in steps], examples[0]))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            from torch.fx.experimental.proxy_tensor import make_fx

            graph = make_fx(run, tracing_mode="symbolic")(*examples)
            made = standalone_compile(graph, examples)
            made(*examples)
    except Exception:  # any failure: the next backend gives the same result
        return None
    return made if not untested(torch.__version__) or _agrees(made, run, examples) else None


def _agrees(made: Callable[..., Any], run: Callable[..., Any], examples: Sequence[Tensor]) -> bool:
    """Compare a kernel with eager torch on random numbers; warn and return False if they differ."""
    seed = torch.Generator(examples[0].device).manual_seed(0)
    w, *others = [torch.randn(t.shape, generator=seed, dtype=t.dtype, device=t.device) for t in examples]
    *tensors, numbers = [w, *[t.abs() for t in others]]  # moments and strengths aren't negative
    mine, reference = [[t.clone() for t in tensors] for _ in range(2)]
    made(*mine, numbers)
    run(*reference, numbers)
    close = 1e-5 if tensors[0].dtype.itemsize >= 4 else 1e-2
    if all(torch.allclose(a, b, close, close, equal_nan=True) for a, b in zip(mine, reference, strict=True)):
        return True
    warnings.warn(
        f"torch {torch.__version__} compiles rules at the optimizer's step to code that gives other numbers than "
        "their formulas: they are done without",
        RestrainWarning,
        stacklevel=level_of_caller(),
    )
    return False
