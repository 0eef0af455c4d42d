"""Looking inside a model: what its layers put out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from restrain.engine import structures
from restrain.engine.capture import DeadHook
from restrain.engine.collect import paused
from restrain.places import Place, Places, outputs, select_places
from restrain.select import as_where
from restrain.sites import layers, unwrap


class _Recorder:
    """A hook that keeps a layer's output under its name; of a further call under name#2, name#3, and so on."""

    def __init__(self, seen: dict[str, Tensor], name: str, place: Place, copy: bool) -> None:
        self.seen, self.name, self.place, self.copy = seen, name, place, copy

    def __reduce__(self) -> tuple[type[DeadHook], tuple[()]]:
        return (DeadHook, ())

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        way = structures.find(output, self.place.index)
        if way is None:
            return
        tensor = structures.get(output, way)
        number, key = 2, self.name
        while key in self.seen:
            key, number = f"{self.name}#{number}", number + 1
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
        where: a glob over layer names, a type, a predicate, or `rs.outputs(...)`.
        copy: keep copies; with False the very tensors, through which gradients flow, but which a later in-place op
            overwrites.

    The dict holds the last forward of the model; a second call of `relu` in it is `relu#2`.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with rs.recording(model, nn.ReLU) as seen:
    ...     y = model(torch.ones(1, 3))
    >>> torch.equal(seen["1"], y)
    True
    """
    root = unwrap(model)
    seen: dict[str, Tensor] = {}
    places = where if isinstance(where, Places) else outputs(as_where(where))
    with ExitStack() as stack:
        begin = root.register_forward_pre_hook(lambda module, args: seen.clear(), prepend=True)
        stack.callback(begin.remove)
        for target in select_places(places, list(layers(root))):
            hook = _Recorder(seen, target.name, target.place, copy)
            stack.callback(target.layer.module.register_forward_hook(hook).remove)
        yield seen
