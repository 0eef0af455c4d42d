"""States of attachments from checkpoints, checked as a whole before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Optimizer

from restrain.engine.ops import known
from restrain.errors import DetachedError, PlanError
from restrain.fields import brief, is_number, is_whole, text_by_new_names
from restrain.named_tensors import is_sharded
from restrain.plans import Plan

VERSION = 1
_OLD = ("movement", "movement_square", "gradient", "gradient_square")  # of a measured metric of version 0.1
_MEASURED = (*_OLD, "rate")
_NUMBERS = ("gain", "eta", "rate")  # of SGD with momentum, of ASGD, of a measured metric


def by_new_names(state: Any) -> Any:
    """Return a saved state with rule names of this version; anything else unchanged."""
    rules = state.get("rules") if isinstance(state, Mapping) else None
    if not isinstance(rules, (list, tuple)) or not all(isinstance(rule, str) for rule in rules):
        return state
    kinds = {key: state[key] for key in ("kept", "strengths") if isinstance(state.get(key), Mapping)}
    named = {
        kind: {text_by_new_names(str(key)): tensors for key, tensors in states.items()}
        for kind, states in kinds.items()
    }
    return {**state, "rules": [text_by_new_names(key) for key in rules], **named}


def split_history(state: Any) -> tuple[Any, Any]:
    """Return (a saved state without its history, the history or None); states may be without."""
    if not isinstance(state, Mapping):
        return state, None
    return {key: value for key, value in state.items() if key != "history"}, state.get("history")


def checked(
    state: Any, mine: Mapping[str, Any], metrics: Mapping[str, tuple[Tensor, tuple[str, ...]]]
) -> dict[str, Any]:
    """Return a saved state with rules, names, shapes and kinds of tensors checked.

    Args:
        state: the saved state.
        mine: the current state.
        metrics: for each parameter with rules at the step, the tensor and the names of its metric's
            state.

    Raises:
        PlanError: it belongs to other rules or a newer version, or a part of it is missing or
            invalid.
    """
    if not isinstance(state, Mapping):
        raise PlanError(f"expected a state as reg.state_dict() gives it, got {brief(state)}")
    _check_version(state.get("version", VERSION))
    if lost := [key for key in mine if key not in state]:
        raise _incomplete(lost)
    if more := [key for key in state if key not in mine]:
        raise PlanError(f"this state has {brief(more)}, which no state has: load what reg.state_dict() gave")
    state = _of_same_rules(state, mine["rules"])
    for key in ("steps", "epochs"):
        _check_count(key, state[key])
    steps = state["optimizer_steps"]
    if not isinstance(steps, (list, tuple)) or len(steps) != len(mine["optimizer_steps"]):
        raise PlanError(
            f"this state belongs to other rules: its optimizer_steps are {brief(steps)}, and here rules act at the "
            f"steps of {len(mine['optimizer_steps'])} optimizers"
        )
    for count in steps:
        _check_count("optimizer_steps", count)
    for key in ("kept", "strengths"):
        _check_tensors(key, state[key], mine[key])
    return {**state, "metrics": _checked_metrics(state["metrics"], metrics)}


def _check_version(version: Any) -> None:
    if not is_whole(version, 1):
        raise PlanError(f"the version of a state is a whole number such as {VERSION}; got {brief(version)}")
    if version > VERSION:
        raise PlanError(
            f"this state is of version {version}, and this library reads up to version {VERSION}: "
            "pip install --upgrade restrain"
        )


def _check_count(key: str, count: Any) -> None:
    if not is_whole(count, 0) or count >= 2**63:
        raise PlanError(f"{key} of a state counts from zero; got {brief(count)}")


def _incomplete(lost: Sequence[str]) -> PlanError:
    return PlanError(f"this state isn't whole, it lacks {', '.join(lost)}: save what reg.state_dict() gives")


# ---------------------------------------------------------------- names


def _of_same_rules(state: Mapping[str, Any], mine: Sequence[str]) -> dict[str, Any]:
    """Return the state with current rule names; version 0.1 left some settings out of them."""
    rules = state["rules"]
    if not isinstance(rules, (list, tuple)) or not all(isinstance(rule, str) for rule in rules):
        raise PlanError(f"the rules of a state are a list of their names; got {brief(rules)}")
    if list(rules) == list(mine):
        return dict(state)
    if list(rules) != _as_in_0_1(mine):
        raise PlanError(f"this state belongs to other rules: expected {list(mine)}, got {list(rules)}")
    now = dict(zip(rules, mine, strict=True))
    renamed = {part: _renamed(state[part], now) for part in ("kept", "strengths") if isinstance(state[part], Mapping)}
    return {**state, "rules": list(mine), **renamed}


_SINCE_0_1 = re.compile(r"(?:, |(?<=\())(?:index=(?:-?\d+|'[^']*'|\"[^\"]*\")|batch_dim=-?\d+|calls='sum')")
_FLAGS = re.compile(r"(re\.compile\((?:'[^']*'|\"[^\"]*\")), re\.[A-Z]+(?: \| re\.[A-Z]+)*\)")


def _as_in_0_1(rules: Sequence[str]) -> list[str]:
    """Return the names of rules in version 0.1, with numbers for equal names."""
    found: list[str] = []
    for rule in rules:
        text = _FLAGS.sub(r"\1)", _SINCE_0_1.sub("", re.sub(r" #\d+$", "", rule)))
        name, number = text, 2
        while name in found:
            name, number = f"{text} #{number}", number + 1
        found.append(name)
    return found


def _renamed(part: Mapping[Any, Any], now: Mapping[str, str]) -> dict[Any, Any]:
    """Return a part of a state, with rule names at the beginning of keys replaced."""
    renamed = {}
    for key, value in part.items():
        own = [old for old in now if key == old or str(key).startswith((f"{old}: ", f"{old} ["))]
        old = max(own, key=len, default="")
        renamed[now[old] + str(key)[len(old) :] if own else key] = value
    return renamed


# ---------------------------------------------------------------- tensors


def _check_tensors(part: str, state: Any, mine: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check names, shapes and kinds of tensors; an empty tensor accepts any length."""
    if not isinstance(state, Mapping) or not all(isinstance(own, Mapping) for own in state.values()):
        raise PlanError(f"{part} of a state is a dict of dicts of tensors; got {brief(state)}")
    if lost := list(_lost(mine, state, part)):
        raise _incomplete(lost)
    if more := list(_lost(state, mine, part)):
        raise PlanError(f"this state belongs to other rules: it has {brief(more)}, which these don't keep")
    for name, own in mine.items():
        lengths = set()
        for key, tensor in own.items():
            saved = state[name][key]
            if wrong := _difference(saved, tensor, may_be_nan=(part, key) == ("strengths", "measured")):
                raise PlanError(f"{part}[{name!r}][{key!r}] of this state {wrong}: save what reg.state_dict() gives")
            if not tensor.numel():
                lengths.add(saved.numel())
        if (0 in lengths and len(lengths) > 1) or not lengths <= {1, max(lengths, default=0)}:
            raise PlanError(f"{part}[{name!r}] of this state has tensors of the lengths {sorted(lengths)}, not of one")


def _lost(mine: Mapping[Any, Any], state: Mapping[Any, Any], part: str) -> Iterator[str]:
    """Yield the keys of `mine` that a saved state lacks."""
    for name, own in mine.items():
        if name not in state:
            yield f"{part}[{name!r}]"
        else:
            yield from (f"{part}[{name!r}][{key!r}]" for key in own if key not in state[name])


def _difference(saved: Any, own: Tensor, may_be_nan: bool = False) -> str:
    """Return why a saved tensor can't replace the current one; "" if it can."""
    if not isinstance(saved, Tensor):
        return f"is {brief(saved)}, where a tensor was expected"
    if saved.layout is not torch.strided or saved.is_meta or saved.is_quantized or is_sharded(saved) != is_sharded(own):
        return "is a tensor without plain entries"
    if _kind(saved.dtype) != _kind(own.dtype):
        return f"is of {saved.dtype}, where {own.dtype} was expected"
    if saved.dim() != own.dim() or (own.numel() and saved.shape != own.shape):
        return f"has the shape {tuple(saved.shape)}, where {tuple(own.shape)} was expected"
    if not may_be_nan and not is_sharded(own) and not saved.isfinite().all() and own.isfinite().all():
        return "has NaN or infinite entries"
    return ""


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "int"


def fill(mine: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy saved tensors into the rules' tensors."""
    with torch.no_grad():
        for name, kept in mine.items():
            for key, tensor in kept.items():
                if tensor.shape == saved[name][key].shape:
                    tensor.copy_(saved[name][key])
                else:  # one of them is still empty, the other was filled by a batch
                    tensor.data = saved[name][key].detach().clone()


# ---------------------------------------------------------------- metrics


def metric_names(optimizer: Optimizer | None) -> tuple[str, ...]:
    """Return the names of the metric state of an optimizer's parameter."""
    if optimizer is None:
        return ()
    if not known(optimizer):
        return _MEASURED
    return ("gain",) if isinstance(optimizer, SGD) else ("eta",) if isinstance(optimizer, ASGD) else ()


def _checked_metrics(
    metrics: Any, mine: Mapping[str, tuple[Tensor, tuple[str, ...]]]
) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Return saved metric state, without the entries of other optimizers' metrics."""
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else (pair,) for pair in _as_list(metrics)]
    if not all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Mapping) for pair in pairs):
        raise PlanError(f"metrics of a state are pairs of a name and a dict; got {brief(metrics)}")
    if len(dict(pairs)) < len(pairs):
        raise PlanError(f"metrics of a state name a parameter twice: {brief([name for name, _ in pairs])}")
    found = []
    for name, kept in pairs:
        if name not in mine:
            raise PlanError(f"this state belongs to other rules: it has metrics of {name!r}, on which none acts here")
        tensor, names = mine[name]
        if set(kept) not in ({"gain"}, {"eta"}, set(_MEASURED), set(_OLD), set()):
            raise PlanError(
                f"metrics of {name!r} in this state are {brief(dict(kept))}; load what reg.state_dict() gave"
            )
        for key, value in kept.items():
            wrong = _wrong_number(value) if key in _NUMBERS else _difference(value, tensor)
            if wrong:
                raise PlanError(f"metrics of {name!r} in this state: {key} {wrong}")
        found.append((name, {key: value for key, value in kept.items() if key in names}))
    return tuple(found)


def _as_list(metrics: Any) -> list[Any]:
    if isinstance(metrics, Mapping):
        return list(metrics.items())
    if not isinstance(metrics, (list, tuple)):
        raise PlanError(f"metrics of a state are pairs of a name and a dict; got {brief(metrics)}")
    return list(metrics)


def _wrong_number(value: Any) -> str:
    return "" if is_number(value) and value >= 0 else f"is {brief(value)}, where a number, zero or more, was expected"


class DetachedAttachment:
    """Copy or pickle of an attachment: knows its plan, and is attached to nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DetachedError(
            f"this is a copy of an attachment, attached to nothing: write rs.attach(model, copy.plan) before .{name}"
        )
