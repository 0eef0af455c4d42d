"""Exact regularisation paths of linear models: the convex case, to the tolerance of float64.

Squared error, or cross-entropy of a softmax, averaged over samples as the estimators do, plus a
penalty on the weights; the intercept is free. Elastic nets of one output are left to scikit-learn's
coordinate descent. Else accelerated proximal gradient with restarts runs on the features that
aren't zero or violate their optimality condition (Beck and Teboulle 2009; O'Donoghue and Candès
2015), until none does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path
from torch import Tensor

from restrain.errors import RestrainWarning
from restrain.fields import level_of_caller
from restrain.paths import least_strength
from restrain.penalties import Penalty

_TOLERANCE = 1e-9  # of the proximal map, relative to the gradient at the origin
_GAP = 1e-14  # of scikit-learn's dual gap, relative to ‖y‖²
_STEPS, _ROUNDS = 50_000, 50


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

    def gradient(self, w: Tensor, b: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the gradient of the loss by w and by b; `features` are those of w."""
        x = self.x if features is None else self.x[:, features]
        output = x @ w.T + b
        error = output.softmax(1) - self.y if self.classes else (output - self.y) * (2 / self.y.shape[1])
        error = error / len(x)
        return error.T @ x, error.sum(0)

    def intercept(self) -> Tensor:
        """Return the best intercept at w = 0."""
        mean = self.y.mean(0)
        return mean.clamp_min(1e-300).log() if self.classes else mean

    def spread(self, features: Tensor) -> float:
        """Return σ² / n, of the greatest singular value of some features."""
        return float(torch.linalg.matrix_norm(self.x[:, features], 2)) ** 2 / len(self.x) if len(features) else 0.0

    def greatest(self, penalty: Penalty) -> float:
        """Return the least strength at which all weights are zero."""
        zero = self.x.new_zeros(self.y.shape[1], self.x.shape[1])
        return least_strength(penalty, self.gradient(zero, self.intercept())[0])

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
        w, b = self.x.new_zeros(self.y.shape[1], self.x.shape[1]), self.intercept()
        scale = float(centred.gradient(w, b)[0].abs().max())
        found = []
        for strength in strengths:
            w, b = _Solver(centred, strength * penalty, _TOLERANCE * scale).solve(w, b)
            found.append((w, b - w @ mean))
        return found

    def _elastic(self, l1: float, l2: float, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Return the path of a Σ|w| + c Σw² by coordinate descent, output by output."""
        outputs, mean_x, mean_y = self.y.shape[1], self.x.mean(0), self.y.mean(0)
        x, y = np.asfortranarray((self.x - mean_x).numpy()), (self.y - mean_y).numpy()
        alphas = np.array([strength * outputs * (l1 / 2 + l2) for strength in strengths])
        order = np.argsort(-alphas, kind="stable")
        ws = torch.zeros(len(strengths), outputs, x.shape[1], dtype=torch.float64, device="cpu")
        share = l1 / 2 / (l1 / 2 + l2)
        for k in range(outputs):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-14 may be below rounding
                column = np.ascontiguousarray(y[:, k])
                given = {"alphas": alphas[order], "l1_ratio": share, "tol": _GAP, "max_iter": _STEPS}
                _, coefs, _ = enet_path(x, column, **given)
            ws[torch.as_tensor(order.copy()), k] = torch.as_tensor(coefs.T.copy())
        return [(w, mean_y - w @ mean_x) for w in ws]


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
        y, d = x, c
        for _ in range(_STEPS):
            gw, gb = self.problem.gradient(y, d, features)
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
        found = torch.zeros_like(w)
        found[:, features] = x
        return found, c

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
