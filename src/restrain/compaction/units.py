"""Units: indices along axes of tensors that can only be removed together.

A label is a number for an index along an axis of a parameter or buffer. `Labels` joins labels that
belong together: the rows of two layers whose outputs are added, a filter and the scale of its batch
normalisation, all features of an attention head. A set of joined labels is a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIXED = 0
"""The label of indices that belong to nothing removable: inputs, times, outputs of the model."""


class Labels:
    """A union-find structure of labels, with the reasons for which units must stay."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int) -> Tensor:
        """Return new labels, each a unit of its own."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count, device="cpu")

    def unit(self, label: int) -> int:
        """Return the unit of a label: the smallest of the labels joined with it."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def units(self, labels: Tensor) -> list[int]:
        """Return the unit of each label, flattened."""
        return [self.unit(label) for label in labels.flatten().tolist()]

    def join(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Make one unit of two labels, entry by entry; the tensors broadcast.

        Args:
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
        """Make one unit of all labels in a row, for each row of a matrix."""
        if labels.numel():
            self.join(labels, labels[:, :1], "")

    def fix(self, labels: Tensor | None, reason: str) -> None:
        """Make the units of these labels stay, for this reason."""
        for label in set() if labels is None else set(labels.flatten().tolist()):
            self._fix(label, reason)

    def _fix(self, label: int, reason: str) -> None:
        if label != FIXED:
            self._reasons.setdefault(self.unit(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why the unit of a label must stay whatever its weights are; None if it may go."""
        return "it is an input or output" if label == FIXED else self._reasons.get(self.unit(label))
