"""Tables from files and standard input: CSV and other text, Excel, Parquet and .npz.

Needs pandas and pyarrow. Messages count rows from 1, without the header.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from restrain import storage
from restrain.errors import DataError, MissingExtraError, RestrainError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.tables import Marks, Table, canonical, columns_of, counted, joined, parsed, plain, shown

__all__ = ["Marks", "Table", "counted", "parsed", "read", "shown"]

_NAMED = "CSV (.csv, .tsv, .txt, .csv.gz), Excel (.xlsx), Parquet (.parquet) or NumPy (.npz)"
_WORKBOOKS = (".xls", ".xlsb", ".ods", ".numbers")
_SEPARATORS = "\t;,|"
_SPACES = r"\s+"
_FAULTS_OF_CELLS = ("#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!")  # in Excel: there is no value


@dataclass(frozen=True)
class _Source:
    """A file, or the content of standard input.

    Args:
        name: for messages.
        ending: determines the format, in lower case, without .gz.
        zipped: compressed by gzip.
        path: the file; None for `content`.
        content: the bytes.
    """

    name: str
    ending: str
    zipped: bool
    path: Path | None = None
    content: bytes = b""

    def open(self) -> Any:
        """Return the raw bytes as a file."""
        return io.BytesIO(self.content) if self.path is None else self.path.open("rb")

    def opened(self) -> Any:
        """Return the bytes as a file, decompressed."""
        if not self.zipped:
            return self.open()
        return gzip.open(io.BytesIO(self.content) if self.path is None else self.path)

    @property
    def size(self) -> int:
        """The number of raw bytes."""
        return len(self.content) if self.path is None else self.path.stat().st_size


def read(path: str | Path | Sequence[Path], texts: Sequence[str] = (), marks: Marks | None = None) -> Table:
    """Return the table in a file, or in several with the same columns.

    Args:
        path: the file, whose ending determines the format; "-" for standard input, in any of the
            formats; or a list of files.
        texts: columns of a text file that stay text even if all values look like numbers.
        marks: how a text file is written; None for the defaults of `Marks`.

    Raises:
        DataError: the file has another format, or values other than numbers, text and dates.
    """
    if not isinstance(path, (str, Path)):
        found = [read(one, texts, marks) for one in path]
        return found[0] if len(found) == 1 else joined(found)
    source, marks = _source(path), marks or Marks()
    formats: dict[str, tuple[Callable[..., Table], str]] = {
        ".csv": (_read_csv, "CSV"),
        ".npz": (_read_npz, ".npz"),
        ".parquet": (_read_parquet, "Parquet"),
        ".xlsx": (_read_excel, "Excel"),
    }
    formats |= {".tsv": formats[".csv"], ".txt": formats[".csv"], ".pq": formats[".parquet"]}
    formats[".xlsm"] = formats[".xlsx"]
    if source.ending in _WORKBOOKS:
        raise DataError(
            f"{path} is a workbook of another kind than .xlsx: save it as .xlsx, or export its sheet as CSV"
        )
    if source.ending not in formats:
        raise DataError(f"{path}: a table is {_NAMED}")
    reader, kind = formats[source.ending]
    if marks.sheet is not None and kind != "Excel":
        raise DataError(f"{source.name} has no sheets: leave out --sheet")
    try:
        _check_size(source)
        table = reader(source, list(texts), marks)
    except (RestrainError, MissingExtraError):
        raise
    except Exception as error:  # pandas, pyarrow, NumPy, openpyxl, gzip or zip, for a damaged file
        said = _first_line(error)
        raise DataError(f"{source.name} can't be read as {kind}: {said}; save it anew as {_NAMED}") from error
    if not table.columns or not len(table):
        raise DataError(f"{source.name}: there are no {'rows' if table.columns else 'columns'}")
    return table


def _source(path: str | Path) -> _Source:
    if str(path) != "-":
        found = Path(path)
        storage.written_at(found)  # raises if there is no such file, or it can't be opened
        name = found.name.lower()
        return _Source(str(found), Path(name.removesuffix(".gz")).suffix, name.endswith(".gz"), found)
    content = _standard_input()
    ending = ".txt"
    if content.startswith(b"PAR1"):
        ending = ".parquet"
    elif content.startswith(b"PK\x03\x04"):
        ending = ".xlsx" if b"xl/workbook.xml" in content else ".npz"
    return _Source("standard input", ending, content.startswith(b"\x1f\x8b"), None, content)


def _standard_input() -> bytes:
    """Return the content of standard input; a command may ask for it again."""
    context = click.get_current_context(silent=True)
    known: dict[str, Any] = {} if context is None else context.meta
    if __name__ not in known:
        known[__name__] = sys.stdin.buffer.read()
    return bytes(known[__name__])


# ---------------------------------------------------------------- formats

# A file may unpack to `_SMALL` bytes, or to `_RATIO` times its size
_SMALL, _RATIO = 2**28, 1000


def _check_size(source: _Source) -> None:
    """Check that a small file doesn't unpack to a huge table, before it is unpacked into memory.

    Raises:
        DataError: the unpacked size is above the limits.
    """
    most = max(_SMALL, _RATIO * source.size)
    if source.zipped:
        with source.opened() as stream:
            size = sum(len(block) for block in iter(lambda: stream.read(2**20), b"")) if most == _SMALL else 0
    elif source.ending in (".parquet", ".pq"):
        from pyarrow import parquet

        with source.open() as file:
            about = parquet.ParquetFile(file).metadata
        size = 8 * about.num_rows * about.num_columns
    elif source.ending in (".npz", ".xlsx", ".xlsm"):
        with source.open() as file:
            size = _unzipped_size(file) if zipfile.is_zipfile(file) else 0
    else:
        return
    if size > most:
        raise DataError(f"{source.name} unpacks to {size:,} bytes, and has {source.size:,}: save it in parts")


def _unzipped_size(file: Any) -> int:
    with zipfile.ZipFile(file) as archive:
        return sum(member.file_size for member in archive.infolist())


def _read_csv(source: _Source, texts: list[str], marks: Marks) -> Table:
    _check_encoding(source, marks)
    separator = _separator(source, marks)
    names = _header(source, marks, separator)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{source.name}: two columns are called {twice[0]!r}; give each a name of its own")
    if len(names) == 1 and any(other in names[0] for other in _SEPARATORS):
        other = next(other for other in _SEPARATORS if other in names[0])
        typed = "tab" if other == "\t" else repr(other)
        raise DataError(f"{source.name}: only one column, called {names[0]!r}; write --separator {typed}")
    frame = _parsed(source, {name for name in names if name in texts}, marks, separator)
    if len(frame) and len(names) > 1 and frame.iloc[:, -1].isna().any():
        _check_short(source, marks, separator, len(names))
    return _read_texts(columns_of(source.name, frame), texts, marks)


def _header(source: _Source, marks: Marks, separator: str) -> list[str]:
    """Return the names in the first line of a text file."""
    given = {"header": None, "nrows": 1, "dtype": str, "keep_default_na": False}
    return [str(name).strip() for name in _by_pandas(source, marks, separator, **given).iloc[0].tolist()]


def _parsed(source: _Source, texts: Collection[str], marks: Marks, separator: str) -> Any:
    """Return the data frame of a text file, its names without spaces around them."""
    first = _by_pandas(source, marks, separator, nrows=0)
    types = {name: "object" for name in first.columns if str(name).strip() in texts}
    frame = _by_pandas(source, marks, separator, dtype=types, decimal=marks.decimal)
    frame.columns = [str(name).strip() for name in frame.columns]
    return frame


def _by_pandas(source: _Source, marks: Marks, separator: str, **given: Any) -> Any:
    """Return what `pandas.read_csv` reads.

    Raises:
        DataError: it can't.
    """
    import pandas

    options: dict[str, Any] = {"sep": separator, "encoding": marks.encoding, "index_col": False, "low_memory": False}
    try:
        with warnings.catch_warnings(), source.opened() as file:
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            return pandas.read_csv(file, skipinitialspace=True, **options, **given)
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{source.name}: the file is empty") from error
    except (pandas.errors.ParserWarning, ValueError, EOFError, OSError, zlib.error) as error:
        written = "spaces" if separator == _SPACES else repr(separator)
        said = _told(source, marks, error)
        raise DataError(f"{source.name} can't be read as CSV separated by {written}: {said}") from error


def _read_texts(table: Table, texts: Sequence[str], marks: Marks) -> Table:
    """Make gaps of what `marks` takes for one, and numbers of text where all of a column is."""
    table.marks = marks
    for name, values in table.columns.items():
        gaps = _gaps(values, marks.gaps)
        values = _without(values, gaps) if gaps.any() else values
        if values.dtype == object and name not in texts:
            numbers = table.parsed(values)
            words = np.isnan(numbers) & np.array([value is not None for value in values], bool)
            values = values if words.any() or name in table.categories else numbers
        table.columns[name] = values
    return table


def _gaps(values: Any, gaps: Sequence[str]) -> Any:
    """Return the mask of the values that stand for a missing one."""
    if values.dtype == object:
        known = {*gaps, *map(canonical, gaps)}
        return np.array([value is not None and canonical(value) in known for value in values], bool)
    numbers = parsed(np.array(gaps, object)) if gaps else np.zeros(0)
    return np.isin(values, numbers[~np.isnan(numbers)]) if values.dtype.kind in "iuf" else np.zeros(len(values), bool)


def _without(values: Any, gaps: Any) -> Any:
    found = values.copy() if values.dtype.kind in "Of" else values.astype(np.float64)
    found[gaps] = None if values.dtype == object else np.nan
    return found


def _check_encoding(source: _Source, marks: Marks) -> None:
    """Check that the encoding exists, and that the content is text.

    Raises:
        DataError: it isn't.
    """
    try:
        codec = codecs.lookup(marks.encoding).name
    except LookupError as error:
        raise DataError(
            f"there is no encoding {marks.encoding!r}; write --encoding latin-1, cp1252 or utf-16"
        ) from error
    if codec.startswith(("utf-16", "utf-32")):
        return
    try:
        with source.opened() as file:
            start = file.read(2)
            if start in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{source.name} is in UTF-16, not in {_called(codec)}; write --encoding utf-16")
            line = 1 + start.count(b"\n")
            for block in iter(lambda: file.read(2**20), b""):
                if b"\0" in block:
                    line += block[: block.index(b"\0")].count(b"\n")
                    raise DataError(
                        f"{source.name}, line {line} has a null character, as no text has; save it anew, or if it is "
                        "UTF-16, write --encoding utf-16"
                    )
                line += block.count(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source.name} can't be read as CSV: {_told(source, marks, error)}") from error


def _called(codec: str) -> str:
    return "UTF-8" if codec.startswith("utf-8") or codec == "utf_8_sig" else codec


def _check_short(source: _Source, marks: Marks, separator: str, count: int) -> None:
    """Check that no row has fewer values than the header has names, as where a file is cut off.

    Raises:
        DataError: one has.
    """
    if separator == _SPACES:
        return
    with (
        source.opened() as file,
        io.TextIOWrapper(file, encoding=marks.encoding, newline="") as text,
        contextlib.suppress(csv.Error),  # a value of more than 131,072 characters
    ):
        lines = csv.reader(text, delimiter=separator, skipinitialspace=True)
        for row in lines:
            if 0 < len(row) < count and row != [""]:
                raise DataError(
                    f"{source.name}, line {lines.line_num} has {counted(len(row), 'value')}, and the header {count} "
                    "names; correct that line, or complete the file"
                )


def _separator(source: _Source, marks: Marks) -> str:
    """Return the separator; in .txt the most frequent of the header's, or else spaces."""
    if marks.separator is not None:
        words = {"\\t": "\t", "tab": "\t", "space": _SPACES, "spaces": _SPACES, " ": _SPACES}
        return words.get(marks.separator.lower(), marks.separator)
    if source.ending == ".txt":
        with source.opened() as file:
            header = codecs.decode(file.readline(2**16), marks.encoding, "replace").strip()
        if any(map(header.count, _SEPARATORS)):
            return max(_SEPARATORS, key=header.count)
        return _SPACES if re.search(r"\S\s+\S", header) else ","
    return "\t" if source.ending == ".tsv" else ","


def _told(source: _Source, marks: Marks, error: BaseException) -> str:
    """Return a description of the fault that pandas found in a CSV file, with its line."""
    said = str(error)
    if isinstance(error, UnicodeError):
        return _undecoded(source, marks)
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


def _undecoded(source: _Source, marks: Marks) -> str:
    codec = codecs.lookup(marks.encoding).name
    with source.opened() as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(marks.encoding)
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                return (
                    f"line {number} isn't in {_called(codec)} (byte {byte}), perhaps in Latin-1: write --encoding "
                    "latin-1, or save it as UTF-8"
                )
    return f"it isn't in {_called(codec)}; write --encoding and its encoding, or save it as UTF-8"


def _read_excel(source: _Source, texts: list[str], marks: Marks) -> Table:
    """Return a sheet, whose first row has the names of the columns."""
    try:
        import openpyxl  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{source.name} is a workbook, and reading it needs openpyxl: pip install 'restrain[tables]'",
            name="openpyxl",
        ) from error
    import pandas

    sheet = marks.sheet
    with source.open() as file, pandas.ExcelFile(file, engine="openpyxl") as book:
        names = [str(name) for name in book.sheet_names]
        if sheet is not None and sheet not in names:
            raise DataError(f"{source.name} has no sheet {sheet!r}; there are: {shown(names)}")
        if sheet is None and len(names) > 1:
            warnings.warn(
                f"{source.name} has {len(names)} sheets, and {names[0]!r} is read; --sheet names another: "
                f"{shown(names[1:])}",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
        one = names[0] if sheet is None else sheet
        header = pandas.read_excel(book, sheet_name=one, header=None, nrows=1, dtype=str).fillna("")
        frame = pandas.read_excel(book, sheet_name=one)
    titles = [str(name).strip() for name in header.iloc[0].tolist()] if len(header) else []
    twice = sorted({name for name in titles if name and titles.count(name) > 1})
    if twice:
        raise DataError(f"{source.name}: two columns are called {twice[0]!r}; give each a name of its own")
    frame.columns = [str(name).strip() for name in frame.columns]
    table = columns_of(source.name, frame)
    return _read_texts(table, texts, replace(marks, gaps=(*marks.gaps, *_FAULTS_OF_CELLS)))


def _read_parquet(source: _Source, texts: list[str], marks: Marks) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with source.open() as file:
            frame = parquet.read_table(file).to_pandas(ignore_metadata=True, date_as_object=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.name} can't be read as Parquet: {_first_line(error)}") from error
    return _with_gaps(columns_of(source.name, frame), marks)


def _with_gaps(table: Table, marks: Marks) -> Table:
    table.marks = marks
    for name, values in table.columns.items():
        gaps = _gaps(values, marks.gaps)
        table.columns[name] = _without(values, gaps) if gaps.any() else values
    return table


def _read_npz(source: _Source, texts: list[str], marks: Marks) -> Table:
    """Return columns: an array of one axis as `x`, an array of two axes as `x[0]`, `x[1]`, ..."""
    try:
        with source.open() as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib, struct and value errors of a damaged file
        raise DataError(f"{source.name} can't be read as .npz: {_first_line(error)}") from error
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{source.name}: all arrays have the same number of rows; got {said}")
    table = Table(source.name, {}, marks)
    for name, array in arrays.items():
        if array.ndim not in (1, 2):
            raise DataError(f"{source.name}: {name!r} has the shape {array.shape}; expected one axis or two")
        for number in range(array.shape[1] if array.ndim == 2 else 0):
            table.columns[f"{name}[{number}]"] = plain(table, f"{name}[{number}]", array[:, number])
        if array.ndim == 1:
            table.columns[name] = plain(table, name, array)
    return _with_gaps(table, marks)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
