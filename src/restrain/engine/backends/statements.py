"""What the steps of kernels do to one entry, or to one row, as statements of C for the loops of `native`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from restrain.engine.backends.compiler import Stages
from restrain.engine.ops import (
    ENDLESS,
    Decay,
    FitRows,
    Gradient,
    Lengths,
    Lowered,
    Project,
    RootedShrink,
    Shrink,
    ShrinkRows,
)
from restrain.transforms import NonNegative


class _UnknownError(Exception):
    """A step that isn't written in C."""


def body(lowered: Lowered) -> tuple[str, list[float], tuple[int, ...]] | None:
    """Statements on w and o0 for all the steps, their numbers, and which tensors change; None if there are none."""
    try:
        lines = [line for step, names in _named(lowered) for line in _WAYS[type(step)](step, names)]
    except (KeyError, _UnknownError):
        return None
    return "\n".join(lines), numbers_of(lowered), changed_by(lowered)


def stages(lowered: Lowered) -> Stages | None:
    """Statements for rows, as `native.rows` takes them, for all the steps; None if there are none."""
    found: list[tuple[str, str, str]] = []
    try:
        for step, names in _named(lowered):
            size = f"size{len(found)}"
            if type(step) in _ROWS:
                found.append(_ROWS[type(step)](step, names, size))
            elif isinstance(step, Gradient | Decay) and (step.sum if isinstance(step, Decay) else step).others:
                found.append((_inverse(size), "1", "\n".join(_WAYS[type(step)](step, names, size))))
            else:
                row, changes, entry = found.pop() if found and found[-1][1] == "1" else ("", "1", "")
                found.append((row, changes, "\n".join([entry, *_WAYS[type(step)](step, names)])))
    except (KeyError, _UnknownError):
        return None
    return tuple(found)


def numbers_of(lowered: Lowered) -> list[float]:
    """The numbers of all the steps."""
    return [float(number) for _, own in lowered for number in own]


def changed_by(lowered: Lowered) -> tuple[int, ...]:
    """Which tensors change: 0, the weights, and 1, the gradient."""
    return tuple(sorted({int(isinstance(step, Gradient)) for step, _ in lowered}))


def _named(lowered: Lowered) -> Iterator[tuple[Any, list[str]]]:
    """The steps, each with the names of its numbers."""
    names = (f"n{number}" for number in count())
    return ((step, [next(names) for _ in own]) for step, own in lowered)


# Entries


def _terms(step: Gradient, numbers: Sequence[str], size: str = "") -> Iterator[str]:
    if step.others and not (size and all(isinstance(other, Lengths) for other in step.others)):
        raise _UnknownError
    row = [f"(w * inverse_{size})"] * len(step.others)
    for number, term in zip(numbers, ["SGN(w)"] * step.l1 + ["w"] * step.l2 + row, strict=True):
        yield f"{number} * {term}"


def _gradient(step: Gradient, numbers: Sequence[str], size: str = "") -> Iterator[str]:
    for term in _terms(step, numbers, size):
        yield f"o0 += {term};"


def _decay(step: Decay, numbers: Sequence[str], size: str = "") -> Iterator[str]:
    yield "{ const wide low = w < 0 ? w : 0, high = w > 0 ? w : 0;"
    yield f"wide v = w - ({' + '.join(_terms(step.sum, numbers, size))});"
    yield "w = CLAMP(v, low, high); }" if step.shrinks else "w = v; }"


def _soft(threshold: str) -> str:
    return f"w -= CLAMP(w, -{threshold}, {threshold});"


def _shrink(step: Shrink, numbers: Sequence[str]) -> Iterator[str]:
    if step.scaled:
        yield f"w *= {numbers[0]};"
    if step.soft:
        yield _soft(numbers[-1])
        yield "w += 0;"  # -0.0 becomes +0.0


def _rooted(step: RootedShrink, numbers: Sequence[str]) -> Iterator[str]:
    root, eps, *strengths = numbers
    yield f"{{ wide s = {eps} + {root} * SQRT(o0); s = s < (wide){ENDLESS!r} ? s : (wide){ENDLESS!r}; w *= s;"
    if step.soft:
        yield _soft(strengths[0])
    if step.scaled:
        yield f"s += {strengths[-1]};"
    yield "w = w / s + 0; }"


def _project(step: Project, numbers: Sequence[str]) -> Iterator[str]:
    low, high = (0.0, None) if isinstance(step.constraint, NonNegative) else (step.constraint.low, step.constraint.high)
    for bound, beyond in ((low, "<"), (high, ">")):
        if bound is not None and not isinstance(bound, int | float):
            raise _UnknownError
        if bound is not None and abs(bound) != float("inf"):
            yield f"w = w {beyond} (wide){float(bound)!r} ? (wide){float(bound)!r} : w;"
    yield "w += 0;"


_WAYS: dict[type, Any] = {
    Gradient: _gradient,
    Decay: _decay,
    Shrink: _shrink,
    RootedShrink: _rooted,
    Project: _project,
}


# Rows: statements on the row, whether its entries change, and on these


def _inverse(size: str) -> str:
    least = "(sizeof(wide) == 4 ? 1e-35 : 1e-300)"  # below it, an inverse would be beyond all numbers
    return f"""const double {size} = length_of(a0, length);
        const wide inverse_{size} = (wide)({size} < {least} ? 0 : 1 / {size});"""


def _shrink_row(step: ShrinkRows, numbers: Sequence[str], size: str) -> tuple[str, str, str]:
    row = f"""const double {size} = length_of(a0, length), left_{size} = 1 - {numbers[0]} / {size};
        const wide scale_{size} = (wide)(left_{size} > 0 ? left_{size} : 0);"""
    return row, f"left_{size} == left_{size}", f"w = w * scale_{size} + 0;"  # not where it is NaN


def _fit_row(step: FitRows, numbers: Sequence[str], size: str) -> tuple[str, str, str]:
    low, high, some = f"(double){step.low!r}", f"(double){step.high!r}", f"{size} > DBL_MIN"
    row = f"""const double {size} = length_of(a0, length), aim_{size} = {size} < {low} ? {low} : {high};
        const double near_{size} = 8 * (sizeof(*a0) == 4 ? FLT_EPSILON : DBL_EPSILON);
        const int fits_{size} = {size} >= {low} * (1 - near_{size}) && {size} <= {high} * (1 + near_{size});
        const double scale_{size} = {some} ? aim_{size} / {size} : 0;
        const double even_{size} = {some} ? 0 : aim_{size} / sqrt((double)length);"""
    finite = f"(wide)((double)w * scale_{size} + even_{size})"
    return row, f"!fits_{size}", f"w = {size} <= DBL_MAX ? {finite} : w - w == 0 ? w : (wide)NAN;"


_ROWS: dict[type, Any] = {ShrinkRows: _shrink_row, FitRows: _fit_row}
