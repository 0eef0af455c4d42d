"""Report of a compaction: removed units, reasons why others stay, and costs before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from restrain.html_table import html_table
from restrain.text_table import text_table

_COSTS = ("", "before", "after", "×")
_LAYERS = ("weight", "before", "after", "outputs that stay")


@dataclass(frozen=True)
class Layer:
    """A weight: its shape before and after, and {reason: number of units that stay for it}."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    stays: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """Cost of a forward on the example: parameters, floating-point operations, seconds."""

    parameters: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """Report of a compaction; `str` gives tables as text, `to_html` as HTML.

    Args:
        layers: an entry for each weight.
        before: the cost of the given model.
        after: the cost of the smaller model.
        difference: the largest measured difference of outputs, relative to their scale.
        changed: the number of removed units whose constant differs in training, where a batch
            normalisation uses the batch's statistics. If 0, training is exact, too.
        notes: what else to know.
    """

    layers: Sequence[Layer]
    before: Cost
    after: Cost
    difference: float
    changed: int = 0
    notes: Sequence[str] = ()

    @property
    def training_exact(self) -> bool:
        """True if the outputs are the same in training, too."""
        return not self.changed

    def _costs(self) -> list[tuple[str, str, str, str]]:
        one, other = self.before, self.after
        return [
            ("parameters", f"{one.parameters:,}", f"{other.parameters:,}", _ratio(one.parameters, other.parameters)),
            ("FLOPs", f"{one.flops:,}", f"{other.flops:,}", _ratio(one.flops, other.flops)),
            (
                "ms a forward",
                f"{1e3 * one.seconds:.3g}",
                f"{1e3 * other.seconds:.3g}",
                _ratio(one.seconds, other.seconds),
            ),
        ]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                layer.name,
                " × ".join(map(str, layer.before)),
                " × ".join(map(str, layer.after)),
                "; ".join(f"{count}: {why}" for why, count in layer.stays.items()),
            )
            for layer in self.layers
        ]

    def __str__(self) -> str:
        costs = text_table([_COSTS, *self._costs()])
        layers = text_table([_LAYERS, *self._rows()])
        return "\n\n".join([costs, layers, "\n".join(self._told())])

    def _told(self) -> list[str]:
        training = (
            "the same in training"
            if self.training_exact
            else f"in training {self.changed} units gave other constants, by batch normalisation"
        )
        return [f"largest difference of outputs: {self.difference:.1e} of their scale; {training}", *self.notes]

    def to_html(self) -> str:
        """Return the tables as HTML."""
        costs, layers = [_COSTS, *self._costs()], [_LAYERS, *self._rows()]
        return "\n".join([html_table(costs, {1, 2, 3}), html_table(layers, {1, 2}, self._told())])

    def _repr_html_(self) -> str:
        return self.to_html()


@torch.no_grad()
def measured(model: nn.Module, args: tuple[Any, ...], rounds: int = 5) -> Cost:
    """Return the cost of a forward; the time is the least of some rounds after a warm-up."""
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=[]):
        with counter:
            model(*args)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            model(*args)
            seconds.append(time.perf_counter() - began)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops(), min(seconds))


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}" if after else "–"
