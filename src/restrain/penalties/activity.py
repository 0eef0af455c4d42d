"""Penalties of layer outputs, per sample: sparsity, entropy, activity of sparse autoencoders."""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from restrain.axes import Grouping, Per, checked, group_norms, grouping_at
from restrain.errors import PenaltyError, SelectionError
from restrain.fields import is_one_of, renamed
from restrain.named_tensors import Handle, fully_sharded, is_sharded, near, parameters
from restrain.penalties.base import OfRows, Penalty, Tensors, batch_size, checked_axis, checked_setting, in_float32
from restrain.penalties.statistics import unit_axis
from restrain.rules import How


@dataclass(frozen=True)
class Hoyer(OfRows):
    """(Σ|x|)² / Σ|x|²: the Hoyer square, from 1 (one nonzero entry) to n (n entries of equal size).

    The value measures sparsity alone: it doesn't change with the scale of x. Where all entries are
    zero, value and gradient are 0. A parameter counts as a whole; an output counts per sample,
    averaged over the batch. Hoyer's own measure of n entries is (√n - √value) / (√n - 1).

    Source: Yang, Wen and Li (2020), DeepHoyer; Hoyer (2004) for the measure.

    >>> rs.Hoyer()(torch.tensor([3.0, -4.0])), rs.Hoyer()(torch.tensor([0.0, 7.0]))
    (tensor(1.9600), tensor(1.))
    """

    takes_mask = True

    def over_rows(self, rows: Tensor) -> Tensor:
        size = rows.abs()
        if not rows.numel():
            return size.sum()
        peak = size.detach().amax(1, keepdim=True)
        tiny = torch.finfo(peak.dtype).tiny
        size = size / torch.where(peak < tiny, 1, peak)  # same value, and squares neither overflow nor vanish
        squares = size.square().sum(1)
        return (size.sum(1).square() / torch.where(squares == 0, 1, squares)).sum()


@dataclass(frozen=True)
class _OfDistributions(Penalty, register=False):
    """Base of sums over distributions whose logits lie along axis `dim`; batch mean on outputs."""

    dim: int | None = None

    takes_mask = True
    at_outputs = True
    by_token = True

    def __post_init__(self) -> None:
        checked_axis("dim", self.dim)

    @abstractmethod
    def terms(self, logs: Tensor, p: Tensor, n: int) -> Tensor:
        """Return the summand of each entry, given log p, p and the number n of classes."""

    def __call__(self, w: Tensors) -> Tensor:
        return self._sum(w, None, None)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        size = 1 if dim is None else max(batch_size(h, dim), 1)
        return in_float32(lambda x: self._sum(x, dim, mask) / size, h)

    def _sum(self, x: Tensor, batch: int | None, mask: Tensor | None) -> Tensor:
        if x.is_complex():
            raise PenaltyError(f"an entropy is of real logits, got {x.dtype}")
        x = x.reshape(1) if x.dim() == 0 else x
        axis = unit_axis(x, self.dim, batch, "dim", "classes")
        if mask is not None:
            if mask.shape[axis] != 1:
                raise PenaltyError("a mask for an entropy takes or leaves all classes of a position together")
            x = torch.where(mask, x, 0)
        if not x.numel():
            return x.sum()
        logs = x.log_softmax(axis)
        p = logs.exp()
        logs = torch.where(p == 0, 0, logs)  # 0 log 0 = 0; also for logits of -inf
        terms = self.terms(logs, p, x.shape[axis]).sum(axis, keepdim=True)
        return terms.sum() if mask is None else torch.where(mask, terms, 0).sum()


@renamed(per="dim")
@dataclass(frozen=True)
class Entropy(_OfDistributions):
    """Σ H(softmax(x)), H(p) = -Σ p log p: the entropy of the predicted class distributions.

    It is small where each sample is assigned to one class with certainty: entropy minimisation, for
    unlabelled data. On outputs: the sum over positions, averaged over the batch. For outputs that
    are probabilities instead of logits, use via=torch.log.

    Args:
        dim: the axis of the classes; by default the last. Required for more than three axes.

    Raises:
        PenaltyError: complex logits, or no such axis.

    Source: Grandvalet and Bengio (2005), semi-supervised learning by entropy minimization.

    >>> rs.Entropy()(torch.tensor([[0.0, 0.0], [9.0, -9.0]]))
    tensor(0.6931)
    """

    def terms(self, logs: Tensor, p: Tensor, n: int) -> Tensor:
        return -p * logs


@renamed(per="dim")
@dataclass(frozen=True)
class Confidence(_OfDistributions):
    """Σ log n - H(softmax(x)) = Σ KL(softmax(x) ‖ uniform), n classes: large for confident outputs.

    The confidence penalty -H, shifted by log n so that it is never negative. It keeps outputs from
    being too confident. Axes and averages are as in `Entropy`.

    Args:
        dim: the axis of the classes; by default the last. Required for more than three axes.

    Raises:
        PenaltyError: complex logits, or no such axis.

    Source: Pereyra and others (2017), regularizing neural networks by penalizing confident output
    distributions.

    >>> rs.Confidence()(torch.tensor([[0.0, 0.0], [9.0, -9.0]]))
    tensor(0.6931)
    """

    def terms(self, logs: Tensor, p: Tensor, n: int) -> Tensor:
        return p * (logs + math.log(n))


@dataclass(frozen=True)
class L0(Penalty):
    """Σ 1[x > threshold]: the number of entries above a threshold, with the gradient of a ramp.

    With a number as the threshold, the gradient of an entry is 1 / bandwidth where
    |x - threshold| < bandwidth / 2, else zero: that of a ramp of this width. The activations are
    pushed below the threshold. For signed activations use via=torch.abs.

    `L0("learned")` counts by the thresholds θ of `rs.JumpReLU` at the same place, and only these
    get a gradient: -1 / bandwidth for each entry with |x - θ| < bandwidth / 2.

    Args:
        threshold: zero or more, so that zeros don't count; or "learned".
        bandwidth: width of the ramp, in units of the activation; with "learned" by default that of
            the JumpReLU. A narrow ramp gives few entries a gradient; a wide ramp gives a biased
            gradient.

    Raises:
        PenaltyError: complex entries; a number without a bandwidth; "learned" for a plain tensor.
        SelectionError: "learned" without a JumpReLU at the same place.

    Source: Rajamanoharan and others (2024), Jumping ahead: JumpReLU sparse autoencoders, arXiv
    2407.14435, eq. 9 and 12; the kernel is a rectangle.

    >>> h = torch.tensor([0.0, 0.5, 0.52, 3.0])
    >>> rs.L0(0.5, 0.1)(h), rs.L0(0.5, 0.1).gradient(h)
    (tensor(2.), tensor([ 0., 10., 10.,  0.]))
    """

    threshold: float | Literal["learned"]
    bandwidth: float | None = None

    at_outputs = True

    def __post_init__(self) -> None:
        learned = is_one_of(self.threshold, ("learned",))
        if not learned:
            checked_setting("threshold", self.threshold, 0, closed=True)  # type: ignore[arg-type]
        if not learned and self.bandwidth is None:
            raise PenaltyError("L0 with a number as the threshold needs bandwidth=, the width of its ramp")
        if self.bandwidth is not None:
            checked_setting("bandwidth", self.bandwidth, 0)

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        """True with a number as the threshold."""
        return self.threshold != "learned"

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places and not self.entrywise:
            raise SelectionError(f"{self!r} is of activations: write .on(rs.outputs('encoder'))")
        return Penalty.moments(self, at_places)

    def bound_at_place(self) -> Penalty:
        return self if self.entrywise else _LearnedL0(self)

    def __call__(self, w: Tensors) -> Tensor:
        if self.threshold == "learned" or self.bandwidth is None:
            raise PenaltyError(
                f"{self!r} takes the thresholds of rs.JumpReLU at the same place: rs.attach(model, [rs.JumpReLU(...)"
                f".on(rs.outputs('encoder')), {self!r}.on(rs.outputs('encoder'))])"
            )
        if w.is_complex():
            raise PenaltyError(f"L0 compares with a threshold, which {w.dtype} can't; penalise via=torch.abs")
        ramp = ((w - self.threshold) / self.bandwidth + 0.5).clamp(0, 1)
        count: Tensor = (w > self.threshold).to(w.dtype) + (ramp - ramp.detach())
        return count.sum()


class Thresholds(Protocol):
    """An activation function with thresholds by unit; implemented by `transforms.JumpAtLayer`."""

    of: Any

    def thresholds(self, x: Tensor) -> Tensor:
        """Return the thresholds, with their gradient."""

    def jumped(self, z: Tensor) -> Tensor:
        """Return the activation without a gradient of the thresholds."""


class _LearnedL0(Penalty, register=False):
    """`L0("learned")` at one place, with the JumpReLU there."""

    takes_mask = True
    jump: Thresholds

    def __init__(self, penalty: L0) -> None:
        self.penalty = penalty

    def __repr__(self) -> str:
        return repr(self.penalty)

    def meet(self, activation: Any) -> Callable[[Tensor], Tensor] | None:
        if not callable(getattr(activation, "thresholds", None)):
            raise SelectionError(
                f"{self!r} takes the thresholds of a JumpReLU, and there is none at the same place: add "
                "rs.JumpReLU(threshold, bandwidth).on(...) with the same selection to the plan"
            )
        self.jump = activation
        return self.jump.jumped

    def __call__(self, w: Tensors) -> Tensor:
        x, threshold = w.detach(), self.jump.thresholds(w)
        width = self.penalty.bandwidth or self.jump.of.bandwidth
        held = threshold.detach()
        near = ((x - held).abs() < width / 2).to(held.dtype).flatten(0, -2).sum(0)
        count = (x > held).sum().to(held.dtype)
        value: Tensor = count - ((threshold - held) * near).sum() / width
        return value

    def without_padding(self, h: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, h, -math.inf)


@dataclass(frozen=True)
class DecoderL1(Penalty):
    """Σ_i |h_i| ‖W_i‖₂, W_i the decoder weights of unit i: bounds the contribution of each unit.

    Unlike L1 on h, the value can't be made small by small activations with large decoder weights.
    It is averaged over the batch, and the decoder gets a gradient too. The units are the last axis
    of h.

    Args:
        decoder: the name of the decoder's weight.
        per: the axis of the units in that weight: "in" for an nn.Linear with the units as inputs;
            "out" for the weight of a tied encoder; 0 for a plain parameter of shape (units,
            inputs).

    Raises:
        PenaltyError: FSDP2 shards the decoder, or it has another number of units than the output.
        SelectionError: the model has no such parameter, or the penalty is put on parameters.

    Source: Anthropic's interpretability team (2024), circuits updates of April: training sparse
    autoencoders.

    >>> sae = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> reg = rs.attach(sae, 1e-3 * rs.DecoderL1("2.weight").on(rs.outputs("1")))
    """

    decoder: str = "decoder.weight"
    per: Per = "in"

    keywords = ("decoder_l1",)
    takes_mask = True
    at_outputs = True
    needs_model = True

    def __post_init__(self) -> None:
        checked(self.per)
        if not isinstance(self.decoder, str):
            raise PenaltyError(f"decoder= is the name of a parameter, got {type(self.decoder).__name__}")

    def __call__(self, w: Tensors) -> Tensor:
        raise PenaltyError(f"{self!r} needs its model: write rs.attach(model, {self!r}.on(rs.outputs(...)))")

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            raise SelectionError(f"{self!r} is of activations: write .on(rs.outputs('encoder'))")
        return ("loss",)

    def bound_in(self, model: nn.Module) -> Penalty:
        slots = parameters(model)
        slot = next((slot for slot in slots if self.decoder in slot.names), None)
        if slot is None:
            names = [slot.name for slot in slots]
            raise SelectionError(f"{self!r}: the model has no parameter {self.decoder!r}{near(self.decoder, names)}")
        self.refuse_sharded(slot.tensor(), model)
        return _BoundDecoderL1(self, slot.handle, weakref.ref(model), grouping_at(self.per, slot.location()))

    def refuse_sharded(self, decoder: Tensor, model: nn.Module) -> None:
        """Refuse a decoder sharded by FSDP2, gathered only for the forward of its own layer.

        Raises:
            PenaltyError: the decoder or the model is sharded.
        """
        if is_sharded(decoder) or fully_sharded([model]):
            raise PenaltyError(
                f"{self!r} uses a weight within another layer's forward, where FSDP2 doesn't have it: penalise by "
                "rs.L1() on the output and rs.UnitNorm(per='in') on the decoder, or train by DDP"
            )


@dataclass(frozen=True, eq=False)
class _BoundDecoderL1(Penalty, register=False):
    """`DecoderL1` with the decoder of a model, looked up by name at each call."""

    penalty: DecoderL1
    handle: Handle
    model: weakref.ref[nn.Module]
    groups: Grouping

    takes_mask = True

    def __repr__(self) -> str:
        return repr(self.penalty)

    def __call__(self, w: Tensors) -> Tensor:
        root = self.model()
        assert root is not None  # alive: this runs in its forward
        decoder = self.handle.find(root)
        self.penalty.refuse_sharded(decoder, root)
        lengths = group_norms(decoder.to(torch.promote_types(decoder.dtype, torch.float32)), self.groups).flatten()
        units = w.shape[-1] if w.dim() else 1
        if lengths.numel() != units:
            raise PenaltyError(
                f"{self!r}: {self.decoder_text()} belongs to {lengths.numel()} units, the output of shape "
                f"{tuple(w.shape)} has {units} along its last axis: say by per= what belongs to one unit"
            )
        value: Tensor = (w.abs() * lengths.to(w.device)).sum()
        return value

    def decoder_text(self) -> str:
        """Return name and shape of the decoder for an error message."""
        return f"{self.handle.name!r} of shape {self.groups.shape}"

    def without_padding(self, h: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, h, 0)
