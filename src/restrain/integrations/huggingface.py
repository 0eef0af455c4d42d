"""Rules in Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from restrain.errors import NotCollectedError, PlanError
from restrain.integrations.session import Session

_FILE = "restrain.pt"  # in the Trainer's checkpoint folders


class RestrainCallback(TrainerCallback):
    """Attaches a plan while the Trainer trains: `RestrainCallback(plan).add_to(trainer)`.

    Penalties whose how is "loss" join the loss that the model itself returns, once an update: whole where the Trainer
    divides by the accumulated batches, in parts where the model has divided by all their items. "data_loss", "penalty"
    and "penalty/<rule>" are in the Trainer's logs and whatever it reports to; what the rules count and keep is a file
    in its checkpoints.

    >>> from restrain.integrations.huggingface import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any) -> None:
        self._session = Session(plan)
        self._handle: Any = None
        self._args: Any = None
        self._steps = 1
        self._reached = False

    @property
    def reg(self) -> Any:
        """The attachment; None outside of a training."""
        return self._session.reg

    def add_to(self, trainer: Trainer) -> RestrainCallback:
        """Put it first among the trainer's callbacks, so that its values are there when the others report.

        Raises:
            PlanError: the trainer computes the loss outside of the model, where it can't be reached.
        """
        if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            raise PlanError(
                "this Trainer computes its loss by compute_loss_func or label smoothing, past the model's own: add the "
                "penalties there, return reg.loss(loss), and attach the rules by rs.attach(model, plan, optimizer)"
            )
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.torch_compile:
            raise PlanError(
                "torch_compile=True compiles the whole forward, the hook on its loss with it: compile the layers"
            )
        self._args, self._steps = args, args.gradient_accumulation_steps
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
        if state.global_step and file.exists():
            self._session.load(torch.load(file, weights_only=True))
        optimizer = kwargs["optimizer"]
        self._session.begin(kwargs["model"], [getattr(optimizer, "optimizer", optimizer)])
        self._handle = kwargs["model"].register_forward_hook(self._add, with_kwargs=True)

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = output["loss"] if isinstance(output, dict) else output[0]
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise PlanError("the model returned no loss: give the Trainer batches with labels")
        loss = self._session.loss(loss, self._share(kwargs))
        if loss.requires_grad:
            loss.register_hook(self._reach)
        if isinstance(output, dict):
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def _share(self, kwargs: dict[str, Any]) -> float:
        """The part of the penalties that belongs to one forward."""
        if kwargs.get("num_items_in_batch") is None:
            return 1.0  # the Trainer divides this loss by the number of accumulated batches
        ranks = self._args.world_size if self._args.average_tokens_across_devices else 1
        return float(1 / (self._steps * ranks))

    def _reach(self, gradient: Tensor) -> None:
        self._reached = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._reached:
            raise NotCollectedError(
                "the Trainer's backward didn't pass the loss that the model returned, so the penalties had no effect: "
                "its compute_loss uses another; return reg.loss(loss) from there, with rules attached by rs.attach"
            )
        self._reached = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            found = self._session.logs()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.exists():
            torch.save(self._session.state(), folder / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._session.end()
