"""Inspect a model: outputs of its layers, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from restrain.activation_points import Places, outputs, select_places
from restrain.engine import Hook, Point, forget_compiled_code, paused, structures
from restrain.named_tensors import checked_module, layers, unwrap
from restrain.selections import as_where
from restrain.torch_private import put_first


class _Begins(Hook):
    """Forward pre-hook of the model: clears the recorded tensors when a new forward begins."""

    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.seen.clear()


class _Records(Hook):
    """Hook that stores a layer's tensor under its name; for further calls name#2, name#3, ..."""

    hands_on = True

    def __init__(self, seen: dict[str, Tensor], point: Point, copy: bool) -> None:
        self.seen, self.point, self.copy = seen, point, copy

    def __call__(self, module: nn.Module, args: Any, last: Any) -> None:
        structure = structures.arguments(args, last) if self.point.place.kind == "inputs" else last
        way = structures.find(structure, self.point.place.index)
        if way is None:
            return
        number, key = 2, self.point.key
        while key in self.seen:
            key, number = f"{self.point.key}#{number}", number + 1
        tensor = self.point.seen(structures.get(structure, way))
        self.seen[key] = tensor.clone() if self.copy else tensor


def activations(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Run the model once on the arguments; return the output of each layer by name.

    Layers come in the order in which they finish. The model keeps its mode (noise and dropout act
    in `train()`) and gradients stay on if they are; attached rules don't record. A tuple output
    gives its first floating-point tensor. Values are copies, safe from later in-place operations.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> list(rs.activations(model, torch.ones(1, 3)))
    ['0', '1']
    """
    with paused(), recording(model, lambda name, module: True) as seen:
        model(*args, **kwargs)
    return seen


@contextmanager
def recording(model: nn.Module, where: Any, *, copy: bool = True) -> Iterator[dict[str, Tensor]]:
    """Context that records the outputs of selected layers, by name, in each forward of the model.

    Yields a dict of the tensors of the last forward; the second call of `relu` in it is `relu#2`.

    Args:
        model: the model; its forward is unchanged.
        where: a glob over layer names, a type, a predicate, or `rs.outputs(...)`, `rs.inputs(...)`.
            Inputs are named like `fc1:inputs`, tensors after `via=torch.tanh` like `fc1:tanh`.
        copy: record copies. False records the tensors themselves, which a later in-place operation
            may overwrite.

    Raises:
        SelectionError: no layer matches.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with rs.recording(model, nn.ReLU) as seen:
    ...     y = model(torch.ones(1, 3))
    >>> torch.equal(seen["1"], y)
    True
    """
    root = unwrap(checked_module(model))
    seen: dict[str, Tensor] = {}
    places = where if isinstance(where, Places) else outputs(as_where(where))
    with ExitStack() as stack:
        stack.callback(put_first(root, _Begins(seen)).remove)
        for target in select_places(places, list(layers(root))):
            hook, module = _Records(seen, Point.of(target), copy), target.layer.module
            if target.place.kind == "inputs":
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(hook).remove)
        forget_compiled_code()
        yield seen
