"""Penalties of batch statistics: the mean of each unit, the covariances between units."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from restrain.axes import squared
from restrain.callstack import Block
from restrain.errors import PenaltyError
from restrain.fields import check_flags
from restrain.penalties.all_reduce import over_processes, several_processes
from restrain.penalties.base import (
    Penalty,
    Tensors,
    batch_size,
    checked_axis,
    checked_setting,
    in_float32,
)
from restrain.penalties.functorch import as_plain, told
from restrain.torch_private import in_backward

_EDGE = 1e-4  # below it log(x) is replaced by its tangent; a steeper tangent overflows float16
_ROUNDING = 1e-6  # tolerance for activations outside [0, 1]


@dataclass(frozen=True)
class Samples:
    """Activations as a matrix (rows, units), with a mask of the entries that count."""

    x: Tensor  # (rows, units), zero where masked out
    counts: Tensor | None  # True where an entry counts: (rows, 1 or units); None: all count
    everywhere: bool  # sum over all processes

    @classmethod
    def of(cls, h: Tensor, per: int | None, dim: int | None, mask: Tensor | None, everywhere: bool = False) -> Samples:
        """Return the samples of a layer's output; all axes but that of the units index rows."""
        if h.dim() < 2:
            return cls(h.reshape(1, -1), None if mask is None else mask.reshape(1, -1), everywhere)
        units = unit_axis(h, per, dim)
        x = h.movedim(units, -1)
        if mask is None:
            return cls(x.flatten(0, -2), None, everywhere)
        kept = mask.movedim(units, -1).expand(*x.shape[:-1], mask.shape[units])
        x = torch.where(kept, x, 0)
        return cls(x.flatten(0, -2), kept.flatten(0, -2), everywhere)

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum of a tensor over processes if `everywhere`, else the tensor."""
        return over_processes(own) if self.everywhere else own

    def size(self) -> Tensor:
        """Return the number of rows that count, for each unit."""
        if self.counts is None:
            return self.x.real.new_full((self.x.shape[1],), self.x.shape[0])
        return self.counts.sum(0).to(self.x.real.dtype).expand(self.x.shape[1])

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return each unit's mean over the rows that count, and the number of these rows."""
        sums, size = self.sum(torch.stack([self.x.sum(0), self.size().to(self.x.dtype)]))
        return sums / size.real.clamp_min(1), size.real.detach()

    def deviations(self) -> tuple[Tensor, Tensor]:
        """Return the rows minus the units' means, zero where masked out, and the numbers of rows.

        Deviations sum to zero, so to first order sums of their products don't depend on the means.
        Over several processes the means are constants to autograd.
        """
        mean, size = self.mean()
        away = self.x - (mean.detach() if self.everywhere and several_processes() else mean)
        return away if self.counts is None else torch.where(self.counts, away, 0), size

    def covariances(self, unbiased: bool, penalty: object) -> Tensor:
        """Return the covariances of the units: Σ (x - m)(x - m)ᴴ / n, or / (n - 1) if `unbiased`.

        Raises:
            PenaltyError: a mask that differs between the units of a sample.
        """
        self.check_whole_rows(penalty)
        away, size = self.deviations()
        return self.sum(away.mH @ away) / (size - int(unbiased)).clamp_min(1)

    def check_whole_rows(self, penalty: object) -> None:
        """Check that the mask takes or leaves all units of a sample together.

        Raises:
            PenaltyError: it doesn't.
        """
        if self.counts is not None and self.counts.shape[1] != 1 and self.x.shape[1] != 1:
            raise PenaltyError(f"a mask for {penalty!r} takes or leaves all units of a sample together")


def unit_axis(h: Tensor, given: int | None, batch: int | None, name: str = "per", whose: str = "units") -> int:
    """Return the axis of the units (or classes) of a layer's output, counted from zero.

    Raises:
        PenaltyError: the output has no such axis, it is the batch axis, or it must be given for an
            output of more than three axes.
    """
    if batch is not None:
        batch_size(h, batch)
    if given is None and h.dim() > 3:
        raise PenaltyError(
            f"which axis of an output of shape {tuple(h.shape)} are the {whose}? Write {name}=1 for the channels "
            f"of (batch, channel, height, width), {name}=-1 for the last"
        )
    axis = -1 if given is None else given
    if not -h.dim() <= axis < h.dim() or (batch is not None and h.dim() > 1 and (axis - batch) % h.dim() == 0):
        raise PenaltyError(
            f"{name}={axis} should be the axis of the {whose}, beside the batch axis {batch}, of an output of shape "
            f"{tuple(h.shape)}"
        )
    return axis % h.dim()


@dataclass(frozen=True)
class KLSparsity(Penalty):
    """Σ KL(rate ‖ m) = Σ rate log(rate / m) + (1 - rate) log((1 - rate) / (1 - m)) over units.

    m is a unit's mean activation over the batch and all other axes (time, space), and over all
    processes of a distributed training on outputs: a statistic of the batch, not a sum over
    samples. Activations must lie in [0, 1]: use via=lambda h: (h + 1) / 2 for tanh units,
    via=torch.sigmoid for unbounded ones. Below m = rate / 10⁴ the first logarithm is replaced by
    its tangent, and likewise the second near m = 1, so that value and gradient stay finite.

    Args:
        rate: the wanted mean activation, between 0 and 1.
        momentum: the weight of earlier steps in a running mean; 0 uses the batch alone. The
            gradient flows through the batch's part, 1 - momentum. `reg.state_dict()` saves the
            running mean.
        per: the axis of the units; by default the last. Required for more than three axes.
        sync: take the mean over all processes; set False if they train different models.

    Raises:
        PenaltyError: activations outside [0, 1] (not checked in compiled code), or complex ones.

    Source: Lee, Ekanadham and Ng (2008) for the idea; Ng (2011), sparse autoencoder, CS294A notes,
    section 3.

    >>> h = torch.tensor([[0.1, 0.5], [0.3, 0.5]])
    >>> rs.KLSparsity(0.2)(h)
    tensor(0.1927)
    """

    rate: float
    momentum: float = 0.0
    per: int | None = None
    sync: bool = True

    keywords = ("kl_sparsity",)
    takes_mask = True
    at_outputs = True

    def __post_init__(self) -> None:
        checked_setting("rate", self.rate, 0, 1)
        checked_setting("momentum", self.momentum, 0, 1, closed=True)
        checked_axis("per", self.per)
        check_flags(PenaltyError, sync=self.sync)

    @property
    def by_steps(self) -> bool:  # type: ignore[override]
        return self.momentum > 0

    def __call__(self, w: Tensors) -> Tensor:
        """Return the value for a batch along dim 0."""
        return self.over_batch(w, 0 if w.dim() else None)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return in_float32(lambda x: self.of_samples(Samples.of(x, self.per, dim, mask), None), h)

    def of_samples(self, samples: Samples, memory: RunningMean | None) -> Tensor:
        """Return the value; a running mean in `memory` is used and updated."""
        _check_unit_interval(samples.x, self)
        mean, size = samples.mean()
        if memory is not None:
            memory.keep(mean.detach(), size)
            mean = memory.mixed(mean, self.momentum)
        off = mean - self.rate
        value = -self.rate * _log1p(off / self.rate) - (1 - self.rate) * _log1p(-off / (1 - self.rate))
        return torch.where(size > 0, value, 0).sum()

    def bound_at_place(self) -> Penalty:
        return _KLAtPlace(self)


def _check_unit_interval(x: Tensor, penalty: Penalty) -> None:
    if x.is_complex():
        raise PenaltyError(f"{penalty!r} is for real activations in [0, 1], got {x.dtype}")
    if torch.compiler.is_compiling() or not x.numel() or x.device.type == "meta":
        return
    with as_plain(x) as plain:
        low, high = plain.aminmax()
    if bool((low < -_ROUNDING) | (high > 1 + _ROUNDING)):
        raise PenaltyError(
            f"{penalty!r} compares means of activations in [0, 1], got values from {float(low):.4g} to "
            f"{float(high):.4g}. Say rs.outputs(..., via=torch.sigmoid), or via=lambda h: (h + 1) / 2 for tanh units"
        )


def _log1p(u: Tensor) -> Tensor:
    """Return log(1 + u); below 1 + u = `_EDGE`, the tangent at that point."""
    safe = u.clamp_min(_EDGE - 1)
    return safe.log1p() + (u - safe) / _EDGE


_resting = Block()


def resting() -> Block:
    """Return the block within which running means are used but not updated: for evaluation."""
    return _resting


class RunningMean:
    """Exponential moving average over optimizer steps, and the sum of means since the last step.

    Tensors are sized by the first batch. The average changes after the step, not in the forward, so
    that a forward repeated by a checkpoint finds the same state.
    """

    def __init__(self) -> None:
        self.total, self.weight = torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu")
        self.pending, self.count = torch.zeros(0, device="cpu"), torch.zeros(1, device="cpu")

    def keep(self, mean: Tensor, size: Tensor) -> None:
        """Add a batch's mean to the pending sum, unless a unit has no rows or a mean isn't finite.

        Does nothing in evaluation and when a checkpoint recomputes the forward.
        """
        if not torch.compiler.is_compiling() and (_resting.on or in_backward()):
            return  # evaluation, or a checkpoint's recomputation in backward
        good = (mean.isfinite() & (size > 0)).all()
        told(torch.cat([torch.where(good, mean, 0), good.to(mean).reshape(1)]), self._add)

    def _add(self, both: Tensor) -> None:
        """Add a sum of means and their number to the pending ones."""
        mean, count = both[:-1], both[-1:]
        if self.pending.shape != mean.shape or self.pending.device != mean.device:
            self.pending, self.count = torch.zeros_like(mean), torch.zeros_like(count)
        self.pending.add_(mean)
        self.count.add_(count)

    def mean(self) -> Tensor | None:
        """Return the running mean; None before the first step."""
        return self.total / self.weight if self.total.numel() else None

    def mixed(self, mean: Tensor, momentum: float) -> Tensor:
        """Return the running mean updated by a batch's mean, without storing it.

        Raises:
            PenaltyError: the number of units has changed.
        """
        if not self.total.numel():
            return mean
        if self.total.shape != mean.shape:
            raise PenaltyError(
                f"the running mean is of {len(self.total)} units, got {len(mean)}: a rule with momentum= needs a "
                "place whose outputs keep their number of units"
            )
        total, weight = self.total.to(mean), self.weight.to(mean)
        return (momentum * total + (1 - momentum) * mean) / (momentum * weight + (1 - momentum))

    def step(self, momentum: float) -> None:
        """Update the running mean by the mean of the pending batches, after an optimizer step."""
        if not bool(self.count > 0):
            return
        if not self.total.numel():
            self.total, self.weight = torch.zeros_like(self.pending), torch.zeros_like(self.count)
        self.total, self.weight = self.total.to(self.count.device), self.weight.to(self.count.device)
        self.total.mul_(momentum).add_(self.pending.to(self.total) / self.count.to(self.total), alpha=1 - momentum)
        self.weight.mul_(momentum).add_(1 - momentum)
        self.pending.zero_()
        self.count.zero_()


class Statistic(Penalty, register=False):
    """Base of a statistic bound to one layer output: `over_batch` sums over all processes."""

    penalty: Any
    takes_mask = True

    def __repr__(self) -> str:
        return repr(self.penalty)

    def __call__(self, w: Tensors) -> Tensor:
        value: Tensor = self.penalty(w)
        return value


@dataclass(frozen=True, eq=False, repr=False)
class _KLAtPlace(Statistic, register=False):
    """`KLSparsity` of one layer output: over all processes, with its running mean."""

    penalty: KLSparsity
    memory: RunningMean = field(default_factory=RunningMean)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        memory = self.memory if self.penalty.momentum else None

        def value(x: Tensor) -> Tensor:
            samples = Samples.of(x, self.penalty.per, dim, mask, everywhere=self.penalty.sync)
            return self.penalty.of_samples(samples, memory)

        return in_float32(value, h)

    def state(self) -> dict[str, Tensor]:
        if not self.penalty.momentum:
            return {}
        return {"total": self.memory.total, "weight": self.memory.weight}

    def stepped(self, w: Tensor | None) -> None:
        self.memory.step(self.penalty.momentum)


class BatchStatistic(Penalty, register=False):
    """Base of functions of the whole batch's samples; on outputs of those of all processes."""

    per: int | None
    sync: bool

    takes_mask = True
    at_outputs = True

    def __post_init__(self) -> None:
        checked_axis("per", self.per)
        check_flags(PenaltyError, sync=self.sync)

    def __call__(self, w: Tensors) -> Tensor:
        """Return the value for a batch along dim 0."""
        return self.over_batch(w, 0 if w.dim() else None)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return in_float32(lambda x: self.of_samples(Samples.of(x, self.per, dim, mask)), h)

    @abstractmethod
    def of_samples(self, samples: Samples) -> Tensor:
        """Return the value of samples, which may lie on several processes."""

    def bound_at_place(self) -> Penalty:
        return Everywhere(self)


@dataclass(frozen=True, eq=False, repr=False)
class Everywhere(Statistic, register=False):
    """A `BatchStatistic` of one layer output: over all processes if its `sync` says so."""

    penalty: Any

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        own = self.penalty
        return in_float32(lambda x: own.of_samples(Samples.of(x, own.per, dim, mask, everywhere=own.sync)), h)


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return the sum of the squares of the entries off the diagonal."""
    return squared(matrix - matrix.diagonal().diag()).sum()


@dataclass(frozen=True)
class Decorrelation(BatchStatistic):
    """½ (‖C‖_F² - ‖diag C‖²), C the covariance matrix of the units: half the off-diagonal squares.

    C is the mean of (h - m)(h - m)ᵀ over the batch and all axes but that of the units, with means
    m: a statistic of the batch, and on outputs of the batches of all processes of a distributed
    training.

    Args:
        per: the axis of the units; by default the last. Required for more than three axes.
        sync: take covariances over all processes; set False if they train different models.

    Raises:
        PenaltyError: no such axis; a mask that differs between the units of a sample.

    Source: Cogswell and others (2016), DeCov, eq. 2.

    >>> rs.Decorrelation()(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    tensor(4.)
    """

    per: int | None = None
    sync: bool = True

    keywords = ("decov",)

    def of_samples(self, samples: Samples) -> Tensor:
        return off_diagonal(samples.covariances(False, self)) / 2
