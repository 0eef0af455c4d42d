"""Tensors inside the transforms of torch.func (grad, vmap, ...), which wrap them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from restrain.torch_private import outside_functorch, unwrap, wrapped


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor behind all wrappers, without a graph; it may have more axes."""
    while wrapped(tensor):
        tensor = unwrap(tensor)
    return tensor.detach()


def trained(tensor: Tensor) -> bool:
    """Whether a gradient is taken by it, inside the transform or outside."""
    while wrapped(tensor) and not tensor.requires_grad:
        tensor = unwrap(tensor)
    return tensor.requires_grad


@contextmanager
def as_plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor behind all wrappers, to look at and to add to what is outside."""
    if torch.compiler.is_compiling() or not wrapped(tensor):
        yield tensor.detach()
        return
    with outside_functorch():
        yield unwrapped(tensor)
