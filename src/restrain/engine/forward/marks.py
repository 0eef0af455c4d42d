"""Marks of forwards on nodes of autograd graphs, which tell the forwards that a loss depends on.

A mark is metadata of an existing node: a node of our own would be in the way of in-place
operations.

Each forward marks the nodes of recorded activations and of the model's outputs; the ancestors of a
loss are searched until all forwards in question are found. A derivative need not depend on the node
that it goes through (that of a Softplus depends on the node's input, that of a linear layer on the
weight), so a hook on a marked node also marks the gradients that the node sends on, if a backward
builds a graph. In a reentrant checkpoint the checkpoint's own node is marked. Compiled code can't
mark: it stores an object with the outputs, whose nodes are marked before the next loss, or when the
next compiled forward replaces it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction


class Mark:
    """Mark of a forward on the nodes of its activations, which its records keep alive.

    Nodes that no record keeps, those of outputs and of gradients, have the `outer` mark: while it
    exists, a loss can still depend on the forward.

    Args:
        key: key of the attachment in the metadata of nodes.
        number: number of the forward.
    """

    __slots__ = ("__weakref__", "_outer", "key", "lost", "number")

    def __init__(self, key: str, number: int) -> None:
        self.key, self.number = key, number
        self.lost = ""  # reason why the forward was given up, or ""
        self._outer: Any = None  # weak reference to the outer mark, after the first use

    def put(self, node: Any, and_gradients: bool = True) -> None:
        """Mark the node of an activation, and the gradients that it sends on unless told not to."""
        if self._add(node) and and_gradients:
            node.register_hook(self)

    def put_outer(self, nodes: Sequence[Any], and_gradients: bool = True) -> None:
        """Mark nodes that no record keeps."""
        for node in nodes:
            if self.outer()._add(node) and and_gradients:
                node.register_hook(self)

    def _add(self, node: Any) -> bool:
        marks = node.metadata.setdefault(self.key, [])
        new = self not in marks
        if new:
            marks.append(self)
        return new

    def __call__(self, sent: tuple[Tensor | None, ...], received: tuple[Tensor | None, ...]) -> None:
        """Mark gradients that a backward with `create_graph=True` sends on from a marked node.

        A derivative need not depend on the node that it goes through: that of a Softplus depends on
        the input of the node, that of a linear layer on the weight.
        """
        if torch.is_grad_enabled():
            self.put_outer([g.grad_fn for g in sent if g is not None and g.grad_fn is not None], and_gradients=False)

    def outer(self) -> Mark:
        """Return the mark of nodes that no record keeps."""
        mark = self._outer and self._outer()
        if mark is None:
            mark = Mark(self.key, self.number)
            mark.lost = self.lost
            self._outer = weakref.ref(mark)
        return mark  # type: ignore[no-any-return]

    @property
    def has_outer(self) -> bool | None:
        """True if a node that no record keeps is marked; None if there never was such a node."""
        return None if self._outer is None else self._outer() is not None

    def lose(self, why: str) -> None:
        """Give the forward up: a loss that depends on it is an error from now on."""
        self.lost = why
        if self.has_outer:
            self.outer().lost = why


def marks_before(loss: Tensor, key: str, wanted: Collection[int]) -> set[Mark]:
    """Return marks on a loss's ancestors, until all wanted forwards are found; if none, all."""
    missing, found = set(wanted), set[Mark]()
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if not following:  # a leaf
            continue
        marks = node.metadata.get(key)
        if marks:
            found.update(marks)
            missing.difference_update([mark.number for mark in marks])
            if wanted and not missing:
                break
        waiting += [other for other, _ in following if other is not None]
    return found


def checkpoint_node() -> Any:
    """Return the node of the outermost reentrant checkpoint in its first run, or None."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            found = frame.f_locals["ctx"]
        frame = frame.f_back
    return found
