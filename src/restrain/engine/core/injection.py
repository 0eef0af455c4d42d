"""Two autograd functions that carry a penalty's gradient where its value can't take its own graph along.

Inside reentrant checkpointing and inside compiled code, the value of a penalty leaves the layer without a graph.
There `Inject` passes the layer's output on unchanged and remembers the penalty; in backward it sends the penalty
the gradient that stands in a *cell*, a tensor. `Root` stands on the loss; its backward writes the loss's own
upstream gradient into the cells, so that loss scaling and accumulation come out right. A backward without the
root finds zeros in the cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from restrain.torch_private import queue_callback, require


class Inject(torch.autograd.Function):
    """`Inject.apply(h, penalty, cell, copy)` is h (or a copy, where a later op overwrites it in place).

    In backward, `penalty` receives the gradient that stands in `cell` then.
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
        # The sum of nothing ties the reading of the cell to the backward: a compiler may compute what depends on the
        # forward alone in the forward, when the cell is still empty.
        nothing = gradient.flatten()[:0].abs().sum()
        return gradient, (ctx.cell.squeeze(0) + nothing).to(ctx.dtype), None, None


class Root(torch.autograd.Function):
    """`Root.apply(loss, value, write)` is loss + value; in backward, `write(g)` sets the cells, g the upstream."""

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
