"""The rules of one point of a path, which wait for the optimizer that `fit` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from restrain.engine import Attachment, attach
from restrain.errors import OptimizerError, PlanError
from restrain.rules import Rule


class Waiting:
    """What `fit(model, reg)` gets as `reg`: `reg.use(optimizer)` attaches the rules.

    After that it offers what an `Attachment` does. Rules that need no optimizer are attached when
    `reg` is first used.
    """

    def __init__(self, model: nn.Module, rules: Sequence[Rule]) -> None:
        self.model, self.rules_of_point = model, rules
        self.attached: Attachment | None = None
        self.optimizers: Any = None  # kept, as certificates count their parameters

    def use(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> Attachment:
        """Attach the rules to the optimizer (or a list of them); return the attachment.

        Raises:
            PlanError: they are attached already.
        """
        if self.attached is not None:
            raise PlanError("reg.use(optimizer) is called once in a fit, before its loop")
        self.attached, self.optimizers = attach(self.model, list(self.rules_of_point), optimizer), optimizer
        return self.attached

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self.attached is None:
            try:
                self.use(None)
            except OptimizerError as error:
                raise OptimizerError(
                    f"fit(model, reg) makes its optimizer and calls reg.use(optimizer) before its loop: {error}"
                ) from error
        return getattr(self.attached, name)

    def detach(self) -> None:
        """Remove the rules from the model, if they are attached."""
        if self.attached is not None:
            self.attached.detach()
