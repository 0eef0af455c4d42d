"""The settings of penalties, transforms and strengths: what they can be, which were given, how they are written."""

from __future__ import annotations

import reprlib
from dataclasses import fields, is_dataclass
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


_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 4, 8, 8, 8
_short.maxstring = _short.maxother = 120


def brief(value: Any) -> str:
    """repr(value) of bounded length, for errors: also of endless nesting, and of an object that has no repr."""
    try:
        return _short.repr(value)
    except Exception:  # an int of more than 4,300 digits; whatever a user's own __repr__ raises
        return f"<{type(value).__name__}>"


def is_number(value: Any) -> bool:
    """Whether it is a real number, finite also as a float; True and False aren't."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    except (OverflowError, TypeError, ValueError):  # 10**400; a number that has no float
        return False


def is_whole(value: Any, least: float = -inf) -> TypeGuard[int]:
    """Whether it is a whole number, not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
