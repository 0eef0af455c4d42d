"""Graph of the layers that produce and read a model's units, derived from `torch.export`.

The exported graph is run once on the example, with three values for each tensor:

* the tensor itself, for shapes;
* labels: the label of each entry's unit (`labels`), as a tensor that broadcasts to the shape; None
  for tensors without units, such as inputs;
* constants: the value of each entry that doesn't depend on the inputs, NaN for other entries, as a
  tensor that broadcasts to the shape; None if all entries depend on the inputs.

Operations that only move entries are applied to labels and constants, too. Pointwise operations
join the labels of their operands. Layers with weights consume labels and produce new ones; each is
recorded as a `Read`. Unknown operations make the units of their operands stay, with the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from restrain.connections.labels import FIXED, Labels
from restrain.connections.trees import leaves, mapped
from restrain.errors import CompactionError

aten = torch.ops.aten


@dataclass
class Held:
    """A tensor of the graph: its value, and the labels and constants of its entries."""

    value: Tensor
    labels: Tensor | None = None
    constants: Tensor | None = None
    name: str | None = None
    """The name of a parameter or buffer; None for other tensors."""


@dataclass
class Read:
    """Consumption of features by a weight: output += weight · features."""

    weight: str
    bias: str | None
    dim: int
    """The axis of the weight along the features, 0 or 1; the other axis is along the outputs."""
    features: Tensor
    """Labels of the features."""
    outputs: Tensor
    """Labels of the outputs."""
    constants: list[float]
    """The constant value of each feature; NaN if it isn't constant."""
    folds: str
    """Why constants other than zero can't be added to the bias; empty if they can."""


MOVES = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.slice.Tensor,
    aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.t.default, aten.flip.default, aten.roll.default, aten.repeat.default,
    aten._unsafe_view.default, aten.unbind.int, aten.pixel_shuffle.default, aten.channel_shuffle.default,
    aten.narrow.default, aten.movedim.int, aten.swapaxes.default, aten.repeat_interleave.self_int,
    aten.expand_as.default, aten.view_as.default, aten.tile.default,
}  # fmt: skip
SAME = {
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.dropout.default,
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.feature_dropout.default,
    aten.alpha_dropout.default, aten.detach_.default, aten.lift_fresh_copy.default, aten.dropout_.default,
    aten.type_as.default, aten.native_dropout.default,
}  # fmt: skip
KEEPS_NAN = {
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "tanh", "sigmoid", "add", "sub", "mul", "div", "neg", "exp",
    "log", "sqrt", "rsqrt", "pow", "abs", "square", "elu", "elu_", "leaky_relu", "leaky_relu_", "softplus", "hardswish",
    "hardswish_", "hardtanh", "hardtanh_", "hardsigmoid", "mish", "selu", "selu_", "celu", "clamp", "clamp_min",
    "clamp_max", "maximum", "minimum", "erf", "sin", "cos", "add_", "sub_", "mul_", "div_", "log1p", "expm1", "rsub",
    "reciprocal", "log_sigmoid", "logit", "softshrink", "hardshrink", "threshold", "tan", "atan", "sinh", "cosh",
}  # fmt: skip
"""Pointwise operations that propagate NaN, unless the result doesn't depend on that operand."""
POOLS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest3d",
    "upsample_bicubic2d", "upsample_trilinear3d", "pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d",
    "reflection_pad1d", "replication_pad1d",
}  # fmt: skip
"""Operations on the last axes that act on each channel alone."""
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "max", "min", "prod", "cumsum", "norm"}


def base_name(target: Any) -> str:
    """Return the name of an operation without namespace and overload: "add" of aten.add.Tensor."""
    return str(getattr(target, "__name__", target)).partition(".")[0]


def compressed(labels: Tensor | None) -> Tensor | None:
    """Return labels with size 1 along axes where they are equal; None if all are `FIXED`."""
    if labels is None or not bool((labels != FIXED).any()):
        return None
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1)
        if labels.shape[dim] > 1 and bool((labels == first).all()):
            labels = first
    return labels


def varying(labels: Tensor | None) -> set[int]:
    """Return the axes along which labels differ."""
    return set() if labels is None else {dim for dim, size in enumerate(labels.shape) if size > 1}


def aligned(tensor: Tensor, rank: int) -> Tensor:
    """Return a tensor with leading axes of size 1 up to a rank, as broadcasting adds them."""
    return tensor.reshape([1] * (rank - tensor.dim()) + list(tensor.shape))


def _calls_of(node: fx.Node) -> list[str]:
    """Return the calls of modules in which a node is: paths, with @ and a number if repeated."""
    return [call for call, _ in (node.meta.get("nn_module_stack") or {}).values()]


class Graph(fx.Interpreter):
    """Interpreter of an exported model that finds the labels of its parameters and their readers.

    Args:
        model: a model in eval mode.
        args: its positional inputs.
        kwargs: its inputs by name.
        acted_on: {path of a module: why units of its output stay}, where functions outside the
            graph act on outputs, which so aren't constant.

    Attributes:
        labels: the union-find structure of labels.
        axes: {name of a parameter or buffer: labels along each axis}.
        reads: the reads of features by weights, in the order of the forward.
        dropped: labels of constants other than zero that pass through dropout.
        normalised: labels of the channels of batch normalisations.
        given: {path of a module: (shape, labels) of its output at each call}.

    Raises:
        CompactionError: torch.export can't follow the model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        acted_on: Mapping[str, str] | None = None,
    ) -> None:
        program = _exported(model, args, kwargs or {})
        super().__init__(program.graph_module)
        last = {call: node for node in program.graph_module.graph.nodes for call in _calls_of(node)}
        reasons = [(node, (acted_on or {}).get(call.partition("@")[0])) for call, node in last.items()]
        self._acted_on = {node: why for node, why in reasons if why is not None}
        self.labels, self.reads = Labels(), list[Read]()
        self.dropped, self.normalised = set[int](), set[int]()
        self.axes: dict[str, list[Tensor]] = {}
        self.given: dict[str, list[tuple[tuple[int, ...], Tensor | None]]] = {}
        self._calls: dict[str, Held] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        self._names = {name: first.setdefault(id(tensor), name) for name, tensor in named}
        self._tensors = {**dict(program.constants), **dict(named)}
        for name in dict.fromkeys(self._names.values()):
            self.axes[name] = [self.labels.fresh(size) for size in self._tensors[name].shape]
        for path, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                for name, _ in module.named_parameters():
                    for labels in self.axes[self._names[f"{path}.{name}" if path else name]]:
                        self.labels.fix(labels, "heads and features of this MultiheadAttention have one width")
        inputs = iter(leaves((args, kwargs or {})))
        with torch.no_grad():
            self.run(*self._placeholders(program.graph_signature, inputs), enable_io_processing=False)
        for call, one in self._calls.items():
            self.given.setdefault(call.partition("@")[0], []).append((tuple(one.value.shape), one.labels))

    def run_node(self, n: fx.Node) -> Any:
        """Return the result of a node, and note it as the latest of the modules that it is in."""
        found = super().run_node(n)
        if isinstance(found, Held):
            for call in _calls_of(n):
                self._calls[call] = found
            if n in self._acted_on:
                found.constants = None
                self.labels.fix(found.labels, self._acted_on[n])
        return found

    def _placeholders(self, signature: Any, inputs: Iterator[Any]) -> list[Any]:
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants, found = signature.inputs_to_lifted_tensor_constants, list[Any]()
        graph: Any = self.module.graph
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in sources:
                found.append(self._named(sources[node.name]))
            elif node.name in constants:
                found.append(Held(self._tensors[constants[node.name]]))
            else:
                value = next(inputs)
                found.append(Held(value) if isinstance(value, Tensor) else value)
        return found

    def _named(self, name: str) -> Held:
        """Return a parameter or buffer, with labels of entries if just one axis has size > 1."""
        value, own = self._tensors[name], self._names.get(name)
        wide = [dim for dim, size in enumerate(value.shape) if size > 1]
        if own is None or len(wide) != 1:
            return Held(value, None, value if not wide and value.is_floating_point() else None, own)
        shape = [size if dim == wide[0] else 1 for dim, size in enumerate(value.shape)]
        constants = value.detach() if value.is_floating_point() else None
        return Held(value, self.axes[own][wide[0]].reshape(shape), constants, own)

    # ------------------------------------------------------------------ running

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on tensors, labels and constants."""
        if target is operator.getitem:
            return args[0][args[1]]
        plain, named = mapped(_value, (args, kwargs))
        value = target(*plain, **named)
        name = base_name(target)
        if value is None or name.startswith("_assert"):
            return value
        if target in SAME and isinstance(args[0], Held):
            constants = self._dropped(args[0], args[1]) if "dropout" in name else args[0].constants
            return Held(value, args[0].labels, constants)
        handler = _HANDLERS.get(name)
        if handler is None and isinstance(value, Tensor) and torch.Tag.pointwise in getattr(target, "tags", ()):
            handler = Graph._by_entry
        operands = [one for one in leaves((args, kwargs)) if isinstance(one, Held)]
        if handler is None:
            return self._unknown(name, value, operands)
        if handler not in _WEIGHTED and all(one.labels is None and one.constants is None for one in operands):
            self._fix_others(operands)
            return _wrapped(value)
        return handler(self, target, value, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor or module of the graph."""
        found = super().get_attr(target, args, kwargs)
        return Held(found) if isinstance(found, Tensor) else found

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Mark the units of the outputs as units that stay."""
        for one in leaves(args):
            if isinstance(one, Held):
                self._fix(one, "it is an output of the model")
        return args[0]

    def _fix(self, one: Held, reason: str) -> None:
        self.labels.fix(one.labels, reason)
        for labels in self.axes.get(one.name or "", ()):
            self.labels.fix(labels, reason)

    def _fix_others(self, operands: Sequence[Held]) -> None:
        """Mark the units of parameters of several axes that aren't used as weights."""
        for one in operands:
            if one.name is not None and one.labels is None:
                self._fix(one, f"{one.name} isn't used as a layer's weight")

    def _unknown(self, name: str, value: Any, operands: Sequence[Held]) -> Any:
        for one in operands:
            self._fix(one, f"it goes into {name}, of which restrain doesn't know what it reads")
        return _wrapped(value)

    def _whole(self, labels: Tensor | None, dims: set[int], reason: str) -> None:
        """Join all indices along the given axes, which are needed together, or make them stay."""
        varied = varying(labels)
        if labels is None or not varied & dims:
            return
        if not varied - dims:
            self.labels.fix(labels, reason)
            return
        inner = [dim for dim in range(labels.dim()) if dim in dims]
        outer = [dim for dim in range(labels.dim()) if dim not in dims]
        rows = labels.permute(*outer, *inner).reshape(-1, math.prod(labels.shape[dim] for dim in inner))
        self.labels.join_rows(rows)

    # ------------------------------------------------------------------ entries

    def _moved(self, target: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation that only moves entries."""
        x, plain = args[0], mapped(_value, args[1:])
        target = aten.reshape.default if target in (aten.view.default, aten._unsafe_view.default) else target
        labels = None if x.labels is None else target(x.labels.expand(x.value.shape), *plain, **kwargs)
        constants = None if x.constants is None else target(x.constants.expand(x.value.shape), *plain, **kwargs)
        if isinstance(value, Tensor):
            return Held(value, compressed(labels), _some(constants))
        parts = range(len(value))
        return [
            Held(
                value[part],
                None if labels is None else compressed(labels[part]),
                None if constants is None else _some(constants[part]),
            )
            for part in parts
        ]

    def _dropped(self, x: Held, share: float) -> Tensor | None:
        """Return constants after dropout, where only zeros are constant in training, too."""
        if x.constants is None or x.labels is None or not share:
            return x.constants
        changed = (x.constants != 0) & ~x.constants.isnan()
        self.dropped |= set(x.labels.expand(x.value.shape)[changed.expand(x.value.shape)].tolist())
        return _some(torch.where(changed, _nan(x.value), x.constants))

    def _joined(self, target: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the concatenation of tensors."""
        parts, rest = args[0], args[1:]
        self._fix_others(parts)
        labels = [_expanded(one.labels, one.value, torch.tensor(FIXED, device="cpu")) for one in parts]
        constants = None
        if value.is_floating_point() and any(one.constants is not None for one in parts):
            constants = target([_expanded(one.constants, one.value, _nan(value)) for one in parts], *rest, **kwargs)
        return Held(value, compressed(target(labels, *rest, **kwargs)), _some(constants))

    def _by_entry(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a pointwise operation, which joins the labels of its operands."""
        name, rank = base_name(target), value.dim()
        operands = [one for one in leaves((args, kwargs)) if isinstance(one, Held)]
        self._fix_others(operands)
        labelled = [aligned(one.labels, rank) for one in operands if one.labels is not None]
        for one in operands:
            if one.labels is None and labelled:
                wide = {dim for dim, size in enumerate(aligned(one.value, rank).shape) if size > 1}
                self._whole(labelled[0], wide, f"in {name} it meets a tensor that can't be made smaller")
        labels = max(labelled, key=Tensor.numel, default=None)
        for own in labelled:
            self._meets(own, max(labelled, key=Tensor.numel), f"in {name} it meets a tensor that can't be made smaller")
        found = Held(value, labels, self._constant(target, name, value, args, kwargs))
        if name.endswith("_") and isinstance(args[0], Held):  # in place
            args[0].labels, args[0].constants = found.labels, found.constants
        return found

    def _meets(self, one: Tensor, labels: Tensor, reason: str) -> None:
        """Join an operand's labels with the labels of the largest operand.

        Units of the largest operand lie along the first axis that varies. Operands that only vary
        along another axis, such as a scale for each feature of all heads, have to stay.
        """
        varied, most = varying(one), varying(labels)
        if varied and most and min(most) not in varied:
            self.labels.fix(one, reason)
            self._whole(labels, varied, reason)
        else:
            self.labels.join(one, labels, reason)

    def _constant(self, target: Any, name: str, value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        if name not in KEEPS_NAN or not value.is_floating_point():
            return None
        rank = value.dim()

        def known(one: Any) -> Any:
            if not isinstance(one, Held):
                return one
            return aligned(_nan(value).reshape([1] * rank) if one.constants is None else one.constants, rank).clone()

        given, named = mapped(known, (args, kwargs))
        found = target(*given, **named)
        if name in ("mul", "mul_"):
            for one in given:
                if isinstance(one, Tensor):
                    found = torch.where(one == 0, torch.zeros_like(found), found)
        return _some(found)

    def _prelu(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = args
        if weight.labels is not None and value.dim() > 1:
            shape = [1] * value.dim()
            shape[1] = -1
            weight = Held(weight.value.reshape(shape), weight.labels.reshape(shape), weight.constants.reshape(shape))
        found: Held = self._by_entry(aten.mul.Tensor, value, (x, weight), {})
        known = x.constants
        found.constants = None if known is None else _some(torch.where(known > 0, known, known * weight.value))
        return found

    # ------------------------------------------------------------------ features

    def _reduced(self, target: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a reduction along axes."""
        x, name = args[0], base_name(target)
        dims = _dims(args[1] if len(args) > 1 else kwargs.get("dim"), x.value.dim())
        self._whole(x.labels, dims, f"{name} goes over its features")
        if not isinstance(value, Tensor):
            return [Held(one) for one in value]
        keep = value.dim() == x.value.dim()
        labels = x.labels
        for dim in sorted(dims, reverse=True) if labels is not None else ():
            labels = labels.narrow(dim, 0, 1) if keep else labels.select(dim, 0)
        constants = None
        if x.constants is not None and name in ("mean", "amax", "amin"):
            constants = _some(target(x.constants.expand(x.value.shape), *args[1:], **kwargs))
        return Held(value, compressed(labels), constants)

    def _softmax(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._whole(args[0].labels, {args[1] % value.dim()}, f"{base_name(target)} goes over its features")
        return Held(value, args[0].labels)

    def _pooled(self, target: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on the last axes that acts on each channel alone."""
        x, name = args[0], base_name(target)
        last = [letter for letter in name if letter.isdigit()]
        count = int(last[0]) if last and "nd" not in name else _padded(args[1])
        self._whole(x.labels, set(range(x.value.dim() - count, x.value.dim())), f"{name} goes over its features")
        constants = None
        if x.constants is not None:
            constants = target(x.constants.expand(x.value.shape).contiguous(), *args[1:], **kwargs)
        if isinstance(value, Tensor):
            return Held(value, x.labels, _some(constants))
        rest = [Held(one) for one in value[1:]]
        return [Held(value[0], x.labels, None if constants is None else _some(constants[0])), *rest]

    def _batch_norm(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias, mean, var = args[:5]
        shape = [1] * value.dim()
        shape[1] = -1
        labels = x.labels
        own = [
            one.labels.reshape(shape) for one in (weight, bias, mean, var) if one is not None and one.labels is not None
        ]
        for one in own:
            fixed = torch.tensor(FIXED, device="cpu") if labels is None else labels
            self.labels.join(one, fixed, "it normalises inputs of the model")
        for one in own:
            self.normalised |= set(one.flatten().tolist())
        constants = None
        if x.constants is not None and mean is not None:
            given = mapped(_value, args[1:])
            constants = target(x.constants.expand(value.shape).contiguous(), *given, **kwargs)
        if weight is not None and bool((weight.value == 0).any()):
            known = _nan(value) if constants is None else constants
            shift = weight.value * 0 if bias is None else bias.value
            constants = torch.where((weight.value == 0).reshape(shape), shift.reshape(shape), known)
        return Held(value, own[0] if labels is None and own else labels, _some(constants))

    def _layer_norm(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, name = args[0], base_name(target)
        dims = {1} if name == "group_norm" else set(range(value.dim() - len(args[1]), value.dim()))
        self._whole(x.labels, dims, f"{name} goes over its features, and its numbers depend on how many there are")
        for one in args[2:4]:
            if isinstance(one, Held):
                self._fix(one, f"{name} goes over its features, and its numbers depend on how many there are")
        return Held(value, x.labels)

    # ------------------------------------------------------------------ weights

    def _linear(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias = (*args, None)[:3]
        return self._product(x, weight, bias, 1, value, "linear")

    def _addmm(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias, x, weight = args
        if kwargs:
            return self._unknown("addmm", value, [x, weight, bias])
        return self._product(x, weight, bias, 0, value, "addmm")

    def _matmul(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, y = args
        if y.name is not None and y.value.dim() == 2 and x.value.dim() > 1:
            return self._product(x, y, None, 0, value, "matmul")
        if min(x.value.dim(), y.value.dim()) < 2:
            return self._unknown("matmul of a vector", value, [x, y])
        return self._of_features(x, y, value)

    def _product(self, x: Held, weight: Held, bias: Held | None, dim: int, value: Tensor, name: str) -> Any:
        """Return the product of the last axis with a weight, whose axis `dim` is the features."""
        if weight.name is None or weight.value.dim() != 2 or (bias is not None and bias.name is None):
            return self._unknown(f"{name} with a weight that is computed", value, [x, weight, *_given(bias)])
        axis = x.value.dim() - 1
        features, others = self._features(x, axis, value)
        outputs = self._outputs(weight, bias, 1 - dim, others)
        self.labels.join(features, self.axes[weight.name][dim], f"{weight.name} reads inputs of the model")
        self._note(x, axis, weight, bias, dim, features, outputs, "")
        matrix = weight.value if dim == 1 else weight.value.t()
        constants = _linear_constants(x.constants, matrix, None if bias is None else bias.value, value)
        labels = x.labels if others else outputs.reshape([1] * axis + [-1])
        return Held(value, compressed(labels), constants)

    def _features(self, x: Held, axis: int, value: Tensor) -> tuple[Tensor, bool]:
        """Return (labels along an axis, True if labels vary along other axes instead)."""
        size, varied = x.value.shape[axis], varying(x.labels)
        if x.labels is not None and varied <= {axis}:
            return x.labels.flatten().expand(size), False
        if axis in varied:
            self.labels.fix(x.labels, "its features lie along several axes")
        return torch.full((size,), FIXED, device="cpu"), bool(varied - {axis})

    def _outputs(self, weight: Held, bias: Held | None, dim: int, others: bool) -> Tensor:
        outputs = self.axes[weight.name or ""][dim]
        if bias is not None:
            self.labels.join(self.axes[bias.name or ""][-1], outputs, "")
        if others:
            self.labels.fix(outputs, "it lies beside features along another axis")
        return outputs

    def _note(
        self,
        x: Held,
        axis: int,
        weight: Held,
        bias: Held | None,
        dim: int,
        features: Tensor,
        outputs: Tensor,
        folds: str,
    ) -> None:
        constants = _levels(x, axis)
        self.reads.append(
            Read(weight.name or "", None if bias is None else bias.name, dim, features, outputs, constants, folds)
        )

    def _convolution(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias = (*args, None)[:3]
        name, groups = base_name(target), args[6] if len(args) > 6 else 1
        transposed = "transpose" in name
        if weight.name is None or (bias is not None and bias.name is None):
            return self._unknown(f"{name} with a weight that is computed", value, [x, weight, *_given(bias)])
        axis = x.value.dim() - weight.value.dim() + 1
        features, others = self._features(x, axis, value)
        if others:
            self.labels.fix(x.labels, "its features lie along several axes")
        if groups > 1:
            outputs = self._grouped(weight, bias, features, groups, transposed, value.shape[axis])
        else:
            outputs = self._outputs(weight, bias, int(transposed), False)
            dim = int(not transposed)
            self.labels.join(features, self.axes[weight.name][dim], f"{weight.name} reads inputs of the model")
            self._note(x, axis, weight, bias, dim, features, outputs, _why_not_folded(name, args))
        shape = [1] * value.dim()
        shape[axis] = -1
        constants = _convolved(target, x, weight, bias, args, value, shape, transposed)
        return Held(value, compressed(outputs.reshape(shape)), constants)

    def _grouped(
        self, weight: Held, bias: Held | None, features: Tensor, groups: int, transposed: bool, count: int
    ) -> Tensor:
        """Join the inputs and outputs of each group to one unit, and return the outputs' labels."""
        axes = self.axes[weight.name or ""]
        self.labels.fix(axes[1], "groups of a convolution are equally large")
        rows = features.reshape(groups, -1)
        self.labels.join_rows(rows)
        outputs = rows[:, :1].expand(groups, count // groups).reshape(-1)
        self.labels.join(axes[0], features if transposed else outputs, f"{weight.name} reads inputs of the model")
        if bias is not None:
            self.labels.join(self.axes[bias.name or ""][0], outputs, f"{weight.name} reads inputs of the model")
        if bool((features == FIXED).any()):
            return torch.full((count,), FIXED, device="cpu")
        return outputs if transposed else axes[0]

    def _embedding(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        table = args[0]
        if table.name is None:
            return self._unknown("an embedding that is computed", value, [table])
        self.labels.fix(self.axes[table.name][0], "it is an entry of an embedding")
        labels = self.axes[table.name][1].reshape([1] * (value.dim() - 1) + [-1])
        still = (table.value == table.value[:1]).all(0)
        constants = torch.where(still, table.value[0], _nan(value)).reshape(labels.shape)
        return Held(value, compressed(labels), _some(constants))

    # ------------------------------------------------------------------ attention

    def _of_features(self, x: Held, y: Held, value: Tensor) -> Held:
        """Return the product of two tensors; the contracted features of a head become one unit."""
        rank = value.dim()
        one = None if x.labels is None else aligned(x.labels, rank)
        other = None if y.labels is None else aligned(y.labels, rank)
        reason = "it is contracted with another tensor"
        if one is not None and other is not None:
            if rank - 2 in varying(one) and rank - 1 in varying(other):
                self.labels.fix(one, reason)
                self.labels.fix(other, reason)
            if rank - 1 in varying(one) and rank - 2 in varying(other):
                self.labels.join(one.narrow(-2, 0, 1), other.narrow(-1, 0, 1).mT, reason)
        self._whole(one, {rank - 1}, reason)
        self._whole(other, {rank - 2}, reason)
        labels = None if one is None else one.narrow(-1, 0, 1)
        if other is not None:
            columns = other.narrow(-2, 0, 1)
            if labels is not None:
                self.labels.join(labels, columns, reason)
            labels = columns if labels is None or columns.numel() >= labels.numel() else labels
        constants = None
        if y.constants is not None:
            zero = (y.constants == 0).expand(y.value.shape).all(-2, keepdim=True)
            constants = _some(torch.where(zero, torch.zeros((), dtype=value.dtype, device=value.device), _nan(value)))
        return Held(value, compressed(labels), constants)

    def _attention(self, target: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the attention; queries, keys and values of a head become one unit."""
        q, k, v = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        rank, heads = value.dim(), value.dim() - 3
        found = [q.labels, k.labels, v.labels]
        wide = isinstance(mask, Held) and aligned(mask.value, rank).shape[heads] > 1
        if rank < 4 or wide or any(one is None or rank - 2 in varying(one) for one in found):
            return self._unknown("attention without heads of its own", value, [q, k, v])
        many = [
            one.repeat_interleave(value.shape[heads] // held.value.shape[heads], heads) if one.shape[heads] > 1 else one
            for one, held in zip(found, (q, k, v), strict=True)
        ]
        rows = [
            one.narrow(-2, 0, 1).expand(*one.shape[:-3], value.shape[heads], 1, held.value.shape[-1]).flatten(-2)
            for one, held in zip(many, (q, k, v), strict=True)
        ]
        self.labels.join_rows(torch.cat(rows, -1).flatten(0, -2))
        constants = None
        if v.constants is not None:
            given = v.constants.expand(v.value.shape)
            given = given.repeat_interleave(value.shape[heads] // given.shape[heads], heads)
            first = given.narrow(-2, 0, 1)
            constants = _some(torch.where((given == first).all(-2, keepdim=True), first, _nan(value)))
        return Held(value, compressed(many[2]), constants)


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CompactionError(
            f"torch.export can't follow {type(model).__name__}, so its units aren't known: {told}"
        ) from error


def _value(one: Any) -> Any:
    return one.value if isinstance(one, Held) else one


def _wrapped(value: Any) -> Any:
    return mapped(lambda one: Held(one) if isinstance(one, Tensor) else one, value)


def _given(one: Any) -> list[Any]:
    return [] if one is None else [one]


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device)


def _some(constants: Tensor | None) -> Tensor | None:
    """Return constants; None if all entries are NaN."""
    return None if constants is None or bool(constants.isnan().all()) else constants


def _expanded(given: Tensor | None, value: Tensor, default: Tensor) -> Tensor:
    return (default if given is None else given).expand(value.shape)


def _dims(dim: Any, rank: int) -> set[int]:
    if dim is None or dim == []:
        return set(range(rank))
    return {one % rank for one in (dim if isinstance(dim, list | tuple) else [dim])}


def _padded(pad: Sequence[int]) -> int:
    """Return the number of last axes that a padding changes."""
    return max((number // 2 + 1 for number, size in enumerate(pad) if size), default=0)


def _levels(x: Held, axis: int) -> list[float]:
    """Return the value of each feature along an axis if it is constant, else NaN."""
    size = x.value.shape[axis]
    if x.constants is None:
        return [torch.nan] * size
    rows = x.constants.transpose(axis, -1).reshape(-1, x.constants.shape[axis])
    low, high = rows.amin(0), rows.amax(0)
    still = (high - low) <= 1e-6 * high.abs()
    return torch.where(still, rows[0], torch.nan).double().expand(size).tolist()


def _linear_constants(x: Tensor | None, matrix: Tensor, bias: Tensor | None, value: Tensor) -> Tensor | None:
    """Return the constants of a linear layer: outputs that only read constant features."""
    shift = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device) if bias is None else bias
    used = matrix != 0
    if x is None:
        unknown = used.any(1)
        return _some(torch.where(unknown, _nan(value), shift).reshape([1] * (value.dim() - 1) + [-1]))
    x = x.expand(*x.shape[:-1], matrix.shape[1])
    unknown = (x.isnan().to(matrix.dtype) @ used.to(matrix.dtype).t()) > 0
    found = torch.nn.functional.linear(x.nan_to_num(0.0), matrix, bias)
    return _some(torch.where(unknown, _nan(value), found))


def _convolved(
    target: Any, x: Held, weight: Held, bias: Held | None, args: Any, value: Tensor, shape: list[int], transposed: bool
) -> Tensor | None:
    """Return the constants of a convolution's outputs."""
    given, shift = mapped(_value, args[3:]), None if bias is None else bias.value
    if x.constants is not None:
        known = x.constants.expand(x.value.shape)
        unknown = target(known.isnan().to(value.dtype), (weight.value != 0).to(value.dtype), None, *given) > 0
        return _some(torch.where(unknown, _nan(value), target(known.nan_to_num(0.0), weight.value, shift, *given)))
    if transposed:
        return None
    zero = (weight.value == 0).flatten(1).all(1)
    shift = torch.zeros(len(zero), dtype=value.dtype, device=value.device) if shift is None else shift
    return _some(torch.where(zero, shift, _nan(value)).reshape(shape))


def _why_not_folded(name: str, args: Sequence[Any]) -> str:
    """Return why a constant read by a convolution can't be added to its bias; empty if it can."""
    if "transpose" in name:
        return "a transposed convolution gives a constant other numbers at the borders"
    padding = args[4] if len(args) > 4 else 0
    padded = padding == "same" if isinstance(padding, str) else any(padding if isinstance(padding, list) else [padding])
    return "a padded convolution gives a constant other numbers at the borders" if padded else ""


_HANDLERS: dict[str, Callable[..., Any]] = {
    **{base_name(target): Graph._moved for target in MOVES},
    **dict.fromkeys(POOLS, Graph._pooled),
    **dict.fromkeys(REDUCTIONS, Graph._reduced),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), Graph._softmax),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), Graph._layer_norm),
    **dict.fromkeys(("cat", "stack", "concat"), Graph._joined),
    **dict.fromkeys(("matmul", "bmm", "mm"), Graph._matmul),
    **{f"conv{kind}{dims}d": Graph._convolution for kind in ("", "_transpose") for dims in (1, 2, 3)},
    "batch_norm": Graph._batch_norm,
    "linear": Graph._linear,
    "addmm": Graph._addmm,
    "embedding": Graph._embedding,
    "prelu": Graph._prelu,
    "scaled_dot_product_attention": Graph._attention,
}
_WEIGHTED = {
    Graph._matmul, Graph._convolution, Graph._batch_norm, Graph._linear, Graph._addmm, Graph._embedding,
    Graph._layer_norm,
}  # fmt: skip
