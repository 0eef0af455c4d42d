"""Keywords of training, and their checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from restrain.errors import PlanError
from restrain.fields import check_flags, check_optional_flags, is_number


@dataclass(frozen=True)
class Settings:
    """Settings of training a model.

    Args:
        algo: a torch optimizer by name ("sgd", "nag", "adam", "rmsprop", "lbfgs", ...), or a
            function of parameters and lr.
        learning_rate: a number, or a function epoch → number, with epochs of this call counted from
            0; None keeps the optimizer's default.
        momentum: for optimizers that have one; None keeps the default.
        batch_size: samples per step.
        epochs: greatest number of passes over the data; "auto": 100 in `train`, and in `fit` as
            long as the validation loss falls (see `restrain.models.defaults`).
        shuffle: draw a new order of the samples in each epoch.
        patience: stop after this number of validations in a row without improvement; None: never;
            "auto": as `epochs` says.
        min_improvement: least decrease that counts, as a fraction of the best validation loss.
        validate_every: epochs from one validation to the next.
        max_updates: stop after so many updates; None: `epochs` alone decides.
        train_batches: batches of an epoch; None: all samples. Of a callable, calls an epoch (100).
        valid_batches: batches of a validation; None: all samples. Of a callable, calls (1).
        monitors: {glob over layers and parameters: levels}, further numbers in `history_`: the
            part of the entries below a level ("hid1<0.1"), or of {"mean": torch.mean} the result
            ("mean(hid1)"). Layers are seen without noise.
        monitor_gradients: squared gradient norm of each parameter ("grad(hid1.weight)").
        save_every: epochs (an int) or minutes (a float) from one written model to the next.
        save_as: their files, "{}" standing for the epoch, as in "net-{}.safetensors".
        max_gradient_norm: clip the norm of the gradient of all parameters; None: don't.
        progress: show a progress bar; None: in a terminal or a notebook.
        checkpoint: file written after each epoch; if it exists, training continues from it.
        compile: compile the whole update (one process on the CPU): True, False, or "auto" for long
            trainings only.
        device: "cpu", "cuda", "cuda:1", "mps"; None: the CPU.
        precision: "32", "64", "16-mixed" or "bf16-mixed"; None: "64" for float64 data on the CPU,
            else "32".

    Raises:
        PlanError: a value isn't allowed.
    """

    algo: Any = "adam"
    learning_rate: Any = None
    momentum: float | None = None
    batch_size: int = 64
    epochs: int = 100
    shuffle: bool = True
    patience: int | None = None
    min_improvement: float = 0.0
    validate_every: int = 1
    max_updates: int | None = None
    train_batches: int | None = None
    valid_batches: int | None = None
    monitors: Any = None
    monitor_gradients: bool = False
    save_every: float | None = None
    save_as: str | Path | None = None
    max_gradient_norm: float | None = None
    progress: bool | None = None
    checkpoint: str | Path | None = None
    compile: bool | str = "auto"
    device: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "validate_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise PlanError(f"{name}= is a whole number, at least 1; got {value!r}")
        for name in ("max_updates", "train_batches", "valid_batches"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise PlanError(f"{name}= is a whole number, at least 1, or None; got {value!r}")
        self._check_saving()
        if self.patience is not None and (not isinstance(self.patience, Integral) or self.patience < 1):
            raise PlanError(f"patience= is a whole number, at least 1, or None; got {self.patience!r}")
        if not is_number(self.min_improvement) or self.min_improvement < 0:
            raise PlanError(f"min_improvement= is a part such as 0.01, zero or more; got {self.min_improvement!r}")
        if self.max_gradient_norm is not None and not (
            is_number(self.max_gradient_norm) and self.max_gradient_norm > 0
        ):
            raise PlanError(f"max_gradient_norm= is a number above zero or None; got {self.max_gradient_norm!r}")
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, Path)):
            raise PlanError(f"checkpoint= is the name of a file or None; got {self.checkpoint!r}")
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise PlanError(f'compile= is True, False or "auto"; got {self.compile!r}')
        check_flags(PlanError, shuffle=self.shuffle)
        check_optional_flags(PlanError, monitor_gradients=self.monitor_gradients, progress=self.progress)

    def _check_saving(self) -> None:
        every, file = self.save_every, self.save_as
        if (every is None) != (file is None):
            raise PlanError('save_every= and save_as= go together, as in save_every=10, save_as="net-{}.safetensors"')
        if every is not None and not (is_number(every) and every > 0):
            raise PlanError(f"save_every= is a number of epochs (an int) or of minutes (a float); got {every!r}")
        if file is not None and not isinstance(file, (str, Path)):
            raise PlanError(f'save_as= is the name of files, as in "net-{{}}.safetensors"; got {file!r}')

    def identity(self) -> dict[str, Any]:
        """Return the settings that change the result, which a checkpoint must share."""
        found = {name: getattr(self, name) for name in NAMES if name not in _OUTSIDE}
        return {name: _plain(value) for name, value in found.items()}


_OUTSIDE = (
    "progress",
    "checkpoint",
    "device",
    "compile",
    "monitors",
    "monitor_gradients",
    "save_every",
    "save_as",
)  # may differ, or are stored separately


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Real):
        return float(value)
    return getattr(value, "__qualname__", type(value).__name__)


NEW = ("max_updates", "train_batches", "valid_batches")  # in the identity, but not in that of version 0.1

NAMES = tuple(field.name for field in dataclasses.fields(Settings))
