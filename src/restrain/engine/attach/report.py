"""Reports of an attachment: table of rules, values, gradient norms and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restrain.engine.binding import Bound, network_value, parameter_values, trains
from restrain.engine.distributed import Term, fitted, local, ranks_of, totals
from restrain.engine.forward import Forwards
from restrain.errors import PenaltyError
from restrain.named_tensors import is_sharded, parameters
from restrain.penalties import NetworkPenalty, Penalty, Scaled
from restrain.penalties.base import ScaledNetwork, at_hand
from restrain.penalties.derivative import OnDerivatives, ScaledDerivative
from restrain.scales import ignored as ignored_scales
from restrain.text_table import text_table
from restrain.transforms import Noise


@dataclass(frozen=True)
class Measure:
    """Value of a loss term, Euclidean norm of its gradient, and share of the sum of norms."""

    value: float
    gradient: float
    share: float


def _term(bound: Bound, root: nn.Module, forwards: Forwards, data_loss: Tensor | None = None) -> Tensor | None:
    """Return the rule's value with its graph, if any; None if nothing was collected yet."""
    if isinstance(bound.rule.what, OnDerivatives):
        return None if bound.derivative is None else bound.derivative.value(root, data_loss)
    if isinstance(bound.rule.what, NetworkPenalty):
        outputs = forwards.outputs.get(bound.key, {})
        return None if bound.output_recorders and not outputs else network_value(bound, root, outputs)
    if not bound.penalty_recorders:
        return parameter_values([bound], root)[0]
    due = [one.due((bound.key,)) for one in forwards.current]
    parts = [one.direct * one.factor for one in due if one is not None and one.direct is not None]
    return torch.stack(parts).sum() if parts else None


def values(bounds: Sequence[Bound], root: nn.Module, forwards: Forwards) -> dict[str, float]:
    """Return {rule: strength × value} of every penalty."""
    found: dict[str, float] = {}
    with torch.no_grad():
        direct = [bound for bound in bounds if not bound.recorders and isinstance(bound.rule.what, Penalty)]
        numbers = {b.key: v for b, v in zip(direct, parameter_values(direct, root), strict=True)}
        for bound in bounds:
            if bound.recorders:
                found[bound.key] = forwards.last(bound.key)
            elif bound.key in numbers:
                found[bound.key] = float(numbers[bound.key])
            elif bound.is_penalty:
                term = _term(bound, root, forwards)
                found[bound.key] = float("nan") if term is None else float(term)
    return found


def measure(
    bounds: Sequence[Bound], root: nn.Module, forwards: Forwards, data_loss: Tensor | None
) -> dict[str, Measure]:
    """Return value, gradient norm and share of each penalty, and of the data loss if given.

    Raises:
        PenaltyError: a data loss with sharded parameters.
    """
    trained = [p for slot in parameters(root) for p in slot.handle.stored(root) if p.requires_grad]
    sharded = any(map(is_sharded, trained))
    if sharded and data_loss is not None:
        raise PenaltyError(
            "reg.measure(data_loss) needs the gradient of the data loss, which FSDP2 gives only in backward(): write "
            "reg.measure(), which leaves it out"
        )
    terms = {b.key: _term(b, root, forwards, data_loss) for b in bounds if b.is_penalty}
    numbers = values(bounds, root, forwards)
    for bound in bounds:
        term = terms.get(bound.key)
        if (bound.output_recorders or bound.derivative) and term is not None:
            numbers[bound.key] = float(term.detach())
    if data_loss is not None:
        key = "data"
        while key in terms:
            key += " loss"
        terms[key], numbers[key] = data_loss, float(data_loss.detach())
    if sharded:  # gradients through activations are known only in backward()
        terms |= {bound.key: None for bound in bounds if bound.recorders and bound.key in terms}
    known = {key: _gradient(term, trained) for key, term in terms.items() if term is not None}
    sizes = dict(zip(known, totals(list(known.values())), strict=True))
    norms = {key: math.sqrt(float(sizes[key])) if key in sizes else math.nan for key in terms}
    whole = sum(norm for norm in norms.values() if norm == norm)
    return {key: Measure(numbers[key], norm, norm / whole if whole else math.nan) for key, norm in norms.items()}


def _gradient(term: Tensor, trained: Sequence[Tensor]) -> list[Term]:
    """Return the squared gradient norm of a term, per parameter.

    Raises:
        PenaltyError: a backward has freed the term's graph.
    """
    if not term.requires_grad or not trained:
        return []
    try:
        gradients = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "a second time" not in str(error):
            raise
        raise PenaltyError(
            "reg.measure() takes gradients in the graph of the last forward, which backward() has freed: call it "
            "between the loss and backward(), or write backward(retain_graph=True)"
        ) from None
    return [(local(g).abs().double().square().sum(), ranks_of(g)) for g in gradients if g is not None]


RIGHT = (2, 3, 4, 6)  # columns of numbers in the table of rules


def table(bounds: Sequence[Bound], root: nn.Module, numbers: dict[str, float] | None) -> str:
    """Return a table with a line per rule, and notes; `numbers` are the values, if known."""
    rows, notes = cells(bounds, root, numbers)
    return "\n".join([text_table(rows, RIGHT), *notes])


def cells(
    bounds: Sequence[Bound], root: nn.Module, numbers: dict[str, float] | None
) -> tuple[list[list[str]], list[str]]:
    """Return (the rows of the table of rules, head first; the notes below it)."""
    head = ["rule", "how", "strength", "tensors", "elements", "where"] + ["value"] * (numbers is not None)
    rows = [head]
    for bound in bounds:
        elements = sum(p.numel() for p, _ in bound.tensors(root)) if bound.parameters else "-"
        row = [
            bound.key,
            bound.rule.how,
            f"{strength_of(bound):g}" if bound.is_penalty else "-",
            str(len(bound.names)),
            f"{elements:,}" if isinstance(elements, int) else elements,
            _short([name or "(the model)" for name in bound.names]),
        ]
        if numbers is not None:
            row.append(f"{numbers[bound.key]:.6g}" if bound.key in numbers else "-")
        rows.append(row)
    frozen = [name for bound in bounds for name in _frozen(bound, root)]
    notes = [note for bound in bounds for note in (*_units(bound), *bound.notes, *map(str, bound.moving))]
    notes += [f"left out while frozen: {_short(frozen)}"] if frozen else []
    notes += [note for bound in bounds for note in _of_ignored_scales(bound, root)]
    return rows, notes


def strength_of(bound: Bound) -> float:
    """Return the current strength of a penalty; 1 of a sum, whose parts have strengths."""
    what = bound.what
    scaled = isinstance(what, (Scaled, ScaledNetwork, ScaledDerivative))
    return float(at_hand(what.strength, what)) if scaled else 1.0


def _units(bound: Bound, shown: int = 4) -> list[str]:
    """Return notes on the units of a rule, at most `shown` and their number."""
    told = () if bound.joint is None else bound.joint.told
    more = [f"... and of {len(told) - shown} more sets"] if len(told) > shown else []
    return [f"{bound.key}: {text}" for text in (*told[:shown], *more)]


def _of_ignored_scales(bound: Bound, root: nn.Module) -> list[str]:
    """Return a note on decays of weights whose scale the network ignores."""
    what, ignored = bound.rule.what, ignored_scales(root)
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else []
    names = [handle.name for handle, _ in bound.parameters if handle.name in ignored]
    if not names or not any(leaf.elastic is not None and leaf.elastic[1] for leaf in leaves):
        return []
    return [
        f"{bound.key}: the network ignores the scale of {_short(names)}; a decay there sets the length of the "
        "optimizer's steps relative to the weight. rs.Hyperball() holds the norm instead, "
        "rs.schedules.LearningRate() corrects the decay"
    ]


def _frozen(bound: Bound, root: nn.Module) -> list[str]:
    return [handle.name for handle, _ in bound.parameters if not trains(handle, handle.find(root), root)]


def _short(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f", … {len(names) - shown} more" if len(names) > shown else "")


def note_gathered(bounds: Sequence[Bound], root: nn.Module) -> None:
    """Add notes for the table on sharded tensors that must be gathered, with their sizes."""
    if not any(map(is_sharded, root.parameters())):
        return
    for bound in bounds:
        network = isinstance(bound.rule.what, NetworkPenalty)
        found = [(handle.name, handle.find(root), what) for handle, what in bound.parameters]
        large = [
            f"{name!r} ({p.numel() * p.element_size():,} bytes)"
            for name, p, what in found
            if is_sharded(p) and not isinstance(what, Noise) and (network or fitted(what, p) is None)
        ]
        if large:
            shown = ", ".join(large[:4]) + (f", … {len(large) - 4} more" if len(large) > 4 else "")
            bound.notes.append(f"{bound.key}: needs whole tensors, gathered on each process whenever it acts: {shown}")
