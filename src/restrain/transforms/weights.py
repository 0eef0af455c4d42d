"""Effective weights of a forward: DropConnect, normalisation, standardisation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from restrain.axes import Grouping, Per, checked, group_norms, group_size, grouping, grouping_at
from restrain.errors import PenaltyError, TransformError
from restrain.fields import check_flags, is_whole
from restrain.named_tensors import Location
from restrain.penalties.base import in_float32
from restrain.penalties.shrink import at_least_float32
from restrain.penalties.unfold import Rows, checked_rows, from_matrix, to_matrix, unfolding, unfolding_at
from restrain.transforms.base import Computed, Noise, Reparametrization, checked_number
from restrain.transforms.sets import directions


@dataclass(frozen=True)
class DropConnect(Noise):
    """w · m / (1 - rate) in each forward, with a mask m that is zero with probability `rate`.

    The stored weight never changes; its gradient is multiplied by the same m / (1 - rate). In
    training only, with one mask per call of the layer, shared by the whole batch.

    Args:
        rate: the probability of a zero, from 0 to below 1.

    Raises:
        TransformError: a `rate` outside of [0, 1); at attach, a complex weight.

    Source: Wan and others (2013), with the scaling done in training and one mask per batch.

    >>> rs.DropConnect(0.5)(torch.ones(1000)).unique()
    tensor([0., 2.])
    """

    rate: float

    keywords = ("drop_connect",)
    on_places = False
    on_weights = True

    def __post_init__(self) -> None:
        checked_number("rate", self.rate, "the probability of a zero, from 0 to below 1", 0, 1, closed=True)

    def bound_to(self, at: Location) -> DropConnect:
        self._check(at.tensor)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        return F.dropout(x, self.rate, training=True)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TransformError(
                f"{self!r} needs a real floating-point weight, got {x.dtype}: torch has no dropout of complex tensors; "
                "leave it out of the rule, or take GaussianNoise"
            )


@dataclass(frozen=True)
class WeightNormalization(Reparametrization):
    """w_g = length_g · v_g / ‖v_g‖₂: direction and length of each group are learned separately.

    The weight is unchanged at attach. The lengths, one per group, are new parameters: create the
    optimizer after attaching, or add them by
    `optimizer.add_param_group({"params": list(reg.parameters())})`. For constant lengths 1 there is
    `UnitNorm`. A group of zeros begins with length zero and a direction of equal entries.

    Args:
        per: the entries that form a group: an axis by its meaning or a dim (see `axes`).

    Raises:
        PenaltyError: a tensor without this axis.

    Source: Salimans and Kingma (2016), eq. 2.

    >>> layer = nn.Linear(3, 2)
    >>> reg = rs.attach(layer, rs.WeightNormalization().on("weight"))
    >>> [p.shape for p in reg.parameters()]
    [torch.Size([2, 1])]
    """

    per: Per = "out"

    keywords = ("weight_normalization", "weight_norm")

    def __post_init__(self) -> None:
        object.__setattr__(self, "per", checked(self.per))

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        groups = grouping(self.per, v.shape)
        length = learned["length"] if learned else 1.0
        return (groups.view(directions(v, groups)) * length).reshape(v.shape)

    def to_free(self, w: Tensor) -> Tensor:
        groups = grouping(self.per, w.shape)
        zero = group_norms(w, groups) == 0
        return torch.where(zero, max(group_size(groups), 1) ** -0.5, groups.view(w)).reshape(w.shape)

    def learned(self, w: Tensor) -> dict[str, Tensor]:
        return {"length": group_norms(w, grouping(self.per, w.shape)).to(w.dtype)}

    def bound_to(self, at: Location) -> WeightNormalization:
        return dataclasses.replace(self, per=grouping_at(self.per, at))


@dataclass(frozen=True)
class WeightStandardization(Reparametrization):
    """w_g = gain_g · (v_g - mean_g) / √(var_g + eps): each group has mean 0 and variance gain².

    Mean and variance (which divides by the group's size) are over the entries of the group. Without
    a gain the layer's outputs grow by the square root of its number of inputs: follow it by a
    normalisation layer. At attach the weight is standardised; with a gain, only its means are
    subtracted.

    Args:
        per: the entries that form a group: an axis by its meaning or a dim (see `axes`).
        eps: a small number, above zero.
        gain: learn a gain per group, which begins at the group's standard deviation;
            `reg.parameters()` yields the gains.

    Raises:
        TransformError: an `eps` that isn't a finite number above zero; groups of a single entry,
            which have no variance.
        PenaltyError: a tensor without this axis.

    Source: Qiao and others (2019), eq. 7; Brock and others (2021), eq. 1, for the gain.

    >>> rs.WeightStandardization(per="row").from_free(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """

    per: Per = "out"
    eps: float = 1e-5
    gain: bool = False

    keywords = ("weight_standardization",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "per", checked(self.per))
        checked_number("eps", self.eps, "a small number above zero", 0, float("inf"), closed=False)
        check_flags(TransformError, gain=self.gain)

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        groups = self._groups(v.shape)
        centred, variance = self._centred(v, groups)
        gain = learned["gain"] if learned else 1.0
        return (centred / (variance + self.eps).sqrt() * gain).to(v.dtype).reshape(v.shape)

    def learned(self, w: Tensor) -> dict[str, Tensor]:
        if not self.gain:
            return {}
        _, variance = self._centred(w, self._groups(w.shape))
        return {"gain": (variance + self.eps).sqrt().to(w.dtype)}

    def _centred(self, v: Tensor, groups: Grouping) -> tuple[Tensor, Tensor]:
        """Return the groups minus their means, and their variances."""
        x, size = groups.view(at_least_float32(v)), max(group_size(groups), 1)
        centred = x - groups.sum(x) / size
        return centred, groups.sum(centred.square()) / size

    def _groups(self, shape: tuple[int, ...]) -> Grouping:
        groups = grouping(self.per, shape)
        if group_size(groups) == 1:
            raise TransformError(f"{self!r}: groups of one entry have no variance (a tensor of shape {tuple(shape)})")
        return groups

    def bound_to(self, at: Location) -> WeightStandardization:
        bound = dataclasses.replace(self, per=grouping_at(self.per, at))
        bound._groups(tuple(at.tensor.shape))
        return bound


@dataclass(frozen=True)
class SpectralNormalization(Reparametrization):
    """W = V / σ(V), σ the greatest singular value of the weight as a matrix.

    With `iterations`, σ is torch's estimate: that many steps of the power method per training
    forward, with two vectors kept as buffers. It isn't exact, and each access to the weight in
    training takes steps. With `None`, each forward computes the exact σ by a singular value
    decomposition.

    Args:
        iterations: steps of the power method per forward, or None.
        rows: the axes that are the rows of the matrix; see `Orthogonal`.

    Raises:
        TransformError: invalid `iterations`; at attach, a weight of zeros, whose σ is zero.
        PenaltyError: a tensor with fewer than two axes, or without the axes of `rows`.

    Source: Miyato and others (2018), eq. 8 and algorithm 1.

    >>> w = rs.SpectralNormalization(None).from_free(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> w.diagonal()
    tensor([1.0000, 0.3333])
    """

    iterations: int | None = 1
    rows: Rows = "out"

    keywords = ("spectral_normalization",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", checked_rows(self.rows))
        number = self.iterations
        if number is not None and not is_whole(number, 1):
            raise TransformError(
                f"iterations= is a whole number, at least 1, or None for the exact norm; got {number!r}"
            )

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        x = at_least_float32(v)
        norm = torch.linalg.matrix_norm(self._matrix(x), 2) if v.numel() else x.new_zeros(())
        return (x / torch.where(norm == 0, 1.0, norm)).to(v.dtype)

    def parametrization(self, w: Tensor) -> nn.Module:
        if w.numel() and not w.any():
            raise TransformError(f"{self!r}: a weight of zeros has no spectral norm to be divided by")
        return _PowerMethod(self, w.detach()) if self.iterations and w.numel() else Computed(self, w)

    def _matrix(self, w: Tensor) -> Tensor:
        return to_matrix(w, unfolding(self.rows, w.shape))

    def bound_to(self, at: Location) -> SpectralNormalization:
        groups = unfolding_at(self.rows, at, transposable=True)
        if groups.stack:
            raise PenaltyError(
                f"{self!r} is of one matrix, and {at.name!r} holds several ({' '.join(at.axes or ())}): bound the "
                "norm of each by rs.SpectralBall(1.0), or give rows= by dims"
            )
        return dataclasses.replace(self, rows=groups)


class _PowerMethod(nn.Module):
    """torch's spectral norm of the weight as a matrix."""

    def __init__(self, what: SpectralNormalization, w: Tensor) -> None:
        super().__init__()
        self.what = what
        holder = nn.Module().eval()  # eval(): registering reads the weight, without a step
        holder.register_parameter("matrix", nn.Parameter(what._matrix(at_least_float32(w)).contiguous()))
        parametrizations.spectral_norm(holder, "matrix", n_power_iterations=what.iterations or 1, dim=0)
        self.norm: Any = holder.parametrizations["matrix"][0]  # type: ignore[index]

    def forward(self, v: Tensor) -> Tensor:
        groups = unfolding(self.what.rows, v.shape)
        matrix = in_float32(lambda x: self.norm(to_matrix(x.to(next(self.norm.buffers())), groups)), v)
        return from_matrix(matrix, groups, tuple(v.shape)).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def extra_repr(self) -> str:
        return repr(self.what)
