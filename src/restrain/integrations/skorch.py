"""Rules in skorch."""

from __future__ import annotations

from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import Tensor, nn

from restrain.integrations.session import Session


class RestrainCallback(Callback):  # type: ignore[misc]
    """Attaches a plan while a net is fitted: `NeuralNetClassifier(..., callbacks=[RestrainCallback(plan)])`.

    Penalties whose how is "loss" join the criterion's loss in training, not in validation; so "train_loss" has them,
    "valid_loss" hasn't. The history gets "data_loss", "penalty" and "penalty/<rule>" an epoch, which `PrintLog` shows.
    The rules' state is pickled with the net, and a `partial_fit` goes on from it.

    >>> from restrain.integrations.skorch import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def initialize(self) -> RestrainCallback:
        self.session_ = Session(self.plan)
        self._handle: Any = None
        return self

    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self.session_.begin(net.module_, [net.optimizer_])
        self._handle = net.criterion_.register_forward_hook(self._add)

    def _add(self, criterion: nn.Module, args: Any, loss: Tensor) -> Tensor | None:
        return self.session_.loss(loss) if torch.is_grad_enabled() else None

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        for name, value in self.session_.logs().items():
            net.history.record(name, value)

    def on_train_end(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self._handle.remove()
        self.session_.end()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}
