"""The named tensors and layers of a model, as a person names them.

Wrappers (`torch.compile`, DDP, FSDP, checkpoint wrappers, averaged models) are seen through: a layer that the
user calls `encoder.fc1` has that name whichever of them stand around it. A parametrised weight is `fc.weight`.
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
from torch.nn.utils import parametrize

from restrain.errors import DetachedError, PlanError

# Wrapper class (by name, so that nothing heavy is imported) -> the attribute that holds the wrapped module.
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
    """The model.

    Raises:
        PlanError: it is no nn.Module, or a scripted one.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise PlanError(f"expected an nn.Module that isn't scripted, got {type(model).__name__}")
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module below every wrapper."""
    while (attribute := _wrapped_as(model)) is not None:
        model = getattr(model, attribute)
    return model


@dataclass(frozen=True)
class Layer:
    """A module of the model at one of its names: `path` are the attributes that lead to it from the root."""

    name: str
    path: tuple[str, ...]
    module: nn.Module
    chain: tuple[nn.Module, ...]  # the modules from the root to this one, both included

    @property
    def callable(self) -> bool:
        """Whether it has a forward of its own; a ModuleList has none, so nothing can be caught there."""
        return type(self.module).forward is not nn.Module.forward


def layers(model: nn.Module) -> Iterator[Layer]:
    """Every layer of the model, parents first, at each of its names; the root's name is ''."""
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
    """A parameter of the model: one tensor, whatever the number of its names (tied weights have several)."""

    sites: list[tuple[Layer, str]] = field(default_factory=list)  # (owner, attribute), the first gives the name
    parametrized: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @functools.cached_property
    def names(self) -> list[str]:
        """All its names."""
        return [f"{layer.name}.{key}" if layer.name else key for layer, key in self.sites]

    @property
    def owner(self) -> nn.Module:
        """The module that holds it, at its first name."""
        return self.sites[0][0].module

    @property
    def attribute(self) -> str:
        """Its attribute on the owner."""
        return self.sites[0][1]

    @functools.cached_property
    def handle(self) -> Handle:
        """Where to look it up at each step."""
        layer, key = self.sites[0]
        return Handle(self.name, layer.path, key)

    @property
    def owners(self) -> list[tuple[Layer, str]]:
        """The modules that hold it, each once, with its attribute there; tied weights have several."""
        return list({(id(layer.module), key): (layer, key) for layer, key in reversed(self.sites)}.values())[::-1]

    def tensor(self) -> Tensor:
        """The tensor; of a parametrised weight the effective one, computed anew."""
        return self.handle.look_up(self.owner, ())

    def location(self) -> Location:
        """What penalties and transforms are told when they are bound to it."""
        attentions = [m for m in self.sites[0][0].chain if isinstance(m, nn.MultiheadAttention)]
        heads = attentions[-1].num_heads if attentions else None
        return Location(self.tensor(), self.name, self.owner, self.attribute, heads)


@dataclass(frozen=True, eq=False)
class Location:
    """A parameter as it is when rules are attached: what a penalty or transform may need to know of it."""

    tensor: Tensor
    name: str = ""
    owner: nn.Module | None = None  # the module that holds it
    attribute: str = ""  # its name there
    heads: int | None = None  # of the attention that it is a part of


@dataclass(frozen=True)
class Handle:
    """A parameter's address. Tensors are looked up at each use: `assign=True`, FSDP2 and others replace them."""

    name: str
    path: tuple[str, ...]
    attribute: str

    def find(self, root: nn.Module) -> Tensor:
        """The tensor that stands there now; of a parametrised weight the effective one, computed anew.

        Raises:
            DetachedError: the model has lost that layer or parameter since the rules were attached.
        """
        return self.look_up(root, self.path)

    def find_owner(self, root: nn.Module) -> nn.Module | None:
        """The module that holds it; None if it is gone."""
        return follow(root, self.path)

    def stored(self, root: nn.Module) -> list[Tensor]:
        """The tensor itself; of a parametrised weight those that it is computed from."""
        owner = self.find_owner(root)
        if owner is not None and parametrize.is_parametrized(owner, self.attribute):
            return list(owner.parametrizations[self.attribute].parameters())  # type: ignore[index, union-attr]
        return [self.find(root)]

    def look_up(self, module: nn.Module, path: tuple[str, ...]) -> Tensor:
        """The tensor at the end of `path` from `module`."""
        owner = follow(module, path)
        found: Tensor | None = None if owner is None else owner._parameters.get(self.attribute)
        if found is not None and owner is not None:
            return _trained(found, owner, self.attribute, module, path)
        if owner is not None and parametrize.is_parametrized(owner, self.attribute):
            with at_rest(owner.parametrizations):
                found = getattr(owner, self.attribute)
        if not isinstance(found, Tensor):
            raise DetachedError(
                f"the parameter {self.name!r} is gone from the model since the rules were attached; after changing "
                "the model's layers, detach() and attach the rules again"
            )
        return found


@contextmanager
def at_rest(stored: Any) -> Iterator[None]:
    """Within it, a look at a parametrised weight is no step of a power method and draws no noise."""
    training = [module for module in stored.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def follow(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    """The module at the end of a path of attributes; None if it is gone."""
    found: nn.Module | None = module
    for key in path:
        found = None if found is None else found._modules.get(key)
    return found


def _along(module: nn.Module, path: Sequence[str]) -> Iterator[nn.Module]:
    """The modules on such a way, both ends included."""
    yield module
    for key in path:
        module = module._modules[key]  # type: ignore[assignment]
        yield module


def _loaded(module: str, name: str) -> Any:
    """A class of torch's, if anything has imported it."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each process holds a part."""
    # a Parameter made of a DTensor is of the class DTensor
    return type(tensor) is not nn.Parameter and isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def fully_sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """Those among the modules to which FSDP2's `fully_shard` was applied."""
    kind = _sharding()
    return [module for module in modules if isinstance(module, kind)] if kind else []


def _sharding() -> Any:
    """The class of the modules to which `fully_shard` was applied; none where that was never done in this process."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return kind if kind and kind.__subclasses__() else ()  # it makes a subclass of it for each class of modules


# The shard that last stood at each attribute of a module; None where FSDP2 leaves a parameter alone.
_shards: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Tensor] | None]] = weakref.WeakKeyDictionary()


def _trained(found: Tensor, owner: nn.Module, attribute: str, root: nn.Module, path: Sequence[str]) -> Tensor:
    """The tensor that is trained, where FSDP2 may have put a gathered one in its place, from forward to backward."""
    if not _shards and type(found) is nn.Parameter and not _sharding():
        return found  # none of this is in use
    known = _shards.get(owner, {})
    reference = known.get(attribute)
    shard: Any = None if reference is None else reference()
    if is_sharded(found):  # with tensor parallelism, a gathered one is a DTensor still, on fewer axes of the mesh
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
    """The parameters of the model, each tensor once, in the order of `named_parameters()`."""
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
    """A sentence for an error: the names that are close to the one that matched nothing, and what there is."""
    core = name.strip("*")
    close = [n for n in names if core and core in n] or difflib.get_close_matches(name, names, 5, 0.5)
    hint = f"; near it: {', '.join(map(repr, close[:8]))}" if close else ""
    shown = ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return f"{hint}; there are: {shown or 'none'}"
