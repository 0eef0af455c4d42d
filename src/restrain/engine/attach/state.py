"""States of attachments from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from restrain.errors import DetachedError, PlanError
from restrain.fields import text_by_new_names
from restrain.plans import Plan


def by_new_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state whose rules are called as this version calls them."""
    kinds = {key: state[key] for key in ("kept", "strengths") if isinstance(state.get(key), Mapping)}
    named = {kind: {text_by_new_names(key): held for key, held in states.items()} for kind, states in kinds.items()}
    return {**state, "rules": [text_by_new_names(str(key)) for key in state.get("rules", ())], **named}


def check(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a state that can't be gone on from.

    Raises:
        PlanError: it belongs to other rules, or a part of it is missing.
    """
    counted = len(state.get("optimizer_steps", ())) == len(mine["optimizer_steps"])
    if state.get("version") != 1 or state.get("rules") != mine["rules"] or not counted:
        raise PlanError(f"this state belongs to other rules: expected {mine['rules']}, got {state.get('rules')}")
    if lost := list(_lost(mine, state)):
        raise PlanError(f"this state isn't whole, it lacks {', '.join(lost)}: save what reg.state_dict() gives")


def fill(mine: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put saved tensors into those that rules keep."""
    for name, kept in mine.items():
        for key, tensor in kept.items():
            if tensor.numel():
                tensor.copy_(saved[name][key])
            else:  # it has the size and type that a first batch gives
                tensor.data = saved[name][key].detach().clone()


def _lost(mine: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[str]:
    """What a saved state lacks of one like mine; the optimizers' metrics come with the first step."""
    for key in mine:
        if key not in state:
            yield key
        elif isinstance(mine[key], dict) and key != "metrics":
            yield from (f"{key}[{name!r}]" for name in _lost(mine[key], state[key]))


class DetachedAttachment:
    """What an attachment becomes in a copy or a pickle: it knows its plan, and that it is attached to nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DetachedError(
            f"this is a copy of an attachment, attached to nothing: write rs.attach(model, copy.plan) before .{name}"
        )
