"""Plans: lists of rules, as objects, as plain data and in files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restrain.errors import PlanError
from restrain.plandata import read_rule, write_rule
from restrain.rules import Rule, What


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
            return cls.from_dict(given) if isinstance(given, Mapping) and "rules" in given else cls((read_rule(given),))
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
        if not isinstance(data, Mapping) or set(data) != {"rules"} or not isinstance(data["rules"], (list, tuple)):
            raise PlanError(f"a plan is {{'rules': [...]}}, a list under that one key; got {data!r}")
        return cls(tuple(read_rule(rule) for rule in data["rules"]))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (dicts, lists, text, numbers).

        Raises:
            PlanError: a rule selects by an object or a function, which has no text form; a plan that is bound
                (`reg.plan`) has names instead.
        """
        return {"rules": [write_rule(rule) for rule in self.rules]}

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a `.yaml`, `.yml`, `.toml` or `.json` file."""
        return cls.from_dict(load(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the plan to a `.yaml`, `.yml`, `.toml` or `.json` file."""
        save(self.to_dict(), Path(path))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __add__(self, other: Any) -> Plan:
        return Plan(self.rules + Plan.of(other).rules)


def load(path: Path) -> Any:
    """The data in a `.yaml`, `.yml`, `.toml` or `.json` file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        return _yaml().safe_load(text)
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix == ".json":
        return json.loads(text)
    raise PlanError(f"a plan file ends in .yaml, .yml, .toml or .json; got {path.name!r}")


def save(data: dict[str, Any], path: Path) -> None:
    """Write data to a `.yaml`, `.yml`, `.toml` or `.json` file."""
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
