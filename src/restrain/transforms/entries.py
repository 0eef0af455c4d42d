"""Constraints on single entries: bounds, signs, fixed values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from restrain.errors import RestrainWarning, TransformError
from restrain.fields import brief, is_number, level_of_caller, shown_number
from restrain.named_tensors import Location
from restrain.operations import Interval
from restrain.penalties.shrink import unsigned_zeros
from restrain.transforms.base import Constraint, wide

_SHOWN = 64  # largest pattern that a repr shows in full


def _one_sided(v: Tensor, at_low: Tensor, at_high: Tensor) -> Tensor:
    """Return `v` without its negative part at lower bounds and positive part at upper bounds."""
    v = torch.where(at_low, v.clamp_min(0), v)
    return torch.where(at_high, v.clamp_max(0), v)


@dataclass(frozen=True)
class NonNegative(Constraint):
    """x ≥ 0 for every entry: negative entries become zero.

    As a parametrisation it is w = softplus(v) = log(1 + exp v) > 0, never exactly zero. Entries
    that are zero or negative at attach start at a hundredth of the weight's root mean square (at
    least 1e-4), with a warning.

    Raises:
        TransformError: a complex tensor, which has no order.

    >>> rs.NonNegative().project(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    keywords = ("non_negative",)
    convex = True
    cone = True
    interval = Interval(low=0.0)
    decays_to = "log 2 = 0.693"

    def project(self, w: Tensor) -> Tensor:
        wide(w, real="so it has no sign: NonNegative needs a real one")
        return unsigned_zeros(w.clamp_min(0))

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        wide(v, real="so it has no sign: NonNegative needs a real one")
        return F.softplus(v, threshold=40)  # above 40, log(1 + exp v) is v in float64 too

    def to_free(self, w: Tensor) -> Tensor:
        outside = wide(w, real="so it has no sign: NonNegative needs a real one") <= 0
        if outside.any():
            least = max(0.01 * float(w.square().mean().sqrt()), 1e-4)
            warnings.warn(
                f"{int(outside.sum())} of {w.numel()} entries are zero or negative; how='parametrize' keeps them "
                f"above zero by softplus, so they begin at {least:.3g}. For exact zeros use how='project'",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
            w = torch.where(outside, least, w)
        return w + torch.log(-torch.expm1(-w))

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return torch.where(w <= 0, v.clamp_min(0), v)


@dataclass(frozen=True)
class Box(Constraint):
    """low ≤ x ≤ high for every entry: entries outside move to the nearer bound.

    Args:
        low: the lower bound, or None.
        high: the upper bound, or None.

    Raises:
        TransformError: no bound, or low above high; a complex tensor.

    >>> rs.Box(-1, 1).project(torch.tensor([-3.0, 0.5, 2.0]))
    tensor([-1.0000,  0.5000,  1.0000])
    """

    low: float | None = None
    high: float | None = None

    convex = True

    @property
    def interval(self) -> Interval:  # type: ignore[override]
        """The interval, with None for an infinite bound."""
        return Interval(
            *[None if bound is None or abs(bound) == inf else float(bound) for bound in (self.low, self.high)]
        )

    def __post_init__(self) -> None:
        for name, none in (("low", -inf), ("high", inf)):
            bound = getattr(self, name)
            # Version 0.1 wrote ±inf for no bound
            if isinstance(bound, (int, float)) and bound == none:
                object.__setattr__(self, name, None)
            elif bound is not None and not is_number(bound):
                raise TransformError(f"{name}= is a finite number, or None for no bound; got {shown_number(bound)}")
        if self.low is None and self.high is None:
            raise TransformError("Box needs a bound: write low=, high= or both")
        low, high = self._bounds()
        if low > high:
            raise TransformError(f"low= is a number that is not above high=; got low={low!r} and high={high!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        Box.__post_init__(self)

    def _bounds(self) -> tuple[float, float]:
        return -inf if self.low is None else self.low, inf if self.high is None else self.high

    def project(self, w: Tensor) -> Tensor:
        wide(w, real="so it has no bounds: Box needs a real one")
        return unsigned_zeros(w.clamp(*self.interval.bounds(w.dtype)))

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        low, high = (torch.tensor(bound, dtype=w.dtype, device=w.device) for bound in self._bounds())
        return _one_sided(v, w <= low, w >= high)


def _plain(value: Any) -> Any:
    """Return a tensor, array or nested list as nested tuples, which can be compared and hashed."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided):
        raise TransformError(f"numbers are given as lists or as a dense tensor with data; got {brief(value)}")
    if isinstance(value, Tensor):
        return _tuples(value.tolist(), value.dim())
    return _plain(value.tolist()) if hasattr(type(value), "tolist") else value


def _tuples(value: Any, depth: int) -> Any:
    """Return lists nested as deep as `depth` as tuples, without a look at each number."""
    return tuple(value if depth == 1 else [_tuples(one, depth - 1) for one in value]) if depth else value


def _as_tensor(name: str, value: Any) -> Tensor:
    """Return numbers of a plan as a tensor.

    Raises:
        TransformError: lists of different lengths, or entries that aren't numbers.
    """
    try:
        return torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TransformError(f"{name}= is a number, a tensor, or nested lists as deep as one: {error}") from error


def _spread(name: str, numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers broadcast to the shape of `like`, on its device.

    Raises:
        TransformError: their shape doesn't broadcast.
    """
    try:
        return numbers.to(like.device).expand(like.shape)
    except RuntimeError as error:
        raise TransformError(
            f"{name} of shape {tuple(numbers.shape)} doesn't fit a tensor of shape {tuple(like.shape)}: its axes, from "
            "the last, must be as long, or one"
        ) from error


def _shown(what: Any) -> str:
    """Return a short repr of a pattern, mask or values: the shape if they are large."""
    if not isinstance(what, tuple):
        return getattr(what, "__name__", type(what).__name__) if callable(what) else repr(what)
    shape = tuple(torch.tensor(what, device="cpu").shape)
    return repr(what) if torch.Size(shape).numel() <= _SHOWN else f"<{' × '.join(map(str, shape))}>"


@dataclass(frozen=True, repr=False)
class Signs(Constraint):
    """x ≥ 0, x ≤ 0 or x free for each entry, by a pattern of 1, -1 and 0.

    `Signs(-1)` is x ≤ 0 for all entries. For entries that must be zero write `Fixed(mask, 0.0)`.

    Args:
        pattern: -1, 0 and 1 as a number, a tensor or nested lists, broadcast to the parameter: for
            a weight (out, in), `[[1], [-1]]` gives a sign to each of two outputs, `[1, -1, 0]` to
            each of three inputs.

    Raises:
        TransformError: the pattern has another number, or a shape that doesn't broadcast; a
            complex tensor.

    >>> rs.Signs([1, -1, 0]).project(torch.tensor([-1.0, 2.0, -3.0]))
    tensor([ 0.,  0., -3.])
    """

    pattern: Any

    convex = True
    cone = True
    separable = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", _plain(self.pattern))
        numbers = self._numbers
        if numbers.dtype == torch.bool or not ((numbers == 0) | (numbers.abs() == 1)).all():
            raise TransformError(f"pattern= holds -1, 0 and 1 only; got {_shown(self.pattern)}")

    @cached_property
    def _numbers(self) -> Tensor:
        return _as_tensor("pattern", self.pattern)

    def __repr__(self) -> str:
        return f"Signs({_shown(self.pattern)})"

    def bound_to(self, at: Location) -> Signs:
        _spread("pattern", self._numbers, at.tensor)
        return self

    def project(self, w: Tensor) -> Tensor:
        wide(w, real="so it has no sign: Signs needs a real one")
        sign = _spread("pattern", self._numbers, w)
        return unsigned_zeros(_one_sided(w, sign > 0, sign < 0))

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        sign = _spread("pattern", self._numbers, w)
        return _one_sided(v, (sign > 0) & (w <= 0), (sign < 0) & (w >= 0))


@dataclass(frozen=True, repr=False)
class Fixed(Constraint):
    """x = value where a mask is true; the other entries are free.

    Args:
        mask: true and false as a bool, a tensor or nested lists, broadcast to the parameter; or a
            function of the parameter, such as `lambda w: w == 0`, called when the rule is attached.
        values: the fixed values: a number, a tensor or nested lists. None: the parameter's entries
            when the rule is attached, which `reg.state_dict()` saves.

    Raises:
        TransformError: the mask or values are of another kind, or of a shape that doesn't
            broadcast; a projection outside of a rule, if there are no values.

    >>> rs.Fixed([[True, False]], values=1.0).project(torch.zeros(2, 2))
    tensor([[1., 0.],
            [1., 0.]])
    """

    mask: Any
    values: Any = None

    convex = True
    separable = True

    def __post_init__(self) -> None:
        if not callable(self.mask):
            given, plain = self.mask, _plain(self.mask)
            if isinstance(given, Tensor):  # in place of the slow way over lists
                vars(self)["_where"] = given.detach().to("cpu", copy=True)
            object.__setattr__(self, "mask", plain)
            if not ((self._where == 0) | (self._where == 1)).all():
                raise TransformError(f"mask= holds true and false only; got {_shown(self.mask)}")
        object.__setattr__(self, "values", _plain(self.values))
        if self.values is not None and not self._numbers.isfinite().all():
            raise TransformError(f"values= are finite; got {_shown(self.values)}")

    @cached_property
    def _where(self) -> Tensor:
        return _as_tensor("mask", self.mask)

    @cached_property
    def _numbers(self) -> Tensor:
        return _as_tensor("values", self.values)

    def __repr__(self) -> str:
        return f"Fixed({_shown(self.mask)}" + (")" if self.values is None else f", values={_shown(self.values)})")

    def bound_to(self, at: Location) -> Constraint:
        w = at.tensor.detach()
        values = w if self.values is None else _spread("values", self._numbers, w).to(w.dtype)
        return _FixedEntries(self, self._mask(w).clone(), values.clone())

    def project(self, w: Tensor) -> Tensor:
        if self.values is None:
            raise TransformError(
                f"{self!r} holds the values that a parameter has when its rule is attached; outside of a rule give "
                "values="
            )
        wide(w)
        return torch.where(self._mask(w), _spread("values", self._numbers, w).to(w.dtype), w)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return torch.where(self._mask(w), 0, v)

    def _mask(self, w: Tensor) -> Tensor:
        if not callable(self.mask):
            return _spread("mask", self._where, w) != 0
        function: Callable[[Tensor], Any] = self.mask
        mask = function(w)
        if isinstance(mask, Tensor) and mask.shape == w.shape and mask.dtype == torch.bool:
            return mask
        came = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TransformError(
            f"the function of Fixed must give a bool tensor of the parameter's shape {tuple(w.shape)}; got {came}"
        )


class _FixedEntries(Constraint, register=False):
    """Entries of a parameter that keep their values: the bound form of `Fixed`."""

    convex = True
    separable = True

    def __init__(self, said: Fixed, mask: Tensor, values: Tensor) -> None:
        self.said, self.mask, self.values = said, mask, values

    def __repr__(self) -> str:
        return repr(self.said)

    def project(self, w: Tensor) -> Tensor:
        return torch.where(self.mask.to(w.device), self.values.to(w), w)

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        return torch.where(self.mask.to(v.device), 0, v)

    def state(self) -> dict[str, Tensor]:
        return {"mask": self.mask, "values": self.values}
