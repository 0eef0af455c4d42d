"""Rules as plain data: text and dicts, for YAML, TOML and JSON.

what: l1                # a registered name; {name: grouplasso, per: in}; {sum: [...]} of penalties
strength: 1e-3          # or {linear: {start: 0, end: 1e-3, steps: 1000}},
                        # {target: {zeros: 0.9}}, {times: [1e-3, {warmup: {steps: 500}}]}
on: "fc*.weight"        # a glob; a list of exact names; {role: weights}; {type: Conv2d};
                        # {regex: ...}; {outputs: "relu*", via: relu};
                        # {and: [...]}, {or: [...]}, {minus: [...]}
how: proximal           # and reduce, name, every, start, optional, momentum, metric, gradient
                        # as in .on(...)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from restrain import registry, storage
from restrain.activation_points import JoinedPlaces, Place, Places, make_place
from restrain.errors import FileError, PenaltyError, PlanError, RestrainError
from restrain.fields import brief, given_fields, is_whole, near_names
from restrain.penalties import Penalty, Scaled, Sum
from restrain.penalties.base import NetworkPenalty, NetworkSum, ScaledNetwork
from restrain.penalties.derivative import OnDerivatives, ScaledDerivative
from restrain.penalties.keras_objects import Forms
from restrain.rules import Rule, What
from restrain.schedule import (
    Cosine,
    Cubic,
    Exponential,
    LearningRate,
    Linear,
    Steps,
    Strength,
    Target,
    Times,
    WarmUp,
)
from restrain.selections import ROLES, Glob, Joined, Names, OfType, Regex, Role, Where, as_where, spine
from restrain.unit_sets import Units, units

_Scalable = (Penalty, NetworkPenalty, OnDerivatives)
_OF_PLACES = {"outputs", "inputs", "and", "or", "minus"}
FORMS: dict[str, type[Strength]] = {
    "linear": Linear,
    "cosine": Cosine,
    "cubic": Cubic,
    "exponential": Exponential,
    "warmup": WarmUp,
    "steps": Steps,
    "learningrate": LearningRate,
    "target": Target,
}
_PLACE_OPTIONS = ("index", "batch_dim", "calls", "mask", "lengths", "average", "call")
_OPTIONS = ("how", "reduce", "name", "every", "start", "optional", "momentum", "metric", "gradient", "cautious")


def read_rule(data: Any) -> Rule:
    """Return the rule of a dict, or of a text such as "l1:0.01".

    Raises:
        PlanError: an unknown name or key, or an invalid value.
    """
    if isinstance(data, str):
        name, colon, strength = data.partition(":")
        data = {"what": name.strip(), **({"strength": strength.strip()} if colon else {})}
    if not isinstance(data, Mapping) or "what" not in data:
        raise PlanError(f"a rule is a text such as 'l1:0.01' or a dict with the key 'what', got {brief(data)}")
    try:
        storage.check_tree(data, "a rule")
        return _read_rule(data)
    except FileError as error:
        raise PlanError(str(error)) from error
    except RecursionError as error:
        raise PlanError("a rule is nested too deep to be read") from error


def _read_rule(data: Mapping[Any, Any]) -> Rule:
    if True in data and "on" in data:
        raise PlanError("a rule says on: twice, once as YAML's word for true; write one of them")
    # YAML reads on as true
    data = {"on" if key is True else key: value for key, value in data.items()}
    unknown = [key for key in data if key not in ("what", "strength", "on", "outputs", *_OPTIONS)]
    if unknown:
        raise PlanError(f"a rule has no {_listed(unknown)}; it has what, strength, on, outputs, {', '.join(_OPTIONS)}")
    options: dict[str, Any] = {key: data[key] for key in _OPTIONS if key in data}
    if "outputs" in data:
        options["outputs"] = _read_where(data["outputs"])
    on = _read_where(data["on"]) if "on" in data else None
    return _read_scaled(data).on(on, **options)


def _listed(keys: Iterable[Any]) -> str:
    """Return unknown keys as text, in their order."""
    found = list(keys)
    return ", ".join(key if isinstance(key, str) and len(key) < 80 else brief(key) for key in found[:8])


def _read_scaled(data: Any) -> What:
    what = _read_what(data["what"]) if isinstance(data, Mapping) and "what" in data else _read_what(data)
    if not isinstance(data, Mapping) or "strength" not in data:
        return what
    if not isinstance(what, _Scalable):
        raise PlanError(f"a strength is for penalties only; got strength={brief(data['strength'])} of {brief(what)}")
    return read_strength(data["strength"]) * what  # type: ignore[no-any-return]


def read_strength(data: Any) -> Any:
    """Return the strength of a number, or of a dict such as `{"linear": {...}}`.

    Raises:
        PlanError: it is something else.
    """
    if isinstance(data, Mapping) and len(data) == 1:
        ((form, content),) = data.items()
        if form == "times" and isinstance(content, (list, tuple)) and content:
            return functools.reduce(operator.mul, map(read_strength, content))
        if form in FORMS and isinstance(content, Mapping):
            return _built(FORMS[form], f"strength {form}", {key: _number(value) for key, value in content.items()})
    strength = _number(data)
    if not isinstance(strength, (int, float)) or isinstance(strength, bool):
        raise PlanError(
            f"a strength is a number, or a dict of one of {', '.join((*FORMS, 'times'))}, as in "
            f"{{linear: {{start: 0, end: 0.001, steps: 1000}}}}; got strength={brief(data)}"
        )
    return strength


def _read_what(data: Any) -> What:
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping):
        raise PlanError(f"what is a registered name or a dict with one under 'name', got {brief(data)}")
    if "sum" in data:
        return _read_sum(data)
    name = data.get("name")
    if not isinstance(name, str):
        raise PlanError(f"what needs a 'name' (of a penalty or transform), got {brief(data)}")
    fields = {key: _read_field(value) for key, value in data.items() if key != "name"}
    return _built(registry.lookup(name), name, fields)  # type: ignore[no-any-return]


def _built(cls: type, name: str, fields: Mapping[Any, Any]) -> Any:
    """Return cls(**fields).

    Raises:
        PlanError: an unknown field, or a value that the class can't take.
        PenaltyError, TransformError: raised by the class.
    """
    strange = [key for key in fields if not isinstance(key, str)]
    if strange:
        raise PlanError(f"{name} has no setting {_listed(strange)}")
    try:
        return cls(**fields)
    except PenaltyError as error:
        raise (PlanError if name.startswith("strength ") else PenaltyError)(f"{name}: {error}") from error
    except (RestrainError, RecursionError):
        raise
    except Exception as error:  # any exception of a class, perhaps a user's, for a wrong type
        known = list(inspect.signature(cls).parameters)
        unknown = [key for key in fields if key not in known]
        if unknown and isinstance(error, TypeError):
            named = f"{', '.join(map(repr, unknown))}{near_names(unknown, known)}"
            raise PlanError(f"{name}: it has no setting {named}") from error
        raise PlanError(f"{name}: {storage.first_line(error)}") from error


def _read_field(value: Any) -> Any:
    """Return a setting: plain data, a selection of activations, a penalty, or a schedule."""
    if isinstance(value, Mapping) and len(value) == 1 and set(value) <= {*FORMS, "times"}:
        return read_strength(value)
    if isinstance(value, Mapping) and set(value) == {"units"}:
        return _read_units(value["units"])
    if isinstance(value, Mapping) and set(value) & _OF_PLACES:
        return _read_where(value)
    return _read_scaled(value) if isinstance(value, Mapping) and "what" in value else _number(value)


def _read_units(data: Any) -> Units:
    sets = [data] if isinstance(data, Mapping | str) else data
    if not isinstance(sets, (list, tuple)) or not all(isinstance(one, Mapping | str) for one in sets):
        raise PlanError(
            "units are a dict of members, {name of a parameter: per}, a glob over known layers, or a list of these; "
            f"got {brief(data)}"
        )
    return units(*sets)


def _read_sum(data: Mapping[str, Any]) -> What:
    terms = data["sum"]
    if set(data) != {"sum"} or not isinstance(terms, (list, tuple)) or not terms:
        raise PlanError(
            f"a sum is {{'sum': [...]}}, a list of penalties, each with its own strength; got {brief(data)}"
        )
    for term in terms:
        if isinstance(term, Mapping) and not set(term) <= {"what", "strength"} and "name" not in term:
            raise PlanError(f"a term of a sum has what and strength, got {_listed(term)}")
    members = [_read_scaled(term) for term in terms]
    for member in members:
        if not isinstance(member, _Scalable):
            raise PlanError(f"a sum is of penalties, and {brief(member)} is none: write a rule of its own for it")
    try:
        return functools.reduce(operator.add, members)
    except TypeError as error:
        raise PlanError(f"{brief(members)} can't be added: they are of parameters, of a network, of a loss") from error


def _number(value: Any) -> Any:
    """Return text that is a number as a float (YAML reads `1e-4` as text), in lists too."""
    if isinstance(value, list):
        return [_number(member) for member in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_where(data: Any) -> Where | Places:
    if isinstance(data, str):
        return Glob(data)
    if isinstance(data, (list, tuple)) and data:
        return Names(tuple(data)) if all(isinstance(name, str) for name in data) else _join("or", data)
    if isinstance(data, Mapping) and len(set(data) & {"outputs", "inputs"}) == 1:
        return _read_place("outputs" if "outputs" in data else "inputs", data)
    if isinstance(data, Mapping) and len(data) == 1:
        ((key, value),) = data.items()
        if key == "role" and isinstance(value, str) and value in ROLES:
            return Role(value)
        types = [value] if isinstance(value, str) else value
        if key == "type" and isinstance(types, (list, tuple)) and types and all(isinstance(t, str) for t in types):
            return OfType(tuple(types))
        if key == "regex" and isinstance(value, str):
            return _read_regex(value)
        if key in ("and", "or", "minus"):
            return _join(key, value)
    raise PlanError(
        f"can't read the selection {brief(data)}; write a glob, a list of names, {{role: weights}}, {{type: Conv2d}}, "
        "{regex: ...}, {outputs: glob}, {inputs: glob}, or {and: [...]}, {or: [...]}, {minus: [...]}"
    )


def _read_regex(pattern: str) -> Regex:
    try:
        return Regex(re.compile(pattern).pattern)
    except (re.error, OverflowError) as error:
        raise PlanError(f"{brief(pattern)} is no regular expression: {error}") from error


def _join(operation: Any, members: Any) -> Where | Places:
    """Return the selections of a list joined from left to right, without recursion."""
    rest: list[Any] = []
    while True:
        if not isinstance(members, (list, tuple)) or len(members) < 2:
            raise PlanError(f"{operation!r} joins a list of two or more selections; got {brief(members)}")
        rest += members[:0:-1]
        first = members[0]
        if not (isinstance(first, Mapping) and len(first) == 1 and operation in first):
            break
        members = first[operation]
    joined: Any = _read_where(first)
    for member in reversed(rest):
        selection: Any = _read_where(member)
        if isinstance(joined, Places) != isinstance(selection, Places):
            raise PlanError(
                f"{operation!r} joins two or more selections, all of parameters or all of places; got {brief(members)}"
            )
        joined = (JoinedPlaces if isinstance(joined, Places) else Joined)(operation, joined, selection)
    return joined  # type: ignore[no-any-return]


def _read_place(kind: Any, data: Mapping[str, Any]) -> Place:
    # "": the model itself, as TOML has no null
    which = None if data[kind] in ("", None) else data[kind]
    if is_whole(which):
        which = brief(which)  # a layer called 0, read as a number by YAML
    unknown = [key for key in data if key not in (kind, "via", *_PLACE_OPTIONS)]
    if unknown:
        raise PlanError(f"{kind} has no {_listed(unknown)}; it has via, {', '.join(_PLACE_OPTIONS)}")
    options = {key: data[key] for key in _PLACE_OPTIONS if key in data}
    chosen = None if which is None else as_where(_read_where(which))
    return make_place(kind, chosen, via=_function(data.get("via")), **options)


def _function(name: Any) -> Any:
    """Return the function of torch or torch.nn.functional with this name; looks up nothing else."""
    if name is None:
        return None
    known = isinstance(name, str) and not name.startswith("_")
    found = (getattr(torch, name, None) or getattr(torch.nn.functional, name, None)) if known else None
    if not callable(found) or isinstance(found, type):
        raise PlanError(
            f"via= in a file names a function of torch or torch.nn.functional, such as 'relu'; got {brief(name)}"
        )
    return found


# Writing


def write_rule(rule: Rule) -> dict[str, Any]:
    """Return the rule as plain data for `read_rule`.

    Raises:
        PlanError: it selects by an object or a function, which has no text form.
    """
    data = _write_what(rule.what)
    data["on"] = _write_where(rule.where)
    if rule.outputs is not None:
        data["outputs"] = _write_where(rule.outputs)
    defaults = {field.name: field.default for field in dataclasses.fields(Rule)}
    data["how"] = rule.how
    data.update({key: getattr(rule, key) for key in _OPTIONS[1:] if getattr(rule, key) != defaults[key]})
    return data


def _write_what(what: Any) -> dict[str, Any]:
    """Return a dict with 'what', and with 'strength' if it isn't one."""
    if isinstance(what, (Scaled, ScaledNetwork, ScaledDerivative)):
        return {**_write_what(what.penalty), "strength": write_strength(what.strength)}
    if isinstance(what, (Sum, NetworkSum)):
        return {"what": {"sum": [_write_what(term) for term in what.terms]}}
    name = registry.name_of(type(what))
    if dataclasses.is_dataclass(what):
        given = {f.name: (getattr(what, f.name), f.default) for f in dataclasses.fields(what) if f.init and f.repr}
        fields = {
            k: _write_field(what, value) for k, (value, default) in given.items() if (value, default) != (None, None)
        }
    elif vars(what):
        raise PlanError(
            f"{what!r} can't be written: make its class a dataclass, whose fields say how to build it again"
        )
    else:
        fields = {}
    functions = [key for key, value in fields.items() if callable(value)]
    if functions:
        raise PlanError(f"{what!r} can't be written: its {functions[0]} is a function, which has no text form")
    return {"what": {"name": name, **fields} if fields else name}


def _write_field(what: Any, value: Any) -> Any:
    if isinstance(value, What):
        return _write_what(value)
    if isinstance(value, Places):
        return _write_where(value)
    if isinstance(value, Strength):
        return write_strength(value)
    if isinstance(value, Units):
        return _write_units(value)
    if isinstance(value, torch.Tensor) or callable(value) or (isinstance(value, Mapping) and value):
        raise PlanError(f"{what!r} can't be written: it holds a {type(value).__name__}; give a file of tensors instead")
    return [_write_field(what, member) for member in value] if isinstance(value, tuple) else value


def _write_units(value: Units) -> dict[str, Any]:
    if value.example is not None:
        raise PlanError(
            f"{value!r} can't be written: it holds an input of the model; write value.named(model), or reg.plan of an "
            "attached plan, which name the members"
        )
    if any(len(dict(members)) < len(members) for members in value.sets):
        raise PlanError(f"{value!r} can't be written: a parameter is twice in a set of units")
    named = [{name: _write_field(None, per) for name, per in members} for members in value.sets]
    return {"units": [*named, *value.where]}


def write_strength(strength: Any) -> Any:
    """Return a strength as a number or a dict, for `read_strength`.

    Raises:
        PlanError: it is a function of the step, or a schedule of a user's class.
    """
    if not isinstance(strength, Strength):
        return strength
    if isinstance(strength, Times):
        number, members = strength.parts
        return {"times": [number] * (number != 1) + [write_strength(member) for member in members]}
    form = next((form for form, cls in FORMS.items() if type(strength) is cls), None)
    if form is None:
        raise PlanError(
            f"{strength!r} can't be written: it is code, and a file holds data only; use one of {', '.join(FORMS)}"
        )
    fields = given_fields(strength)
    return {form: {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}}


def _write_where(where: Any) -> Any:
    if isinstance(where, Glob):
        return where.pattern
    if isinstance(where, Names):
        return list(where.names)
    if isinstance(where, Role):
        return {"role": where.role}
    if isinstance(where, OfType):
        return {"type": [t if isinstance(t, str) else t.__name__ for t in where.types]}
    if isinstance(where, Regex) and where.flags == Regex("").flags:
        return {"regex": where.pattern}
    if isinstance(where, (Joined, JoinedPlaces)):
        nodes = spine(where)
        joined: Any = _write_where(nodes[0].left)
        for node in nodes:
            same = node is not nodes[0] and node.operation in joined
            joined = {node.operation: [*(joined[node.operation] if same else [joined]), _write_where(node.right)]}
        return joined
    if isinstance(where, Place):
        data: dict[str, Any] = {where.kind: "" if where.which is None else _write_where(where.which)}
        if where.via is not None:
            name = getattr(where.via, "__name__", "")
            if where.via not in (getattr(torch, name, None), getattr(torch.nn.functional, name, None)):
                raise PlanError(
                    f"via={where.via!r} can't be written: only functions of torch or torch.nn.functional can"
                )
            data["via"] = name
        options = {key: getattr(where, key) for key in _PLACE_OPTIONS}
        for key in ("mask", "lengths"):
            if callable(options[key]):
                raise PlanError(f"{key}={options[key]!r} can't be written: only a name or position of an argument can")
        return {**data, **{k: v for k, v in options.items() if v is not None and v not in ("mean", "samples")}}
    raise PlanError(
        f"{where!r} can't be written as text; attach the plan and write reg.plan, which has the names instead"
    )


Forms.write, Forms.read = staticmethod(_write_what), staticmethod(_read_scaled)
