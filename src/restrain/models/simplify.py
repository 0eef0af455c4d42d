"""Fewer operations in a recorded update that runs one by one.

Each operation on a small tensor costs a few microseconds, whatever it computes. An update recorded
from autograd computes some numbers twice, and multiplies by tensors of ones:

    equal operations on equal tensors                   once
    x to the power 1, permutations that change nothing  x
    tensors of equal entries (gradients of means, ...)  made once, when recording
    y · (tensor of entries c)                           y · c
    g + c · x, also of a small product of matrices g    one operation
    Σ c x, Σ x², Σ |x| of small tensors                 c Σ x, one operation

Results are equal up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.operator_schemas import get_signature_for_torch_op

aten = torch.ops.aten
_Operation = type(aten.mul.Tensor)
_LARGEST = 2**16  # entries of a constant that is kept
_LITTLE = 2**13  # entries whose sums in any order differ by rounding alone
_PRODUCT = 2**18  # multiplications of a product that may take a sum with it


def simplify(graph: GraphModule) -> None:
    """Rewrite a recorded graph in place; its nodes still have `meta["val"]`."""
    for rewrite in (_merge, _shorten, _fold, _reduce):
        rewrite(graph, _written(graph))
        graph.graph.eliminate_dead_code()


def _is_operation(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, _Operation)


def _schema(node: Node) -> Any:
    """Return what an operation's arguments are, and which of them it writes."""
    target: Any = node.target
    found: Any = get_signature_for_torch_op(target, return_schemas=True)
    return found[1][0]


def _is_pure(node: Node) -> bool:
    """Return True if a node changes none of its arguments; recordings draw no random numbers."""
    if not _is_operation(node):
        return node.op == "call_function"  # getitem
    target: Any = node.target
    return not (_schema(node).is_mutable or "empty" in target.name())


def _inputs(value: Any) -> Iterator[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    yield from found


def _written(graph: GraphModule) -> set[Node]:
    """Return the nodes whose memory an operation changes in place, also through views."""
    found: set[Node] = set()
    for node in reversed(list(graph.graph.nodes)):
        if not _is_operation(node):
            if node in found:
                found.update(_inputs(node.args))
            continue
        arguments = _schema(node).arguments
        given = [*zip(arguments, node.args, strict=False)]
        given += [(one, node.kwargs[one.name]) for one in arguments if one.name in node.kwargs]
        for argument, value in given:
            alias = argument.alias_info
            if alias is not None and (alias.is_write or node in found):
                found.update(_inputs(value))
    return found


def _merge(graph: GraphModule, written: set[Node]) -> None:
    """Use the first of equal operations for all of them, where nothing is changed in between."""
    seen: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if not _is_pure(node):
            seen.clear()
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if node in written:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def _shorten(graph: GraphModule, written: set[Node]) -> None:
    """Leave out operations that change nothing."""
    for node in list(graph.graph.nodes):
        same = node.target is aten.permute.default and list(node.args[1]) == list(range(len(node.args[1])))
        power = node.target is aten.pow.Tensor_Scalar and node.args[1] == 1 and _alike(node, node.args[0])
        if node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
            graph.graph.erase_node(node)
        elif node.target is aten.detach.default or ((same or power) and node not in written):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten.view.default and node.args[0].target is aten.sum.dim_IntList:
            x, dims, *keeps = node.args[0].args
            kept = [size for dim, size in enumerate(x.meta["val"].shape) if dim not in dims]
            if keeps == [True] and list(node.args[1]) == kept and not node.args[0].kwargs:
                _replace(graph, node, aten.sum.dim_IntList, (x, dims), {})


def _fold(graph: GraphModule, written: set[Node]) -> None:
    """Replace tensors of equal entries by their number, or by a tensor made once."""
    numbers: dict[Node, float] = {}
    for node in list(graph.graph.nodes):
        if node.target is aten.add.Tensor:
            _join(graph, node, written)
        if node in written or not _is_operation(node):
            continue
        number = _number(node, numbers)
        if number is not None:
            numbers[node] = number
        elif node.target is aten.mul.Tensor:
            _as_scalar(graph, node, numbers)
    for count, node in enumerate(numbers):
        if any(user not in numbers for user in node.users) and node.meta["val"].numel() <= _LARGEST:
            _keep(graph, node, numbers[node], f"constant_{count}")


def _number(node: Node, numbers: dict[Node, float]) -> float | None:
    """Return the number that all entries of a floating-point tensor are, if it is known."""
    like = node.meta.get("val")  # none of operations with several results, or none
    if like is None or not like.is_floating_point():
        return None
    if node.target is aten.ones_like.default:
        return 1.0
    first = numbers.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if first is None:
        return None
    if node.target in (aten.expand.default, aten.view.default):
        return first
    operation = _OF_NUMBERS.get(node.target)
    if operation is None or node.kwargs:
        return None
    other = node.args[1]
    second = numbers.get(other) if isinstance(other, Node) else other
    return operation(first, second) if isinstance(second, (int, float)) else None


_OF_NUMBERS: dict[Any, Callable[[float, float], float]] = {
    aten.mul.Tensor: lambda a, b: a * b,
    aten.mul.Scalar: lambda a, b: a * b,
    aten.div.Tensor: lambda a, b: a / b if b else math.nan,
    aten.div.Scalar: lambda a, b: a / b if b else math.nan,
}


def _as_scalar(graph: GraphModule, node: Node, numbers: dict[Node, float]) -> None:
    """Write y · c for the product of y and a tensor of entries c."""
    for one, other in (node.args, node.args[::-1]):
        if one in numbers and isinstance(other, Node) and _alike(node, other):
            inner, factor = _multiple(other) if len(other.users) == 1 else (other, 1.0)
            _replace(graph, node, aten.mul.Scalar, (inner, factor * numbers[one]), {})  # type: ignore[index]
            return


def _multiple(node: Node) -> tuple[Any, float]:
    """Return (x, c) of a node c · x with a number c, else (node, 1)."""
    if node.target in (aten.mul.Scalar, aten.mul.Tensor) and isinstance(node.args[1], (int, float)):
        return node.args[0], float(node.args[1])
    return node, 1.0


def _join(graph: GraphModule, node: Node, written: set[Node]) -> None:
    """Write g + c · x as one operation."""
    if node.kwargs:
        return
    for one, other in (node.args, node.args[::-1]):
        if not (isinstance(one, Node) and isinstance(other, Node) and _alike(node, one) and _alike(node, other)):
            continue
        x, factor = _multiple(one)
        if x is not one and len(one.users) == 1 and one not in written and _alike(node, x):
            if other.target is aten.mm.default and len(other.users) == 1 and _multiplications(other) < _PRODUCT:
                _replace(graph, node, aten.addmm.default, (x, *other.args), {"beta": factor})
            else:
                _replace(graph, node, aten.add.Tensor, (other, x), {"alpha": factor})
            return


def _multiplications(node: Node) -> int:
    """Return the number of multiplications of a product of matrices."""
    a: Any = node.args[0]
    return int(node.meta["val"].numel() * a.meta["val"].shape[1])


def _reduce(graph: GraphModule, written: set[Node]) -> None:
    """Write sums of multiples, squares and absolute values as one operation."""
    for node in list(graph.graph.nodes):
        inner: Any = node.args[0] if node.target is aten.sum.default and not node.kwargs else None
        if inner is None or len(inner.users) > 1 or inner in written or not _is_little(inner):
            continue
        x, factor = _multiple(inner)
        if x is not inner and _is_little(x):
            with graph.graph.inserting_before(node):
                total = graph.graph.call_function(aten.sum.default, (x,))
            total.meta = dict(node.meta)
            _replace(graph, node, aten.mul.Scalar, (total, factor), {})
        elif inner.target is aten.abs.default and _is_little(inner.args[0]):
            _replace(graph, node, aten.linalg_vector_norm.default, (inner.args[0], 1), {})
        elif inner.target is aten.pow.Tensor_Scalar and inner.args[1] == 2 and _is_little(inner.args[0]):
            with graph.graph.inserting_before(node):
                flat = graph.graph.call_function(aten.view.default, (inner.args[0], [-1]))
            flat.meta["val"] = inner.args[0].meta["val"].view(-1)
            _replace(graph, node, aten.dot.default, (flat, flat), {})


def _is_little(node: Any) -> bool:
    value = node.meta.get("val")
    fits = isinstance(value, torch.Tensor) and value.is_floating_point() and 0 < value.numel() <= _LITTLE
    return fits and value.is_contiguous()


def _alike(node: Node, other: Any) -> bool:
    a, b = node.meta.get("val"), other.meta.get("val")
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _replace(graph: GraphModule, node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _keep(graph: GraphModule, node: Node, number: float, name: str) -> None:
    """Make a tensor of equal entries once, as an attribute of the graph."""
    like = node.meta["val"]
    graph.register_buffer(name, torch.full(like.shape, number, dtype=like.dtype, device="cpu"))
    with graph.graph.inserting_before(node):
        new = graph.graph.get_attr(name)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
