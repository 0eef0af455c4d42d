"""Autograd functions that give a penalty its gradient when its value carries no graph.

Inside reentrant checkpointing and compiled code, the value of a penalty leaves the layer without a
graph. There `Inject` returns the layer's output unchanged and takes the penalty as a second input;
in backward it passes the penalty the gradient stored in a *cell*, a tensor. `Root` is applied to
the loss; its backward writes the upstream gradient of the loss into the cells, so that loss scaling
and accumulation are right. A backward without the root finds zeros in the cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from restrain.torch_private import queue_callback, require


class Inject(torch.autograd.Function):
    """`Inject.apply(h, penalty, cell, copy)` returns h, or a copy, which a later op may overwrite.

    In backward, `penalty` receives the gradient stored in `cell` at that time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, penalty: Tensor, cell: Tensor, copy: bool) -> Tensor:
        return h.clone() if copy else h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.cell, ctx.dtype = (
            inputs[2],
            inputs[1].dtype,
        )  # not saved: the root writes into it before it is read

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The empty sum makes the read of the cell depend on the gradient. Otherwise a compiler may
        # read the cell in the forward, when it is still empty.
        nothing = gradient.flatten()[:0].abs().sum()
        return gradient, (ctx.cell.squeeze(0) + nothing).to(ctx.dtype), None, None


class Root(torch.autograd.Function):
    """`Root.apply(loss, value, write)` returns loss + value.

    In backward, `write(g)` fills the cells with the upstream gradient g, and `write(None)` resets
    them at the end of the backward.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, write: Callable[[Tensor | None], None]) -> Tensor:
        require("queue_callback")
        ctx.write = write
        return loss + value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.write(gradient.detach())
        queue_callback(lambda: ctx.write(None))
        return gradient, None, None
