"""Units: indices along axes of tensors that can only be removed together.

A label is a number for an index along an axis of a parameter or buffer. `Labels` joins labels that
belong together: the rows of two layers whose outputs are added, a filter and the scale of its batch
normalisation, all features of an attention head. A set of joined labels is a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIXED = 0
"""The label of indices that can't be removed: inputs, steps of time, outputs of the model."""


class Labels:
    """A union-find structure of labels, with the reasons why units must stay."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int) -> Tensor:
        """Return new labels, each a unit of its own."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count, device="cpu")

    def unit(self, label: int) -> int:
        """Return the unit of a label: the smallest label that is joined with it."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def units(self, labels: Tensor) -> list[int]:
        """Return the unit of each label, flattened."""
        return [self.unit(label) for label in labels.flatten().tolist()]

    def join(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Join the labels of two tensors, entry by entry; the tensors broadcast.

        Args:
            first: labels.
            second: the labels to join with `first`.
            reason: why a unit that is joined with `FIXED` must stay.
        """
        pairs = torch.stack([t.flatten() for t in torch.broadcast_tensors(first, second)], 1)
        for one, other in {tuple(sorted(pair)) for pair in pairs.tolist()}:
            if one == FIXED:
                self._fix(other, reason)
            else:
                self._join(one, other)

    def _join(self, first: int, second: int) -> None:
        one, other = sorted((self.unit(first), self.unit(second)))
        if one != other:
            self._parent[other] = one
            if other in self._reasons:
                self._reasons.setdefault(one, self._reasons.pop(other))

    def join_rows(self, labels: Tensor) -> None:
        """Join all labels of a row to one unit, for each row of a matrix."""
        if labels.numel():
            self.join(labels, labels[:, :1], "")

    def fix(self, labels: Tensor | None, reason: str) -> None:
        """Mark the units of labels as units that must stay, with the reason."""
        for label in set() if labels is None else set(labels.flatten().tolist()):
            self._fix(label, reason)

    def _fix(self, label: int, reason: str) -> None:
        if label != FIXED:
            self._reasons.setdefault(self.unit(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why a label's unit must stay, whatever its weights; None if it may be removed."""
        return "it is an input or output" if label == FIXED else self._reasons.get(self.unit(label))
