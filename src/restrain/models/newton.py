"""Newton steps of a linear problem on the support that proximal gradient found.

Where the zeros are known, loss + penalty is smooth in the entries that aren't zero: a few steps
with its Hessian take the place of thousands of proximal steps. Known for elastic nets and group
lassos, also together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restrain.axes import grouping
from restrain.penalties import GroupLasso, Penalty

_STEPS, _HALVINGS, _LARGEST = 25, 6, 2000


class Support:
    """Loss + penalty as a function of the entries of w that aren't zero and the intercept.

    Args:
        problem: the loss, `loss(w, b)`, `gradient(w, b)` and `shares(w, b)`.
        penalty: a penalty that `knows` accepts.
        w: weights (outputs, features), of which some are zero.
        b: the intercept.
    """

    def __init__(self, problem: Any, penalty: Penalty, w: Tensor, b: Tensor) -> None:
        self.problem, self.penalty, self.b = problem, penalty, b
        self.mask = w != 0
        self.v = w[self.mask]
        self.rows, self.columns = self.mask.nonzero(as_tuple=True)
        _, self.l2, others = penalty.split()
        self.groups = [self._members(float(strength), leaf, w) for strength, leaf in others]

    def _members(self, strength: float, leaf: Penalty, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (group of each entry, strength of each group) of a group lasso."""
        assert isinstance(leaf, GroupLasso)
        groups = grouping(leaf.per, w.shape)
        numbers = torch.arange(groups.count, dtype=torch.float64, device="cpu")
        spread = groups.spread(numbers).expand(groups.shape)
        each = groups.restore(spread, torch.full_like(w, -1.0)).long()
        sizes = torch.bincount(each[each >= 0], minlength=groups.count)
        return each[self.mask], strength * sizes.double().sqrt()

    def whole(self, v: Tensor) -> Tensor:
        """Return the weights with zeros."""
        found = torch.zeros(self.mask.shape, dtype=torch.float64, device="cpu")
        found[self.mask] = v
        return found

    def value(self, v: Tensor, b: Tensor) -> float:
        """Return loss + penalty."""
        w = self.whole(v)
        return float(self.problem.loss(w, b) + self.penalty(w))

    def slope(self, v: Tensor, b: Tensor) -> Tensor:
        """Return the gradient by the entries, then by the intercept."""
        w = self.whole(v)
        gradient, free = self.problem.gradient(w, b)
        return torch.cat([(gradient + self.penalty.gradient(w))[self.mask], free])

    def bend(self, v: Tensor, b: Tensor) -> Tensor:
        """Return the Hessian by the entries, then by the intercept."""
        count, outputs = len(v), len(b)
        x = torch.cat([self.problem.x[:, self.columns], torch.ones_like(self.problem.x[:, :1]).expand(-1, outputs)], 1)
        own = torch.cat([self.rows, torch.arange(outputs, device="cpu")])
        shares = self.problem.shares(self.whole(v), b)
        if shares is None:  # of squared errors: the same for all samples, outputs apart
            found = x.T @ x * (2 / (len(x) * outputs))
            found = torch.where(own[:, None] == own, found, 0.0)
        else:
            p = shares[:, own] * x
            found = torch.where(own[:, None] == own, x.T @ p, 0.0) / len(x) - p.T @ p / len(x)
            found[count:, count:] += 1 / outputs  # one constant for all outputs changes nothing
        found[:count, :count].diagonal().add_(2 * float(self.l2))
        for each, strengths in self.groups:
            self._add(found, v, each, strengths)
        return found

    def _add(self, found: Tensor, v: Tensor, each: Tensor, strengths: Tensor) -> None:
        """Add the Hessian of Σ strength ‖v_g‖: (I - u uᵀ) strength / ‖v_g‖ with u = v_g / ‖v_g‖."""
        inside = each >= 0
        place = each.clamp_min(0)
        lengths = torch.zeros_like(strengths).index_add_(0, place, torch.where(inside, v.square(), 0.0)).sqrt()
        scale = torch.where(inside, strengths[place] / lengths[place], 0.0)
        unit = torch.where(inside, v / lengths[place], 0.0)
        order = torch.argsort(each, stable=True)
        for entries in order.split(each[order].unique_consecutive(return_counts=True)[1].tolist()):
            if inside[entries[0]]:
                u = unit[entries]
                found[entries[:, None], entries] -= scale[entries[0]] * torch.outer(u, u)
        found[: len(v), : len(v)].diagonal().add_(scale)


def knows(penalty: Penalty) -> bool:
    """Return True if the penalty's Hessian on a support is known."""
    return all(isinstance(leaf, GroupLasso) for _, leaf in penalty.split()[2])


def polished(problem: Any, penalty: Penalty, w: Tensor, b: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Return (weights, intercept) with a gradient of at most `tolerance` on the support of w.

    None if an entry or group would cross zero, the steps don't get there, or there are too many
    entries for a Hessian.
    """
    support = Support(problem, penalty, w, b)
    if len(support.v) > _LARGEST:
        return None
    v, value = support.v, support.value(support.v, b)
    for _ in range(_STEPS):
        slope = support.slope(v, b)
        if float(slope.abs().max()) <= tolerance:
            return support.whole(v), b
        factor, failed = torch.linalg.cholesky_ex(support.bend(v, b))
        if bool(failed):
            return None
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        for halving in range(_HALVINGS):
            t = 0.5**halving
            u, c = v - t * step[: len(v)], b - t * step[len(v) :]
            now = support.value(u, c)
            if now <= value + 1e-13 * abs(value):
                break
        else:
            return None
        if _crossed(support, v, u):
            return None
        v, b, value = u, c, now
    return None


def _crossed(support: Support, v: Tensor, u: Tensor) -> bool:
    """Return True if an entry under a Σ|x| changed its sign, or a group shrank to a hundredth."""
    if support.penalty.split()[0] and bool((v.sgn() != u.sgn()).any()):
        return True
    for each, strengths in support.groups:
        inside = each >= 0
        zero = torch.zeros_like(strengths)
        before = zero.index_add(0, each[inside], v[inside].square())
        after = zero.index_add(0, each[inside], u[inside].square())
        if bool((after < 1e-4 * before).any()):
            return True
    return False
