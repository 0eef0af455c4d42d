"""Check several attachments on one parameter: together they must equal one plan with all rules."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.step import ParameterRules
from restrain.errors import DetachedError, HowError


@dataclass(frozen=True)
class _Living:
    """What a living attachment does at the optimizer's step."""

    model: weakref.ref[nn.Module]
    works: Sequence[ParameterRules]
    optimizers: weakref.WeakSet[Optimizer]


_living: weakref.WeakKeyDictionary[object, _Living] = weakref.WeakKeyDictionary()
_ON_WEIGHTS = ("decoupled", "proximal", "project", "cautious")
# kinds in (earlier, later) attachment: one plan would apply them in another order, or joined
_CLASHES = {
    ("decoupled", "gradient"),
    ("decoupled", "decoupled"),
    ("proximal", "proximal"),
    ("project", "proximal"),
    ("project", "project"),
    # cautious decay reads how the optimizer alone moved the weights, and acts before a prox
    ("decoupled", "cautious"),
    ("cautious", "decoupled"),
    ("cautious", "cautious"),
    ("proximal", "cautious"),
    ("project", "cautious"),
    # a held norm reads weights and gradient before the step, and replaces the step
    ("held", "gradient"),
    ("held", "held"),
    *[("held", kind) for kind in _ON_WEIGHTS],
    *[(kind, "held") for kind in _ON_WEIGHTS],
}
_SAID = {"held": "Hyperball", "cautious": "how='decoupled', cautious=True"}


def join(owner: object, works: Sequence[ParameterRules], model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Register the rules of an attachment at the optimizer's step.

    Raises:
        HowError: another attachment acts on the same parameter, and both together aren't the sum of
            their rules, or has the same rule, as when a cell of a notebook is run again.
    """
    mine = {id(work.handle.find(model)): work for work in works}
    for other in list(_living.values()):
        for earlier in other.works:
            work = mine.get(id(_found(earlier, other.model())))
            if work is not None:
                _refuse_order(earlier, work)
                if any(one in other.optimizers for one in optimizers):
                    _refuse_twice(earlier, work)
    if works:
        _living[owner] = _Living(weakref.ref(model), works, weakref.WeakSet(optimizers))


def _found(work: ParameterRules, root: nn.Module | None) -> Tensor | None:
    """Return the parameter of a living attachment; None if its model has lost it."""
    try:
        return None if root is None else work.handle.find(root)
    except DetachedError:
        return None


def _refuse_order(earlier: ParameterRules, later: ParameterRules) -> None:
    if clash := _clashes(earlier, later):
        first, second = [_SAID.get(kind, f"how={kind!r}") for kind in min(clash)]
        raise HowError(
            f"another attachment acts on {later.handle.name!r} with {first}, and this one with {second}: "
            "one after the other, they don't give what both rules together mean. Put them into one plan: "
            "first.detach(), then rs.attach(model, [*first.plan, ...], optimizer)"
        )


def _refuse_twice(earlier: ParameterRules, later: ParameterRules) -> None:
    """Refuse a rule on gradients that another attachment has on the parameter and optimizer."""
    for kind in ("gradient", "noise"):
        for rule, _ in later.at(kind):
            for other, _ in earlier.at(kind):
                if rule.what == other.what and (rule.every, rule.start) == (other.every, other.start):
                    raise HowError(
                        f"another attachment has the same rule {rule.what!r} on {later.handle.name!r} at the same "
                        "optimizer, so it would act twice: reg.detach() the other one first, or put both rules into "
                        "one plan if you mean that"
                    )


def _clashes(earlier: ParameterRules, later: ParameterRules) -> list[tuple[str, str]]:
    found = [pair for pair in _CLASHES if earlier.at(pair[0]) and later.at(pair[1])]
    sets = [what for _, what in earlier.at("project") + later.at("project")]
    joint = [one for one in earlier.joint + later.joint if one.rule.how == "project"]
    apart = bool(joint) or any(one != sets[0] for one in sets)
    return [pair for pair in found if pair != ("project", "project") or apart]


def leave(owner: object) -> None:
    """Remove the rules of an attachment."""
    _living.pop(owner, None)
