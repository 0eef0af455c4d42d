"""Shapes of the outputs of layers, without the axis of samples.

A table has (features,), a sequence (steps, features), an image (height, width, channels). The
number of steps is None where it is free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from restrain.errors import PlanError
from restrain.storage import first_line

Shape = tuple[int | None, ...]
SEQUENCES = ("rnn", "lstm", "gru", "bidirectional", "conv1", "pool1")  # forms that read (steps, features)


def of_input(layer: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Shape:
    """Return the shape of an input layer: a size alone is of each step, if a layer reads steps."""
    if "shape" in layer:
        return tuple(layer["shape"])
    steps = any(other.get("form") in SEQUENCES for other in layers)
    return (None, layer["size"]) if steps else (layer["size"],)


def after(layer: Mapping[str, Any], given: list[Shape]) -> Shape:
    """Return the shape of a layer's output.

    Args:
        layer: the resolved layer; its size may be missing where it follows from the inputs.
        given: the shapes of its inputs.

    Raises:
        PlanError: the inputs don't fit the layer.
    """
    form = layer["form"]
    if form == "module":
        return probed(layer["module"], layer["name"], given)
    joined = joint(layer, given)
    if form in ("dense", "tied", "ordinal"):
        return (*joined[:-1], layer["size"])
    other = _OTHERS.get(form)
    return joined if other is None else other(layer, joined)


def joint(layer: Mapping[str, Any], given: list[Shape]) -> Shape:
    """Return the shape of what a layer reads: the product of its inputs, or their features joined.

    Raises:
        PlanError: the inputs don't fit each other.
    """
    first, product = given[0], layer["form"] == "product"
    if any(len(shape) != len(first) or shape[:-1] != first[:-1] for shape in given) or (
        product and any(shape != first for shape in given)
    ):
        raise PlanError(f"the layer {layer['name']!r} reads outputs that don't fit: {', '.join(map(text, given))}")
    if product:
        return first
    return (*first[:-1], sum(shape[-1] or 0 for shape in given))


def text(shape: Shape) -> str:
    """Return a shape as text, free axes as "steps"."""
    return f"({', '.join('steps' if size is None else str(size) for size in shape)})"


def _axes(layer: Mapping[str, Any], shape: Shape, count: int, wanted: str) -> None:
    if len(shape) != count:
        hint = f"; of images, the first layer is their shape, as in {wanted}" if count == 3 else ""
        raise PlanError(
            f"the layer {layer['name']!r}, form={layer['form']!r}, reads {wanted}, and here {text(shape)} come{hint}"
        )


def _of_sequence(layer: Mapping[str, Any], shape: Shape) -> Shape:
    _axes(layer, shape, 2, "sequences (steps, features)")
    return (shape[0], layer["size"])


def _of_window(layer: Mapping[str, Any], shape: Shape) -> Shape:
    """Return the shape after a convolution or pooling."""
    count = int(layer["form"][-1])
    _axes(layer, shape, count + 1, "(height, width, channels)" if count == 2 else "sequences (steps, features)")
    sizes = []
    for axis, size in enumerate(shape[:-1]):
        kernel, stride = layer["kernel_size"][axis], layer["stride"][axis]
        padding = layer.get("padding", [0] * count)
        if size is None or padding == "same":
            sizes.append(size)
            continue
        found = (size + 2 * padding[axis] - kernel) // stride + 1
        if found < 1:
            raise PlanError(f"the layer {layer['name']!r} has a window of {kernel}, and {size} numbers come there")
        sizes.append(found)
    return (*sizes, layer.get("size", shape[-1]) if layer["form"].startswith("conv") else shape[-1])


def _known(layer: Mapping[str, Any], shape: Shape) -> int:
    if any(size is None for size in shape):
        raise PlanError(
            f"the layer {layer['name']!r} needs sequences of one length: give the first layer as (steps, features), as "
            "in (20, 3)"
        )
    return math.prod(size or 0 for size in shape)


def _reshaped(layer: Mapping[str, Any], shape: Shape) -> Shape:
    if _known(layer, shape) != math.prod(layer["shape"]):
        raise PlanError(f"the layer {layer['name']!r} can't make {text(tuple(layer['shape']))} of {text(shape)}")
    return tuple(layer["shape"])


def _binned(layer: Mapping[str, Any], shape: Shape) -> Shape:
    _axes(layer, shape, 1, "tables (features,)")
    if layer["size"] <= (shape[0] or 0):
        raise PlanError(f"the layer {layer['name']!r} puts out more than it reads, {text(shape)}; got {layer['size']}")
    return (layer["size"],)


def _last(layer: Mapping[str, Any], shape: Shape) -> Shape:
    _axes(layer, shape, 2, "sequences (steps, features)")
    return shape[1:]


_OTHERS: dict[str, Callable[[Mapping[str, Any], Shape], Shape]] = {
    **dict.fromkeys(("rnn", "lstm", "gru", "bidirectional"), _of_sequence),
    **dict.fromkeys(("conv1", "conv2", "pool1", "pool2"), _of_window),
    "flatten": lambda layer, shape: (_known(layer, shape),),
    "reshape": _reshaped,
    "last": _last,
    "bins": _binned,
}


def probed(module: nn.Module, name: str, given: list[Shape]) -> Shape:
    """Return the shape that a user's module puts out, found by a copy of it on zeros.

    Raises:
        PlanError: the module fails, or puts out something else than numbers for each sample.
    """
    if any(map(is_lazy, module.parameters())):
        raise PlanError(
            f"the layer {name!r} is lazy: run your {type(module).__name__} once, so that its sizes are known"
        )
    steps = 3  # where their number is free
    like = next(iter(module.parameters()), torch.zeros((), device="cpu"))
    kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device} if like.is_floating_point() else {}
    zeros = [torch.zeros(2, *(steps if size is None else size for size in shape), **kind) for shape in given]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = copy.deepcopy(module).eval()(*zeros)
    except Exception as error:  # whatever the module raises
        shown = ", ".join(map(text, given))
        raise PlanError(
            f"the layer {name!r}, your {type(module).__name__}, fails on samples of shape {shown}: {first_line(error)}"
        ) from error
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, torch.Tensor) or found.dim() < 2 or found.shape[0] != 2:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise PlanError(
            f"the layer {name!r}, your {type(module).__name__}, is to return a tensor (samples, ..., features); got "
            f"{got} for 2 samples"
        )
    free = len(given[0]) > 1 and given[0][0] is None and found.dim() == 3 and found.shape[1] == steps
    return (None, *found.shape[2:]) if free else tuple(found.shape[1:])
