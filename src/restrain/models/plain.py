"""Settings and learned attributes of models as JSON, and back; no code is stored or run.

JSON types stand for themselves. Any other value is a dict with one key that begins with "$" and is
looked up in a fixed table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import numpy
import torch
from torch.optim import Optimizer

from restrain.activation_points import Places, inputs
from restrain.errors import FileError, RestrainError
from restrain.fields import brief
from restrain.penalties import L1
from restrain.plandata import read_strength, write_strength
from restrain.plans import Plan
from restrain.rules import Rule
from restrain.schedule import Strength
from restrain.selections import Where
from restrain.storage import first_line
from restrain.tables import TableEncoder
from restrain.transforms import Noise

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: value for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)
}


def encode(value: Any, name: str) -> Any:
    """Return the value as JSON data; `name` stands for it in errors.

    Raises:
        FileError: the value, or a member, is code or of a type without a form here.
    """
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value) if isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list):
        return [encode(member, f"{name}[{number}]") for number, member in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": encode(list(value), name)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, name)
    if isinstance(value, numpy.ndarray):
        return _encode_array(value, name)
    return _encode_named(value, name)


def _encode_mapping(value: Mapping[Any, Any], name: str) -> dict[str, Any]:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(member, f"{name}[{key!r}]") for key, member in value.items()}
    return {"$dict": [[encode(k, f"a key of {name}"), encode(v, f"{name}[{k!r}]")] for k, v in value.items()]}


def _encode_array(value: Any, name: str) -> dict[str, Any]:
    if value.dtype.kind not in "biufUO":
        raise _cannot(value, name, f"an array of {value.dtype}", "numbers or text")
    data = [encode(member, f"an entry of {name}") for member in value.ravel().tolist()]
    return {"$array": {"dtype": value.dtype.newbyteorder("=").str, "shape": list(value.shape), "data": data}}


def _encode_named(value: Any, name: str) -> dict[str, Any]:
    try:
        if isinstance(value, Plan):
            return {"$plan": value.to_dict()}
        if isinstance(value, Rule):
            return {"$rule": Plan((value,)).to_dict()["rules"][0]}
        if isinstance(value, Noise):
            return {"$noise": Plan((value.on(inputs()),)).to_dict()["rules"][0]["what"]}
        if isinstance(value, Strength):
            return {"$strength": write_strength(value)}
        if isinstance(value, (Where, Places, re.Pattern)):
            return {"$where": Plan((L1().on(value),)).to_dict()["rules"][0]["on"]}
    except RestrainError as error:
        raise FileError(f"{name} can't be written: {error}") from error
    if type(value) is TableEncoder:
        return {"$encoder": encode(value.to_dict(), name)}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, type) and value in _OPTIMIZERS.values():
        return {"$optimizer": value.__name__}
    if callable(value):
        raise _cannot(value, name, "code", "a number, text or another plain value")
    raise _cannot(value, name, f"of type {type(value).__name__}", "a number, text, or a list or dict of these")


def _cannot(value: Any, name: str, what: str, instead: str) -> FileError:
    return FileError(
        f"{name}={value!r:.80} can't be written: it is {what}, and a file holds data only. Put {instead} there first, "
        "as in model.set_params(name=value), then save"
    )


def decode(data: Any) -> Any:
    """Return the value for JSON data written by `encode`.

    Raises:
        FileError: a form doesn't exist, or content doesn't fit its form.
        PlanError: the penalty of a rule isn't registered.
    """
    if isinstance(data, list):
        return [decode(member) for member in data]
    if not isinstance(data, dict):
        return data
    if not any(key.startswith("$") for key in data):
        return {key: decode(member) for key, member in data.items()}
    ((form, content),) = data.items() if len(data) == 1 else [("several", None)]
    if form not in _FORMS:
        raise FileError(f"expected one of {', '.join(_FORMS)}, got the keys {brief(sorted(data))}")
    try:
        return _FORMS[form](content)
    except RestrainError:
        raise
    except Exception as error:  # whatever Python, NumPy and torch raise for malformed content
        raise FileError(f"{form} can't be {brief(content)}: {first_line(error)}") from error


_LARGEST = 2**28  # bytes of a text array; its dtype can declare longer texts than the file has


def _decode_array(content: Any) -> Any:
    dtype = numpy.dtype(content["dtype"])
    if dtype.kind not in "biufUO":
        raise ValueError(f"arrays of {dtype} aren't written")
    if dtype.kind == "U" and dtype.itemsize * len(content["data"]) > _LARGEST:
        raise ValueError(f"{len(content['data'])} texts of {dtype.itemsize // 4} characters each")
    array = numpy.empty(len(content["data"]), dtype)
    array[:] = decode(content["data"])
    return array.reshape(content["shape"])


_FORMS: dict[str, Callable[[Any], Any]] = {
    "$float": {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}.__getitem__,
    "$tuple": lambda content: tuple(decode(list(content))),
    "$dict": lambda content: {decode(key): decode(member) for key, member in content},
    "$array": _decode_array,
    "$plan": Plan.from_dict,
    "$strength": read_strength,
    "$rule": lambda content: Plan.from_dict({"rules": [content]}).rules[0],
    "$noise": lambda content: Plan.from_dict({"rules": [{"what": content, "on": {"inputs": ""}}]}).rules[0].what,
    "$where": lambda content: Plan.from_dict({"rules": [{"what": "l1", "on": content}]}).rules[0].where,
    "$encoder": lambda content: TableEncoder.from_dict(decode(content)),
    "$path": Path,
    "$dtype": _DTYPES.__getitem__,
    "$device": torch.device,
    "$optimizer": _OPTIMIZERS.__getitem__,
}
