"""Penalties of the distribution of embeddings: variance, covariance, distance to a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi

import torch
from torch import Tensor

from restrain.axes import squared
from restrain.errors import PenaltyError
from restrain.fields import is_whole, shown_number
from restrain.penalties.all_reduce import check_several
from restrain.penalties.base import Penalty, checked_setting, in_float32
from restrain.penalties.statistics import BatchStatistic, Samples, Statistic, off_diagonal


@dataclass(frozen=True)
class Variance(BatchStatistic):
    """1/d Σ_j max(0, target - √(v_j + eps)), v_j the variance of feature j over n samples.

    The variance is unbiased, Σ (x - mean)² / (n - 1), over the batch and all axes but that of the
    features: a statistic of the batch, on outputs of the batches of all processes. It keeps
    embeddings from collapsing to a point.

    Args:
        target: the standard deviation below which a feature is pushed up.
        eps: keeps the gradient of the root finite.
        per: the axis of the features; by default the last. Required for more than three axes.
        sync: take variances over all processes; set False if they train different models.

    Raises:
        PenaltyError: a single sample; a mask that differs between the features of a sample.

    Source: Bardes, Ponce and LeCun (2022), VICReg, eq. 1 and 2.

    >>> rs.Variance()(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    tensor(0.4950)
    """

    target: float = 1.0
    eps: float = 1e-4
    per: int | None = None
    sync: bool = True

    def __post_init__(self) -> None:
        BatchStatistic.__post_init__(self)
        checked_setting("target", self.target, 0)
        checked_setting("eps", self.eps, 0)

    def of_samples(self, samples: Samples) -> Tensor:
        samples.check_whole_rows(self)
        check_several(samples.x.shape[0], samples.everywhere, self)
        away, size = samples.deviations()
        deviation = (samples.sum(squared(away).sum(0)) / (size - 1).clamp_min(1) + self.eps).sqrt()
        short = torch.where(size > 1, (self.target - deviation).clamp_min(0), 0)
        return short.sum() / max(len(short), 1)


@dataclass(frozen=True)
class Covariance(BatchStatistic):
    """1/d Σ_{i≠j} C_ij², C = Σ (x - mean)(x - mean)ᵀ / (n - 1) the covariances of d features.

    Samples are all axes but that of the features, on outputs of all processes. It keeps features
    from repeating each other; `Decorrelation` is the same with other constants: n in place of
    n - 1, and ½ in place of 1/d.

    Args:
        per: the axis of the features; by default the last. Required for more than three axes.
        sync: take covariances over all processes; set False if they train different models.

    Raises:
        PenaltyError: a single sample; a mask that differs between the features of a sample.

    Source: Bardes, Ponce and LeCun (2022), VICReg, eq. 3 and 4.

    >>> rs.Covariance()(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    tensor(16.)
    """

    per: int | None = None
    sync: bool = True

    def of_samples(self, samples: Samples) -> Tensor:
        check_several(samples.x.shape[0], samples.everywhere, self)
        return off_diagonal(samples.covariances(True, self)) / max(samples.x.shape[1], 1)


_REACH, _HALF = 5.0, 8  # algorithm 1: 17 points from -5 to 5; the integrand is even, and zero at 0


@dataclass(frozen=True)
class SIGReg(BatchStatistic):
    """Mean over directions a of N ∫ |φ_a(t) - exp(-t²/2)|² exp(-t²/2) dt: distance to a Gaussian.

    φ_a(t) = 1/N Σ exp(i t aᵀx) is the empirical characteristic function of N samples along a unit
    vector a: the statistic of Epps and Pulley, small if the embeddings are distributed as N(0, I).
    The integral is the trapezoidal rule of the paper's algorithm 1, at 17 points from -5 to 5.
    Samples are all axes but that of the features, on outputs of all processes; the value grows
    with their number N, as a test's does.

    Directions are drawn from `seed` and the number of optimizer steps, by a hash instead of a
    generator: new ones after each step, the same on every process, in each micro-batch and in a
    checkpoint's recomputation. Called on a plain tensor, those of step 0.

    Args:
        directions: how many.
        seed: a whole number, zero or more.
        per: the axis of the features; by default the last. Required for more than three axes.
        sync: take φ over all processes; set False if they train different models, or if they all
            have the same samples (tensor parallelism).

    Raises:
        PenaltyError: complex embeddings; a mask that differs between the features of a sample.

    Source: Balestriero and LeCun (2025), LeJEPA, arXiv 2511.08544, algorithm 1; Epps and Pulley
    (1983). Salmon and others (2011) for random numbers by counters.

    >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> bool(rs.SIGReg()(x) < 2 < rs.SIGReg()(2 * x))
    True
    """

    directions: int = 256
    seed: int = 0
    per: int | None = None
    sync: bool = True

    by_steps = True

    def __post_init__(self) -> None:
        BatchStatistic.__post_init__(self)
        if not is_whole(self.directions, 1):
            raise PenaltyError(f"directions= is a whole number, at least 1; got {shown_number(self.directions)}")
        if not is_whole(self.seed, 0) or self.seed >= 2**31:
            raise PenaltyError(f"seed= is a whole number from 0 to 2³¹ - 1; got {shown_number(self.seed)}")

    def of_samples(self, samples: Samples) -> Tensor:
        return self.along(samples, torch.zeros((), dtype=torch.int64, device=samples.x.device))

    def along(self, samples: Samples, step: Tensor) -> Tensor:
        """Return the value along the directions of a step, a 0-d tensor of integers."""
        x = samples.x
        if x.is_complex():
            raise PenaltyError(f"{self!r} compares with a real Gaussian, got {x.dtype}")
        samples.check_whole_rows(self)
        if not x.numel():
            return x.sum()
        spacing = _REACH / _HALF
        t = torch.arange(1, _HALF + 1, device=x.device, dtype=x.dtype) * spacing
        gaussian = (-t.square() / 2).exp()
        weights = torch.where(t == _REACH, spacing, 2 * spacing) * gaussian  # both sides; half at the end
        angles = (x @ directions(x.shape[1], self.directions, self.seed, step, x.dtype)).unsqueeze(2) * t
        counts = samples.size()[0]
        if samples.counts is None:
            real, imaginary = angles.cos().sum(0), angles.sin().sum(0)
        else:
            kept = samples.counts[:, :1].unsqueeze(2)
            real, imaginary = torch.where(kept, angles.cos(), 0).sum(0), angles.sin().sum(0)
        *sums, size = samples.sum(torch.cat([real.flatten(), imaginary.flatten(), counts.reshape(1)])).split(
            [real.numel(), real.numel(), 1]
        )
        n = size.detach().clamp_min(1)
        real, imaginary = (part.reshape(real.shape) / n for part in sums)
        away = (real - gaussian).square() + imaginary.square()
        return torch.where(size > 0, (away * weights).sum(1).mean() * n, 0).sum()

    def bound_at_place(self) -> Penalty:
        return _SIGRegAtPlace(self)


@dataclass(frozen=True, eq=False, repr=False)
class _SIGRegAtPlace(Statistic, register=False):
    """`SIGReg` of one layer output: over all processes, with new directions after each step."""

    penalty: SIGReg
    step: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64, device="cpu"))

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        own = self.penalty

        def value(x: Tensor) -> Tensor:
            samples = Samples.of(x, own.per, dim, mask, everywhere=own.sync)
            return own.along(samples, self.step.to(x.device).sum())

        return in_float32(value, h)

    def state(self) -> dict[str, Tensor]:
        return {"step": self.step}

    def stepped(self, w: Tensor | None) -> None:
        self.step.add_(1)


def directions(features: int, count: int, seed: int, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return random unit vectors as columns, (features, count): a function of seed and step alone.

    Standard normal entries by Box and Muller from a hash of (seed, step, entry), then normalised.
    """
    wide = torch.float32 if step.device.type == "mps" else torch.float64
    key = _mixed(_mixed(torch.full_like(step, seed)) + step)
    entries = _mixed(key + torch.arange(features * count, device=step.device))
    low, high = ((_mixed(entries + other).to(wide) + 0.5) / 2**32 for other in (0, 0x3C6EF372))
    normal = (-2 * low.log()).sqrt() * (2 * pi * high).cos()
    columns = normal.reshape(features, count)
    return (columns / columns.square().sum(0).sqrt()).to(dtype)


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of 32 bits of integers, by two rounds of shifts and multiplications."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF  # factors below 2³¹: products fit into 63 bits
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
