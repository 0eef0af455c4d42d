"""Noise on weights: during a layer's forward, an attribute of the module hides the stored weight.

`module.__dict__` is looked at before `module._parameters`, so the layer computes with what is put there, while
`parameters()`, `state_dict()` and the optimizer see the stored tensor. The attribute goes when the forward ends, also
by an exception. A recomputation (checkpointing) draws the same noise, as torch restores the global generator.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.callstack import Call
from restrain.engine.core import Draws, Hook
from restrain.engine.distributed import NOISE_ON_PARTS
from restrain.errors import DetachedError, HowError, NeverFiredError, RestrainWarning
from restrain.named_tensors import Layer, Slot, follow, fully_sharded, is_sharded
from restrain.torch_private import keep_flat, undone, version
from restrain.transforms.base import Noise


@dataclass(frozen=True)
class Site:
    """A weight where it is used: the module whose forward uses it, and the way from there to its owner."""

    name: str
    caller: tuple[str, ...]
    way: tuple[str, ...]
    attribute: str


def sites_of(slot: Slot) -> list[Site]:
    """Where a weight is used, one for each module that holds it.

    Raises:
        HowError: it is used past all forwards.
    """
    return [_site(slot.name, layer, key) for layer, key in slot.owners]


def check_computable(slot: Slot) -> None:
    """Refuse a weight that its layer writes into.

    Raises:
        HowError: so it is.
    """
    for layer, _ in slot.owners:
        if isinstance(layer.module, (nn.Embedding, nn.EmbeddingBag)) and layer.module.max_norm is not None:
            raise HowError(
                f"{slot.name!r}: {type(layer.module).__name__}(max_norm=...) writes into its weight in the forward, "
                "which would be lost in a temporary; write rs.MaxNorm(..., per='in').on(...) instead of it"
            )


def _site(name: str, layer: Layer, key: str) -> Site:
    chain = list(layer.chain)
    caller = len(chain) - 1
    while caller >= 0 and not _is_called(chain, caller):
        caller -= 1
    if caller < 0:
        raise HowError(f"{name!r} belongs to no module with a forward, so noise on it has no moment to act")
    cut = next(i for i in range(len(layer.path) + 1) if follow(chain[0], layer.path[:i]) is chain[caller])
    return Site(name, layer.path[:cut], layer.path[cut:], key)


def _is_called(chain: Sequence[nn.Module], i: int) -> bool:
    """Whether the module's hooks fire: not those of a list, nor those of the layer that an attention uses past them."""
    inside = i > 0 and isinstance(chain[i - 1], nn.MultiheadAttention)
    return type(chain[i]).forward is not nn.Module.forward and not inside


@dataclass
class _Hidden:
    """What a call of a module hides: (owner, attribute, what stood there before) in the order in which it came."""

    call: Call
    entries: list[tuple[weakref.ref[nn.Module], str, Any]] = field(default_factory=list)
    versions: list[tuple[str, Tensor, int]] = field(default_factory=list)  # the disturbed tensors as they were made

    def hide(self, owner: nn.Module, key: str, value: Any) -> None:
        """Put a value before what is stored."""
        self.entries.append((weakref.ref(owner), key, owner.__dict__.get(key, _NOTHING)))
        owner.__dict__[key] = value

    def undo(self) -> None:
        """Let be seen what was seen before; that may be done twice."""
        for reference, key, before in reversed(self.entries):
            owner = reference()
            if owner is None:
                continue
            if before is _NOTHING:
                owner.__dict__.pop(key, None)
            else:
                owner.__dict__[key] = before
            keep_flat(owner)


_NOTHING = object()


class _Clean:
    """`__reduce_ex__` of a module whose weights are hidden: copies and pickles are of the stored weights.

    That also holds where an interrupt has left the disturbed weights behind.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, protocol: Any) -> Any:
        module = self._module()
        assert module is not None
        hidden = [key for key in (*module._parameters, "__reduce_ex__") if key in module.__dict__]
        values = {key: module.__dict__.pop(key) for key in hidden}
        keep_flat(module)
        try:
            reduced = module.__reduce_ex__(protocol)
            state = [dict(part) if part is module.__dict__ else part for part in reduced]
        finally:
            module.__dict__.update(values)
            keep_flat(module)
        return tuple(state)


class Disturb(Draws, Hook):
    """Forward pre-hook: puts the disturbed weights before the stored ones."""

    def __init__(self) -> None:
        super().__init__()
        self.noises: list[tuple[Site, list[Noise]]] = []
        self.hidden: list[_Hidden] = []  # of the calls that run, the innermost last
        self.fired = False
        self.calls = torch.zeros(1)  # in compiled code: what is done in place leaves a compiled checkpoint, too

    def add(self, site: Site, noise: Noise) -> None:
        """One more noise on a weight, after those that it has."""
        known = next((noises for one, noises in self.noises if one == site), None)
        if known is None:
            self.noises.append((site, [noise]))
        else:
            known.append(noise)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            if self.draws(module):
                self.calls.add_(1)
                for site, owner, disturbed in self._disturbed(module):
                    _set(owner, site.attribute, disturbed)
                    keep_flat(owner)
            return
        frame = sys._getframe(1)
        self.restore(frame.f_back)
        if not self.draws(module):
            return
        self._check_alone()
        self.fired = True
        self.hidden.append(hidden := _Hidden(Call(frame, module)))
        for site, owner, disturbed in self._disturbed(module):
            if not isinstance(owner.__dict__.get("__reduce_ex__"), _Clean):
                hidden.hide(owner, "__reduce_ex__", _Clean(owner))
            hidden.versions.append((site.name, disturbed, _version(disturbed)))
            hidden.hide(owner, site.attribute, disturbed)
            keep_flat(owner)

    def _disturbed(self, module: nn.Module) -> Iterator[tuple[Site, nn.Module, Tensor]]:
        """Each weight, where it belongs, and disturbed."""
        for site, noises in self.noises:
            owner = _owner(module, site)
            w = owner._parameters.get(site.attribute)
            if w is None:
                raise DetachedError(
                    f"the parameter {site.name!r} is gone or parametrised since noise was attached to it; detach() and "
                    "attach the rules again"
                )
            if is_sharded(w):
                raise HowError(NOISE_ON_PARTS.format(whose=f"{site.name!r} is sharded"))
            disturbed: Tensor = w
            for noise in noises:
                disturbed = noise.of_weight(disturbed)
            yield site, owner, disturbed

    def _check_alone(self) -> None:
        """Refuse two threads at once, which would see each other's weights.

        Raises:
            HowError: another thread runs the module.
        """
        if any(not hidden.call.is_here for hidden in self.hidden):
            raise HowError(
                f"two threads call the layer of {self.noises[0][0].name!r} at once, and noise on a weight is seen by "
                "both: give each thread a copy of the model, or let one wait for the other"
            )

    def end(self, frame: FrameType) -> None:
        """The call that runs in this frame ended; in another frame: one was ended by an exception."""
        self.restore()
        if self.hidden and self.hidden[-1].call.is_at(frame):
            self.hidden[-1].undo()
            del self.hidden[-1:]

    def restore(self, below: FrameType | None = None) -> None:
        """Let stored weights be seen again that a call has left hidden, as an exception ended it."""
        for hidden in reversed([hidden for hidden in self.hidden if not hidden.call.runs(below)]):
            edited = [name for name, tensor, before in hidden.versions if _version(tensor) != before]
            hidden.undo()
            self.hidden.remove(hidden)
            if edited:
                warnings.warn(
                    f"{', '.join(map(repr, edited))} was changed after an interrupt that had left the disturbed weight "
                    "in the place of the stored one: what was changed is lost. Change the weight again",
                    RestrainWarning,
                    stacklevel=3,
                )


class Restore(Hook):
    """Forward hook, also called after an `Exception`: takes the disturbed weights away."""

    def __init__(self, disturb: Disturb) -> None:
        self.disturb = disturb

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.disturb.end(sys._getframe(1))
        for site, _ in self.disturb.noises:
            owner = _owner(module, site)
            if torch.compiler.is_compiling() and site.attribute in owner.__dict__:
                _set(owner, site.attribute, None)
                keep_flat(owner)


def _set(owner: nn.Module, key: str, tensor: Tensor | None) -> None:
    """Put a tensor before the stored one, or take it away; torch.compile sees in a checkpoint that it is both."""
    if torch.compiler.is_compiling():
        undone(_write, owner, key, tensor)
    else:
        _write(owner, key, tensor)


def _write(owner: nn.Module, key: str, tensor: Tensor | None) -> None:
    if tensor is None:
        owner.__dict__.pop(key)
    else:
        owner.__dict__[key] = tensor


def _owner(module: nn.Module, site: Site) -> nn.Module:
    for key in site.way:
        module = module._modules[key]  # type: ignore[assignment]
    return module


def _version(tensor: Tensor) -> Any:
    """The version of a tensor; an inference tensor has none."""
    return None if tensor.is_inference() else version(tensor)


@dataclass
class WeightNoise:
    """The noise on weights of one attachment: hooks on the modules that use them."""

    hooks: dict[tuple[str, ...], Disturb] = field(default_factory=dict)  # by the path of the module
    handles: list[Any] = field(default_factory=list)
    checked: dict[Site, bool] = field(default_factory=dict)  # whether a hook that never fires is an error

    def begin(self, noisy: Iterable[tuple[Site, Noise, bool]], root: nn.Module) -> None:
        """Put the hooks on: for each weight its noise, and whether a hook that never fires is an error."""
        for site, noise, checked in noisy:
            if site.caller not in self.hooks:
                self._hook(root, site.caller)
            self.hooks[site.caller].add(site, noise)
            self.checked[site] = checked

    def _hook(self, root: nn.Module, path: tuple[str, ...]) -> None:
        module = follow(root, path)
        assert module is not None
        if any(isinstance(hook, Disturb) for hook in module._forward_pre_hooks.values()):
            raise HowError(
                f"another attachment has noise on the weights of {'.'.join(path) or 'the model'!r}, of which one would "
                "undo the other: put both into one plan"
            )
        disturb = self.hooks[path] = Disturb()
        # before any other, as hooks of the old weight_norm read what we disturb; but after FSDP2 has gathered it
        first = not fully_sharded([module])
        self.handles.append(module.register_forward_pre_hook(disturb, prepend=first))
        self.handles.append(module.register_forward_hook(Restore(disturb), always_call=True))

    def end(self) -> None:
        """Take the hooks away, and what an interrupted forward may have left."""
        for handle in self.handles:
            handle.remove()
        self.restore()
        self.handles, self.hooks = [], {}

    def restore(self) -> None:
        """Let stored weights be seen again that an interrupted forward has left hidden."""
        for disturb in self.hooks.values():
            disturb.restore()

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """After a real step.

        Raises:
            NeverFiredError: a weight has a gradient, though the module that should have disturbed it was never called.
        """
        self.restore()
        for disturb in self.hooks.values():
            disturb.fired = disturb.fired or bool(disturb.calls)
            silent = [] if disturb.fired else [site for site, _ in disturb.noises if self.checked[site]]
            for site in silent:
                owner = follow(root, site.caller + site.way)
                w = None if owner is None else owner._parameters.get(site.attribute)
                if w is not None and w.grad is not None:
                    raise NeverFiredError(
                        f"{site.name!r} was trained, but the layer that holds it was never called in train() mode, so "
                        "its noise never came: the model uses the weight past the layer (F.linear(x, layer.weight)), "
                        "or was compiled before. Call the layer itself, or say optional=True in .on(...)"
                    )
