"""Check several attachments on one parameter: together they must equal one plan with all rules."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from restrain.engine.step import ParameterRules
from restrain.errors import HowError

# Model and rules at the optimizer's step of each living attachment.
_living: weakref.WeakKeyDictionary[object, tuple[weakref.ref[nn.Module], Sequence[ParameterRules]]] = (
    weakref.WeakKeyDictionary()
)
# `how` in (earlier, later) attachment: one plan would apply them in another order, or joined
_CLASHES = {
    ("decoupled", "gradient"),
    ("decoupled", "decoupled"),
    ("proximal", "proximal"),
    ("project", "proximal"),
    ("project", "project"),
}


def join(owner: object, works: Sequence[ParameterRules], model: nn.Module) -> None:
    """Register the rules of an attachment at the optimizer's step.

    Raises:
        HowError: another attachment acts on the same parameter, and both together aren't the sum of
            their rules.
    """
    mine = {id(work.handle.find(model)): work for work in works}
    for reference, others in list(_living.values()):
        root = reference()
        if root is None:
            continue
        for other in others:
            work = mine.get(id(other.handle.find(root)))
            clash = [] if work is None else _clashes(other, work)
            if work is not None and clash:
                earlier, later = min(clash)
                raise HowError(
                    f"another attachment acts on {work.handle.name!r} with how={earlier!r}, and this one with "
                    f"how={later!r}: one after the other, they don't give what both rules together mean. Put them into "
                    "one plan: first.detach(), then rs.attach(model, [*first.plan, ...], optimizer)"
                )
    if works:
        _living[owner] = (weakref.ref(model), works)


def _clashes(earlier: ParameterRules, later: ParameterRules) -> list[tuple[str, str]]:
    found = [pair for pair in _CLASHES if getattr(earlier, pair[0]) and getattr(later, pair[1])]
    sets = [what for _, what in earlier.project + later.project]
    return [pair for pair in found if pair != ("project", "project") or any(one != sets[0] for one in sets)]


def leave(owner: object) -> None:
    """Remove the rules of an attachment."""
    _living.pop(owner, None)
