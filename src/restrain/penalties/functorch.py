"""Access tensors wrapped by the transforms of torch.func (grad, vmap, ...)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from restrain.torch_private import outside_functorch, unwrap, wrapped


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor behind all wrappers, detached; under vmap it has more axes."""
    while wrapped(tensor):
        tensor = unwrap(tensor)
    return tensor.detach()


def trained(tensor: Tensor) -> bool:
    """Return True if a gradient is taken by the tensor, inside the transform or outside."""
    while wrapped(tensor) and not tensor.requires_grad:
        tensor = unwrap(tensor)
    return tensor.requires_grad


@contextmanager
def as_plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor behind all wrappers, to read it or to add it outside of the transform."""
    if torch.compiler.is_compiling() or not wrapped(tensor):
        yield tensor.detach()
        return
    with outside_functorch():
        yield unwrapped(tensor)
