"""What the callbacks share: a plan that is attached while a trainer trains, its state, and what is logged."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine import Attachment, attach
from restrain.integrations.logged import logs


class Session:
    """An attachment that lives as long as a fit.

    A fit goes on from a state that was loaded before it, or from the last fit's, if that was one of the same model;
    with another model it begins anew.
    """

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.reg: Attachment | None = None
        self._state: dict[str, Any] = {}  # loaded, or of the last fit
        self._fitted: weakref.ref[nn.Module] | None = None  # whose state it is; None of one that was loaded
        self._losses: Tensor | None = None
        self._weights = 0.0

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Attachment:
        """Attach the plan, and go on from a state that is there for this model."""
        self.end()
        self.reg = attach(model, self.plan, list(optimizers))
        if self._state and (self._fitted is None or self._fitted() is self.reg.model):
            self.reg.load_state_dict(self._state)
        self._state, self._fitted = {}, None
        self.data_loss()  # of a fit that broke off
        return self.reg

    def end(self) -> None:
        """Detach."""
        if self.reg is not None:
            self._state, self._fitted = self.reg.state_dict(), weakref.ref(self.reg.model)
            self.reg.detach()
            self.reg = None

    def loss(self, data_loss: Tensor, share: float = 1.0, weight: float = 1.0) -> Tensor:
        """The data loss with `share` of the penalties; it weighs `weight` in the mean that is logged."""
        assert self.reg is not None
        self._note(data_loss / share, weight)
        return self.reg.loss(data_loss, share=share)

    def join(self, loss: Tensor, scale: float) -> None:
        """Add the penalties, scaled, in place to a loss that is so scaled: its owner goes on with that very tensor."""
        assert self.reg is not None
        self._note(loss / scale, 1.0)
        loss.add_(self.reg.loss(loss, share=scale) - loss)

    def _note(self, data_loss: Tensor, weight: float) -> None:
        part = data_loss.detach() * weight
        self._losses = part if self._losses is None else self._losses + part
        self._weights += weight

    def data_loss(self) -> float | None:
        """The mean of the data losses since it was last asked for; None if there was none."""
        mean = None if self._losses is None else float(self._losses) / self._weights
        self._losses, self._weights = None, 0.0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """What belongs into the trainer's checkpoint."""
        return self.reg.state_dict() if self.reg is not None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: at once, or when the fit begins."""
        if self.reg is not None and state:
            self.reg.load_state_dict(state)
        else:
            self._state, self._fitted = state, None

    def logs(self) -> dict[str, float]:
        """The mean data loss since the last time, and what the rules are worth now."""
        return {} if self.reg is None else logs(self.reg, self.data_loss())

    def __getstate__(self) -> dict[str, Any]:
        fresh = vars(Session(self.plan))
        return {**fresh, "_state": self.state_dict()}  # the copy's model is another object, and the same model
