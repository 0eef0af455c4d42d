"""The encoding of tables as a scikit-learn transformer, which the models use for data frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from restrain.errors import DataError, PlanError
from restrain.fields import brief, is_one_of, listed
from restrain.tables.encoding import Encoding
from restrain.tables.frames import is_frame, table_of
from restrain.tables.table import OF_FRAMES, Table, plain

_WAYS = {"missing": ("error", "fill"), "unknown": ("zeros", "error")}


class TableEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Table with named columns → matrix of numbers, the same for Python and the command line.

    Numbers stay, booleans are 0 and 1; a category (a column of text or of the type category) has
    an input for each value; a date is its days since 1970-01-01 and its place in the cycles of
    year, week and day, if the data show them (see `restrain.tables.dates`). Text whose every value
    is a date is a date. Values of categories are equal by the rules of `restrain.tables.spelling`:
    1.0 is 1, 01 isn't.

    Args:
        missing: "error" refuses missing values; "fill" takes the mean of a number or date, and a
            value of its own for a category.
        categories: columns of numbers that are categories.
        unknown: values of a category that weren't there in `fit`: "zeros" takes them as none of
            the known ones, and warns with their number; "error" refuses them.

    Raises:
        DataError: a column isn't there, or can't be encoded; the message names row and column.

    Attributes: `feature_names_in_`, `n_features_in_`, `encoding_`.

    >>> import pandas
    >>> X = pandas.DataFrame({"age": [30, 41], "color": ["red", "blue"]})
    >>> encoder = rs.TableEncoder().fit(X)
    >>> encoder.get_feature_names_out().tolist()
    ['age', 'color=blue', 'color=red']
    >>> encoder.transform(X)[0].tolist()
    [30.0, 0.0, 1.0]
    """

    def __init__(self, *, missing: str = "error", categories: Any = (), unknown: str = "zeros") -> None:
        self.missing = missing
        self.categories = categories
        self.unknown = unknown

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the columns, their categories and means; return self."""
        for name, ways in _WAYS.items():
            if not is_one_of(getattr(self, name), ways):
                given = brief(getattr(self, name))
                raise PlanError(f"{name}= is {' or '.join(map(repr, ways))}, got {given}")
        table = self._table(X, reset=True)
        categories = [self.categories] if isinstance(self.categories, str) else list(self.categories)
        for name in categories:
            table.column(name)
        rows = np.arange(len(table))
        self.encoding_ = Encoding.learn(table, list(table.columns), categories, self.missing, rows)  # type: ignore[arg-type]
        return self

    def transform(self, X: Any) -> Any:
        """Return the matrix of inputs in float64.

        Raises:
            DataError: a column is missing or new, columns are in another order, or a value can't be
                encoded.
        """
        check_is_fitted(self, "encoding_")
        return self.encoding_.apply(self._table(X, reset=False), self.unknown)  # type: ignore[arg-type]

    encoded = transform  # without what `set_output` adds

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Return the names of the inputs: of a category as color=red, of a date as day.week.sin."""
        check_is_fitted(self, "encoding_")
        return np.array(self.encoding_.columns, object)

    @property
    def is_fitted(self) -> bool:
        """True after `fit`."""
        return "encoding_" in vars(self)

    @classmethod
    def of(cls, encoding: Encoding, **settings: Any) -> Self:
        """Return a fitted encoder of a known encoding."""
        found = cls(missing=encoding.missing, **settings)
        found.encoding_ = encoding
        names = [feature.name for feature in encoding.features]
        found.feature_names_in_, found.n_features_in_ = np.array(names, object), len(names)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return settings, and encoding if fitted, as plain data for JSON."""
        categories = self.categories if isinstance(self.categories, str) else list(self.categories)
        data = {"missing": self.missing, "categories": categories, "unknown": self.unknown}
        return {**data, "encoding": self.encoding_.to_dict() if self.is_fitted else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the encoder described by the result of `to_dict`.

        Raises:
            LookupError, ValueError: the data are no encoder's.
        """
        settings = {name: data[name] for name in ("missing", "categories", "unknown")}
        if not all(is_one_of(settings[name], ways) for name, ways in _WAYS.items()):
            raise ValueError(f"no encoder has the settings {brief(settings)}")
        found = cls(**settings)
        if data["encoding"] is None:
            return found
        known = cls.of(Encoding.from_dict(data["encoding"]), categories=settings["categories"])
        known.missing, known.unknown = found.missing, found.unknown
        return known

    # ---------------------------------------------------------------- tables

    def _table(self, x: Any, reset: bool) -> Table:
        if not (is_frame(x) or isinstance(x, Table)):
            return self._of_array(x, reset)
        table = x if isinstance(x, Table) else table_of(x)
        names = list(table.columns)
        if reset:
            self.feature_names_in_, self.n_features_in_ = np.array(names, object), len(names)
        else:
            check_columns(list(self.feature_names_in_), names)
        if not len(table):
            raise DataError(f"{table.source} has no rows")
        return table

    def _of_array(self, x: Any, reset: bool) -> Table:
        """Return the table of an array, with columns called x0, x1, ..."""
        finite = True if self.missing == "error" else "allow-nan"
        array = validate_data(self, x, reset=reset, dtype=None, ensure_all_finite=finite)
        table = Table("X", {}, words=OF_FRAMES)
        known = vars(self).get("feature_names_in_")
        names = [f"x{k}" for k in range(array.shape[1])] if known is None else known.tolist()
        table.columns = {name: plain(table, name, array[:, k]) for k, name in enumerate(names)}
        return table

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.categorical = True
        return tags


def check_columns(known: list[str], names: list[str]) -> None:
    """Check that a table has the columns of the training, in their order.

    Raises:
        DataError: it hasn't.
    """
    if names == known:
        return
    missing, new = [n for n in known if n not in names], [n for n in names if n not in known]
    said = [f"{word} {listed(list(map(repr, some)))}" for word, some in (("lacks", missing), ("also has", new)) if some]
    order = f"has them in the order {listed(names)}"
    way_out = "" if missing else "; choose the columns: X[list(model.feature_names_in_)]"
    raise DataError(f"X has the columns of the training, {listed(known)}, in this order; this table "
                    f"{' and '.join(said) or order}{way_out}")  # fmt: skip
