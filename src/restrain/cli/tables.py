"""Tables from files: CSV, Parquet and .npz as named columns, each of numbers or of text. Needs pandas and pyarrow.

Rows are counted from 1, without the header, in everything that is said of them.
"""

from __future__ import annotations

import decimal
import gzip
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from restrain import storage
from restrain.errors import DataError, RestrainError

_NAMED = "CSV (.csv, .tsv, .csv.gz), Parquet (.parquet) or NumPy (.npz)"


@dataclass
class Table:
    """Named columns of one length: arrays of numbers (NaN is missing), or of text (None is missing)."""

    source: str
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> Any:
        """The column of that name.

        Raises:
            DataError: there is none.
        """
        if name not in self.columns:
            near = get_close_matches(name, self.columns)
            hint = f" (near it: {', '.join(near)})" if near else ""
            raise DataError(f"{self.source}: no column is called {name!r}{hint}; there are: {_listed(self.columns)}")
        return self.columns[name]

    def numbers(self, name: str) -> Any:
        """The column in float64; missing values are NaN.

        Raises:
            DataError: there is text, or an infinite number.
        """
        values = self.column(name)
        if values.dtype == object:
            numbers = parsed(values)
            self._refuse(name, np.array([v is not None for v in values]) & np.isnan(numbers), "a number")
            values = numbers
        values = values.astype(np.float64)
        self._refuse(name, np.isinf(values), "a finite number")
        return values

    def texts(self, name: str) -> Any:
        """The column as text; missing values are None. Whole numbers are written without a point."""
        values = self.column(name)
        return values if values.dtype == object else as_texts(values)

    def _refuse(self, name: str, wrong: Any, wanted: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise self.fault(name, row, f"expected {wanted}, got {self.columns[name][row : row + 1].tolist()[0]!r}")

    def fault(self, name: str, row: int, what: str) -> DataError:
        """The error that says what is wrong in a row (counted from 0 here)."""
        return DataError(f"{self.source}, row {row + 1}, column {name!r}: {what}")


def parsed(texts: Any) -> Any:
    """Numbers of texts; NaN where there is none."""
    import pandas

    return pandas.to_numeric(pandas.Series(texts, dtype=object), errors="coerce").to_numpy(np.float64)


def as_texts(values: Any) -> Any:
    """Numbers as text: whole ones without a point, NaN as None."""
    found = np.empty(len(values), object)
    found[:] = [
        None if v != v else str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values.tolist()
    ]
    return found


def _listed(names: Collection[str], shown: int = 12) -> str:
    members = list(names)
    return ", ".join(members[:shown]) + (f", … {len(members) - shown} more" if len(members) > shown else "")


def read(path: str | Path, texts: Sequence[str] = (), separator: str | None = None) -> Table:
    """The table in a file.

    Args:
        path: its ending says the format.
        texts: columns of a CSV file that are text, even where they look like numbers.
        separator: between the values of a CSV file; a comma, or in .tsv a tab.

    Raises:
        DataError: it isn't such a file, or holds what isn't a table of numbers and text.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    formats = {".csv": (_read_csv, "CSV"), ".npz": (_read_npz, ".npz"), ".parquet": (_read_parquet, "Parquet")}
    formats |= {".tsv": formats[".csv"], ".pq": formats[".parquet"]}
    if Path(name).suffix not in formats:
        raise DataError(f"{path}: a table is {_NAMED}")
    reader, kind = formats[Path(name).suffix]
    storage.written_at(path)  # refuses what isn't there, or can't be opened
    try:
        _check_size(path, name)
        columns = dict(reader(path, list(texts), separator))
    except RestrainError:
        raise
    except Exception as error:  # whatever pandas, pyarrow, NumPy, gzip and zip raise of what isn't a table
        raise DataError(f"{path} can't be read as {kind}: {_first_line(error)}; save it anew as {_NAMED}") from error
    table = Table(str(path), columns)
    if not columns or not len(table):
        raise DataError(f"{path}: there are no {'rows' if columns else 'columns'}")
    return table


# ---------------------------------------------------------------- formats

_SMALL, _RATIO = 2**28, 1000  # bytes that any file may unpack to; times its size that a larger one may


def _check_size(path: Path, name: str) -> None:
    """Refuse a small file that unpacks to a huge table, before anything is unpacked into memory.

    Raises:
        DataError: so it is.
    """
    most = max(_SMALL, _RATIO * path.stat().st_size)
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            size = sum(len(block) for block in iter(lambda: stream.read(2**20), b"")) if most == _SMALL else 0
    elif name.endswith((".parquet", ".pq")):
        from pyarrow import parquet

        about = parquet.ParquetFile(path).metadata
        size = 8 * about.num_rows * about.num_columns
    elif name.endswith(".npz") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    else:
        return
    if size > most:
        raise DataError(f"{path} unpacks to {size:,} bytes, and has {path.stat().st_size:,}: save it in parts")


def _read_csv(path: Path, texts: list[str], separator: str | None) -> Iterator[tuple[str, Any]]:
    import pandas

    separator = separator or ("\t" if ".tsv" in path.name.lower() else ",")
    options: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "index_col": False, "low_memory": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            header = pandas.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, **options)
            names = header.iloc[0].tolist()
            types = dict.fromkeys([name for name in texts if name in names], "object")
            frame = pandas.read_csv(path, dtype=types, **options)
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{path}: the file is empty") from error
    except (pandas.errors.ParserError, pandas.errors.ParserWarning, UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{path} can't be read as CSV separated by {separator!r}: {_first_line(error)}") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; give each a name of its own")
    if len(names) == 1 and any(other in names[0] for other in ";\t|"):
        other = next(other for other in ";\t|" if other in names[0])
        raise DataError(f"{path}: only one column, called {names[0]!r}; write --separator {other!r}")
    return _typed(path, frame)


def _read_parquet(path: Path, texts: list[str], separator: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        frame = parquet.read_table(path).to_pandas(ignore_metadata=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as Parquet: {_first_line(error)}") from error
    return _typed(path, frame)


def _read_npz(path: Path, texts: list[str], separator: str | None) -> Iterator[tuple[str, Any]]:
    """Arrays of one axis are columns, those of two are columns `x[0]`, `x[1]` and so on."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib, struct and value errors of a file that isn't one
        raise DataError(f"{path} can't be read as .npz: {_first_line(error)}") from error
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{path}: all arrays have the same number of rows; got {said}")
    for name, array in arrays.items():
        if array.ndim not in (1, 2):
            raise DataError(f"{path}: {name!r} has the shape {array.shape}; expected one axis or two")
        for number in range(array.shape[1] if array.ndim == 2 else 0):
            yield f"{name}[{number}]", _plain(path, f"{name}[{number}]", array[:, number])
        if array.ndim == 1:
            yield name, _plain(path, name, array)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- types


def _typed(path: Path, frame: Any) -> Iterator[tuple[str, Any]]:
    for name in frame.columns:
        series = frame[name]
        if str(series.dtype) == "category":
            series = series.astype(series.cat.categories.dtype)
        if str(series.dtype) in ("str", "string", "object"):
            yield str(name), _objects(path, str(name), series.to_numpy(object), series.isna().to_numpy())
        elif series.isna().any():
            kind = getattr(series.dtype, "kind", "O")
            values = series.to_numpy(np.float64, na_value=np.nan) if kind in "biuf" else series.to_numpy()
            yield str(name), _plain(path, str(name), values)
        else:
            yield str(name), _plain(path, str(name), series.to_numpy())


def _plain(path: Path, name: str, values: Any) -> Any:
    if values.dtype.kind in "biuf":
        return values
    if values.dtype.kind in "USO":
        values = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
        return _objects(path, name, values.astype(object), np.array([v == "" or v is None for v in values], bool))
    raise DataError(
        f"{path}: the column {name!r} is of type {values.dtype}; turn it into numbers or text, or leave it out: "
        f"--ignore {name!r}"
    )


def _objects(path: Path, name: str, values: Any, missing: Any) -> Any:
    """Numbers, where all that are there are numbers; else texts."""
    there = [value for value, gone in zip(values, missing, strict=True) if not gone]
    kinds = (bool, int, float, decimal.Decimal, np.generic)
    if there and all(isinstance(value, kinds) and not isinstance(value, str) for value in there):
        numbers = np.full(len(values), np.nan)
        numbers[~missing] = np.array(there, np.float64)
        return numbers
    for row, (value, gone) in enumerate(zip(values, missing, strict=True)):
        if not gone and not isinstance(value, (str, *kinds)):
            raise DataError(f"{path}, row {row + 1}, column {name!r}: expected a number or text, got {value!r:.60}")
    found = np.empty(len(values), object)
    found[:] = [None if gone else str(value) for value, gone in zip(values, missing, strict=True)]
    return found
