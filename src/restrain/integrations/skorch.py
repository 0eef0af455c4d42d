"""Rules in skorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from restrain.extras import needing
from restrain.integrations.session import Session

with needing("skorch", __name__):
    from skorch import NeuralNet
    from skorch.callbacks import Callback


class RestrainCallback(Callback):  # type: ignore[misc]
    """Attaches a plan while a net is fitted: `NeuralNetClassifier(..., callbacks=[RestrainCallback(plan)])`.

    Penalties whose how is "loss" join the criterion's loss in training, not in validation; so "train_loss" has them,
    "valid_loss" hasn't. The history gets "data_loss" (the epoch's mean, as "train_loss" is), "penalty",
    "penalties/<rule>", and "strengths/<rule>" of those that move, which `PrintLog` shows. The rules' state is pickled
    with the net, and a `partial_fit` goes on from it; a checkpoint has it with `Checkpoint(f_rules="rules.pt")`.

    >>> from restrain.integrations.skorch import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def initialize(self) -> RestrainCallback:
        if hasattr(self, "session_"):  # perhaps of a fit that broke off
            self._remove()
        self.session_ = Session(self.plan)
        self._handle: Any = None
        return self

    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self._remove()
        self.session_.begin(net.module_, [net.optimizer_])
        net.rules_ = self.session_  # where skorch looks for what f_rules= saves
        self._handle = net.criterion_.register_forward_hook(self._add)

    def _add(self, criterion: nn.Module, args: Any, loss: Tensor) -> Tensor | None:
        return self.session_.loss(loss) if torch.is_grad_enabled() else None

    def on_batch_end(self, net: NeuralNet, batch: Any = None, training: bool = False, **kwargs: Any) -> None:
        if training and (data_loss := self.session_.data_loss()) is not None:
            net.history.record_batch("data_loss", data_loss)

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        batches = net.history[-1, "batches", :, ("data_loss", "train_batch_size")]
        net.history.record("data_loss", sum(loss * size for loss, size in batches) / sum(size for _, size in batches))
        for name, value in self.session_.logs().items():
            net.history.record(name, value)

    def on_train_end(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.session_.end()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}
