"""Tensors inside the transforms of torch.func (grad, vmap, ...), which wrap them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_NOTHING = torch.empty(0)


def wrapped(tensor: Tensor) -> bool:
    """Whether it lives inside a transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def life() -> Tensor | None:
    """A sign of the innermost transform that runs; None outside of all."""
    level = torch._C._functorch.maybe_current_level()
    return None if level is None else torch._C._functorch._wrap_for_grad(_NOTHING, level)


def over(sign: Tensor | None) -> bool:
    """Whether the transform that gave the sign is over."""
    return sign is not None and bool(torch._C._functorch.is_dead_tensor_wrapper(sign))  # type: ignore[attr-defined]


def transforming() -> bool:
    """Whether a transform runs."""
    return torch._C._functorch.maybe_current_level() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor behind all wrappers, without a graph; it may have more axes."""
    while wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach()


def trained(tensor: Tensor) -> bool:
    """Whether a gradient is taken by it, inside the transform or outside."""
    while wrapped(tensor) and not tensor.requires_grad:
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


@contextmanager
def as_plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor behind all wrappers, to look at and to add to what is outside."""
    if torch.compiler.is_compiling() or not wrapped(tensor):
        yield tensor.detach()
        return
    with torch._C._DisableFuncTorch():
        yield unwrapped(tensor)
