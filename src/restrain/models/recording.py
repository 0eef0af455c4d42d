"""Record the operations of a function of tensors as a graph, by running it once.

torch's `make_fx` does the same but loads torch's compiler, which takes nearly a second. Here the
function runs on real tensors under a dispatch mode that sees each operation.
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
    """An update can't be recorded or compiled; the message says why."""


class _Recorder(DispatchMode):  # type: ignore[misc]
    """Dispatch mode that adds each operation to a graph.

    Each input of an operation must be an argument or the result of an earlier operation.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.kept: list[Tensor] = []  # ids are unique only while the tensors live
        for number, tensor in enumerate(given):
            self._known(tensor, self.graph.placeholder(f"given_{number}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler never sees this mode; the default would load it

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
        """Return the arguments with each tensor replaced by its node."""
        return map_aggregate(value, lambda member: self._node(member) if isinstance(member, Tensor) else member)

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self.nodes:
            raise UnfitError("a rule keeps numbers in a tensor of its own")
        return self.nodes[id(tensor)]


def record(run: Callable[..., Any], given: list[Tensor]) -> GraphModule:
    """Run `run(*given)` on the given tensors; return its operations as a graph.

    The `meta["val"]` of a node is a meta tensor with shape, strides and dtype of its result.

    Raises:
        UnfitError: another run might differ: it reads tensors that aren't arguments, draws random
            numbers, or branches on a computed number.
    """
    if "dispatch_mode" in MISSING:
        raise UnfitError(f"torch {torch.__version__} has no mode that sees each operation")
    recorder = _Recorder(given)
    with recorder:
        found = run(*given)
    recorder.graph.output(recorder.written(found))
    return GraphModule({}, recorder.graph)
