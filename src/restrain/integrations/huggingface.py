"""Rules in Hugging Face's Trainer."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restrain.errors import NotCollectedError, PlanError, RestrainWarning
from restrain.extras import needing
from restrain.integrations.session import Session

with needing("huggingface", __name__):
    from transformers import Trainer, TrainerCallback

_FILE = "restrain.pt"  # in the Trainer's checkpoint folders


class RestrainCallback(TrainerCallback):
    """Attaches a plan while the Trainer trains: `RestrainCallback(plan).add_to(trainer)`.

    Penalties whose how is "loss" join the loss that the model itself returns, once an update: whole where the Trainer
    divides by the accumulated batches, in parts where the model has divided by all their items. "data_loss" (the mean
    since the last time, as "loss" is), "penalty", "penalties/<rule>", and "strengths/<rule>" of those that move are in
    the Trainer's logs and whatever it reports to; what the rules count and keep is a file in its checkpoints. A second
    `train()` on the same model goes on from the first; with another model (`model_init`) the rules begin anew.

    >>> from restrain.integrations.huggingface import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any) -> None:
        self._session = Session(plan)
        self._handle: Any = None
        self._trainer: Any = lambda: None
        self._reached = False
        self._loaded = False

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
        self._trainer = weakref.ref(trainer)
        return self

    def load(self, checkpoint: str | Path) -> RestrainCallback:
        """Go on from the state in a checkpoint that isn't in the Trainer's output_dir, where it is found by itself."""
        self._session.load_state_dict(torch.load(Path(checkpoint) / _FILE, weights_only=True))
        self._loaded = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer() is None:
            raise PlanError(
                "callbacks=[RestrainCallback(plan)] would come after those that report: write "
                "RestrainCallback(plan).add_to(trainer)"
            )
        if args.torch_compile:
            raise PlanError(
                "torch_compile=True compiles the whole forward, the hook on its loss with it: compile the layers"
            )
        self._remove()
        if state.global_step and not self._loaded:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._loaded, optimizer = False, kwargs["optimizer"]
        self._session.begin(kwargs["model"], [getattr(optimizer, "optimizer", optimizer)])
        self._handle = kwargs["model"].register_forward_hook(self._add, with_kwargs=True)

    def _resume(self, checkpoint: Path) -> None:
        if (checkpoint / _FILE).exists():
            self.load(checkpoint)
        else:
            warnings.warn(
                f"training goes on at step {checkpoint.name.removeprefix('checkpoint-')}, but the rules begin anew: "
                f"there is no {checkpoint / _FILE}. If the checkpoint is elsewhere, write callback.load(checkpoint) "
                "before trainer.train(resume_from_checkpoint=checkpoint)",
                RestrainWarning,
                stacklevel=2,
            )

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._session.end()

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = output["loss"] if isinstance(output, dict) else output[0]
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise PlanError("the model returned no loss: give the Trainer batches with labels")
        steps = self._trainer().current_gradient_accumulation_steps  # fewer at the end of an epoch
        loss = self._session.loss(loss, self._share(kwargs, steps), weight=1 / steps)
        if loss.requires_grad:
            loss.register_hook(self._reach)
        if isinstance(output, dict):
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def _share(self, kwargs: dict[str, Any], steps: int) -> float:
        """The part of the penalties that belongs to one forward."""
        if kwargs.get("num_items_in_batch") is None:
            return 1.0  # the Trainer divides this loss by the number of accumulated batches
        args = self._trainer().args
        return float(1 / (steps * (args.world_size if args.average_tokens_across_devices else 1)))

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
            torch.save(self._session.state_dict(), folder / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()
