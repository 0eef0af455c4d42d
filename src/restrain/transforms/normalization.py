"""Standardising and robust scaling of data, with inverses. No rules: models or users call them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from restrain.errors import RestrainWarning, TransformError
from restrain.extras import needing
from restrain.fields import level_of_caller, listed

_BLOCK = 2**20  # numbers per block that is read


@runtime_checkable
class _Array(Protocol):
    """An object that NumPy can make an array of: arrays, memory-mapped or not, tables of pandas."""

    def __array__(self) -> Any: ...


@runtime_checkable
class _Table(Protocol):
    """A table of pandas or Polars, whose columns have names."""

    columns: Any


class _Scaling(nn.Module):
    """z = (x - shift) / size per feature; shift and size, learned from data, are named buffers."""

    names: ClassVar[tuple[str, str]]  # buffers of shift and size
    feature_names_in_: tuple[str, ...] | None = None
    """Column names of the table that the scaling was fitted on. Not in the `state_dict`."""

    def __init__(self, missing: Literal["error", "ignore"] = "error") -> None:
        super().__init__()
        if not (isinstance(missing, str) and missing in ("error", "ignore")):
            raise TransformError(f"missing= is 'error' or 'ignore', got {missing!r}")
        self.missing = missing
        for name in self.names:
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    def _learn(self, blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Return shift and size, given blocks of samples, with NaN for missing values."""
        raise NotImplementedError

    def fit(self, x: Any) -> Self:
        """Learn shift and size from data in float64, replacing earlier ones; return self.

        Args:
            x: a tensor, an array (memory-mapped arrays are read in blocks), a table with named
                columns, or an iterable of these, each with further samples.

        Raises:
            TransformError: no data, not numbers, chunks that don't fit together, infinite values,
                NaN unless `missing="ignore"`, a feature without any value, or values too large for
                float64.
        """
        names: list[tuple[str, ...] | None] = []

        def chunks() -> Iterator[Any]:
            for chunk in _chunks(x):
                names.append(_column_names(chunk))
                _check_names(names[0], names[-1], "the first part")
                yield chunk

        shift, size = self._learn(_alike(_blocks(chunks()), self.missing))
        self.feature_names_in_ = names[0]
        for name, learned in zip(self.names, (shift, size), strict=True):
            setattr(self, name, learned.to(self._buffers[name]))
        return self

    @property
    def _shift(self) -> Tensor:
        return self._buffers[self.names[0]]  # type: ignore[return-value]

    @property
    def _size(self) -> Tensor:
        return self._buffers[self.names[1]]  # type: ignore[return-value]

    @property
    def fitted(self) -> bool:
        """True after `fit`."""
        return self._shift.shape != (0,)

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            self._warn_of_unnamed(_column_names(x))
        return self._mapped(x, lambda numbers: (numbers - self._shift) / self._size)

    def _warn_of_unnamed(self, names: tuple[str, ...] | None) -> None:
        """Warn if only one of the data of `fit` and of this call has column names."""
        known = self.feature_names_in_
        if (names is None) != (known is None):
            here, there = ("without", "with") if names is None else ("with", "without")
            warnings.warn(
                f"a table {here} names of columns, but this {type(self).__name__} was fitted {there} them: whether the "
                "columns are in the same order can't be checked; fit and call it with the same kind of table",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )

    def inverse(self, z: Any) -> Any:
        """Return z · size + shift: values, means or quantiles on the scale of the data.

        Raises:
            TransformError: before `fit`, or with another number of features.
        """
        return self._mapped(z, lambda numbers: numbers * self._size + self._shift)

    def inverse_std(self, std: Any) -> Any:
        """Return std · size: a standard deviation is scaled, not shifted.

        Raises:
            TransformError: before `fit`, or with another number of features.
        """
        return self._mapped(std, lambda numbers: numbers * self._size)

    def inverse_interval(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Return both ends of an interval on the scale of the data; they keep their order.

        Raises:
            TransformError: before `fit`, or with another number of features.
        """
        return self.inverse(low), self.inverse(high)

    def _mapped(self, x: Any, formula: Any) -> Any:
        if not self.fitted:
            kind = type(self).__name__
            raise TransformError(f"this {kind} has learned nothing yet: call .fit(x) first, or load its state_dict")
        _check_names(self.feature_names_in_, _column_names(x), f"this {type(self).__name__}")
        numbers = x if isinstance(x, Tensor) else torch.from_numpy(_numbers(x))
        if numbers.is_complex():
            raise TransformError(f"expected real numbers, got {numbers.dtype}")
        self._check_features(tuple(numbers.shape))
        dtype = numbers.dtype if numbers.is_floating_point() else torch.get_default_dtype()
        result = formula(numbers.to(torch.promote_types(dtype, self._shift.dtype))).to(dtype)
        return result if isinstance(x, Tensor) else result.detach().cpu().numpy()

    def _check_features(self, shape: tuple[int, ...]) -> None:
        if self._shift.dim() == 0 and len(shape) > 1:
            raise TransformError(
                f"fitted on samples of a single feature, of shape (n,), got the shape {shape}: "
                "fit on (n, features), or write x[:, 0]"
            )
        if self._shift.dim() == 1 and (not shape or shape[-1] != len(self._shift)):
            raise TransformError(f"fitted on {_features(self._shift)}, the last axis of x; got the shape {shape}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """Load shift and size of any valid shape."""
        shift, size = (state_dict.get(prefix + name) for name in self.names)
        errors: list[str] = others[-1]
        if isinstance(shift, Tensor) and isinstance(size, Tensor):
            if shift.shape != size.shape or shift.dim() > 1 or not _are_scales(shift, size):
                errors.append(
                    f"{prefix}{self.names[0]} and {prefix}{self.names[1]} must have one shape (features,), finite "
                    f"numbers and positive {self.names[1]}s; got the shapes {tuple(shift.shape)}, {tuple(size.shape)}"
                )
                return
            if shift.shape != self._shift.shape or not shift.equal(self._shift.to(shift)):
                self.feature_names_in_ = None  # loaded values were learned from other data
            for name in self.names:
                setattr(self, name, self._shift.new_zeros(shift.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"missing={self.missing!r}, {_features(self._shift) if self.fitted else 'not fitted'}"


class Standardize(_Scaling):
    """z = (x - mean) / deviation for each feature, with `inverse`.

    Features are the last axis, the others are samples: rows of a table, or sequences of shape
    (batch, time, features). Data of one axis are samples of a single feature. The deviation divides
    by the number of samples, like scikit-learn's StandardScaler. A constant feature (or one whose
    values differ by too little for a variance in float64) has deviation 1, so that z is zero and
    `inverse` is exact.

    `mean` and `deviation` are float64 buffers in the `state_dict`, which an unfitted object can
    load (for "mps", which has no float64: `.to("mps", torch.float32)`). Results have the dtype of a
    floating-point input; NumPy arrays give NumPy arrays. Fitting takes one pass, a block at a time.

    After fitting on a table with named columns (pandas, Polars), tables with other names or another
    order are refused, as in scikit-learn. Arrays give a warning, as their order can't be checked.

    Args:
        missing: "error" refuses NaN in `fit`; "ignore" learns from the other values. A call maps
            NaN to NaN.

    Raises:
        TransformError: calls before `fit`, with another number of features, or with other names.

    >>> scale = rs.Standardize().fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    >>> scale(torch.tensor([[4.0, 5.0]]))
    tensor([[3., 0.]])
    """

    mean: Tensor
    deviation: Tensor

    names = ("mean", "deviation")

    def _learn(self, blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        moments = None
        for block in blocks:
            part = _Moments.of(block)
            moments = part if moments is None else moments.joined(part)
        if moments is None:
            raise TransformError("there are no samples to learn mean and deviation from")
        return moments.finish()


class RobustScale(_Scaling):
    """z = (x - median) / spread for each feature, spread being the distance between two quantiles.

    Up to half of the data may be wrong by any amount without breaking the median, a quarter without
    breaking the spread. Quantiles are interpolated linearly, like those of NumPy and scikit-learn's
    RobustScaler. If the quantiles are equal (for instance when more than half of the values are the
    same), the spread is 1. On normal data it is 1.349 standard deviations.

    Otherwise like `Standardize`, with the buffers `median` and `spread`; but fitting holds all data
    in memory.

    Args:
        missing: "error" refuses NaN in `fit`; "ignore" learns from the other values. A call maps
            NaN to NaN.
        quantiles: two quantiles, as fractions of the data: 0 ≤ low < high ≤ 1.

    Raises:
        TransformError: invalid quantiles; calls before `fit`, or with another number of features.

    Source: Huber (1981), Robust Statistics, chapter 5 (median and interquartile range).

    >>> scale = rs.RobustScale().fit(torch.tensor([0.0, 1.0, 2.0, 3.0, 1e6]))
    >>> scale(torch.tensor([4.0]))
    tensor([1.])
    """

    median: Tensor
    spread: Tensor

    names = ("median", "spread")

    def __init__(
        self, missing: Literal["error", "ignore"] = "error", quantiles: tuple[float, float] = (0.25, 0.75)
    ) -> None:
        super().__init__(missing)
        low, high = _checked_quantiles(quantiles)
        self.quantiles = (low, high)

    def _learn(self, blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        parts = [block.flatten(0, -2) if block.dim() > 1 else block for block in blocks]
        if not parts:
            raise TransformError("there are no samples to learn median and spread from")
        values = torch.cat(parts).sort(0).values  # NaN comes last
        count = (~values.isnan()).sum(0)
        _refuse_empty_columns(count)
        median, low, high = (_quantile(values, count, q) for q in (0.5, *self.quantiles))
        spread = high - low
        if not (median.isfinite() & spread.isfinite()).all():
            raise TransformError("values are too large for a difference in float64: divide them by a power of ten")
        return median, torch.where(spread < torch.finfo(torch.float64).tiny ** 0.5, 1.0, spread)

    def extra_repr(self) -> str:
        return f"quantiles={self.quantiles}, {super().extra_repr()}"


def _checked_quantiles(quantiles: Any) -> tuple[float, float]:
    pair = tuple(quantiles) if isinstance(quantiles, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(q, (int, float)) and 0 <= q <= 1 for q in pair) or pair[0] >= pair[1]:
        raise TransformError(f"quantiles= is a pair of parts of the data, as in (0.25, 0.75); got {quantiles!r}")
    return float(pair[0]), float(pair[1])


def _quantile(values: Tensor, count: Tensor, q: float) -> Tensor:
    """Return the q-quantile of the first `count` sorted values on axis 0, interpolated linearly."""
    place = q * (count - 1).double()
    below = place.floor()
    low, high = (values.gather(0, end.long().unsqueeze(0)).squeeze(0) for end in (below, place.ceil()))
    return low.lerp(high, place - below)


@dataclass
class _Moments:
    """Count, mean, sum of squared distances to the mean, minimum and maximum of each feature."""

    count: Tensor
    mean: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, block: Tensor) -> _Moments:
        """Return the moments of a block without its NaN, computed in two passes."""
        shape = block.shape[-1:] if block.dim() > 1 else ()
        rows = block.flatten(0, -2) if shape else block
        present = ~rows.isnan()
        count = present.sum(0).double()
        mean = rows.nan_to_num(nan=0.0).sum(0) / count.clamp(min=1)
        distance = torch.where(present, rows - mean, 0.0)
        rest = distance.sum(0) / count.clamp(min=1)  # rounding error of the mean
        inf = torch.tensor(torch.inf, dtype=torch.float64, device=rows.device)
        low, high = torch.where(present, rows, inf).amin(0), torch.where(present, rows, -inf).amax(0)
        return cls(count, mean + rest, (distance - rest).where(present, 0.0).square().sum(0), low, high)

    def joined(self, other: _Moments) -> _Moments:
        """Return the moments of both together (Chan, Golub and LeVeque, 1983)."""
        count = self.count + other.count
        part = other.count / count.clamp(min=1)
        shift = other.mean - self.mean
        return _Moments(
            count,
            self.mean + shift * part,
            self.squares + other.squares + shift.square() * self.count * part,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation; 1 for a feature without variance."""
        _refuse_empty_columns(self.count)
        deviation = (self.squares / self.count).sqrt()
        if not deviation.isfinite().all():
            raise TransformError("values are too large for a variance in float64: divide them by a power of ten")
        constant = (self.low == self.high) | (deviation < torch.finfo(torch.float64).tiny ** 0.5)
        mean = torch.where(self.low == self.high, self.low, self.mean)  # exactly
        return mean, torch.where(constant, 1.0, deviation)


def _column_names(x: Any) -> tuple[str, ...] | None:
    """Return the column names of a table; None if they aren't text.

    Raises:
        TransformError: only some of the names are text.
    """
    if isinstance(x, Tensor) or not isinstance(x, _Table):
        return None
    names = tuple(x.columns)
    kinds = {isinstance(name, str): type(name).__name__ for name in names}
    if len(kinds) == 2:
        raise TransformError(
            f"the names of columns are all text or none is, got {kinds[False]} among them: rename them, as by "
            "table.columns = table.columns.astype(str)"
        )
    return names if True in kinds else None


def _check_names(known: tuple[str, ...] | None, names: tuple[str, ...] | None, what: str) -> None:
    """Check that a table has the columns of `what`, in the same order.

    Raises:
        TransformError: it hasn't.
    """
    if known is None or names is None or names == known:
        return
    missing, new = [n for n in known if n not in names], [n for n in names if n not in known]
    said = [f"{word} {listed(some)}" for word, some in (("without", missing), ("also with", new)) if some]
    raise TransformError(
        f"the feature names should be those of {what}, in their order: {listed(known)}; got a table "
        f"{', '.join(said) or f'in the order {listed(names)}'}"
        + ("" if missing else ". Choose the columns: table[list(scale.feature_names_in_)]")
    )


def _chunks(x: Any) -> Iterator[Any]:
    """Yield the tensors, arrays and tables of the data."""
    if isinstance(x, (Tensor, _Array)):
        yield x
        return
    if isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable):
        raise TransformError(f"expected a tensor, an array, or an iterable of these, got {type(x).__name__}")
    for chunk in x:
        if not isinstance(chunk, (Tensor, _Array)):
            raise TransformError(
                f"expected an iterable of tensors or arrays, got one of {type(chunk).__name__}: "
                "write torch.tensor(...) around lists of numbers"
            )
        yield chunk


def _blocks(chunks: Iterable[Any]) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of samples in float64, each with the number of its first sample."""
    start = 0
    for chunk in chunks:
        data = chunk if isinstance(chunk, Tensor) else _ndarray(chunk)
        if not data.shape:
            raise TransformError("expected samples along the first axis, got a single number")
        rows = max(1, _BLOCK * len(data) // max(1, prod(data.shape)))
        for within in range(0, len(data), rows):
            yield start + within, _double(data[within : within + rows])
        start += len(data)


def _alike(blocks: Iterator[tuple[int, Tensor]], missing: str) -> Iterator[Tensor]:
    """Yield the blocks; raise if their features differ or values are missing."""
    first = None
    for start, block in blocks:
        _refuse_missing(block, start, missing)
        shape = block.shape[-1:] if block.dim() > 1 else ()
        if first is not None and shape != first.shape:
            raise TransformError(
                f"all chunks have the same features; got {_features(first)}, then {_features(block.new_empty(shape))}"
            )
        first = block.new_empty(shape)
        yield block


def _ndarray(x: Any) -> Any:
    with needing("models", "data that isn't a tensor"):
        import numpy

    array = numpy.asanyarray(x)  # memory-mapped arrays stay memory-mapped
    if array.dtype.kind not in "biuf":
        raise TransformError(f"expected real numbers, got an array of {array.dtype}")
    return array


def _numbers(x: Any) -> Any:
    """Return a copy as a NumPy array of a dtype that torch has."""
    array = _ndarray(x)
    floating = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    return array.astype(array.dtype.newbyteorder("=") if floating else "f8")


def _double(block: Any) -> Tensor:
    if isinstance(block, Tensor):
        if block.is_complex():
            raise TransformError(f"expected real numbers, got {block.dtype}")
        return block.detach().cpu().double()
    return torch.from_numpy(block.astype("f8"))


def _refuse_missing(block: Tensor, start: int, missing: str) -> None:
    wrong = block.isinf() if missing == "ignore" else ~block.isfinite()
    if not wrong.any():
        return
    row, *rest = wrong.nonzero()[0].tolist()
    value = block[row, *rest].item()
    place = f"row {start + row}" + "".join(f", step {step}" for step in rest[:-1])
    place += f", column {rest[-1]}" if rest else ""
    way = "missing='ignore' learns from the values that are there, or fill it first" if value != value else "replace it"
    raise TransformError(f"expected finite numbers, got {value} at {place} (counted from 0): {way}")


def _refuse_empty_columns(count: Tensor) -> None:
    if not count.numel() or not count.all():
        empty = ", ".join(map(str, (count.reshape(-1) == 0).nonzero().flatten().tolist()))
        raise TransformError(f"no values at all in column {empty or '0 (there are no columns)'}: leave it out")


def _are_scales(mean: Tensor, deviation: Tensor) -> bool:
    return bool(mean.isfinite().all() and deviation.isfinite().all() and (deviation > 0).all())


def _features(mean: Tensor) -> str:
    return "a single feature without an axis" if mean.dim() == 0 else f"{len(mean)} feature{'s' * (len(mean) != 1)}"
