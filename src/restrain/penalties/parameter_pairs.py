"""Penalties on parameter pairs: of their difference, and of their product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restrain.errors import PenaltyError, SelectionError
from restrain.fields import check_flags
from restrain.named_tensors import near
from restrain.penalties.base import NetworkPenalty, Penalty, in_float32
from restrain.penalties.entrywise import L2
from restrain.schedule import Strength


class _Pairs(NetworkPenalty, register=False):
    """Base of penalties on parameter pairs; their names have `left` or `right` at a place."""

    takes_frozen = True
    left: str
    right: str

    def __post_init__(self) -> None:
        named = all(isinstance(part, str) and part for part in (self.left, self.right))
        if not named or self.left == self.right:
            raise PenaltyError(
                f"left= and right= are the parts in which the names of a pair differ, such as 'encoder' and 'decoder'; "
                f"got {self.left!r} and {self.right!r}"
            )

    @torch.no_grad()
    def check(self, parameters: Mapping[str, Tensor]) -> None:
        self(parameters, {})

    def _pairs(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, str, Tensor]]:
        """Yield (name, parameter, partner's name, partner) for each pair.

        Raises:
            SelectionError: a selected parameter has no partner, or no pair is selected.
        """
        lefts = [name for name in parameters if self.left in name]
        if not lefts:
            raise SelectionError(f"{self!r}: no selected parameter has {self.left!r} in its name{_names(parameters)}")
        for name in lefts:
            partner = name.replace(self.left, self.right)
            if partner not in parameters:
                raise SelectionError(f"{self!r}: {name!r} has no partner {partner!r}{near(partner, list(parameters))}")
            yield name, parameters[name], partner, parameters[partner]


def _names(parameters: Mapping[str, Tensor]) -> str:
    return near("", list(parameters))


@dataclass(frozen=True)
class Tie(_Pairs):
    """Σ over pairs of penalty(A - B): pulls two parameters together; a frozen one stays.

    `1e-2 * rs.Tie("encoder", "decoder").on("*.weight")` pairs each parameter that has "encoder" in
    its name with the parameter that has "decoder" instead.

    Args:
        left: the part of A's name that differs.
        right: the part of B's name in its place.
        penalty: a penalty of the difference.
        transposed: compare A with the transpose of B, as in a tied autoencoder.

    Raises:
        SelectionError: a parameter without a partner, or no pair.
        PenaltyError: partners of different shapes.

    >>> ones = {"encoder.weight": torch.ones(2, 3), "decoder.weight": torch.zeros(3, 2)}
    >>> rs.Tie("encoder", "decoder", transposed=True)(ones, {})
    tensor(6.)
    """

    left: str
    right: str
    penalty: Penalty = field(default_factory=L2)
    transposed: bool = False

    def __post_init__(self) -> None:
        _Pairs.__post_init__(self)
        check_flags(PenaltyError, transposed=self.transposed)
        if not isinstance(self.penalty, Penalty):
            raise PenaltyError(f"Tie takes a penalty of the difference, such as L2(); got {self.penalty!r}")

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for name, a, partner, b in self._pairs(parameters):
            other = b.mT if self.transposed and b.dim() > 1 else b
            if a.shape != other.shape:
                how = "" if self.transposed else "; or say transposed=True"
                raise PenaltyError(
                    f"{self!r}: {name!r} has the shape {tuple(a.shape)}, {partner!r} has {tuple(b.shape)}: leave the "
                    f"pair out of the selection{how}"
                )
            terms.append(self.penalty(a - other.to(a.device)))
        return sum(terms[1:], terms[0])

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> Tie:
        return dataclasses.replace(self, penalty=self.penalty.with_strengths(live))


@dataclass(frozen=True)
class ProductNorm(_Pairs):
    """Σ over pairs of ‖B A‖_F² = Σ (BᵀB) ∘ (A Aᵀ): the size of low-rank updates B A.

    Decay of the factors A and B isn't decay of their product; this penalty is. B A is not formed:
    for B (out, r) and A (r, in) it costs r² (out + in) instead of r · out · in.

    Args:
        left: the part of B's name that differs.
        right: the part of A's name in its place.

    Raises:
        SelectionError: a parameter without a partner, or no pair.
        PenaltyError: shapes that can't be multiplied.

    >>> factors = {"lora_B.weight": torch.ones(3, 1), "lora_A.weight": torch.full((1, 2), 2.0)}
    >>> rs.ProductNorm()(factors, {})
    tensor(24.)
    """

    left: str = "lora_B"
    right: str = "lora_A"

    keywords = ("product_norm",)

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for name, b, partner, a in self._pairs(parameters):
            if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
                raise PenaltyError(
                    f"{self!r}: {name!r} of shape {tuple(b.shape)} times {partner!r} of shape {tuple(a.shape)} is no "
                    "product of matrices (out, r) and (r, in); swap left= and right=?"
                )
            gram = in_float32(lambda x: x.mH @ x, b)
            terms.append((gram * in_float32(lambda x: (x @ x.mH).conj(), a).to(gram.device)).sum().real)
        return sum(terms[1:], terms[0])
