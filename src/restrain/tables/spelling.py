"""Spelling of values in tables: equal categories, booleans, and numbers in other forms.

Two values of a category are equal if their texts are equal after two rules:

1. A whole number is written without point and zeros: 1.0 equals 1, since pandas writes 1 as 1.0 in
   a column with gaps. Leading zeros stay, as in zip codes: 01, 1 and 001 are three values. Zeros of
   a fraction stay, too, as in version numbers: 1.10 and 1.1 are two values.
2. If the training data have exactly two values, and these are the two words of a pair in `PAIRS` in
   upper or lower case, the words of all pairs are equal: true, yes, y, t, on and 1 are one value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

PAIRS = (("true", "false"), ("yes", "no"), ("y", "n"), ("t", "f"), ("on", "off"), ("1", "0"))
_TRUTH = {word: number == 0 for pair in PAIRS for number, word in enumerate(pair)}
_WHOLE = re.compile(r"(-?)(0|[1-9][0-9]*)(\.0+)?")


def canonical(text: str) -> str:
    """Return a whole number without point, zeros and the sign of -0; other texts unchanged.

    >>> [canonical(text) for text in ("1.0", "-2", "-0.0", "01", "1.50", "red")]
    ['1', '-2', '0', '01', '1.50', 'red']
    """
    found = _WHOLE.fullmatch(text)
    return text if found is None else ("" if found[2] == "0" else found[1]) + found[2]


def are_booleans(values: Collection[str]) -> bool:
    """Return True if the values are the two words of a pair, in upper or lower case.

    >>> are_booleans(["No", "YES"]), are_booleans(["0", "1"]), are_booleans(["yes", "no", "maybe"])
    (True, True, False)
    """
    return tuple(sorted(value.lower() for value in values)) in {tuple(sorted(pair)) for pair in PAIRS}


def matcher(values: Iterable[str | None]) -> Callable[[str | None], str | None]:
    """Return a function that maps a text to the equal value, or to itself if there is none.

    >>> same = matcher(["False", "True"])
    >>> [same(text) for text in ("yes", "0", "FALSE", "maybe", None)]
    ['True', 'False', 'False', 'maybe', None]
    """
    there = [value for value in values if value is not None]
    exact = {canonical(value): value for value in there}
    if len(exact) < len(there):  # a model of version 0.1 may tell 1 and 1.0 apart
        exact = {value: value for value in there}
    booleans = {_TRUTH[value.lower()]: value for value in there} if are_booleans(there) else {}

    def match(text: str | None) -> str | None:
        if text is None or text in exact:
            return text if text is None else exact[text]
        bare = canonical(text)
        if bare in exact:
            return exact[bare]
        truth = _TRUTH.get(bare.lower())
        return text if truth is None else booleans.get(truth, text)

    return match


# ---------------------------------------------------------------- numbers in other forms


@dataclass(frozen=True)
class Form:
    """A form of numbers that `float` doesn't read, and the option that reads it, if any."""

    name: str
    pattern: re.Pattern[str]
    option: str = ""


_THOUSANDS = r"[-+]?[1-9][0-9]{0,2}(%s[0-9]{3})+"
_CURRENCY = r"(?:[$€£¥₹]|USD|EUR|GBP|CHF|JPY)"
_AMOUNT = r"[-+−]?[0-9]+(?:[.,' ][0-9]+)*"
FORMS = (
    Form("decimal commas", re.compile(r"[-+]?[0-9]*,[0-9]+([eE][-+]?[0-9]+)?"), "--decimal ,"),
    Form("commas at thousands", re.compile(_THOUSANDS % "," + r"(\.[0-9]*)?"), "--thousands ,"),
    Form("points at thousands", re.compile(_THOUSANDS % r"\."), "--thousands . --decimal ,"),
    Form(
        "points at thousands and decimal commas",
        re.compile(_THOUSANDS % r"\." + ",[0-9]+"),
        "--thousands . --decimal ,",
    ),
    Form("spaces at thousands", re.compile(_THOUSANDS % "[ \u00a0\u202f]" + r"(\.[0-9]*)?"), "--thousands ' '"),
    Form("apostrophes at thousands", re.compile(_THOUSANDS % "['’]" + r"(\.[0-9]*)?"), """--thousands "'" """[:-1]),
    Form("percent signs", re.compile(rf"{_AMOUNT}\s?%")),
    Form("currencies", re.compile(rf"[-+−]?{_CURRENCY}\s?{_AMOUNT}|{_AMOUNT}\s?{_CURRENCY}")),
    Form("signs that are no hyphens", re.compile(r"[−–][0-9]+(\.[0-9]*)?")),
    Form(
        "dates",
        re.compile(
            r"[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}([T ][0-9]{1,2}:[0-9]{2}\S*( ?[AaPp][Mm])?)?"
            r"|[0-9]{1,2}([-/.])[0-9]{1,2}\3([0-9]{4}|[0-9]{2})([T ][0-9]{1,2}:[0-9]{2}\S*( ?[AaPp][Mm])?)?"
        ),
    ),
    Form("times of day", re.compile(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?( ?[AaPp][Mm])?")),
)


_POINTS = Form("decimal points", re.compile(r"[-+]?[0-9]*\.[0-9]+([eE][-+]?[0-9]+)?"), "--decimal .")


def forms_of(text: str, decimal: str = ".") -> list[Form]:
    """Return the forms of numbers that match a text: two for "1,000", none for a word.

    If the decimal mark is a comma, a number with a point is in another form, too.
    """
    stripped = text.strip()
    return [form for form in (FORMS if decimal == "." else (*FORMS, _POINTS)) if form.pattern.fullmatch(stripped)]


def common_forms(texts: Iterable[str], decimal: str = ".") -> list[Form]:
    """Return the forms that match all texts, or else the forms of the first text that has any.

    >>> [form.name for form in common_forms(["1,000", "2,5"])]
    ['decimal commas']
    >>> [form.name for form in common_forms(["1,000", "2,500"])]
    ['decimal commas', 'commas at thousands']
    """
    found = [forms for forms in (forms_of(text, decimal) for text in texts) if forms]
    if not found:
        return []
    shared = [form for form in found[0] if all(form in forms for forms in found)]
    return shared or found[0]


def way_out(texts: Iterable[str], decimal: str = ".") -> str:
    """Return a hint at the option that reads numbers of another form; "" if no form matches."""
    found = common_forms(texts, decimal)
    options = [form.option for form in found if form.option]
    if not found:
        return ""
    said = f"these look like numbers with {' or '.join(form.name for form in found)}"
    if found[0].name in ("dates", "times of day"):
        said = f"these look like {found[0].name}"
    return f"{said}: {'write ' + ', or '.join(options) if options else 'turn them into plain numbers'}"


def reader(decimal: str, thousands: str) -> Callable[[str], float]:
    """Return a function that reads numbers with the given marks; it gives NaN for other texts.

    A mark of thousands must precede a group of three digits, so that 1,5 isn't 15.

    >>> read = reader(",", ".")
    >>> read("1.234,5"), read("12"), read("1.5")
    (1234.5, 12.0, nan)
    """
    mark, point = re.escape(thousands), re.escape(decimal)
    whole = rf"(?:[0-9]+|[0-9]{{1,3}}(?:{mark}[0-9]{{3}})+)" if thousands else "[0-9]+"
    number = re.compile(rf"[-+]?(?:{whole}(?:{point}[0-9]*)?|{point}[0-9]+)(?:[eE][-+]?[0-9]+)?")

    def read(text: str) -> float:
        text = text.strip()
        if number.fullmatch(text) is None:
            return float("nan")
        return float((text.replace(thousands, "") if thousands else text).replace(decimal, "."))

    return read
