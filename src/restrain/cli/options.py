"""Options of `restrain fit`: their types, and their conversion to keywords of the models."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from restrain.errors import DataError
from restrain.tables import Marks

Command = Callable[..., Any]

TRAINING: dict[str, tuple[Any, str]] = {
    "algo": (str, "A torch optimizer, such as adam (the default), sgd, nag, rmsprop, lbfgs."),
    "learning_rate": (click.FloatRange(min=0), "The optimizer's own, unless given."),
    "momentum": (click.FloatRange(0, 1, max_open=True), "For the optimizers that have one."),
    "batch_size": (click.IntRange(min=1), "Rows a step; 64, unless given."),
    "epochs": (
        click.IntRange(min=1),
        "How often each row is seen at most; unless given, until validation stops improving.",
    ),
    "patience": (click.IntRange(min=1), "Stop after so many validations in a row without improvement."),
    "min_improvement": (click.FloatRange(min=0), "By what part a validation loss must be less to count as better."),
    "validate_every": (click.IntRange(min=1), "Epochs from one validation to the next."),
    "max_gradient_norm": (click.FloatRange(min=0, min_open=True), "Longer gradients are scaled down to that length."),
    "device": (str, "Such as cuda or mps; the CPU, unless given. Needs Lightning Fabric."),
    "precision": (str, "32, 64 (the default on the CPU), 16-mixed or bf16-mixed."),
}
RULES = {
    "weight_l1": "Sum of |w| over weights.",
    "weight_l2": "Sum of w² over weights.",
    "hidden_l1": "Sum of |h| over the units of hidden layers, averaged over rows.",
    "contractive": "Squared Frobenius norm of d hidden / d input, averaged over rows.",
    "input_noise": "Standard deviation of Gaussian noise on the inputs.",
    "hidden_noise": "The same on hidden layers.",
    "output_noise": "The same on the outputs.",
    "input_dropout": "Probability of a zero in the inputs.",
    "hidden_dropout": "The same in hidden layers.",
    "output_dropout": "The same in the outputs.",
    "max_norm": "Longest row of a weight.",
}

ELSEWHERE = {
    "valid": "--valid 0.2, or --valid and a file",
    "encoder": "--missing, --categories, --unknown",
    "random_state": "--seed",
    "normalize": "--normalize or --no-normalize",
    "regularizers": "--plan and a file",
    "checkpoint": "--resume",
}
"""Keywords that `--set` refuses, each with the option to write instead."""


class Amount(click.ParamType[Any]):
    """A number ≥ 0, or settings such as `strength=1e-4,on=hid1.weight,how=proximal`."""

    name = "number|k=v,..."

    def __init__(self, below: float | None = None) -> None:
        self.below = below

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        if "=" not in value:
            return self._number(value, param, ctx)
        settings = _settings(value)
        if settings is None:
            self.fail(f"expected a number, or k=v,k=v as in strength=1e-4,on=hid1.weight; got {value!r}", param)
        if "strength" in settings:
            settings["strength"] = self._number(str(settings["strength"]), param, ctx)
        return settings

    def _number(self, text: str, param: Any, ctx: Any) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < (float("inf") if self.below is None else self.below):
            wanted = "a number, zero or more" if self.below is None else f"a number from 0 to below {self.below:g}"
            self.fail(f"expected {wanted}, got {text!r}", param, ctx)
        return number


class Pattern(click.ParamType[Any]):
    """A glob over layers and an amount, as in `hid*=0.1`."""

    name = "glob=number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        glob, _, amount = str(value).rpartition("=")
        if not glob:
            self.fail(f"expected a glob over layers and a number, as in 'hid*=0.1'; got {value!r}", param, ctx)
        return glob, Amount(1.0 if param is not None and param.name == "dropout" else None).convert(amount, param, ctx)


class Sizes(click.ParamType[Any]):
    """Hidden layers, as in `100,50` or `100:tanh,50`."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(self._layer(part.strip(), value, param, ctx) for part in value.split(",") if part.strip())

    def _layer(self, part: str, value: str, param: Any, ctx: Any) -> Any:
        size, _, activation = part.partition(":")
        if not size.isdigit() or int(size) == 0:
            self.fail(f"expected whole numbers above zero, as in 100,50 or 100:tanh; got {value!r}", param, ctx)
        return (int(size), activation) if activation else int(size)


class Hidden(Sizes):
    """Hidden layers as in `Sizes`; 0 or none for a linear model."""

    name = "sizes|none"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return () if value in ("0", "none") else super().convert(value, param, ctx)


class Valid(click.ParamType[Any]):
    """A fraction of the rows, a file, or none."""

    name = "part|file|none"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str) or value == "none":
            return value
        try:
            part = float(value)
        except ValueError:
            if Path(value).is_file():
                return Path(value)
            self.fail(f"expected a part such as 0.2, or a file; got {value!r}, which is neither", param, ctx)
        if not 0 < part < 1:
            self.fail(f"expected a part between 0 and 1, got {value!r}", param, ctx)
        return part


class Page(click.ParamType[Any]):
    """A file that ends in .html."""

    name = "page.html"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        path = Path(value)
        if path.suffix.lower() not in (".html", ".htm"):
            self.fail(f"expected a file that ends in .html, got {str(value)!r}", param, ctx)
        return path


def refuse_present(file: Path | None, *, overwrite: bool) -> None:
    """Check that a file isn't there yet.

    Raises:
        click.UsageError: it is, without `overwrite`.
    """
    if file is not None and file.exists() and not overwrite:
        raise click.UsageError(f"{file} is there already: write --overwrite, or another file")


class Json(click.ParamType[Any]):
    """Data in JSON."""

    name = "json"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(
                f"""expected JSON, as in '[64, [200, "relu"], [64, "tied"]]'; got {value!r} ({error})""", param, ctx
            )


class Setting(click.ParamType[Any]):
    """A keyword of the model and its value: settings `strength=1e-3,per=in`, JSON, or else text."""

    name = "keyword=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        key, equals, text = str(value).partition("=")
        if not (equals and key.strip().isidentifier()):
            self.fail(f"expected keyword=value, as in grouplasso=1e-3; got {value!r}", param, ctx)
        key, settings = key.strip(), _settings(text)
        if key in ELSEWHERE:
            self.fail(f"{key} has an option of its own: write {ELSEWHERE[key]}", param, ctx)
        return key, _plain(text.strip()) if settings is None else settings


def _settings(text: str) -> dict[str, Any] | None:
    """Return the settings k=v,k=v as a dict; None if the text has another form.

    >>> _settings("strength=1e-3,per=[4, 4],on=hid*")
    {'strength': 0.001, 'per': [4, 4], 'on': 'hid*'}
    """
    parts = [part.partition("=") for part in re.split(r",\s*(?=[A-Za-z_]\w*\s*=)", text.strip())]
    if not all(key.strip().isidentifier() and equals and value.strip() for key, equals, value in parts):
        return None
    return {key.strip(): _plain(value.strip()) for key, _, value in parts}


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def keyword_options(command: Command) -> Command:
    """Add the options that are keywords of the models to a command."""
    for name, (kind, text) in reversed(TRAINING.items()):
        command = click.option(_flag(name), type=kind, help=text)(command)
    for name, text in reversed(RULES.items()):
        command = click.option(_flag(name), type=Amount(1.0 if "dropout" in name else None), help=text)(command)
    return command


def marks_options(command: Command) -> Command:
    """Add the options that say how a table is written to a command."""
    one = click.Choice([",", ".", " ", "'", "_"])
    gaps = "A text or number that stands for a missing value, as ? or -99; several by commas."
    date = "How dates are written, as '%d.%m.%Y'; 2024-01-31 is read without it."
    for option in (
        click.option("--sheet", help="The sheet of a workbook; the first, unless given."),
        click.option("--date-format", metavar="FORMAT", help=date),
        click.option("--na-values", multiple=True, metavar="TEXT", help=gaps),
        click.option("--encoding", help="Of a text file, as latin-1, cp1252, utf-16; UTF-8, unless given."),
        click.option("--thousands", type=one, default=None, help="Between groups of three digits in a text file."),
        click.option("--decimal", type=click.Choice([".", ","]), default=None, help="Before decimals in a text file."),
        click.option("--separator", help="Between the values of a text file; tab stands for a tab, space for spaces."),
    ):
        command = option(command)
    return command


def table_options(command: Command) -> Command:
    """Add the options that say how a table is read and encoded for training to a command."""
    missing = "Missing values: refuse them, or take a number's mean, and a value of its own for a category."
    ways = click.Choice(["error", "fill"])
    command = marks_options(command)
    for option in (
        click.option("--drop-missing", is_flag=True, help="Leave out rows with a missing value, and say how many."),
        click.option("--missing", type=ways, default="error", show_default=True, help=missing),
        click.option("--categories", multiple=True, metavar="COLUMN", help="A column of numbers that are categories."),
        click.option("--ignore", multiple=True, metavar="COLUMN", help="A column to leave out."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is random."),
        click.option(
            "--normalize/--no-normalize", default=True, help="Standardise inputs (and a regressor's targets)."
        ),
    ):
        command = option(command)
    return command


def marks_of(given: dict[str, Any], known: Mapping[str, Any] | None = None) -> Marks:
    """Return how a table is written: as the options say, else as that of the training.

    Args:
        given: the options.
        known: the marks of the training, as of `told_marks`.

    Raises:
        click.UsageError: a character has two meanings, or a date format isn't one.
    """
    usual = {**dataclasses.asdict(Marks()), **(known or {})}
    gaps = tuple(part for text in given["na_values"] for part in ([text] if text == "," else text.split(",")))
    asked = {name: given[name] for name in ("separator", "decimal", "thousands", "encoding", "sheet")}
    asked |= {"date": given["date_format"], "gaps": gaps or None}
    chosen = {**usual, **{name: value for name, value in asked.items() if value is not None}}
    if chosen["decimal"] == chosen["thousands"] and given["thousands"] is None:
        chosen["thousands"] = ""
    if chosen["encoding"].lower() in ("utf-8", "utf8"):
        chosen["encoding"] = "utf-8-sig"  # drops a byte order mark, if there is one
    if given["date_format"] is not None and not re.search(r"%[YyGsc]", given["date_format"]):
        raise click.UsageError(
            f"--date-format says where day, month and year stand, as in '%d.%m.%Y'; got {given['date_format']!r}"
        )
    try:
        return Marks(**{**chosen, "gaps": tuple(chosen["gaps"])})
    except DataError as error:
        raise click.UsageError(str(error)) from error


def told_marks(marks: Marks) -> dict[str, Any]:
    """Return how values are written as plain data, for a model's file; not how the file is."""
    return {"decimal": marks.decimal, "thousands": marks.thousands, "date": marks.date, "gaps": list(marks.gaps)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def keywords_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `restrain fit` as keywords of a model.

    Raises:
        click.UsageError: two options exclude each other.
    """
    found = {name: given[name] for name in (*TRAINING, *RULES) if given[name] is not None}
    for name in ("noise", "dropout"):
        if given[name]:
            found[name] = dict(given[name])
    if given["nonnegative"] is not None:
        found["nonnegative"] = True if given["nonnegative"] == "all" else given["nonnegative"]
    if given["layers"] is not None and given["hidden"] is not None:
        raise click.UsageError("--layers and --hidden exclude each other: write one of them")
    for name in ("layers", "hidden", "activation", "how"):
        if given[name] is not None:
            found[name] = given[name]
    twice = sorted({key for key, _ in given["set"]} & set(found))
    if twice:
        raise click.UsageError(f"--set {twice[0]}=... says again what {_flag(twice[0])} says: write one of them")
    return {**found, **dict(given["set"])}


def chosen(option: str, names: Sequence[str], there: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the column names in an option that takes them comma-separated or repeated.

    Raises:
        click.BadParameter: the table has no column of this name.
    """
    from difflib import get_close_matches

    found = [part for name in names for part in ([name] if name in there else name.split(","))]
    for name in found:
        if name not in there:
            near = get_close_matches(name, there)
            hint = f" (near it: {', '.join(near)})" if near else ""
            listed = ", ".join(list(there)[:12]) + (", …" if len(there) > 12 else "")
            raise click.BadParameter(f"{source} has no column {name!r}{hint}; there are: {listed}", param_hint=option)
    return tuple(dict.fromkeys(found))


# ---------------------------------------------------------------- errors of the models

_IN_PYTHON = {
    "valid=(X, y)": "--valid and a file",
    "a dict needs a strength": "settings need a strength",
    "write its settings into a dict": "write its settings, as in strength=...,key=...",
    "is a rule: regularizers=[... ": "is a rule in a file for --plan, as [",
    "; a dict has ": "; settings are ",
    "write progress=": "write --set progress=true",
}
_OPTIONS = {
    **{name: _flag(name) for name in (*TRAINING, *RULES, "hidden", "activation", "layers", "valid")},
    **{"random_state": "--seed", "checkpoint": "--resume", "normalize": "--normalize", "regularizers": "--plan"},
    **{name: f"--{name}" for name in ("noise", "dropout", "nonnegative")},
}


def in_options(text: str) -> str:
    """Return an error message of the models with keywords replaced by options.

    >>> in_options("patience= needs validation data: write valid=0.2, or valid=(X, y)")
    '--patience needs validation data: write --valid 0.2, or --valid and a file'
    >>> in_options("nonnegative={'strength': 1.0, 'per': 'in'}: write dict(strength=1e-4)")
    '--nonnegative strength=1.0,per=in: write strength=1e-4'
    """
    for python, words in _IN_PYTHON.items():
        text = text.replace(python, words)
    text = re.sub(r"(?:\ba )?\bdict\(([^()]*)\)", lambda found: _typed(found[1]), text)
    text = re.sub(r"^(\w+)=(\{[^{}]*\}): ", _typed_dict, text)
    text = re.sub(r"(?<![\w,=-])(\w+)=('[^']*'|[^\s,;:)'\[{(]+)?", _as_option, text)
    return text


def _typed(settings: str) -> str:
    pairs = [pair.strip().partition("=") for pair in settings.split(",")]
    return ",".join(f"{key}={value.strip(chr(39)) or '...'}" for key, _, value in pairs)


def _typed_dict(found: re.Match[str]) -> str:
    try:
        settings = ast.literal_eval(found[2])
    except (ValueError, SyntaxError):
        return found[0]
    keyword = _OPTIONS[found[1]] + " " if found[1] in _OPTIONS else f"--set {found[1]}="
    return f"{keyword}{','.join(f'{key}={value}' for key, value in settings.items())}: "


def _as_option(found: re.Match[str]) -> str:
    if found[1] not in _OPTIONS:
        return found[0]
    return f"{_OPTIONS[found[1]]}{' ' * bool(found[2])}{(found[2] or '').strip(chr(39))}"
