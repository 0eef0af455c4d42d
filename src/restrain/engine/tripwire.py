"""Watches every optimizer's step: a penalty that was meant for the loss but never collected is an error."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from restrain.engine.bind import Bound
from restrain.engine.collect import Forwards
from restrain.engine.steps import real_step
from restrain.errors import NotCollectedError


class Tripwire:
    """After each real step of an optimizer that trains the model: whether the loss-mode rules were collected.

    `steps` counts these steps. `collected` is set by the attachment whenever the penalties are asked for.
    """

    def __init__(self, bounds: list[Bound], forwards: Forwards, model: Callable[[], nn.Module | None]) -> None:
        self.bounds = [bound for bound in bounds if bound.rule.how == "loss"]
        self.forwards, self.model = forwards, model
        self.collected, self.steps, self._from = False, 0, 0
        self._relevant: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._counts: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        _watchers.add(self)

    def remove(self) -> None:
        """Stop watching."""
        _watchers.remove(self)

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Called after a step of any optimizer in the process."""
        self.forwards.stepped()
        if not real_step(optimizer) or not self._trains(optimizer, root):
            return
        forgotten = self.forwards.ran and not self.collected
        missed = [b for b in self.bounds if self._due(b) and self._concerns(b, optimizer, root)] if forgotten else []
        self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
        self.steps = max(self.steps, self._from + self._counts[optimizer])
        self.forwards.ran = self.collected = False
        if missed:
            raise NotCollectedError(
                "the optimizer took a step after a training forward, but these rules were not in the loss: "
                f"{', '.join(repr(bound.key) for bound in missed)}. Write loss = reg.loss(data_loss) before "
                "loss.backward(); or attach them with how='gradient', which needs no line in the loop"
            )

    def resume(self, steps: int) -> None:
        """Go on counting from so many steps."""
        self.steps = steps
        self._counts.clear()
        self._from = steps

    def _due(self, bound: Bound) -> bool:
        return self.steps % bound.rule.every == 0

    def _trains(self, optimizer: Optimizer, root: nn.Module) -> bool:
        """Whether the optimizer holds any parameter of the model; remembered while it holds as many."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._relevant.get(optimizer)
        if known is None or known[0] != size:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            known = self._relevant[optimizer] = (size, any(id(p) in held for p in root.parameters()))
        return known[1]

    def _concerns(self, bound: Bound, optimizer: Optimizer, root: nn.Module) -> bool:
        """Whether the optimizer holds a parameter that the rule acts on, or (for activations) any of the model."""
        if bound.spots or bound.raws:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for p, _ in bound.tensors(root))


class _Watchers:
    """The living tripwires, behind one hook that torch calls after the step of every optimizer in the process."""

    def __init__(self) -> None:
        self.tripwires: list[Tripwire] = []
        self.hook: Any = None

    def add(self, tripwire: Tripwire) -> None:
        self.tripwires.append(tripwire)
        self.hook = self.hook or register_optimizer_step_post_hook(self.after)

    def remove(self, tripwire: Tripwire) -> None:
        self.tripwires = [t for t in self.tripwires if t is not tripwire and t.model() is not None]
        if not self.tripwires and self.hook is not None:
            self.hook.remove()
            self.hook = None

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = [(tripwire, root) for tripwire in self.tripwires if (root := tripwire.model()) is not None]
        self.tripwires = [tripwire for tripwire, _ in alive]
        for tripwire, root in alive:
            tripwire.after(optimizer, root)


_watchers = _Watchers()
