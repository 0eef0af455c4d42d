"""Activation functions of sparse codes, put on outputs or inputs of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restrain.errors import SelectionError, TransformError
from restrain.fields import check_flags, is_whole
from restrain.penalties.all_reduce import averaged_gradient, several_processes
from restrain.penalties.functorch import told
from restrain.penalties.shrink import at_least_float32
from restrain.penalties.statistics import RunningMean, resting
from restrain.rules import How
from restrain.torch_private import exporting, in_backward, wrapped
from restrain.transforms.base import Transform, checked_number, checked_type
from restrain.transforms.layout import Layout


class Activation(Transform, register=False):
    """Base of activation functions at layers: of the model while attached, in evaluation as well.

    Penalties at the same place see the layer's own output, before the activation function. A copy
    of the model is without it, as of all rules: attach the plan to the copy.
    """

    at_outputs: ClassVar[bool] = True

    sync: bool

    def __post_init__(self) -> None:
        check_flags(TransformError, sync=self.sync)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation of a tensor whose units are its last axis, as in training."""

    @abstractmethod
    def bound_in_layer(self, layer: nn.Module, kind: str, device: torch.device) -> AtLayer:
        """Return the activation function of one layer's outputs or inputs (`kind`), with its state.

        Raises:
            TransformError: the layer doesn't say what the function must know.
        """

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            raise SelectionError(
                f"{self!r} is an activation function of a layer, not of parameters: write .on(rs.outputs('encoder'))"
            )
        return ("forward",)


class FiringCounts:
    """Tokens since each unit was last active, counted by optimizer steps, over all processes.

    They change after the step, so that a forward repeated by a checkpoint counts once. Tensors are
    sized by the first batch.
    """

    def __init__(self, sync: bool) -> None:
        self.sync = sync
        self.idle = torch.zeros(0, dtype=torch.int64, device="cpu")  # tokens, by unit
        self.hits = torch.zeros(0, device="cpu")  # number of active entries since the last step, by unit
        self.tokens = torch.zeros(1, dtype=torch.int64, device="cpu")  # since the last step

    def add(self, hits: Tensor, tokens: int) -> None:
        """Add a batch's active entries by unit, and its number of tokens."""
        if not torch.compiler.is_compiling() and (resting().on or in_backward()):
            return
        told(torch.cat([hits, hits.new_full((1,), tokens)]), self._add)

    def _add(self, both: Tensor) -> None:
        hits, tokens = both[:-1], both[-1:].to(torch.int64)
        if self.hits.shape != hits.shape or self.hits.device != hits.device:
            self.hits, self.tokens = torch.zeros_like(hits), torch.zeros_like(tokens)
        self.hits.add_(hits)
        self.tokens.add_(tokens)

    def step(self) -> None:
        """Update the counts by the batches since the last step."""
        both = torch.cat([self.hits.double(), self.tokens.double()])
        if self.sync and several_processes():
            dist.all_reduce(both)
        if both.numel() == 1 or not bool(both[-1] > 0):
            return
        if self.idle.shape != self.hits.shape:
            self.idle = torch.zeros_like(self.hits, dtype=torch.int64)
        self.idle = self.idle.to(both.device)
        self.idle.copy_(torch.where(both[:-1] > 0, 0, self.idle + both[-1].to(torch.int64)))
        self.hits.zero_()
        self.tokens.zero_()


class AtLayer(Transform, register=False):
    """Base of an activation function bound to one layer, with counts of its units' firing."""

    of: Transform
    lasting: ClassVar[bool] = True  # acts in evaluation, too

    def __init__(self, of: Transform, sync: bool) -> None:
        self.of, self.counts = of, FiringCounts(sync)

    def __repr__(self) -> str:
        return repr(self.of)

    @abstractmethod
    def at(self, x: Tensor, layout: Layout) -> Tensor:
        """Return the activation of a layer's tensor."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return what is learned beside the model's parameters."""
        return ()

    def reset(self, units: Tensor) -> None:
        """Begin anew with some units, given by a boolean tensor."""
        self.counts.idle[units] = 0

    def state(self) -> dict[str, Tensor]:
        return {"idle": self.counts.idle}

    def stepped(self, w: Tensor | None) -> None:
        self.counts.step()

    def moments(self, at_places: bool) -> tuple[How, ...]:
        return ("forward",)


def checked_code(what: Transform, x: Tensor) -> None:
    """Check that a tensor is (units,), (tokens, units) or (batch, time, units), of real numbers.

    Raises:
        TransformError: it isn't.
    """
    checked_type(what, x)  # type: ignore[arg-type]
    if not 1 <= x.dim() <= 3 or x.is_complex():
        raise TransformError(
            f"{what!r} takes real activations whose units are the last axis, (tokens, units) or (batch, time, units); "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )


def hits_of(y: Tensor) -> tuple[Tensor, int]:
    """Return the number of nonzero entries of each unit, and the number of tokens."""
    rows = y.detach().reshape(-1, y.shape[-1])
    return (rows != 0).sum(0).float(), rows.shape[0]


def hits_at(indices: Tensor, values: Tensor, units: int) -> Tensor:
    """Return the number of nonzero values of each unit, given the units' indices of values."""
    alive = (values != 0).float().flatten()
    return values.new_zeros(units, dtype=torch.float32).scatter_add(0, indices.flatten(), alive)


def above(z: Tensor, threshold: Tensor | float, size: Tensor | None = None) -> Tensor:
    """Return z where it, or its size, is above a threshold, and zero elsewhere; NaN stays."""
    return torch.where((z if size is None else size) <= threshold, 0, z)


def sizes(x: Tensor) -> Tensor:
    """Return |x|, without a copy of the output of a ReLU."""
    node = None if torch.compiler.is_compiling() or exporting() else x.grad_fn
    x = x.detach()
    return x if node is not None and node.name() == "ReluBackward0" else x.abs()


def taken(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return (tensor with the entries at `indices` of the last axis, zeros elsewhere; the entries).

    The backward saves the indices alone.
    """
    values, y = x.gather(-1, indices), torch.zeros_like(x)
    if not torch.compiler.is_compiling() and wrapped(x):  # vmap has no rule for the operation in place
        return y.scatter(-1, indices, values), values.detach()
    return y.scatter_(-1, indices, values), values.detach()


@dataclass(frozen=True)
class Firings(Activation):
    """x, unchanged: counts the tokens since each unit was last active (not zero), in training.

    For codes without another activation function of this library; these count by themselves.
    `reg.tokens_since_fired()` gives the counts. The units are the last axis.

    Args:
        sync: count over all processes; set False if they train different models.

    >>> sae = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> reg = rs.attach(sae, rs.Firings().on(rs.outputs("1")))
    """

    sync: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def bound_in_layer(self, layer: nn.Module, kind: str, device: torch.device) -> AtLayer:
        return _FiringsAtLayer(self, self.sync)


class _FiringsAtLayer(AtLayer, register=False):
    """`Firings` at one layer."""

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.training:
            checked_code(self.of, x)
            self.counts.add(*hits_of(x))
        return x


# ---------------------------------------------------------------- BatchTopK


@dataclass(frozen=True)
class BatchTopK(Activation):
    """The k · tokens largest |x| of a batch stay, the others become zero; in evaluation |x| > θ.

    So that a token may have more or less than k, by its need. θ is the running mean of the smallest
    entry that a training batch kept, and evaluation doesn't depend on the other tokens of a batch;
    before the first optimizer step there is no θ, and evaluation takes the k · tokens largest, too.
    The gradient is that of the entries that stay. On (tokens, units) or (batch, time, units), as a
    rule behind a ReLU.

    Args:
        k: the mean number of nonzero entries of a token.
        momentum: the weight of earlier steps in the running mean θ, corrected for its start. θ
            moves with each optimizer step, and `reg.state_dict()` saves it.
        sync: take the largest entries of all processes' tokens, so that several processes do what
            one does with the whole batch, for four messages a forward; False: each takes those of
            its own, and its own θ.

    Raises:
        TransformError: a setting that can't be; complex or higher-dimensional activations.

    Source: Bussmann, Leask and Nanda (2024), BatchTopK sparse autoencoders, arXiv 2412.06410, eq. 5
    and 6.

    >>> rs.BatchTopK(1)(torch.tensor([[5.0, 4.0, 0.0], [1.0, 2.0, 3.0]]))
    tensor([[5., 4., 0.],
            [0., 0., 0.]])
    """

    k: int
    momentum: float = 0.99
    sync: bool = True

    keywords = ("batch_top_k",)

    def __post_init__(self) -> None:
        Activation.__post_init__(self)
        if not is_whole(self.k, 1):
            raise TransformError(f"k= is a whole number of entries a token, at least 1; got {self.k!r}")
        checked_number("momentum", self.momentum, "the weight of earlier steps, from 0 to below 1", 0, 1, closed=True)

    def __call__(self, x: Tensor) -> Tensor:
        return self.largest(x, everywhere=False)[0]

    def largest(self, x: Tensor, everywhere: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return (activation, smallest |x| that stays and isn't zero, numbers of hits by unit).

        The smallest is inf if all are zero.
        """
        checked_code(self, x)
        rows, size = x.reshape(-1, x.shape[-1]), sizes(x).reshape(-1, x.shape[-1])
        if everywhere and several_processes():
            kept = first_of_all(size, self.k)
            y = torch.where(kept, rows, 0)
            least = least_of_all(y)
            return y.reshape(x.shape), least, hits_of(y)[0]
        flat = rows.reshape(-1)
        indices = largest_entries(size, self.k * rows.shape[0])
        y, values = taken(flat, indices)
        least = torch.where(values != 0, values.abs(), torch.inf)
        least = torch.cat([least, values.new_full((1,), torch.inf)]).amin()
        return y.reshape(x.shape), least, hits_at(indices % max(rows.shape[1], 1), values, rows.shape[1])

    def bound_in_layer(self, layer: nn.Module, kind: str, device: torch.device) -> AtLayer:
        return _BatchTopKAtLayer(self, self.sync)


class _BatchTopKAtLayer(AtLayer, register=False):
    """`BatchTopK` at one layer, with its threshold."""

    of: BatchTopK

    def __init__(self, of: BatchTopK, sync: bool) -> None:
        AtLayer.__init__(self, of, sync)
        self.least = RunningMean()

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        if not layout.training and (threshold := self.least.mean()) is not None:
            checked_code(self.of, x)
            return above(x, threshold.to(x.device), at_least_float32(x.detach()).abs())
        y, least, hits = self.of.largest(x, everywhere=self.of.sync and layout.training)
        if layout.training:
            self.counts.add(hits, x.numel() // max(x.shape[-1], 1))
            self.least.keep(at_least_float32(least).reshape(1), hits.new_ones(1))
        return y

    def state(self) -> dict[str, Tensor]:
        return {"idle": self.counts.idle, "total": self.least.total, "weight": self.least.weight}

    def stepped(self, w: Tensor | None) -> None:
        self.counts.step()
        self.least.step(self.of.momentum)


def largest_entries(size: Tensor, count: int) -> Tensor:
    """Return the indices, in the flat tensor, of the `count` largest entries of a matrix.

    In eager code on a CPU only the largest of each row are compared, if these are found to be
    enough: the selection in rows runs in parallel, that in a long vector doesn't.
    """
    rows, columns = size.shape
    count = min(count, size.numel())
    each = 4 * (count // max(rows, 1) + 1)
    if torch.compiler.is_compiling() or not size.is_cpu or not rows or 2 * each > columns:
        return size.flatten().topk(count, sorted=False).indices
    values, places = size.topk(each, sorted=False)
    chosen = values.flatten().topk(count, sorted=False)
    if bool((values.amin(1) > chosen.values.amin()).any()):  # a row may have more of them
        return size.flatten().topk(count, sorted=False).indices
    places += columns * torch.arange(rows, device=size.device).unsqueeze(1)
    return places.flatten()[chosen.indices]


def first_of_all(size: Tensor, k: int) -> Tensor:
    """Return the mask of the k · tokens largest entries of all processes, first in order of equals.

    The smallest of them is found digit by digit, from counts of the entries by digit.
    """
    wide = size.double() if size.dtype == torch.float64 else size.float()
    bits = wide.contiguous().view(torch.int64 if wide.dtype == torch.float64 else torch.int32).flatten().long()
    left = torch.full((1,), k * size.shape[0], device=size.device)
    dist.all_reduce(left)
    inside, found = torch.ones_like(bits), torch.zeros_like(left)
    for high in range(63 if wide.dtype == torch.float64 else 31, 0, -11):
        low = max(high - 11, 0)
        digit = (bits >> low) & (2 ** (high - low) - 1)
        numbers = bits.new_zeros(2 ** (high - low) + 1).scatter_add_(0, digit, inside)
        dist.all_reduce(numbers)
        upwards = numbers.flip(0).cumsum(0).flip(0)  # entries with this digit or a higher one
        chosen = (upwards >= left).sum().sub(1).clamp_min(0).reshape(1)
        left = left - upwards[chosen + 1]
        inside = inside * (digit == chosen)
        found = found + (chosen << low)
    above, equal = bits > found, bits == found
    ties = equal.sum().reshape(1)
    before = [torch.zeros_like(ties) for _ in range(dist.get_world_size())]
    dist.all_gather(before, ties)
    left = left - torch.cat(before)[: dist.get_rank()].sum()
    return (above | (equal & (equal.cumsum(0) <= left))).reshape(size.shape)


def least_of_all(y: Tensor) -> Tensor:
    """Return the smallest nonzero |y| of all processes; inf without any."""
    size = y.detach().abs()
    least = torch.cat([torch.where(size > 0, size, torch.inf).flatten(), size.new_full((1,), torch.inf)]).amin()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


# ---------------------------------------------------------------- JumpReLU


class _Jump(torch.autograd.Function):
    """z · 1[z > θ]; the gradient of θ is -θ / bandwidth · Σ g over |z - θ| < bandwidth / 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return above(z, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.bandwidth = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        own = torch.where(near, gradient, 0) * (-threshold / ctx.bandwidth)
        return above(gradient, threshold, z), own.sum_to_size(threshold.shape), None


@dataclass(frozen=True)
class JumpReLU(Activation):
    """z · 1[z > θ] with a threshold θ > 0 for each unit, learned by straight-through gradients.

    ∂/∂θ = -θ/ε K((z - θ)/ε) with the rectangle K(u) = 1[|u| < 1/2] and ε the bandwidth; the
    gradient of z is that of the entries that stay. θ is learned as log θ: `reg.parameters()` gives
    the logarithms, for `optimizer.add_param_group`, and `reg.state_dict()` saves them. The penalty
    that learns them against the data loss is `rs.L0("learned")` at the same place. On
    (tokens, units) or (batch, time, units), the layer before an activation function.

    Args:
        threshold: the initial θ, in units of the activations.
        bandwidth: ε, the width in which entries move θ.
        units: the number of units; an nn.Linear says it.
        sync: average the gradient of θ over all processes, as DDP averages others.

    Raises:
        TransformError: a setting that can't be; a layer that doesn't say its number of units;
            complex or higher-dimensional activations.

    Source: Rajamanoharan and others (2024), Jumping ahead: JumpReLU sparse autoencoders, arXiv
    2407.14435, eq. 3 and 11, appendix J.

    >>> rs.JumpReLU(0.5, 0.1)(torch.tensor([-1.0, 0.4, 0.6]))
    tensor([0.0000, 0.0000, 0.6000])
    """

    threshold: float
    bandwidth: float
    units: int | None = None
    sync: bool = True

    keywords = ("jump_relu",)

    def __post_init__(self) -> None:
        Activation.__post_init__(self)
        for name in ("threshold", "bandwidth"):
            checked_number(name, getattr(self, name), "a finite number above zero", 0, float("inf"), closed=False)
        if self.units is not None and not is_whole(self.units, 1):
            raise TransformError(f"units= is the number of units, at least 1; got {self.units!r}")

    def __call__(self, x: Tensor) -> Tensor:
        checked_code(self, x)
        return above(x, self.threshold)

    def bound_in_layer(self, layer: nn.Module, kind: str, device: torch.device) -> AtLayer:
        units = self.units
        if units is None and isinstance(layer, nn.Linear):
            units = layer.out_features if kind == "outputs" else layer.in_features
        if units is None:
            raise TransformError(
                f"{self!r} learns a threshold for each unit, and a {type(layer).__name__} doesn't say how many it has: "
                "write units="
            )
        dtype = torch.promote_types(next((p.dtype for p in layer.parameters()), torch.float32), torch.float32)
        return JumpAtLayer(self, units, dtype, device)


class JumpAtLayer(AtLayer, register=False):
    """`JumpReLU` at one layer, with its thresholds."""

    of: JumpReLU

    def __init__(self, of: JumpReLU, units: int, dtype: torch.dtype, device: torch.device) -> None:
        AtLayer.__init__(self, of, of.sync)
        self.log_threshold = nn.Parameter(torch.full((units,), log(of.threshold), dtype=dtype, device=device))
        self._values = self.log_threshold.detach()  # the same memory

    def thresholds(self, x: Tensor) -> Tensor:
        """Return the thresholds for an activation.

        Raises:
            TransformError: it has another number of units.
        """
        checked_code(self.of, x)
        if x.shape[-1] != self._values.numel():
            raise TransformError(
                f"{self.of!r} has thresholds of {self._values.numel()} units, got an activation of shape "
                f"{tuple(x.shape)}: say units={x.shape[-1]}"
            )
        if exporting():  # no parameters but the model's
            own = self._values
        else:
            own = averaged_gradient(self.log_threshold) if self.of.sync else self.log_threshold
        return own.exp().to(x.device, torch.promote_types(x.dtype, torch.float32))

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        threshold = self.thresholds(x)
        y: Tensor = _Jump.apply(at_least_float32(x), threshold, self.of.bandwidth).to(x.dtype)  # type: ignore[no-untyped-call]
        if layout.training:
            self.counts.add(*hits_of(y))
        return y

    def jumped(self, z: Tensor) -> Tensor:
        """Return the activation without a gradient of the thresholds."""
        return above(z, self.thresholds(z).detach(), at_least_float32(z))

    def parameters(self) -> Sequence[nn.Parameter]:
        return (self.log_threshold,)

    def reset(self, units: Tensor) -> None:
        AtLayer.reset(self, units)
        with torch.no_grad():
            self.log_threshold[units] = log(self.of.threshold)

    def state(self) -> dict[str, Tensor]:
        return {"idle": self.counts.idle, "log_threshold": self.log_threshold.detach()}
