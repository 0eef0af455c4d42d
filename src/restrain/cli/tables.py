"""Tables from files: CSV, Parquet and .npz as named columns of numbers or text.

Needs pandas and pyarrow. Messages count rows from 1, without the header.
"""

from __future__ import annotations

import decimal
import gzip
import re
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from restrain import storage
from restrain.cli import spelling
from restrain.errors import DataError, RestrainError

_NAMED = "CSV (.csv, .tsv, .txt, .csv.gz), Parquet (.parquet) or NumPy (.npz)"
_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
_SEPARATORS = "\t;,|"


@dataclass(frozen=True)
class Marks:
    """Special characters of a CSV file.

    Args:
        separator: the character between values. None means a tab in .tsv, the most frequent
            candidate of the header in .txt, else a comma.
        decimal: the character before the fraction of a number.
        thousands: the character between groups of three digits, or "".
    """

    separator: str | None = None
    decimal: str = "."
    thousands: str = ""

    def __post_init__(self) -> None:
        if self.decimal == self.thousands:
            raise DataError(
                f"decimals and thousands can't both be marked by {self.decimal!r}: as in 1.000,5 write "
                "--decimal , --thousands ."
            )


@dataclass
class Table:
    """Named columns of equal length: numbers (NaN if missing), or text (None if missing)."""

    source: str
    columns: dict[str, Any]
    marks: Marks = Marks()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> Any:
        """Return the column of a name.

        Raises:
            DataError: there is no such column; the message lists similar names.
        """
        if name not in self.columns:
            near = get_close_matches(name, self.columns)
            hint = f" (near it: {', '.join(near)})" if near else ""
            raise DataError(f"{self.source}: no column is called {name!r}{hint}; there are: {_listed(self.columns)}")
        return self.columns[name]

    def numbers(self, name: str) -> Any:
        """Return the column in float64; missing values are NaN.

        Raises:
            DataError: the column holds text, or an infinite number.
        """
        values = self.column(name)
        if values.dtype == object:
            numbers = self.parsed(values)
            self._refuse(name, np.array([v is not None for v in values]) & np.isnan(numbers), "a number")
            values = numbers
        values = values.astype(np.float64)
        self._refuse(name, np.isinf(values), "a finite number")
        return values

    def texts(self, name: str) -> Any:
        """Return the column as text, numbers in canonical spelling; missing values are None."""
        values = self.column(name)
        return values if values.dtype == object else as_texts(values)

    def parsed(self, texts: Any) -> Any:
        """Return texts as float64; NaN for None, and for texts that aren't numbers in these marks.

        The marks are the table's `marks`.
        """
        if self.marks.decimal == "." and not self.marks.thousands:
            return parsed(texts)
        read = spelling.reader(self.marks.decimal, self.marks.thousands)
        return np.array([np.nan if text is None else read(text) for text in texts])

    def _refuse(self, name: str, wrong: Any, wanted: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            got = self.columns[name][row : row + 1].tolist()[0]
            texts = self.columns[name][wrong].tolist() if isinstance(got, str) else []
            hint = spelling.way_out(texts, self.marks.decimal)
            raise self.fault(name, row, f"expected {wanted}, got {got!r}{'; ' * bool(hint)}{hint}")

    def fault(self, name: str, row: int, what: str) -> DataError:
        """Return the error that names a row (given from 0, shown from 1), a column and a fault."""
        return DataError(f"{self.source}, row {row + 1}, column {name!r}: {what}")


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: 1 row, 2 rows.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1200 rows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def parsed(texts: Any) -> Any:
    """Return texts as float64; NaN for texts that are no number."""
    import pandas

    return pandas.to_numeric(pandas.Series(texts, dtype=object), errors="coerce").to_numpy(np.float64)


def as_texts(values: Any) -> Any:
    """Return numbers as text in canonical spelling, NaN as None."""
    found = np.empty(len(values), object)
    found[:] = [None if v != v else spelling.canonical(f"{v:.0f}" if _is_whole(v) else str(v)) for v in values]
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and float(value).is_integer()


def _listed(names: Collection[str], shown: int = 12) -> str:
    members = list(names)
    return ", ".join(members[:shown]) + (f", … {len(members) - shown} more" if len(members) > shown else "")


def read(path: str | Path, texts: Sequence[str] = (), marks: Marks | None = None) -> Table:
    """Return the table in a file.

    Args:
        path: the file, whose ending determines the format.
        texts: columns of a CSV file that stay text even if all values look like numbers.
        marks: special characters of a CSV file; None for the defaults of `Marks`.

    Raises:
        DataError: the file has another format, or values other than numbers and text.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    formats = {".csv": (_read_csv, "CSV"), ".npz": (_read_npz, ".npz"), ".parquet": (_read_parquet, "Parquet")}
    formats |= {".tsv": formats[".csv"], ".txt": formats[".csv"], ".pq": formats[".parquet"]}
    if Path(name).suffix in _WORKBOOKS:
        raise DataError(
            f"{path} is a workbook, as Excel writes: export its sheet as CSV, or convert it in Python by "
            f"pandas.read_excel({path.name!r}).to_csv({path.stem + '.csv'!r}, index=False)"
        )
    if Path(name).suffix not in formats:
        raise DataError(f"{path}: a table is {_NAMED}")
    reader, kind = formats[Path(name).suffix]
    storage.written_at(path)  # raises if there is no such file, or it can't be opened
    try:
        _check_size(path, name)
        columns = dict(reader(path, list(texts), marks or Marks()))
    except RestrainError:
        raise
    except Exception as error:  # pandas, pyarrow, NumPy, gzip or zip, for a damaged file
        raise DataError(f"{path} can't be read as {kind}: {_first_line(error)}; save it anew as {_NAMED}") from error
    table = Table(str(path), columns, marks or Marks())
    if not columns or not len(table):
        raise DataError(f"{path}: there are no {'rows' if columns else 'columns'}")
    return table


# ---------------------------------------------------------------- formats

# A file may unpack to `_SMALL` bytes, or to `_RATIO` times its size
_SMALL, _RATIO = 2**28, 1000


def _check_size(path: Path, name: str) -> None:
    """Check that a small file doesn't unpack to a huge table, before it is unpacked into memory.

    Raises:
        DataError: the unpacked size is above the limits.
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


def _read_csv(path: Path, texts: list[str], marks: Marks) -> Iterator[tuple[str, Any]]:
    import pandas

    separator = _separator(path, marks)
    options: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "index_col": False, "low_memory": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            header = pandas.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, **options)
            names = header.iloc[0].tolist()
            types = dict.fromkeys([name for name in texts if name in names], "object")
            frame = pandas.read_csv(path, dtype=types, decimal=marks.decimal, **options)
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{path}: the file is empty") from error
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} can't be read as CSV separated by {separator!r}: {_told(path, error)}") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; give each a name of its own")
    if len(names) == 1 and any(other in names[0] for other in _SEPARATORS):
        other = next(other for other in _SEPARATORS if other in names[0])
        typed = "tab" if other == "\t" else repr(other)
        raise DataError(f"{path}: only one column, called {names[0]!r}; write --separator {typed}")
    read = Table(str(path), {}, marks).parsed
    for name, values in _typed(path, frame):
        if values.dtype != object or name in texts:
            yield name, values
            continue
        numbers = read(values)
        words = np.isnan(numbers) & np.array([value is not None for value in values], bool)
        yield name, values if words.any() else numbers


def _separator(path: Path, marks: Marks) -> str:
    if marks.separator is not None:
        return {"\\t": "\t", "tab": "\t"}.get(marks.separator.lower(), marks.separator)
    if ".txt" in path.name.lower():
        with _opened(path) as file:
            header = file.readline(2**16).decode("utf-8", "replace")
        return max(_SEPARATORS, key=header.count) if any(map(header.count, _SEPARATORS)) else ","
    return "\t" if ".tsv" in path.name.lower() else ","


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _told(path: Path, error: BaseException) -> str:
    """Return a description of the fault that pandas found in a CSV file, with its line."""
    said = str(error)
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(path)
    ragged = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", said)
    if ragged:
        expected, line, saw = ragged.groups()
        return f"line {line} has {counted(int(saw), 'value')}, and those before it {expected}; correct that line"
    if "Length of header" in said:
        return "its rows have more values than the header has names; correct the header"
    quote = re.search(r"EOF inside string starting at row (\d+)", said)
    if quote:
        return f"a quotation mark that opens at line {int(quote[1]) + 1} isn't closed"
    if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
        return "it isn't compressed by gzip as its ending says, or is cut short"
    if isinstance(error, OSError):
        return _first_line(error)
    return "its lines aren't those of a table; save it anew"


def _not_utf8(path: Path) -> str:
    with _opened(path) as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "it is in UTF-16, not in UTF-8; save it as UTF-8"
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                return f"line {number} isn't in UTF-8 (byte {byte}), perhaps in Latin-1; save it as UTF-8"
    return "it isn't in UTF-8; save it as UTF-8"


def _read_parquet(path: Path, texts: list[str], marks: Marks) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        frame = parquet.read_table(path).to_pandas(ignore_metadata=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as Parquet: {_first_line(error)}") from error
    return _typed(path, frame)


def _read_npz(path: Path, texts: list[str], marks: Marks) -> Iterator[tuple[str, Any]]:
    """Yield columns: an array of one axis as `x`, an array of two axes as `x[0]`, `x[1]`, ..."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib, struct and value errors of a damaged file
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
    """Return a column of numbers if all values but missing ones are numbers; else of texts."""
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
