"""Dates: read from text, and as inputs of a model.

A date becomes the number of days since 1970-01-01, with the time of day as a fraction, and the sine
and cosine of its place in a cycle, for each cycle that the training data show:

    cycle    period          there if the dates
    year     365.2425 days   reach over a year or more
    week     7 days          reach over a week or more, and are of several days of the week
    day      1 day           have a time of day other than midnight

The year's place is counted from 1 January, the week's from Monday, the day's from midnight.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

PERIODS = {"year": 365.2425, "week": 7.0, "day": 1.0}  # days
_MONDAY = 4  # 1970-01-05
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[-+][0-9:]{4,6})?)?")
_NONE = np.datetime64("NaT", "us")


def reader(form: str | None) -> Callable[[str], datetime.datetime | None]:
    """Return a function that reads a date; it gives None for other texts.

    Args:
        form: as of `strptime`; None for 2024-01-31, 2024-01-31 12:30:00 and the like. A time zone
            is dropped, the wall clock counts.

    >>> reader(None)("2024-01-31 12:30"), reader("%d.%m.%Y")("31.1.2024")
    (datetime.datetime(2024, 1, 31, 12, 30), datetime.datetime(2024, 1, 31, 0, 0))
    """

    def read(text: str) -> datetime.datetime | None:
        text = text.strip()
        try:
            if form is not None:
                return datetime.datetime.strptime(text, form).replace(tzinfo=None)
            return datetime.datetime.fromisoformat(text).replace(tzinfo=None) if _ISO.fullmatch(text) else None
        except ValueError:
            return None

    return read


_DAYS = [
    *(f"%Y{mark}%m{mark}%d" for mark in "-/."),
    *(f"{first}{mark}{second}{mark}{year}" for year in ("%Y", "%y") for mark in "./-"
      for first, second in (("%d", "%m"), ("%m", "%d"))),
]  # fmt: skip
_TIMES = ("", " %H:%M", " %H:%M:%S", "T%H:%M", "T%H:%M:%S", " %I:%M %p", " %I:%M:%S %p")


def forms(texts: Sequence[str]) -> list[str]:
    """Return the formats that read some texts as dates, 2 at most: 1/2/2024 has two.

    >>> forms(["1/2/2024", "2/13/2024"]), forms(["1.2.2024 12:30"])
    (['%m/%d/%Y'], ['%d.%m.%Y %H:%M', '%m.%d.%Y %H:%M'])
    """
    some = list(texts)[:200]
    readers = ((form, reader(form)) for form in (day + time for time in _TIMES for day in _DAYS))
    return [form for form, read in readers if all(read(text) is not None for text in some)][:2]


def parsed(texts: Iterable[str | None], form: str | None = None) -> Any:
    """Return texts as datetime64; NaT for None, and for texts that aren't dates."""
    read = reader(form)
    values = [None if text is None else read(text) for text in texts]
    return np.array([_NONE if value is None else np.datetime64(value, "us") for value in values], "M8[us]")


def texts(values: Any) -> Any:
    """Return dates as text, as 2024-01-31 if all are at midnight; None for NaT."""
    there = values[~np.isnat(values)]
    unit: Any = "D" if (there == there.astype("M8[D]")).all() else "s"
    found = np.empty(len(values), object)
    found[:] = [None if np.isnat(value) else np.datetime_as_string(value, unit) for value in values]
    return found


def days(values: Any) -> Any:
    """Return days since 1970-01-01 in float64; NaN for NaT."""
    found = values.astype("M8[us]").astype(np.int64) / 86_400e6
    return np.where(np.isnat(values), np.nan, found)


def cycles(values: Any) -> tuple[str, ...]:
    """Return the cycles that some dates show; see above."""
    there = days(values[~np.isnat(values)])
    if not len(there):
        return ()
    span, whole = there.max() - there.min(), np.floor(there)
    return tuple(
        name
        for name, is_there in (
            ("year", span >= PERIODS["year"]),
            ("week", span >= PERIODS["week"] and len(np.unique(whole % 7)) > 1),
            ("day", bool((there != whole).any())),
        )
        if is_there
    )


def places(values: Any, cycle: str) -> Any:
    """Return the place of each date in a cycle, from 0 to below 1; NaN for NaT."""
    found = days(values)
    if cycle == "year":
        years = values.astype("M8[Y]")
        start, end = days(years), days(years + 1)
        return (found - start) / (end - start)
    return (found - (_MONDAY if cycle == "week" else 0)) % PERIODS[cycle] / PERIODS[cycle]


def inputs(values: Any, known: Sequence[str]) -> Any:
    """Return the inputs for dates, shape (dates, 1 + 2 · cycles); NaN for NaT."""
    angles = [2 * np.pi * places(values, cycle) for cycle in known]
    return np.stack([days(values), *(wave(angle) for angle in angles for wave in (np.sin, np.cos))], 1)


def names(column: str, known: Sequence[str]) -> list[str]:
    """Return the names of the inputs of a column of dates."""
    return [column, *(f"{column}.{cycle}.{wave}" for cycle in known for wave in ("sin", "cos"))]
