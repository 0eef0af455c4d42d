"""Noise on weights: during a layer's forward, a weight's attribute gives a noisy tensor.

In eager code the layer's `_parameters` are replaced by a mapping that knows the call for which
weights are noisy. In compiled code the noisy tensor is put into `module.__dict__`, which Python
searches first, and removed again. Either way `parameters()`, `state_dict()` and the optimizer see
the stored tensor. A recomputation (checkpointing) draws the same noise, as torch restores the
global generator.
"""

from __future__ import annotations

import sys
import threading
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
from restrain.errors import DetachedError, HowError, NeverFiredError
from restrain.named_tensors import Layer, Slot, follow, fully_sharded, is_sharded
from restrain.torch_private import check_compiled_noise, keep_flat, put_first, undone
from restrain.transforms.base import Noise


@dataclass(frozen=True)
class Use:
    """Use of a weight: path to the module whose forward uses it, and from there to its owner."""

    name: str
    caller: tuple[str, ...]
    way: tuple[str, ...]
    attribute: str


def uses_of(slot: Slot) -> list[Use]:
    """Return the uses of a weight, one for each module that holds it.

    Raises:
        HowError: no module with a forward holds it.
    """
    return [_use(slot.name, layer, key) for layer, key in slot.owners]


def check_computable(slot: Slot) -> None:
    """Check that a layer doesn't write into its weight in the forward.

    Raises:
        HowError: it does.
    """
    for layer, _ in slot.owners:
        if isinstance(layer.module, (nn.Embedding, nn.EmbeddingBag)) and layer.module.max_norm is not None:
            raise HowError(
                f"{slot.name!r}: {type(layer.module).__name__}(max_norm=...) writes into its weight in the forward, "
                "which would be lost in a temporary; write rs.MaxNorm(..., per='in').on(...) instead of it"
            )


def _use(name: str, layer: Layer, key: str) -> Use:
    chain = list(layer.chain)
    caller = len(chain) - 1
    while caller >= 0 and not _is_called(chain, caller):
        caller -= 1
    if caller < 0:
        raise HowError(f"{name!r} belongs to no module with a forward, so noise on it has no moment to act")
    cut = next(i for i in range(len(layer.path) + 1) if follow(chain[0], layer.path[:i]) is chain[caller])
    return Use(name, layer.path[:cut], layer.path[cut:], key)


def _is_called(chain: Sequence[nn.Module], i: int) -> bool:
    """Return True if the module's hooks fire.

    They don't in a list of modules, and in a layer that an attention uses without calling it.
    """
    inside = i > 0 and isinstance(chain[i - 1], nn.MultiheadAttention)
    return type(chain[i]).forward is not nn.Module.forward and not inside


# threads may call a layer at the same time, each with its own noise
_several_threads = threading.RLock()


@dataclass(eq=False)
class _Disturbance:
    """Noisy weights of a call of a module, by owner and attribute; void after the call."""

    call: Call
    tensors: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class _Stored(dict[str, Any]):
    """Replacement of an owner's `_parameters`, with the same contents, during calls with noise.

    A weight's name gives the noisy tensor in code below such a call, and the stored tensor
    elsewhere: in `parameters()` and `state_dict()`, in other threads, in copies and pickles, and
    everywhere once the call has ended.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.plain = owner._parameters
        super().__init__(self.plain)
        self.owner, self.disturbances = id(owner), list[_Disturbance]()

    def __getitem__(self, key: str) -> Any:
        for one in reversed(self.disturbances):
            tensor = one.tensors.get((self.owner, key))
            # compiled code can't inspect the call stack
            if tensor is not None and (torch.compiler.is_compiling() or (one.call.is_here and one.call.runs())):
                return tensor
        return super().__getitem__(key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self.items()),)

    @classmethod
    def put(cls, owner: nn.Module, key: str, disturbance: _Disturbance, tensor: Tensor) -> None:
        """Make an owner's weight give this tensor to code below a call."""
        found = owner._parameters
        if not isinstance(found, cls):
            found = owner.__dict__["_parameters"] = cls(owner)
        if disturbance not in found.disturbances:
            found.disturbances.append(disturbance)
        disturbance.tensors[id(owner), key] = tensor
        keep_flat(owner)

    def drop(self, disturbance: _Disturbance, owner: nn.Module) -> None:
        """Forget a call; after the last, restore the owner's own mapping, with later changes."""
        self.disturbances = [one for one in self.disturbances if one is not disturbance]
        if not self.disturbances:
            self.plain.update(self.items())
            for key in [key for key in self.plain if key not in self]:
                del self.plain[key]
            owner.__dict__["_parameters"] = self.plain
        keep_flat(owner)


class Disturb(Draws, Hook):
    """Forward pre-hook that puts noisy weights before the stored ones."""

    def __init__(self) -> None:
        super().__init__()
        self.noises: list[tuple[Use, list[Noise]]] = []
        self.running: list[_Disturbance] = []  # of running calls, the innermost last
        self.fired = False
        # calls in compiled code: changes in place also leave a compiled checkpoint
        self.calls = torch.zeros(1, device="cpu")

    def add(self, use: Use, noise: Noise) -> None:
        """Add a noise on a weight, after its earlier noises."""
        self.take([*[(one, known) for one, noises in self.noises for known in noises], (use, noise)])

    def take(self, noisy: Iterable[tuple[Use, Noise]]) -> None:
        """Take these noises instead, at once: another thread may be in a forward."""
        found: dict[Use, list[Noise]] = {}
        for use, noise in noisy:
            found.setdefault(use, []).append(noise)
        self.noises = list(found.items())

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            if self.draws(module):
                check_compiled_noise()
                self.calls.add_(1)
                for use, owner, disturbed in self._disturbed(module):
                    _set(owner, use.attribute, disturbed)
                    keep_flat(owner)
            return
        frame = sys._getframe(1)
        self.restore(module, frame.f_back)
        if not self.draws(module):
            return
        check_compiled_noise()
        self.fired = True
        one = _Disturbance(Call(frame, module))
        with _several_threads:
            self.running.append(one)
        for use, owner, disturbed in self._disturbed(module):
            with _several_threads:
                self._check_thread(owner)
                _Stored.put(owner, use.attribute, one, disturbed)

    def _disturbed(self, module: nn.Module) -> Iterator[tuple[Use, nn.Module, Tensor]]:
        """Yield each weight's use, owner and noisy tensor."""
        for use, noises in self.noises:
            owner = _owner(module, use)
            w = owner._parameters.get(use.attribute)
            if w is None:
                raise DetachedError(
                    f"the parameter {use.name!r} is gone or parametrised since noise was attached to it; detach() and "
                    "attach the rules again"
                )
            if is_sharded(w):
                raise HowError(NOISE_ON_PARTS.format(whose=f"{use.name!r} is sharded"))
            disturbed: Tensor = w
            for noise in noises if module.training else [one for one in noises if one.random]:
                disturbed = noise.of_weight(disturbed)
            yield use, owner, disturbed

    def _check_thread(self, owner: nn.Module) -> None:
        """Check that no two threads are in a recurrent layer, which has a single list of weights.

        Raises:
            HowError: another thread is in the layer.
        """
        if isinstance(owner, nn.RNNBase) and not all(one.call.is_here for one in self.running):
            raise HowError(
                f"two threads call the recurrent layer of {self.noises[0][0].name!r} at once, and it has one list of "
                "weights for both, with noise on them: give each thread a copy of the model"
            )

    def end(self, module: nn.Module, frame: FrameType) -> None:
        """End the call that runs in this frame; in another frame, an exception has ended a call."""
        self.restore(module)
        for one in [one for one in self.running if one.call.is_here][-1:]:
            if one.call.is_at(frame):
                self._drop(one, module)

    def restore(self, module: nn.Module, below: FrameType | None = None) -> None:
        """Remove noisy weights of calls that an exception has ended."""
        for one in [one for one in self.running if not one.call.runs(below)]:
            self._drop(one, module)

    def _drop(self, one: _Disturbance, module: nn.Module) -> None:
        with _several_threads:
            for use, _ in self.noises:
                owner = _owner(module, use)
                if isinstance(owner._parameters, _Stored):
                    owner._parameters.drop(one, owner)
            self.running = [other for other in self.running if other is not one]


class Restore(Hook):
    """Forward hook that takes the disturbed weights away.

    After an exception they are void, as their call has ended: see `_Stored`. With
    `always_call=True` torch.compile would compile equal layers each anew, by the numbers of their
    hooks.
    """

    def __init__(self, disturb: Disturb) -> None:
        self.disturb = disturb

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.disturb.end(module, sys._getframe(1))
            return
        for use, _ in self.disturb.noises:
            owner = _owner(module, use)
            if use.attribute in owner.__dict__:
                _set(owner, use.attribute, None)
                keep_flat(owner)


def _set(owner: nn.Module, key: str, tensor: Tensor | None) -> None:
    """Put a tensor before the stored one, or remove it, also as traced by torch.compile.

    torch.compile sees in a checkpoint that both happen.
    """
    if torch.compiler.is_compiling():
        undone(_write, owner, key, tensor)
    else:
        _write(owner, key, tensor)


def _write(owner: nn.Module, key: str, tensor: Tensor | None) -> None:
    if tensor is None:
        owner.__dict__.pop(key)
    else:
        owner.__dict__[key] = tensor


def _owner(module: nn.Module, use: Use) -> nn.Module:
    for key in use.way:
        module = module._modules[key]  # type: ignore[assignment]
    return module


@dataclass
class WeightNoise:
    """Noise on weights of an attachment: hooks on the modules that use the weights."""

    hooks: dict[tuple[str, ...], Disturb] = field(default_factory=dict)  # by path of the module
    handles: dict[tuple[str, ...], list[Any]] = field(default_factory=dict)  # by path
    modules: dict[tuple[str, ...], weakref.ref[nn.Module]] = field(default_factory=dict)
    checked: dict[Use, bool] = field(default_factory=dict)  # error if the hook never fires

    def begin(self, noisy: Iterable[tuple[Use, Noise, bool]], root: nn.Module) -> None:
        """Register hooks, given (weight, noise, True if a hook that never fires is an error)."""
        for use, noise, checked in noisy:
            if use.caller not in self.hooks:
                self._hook(root, use.caller)
            self.hooks[use.caller].add(use, noise)
            self.checked[use] = checked

    def _hook(self, root: nn.Module, path: tuple[str, ...]) -> None:
        module = follow(root, path)
        assert module is not None
        if any(isinstance(hook, Disturb) for hook in module._forward_pre_hooks.values()):
            raise HowError(
                f"another attachment has noise on the weights of {'.'.join(path) or 'the model'!r}, of which one would "
                "undo the other: put both into one plan"
            )
        self.hooks[path] = Disturb()
        self._put(path, module)

    def _put(self, path: tuple[str, ...], module: nn.Module) -> None:
        # torch's quantisation may have copied our hooks
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "disturb", hook) is self.hooks[path]]:
                del hooks[key]
        # before other hooks: the old weight_norm reads the noisy tensor; but after FSDP2's
        # gathering
        put: Any = nn.Module.register_forward_pre_hook if fully_sharded([module]) else put_first
        self.modules[path] = weakref.ref(module)
        self.handles[path] = [
            put(module, self.hooks[path]),
            module.register_forward_hook(Restore(self.hooks[path])),
        ]

    def moves(self, root: nn.Module) -> list[tuple[str, ...]]:
        """Return the paths whose module has been replaced."""
        return [path for path in self.hooks if follow(root, path) is not self.modules[path]()]

    def move(self, noisy: Iterable[tuple[Use, Noise, bool]], root: nn.Module) -> None:
        """Move the hooks to the current modules of their paths, with the current noises."""
        found = [(use, noise) for use, noise, _ in noisy]
        for path, disturb in self.hooks.items():
            disturb.take([(use, noise) for use, noise in found if use.caller == path])
        for path in self.moves(root):
            before, now = self.modules[path](), follow(root, path)
            for handle in self.handles[path]:
                handle.remove()
            if before is not None:
                self.hooks[path].restore(before)
            if now is not None:
                self._put(path, now)

    def end(self) -> None:
        """Remove the hooks, and noisy weights of an interrupted forward."""
        for handle in [handle for handles in self.handles.values() for handle in handles]:
            handle.remove()
        for path, disturb in self.hooks.items():
            module = self.modules[path]()
            if module is not None:
                disturb.restore(module)
        self.handles, self.hooks, self.modules = {}, {}, {}

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Check after a real step that noise has acted.

        Raises:
            NeverFiredError: a weight has a gradient, but its module, which adds the noise, was
                never called.
        """
        for disturb in self.hooks.values():
            disturb.fired = disturb.fired or bool(disturb.calls)
            silent = [] if disturb.fired else [use for use, _ in disturb.noises if self.checked[use]]
            for use in silent:
                owner = follow(root, use.caller + use.way)
                w = None if owner is None else owner._parameters.get(use.attribute)
                if w is not None and w.grad is not None:
                    raise NeverFiredError(
                        f"{use.name!r} was trained, but the layer that holds it was never called in train() mode, so "
                        "its noise never came: the model uses the weight past the layer (F.linear(x, layer.weight)), "
                        "or was compiled before. Call the layer itself, or say optional=True in .on(...)"
                    )
