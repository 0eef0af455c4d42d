"""Errors at the optimizer's step: penalties missing in the loss, and unknown optimizers."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.binding import ASCENDS, Bound, ascends
from restrain.engine.forward import Forwards
from restrain.engine.step import Clock, ParameterRules
from restrain.errors import NotCollectedError, OptimizerError, RestrainWarning
from restrain.fields import level_of_caller


class Tripwire:
    """Check after each real step that the loss-mode rules were collected after a training forward.

    The attachment sets `collected` whenever the penalties are requested.
    """

    def __init__(self, bounds: list[Bound], forwards: Forwards, clock: Clock) -> None:
        self.bounds, self.forwards, self.clock = bounds, forwards, clock
        self.collected = False

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Check and reset after a real step of an optimizer that trains the model.

        Raises:
            NotCollectedError: a training forward ran, and rules that act in the loss weren't
                collected.
            OptimizerError: it maximises, and so ascends a penalty in the loss.
        """
        if any(group.get("maximize") for group in optimizer.param_groups) and self.collected:
            for bound in self.bounds:
                if self._ascended(bound, optimizer, root):
                    raise OptimizerError(ASCENDS.format(rule=bound.key))
        forgotten, step = self.forwards.ran and not self.collected, self.clock.steps - 1
        missed = (
            [b for b in self.bounds if b.rule.due(step) and self._concerns(b, optimizer, root)] if forgotten else []
        )
        self.forwards.ran = self.collected = False
        if missed:
            raise NotCollectedError(
                "the optimizer took a step after a training forward, but these rules were not in the loss: "
                f"{', '.join(repr(bound.key) for bound in missed)}. Write loss = reg.loss(data_loss) before "
                "loss.backward(); or attach them with how='gradient', which needs no line in the loop"
            )

    def _ascended(self, bound: Bound, optimizer: Optimizer, root: nn.Module) -> bool:
        """Return True if an optimizer maximises by a parameter of the rule.

        For a rule on activations, by any parameter of the model.
        """
        if bound.points or bound.output_recorders:
            return ascends(optimizer, root)
        up = {id(p) for group in optimizer.param_groups for p in group["params"] if group.get("maximize")}
        return any(id(p) in up for handle, _, _ in bound.standing(root) for p in handle.stored(root))

    def _concerns(self, bound: Bound, optimizer: Optimizer, root: nn.Module) -> bool:
        """Return True if the optimizer holds a parameter of the rule, or it acts on activations."""
        if bound.points or bound.output_recorders:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for handle, _, _ in bound.standing(root) for p in handle.stored(root))


class UnknownOptimizers:
    """Check that only optimizers given to `attach` move parameters with rules at the step."""

    def __init__(self, optimizers: Sequence[Optimizer], works: Sequence[ParameterRules]) -> None:
        self.known, self.works = weakref.WeakSet(optimizers), works
        self.stepped = False  # a known one stepped since the last unknown one: either may wrap the other

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Check after a real step of an optimizer.

        Raises:
            OptimizerError: an unknown optimizer moved a parameter without its rules.
        """
        if optimizer in self.known:
            self.stepped = True
            return
        stepped, self.stepped = self.stepped, False
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        found = [(work.handle.name, work.handle.find(root)) for work in self.works]
        moved = [name for name, p in found if id(p) in held and p.requires_grad]
        if moved and not stepped and not self._within():
            raise OptimizerError(
                f"{', '.join(map(repr, moved[:5]))} {'was' if len(moved) == 1 else 'were'} moved by a "
                f"{type(optimizer).__name__} that wasn't given to rs.attach, so the rules at the optimizer's step "
                "never came: reg.detach(), then rs.attach(model, reg.plan, optimizer) with the one that trains it"
            )

    def _within(self) -> bool:
        """Return True if the step of a known optimizer is running and includes this step."""
        frame = sys._getframe(1)
        while frame is not None:
            known = frame.f_code.co_name == "step" and frame.f_locals.get("self")
            if isinstance(known, Optimizer) and known in self.known:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


class Untrained:
    """Warn once, after two steps, of learned thresholds that no stepping optimizer holds."""

    def __init__(self, learning: Sequence[tuple[str, Sequence[Tensor]]], steps: Callable[[], int]) -> None:
        self.learning, self.steps = learning, steps
        self.held: set[int] = set()

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Look at a real step of an optimizer."""
        if self.steps() > 2:
            return
        self.held.update(id(p) for group in optimizer.param_groups for p in group["params"])
        lost = [name for name, learned in self.learning if not all(id(p) in self.held for p in learned)]
        if lost and self.steps() == 2:
            warnings.warn(
                f"the thresholds that the rules learn at {', '.join(map(repr, lost))} are in no optimizer that took a "
                "step: write optimizer.add_param_group({'params': list(reg.parameters())})",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
