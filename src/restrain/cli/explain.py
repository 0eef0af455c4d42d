"""Text of `restrain explain`: data, layers with their zeros, rules by parameter, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restrain.cli.jobs import Run, measure
from restrain.tables import Feature, counted
from restrain.text_table import text_table

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"


def explain(run: Run, plain: bool = False) -> str:
    """Return the text of `restrain explain`.

    Args:
        run: the run to explain.
        plain: True for curves in ASCII.
    """
    parts = [_head(run), layers(run.model), rules(run.model), curves(run.model.history_, plain)]
    return "\n\n".join(part for part in parts if part)


def _head(run: Run) -> str:
    notes, model = run.notes, run.model
    lines = [f"{type(model).__name__} in {run.file}"]
    held = f", {notes['rows'][1]} to validate with" if notes["rows"][1] else ""
    lines.append(f"data      {notes['data']}: {counted(notes['rows'][0], 'row')} to train on{held}")
    if notes["targets"]:
        classes = f": {_listed([str(c) for c in model.classes_])}" if notes["model"] == "classifier" else ""
        lines.append(f"target    {', '.join(notes['targets'])}{classes}")
    lines.append(f"inputs    {len(run.encoding.columns)}: {_listed([_feature(f) for f in run.encoding.features])}")
    if notes["ignored"]:
        lines.append(f"ignored   {_listed(notes['ignored'])}")
    scores = ", ".join(f"{part} {value:.4f}" for part, value in notes["scores"].items())
    lines.append(f"{measure(notes['model']):<9} {scores}")
    return "\n".join(lines)


def _feature(feature: Feature) -> str:
    if feature.values is None:
        return feature.name
    return f"{feature.name} ({_listed(['(missing)' if v is None else v for v in feature.values], 6)})"


def _listed(names: Sequence[str], shown: int = 12) -> str:
    return ", ".join(names[:shown]) + (f", … {len(names) - shown} more" if len(names) > shown else "")


def layers(model: Any) -> str:
    """Return a line for each layer: form, size, number of parameters, and number of exact zeros.

    A weight shared by two layers counts for the first layer.
    """
    counted: set[int] = set()
    rows = [["layer", "form", "size", "activation", "parameters", "zeros", ""]]
    for layer in model.layers_:
        row = [layer["name"], layer["form"], str(layer["size"]), layer.get("activation", "")]
        module = None if layer["form"] == "input" else model.module_.get_submodule(layer["name"])
        own = [] if module is None else [p for p in module.parameters() if id(p) not in counted]
        counted |= set(map(id, own))
        zeros, size = sum(int((p == 0).sum()) for p in own), sum(p.numel() for p in own)
        rows.append([*row, *([f"{size:,}", f"{zeros:,}", f"{zeros / size:.1%}"] if size else [""] * 3)])
    return text_table(rows, right={2, 4, 5, 6})


def rules(model: Any) -> str:
    """Return the table of rules and the parameters or outputs that they act on."""
    with model.attached() as reg:
        return "no rules" if reg is None else reg.table()


def curves(history: Sequence[Mapping[str, Any]], plain: bool = False, width: int = 48) -> str:
    """Return a line for each curve: its first, last and least value, and a sparkline."""
    if not history:
        return "no epochs"
    rows = [["over the epochs", "first", "last", "least", f"1 … {len(history)}" if len(history) > 1 else "1"]]
    for name, values in series(history).items():
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            numbers = [f"{value:.5g}" for value in (finite[0], finite[-1], min(finite))]
            rows.append([name, *numbers, _line(values, width, _ASCII if plain else _BLOCKS)])
    return text_table(rows, right={1, 2, 3})


def series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return each curve by name; NaN where an epoch has no value."""
    names = dict.fromkeys(name for row in history for name in row if name != "epoch")
    return {name: [float(row.get(name, math.nan)) for row in history] for name in names}


def _line(values: Sequence[float], width: int, blocks: str) -> str:
    """Return a curve as a sparkline, in which each sign is the mean over some epochs."""
    count = min(width, len(values))
    means = []
    for place in range(count):
        part = values[place * len(values) // count : (place + 1) * len(values) // count]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    there = [value for value in means if value == value]
    low, high = min(there), max(there)
    step = (high - low) / (len(blocks) - 1) or 1.0
    return "".join(" " if value != value else blocks[round((value - low) / step)] for value in means)


def draw(run: Run, path: Path) -> Path:
    """Draw the curves of training and validation into a file; return its path."""
    from restrain import plots

    columns = series(run.model.history_)
    parts = {
        title: {name.removeprefix("valid_"): values for name, values in columns.items() if held == _is_held(name)}
        for title, held in (("training", False), ("validation", True))
    }
    drawn = {title: part for title, part in parts.items() if part}
    figure, axes = plots.panels(len(drawn), 2, (5.5, 3.3))
    for ax, (title, part) in zip(axes, drawn.items(), strict=True):
        plots.curves(part, ax).set_title(title, fontsize=10, loc="left")
    return plots.save(figure, path)


def _is_held(name: str) -> bool:
    """Return True for a curve of the validation data."""
    return name.startswith("valid_")
