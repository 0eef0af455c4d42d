"""Additive noise on activations, weights and gradients, drawn from torch's global generator."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from restrain.axes import squared
from restrain.errors import SelectionError, TransformError
from restrain.fields import check_flags
from restrain.penalties.base import in_float32
from restrain.penalties.shrink import at_least_float32
from restrain.rules import How
from restrain.transforms.base import Noise, checked_number, checked_type
from restrain.transforms.layout import PLAIN, Layout


def _deviation(x: Tensor, layout: Layout) -> Tensor:
    """Return each feature's standard deviation over the batch, without a gradient.

    Divides by the number of samples; zero for a single sample.
    """
    if layout.batch_dim is None or x.dim() == 0:
        return x.new_zeros(()).real
    wide = at_least_float32(x.detach())
    apart = wide - wide.mean(layout.batch_dim, keepdim=True)
    return apart.abs().square().mean(layout.batch_dim, keepdim=True).sqrt().to(x.real.dtype)


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """x + std · n, with n standard normal and independent for every entry.

    For complex x, E|n|² = 1: real and imaginary part have the variance 1/2 each. On parameters,
    each forward draws anew, and the stored weight never changes.

    Args:
        std: the standard deviation, in the units of x.
        relative: multiply by each feature's standard deviation over the batch of the call, without
            a gradient through it; for a single sample it is zero, for a packed sequence it is over
            all rows. On parameters, multiply by the root mean square of the entries.

    Raises:
        TransformError: a `std` that isn't a finite number, zero or more; integer x.

    Source: Bishop (1995): training with noise is Tikhonov regularisation.

    >>> rs.GaussianNoise(0.1)(torch.zeros(1000)).std()
    tensor(0.1)
    """

    std: float
    relative: bool = False

    keywords = ("noise", "gaussian_noise")
    on_weights = True

    def __post_init__(self) -> None:
        checked_number("std", self.std, "a standard deviation: a finite number, zero or more", 0, inf, closed=True)
        check_flags(TransformError, relative=self.relative)

    def __call__(self, x: Tensor) -> Tensor:
        return self.at(x, PLAIN)

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        checked_type(self, x)
        noise = self.std * torch.randn_like(x)
        return x + (noise * _deviation(x, layout) if self.relative else noise)

    def of_weight(self, w: Tensor) -> Tensor:
        checked_type(self, w)
        scale = in_float32(lambda x: squared(x).mean().sqrt(), w.detach()).to(w.real) if self.relative else 1.0
        return w + self.std * scale * torch.randn_like(w)


@dataclass(frozen=True)
class UniformNoise(Noise):
    """x + u, with u uniform in [-width, width], independent for every entry: variance width² / 3.

    For complex x, real and imaginary part lie within ± width / √2: E|u|² is the same.

    Args:
        width: half the length of the interval, in the units of x.
        relative: multiply by each feature's standard deviation over the batch; see `GaussianNoise`.

    Raises:
        TransformError: a `width` that isn't a finite number, zero or more; integer x.

    >>> rs.UniformNoise(0.1)(torch.zeros(1000)).abs().max()
    tensor(0.1)
    """

    width: float
    relative: bool = False

    keywords = ("uniform_noise",)

    def __post_init__(self) -> None:
        checked_number("width", self.width, "half of an interval: a finite number, zero or more", 0, inf, closed=True)
        check_flags(TransformError, relative=self.relative)

    def __call__(self, x: Tensor) -> Tensor:
        return self.at(x, PLAIN)

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        checked_type(self, x)
        drawn = torch.rand_like(x)
        noise = drawn * 2**0.5 - (1 + 1j) * 0.5**0.5 if x.is_complex() else 2 * drawn - 1
        noise = self.width * noise
        return x + (noise * _deviation(x, layout) if self.relative else noise)


@dataclass(frozen=True)
class GradientNoise(Noise):
    """g + std (1 + t)^(-decay / 2) · n for the gradient g of a parameter at step t, n normal.

    n is standard normal, and the variance falls as std² / (1 + t)^decay. The noise is added to
    `.grad` just before each step (`how="gradient"`): after your own clipping, once per real step,
    and equal on all ranks of a distributed training. t counts the real steps since the rule's
    `start`, and continues after `reg.load_state_dict`.

    Args:
        std: the standard deviation at the first step, in the units of the gradient.
        decay: the exponent of the decay; 0 for constant variance.

    Raises:
        TransformError: a setting that isn't a finite number, zero or more.

    Source: Neelakantan and others (2015), equation 1, with std² = η there and decay = γ.

    >>> rs.GradientNoise(0.1, decay=2).draw(torch.zeros(1000), step=9).std()
    tensor(0.01)
    """

    std: float
    decay: float = 0.55

    keywords = ("gradient_noise",)
    on_places = False

    def __post_init__(self) -> None:
        checked_number("std", self.std, "a standard deviation: a finite number, zero or more", 0, inf, closed=True)
        checked_number("decay", self.decay, "an exponent: a finite number, zero or more", 0, inf, closed=True)

    def __call__(self, x: Tensor) -> Tensor:
        checked_type(self, x)
        return x + self.draw(x, 0)

    def draw(self, grad: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the noise for the gradient at a step."""
        noise = torch.randn_like(grad) if generator is None else torch.empty_like(grad).normal_(generator=generator)
        std: float = self.std * (1 + step) ** (-self.decay / 2)
        return noise * std

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} acts on the gradients of parameters, not on outputs or inputs: select parameters by a glob, "
                "a role such as rs.weights, a module or a type; for outputs there is GaussianNoise"
            )
        return ("gradient",)
