"""Losses and penalties of linear problems: values, slopes, Hessians where they are smooth.

Weights are flat arrays of (outputs, features) in float64. On a support, the entries that aren't
zero, both a loss and an elastic net with a group lasso have two derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.linalg.blas import dsyrk

from restrain.axes import grouping
from restrain.models.lasso import Products
from restrain.penalties import GroupLasso, Penalty

_RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)  # of a Hessian's greatest diagonal entry: flat directions stay as they are
_WIDE = 1.5  # entries per sample, from which on systems of the samples' size are quicker


def knows(penalty: Penalty) -> bool:
    """Return True for a Σ|w| + c Σw² + a group lasso, each of which may be missing."""
    others = penalty.split()[2]
    return len(others) <= 1 and all(type(leaf) is GroupLasso for _, leaf in others)


# ---------------------------------------------------------------- penalties


@dataclass(frozen=True)
class Form:
    """l1 Σ|w| + l2 Σw² + Σ_g strength_g ‖w_g‖ of a flat array of weights.

    Args:
        l1, l2: the strengths of the elastic net.
        each: the group of each entry, -1 if it is in none.
        strengths: the strength of each group.
    """

    l1: float
    l2: float
    each: Any
    strengths: Any

    @classmethod
    def of(cls, penalty: Penalty, shape: tuple[int, int]) -> Form:
        """Return the form of a penalty that `knows` accepts, for weights of a shape."""
        l1, l2, others = penalty.split()
        each, strengths = np.full(shape[0] * shape[1], -1), np.zeros(0)
        for strength, leaf in others:
            assert isinstance(leaf, GroupLasso)
            groups = grouping(leaf.per, shape)
            numbers = torch.arange(groups.count, dtype=torch.float64, device="cpu")
            nowhere = torch.full(shape, -1.0, dtype=torch.float64, device="cpu")
            each = groups.restore(groups.spread(numbers).expand(groups.shape), nowhere).reshape(-1).long().numpy()
            sizes = np.bincount(each[each >= 0], minlength=groups.count)
            strengths = float(strength) * np.sqrt(sizes)
        return cls(float(l1), float(l2), each, strengths)

    def times(self, strength: float) -> Form:
        """Return the form times a strength."""
        return Form(strength * self.l1, strength * self.l2, self.each, strength * self.strengths)

    def on(self, support: Any) -> Form:
        """Return the form of some entries; the others are zero."""
        return Form(self.l1, self.l2, self.each[support], self.strengths)

    @property
    def free(self) -> Any:
        """The mask of entries that no penalty makes zero."""
        return self.each < 0 if self.l1 == 0 else np.zeros(len(self.each), dtype=bool)

    def value(self, w: Any) -> float:
        """Return the penalty."""
        return float(self.l1 * np.abs(w).sum() + self.l2 * w @ w + self.strengths @ np.sqrt(self._sums(w * w)))

    def prox(self, w: Any, t: float) -> Any:
        """Return the proximal map of the penalty without l2 Σw², which counts as smooth."""
        w = np.sign(w) * np.maximum(np.abs(w) - t * self.l1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.maximum(1 - t * self.strengths / np.sqrt(self._sums(w * w)), 0)
        return w * self._spread(np.nan_to_num(left), 1.0)

    def sizes(self, w: Any) -> Any:
        """Return the length of each entry's group; of entries in no group, their own."""
        return np.where(self.each >= 0, self.lengths(w), np.abs(w))

    def lengths(self, w: Any) -> Any:
        """Return the length of each entry's group; one for entries in no group."""
        return self._spread(np.sqrt(self._sums(w * w)), 1.0)

    def slope(self, w: Any) -> Any:
        """Return the gradient where no entry under a Σ|w| and no group is zero."""
        return self.l1 * np.sign(w) + 2 * self.l2 * w + self._spread(self.strengths, 0.0) / self.lengths(w) * w

    def bend(self, w: Any) -> Bend:
        """Return the Hessian where no group is zero: of a group, (I - u uᵀ) strength / ‖w_g‖."""
        lengths = self.lengths(w)
        scale = self._spread(self.strengths, 0.0) / lengths
        order = np.argsort(self.each, kind="stable")
        order = order[self.each[order] >= 0]
        return Bend(
            2 * self.l2 + scale, scale, w / lengths, order, np.flatnonzero(np.diff(self.each[order], prepend=-1))
        )

    def stopped(self, w: Any, before: Any) -> Any:
        """Return w with zeros where an entry's sign or a group's direction turned round."""
        found = np.where((self.l1 > 0) & (w * before < 0), 0.0, w)
        return np.where(self._spread(self._sums(found * before) <= 0, 0.0) > 0, 0.0, found)

    def _sums(self, values: Any) -> Any:
        """Return the sum of each group."""
        inside = self.each >= 0
        return np.bincount(self.each[inside], values[inside], minlength=len(self.strengths))

    def _spread(self, values: Any, otherwise: float) -> Any:
        """Return the value of each entry's group; `otherwise` for entries in no group."""
        return np.append(values, otherwise)[self.each]


@dataclass(frozen=True)
class Bend:
    """The Hessian diag(d) - Σ_g s_g u_g u_gᵀ of a penalty.

    Args:
        diagonal: d.
        scale: s of each entry's group, 0 for entries in no group.
        unit: u, of length one in each group.
        order: the entries in groups, group by group.
        starts: where in `order` a group begins.
    """

    diagonal: Any
    scale: Any
    unit: Any
    order: Any
    starts: Any

    def add_to(self, hessian: Any) -> None:
        """Add it to a matrix in place."""
        for entries in np.split(self.order, self.starts[1:]):
            u = self.unit[entries]
            hessian[np.ix_(entries, entries)] -= self.scale[entries[:1]] * np.outer(u, u)
        hessian[np.diag_indices(len(self.diagonal))] += self.diagonal

    def over_groups(self, columns: Any) -> Any:
        """Return the sums of columns over each group."""
        return np.add.reduceat(columns[..., self.order], self.starts, axis=-1)


# ---------------------------------------------------------------- losses


class Loss(Protocol):
    """A smooth loss of weights and of intercepts, one for each output or none."""

    bound: float  # of the Hessian's eigenvalues, by the weights

    def gradient(self, w: Any, b: Any) -> tuple[Any, Any]:
        """Return the gradient by the weights and by the intercepts."""

    def on(self, support: Any) -> OnSupport:
        """Return the loss of the weights on a support, all others zero."""


class OnSupport(Protocol):
    """A loss of some weights v and the intercepts b."""

    def value(self, v: Any, b: Any) -> float:
        """Return the loss."""

    def slope(self, v: Any, b: Any) -> Any:
        """Return its gradient by v, then by b."""

    def solved(self, v: Any, b: Any, bend: Bend, slope: Any) -> Any:
        """Return (its Hessian + bend)⁻¹ slope; None if that matrix is singular."""


class Squares:
    """Σ (y - x wᵀ)² / (n outputs) of centred inputs and targets, without intercepts.

    Args:
        x: inputs (n, features).
        y: targets (n, outputs).
        spread: the greatest eigenvalue of xᵀx / n, or more.
    """

    def __init__(self, x: Any, y: Any, spread: float) -> None:
        self.x, self.y = np.asfortranarray(x), y
        self.scale: float = 2 / y.size
        self.bound = self.scale * len(x) * spread
        self.products = Products(self.x)

    def gradient(self, w: Any, b: Any) -> tuple[Any, Any]:
        """Return the gradient by the weights; there are no intercepts."""
        error = _product(self.x, w.reshape(self.y.shape[1], -1)) - self.y
        return self.scale * (error.T @ self.x).reshape(-1), b

    def on(self, support: Any) -> OnSupport:
        """Return the loss of the weights on a support."""
        return _OnSquares(self, support)


class _OnSquares:
    def __init__(self, whole: Squares, support: Any) -> None:
        self.whole = whole
        self.own, self.features = np.divmod(support, whole.x.shape[1])
        self.x = whole.x[:, self.features]

    def _error(self, v: Any) -> Any:
        return _by_output(self.x, v, self.own, self.whole.y.shape[1]) - self.whole.y

    def value(self, v: Any, b: Any) -> float:
        return float(np.square(self._error(v)).sum()) * self.whole.scale / 2

    def slope(self, v: Any, b: Any) -> Any:
        return self.whole.scale * _of_outputs(self.x, self._error(v), self.own)

    def solved(self, v: Any, b: Any, bend: Bend, slope: Any) -> Any:
        wide = len(v) > _WIDE * len(self.x) and self.whole.y.shape[1] == 1
        if wide and bend.diagonal.min() > 0 and (found := self._by_samples(bend, slope)) is not None:
            return found
        hessian = self.whole.scale * len(self.x) * self.whole.products.of(self.features)
        if self.whole.y.shape[1] > 1:
            hessian *= self.own[:, None] == self.own
        bend.add_to(hessian)
        return _solved(hessian, slope)

    def _by_samples(self, bend: Bend, slope: Any) -> Any:
        """Return the solution by systems of the samples' and of the groups' size (Woodbury).

        With A = diag(d) + scale xᵀx, M = I / scale + x diag(1/d) xᵀ, and U the u_g as columns, the
        Hessian is A - U diag(s) Uᵀ, and Uᵀ A⁻¹ U = diag(1/d) - Yᵀ M⁻¹ Y with Y = x diag(1/d) U.
        """
        d, first = bend.diagonal, bend.order[bend.starts]
        samples = dsyrk(1.0, self.x / np.sqrt(d), lower=1)
        samples[np.diag_indices(len(samples))] += 1 / self.whole.scale
        try:
            factor = cho_factor(samples, lower=True, overwrite_a=True, check_finite=False)
            y = bend.over_groups(self.x * (bend.unit / d))
            half = solve_triangular(factor[0], y, lower=True, check_finite=False)
            groups = dsyrk(1.0, half, trans=1, lower=1)
            groups[np.diag_indices(len(groups))] += 1 / bend.scale[first] - 1 / d[first]
            inner = cho_factor(groups, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return None

        def without_groups(r: Any) -> Any:
            return (r - self.x.T @ cho_solve(factor, self.x @ (r / d), check_finite=False)) / d

        found = without_groups(slope)
        share = np.zeros_like(found)
        of_groups = cho_solve(inner, bend.over_groups(bend.unit * found), check_finite=False)
        share[bend.order] = np.repeat(of_groups, np.diff(bend.starts, append=len(bend.order)))
        return found + without_groups(bend.unit * share)


class CrossEntropy:
    """The mean of log Σ exp(outputs) - output of the class; outputs x wᵀ + b.

    Args:
        x: inputs (n, features).
        y: one-hot classes (n, classes).
        spread: the greatest eigenvalue of xᵀx / n, or more.
    """

    def __init__(self, x: Any, y: Any, spread: float) -> None:
        self.x, self.y, self.bound = np.asfortranarray(x), y, spread / 2

    def gradient(self, w: Any, b: Any) -> tuple[Any, Any]:
        """Return the gradient by the weights and by the intercepts."""
        error = (_shares(_product(self.x, w.reshape(len(b), -1)) + b)[0] - self.y) / len(self.x)
        return (error.T @ self.x).reshape(-1), error.sum(0)

    def on(self, support: Any) -> OnSupport:
        """Return the loss of the weights on a support."""
        return _OnCrossEntropy(self, support)


class _OnCrossEntropy:
    def __init__(self, whole: CrossEntropy, support: Any) -> None:
        self.own, features = np.divmod(support, whole.x.shape[1])
        self.x, self.y = whole.x[:, features], whole.y

    def _outputs(self, v: Any, b: Any) -> Any:
        return _by_output(self.x, v, self.own, len(b)) + b

    def value(self, v: Any, b: Any) -> float:
        output = self._outputs(v, b)
        return float((_shares(output)[1] - (output * self.y).sum(1)).mean())

    def slope(self, v: Any, b: Any) -> Any:
        error = (_shares(self._outputs(v, b))[0] - self.y) / len(self.y)
        return np.append(_of_outputs(self.x, error, self.own), error.sum(0))

    def bend(self, v: Any, b: Any) -> Any:
        p, count = _shares(self._outputs(v, b))[0], len(self.y)
        own = np.append(self.own, np.arange(len(b)))
        x = np.concatenate([self.x, np.ones((count, len(b)))], 1)
        q = p[:, own] * x
        found = (np.where(own[:, None] == own, x.T @ q, 0.0) - q.T @ q) / count
        found[len(v) :, len(v) :] += 1 / len(b)  # one constant for all outputs changes nothing
        return found

    def solved(self, v: Any, b: Any, bend: Bend, slope: Any) -> Any:
        hessian = self.bend(v, b)
        bend.add_to(hessian[: len(v), : len(v)])
        return _solved(hessian, slope)


def _product(x: Any, w: Any) -> Any:
    """Return x wᵀ, in less time if most features have no weights."""
    on = np.flatnonzero(w.any(0))
    return x[:, on] @ w[:, on].T if len(on) < x.shape[1] // 4 else x @ w.T


def _by_output(x: Any, v: Any, own: Any, outputs: int) -> Any:
    """Return the sums (n, outputs) of the products x v of entries of which output `own` tells."""
    return np.stack([x[:, own == k] @ v[own == k] for k in range(outputs)], 1) if outputs > 1 else (x @ v)[:, None]


def _of_outputs(x: Any, error: Any, own: Any) -> Any:
    """Return the sums over samples of each entry's column and its output's error."""
    if error.shape[1] == 1:
        return x.T @ error[:, 0]
    return np.einsum("nk,nk->k", x, error[:, own])


def _shares(output: Any) -> tuple[Any, Any]:
    """Return (softmax, log Σ exp) of each row."""
    top = output.max(1, keepdims=True)
    powers = np.exp(output - top)
    sums = powers.sum(1, keepdims=True)
    return powers / sums, (np.log(sums) + top)[:, 0]


def _solved(hessian: Any, slope: Any) -> Any:
    """Return the solution of the system, with a small ridge; None if the matrix is indefinite."""
    top = float(hessian.diagonal().max(initial=0.0)) or 1.0
    diagonal = np.diag_indices(len(hessian))
    for ridge in _RIDGES:
        hessian[diagonal] += ridge * top
        try:
            return cho_solve(cho_factor(hessian, check_finite=False), slope, check_finite=False)
        except LinAlgError:
            continue
    return None
