"""Exact paths of the lasso and of elastic nets of one output, by active sets.

Given the features that aren't zero and their signs, the weights solve a linear system. So from
point to point the system of the last set is solved; where signs disagree, the objective is
minimised exactly along the line to the solution, and weights that end at zero leave the set; the
features that violate their optimality condition most join it. The objective falls in each step, so
it ends, at the minimiser to rounding (Lee, Battle, Raina and Ng 2006, "feature-sign search", here
with several features at once). Where the system is singular coordinate descent takes over.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path

_GAP = 1e-14  # of scikit-learn's dual gap, relative to ‖y‖²
_STEPS, _ROUNDS = 50_000, 1000
_FEW = 10  # features that may join the set at once, or as many as are in it
_ROUNDING = 1e-10  # of the strength, by which a condition may be violated


def elastic_net_path(x: Any, y: Any, strengths: Any, ridges: Any) -> Any:
    """Return the weights (strengths, features) of ‖y - x w‖² / 2n + a ‖w‖₁ + c ‖w‖² / 2.

    Args:
        x: centred inputs (n, features).
        y: centred targets (n,).
        strengths: a of each point, above zero.
        ridges: c of each point, proportional to a.
    """
    found, search = np.zeros((len(strengths), x.shape[1])), _ActiveSet(x, y)
    for k in np.argsort(-np.asarray(strengths), kind="stable"):
        if not search.solve(strengths[k], ridges[k]):
            search.start(_descended(x, y, strengths[k], ridges[k], search.weights()))
        found[k] = search.weights()
    return found


def _descended(x: Any, y: Any, strength: float, ridge: float, begin: Any) -> Any:
    """Return the weights that scikit-learn's coordinate descent finds."""
    alpha = strength + ridge
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-14 may be below rounding
        given = {"alphas": [alpha], "l1_ratio": strength / alpha, "tol": _GAP, "max_iter": _STEPS, "coef_init": begin}
        return enet_path(np.asfortranarray(x), y, **given)[1][:, 0]


class Products:
    """Products xᵀx / n of features, each computed once, when it is first asked for."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.place = np.full(x.shape[1], -1)  # of a feature in `table`, -1 if it isn't there
        self.table = np.zeros((0, 0))
        self.seen = np.zeros(0, dtype=np.intp)  # the features of `table`

    def of(self, features: Any) -> Any:
        """Return the products of some features with each other."""
        new = np.unique(features[self.place[features] < 0])
        if len(new):
            old, seen = self.table, np.append(self.seen, new)
            self.table = np.empty((len(seen), len(seen)))
            self.table[: len(old), : len(old)] = old
            self.table[len(old) :] = self.x[:, new].T @ self.x[:, seen] / len(self.x)
            self.table[: len(old), len(old) :] = self.table[len(old) :, : len(old)].T
            self.seen, self.place[new] = seen, np.arange(len(old), len(seen))
        return self.table[np.ix_(self.place[features], self.place[features])]


class _ActiveSet:
    """The features that aren't zero, with their weights and signs, and products of features."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y
        self.slopes = x.T @ y / len(y)
        self.tiny = 1e-14 * float(np.abs(self.slopes).max(initial=0.0))
        self.on = np.zeros(0, dtype=np.intp)  # features
        self.w = np.zeros(0)
        self.signs = np.zeros(0)
        self.products = Products(x)

    def weights(self) -> Any:
        """Return the weights of all features."""
        found = np.zeros(self.x.shape[1])
        found[self.on] = self.w
        return found

    def start(self, w: Any) -> None:
        """Go on from other weights."""
        self._keep(np.flatnonzero(w), w[np.flatnonzero(w)])

    def solve(self, a: float, c: float) -> bool:
        """Find the minimiser; False where the system is singular, or it takes too long."""
        many = True
        for _ in range(_ROUNDS):
            if not self._descend(a, c):
                return False
            left = self.slopes - self.x.T @ (self.x[:, self.on] @ self.w) / len(self.y)
            excess = np.abs(left) - a
            excess[self.on] = -np.inf
            over = np.flatnonzero(excess > _ROUNDING * a + self.tiny)
            if not len(over):
                return True
            count = max(_FEW, len(self.on)) if many else 1
            new = over[np.argsort(-excess[over], kind="stable")[:count]]
            joined = self._join(new, np.sign(left[new]), a, c)
            if not joined and not many:
                return False
            many = joined
        return False

    def _join(self, new: Any, signs: Any, a: float, c: float) -> bool:
        """Let features join whose weights would move to the side of their signs; False if none."""
        old = len(self.on)
        while len(new):
            on, both = np.append(self.on, new), np.append(self.signs, signs)
            target = self._target(on, both, a, c)
            right = np.zeros(len(new), dtype=bool) if target is None else target[old:] * signs > 0
            if right.all():
                self.on, self.signs, self.w = on, both, np.append(self.w, np.zeros(len(new)))
                return True
            new, signs = new[right], signs[right]
        return False

    def _descend(self, a: float, c: float) -> bool:
        """Minimise over the features that are on; False where the system is singular."""
        while len(self.on):
            target = self._target(self.on, self.signs, a, c)
            if target is None:
                return False
            if (np.sign(target) == self.signs).all():
                self.w = target
                break
            at, stopped = self._along(target - self.w, a, c)
            w = self.w + at * (target - self.w)
            w[stopped] = 0.0
            self._keep(self.on[w != 0], w[w != 0])
        return True

    def _along(self, d: Any, a: float, c: float) -> tuple[float, Any]:
        """Return (t, the entries that are zero there) of the minimum along w + t d, t up to 1."""
        gram = self.products.of(self.on)
        slope = float((gram @ self.w + c * self.w - self.slopes[self.on]) @ d + a * self.signs @ d)
        bend = float(d @ (gram @ d) + c * d @ d)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.where(self.signs * d < 0, -self.w / d, np.inf)  # where each is zero
        for k in np.argsort(ends, kind="stable"):
            if slope + bend * min(ends[k], 1.0) >= 0 or ends[k] >= 1:
                break
            slope += 2 * a * abs(d[k])
            if slope + bend * ends[k] >= 0:
                return float(ends[k]), np.flatnonzero(ends == ends[k])
        return min(max(-slope / bend, 0.0), 1.0) if bend > 0 else 1.0, np.zeros(0, dtype=np.intp)

    def _keep(self, on: Any, w: Any) -> None:
        self.on, self.w, self.signs = on, w, np.sign(w)

    def _target(self, on: Any, signs: Any, a: float, c: float) -> Any:
        """Return the solution of the system of some features and signs; None if it is singular."""
        gram = self.products.of(on)
        gram[np.diag_indices(len(on))] += c
        try:
            return cho_solve(cho_factor(gram, check_finite=False), self.slopes[on] - a * signs, check_finite=False)
        except LinAlgError:
            return None
