"""Installation of the hooks of bound rules, one per layer and side."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from restrain.engine.binding import Bound
from restrain.engine.core import Overrides
from restrain.engine.forward import Forwards, InputHook, LayerHook, Point, RootBegins, RootEnds, positional
from restrain.errors import DetachedError, HowError
from restrain.named_tensors import follow
from restrain.torch_private import put_first
from restrain.transforms.activation import AtLayer


class Hooks:
    """The hooks on a model's layers, and on the model itself."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards
        self.at_layers: dict[tuple[int, str], LayerHook] = {}  # by layer and side
        self._layers: dict[tuple[int, str], _AtLayer] = {}  # the same, where each is
        self._handles: list[Any] = []

    def put(self, bounds: Sequence[Bound], model: nn.Module, on_root: bool, steps: Callable[[], int]) -> None:
        """Register all hooks; with `on_root` (penalties in the loss) also on the model itself."""
        if on_root:
            acting = [bound for bound in bounds if bound.rule.how == "loss" and bound.parameters]
            handles = {handle.name: handle for bound in acting for handle, _ in bound.parameters}
            self.forwards.overridden = Overrides(list(handles.values()))
            self.forwards.overridden.remember(model)
            for bound in acting:
                bound.overridden = self.forwards.overridden
            padded = any(recorder.point.place.padded for bound in bounds for recorder in bound.penalty_recorders)
            self.forwards.names = positional(model) if padded else None
            begins = RootBegins(self.forwards)
            self._handles.append(put_first(model, begins, with_kwargs=padded))
        for bound in bounds:
            if bound.derivative is not None:
                bound.derivative.bind(self.forwards, _timer(bound, steps), weakref.ref(model))
                arguments = bound.derivative.arguments
                self._handles.append(model.register_forward_pre_hook(arguments, with_kwargs=True))
        for point in {
            id(recorder.point): recorder.point for bound in bounds for recorder in bound.penalty_recorders
        }.values():
            _refuse_noise_of_another(model, point)
        known = dict[int, LayerHook]()  # by point; rules of the same selection share points
        for bound in bounds:
            self._put_at_layers(bound, model, known)
        for hook in self.at_layers.values():
            others = hook.output_recorders or hook.probes or hook.transforms or self.forwards.derived
            alone = (
                len(hook.penalty_recorders) == 1
                and not others
                and hook.penalty_recorders[0].simple
                and not hook.penalty_recorders[0].activities
            )
            hook.lone = (
                hook.penalty_recorders[0] if alone and hook.penalty_recorders[0].point.place.index is None else None
            )
        if on_root:
            self._handles.append(model.register_forward_hook(RootEnds(self.forwards), always_call=True))

    def _put_at_layers(self, bound: Bound, model: nn.Module, known: dict[int, LayerHook]) -> None:
        first = [recorder for recorder in bound.penalty_recorders if recorder.rule == bound.key]
        self.forwards.watch(
            first,
            bound.output_recorders,
            () if bound.derivative is None else bound.derivative.recorders,
        )
        probes = bound.derivative.probes if bound.derivative is not None else []
        for recorder in (*first, *bound.output_recorders, *probes):
            if id(recorder.point) not in known:
                known[id(recorder.point)] = self._at(model, recorder.point)
        for recorder in first:
            known[id(recorder.point)].penalty_recorders.append(recorder)
        for recorder in bound.output_recorders:
            known[id(recorder.point)].output_recorders.append(recorder)
        for probe in probes:
            known[id(probe.point)].probes.append(probe)
        for point, what in bound.transforms:
            self._refuse_same(model, point, what)
            self._at(model, point).transforms.append((what, point))

    def _at(self, model: nn.Module, point: Point) -> LayerHook:
        module, kind = point.find(model), point.place.kind
        key = (id(module), kind)
        if key not in self.at_layers:
            self.at_layers[key] = (LayerHook if kind == "outputs" else InputHook)(self.forwards)
            self._layers[key] = _AtLayer(
                self.at_layers[key], weakref.ref(module), {}, _put(self.at_layers[key], module)
            )
        self._layers[key].paths[point.path] = None
        return self.at_layers[key]

    def _refuse_same(self, model: nn.Module, point: Point, what: Any) -> None:
        """Refuse a transform that another attachment has at the place, as when a cell is rerun."""
        module, own, said = point.find(model), self.at_layers.values(), _said(what)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            others = hook.transforms if isinstance(hook, LayerHook) and all(hook is not one for one in own) else []
            if any(_said(other) == said and place == point for other, place in others):
                kind, twice = ("activation function", "act") if isinstance(what, AtLayer) else ("noise", "be drawn")
                raise HowError(
                    f"another attachment has the same {kind} {said!r} at the {point}, so it would {twice} twice: "
                    "reg.detach() the other one first, or put both rules into one plan if you mean that"
                )

    def first(self, hook: Callable[..., Any], model: nn.Module) -> None:
        """Register a pre-hook of the model before its other hooks."""
        self._handles.append(put_first(model, hook))

    def moves(self, moved: Mapping[tuple[str, ...], tuple[str, ...]], model: nn.Module) -> list[Move]:
        """Return the hooks of layers, each with its current layer.

        Args:
            moved: {path: current path} of layers whose path has changed.
            model: the current model.

        Raises:
            DetachedError: a single layer has become several, or several have become one.
        """
        at: dict[tuple[int, str], str] = {}
        moves = []
        for key, one in self._layers.items():
            paths = [moved.get(path, path) for path in one.paths]
            modules = [follow(model, path) for path in paths]
            name, module = ".".join(paths[0]) or "the model", modules[0]
            place = (id(module), key[1])
            if module is None or any(other is not module for other in modules) or place in at:
                raise DetachedError(
                    f"the layer at {name!r} isn't the one layer that it was when the rules were attached: after the "
                    "change write reg.detach(), then rs.attach(model, plan, optimizer)"
                )
            at[place] = name
            moves.append(Move(one, module, dict.fromkeys(paths)))
        return moves

    def move(self, moves: Sequence[Move]) -> None:
        """Move hooks to the layers of `moves`."""
        for one in moves:
            one.at.paths = one.paths
            if one.at.module() is not one.module:
                one.at.handle.remove()
                one.at.module, one.at.handle = weakref.ref(one.module), _put(one.at.hook, one.module)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for one in self._layers.values():
            one.handle.remove()
        self._handles, self._layers = [], {}


def _said(what: Any) -> Any:
    """Return a transform as it stands in the plan."""
    return what.of if isinstance(what, AtLayer) else what


@dataclass
class _AtLayer:
    """A hook and its layer, with the layer's paths in rules."""

    hook: LayerHook
    module: weakref.ref[nn.Module]
    paths: dict[tuple[str, ...], None]
    handle: Any


@dataclass
class Move:
    """A hook, its current layer, and the layer's paths."""

    at: _AtLayer
    module: nn.Module
    paths: dict[tuple[str, ...], None]

    @property
    def needed(self) -> bool:
        """True if the hook is on another layer."""
        return self.at.module() is not self.module


def _put(hook: LayerHook, module: nn.Module) -> Any:
    """Register a hook at a layer, after removing copies made by torch's quantisation."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, other in hooks.items() if other is hook]:
            del hooks[key]
    if isinstance(hook, InputHook):
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, with_kwargs=True)


def _timer(bound: Bound, steps: Callable[[], int]) -> Callable[[], bool]:
    return lambda: bound.rule.due(steps())


def _refuse_noise_of_another(model: nn.Module, point: Point) -> None:
    module = point.find(model)
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if isinstance(hook, LayerHook) and hook.transforms:
            what, which = ("noise", "the noise") if hook.random else ("an activation function", "that")
            raise HowError(
                f"another attachment has {what} at {point.name!r}, which this one's penalty would see: put both into "
                f"one plan, or attach {which} last"
            )
