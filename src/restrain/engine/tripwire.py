"""A penalty that was meant for the loss but was never collected is an error at the optimizer's step."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from restrain.engine.bind import Bound
from restrain.engine.clock import Clock
from restrain.engine.collect import Forwards
from restrain.errors import NotCollectedError


class Tripwire:
    """After each real step of an optimizer that trains the model: whether the loss-mode rules were collected.

    `collected` is set by the attachment whenever the penalties are asked for.
    """

    def __init__(self, bounds: list[Bound], forwards: Forwards, clock: Clock) -> None:
        self.bounds, self.forwards, self.clock = bounds, forwards, clock
        self.collected = False

    def after(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Called after a real step.

        Raises:
            NotCollectedError: a training forward ran, and rules that act in the loss were not asked for.
        """
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

    def _concerns(self, bound: Bound, optimizer: Optimizer, root: nn.Module) -> bool:
        """Whether the optimizer holds a parameter that the rule acts on, or (for activations) any of the model."""
        if bound.spots or bound.raws:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for handle, _, _ in bound.standing(root) for p in handle.stored(root))
