"""Counts the real steps of a model's optimizers, and tells those who listen."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from restrain.engine.hanging import eagerly
from restrain.engine.steps import nested, real_step

Listener = Callable[[Optimizer, nn.Module], None]


class Clock:
    """The number of real steps that were taken in training a model; of several optimizers, of the one with the most.

    A real step wasn't skipped by a loss scaler, and its learning rate isn't zero.
    """

    def __init__(self, model: Callable[[], nn.Module | None]) -> None:
        self.model, self.steps, self._from = model, 0, 0
        self.epochs = 0  # as the user counts them
        self.on_any: list[Listener] = []  # called after any step in the process
        self.on_real: list[Listener] = []  # called after a real step of an optimizer that trains the model
        self._relevant: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._counts: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        _watchers.add(self)

    def remove(self) -> None:
        """Stop watching."""
        _watchers.remove(self)

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Called after a step of any optimizer in the process."""
        if torch.compiler.is_compiling():
            return eagerly(self.after, optimizer, root)  # type: ignore[no-any-return]
        if nested(optimizer):
            return
        for listener in self.on_any:
            listener(optimizer, root)
        if real_step(optimizer) and self._trains(optimizer, root):
            self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
            self.steps = max(self.steps, self._from + self._counts[optimizer])
            for listener in self.on_real:
                listener(optimizer, root)

    def resume(self, steps: int) -> None:
        """Go on counting from so many steps."""
        self.steps = steps
        self._counts.clear()
        self._from = steps

    def _trains(self, optimizer: Optimizer, root: nn.Module) -> bool:
        """Whether the optimizer holds any parameter of the model; remembered while it holds as many."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._relevant.get(optimizer)
        if known is None or known[0] != size:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            known = self._relevant[optimizer] = (size, any(id(p) in held for p in root.parameters()))
        return known[1]


class _Watchers:
    """The living clocks, behind one hook that torch calls after the step of every optimizer in the process."""

    def __init__(self) -> None:
        self.clocks: list[Clock] = []
        self.hook: Any = None

    def add(self, clock: Clock) -> None:
        self.clocks.append(clock)
        self.hook = self.hook or register_optimizer_step_post_hook(self.after)

    def remove(self, clock: Clock) -> None:
        self.clocks = [c for c in self.clocks if c is not clock and c.model() is not None]
        if not self.clocks and self.hook is not None:
            self.hook.remove()
            self.hook = None

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = [(clock, root) for clock in self.clocks if (root := clock.model()) is not None]
        self.clocks = [clock for clock, _ in alive]
        for clock, root in alive:
            clock.after(optimizer, root)


_watchers = _Watchers()
