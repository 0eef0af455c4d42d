"""The metric of each optimizer: how far a step of it moves an entry for a constant gradient of one.

A proximal rule must use that length as the step of its prox; with any other, the point where the optimizer and the
prox balance isn't the minimiser of loss + penalty. Plain SGD moves by the learning rate; momentum multiplies that in
the long run; the adaptive ones divide each entry by the root of a second moment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from restrain.errors import OptimizerError


@dataclass(frozen=True)
class Metric:
    """The step of each entry: scale / (sqrt(second) / root + eps), or scale alone where `second` is None."""

    scale: float | Tensor
    second: Tensor | None = None
    root: float | Tensor = 1.0
    eps: float = 0.0

    def steps(self, second: Tensor | None = None) -> float | Tensor:
        """The steps of all entries, or of those whose second moments are given."""
        second = self.second if second is None else second
        return self.scale if second is None else self.scale / (second.sqrt() / self.root + self.eps)


State = dict[str, Any]
Group = dict[str, Any]


def _sgd(group: Group, state: State) -> Metric:
    # a constant gradient g builds up the buffer (1 - dampening) g / (1 - momentum); Nesterov's the same
    momentum = float(group["momentum"])
    gain = (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0
    return Metric(group["lr"] * gain)


def _adam(group: Group, state: State) -> Metric:
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    decay = group["betas"][1] ** _count(state["step"])
    return Metric(group["lr"], second, (1 - decay) ** 0.5, group["eps"])


def _rmsprop(group: Group, state: State) -> Metric:
    second = state["square_avg"]
    if group["centered"]:
        second = second - state["grad_avg"].square()
    return Metric(group["lr"] / (1 - group["momentum"]), second, 1.0, group["eps"])


def _adagrad(group: Group, state: State) -> Metric:
    rate = group["lr"] / (1 + (_count(state["step"]) - 1) * group["lr_decay"])
    return Metric(rate, state["sum"], 1.0, group["eps"])


def _count(step: float | Tensor) -> float | Tensor:
    return float(step) if not isinstance(step, Tensor) or step.device.type == "cpu" else step


METRICS: dict[type[Optimizer], Callable[[Group, State], Metric]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}


def metric_of(optimizer: Optimizer) -> Callable[[Group, State], Metric]:
    """The metric of an optimizer, as a function of a parameter group and a parameter's state.

    Raises:
        OptimizerError: an optimizer whose metric isn't known; the message lists those that are.
    """
    metric = _known(type(optimizer))
    if metric is not None:
        return metric
    known = ", ".join(cls.__name__ for cls in METRICS)
    why = " (it is called with a closure, several times a step)" if isinstance(optimizer, torch.optim.LBFGS) else ""
    raise OptimizerError(
        f"how='proximal' needs the optimizer's own metric, which is known for {known}; not for "
        f"{type(optimizer).__name__}{why}. Use one of these, or how='loss' or how='gradient' (no exact zeros then)"
    )


def diagonal(optimizer: Optimizer) -> bool:
    """Whether its metric differs from entry to entry."""
    return metric_of(optimizer) is not _sgd


def _known(cls: type[Optimizer]) -> Callable[[Group, State], Metric] | None:
    """The metric of the first of its bases that has one and whose step it has not overridden."""
    return next((METRICS[base] for base in cls.__mro__ if base in METRICS and _step_of(cls) is _step_of(base)), None)


def _step_of(cls: type[Optimizer]) -> Any:
    return inspect.unwrap(cls.step)
