"""A table as named columns of numbers, text or dates, whatever it was read from.

Errors name the source, the row and the column, and say what to write: an option of the command line
for a file, a line of Python for a data frame (`Words`).
"""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from restrain.errors import DataError
from restrain.tables import dates, spelling


@dataclass(frozen=True)
class Marks:
    """How numbers, dates and gaps are written in a text file.

    Args:
        separator: the character between values. None means a tab in .tsv, the most frequent
            candidate of the header in .txt, else a comma.
        decimal: the character before the fraction of a number.
        thousands: the character between groups of three digits, or "".
        date: how dates are written, as in "%d.%m.%Y"; None for 2024-01-31 only, with or without a
            time of day.
        encoding: the encoding of the file.
        gaps: texts that stand for a missing value, besides the empty one and pandas' own (NA, ...).
        sheet: of a workbook; None: the first.
    """

    separator: str | None = None
    decimal: str = "."
    thousands: str = ""
    date: str | None = None
    encoding: str = "utf-8-sig"
    gaps: tuple[str, ...] = ()
    sheet: str | None = None

    def __post_init__(self) -> None:
        if self.decimal == self.thousands:
            raise DataError(
                f"decimals and thousands can't both be marked by {self.decimal!r}: as in 1.000,5 write "
                "--decimal , --thousands ."
            )


@dataclass(frozen=True)
class Words:
    """What to write instead, in messages about a column; `{}` stands for its name."""

    first: int = 1  # the number of the first row
    leave_out: str = "--ignore {!r}"
    as_category: str = "--categories {!r}"
    fill: str = "fit with --missing fill, or --drop-missing"
    anew: str = "fit with --missing fill"  # of a table that isn't that of the training
    unknown: str = "or take it as none of these: --unknown zeros"
    date: str = "--date-format {!r}"  # of the format, and the name
    reread: str = "{}"  # of options for the marks of a file

    def row(self, row: int) -> str:
        """Return the name of a row, counted from 0."""
        return f"row {row + self.first}"

    def marks(self, hint: str) -> str:
        """Return a hint of `spelling.way_out` in these words.

        >>> OF_FRAMES.marks("write --thousands . --decimal ,")
        "write pandas.read_csv(..., thousands='.', decimal=',')"
        """
        if self.reread == "{}":
            return hint
        return re.sub(
            r"--\S+ (?:'[^']*'|\S+)(?: --\S+ \S+)*",
            lambda found: self.reread.format(", ".join(map(_as_keyword, _OPTION.findall(found[0])))),
            hint,
        )


_OPTION = re.compile(r"--(\S+) ('[^']*'|\"[^\"]*\"|[^\s,]+|,)")


def _as_keyword(option: tuple[str, str]) -> str:
    name, value = option
    return f"{name.replace('-', '_')}={value if value[0] in _QUOTES else repr(value)}"


_QUOTES = "'\""
OF_FILES = Words()
OF_FRAMES = Words(
    first=0,
    leave_out="X.drop(columns={!r})",
    as_category="X[{0!r}].astype('category')",
    fill='write encoder=rs.TableEncoder(missing="fill")',
    anew='fit with encoder=rs.TableEncoder(missing="fill")',
    unknown='or take it as none of these: rs.TableEncoder(unknown="zeros")',
    date="pandas.to_datetime(X[{1!r}], format={0!r})",
    reread="pandas.read_csv(..., {})",
)


@dataclass
class Table:
    """Named columns of equal length: numbers (NaN if missing), dates (NaT), or text (None).

    Args:
        source: what the table was read from, for messages.
        columns: the columns, in order.
        marks: how numbers and dates are written in columns of text.
        categories: columns whose own type says that they are categories.
        words: what messages propose.
        starts: of a table of several files, their names with the numbers of their first rows.
    """

    source: str
    columns: dict[str, Any]
    marks: Marks = Marks()
    categories: frozenset[str] = frozenset()
    words: Words = OF_FILES
    starts: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def part(self, rows: Any) -> Table:
        """Return the table of some rows."""
        return replace(self, columns={name: values[rows] for name, values in self.columns.items()})

    def column(self, name: str) -> Any:
        """Return the column of a name.

        Raises:
            DataError: there is no such column; the message lists similar names.
        """
        if name not in self.columns:
            near = get_close_matches(name, self.columns)
            hint = f" (near it: {', '.join(near)})" if near else ""
            raise DataError(f"{self.source}: no column is called {name!r}{hint}; there are: {shown(self.columns)}")
        return self.columns[name]

    def missing(self, name: str) -> Any:
        """Return the mask of the missing values of a column."""
        values = self.column(name)
        if values.dtype == object:
            return np.array([value is None for value in values], bool)
        return np.isnat(values) if values.dtype.kind == "M" else np.isnan(values.astype(np.float64))

    def numbers(self, name: str) -> Any:
        """Return the column in float64; missing values are NaN.

        Raises:
            DataError: the column holds text or dates, or an infinite number.
        """
        values = self.column(name)
        if values.dtype.kind == "M":
            self._refuse(name, ~np.isnat(values), "a number")
            return np.full(len(values), np.nan)
        if values.dtype == object:
            numbers = self.parsed(values)
            self._refuse(name, ~self.missing(name) & np.isnan(numbers), "a number")
            values = numbers
        values = values.astype(np.float64)
        self._refuse(name, np.isinf(values), "a finite number")
        return values

    def dates(self, name: str) -> Any:
        """Return the column as dates, datetime64; missing values are NaT.

        Raises:
            DataError: the column holds something else.
        """
        values = self.column(name)
        if values.dtype.kind == "M":
            return values
        if values.dtype != object:
            self._refuse(name, ~np.isnan(values.astype(np.float64)), "a date")
            return np.full(len(values), "NaT", "M8[us]")
        found = dates.parsed(values, self.marks.date)
        form = "2024-01-31" if self.marks.date is None else self.marks.date
        self._refuse(name, ~self.missing(name) & np.isnat(found), f"a date as {form}")
        return found

    def texts(self, name: str) -> Any:
        """Return the column as text, numbers in canonical spelling; missing values are None."""
        values = self.column(name)
        if values.dtype.kind == "M":
            return dates.texts(values)
        return values if values.dtype == object else as_texts(values)

    def parsed(self, texts: Any) -> Any:
        """Return texts as float64; NaN for None, and for texts that aren't numbers in these marks.

        The marks are the table's `marks`.
        """
        if self.marks.decimal == "." and not self.marks.thousands:
            return parsed(texts)
        read = spelling.reader(self.marks.decimal, self.marks.thousands)
        return np.array([np.nan if text is None else read(text) for text in texts])

    def way_out(self, name: str, texts: Any) -> str:
        """Return a hint at what reads numbers or dates of another form; "" if no form matches."""
        hint = spelling.way_out(texts, self.marks.decimal)
        if hint.startswith("these look like dates"):
            forms = dates.forms(texts)
            ways = [self.words.date.format(form, name) for form in forms]
            return f"these look like dates: write {', or '.join(ways)}" if ways else hint
        return self.words.marks(hint)

    def _refuse(self, name: str, wrong: Any, wanted: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            got = self.columns[name][row : row + 1].tolist()[0]
            texts = self.columns[name][wrong].tolist() if isinstance(got, str) else []
            hint = self.way_out(name, texts) if wanted == "a number" else ""
            raise self.fault(name, row, f"expected {wanted}, got {said(got)}{'; ' * bool(hint)}{hint}")

    def fault(self, name: str, row: int, what: str) -> DataError:
        """Return the error that names a row (given from 0), a column and a fault."""
        source, start = next(((one, first) for one, first in reversed(self.starts) if first <= row), (self.source, 0))
        return DataError(f"{source}, {self.words.row(row - start)}, column {name!r}: {what}")


def joined(tables: Sequence[Table]) -> Table:
    """Return the rows of several tables with the same columns, those of the first in its order.

    A column that is text in one of them is text in all.

    Raises:
        DataError: a table has other columns.
    """
    first = tables[0]
    for other in tables[1:]:
        for one, its in ((first, other), (other, first)):
            lost = [name for name in one.columns if name not in its.columns]
            if lost:
                raise DataError(
                    f"{its.source} has no column {lost[0]!r}, which {one.source} has; tables that are read together "
                    "have the same columns"
                )
    lengths = np.cumsum([0, *map(len, tables)])[:-1].tolist()
    columns = {name: _joined_column([table.columns[name] for table in tables]) for name in first.columns}
    names = [table.source for table in tables]
    starts = tuple(zip(names, lengths, strict=True))
    kept = frozenset(name for table in tables for name in table.categories)
    return replace(first, source=", ".join(names), columns=columns, starts=starts, categories=kept)


def _joined_column(parts: list[Any]) -> Any:
    kinds = {part.dtype.kind for part in parts}
    if "O" in kinds or ("M" in kinds and len(kinds) > 1):
        parts = [dates.texts(p) if p.dtype.kind == "M" else p if p.dtype.kind == "O" else as_texts(p) for p in parts]
    return np.concatenate(parts)


def said(value: Any) -> str:
    """Return a value for messages, of bounded length."""
    text = str(value) if isinstance(value, (datetime.date, datetime.datetime)) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: 1 row, 2 rows.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1200 rows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def parsed(texts: Any) -> Any:
    """Return texts as float64; NaN for texts that are no number."""
    return np.array([np.nan if text is None else _number(text) for text in texts], np.float64)


def _number(text: str) -> float:
    try:
        return float(text) if _PLAIN.fullmatch(text) else float("nan")
    except ValueError:
        return float("nan")


_PLAIN = re.compile(r"\s*[-+]?([0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|inf|infinity)\s*", re.I)


def as_texts(values: Any) -> Any:
    """Return numbers as text in canonical spelling, NaN as None."""
    found = np.empty(len(values), object)
    found[:] = [None if v != v else spelling.canonical(f"{v:.0f}" if _is_whole(v) else str(v)) for v in values]
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and float(value).is_integer()


def shown(names: Collection[str], most: int = 12) -> str:
    """Return names joined by commas, at most `most` of them, and the number of the others."""
    members = list(names)
    return ", ".join(members[:most]) + (f", … {len(members) - most} more" if len(members) > most else "")


# ---------------------------------------------------------------- columns of any type


def columns_of(source: str, frame: Any, words: Words = OF_FILES) -> Table:
    """Return the table of a pandas data frame.

    Categories stay categories, whatever their values; booleans are 0 and 1; of dates with a time
    zone the wall clock counts, periods are dated by their start, durations are days.

    Raises:
        DataError: a column has another type, or a name twice.
    """
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{source}: two columns are called {twice[0]!r}; give each a name of its own")
    table = Table(source, {}, words=words)
    series = [frame.iloc[:, number] for number in range(len(names))]
    table.columns = {name: _column(table, name, one) for name, one in zip(names, series, strict=True)}
    kept = [name for name, one in zip(names, series, strict=True) if str(one.dtype) == "category"]
    table.categories = frozenset(kept)
    return table


def _column(table: Table, name: str, series: Any) -> Any:
    if str(series.dtype) == "category":
        series = series.astype(series.cat.categories.dtype)
    gone, kind = series.isna().to_numpy(), getattr(series.dtype, "kind", "O")
    if str(series.dtype).startswith("period"):
        series, kind = series.dt.to_timestamp(), "M"
    if kind == "M":
        local = series if getattr(series.dtype, "tz", None) is None else series.dt.tz_localize(None)
        return local.to_numpy().astype("M8[us]")
    if kind == "m":
        return series.dt.total_seconds().to_numpy(np.float64, na_value=np.nan) / 86400
    if kind in "biuf":
        return series.to_numpy(np.float64, na_value=np.nan) if gone.any() else plain(table, name, series.to_numpy())
    if str(series.dtype) in ("str", "string", "object"):
        return _objects(table, name, series.to_numpy(object), gone)
    return plain(table, name, series.to_numpy())


def plain(table: Table, name: str, values: Any) -> Any:
    """Return an array of numbers, text or dates as a column.

    Raises:
        DataError: it is of another type.
    """
    if values.dtype.kind in "biuf":
        return values
    if values.dtype.kind == "M":
        return values.astype("M8[us]")
    if values.dtype.kind in "USO":
        values = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
        return _objects(table, name, values.astype(object), np.array([v == "" or v is None for v in values], bool))
    raise DataError(
        f"{table.source}: the column {name!r} is of type {values.dtype}; turn it into numbers or text, or leave it "
        f"out: {table.words.leave_out.format(name)}"
    )


_NUMBERS = (bool, int, float, decimal.Decimal, np.generic)


def _objects(table: Table, name: str, values: Any, missing: Any) -> Any:
    """Return a column of numbers or dates if all values but missing ones are; else of texts."""
    there = [value for value, gone in zip(values, missing, strict=True) if not gone]
    if there and all(isinstance(value, _NUMBERS) and not isinstance(value, str) for value in there):
        return _filled(table, name, missing, there, np.float64, np.nan)
    if there and all(isinstance(value, datetime.date) for value in there):
        days = [value.replace(tzinfo=None) if isinstance(value, datetime.datetime) else value for value in there]
        return _filled(table, name, missing, days, "M8[us]", np.datetime64("NaT"))
    for row, (value, gone) in enumerate(zip(values, missing, strict=True)):
        if not gone and not isinstance(value, (str, *_NUMBERS)):
            raise table.fault(name, row, f"expected a number, text or a date, got {said(value)}")
    found = np.empty(len(values), object)
    found[:] = [None if gone else str(value) for value, gone in zip(values, missing, strict=True)]
    return found


def _filled(table: Table, name: str, missing: Any, there: list[Any], dtype: Any, gap: Any) -> Any:
    found = np.full(len(missing), gap, dtype)
    try:
        found[~missing] = np.array(there, dtype)
    except OverflowError as error:
        raise DataError(f"{table.source}: the column {name!r} has numbers too large for float64") from error
    return found
