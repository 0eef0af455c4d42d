"""Updates of SGD, Adam and AdamW for compiled code, in place on the optimizer's own state.

    SGD     g += decay p;  b = μ b + (1 - dampening) g;  p -= lr (g + μ b if nesterov else b)
    Adam    m += (1 - β₁) (g - m);  v = β₂ v + (1 - β₂) g²;
            p -= lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

AdamW is Adam with p *= 1 - lr decay before it instead of g += decay p. Scalars that change from
update to update come as a row of a table, so that the code is compiled once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from restrain.torch_private import fused_adam_, fused_adamw_, fused_sgd_, step_hooks

_PLAIN = {"capturable": False, "differentiable": False, "amsgrad": False}


class Formula:
    """Base of the updates: one optimizer with one group of parameters, all with state."""

    names: tuple[str, ...] = ()  # of the state tensors of a parameter

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.group = optimizer, optimizer.param_groups[0]
        self.params: list[Tensor] = list(self.group["params"])

    def state(self) -> list[list[Tensor]]:
        """Return the state tensors, a list for each parameter."""
        return [[self.optimizer.state[p][name] for name in self.names] for p in self.params]

    def table(self, updates: int) -> Tensor:
        """Return the scalars of the next updates, a float64 row for each update."""
        return torch.full((updates, 1), float(self.group["lr"]), dtype=torch.float64, device="cpu")

    def took(self, updates: int) -> None:
        """Advance the optimizer's step counters by the number of updates carried out."""

    def apply(self, p: Tensor, g: Tensor, state: list[Tensor], row: Tensor) -> None:
        """Update one parameter and its state in place; `row` is the row of `table`."""
        raise NotImplementedError

    def fused(self, ps: list[Tensor], gs: list[Tensor], state: list[list[Tensor]], row: Tensor) -> None:
        """Update all parameters and their state in place by torch's fused operation."""
        raise NotImplementedError


class _Sgd(Formula):
    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.names = ("momentum_buffer",) if self.group["momentum"] else ()

    def apply(self, p: Tensor, g: Tensor, state: list[Tensor], row: Tensor) -> None:
        momentum, decay = self.group["momentum"], self.group["weight_decay"]
        g = -g if self.group["maximize"] else g
        g = g + decay * p if decay else g
        if momentum:
            buffer = state[0].mul_(momentum).add_(g, alpha=1 - self.group["dampening"])
            g = g + momentum * buffer if self.group["nesterov"] else buffer
        p.sub_(row[0] * g)

    def fused(self, ps: list[Tensor], gs: list[Tensor], state: list[list[Tensor]], row: Tensor) -> None:
        names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        given: dict[str, Any] = {name: self.group[name] for name in names}
        gs = [g.contiguous() for g in gs]  # the operation ignores strides
        fused_sgd_(ps, gs, [kept[0] for kept in state if kept], lr=row[0], is_first_step=False, **given)


class _Adam(Formula):
    names = ("exp_avg", "exp_avg_sq")

    def table(self, updates: int) -> Tensor:
        (one, two), rate = self.group["betas"], float(self.group["lr"])
        times = float(self.optimizer.state[self.params[0]]["step"]) + torch.arange(
            1, updates + 1, dtype=torch.float64, device="cpu"
        )
        steps, roots = rate / (1 - one**times), (1 - two**times).sqrt()
        return torch.stack([torch.full_like(steps, rate), steps, roots, times], 1)

    def took(self, updates: int) -> None:
        for p in self.params:
            self.optimizer.state[p]["step"] += updates

    def apply(self, p: Tensor, g: Tensor, state: list[Tensor], row: Tensor) -> None:
        (one, two), decay = self.group["betas"], self.group["weight_decay"]
        g = -g if self.group["maximize"] else g
        if decay and self.group["decoupled_weight_decay"]:
            p.mul_(1 - row[0] * decay)
        elif decay:
            g = g + decay * p
        mean, square = state[0].lerp_(g, 1 - one), state[1].mul_(two).addcmul_(g, g, value=1 - two)
        p.sub_(row[1] * (mean / (square.sqrt() / row[2] + self.group["eps"])))

    def fused(self, ps: list[Tensor], gs: list[Tensor], state: list[list[Tensor]], row: Tensor) -> None:
        given: dict[str, Any] = {name: self.group[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}
        (given["beta1"], given["beta2"]), times = self.group["betas"], [row[3].float()] * len(ps)
        gs = [g.contiguous() for g in gs]
        carry_out = fused_adamw_ if self.group["decoupled_weight_decay"] else fused_adam_
        means, squares = map(list, zip(*state, strict=True))
        carry_out(ps, gs, means, squares, [], times, lr=row[0], **given)


def formula_of(optimizer: Any) -> Formula | None:
    """Return the formula of an optimizer, or None if its own `step` must be called."""
    kind = {SGD: _Sgd, Adam: _Adam, AdamW: _Adam}.get(type(optimizer))
    if kind is None or len(optimizer.param_groups) != 1:
        return None
    hooks = step_hooks(optimizer)
    if hooks is None or any(hooks):
        return None  # rules act at the step
    group = optimizer.param_groups[0]
    plain = all(group.get(name, value) == value for name, value in _PLAIN.items())
    return kind(optimizer) if plain and not isinstance(group["lr"], Tensor) else None
