"""Measuring of a model for a report: zeros, units, groups, histograms and features of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from restrain.axes import Grouping
from restrain.engine.attach.groups import lengths
from restrain.engine.attach.report import cells, strength_of
from restrain.engine.attach.tracking import into_units, tensors_of
from restrain.engine.binding import Bound
from restrain.engine.ops import norm_of
from restrain.errors import PlanError
from restrain.named_tensors import device_of, is_sharded, parameters
from restrain.penalties import Penalty, Scaled
from restrain.penalties.shrink import at_least_float32
from restrain.plans import Plan
from restrain.report import (
    Content,
    RuleFacts,
    TensorFacts,
    as_code,
    checked_facts,
    checked_images,
    checked_path,
    checked_rows,
    environment,
)

_BINS, _HISTOGRAMS, _FEATURES, _LENGTHS = 40, 12, 40, 200


def contents_of(
    root: nn.Module,
    bounds: Sequence[Bound] = (),
    plan: Plan | None = None,
    *,
    rows: Any = (),
    path: Any = None,
    images: Any = None,
    inputs: Sequence[str] | None = None,
    title: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Content:
    """Return the contents of a report on a model and its rules.

    Args:
        root: the model.
        bounds: its rules.
        plan: the plan of these.
        rows, path, images, inputs, title, facts: see `Attachment.report`.

    Raises:
        PlanError: see `Attachment.report`.
    """
    shapes = {slot.name: tuple(slot.tensor().shape) for slot in parameters(root) if not is_lazy(slot.tensor())}
    view, checked = checked_path(path, inputs), checked_rows(rows)
    found = {} if images is None else checked_images(images, shapes)
    tensors = tensors_for(bounds, root, found)
    table, notes = cells(bounds, root, None) if bounds else ([], [])
    return Content(
        title=f"Report on {type(root).__name__}" if title is None else str(title),
        facts=_summary(root, tensors, checked) | checked_facts(facts),
        table=table,
        notes=notes,
        rules=rules_of(bounds),
        tensors=tensors,
        rows=checked,
        path=view,
        images=found,
        data=_as_json(plan),
        environment=environment(device_of(root)),
    )


def same_parameters(model: nn.Module, attached: nn.Module) -> nn.Module:
    """Return the model, if its parameters have the names and shapes of another's.

    Raises:
        PlanError: one is missing, or has another shape.
    """
    own = {slot.name: tuple(slot.tensor().shape) for slot in parameters(model)}
    for slot in parameters(attached):
        if own.get(slot.name) != tuple(slot.tensor().shape):
            came = f"of shape {own[slot.name]}" if slot.name in own else "missing"
            raise PlanError(
                f"model= has the parameters of the attached model; {slot.name!r} is {came} there: attach the plan to "
                "that model, and write its report"
            )
    return model


def _summary(root: nn.Module, tensors: Sequence[TensorFacts], rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return {what: text} for the head of a report."""
    entries, zeros = sum(one.entries for one in tensors), sum(one.zeros for one in tensors)
    found = {"parameters": f"{sum(p.numel() for p in root.parameters() if not is_lazy(p)):,}"}
    found |= {"zeros in weights": f"{zeros / entries:.1%}"} if entries else {}
    last = rows[-1] if rows else {}
    for name, title in (("step", "steps"), ("epoch", "epochs")):
        found |= {title: f"{last[name]:,.0f}"} if name in last else {}
    for name, title in (("data_loss", "data loss"), ("valid_loss", "validation loss"), ("valid_acc", "accuracy")):
        found |= {title: f"{last[name]:.4g}"} if math.isfinite(last.get(name, math.nan)) else {}
    return found


def _as_json(plan: Plan | None) -> str:
    """Return a plan as JSON; "" without rules, or where a rule has no text form."""
    if plan is None or not len(plan):
        return ""
    try:
        return json.dumps(plan.to_dict(), indent=2, ensure_ascii=False)
    except PlanError:
        return ""


def rules_of(bounds: Sequence[Bound]) -> list[RuleFacts]:
    """Return the rules of an attachment, as a report's advice speaks of them."""
    found = []
    for bound in bounds:
        what = bound.rule.what
        bare = what.penalty if isinstance(what, Scaled) else what
        leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) and bound.parameters else []
        zeros = any(leaf.has_prox and (leaf.groupwise or _makes_zeros(leaf)) for leaf in leaves)
        strength = strength_of(bound) if bound.is_penalty and bare is not what else None
        options = repr(bound.rule).rpartition(f"how={bound.rule.how!r}")[2].removesuffix(")")
        found.append(RuleFacts(bound.key, bound.rule.how, as_code(bare), strength, tuple(bound.names), zeros, options))
    return found


def _makes_zeros(leaf: Penalty) -> bool:
    """Return True if a penalty by entry has a prox that takes small entries to zero."""
    if not leaf.entrywise or not leaf.uniform:
        return False
    small = torch.full((1,), 1e-3, dtype=torch.float64, device="cpu")
    return not bool(leaf.prox(small, 1.0))


def tensors_for(bounds: Sequence[Bound], root: nn.Module, images: Mapping[str, tuple[int, int]]) -> list[TensorFacts]:
    """Return measures of each weight, and of each other parameter with rules.

    Args:
        bounds: the rules.
        root: the model.
        images: {weight: (height, width)} of those whose inputs or outputs are images; filters with
            one or three channels are images without being named.

    Raises:
        PlanError: a parameter of which this process has a part only.
    """
    with_rules = tensors_of(bounds, root)
    keys: dict[str, list[str]] = {}
    for bound in bounds:
        for handle, _ in bound.parameters:
            keys.setdefault(handle.name, []).append(bound.key)
    found: list[TensorFacts] = []
    for slot in parameters(root):
        location = slot.location()
        p = location.tensor
        if is_lazy(p):
            continue
        if is_sharded(p):
            raise PlanError(
                f"a report needs whole parameters, and this process has a part of {slot.name!r}: load the state of the "
                "whole model into a plain one, and write reg.report(file, model=plain)"
            )
        if p.dim() < 2 and slot.name not in with_rules:
            continue
        groups = with_rules[slot.name][1] if slot.name in with_rules else None
        drawn = sum(one.histogram is not None for one in found) < _HISTOGRAMS
        rules = tuple(keys.get(slot.name, ()))
        found.append(_measured(slot.name, p, rules, groups, into_units(location), drawn, images.get(slot.name)))
    return found


@torch.no_grad()
def _measured(
    name: str,
    p: Tensor,
    rules: tuple[str, ...],
    groups: Grouping | None,
    units: Grouping | None,
    drawn: bool,
    size: tuple[int, int] | None,
) -> TensorFacts:
    """Return the measures of a parameter.

    Args:
        name: its name.
        p: the parameter.
        rules: the names of its rules.
        groups: the groups of its first rule by group.
        units: the groups of weights into one unit.
        drawn: True if it may have a histogram.
        size: height and width, if its rows or columns are images.
    """
    w = p.detach()
    own, into = (None if one is None else lengths(at_least_float32(w), one).flatten() for one in (groups, units))
    return TensorFacts(
        name,
        tuple(w.shape),
        int((w == 0).sum()),
        float(norm_of(w)),
        rules,
        None if into is None else (int((into == 0).sum()), len(into)),
        None if own is None else (int((own == 0).sum()), len(own)),
        () if own is None else _falling(own),
        _histogram(w) if drawn and w.dim() > 1 else None,
        _images(w, size),
    )


def _falling(sizes: Tensor) -> list[float]:
    """Return the lengths from the greatest, at most some hundred, the first and last among them."""
    ordered = sizes.sort(descending=True).values
    count = min(len(ordered), _LENGTHS)
    places = torch.linspace(0, len(ordered) - 1, count, device="cpu").round().long()
    return [float(one) for one in ordered.cpu()[places]]


def _histogram(w: Tensor) -> tuple[list[float], list[float]] | None:
    """Return (edges, counts) of the entries that are finite and not zero; None without any."""
    x = w.abs().flatten().float().cpu() if w.is_complex() else w.flatten().float().cpu()
    x = x[x.isfinite() & (x != 0)]
    if not len(x):
        return None
    low, high = float(x.min()), float(x.max())
    if low == high:
        low, high = low - 0.5 * abs(low), high + 0.5 * abs(high)
    counts = torch.histc(x, _BINS, low, high)
    return [low + (high - low) * place / _BINS for place in range(_BINS + 1)], counts.tolist()


def _images(w: Tensor, size: tuple[int, int] | None) -> Tensor | None:
    """Return the longest features as images; None if they aren't images, or all are zero."""
    if size is not None:
        rows = w if w.shape[1] == math.prod(size) else w.T
        images = rows.reshape(-1, *size)
    elif w.dim() == 4 and w.shape[1] in (1, 3) and min(w.shape[2:]) > 1:
        images = w
    else:
        return None
    sizes = images.flatten(1).norm(dim=1)
    order = sizes.argsort(descending=True)[: min(_FEATURES, int((sizes > 0).sum()))]
    return images[order].float().cpu() if len(order) else None
