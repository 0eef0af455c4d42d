"""Work of `restrain fit` and `restrain predict`, once the command line is parsed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from restrain import storage
from restrain.cli import tables
from restrain.errors import DataError
from restrain.models import Autoencoder, Classifier, files, give_up, held_back, load, losses, specs, warn_of_unheld
from restrain.tables import Encoding, Feature, Table, as_texts, counted, parsed, spelling


@dataclass
class Data:
    """Training data: inputs, targets (None for an autoencoder), training and validation rows."""

    encoding: Encoding
    x: Any
    y: Any
    train: Any
    valid: Any

    def part(self, rows: Any) -> Any:
        """Return inputs and targets of some rows, in the form of `fit`'s argument `valid`."""
        return self.x[rows] if self.y is None else (self.x[rows], self.y[rows])


# ---------------------------------------------------------------- targets


def labels(table: Table, name: str, known: Any = None) -> Any:
    """Return the classes in a column as text, whole numbers or booleans.

    Args:
        table: the table.
        name: the column's name.
        known: classes of the training data; equal values (by `restrain.cli.spelling`) are replaced
            by them.

    Raises:
        DataError: a class is missing or of another kind than `known`, or the numbers look like
            quantities.
    """
    texts = _all_there(table, name, table.texts(name))
    if known is None:
        return _learned_labels(table, name, texts)
    shown = as_texts(known) if known.dtype.kind in "biuf" else known.astype(object)
    match, places = spelling.matcher(shown.tolist()), {text: number for number, text in enumerate(shown.tolist())}
    whole = known.dtype.kind in "iu"
    found = np.array([match(_whole(text) if whole else text) for text in texts.tolist()], object)
    strays = [row for row, text in enumerate(found.tolist()) if text not in places]
    if strays and known.dtype.kind not in "OU":
        if not (whole and all(_WHOLE.fullmatch(found[row]) for row in strays)):
            raise table.fault(name, strays[0], f"expected one of the classes {_shown(shown)}, got {texts[strays[0]]!r}")
        return np.array([int(text) for text in found.tolist()])
    return found.astype(str) if known.dtype.kind in "OU" else known[[places[text] for text in found.tolist()]]


_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # fits into int64
_LEADING_ZERO = re.compile(r"-?0[0-9]")


def _whole(text: str) -> str:
    """Return the digits of a whole number, such as 100 for 1e2 and 100.0; other texts unchanged."""
    text = spelling.canonical(text)
    if _WHOLE.fullmatch(text) or _LEADING_ZERO.match(text):
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if abs(number) < 2**53 and number.is_integer() else text


def _shown(names: Any) -> str:
    return ", ".join(names[:12].tolist()) + (", …" if len(names) > 12 else "")


def _learned_labels(table: Table, name: str, texts: Any) -> Any:
    values = [_whole(text) for text in texts.tolist()]
    numbers, distinct = parsed(texts), set(values)
    if {text.lower() for text in distinct} <= {"true", "false"}:
        return np.array([text.lower() == "true" for text in values])
    if np.isnan(numbers).any() or any(_LEADING_ZERO.match(text) for text in distinct):
        return np.array([spelling.canonical(text) for text in texts.tolist()], str)
    odd = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.trunc(numbers)))
    if len(odd):
        raise table.fault(
            name,
            int(odd[0]),
            f"expected a class, text or a whole number, got {float(numbers[odd[0]])!r}; for numbers write "
            "--model regressor",
        )
    if len(distinct) > 20 and 4 * len(distinct) > len(values):
        raise DataError(
            f"{table.source}: the target {name!r} has {len(distinct)} different numbers in {len(values)} rows, too "
            "many for classes; for numbers write --model regressor"
        )
    return np.array(values, np.int64 if all(map(_WHOLE.fullmatch, values)) else str)


def quantities(table: Table, names: Sequence[str]) -> Any:
    """Return the numbers of the target columns: one axis for one column, else (rows, columns).

    Raises:
        DataError: a target is missing, or isn't a number.
    """
    columns = [_all_there(table, name, table.numbers(name)) for name in names]
    return columns[0] if len(columns) == 1 else np.stack(columns, 1)


def _all_there(table: Table, name: str, values: Any) -> Any:
    gone = np.flatnonzero([value is None or value != value for value in values])
    if len(gone):
        more = f" (and in {counted(len(gone) - 1, 'other row')})" if len(gone) > 1 else ""
        raise table.fault(name, int(gone[0]), f"the target is missing{more}; fill it in, or leave these rows out")
    return values


def targets(table: Table, model: str, names: Sequence[str], known: Any = None) -> Any:
    """Return the targets for a kind of model, None for an autoencoder; `known` as in `labels`."""
    if model == "autoencoder":
        return None
    return labels(table, names[0], known) if model == "classifier" else quantities(table, names)


# ---------------------------------------------------------------- fit


def complete(table: Table, names: Sequence[str]) -> tuple[Table, str]:
    """Return the rows without missing values in some columns, and what was left out, as text.

    Raises:
        DataError: no row is left.
    """
    gone = {name: table.missing(name) for name in names}
    rows = np.flatnonzero(~np.any(list(gone.values()), axis=0)) if gone else np.arange(len(table))
    lost = len(table) - len(rows)
    where = ", ".join(f"{int(mask.sum())} in {name!r}" for name, mask in gone.items() if mask.any())
    if not len(rows):
        raise DataError(f"{table.source}: each row has a missing value ({where}); write --missing fill, or --ignore")
    said = f"left out: {lost} of {counted(len(table), 'row')} with missing values ({where})" if lost else ""
    return (table.part(rows) if lost else table), said


def split(count: int, part: float, seed: int, y: Any = None, *, quiet: bool = False) -> tuple[Any, Any]:
    """Return (training rows, validation rows), drawn at random.

    Args:
        count: the number of rows.
        part: the fraction of rows to validate with.
        seed: the seed of the draw.
        y: classes, for a split that keeps their proportions; or None.
        quiet: don't warn of classes without a row to validate with.

    Raises:
        DataError: there would be no training rows or no validation rows.
    """
    held = round(part * count)
    if not 0 < held < count:
        raise DataError(
            f"--valid {part:g} of {counted(count, 'row')} leaves none to validate with, or none to train on"
        )
    order = np.random.default_rng(seed).permutation(count)
    if y is None:
        return held_back(order, held)
    names, kinds = np.unique(y, return_inverse=True)
    train, valid = held_back(order, held, kinds)
    if not quiet:
        warn_of_unheld(kinds, kinds[valid], names)
    return train, valid


def prepare(
    table: Table,
    features: Sequence[str],
    y: Any,
    *,
    valid: float | None,
    seed: int,
    classes: bool,
    quiet: bool = False,
    **learning: Any,
) -> Data:
    """Return inputs and targets as numbers.

    Args:
        table: all rows.
        features: the names of the input columns.
        y: the targets.
        valid: the fraction of rows to validate with, or None.
        seed: the seed of the split.
        classes: True if the targets are classes.
        quiet: as in `split`.
        learning: categories and missing, as in `Encoding.learn`.

    Raises:
        DataError: a column can't be a feature without a change.
    """
    train, held = np.arange(len(table)), None
    if valid is not None:
        train, held = split(len(table), valid, seed, y if classes else None, quiet=quiet)
    encoding = Encoding.learn(table, features, rows=train, **learning)
    return Data(encoding, encoding.apply(table), y, train, held)


def fit(model: Any, data: Data, other: Any = None) -> dict[str, float]:
    """Train the model, and return its scores on the training and validation rows.

    Args:
        model: an estimator.
        data: training data.
        other: validation data from another file, in the form of `Data.part`.
    """
    held = other if other is not None else None if data.valid is None else data.part(data.valid)
    every = data.valid is None
    x = data.x if every else data.x[data.train]
    y = None if data.y is None else data.y if every else data.y[data.train]
    model.fit(x, y, valid=held)
    scores = {"training": float(model.score(x, y))}
    if held is not None:
        scores["validation"] = float(model.score(*held) if isinstance(held, tuple) else model.score(held))
    return scores


# ---------------------------------------------------------------- predict


@dataclass
class Run:
    """A model loaded from its file, with the notes of `restrain fit`.

    Args:
        model: takes inputs encoded by `encoding`.
        encoding: of the columns of a table.
        notes: kind of the model, columns that are targets, and what else is known of the training;
            of a model that was fitted in Python "rows" and "data" are None.
        file: the model's.
        named: False if the model was fitted to arrays, whose columns have no names.
    """

    model: Any
    encoding: Encoding
    notes: dict[str, Any]
    file: Path
    named: bool = True

    @classmethod
    def load(cls, path: str | Path, target: Sequence[str] = ()) -> Run:
        """Return the run that a folder holds, or a model that was saved in Python.

        Args:
            path: the folder or file.
            target: columns with the targets, where the model doesn't know them.

        Raises:
            FileNotFoundError, FileError: as in `rs.load`.
            DataError: the model reads no tables, or was fitted to other targets.
        """
        model, notes, file = load(path), files.read_notes(path), files.place(path)
        if "encoding" not in notes:
            return _of_python(model, file, list(target))
        if target and list(target) != notes["targets"]:
            raise DataError(
                f"{file} was fitted to the target {', '.join(notes['targets']) or 'nothing'}: leave out --target"
            )
        give_up(model)
        return cls(model, Encoding.from_dict(notes["encoding"]), notes, file)

    def read(self, path: str | Path | Sequence[Path], marks: tables.Marks) -> Table:
        """Return the table in files; columns that were text in training are read as text.

        Raises:
            DataError: the model knows no names of columns, and the table has other names than x0,
                x1, ...
        """
        texts = [*self.encoding.categories, *(self.notes["targets"] if self.notes["model"] == "classifier" else [])]
        table = tables.read(path, texts, marks)
        return table if self.named else self._unnamed(table)

    def _unnamed(self, table: Table) -> Table:
        """Return the table with its columns called x0, x1, ..., if these are those of an array.

        Raises:
            DataError: nothing says which column is which.
        """
        wanted = [feature.name for feature in self.encoding.features]
        arrays = {name.partition("[")[0] for name in table.columns if name.endswith("]")}
        for array in arrays:  # as .npz files have them
            own = [name for name in table.columns if name.startswith(f"{array}[")]
            if own == [f"{array}[{number}]" for number in range(len(wanted))]:
                given = dict(zip(own, wanted, strict=True))
                return replace(table, columns={given.get(name, name): values for name, values in table.columns.items()})
        if not set(wanted) <= set(table.columns):
            ends = wanted[0] if len(wanted) == 1 else f"{wanted[0]} to {wanted[-1]}"
            raise DataError(
                f"{self.file} was fitted in Python to an array of {counted(len(wanted), 'column')} without names, so "
                f"nothing says which columns of {table.source} these are: fit it to a data frame, or call them {ends}"
            )
        return table

    def unused(self, table: Table) -> list[str]:
        """Return the columns that the model neither takes nor predicts."""
        known = {*self.notes["targets"], *self.notes["ignored"], *(f.name for f in self.encoding.features)}
        return [name for name in table.columns if name not in known]

    def predict(self, x: Any, probabilities: bool = False, code: bool = False) -> dict[str, Any]:
        """Return {column name: predictions}."""
        if code:
            codes = self.model.transform(x)
            return _columns([f"code[{number}]" for number in range(codes.shape[1])], codes)
        found = self.model.predict(x)
        if self.notes["model"] == "autoencoder":
            return _columns(self.encoding.columns, found)
        found = found.reshape(len(x), -1)
        columns = _columns(self._names(found.shape[1]), found)
        if probabilities:
            names = [f"p({label})" for label in self.model.classes_]
            columns |= _columns(names, self.model.predict_proba(x))
        return columns

    def _names(self, count: int) -> list[str]:
        """Return the names of columns of predictions: of the targets, if there are as many."""
        own = self.notes["targets"]
        if len(own) == count:
            return list(own)
        name, loss = own[0] if len(own) == 1 else "prediction", self.model.loss_function()
        if isinstance(loss, losses.Quantile) and len(loss.quantiles) == count:
            return [f"{name}[{q:g}]" for q in loss.quantiles]
        return [name] if count == 1 else [f"{name}[{number}]" for number in range(count)]

    def score(self, table: Table, x: Any) -> str | None:
        """Return the score on the table's targets, as text; None if it has no targets."""
        names = self.notes["targets"]
        if not names or any(name not in table.columns for name in names):
            return None
        y = targets(table, self.notes["model"], names, getattr(self.model, "classes_", None))
        return f"{measure(self.model)} {self.model.score(x, y):.4f} on {counted(len(x), 'row')}"


def _of_python(model: Any, file: Path, target: list[str]) -> Run:
    """Return the run of a model that was fitted and saved in Python.

    Raises:
        DataError: it reads sequences.
    """
    if specs.steps(model.layers_):
        raise DataError(f"{file} reads sequences, and a table has one row a sample: use rs.load(path).predict(X)")
    names, named = vars(model).get("feature_names_in_"), True
    encoder = give_up(model)
    if encoder is None:
        named = names is not None
        names = model.input_names_ if names is None else names
        encoding = Encoding(tuple(Feature(str(name)) for name in names))
        vars(model).pop("feature_names_in_", None)
    else:
        encoding = encoder.encoding_
    kind = next(word for cls, word in _KINDS.items() if isinstance(model, cls))
    if target and kind == "autoencoder":
        raise DataError(f"{file} is an autoencoder, which has no target: leave out --target")
    notes: dict[str, Any] = {"model": kind, "targets": target, "ignored": [], "rows": None, "data": None, "scores": {}}
    return Run(model, encoding, notes, file, named)


_KINDS = {Autoencoder: "autoencoder", Classifier: "classifier", object: "regressor"}


def measure(model: Any) -> str:
    """Return the name of the score of a model."""
    if isinstance(model, Classifier):
        return "accuracy"
    if isinstance(model, Autoencoder):
        return "R²"
    loss = model.loss_function()
    if isinstance(loss, losses.Cox):
        return "concordance"
    return "R²" if loss.by_r2 else "minus the loss" if isinstance(loss, losses.MeanDiscrepancy | losses.Own) else "D²"


def _columns(names: Iterable[str], matrix: Any) -> dict[str, Any]:
    return dict(zip(names, matrix.T, strict=True))


def write(columns: Mapping[str, Any], path: Path | None, stream: IO[str]) -> None:
    """Write columns to a .csv, .tsv, .parquet or .npz file, or as CSV to the stream.

    Raises:
        DataError: the file has another ending.
        FileAccessError: there is no such folder, no space or no permission; an old file remains.
    """
    if path is None:
        _write_csv(columns, stream, ",")
        return
    ending, arrays = path.suffix.lower(), {name: np.asarray(values) for name, values in columns.items()}
    writers: dict[str, Callable[[BinaryIO], Any]] = {
        ".csv": lambda file: _write_text(columns, file, ","),
        ".tsv": lambda file: _write_text(columns, file, "\t"),
        ".npz": lambda file: np.savez(file, **arrays),  # type: ignore[arg-type]
        ".parquet": lambda file: _write_parquet(arrays, file),
        ".pq": lambda file: _write_parquet(arrays, file),
    }
    if ending not in writers:
        raise DataError(f"predictions are written to .csv, .tsv, .parquet or .npz; got {path.name!r}")
    storage.write(path, writers[ending])


def _write_text(columns: Mapping[str, Any], file: BinaryIO, separator: str) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    _write_csv(columns, text, separator)
    text.detach()  # flushes the text, and keeps the file open


def _write_parquet(arrays: Mapping[str, Any], file: BinaryIO) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(dict(arrays)), file)


def _write_csv(columns: Mapping[str, Any], stream: IO[str], separator: str) -> None:
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True))
