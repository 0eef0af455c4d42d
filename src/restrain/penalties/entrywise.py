"""Entrywise penalties Σᵢ f(xᵢ), where f is a function of one entry."""

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

# For |x|^p: started right of the root of a convex function, whose slope at the root is ≥ 1 - p/2
_NEWTON_STEPS = 10


class Entrywise(Penalty, register=False):
    """Base of penalties Σᵢ f(xᵢ).

    A subclass declares f by `operations`; or it defines f (`entries`), f′ (`slopes`) and the prox
    of f (`nearest`). Each of the three takes a real or complex tensor of float32 or wider, and
    returns a tensor of the same shape.
    """

    entrywise = True
    shrinks = True

    @property
    def operations(self) -> Terms:  # type: ignore[override]
        """Terms that compute f and f′ by the subclass's `entries` and `slopes`."""
        return ((1.0, Function(self)),)

    def entries(self, x: Tensor) -> Tensor:
        """Return f of each entry, a real tensor."""
        return weighted([(factor, one.value(x)) for factor, one in self._declared()])

    def slopes(self, x: Tensor) -> Tensor:
        """Return the gradient of f at each entry, zero where f has a kink."""
        return weighted([(factor, one.slope(x)) for factor, one in self._declared()])

    def _declared(self) -> list[tuple[float, ByEntry]]:
        found = [(factor, one) for factor, one in self.operations if isinstance(one, ByEntry)]
        if any(isinstance(one, Function) for _, one in found):
            raise NotImplementedError(f"{type(self).__name__} declares no `operations`: write entries(x) and slopes(x)")
        return found

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return argmin_z ½|z - x|² + t f(z) for each entry; t may differ by entry.

        Raises:
            NoProxError: f isn't a declared sum of |x| and |x|², and the subclass defines no
                `nearest`.
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
    """Σ|x|, the sum of absolute values; with how="proximal" entries become exactly zero.

    The prox is the soft threshold. The gradient at zero is zero. Of complex entries the modulus
    counts.

    Source: Tibshirani (1996), the lasso; Donoho and Johnstone (1994) for the soft threshold.

    >>> rs.L1()(torch.tensor([3.0, -4.0])), rs.L1().prox(torch.tensor([3.0, -4.0, 0.5]))
    (tensor(7.), tensor([ 2., -3.,  0.]))
    """

    operations = ((1.0, Absolute()),)


@dataclass(frozen=True)
class L2(Entrywise):
    """Σ|x|², the sum of squares, not halved and without a root (for the root see `Norm(2)`).

    The prox is w / (1 + 2 step). `(c / 2) * L2()` has the gradient of `weight_decay=c` in a coupled
    optimizer.

    Source: Hoerl and Kennard (1970), ridge regression.

    >>> rs.L2()(torch.tensor([3.0, -4.0])), rs.L2().prox(torch.tensor([3.0, -4.0]))
    (tensor(25.), tensor([ 1.0000, -1.3333]))
    """

    operations = ((1.0, Square()),)


@dataclass(frozen=True)
class ElasticNet(Entrywise):
    """l1 Σ|x| + l2 Σ|x|², the same as `l1 * L1() + l2 * L2()`.

    scikit-learn's ElasticNet(alpha, l1_ratio) adds
    alpha l1_ratio Σ|x| + alpha (1 - l1_ratio) / 2 Σ|x|² to half the mean squared error.

    Raises:
        PenaltyError: a strength isn't a finite number, zero or more.

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
        """|x| with strength `l1` and |x|² with strength `l2`."""
        return ((self.l1, Absolute()), (self.l2, Square()))


@dataclass(frozen=True)
class Huber(Entrywise):
    """Σ f(|x|), a square near zero and linear in |x| far out.

    f(s) = s²/2 for s ≤ delta, and delta (s - delta/2) beyond. The gradient of large entries is no
    more than delta; no entry becomes exactly zero.

    Raises:
        PenaltyError: `delta` isn't a finite number above zero.

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
    """Σ log(1 + |x| / epsilon), with slope 1 / epsilon at zero, falling off as 1 / |x|.

    Not convex: small entries are shrunk strongly, large ones hardly. The prox is the global
    minimiser, which jumps if step > epsilon².

    Raises:
        PenaltyError: `epsilon` isn't a finite number above zero.

    Source: Candès, Wakin and Boyd (2008), eq. 8; Prater-Bennette, Shen and Tripp (2022) for the
    prox.

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

    @property
    def concavity(self) -> float:  # type: ignore[override]
        return 1 / self.epsilon**2

    def nearest(self, x: Tensor, t: float | Tensor) -> Tensor:
        size, t = x.abs(), as_tensor(t, x)
        # The greater root of (z - x)(z + epsilon) + t; with two local minima, the lower of the two
        far, near = size + self.epsilon, 2 * t.sqrt()
        least = far - near  # the root is real if this isn't negative
        root = size - t / (far / 2 + (least.clamp_min(0).sqrt() * (far + near).sqrt()) / 2)
        bottom = torch.where(root > 0, root, 1)
        ratio = (bottom / self.epsilon).clamp_max(torch.finfo(size.dtype).max)
        gain = (size - root / 2) - t / bottom * torch.log1p(ratio)  # divided by the root
        kept = torch.where(t <= self.epsilon**2, size > t / self.epsilon, (least > 0) & (root > 0) & (gain > 0))
        return resized(x, torch.where(kept | ~size.isfinite(), root, 0))


@dataclass(frozen=True)
class MCP(Entrywise):
    """Σ f(|x|), the minimax concave penalty.

    f(s) = s - s² / (2 knee) for s ≤ knee, and knee / 2 beyond. The slope falls from one at zero to
    zero at the knee, so that larger entries aren't shrunk. Not convex. The prox is firm
    thresholding, or if step ≥ knee the hard threshold at √(knee · step).

    `alpha * MCP(gamma * alpha)` is skglm's MCPenalty(alpha, gamma).

    Raises:
        PenaltyError: `knee` isn't a finite number above zero.

    Source: Zhang (2010), eq. 2.1.

    >>> rs.MCP(3.0)(torch.tensor([1.0, 5.0])), rs.MCP(3.0).prox(torch.tensor([1.0, 2.0, 5.0]))
    (tensor(2.3333), tensor([0.0000, 1.5000, 5.0000]))
    """

    knee: float = 3.0

    def __post_init__(self) -> None:
        checked_setting("knee", self.knee, 0)

    @property
    def concavity(self) -> float:  # type: ignore[override]
        return 1 / self.knee

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
    """Σ f(|x|), the smoothly clipped absolute deviation.

    The slope of f is one up to `start`, falls linearly to zero at `knee`, and is zero beyond: small
    entries are shrunk as by L1, large ones not at all. Not convex. The prox is the global
    minimiser, which jumps if step > knee - start.

    `s * SCAD(start=s, knee=3.7 * s)` is Fan and Li's penalty of strength s with a = 3.7, and
    skglm's SCAD(s, 3.7).

    Raises:
        PenaltyError: `start` and `knee` aren't finite with 0 < start < knee.

    Source: Fan and Li (2001), eqs. 2.7 and 2.8.

    >>> rs.SCAD(1.0, 3.7)(torch.tensor([1.0, 5.0]))
    tensor(3.3500)
    >>> rs.SCAD(1.0, 3.7).prox(torch.tensor([1.5, 3.0, 5.0]))
    tensor([0.5000, 2.5882, 5.0000])
    """

    start: float = 1.0
    knee: float = 3.7

    def __post_init__(self) -> None:
        checked_setting("start", self.start, 0)
        checked_setting("knee", self.knee, self.start)

    @property
    def concavity(self) -> float:  # type: ignore[override]
        return 1 / (self.knee - self.start)

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
        # No minimum between start and knee: the lower of the minima below start and above knee
        below = soft.clamp_max(self.start)
        limit = torch.where(size - t > self.start, self.start + width**0.5 * t.sqrt(), (self.start + self.knee + t) / 2)
        # `below` is zero for size ≤ t
        limit = torch.where(size <= t, (self.start + self.knee) ** 0.5 * t.sqrt(), limit)
        jump = torch.where((size > self.knee) & (size > limit), size, below)
        return resized(x, torch.where(steep, jump, smooth))


@dataclass(frozen=True)
class Lp(Entrywise):
    """Σ|x|^p for 0 < p < 1, between the number of nonzeros (p → 0) and L1; not convex, no norm.

    The gradient is unbounded near zero (and zero at zero), so how="proximal" suits it best. The
    prox is zero up to a threshold, and beyond it the greater root of z + t p z^(p-1) = |x|, found
    by Newton's method for every p (p = 1/2 and p = 2/3 also have closed forms).

    Raises:
        PenaltyError: p isn't between 0 and 1 (for p = 1 and 2 there are `L1` and `L2`, for norms
            `Norm(p)`).

    Source: Xu and others (2012) for p = 1/2; Cao, Sun and Xu (2013) for p = 2/3; Marjanovic and
    Solo (2012) for any p.

    >>> rs.Lp(0.5)(torch.tensor([4.0, -9.0])), rs.Lp(0.5).prox(torch.tensor([1.0, 4.0]))
    (tensor(5.), tensor([0.0000, 3.7415]))
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        checked_setting("p", self.p, 0, 1)

    @property
    def concavity(self) -> float:  # type: ignore[override]
        return inf

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
        # At |x| = limit the prox jumps from zero to `least`
        least = t.pow(1 / (2 - p)) * (2 - 2 * p) ** (1 / (2 - p))
        limit = torch.where(t > 0, least * ((2 - p) / (2 - 2 * p)), 0)
        dead = size <= limit
        bound = torch.where(dead, 1, size)
        t = torch.where(dead, 0, t)
        z = bound
        tiny = torch.finfo(x.real.dtype).tiny
        for _ in range(_NEWTON_STEPS):
            pull = t * p * z.clamp_min(tiny).pow(p - 1)  # finite also for the smallest z
            z = torch.maximum(z - (z + pull - bound) / (1 - (1 - p) * pull / z), least)
        return resized(x, torch.where(dead, 0, torch.where(size.isinf(), size, z)))


@dataclass(frozen=True)
class SoftBox(Entrywise):
    """Σ max(0, low - x)² + max(0, x - high)², the squared excess outside [low, high].

    A soft constraint; for the hard one see `Box`. The prox moves entries outside towards the box.

    Args:
        low: the lower bound, or None if unbounded below.
        high: the upper bound, or None if unbounded above.

    Raises:
        PenaltyError: the bounds aren't numbers with low ≤ high; a complex tensor, which has no
            order.

    >>> rs.SoftBox(-1.0, 1.0)(torch.tensor([0.5, 3.0]))
    tensor(4.)
    >>> rs.SoftBox(-1.0, 1.0).prox(torch.tensor([0.5, 4.0]))
    tensor([0.5000, 2.0000])
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
        # Adds the smaller part: exact for small steps, in the box for large ones
        moved = torch.where(scale > 0.5, x - excess * (t / (0.5 + t)), x.clamp(*self._bounds()) + excess * scale)
        return unsigned_zeros(torch.where((excess == 0) | x.isinf(), x, moved))
