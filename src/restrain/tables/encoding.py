"""Encoding of the columns of a table as inputs of a model, learned once and stored as JSON.

A column becomes

    a number     itself; booleans are 0 and 1
    a date       days since 1970-01-01 and its places in cycles (see `restrain.tables.dates`)
    a category   one input for each value, 1 where the value stands

Text whose every value is a date is a column of dates, other text is a category.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from restrain.errors import DataError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.tables import dates, spelling
from restrain.tables.table import Table, counted, said, shown

_FEW = 20  # a text column with more values, and on average less than two rows each, is no category


@dataclass(frozen=True)
class Feature:
    """A column that is a number, a category or a date.

    Args:
        name: the column's name.
        values: the values of a category in the order of their inputs, among them None for missing;
            or None.
        fill: the number (of a date: its days) that replaces missing ones; or None.
        cycles: of a date, the cycles whose places are inputs; else None.
    """

    name: str
    values: tuple[str | None, ...] | None = None
    fill: float | None = None
    cycles: tuple[str, ...] | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the column's inputs."""
        if self.cycles is not None:
            return dates.names(self.name, self.cycles)
        if self.values is None:
            return [self.name]
        return [f"{self.name}={'(missing)' if value is None else value}" for value in self.values]

    @property
    def kind(self) -> str:
        """Return "number", "category" or "date"."""
        return "date" if self.cycles is not None else "number" if self.values is None else "category"

    def indices(self, texts: Any) -> Any:
        """Return the index of each text among the values of a category; -1 for other texts."""
        values = self.values or ()
        match, places = spelling.matcher(values), {value: number for number, value in enumerate(values)}
        found = {text: places.get(match(text), -1) for text in set(texts.tolist())}
        return np.array([found[text] for text in texts.tolist()], np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        if self.values is not None:
            return {"name": self.name, "kind": "category", "values": list(self.values)}
        more = {} if self.cycles is None else {"cycles": list(self.cycles)}
        return {"name": self.name, "kind": self.kind, "fill": self.fill, **more}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Feature:
        """Return the feature described by the result of `to_dict`.

        Raises:
            LookupError, ValueError: the data are no feature's.
        """
        kind, name = data["kind"], data["name"]
        if kind not in ("number", "category", "date") or not isinstance(name, str):
            raise ValueError(f"no column is a {said(kind)} called {said(name)}")
        if kind == "category":
            values = tuple(data["values"])
            if not values or not all(value is None or isinstance(value, str) for value in values):
                raise ValueError(f"the values of {name!r} are {said(values)}, not text")
            return cls(name, values=values)
        cycles = tuple(data["cycles"]) if kind == "date" else None
        fill = data["fill"]
        if not set(cycles or ()) <= set(dates.PERIODS) or not (fill is None or np.isfinite(fill)):
            raise ValueError(f"{name!r} has the cycles {said(cycles)}, and gaps filled by {said(fill)}")
        return cls(name, fill=None if fill is None else float(fill), cycles=cycles)


@dataclass(frozen=True)
class Encoding:
    """The inputs of a table's columns: numbers, dates, and one-hot encoded categories.

    Args:
        features: the columns, in their order.
        missing: "error" refuses missing values; "fill" replaces a missing number or date by the
            mean of the training rows, and counts a missing category as a value.
    """

    features: tuple[Feature, ...]
    missing: Literal["error", "fill"] = "error"

    @classmethod
    def learn(
        cls, table: Table, names: Sequence[str], categories: Sequence[str], missing: Literal["error", "fill"], rows: Any
    ) -> Encoding:
        """Return the encoding with the categories of all rows, and the means of the given rows.

        Raises:
            DataError: a column can't be a feature without a change.
        """
        asked = {*categories, *table.categories}
        return cls(tuple(_feature(table, name, name in asked, missing, rows) for name in names), missing)

    def apply(self, table: Table, unknown: Literal["error", "zeros"] = "error") -> Any:
        """Return the matrix of inputs in float64.

        Args:
            table: a table with the columns of all features; other columns are ignored.
            unknown: for values of a category that are new since training: "error", or "zeros" with
                a warning that counts them.

        Raises:
            DataError: a column or a value is missing, a text isn't a number, or a category's value
                is unknown.
        """
        absent = [feature.name for feature in self.features if feature.name not in table.columns]
        if absent:
            raise DataError(
                f"{table.source}: the model needs the columns {', '.join(map(repr, absent))}; there are: "
                f"{shown(table.columns)}"
            )
        matrix = np.empty((len(table), len(self.columns)), np.float64)
        for feature, place in zip(self.features, self.places(), strict=True):
            matrix[:, place] = self._encoded(table, feature, unknown)
        return matrix

    def _encoded(self, table: Table, feature: Feature, unknown: str) -> Any:
        if feature.values is not None:
            return self._hot(table, feature, unknown)
        values: Any = table.numbers(feature.name) if feature.cycles is None else table.dates(feature.name)
        gone = np.isnan(values) if feature.cycles is None else np.isnat(values)
        if gone.any() and (self.missing == "error" or feature.fill is None):
            raise _gap(table, feature.name, int(np.flatnonzero(gone)[0]), int(gone.sum()))
        if gone.any():
            values[gone] = feature.fill if feature.cycles is None else _date(feature.fill)
        return values[:, None] if feature.cycles is None else dates.inputs(values, feature.cycles)

    def _hot(self, table: Table, feature: Feature, unknown: str) -> Any:
        texts = table.texts(feature.name)
        found = feature.indices(texts)
        wrong = np.flatnonzero(found < 0)
        if len(wrong) and self.missing == "error":
            gone = [row for row in wrong if texts[row] is None]
            if gone:
                raise _gap(table, feature.name, int(gone[0]), len(gone))
        if len(wrong) and unknown == "error":
            raise _unknown(table, feature, int(wrong[0]), len(wrong))
        if len(wrong):
            _warn_of_unknown(table, feature, texts[wrong].tolist())
        hot = np.zeros((len(texts), len(feature.values or ())), np.float64)
        rows = np.flatnonzero(found >= 0)
        hot[rows, found[rows]] = 1
        return hot

    def places(self) -> list[slice]:
        """Return the place of each feature's inputs among all."""
        ends = np.cumsum([len(feature.columns) for feature in self.features]).tolist()
        return [slice(start, stop) for start, stop in pairwise([0, *ends])]

    @property
    def columns(self) -> list[str]:
        """Names of the model's inputs."""
        return [column for feature in self.features for column in feature.columns]

    @property
    def categories(self) -> list[str]:
        """Names of the columns that are categories."""
        return [feature.name for feature in self.features if feature.values is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"features": [feature.to_dict() for feature in self.features], "missing": self.missing}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Encoding:
        """Return the encoding described by the result of `to_dict`.

        Raises:
            LookupError, ValueError: the data are no encoding's.
        """
        if data["missing"] not in ("error", "fill"):
            raise ValueError(f"missing values are refused or filled, not {said(data['missing'])}")
        return cls(tuple(map(Feature.from_dict, data["features"])), data["missing"])


def _date(number: float | None) -> Any:
    return np.datetime64(round((number or 0.0) * 86_400e6), "us")


def _feature(table: Table, name: str, category: bool, missing: str, rows: Any) -> Feature:
    """Return the feature of a column: a number, a date, or a category if asked for, or text."""
    words, values = table.words, table.column(name)
    if name.startswith(("Unnamed: ", "__index_level_")):
        raise DataError(
            f"{table.source}: the column {name!r} has no name, perhaps row numbers that pandas wrote; leave it out: "
            f"{words.leave_out.format(name)}"
        )
    gone = table.missing(name)
    _check_gaps(table, name, gone, missing)
    if not category and values.dtype != object and values.dtype.kind != "M":
        return Feature(name, fill=_mean(table.numbers(name)[rows], missing))
    texts = values if category or values.dtype.kind == "M" else table.texts(name)
    if not category and (values.dtype.kind == "M" or _are_dates(table, texts, gone)):
        found = table.dates(name)
        return Feature(name, fill=_mean(dates.days(found[rows]), missing), cycles=dates.cycles(found))
    texts = table.texts(name)
    if not category:
        _check_is_category(table, name, texts, gone)
    known = sorted(_distinct(texts[~gone].tolist()), key=_order)
    return Feature(name, values=(*known, None) if gone.any() else tuple(known))


def _mean(values: Any, missing: str) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if missing == "fill" and len(known) else None


def _are_dates(table: Table, texts: Any, gone: Any) -> bool:
    first = texts[~gone][:10]  # most columns of text aren't dates
    return all(
        bool((~np.isnat(dates.parsed(some, table.marks.date)) | mask).all())
        for some, mask in ((first, np.zeros(len(first), bool)), (texts, gone))
    )


def _distinct(texts: Sequence[str]) -> set[str]:
    """Return the distinct values; of booleans in mixed case, one spelling of true and of false."""
    found = set(map(spelling.canonical, texts))
    if spelling.are_booleans({text.lower() for text in found}):
        return set({text.lower(): text for text in sorted(found, reverse=True)}.values())
    return found


def _order(text: str) -> tuple[int, float, str]:
    """Return a sort key that puts numbers by size before other texts."""
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def _check_gaps(table: Table, name: str, gone: Any, missing: str) -> None:
    if gone.all():
        raise DataError(
            f"{table.source}: the column {name!r} has no values at all; leave it out: "
            f"{table.words.leave_out.format(name)}"
        )
    if gone.any() and missing == "error":
        raise _missing(table, name, int(np.flatnonzero(gone)[0]), int(gone.sum()))


def _check_is_category(table: Table, name: str, texts: Any, gone: Any) -> None:
    """Check that a text column is a category: no numbers with mistakes or in another form, no ids.

    Raises:
        DataError: the column is of another kind; the message says what to write.
    """
    there, words = ~gone, table.words
    leave_out, as_category = words.leave_out.format(name), words.as_category.format(name)
    strays = np.flatnonzero(there & np.isnan(table.parsed(texts)))
    undated = np.flatnonzero(there & np.isnat(dates.parsed(texts, table.marks.date)))
    formed = [row for row in strays.tolist() if spelling.forms_of(texts[row], table.marks.decimal)]
    for wrong, wanted in ((undated, "a date"), (strays, "a number")):
        if len(wrong) and 2 * len(wrong) < there.sum() and (wanted == "a date" or wrong[0] not in formed):
            raise table.fault(
                name,
                int(wrong[0]),
                f"expected {wanted}, as in {counted(int(there.sum()) - len(wrong), 'other row')}, got "
                f"{said(texts[wrong[0]])}; correct it, or say that the column is a category: {as_category}",
            )
    hint = table.way_out(name, texts[formed].tolist())
    if formed and 2 * (len(strays) - len(formed)) < there.sum():
        raise table.fault(
            name,
            formed[0],
            f"expected a number or a category, got {said(texts[formed[0]])}; {hint}, leave the column out: "
            f"{leave_out}, or take its values as categories: {as_category}",
        )
    counts = Counter(texts[there].tolist())
    if len(counts) > _FEW and 2 * len(counts) > there.sum():
        numbers = "" if len(strays) else ", all of them numbers"
        raise DataError(
            f"{table.source}: the column {name!r} has {len(counts)} different texts in {int(there.sum())} rows"
            f"{numbers}, too many for a category; leave it out: {leave_out}, or take it all the same: {as_category}"
        )


def _missing(table: Table, name: str, row: int, count: int = 1) -> DataError:
    return table.fault(name, row, f"{_of_rows(count)}; fill it in, leave the column out, or {table.words.fill}")


def _gap(table: Table, name: str, row: int, count: int) -> DataError:
    """Return the error of a gap in a table that isn't that of the training."""
    rows = "this row" if count == 1 else "these rows"
    return table.fault(name, row, f"{_of_rows(count)}; fill it in, leave {rows} out, or {table.words.anew}")


def _of_rows(count: int) -> str:
    return "the value is missing" + (f" (and in {counted(count - 1, 'other row')})" if count > 1 else "")


def _unknown(table: Table, feature: Feature, row: int, count: int) -> DataError:
    known = ", ".join(str(value) for value in (feature.values or ())[:12] if value is not None)
    value = table.texts(feature.name)[row]
    more = f" ({counted(count, 'row')} of {len(table)} have such values)" if count > 1 else ""
    return table.fault(
        feature.name,
        row,
        f"{'a missing value' if value is None else said(value)} was not there in training, only {known}{more}; "
        f"correct it, {table.words.unknown}",
    )


def _warn_of_unknown(table: Table, feature: Feature, texts: list[str | None]) -> None:
    named = ", ".join("a missing value" if text is None else repr(text) for text in dict.fromkeys(texts[:100]))
    warnings.warn(
        f"{table.source}, column {feature.name!r}: {counted(len(texts), 'row')} of {len(table)} with values that were "
        f"not there in training, taken as none of its values: {named:.200}",
        RestrainWarning,
        stacklevel=level_of_caller(),
    )
