"""Monitors: data loss and rule values, averaged over an epoch or over validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine import Attachment, Evaluation
from restrain.errors import PlanError
from restrain.fields import brief
from restrain.named_tensors import near

Monitors = dict[str, float]


@dataclass
class Means:
    """Means over batches, weighted by rows; values stay on the device up to 1,024 batches."""

    rows: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    waiting: list[tuple[dict[str, Tensor], int]] = field(default_factory=list)

    def add(self, values: dict[str, Tensor], rows: int) -> None:
        """Add the mean values of a batch of `rows` rows."""
        self.waiting.append(({key: value.detach() for key, value in values.items()}, rows))
        if len(self.waiting) == 1024:
            self._add_up()

    def take(self, sums: dict[str, Tensor], rows: int) -> None:
        """Add sums over `rows` rows."""
        self.rows += rows
        for key, value in sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def _add_up(self) -> None:
        """Add the waiting values to the sums, one operation per name: 1,000 cost as much as one."""
        waiting, self.waiting = self.waiting, []
        for key in {key: None for values, _ in waiting for key in values}:
            found = torch.stack([values[key] for values, _ in waiting if key in values])
            counts = torch.tensor(
                [rows for values, rows in waiting if key in values], dtype=torch.float64, device="cpu"
            )
            self.take({key: found.to("cpu", torch.float64) @ counts}, 0)
        self.rows += sum(rows for _, rows in waiting)

    def read(self, rules: list[str]) -> Monitors:
        """Return the means, and "loss": the data loss plus the values of `rules`."""
        self._add_up()
        found = {key: float(value) / max(self.rows, 1) for key, value in self.sums.items()}
        return {"loss": found["data_loss"] + sum(found.get(rule, 0.0) for rule in rules), **found}


def penalties(reg: Attachment | None) -> list[str]:
    """Return the names of the rules that are penalties."""
    return [] if reg is None else [rule.key for rule in reg.rules if rule.is_penalty]


def training_values(reg: Attachment | None) -> dict[str, Tensor]:
    """Return the value of each penalty at the last loss, without waiting for the device."""
    return {} if reg is None else reg.latest()


@contextmanager
def evaluating(reg: Attachment | None) -> Iterator[Evaluation | None]:
    """Context for measuring rules in evaluation; yields the Evaluation, or None without rules."""
    if reg is None:
        yield None
        return
    with reg.evaluating() as evaluation:
        yield evaluation


@dataclass(frozen=True)
class _Item:
    """A monitor: its key, the layer or parameter that it is of, and the function of its values."""

    key: str
    name: str
    of_parameter: bool
    function: Callable[[Tensor], Any]


class Watch:
    """Monitors of the user's: functions of layers' outputs and of parameters, gradient norms.

    Args:
        network: its layers and parameters are watched.
        monitors: {glob: level, levels, or {label: function}}, or None.
        gradients: also the squared gradient norm of each parameter.

    Raises:
        PlanError: a glob matches nothing, or its levels are something else.
    """

    def __init__(self, network: nn.Module, monitors: Any, gradients: bool) -> None:
        self.network, self.gradients = network, bool(gradients)
        self.items = _items(network, monitors)
        self.seen: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.items) or self.gradients

    @contextmanager
    def seeing(self) -> Iterator[None]:
        """Context in which forwards of the network are watched."""
        handles = [
            self.network.get_submodule(name).register_forward_hook(self._hook(name), prepend=True)
            for name in {item.name for item in self.items if not item.of_parameter}
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.seen.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            self.seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return see

    def values(self) -> dict[str, Tensor]:
        """Return the monitors of the last forward, without those of gradients."""
        found = {}
        for item in self.items:
            tensor = self.network.get_parameter(item.name).detach() if item.of_parameter else self.seen[item.name]
            found[item.key] = _number(item.function(tensor), item.key, tensor)
        return found

    def squared_gradients(self) -> dict[str, Tensor]:
        """Return the squared gradient norm of each parameter that has a gradient."""
        if not self.gradients:
            return {}
        named = self.network.named_parameters()
        return {f"grad({name})": p.grad.detach().square().sum() for name, p in named if p.grad is not None}


def _number(value: Any, key: str, like: Tensor) -> Tensor:
    found = torch.as_tensor(value, device=like.device)
    if found.numel() != 1:
        raise PlanError(f"the monitor {key!r} is a number, got a tensor of shape {tuple(found.shape)}")
    return found.detach().reshape(())


def _items(network: nn.Module, monitors: Any) -> list[_Item]:
    if monitors is None:
        return []
    if not isinstance(monitors, Mapping):
        raise PlanError(f'monitors= is a dict of globs, as in {{"hid*": (0.1, 0.9)}}; got {brief(monitors)}')
    layers, parameters = [n for n, _ in network.named_children()], [n for n, _ in network.named_parameters()]
    found: dict[str, _Item] = {}
    for glob, levels in monitors.items():
        names = [name for name in (*layers, *parameters) if fnmatchcase(name, str(glob))]
        if not names:
            hint = f"; theanets' {glob!r} is {glob.partition(':')[0]!r} here" if ":" in str(glob) else ""
            there = near(str(glob), [*layers, *parameters])
            raise PlanError(f"monitors= of {glob!r} match no layer or parameter{there}{hint}")
        for name in names:
            for label, function in _functions(levels):
                key = f"{label}({name})" if not label.startswith("<") else f"{name}{label}"
                found[key] = _Item(key, name, name not in layers, function)
    return list(found.values())


def _functions(levels: Any) -> list[tuple[str, Callable[[Tensor], Any]]]:
    """Return (label, function) of each level or function.

    Raises:
        PlanError: there is something else.
    """
    if isinstance(levels, Mapping) and all(callable(function) for function in levels.values()):
        return [(str(label), function) for label, function in levels.items()]
    some = list(levels) if isinstance(levels, (list, tuple)) else [levels]
    if not all(isinstance(level, Real) and not isinstance(level, bool) for level in some):
        raise PlanError(
            f'levels of monitors are numbers, or functions as in {{"mean": torch.mean}}; got {brief(levels)}'
        )
    return [(f"<{level:g}", _below(float(level))) for level in some]


def _below(level: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x < level).float().mean()
