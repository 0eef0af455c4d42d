"""Encoding of the columns of a table as inputs of a model, learned once and stored as JSON."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from restrain.cli import spelling
from restrain.cli.tables import Table, counted
from restrain.errors import DataError, RestrainWarning
from restrain.fields import level_of_caller

_FEW = 20  # a text column with more values, and on average less than two rows each, is no category


@dataclass(frozen=True)
class Feature:
    """A column that is a number or a category.

    Args:
        name: the column's name.
        values: the values of a category in the order of their inputs, among them None for missing;
            or None for a number.
        fill: the number that replaces missing numbers; or None.
    """

    name: str
    values: tuple[str | None, ...] | None = None
    fill: float | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the column's inputs."""
        if self.values is None:
            return [self.name]
        return [f"{self.name}={'(missing)' if value is None else value}" for value in self.values]

    def indices(self, texts: Any) -> Any:
        """Return the index of each text among the values of a category; -1 for other texts."""
        values = self.values or ()
        match, places = spelling.matcher(values), {value: number for number, value in enumerate(values)}
        found = {text: places.get(match(text), -1) for text in set(texts.tolist())}
        return np.array([found[text] for text in texts.tolist()], np.int64)


@dataclass(frozen=True)
class Encoding:
    """One-hot encoding of categories; numbers stay unchanged.

    Args:
        features: the columns, in their order.
        missing: "error" refuses missing values; "fill" replaces a missing number by the mean of the
            training rows, and counts a missing category as a value.
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
        return cls(tuple(_feature(table, name, name in categories, missing, rows) for name in names), missing)

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
                f"{', '.join(list(table.columns)[:12])}"
            )
        matrix = np.empty((len(table), len(self.columns)), np.float64)
        start = 0
        for feature in self.features:
            width = len(feature.columns)
            matrix[:, start : start + width] = self._encoded(table, feature, unknown)
            start += width
        return matrix

    def _encoded(self, table: Table, feature: Feature, unknown: str) -> Any:
        if feature.values is None:
            numbers = table.numbers(feature.name)
            gone = np.isnan(numbers)
            if gone.any() and (self.missing == "error" or feature.fill is None):
                raise _missing(table, feature.name, int(np.flatnonzero(gone)[0]))
            if gone.any():
                numbers[gone] = feature.fill
            return numbers[:, None]
        texts = table.texts(feature.name)
        found = feature.indices(texts)
        wrong = np.flatnonzero(found < 0)
        if len(wrong) and self.missing == "error":
            gone = [row for row in wrong if texts[row] is None]
            if gone:
                raise _missing(table, feature.name, int(gone[0]))
        if len(wrong) and unknown == "error":
            raise _unknown(table, feature, int(wrong[0]))
        if len(wrong):
            _warn_of_unknown(table, feature, texts[wrong].tolist())
        hot = np.zeros((len(texts), len(feature.values)), np.float64)
        rows = np.flatnonzero(found >= 0)
        hot[rows, found[rows]] = 1
        return hot

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
        features = [
            {"name": f.name, "kind": "number", "fill": f.fill}
            if f.values is None
            else {"name": f.name, "kind": "category", "values": list(f.values)}
            for f in self.features
        ]
        return {"features": features, "missing": self.missing}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Encoding:
        """Return the encoding described by the result of `to_dict`."""
        features = [
            Feature(one["name"], fill=one["fill"])
            if one["kind"] == "number"
            else Feature(one["name"], values=tuple(one["values"]))
            for one in data["features"]
        ]
        return cls(tuple(features), data["missing"])


def _feature(table: Table, name: str, category: bool, missing: str, rows: Any) -> Feature:
    values = table.column(name)
    if name.startswith(("Unnamed: ", "__index_level_")):
        raise DataError(
            f"{table.source}: the column {name!r} has no name, perhaps row numbers that pandas wrote; leave it out: "
            f"--ignore {name!r}"
        )
    if not category and values.dtype != object:
        numbers = table.numbers(name)
        _check_gaps(table, name, np.isnan(numbers), missing)
        known = numbers[rows][~np.isnan(numbers[rows])]
        return Feature(name, fill=float(known.mean()) if missing == "fill" and len(known) else None)
    texts = table.texts(name)
    gone = np.array([text is None for text in texts])
    _check_gaps(table, name, gone, missing)
    if not category:
        _check_is_category(table, name, texts, gone)
    known = sorted(_distinct(texts[~gone].tolist()), key=_order)
    return Feature(name, values=(*known, None) if gone.any() else tuple(known))


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
        raise DataError(f"{table.source}: the column {name!r} has no values at all; leave it out: --ignore {name!r}")
    if gone.any() and missing == "error":
        raise _missing(table, name, int(np.flatnonzero(gone)[0]), int(gone.sum()))


def _check_is_category(table: Table, name: str, texts: Any, gone: Any) -> None:
    """Check that a text column is a category: no numbers with mistakes or in another form, no ids.

    Raises:
        DataError: the column is of another kind; the message says what to write.
    """
    there = ~gone
    strays = np.flatnonzero(there & np.isnan(table.parsed(texts)))
    formed = [row for row in strays.tolist() if spelling.forms_of(texts[row], table.marks.decimal)]
    hint = spelling.way_out(texts[formed].tolist(), table.marks.decimal)
    if formed and 2 * (len(strays) - len(formed)) < there.sum():
        raise table.fault(
            name,
            formed[0],
            f"expected a number or a category, got {texts[formed[0]]!r}; {hint}, leave the column out: --ignore "
            f"{name!r}, or take its values as categories: --categories {name!r}",
        )
    if len(strays) and 2 * len(strays) < there.sum():
        raise table.fault(
            name,
            int(strays[0]),
            f"expected a number, as in {counted(int(there.sum()) - len(strays), 'other row')}, got "
            f"{texts[strays[0]]!r}; correct it, or say that the column is a category: --categories {name!r}",
        )
    counts = Counter(texts[there].tolist())
    if len(counts) > _FEW and 2 * len(counts) > there.sum():
        raise DataError(
            f"{table.source}: the column {name!r} has {len(counts)} different texts in {int(there.sum())} rows, too "
            f"many for a category; leave it out: --ignore {name!r}, or take it all the same: --categories {name!r}"
        )


def _missing(table: Table, name: str, row: int, count: int = 1) -> DataError:
    more = f" (and in {counted(count - 1, 'other row')})" if count > 1 else ""
    return table.fault(
        name, row, f"the value is missing{more}; fill it in, leave the column out, or fit with --missing fill"
    )


def _unknown(table: Table, feature: Feature, row: int) -> DataError:
    known = ", ".join(str(value) for value in (feature.values or ())[:12] if value is not None)
    value = table.texts(feature.name)[row]
    return table.fault(
        feature.name,
        row,
        f"{'a missing value' if value is None else repr(value)} was not there in training, only {known}; correct it, "
        "or take it as none of these: --unknown zeros",
    )


def _warn_of_unknown(table: Table, feature: Feature, texts: list[str | None]) -> None:
    shown = ", ".join("a missing value" if text is None else repr(text) for text in dict.fromkeys(texts[:100]))
    warnings.warn(
        f"{table.source}, column {feature.name!r}: {counted(len(texts), 'row')} of {len(table)} with values that were "
        f"not there in training, taken as none of its values: {shown:.200}",
        RestrainWarning,
        stacklevel=level_of_caller(),
    )
