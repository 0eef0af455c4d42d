"""The updates of the table of optimizers, for recorded and compiled code, in place on the state.

Scalars that change from update to update come as a row of a table, so that the code is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from restrain.engine import OPTIMIZERS, state_names
from restrain.torch_private import foreach_add_, fused_adam_, fused_adamw_, fused_sgd_, step_hooks

_AT_ONCE = 256  # updates whose counts are made at once
_PLAIN = {"capturable": False, "differentiable": False, "amsgrad": False}


class Formula:
    """The update of an optimizer with one group of parameters, all of which have their state."""

    def __init__(self, optimizer: Optimizer) -> None:
        known = OPTIMIZERS[type(optimizer)].update
        assert known is not None
        self.optimizer, self.group, self._update = optimizer, optimizer.param_groups[0], known
        self.params: list[Tensor] = list(self.group["params"])
        self.names = state_names(self.group)  # of the state tensors of a parameter
        self._rate: tuple[float, Tensor] | None = None
        self._counts: Sequence[Tensor] = ()  # from `_first` on
        self._first = 0

    def state(self) -> list[list[Tensor]]:
        """Return the state tensors, a list for each parameter."""
        return [[self.optimizer.state[p][name] for name in self.names] for p in self.params]

    @property
    def count(self) -> int:
        """The number of updates so far; 0 where the optimizer doesn't count them."""
        return int(self.optimizer.state[self.params[0]].get("step", 0))

    def table(self, updates: int) -> Tensor:
        """Return the scalars of the next updates, a float64 row each.

        They are the learning rate, the count and those of the formula.
        """
        counts = [float(self.count + number) for number in range(1, updates + 1)]
        rate = float(self.group["lr"])
        rows = [(rate, count, *self._update.scalars(self.group, count)) for count in counts]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def scalars(self, updates: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return rate and count of each of the next updates, for `fused`."""
        if self._rate is None or self._rate[0] != self.group["lr"]:
            self._rate = self.group["lr"], torch.tensor(float(self.group["lr"]), dtype=dtype, device="cpu")
        first = self.count + 1
        if not self._first <= first <= first + updates <= self._first + len(self._counts):
            size = max(updates, _AT_ONCE)
            self._first = first
            self._counts = torch.arange(first, first + size, dtype=torch.float32, device="cpu").unbind()
        at = first - self._first
        return [(self._rate[1], count) for count in self._counts[at : at + updates]]

    def took(self, updates: int) -> None:
        """Advance the optimizer's step counters by the number of updates carried out."""
        if "step" in self.optimizer.state[self.params[0]]:
            counts = [self.optimizer.state[p]["step"] for p in self.params]
            foreach_add_(counts, torch.full((), float(updates), device="cpu"), alpha=1.0)

    def apply(self, p: Tensor, g: Tensor, state: list[Tensor], row: Tensor) -> None:
        """Update one parameter and its state in place; `row` is the row of `table`."""
        weight, kept = self._update.step(self.group, row[2:].unbind(), p, g, state)
        for held, new in zip((p, *state), (weight, *kept), strict=True):
            held.copy_(new)

    def fused(self, ps: list[Tensor], gs: list[Tensor], state: list[list[Tensor]], rate: Tensor, count: Tensor) -> None:
        """Update all parameters and their state in place by torch's fused operation.

        `rate` and `count` are those of `scalars`.
        """
        gs = [g.contiguous() for g in gs]  # the operation ignores strides
        if "betas" not in self.group:
            given = self._settings("momentum", "dampening", "weight_decay", "nesterov", "maximize")
            fused_sgd_(ps, gs, [kept[0] for kept in state if kept], lr=rate, is_first_step=False, **given)
            return
        given = self._settings("weight_decay", "eps", "amsgrad", "maximize")
        given["beta1"], given["beta2"] = self.group["betas"]
        carry_out = fused_adamw_ if self.group["decoupled_weight_decay"] else fused_adam_
        means, squares = map(list, zip(*state, strict=True))
        carry_out(ps, gs, means, squares, [], [count] * len(ps), lr=rate, **given)

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: self.group[name] for name in names}


def formula_of(optimizer: Any, *, hooked: bool = False) -> Formula | None:
    """Return the formula of an optimizer, or None if its own `step` must be called.

    With `hooked`, what its hooks do is done otherwise.
    """
    known = OPTIMIZERS.get(type(optimizer))
    if known is None or known.update is None or len(optimizer.param_groups) != 1:
        return None
    hooks: Sequence[Any] | None = step_hooks(optimizer)
    if hooks is None or (any(hooks) and not hooked):
        return None  # rules act at the step
    group = optimizer.param_groups[0]
    plain = all(group.get(name, value) == value for name, value in _PLAIN.items())
    return Formula(optimizer) if plain and not isinstance(group["lr"], Tensor) else None
