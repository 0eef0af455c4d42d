"""What one forward of a model gave at the places of rules."""

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
    """What a call of a layer gave to a recorder.

    Args:
        value: a penalty's value is `value` times `factor`; for other recorders the tensor, or whatever they keep.
        factor: see there.
        graph: whether the value has its graph; inside a reentrant checkpoint and in compiled code it has none.
        calls: over how many calls the value is summed.
        watched: a tensor that must not change until the value is used, or of which it is to be known whether it does.
        version: the version of the watched tensor.
        life: token of the transform of torch.func that the value lives in.
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
        """The record of a tensor that has its graph if there are any now."""
        sign = life() if wrapped(value) else None
        before = None if watched is None else version(watched)
        return cls(value, factor, torch.is_grad_enabled(), 1, watched, before, sign)

    @property
    def changed(self) -> bool:
        """Whether the watched tensor was overwritten in place."""
        return self.watched is not None and version(self.watched) != self.version


class Forward:
    """A forward of the model in training, or a call of one of its layers outside of all forwards ("alone").

    Args:
        pending: a mapping by numbers, which it enters with its first record; taken out of there it is forgotten.
        key, number: of its marks.
        call: the call of the model, while that runs; None of what is over.
    """

    def __init__(self, pending: MutableMapping[int, Forward], key: str, number: int, call: Call | None = None) -> None:
        self._pending, self.number, self.call = pending, number, call
        self.mark = Mark(key, number)
        self.marked = False  # whether any node has the mark
        self.hidden = False  # whether there is a record of what has a graph somewhere, but no node to be seen
        self.records: dict[Hashable, list[Record]] = {}  # by recorder
        self.lost: set[Hashable] = set()  # recorders that saw a tensor which can't leave a transform of torch.func
        self.collection = 0  # the number of the collection that counted it
        self.past = False  # counts only for losses that are known to depend on it
        # Sequence numbers of nodes, which rise along the graph: the next one at the beginning; the highest one of an
        # activation; the lowest one of a marked node besides, whose mark is to tell whether anything is left.
        self._start = 0 if call is None else newest_node()
        self._highest, self._lowest = -1, sys.maxsize

    def keep(self, recorder: Any, record: Record, seen: Tensor | None = None) -> None:
        """Keep a record of a recorder, who saw this tensor; none of what compiled code has added."""
        if seen is None:
            self.hidden = True
        else:
            self._mark(seen)
        self.records.setdefault(recorder, []).append(record)
        self._pending[self.number] = self
        recorder.fired = True

    def lose(self, recorder: Any) -> None:
        """Note that a recorder saw what can't leave a transform of torch.func."""
        self.lost.add(recorder)
        self._pending[self.number] = self
        recorder.fired = True

    def _mark(self, activation: Tensor) -> None:
        node: Any = activation.grad_fn
        if node is None and not torch.is_grad_enabled() and (node := checkpoint_node()) is not None:
            self._lowest = min(self._lowest, made_as(node))
            self.mark.put_outer([node], passes=False)
            self.marked = True
        elif node is None:
            self.hidden = self.hidden or activation.requires_grad or wrapped(activation)
        elif self._is_own(node):
            self._highest = max(self._highest, made_as(node))
            self.mark.put(node)
            self.marked = True

    def _is_own(self, node: Any) -> bool:
        """Whether a node was made in this forward: what came with the inputs may belong to others, too."""
        return made_as(node) >= self._start

    def end(self, output: Any) -> Any:
        """The forward came to its end; return its output.

        Where the records keep the node of an output alive, an alias goes on in its place, whose node tells when nobody
        can depend on it any more.
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
        """Whether nothing tells when its outputs are gone: none is known, or one came before an activation.

        That one's node is kept by the records.
        """
        return self.mark.has_outer is None or self._lowest <= self._highest

    @property
    def gone(self) -> bool:
        """Whether outputs and gradients are gone; false if that can't be told."""
        return self.call is None and not self.open_ended and not self.mark.has_outer

    def left_transform(self) -> None:
        """Leave out the records of transforms of torch.func that are over."""
        for recorder, records in list(self.records.items()):
            alive = [record for record in records if not over(record.life)]
            if len(alive) < len(records):
                self.records[recorder] = alive
                self.lost.add(recorder)
