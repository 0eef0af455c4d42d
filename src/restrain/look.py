"""Looking inside a model: what its layers put out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from restrain.activation_points import Places, outputs, select_places
from restrain.engine import Hook, Point, forget_compiled_code, paused, structures
from restrain.named_tensors import checked_module, layers, unwrap
from restrain.selections import as_where


class _Begins(Hook):
    """At the model's own input: a new forward begins."""

    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.seen.clear()


class _Records(Hook):
    """Keeps a layer's tensor under its name; of a further call under name#2, name#3, and so on."""

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
    """Every layer's output in the order in which the layers finish, by one forward of the model on the arguments.

    The model runs in the mode it is in (noise and dropout act in `train()`), with gradients if they are on; rules that
    are attached to it don't record. Of a tuple output, the first floating-point tensor. Values are copies, so that a
    later in-place op doesn't change them.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> list(rs.activations(model, torch.ones(1, 3)))
    ['0', '1']
    """
    with paused(), recording(model, lambda name, module: True) as seen:
        model(*args, **kwargs)
    return seen


@contextmanager
def recording(model: nn.Module, where: Any, *, copy: bool = True) -> Iterator[dict[str, Tensor]]:
    """Within it, the outputs of the selected layers are kept, by name, at each of your own forwards.

    Args:
        model: the model, which runs as it does without.
        where: a glob over layer names, a type, a predicate, or `rs.outputs(...)`, `rs.inputs(...)`, whose tensors are
            called `fc1:inputs`, and after `via=torch.tanh` `fc1:tanh`.
        copy: keep copies; with False the very tensors, through which gradients flow, but which a later in-place op
            overwrites.

    The dict holds the last forward of the model; a second call of `relu` in it is `relu#2`.

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
        stack.callback(root.register_forward_pre_hook(_Begins(seen), prepend=True).remove)
        for target in select_places(places, list(layers(root))):
            hook, module = _Records(seen, Point.of(target), copy), target.layer.module
            if target.place.kind == "inputs":
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(hook).remove)
        forget_compiled_code()
        yield seen
