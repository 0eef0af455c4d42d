"""Penalties that are sums over entries of a function of each entry alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from restrain import operations
from restrain.axes import squared
from restrain.errors import NoProxError, PenaltyError
from restrain.operations import Absolute, ByEntry, Function, Logarithm, Square, Terms, weighted
from restrain.penalties.base import Penalty, Tensors, checked_setting, checked_strength
from restrain.penalties.shrink import as_step, as_tensor, at_least_float32, resized, shrink_entries, unsigned_zeros

_NEWTON_STEPS = 10  # for |x|^p: from the right, on a convex function whose slope at the root is 1 - p/2 or more


class Entrywise(Penalty, register=False):
    """Base of penalties Σᵢ f(xᵢ): a member declares f by `operations`, or writes f and f′, and the prox of f.

    All three take a real or complex tensor of float32 or wider and return one of its shape.
    """

    entrywise = True
    shrinks = True

    @property
    def operations(self) -> Terms:  # type: ignore[override]
        """f and f′, as a member writes them."""
        return ((1.0, Function(self)),)

    def entries(self, x: Tensor) -> Tensor:
        """f of each entry, real."""
        return weighted([(factor, one.value(x)) for factor, one in self._declared()])

    def slopes(self, x: Tensor) -> Tensor:
        """The gradient of f at each entry, zero where f has a kink."""
        return weighted([(factor, one.slope(x)) for factor, one in self._declared()])

    def _declared(self) -> list[tuple[float, ByEntry]]:
        found = [(factor, one) for factor, one in self.operations if isinstance(one, ByEntry)]
        if any(isinstance(one, Function) for _, one in found):
            raise NotImplementedError(f"{type(self).__name__} declares no `operations`: write entries(x) and slopes(x)")
        return found

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return argmin_z ½|z - x|² + t f(z) for each entry; t may differ by entry.

        Raises:
            NoProxError: a member that declares no sum of |x| and |x|², and doesn't override this.
        """
        if (elastic := self.elastic) is None:
            raise NoProxError(f"{self!r} has no known prox: define nearest(self, x, t) in its class")
        return shrink_entries(x, t, *elastic)

    def __call__(self, w: Tensors) -> Tensor:
        return self.entries(w).sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        x = at_least_float32(w)
        return self.nearest(x, as_step(step, x)).to(w.dtype)


@dataclass(frozen=True)
class L1(Entrywise):
    """Σ|x|: the sum of absolute values, which with how="proximal" makes entries exactly zero.

    Its prox is the soft threshold. The gradient at zero is zero. Complex entries count by their modulus.

    Source: Tibshirani (1996), the lasso; Donoho and Johnstone (1994) for the soft threshold.

    >>> rs.L1()(torch.tensor([3.0, -4.0])), rs.L1().prox(torch.tensor([3.0, -4.0, 0.5]))
    (tensor(7.), tensor([ 2., -3.,  0.]))
    """

    operations = ((1.0, Absolute()),)


@dataclass(frozen=True)
class L2(Entrywise):
    """Σ|x|²: the sum of squares, not halved and without a root (for the root see `Norm(2)`).

    `(w / 2) * L2()` has the gradient of a coupled optimizer's `weight_decay=w`. Its prox is w / (1 + 2 step).

    Source: Hoerl and Kennard (1970), ridge regression.

    >>> rs.L2()(torch.tensor([3.0, -4.0])), rs.L2().prox(torch.tensor([3.0, -4.0]))
    (tensor(25.), tensor([ 1.0000, -1.3333]))
    """

    operations = ((1.0, Square()),)


@dataclass(frozen=True)
class ElasticNet(Entrywise):
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

    def __post_init__(self) -> None:
        checked_strength(self.l1)
        checked_strength(self.l2)

    @property
    def operations(self) -> Terms:  # type: ignore[override]
        """Both, each with its strength."""
        return ((self.l1, Absolute()), (self.l2, Square()))


@dataclass(frozen=True)
class Huber(Entrywise):
    """Σ ½|x|² where |x| ≤ delta, delta (|x| - delta/2) beyond: a square near zero, an absolute value far out.

    Large entries are pulled by no more than delta; none becomes exactly zero.

    Raises:
        PenaltyError: a `delta` that isn't a finite number above zero.

    Source: Huber (1964), section 4.

    >>> rs.Huber(1.0)(torch.tensor([0.5, -3.0])), rs.Huber(1.0).prox(torch.tensor([0.5, -3.0]))
    (tensor(2.6250), tensor([ 0.2500, -2.0000]))
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        checked_setting("delta", self.delta, 0)

    @property
    def operations(self) -> Terms:  # type: ignore[override]
        """The formula."""
        return ((1.0, operations.Huber(self.delta)),)

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        size = x.abs()
        return resized(x, torch.where(size <= self.delta * (1 + t), size / (1 + t), size - self.delta * t))


@dataclass(frozen=True)
class LogSum(Entrywise):
    """Σ log(1 + |x| / epsilon): its slope at zero is 1 / epsilon and falls off as 1 / |x|.

    Not convex: large entries are hardly pulled, small ones hard. The prox is the global minimiser, which jumps
    where step > epsilon².

    Raises:
        PenaltyError: an `epsilon` that isn't a finite number above zero.

    Source: Candès, Wakin and Boyd (2008), eq. 8; Prater-Bennette, Shen and Tripp (2022) for the prox.

    >>> rs.LogSum(1.0)(torch.tensor([0.0, 1.0])), rs.LogSum(1.0).prox(torch.tensor([0.5, 3.0]))
    (tensor(0.6931), tensor([0.0000, 2.7321]))
    """

    epsilon: float = 1.0

    keywords = ("log_sum",)

    def __post_init__(self) -> None:
        checked_setting("epsilon", self.epsilon, 0)

    @property
    def operations(self) -> Terms:  # type: ignore[override]
        """The formula."""
        return ((1.0, Logarithm(self.epsilon)),)

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        size, t = x.abs(), as_tensor(t, x)
        # the greater root of (z - x)(z + epsilon) + t; where two minima compete, the lower one
        far, near = size + self.epsilon, 2 * t.sqrt()
        least = far - near  # the root is real where this isn't negative
        root = size - t / (far / 2 + (least.clamp_min(0).sqrt() * (far + near).sqrt()) / 2)
        bottom = torch.where(root > 0, root, 1)
        ratio = (bottom / self.epsilon).clamp_max(torch.finfo(size.dtype).max)
        gain = (size - root / 2) - t / bottom * torch.log1p(ratio)  # divided by the root
        kept = torch.where(t <= self.epsilon**2, size > t / self.epsilon, (least > 0) & (root > 0) & (gain > 0))
        return resized(x, torch.where(kept | ~size.isfinite(), root, 0))


@dataclass(frozen=True)
class MCP(Entrywise):
    """Σ |x| - |x|² / (2 knee) where |x| ≤ knee, knee / 2 beyond: the minimax concave penalty.

    Its slope falls from one at zero to nothing at the knee, so that large entries aren't pulled at all. Not convex.
    The prox is firm thresholding, and where step ≥ knee the hard threshold at √(knee · step).

    Skglm's MCPenalty(alpha, gamma) is `alpha * MCP(gamma * alpha)`.

    Raises:
        PenaltyError: a `knee` that isn't a finite number above zero.

    Source: Zhang (2010), eq. 2.1.

    >>> rs.MCP(3.0)(torch.tensor([1.0, 5.0])), rs.MCP(3.0).prox(torch.tensor([1.0, 2.0, 5.0]))
    (tensor(2.3333), tensor([0.0000, 1.5000, 5.0000]))
    """

    knee: float = 3.0

    def __post_init__(self) -> None:
        checked_setting("knee", self.knee, 0)

    def entries(self, x: Tensor) -> Tensor:
        size = torch.abs(x)
        return torch.where(size > self.knee, self.knee / 2, size - squared(x) / (2 * self.knee))

    def slopes(self, x: Tensor) -> Tensor:
        return x.sgn() * (1 - x.abs() / self.knee).clamp_min(0)

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        size, t = x.abs(), as_tensor(t, x)
        steep = t >= self.knee
        firm = (size - t).clamp_min(0) / torch.where(steep, 1, 1 - t / self.knee)
        firm = torch.where(size > self.knee, size, firm.clamp_max(self.knee))
        hard = torch.where(size <= self.knee**0.5 * t.sqrt(), 0, size)
        return resized(x, torch.where(steep, hard, firm))


@dataclass(frozen=True)
class SCAD(Entrywise):
    """Σ f(|x|) with the slope one up to `start`, falling to zero at `knee`, and zero beyond.

    Smoothly clipped absolute deviation: small entries as under L1, large ones not pulled. Not convex. The prox is
    the global minimiser, which jumps where step > knee - start.

    Fan and Li's penalty of strength s with a = 3.7, and skglm's SCAD(s, 3.7), is `s * SCAD(start=s, knee=3.7 * s)`.

    Raises:
        PenaltyError: not 0 < start < knee, both finite.

    Source: Fan and Li (2001), eqs. 2.7 and 2.8.

    >>> rs.SCAD(1.0, 3.7)(torch.tensor([1.0, 5.0])), rs.SCAD(1.0, 3.7).prox(torch.tensor([1.5, 3.0, 5.0]))
    (tensor(3.3500), tensor([0.5000, 2.5882, 5.0000]))
    """

    start: float = 1.0
    knee: float = 3.7

    def __post_init__(self) -> None:
        checked_setting("start", self.start, 0)
        checked_setting("knee", self.knee, self.start)

    def entries(self, x: Tensor) -> Tensor:
        size, start, knee = torch.abs(x), self.start, self.knee
        middle = (2 * knee * size - squared(x) - start**2) / (2 * (knee - start))
        return torch.where(size > knee, (start + knee) / 2, torch.where(size > start, middle, size))

    def slopes(self, x: Tensor) -> Tensor:
        return x.sgn() * ((self.knee - x.abs()) / (self.knee - self.start)).clamp(0, 1)

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        size, t = x.abs(), as_tensor(t, x)
        width = self.knee - self.start
        soft = (size - t).clamp_min(0)
        steep = t >= width
        middle = size - t * (self.knee - size) / torch.where(steep, 1, width - t)
        smooth = torch.where(size > self.knee, size, torch.where(size <= self.start + t, soft, middle))
        # no minimum between start and knee: the better of the one below and the one above
        below = soft.clamp_max(self.start)
        limit = torch.where(size - t > self.start, self.start + width**0.5 * t.sqrt(), (self.start + self.knee + t) / 2)
        limit = torch.where(size <= t, (self.start + self.knee) ** 0.5 * t.sqrt(), limit)  # where `below` is zero
        jump = torch.where((size > self.knee) & (size > limit), size, below)
        return resized(x, torch.where(steep, jump, smooth))


@dataclass(frozen=True)
class Lp(Entrywise):
    """Σ|x|^p for 0 < p < 1: between counting the entries (p → 0) and L1; not convex, and no norm.

    The gradient at zero is zero, and grows without bound beside it: how="proximal" suits it best. The prox is zero
    up to a threshold and the greater root of z + t p z^(p-1) = |x| beyond it; that root has a closed form for p = 1/2
    and p = 2/3, and is found by Newton's method for every p.

    Raises:
        PenaltyError: a p that isn't between 0 and 1 (for p = 1 and 2 there are `L1` and `L2`, for norms `Norm(p)`).

    Source: Xu and others (2012) for p = 1/2; Cao, Sun and Xu (2013) for p = 2/3; Marjanovic and Solo (2012) for any.

    >>> rs.Lp(0.5)(torch.tensor([4.0, -9.0])), rs.Lp(0.5).prox(torch.tensor([1.0, 4.0]))
    (tensor(5.), tensor([0.0000, 3.7415]))
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        checked_setting("p", self.p, 0, 1)

    def entries(self, x: Tensor) -> Tensor:
        size = torch.abs(x)
        zero = size == 0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, size).pow(self.p))

    def slopes(self, x: Tensor) -> Tensor:
        size = x.abs()
        zero = size == 0
        return torch.where(zero, 0, self.p * torch.where(zero, 1, size).pow(self.p - 1) * x.sgn())

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        p, size, t = self.p, x.abs(), as_tensor(t, x)
        least = t.pow(1 / (2 - p)) * (2 - 2 * p) ** (1 / (2 - p))  # what the prox jumps to, at the size `limit`
        limit = torch.where(t > 0, least * ((2 - p) / (2 - 2 * p)), 0)
        dead = size <= limit
        bound = torch.where(dead, 1, size)
        t = torch.where(dead, 0, t)
        z = bound
        tiny = torch.finfo(x.real.dtype).tiny
        for _ in range(_NEWTON_STEPS):
            pull = t * p * z.clamp_min(tiny).pow(p - 1)  # finite also at the smallest numbers
            z = torch.maximum(z - (z + pull - bound) / (1 - (1 - p) * pull / z), least)
        return resized(x, torch.where(dead, 0, torch.where(size.isinf(), size, z)))


@dataclass(frozen=True)
class SoftBox(Entrywise):
    """Σ max(0, low - x)² + max(0, x - high)²: nothing between `low` and `high`, the squared excess outside.

    A barrier that gives way; for one that doesn't, see `Box`. The prox moves entries outside towards the box.

    Args:
        low: the lower bound, or None for none.
        high: the upper bound, or None for none.

    Raises:
        PenaltyError: bounds that aren't numbers with low ≤ high; a complex tensor, which has no order.

    >>> rs.SoftBox(-1.0, 1.0)(torch.tensor([0.5, 3.0])), rs.SoftBox(-1.0, 1.0).prox(torch.tensor([0.5, 4.0]))
    (tensor(4.), tensor([0.5000, 2.0000]))
    """

    low: float | None = -1.0
    high: float | None = 1.0

    keywords = ("soft_box",)
    shrinks = False

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                checked_setting(name, bound, -inf)
        low, high = self._bounds()
        if low > high or (self.low is None and self.high is None):
            raise PenaltyError(f"SoftBox needs low ≤ high, one of which may be None; got {self.low!r}, {self.high!r}")

    def _bounds(self) -> tuple[float, float]:
        return -inf if self.low is None else self.low, inf if self.high is None else self.high

    def _excess(self, x: Tensor) -> Tensor:
        if x.is_complex():
            raise PenaltyError(f"a complex tensor ({x.dtype}) has no order: SoftBox needs a real one")
        return x - x.clamp(*self._bounds())

    def entries(self, x: Tensor) -> Tensor:
        return self._excess(x).square()

    def slopes(self, x: Tensor) -> Tensor:
        return 2 * self._excess(x)

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        excess, t = self._excess(x), as_tensor(t, x)
        scale = 0.5 / (0.5 + t)
        # the smaller part is added, so that the result is exact for small steps, and in the box for large ones
        moved = torch.where(scale > 0.5, x - excess * (t / (0.5 + t)), x.clamp(*self._bounds()) + excess * scale)
        return unsigned_zeros(torch.where((excess == 0) | x.isinf(), x, moved))
