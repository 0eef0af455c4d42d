"""Access tensors wrapped by the transforms of torch.func (grad, vmap, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


class _Told(torch.autograd.Function):
    """Give a tensor, summed over the axes of all vmaps, to a function outside of the transforms."""

    @staticmethod
    def forward(x: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        tell(x)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, tell: Callable[[Tensor], None]) -> Any:
        _Told.apply(x.sum(in_dims[0]), tell)  # type: ignore[no-untyped-call]
        return x, in_dims[0]


def told(x: Tensor, tell: Callable[[Tensor], None]) -> None:
    """Call a function with a tensor, detached; under vmap once, with the sum over its samples."""
    if torch.compiler.is_compiling() or not wrapped(x):
        tell(x.detach())
    else:
        _Told.apply(x.detach(), tell)  # type: ignore[no-untyped-call]


@contextmanager
def as_plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor behind all wrappers, to read it or to add it outside of the transform."""
    if torch.compiler.is_compiling() or not wrapped(tensor):
        yield tensor.detach()
        return
    with outside_functorch():
        yield unwrapped(tensor)
