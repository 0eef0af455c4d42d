"""What the steps of kernels do to one entry, as statements of C for the loops of `native`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from restrain.engine.kernels import Decay, Gradient, Lowered, Project, RootedShrink, Shrink
from restrain.engine.metric import ENDLESS
from restrain.transforms import NonNegative


class _UnknownError(Exception):
    """A step that isn't written in C."""


def body(lowered: Lowered) -> tuple[str, list[float], tuple[int, ...]] | None:
    """Statements on w and o0 for all the steps, their numbers, and which tensors change; None if there are none."""
    numbers = [float(number) for _, own in lowered for number in own]
    names = iter([f"n{number}" for number in range(len(numbers))])
    try:
        lines = [line for step, own in lowered for line in _WAYS[type(step)](step, [next(names) for _ in own])]
    except (KeyError, _UnknownError):
        return None
    return "\n".join(lines), numbers, tuple(sorted({int(isinstance(step, Gradient)) for step, _ in lowered}))


def _terms(step: Gradient, numbers: Sequence[str]) -> Iterator[str]:
    if step.others:
        raise _UnknownError
    for number, term in zip(numbers, ["SGN(w)"] * step.l1 + ["w"] * step.l2, strict=True):
        yield f"{number} * {term}"


def _gradient(step: Gradient, numbers: Sequence[str]) -> Iterator[str]:
    for term in _terms(step, numbers):
        yield f"o0 += {term};"


def _decay(step: Decay, numbers: Sequence[str]) -> Iterator[str]:
    yield "{ const wide low = w < 0 ? w : 0, high = w > 0 ? w : 0;"
    yield f"wide v = w - ({' + '.join(_terms(step.sum, numbers))});"
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
