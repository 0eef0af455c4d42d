"""Work of `restrain explain`: data, layers, rules, curves, and what the model does on a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from restrain.cli import drawing
from restrain.cli.evaluation import Calibration, Importance, calibration, confusion, importances, residuals, selected
from restrain.cli.jobs import Run, measure, targets
from restrain.errors import DataError
from restrain.models import defaults
from restrain.report import Part
from restrain.tables import Feature, Marks, counted
from restrain.text_table import text_table

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"


@dataclass(frozen=True)
class Look:
    """What the model does on a table with targets.

    Args:
        data: the table's name.
        rows: its number of rows.
        score: of the model.
        importances: of the columns, greatest first; none of an autoencoder.
        confusion: (classes, counts by true and predicted class), of a classifier.
        residuals: (predictions, targets minus predictions), of a regressor.
        calibration: None of an autoencoder.
    """

    data: str
    rows: int
    score: float
    importances: Sequence[Importance]
    confusion: tuple[list[str], Any] | None
    residuals: tuple[Any, Any] | None
    calibration: Calibration | None


def look(run: Run, data: Path, marks: Marks, seed: int) -> Look:
    """Return what the model does on the table in a file.

    Raises:
        DataError: the table has no target, or isn't one of the model.
    """
    table, kind, names = run.read(data, marks), run.notes["model"], run.notes["targets"]
    if not names and kind != "autoencoder":
        raise DataError(f"{run.file} was fitted in Python, and doesn't know what its target is called: write --target")
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise DataError(f"{data} has no column {missing[0]!r}, the target, by which the model is judged")
    x = run.encoding.apply(table)
    y = targets(table, kind, names, getattr(run.model, "classes_", None))
    if kind == "autoencoder":
        y = None
    classes = kind == "classifier"
    unknown = sorted(set(np.asarray(y).tolist()) - set(run.model.classes_.tolist())) if classes else []
    if unknown:
        raise DataError(f"{data} has the class {unknown[0]!r}, which the model wasn't fitted to")
    return Look(
        str(data),
        len(x),
        float(run.model.score(x, y)),
        [] if y is None else importances(run.model, run.encoding, x, y, seed=seed),
        confusion(run.model, x, y) if classes else None,
        residuals(run.model, x, y) if kind == "regressor" else None,
        None if y is None else calibration(run.model, x, y),
    )


def explain(run: Run, plain: bool = False, seen: Look | None = None) -> str:
    """Return the text of `restrain explain`.

    Args:
        run: the run to explain.
        plain: True for curves in ASCII.
        seen: what the model does on a table.
    """
    parts = [_head(run), layers(run.model), _selected(run), rules(run.model), curves(run.model.history_, plain)]
    parts += [] if seen is None else [text_table(rows, right) for rows, right in _tables(run, seen).values()]
    return "\n\n".join(part for part in parts if part)


def _selected(run: Run) -> str:
    """Return a line on the columns that the first layer uses; "" if it uses all."""
    try:
        kept, left = selected(run.model, run.encoding)
    except AttributeError:
        return ""
    return f"columns without any weight: {_listed(left)}; used: {_listed(kept) or 'none'}" if left else ""


def _tables(run: Run, seen: Look) -> dict[str, tuple[list[list[str]], set[int]]]:
    """Return {title: (rows of a table, head first, and the columns to align right)}."""
    score = measure(run.model)
    found: dict[str, tuple[list[list[str]], set[int]]] = {}
    if seen.importances:
        rows = [[f"importance on {seen.data}", f"fall of {score}", "±"]]
        rows += [[one.column, f"{one.fall:.4f}", f"{one.error:.4f}"] for one in seen.importances]
        found["Importance"] = (rows, {1, 2})
    if seen.confusion is not None:
        names, counts = seen.confusion
        shown = min(len(names), _CLASSES)
        rows = [["true \\ predicted", *names[:shown], "recall"]]
        for name, row, right in zip(names, counts, counts.diagonal(), strict=True):
            recall = f"{right / row.sum():.3f}" if row.sum() else ""
            rows.append([name, *map(str, row[:shown].tolist()), recall])
        found["Confusion"] = (rows, set(range(1, shown + 2)))
    if seen.residuals is not None:
        rest = seen.residuals[1]
        numbers = [rest.mean(), np.sqrt(np.mean(rest**2)), np.abs(rest).mean(), *np.quantile(rest, [0.05, 0.5, 0.95])]
        names = ["mean", "RMSE", "mean |.|", "5 %", "median", "95 %"]
        found["Residuals"] = ([["target - prediction", *names], ["", *(f"{n:.5g}" for n in numbers)]], set(range(1, 7)))
    if seen.calibration is not None:
        found["Calibration"] = (_calibration(run, seen.calibration), {0, 1, 2})
    return found


_CLASSES = 20  # whose columns are shown


def _calibration(run: Run, found: Calibration) -> list[list[str]]:
    rows = [["rows", *_CALIBRATED[run.notes["model"]]]]
    for predicted, observed, count in zip(found.predicted, found.observed, found.rows, strict=True):
        rows.append([str(count), f"{predicted:.5g}", f"{observed:.5g}"])
    return [*rows, ["", "mean distance", f"{found.gap:.5g}"]]


_CALIBRATED = {
    "classifier": ("probability of the class", "part that is right"),
    "regressor": ("mean prediction", "mean target"),
}


def _head(run: Run) -> str:
    notes, model = run.notes, run.model
    lines = [f"{type(model).__name__} in {run.file}"]
    lines.append(f"data      {_trained_on(notes)}")
    if notes["targets"]:
        classes = f": {_listed([str(c) for c in model.classes_])}" if notes["model"] == "classifier" else ""
        lines.append(f"target    {', '.join(notes['targets'])}{classes}")
    lines.append(f"inputs    {len(run.encoding.columns)}: {_listed([_feature(f) for f in run.encoding.features])}")
    if notes["ignored"]:
        lines.append(f"ignored   {_listed(notes['ignored'])}")
    scores = ", ".join(f"{part} {value:.4f}" for part, value in notes["scores"].items())
    if scores:
        lines.append(f"{measure(model):<9} {scores}")
    return "\n".join(lines)


def _trained_on(notes: Mapping[str, Any]) -> str:
    if notes["rows"] is None:
        return "not known: fitted in Python"
    held = f", {notes['rows'][1]} to validate with" if notes["rows"][1] else ""
    return f"{notes['data']}: {counted(notes['rows'][0], 'row')} to train on{held}"


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
        if reg is not None:
            return str(reg.table())
    return defaults.rules_of_fit(model.history_) or "No rules."


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

    panels = drawing.panels_of(run.model.history_)
    figure, axes = plots.panels(len(panels), 2, (5.5, 3.3))
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        drawing.curves(ax, run.model.history_, names)
        ax.set_title(title, fontsize=10, loc="left")
    return plots.save(figure, path)


def report(run: Run, file: Path, seen: Look | None) -> Path:
    """Write a page with what `explain` shows; return its path."""
    facts = {f"{measure(run.model)} in {part}": f"{score:.4f}" for part, score in run.notes["scores"].items()}
    if seen is not None:
        facts[f"{measure(run.model)} on {seen.data}"] = f"{seen.score:.4f}, {counted(seen.rows, 'row')}"
    written: Path = run.model.report(file, facts=facts, parts=[] if seen is None else _parts(run, seen))
    return written


def _parts(run: Run, seen: Look) -> list[Part]:
    score, tables = measure(run.model), _tables(run, seen)
    draws: dict[str, Callable[[list[Any]], None]]
    draws = {"Importance": lambda axes: drawing.importances(axes[0], seen.importances, score)}
    sizes = {"Importance": (4.8, 1.0 + 0.25 * min(20, len(seen.importances)))}
    if seen.confusion is not None:
        names, counts = seen.confusion
        draws["Confusion"] = lambda axes: drawing.confusion(axes[0], names, counts)
    if seen.residuals is not None:
        predicted, rest = seen.residuals
        draws["Residuals"] = lambda axes: drawing.residuals(axes[0], predicted, rest)
    if seen.calibration is not None:
        known, labels = seen.calibration, _CALIBRATED[run.notes["model"]]
        draws["Calibration"] = lambda axes: drawing.calibration(axes[0], known, labels)
    return [
        Part(title.lower(), title, f"On {seen.data}.", rows, tuple(right), draws[title], sizes.get(title, (4.8, 3.2)))
        for title, (rows, right) in tables.items()
    ]
