"""Rules in skorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine import History, Hook
from restrain.errors import PlanError
from restrain.extras import needing
from restrain.integrations.session import Around, Session

with needing("skorch", __name__):
    from skorch import NeuralNet
    from skorch.callbacks import Callback


class RestrainCallback(Callback):  # type: ignore[misc]
    """Attach a plan while a net fits: `NeuralNet(..., callbacks=[RestrainCallback(plan)])`.

    Penalties with how="loss" are added to the criterion's loss in training, not in validation:
    "train_loss" includes them, "valid_loss" doesn't. The history gets "data_loss" (the epoch's
    mean, like "train_loss"), "penalty", "penalties/<rule>", and "strengths/<rule>" for moving
    strengths, which `PrintLog` shows. The rules' state is pickled with the net, also during a fit,
    and `partial_fit` continues from it; `Checkpoint(f_rules="rules.pt")` saves it. Another plan
    (`set_params`) begins anew. When the fit ends, also by an exception, the rules are detached.

    Args:
        plan: as in `rs.attach`.
        track: keep a history with a row for each k-th step, in `callback.rule_history_`; see
            `reg.track`.

    >>> from restrain.integrations.skorch import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    join_: _Join | None = None  # during a fit
    around_: Around | None = None
    track: int | None = None  # for pickles of version 0.1

    def __init__(self, plan: Any, track: int | None = None) -> None:
        self.plan, self.track = plan, track

    def initialize(self) -> RestrainCallback:
        if not hasattr(self, "session_"):
            self.session_ = Session(self.plan, self.track)
        return self

    @property
    def rule_history_(self) -> History:
        """The history of the fit that runs, else of the last one; see `reg.track`."""
        return self.session_.history

    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        if sum(isinstance(callback, RestrainCallback) for _, callback in net.callbacks_) > 1:
            raise PlanError("this net has several RestrainCallbacks: put all rules into one plan")
        if not isinstance(net.criterion_, nn.Module):
            raise PlanError(
                f"penalties join the loss of a criterion that is an nn.Module, got {type(net.criterion_).__name__}: "
                "wrap it in one"
            )
        # another plan, or a net without history
        if self.session_.plan is not self.plan or not net.history:
            self.session_ = Session(self.plan, self.track)
        self.session_.track = self.track
        net.rules_ = self.session_  # skorch saves this attribute for f_rules=
        if self.around_ is not None:  # left by a fit interrupted before its loop
            self.around_.remove()
        self.around_ = Around(net, "fit_loop", self._fit_loop)

    def _fit_loop(self, net: NeuralNet, fit_loop: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the net's `fit_loop`; detach when it ends: skorch has no event for an exception."""
        self.join_ = _Join(self.session_)
        handle = net.criterion_.register_forward_hook(self.join_)
        try:
            self.session_.begin(net.module_, [getattr(net, f"{name}_") for name in net._optimizers])
            return fit_loop(*args, **kwargs)
        finally:
            handle.remove()
            if self.around_ is not None:
                self.around_.remove()
            self.join_ = self.around_ = None
            self.session_.end()

    def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        self.session_.epoch_begins(len(net.history) - 1)

    def on_batch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        self._expect()

    def on_grad_computed(self, net: NeuralNet, named_parameters: Any, **kwargs: Any) -> None:
        self._expect()  # an optimizer with a closure computes several times per batch

    def on_batch_end(self, net: NeuralNet, batch: Any = None, training: bool = False, **kwargs: Any) -> None:
        if training and (data_loss := self.session_.data_loss()) is not None:
            net.history.record_batch("data_loss", data_loss)

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        batches = net.history[-1, "batches", :, ("data_loss", "train_batch_size")]
        net.history.record("data_loss", sum(loss * size for loss, size in batches) / sum(size for _, size in batches))
        for name, value in self.session_.logs().items():
            net.history.record(name, value)
        self.session_.epoch_ends()

    def _expect(self) -> None:
        if self.join_ is not None:
            self.join_.joined = False

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        return {**state, "join_": None, "around_": None} if "session_" in state else state


class _Join(Hook):
    """Hook on the criterion that adds the penalties; a DeadHook in a copy."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.joined = False  # penalties were added in this batch

    def __call__(self, criterion: nn.Module, args: Any, loss: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if self.joined:
            raise PlanError(
                "the criterion was called twice for one batch, so the penalties would be added twice: let one "
                "criterion compute the whole loss, or call the second under torch.no_grad() where it only measures"
            )
        self.joined = True
        return self.session.loss(loss)
