"""Numbers of a regularisation path as pictures and pages show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from restrain.errors import PlanError


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
        return replace(self, labels=labels)

    def view(self) -> PathView:
        """Return this object, so that pictures take it as they take a path."""
        return self


@runtime_checkable
class Viewed(Protocol):
    """A path: the result of `rs.path`, or a fitted `RegressorCV` or `ClassifierCV`."""

    def view(self) -> PathView:
        """Return the numbers of the path."""
