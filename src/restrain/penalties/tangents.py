"""Derivatives along random directions by the graph of a finished forward.

Tangents pass node by node from the inputs to the outputs. torch's forward mode would run the
function again. But the tensors that a graph node saves for its backward suffice for its derivative
along a direction: a linear operation is applied to the direction, and a symmetric Jacobian
(activations) is applied by the node's own backward. The result is differentiable, since saved
tensors have their graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from restrain.penalties.estimators import Batch, Direction
from restrain.torch_private import MissingError, result_shapes, saved

Node: TypeAlias = Any  # torch.autograd.graph.Node; each kind has its own saved attributes
Tangents: TypeAlias = list[Tensor | None]  # tangent of each input of an operation; None: no tangent

_LEAF = "torch::autograd::AccumulateGrad"
_FACTORS = {"AddmmBackward0": ("mat1", 1), "MmBackward0": ("self", 0)}  # saved name and input index of x in b + x Wᵀ


def pushed_by_graph(ys: Sequence[Batch], xs: Sequence[Batch]) -> tuple[list[Batch], bool] | None:
    """Return Ju of the outputs for random signs u; None if an operation isn't supported.

    An input that needs no gradient isn't in the graph. It must be a factor of matrix products, and
    everything else in the graph made of parameters, so that nothing else can depend on it.

    Returns:
        The derivatives, and True if they need no gradient of the inputs.
    """
    known: dict[Node, Tensor] = {}
    outside: list[tuple[Tensor, Tensor]] = []
    directions = {forward: Direction() for forward in dict.fromkeys(x.forward for x in xs)}
    for x in xs:
        u = directions[x.forward].along(x.tensor)
        if not x.tensor.requires_grad:
            outside.append((x.tensor, u))
            continue
        edge = torch.autograd.graph.get_gradient_edge(x.tensor)
        if edge.output_nr or edge.node in known:
            return None
        known[edge.node] = u
    ends = [y.tensor.grad_fn for y in ys]
    if None in ends or any(y.tensor.output_nr for y in ys):
        return None
    try:
        with torch.autocast(xs[0].tensor.device.type, enabled=False):
            closed = _push(_upwards(ends), known, outside, set(known))
    except MissingError:
        return None
    if closed is None or (outside and not closed) or any(end not in known for end in ends):
        return None
    return [replace(y, tensor=known[end]) for y, end in zip(ys, ends, strict=True)], closed


def _upwards(ends: Sequence[Node]) -> list[Node]:
    """Return the nodes that lead to `ends` in topological order, inputs first."""
    order: list[Node] = []
    seen: set[Node] = set()
    waiting = [(end, False) for end in ends]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(before, False) for before, _ in node.next_functions if before is not None]
    return order


def _push(
    order: Sequence[Node], known: dict[Node, Tensor], outside: Sequence[tuple[Tensor, Tensor]], starts: set[Node]
) -> bool | None:
    """Propagate tangents through the nodes into `known`; None if an operation isn't supported.

    Return True if the graph consists only of parameters and inputs multiplied by them.
    """
    closed = True
    for node in order:
        name, before = node.name(), [one for one, _ in node.next_functions]
        if name == _LEAF:
            continue
        given: Tangents = [known.get(one) for one in before]
        kept, place = _FACTORS.get(name, ("", -1))
        if outside and kept and before[place] is None:
            factor = saved(node, kept)
            given[place] = next((u for x, u in outside if x is factor), None)
        if all(t is None for t in given):
            closed = closed and name == "TBackward0" and before[0] is not None and before[0].name() == _LEAF
            continue
        rule = _RULES.get(name)
        if rule is None or any(
            number and t is not None for (_, number), t in zip(node.next_functions, given, strict=True)
        ):
            return None
        tangent = rule(node, given)
        if tangent is None:
            return None
        known[node] = known[node] + tangent if node in known else tangent
        constant = any(one is None and t is None for one, t in zip(before, given, strict=True))
        closed = closed and not constant and not any(one in starts and i != place for i, one in enumerate(before))
    return closed


# Operations


def _symmetric(node: Node, given: Tangents) -> Tensor | None:
    tangent: Tensor = node(given[0])
    return tangent


def _linear(node: Node, given: Tangents) -> Tensor | None:
    _, place = _FACTORS[node.name()]
    x = given[place]
    if x is None or sum(t is not None for t in given) > 1 or saved(node, "alpha", 1) != 1:
        return None
    matrix = saved(node, "mat2")
    if matrix is None:  # saved only for the gradient of x
        transposed = node.next_functions[place + 1][0]
        weight = (
            getattr(transposed.next_functions[0][0], "variable", None) if transposed.name() == "TBackward0" else None
        )
        if weight is None:
            return None
        matrix = weight.t()
    product: Tensor = x @ matrix
    return product


def _convolution(node: Node, given: Tangents) -> Tensor | None:
    x, *others = given
    if x is None or any(t is not None for t in others):
        return None
    settings = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    return torch.convolution(x, saved(node, "weight"), None, *[saved(node, one) for one in settings])


def _sum(node: Node, given: Tangents, sign: float = 1.0) -> Tensor | None:
    x, y = given
    other = None if y is None else y * (sign * saved(node, "alpha"))
    total = other if x is None else x if other is None else x + other
    assert total is not None
    return total.expand(_shape(node))


def _difference(node: Node, given: Tangents) -> Tensor | None:
    return _sum(node, given, -1.0)


def _product(node: Node, given: Tangents) -> Tensor | None:
    terms = [t * saved(node, key) for t, key in zip(given, ("other", "self"), strict=True) if t is not None]
    total: Tensor = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return total


def _quotient(node: Node, given: Tangents) -> Tensor | None:
    x, y = given
    return None if x is None or y is not None else x / saved(node, "other")


def _same_order(node: Node, given: Tangents) -> Tensor | None:
    assert given[0] is not None
    return given[0].reshape(_shape(node))


def _max_pool(node: Node, given: Tangents) -> Tensor | None:
    assert given[0] is not None
    chosen: Tensor = saved(node, "result1")
    return given[0].flatten(-2).gather(-1, chosen.flatten(-2)).view_as(chosen)


def _mean_pool(node: Node, given: Tangents) -> Tensor | None:
    assert given[0] is not None
    high, wide = _shape(node)[-2:]
    return F.adaptive_avg_pool2d(given[0], (high, wide))


def _shape(node: Node) -> list[int]:
    """Return the shape of an operation's result."""
    return list(result_shapes(node)[0])


_RULES: dict[str, Callable[[Node, Tangents], Tensor | None]] = {
    "AddmmBackward0": _linear,
    "MmBackward0": _linear,
    "ConvolutionBackward0": _convolution,
    "AddBackward0": _sum,
    "SubBackward0": _difference,
    "MulBackward0": _product,
    "DivBackward0": _quotient,
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "AdaptiveAvgPool2DBackward0": _mean_pool,
    "RsubBackward1": _symmetric,  # number - tensor
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0"), _same_order),
    **{
        f"{name}Backward0": _symmetric
        for name in (
            "Tanh", "Sigmoid", "Relu", "Gelu", "Silu", "Elu", "LeakyRelu", "Softplus", "Hardtanh", "Hardswish", "Mish",
            "LogSigmoid", "Softmax", "Exp", "Sin", "Cos", "Neg", "Clone",
        )
    },
}  # fmt: skip
