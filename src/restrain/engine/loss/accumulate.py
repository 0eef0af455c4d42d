"""Add gradients of penalties to `.grad` in place, at the end of the backward.

A gradient that a backward returns is allocated, written, read again by autograd for the addition,
and freed, where one pass over the gradients would do. So if no hook or other process can see the
difference, our backward returns None and adds to `.grad` at the end.

The difference can be seen by a hook on the parameter (also one registered after the forward), by
`autograd.grad`, `backward(inputs=...)` without the parameter, `create_graph=True`, and processes of
torch.distributed, which send gradients as soon as they are there. Then gradients are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restrain.torch_private import observed, queue_callback, will_execute


def unobserved(p: Tensor) -> bool:
    """True for a trained leaf without gradient hooks, outside of torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return p.is_leaf and p.requires_grad and not observed(p)


def reached(nodes: Sequence[Any]) -> list[Tensor] | None:
    """Return the parameters of the given leaf nodes, if the running backward accumulates into all.

    None if a node has no unobserved parameter, in `autograd.grad`, which returns gradients instead,
    and in a `backward(inputs=...)` without all of them.
    """
    try:
        if not all(map(will_execute, nodes)):
            return None
    except RuntimeError:  # raised for leaf nodes in autograd.grad
        return None
    found = [getattr(node, "variable", None) for node in nodes]
    return found if all(p is not None and unobserved(p) for p in found) else None  # type: ignore[return-value]


def at_the_end(do: Callable[[], None]) -> None:
    """Call a function at the end of the running backward."""
    queue_callback(do)


def takes(gradient: Tensor | None, p: Tensor) -> bool:
    """True if the gradient has dtype, strides and device (CPU) to be updated in place by loops."""
    return (
        type(gradient) is Tensor
        and gradient.layout == torch.strided
        and gradient.dtype == p.dtype
        and gradient.is_cpu
        and gradient.stride() == p.stride()
        and not (gradient.requires_grad or gradient.is_neg() or gradient.is_inference())
    )


def give(p: Tensor, gradient: Tensor) -> None:
    """Add a gradient to `p.grad` like autograd: in place if `.grad` is dense and has no graph."""
    if p.grad is None:
        p.grad = gradient
    elif p.grad.layout == torch.strided and not p.grad.requires_grad:
        p.grad.add_(gradient)
    else:
        p.grad = gradient + p.grad  # dense + sparse works in this order only
