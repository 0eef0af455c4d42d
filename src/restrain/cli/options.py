"""The options of `restrain fit`: how each is read, and which keyword of the models it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

TRAINING: dict[str, tuple[Any, str]] = {
    "algo": (str, "A torch optimizer, such as adam (the default), sgd, nag, rmsprop, lbfgs."),
    "learning_rate": (click.FloatRange(min=0), "The optimizer's own, unless given."),
    "momentum": (click.FloatRange(0, 1, max_open=True), "For the optimizers that have one."),
    "batch_size": (click.IntRange(min=1), "Rows a step; 64, unless given."),
    "epochs": (click.IntRange(min=1), "How often each row is seen at most; 100, unless given."),
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


class Amount(click.ParamType[Any]):
    """A number, zero or more, or settings such as `strength=1e-4,on=hid1.weight,how=proximal`."""

    name = "number|k=v,..."

    def __init__(self, below: float | None = None) -> None:
        self.below = below

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        if "=" not in value:
            return self._number(value, param, ctx)
        settings: dict[str, Any] = {}
        for part in value.split(","):
            key, equals, text = (piece.strip() for piece in part.partition("="))
            if not (key and equals and text):
                self.fail(f"expected a number, or k=v,k=v as in strength=1e-4,on=hid1.weight; got {value!r}", param)
            settings[key] = _plain(text)
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


class Valid(click.ParamType[Any]):
    """A part of the rows, or a file."""

    name = "part|file"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
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
    """A keyword of the model and its value, in JSON or else text."""

    name = "keyword=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        key, equals, text = str(value).partition("=")
        if not (equals and key.strip().isidentifier()):
            self.fail(f"expected keyword=value, as in grouplasso=1e-3; got {value!r}", param, ctx)
        return key.strip(), _plain(text.strip())


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def keyword_options(command: Command) -> Command:
    """Every option that is a keyword of the models."""
    for name, (kind, text) in reversed(TRAINING.items()):
        command = click.option(_flag(name), type=kind, help=text)(command)
    for name, text in reversed(RULES.items()):
        command = click.option(_flag(name), type=Amount(1.0 if "dropout" in name else None), help=text)(command)
    return command


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def keywords_of(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a model that the options of `restrain fit` say.

    Raises:
        click.UsageError: two that exclude each other.
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
    """Names of columns, comma-separated or repeated, which must be there.

    Raises:
        click.BadParameter: there is no such column.
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
