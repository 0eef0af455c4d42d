"""Parameters whose `.grad` a backward of ours may add to in place, when all else of it is done.

What a function's backward returns is a tensor that autograd adds to another: it is made, written, read again and given
back to the system, where one pass over the gradients would do. So where nobody could tell the difference, ours returns
nothing, and adds at the end of the backward to what stands in `.grad` by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.torch_private import observed, queue_callback, will_execute


def unobserved(p: Tensor) -> bool:
    """Whether it is trained, and nothing is told when its gradient is there: no hook, no process that waits for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return p.is_leaf and p.requires_grad and not observed(p)


def reached(nodes: Sequence[Any]) -> list[Tensor] | None:
    """In a backward, the parameters at the ends of a graph, if it adds to the gradients of all of them, unobserved.

    None for `autograd.grad`, which gives the gradients back, and for `backward(inputs=...)` that leaves some out.
    """
    try:
        if not all(map(will_execute, nodes)):
            return None
    except RuntimeError:  # what torch says of an end of the graph in autograd.grad
        return None
    found = [getattr(node, "variable", None) for node in nodes]
    return found if all(p is not None and unobserved(p) for p in found) else None  # type: ignore[return-value]


def at_the_end(do: Callable[[], None]) -> None:
    """Call this when the backward that runs now is done."""
    queue_callback(do)


def takes(gradient: Tensor | None, p: Tensor) -> bool:
    """Whether it lies in memory as the parameter does."""
    return (
        type(gradient) is Tensor
        and gradient.layout == torch.strided
        and gradient.dtype == p.dtype
        and gradient.is_cpu
        and gradient.stride() == p.stride()
        and not (gradient.requires_grad or gradient.is_neg() or gradient.is_inference())
    )


def give(p: Tensor, gradient: Tensor) -> None:
    """Add a gradient as torch does it: in place where there is a plain one."""
    if p.grad is None:
        p.grad = gradient
    elif p.grad.layout == torch.strided and not p.grad.requires_grad:
        p.grad.add_(gradient)
    else:
        p.grad = gradient + p.grad  # of a sparse one torch takes this order only
