"""Standardising data. Not a `Transform`: no rule makes it act, a model or its user calls it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from restrain.errors import TransformError

_BLOCK = 2**20  # numbers that are read at a time


@runtime_checkable
class _Array(Protocol):
    """What NumPy can make an array of: its own, memory-mapped ones, tables of pandas."""

    def __array__(self) -> Any: ...


class Standardize(nn.Module):
    """z = (x - mean) / deviation, for each feature; `inverse` undoes it.

    Features are the last axis, the others are samples: rows of a table, or sequences of shape (batch, time,
    features). Data of one axis are samples of a single feature. The deviation divides by the number of samples, as
    scikit-learn's StandardScaler does. Where all values of a feature are equal (or differ by too little for a
    variance in float64), the deviation is taken as one, so that z is zero there, and `inverse` stays exact.

    `mean` and `deviation` are buffers in float64 (for "mps", which has none: `.to("mps", torch.float32)`), in the
    `state_dict`, which also an unfitted one loads. Results have the dtype of a floating-point input; NumPy arrays
    give NumPy arrays.

    Args:
        missing: "error" refuses NaN in `fit`; "ignore" learns from the values that are there. A call turns NaN
            into NaN.

    Raises:
        TransformError: calls before `fit`, or with another number of features.

    >>> scale = rs.Standardize().fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    >>> scale(torch.tensor([[4.0, 5.0]]))
    tensor([[3., 0.]])
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, missing: Literal["error", "ignore"] = "error") -> None:
        super().__init__()
        if missing not in ("error", "ignore"):
            raise TransformError(f"missing= is 'error' or 'ignore', got {missing!r}")
        self.missing = missing
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("deviation", torch.zeros(0, dtype=torch.float64))

    def fit(self, x: Any) -> Standardize:
        """Learn mean and deviation, anew, in float64 and in one pass.

        Args:
            x: a tensor, an array (memory-mapped ones are read in blocks), or an iterable of such, each of which
                holds further samples.

        Raises:
            TransformError: no data, not numbers, chunks that don't fit together, infinite values, NaN unless
                `missing="ignore"`, a feature without any value, or a variance beyond float64.
        """
        moments = None
        for start, block in _blocks(x):
            _refuse_missing(block, start, self.missing)
            part = _Moments.of(block)
            if moments is not None and moments.mean.shape != part.mean.shape:
                raise TransformError(
                    f"all chunks have the same features; got {_features(moments.mean)}, then {_features(part.mean)}"
                )
            moments = part if moments is None else moments.joined(part)
        if moments is None:
            raise TransformError("there are no samples to learn mean and deviation from")
        mean, deviation = moments.finish()
        self.mean, self.deviation = mean.to(self.mean), deviation.to(self.deviation)
        return self

    @property
    def fitted(self) -> bool:
        """Whether mean and deviation are known."""
        return self.mean.shape != (0,)

    def forward(self, x: Any) -> Any:
        return self._mapped(x, lambda numbers: (numbers - self.mean) / self.deviation)

    def inverse(self, z: Any) -> Any:
        """z · deviation + mean: values, means or quantiles on the scale of the data.

        Raises:
            TransformError: before `fit`, or with another number of features.
        """
        return self._mapped(z, lambda numbers: numbers * self.deviation + self.mean)

    def inverse_std(self, std: Any) -> Any:
        """std · deviation: a standard deviation is scaled, not shifted.

        Raises:
            TransformError: before `fit`, or with another number of features.
        """
        return self._mapped(std, lambda numbers: numbers * self.deviation)

    def inverse_interval(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Both ends of an interval on the scale of the data; they keep their order.

        Raises:
            TransformError: before `fit`, or with another number of features.
        """
        return self.inverse(low), self.inverse(high)

    def _mapped(self, x: Any, formula: Any) -> Any:
        if not self.fitted:
            raise TransformError("this Standardize has learned nothing yet: call .fit(x) first, or load its state_dict")
        numbers = x if isinstance(x, Tensor) else torch.from_numpy(_numbers(x))
        if numbers.is_complex():
            raise TransformError(f"expected real numbers, got {numbers.dtype}")
        self._check_features(tuple(numbers.shape))
        kind = numbers.dtype if numbers.is_floating_point() else torch.get_default_dtype()
        result = formula(numbers.to(torch.promote_types(kind, self.mean.dtype))).to(kind)
        return result if isinstance(x, Tensor) else result.detach().cpu().numpy()

    def _check_features(self, shape: tuple[int, ...]) -> None:
        if self.mean.dim() == 0 and len(shape) > 1:
            raise TransformError(
                f"fitted on samples of a single feature, of shape (n,), got the shape {shape}: "
                "fit on (n, features), or write x[:, 0]"
            )
        if self.mean.dim() == 1 and (not shape or shape[-1] != len(self.mean)):
            raise TransformError(f"fitted on {_features(self.mean)}, the last axis of x; got the shape {shape}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """Take the shapes that come, as long as they can be a mean and a deviation."""
        mean, deviation = (state_dict.get(prefix + name) for name in ("mean", "deviation"))
        errors: list[str] = others[-1]
        if isinstance(mean, Tensor) and isinstance(deviation, Tensor):
            if mean.shape != deviation.shape or mean.dim() > 1 or not _are_scales(mean, deviation):
                errors.append(
                    f"{prefix}mean and {prefix}deviation must have one shape (features,), finite numbers and "
                    f"positive deviations; got the shapes {tuple(mean.shape)} and {tuple(deviation.shape)}"
                )
                return
            self.mean, self.deviation = self.mean.new_zeros(mean.shape), self.deviation.new_zeros(mean.shape)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"missing={self.missing!r}, {_features(self.mean) if self.fitted else 'not fitted'}"


@dataclass
class _Moments:
    """Of each feature: number of values, mean, sum of squared distances from it, least and greatest value."""

    count: Tensor
    mean: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, block: Tensor) -> _Moments:
        """Of one block, NaN left out, by two passes."""
        shape = block.shape[-1:] if block.dim() > 1 else ()
        rows = block.flatten(0, -2) if shape else block
        there = ~rows.isnan()
        count = there.sum(0).double()
        mean = rows.nan_to_num(nan=0.0).sum(0) / count.clamp(min=1)
        distance = torch.where(there, rows - mean, 0.0)
        rest = distance.sum(0) / count.clamp(min=1)  # what rounding left of the mean
        inf = torch.tensor(torch.inf, dtype=torch.float64)
        low, high = torch.where(there, rows, inf).amin(0), torch.where(there, rows, -inf).amax(0)
        return cls(count, mean + rest, (distance - rest).where(there, 0.0).square().sum(0), low, high)

    def joined(self, other: _Moments) -> _Moments:
        """Of both (Chan, Golub and LeVeque, 1983)."""
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
        """Mean and deviation; one where there is no variance."""
        if not self.count.numel() or not self.count.all():
            empty = ", ".join(map(str, (self.count.reshape(-1) == 0).nonzero().flatten().tolist()))
            raise TransformError(f"no values at all in column {empty or '0 (there are no columns)'}: leave it out")
        deviation = (self.squares / self.count).sqrt()
        if not deviation.isfinite().all():
            raise TransformError("values are too large for a variance in float64: divide them by a power of ten")
        constant = (self.low == self.high) | (deviation < torch.finfo(torch.float64).tiny ** 0.5)
        mean = torch.where(self.low == self.high, self.low, self.mean)  # exactly
        return mean, torch.where(constant, 1.0, deviation)


def _blocks(x: Any) -> Iterator[tuple[int, Tensor]]:
    """Samples in float64, a block at a time, each with the number of its first sample."""
    if isinstance(x, (Tensor, _Array)):
        data = x if isinstance(x, Tensor) else _ndarray(x)
        if not data.shape:
            raise TransformError("expected samples along the first axis, got a single number")
        rows = max(1, _BLOCK * len(data) // max(1, prod(data.shape)))
        for start in range(0, len(data), rows):
            yield start, _double(data[start : start + rows])
        return
    if isinstance(x, (str, bytes, Mapping)) or not isinstance(x, Iterable):
        raise TransformError(f"expected a tensor, an array, or an iterable of these, got {type(x).__name__}")
    start = 0
    for chunk in x:
        if not isinstance(chunk, (Tensor, _Array)):
            raise TransformError(
                f"expected an iterable of tensors or arrays, got one of {type(chunk).__name__}: "
                "write torch.tensor(...) around lists of numbers"
            )
        end = start
        for within, block in _blocks(chunk):
            yield start + within, block
            end = start + within + len(block)
        start = end


def _ndarray(x: Any) -> Any:
    import numpy

    array = numpy.asanyarray(x)  # memory-mapped ones stay so
    if array.dtype.kind not in "biuf":
        raise TransformError(f"expected real numbers, got an array of {array.dtype}")
    return array


def _numbers(x: Any) -> Any:
    """A NumPy array of a type that torch has, in memory of its own."""
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


def _are_scales(mean: Tensor, deviation: Tensor) -> bool:
    return bool(mean.isfinite().all() and deviation.isfinite().all() and (deviation > 0).all())


def _features(mean: Tensor) -> str:
    return "a single feature without an axis" if mean.dim() == 0 else f"{len(mean)} feature{'s' * (len(mean) != 1)}"
