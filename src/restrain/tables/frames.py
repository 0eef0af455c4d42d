"""Data frames of pandas, Polars and Arrow as tables; each is imported where it is used."""

from __future__ import annotations

from typing import Any

from restrain.extras import needing
from restrain.tables.table import OF_FRAMES, Table, columns_of

_KINDS = {("pandas", "DataFrame"), ("polars", "DataFrame"), ("polars", "LazyFrame"), ("pyarrow", "Table"),
          ("pyarrow", "RecordBatch")}  # fmt: skip


def _package(x: Any) -> str | None:
    """Return the package of a data frame, "arrow" for others that export Arrow; None for arrays."""
    names = [(base.__module__.partition(".")[0], base.__name__) for base in type(x).__mro__]
    found = next((package for package, name in names if (package, name) in _KINDS), None)
    if found is None and hasattr(x, "__arrow_c_stream__") and hasattr(x, "columns"):
        return "arrow"
    return found


def is_frame(x: Any) -> bool:
    """Return True for a data frame of pandas, Polars or Arrow, or one that exports Arrow."""
    return _package(x) is not None


def to_pandas(x: Any) -> Any:
    """Return a data frame as one of pandas; anything else as it is.

    Raises:
        MissingExtraError: pandas or pyarrow isn't installed.
    """
    package = _package(x)
    if package in (None, "pandas"):
        return x
    with needing("tables", f"a table of {package}"):
        import pandas  # noqa: F401
        import pyarrow
    whole = x.collect() if type(x).__name__ == "LazyFrame" else x
    return pyarrow.table(whole).to_pandas(date_as_object=False, ignore_metadata=True)


def odd_columns(x: Any) -> list[str]:
    """Return the columns of a data frame that aren't numbers or booleans, as "'name' (dtype)"."""
    if _package(x) == "polars":
        found = x.collect_schema().items()
        return [f"{name!r} ({dtype})" for name, dtype in found if not (dtype.is_numeric() or str(dtype) == "Boolean")]
    frame = to_pandas(x)
    pairs = [(str(name), frame.dtypes.iloc[number]) for number, name in enumerate(frame.columns)]
    return [f"{name!r} ({dtype})" for name, dtype in pairs if not _is_numeric(dtype)]


def _is_numeric(dtype: Any) -> bool:
    return str(dtype) != "category" and getattr(dtype, "kind", "O") in "biuf"


def table_of(x: Any, name: str = "X") -> Table:
    """Return the table of a data frame.

    Raises:
        DataError: a column is of a type that no input can be made of.
    """
    return columns_of(name, to_pandas(x), OF_FRAMES)
