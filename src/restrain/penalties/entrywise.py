"""Penalties that are sums over entries of a function of each entry alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.axes import squared
from restrain.penalties.base import Penalty, Tensors
from restrain.penalties.checks import checked_strength
from restrain.penalties.shrink import at_least_float32, shrink_entries


@dataclass(frozen=True)
class L1(Penalty):
    """Σ|x|: the sum of absolute values, which with how="proximal" makes entries exactly zero.

    Its prox is the soft threshold. The gradient at zero is zero. Complex entries count by their modulus.

    Source: Tibshirani (1996), the lasso; Donoho and Johnstone (1994) for the soft threshold.

    >>> rs.L1()(torch.tensor([3.0, -4.0])), rs.L1().prox(torch.tensor([3.0, -4.0, 0.5]))
    (tensor(7.), tensor([ 2., -3.,  0.]))
    """

    entrywise = True
    elastic = (1.0, 0.0)
    shrinks = True

    def __call__(self, w: Tensors) -> Tensor:
        return torch.abs(w).sum()

    def gradient(self, w: Tensor) -> Tensor:
        return w.detach().sgn()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return shrink_entries(w, step, *self.elastic)


@dataclass(frozen=True)
class L2(Penalty):
    """Σ|x|²: the sum of squares, not halved and without a root (for the root see `Norm(2)`).

    `(w / 2) * L2()` has the gradient of a coupled optimizer's `weight_decay=w`. Its prox is w / (1 + 2 step).

    Source: Hoerl and Kennard (1970), ridge regression.

    >>> rs.L2()(torch.tensor([3.0, -4.0])), rs.L2().prox(torch.tensor([3.0, -4.0]))
    (tensor(25.), tensor([ 1.0000, -1.3333]))
    """

    entrywise = True
    elastic = (0.0, 1.0)
    shrinks = True

    def __call__(self, w: Tensors) -> Tensor:
        return squared(w).sum()

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * w.detach()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return shrink_entries(w, step, *self.elastic)


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """l1 Σ|x| + l2 Σ|x|²: the same as `l1 * L1() + l2 * L2()`.

    scikit-learn's ElasticNet(alpha, l1_ratio) adds alpha l1_ratio Σ|x| + alpha (1 - l1_ratio) / 2 Σ|x|² to
    half the mean squared error.

    Raises:
        PenaltyError: a strength that isn't a finite number, zero or more.

    Source: Zou and Hastie (2005), the naive elastic net (eq. 3).

    >>> rs.ElasticNet(l1=0.1, l2=0.01)(torch.tensor([3.0, -4.0]))
    tensor(0.9500)
    """

    l1: float
    l2: float

    keywords = ("elastic_net",)
    entrywise = True
    shrinks = True

    def __post_init__(self) -> None:
        checked_strength(self.l1)
        checked_strength(self.l2)

    @property
    def elastic(self) -> tuple[float, float]:  # type: ignore[override]
        """The two strengths."""
        return (self.l1, self.l2)

    def __call__(self, w: Tensors) -> Tensor:
        return self.l1 * torch.abs(w).sum() + self.l2 * squared(w).sum()

    def gradient(self, w: Tensor) -> Tensor:
        x = at_least_float32(w.detach())
        return (self.l1 * x.sgn() + 2 * self.l2 * x).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return shrink_entries(w, step, *self.elastic)
