"""In-place changes of a tensor around an optimizer step, as data, and their instructions.

A `Change` is a gradient, decay, prox or projection by a penalty or constraint. `lower` turns
changes into instructions with scalars: an instruction says what is computed, without strengths and
learning rates, so that one instruction serves all strengths, and compiled code takes the scalars as
inputs. This module carries instructions out in plain torch; backends have tables of the
instructions that they support. Changes that can't be lowered are computed by the formulas
(`by_formulas`).
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

from restrain.engine.ops.groups import FitRows, Lengths, RootedShrinkRows, ShrinkRows, fit_of, length_of, put, row_dims
from restrain.engine.ops.optimizers import ENDLESS, Metric, rooted
from restrain.operations import Function, Interval, Length
from restrain.penalties import Penalty
from restrain.penalties.base import unchecked_prox
from restrain.penalties.shrink import at_least_float32, in_range, shrink_entries, unsign_zeros_
from restrain.transforms import Constraint

Numbers: TypeAlias = Sequence[Any]  # floats in eager code, 0-d tensors in compiled code

Tensors: TypeAlias = "tuple[Tensor, ...]"  # weights; gradient (before a step) or metric's moments (after it)


@dataclass(frozen=True)
class Change:
    """A change of a tensor by a rule, or by the sum of several rules."""

    kind: Literal["gradient", "tangent", "decay", "cautious", "hold", "prox", "project", "fit"]
    # a penalty; a constraint for "tangent" (of the gradient), "project", and "fit" (in the metric);
    # None for "hold", whose norms differ by tensor
    what: Any

    @cached_property
    def by_entry(self) -> bool:
        """True if the change can be applied to any part of a tensor alone."""
        return self.what.by_entry  # type: ignore[no-any-return]

    @cached_property
    def terms(self) -> ProxTerms | None:
        """The terms of a penalty's prox; None if its strengths are tensors, which may change.

        Raises:
            _UnknownNumberError: the instructions don't know it.
        """
        l1, l2, others = self.what.split()
        strengths = [l1, l2, *[strength for strength, _ in others]]
        return None if any(isinstance(one, Tensor) for one in strengths) else _terms_of(self.what)

    @cached_property
    def _row_dims(self) -> dict[Any, tuple[int, ...] | None]:
        return {}

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the dims whose indices number the rows of the change; None if it has no rows."""
        if shape not in self._row_dims:
            self._row_dims[shape] = row_dims(self.what, tuple(shape))
        return self._row_dims[shape]


@dataclass(frozen=True)
class StepScalars:
    """Scalars of one step: learning rate, gradient scale, metric."""

    rate: float | Tensor = 0.0
    scale: Tensor | None = None  # of the gradients, if scaled by a loss scaler
    metric: Metric = field(default_factory=lambda: Metric(0.0))


@dataclass(frozen=True)
class Batch:
    """One list of changes for tensors that share their scalars."""

    changes: Sequence[Change]  # applied in this order
    scalars: StepScalars
    members: Sequence[Tensors]

    @cached_property
    def lowered(self) -> Lowered | None:
        """Instructions for tensors like the first member's; None if changes can't be lowered."""
        return lower(self.changes, self.scalars, self.members[0][0])

    def of(self, members: Sequence[Tensors]) -> Batch:
        """Return a batch of some of the members."""
        some = Batch(self.changes, self.scalars, members)
        if "lowered" in vars(self):
            vars(some)["lowered"] = self.lowered
        return some

    @property
    def by_entry(self) -> bool:
        """True if every change can be applied to any part of a tensor alone."""
        return all(change.by_entry for change in self.changes)


# Instructions: functions of the weights, the gradient (before an optimizer step) or moments (after
# it), all in float32 or wider, and scalars. They return the new weights, possibly the old tensor;
# gradients change in place.


@dataclass(frozen=True)
class Gradient:
    """gradient += a sgn(w) + 2 c w + Σ s · gradient of the others."""

    l1: bool
    l2: bool
    others: tuple[Any, ...] = ()  # operations with a `slope`, and penalties without operations

    def terms(self, w: Tensor) -> list[Callable[[], Tensor]]:
        """Return functions that compute the terms of the sum, without their factors."""
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
    """w -= the sum of `Gradient`; if every penalty shrinks, entries stop at zero."""

    sum: Gradient
    shrinks: bool

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        new = w
        for number, term in zip(numbers, self.sum.terms(w), strict=True):
            new = new - term() * number
        return new.clamp(w.clamp_max(0), w.clamp_min(0)) if self.shrinks else new


@dataclass(frozen=True)
class Shrink:
    """Scale entries (if `scaled`), then soft-threshold them (if `soft`)."""

    scaled: bool
    soft: bool

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        if self.scaled:
            w = w.mul_(numbers[0])
        w = _soft(w, numbers[-1]) if self.soft else w
        return unsign_zeros_(w)


@dataclass(frozen=True)
class RootedShrink:
    """Prox of a Σ|x| + c Σ|x|², step 1 / (√second · r + e) per entry; see `_rooted_shrink`."""

    scaled: bool
    soft: bool

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        root, eps, *strengths = numbers
        size = others[0].sqrt()
        if isinstance(root, Tensor):
            size = size.mul_(root).add_(eps)
        else:  # one pass
            size = torch.add(torch.full((), eps, dtype=w.dtype, device=w.device), size, alpha=root, out=size)
        w = w.mul_(size.clamp_max_(ENDLESS))
        if self.soft:
            w = _soft(w, strengths[0])
        if self.scaled:
            size = size.add_(strengths[-1])
        return torch.addcdiv(w.new_zeros(()), w, size, out=w)  # -0.0 becomes +0.0


@dataclass(frozen=True)
class Prox:
    """Prox of a Σ|x| + c Σ|x|² + s · one other penalty, with one step or a step per entry."""

    l1: bool
    l2: bool
    other: Penalty | None = None
    size: Callable[..., Tensor] | None = None  # of the metric
    counted: int = 0  # number of scalars of `size`

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
            rest = step / (1 + 2 * l2 * step) if self.l2 else step
            w = unchecked_prox(self.other, w, left.pop(0) * rest)
        return w


@dataclass(frozen=True)
class Project:
    """w = the nearest number in an interval."""

    interval: Interval

    def __call__(self, w: Tensor, others: Sequence[Tensor], numbers: Numbers) -> Tensor:
        w = w.clamp_(*self.interval.bounds(w.dtype))
        return unsign_zeros_(w)


Instruction: TypeAlias = (
    Gradient | Decay | Shrink | RootedShrink | Prox | Project | ShrinkRows | RootedShrinkRows | FitRows
)
Lowered: TypeAlias = Sequence[tuple[Instruction, Sequence[Any]]]


def _soft(w: Tensor, threshold: float | Tensor) -> Tensor:
    """Apply the soft threshold in place; some zeros are -0.0."""
    threshold = in_range(threshold, w)
    if isinstance(threshold, Tensor):
        return w.sub_(w.clamp(-threshold, threshold))
    return F.softshrink(w, threshold, out=w)  # type: ignore[call-arg]


def carry_out(lowered: Lowered, tensors: Sequence[Tensor]) -> None:
    """Carry out instructions in place on (weights, gradient) or (weights, moments)."""
    w, *others = map(at_least_float32, tensors)
    new = w
    for step, numbers in lowered:
        new = step(new, others, numbers)
    adds = any(isinstance(step, Gradient) for step, _ in lowered)
    for old, now in zip(tensors, [new, *others[:adds]], strict=False):
        if now is not old:
            old.copy_(now)


def lower(changes: Sequence[Change], scalars: StepScalars, w: Tensor) -> Lowered | None:
    """Return the instructions of changes for tensors like `w`, with scalars, or None."""
    half = w.dtype.itemsize < 4 and any(
        change.kind == "project" for change in changes
    )  # rounding could leave the interval
    if w.is_complex() or half or not (all(change.by_entry for change in changes) or rows_of(changes, w) is not None):
        return None
    try:
        return [step for change in changes for step in _LOWER[change.kind](change, scalars)]
    except _UnknownNumberError:
        return None


def rows_of(changes: Sequence[Change], w: Tensor) -> tuple[int, ...] | None:
    """Return the dims that number the rows of changes, some of them by row; None if unsupported."""
    of_rows = [change for change in changes if not change.by_entry]
    if not w.is_cpu and any(change.kind == "project" for change in of_rows):
        return None  # would synchronise to read the lengths
    found = {change.rows(w.shape) for change in of_rows}
    return found.pop() if len(found) == 1 else None


class _UnknownNumberError(Exception):
    """A scalar isn't on the CPU, isn't finite, or isn't supported."""


def _float(number: float | Tensor) -> float:
    if isinstance(number, Tensor) and number.device.type != "cpu":
        raise _UnknownNumberError
    if not isfinite(number := float(number)):
        raise _UnknownNumberError
    return number


def slope_of(one: Any, w: Tensor) -> Tensor:
    """Return the gradient of an operation, or of a penalty without operations."""
    found: Tensor = one.gradient(w) if isinstance(one, Penalty) else one.slope(w)
    return found


def _split(penalty: Penalty) -> tuple[float, float, list[tuple[float, Any]]]:
    """Return (a, c, others) of a penalty a Σ|x| + c Σ|x|² + Σ strength · other."""
    l1, l2, others = penalty.split()
    pairs = [(_float(strength), other) for strength, other in others]
    return _float(l1), _float(l2), [pair for pair in pairs if pair[0]]


def _declared(strength: float, penalty: Penalty) -> list[tuple[float, Any]]:
    """Return (strength, operation) pairs of a penalty; the penalty itself if it declares none.

    The Euclidean length of a group becomes that of a row.
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


def _gradient(change: Change, scalars: StepScalars) -> Lowered:
    step, numbers = _sum(change.what, 1.0 if scalars.scale is None else _float(scalars.scale))
    return [(step, numbers)] if numbers else []


def _sum(penalty: Penalty, factor: float) -> tuple[Gradient, tuple[float, ...]]:
    l1, l2, found = _split(penalty)
    others = [pair for strength, other in found for pair in _declared(strength, other)]
    strengths = [l1] * (l1 > 0) + [2 * l2] * (l2 > 0) + [strength for strength, _ in others]
    step = Gradient(l1 > 0, l2 > 0, tuple([other for _, other in others]))
    return step, tuple([factor * strength for strength in strengths])


def _decay(change: Change, scalars: StepScalars) -> Lowered:
    penalty, rate = change.what, _float(scalars.rate)
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


@dataclass(frozen=True)
class ProxTerms:
    """The terms l1 Σ|x| + l2 Σ|x|² + strength · other of a penalty.

    `by_length` is the factor of the row length if `other` is a multiple of Σ‖row‖₂, else 0.
    """

    l1: float
    l2: float
    strength: float
    other: Penalty | None
    by_length: float


def _terms_of(penalty: Penalty) -> ProxTerms:
    l1, l2, others = _split(penalty)
    if len(others) > 1:
        raise _UnknownNumberError
    strength, other = others[0] if others else (0.0, None)
    return ProxTerms(l1, l2, strength, other, _by_length(other))


def _prox(change: Change, scalars: StepScalars) -> Lowered:
    metric, terms = scalars.metric, change.terms or _terms_of(change.what)
    l1, l2, strength, other, by_length = terms.l1, terms.l2, terms.strength, terms.other, terms.by_length
    scale = _float(metric.scale)
    if scale < 0:
        raise _UnknownNumberError
    if not metric.moments:
        rest = scale / (1 + 2 * l2 * scale)
        last: list[tuple[Instruction, Sequence[float]]] = []
        if by_length:
            last = [(ShrinkRows(), (strength * by_length * rest,))]
        elif other is not None:
            last = [(Prox(False, False, other), (rest, strength))]
        return [*_shrink(1 / (1 + 2 * l2 * scale), l1 * rest), *last]
    sizes = tuple(map(_float, metric.numbers))
    if not (l1 or l2 or strength):
        return []
    known = metric.size is rooted and scale and sizes[1]
    if by_length:
        if l1 or l2 or not known:
            raise _UnknownNumberError
        root, eps = 1 / sizes[0], max(sizes[1], scale / ENDLESS)
        return [(RootedShrinkRows(), tuple(map(_float, (root, eps, scale * strength * by_length))))]
    if known and other is None:
        return _rooted_shrink(l1, l2, scale, *sizes)
    numbers = (scale, *sizes) + (l1,) * (l1 > 0) + (l2,) * (l2 > 0) + (strength,) * (other is not None)
    return [(Prox(l1 > 0, l2 > 0, other, metric.size, len(sizes)), numbers)]


def _by_length(penalty: Penalty | None) -> float:
    """Return the factor of the row length if the penalty is a multiple of Σ‖row‖₂, else 0."""
    found = [] if penalty is None else _declared(1.0, penalty)
    return float(found[0][0]) if [type(one) for _, one in found] == [Lengths] else 0.0


def _rooted_shrink(l1: float, l2: float, scale: float, root: float, eps: float) -> Lowered:
    """Return `RootedShrink` with scalars, for s = √second / root + eps and the step t = scale / s.

    The soft threshold of x at a t, divided by 1 + 2 c t, equals that of s x at a scale, divided by
    s + 2 c scale. Steps are at most ENDLESS, so s is at least scale / ENDLESS.
    """
    eps = max(eps, scale / ENDLESS)
    numbers = (1 / root, eps) + (l1 * scale,) * (l1 > 0) + (2 * l2 * scale,) * (l2 > 0)
    return [(RootedShrink(l2 > 0, l1 > 0), tuple(map(_float, numbers)))]


def _project(change: Change, scalars: StepScalars) -> Lowered:
    constraint: Constraint = change.what
    if isinstance(constraint.interval, Interval):
        return [(Project(constraint.interval), ())]
    fit = fit_of(constraint)
    if fit is None:
        raise _UnknownNumberError
    return [(fit, ())]


def _by_formula_alone(change: Change, scalars: StepScalars) -> Lowered:
    raise _UnknownNumberError


_LOWER: dict[str, Callable[[Change, StepScalars], Lowered]] = {
    "gradient": _gradient,
    "tangent": _by_formula_alone,
    "decay": _decay,
    "prox": _prox,
    "project": _project,
    "fit": _by_formula_alone,
}


# What can't be lowered


def by_formulas(changes: Sequence[Change], scalars: StepScalars, tensors: Sequence[Tensor]) -> None:
    """Apply changes in place by the formulas, to tensors as `carry_out` takes them.

    NaN entries don't spread; see `put`.
    """
    w, *others = tensors
    steps: float | Tensor | None = None
    fits = any(change.kind == "fit" for change in changes)
    for change in changes:
        if change.kind == "gradient":
            added = change.what.gradient(w)
            others[0].add_(added if scalars.scale is None else added * scalars.scale.to(added.dtype))
            continue
        if change.kind == "tangent":
            step = -others[0]  # against the gradient
            put(others[0], torch.neg(change.what.tangent(w, step), out=step))
            continue
        if change.kind == "decay":
            new = decayed(w, change.what, scalars.rate)
        elif change.kind == "prox":
            now = scalars.metric.steps(*others)
            new = unchecked_prox(change.what, w, now)
            steps = _after_prox(now, change.what) if fits else None
        elif change.kind == "fit":
            new = change.what.project_by(w, scalars.metric.steps(*others) if steps is None else steps)
        else:
            new = change.what.project(w)
        w.copy_(new) if change.by_entry else put(w, new)


def _after_prox(steps: float | Tensor, penalty: Penalty) -> float | Tensor:
    """Return the steps in whose metric a projection follows a prox.

    The prox of c Σ|x|² and a set is the projection of x / (1 + 2 c t) in the metric 1 / t + 2 c.
    """
    curvature = penalty.split()[1]
    return steps / (1 + 2 * curvature * steps)  # type: ignore[no-any-return]


def decayed(w: Tensor, penalty: Penalty, rate: float | Tensor) -> Tensor:
    """Return w - rate · gradient of the penalty at w; entries stop at zero if it shrinks."""
    wide = at_least_float32(w)
    new = (penalty.gradient(wide) * -rate).add_(wide)
    if not all(leaf.shrinks for _, leaf in penalty.leaves()):
        return new
    if wide.is_complex():
        return torch.where((new * wide.conj()).real < 0, 0, new)
    return new.clamp_(wide.clamp_max(0), wide.clamp_min(0))  # much faster than `where`
