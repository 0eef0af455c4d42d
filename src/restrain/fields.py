"""The settings of penalties, transforms and strengths: what they can be, which were given, how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from math import inf, isfinite
from numbers import Real
from typing import Any, TypeGuard


def given_fields(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass that aren't as by default, and penalties in it; of another object all attributes."""
    if not is_dataclass(thing):
        return dict(vars(thing))
    pairs = ((field, getattr(thing, field.name)) for field in fields(thing) if field.init and field.repr)
    return {
        field.name: value for field, value in pairs if type(value) is not type(field.default) or value != field.default
    }


def call_text(thing: Any, prefix: str = "") -> str:
    """The call that makes it, with what isn't as by default; where all is, with the first field, if that isn't None."""
    given = given_fields(thing)
    first = fields(thing)[0].name if not given and is_dataclass(thing) and fields(thing) else None
    if first is not None and getattr(thing, first) is not None:
        given = {first: getattr(thing, first)}
    return f"{prefix}{type(thing).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, which True and False aren't."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def is_whole(value: Any, least: float = -inf) -> TypeGuard[int]:
    """Whether it is a whole number, not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in a sentence, at most so many of them, and how many more there are."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def near_names(wrong: Sequence[str], names: Sequence[str]) -> str:
    """The end of an error about names that don't exist: at most ten near names, and the others where they are few."""
    near = list(dict.fromkeys(name for one in wrong for name in get_close_matches(one, names)))
    hint = f" (near it: {listed(near)})" if near else ""
    return f"{hint}; there are: {listed(names, 12)}" if not near or len(names) <= 12 else hint
