"""Penalties between two views of the same samples: two layers, or two calls of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.axes import squared
from restrain.errors import PenaltyError, SelectionError
from restrain.fields import check_flags
from restrain.penalties.all_reduce import check_several, over_processes, several_processes
from restrain.penalties.base import NetworkPenalty, checked_setting
from restrain.penalties.shrink import at_least_float32
from restrain.rules import How


class OfViews(NetworkPenalty, register=False):
    """Base of penalties of two outputs whose rows are the same samples.

    `.on(rs.outputs("proj"))` takes two calls of a layer in one forward, or one call in each of two
    forwards under one loss; `.on(rs.outputs("a") | rs.outputs("b"))` two layers;
    `rs.outputs("proj", call=0) | rs.outputs("proj", call=2)` says which calls.
    """

    @abstractmethod
    def between(self, a: Tensor, b: Tensor, everywhere: bool = False) -> Tensor:
        """Return the value of two views, (samples, features), over processes if `everywhere`."""

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        views = list(outputs.values())
        if len(views) != 2:
            raise PenaltyError(
                f"{self!r} compares two views, got {len(views)} outputs: {', '.join(outputs) or 'none'}. Say "
                "which two, as in rs.outputs('proj', call=0) | rs.outputs('proj', call=1)"
            )
        a, b = views[0], views[1].to(views[0].device)
        if a.shape != b.shape or a.dim() < 2 or a.is_complex() or b.is_complex():
            raise PenaltyError(
                f"{self!r} compares real outputs of one shape, (samples, features); got {a.dtype} of shape "
                f"{tuple(a.shape)} and {b.dtype} of shape {tuple(b.shape)}"
            )
        device = a.device.type
        with torch.autocast(device, enabled=False):
            a, b = (at_least_float32(x).flatten(0, -2) for x in (a, b))
            return self.between(a, b, everywhere=True)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            raise SelectionError(f"{self!r} is of two outputs: write .on(rs.outputs('proj'))")
        return ("loss",)


@dataclass(frozen=True)
class Invariance(OfViews):
    """1/n Σ ‖a_s - b_s‖² over n samples: two views of a sample should have one embedding.

    Each view's gradient flows; to hold one of them fixed, detach it in the model.

    Raises:
        PenaltyError: other than two outputs, or of different shapes.

    Source: Bardes, Ponce and LeCun (2022), VICReg, eq. 5 (their code divides by the features, too).

    >>> rs.Invariance()({}, {"a": torch.zeros(2, 3), "b": torch.ones(2, 3)})
    tensor(3.)
    """

    def between(self, a: Tensor, b: Tensor, everywhere: bool = False) -> Tensor:
        return squared(a - b).sum() / max(a.shape[0], 1)


@dataclass(frozen=True)
class CrossCorrelation(OfViews):
    """Σ_i (1 - C_ii)² + off_diagonal Σ_{i≠j} C_ij², C the cross-correlations of two views.

    C_ij = Σ_s a_si b_sj / √(Σ_s a_si² Σ_s b_sj²), each feature minus its mean over the samples of
    all processes: a statistic of the batch. A feature that is constant has correlations of 0.

    Args:
        off_diagonal: the weight of the redundancy between features.
        sync: take correlations over all processes; set False if they train different models.

    Raises:
        PenaltyError: other than two outputs, or of different shapes; a single sample.

    Source: Zbontar and others (2021), Barlow Twins, eq. 1 and 2.

    >>> x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> rs.CrossCorrelation()({}, {"a": x, "b": 3 * x + 1})
    tensor(0.)
    """

    off_diagonal: float = 5e-3
    sync: bool = True

    keywords = ("barlow_twins",)

    def __post_init__(self) -> None:
        checked_setting("off_diagonal", self.off_diagonal, 0, closed=True)
        check_flags(PenaltyError, sync=self.sync)

    def between(self, a: Tensor, b: Tensor, everywhere: bool = False) -> Tensor:
        everywhere = everywhere and self.sync and several_processes()
        features = a.shape[1]

        def total(own: Tensor) -> Tensor:
            return over_processes(own) if everywhere else own

        if not features:
            return (a + b).sum()
        check_several(a.shape[0], everywhere, self)
        both = torch.cat([a, b], 1)
        count = both.new_full((1,), both.shape[0])
        *sums, size = total(torch.cat([both.sum(0), count])).split([2 * features, 1])
        mean = sums[0] / size.clamp_min(1)
        # deviations sum to zero: over processes the mean may be a constant
        away = both - (mean.detach() if everywhere else mean)
        left, right = away.split(features, 1)
        moments = total(torch.cat([(left.T @ right).flatten(), away.square().sum(0)]))
        products, squares = moments.split([features**2, 2 * features])
        first, second = squares.split(features)
        of_pairs = first.unsqueeze(1) * second
        moving = of_pairs != 0  # NaN stays
        lengths = torch.where(moving, of_pairs, 1).sqrt()
        c = torch.where(moving, products.reshape(features, features) / lengths, 0)
        diagonal = c.diagonal()
        apart = squared(c - diagonal.diag()).sum()
        value = (1 - diagonal).square().sum() + self.off_diagonal * apart
        return torch.where(size[0].detach() > 0, value, 0)
