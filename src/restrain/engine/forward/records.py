"""Records of a forward: the values at layers with rules, by recorder."""

from __future__ import annotations

import sys
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restrain.callstack import Call
from restrain.engine.core import structures
from restrain.engine.forward.marks import Mark, checkpoint_node
from restrain.torch_private import life, made_as, newest_node, over, version, wrapped


@dataclass(slots=True)
class Record:
    """Value that a recorder took from a call of a layer.

    Args:
        value: the penalty's value divided by `factor`; for other recorders a tensor or other
            object.
        factor: multiplies `value`.
        graph: True if the value has its graph; False in a reentrant checkpoint and in compiled
            code.
        calls: the number of calls over which the value is summed.
        watched: a tensor whose changes in place are detected by its version.
        version: the version of `watched` at the record.
        life: token of the torch.func transform in which the value was made.
    """

    value: Any
    factor: float = 1.0
    graph: bool = True
    calls: Any = 1
    watched: Tensor | None = None
    version: Any = None
    life: Any = None

    @classmethod
    def of(cls, value: Tensor, factor: float = 1.0, watched: Tensor | None = None) -> Record:
        """Return the record of a tensor, with a graph if gradients are enabled."""
        sign = life() if wrapped(value) else None
        before = None if watched is None else version(watched)
        return cls(value, factor, torch.is_grad_enabled(), 1, watched, before, sign)

    @property
    def changed(self) -> bool:
        """True if the watched tensor was overwritten in place."""
        return self.watched is not None and version(self.watched) != self.version


class Forward:
    """A training forward of the model, or a call of a layer alone, outside of all forwards.

    Args:
        pending: mapping of forwards by number, which this forward enters with its first record and
            leaves when it is forgotten.
        key, number: key and number of its marks.
        call: the running call of the model; None once it has ended.
    """

    def __init__(self, pending: MutableMapping[int, Forward], key: str, number: int, call: Call | None = None) -> None:
        self._pending, self.number, self.call = pending, number, call
        self.mark = Mark(key, number)
        self.marked = False  # a node has the mark
        self.hidden = False  # a record has a graph somewhere, but no visible node
        self.records: dict[Hashable, list[Record]] = {}  # records by recorder
        self.lost: set[Hashable] = set()  # recorders of tensors inside a torch.func transform
        self.active: list[tuple[Any, Tensor]] = []  # measurements of targets, and fractions of active entries
        self.collection = 0  # number of the collection that counted it, or 0
        self.past = False  # counts only for losses that depend on it
        # Sequence numbers of nodes, which rise along the graph: the next number at the beginning;
        # the highest of an activation; the lowest of other marked nodes, whose marks tell whether
        # an output or gradient is left.
        self._start = 0 if call is None else newest_node()
        self._highest, self._lowest = -1, sys.maxsize

    def keep(self, recorder: Any, record: Record, seen: Tensor | None = None) -> None:
        """Keep a recorder's record and mark the tensor it saw; compiled code gives no tensor."""
        if seen is None:
            self.hidden = True
        else:
            self._mark(seen)
        self.records.setdefault(recorder, []).append(record)
        self._pending[self.number] = self
        recorder.fired = True

    def lose(self, recorder: Any) -> None:
        """Note that a recorder saw a tensor that can't leave a torch.func transform."""
        self.lost.add(recorder)
        self._pending[self.number] = self
        recorder.fired = True

    def _mark(self, activation: Tensor) -> None:
        node: Any = activation.grad_fn
        if node is None and not torch.is_grad_enabled() and (node := checkpoint_node()) is not None:
            self._lowest = min(self._lowest, made_as(node))
            self.mark.put_outer([node], and_gradients=False)
            self.marked = True
        elif node is None:
            self.hidden = self.hidden or activation.requires_grad or wrapped(activation)
        elif self._is_own(node):
            self._highest = max(self._highest, made_as(node))
            self.mark.put(node)
            self.marked = True

    def _is_own(self, node: Any) -> bool:
        """Return True if a node was made in this forward; nodes of inputs may be shared."""
        return made_as(node) >= self._start

    def end(self, output: Any) -> Any:
        """End the forward and return its output.

        If records keep an output's node alive, an alias replaces the output: the alias's node tells
        when no loss can depend on it any more.
        """
        result, nodes = output, list[Any]()
        for way, tensor in structures.each(output):
            if tensor.grad_fn is not None and self._is_own(tensor.grad_fn):
                kept = made_as(tensor.grad_fn) <= self._highest and tensor.layout is torch.strided
                alias = torch.ops.aten.alias(tensor) if kept else tensor
                result = structures.put(result, way, alias) if kept else result
                nodes.append(alias.grad_fn)
        self._lowest = min([self._lowest, *map(made_as, nodes)])
        self.mark.put_outer(nodes)
        self.marked = self.marked or bool(nodes)
        self.call = None
        return result

    @property
    def open_ended(self) -> bool:
        """True if no mark tells when its outputs are gone.

        No outputs are known, or a marked node came before an activation, so that the records keep
        it.
        """
        return self.mark.has_outer is None or self._lowest <= self._highest

    @property
    def gone(self) -> bool:
        """True if outputs and gradients are gone; False if that can't be seen."""
        return self.call is None and not self.open_ended and not self.mark.has_outer

    def left_transform(self) -> None:
        """Drop records of torch.func transforms that have ended."""
        for recorder, records in list(self.records.items()):
            alive = [record for record in records if not over(record.life)]
            if len(alive) < len(records):
                self.records[recorder] = alive
                self.lost.add(recorder)
