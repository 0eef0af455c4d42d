"""The keywords of training, and what they may be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from restrain.errors import PlanError
from restrain.fields import is_number


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Args:
        algo: a torch optimizer by name ("sgd", "nag", "adam", "rmsprop", "lbfgs", ...), or a function of parameters
            and lr.
        learning_rate: a number, or a function epoch → number, epochs of this call counted from 0; None is the
            optimizer's own.
        momentum: for the optimizers that have one.
        batch_size: samples a step.
        epochs: how often each sample is seen at most.
        shuffle: a new order of samples in every epoch.
        patience: stop after so many validations in a row without improvement.
        min_improvement: by what part of the best validation loss a better one must be less to count.
        validate_every: epochs from one validation to the next.
        max_gradient_norm: longer gradients (of all parameters together) are scaled down to that length.
        progress: a progress bar: None where stderr is a terminal, True or False always or never.
        checkpoint: a file, written after every epoch; a fit that finds one there goes on from it.
        compile: whether the whole update is compiled (CPU, one process): True, False, or "auto", for long trainings.
        device, precision: "cuda", "cuda:1", "mps"; "32", "64", "16-mixed", "bf16-mixed".
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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: all that changes the result."""
        found = {name: getattr(self, name) for name in NAMES if name not in _OUTSIDE}
        return {name: _plain(value) for name, value in found.items()}


_OUTSIDE = ("progress", "checkpoint", "device", "compile")  # what a checkpoint needn't agree with, or says itself


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Real):
        return float(value)
    return getattr(value, "__qualname__", type(value).__name__)


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
