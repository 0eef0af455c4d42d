"""Settings of penalties, transforms and strengths: checks, text forms, and old names."""

from __future__ import annotations

import functools
import re
import reprlib
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from math import inf
from numbers import Real
from typing import Any, TypeGuard, TypeVar

from restrain.errors import PlanError, RestrainDeprecationWarning

T = TypeVar("T")
_RENAMED: dict[type, Mapping[str, str]] = {}  # class → {old name of a setting: new name}


def given_fields(thing: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that aren't at their defaults; else all attributes."""
    if not is_dataclass(thing):
        return dict(vars(thing))
    pairs = ((field, getattr(thing, field.name)) for field in fields(thing) if field.init and field.repr)
    return {
        field.name: value for field, value in pairs if type(value) is not type(field.default) or value != field.default
    }


def call_text(thing: Any, prefix: str = "") -> str:
    """Return the constructor call as text, with the settings that differ from their defaults.

    If none differs, the first field is shown, unless it is None.
    """
    given = given_fields(thing)
    first = fields(thing)[0].name if not given and is_dataclass(thing) and fields(thing) else None
    if first is not None and getattr(thing, first) is not None:
        given = {first: getattr(thing, first)}
    return f"{prefix}{type(thing).__name__}({', '.join(f'{name}={setting(value)}' for name, value in given.items())})"


_LONGEST = 80  # characters of a setting that is shown whole


def setting(value: Any) -> str:
    """Return a setting as text that names of rules can bear: a long list or a tensor by its size.

    >>> setting([1.0, 2.0]), setting(list(range(1000))), setting([[0] * 40] * 32)
    ('[1.0, 2.0]', '<1000 values>', '<32 × 40 values>')
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{_sized(value.shape)}>" if len(value.shape) else brief(value)
    if isinstance(value, Mapping):
        shown = [f"{key!r}: {setting(value[key])}" for key in list(value)[:2]]
        return "{" + ", ".join([*shown, f"… {len(value)} in all"] if len(value) > 2 else shown) + "}"
    text = repr(value)
    if len(text) <= _LONGEST or not isinstance(value, (list, tuple)):
        return text
    if len(value) <= 3:
        members = ", ".join(map(setting, value))
        return f"[{members}]" if isinstance(value, list) else f"({members})"
    shape, inner = [len(value)], value[0]
    while isinstance(inner, (list, tuple)) and inner:
        shape, inner = [*shape, len(inner)], inner[0]
    return f"<{_sized(shape)}>"


def shortened(text: str, most: int = 200) -> str:
    """Return a text of at most `most` characters, without its middle if it is longer."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 4 :]}"


def _sized(shape: Sequence[int]) -> str:
    return f"{' × '.join(map(str, shape))} values"


_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 4, 8, 8, 8
_short.maxstring = _short.maxother = 120


def brief(value: Any) -> str:
    """Return repr(value) of bounded length, for messages; safe for recursive and faulty objects."""
    try:
        return _short.repr(value)
    except Exception:  # an int of more than 4,300 digits; whatever a user's own __repr__ raises
        return f"<{type(value).__name__}>"


def is_number(value: Any) -> bool:
    """True if the value is a real number that float32 holds, an int also int64, and not a bool."""
    try:
        most: float = 2**63 - 1 if isinstance(value, int) else _LARGEST
        size: Any = abs(value) if isinstance(value, Real) else inf
        return not isinstance(value, bool) and bool(size <= most)
    except (OverflowError, TypeError, ValueError):  # no conversion to float
        return False


_LARGEST = (2 - 2**-23) * 2.0**127  # of float32; torch raises for larger ones


def shown_number(value: Any) -> str:
    """Return the repr of a refused number, and why a finite one is refused."""
    huge = isinstance(value, (int, float)) and value not in (inf, -inf) and value == value and abs(value) > _LARGEST
    whole = isinstance(value, int) and abs(value) >= 2**63
    return brief(value) + (
        ": above 3.4e38, too large for float32" if huge else ": write it with a point" if whole else ""
    )


def is_whole(value: Any, least: float = -inf) -> TypeGuard[int]:
    """True if the value is an int, at least `least`, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_flags(error: type[Exception], **flags: Any) -> None:
    """Raise an error for the first flag that isn't True or False: also the text "no" is true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise error(f"{name}= is True or False, got {brief(value)}")


def check_optional_flags(error: type[Exception], **flags: Any) -> None:
    """Raise an error for the first flag that isn't True, False or None."""
    check_flags(error, **{name: value for name, value in flags.items() if value is not None})


def is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """True for an iterable, other than arrays and tensors without an axis, which only look so."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def is_one_of(value: Any, words: Container[str]) -> bool:
    """True if the value is one of some words; arrays and tensors, whose == has no truth, aren't."""
    return isinstance(value, str) and value in words


# Renamed settings


def renamed(**new_names: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator that accepts old names of settings, with a warning.

    Old names work in calls, as attributes and in pickles (without a warning), and in plans.

    Args:
        new_names: old name = new name.

    Raises:
        PlanError: the class is called with both names of a setting.
    """

    def decorate(cls: type[Any]) -> type[Any]:
        made = cls.__init__

        @functools.wraps(made)
        def init(self: Any, *args: Any, **settings: Any) -> None:
            made(self, *args, **by_new_names(cls, settings))

        def read(self: Any, name: str) -> Any:
            if name not in new_names:
                raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
            _warn(cls, name, new_names[name])
            return getattr(self, new_names[name])

        def restore(self: Any, state: Mapping[str, Any]) -> None:
            vars(self).update({new_names.get(name, name): value for name, value in state.items()})

        cls.__init__, cls.__getattr__, cls.__setstate__ = init, read, restore
        _RENAMED[cls] = new_names
        return cls

    return decorate


def by_new_names(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a class with old names replaced, each with a warning.

    Raises:
        PlanError: both names of a setting are given.
    """
    new_names = next((_RENAMED[base] for base in cls.__mro__ if base in _RENAMED), {})
    found = dict(settings)
    for old in new_names.keys() & settings.keys():
        if new_names[old] in found:
            raise PlanError(f"{cls.__name__} takes {new_names[old]}=, whose old name is {old}=: write it once")
        _warn(cls, old, new_names[old])
        found[new_names[old]] = found.pop(old)
    return found


def text_by_new_names(text: str) -> str:
    """Return the text of rules (such as keys of a saved state) with old names replaced.

    >>> text_by_new_names("0.5 * StateChange(per_unit=True, time=1) on rs.outputs('lstm')")
    "0.5 * StateChange(per_unit=True, dim=1) on rs.outputs('lstm')"
    """
    for cls, new_names in _RENAMED.items():
        for old, new in new_names.items():
            text = re.sub(rf"\b({cls.__name__}\((?:[^()]*, )?){old}=", rf"\1{new}=", text)
    return text


def _warn(cls: type, old: str, new: str) -> None:
    warnings.warn(
        f"{old}= of {cls.__name__} is called {new}= since version 0.2, and 0.3 won't take the old name: write {new}=",
        RestrainDeprecationWarning,
        stacklevel=level_of_caller(),
    )


_BETWEEN = ("restrain", "torch", "contextlib")  # packages whose frames are no user's


def level_of_caller() -> int:
    """Return the `stacklevel` with which a warning points at the user's line.

    It calls this library, or what calls the library's hooks: torch, a context manager.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    return level


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return names joined by commas, at most `most` of them, and the number of the others."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def near_names(wrong: Sequence[str], names: Sequence[str]) -> str:
    """Return the end of an error about unknown names: near names, and all names if they are few."""
    near = list(dict.fromkeys(name for one in wrong for name in get_close_matches(one, names)))
    hint = f" (near it: {listed(near)})" if near else ""
    return f"{hint}; there are: {listed(names, 12)}" if not near or len(names) <= 12 else hint
