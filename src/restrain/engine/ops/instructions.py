"""What rules do in place to a tensor around a step, as data: changes, and the instructions that they are lowered to.

A `Change` says what is done (gradient, decay, prox, projection) by which penalty or constraint. `lower` turns changes
into instructions and their numbers: an instruction knows what is computed, but no strength and no learning rate, so one
serves all strengths, and compiled code takes the numbers as inputs. Here instructions are carried out by plain torch;
backends have tables of those that they know. What can't be lowered is done by the formulas (`by_formulas`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from restrain.engine.ops.groups import FitRows, Lengths, ShrinkRows, fit_of, length_of, put, row_dims
from restrain.engine.ops.optimizers import ENDLESS, Metric, rooted
from restrain.operations import Function, Interval, Length
from restrain.penalties import Penalty
from restrain.penalties.shrink import at_least_float32, shrink_entries
from restrain.transforms import Constraint

Numbers: TypeAlias = Sequence[Any]  # floats in eager code, 0-d tensors in code that is compiled

Tensors: TypeAlias = "tuple[Tensor, ...]"  # the weights; before a step their gradient, after it the metric's moments


@dataclass(frozen=True)
class Change:
    """What a rule, or the sum of several, does to a tensor."""

    kind: Literal["gradient", "decay", "prox", "project"]
    what: Any  # a penalty, or a constraint for "project"

    @cached_property
    def by_entry(self) -> bool:
        """Whether it may be done to any part of a tensor."""
        return self.what.by_entry  # type: ignore[no-any-return]

    @cached_property
    def _row_dims(self) -> dict[Any, tuple[int, ...] | None]:
        return {}

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The dims by which a tensor is cut into the rows that it is done to; None if that can't be."""
        if shape not in self._row_dims:
            self._row_dims[shape] = row_dims(self.what, tuple(shape))
        return self._row_dims[shape]


@dataclass(frozen=True)
class StepScalars:
    """Scalars of one step: learning rate, gradient scale, metric."""

    rate: float | Tensor = 0.0
    scale: Tensor | None = None  # of the gradients, where a loss scaler has scaled them
    metric: Metric = field(default_factory=lambda: Metric(0.0))


@dataclass(frozen=True)
class Batch:
    """One list of changes for tensors that share their scalars."""

    changes: Sequence[Change]  # one after the other
    scalars: StepScalars
    members: Sequence[Tensors]

    @cached_property
    def lowered(self) -> Lowered | None:
        """The instructions for tensors like the first member's; None if they aren't known."""
        return lower(self.changes, self.scalars, self.members[0][0])

    def of(self, members: Sequence[Tensors]) -> Batch:
        """The same for some of the members."""
        some = Batch(self.changes, self.scalars, members)
        if "lowered" in vars(self):
            vars(some)["lowered"] = self.lowered
        return some

    @property
    def by_entry(self) -> bool:
        """Whether every change may be done to any part of a tensor."""
        return all(change.by_entry for change in self.changes)


# Steps: functions of the weights, of the gradient (before an optimizer step) or the moments (after it), all in float32
# or wider, and of their numbers. They give the new weights, which may be the old ones; gradients change in place.


@dataclass(frozen=True)
class Gradient:
    """gradient += a sgn(w) + 2 c w + Σ s · gradient of each of the others."""

    l1: bool
    l2: bool
    others: tuple[Any, ...] = ()  # operations, each with its `slope`, and penalties that declare none

    def terms(self, w: Tensor) -> list[Callable[[], Tensor]]:
        """What is added, each to be multiplied by a number."""
        elastic = [w.sgn] * self.l1 + [lambda: w] * self.l2
        return elastic + [lambda one=one: slope_of(one, w) for one in self.others]

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        for number, term in zip(numbers, self.terms(w), strict=True):
            if isinstance(number, Tensor):
                others[0].add_(term() * number)
            else:
                others[0].add_(term(), alpha=number)
        return w


@dataclass(frozen=True)
class Decay:
    """w -= the same sum; where every penalty shrinks, entries stop at zero."""

    sum: Gradient
    shrinks: bool

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        new = w
        for number, term in zip(numbers, self.sum.terms(w), strict=True):
            new = new - term() * number
        return new.clamp(w.clamp_max(0), w.clamp_min(0)) if self.shrinks else new


@dataclass(frozen=True)
class Shrink:
    """Entries are scaled by a number, then go towards zero by another."""

    scaled: bool
    soft: bool

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        if self.scaled:
            w = w.mul_(numbers[0])
        return _soft(w, numbers[-1]).add_(0.0) if self.soft else w


@dataclass(frozen=True)
class RootedShrink:
    """The prox of a Σ|x| + c Σ|x|² with the step 1 / (√second · r + e) of each entry: see `_rooted_shrink`."""

    scaled: bool
    soft: bool

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        root, eps, *strengths = numbers
        size = others[0].sqrt()
        if isinstance(root, Tensor):
            size = size.mul_(root).add_(eps)
        else:  # in one pass
            size = torch.add(torch.full((), eps, dtype=w.dtype, device=w.device), size, alpha=root, out=size)
        w = w.mul_(size.clamp_max_(ENDLESS))
        if self.soft:
            w = _soft(w, strengths[0])
        if self.scaled:
            size = size.add_(strengths[-1])
        return torch.addcdiv(w.new_zeros(()), w, size, out=w)  # -0.0 becomes +0.0


@dataclass(frozen=True)
class Prox:
    """The prox of a Σ|x| + c Σ|x|² + s · one other, with a step of each entry, or of all."""

    l1: bool
    l2: bool
    other: Penalty | None = None
    size: Callable[..., Tensor] | None = None  # of a metric
    counted: int = 0  # the numbers that it takes

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        left = list(numbers)
        step: Any = left.pop(0)
        if self.size is not None:
            size = self.size(*others, *[left.pop(0) for _ in range(self.counted)])
            step = (size.reciprocal_() * step).clamp_max_(ENDLESS)
        l1 = left.pop(0) if self.l1 else 0.0
        l2 = left.pop(0) if self.l2 else 0.0
        if self.l1 or self.l2:
            w = shrink_entries(w, step, l1, l2)
        if self.other is not None:
            w = self.other.prox(w, left.pop(0) * (step / (1 + 2 * l2 * step) if self.l2 else step))
        return w


@dataclass(frozen=True)
class Project:
    """w = the nearest number of an interval."""

    interval: Interval

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        return w.clamp_(self.interval.low, self.interval.high).add_(0.0)  # -0.0 becomes +0.0


Instruction: TypeAlias = Gradient | Decay | Shrink | RootedShrink | Prox | Project | ShrinkRows | FitRows
Lowered: TypeAlias = Sequence[tuple[Instruction, Sequence[Any]]]


def _soft(w: Tensor, threshold: float | Tensor) -> Tensor:
    """The soft threshold; some zeros are -0.0."""
    if isinstance(threshold, Tensor):
        return w.sub_(w.clamp(-threshold, threshold))
    return F.softshrink(w, threshold, out=w)  # type: ignore[call-arg]


def carry_out(lowered: Lowered, tensors: Sequence[Tensor]) -> None:
    """Do in place what was lowered, to the weights and their gradient, or to the weights by their moments."""
    w, *others = map(at_least_float32, tensors)
    new = w
    for step, numbers in lowered:
        new = step(new, others, numbers)
    adds = any(isinstance(step, Gradient) for step, _ in lowered)
    for old, now in zip(tensors, [new, *others[:adds]], strict=False):
        if now is not old:
            old.copy_(now)


def lower(changes: Sequence[Change], scalars: StepScalars, w: Tensor) -> Lowered | None:
    """The instructions that do this to a tensor like `w`, each with its numbers; None if they aren't known."""
    half = w.dtype.itemsize < 4 and any(
        change.kind == "project" for change in changes
    )  # a bound holds for what is rounded
    if w.is_complex() or half or not (all(change.by_entry for change in changes) or rows_of(changes, w) is not None):
        return None
    try:
        return [step for change in changes for step in _LOWER[change.kind](change.what, scalars)]
    except _UnknownNumberError:
        return None


def rows_of(changes: Sequence[Change], w: Tensor) -> tuple[int, ...] | None:
    """The dims by which a tensor is cut into rows for changes of which some are on rows; None if that can't be."""
    of_rows = [change for change in changes if not change.by_entry]
    if not w.is_cpu and any(change.kind == "project" for change in of_rows):
        return None  # it looks at the lengths
    found = {change.rows(w.shape) for change in of_rows}
    return found.pop() if len(found) == 1 else None


class _UnknownNumberError(Exception):
    """A number that isn't at hand."""


def _float(number: float | Tensor) -> float:
    if isinstance(number, Tensor) and number.device.type != "cpu":
        raise _UnknownNumberError
    if not isfinite(number := float(number)):
        raise _UnknownNumberError
    return number


def slope_of(one: Any, w: Tensor) -> Tensor:
    """The gradient of an operation, or of a penalty that declares none."""
    found: Tensor = one.gradient(w) if isinstance(one, Penalty) else one.slope(w)
    return found


def _split(penalty: Penalty) -> tuple[float, float, list[tuple[float, Any]]]:
    """a and c of a Σ|x| + c Σ|x|², and the other penalties with their strengths."""
    l1, l2, others = penalty.split()
    pairs = [(_float(strength), other) for strength, other in others]
    return _float(l1), _float(l2), [pair for pair in pairs if pair[0]]


def _declared(strength: float, penalty: Penalty) -> list[tuple[float, Any]]:
    """The operations that a penalty declares, with their strengths; the penalty itself where it declares none.

    A length is that of a row, where groups are rows.
    """
    terms = penalty.operations
    if terms is None or any(isinstance(one, Function) for _, one in terms):
        return [(strength, penalty)]
    return [
        (strength * factor * length_of(one.per) ** 0.5, Lengths())
        if isinstance(one, Length)
        else (strength * factor, one)
        for factor, one in terms
    ]


def _gradient(penalty: Penalty, scalars: StepScalars) -> Lowered:
    step, numbers = _sum(penalty, 1.0 if scalars.scale is None else _float(scalars.scale))
    return [(step, numbers)] if numbers else []


def _sum(penalty: Penalty, factor: float) -> tuple[Gradient, tuple[float, ...]]:
    l1, l2, found = _split(penalty)
    others = [pair for strength, other in found for pair in _declared(strength, other)]
    strengths = [l1] * (l1 > 0) + [2 * l2] * (l2 > 0) + [strength for strength, _ in others]
    step = Gradient(l1 > 0, l2 > 0, tuple([other for _, other in others]))
    return step, tuple([factor * strength for strength in strengths])


def _decay(penalty: Penalty, scalars: StepScalars) -> Lowered:
    rate = _float(scalars.rate)
    step, numbers = _sum(penalty, rate)
    shrinks = all(leaf.shrinks for _, leaf in penalty.leaves())
    if shrinks and not step.others and rate >= 0:
        l1, l2, _ = _split(penalty)
        return _shrink(max(1 - 2 * l2 * rate, 0.0), l1 * rate)
    if not (step.l1 or step.l2) and list(map(type, step.others)) == [Lengths] and rate >= 0:
        return [(ShrinkRows(), numbers)]
    return [(Decay(step, shrinks), numbers)] if numbers else []


def _shrink(scale: float, threshold: float) -> Lowered:
    numbers = (scale,) * (scale != 1) + (threshold,) * (threshold > 0)
    return [(Shrink(scale != 1, threshold > 0), numbers)] if numbers else []


def _prox(penalty: Penalty, scalars: StepScalars) -> Lowered:
    metric, (l1, l2, others) = scalars.metric, _split(penalty)
    scale = _float(metric.scale)
    if scale < 0 or len(others) > 1:
        raise _UnknownNumberError
    strength, other = others[0] if others else (0.0, None)
    by_length = _by_length(other)
    if not metric.moments:
        rest = scale / (1 + 2 * l2 * scale)
        last: list[tuple[Instruction, Sequence[float]]] = []
        if by_length:
            last = [(ShrinkRows(), (strength * by_length * rest,))]
        elif other is not None:
            last = [(Prox(False, False, other), (rest, strength))]
        return [*_shrink(1 / (1 + 2 * l2 * scale), l1 * rest), *last]
    if by_length:  # with steps that differ within a group
        raise _UnknownNumberError
    sizes = tuple(map(_float, metric.numbers))
    if not (l1 or l2 or strength):
        return []
    if metric.size is rooted and other is None and scale and sizes[1]:
        return _rooted_shrink(l1, l2, scale, *sizes)
    numbers = (scale, *sizes) + (l1,) * (l1 > 0) + (l2,) * (l2 > 0) + (strength,) * (other is not None)
    return [(Prox(l1 > 0, l2 > 0, other, metric.size, len(sizes)), numbers)]


def _by_length(penalty: Penalty | None) -> float:
    """The factor of the length of each row, where a penalty is a sum of these; else 0."""
    found = [] if penalty is None else _declared(1.0, penalty)
    return float(found[0][0]) if [type(one) for _, one in found] == [Lengths] else 0.0


def _rooted_shrink(l1: float, l2: float, scale: float, root: float, eps: float) -> Lowered:
    """With the size s = √second / root + eps and the step t = scale / s of an entry.

    The soft threshold of x at a t, divided by 1 + 2 c t, is that of s x at a scale, divided by s + 2 c scale. No step
    is longer than ENDLESS, so no s is below scale / ENDLESS.
    """
    eps = max(eps, scale / ENDLESS)
    numbers = (1 / root, eps) + (l1 * scale,) * (l1 > 0) + (2 * l2 * scale,) * (l2 > 0)
    return [(RootedShrink(l2 > 0, l1 > 0), tuple(map(_float, numbers)))]


def _project(constraint: Constraint, scalars: StepScalars) -> Lowered:
    if isinstance(constraint.interval, Interval):
        return [(Project(constraint.interval), ())]
    fit = fit_of(constraint)
    if fit is None:
        raise _UnknownNumberError
    return [(fit, ())]


_LOWER: dict[str, Callable[[Any, StepScalars], Lowered]] = {
    "gradient": _gradient,
    "decay": _decay,
    "prox": _prox,
    "project": _project,
}


# What can't be lowered


def by_formulas(changes: Sequence[Change], scalars: StepScalars, tensors: Sequence[Tensor]) -> None:
    """Do in place what the changes say, by the formulas, to tensors as `carry_out` takes them.

    Entries that are NaN don't spread; see `put`.
    """
    w, *others = tensors
    for change in changes:
        if change.kind == "gradient":
            added = change.what.gradient(w)
            others[0].add_(added if scalars.scale is None else added * scalars.scale.to(added.dtype))
            continue
        if change.kind == "decay":
            new = decayed(w, change.what, scalars.rate)
        elif change.kind == "prox":
            new = change.what.prox(w, scalars.metric.steps(*others))
        else:
            new = change.what.project(w)
        w.copy_(new) if change.by_entry else put(w, new)


def decayed(w: Tensor, penalty: Penalty, rate: float | Tensor) -> Tensor:
    """w - rate · gradient of the penalty at w; entries that a penalty shrinks stop at zero."""
    wide = at_least_float32(w)
    new = (penalty.gradient(wide) * -rate).add_(wide)
    if not all(leaf.shrinks for _, leaf in penalty.leaves()):
        return new
    if wide.is_complex():
        return torch.where((new * wide.conj()).real < 0, 0, new)
    return new.clamp_(wide.clamp_max(0), wide.clamp_min(0))  # much faster than `where`
