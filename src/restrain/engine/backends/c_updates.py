"""The step of an optimizer for one entry, with what rules do before and after it, as one list of C statements."""

from __future__ import annotations

from math import isfinite

from torch.optim import Optimizer

from restrain.engine.backends.c import numbers_of, statements
from restrain.engine.ops import OPTIMIZERS, Group, Lowered, counted, state_names


def update(
    kind: type[Optimizer], early: Lowered, late: Lowered, group: Group, count: float
) -> tuple[str, list[float]] | None:
    """Statements on the weight w, the gradient o0 and the moments o1, ..., and their numbers; None if there are none.

    Args:
        kind: of optimizer.
        early: what rules do before the step.
        late: what they do after it.
        group: the optimizer's settings.
        count: of the steps, with this one.
    """
    known, before, after = OPTIMIZERS[kind], statements(early), statements(late)
    if known.update is None or before is None or after is None:
        return None
    numbers, last = numbers_of(early), numbers_of(late)

    def number(value: float) -> str:
        numbers.append(float(value))
        return f"n{len(numbers) - 1}"

    lines = [before, *known.update(group, count, number)]
    # what comes after calls its numbers n0, ..., too, and the second moment o0
    own = [f"n{place} = n{len(numbers) + place}" for place in range(len(last))]
    own += [f"o0 = o{len(state_names(group))}"] * counted(group)
    lines += ["{", *[f"const wide {name};" for name in own], after, "}"]
    numbers += last
    return ("\n".join(lines), numbers) if all(map(isfinite, numbers)) else None
