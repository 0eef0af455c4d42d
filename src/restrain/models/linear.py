"""Exact regularisation paths of linear models: the convex case, to the tolerance of float64.

Squared error, or cross-entropy of a softmax, averaged over samples as the estimators do, plus a
penalty on the weights; the intercept is free. Lasso and elastic net of squared errors go output by
output, by active sets (`lasso`); group lassos and logistic regression by Newton's method
(`newton`). Else accelerated proximal gradient with restarts runs on the features that aren't zero
or violate their optimality condition (Beck and Teboulle 2009; O'Donoghue and Candès 2015), until
none does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from restrain.errors import PlanError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.models.lasso import elastic_net_path
from restrain.models.newton import minimised
from restrain.models.objectives import CrossEntropy, Form, Squares, knows
from restrain.named_tensors import Location
from restrain.paths import least_strength, quantile
from restrain.penalties import Penalty

_TOLERANCE = 1e-9  # of the proximal map, relative to the gradient at the origin
_STEPS, _ROUNDS = 50_000, 50
_SMALL, _POWERS = 30, 20  # features with an exact spread; powers of the others' products
_HALVINGS = 30  # of the strength, in search of the universal threshold


@dataclass(frozen=True)
class Linear:
    """A linear problem: inputs (n, features), targets (n, outputs) or classes (n,), in float64.

    Args:
        x: the inputs.
        y: the targets, or one-hot classes.
        classes: True for the cross-entropy.
    """

    x: Tensor
    y: Tensor
    classes: bool

    @classmethod
    def of(cls, x: Any, y: Any, classes: int) -> Linear:
        """Return the problem of arrays; `classes` is their number, or 0 for numeric targets."""
        inputs = torch.as_tensor(np.asarray(x), dtype=torch.float64, device="cpu")
        targets = torch.as_tensor(np.asarray(y), device="cpu")
        if classes:
            return cls(inputs, torch.nn.functional.one_hot(targets.long(), classes).double(), True)
        return cls(inputs, targets.double().reshape(len(inputs), -1), False)

    def loss(self, w: Tensor, b: Tensor) -> Tensor:
        """Return the data loss."""
        output = self.x @ w.T + b
        if self.classes:
            return (output.logsumexp(1) - (output * self.y).sum(1)).mean()
        return (output - self.y).square().mean()

    def gradient(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the loss by w and by b."""
        output = self.x @ w.T + b
        error = output.softmax(1) - self.y if self.classes else (output - self.y) * (2 / self.y.shape[1])
        error = error / len(self.x)
        return error.T @ self.x, error.sum(0)

    def intercept(self) -> Tensor:
        """Return the best intercept at w = 0."""
        mean = self.y.mean(0)
        return mean.clamp_min(1e-300).log() if self.classes else mean

    def spread(self, features: Tensor) -> float:
        """Return σ² / n and a little more, of the greatest singular value of some features."""
        if not len(features):
            return 0.0
        x = self.x[:, features]
        if min(x.shape) <= _SMALL:
            return float(torch.linalg.matrix_norm(x, 2)) ** 2 / len(x)
        v, found = x.square().sum(0).sqrt(), 0.0
        for _ in range(_POWERS):
            v = v / v.norm()
            v = x.T @ (x @ v)
            found = max(found, float(v.norm()))
        return 1.1 * found / len(x)

    def greatest(self, penalty: Penalty) -> float:
        """Return the least strength at which all weights are zero."""
        zero = self.x.new_zeros(self.y.shape[1], self.x.shape[1])
        return least_strength(penalty, self.gradient(zero, self.intercept())[0])

    def universal(self, penalty: Penalty, level: float, draws: int, draw: torch.Generator) -> float:
        """Return the quantile universal threshold: nothing is selected by chance at 1 - level.

        Classes are drawn with their shares, and the threshold is the quantile of the dual norm of
        the gradient at the origin. For numbers it is that of the square-root lasso, whose gradient
        at the origin, ∇ / (2 r) with r² the squared error there, doesn't depend on the noise's
        scale: with κ its quantile, the strength s at which s = 2 κ r(s), r(s)² the squared error on
        the path at s. At this strength both have the same minimiser.

        Raises:
            PlanError: there is no such strength, as the path interpolates the targets.

        Source: Giacobino and others (2017), arXiv 1511.05433; Belloni, Chernozhukov and Wang
        (2011) for the square-root lasso, there with one output.
        """
        found = torch.tensor([self._null(penalty, draw) for _ in range(draws)], dtype=torch.float64, device="cpu")
        threshold = quantile(found, level)
        return threshold if self.classes else self._crossing(penalty, 2 * threshold)

    def _null(self, penalty: Penalty, draw: torch.Generator) -> float:
        """Return the least strength that makes all zero, of targets drawn from the null model."""
        if self.classes:
            labels = torch.multinomial(self.y.mean(0), len(self.y), True, generator=draw)
            y = torch.nn.functional.one_hot(labels, self.y.shape[1]).double()
        else:
            y = torch.randn(self.y.shape, generator=draw, dtype=torch.float64, device="cpu")
        drawn = replace(self, y=y)
        return drawn.greatest(penalty) / (1.0 if self.classes else 2 * drawn.error_at_origin())

    def error_at_origin(self) -> float:
        """Return the root of the mean squared error at w = 0."""
        return float((self.y - self.y.mean(0)).square().mean().sqrt())

    def _crossing(self, penalty: Penalty, ratio: float) -> float:
        """Return the strength s with s = ratio · the root of the mean squared error at s."""
        high = ratio * self.error_at_origin()

        def excess(logarithm: float) -> float:
            ((w, b),) = self.path(penalty, [math.exp(logarithm)])
            return logarithm - math.log(ratio) - math.log(max(float(self.loss(w, b)), 1e-300)) / 2

        top = math.log(high)
        if excess(top) <= 1e-12:  # all weights are zero
            return high
        for halvings in range(1, _HALVINGS):
            if excess(low := top - halvings * math.log(2)) <= 0:
                return math.exp(brentq(excess, low, low + math.log(2), xtol=1e-11))
        raise PlanError(
            "the square-root path reaches its targets before the universal threshold, so that no noise is left to be "
            "compared with: choose by cross-validation, choice='best'"
        )

    def path(self, penalty: Penalty, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Return (weights, intercept) at each strength; warm starts follow the given order.

        Args:
            penalty: a convex penalty on the weights (outputs, features) with a prox.
            strengths: factors of the penalty, best in decreasing order.
        """
        l1, l2, others = penalty.split()
        if not self.classes and l1 and not others:
            return self._elastic(l1, l2, strengths)
        mean = self.x.mean(0)
        centred = replace(self, x=self.x - mean)  # the intercept is then apart from the weights
        penalty = penalty.bound_to(Location(self.x.new_zeros(self.y.shape[1], self.x.shape[1])))
        w, b = self.x.new_zeros(self.y.shape[1], self.x.shape[1]), self.intercept()
        scale = float(centred.gradient(w, b)[0].abs().max())
        by_newton = _Newton(centred, penalty) if knows(penalty) else None
        found: list[tuple[Tensor, Tensor]] = []
        ways = [w]
        for k, strength in enumerate(strengths):
            solved = None
            if by_newton is not None:
                start = _ahead(ways[-2:], strengths[max(k - 2, 0) : k + 1])
                solved = by_newton.solve(float(strength), start, b, _TOLERANCE * scale)
            w, b = solved or _Solver(centred, strength * penalty, _TOLERANCE * scale).solve(w, b)
            ways.append(w)
            found.append((w, b - w @ mean))
        return found

    def _elastic(self, l1: float, l2: float, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Return the path of a Σ|w| + c Σw², output by output."""
        outputs, mean_x, mean_y = self.y.shape[1], self.x.mean(0), self.y.mean(0)
        x, y = np.asfortranarray((self.x - mean_x).numpy()), (self.y - mean_y).numpy()
        scale = outputs * np.asarray(strengths, dtype=float)  # of the loss / 2
        columns = [elastic_net_path(x, y[:, k], scale * l1 / 2, scale * l2) for k in range(outputs)]
        ws = torch.as_tensor(np.stack(columns, 1), device="cpu")
        return [(w, mean_y - w @ mean_x) for w in ws]


def _ahead(ways: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Return the line through the last two points at the next strength; signs and zeros stay."""
    w = ways[-1]
    if len(strengths) < 3 or strengths[0] == strengths[1]:
        return w
    further = w + (strengths[2] - strengths[1]) / (strengths[1] - strengths[0]) * (w - ways[-2])
    return torch.where(further * w > 0, further, 0)


class _Newton:
    """Newton's method for a problem of centred inputs, see `newton`."""

    def __init__(self, problem: Linear, penalty: Penalty) -> None:
        x, y, self.shape = problem.x.numpy(), problem.y.numpy(), (problem.y.shape[1], problem.x.shape[1])
        spread = problem.spread(torch.arange(x.shape[1], device="cpu"))
        self.mean = None if problem.classes else problem.y.mean(0)
        self.loss: Any = CrossEntropy(x, y, spread) if problem.classes else Squares(x, y - y.mean(0), spread)
        self.form = Form.of(penalty, self.shape)

    def solve(self, strength: float, w: Tensor, b: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
        """Return the minimiser, from a start; None where Newton's method doesn't get there."""
        free = b.numpy() if self.mean is None else np.zeros(0)
        found = minimised(self.loss, self.form.times(strength), w.reshape(-1).numpy(), free, tolerance)
        if found is None:
            return None
        weights, fitted = (torch.as_tensor(one, device="cpu") for one in found)
        return weights.reshape(self.shape), fitted if self.mean is None else self.mean


class _Solver:
    """Proximal gradient on the features that aren't zero or violate their condition."""

    def __init__(self, problem: Linear, penalty: Penalty, tolerance: float) -> None:
        self.problem, self.penalty, self.tolerance = problem, penalty, tolerance
        self.by_feature = _by_feature(penalty)

    def solve(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the minimiser, from a start."""
        active = (w != 0).any(0) if self.by_feature else torch.ones_like(w[0], dtype=torch.bool)
        for _ in range(_ROUNDS):
            features = active.nonzero()[:, 0]
            w, b = self._on(features, w, b)
            more = self._violated(w, b) & ~active
            if not bool(more.any()):
                return w, b
            active |= more
        self._warn()
        return w, b

    def _violated(self, w: Tensor, b: Tensor) -> Tensor:
        """Return the mask of features that a proximal step would move."""
        gradient, _ = self.problem.gradient(w, b)
        t = 1e-3 * max(float(w.abs().max()), 1e-6) / max(float(gradient.abs().max()), 1e-300)
        moved = (w - self.penalty.prox(w - t * gradient, t)).abs().amax(0) / t
        return moved > 10 * self.tolerance

    def _on(self, features: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Minimise over some features and the intercept.

        The intercept is b = √s β with s the spread of the features, which balances both.
        """
        s = self.problem.spread(features) or 1.0
        share = 0.5 if self.problem.classes else 2 / self.problem.y.shape[1]
        t, theta = 1 / (share * s), 1.0
        x, c = w[:, features], b
        y, d, own = x, c, replace(self.problem, x=self.problem.x[:, features].contiguous())
        for _ in range(_STEPS):
            gw, gb = own.gradient(y, d)
            z, e = self._prox(y - t * gw, features, w, t), d - t * s * gb
            residual = max(_greatest(y - z) / t, _greatest(d - e) / (t * math.sqrt(s)))
            turned = float(((y - z) * (z - x)).sum() + ((d - e) * (e - c)).sum() / s) > 0
            following = 1.0 if turned else (1 + math.sqrt(1 + 4 * theta**2)) / 2
            momentum = 0.0 if turned else (theta - 1) / following
            y, d = z + momentum * (z - x), e + momentum * (e - c)
            x, c, theta = z, e, following
            if residual <= self.tolerance:
                break
        else:
            self._warn()
        return self._whole(features, x, w), c

    def _whole(self, features: Tensor, x: Tensor, w: Tensor) -> Tensor:
        found = torch.zeros_like(w)
        found[:, features] = x
        return found

    def _prox(self, moved: Tensor, features: Tensor, w: Tensor, t: float) -> Tensor:
        if len(features) == w.shape[1]:
            return self.penalty.prox(moved, t)
        whole = torch.zeros_like(w)
        whole[:, features] = moved
        return self.penalty.prox(whole, t)[:, features]

    def _warn(self) -> None:
        warnings.warn(
            f"a linear path under {self.penalty!r} didn't converge in {_STEPS:,} steps: standardise the inputs "
            "(normalize=True), or take fewer or greater strengths",
            RestrainWarning,
            stacklevel=level_of_caller(),
        )


def _by_feature(penalty: Penalty) -> bool:
    """Return True if zero columns of the weights stay zero, whatever the others do."""
    return all(leaf.entrywise or leaf.groupwise for _, leaf in penalty.leaves())


def _greatest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
