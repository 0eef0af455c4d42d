"""Penalties of logits and attention weights, averaged over positions (tokens)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.errors import PenaltyError, SelectionError
from restrain.penalties.base import Penalty, Tensors, checked_axis, checked_setting, in_float32
from restrain.penalties.functorch import as_plain
from restrain.penalties.statistics import unit_axis
from restrain.rules import How


def mean_of_kept(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return the mean of the values that count; zero if there are none."""
    if kept is None:
        return values.sum() / max(values.numel(), 1)
    kept = kept.expand(values.shape)
    return torch.where(kept, values, 0).sum() / kept.sum().clamp_min(1)


@dataclass(frozen=True)
class ZLoss(Penalty):
    """Mean over positions of (log Σ exp z)²: keeps logits from drifting; also of a router's logits.

    A softmax doesn't see a constant that is added to all logits of a position; this penalty holds
    it near zero, which keeps logits small and 16-bit softmaxes exact. Positions are all axes but
    that of the classes: tokens of a language model. With `mask=`, the mean is over those that
    count. PaLM's strength is 1e-4, ST-MoE's for routers 1e-3.

    Args:
        dim: the axis of the classes; by default the last. Required for more than three axes.

    Raises:
        PenaltyError: complex logits, or no such axis.

    Source: Chowdhery and others (2022), PaLM, section 5; Zoph and others (2022), ST-MoE, eq. 5.

    >>> rs.ZLoss()(torch.tensor([[0.0, 0.0], [-20.0, 2.0]]))
    tensor(2.2402)
    """

    dim: int | None = None

    keywords = ("z_loss",)
    takes_mask = True
    at_outputs = True
    by_token = True

    def __post_init__(self) -> None:
        checked_axis("dim", self.dim)

    def __call__(self, w: Tensors) -> Tensor:
        """Return the mean over all positions of a tensor."""
        return self._mean(w, None, None)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return in_float32(lambda x: self._mean(x, dim, mask), h)

    def over_tokens(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.over_batch(h, 0, mask)

    def _mean(self, x: Tensor, batch: int | None, mask: Tensor | None) -> Tensor:
        if x.is_complex():
            raise PenaltyError(f"{self!r} is of real logits, got {x.dtype}")
        x = x.reshape(1) if x.dim() == 0 else x
        axis = unit_axis(x, self.dim, batch, "dim", "classes")
        if mask is not None and mask.shape[axis] != 1:
            raise PenaltyError(f"a mask for {self!r} takes or leaves all classes of a position together")
        if not x.numel():
            return x.sum()
        x = x if mask is None else torch.where(mask, x, 0)
        return mean_of_kept(x.logsumexp(axis).square(), None if mask is None else mask.squeeze(axis))


_FROM_ONE = 0.02  # of the sum of a row of attention weights, in bfloat16 too


@dataclass(frozen=True)
class AttentionEntropy(Penalty):
    """Mean over heads and queries of max(0, floor - H(p)): keeps attention from collapsing.

    H(p) = -Σ p log p, in nats, is the entropy of a query's attention weights, along the last axis.
    A query that attends to one key has entropy 0, one that attends to n keys alike log n. Rows of
    zeros (queries of padding) don't count. For scores before the softmax use
    via=lambda s: s.softmax(-1).

    Args:
        floor: the entropy below which a query is pushed up, such as 1.0.

    Raises:
        PenaltyError: rows that don't sum to one, as after dropout (not checked in compiled code).

    Source: Zhai and others (2023), Stabilizing transformer training by preventing attention entropy
    collapse, section 3, for the entropy.

    >>> rs.AttentionEntropy(0.5)(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor(0.2500)
    """

    floor: float

    keywords = ("attention_entropy",)
    at_outputs = True
    takes_mask = False

    def __post_init__(self) -> None:
        checked_setting("floor", self.floor, 0)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            raise SelectionError(f"{self!r} is of attention weights: write .on(rs.outputs('attention', index=1))")
        return ("loss",)

    def __call__(self, w: Tensors) -> Tensor:
        """Return the mean over all rows of a tensor."""
        return self._mean(w)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return in_float32(self._mean, h if mask is None else self.without_padding(h, mask))

    def _mean(self, p: Tensor) -> Tensor:
        if p.is_complex():
            raise PenaltyError(f"{self!r} is of real attention weights, got {p.dtype}")
        p = p.reshape(1) if p.dim() == 0 else p
        if not p.numel():
            return p.sum()
        sums = p.sum(-1)
        self._check_rows(sums)
        entropy = -(p * torch.where(p > 0, p, 1).log()).sum(-1)
        return mean_of_kept((self.floor - entropy).clamp_min(0), sums != 0)

    def _check_rows(self, sums: Tensor) -> None:
        if torch.compiler.is_compiling() or sums.device.type == "meta":
            return
        with as_plain(sums) as plain:
            away = ((plain - 1).abs() > _FROM_ONE) & (plain != 0)
            if bool(away.any()):
                raise PenaltyError(
                    f"{self!r} takes attention weights, whose rows sum to one; got a row that sums to "
                    f"{float(plain[away][0]):.4g}. Of scores say via=lambda s: s.softmax(-1); after dropout the "
                    "weights aren't known: set its rate to zero"
                )
