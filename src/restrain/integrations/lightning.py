"""Rules in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from restrain.extras import needing
from restrain.integrations.session import Session

with needing("lightning", __name__):
    from lightning.pytorch import Callback, LightningModule, Trainer


class RestrainCallback(Callback):
    """Attaches a plan while the Trainer fits: `Trainer(callbacks=[RestrainCallback(plan)])`.

    Penalties whose how is "loss" join what `training_step` returns just before the backward, whole, under
    accumulation and loss scaling too; the loss that Lightning itself shows and logs stays the data loss. Logged every
    `log_every_n_steps`: "penalty" (also in the progress bar), "data_loss" (the mean since the last time),
    "penalties/<rule>", and "strengths/<rule>" of those that move. What the rules count and keep is in the Trainer's
    checkpoints. A second fit of the same module goes on from the first; with another module the rules begin anew.

    >>> from restrain.integrations.lightning import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any) -> None:
        self._session = Session(plan)

    @property
    def reg(self) -> Any:
        """The attachment; None outside of a fit."""
        return self._session.reg

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.begin(pl_module, trainer.optimizers)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        scale = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of mixed precision, which has scaled the loss
        self._session.join(loss, scale if scaler is None else scale * scaler.get_scale())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            logs = self._session.logs()
            total = logs.pop("penalty", 0.0)
            pl_module.log("penalty", total, prog_bar=True, batch_size=1)
            pl_module.log_dict(logs, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._session.end()

    def state_dict(self) -> dict[str, Any]:
        return self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._session.load_state_dict(state_dict)
