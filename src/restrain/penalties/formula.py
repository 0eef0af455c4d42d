"""What `Penalty` puts around the formulas of its subclasses: precision, many tensors at once, masks."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restrain.errors import PenaltyError
from restrain.penalties.shrink import at_least_float32

Tensors: TypeAlias = Any
"""What a penalty is called with: a tensor, or an iterable or mapping of them (a formula: one tensor)."""


def in_float32(formula: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """formula(w), computed at least in float32 and outside autocast.

    Raises:
        PenaltyError: `w` isn't of a floating-point or complex type.
    """
    if not (w.is_floating_point() or w.is_complex()):
        raise PenaltyError(f"a penalty needs a floating-point or complex tensor, got {w.dtype}: convert it by .float()")
    device = w.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return formula(at_least_float32(w))
    return formula(at_least_float32(w))


def of_tensors(formula: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensors], Tensor]:
    """A `__call__` for one tensor, made to take also an iterable or mapping of them, over which it sums.

    `Penalty.__init_subclass__` puts it around the `__call__` of every subclass, so that whoever writes a
    penalty writes its formula and nothing else. It is plain tensor code, which torch.compile traces with
    fullgraph=True.
    """

    @functools.wraps(formula)
    def call(self: Any, w: Tensors) -> Tensor:
        if not isinstance(w, Tensor) and type(w).__module__.partition(".")[0] == "keras":
            w = w.value  # of a variable of a Keras 3 layer, on its torch backend
        if isinstance(w, Tensor):
            return _scalar(self, in_float32(functools.partial(formula, self), w))
        if isinstance(w, nn.Module) or not isinstance(w, Iterable):
            hint = ": pass model.parameters()" if isinstance(w, nn.Module) else ""
            raise PenaltyError(
                f"{self!r} takes a tensor, or an iterable or mapping of them, got {type(w).__name__}{hint}"
            )
        members = list(w.values() if isinstance(w, Mapping) else w)
        for member in members:
            if not isinstance(member, Tensor):
                raise PenaltyError(f"{self!r} got an iterable with {type(member).__name__} in it; it takes tensors")
        if not members:
            raise PenaltyError(f"{self!r} got an empty iterable of tensors: one that was already used up?")
        values = [_scalar(self, in_float32(functools.partial(formula, self), member)) for member in members]
        return functools.reduce(operator.add, [value.to(values[0].device) for value in values])

    return call


def _scalar(penalty: object, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise PenaltyError(f"the __call__ of {type(penalty).__name__} must return a 0-d tensor, got {came}: sum it")


def taking_masks(over_batch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An `over_batch` that takes a mask; one without that argument is given h with zeros under the mask.

    `Penalty.__init_subclass__` puts it around the `over_batch` of every subclass.
    """
    if "mask" in inspect.signature(over_batch).parameters:
        return over_batch

    @functools.wraps(over_batch)
    def call(self: Any, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return over_batch(self, h if mask is None else self.without_padding(h, mask), dim)

    return call
