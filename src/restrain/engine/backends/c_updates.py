"""The step of an optimizer for one entry and the rules before and after it, as C statements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch.optim import Optimizer

from restrain.engine.backends.c import numbers_of, statements
from restrain.engine.backends.c_compiler import names
from restrain.engine.ops import OPTIMIZERS, Group, Lowered, counted, state_names


@dataclass(frozen=True)
class Expression:
    """An expression of C, built by Python's arithmetic; numbers in it become arguments of the loop.

    Args:
        text: the expression.
        numbers: the arguments so far, to which its numbers are added; argument i is called ni.
    """

    text: str
    numbers: list[float]

    def of(self, value: Any) -> str:
        """The text of an operand."""
        if isinstance(value, Expression):
            return value.text
        self.numbers.append(float(value))
        return f"n{len(self.numbers) - 1}"

    def _joined(self, left: Any, sign: str, right: Any) -> Expression:
        return Expression(f"({self.of(left)} {sign} {self.of(right)})", self.numbers)

    def __add__(self, other: Any) -> Expression:
        return self._joined(self, "+", other)

    def __sub__(self, other: Any) -> Expression:
        return self._joined(self, "-", other)

    def __mul__(self, other: Any) -> Expression:
        return self._joined(self, "*", other)

    def __rmul__(self, other: Any) -> Expression:
        return self._joined(other, "*", self)

    def __truediv__(self, other: Any) -> Expression:
        return self._joined(self, "/", other)

    def __neg__(self) -> Expression:
        return Expression(f"(-{self.text})", self.numbers)

    def sqrt(self) -> Expression:
        """The square root."""
        return Expression(f"SQRT({self.text})", self.numbers)

    def maximum(self, other: Expression) -> Expression:
        """The greater of the two; NaN if this is NaN."""
        mine, its = self.text, other.text
        return Expression(f"({mine} > {its} || {mine} != {mine} ? {mine} : {its})", self.numbers)


def update(
    kind: type[Optimizer], early: Lowered, late: Lowered, group: Group, count: float, cautious: Lowered = ()
) -> tuple[str, list[float]] | None:
    """Return the statements of a step, and their numbers.

    They read and write the weight w, the gradient o0 and the moments o1, ...

    Args:
        kind: of optimizer.
        early: what rules do before the step.
        late: what they do after it.
        group: the optimizer's settings.
        count: of the steps, with this one.
        cautious: decay of the weight before the step, done where the step doesn't move it away
            from zero.
    """
    known, before, after, decay = OPTIMIZERS[kind].update, *map(statements, (early, late, cautious))
    if known is None or before is None or after is None or decay is None:
        return None
    numbers = numbers_of(early)
    lines = [before, "const wide was = w;", *_stepped(known.step, group, known.scalars(group, count), numbers)]
    if cautious:
        aim = ["const wide now = w; w = was;", decay, "w = SGN(was) * SGN(was - now) >= 0 ? now + (w - was) : now;"]
        lines += _own(aim, numbers, cautious)
    # what comes after calls the second moment o0
    lines += _own([f"const wide o0 = o{len(state_names(group))};"] * counted(group) + [after], numbers, late)
    return ("\n".join(lines), numbers) if all(map(isfinite, numbers)) else None


def _own(lines: Sequence[str], numbers: list[float], lowered: Lowered) -> list[str]:
    """Return a block in which an instruction's numbers are n0, ...; add them to `numbers`."""
    own = numbers_of(lowered)
    names = [f"const wide n{place} = n{len(numbers) + place};" for place in range(len(own))]
    numbers += own
    return ["{", *names, *lines, "}"]


def held_step(kind: type[Optimizer], early: Lowered, group: Group, count: float) -> tuple[str, str, list[float]] | None:
    """Return what `c_held.held` takes of a step that keeps norms: statements, movement, numbers.

    Args:
        kind: of optimizer.
        early: what rules do to the gradient before the step.
        group: the optimizer's settings.
        count: of the steps, with this one.
    """
    known, before = OPTIMIZERS[kind].update, statements(early)
    if known is None or known.movement is None or before is None:
        return None
    numbers = numbers_of(early)
    w, g, *state = (Expression(name, numbers) for name in names(2 + _kept(group)))
    scalars = [Expression(w.of(number), numbers) for number in known.scalars(group, count)]
    _, moments = known.step(group, scalars, w, g, state)
    made = [f"const wide new_{old.text} = {new.text};" for old, new in zip(state, moments, strict=True)]
    moved = known.movement(group, scalars, state).text
    lines = [before, *made, *[f"{old.text} = new_{old.text};" for old in state]]
    return ("\n".join(lines), moved, numbers) if all(map(isfinite, numbers)) else None


def _stepped(step: Any, group: Group, scalars: tuple[float, ...], numbers: list[float]) -> list[str]:
    """The step as statements; each new value is named before one of the old ones is overwritten."""
    w, g, *state = (Expression(name, numbers) for name in ("w", "o0", *(f"o{i + 1}" for i in range(_kept(group)))))
    named = [Expression(w.of(number), numbers) for number in scalars]
    weight, moments = step(group, named, w, g, state)
    pairs = [("w", weight), *[(f"o{i + 1}", moment) for i, moment in enumerate(moments)]]
    made = [f"const wide new_{name} = {value.text};" for name, value in pairs]
    return ["{", *made, *[f"{name} = new_{name};" for name, _ in pairs], "}"]


def _kept(group: Group) -> int:
    return len(state_names(group))
