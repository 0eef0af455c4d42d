"""Counter of the real steps of a model's optimizers, which calls listeners."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from restrain.engine.core import eagerly, refuse_capture
from restrain.engine.step.stepper import nested, real_step

Listener = Callable[[Optimizer, nn.Module], None]


class Clock:
    """Number of real steps in training a model; with several optimizers, the greatest of theirs.

    A real step isn't skipped by a loss scaler, and has a nonzero learning rate. With several given
    optimizers, a training step ends after the last has stepped; if an optimizer doesn't step this
    time, it ends when the next training step begins: with a forward or loss (`end`), or before an
    optimizer steps a second time.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module | None],
        given: Sequence[Optimizer],
        on_end: Callable[[nn.Module], None],
        beside: Iterable[Optimizer] = (),
    ) -> None:
        self.model, self.steps, self._from = model, 0, 0
        self.on_end = on_end  # called after a training step
        self.epochs = 0  # counted by the user
        # called after steps of optimizers that were given or train the model
        self.on_step: list[Listener] = []
        # called after real steps of optimizers that train the model
        self.on_real: list[Listener] = []
        self._given = [_Known(one) for one in given]
        self._beside = weakref.WeakSet(beside)  # around or within given ones, whose steps are those of these
        self._others: list[_Known] = []
        self._moved = False  # a real step was taken since the last training step ended
        self._handles = [one.register_step_pre_hook(self.before) for one in given] if len(given) > 1 else []
        _watchers.add(self)

    def remove(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _watchers.remove(self)

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """End the training step if an optimizer, of several given, is about to step again."""
        if torch.compiler.is_compiling():
            return eagerly(self.before, optimizer, args, kwargs)  # type: ignore[no-any-return]
        if self._of(optimizer).came and not nested(optimizer):
            self.end()

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Count a step of any optimizer in the process, and call the listeners."""
        if torch.compiler.is_compiling():
            return eagerly(self.after, optimizer, root)  # type: ignore[no-any-return]
        if nested(optimizer) or optimizer in self._beside:
            return
        known = self._of(optimizer)
        if known not in self._given and not known.trains(root):
            return
        refuse_capture("a step of an optimizer with rules")
        for listener in self.on_step:
            listener(optimizer, root)
        known.came = True
        if real_step(optimizer) and known.trains(root):
            known.steps += 1
            self.steps = max(self.steps, self._from + known.steps)
            self._moved = True
            for listener in self.on_real:
                listener(optimizer, root)
        if all(one.came or one.rests() for one in self._given) or not any(one.came for one in self._given):
            self.end()

    def took(self, optimizer: Optimizer) -> None:
        """Count a real step that a caller has carried out itself, without listeners."""
        known = self._of(optimizer)
        known.steps += 1
        self.steps = max(self.steps, self._from + known.steps)

    def _of(self, optimizer: Optimizer) -> _Known:
        """Return the record of an optimizer."""
        for known in (*self._given, *self._others):
            if known.optimizer() is optimizer:
                return known
        self._others = [other for other in self._others if other.optimizer() is not None] + [_Known(optimizer)]
        return self._others[-1]

    def end(self) -> None:
        """End the training step, if it has begun."""
        for known in self._given:
            known.came = False
        moved, self._moved, root = self._moved, False, self.model()
        if moved and root is not None:
            self.on_end(root)

    def resume(self, steps: int) -> None:
        """Continue counting from a number of steps."""
        self.steps, self._moved = steps, False
        for known in (*self._given, *self._others):
            known.came, known.steps = False, 0
        self._from = steps


class _Known:
    """A clock's record of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.came = False  # stepped since the last training step ended
        self.steps = 0  # real steps
        self._size, self._trains = -1, False

    def trains(self, root: nn.Module) -> bool:
        """Return True if it holds a parameter of the model; cached by its number of parameters."""
        groups = getattr(self.optimizer(), "param_groups", ())
        size = 0
        for group in groups:
            size += len(group["params"])
        if size != self._size:
            ids = {id(p) for group in groups for p in group["params"]}
            self._size, self._trains = size, any(id(p) in ids for p in root.parameters())
        return self._trains

    def rests(self) -> bool:
        """Return True if it is gone or moves nothing: frozen parameters, or learning rates zero."""
        groups = getattr(self.optimizer(), "param_groups", ())
        return not any(float(g["lr"]) != 0 and any(p.requires_grad for p in g["params"]) for g in groups)


class _Watchers:
    """The existing clocks, behind a hook that torch calls after every optimizer step.

    Threads attach and detach while others step: the tuple is replaced under a lock, never changed
    in place.
    """

    def __init__(self) -> None:
        self.clocks: tuple[Clock, ...] = ()
        self.hook: Any = None
        self._lock = threading.RLock()

    def add(self, clock: Clock) -> None:
        with self._lock:
            self.clocks = (*self.clocks, clock)
            self.hook = self.hook or register_optimizer_step_post_hook(self.after)

    def remove(self, clock: Clock) -> None:
        with self._lock:
            self.clocks = tuple(c for c in self.clocks if c is not clock and c.model() is not None)
            if not self.clocks and self.hook is not None:
                self.hook.remove()
                self.hook = None

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for clock in self.clocks:
            root = clock.model()
            if root is None:
                self.remove(clock)
            else:
                clock.after(optimizer, root)


_watchers = _Watchers()
