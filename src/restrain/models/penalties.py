"""The penalty of the keyword models which needs to know the network: of the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.errors import PenaltyError
from restrain.penalties import NetworkPenalty

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
