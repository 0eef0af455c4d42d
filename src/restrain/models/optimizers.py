"""Optimizers by name, and learning rates that change from epoch to epoch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from restrain.errors import PlanError
from restrain.fields import is_number

_CLASSES = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}
NAMES = tuple(sorted({*_CLASSES, "nag"}))


def make(
    algo: Any, parameters: Iterable[nn.Parameter], *, learning_rate: Any = None, momentum: float | None = None
) -> Optimizer:
    """The optimizer that `algo` names: one of torch's in any case, "nag" (SGD with Nesterov's momentum), or a function
    of parameters and lr, such as a class or a `functools.partial` of one.

    Raises:
        PlanError: no such optimizer, or one without momentum is to have it.
    """
    options: dict[str, Any] = {}
    if learning_rate is not None:
        options["lr"] = rate_at(learning_rate, 0)
    if isinstance(algo, str):
        name = algo.lower()
        if name not in NAMES:
            raise PlanError(f"algo= names a torch optimizer, got {algo!r}; there are: {', '.join(NAMES)}")
        if name == "nag":
            options.update(nesterov=True, momentum=0.9)
        build: Callable[..., Any] = _CLASSES["sgd" if name == "nag" else name]
    elif callable(algo):
        build = algo
    else:
        raise PlanError(f"algo= is a name such as 'adam', or a class of optimizers; got {algo!r}")
    if momentum is not None:
        if "momentum" not in inspect.signature(build).parameters:
            having = [n for n, cls in sorted(_CLASSES.items()) if "momentum" in inspect.signature(cls).parameters]
            raise PlanError(f"algo={algo!r} has no momentum=; these have: {', '.join(having)}, nag")
        if not (isinstance(momentum, Real) and 0 <= momentum < 1):
            raise PlanError(f"momentum= is a number from 0 to below 1, got {momentum!r}")
        options["momentum"] = momentum
    if options.get("nesterov") and options["momentum"] == 0:
        raise PlanError("algo='nag' needs a momentum above zero; without momentum it is 'sgd'")
    made = build(list(parameters), **options)
    if not isinstance(made, Optimizer):
        raise PlanError(f"algo={algo!r} gave {type(made).__name__}, not a torch optimizer")
    return made


def rate_at(learning_rate: Any, epoch: int) -> float:
    """The learning rate of an epoch (counted from 0): a number, or what a function of the epoch says.

    Raises:
        PlanError: it isn't a finite number, zero or more.
    """
    rate = learning_rate(epoch) if callable(learning_rate) else learning_rate
    if not is_number(rate) or rate < 0:
        raise PlanError(
            f"learning_rate= is a finite number, zero or more, or a function epoch → such a number; got {rate!r}"
        )
    return float(rate)


def set_rate(optimizer: Optimizer, learning_rate: Any, epoch: int) -> None:
    """Give the optimizer the rate of an epoch; None leaves it its own."""
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(learning_rate, epoch)
