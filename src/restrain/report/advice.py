"""Warnings of a report, in plain words, each with the line to write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from restrain.path_view import PathView
from restrain.report.content import Content, RuleFacts, TensorFacts

_DEAD, _GREAT, _SMALL = 0.1, 0.9, 1e-3  # fractions of units, and of the gradient
_LATER, _WORSE = 5, 1.05  # epochs after the best one, and a validation loss that is worse


@dataclass(frozen=True)
class Advice:
    """A sentence, and the line to write; "" where there is none."""

    text: str
    line: str = ""


def advice(content: Content) -> list[Advice]:
    """Return the warnings of a report, the gravest first."""
    return [*_of_losses(content), *_of_tensors(content), *_of_rules(content), *_of_path(content.path)]


def _of_losses(content: Content) -> Iterator[Advice]:
    """Yield warnings about the curves."""
    rows = content.rows
    over = "step" if any("step" in row for row in rows) else "epoch"
    losses = [(row.get(over, place + 1), row["data_loss"]) for place, row in enumerate(rows) if "data_loss" in row]
    broken = [at for at, loss in losses if math.isinf(loss)]
    if losses and all(math.isnan(loss) for _, loss in losses):
        yield Advice(
            "No tracked step has a data loss: the loss was never given to the rules, or it isn't a number.",
            "loss = reg.loss(F.cross_entropy(model(x), y))",
        )
    elif broken:
        yield Advice(
            f"The data loss is infinite at {over} {broken[0]:g}: the learning rate is too great, or the data have "
            "values that aren't numbers.",
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # before optimizer.step()",
        )
    yield from _of_validation([row["valid_loss"] for row in rows if "valid_loss" in row])
    yield from _of_sizes(content)


def _of_validation(held: list[float]) -> Iterator[Advice]:
    """Yield a warning if the validation loss was best long before the end."""
    finite = [loss for loss in held if math.isfinite(loss)]
    if not finite:
        return
    best = held.index(min(finite))
    if len(held) - 1 - best >= _LATER and held[-1] > _WORSE * min(finite):
        yield Advice(
            f"The validation loss was least after epoch {best + 1} of {len(held)}, and {held[-1] / min(finite):.2g} "
            "times that at the end: the network has learned its data by heart. Stop earlier, or take stronger rules.",
            "model.fit(X, y, valid=0.2, patience=5)",
        )


def _of_sizes(content: Content) -> Iterator[Advice]:
    """Yield warnings about rules that outweigh the data, or hardly act."""
    last = content.rows[-1] if content.rows else {}
    for rule in content.rules:
        share = last.get(f"shares/{rule.key}", math.nan)
        if share > _GREAT:
            yield Advice(
                f"{rule.key!r} is {share:.0%} of the gradient on its weights: it outweighs the data.",
                _scaled(rule, 0.1),
            )
        elif 0 <= share < _SMALL:
            yield Advice(
                f"{rule.key!r} is {share:.2%} of the gradient on its weights: it hardly acts.", _scaled(rule, 10)
            )


def _of_tensors(content: Content) -> Iterator[Advice]:
    """Yield warnings about weights that are all zero, and units that are dead."""
    rules = {rule.key: rule for rule in content.rules}
    for tensor in content.tensors:
        if tensor.rules and len(tensor.shape) > 1 and tensor.entries and tensor.zeros == tensor.entries:
            own = next((rules[key] for key in tensor.rules if key in rules and rules[key].makes_zeros), None)
            yield Advice(
                f"All of {tensor.name!r} is zero: nothing of the layer's input reaches its output.",
                "" if own is None else _scaled(own, 0.3),
            )
    dead = [tensor for tensor in content.tensors if _is_dead(tensor)]
    if dead:
        told = ", ".join(f"{one.dead[0]:,} of {one.dead[1]:,} in {one.name!r}" for one in dead[:3] if one.dead)
        more = f", and in {len(dead) - 3} more" if len(dead) > 3 else ""
        yield Advice(
            f"Units without any incoming weight: {told}{more}. They cost time and change nothing; a smaller network "
            "gives the same outputs.",
            "smaller = rs.compact(model, example, optimizer).model",
        )


def _is_dead(tensor: TensorFacts) -> bool:
    return tensor.dead is not None and _DEAD * tensor.dead[1] <= tensor.dead[0] < tensor.dead[1] and tensor.dead[0] > 0


def _of_rules(content: Content) -> Iterator[Advice]:
    """Yield warnings about penalties that are meant to make zeros, and can't as they are."""
    tensors = {tensor.name: tensor for tensor in content.tensors}
    for rule in content.rules:
        own = [tensors[name] for name in rule.names if name in tensors]
        if rule.makes_zeros and rule.how in ("loss", "gradient") and own and not any(one.zeros for one in own):
            entries = sum(one.entries for one in own)
            yield Advice(
                f"{rule.key!r} shrinks {entries:,} weights, but none is exactly zero, as it acts in the {rule.how}. A "
                "proximal step makes exact zeros, with any optimizer.",
                _line(rule, rule.strength, "proximal"),
            )


def _of_path(path: PathView | None) -> Iterator[Advice]:
    """Yield warnings about a best point at an end of the path."""
    if path is None or len(path.strengths) < 2:
        return
    best = path.strengths[path.best]
    if best == min(path.strengths):
        yield Advice(
            "The best point of the path is the weakest strength that was tried; a weaker one may be better.",
            "rs.path(..., ratio=1e-5)  # of RegressorCV and ClassifierCV, too",
        )
    elif not path.selected[path.best]:
        yield Advice(
            "The best point of the path uses nothing: what is selected doesn't help to predict, or there are too few "
            "samples to tell."
        )


def _scaled(rule: RuleFacts, factor: float) -> str:
    """Return the line of a rule with another strength."""
    return "" if rule.strength is None else _line(rule, factor * rule.strength, rule.how)


def _line(rule: RuleFacts, strength: float | None, how: str) -> str:
    """Return a rule as code."""
    names = list(rule.names)
    where = repr(names[0] if len(names) == 1 else names) if len(names) <= 3 else f"[{names[0]!r}, ...]"
    code = f"({rule.code})" if " + " in rule.code else rule.code
    scaled = code if strength is None or strength == 1 else f"{strength:g} * {code}"
    return f"{scaled}.on({where}, how={how!r}{rule.options})"
