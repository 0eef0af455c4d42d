"""Constraints on a tensor as a matrix: on its singular values, rank and symmetry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from restrain.axes import Grouping
from restrain.errors import TransformError
from restrain.fields import is_whole
from restrain.named_tensors import Location
from restrain.penalties.unfold import (
    Rows,
    SpectralMap,
    by_matrix,
    change_singular_values,
    checked_rows,
    from_matrix,
    of_one_matrix,
    svd,
    to_matrix,
    unfolding,
    unfolding_at,
)
from restrain.transforms.base import Constraint, checked_number, slack, wide
from restrain.transforms.metric import symmetric
from restrain.transforms.sets import to_simplex


class _OfMatrix(Constraint, register=False):
    """Base of constraints on the tensor as a matrix, whose rows are the axes `rows`."""

    rows: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", checked_rows(self.rows))

    def bound_to(self, at: Location) -> Constraint:
        groups = unfolding_at(self.rows, at, transposable=True)
        one = dataclasses.replace(self, rows=of_one_matrix(groups) if groups.stack else groups)  # type: ignore[type-var]
        return _OfEach(one, groups) if groups.stack else one

    def project(self, w: Tensor) -> Tensor:
        wide(w)
        groups = unfolding(self.rows, w.shape)
        return change_singular_values(w, groups, lambda s: self._changed(s, slack(w, len(s) ** 0.5)))

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        if not v.numel():
            return v.clone()
        groups = unfolding(self.rows, v.shape)
        z: Tensor = SpectralMap.apply(to_matrix(wide(v), groups), self)  # type: ignore[no-untyped-call]
        return from_matrix(z, groups, tuple(v.shape)).to(v.dtype)

    def mapped(self, s: Tensor) -> Tensor:
        """Return the singular values of the parametrised weight, given those of v."""
        return self._changed(s, 0.0)

    def slopes(self, s: Tensor, f: Tensor) -> Tensor:
        """Return (f_i - f_j) / (s_i - s_j) at s_i = s_j: 1 (true) if f keeps s, else 0 (false)."""
        return f == s

    def pulled(self, s: Tensor, f: Tensor, v: Tensor) -> Tensor:
        """Return v times the derivative of f; here each f_i depends on s_i alone."""
        return v * self.slopes(s, f)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        groups = unfolding(self.rows, w.shape)
        if not w.numel():
            return v.clone()
        matrix, movement = to_matrix(wide(w), groups), to_matrix(wide(v), groups)
        moved = self._tangent(matrix, movement, slack(w, 2 * min(matrix.shape) ** 0.5))
        return from_matrix(moved, groups, tuple(v.shape)).to(v.dtype)

    def _changed(self, s: Tensor, slack: float) -> Tensor:
        """Return the singular values of the projection; `s` itself if within the slack."""
        raise NotImplementedError

    def _tangent(self, matrix: Tensor, movement: Tensor, slack: float) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class _OfEach(Constraint, register=False):
    """A constraint on each of the matrices that a tensor stacks, such as one for each expert."""

    constraint: _OfMatrix
    groups: Grouping

    def __repr__(self) -> str:
        return repr(self.constraint)

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """True if the set of each matrix is convex."""
        return self.constraint.convex

    @property
    def cone(self) -> bool:  # type: ignore[override]
        """True if the set of each matrix is a cone."""
        return self.constraint.cone

    @property
    def has_tangent(self) -> bool:  # type: ignore[override]
        """True if the constraint's tangent is known."""
        return self.constraint.has_tangent

    @property
    def has_metric(self) -> bool:
        """True if the constraint's projection is known for steps that differ by entry."""
        return self.constraint.has_metric

    @property
    def by_tangent(self) -> bool:  # type: ignore[override]
        """True if the constraint keeps gradients in the tangent."""
        return self.constraint.by_tangent

    def project(self, w: Tensor) -> Tensor:
        return by_matrix(self.constraint.project, self.groups, w)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        if not (isinstance(step, Tensor) and step.dim()):
            return self.project(w)
        return by_matrix(self.constraint.project_by, self.groups, w, step)

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return by_matrix(self.constraint.from_free, self.groups, v)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return by_matrix(self.constraint.tangent, self.groups, w, v)


@dataclass(frozen=True)
class Orthogonal(_OfMatrix):
    """W Wᴴ = I, or Wᴴ W = I if W has more rows than columns: W becomes its polar factor U Vᴴ.

    If W doesn't have full rank, several orthogonal matrices are equally near, and W becomes one of
    them.

    Args:
        rows: the axes that are the rows of the matrix: a name or dim as in `per=`, or several dims
            (see `unfold`).

    Raises:
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`.

    Source: Fan and Hoffman (1955), theorem 1; Edelman, Arias and Smith (1998), section 2.2, for the
    tangent.

    >>> rs.Orthogonal().project(torch.tensor([[2.0, 0.0], [0.0, -3.0]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """

    rows: Rows = "out"

    by_tangent = True

    def _changed(self, s: Tensor, slack: float) -> Tensor:
        return torch.where((s - 1).abs().amax() <= slack, s, 1 + 0 * s)  # NaN stays

    def mapped(self, s: Tensor) -> Tensor:
        return 1 + 0 * s

    def slopes(self, s: Tensor, f: Tensor) -> Tensor:
        return torch.zeros_like(s)

    def _tangent(self, matrix: Tensor, movement: Tensor, slack: float) -> Tensor:
        if matrix.shape[0] > matrix.shape[1]:
            return movement - matrix @ _hermitian(matrix.mH @ movement)
        return movement - _hermitian(movement @ matrix.mH) @ matrix


@dataclass(frozen=True)
class SpectralBall(_OfMatrix):
    """σ ≤ radius for every singular value σ: greater singular values are cut.

    Then the layer lengthens no vector by a factor above `radius`.

    Args:
        radius: the greatest spectral norm, above zero.
        rows: the axes that are the rows of the matrix; see `Orthogonal`.

    Raises:
        TransformError: `radius` isn't a finite number above zero.
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`.

    Source: Sedghi, Gupta and Long (2019), who constrain a convolution's operator.

    >>> rs.SpectralBall(1.0).project(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    radius: float
    rows: Rows = "out"

    keywords = ("spectral_ball",)
    convex = True

    def __post_init__(self) -> None:
        checked_number("radius", self.radius, "a finite number above zero", 0, inf, closed=False)
        _OfMatrix.__post_init__(self)

    def _changed(self, s: Tensor, slack: float) -> Tensor:
        return torch.where(s[0] <= self.radius * (1 + slack), s, s.clamp_max(self.radius))

    def _tangent(self, matrix: Tensor, movement: Tensor, slack: float) -> Tensor:
        # Remove the growth of singular values at the bound: the positive part of Uᴴ M V there
        u, s, vh = svd(matrix)
        greatest = (s >= self.radius * (1 - slack)).to(s.dtype)
        u, vh = u * greatest, vh * greatest[:, None]
        inner = _hermitian(u.mH @ movement @ vh.mH)
        finite = inner.isfinite().all()  # LAPACK would raise
        values, vectors = torch.linalg.eigh(torch.where(finite, inner, 0))
        values = torch.where(finite, values, torch.nan)
        rising: Tensor = u @ ((vectors * values.clamp_min(0)) @ vectors.mH) @ vh
        return movement - rising


@dataclass(frozen=True)
class NuclearBall(_OfMatrix):
    """Σ σ ≤ radius: otherwise singular values σ are soft-thresholded, often to a low rank.

    Args:
        radius: the greatest nuclear norm, above zero.
        rows: the axes that are the rows of the matrix; see `Orthogonal`.

    Raises:
        TransformError: `radius` isn't a finite number above zero.
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`.

    Source: Cai, Candès and Shen (2010) for the threshold; Duchi and others (2008) for its height.

    >>> rs.NuclearBall(2.0).project(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    tensor([[2., 0.],
            [0., 0.]])
    """

    radius: float
    rows: Rows = "out"

    keywords = ("nuclear_ball",)
    convex = True
    tangent = Constraint.tangent  # no formula is known

    def __post_init__(self) -> None:
        checked_number("radius", self.radius, "a finite number above zero", 0, inf, closed=False)
        _OfMatrix.__post_init__(self)

    def _changed(self, s: Tensor, slack: float) -> Tensor:
        return torch.where(s.sum() <= self.radius * (1 + slack), s, to_simplex(s, self.radius))

    def slopes(self, s: Tensor, f: Tensor) -> Tensor:
        return f > 0

    def pulled(self, s: Tensor, f: Tensor, v: Tensor) -> Tensor:
        alive = (f > 0).to(s.dtype)
        level = (alive * v).sum() / alive.sum().clamp_min(1)  # derivative of the threshold's height
        return torch.where((f == s).all(), v, alive * (v - level))


@dataclass(frozen=True)
class LowRank(_OfMatrix):
    """rank ≤ k: the k largest singular values stay, the other singular values become zero.

    If the k-th and the next singular value are equal, several matrices are equally near, and W
    becomes one of them. Singular values that are zero up to rounding count as zero.

    Args:
        k: the greatest rank, one or more.
        rows: the axes that are the rows of the matrix; see `Orthogonal`.

    Raises:
        TransformError: `k` isn't a whole number, one or more.
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`.

    Source: Eckart and Young (1936); Schneider and Uschmajew (2015), theorem 3.2, for the tangent.

    >>> rs.LowRank(1).project(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor([[2., 0.],
            [0., 0.]])
    """

    k: int
    rows: Rows = "out"

    keywords = ("low_rank",)
    cone = True
    by_tangent = True

    def __post_init__(self) -> None:
        if not is_whole(self.k, 1):
            raise TransformError(f"k= is a whole number, one or more; got {self.k!r}")
        _OfMatrix.__post_init__(self)

    def _changed(self, s: Tensor, slack: float) -> Tensor:
        if self.k >= len(s):
            return s
        kept = s * (torch.arange(len(s), device=s.device) < self.k)
        return torch.where(s[self.k] <= slack * s[0], s, kept)

    def _tangent(self, matrix: Tensor, movement: Tensor, slack: float) -> Tensor:
        u, s, vh = svd(matrix)
        there = (s > slack * s[0]) & (torch.arange(len(s), device=s.device) < self.k)
        u, vh = u * there, vh * there[:, None]
        across = movement - u @ (u.mH @ movement)
        beside, along, others = svd(across - (across @ vh.mH) @ vh)  # growth of the rank
        along = along * (torch.arange(len(s), device=s.device) >= self.k - there.sum())
        rising: Tensor = (beside * along) @ others
        return movement - rising


def _hermitian(a: Tensor) -> Tensor:
    return (a + a.mH) / 2


@dataclass(frozen=True)
class Symmetric(Constraint):
    """W = Wᵀ for a square matrix, which becomes (W + Wᵀ) / 2, not conjugated if complex.

    Raises:
        TransformError: a tensor that isn't a square matrix.

    >>> rs.Symmetric().project(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[1., 1.],
            [1., 1.]])
    """

    convex = True
    cone = True
    by_tangent = True  # so that steps are symmetric, too

    def project(self, w: Tensor) -> Tensor:
        x = wide(w)
        if x.dim() != 2 or x.shape[0] != x.shape[1]:
            raise TransformError(f"Symmetric needs a square matrix, got a tensor of shape {tuple(w.shape)}")
        return torch.where(x == x.mT, x, x / 2 + x.mT / 2).to(w.dtype)

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        if not isinstance(step, Tensor) or not step.dim() or w.is_complex():
            return self.project(w)
        return symmetric(wide(w), step).to(w.dtype)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return self.project(v)

    def bound_to(self, at: Location) -> Symmetric:
        self.project(at.tensor.detach())
        return self
