"""What rules do in place to the entries of a tensor: gradient, decay, prox, projection.

Most rules are sums over entries: a Σ|x| + c Σ|x|² and few others. `lower` turns these into steps and their numbers. A
step knows what kind of thing is done, but no strength and no learning rate: so one step serves all strengths, and code
that is compiled of it (`fused`) takes the numbers as inputs. Groups that are rows have their own (`rows`). What can't
be lowered (other groups, complex entries, numbers that another device holds) is done by `slowly`.
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

from restrain.engine.ops.groups import FitRows, Lengths, ShrinkRows, fit_of, kept, length_of, put
from restrain.engine.ops.metric import ENDLESS, Metric, rooted
from restrain.penalties import GroupLasso, Penalty
from restrain.penalties.shrink import at_least_float32, shrink_entries
from restrain.transforms import Box, Constraint, NonNegative

Numbers: TypeAlias = Sequence[Any]  # floats in eager code, 0-d tensors in code that is compiled

Tensors: TypeAlias = "tuple[Tensor, ...]"  # the weights; before a step their gradient, after it the metric's moments


@dataclass(frozen=True)
class Act:
    """What a rule, or the sum of several, does to a tensor."""

    kind: Literal["gradient", "decay", "prox", "project"]
    what: Any  # a penalty, or a constraint for "project"

    @cached_property
    def by_entry(self) -> bool:
        """Whether it may be done to any part of a tensor."""
        if isinstance(self.what, Constraint):
            return isinstance(self.what, NonNegative | Box)
        return bool(self.what.entrywise and self.what.uniform)

    @cached_property
    def _kept(self) -> dict[Any, tuple[int, ...] | None]:
        return {}

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The dims by which a tensor is cut into the rows that it is done to; None if that can't be."""
        if shape not in self._kept:
            self._kept[shape] = kept(self.what, tuple(shape))
        return self._kept[shape]


@dataclass(frozen=True)
class Given:
    """The numbers of a step of the optimizer."""

    rate: float | Tensor = 0.0
    scale: Tensor | None = None  # of the gradients, where a loss scaler has scaled them
    metric: Metric = field(default_factory=lambda: Metric(0.0))


@dataclass(frozen=True)
class Lot:
    """Acts, with numbers that are the same for all of some members."""

    acts: Sequence[Act]  # one after the other
    given: Given
    members: Sequence[Tensors]

    @property
    def by_entry(self) -> bool:
        """Whether every act may be done to any part of a tensor."""
        return all(act.by_entry for act in self.acts)


# Steps: functions of the weights, of the gradient (before an optimizer step) or the moments (after it), all in float32
# or wider, and of their numbers. They give the new weights, which may be the old ones; gradients change in place.


@dataclass(frozen=True)
class Gradient:
    """gradient += a sgn(w) + 2 c w + Σ s · gradient of each of the others."""

    l1: bool
    l2: bool
    others: tuple[Penalty, ...] = ()

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it calls."""
        return tuple(map(type, self.others))

    def terms(self, w: Tensor) -> list[Callable[[], Tensor]]:
        """What is added, each to be multiplied by a number."""
        elastic = [w.sgn] * self.l1 + [lambda: w] * self.l2
        return elastic + [lambda one=one: one.gradient(w) for one in self.others]

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

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it calls."""
        return self.sum.parts

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
    parts = ()

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        if self.scaled:
            w = w.mul_(numbers[0])
        return _soft(w, numbers[-1]).add_(0.0) if self.soft else w


@dataclass(frozen=True)
class RootedShrink:
    """The prox of a Σ|x| + c Σ|x|² with the step 1 / (√second · r + e) of each entry: see `_rooted_shrink`."""

    scaled: bool
    soft: bool
    parts = ()

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

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it calls."""
        return (self.size or Prox, Prox if self.other is None else type(self.other))

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
    """w = the nearest point of a set."""

    constraint: Any  # NonNegative or Box

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it calls."""
        return (type(self.constraint),)

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        bounds = (
            (0.0, None) if isinstance(self.constraint, NonNegative) else (self.constraint.low, self.constraint.high)
        )
        return w.clamp_(*bounds).add_(0.0)  # -0.0 becomes +0.0


Step: TypeAlias = Gradient | Decay | Shrink | RootedShrink | Prox | Project | ShrinkRows | FitRows
Lowered: TypeAlias = Sequence[tuple[Step, Sequence[Any]]]


def _soft(w: Tensor, threshold: float | Tensor) -> Tensor:
    """The soft threshold; some zeros are -0.0."""
    if isinstance(threshold, Tensor):
        return w.sub_(w.clamp(-threshold, threshold))
    return F.softshrink(w, threshold, out=w)  # type: ignore[call-arg]


def quickly(lowered: Lowered, tensors: Sequence[Tensor]) -> None:
    """Do in place what was lowered, to the weights and their gradient, or to the weights by their moments."""
    w, *others = map(at_least_float32, tensors)
    new = w
    for step, numbers in lowered:
        new = step(new, others, numbers)
    adds = any(isinstance(step, Gradient) for step, _ in lowered)
    for old, now in zip(tensors, [new, *others[:adds]], strict=False):
        if now is not old:
            old.copy_(now)


def lower(acts: Sequence[Act], given: Given, w: Tensor) -> Lowered | None:
    """The steps that do this to a tensor like `w`, each with its numbers; None if they aren't known."""
    half = w.dtype.itemsize < 4 and any(act.kind == "project" for act in acts)  # a bound holds for what is rounded
    if w.is_complex() or half or not (all(act.by_entry for act in acts) or rows_of(acts, w) is not None):
        return None
    try:
        return [step for act in acts for step in _LOWER[act.kind](act.what, given)]
    except _UnknownError:
        return None


def rows_of(acts: Sequence[Act], w: Tensor) -> tuple[int, ...] | None:
    """The dims by which a tensor is cut into rows for acts of which some are on rows; None if that can't be."""
    of_rows = [act for act in acts if not act.by_entry]
    if not w.is_cpu and any(act.kind == "project" for act in of_rows):
        return None  # it looks at the lengths
    found = {act.rows(w.shape) for act in of_rows}
    return found.pop() if len(found) == 1 else None


class _UnknownError(Exception):
    """A number that isn't at hand."""


def _float(number: float | Tensor) -> float:
    if isinstance(number, Tensor) and number.device.type != "cpu":
        raise _UnknownError
    if not isfinite(number := float(number)):
        raise _UnknownError
    return number


def _split(penalty: Penalty) -> tuple[float, float, list[tuple[float, Any]]]:
    l1, l2, others = penalty.split()
    pairs = [_by_row(_float(strength), other) for strength, other in others]
    return _float(l1), _float(l2), [(strength, other) for strength, other in pairs if strength]


def _by_row(strength: float, penalty: Any) -> tuple[float, Any]:
    """The same of the lengths of rows, where the groups are rows."""
    if isinstance(penalty, GroupLasso):
        return strength * length_of(penalty.per) ** 0.5, Lengths()
    return strength, penalty


def _gradient(penalty: Penalty, given: Given) -> Lowered:
    step, numbers = _sum(penalty, 1.0 if given.scale is None else _float(given.scale))
    return [(step, numbers)] if numbers else []


def _sum(penalty: Penalty, factor: float) -> tuple[Gradient, tuple[float, ...]]:
    l1, l2, others = _split(penalty)
    strengths = [l1] * (l1 > 0) + [2 * l2] * (l2 > 0) + [strength for strength, _ in others]
    step = Gradient(l1 > 0, l2 > 0, tuple([other for _, other in others]))
    return step, tuple([factor * strength for strength in strengths])


def _decay(penalty: Penalty, given: Given) -> Lowered:
    rate = _float(given.rate)
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


def _prox(penalty: Penalty, given: Given) -> Lowered:
    metric, (l1, l2, others) = given.metric, _split(penalty)
    scale = _float(metric.scale)
    if scale < 0 or len(others) > 1:
        raise _UnknownError
    strength, other = others[0] if others else (0.0, None)
    if not metric.moments:
        rest = scale / (1 + 2 * l2 * scale)
        last: list[tuple[Step, Sequence[float]]] = []
        if isinstance(other, Lengths):
            last = [(ShrinkRows(), (strength * rest,))]
        elif other is not None:
            last = [(Prox(False, False, other), (rest, strength))]
        return [*_shrink(1 / (1 + 2 * l2 * scale), l1 * rest), *last]
    if isinstance(other, Lengths):  # with steps that differ within a group
        raise _UnknownError
    sizes = tuple(map(_float, metric.numbers))
    if not (l1 or l2 or strength):
        return []
    if metric.size is rooted and other is None and scale and sizes[1]:
        return _rooted_shrink(l1, l2, scale, *sizes)
    numbers = (scale, *sizes) + (l1,) * (l1 > 0) + (l2,) * (l2 > 0) + (strength,) * (other is not None)
    return [(Prox(l1 > 0, l2 > 0, other, metric.size, len(sizes)), numbers)]


def _rooted_shrink(l1: float, l2: float, scale: float, root: float, eps: float) -> Lowered:
    """With the size s = √second / root + eps and the step t = scale / s of an entry.

    The soft threshold of x at a t, divided by 1 + 2 c t, is that of s x at a scale, divided by s + 2 c scale. No step
    is longer than ENDLESS, so no s is below scale / ENDLESS.
    """
    eps = max(eps, scale / ENDLESS)
    numbers = (1 / root, eps) + (l1 * scale,) * (l1 > 0) + (2 * l2 * scale,) * (l2 > 0)
    return [(RootedShrink(l2 > 0, l1 > 0), tuple(map(_float, numbers)))]


def _project(constraint: Constraint, given: Given) -> Lowered:
    return [(fit_of(constraint) or Project(constraint), ())]


_LOWER: dict[str, Callable[[Any, Given], Lowered]] = {
    "gradient": _gradient,
    "decay": _decay,
    "prox": _prox,
    "project": _project,
}


# What can't be lowered


def slowly(acts: Sequence[Act], given: Given, tensors: Sequence[Tensor]) -> None:
    """Do in place what the acts say, by the formulas, to tensors as `quickly` takes them.

    Entries that are NaN don't spread; see `put`.
    """
    w, *others = tensors
    for act in acts:
        if act.kind == "gradient":
            added = act.what.gradient(w)
            others[0].add_(added if given.scale is None else added * given.scale.to(added.dtype))
            continue
        if act.kind == "decay":
            new = decayed(w, act.what, given.rate)
        elif act.kind == "prox":
            new = act.what.prox(w, given.metric.steps(*others))
        else:
            new = act.what.project(w)
        w.copy_(new) if act.by_entry else put(w, new)


def decayed(w: Tensor, penalty: Penalty, rate: float | Tensor) -> Tensor:
    """w - rate · gradient of the penalty at w; entries that a penalty shrinks stop at zero."""
    wide = at_least_float32(w)
    new = (penalty.gradient(wide) * -rate).add_(wide)
    if not all(leaf.shrinks for _, leaf in penalty.leaves()):
        return new
    if wide.is_complex():
        return torch.where((new * wide.conj()).real < 0, 0, new)
    return new.clamp_(wide.clamp_max(0), wide.clamp_min(0))  # much faster than `where`
