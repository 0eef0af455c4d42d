"""Rules in Hugging Face's Trainer."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restrain import storage
from restrain.engine import History
from restrain.errors import FileError, PlanError, RestrainWarning
from restrain.extras import needing
from restrain.fields import brief, level_of_caller
from restrain.integrations.session import Around, Session

with needing("huggingface", __name__):
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

_FILE = "restrain.pt"  # in the Trainer's checkpoint folders


class RestrainCallback(TrainerCallback):
    """Attach a plan while the Trainer trains: `RestrainCallback(plan).add_to(trainer)`.

    Penalties with how="loss" are added to the result of `compute_loss`, your own or the Trainer's,
    once per update: in full if the Trainer divides by the number of accumulated batches, in parts
    if that loss is already divided by all their items. "data_loss" (the mean since the last log,
    like "loss"), "penalty", "penalties/<rule>", and "strengths/<rule>" for moving strengths are in
    the Trainer's logs and reports; the state of the rules is a file in its checkpoints. A second
    `train()` on the same model continues from the first; with another model (`model_init`) the
    rules begin anew. When `train()` ends, also by an exception, the rules are detached.

    Args:
        plan: as in `rs.attach`.
        track: keep a history with a row for each k-th step, in `callback.history`; see `reg.track`.

    >>> from restrain.integrations.huggingface import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any, *, track: int | None = None) -> None:
        self._session = Session(plan, track)
        self._trainer: weakref.ref[Trainer] | None = None  # the trainer while it trains
        self._join: Around | None = None
        self._resumes: Any = None  # argument resume_from_checkpoint
        self._loaded = False
        self._epoch = 0  # number of the next epoch

    @property
    def reg(self) -> Any:
        """The attachment; None outside of a training."""
        return self._session.reg

    @property
    def history(self) -> History:
        """The history of the fit that runs, else of the last one; see `reg.track`."""
        return self._session.history

    def add_to(self, trainer: Trainer) -> RestrainCallback:
        """Insert it first among the trainer's callbacks, so that later callbacks report its values.

        Raises:
            PlanError: the trainer has another RestrainCallback.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(one, RestrainCallback) and one is not self for one in callbacks):
            raise PlanError(
                "this Trainer has a RestrainCallback already, and both would add their penalties: put all rules into "
                "one plan, or write trainer.remove_callback(RestrainCallback) before"
            )
        if self not in callbacks:
            callbacks.insert(0, self)
        Around(trainer, "train", self._train)
        return self

    def load(self, checkpoint: str | Path) -> RestrainCallback:
        """Load a checkpoint's state for the next training, whichever one the Trainer resumes."""
        state = _state(checkpoint)
        state.pop("belongs_to", None)
        self._session.load_state_dict(state)
        self._loaded = True
        return self

    def _train(self, trainer: Trainer, train: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the trainer's `train`; detach when it ends, also by an exception."""
        self._trainer = weakref.ref(trainer)
        self._resumes = args[0] if args else kwargs.get("resume_from_checkpoint")
        try:
            return train(*args, **kwargs)
        finally:
            self._trainer, self._loaded = None, False
            self._end()

    def _end(self) -> None:
        if self._join is not None:
            self._join.remove()
            self._join = None
        self._session.end()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is None:
            raise PlanError(
                "callbacks=[RestrainCallback(plan)] would come after those that report: write "
                "RestrainCallback(plan).add_to(trainer)"
            )
        if args.n_gpu > 1:
            raise PlanError(
                f"one process would train on {args.n_gpu} devices by nn.DataParallel, whose replicas the rules can't "
                "see: launch with torchrun, or show it one device (CUDA_VISIBLE_DEVICES=0)"
            )
        self._end()
        if self._resumes and not self._loaded:
            last: Any = get_last_checkpoint(args.output_dir) if self._resumes is True else self._resumes  # type: ignore[no-untyped-call]
            self._resume(Path(last))
        self._loaded, self._epoch, optimizer = False, int(state.epoch or 0), kwargs["optimizer"]
        self._session.begin(kwargs["model"], [getattr(optimizer, "optimizer", optimizer)])
        self._join = Around(self._trainer(), "compute_loss", self._compute_loss)

    def _resume(self, checkpoint: Path) -> None:
        if not (checkpoint / _FILE).exists():
            warnings.warn(
                f"training resumes from {checkpoint}, but the rules begin anew: there is no {_FILE} in it. If another "
                "checkpoint has it, write callback.load(that_checkpoint) before trainer.train(...)",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
        elif _state(checkpoint).get("belongs_to") != _identity(checkpoint):
            raise PlanError(
                f"{checkpoint / _FILE} is of another run, which had a checkpoint of that name: delete it, and the "
                f"rules begin anew; or write callback.load({str(checkpoint)!r}) before trainer.train(...) to take it"
            )
        else:
            self.load(checkpoint)

    def _compute_loss(self, trainer: Trainer, compute: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the trainer's `compute_loss`; in training, add the penalties."""
        found = compute(model, *args, **kwargs)
        if not (model.training and torch.is_grad_enabled()):
            return found
        items = kwargs.get("num_items_in_batch", args[2] if len(args) > 2 else None)
        steps = trainer.current_gradient_accumulation_steps  # fewer at an epoch's end
        share = 1 / steps if _is_scaled(trainer, items) else 1.0
        if isinstance(found, tuple):
            return (self._session.loss(found[0], share, weight=1 / steps), *found[1:])
        return self._session.loss(found, share, weight=1 / steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.epoch_begins(self._epoch)
        self._epoch += 1

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.epoch_ends()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            found = self._session.logs(self._mean if args.world_size > 1 else None)
            logs.update(found)
            state.log_history[-1].update(found)

    def _mean(self, values: Tensor) -> Tensor:
        trainer = self._trainer() if self._trainer is not None else None
        assert trainer is not None
        return trainer.accelerator.reduce(values.to(trainer.args.device), reduction="mean")  # type: ignore[no-any-return]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or not state.is_world_process_zero:
            return
        folder = Path(trainer._get_output_dir(trainer._trial)) / f"checkpoint-{state.global_step}"
        if folder.exists():
            storage.write_torch(folder / _FILE, {**self._session.state_dict(), "belongs_to": _identity(folder)})

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no trainer
        return {**vars(RestrainCallback(None)), "_session": self._session}


def _is_scaled(trainer: Trainer, items: Any) -> bool:
    """Return True if the Trainer expects a loss divided by all items of an update.

    It decides like the Trainer's `training_step`.
    """
    told = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5
    if told is not None:
        return bool(told)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def _state(checkpoint: str | Path) -> dict[str, Any]:
    """Return the rules' state in a Trainer's checkpoint folder, with the digest of its run.

    Raises:
        MissingFileError, FileError: it has none, or it is damaged.
    """
    file = storage.as_path(checkpoint) / _FILE
    state = storage.read_torch(file)
    if not isinstance(state, dict):
        raise FileError(f"{file} holds {brief(state)}; expected a state of rules, a dict")
    return state


def _identity(checkpoint: Path) -> str:
    """Return a digest of the Trainer's state in a checkpoint, which is unique to a run."""
    file = checkpoint / "trainer_state.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
