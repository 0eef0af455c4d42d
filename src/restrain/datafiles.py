"""Plain data (dicts, lists, text, numbers) in YAML, TOML and JSON files.

A YAML or TOML file cut at the end of a line can still be read, as a shorter one. So files written
here begin with a comment that says how they end. Files written by hand need no such comment.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from restrain import storage
from restrain.errors import FileError, PlanError
from restrain.fields import brief

MOST_BYTES, MOST = 2**24, 500_000  # bounds on a file's bytes and values
_END = "# end of plan"
_HEAD = f"# restrain plan, whole if it has the line: {_END}"


def save(data: dict[str, Any], path: Any) -> Path:
    """Write data to a `.yaml`, `.yml`, `.toml` or `.json` file; return its path.

    Raises:
        PlanError: another ending, or a value that the format can't hold.
        FileAccessError: see `storage.write`.
    """
    file = storage.as_path(path)
    _check_ending(file)
    try:
        if file.suffix == ".json":
            text = json.dumps(data, indent=2) + "\n"
        else:
            body = _toml().dumps(data) if file.suffix == ".toml" else _yaml().safe_dump(data, sort_keys=False)
            text = f"{_HEAD}\n{body.rstrip()}\n{_END}\n"
    except RecursionError as error:
        raise PlanError(f"{file} can't be written: its rules are nested too deep") from error
    except (TypeError, ValueError) as error:
        raise PlanError(f"{file} can't be written as {file.suffix}: {storage.first_line(error)}") from error
    return storage.write(file, text.encode("utf-8"))


def load(path: Any) -> Any:
    """Return the data in a `.yaml`, `.yml`, `.toml` or `.json` file.

    Raises:
        PlanError: it is cut off, invalid or too large; the message gives file, line and column.
        MissingFileError, FileAccessError: there is no such file, or it can't be opened.
    """
    file = storage.as_path(path)
    _check_ending(file)
    try:
        content = storage.read(file, MOST_BYTES)
        text = content.decode("utf-8-sig")
        if text.startswith(_HEAD) and _END not in text.splitlines():
            raise PlanError(f"{file} is cut off: it has no line {_END!r}; write it anew, or fetch it again")
        data = {".json": _from_json, ".toml": _from_toml}.get(file.suffix, _from_yaml)(text)
        storage.check_tree(data, str(file), MOST)
    except (PlanError, OSError):
        raise
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PlanError(f"{file}, line {line}: byte {content[error.start]:#04x} is no UTF-8; save it so") from error
    except RecursionError as error:
        raise PlanError(f"{file} is nested too deep") from error
    except (FileError, ValueError) as error:
        raise PlanError(f"{file} can't be read: {error}") from error
    return data


def _check_ending(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise PlanError(f"a plan file ends in .yaml, .yml, .toml or .json; got {path.name!r}")


# ---------------------------------------------------------------- JSON and TOML


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)  # errors have line and column


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {brief(twice)} stands twice in one mapping, and only one of them can hold")
    return found


def _from_toml(text: str) -> Any:
    return tomllib.loads(text)  # refuses repeated keys; errors have line and column


def _toml() -> Any:
    try:
        import tomli_w
    except ImportError as error:
        raise PlanError("writing TOML needs tomli-w: pip install 'restrain[plans]', or use .json") from error
    return tomli_w


# ---------------------------------------------------------------- YAML


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise PlanError("YAML plans need PyYAML: pip install 'restrain[plans]', or use .toml or .json") from error
    return yaml


def _from_yaml(text: str) -> Any:
    yaml = _yaml()
    builder = _Builder(yaml)
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            builder.take(event)
    except yaml.YAMLError as error:
        raise ValueError(_in_a_line(error)) from error
    return builder.document


def _in_a_line(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{place}{getattr(error, 'problem', None) or storage.first_line(error)}"


_MERGE, _NO_KEY = object(), object()


@dataclass
class _Open:
    """A list or mapping that hasn't ended yet."""

    value: Any
    anchor: str | None
    key: Any = _NO_KEY
    merged: dict[Any, Any] = field(default_factory=dict)  # content of `<<`; own keys override it
    size: int = 1
    height: int = 1


class _Builder:
    """Data from the events of a YAML parser.

    Unlike PyYAML's builder, it refuses repeated keys, doesn't recurse, and counts the content of an
    alias at each use, so that a few lines can't expand to a billion values.
    """

    def __init__(self, yaml: Any) -> None:
        self._yaml, self._scalars = yaml, yaml.SafeLoader("")
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int, int]] = {}  # value, its number of values, levels
        self.document: Any = None
        self._documents = 0

    def take(self, event: Any) -> None:
        """Process an event.

        Raises:
            ValueError: invalid data; the message gives the position.
        """
        yaml = self._yaml
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
            self._put(value, 1, 0, event)
            self._name(event.anchor, value, 1, 0)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._error(event, f"*{event.anchor} stands for nothing that is whole before it")
            self._put(*self._anchors[event.anchor], event)
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            value = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            if event.tag not in (None, "!", f"tag:yaml.org,2002:{'map' if value == {} else 'seq'}"):
                raise self._error(event, f"a plan has no values of the kind {event.tag}")
            self._anchors.pop(event.anchor, None)
            self._open.append(_Open(value, event.anchor))
            self._check(1, 1, event)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            done = self._open.pop()
            if done.merged:
                done.value = {**done.merged, **done.value}
            self._put(done.value, done.size, done.height, event)
            self._name(done.anchor, done.value, done.size, done.height)

    def _name(self, anchor: str | None, value: Any, size: int, height: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (value, size, height)

    def _put(self, value: Any, size: int, height: int, event: Any) -> None:
        """Add a complete value to the list or mapping that contains it."""
        if not self._open:
            self.document, self._documents = value, self._documents + 1
            if self._documents > 1:
                raise self._error(event, "a second document begins, after a line ---")
            return
        into = self._open[-1]
        into.size, into.height = into.size + size, max(into.height, height + 1)
        self._check(0, height, event)
        if isinstance(into.value, list):
            into.value.append(value)
        elif into.key is _NO_KEY:
            into.key = self._checked_key(value, into, event)
        elif into.key is _MERGE:
            for other in value[::-1] if isinstance(value, list) else [value]:
                if not isinstance(other, Mapping):
                    raise self._error(event, "<< takes a mapping, or a list of mappings")
                into.merged.update(other)
            into.key = _NO_KEY
        else:
            into.value[into.key] = value
            into.key = _NO_KEY

    def _checked_key(self, key: Any, into: _Open, event: Any) -> Any:
        if isinstance(key, (list, dict)):
            raise self._error(event, "a key is text or a number, not a list or mapping")
        if key is not _MERGE and key in into.value:
            raise self._error(event, f"the key {brief(key)} stands twice in one mapping, and only one of them can hold")
        return key

    def _scalar(self, event: Any) -> Any:
        node = self._yaml.ScalarNode
        tag = event.tag if event.tag not in (None, "!") else self._scalars.resolve(node, event.value, event.implicit)
        if tag == "tag:yaml.org,2002:str":
            return event.value
        if tag == "tag:yaml.org,2002:merge":
            return _MERGE if self._open and self._open[-1].key is _NO_KEY else event.value
        try:
            return self._scalars.construct_object(node(tag, event.value, event.start_mark, event.end_mark))
        except self._yaml.YAMLError:
            raise
        # such as an impossible date, a number of 5,000 digits, !!int "text"
        except Exception as error:
            raise self._error(event, f"{brief(event.value)} is no {tag.rpartition(':')[2]}") from error
        finally:
            self._scalars.constructed_objects.clear()

    def _check(self, more: int, height: int, event: Any) -> None:
        if self._open[-1].size + more > MOST or len(self._open) + height > storage.DEEPEST:
            raise self._error(
                event, f"more than {MOST:,} values or {storage.DEEPEST:,} levels, aliases counted each time"
            )

    def _error(self, event: Any, what: str) -> ValueError:
        mark = event.start_mark
        return ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {what}")
