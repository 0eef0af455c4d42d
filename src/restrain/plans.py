"""Plans: lists of rules, and their form as plain data (text, dicts, YAML, TOML and JSON files).

A rule as data:

    what: l1                       # a registered name; {name: grouplasso, per: in}; {sum: [...]} of such
    strength: 1e-3
    on: "fc*.weight"               # a glob; a list of exact names; {role: weights}; {type: Conv2d};
                                   # {regex: ...}; {outputs: "relu*", via: relu}; {and: [...]}, {or: ...}, {minus: ...}
    how: proximal                  # and reduce, name, every, optional as in .on(...)
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from restrain import registry
from restrain.errors import PlanError
from restrain.penalties import Scaled, Sum
from restrain.places import JoinedPlaces, Place, Places
from restrain.rules import Rule, What
from restrain.select import ROLES, Glob, Joined, Names, OfType, Regex, Role, Where, as_where
from restrain.transforms.base import Transform

_OPTIONS = ("how", "reduce", "name", "every", "optional")


@dataclass(frozen=True)
class Plan:
    """A list of rules: plain data, to be bound to a model by `attach`.

    Made of rules, text forms (`"l2"`, `"l1:0.01"`: a registered name and a strength, on the weights), dicts as
    `to_dict` writes them, or any list of these.

    >>> plan = rs.Plan.of(["l2:1e-4", 0.1 * rs.L1().on("fc*", how="proximal")])
    >>> [rule.how for rule in plan]
    ['loss', 'proximal']
    """

    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, given: Any) -> Plan:
        """The plan that a rule, text, dict, plan, or a list of these stands for.

        Raises:
            PlanError: it is none of these.
        """
        if given is None or isinstance(given, Plan):
            return given or cls()
        if isinstance(given, Rule):
            return cls((given,))
        if isinstance(given, (str, Mapping)):
            return (
                cls.from_dict(given) if isinstance(given, Mapping) and "rules" in given else cls((_read_rule(given),))
            )
        if isinstance(given, What):
            raise PlanError(f"{given!r} says what, but not where: write .on(...) after it")
        if isinstance(given, Iterable):
            return cls(tuple(rule for member in given for rule in cls.of(member)))
        raise PlanError(f"expected rules made by .on(...), text, dicts or a list of them; got {given!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote, or that a person wrote in the same form: `{"rules": [...]}`.

        Raises:
            PlanError: an unknown name or key, or a number that isn't one.
        """
        if set(data) != {"rules"} or isinstance(data["rules"], (str, Mapping)):
            raise PlanError(f"a plan is {{'rules': [...]}}, got the keys {sorted(data)}")
        return cls(tuple(_read_rule(rule) for rule in data["rules"]))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (dicts, lists, text, numbers).

        Raises:
            PlanError: a rule selects by an object or a function, which has no text form; a plan that is bound
                (`reg.plan`) has names instead.
        """
        return {"rules": [_write_rule(rule) for rule in self.rules]}

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a `.yaml`, `.yml`, `.toml` or `.json` file."""
        return cls.from_dict(_load(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the plan to a `.yaml`, `.yml`, `.toml` or `.json` file."""
        _save(self.to_dict(), Path(path))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __add__(self, other: Any) -> Plan:
        return Plan(self.rules + Plan.of(other).rules)


# ---------------------------------------------------------------- reading


def _read_rule(data: Any) -> Rule:
    if isinstance(data, str):
        name, _, strength = data.partition(":")
        data = {"what": name.strip(), **({"strength": strength} if strength else {})}
    if not isinstance(data, Mapping) or "what" not in data:
        raise PlanError(f"a rule is a text such as 'l1:0.01' or a dict with the key 'what', got {data!r}")
    unknown = set(data) - {"what", "strength", "on", "outputs", *_OPTIONS}
    if unknown:
        raise PlanError(
            f"a rule has no {', '.join(sorted(map(str, unknown)))}; it has what, strength, on, outputs, "
            f"{', '.join(_OPTIONS)}"
        )
    options: dict[str, Any] = {key: data[key] for key in _OPTIONS if key in data}
    if "outputs" in data:
        options["outputs"] = _read_where(data["outputs"])
    on = _read_where(data["on"]) if "on" in data else None
    return _read_scaled(data).on(on, **options)


def _read_scaled(data: Any) -> What:
    what = _read_what(data["what"]) if isinstance(data, Mapping) and "what" in data else _read_what(data)
    if not isinstance(data, Mapping) or "strength" not in data:
        return what
    strength = _number(data["strength"])
    if not isinstance(strength, float) or isinstance(what, Transform):
        raise PlanError(f"a strength is a number, for penalties only; got strength={data['strength']!r} of {what!r}")
    return strength * what  # type: ignore[operator, return-value]


def _read_what(data: Any) -> What:
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping):
        raise PlanError(f"what is a registered name or a dict with one under 'name', got {data!r}")
    if "sum" in data:
        terms = [_read_scaled(term) for term in data["sum"]]
        return sum(terms[1:], start=terms[0])  # type: ignore[call-overload, no-any-return]
    if "name" not in data:
        raise PlanError(f"what needs a 'name' (of a penalty or transform), got {dict(data)!r}")
    cls = registry.lookup(str(data["name"]))
    fields = {key: _number(value) for key, value in data.items() if key != "name"}
    try:
        return cls(**fields)  # type: ignore[no-any-return]
    except TypeError as error:
        raise PlanError(f"{data['name']}: {error}") from error


def _number(value: Any) -> Any:
    """A number that a file gives as text (YAML reads `1e-4` so) is a number; strengths and settings are floats."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _read_where(data: Any) -> Where | Places:
    if isinstance(data, str):
        return Glob(data)
    if isinstance(data, (list, tuple)):
        return Names(tuple(data)) if all(isinstance(name, str) for name in data) else _join("or", data)
    if isinstance(data, Mapping) and len(set(data) & {"outputs", "inputs"}) == 1:
        return _read_place("outputs" if "outputs" in data else "inputs", data)
    if isinstance(data, Mapping) and len(data) == 1:
        ((key, value),) = data.items()
        if key == "role" and value in ROLES:
            return Role(value)
        if key == "type":
            return OfType(tuple([value] if isinstance(value, str) else value))
        if key == "regex":
            return Regex(value)
        if key in ("and", "or", "minus"):
            return _join(key, value)
    raise PlanError(
        f"can't read the selection {data!r}; write a glob, a list of names, {{role: weights}}, {{type: Conv2d}}, "
        "{regex: ...}, {outputs: glob}, {inputs: glob}, or {and: [...]}, {or: [...]}, {minus: [...]}"
    )


def _join(operation: Any, members: Any) -> Where | Places:
    selections = [_read_where(member) for member in members]
    if len(selections) < 2 or len({isinstance(s, Places) for s in selections}) != 1:
        raise PlanError(
            f"{operation!r} joins two or more selections, all of parameters or all of places; got {members!r}"
        )
    joined: Any = selections[0]
    for selection in selections[1:]:
        joined = (JoinedPlaces if isinstance(joined, Places) else Joined)(operation, joined, selection)  # type: ignore[arg-type]
    return joined  # type: ignore[no-any-return]


def _read_place(kind: Any, data: Mapping[str, Any]) -> Place:
    which = data[kind] or None  # "" is the model itself: TOML has no null
    unknown = set(data) - {kind, "via", "index", "batch_dim", "calls"}
    if unknown:
        raise PlanError(f"{kind} has no {', '.join(sorted(unknown))}; it has via, index, batch_dim, calls")
    options = {key: data[key] for key in ("index", "batch_dim", "calls") if key in data}
    chosen = None if which is None else _read_where(which)
    return Place(kind, None if chosen is None else as_where(chosen), _function(data.get("via")), **options)


def _function(name: str | None) -> Any:
    """The function of torch or torch.nn.functional that a text names; nothing else is ever looked up."""
    if name is None:
        return None
    found = getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
    if not callable(found) or name.startswith("_"):
        raise PlanError(
            f"via= in a file names a function of torch or torch.nn.functional, such as 'relu'; got {name!r}"
        )
    return found


# ---------------------------------------------------------------- writing


def _write_rule(rule: Rule) -> dict[str, Any]:
    data = _write_what(rule.what)
    data["on"] = _write_where(rule.where)
    if rule.outputs is not None:
        data["outputs"] = _write_where(rule.outputs)
    defaults = {field.name: field.default for field in dataclasses.fields(Rule)}
    data["how"] = rule.how
    data.update({key: getattr(rule, key) for key in _OPTIONS[1:] if getattr(rule, key) != defaults[key]})
    return data


def _write_what(what: Any) -> dict[str, Any]:
    """What as a dict with 'what' and, where it isn't one, 'strength'."""
    if isinstance(what, Scaled):
        return {**_write_what(what.penalty), "strength": what.strength}
    if isinstance(what, Sum):
        return {"what": {"sum": [_write_what(term) for term in what.terms]}}
    name = registry.name_of(type(what))
    if dataclasses.is_dataclass(what):
        fields = {f.name: getattr(what, f.name) for f in dataclasses.fields(what) if f.init}
    elif vars(what):
        raise PlanError(
            f"{what!r} can't be written: make its class a dataclass, whose fields say how to build it again"
        )
    else:
        fields = {}
    return {"what": {"name": name, **fields} if fields else name}


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
        return {where.operation: [_write_where(where.left), _write_where(where.right)]}
    if isinstance(where, Place):
        data: dict[str, Any] = {where.kind: "" if where.which is None else _write_where(where.which)}
        if where.via is not None:
            name = getattr(where.via, "__name__", "")
            if where.via not in (getattr(torch, name, None), getattr(torch.nn.functional, name, None)):
                raise PlanError(
                    f"via={where.via!r} can't be written: only functions of torch or torch.nn.functional can"
                )
            data["via"] = name
        options = {"index": where.index, "batch_dim": where.batch_dim, "calls": where.calls}
        return {**data, **{k: v for k, v in options.items() if v is not None and v != "mean"}}
    raise PlanError(
        f"{where!r} can't be written as text; attach the plan and write reg.plan, which has the names instead"
    )


# ---------------------------------------------------------------- files


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        return _yaml().safe_load(text)
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix == ".json":
        return json.loads(text)
    raise PlanError(f"a plan file ends in .yaml, .yml, .toml or .json; got {path.name!r}")


def _save(data: dict[str, Any], path: Path) -> None:
    if path.suffix in (".yaml", ".yml"):
        text = _yaml().safe_dump(data, sort_keys=False)
    elif path.suffix == ".toml":
        text = _toml().dumps(data)
    elif path.suffix == ".json":
        text = json.dumps(data, indent=2) + "\n"
    else:
        raise PlanError(f"a plan file ends in .yaml, .yml, .toml or .json; got {path.name!r}")
    path.write_text(text, encoding="utf-8")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise PlanError("YAML plans need PyYAML: pip install 'restrain[plans]', or use .toml or .json") from error
    return yaml


def _toml() -> Any:
    try:
        import tomli_w
    except ImportError as error:
        raise PlanError("writing TOML needs tomli-w: pip install 'restrain[plans]', or use .json") from error
    return tomli_w
