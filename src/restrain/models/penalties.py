"""Penalties of the keyword models which need to know the network: of the Jacobian, and of changes over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.errors import PenaltyError
from restrain.penalties import NetworkPenalty, Penalty
from restrain.penalties.base import Tensors

INPUT = ":inputs"  # what the model's own input is called among the outputs that a penalty on the network is given
_AT_ONCE = 2**22  # entries of the Jacobian that are computed together

# dh/da of an activation h = f(a), as a function of h
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.ones_like,
    "relu": lambda h: (h > 0).to(h),
    "tanh": lambda h: 1 - h.square(),
    "sigmoid": lambda h: h * (1 - h),
}


@dataclass(frozen=True)
class Contractive(NetworkPenalty, register=False):
    """Σ_layers mean_batch ‖∂h/∂x‖_F², x being the model's input: exact, by one backward for each unit.

    For the first layer, of h = f(W x + b), it is mean_batch Σⱼ f'(aⱼ)² ‖wⱼ‖², which costs less than the forward.
    The input must require a gradient.

    Args:
        first: the name of a layer for which the closed form holds, or "".
        activation: its activation.

    Source: Rifai and others (2011), contractive auto-encoders, eq. 2.
    """

    first: str = ""
    activation: str = ""

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        x = outputs[INPUT]
        value = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for name, h in outputs.items():
            if name == INPUT:
                continue
            h, weight = h.to(value.dtype), parameters.get(f"{name}.weight")
            if name == self.first and weight is not None and self.activation in _SLOPES:
                slopes = _SLOPES[self.activation](h)
                square = (slopes.square() @ weight.square().sum(1)).sum()
            else:
                square = _squared_jacobian(h, x)
            value = value + square / max(len(x), 1)
        return value


def _squared_jacobian(h: Tensor, x: Tensor) -> Tensor:
    """Σ over the batch of ‖∂h/∂x‖_F², for samples that don't depend on each other."""
    if not x.requires_grad:
        raise PenaltyError("contractive needs the derivative by the input: call x.requires_grad_() before the forward")
    units = h.flatten(1).sum(0)
    rows = max(1, _AT_ONCE // max(x.numel(), 1))
    value = x.new_zeros(())
    for start in range(0, len(units), rows):
        if not units.requires_grad:
            break
        some = torch.arange(start, min(start + rows, len(units)), device=h.device)
        basis = h.new_zeros(len(some), len(units)).index_put((some - start, some), h.new_ones(()))
        (jacobian,) = torch.autograd.grad(
            units, x, basis, create_graph=torch.is_grad_enabled(), retain_graph=True, is_grads_batched=True
        )
        value = value + jacobian.square().sum()
    return value


@dataclass(frozen=True)
class RecurrentState(Penalty, register=False):
    """Mean over batch and transitions of ‖hₜ₊₁ - hₜ‖², h of shape (batch, time, units); zero for a single step.

    Args:
        per_unit: the mean over units too, as theanets computes it.

    Source: Krueger and Memisevic (2015), where it is the alternative to the norm stabiliser.
    """

    per_unit: bool = False

    def __call__(self, w: Tensors) -> Tensor:
        """The mean for one sequence, of shape (time, units), or the sum of those of several."""
        change: Tensor = w.diff(dim=-2).square().sum() / max(w.shape[-2] - 1, 1)
        return change / w.shape[-1] if self.per_unit else change


@dataclass(frozen=True)
class RecurrentNorm(Penalty, register=False):
    """Mean over batch and transitions of (‖hₜ₊₁‖² - ‖hₜ‖²)², h of shape (batch, time, units).

    Source: Krueger and Memisevic (2015), eq. 1, with squared lengths, which are smooth at zero.
    """

    def __call__(self, w: Tensors) -> Tensor:
        """The mean for one sequence, of shape (time, units), or the sum of those of several."""
        lengths: Tensor = w.square().sum(-1)
        value: Tensor = lengths.diff(dim=-1).square().sum() / max(w.shape[-2] - 1, 1)
        return value
