"""Noise on activations (Gaussian noise also on weights), in training only, drawn from torch's global generator."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from restrain.axes import squared
from restrain.errors import SelectionError, TransformError
from restrain.penalties.base import in_float32
from restrain.rules import How
from restrain.transforms.base import Noise, checked_number


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """x + std · n, with n standard normal and independent for every entry.

    For complex x, E|n|² = 1: real and imaginary part have the variance 1/2 each.

    On parameters each forward draws anew, and the stored weight never changes.

    Args:
        std: the standard deviation, in the units of x.
        relative: on parameters, multiply it by the root mean square of the parameter's own entries, a constant as far
            as gradients go.

    Raises:
        TransformError: a `std` that isn't a finite number, zero or more; or integer x.

    Source: Bishop (1995), training with noise is Tikhonov regularisation.

    >>> rs.GaussianNoise(0.1)(torch.zeros(1000)).std()
    tensor(0.1)
    """

    std: float
    relative: bool = False

    keywords = ("noise", "gaussian_noise")
    on_weights = True

    def __post_init__(self) -> None:
        checked_number("std", self.std, "a standard deviation: a finite number, zero or more", 0, inf, closed=True)

    def __call__(self, x: Tensor) -> Tensor:
        _check_type(self, x)
        return x + self.std * torch.randn_like(x)

    def of_weight(self, w: Tensor) -> Tensor:
        _check_type(self, w)
        scale = in_float32(lambda x: squared(x).mean().sqrt(), w.detach()).to(w.real) if self.relative else 1.0
        return w + self.std * scale * torch.randn_like(w)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places and self.relative:
            raise SelectionError(f"{self!r}: relative=True is for parameters, by .on(rs.weights)")
        return super().moments(at_places)


@dataclass(frozen=True)
class Dropout(Noise):
    """Each entry becomes zero with probability `rate`, the others are divided by 1 - rate: the mean stays.

    Args:
        rate: the probability, from 0 to below 1.

    Raises:
        TransformError: a `rate` outside of that; integer or complex x.

    Source: Srivastava and others (2014), with the scaling done in training ("inverted" dropout).

    >>> rs.Dropout(0.5)(torch.ones(1000)).unique()
    tensor([0., 2.])
    """

    rate: float

    def __post_init__(self) -> None:
        checked_number("rate", self.rate, "the probability of a zero, from 0 to below 1", 0, 1, closed=True)

    def __call__(self, x: Tensor) -> Tensor:
        _check_type(self, x)
        if x.is_complex():
            raise TransformError(f"torch has no dropout of complex tensors ({x.dtype})")
        return F.dropout(x, self.rate, training=True)


def _check_type(noise: Noise, x: Tensor) -> None:
    if not (x.is_floating_point() or x.is_complex()):
        raise TransformError(
            f"{noise!r} can't act on {x.dtype}: token ids and other whole numbers take no noise. Select the "
            "output of "
            "the embedding, as in rs.outputs('embedding')"
        )
