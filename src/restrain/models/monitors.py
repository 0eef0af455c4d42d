"""Monitors: data loss and rule values, averaged over an epoch or over validation data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restrain.engine import Attachment, Evaluation

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
