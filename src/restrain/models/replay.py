"""What a recorded update, run operation by operation, needn't do at each update.

views of tensors that stay (weights, state, sums)      made before the first of many updates
products and sums of the monitors' values              done once, on the sums over all updates
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
_VIEWS = (
    aten.t.default,
    aten.view.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.detach.default,
)


def hoist(graph: GraphModule, fixed: int) -> GraphModule:
    """Take views of the first `fixed` arguments out of a graph, which gets them as last arguments.

    Returns:
        A graph of the fixed arguments that returns these views.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    before = Graph()
    known: dict[Node, Node] = {node: before.placeholder(node.name) for node in placeholders[:fixed]}
    moved = []
    for node in graph.graph.nodes:
        if node.target in _VIEWS and not node.kwargs and all(one in known for one in node.all_input_nodes):
            known[node] = before.node_copy(node, lambda one: known[one])
            moved.append(node)
    last = placeholders[-1]
    for number, node in enumerate(moved):
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"view_{number}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
    for node in reversed(moved):
        graph.graph.erase_node(node)
    before.output([known[node] for node in moved])
    graph.recompile()
    return GraphModule({}, before)


def sum_apart(graph: GraphModule, most: int) -> Tensor | None:
    """Have a graph sum up the scalars of which the monitors' values are linear combinations.

    Args:
        graph: adds the stacked values to a slice of its first argument, as its only use.
        most: length of that argument.

    Returns:
        The matrix (values, scalars), in float64, which gives the sums of the values; None, with
        nothing changed, if the graph is another one or has more scalars.
    """
    first = next(iter(graph.graph.nodes))
    if len(first.users) != 1:
        return None
    (part,) = first.users
    adds = list(part.users)
    if part.target is not aten.slice.Tensor or len(adds) != 1 or adds[0].target is not aten.add_.Tensor:
        return None
    stack: Any = adds[0].args[1]
    if stack.target is not aten.stack.default or len(stack.users) != 1 or len(stack.args) > 1:
        return None
    values = [_atoms(value) for value in stack.args[0]]
    atoms = list(dict.fromkeys(atom for value in values for atom in value))
    if len(atoms) > most:
        return None
    matrix = torch.zeros(len(values), len(atoms), dtype=torch.float64, device="cpu")
    for row, value in enumerate(values):
        for atom, factor in value.items():
            matrix[row, atoms.index(atom)] = factor
    stack.args = (atoms,)
    part.args = (first, 0, 0, len(atoms))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return matrix


def _atoms(node: Node) -> dict[Node, float]:
    """Return {scalar: factor} of a scalar that is a linear combination of others."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        one, number = node.args[:2]
        if isinstance(one, Node) and _is_scalar(one) and isinstance(number, (int, float)) and number:
            factor = number if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / number
            return {atom: own * factor for atom, own in _atoms(one).items()}
    elif node.target is aten.add.Tensor and all(isinstance(one, Node) and _is_scalar(one) for one in node.args):
        one, other = node.args
        found, more = _atoms(one), _atoms(other)  # type: ignore[arg-type]
        alpha: Any = node.kwargs.get("alpha", 1)
        for atom, own in more.items():
            found[atom] = found.get(atom, 0.0) + alpha * own
        return found
    return {node: 1.0}


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
