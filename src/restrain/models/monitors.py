"""What a training tells: the data loss and each rule's value, averaged over an epoch or over validation data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine import structures
from restrain.engine.attach import Attachment
from restrain.engine.bind import Bound
from restrain.engine.padding import Inputs, positional
from restrain.engine.taps import Tap, Watch
from restrain.engine.terms import network_value, parameter_values
from restrain.penalties import NetworkPenalty, Penalty
from restrain.penalties.derivative import OnDerivatives
from restrain.penalties.statistics import resting

Monitors = dict[str, float]


@dataclass
class Means:
    """Sums over batches, each weighted by its number of rows; read once, at the end."""

    rows: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    waiting: list[tuple[dict[str, Tensor], int]] = field(default_factory=list)

    def add(self, values: dict[str, Tensor], rows: int) -> None:
        """Add the means over a batch of so many rows."""
        self.waiting.append(({key: value.detach() for key, value in values.items()}, rows))
        if len(self.waiting) == 1024:
            self._add_up()

    def take(self, sums: dict[str, Tensor], rows: int) -> None:
        """Add sums over so many rows."""
        self.rows += rows
        for key, value in sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def _add_up(self) -> None:
        """Add up what waits, by one operation a name: a number that is added alone takes as long as a thousand."""
        waiting, self.waiting = self.waiting, []
        for key in {key: None for values, _ in waiting for key in values}:
            found = torch.stack([values[key] for values, _ in waiting if key in values])
            counts = torch.tensor([rows for values, rows in waiting if key in values], dtype=torch.float64)
            self.take({key: found.to("cpu", torch.float64) @ counts}, 0)
        self.rows += sum(rows for _, rows in waiting)

    def read(self, rules: list[str]) -> Monitors:
        """The means, with their "loss": the data loss and all rules."""
        self._add_up()
        found = {key: float(value) / max(self.rows, 1) for key, value in self.sums.items()}
        return {"loss": found["data_loss"] + sum(found.get(rule, 0.0) for rule in rules), **found}


def _is_penalty(bound: Bound) -> bool:
    return isinstance(bound.rule.what, (Penalty, NetworkPenalty, OnDerivatives))


def penalties(reg: Attachment | None) -> list[str]:
    """The names of the rules that have a value."""
    return [] if reg is None else [bound.key for bound in reg._bounds if _is_penalty(bound)]


def training_values(reg: Attachment | None) -> dict[str, Tensor]:
    """The value of each penalty at the forward that was just collected, without waiting for the device."""
    values: dict[str, Tensor] = {}
    if reg is None:
        return values
    with torch.no_grad():
        for bound in reg._bounds:
            if bound.watches:
                parts = [part.reshape(()) for watch in bound.watches for part in watch.last]
                values[bound.key] = torch.stack(parts).sum() if parts else torch.zeros(())
            elif isinstance(bound.rule.what, NetworkPenalty):
                values[bound.key] = network_value(bound, reg.model, {})
            elif _is_penalty(bound):
                values[bound.key] = parameter_values([bound], reg.model)[0]
    return values


class Looking:
    """The values of rules on activations in evaluation, where their own hooks rest."""

    def __init__(self, reg: Attachment | None) -> None:
        self.reg = reg
        self.seen: dict[int, Tensor] = {}  # watch -> what was caught there
        self.inputs: Inputs | None = None  # what the model's forward was called with

    @property
    def needs_graph(self) -> bool:
        """Whether a rule takes derivatives."""
        return self.reg is not None and any(bound.raws or bound.derivative for bound in self.reg._bounds)

    @contextmanager
    def attached(self) -> Iterator[Looking]:
        """Within it, the model's forwards are looked at."""
        with ExitStack() as stack:
            for bound in self.reg._bounds if self.reg is not None else ():
                for watch in bound.watches:
                    stack.callback(self._hook(watch).remove)
            if self.reg is not None:
                stack.callback(self.model.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
            yield self

    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs = (args, kwargs, positional(module))

    def _hook(self, watch: Watch) -> Any:
        assert self.reg is not None
        place, module = watch.spot.place, watch.spot.find(self.reg.model)

        def keep(structure: Any) -> None:
            way = structures.find(structure, place.index)
            if way is not None:
                self.seen[id(watch)] = structures.get(structure, way)

        if place.kind == "inputs":
            return module.register_forward_pre_hook(lambda module, args: keep(dict(enumerate(args))))
        return module.register_forward_hook(lambda module, args, output: keep(output))

    def values(self) -> dict[str, Tensor]:
        """The value of each penalty for the last forward."""
        values: dict[str, Tensor] = {}
        for bound in self.reg._bounds if self.reg is not None else ():
            if bound.taps:
                with torch.no_grad(), resting():
                    values[bound.key] = torch.stack([self._value(tap) for tap in bound.taps]).sum()
            elif bound.derivative is not None and bound.derivative.penalty.of_loss:
                continue  # the data loss here is of other modes and weights
            elif bound.derivative is not None:
                values[bound.key] = bound.derivative.of_tensors(self.seen)
            elif isinstance(bound.rule.what, NetworkPenalty):
                outputs = {raw.spot.key: raw.spot.seen(self.seen[id(raw)]) for raw in bound.raws}
                values[bound.key] = network_value(bound, self.model, outputs)
            elif _is_penalty(bound):
                values[bound.key] = parameter_values([bound], self.model)[0]
        return values

    def _value(self, tap: Tap) -> Tensor:
        inputs = self.inputs if tap.spot.place.padded else None
        return tap.evaluate(self.seen[id(tap)], (), tap.spot.find(self.model), inputs) * tap.weight

    @property
    def model(self) -> nn.Module:
        """The model."""
        assert self.reg is not None
        return self.reg.model
