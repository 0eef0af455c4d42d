"""What the callbacks share: a plan that is attached while a trainer trains, its state, and what is logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.attach import Attachment, attach


class Session:
    """An attachment that lives as long as a fit. State may be loaded before the fit begins."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.reg: Attachment | None = None
        self._pending: dict[str, Any] | None = None
        self._data_loss: Tensor | None = None

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Attachment:
        """Attach the plan, and go on from a state that was loaded."""
        self.end()
        self.reg = attach(model, self.plan, list(optimizers))
        if self._pending is not None:
            self.reg.load_state_dict(self._pending)
            self._pending = None
        return self.reg

    def end(self) -> None:
        """Detach."""
        if self.reg is not None:
            self._pending = self.reg.state_dict()  # a later fit goes on from here
            self.reg.detach()
            self.reg = None

    def loss(self, data_loss: Tensor, share: float = 1.0) -> Tensor:
        """The data loss with `share` of the penalties."""
        assert self.reg is not None
        self._data_loss = data_loss.detach().clone()
        return self.reg.loss(data_loss, share=share)

    def join(self, loss: Tensor, scale: float) -> None:
        """Add the penalties, scaled, in place to a loss that is so scaled: its owner goes on with that very tensor."""
        assert self.reg is not None
        self._data_loss = loss.detach() / scale
        loss.add_(self.reg.loss(loss, share=scale) - loss)

    def state(self) -> dict[str, Any]:
        """What belongs into the trainer's checkpoint."""
        return self.reg.state_dict() if self.reg is not None else self._pending or {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state: at once, or when the fit begins."""
        if self.reg is not None and state:
            self.reg.load_state_dict(state)
        else:
            self._pending = state or None

    @torch.no_grad()
    def logs(self) -> dict[str, float]:
        """The data loss alone, all penalties together, and each rule's strength × value."""
        if self.reg is None:
            return {}
        values = self.reg.values()
        found = {f"penalty/{name}": value for name, value in values.items()}
        total = sum(value for value in values.values() if value == value)
        data = {} if self._data_loss is None else {"data_loss": float(self._data_loss)}
        return {**data, "penalty": total, **found}
