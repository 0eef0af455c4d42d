"""Numbers of a regularisation path as pictures and pages show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from restrain.errors import PlanError


@dataclass(frozen=True, eq=False)
class Column:
    """A column of a network's drawing: the inputs, or the units of a layer, along a path.

    Args:
        name: what stands above it: "inputs", or the name of the layer's weight.
        left: (points, units): True where a unit remains.
        labels: the names of the units.
        reads: (points, units, units of the column before): True where a weight between two units
            isn't zero; None for the inputs, and where there are too many.
    """

    name: str
    left: Tensor
    labels: Sequence[str]
    reads: Tensor | None = None


_MOST_READS = 1024  # weights of a layer that are drawn one by one


def columns(weights: Mapping[str, Tensor]) -> list[Column]:
    """Return the columns of a chain of layers: its inputs, then the outputs of each.

    An input remains if a weight on it isn't zero. A unit remains if one of its incoming weights and
    one of its outgoing weights aren't zero; of the last layer, the incoming ones count.

    Args:
        weights: {name: (points, outputs, inputs, ...)} of the layers, in their order; further axes
            are those of kernels. A layer may have a whole number of inputs for each unit of the
            layer before, as behind a flattened convolution.

    Returns:
        The columns; [] if the sizes aren't those of a chain.
    """
    masks = {name: _read(w) for name, w in weights.items()}
    found: list[Column] = []
    for name, mask in masks.items():
        if not found:
            found.append(Column("inputs", mask.any(1), _numbers(mask.shape[2])))
        before = found[-1]
        positions, rest = divmod(mask.shape[2], before.left.shape[1])
        if rest or not positions:
            return []
        mask = mask.unflatten(2, (before.left.shape[1], positions)).any(3)
        if before.name != "inputs":
            found[-1] = replace(before, left=before.left & mask.any(1))
        reads = mask if mask[0].numel() <= _MOST_READS else None
        found.append(Column(name, mask.any(2), _numbers(mask.shape[1]), reads))
    return found


def stacked(points: Sequence[Sequence[Column]]) -> list[Column]:
    """Return the columns of a path from those of its points."""
    return [
        Column(
            first.name,
            torch.cat([one.left for one in own]),
            first.labels,
            torch.cat([one.reads for one in own if one.reads is not None]) if first.reads is not None else None,
        )
        for own in zip(*points, strict=True)
        for first in own[:1]
    ]


def _read(w: Tensor) -> Tensor:
    """Return (points, outputs, inputs): True where a weight isn't zero."""
    return (w != 0).flatten(3).any(3) if w.dim() > 3 else w != 0


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@dataclass(frozen=True, eq=False)
class PathView:
    """Numbers of a path, a point after the other in the order of the walk.

    Args:
        strengths: the strength of each point.
        scores: the mean score of each point, higher is better.
        errors: the standard error of each mean score; 0 where none is known.
        selected: the number of groups (or inputs) that aren't zero at each point.
        lines: {tensor: (points, groups)}: signed weights if a group is one entry, else lengths.
        labels: {tensor: names of its groups}.
        best: the number of the point of the highest score.
        sparse: the number of the sparsest point within one standard error of it; None if no error
            is known.
        ways: "up" or "down" for each point, or "removal", where the strength is the part of the
            groups that is gone.
        columns: the network's inputs and units, where its layers are a chain.
    """

    strengths: Sequence[float]
    scores: Sequence[float]
    errors: Sequence[float]
    selected: Sequence[int]
    lines: Mapping[str, Tensor]
    labels: Mapping[str, Sequence[str]]
    best: int
    sparse: int | None
    ways: Sequence[str]
    columns: Sequence[Column] = ()

    @property
    def axis(self) -> str:
        """What the strength of a point is."""
        return "part of the groups that is gone" if "removal" in self.ways else "strength"

    @property
    def logarithmic(self) -> bool:
        """True if strengths are shown on a logarithmic axis."""
        return "removal" not in self.ways and min(self.strengths) > 0

    @property
    def signed(self) -> bool:
        """True if the lines are signed weights, not lengths."""
        return any(bool((lines < 0).any()) for lines in self.lines.values())

    def named(self, names: Sequence[str]) -> PathView:
        """Return these numbers with names for the groups of every tensor that has as many.

        Raises:
            PlanError: no tensor has as many groups.
        """
        if not any(len(own) == len(names) for own in self.labels.values()):
            sizes = ", ".join(f"{len(own)} in {name!r}" for name, own in self.labels.items())
            raise PlanError(f"there are {len(names)} names for groups, and the path has {sizes}")
        labels = {name: list(names) if len(own) == len(names) else own for name, own in self.labels.items()}
        inputs = [
            replace(one, labels=list(names)) if one.name == "inputs" and len(one.labels) == len(names) else one
            for one in self.columns
        ]
        return replace(self, labels=labels, columns=inputs)

    def view(self) -> PathView:
        """Return this object, so that pictures take it as they take a path."""
        return self


@runtime_checkable
class Viewed(Protocol):
    """A path: the result of `rs.path`, or a fitted `RegressorCV` or `ClassifierCV`."""

    def view(self) -> PathView:
        """Return the numbers of the path."""
