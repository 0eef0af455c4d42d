"""Operations: the formula of a penalty or constraint declared as data, for fast backends.

A penalty that is a weighted sum of a function of each entry, or of the lengths of groups, declares
it in `operations`; a constraint to an interval of entries or lengths declares it in `interval`.
This file has the formulas in plain torch, the reference; a backend (`engine/backends`) has a table
of the operations that it supports. A penalty defined elsewhere, such as a user's, is as fast as
ours if it declares the same:

>>> class Sparse(rs.Penalty):
...     entrywise = True
...     operations = ((2.0, rs.operations.Absolute()),)
...     def __call__(self, w):
...         return 2 * w.abs().sum()
>>> rs.operations.check(Sparse())  # compares the formula with what is declared

When a class is first attached, its declaration and formula are compared; a difference is an error.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from restrain.axes import Grouping, Per, group_norms, grouping, squared
from restrain.errors import PenaltyError


class Operation(ABC):
    """Function of a tensor: a sum over entries or groups. Subclasses are frozen dataclasses."""

    by_entry: bool = True
    """True for a sum over entries: any part of a tensor can be computed alone."""

    @abstractmethod
    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the tensor, differentiable."""

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """Return the gradient of `total`, zero at kinks."""


Terms: TypeAlias = "tuple[tuple[float, Operation], ...]"
"""A weighted sum of operations: pairs of factor and operation."""


class ByEntry(Operation):
    """Sum of `value` over entries."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return the function of each entry: real, for real or complex entries."""

    def total(self, x: Tensor) -> Tensor:
        return self.value(x).sum()


@dataclass(frozen=True)
class Absolute(ByEntry):
    """|x|."""

    def value(self, x: Tensor) -> Tensor:
        return torch.abs(x)

    def slope(self, x: Tensor) -> Tensor:
        return x.sgn()


@dataclass(frozen=True)
class Square(ByEntry):
    """|x|²."""

    def value(self, x: Tensor) -> Tensor:
        return squared(x)

    def slope(self, x: Tensor) -> Tensor:
        return 2 * x


@dataclass(frozen=True)
class Huber(ByEntry):
    """½|x|² where |x| ≤ delta, delta (|x| - delta / 2) beyond."""

    delta: float

    def value(self, x: Tensor) -> Tensor:
        size = torch.abs(x)
        return torch.where(size <= self.delta, squared(x) / 2, self.delta * (size - self.delta / 2))

    def slope(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() <= self.delta, x, self.delta * x.sgn())


@dataclass(frozen=True)
class Logarithm(ByEntry):
    """log(1 + |x| / epsilon)."""

    epsilon: float

    def value(self, x: Tensor) -> Tensor:
        return torch.log1p(torch.abs(x) / self.epsilon)

    def slope(self, x: Tensor) -> Tensor:
        return x.sgn() / (self.epsilon + x.abs())


@dataclass(frozen=True)
class Function(ByEntry):
    """Any other function of entries and its derivative: `entries` and `slopes` of a penalty."""

    penalty: Any

    def value(self, x: Tensor) -> Tensor:
        return self.penalty.entries(x)  # type: ignore[no-any-return]

    def slope(self, x: Tensor) -> Tensor:
        return self.penalty.slopes(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Length(Operation):
    """√n_g ‖x_g‖₂, summed over groups g of n_g entries; the slope is zero where ‖x_g‖₂ is zero."""

    per: Per | Grouping
    by_entry = False

    def total(self, x: Tensor) -> Tensor:
        groups = grouping(self.per, x.shape)
        norms = group_norms(x, groups)
        return groups.once(groups.sizes(norms) ** 0.5 * norms).sum()

    def slope(self, x: Tensor) -> Tensor:
        groups = grouping(self.per, x.shape)
        parts = groups.view(x)
        norms = group_norms(parts, groups)
        zero = norms == 0
        unit = torch.where(zero, 0, parts / torch.where(zero, 1, norms))
        return groups.restore(groups.sizes(norms) ** 0.5 * unit, torch.zeros_like(x))


@dataclass(frozen=True)
class Interval:
    """Constraint low ≤ x ≤ high for every entry; None for no bound."""

    low: float | None = None
    high: float | None = None

    def nearest(self, w: Tensor) -> Tensor:
        """Return the nearest tensor that satisfies the constraint."""
        return w.clamp(*self.bounds(w.dtype))

    def bounds(self, dtype: torch.dtype) -> tuple[float | None, float | None]:
        """Return (low, high), moved into the range of a dtype; float16's ends at 65504."""
        most = torch.finfo(dtype).max
        low, high = (None if bound is None else max(-most, min(most, bound)) for bound in (self.low, self.high))
        return low, high


@dataclass(frozen=True)
class LengthInterval:
    """Constraint low ≤ ‖x_g‖₂ ≤ high for every group g."""

    low: float
    high: float
    per: Per | Grouping | None

    def nearest(self, w: Tensor) -> Tensor:
        """Return the nearest tensor that satisfies the constraint; no group may be zero."""
        groups = Grouping(tuple(w.shape), ()) if self.per is None else grouping(self.per, w.shape)
        norms = group_norms(groups.view(w), groups)
        return groups.restore(groups.view(w) * (norms.clamp(self.low, self.high) / norms), w)


# Comparison of declarations with formulas

_checked: set[type] = set()


def check(what: Any) -> None:
    """Compare the declaration of a penalty or constraint with its formula on random numbers.

    Each class is compared once.

    Raises:
        PenaltyError: they differ.
    """
    if type(what) in _checked:
        return
    what = _by_rows(what)
    interval, terms = getattr(what, "interval", None), getattr(what, "operations", None)
    if interval is not None:
        _compare(what, "interval", "project", interval.nearest, what.project)
    if terms is not None and not any(isinstance(one, Function) for _, one in terms):
        _compare(what, "operations", "__call__", lambda x: total(terms, x), what)
        _compare(what, "operations", "gradient", lambda x: slope(terms, x), what.gradient)
    _checked.add(type(what))


def total(terms: Terms, x: Tensor) -> Tensor:
    """Return the value of a weighted sum of operations."""
    return weighted([(factor, one.total(x)) for factor, one in terms])


def slope(terms: Terms, x: Tensor) -> Tensor:
    """Return the gradient of a weighted sum of operations."""
    return weighted([(factor, one.slope(x)) for factor, one in terms])


def weighted(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Return the weighted sum of tensors, without multiplications by one."""
    first, *others = [value if factor == 1 else factor * value for factor, value in parts]
    for other in others:
        first = first + other
    return first


def _compare(what: Any, declared: str, formula: str, fast: Callable[[Tensor], Tensor], slow: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(_sample_shape(what), generator=draws, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        expected, found = slow(x.clone()), fast(x)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
        raise PenaltyError(
            f"the {formula} of {type(what).__name__} differs from what its `{declared}` says: on a random tensor they "
            f"give {_shown(expected)} and {_shown(found)}. Declare `{declared} = None`, which is right for any "
            "formula, or make both the same"
        )


def _by_rows(what: Any) -> Any:
    """Return a dataclass with rows as groups, which fit the tensor of the comparison."""
    fields = dataclasses.fields(what) if dataclasses.is_dataclass(what) else ()
    if any(field.name == "per" and field.init for field in fields) and what.per is not None:
        return dataclasses.replace(what, per="row")
    return what


def _sample_shape(what: Any) -> tuple[int, ...]:
    per = getattr(what, "per", None)
    return per.shape if isinstance(per, Grouping) else (6, 4)


def _shown(x: Tensor) -> str:
    return f"{x.item():.6g}" if x.dim() == 0 else f"norm {float(x.norm()):.6g}"
