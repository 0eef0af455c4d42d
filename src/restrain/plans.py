"""Plans: lists of rules as objects, plain data and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restrain import datafiles
from restrain.errors import PlanError, RestrainError
from restrain.fields import brief, is_iterable, is_whole
from restrain.html_table import html_table
from restrain.layouts import NONE, Layouts, read_layouts, write_layouts
from restrain.plandata import read_rule, write_rule
from restrain.rules import Rule, What

VERSION = 1  # of the data; the key is optional
_KEYS = {"rules", "version", "layouts"}
_DEEPEST = 20  # greatest depth of nested lists


@dataclass(frozen=True)
class Plan:
    """A list of rules: plain data, bound to a model by `attach`.

    Made from rules, text forms (`"l2"`, `"l1:0.01"`: a registered name and a strength, on the
    weights), dicts as written by `to_dict`, or lists of these.

    >>> plan = rs.Plan.of(["l2:1e-4", 0.1 * rs.L1().on("fc*", how="proximal")])
    >>> [rule.how for rule in plan]
    ['loss', 'proximal']
    """

    rules: tuple[Rule, ...] = ()
    layouts: Layouts = NONE

    def __post_init__(self) -> None:
        if not (_is_list(self.rules) and all(isinstance(rule, Rule) for rule in self.rules)):
            raise PlanError(f"Plan(...) takes a tuple of rules; for anything else write Plan.of: {brief(self.rules)}")
        object.__setattr__(self, "rules", tuple(self.rules))

    @classmethod
    def of(cls, given: Any) -> Plan:
        """Return the plan of a rule, text, dict, plan, or list of these.

        Raises:
            PlanError: it is something else.
        """
        if given is None or isinstance(given, Plan):
            return cls() if given is None else given
        found: list[Layouts] = []
        rules = tuple(_rules(given, 0, found))
        return cls(rules, Layouts(tuple([pair for one in found for pair in one.by_name])))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan of a dict written by `to_dict`, or by hand: `{"rules": [...]}`.

        Raises:
            PlanError: an unknown name or key, or an invalid number.
        """
        _check_version(data)
        if not isinstance(data, Mapping) or not set(data) <= _KEYS or not _is_list(data.get("rules")):
            raise PlanError(
                "a plan is {'rules': [...]}, a list of rules, and may have 'layouts', words for the axes of "
                f"parameters; got {brief(data)}"
            )
        layouts = read_layouts(data.get("layouts", {}))  # first: rules may name axes by their words
        return cls(tuple(_read(rule, f"rule {number}") for number, rule in enumerate(data["rules"], 1)), layouts)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data (dicts, lists, text, numbers).

        Raises:
            PlanError: a rule selects by an object or a function, which has no text form; a bound
                plan (`reg.plan`) has names instead.
        """
        data: dict[str, Any] = {"rules": [write_rule(rule) for rule in self.rules]}
        return data | ({"layouts": write_layouts(self.layouts)} if self.layouts.by_name else {})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Return the plan in a `.yaml`, `.yml`, `.toml` or `.json` file.

        Raises:
            MissingFileError, FileAccessError: there is no such file, or it can't be opened.
            PlanError: it is cut off or damaged, or holds no plan; the message gives the file and
                the position.
            PenaltyError, TransformError, SelectionError, HowError: an invalid rule.
        """
        data = datafiles.load(path)
        try:
            return cls.from_dict(data)
        except RestrainError as error:
            raise type(error)(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a `.yaml`, `.yml`, `.toml` or `.json` file, atomically.

        Raises:
            PlanError: another ending; a rule without a text form.
            FileAccessError: no such folder, no space or no permission; the old file is unchanged.
        """
        datafiles.save(self.to_dict(), path)

    def _repr_html_(self) -> str:
        rows = [[rule.name or "", brief(rule.what), rule.how, brief(rule.where)] for rule in self.rules]
        return html_table([["name", "what", "how", "where"], *rows])

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __add__(self, other: Any) -> Plan:
        more = Plan.of(other)
        return Plan(self.rules + more.rules, Layouts(self.layouts.by_name + more.layouts.by_name))


def _rules(given: Any, depth: int, layouts: list[Layouts]) -> Iterator[Rule]:
    """Yield the rules of what `Plan.of` takes; append the layouts of plans in it."""
    if isinstance(given, Rule):
        yield given
    elif isinstance(given, Plan) or (isinstance(given, Mapping) and _KEYS & set(given)):
        plan = given if isinstance(given, Plan) else Plan.from_dict(given)
        layouts.append(plan.layouts)
        yield from plan
    elif isinstance(given, (str, Mapping)):
        yield read_rule(given)
    elif isinstance(given, What):
        raise PlanError(f"{brief(given)} says what, but not where: write .on(...) after it")
    elif depth > _DEEPEST:
        raise PlanError(f"a plan is a list of rules; got lists within lists, {_DEEPEST} deep")
    else:
        for member in _members(given):
            yield from _rules(member, depth + 1, layouts) if member is not None else ()


def _members(given: Any) -> Iterator[Any]:
    if is_iterable(given):
        return iter(given)
    raise PlanError(f"expected rules made by .on(...), text, dicts or a list of them; got {brief(given)}")


def _is_list(given: Any) -> bool:
    return isinstance(given, (list, tuple))


def _check_version(data: Any) -> None:
    version = data.get("version", VERSION) if isinstance(data, Mapping) else VERSION
    if not is_whole(version, 1):
        raise PlanError(f"the version of a plan is a whole number such as {VERSION}; got {brief(version)}")
    if version > VERSION:
        raise PlanError(
            f"this plan is of version {version}, and this library reads up to version {VERSION}: "
            "pip install --upgrade restrain"
        )


def _read(data: Any, which: str) -> Rule:
    """Return the rule; errors say which rule it is."""
    try:
        return read_rule(data)
    except RestrainError as error:
        raise type(error)(f"{which}: {error}") from error
