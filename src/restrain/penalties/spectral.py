"""Penalties of a tensor as a matrix: singular values, and angles between rows or columns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from restrain.axes import Grouping, group_norms, squared
from restrain.errors import PenaltyError
from restrain.fields import check_flags, is_number, is_one_of
from restrain.named_tensors import Location
from restrain.penalties.base import Penalty, Tensors
from restrain.penalties.shrink import cut_groups, one_step, shrink_entries
from restrain.penalties.unfold import (
    Rows,
    by_matrix,
    change_singular_values,
    checked_rows,
    matrices,
    of_one_matrix,
    singular_values,
    to_matrix,
    unfolding,
    unfolding_at,
)
from restrain.rules import How


@dataclass(frozen=True)
class _OfMatrix(Penalty, register=False):
    """Base of penalties of a matrix; `rows` names the axes that index its rows."""

    rows: Rows = "out"

    transposable: ClassVar[bool] = True  # the value is the same for the transposed matrix

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", checked_rows(self.rows))

    def bound_to(self, at: Location) -> Penalty:
        groups = unfolding_at(self.rows, at, self.transposable)
        one = dataclasses.replace(self, rows=of_one_matrix(groups) if groups.stack else groups)
        return _OfEach(one, groups) if groups.stack else one

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise PenaltyError(
                f"{self!r} is of a weight as a matrix; the matrix of an output would have the batch as an axis, and so "
                "mix its samples: select parameters, for instance by rs.weights"
            )
        return Penalty.moments(self, at_places)


@dataclass(frozen=True)
class _OfEach(Penalty, register=False):
    """Sum of a penalty over the matrices that a tensor stacks, such as one for each expert."""

    penalty: _OfMatrix
    groups: Grouping

    def __repr__(self) -> str:
        return repr(self.penalty)

    @property
    def has_prox(self) -> bool:
        return self.penalty.has_prox

    def __call__(self, w: Tensors) -> Tensor:
        return torch.stack([self.penalty(matrix) for matrix in matrices(w, self.groups)]).sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return by_matrix(lambda matrix: self.penalty.prox(matrix, one_step(step, self)), self.groups, w)


@dataclass(frozen=True)
class NuclearNorm(_OfMatrix):
    """Σ σ: the sum of the singular values. With how="proximal", matrices get a low rank.

    The prox is a soft threshold of the singular values. The gradient is U Vᴴ over the singular
    values that aren't zero up to rounding, hence finite at any rank.

    Args:
        rows: the axes that index the rows of the matrix: a name or dim as for `per=`, or a tuple of
            dims (see `unfold`).

    Raises:
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`; activations.

    Source: Fazel (2002); Cai, Candès and Shen (2010), theorem 2.1, for the prox.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> rs.NuclearNorm()(w), rs.NuclearNorm().prox(w, step=1.0)
    (tensor(4.), tensor([[2., 0.],
            [0., 0.]]))
    """

    keywords = ("nuclear_norm",)

    def __call__(self, w: Tensors) -> Tensor:
        matrix = to_matrix(w, unfolding(self.rows, w.shape))
        s = singular_values(matrix)
        zero = s <= s[:1] * (torch.finfo(s.dtype).eps * max(matrix.shape))
        return torch.where(zero, s.detach(), s).sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        groups, step = unfolding(self.rows, w.shape), one_step(step, self)
        return change_singular_values(w, groups, lambda s: shrink_entries(s, step, 1.0, 0.0))


@dataclass(frozen=True)
class SpectralNorm(_OfMatrix):
    """The largest singular value: how much the matrix can lengthen a vector.

    The prox lowers the largest singular values to a common level, as the prox of `Norm(inf)` lowers
    entries. The gradient is u₁ v₁ᴴ, and zero at zero.

    Args:
        rows: the axes that index the rows of the matrix, as in `NuclearNorm`. A convolution's
            matrix (out, the rest) isn't the operator that it applies to an image: that operator's
            norm is at most √(kernel entries) times the matrix norm.

    Raises:
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`; activations.

    Source: Yoshida and Miyato (2017), who square it; Parikh and Boyd (2014), section 6.7, for the
    prox; Tsuzuku, Sato and Sugiyama (2018) for the bound.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> rs.SpectralNorm()(w), rs.SpectralNorm().prox(w, step=0.5)
    (tensor(3.), tensor([[2.5000, 0.0000],
            [0.0000, 1.0000]]))
    """

    keywords = ("spectral_norm",)

    def __call__(self, w: Tensors) -> Tensor:
        first = singular_values(to_matrix(w, unfolding(self.rows, w.shape)))[:1]  # empty for an empty tensor
        return torch.where(first == 0, first.detach(), first).sum()

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        groups, step = unfolding(self.rows, w.shape), one_step(step, self)
        return change_singular_values(w, groups, lambda s: cut_groups(s, Grouping((s.numel(),), ()), step))


@dataclass(frozen=True)
class Orthogonality(_OfMatrix):
    """Σ |W Wᴴ - I|^power: zero if the rows of the matrix are orthogonal and of length one.

    With `off_diagonal` the sum is over pairs of different rows, Σ_{i≠j} |w_i · w_j|^power: lengths
    don't count. With `normalized` it is over the same pairs of rows scaled to length one: cosines;
    rows of zeros add nothing. More rows than columns can't all be orthogonal; then use
    `of="columns"`.

    Keras' OrthogonalRegularizer is `factor / (n (n - 1))` times `Orthogonality(normalized=True,
    power=1)` of n rows.

    Args:
        rows: the axes that index the rows of the matrix, as in `NuclearNorm`.
        of: the vectors to make orthogonal, "rows" or "columns".
        off_diagonal: leave out the lengths.
        normalized: take cosines.
        power: 2 for squares, 1 for absolute values.

    Raises:
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`; activations;
            an invalid setting.

    Source: Xie, Xiong and Pu (2017) with squares; Brock and others (2017) with absolute values.

    >>> rs.Orthogonality()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor(9.)
    """

    of: Literal["rows", "columns"] = "rows"
    off_diagonal: bool = False
    normalized: bool = False
    power: int = 2

    transposable = False

    def __post_init__(self) -> None:
        _OfMatrix.__post_init__(self)
        if not is_one_of(self.of, ("rows", "columns")):
            raise PenaltyError(f"of= is 'rows' or 'columns', got {self.of!r}")
        if not is_number(self.power) or self.power not in (1, 2):
            raise PenaltyError(f"power= is 2 (squares) or 1 (absolute values), got {self.power!r}")
        object.__setattr__(self, "power", int(self.power))
        check_flags(PenaltyError, off_diagonal=self.off_diagonal, normalized=self.normalized)

    def __call__(self, w: Tensors) -> Tensor:
        if not w.numel():
            return torch.abs(w).sum()
        matrix = to_matrix(w, unfolding(self.rows, w.shape))
        matrix = matrix if self.of == "rows" else matrix.mH
        if self.off_diagonal or self.normalized:
            return self._sum(_gram(matrix, self.normalized).fill_diagonal_(0))
        longer = matrix.shape[0] - matrix.shape[1]
        if self.power == 2 and longer > 0:  # W Wᴴ has Wᴴ W's eigenvalues and `longer` zeros: each adds 1
            return self._sum(_minus_one(_gram(matrix.mH))) + longer
        return self._sum(_minus_one(_gram(matrix)))

    def _sum(self, products: Tensor) -> Tensor:
        return squared(products).sum() if self.power == 2 else products.abs().sum()


def _gram(matrix: Tensor, normalized: bool = False) -> Tensor:
    """Return the Gram matrix of the rows; if `normalized`, their cosines."""
    if normalized:
        peak = matrix.detach().abs().amax(1, keepdim=True)  # else squares may overflow or vanish
        matrix = matrix / torch.where(peak < torch.finfo(peak.dtype).tiny, 1, peak)
        norms = group_norms(matrix, Grouping(tuple(matrix.shape), (0,)))
        matrix = matrix / torch.where(norms < torch.finfo(peak.dtype).tiny, 1, norms)
    gram: Tensor = matrix @ matrix.mH
    return gram


def _minus_one(gram: Tensor) -> Tensor:
    return gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
