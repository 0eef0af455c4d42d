"""The named tensors and layers of a model, under the names that users give them.

Names skip wrappers (`torch.compile`, DDP, FSDP, checkpoint wrappers, averaged models): the layer
`encoder.fc1` keeps that name in any of them. The name of a parametrised weight is `fc.weight`.
"""

from __future__ import annotations

import difflib
import functools
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from restrain.errors import DetachedError, PlanError
from restrain.layouts import axes_of

# Wrapper class (by name, to import nothing heavy) -> the attribute with the wrapped module.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def _wrapped_as(module: nn.Module) -> str | None:
    cls = type(module)
    return WRAPPERS.get(cls.__name__) if cls.__module__.startswith("torch.") else None


def checked_module(model: Any) -> nn.Module:
    """Return the model.

    Raises:
        PlanError: it is no nn.Module, or a scripted one.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise PlanError(f"expected an nn.Module that isn't scripted, got {type(model).__name__}")
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside all wrappers."""
    while (attribute := _wrapped_as(model)) is not None:
        model = getattr(model, attribute)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@dataclass(frozen=True)
class Layer:
    """A module of the model at one of its names; `path` has the attributes from the root to it."""

    name: str
    path: tuple[str, ...]
    module: nn.Module
    chain: tuple[nn.Module, ...]  # modules from the root to this one, both included

    @property
    def callable(self) -> bool:
        """True if the module has a forward; a ModuleList has none, so hooks see nothing there."""
        return type(self.module).forward is not nn.Module.forward


def layers(model: nn.Module) -> Iterator[Layer]:
    """Yield every layer of the model, parents first, at each of its names ('' for the root)."""
    yield from _walk(unwrap(model), "", (), ())


def _walk(module: nn.Module, name: str, path: tuple[str, ...], chain: tuple[nn.Module, ...]) -> Iterator[Layer]:
    while (attribute := _wrapped_as(module)) is not None:
        module, path = getattr(module, attribute), (*path, attribute)
    chain = (*chain, module)
    yield Layer(name, path, module, chain)
    for key, child in module._modules.items():
        if child is None or (key == "parametrizations" and parametrize.is_parametrized(module)):
            continue
        yield from _walk(child, f"{name}.{key}" if name else key, (*path, key), chain)


@dataclass(frozen=True)
class Slot:
    """A parameter of the model: one tensor with all its names (tied weights have several)."""

    sites: list[tuple[Layer, str]] = field(default_factory=list)  # (owner, attribute); the first gives the name
    parametrized: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The first of the parameter's names."""
        return self.names[0]

    @functools.cached_property
    def names(self) -> list[str]:
        """All names of the parameter."""
        return [f"{layer.name}.{key}" if layer.name else key for layer, key in self.sites]

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter, at its first name."""
        return self.sites[0][0].module

    @property
    def attribute(self) -> str:
        """The parameter's attribute on the owner."""
        return self.sites[0][1]

    @functools.cached_property
    def handle(self) -> Handle:
        """The address by which the parameter is looked up at each step."""
        layer, key = self.sites[0]
        return Handle(self.name, layer.path, key)

    @property
    def owners(self) -> list[tuple[Layer, str]]:
        """Modules that have the parameter, with its attribute; tied weights have several."""
        return list({(id(layer.module), key): (layer, key) for layer, key in reversed(self.sites)}.values())[::-1]

    def tensor(self) -> Tensor:
        """Return the tensor; for a parametrised weight the effective one, recomputed."""
        return self.handle.look_up(self.owner, ())

    def location(self) -> Location:
        """Return the parameter's location, to which penalties and transforms are bound."""
        attentions = [m for m in self.sites[0][0].chain if isinstance(m, nn.MultiheadAttention)]
        heads = attentions[-1].num_heads if attentions else None
        tensor, root = self.tensor(), self.sites[0][0].chain[0]
        rank = None if is_lazy(tensor) else tensor.dim()
        axes = axes_of(self.owner, self.attribute, self.names, root, rank)
        return Location(tensor, self.name, self.owner, self.attribute, heads, axes)


@dataclass(frozen=True, eq=False)
class Location:
    """A parameter at attach, with the context that penalties and transforms may need."""

    tensor: Tensor
    name: str = ""
    owner: nn.Module | None = None  # the module that has it
    attribute: str = ""  # its name there
    heads: int | None = None  # number of heads, for a parameter of attention
    axes: tuple[str, ...] | None = None  # its layout, if declared, or known for another package's layer


@dataclass(frozen=True)
class Handle:
    """A parameter's address, looked up at each use: for instance FSDP2 replaces tensors."""

    name: str
    path: tuple[str, ...]
    attribute: str

    def find(self, root: nn.Module) -> Tensor:
        """Return the current tensor; for a parametrised weight the effective one, recomputed.

        Raises:
            DetachedError: the model has lost that layer or parameter since the rules were attached.
        """
        return self.look_up(root, self.path)

    def find_owner(self, root: nn.Module) -> nn.Module | None:
        """Return the module that has the parameter; None if it is gone."""
        return follow(root, self.path)

    def stored(self, root: nn.Module) -> list[Tensor]:
        """Return the tensor; for a parametrised weight, the tensors that it is computed from."""
        owner = self.find_owner(root)
        if owner is not None and parametrize.is_parametrized(owner, self.attribute):
            return list(owner.parametrizations[self.attribute].parameters())  # type: ignore[index, union-attr]
        return [self.find(root)]

    def look_up(self, module: nn.Module, path: tuple[str, ...]) -> Tensor:
        """Return the tensor at the end of `path` from `module`."""
        owner = follow(module, path)
        found: Tensor | None = None if owner is None else owner._parameters.get(self.attribute)
        if found is not None and owner is not None:
            return _trained(found, owner, self.attribute, module, path)
        if owner is not None and parametrize.is_parametrized(owner, self.attribute):
            with at_rest(owner.parametrizations):
                found = getattr(owner, self.attribute)
        if not isinstance(found, Tensor):
            raise DetachedError(
                f"the parameter {self.name!r} is gone from the model since the rules were attached: after a change of "
                "the model's layers write reg.detach(), then rs.attach(model, plan, optimizer)"
            )
        return found


@contextmanager
def at_rest(stored: Any) -> Iterator[None]:
    """Set modules to eval() within the block: computing a weight changes no state, draws no noise.

    In train(), spectral normalisation would take a step of its power method.
    """
    training = [module for module in stored.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def follow(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    """Return the module at the end of a path of attributes; None if it is gone."""
    found: nn.Module | None = module
    for key in path:
        found = None if found is None else found._modules.get(key)
    return found


def _along(module: nn.Module, path: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the modules along a path of attributes, both ends included."""
    yield module
    for key in path:
        module = module._modules[key]  # type: ignore[assignment]
        yield module


def _loaded(module: str, name: str) -> Any:
    """Return a class of torch if its module was imported; else ()."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, of which each process has a part."""
    # a Parameter made from a DTensor has the class DTensor
    return type(tensor) is not nn.Parameter and isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def fully_sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the modules to which FSDP2's `fully_shard` was applied."""
    kind = _sharding()
    return [module for module in modules if isinstance(module, kind)] if kind else []


def _sharding() -> Any:
    """Return the class of modules after `fully_shard`; () where none is known to have been made."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    if kind and not torch.compiler.is_compiling():  # torch 2.10 can't trace __subclasses__
        return kind if kind.__subclasses__() else ()  # `fully_shard` makes a subclass for each class of modules
    return kind


# The last shard at each attribute of a module; None for a parameter that FSDP2 leaves alone.
_shards: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Tensor] | None]] = weakref.WeakKeyDictionary()


def _trained(found: Tensor, owner: nn.Module, attribute: str, root: nn.Module, path: Sequence[str]) -> Tensor:
    """Return the trained tensor: the shard, if FSDP2 has a gathered tensor in its place.

    FSDP2 keeps gathered tensors there from forward to backward.
    """
    if not _shards and type(found) is nn.Parameter and not fully_sharded(_along(root, path)):
        return found  # FSDP2 isn't in use
    known = _shards.get(owner, {})
    reference = known.get(attribute)
    shard: Any = None if reference is None else reference()
    if is_sharded(found):  # with tensor parallelism, a gathered tensor is still a DTensor, on fewer mesh axes
        if shard is not None and shard.device_mesh.ndim > found.device_mesh.ndim:  # type: ignore[attr-defined]
            return shard  # type: ignore[no-any-return]
        _shards.setdefault(owner, {})[attribute] = weakref.ref(found)
        return found
    if attribute in known:
        return found if shard is None else shard
    around = fully_sharded(_along(root, path))
    if not around:
        return found
    for module in around:
        module.reshard()
    now = owner._parameters[attribute]
    assert now is not None
    _shards.setdefault(owner, {})[attribute] = weakref.ref(now) if is_sharded(now) else None
    return now


def parameters(model: nn.Module) -> list[Slot]:
    """Return the model's parameters, each tensor once, in the order of `named_parameters()`."""
    slots: dict[int, Slot] = {}
    for layer in layers(model):
        own = {key: p for key, p in layer.module._parameters.items() if p is not None}
        for key, p in own.items():
            slots.setdefault(id(p), Slot()).sites.append((layer, key))
        if parametrize.is_parametrized(layer.module):
            for key, stored in layer.module.parametrizations.items():  # type: ignore[union-attr, operator]
                identity = id(next(iter(stored.parameters()), stored))
                slots.setdefault(identity, Slot(parametrized=True)).sites.append((layer, key))
    return list(slots.values())


def near(name: str, names: Sequence[str], limit: int = 40) -> str:
    """Return the end of an error message for an unknown name: similar names, and all names."""
    core = name.strip("*")
    close = [n for n in names if core and core in n] or difflib.get_close_matches(name, names, 5, 0.5)
    hint = f"; near it: {', '.join(map(repr, close[:8]))}" if close else ""
    shown = ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return f"{hint}; there are: {shown or 'none'}"
