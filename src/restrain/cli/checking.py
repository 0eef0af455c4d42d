"""Work of `restrain check`: what a table is made of, what would go wrong, and the command to write.

A column tells the target if it equals it, if it determines it (each of its values, with two rows or
more on average, has one class or one number), if a number's thresholds part the classes, or if a
number is a linear function of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from restrain.cli import jobs
from restrain.errors import DataError
from restrain.tables import Encoding, Table, canonical, counted, dates, shown
from restrain.text_table import text_table

_FEW = 20  # as many classes at most, of a target of whole numbers
_LINEAR = 1 - 1e-10  # of a squared correlation


@dataclass
class Findings:
    """What was found in a table.

    Args:
        rows: the lines of the table of columns.
        notes: sentences on what was found, each with what to do.
        ignore: columns to leave out.
        missing: True if rows have missing values.
        date: how dates are written, where not as 2024-01-31.
    """

    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    missing: bool = False
    date: str | None = None

    def leave_out(self, name: str, why: str) -> None:
        """Note a column that is better left out."""
        self.notes.append(f"{name}: {why}; leave it out: --ignore {shlex.quote(name)}")
        self.ignore.append(name)


def check(table: Table, targets: Sequence[str], ignored: Sequence[str], categories: Sequence[str]) -> Findings:
    """Return what there is to say about a table.

    Args:
        table: the table.
        targets: the columns to predict, or none.
        ignored: columns that are left out.
        categories: columns of numbers that are categories.
    """
    found, names = Findings(), [name for name in table.columns if name not in ignored]
    codes = {name: _codes(table, name) for name in names}
    for name in names:
        _column(found, table, name, codes[name], name in categories, name in targets)
    inputs = [name for name in names if name not in targets and name not in found.ignore]
    _missing(found, table, [*inputs, *targets])
    _same_columns(found, codes, inputs)
    _same_rows(found, codes, inputs, targets)
    for target in targets:
        for name in inputs:
            why = _leak(table, name, target, codes)
            if why and name not in found.ignore:
                found.leave_out(name, f"{why} the target {target!r}, which is no gift if it isn't known beforehand")
    if len(targets) == 1:
        _target(found, table, targets[0], codes[targets[0]])
    return found


def text(table: Table, found: Findings, command: str) -> str:
    """Return the findings as text."""
    head = f"{table.source}: {counted(len(table), 'row')}, {counted(len(table.columns), 'column')}"
    rows = [["column", "kind", "values", "missing", "", ""], *found.rows]
    notes = [f"- {note}" for note in found.notes] or ["nothing to mend was found"]
    return "\n".join([head, "", text_table(rows, right={2, 3}), "", *notes, "", f"then: {command}"])


def command_of(
    table: Table, found: Findings, given: dict[str, Any], targets: Sequence[str], files: Sequence[Any]
) -> str:
    """Return the command that fits a model to the table as it was found."""
    kind = "autoencoder" if not targets else "classifier" if _is_classes(table, targets) else "regressor"
    words = ["restrain", "fit", *map(str, files)]
    words += [word for target in targets for word in ("--target", target)]
    words += ["--model", kind]
    ignored = [*given["ignore"], *found.ignore]
    words += ["--ignore", ",".join(ignored)] if ignored else []
    words += [word for name in given["categories"] for word in ("--categories", name)]
    for name in ("separator", "decimal", "thousands", "encoding", "date_format", "sheet"):
        value = found.date if name == "date_format" and given[name] is None else given[name]
        words += [f"--{name.replace('_', '-')}", value] if value is not None else []
    words += [word for gap in given["na_values"] for word in ("--na-values", gap)]
    words += ["--missing", "fill"] if found.missing else []
    return shlex.join([*words, "--out", "run/"])


# ---------------------------------------------------------------- columns


def _codes(table: Table, name: str) -> Any:
    """Return the number of each row's value among the distinct ones; -1 where it is missing."""
    gone = table.missing(name)
    values = table.column(name)
    values = np.array(["" if v is None else canonical(v) for v in values], str) if values.dtype == object else values
    found = np.full(len(gone), -1)
    if not gone.all():
        found[~gone] = np.unique(values[~gone], return_inverse=True)[1].ravel()
    return found


def _column(found: Findings, table: Table, name: str, codes: Any, category: bool, is_target: bool) -> None:
    """Add a column's line, and what is wrong with it."""
    gone, distinct = int((codes < 0).sum()), int(codes.max(initial=-1)) + 1
    kind, what = _kind(table, name, category)
    missing = f"{gone} ({gone / len(codes):.0%})" if gone else ""
    mark = "target" if is_target else ""
    found.rows.append([name, kind, str(distinct), missing, _examples(table, name, kind), mark])
    if is_target:
        if gone:
            found.notes.append(
                f"{name}: the target is missing in {counted(gone, 'row')}; leave them out: --drop-missing"
            )
        return
    if distinct == 0:
        found.leave_out(name, "has no values at all")
    elif distinct == 1 and not gone:
        found.leave_out(name, f"is constant, {_examples(table, name, kind)}")
    elif what:
        found.notes.append(f"{name}: {what}")
        form = next(iter(dates.forms([value for value in table.column(name).tolist() if isinstance(value, str)])), None)
        if form is not None and found.date in (None, form):
            found.date = form
        else:
            found.ignore.append(name)
    elif kind == "number" and _counts_rows(table.numbers(name)):
        found.leave_out(name, "counts the rows")
    elif kind == "number" and 2 < distinct <= _FEW // 2 and _are_whole(table.numbers(name)):
        found.notes.append(
            f"{name}: {distinct} different whole numbers; if they are names of groups, write --categories "
            f"{shlex.quote(name)}"
        )


def _kind(table: Table, name: str, category: bool) -> tuple[str, str]:
    """Return the kind of a column, and why it can't be an input, or ""."""
    values = table.column(name)
    try:
        asked = [name] if category else []
        feature = Encoding.learn(table, [name], asked, "fill", np.arange(len(table))).features[0]
    except DataError as error:
        said = str(error).removeprefix(f"{table.source}, ").removeprefix(f"{table.source}: ")
        return "text" if values.dtype == object else "number", said
    return "boolean" if values.dtype.kind == "b" else feature.kind, ""


def _examples(table: Table, name: str, kind: str) -> str:
    """Return the range of numbers and dates, or the most frequent texts."""
    gone = table.missing(name)
    if gone.all():
        return ""
    values = table.column(name)[~gone]
    if kind == "date" or values.dtype.kind == "M":
        days = np.datetime_as_string(table.dates(name)[~gone], "D")
        return f"{min(days)} … {max(days)}"
    if values.dtype.kind in "iuf":
        low, high = values.min(), values.max()
        return f"{low:g}" if low == high else f"{low:g} … {high:g}"
    texts, counts = np.unique(table.texts(name)[~gone].astype(str), return_counts=True)
    return shown([_short(one) for one in texts[np.argsort(-counts, kind="stable")]], 3)


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:19]}…"


def _are_whole(values: Any) -> bool:
    there = values[~np.isnan(values)]
    return bool((there == np.trunc(there)).all())


def _counts_rows(values: Any) -> bool:
    """Return True for whole numbers that rise by 1 from row to row."""
    return len(values) > 2 and bool((np.diff(values) == 1).all()) and values[0] == np.trunc(values[0])


# ---------------------------------------------------------------- rows and pairs of columns


def _missing(found: Findings, table: Table, names: Sequence[str]) -> None:
    masks = [table.missing(name) for name in names]
    gone = int(np.any(masks, axis=0).sum()) if masks else 0
    if gone:
        found.missing = True
        found.notes.append(
            f"{counted(gone, 'row')} of {len(table)} with missing values: --missing fill takes means, and a category "
            f"of their own; --drop-missing leaves {counted(len(table) - gone, 'row')}"
        )


def _same_columns(found: Findings, codes: dict[str, Any], names: Sequence[str]) -> None:
    """Note columns that tell the same apart as one before them."""
    known: dict[bytes, str] = {}
    for name in names:
        _, order = np.unique(codes[name], return_index=True)
        rank = np.empty(len(order), np.int64)
        rank[np.argsort(order)] = np.arange(len(order))
        key = rank[np.searchsorted(np.unique(codes[name]), codes[name])].tobytes()  # numbered as they appear
        if key in known and len(order) > 1 and len(order) < len(codes[name]):
            found.leave_out(name, f"says the same as {known[key]!r}, value by value")
        known.setdefault(key, name)


def _same_rows(found: Findings, codes: dict[str, Any], inputs: Sequence[str], targets: Sequence[str]) -> None:
    """Note equal rows, and equal inputs with different targets."""
    everything = [*inputs, *targets]
    if not inputs:
        return
    rows = np.stack([codes[name] for name in everything], 1)
    more = len(rows) - len(np.unique(rows, axis=0))
    if more:
        found.notes.append(
            f"{counted(more, 'row')} equal to another row: if they are copies, a validation part knows its answers"
        )
    if targets:
        distinct = np.unique(rows, axis=0)
        torn = len(distinct) - len(np.unique(distinct[:, : len(inputs)], axis=0))
        if torn:
            found.notes.append(f"{counted(torn, 'row')} with the inputs of another and a different target")


def _leak(table: Table, name: str, target: str, codes: dict[str, Any]) -> str:
    """Return how a column tells the target, or ""."""
    x, y = codes[name], codes[target]
    there = (x >= 0) & (y >= 0)
    x, y = x[there], y[there]
    values, classes = len(np.unique(x)), len(np.unique(y))
    if classes < 2 or len(x) < 4:
        return ""
    pairs = len(np.unique(np.stack([x, y], 1), axis=0))
    if pairs == values == classes and 2 * values <= len(x):
        return "is another name of"
    if pairs == values and 2 * values <= len(x):
        return "determines"
    numeric = table.column(name).dtype.kind in "iuf"
    if numeric and 2 * classes <= len(x) and classes <= _FEW:
        order = np.argsort(x, kind="stable")  # codes of numbers are in their order
        runs = 1 + int((np.diff(y[order]) != 0).sum())
        if runs == classes and pairs == values:
            return "parts by thresholds the classes of"
    if numeric and table.column(target).dtype.kind in "iuf":
        a, b = table.numbers(name)[there], table.numbers(target)[there]
        if a.std() > 0 and b.std() > 0 and np.corrcoef(a, b)[0, 1] ** 2 >= _LINEAR:
            return "is a linear function of"
    return ""


# ---------------------------------------------------------------- targets


def _is_classes(table: Table, targets: Sequence[str]) -> bool:
    if len(targets) != 1:
        return False
    values = table.column(targets[0])
    if values.dtype.kind in "bO":
        return True
    return values.dtype.kind != "M" and _are_whole(table.numbers(targets[0])) and len(np.unique(values)) <= _FEW


def _target(found: Findings, table: Table, name: str, codes: Any) -> None:
    """Note rare classes, or that numbers may be classes."""
    if not _is_classes(table, [name]):
        return
    counts = np.bincount(codes[codes >= 0])
    texts = table.texts(name)
    names = [texts[int(np.flatnonzero(codes == code)[0])] for code in range(len(counts))]
    rare = [f"{one!r} ({counted(int(count), 'row')})" for one, count in zip(names, counts, strict=True) if count < 5]
    if rare:
        found.notes.append(f"{name}: rare classes, {shown(rare, 6)}; scores on them mean little")
    if len(counts) > 1 and counts.max() > 0.9 * counts.sum():
        found.notes.append(
            f"{name}: {counts.max() / counts.sum():.1%} of the rows are of one class, {names[int(counts.argmax())]!r}: "
            "so much accuracy is had for nothing; --set class_weight=balanced weighs all classes alike"
        )
    if table.column(name).dtype.kind in "iuf":
        found.notes.append(
            f"{name}: {len(counts)} different whole numbers are taken for classes; for quantities write --model "
            "regressor"
        )
    try:
        jobs.labels(table.part(codes >= 0), name)
    except DataError as error:
        found.notes.append(str(error))
