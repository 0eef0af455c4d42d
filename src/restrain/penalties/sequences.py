"""Penalties on sequences: the change of the state from each step to the next."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.axes import Grouping, group_norms, squared
from restrain.errors import PenaltyError
from restrain.fields import check_flags, renamed
from restrain.penalties.base import Penalty, Tensors, batch_size, checked_axis, in_float32


class _OfTransitions(Penalty, register=False):
    """Base of means over the transitions of each sequence; all fields but `dim` must be flags."""

    dim: int | None
    takes_mask = True
    at_outputs = True

    def __post_init__(self) -> None:
        check_flags(PenaltyError, **{name: value for name, value in vars(self).items() if name != "dim"})
        checked_axis("dim", self.dim)

    @abstractmethod
    def changes(self, states: Tensor) -> Tensor:
        """Return the transitions' terms, (batch, time - 1), of states (batch, time, features)."""

    def __call__(self, w: Tensors) -> Tensor:
        """Return the sum over sequences; a tensor of up to two axes is one sequence."""
        return self.over_batch(w, 0) * w.shape[0] if w.dim() > 2 else self.over_batch(w, None)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        def value(x: Tensor) -> Tensor:
            states, kept = _sequences(x, dim, self.dim, mask)
            return _mean(self.changes(states), kept)

        return in_float32(value, h)


@renamed(time="dim")
@dataclass(frozen=True)
class StateChange(_OfTransitions):
    """Mean over transitions of ‖hₜ₊₁ - hₜ‖²: temporal activation regularisation (TAR).

    The mean over a sequence's transitions, between two unmasked steps, is averaged over the batch.
    A sequence of a single step has the value zero. A plain tensor is (time, features), or (batch,
    time, features), summed over the batch.

    Args:
        per_unit: divide also by the number of features.
        dim: the axis of the steps; by default the first except the batch axis. All others are
            features.

    Raises:
        PenaltyError: an output without this axis; a mask that differs between features of a step.

    Source: Krueger and Memisevic (2016), section 2; Merity, McCann and Socher (2017), TAR, with
    per_unit=True.

    >>> rs.StateChange()(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))
    tensor(12.5000)
    """

    per_unit: bool = False
    dim: int | None = None

    keywords = ("state_change",)

    def changes(self, states: Tensor) -> Tensor:
        return squared(states.diff(dim=1)).sum(2) / (max(states.shape[2], 1) if self.per_unit else 1)


@renamed(time="dim")
@dataclass(frozen=True)
class NormChange(_OfTransitions):
    """Mean over transitions of (‖hₜ₊₁‖ - ‖hₜ‖)²: the norm stabiliser.

    Steps, averages and axes are as in `StateChange`.

    Args:
        squared: use squared lengths, (‖hₜ₊₁‖² - ‖hₜ‖²)², smooth at zero, as in theanets'
            documentation.
        dim: the axis of the steps; by default the first except the batch axis. All others are
            features.

    Raises:
        PenaltyError: an output without this axis; a mask that differs between features of a step.

    Source: Krueger and Memisevic (2016), eq. 1.

    >>> h = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    >>> rs.NormChange()(h), rs.NormChange(squared=True)(h)
    (tensor(12.5000), tensor(312.5000))
    """

    squared: bool = False
    dim: int | None = None

    keywords = ("norm_change",)

    def changes(self, states: Tensor) -> Tensor:
        if self.squared:
            lengths = squared(states).sum(2)
        else:
            lengths = group_norms(states, Grouping(tuple(states.shape), (0, 1))).squeeze(2)
        return lengths.diff(dim=1).square()


def _sequences(h: Tensor, batch: int | None, time: int | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return an output as (batch, time, features), zero where masked; and the mask (batch, time).

    Raises:
        PenaltyError: no such axes; a mask that isn't the same for all features of a step.
    """
    if batch is None:  # a batch of one, in front
        h, mask, batch = h.unsqueeze(0), None if mask is None else mask.unsqueeze(0), 0
        time = time + 1 if time is not None and time >= 0 else time
    batch_size(h, batch)
    if h.dim() == 1:  # a single step
        h, mask = h.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
    rank = h.dim()
    batch = batch % rank
    steps = int(batch == 0) if time is None else time
    if not -rank <= steps < rank or steps % rank == batch:
        raise PenaltyError(
            f"dim={steps} should be the axis of the steps, beside the batch axis {batch}, of an output of shape "
            f"{tuple(h.shape)}"
        )

    def arranged(t: Tensor) -> Tensor:
        return t.unsqueeze(rank).movedim((batch, steps % rank), (0, 1)).flatten(2)

    h = arranged(h)
    if mask is None:
        return h, None
    mask = arranged(mask)
    if mask.shape[2] != 1:
        raise PenaltyError("a mask for changes over time takes or leaves all features of a step together")
    return torch.where(mask, h, 0), mask.squeeze(2).expand(h.shape[:2])


def _mean(changes: Tensor, kept: Tensor | None) -> Tensor:
    """Return the batch average of each sequence's mean over transitions of unmasked steps."""
    size = max(changes.shape[0], 1)
    if kept is None:
        return changes.sum() / (max(changes.shape[1], 1) * size)
    pairs = kept[:, 1:] & kept[:, :-1]
    sums = torch.where(pairs, changes, 0).sum(1)
    return (sums / pairs.sum(1).clamp_min(1)).sum() / size
