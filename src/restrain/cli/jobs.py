"""What `restrain fit` and `restrain predict` do, apart from reading the command line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from restrain import storage
from restrain.cli import tables
from restrain.cli.encoding import Encoding
from restrain.cli.tables import Table
from restrain.errors import DataError
from restrain.models import files, held_back, load, warn_of_unheld


@dataclass
class Data:
    """What a model trains on: inputs, targets (None for an Autoencoder), and rows to train on and to validate with."""

    encoding: Encoding
    x: Any
    y: Any
    train: Any
    valid: Any

    def part(self, rows: Any) -> Any:
        """Inputs and targets of some rows, as `fit` takes them for validation."""
        return self.x[rows] if self.y is None else (self.x[rows], self.y[rows])


# ---------------------------------------------------------------- targets


def labels(table: Table, name: str) -> Any:
    """The classes in a column: text, or whole numbers.

    Raises:
        DataError: a class is missing, or the numbers look like quantities.
    """
    values = table.column(name)
    if values.dtype == object:
        return np.array(_all_there(table, name, values), str)
    if values.dtype.kind == "f":
        _all_there(table, name, values)
        odd = np.flatnonzero(values != np.trunc(values))
        if len(odd):
            raise table.fault(
                name,
                int(odd[0]),
                f"expected a class, text or a whole number, got {float(values[odd[0]])!r}; for numbers "
                "write --model regressor",
            )
        values = values.astype(np.int64)
    count = len(np.unique(values))
    if values.dtype.kind != "b" and count > 20 and 2 * count > len(values):
        raise DataError(
            f"{table.source}: the target {name!r} has {count} different numbers in {len(values)} rows, too many for "
            "classes; for numbers write --model regressor"
        )
    return values


def quantities(table: Table, names: Sequence[str]) -> Any:
    """The numbers of the target columns: one axis for one column, else (rows, columns).

    Raises:
        DataError: one is missing, or isn't a number.
    """
    columns = [_all_there(table, name, table.numbers(name)) for name in names]
    return columns[0] if len(columns) == 1 else np.stack(columns, 1)


def _all_there(table: Table, name: str, values: Any) -> Any:
    gone = np.flatnonzero([value is None or value != value for value in values])
    if len(gone):
        raise table.fault(name, int(gone[0]), f"the target is missing (and in {len(gone) - 1} other rows)")
    return values


def targets(table: Table, model: str, names: Sequence[str]) -> Any:
    """What a model of that kind is to predict."""
    if model == "autoencoder":
        return None
    return labels(table, names[0]) if model == "classifier" else quantities(table, names)


# ---------------------------------------------------------------- fit


def split(count: int, part: float, seed: int, y: Any = None) -> tuple[Any, Any]:
    """Rows to train on and rows to validate with, drawn by the seed; of classes, each in its proportion.

    Args:
        count: of rows.
        part: the part to validate with.
        seed: of the draw.
        y: classes, or None.

    Raises:
        DataError: one of them would be empty.
    """
    held = round(part * count)
    if not 0 < held < count:
        raise DataError(f"--valid {part:g} of {count} rows leaves none to validate with, or none to train on")
    order = np.random.default_rng(seed).permutation(count)
    if y is None:
        return held_back(order, held)
    names, kinds = np.unique(y, return_inverse=True)
    train, valid = held_back(order, held, kinds)
    warn_of_unheld(kinds, kinds[valid], names)
    return train, valid


def prepare(
    table: Table, features: Sequence[str], y: Any, *, valid: float | None, seed: int, classes: bool, **learning: Any
) -> Data:
    """Inputs and targets as numbers.

    Args:
        table: all rows.
        features: the names of the columns that are inputs.
        y: the targets.
        valid: the part to validate with, or None.
        seed: of the split.
        classes: whether the targets are classes.
        learning: categories and missing, as in `Encoding.learn`.

    Raises:
        DataError: a column that can't be a feature as it is.
    """
    train, held = np.arange(len(table)), None
    if valid is not None:
        train, held = split(len(table), valid, seed, y if classes else None)
    encoding = Encoding.learn(table, features, rows=train, **learning)
    return Data(encoding, encoding.apply(table), y, train, held)


def fit(model: Any, data: Data, other: Any = None) -> dict[str, float]:
    """Train the model; its score on the training rows, and on those to validate with.

    Args:
        model: an estimator.
        data: what to train on.
        other: validation data of a file of their own, as `Data.part` gives them.
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
    """A model on file, with what `restrain fit` noted beside it."""

    model: Any
    encoding: Encoding
    notes: dict[str, Any]
    file: Path

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """The run in a folder.

        Raises:
            FileNotFoundError, FileError: as in `rs.load`.
            DataError: the model wasn't made by `restrain fit`.
        """
        model, notes = load(path), files.read_notes(path)
        if "encoding" not in notes:
            raise DataError(
                f"{path} is a model, but was not made by `restrain fit`: it doesn't know the columns of a table; use "
                "rs.load(path).predict(X) instead"
            )
        return cls(model, Encoding.from_dict(notes["encoding"]), notes, files.place(path))

    def read(self, path: str | Path, separator: str | None) -> Table:
        """A table whose text columns are those of the training."""
        texts = [*self.encoding.categories, *(self.notes["targets"] if self.notes["text_target"] else [])]
        return tables.read(path, texts, separator)

    def unused(self, table: Table) -> list[str]:
        """Columns that the model neither takes nor predicts."""
        known = {*self.notes["targets"], *self.notes["ignored"], *(f.name for f in self.encoding.features)}
        return [name for name in table.columns if name not in known]

    def predict(self, x: Any, probabilities: bool = False, code: bool = False) -> dict[str, Any]:
        """Columns of predictions by name."""
        if code:
            codes = self.model.transform(x)
            return _columns([f"code[{number}]" for number in range(codes.shape[1])], codes)
        found = self.model.predict(x)
        if self.notes["model"] == "autoencoder":
            return _columns(self.encoding.columns, found)
        columns = _columns(self.notes["targets"], found.reshape(len(x), -1))
        if probabilities:
            names = [f"p({label})" for label in self.model.classes_]
            columns |= _columns(names, self.model.predict_proba(x))
        return columns

    def score(self, table: Table, x: Any) -> str | None:
        """How well the targets in the table are predicted, as text; None where it has none."""
        names = self.notes["targets"]
        if not names or any(name not in table.columns for name in names):
            return None
        y = targets(table, self.notes["model"], names)
        return f"{measure(self.notes['model'])} {self.model.score(x, y):.4f} on {len(x)} rows"


def measure(model: str) -> str:
    """What `score` is called."""
    return "accuracy" if model == "classifier" else "R²"


def _columns(names: Iterable[str], matrix: Any) -> dict[str, Any]:
    return dict(zip(names, matrix.T, strict=True))


def write(columns: Mapping[str, Any], path: Path | None, stream: IO[str]) -> None:
    """Write columns to a .csv, .tsv, .parquet or .npz file, or as CSV to the stream.

    Raises:
        DataError: another ending.
        FileAccessError: there is no such folder, no space or no permission; the old file is as it was.
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
    text.detach()  # flushes it, and leaves the file open


def _write_parquet(arrays: Mapping[str, Any], file: BinaryIO) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(dict(arrays)), file)


def _write_csv(columns: Mapping[str, Any], stream: IO[str], separator: str) -> None:
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True))
