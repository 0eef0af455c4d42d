"""Records the operations of a function of tensors as a graph, by running it once.

As torch's `make_fx` does, which however loads torch's compiler, nearly a second. Here the function runs on real
tensors, so that nothing is needed but a mode that sees each operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from restrain.torch_private import MISSING, DispatchMode


class UnfitError(Exception):
    """An update that can't be recorded or compiled; says why."""


class _Recorder(DispatchMode):  # type: ignore[misc]
    """Writes down each operation; every tensor is an argument or the result of another operation."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.kept: list[Tensor] = []  # a number stands for a tensor as long as the tensor lives
        for number, tensor in enumerate(given):
            self._known(tensor, self.graph.placeholder(f"given_{number}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler never sees this, and needn't be told so

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise UnfitError("a rule decides by a number that it has computed")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnfitError(f"it draws random numbers by {func}")
        node = self.graph.call_function(func, self.written(args), self.written(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        for number, tensor in enumerate(found if isinstance(found, (tuple, list)) else ()):
            if isinstance(tensor, Tensor):
                self._known(tensor, self.graph.call_function(operator.getitem, (node, number)))
        if isinstance(found, Tensor):
            self._known(found, node)
        return found

    def _known(self, tensor: Tensor, node: Node) -> None:
        node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def written(self, value: Any) -> Any:
        """Arguments with a node in the place of each tensor."""
        return map_aggregate(value, lambda member: self._node(member) if isinstance(member, Tensor) else member)

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self.nodes:
            raise UnfitError("a rule keeps numbers in a tensor of its own")
        return self.nodes[id(tensor)]


def record(run: Callable[..., Any], given: list[Tensor]) -> GraphModule:
    """The operations of run(*given), which works on the tensors that are given. In `meta["val"]`, their shapes.

    Raises:
        UnfitError: the graph would hold what another run needn't have: tensors that aren't arguments, random numbers,
            decisions by a computed number.
    """
    if "dispatch_mode" in MISSING:
        raise UnfitError(f"torch {torch.__version__} has no mode that sees each operation")
    recorder = _Recorder(given)
    with recorder:
        found = run(*given)
    recorder.graph.output(recorder.written(found))
    return GraphModule({}, recorder.graph)
