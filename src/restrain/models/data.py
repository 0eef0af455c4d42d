"""Samples on their way to the network: rows of arrays, read a batch at a time, never copied whole."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from restrain.errors import PlanError, RestrainWarning
from restrain.fields import listed
from restrain.transforms.normalization import Standardize

_LOADED = 2**30  # bytes of samples that are made tensors at once


@runtime_checkable
class _Frame(Protocol):
    """A table of named columns, each of its own type, of pandas or Polars."""

    columns: Any
    dtypes: Any

    def __getitem__(self, name: Any) -> Any: ...


def as_numbers(given: Any, check: Callable[[], Any], name: str) -> Any:
    """The array of numbers that scikit-learn's `check` makes of what was given.

    Raises:
        PlanError: columns of a table, or the whole, are something else, such as categories or dates.
    """
    try:
        array = check()
    except (TypeError, ValueError) as error:
        if not isinstance(given, _Frame) or not _strange_columns(given):
            raise
        raise _no_numbers(given, name) from error
    if array.dtype.kind not in "biuf":
        raise _no_numbers(given if isinstance(given, _Frame) else array, name)
    return array


def _strange_columns(table: _Frame) -> list[str]:
    """The columns that aren't numbers, with their types."""
    kinds = [np.asarray(table[column]).dtype for column in table.columns]
    return [
        f"{column!r} ({dtype})"
        for column, dtype, kind in zip(table.columns, table.dtypes, kinds, strict=True)
        if kind.kind not in "biuf"
    ]


def _no_numbers(given: Any, name: str) -> PlanError:
    columns = isinstance(given, _Frame)
    said = f"its columns {listed(_strange_columns(given))} aren't" if columns else f"got {given.dtype}"
    return PlanError(
        f"{name} is of numbers, {said}: make numbers of them first, of categories by pandas.get_dummies, of dates as "
        "days since one of them; or leave them out"
    )


@dataclass(frozen=True)
class Scale:
    """What standardises inputs and targets on their way in, and undoes it on the way out."""

    x: Standardize
    y: Standardize

    def inputs(self, x: Tensor) -> Tensor:
        """Standardised inputs."""
        return self.x(x)  # type: ignore[no-any-return]

    def targets(self, y: Tensor) -> Tensor:
        """Standardised targets."""
        return self.y(y)  # type: ignore[no-any-return]


@dataclass
class Samples:
    """Rows of inputs, targets and weights. The arrays may be memory-mapped; `rows` says which of them take part.

    `scale`, where it is given, is what standardises inputs and targets on their way.
    """

    x: Any
    y: Any = None  # None: the target is the input
    weight: Any = None
    rows: Any = None
    dtype: torch.dtype = torch.float32
    labels: bool = False  # targets are class indices
    scale: Scale | None = None
    tensors: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # all of it, once it is loaded

    def __len__(self) -> int:
        return len(self.x) if self.rows is None else len(self.rows)

    @property
    def mean_weight(self) -> float:
        """The mean weight of all rows; one where there are none."""
        if self.weight is None:
            return 1.0
        weight = self.weight if self.rows is None else self.weight[self.rows]
        return float(np.mean(weight, dtype=np.float64))

    def part(self, rows: Any) -> Samples:
        """Some of the rows, by their numbers here."""
        rows = np.asarray(rows)
        return replace(self, tensors=None, rows=rows if self.rows is None else self.rows[rows])

    def load(self) -> None:
        """Make tensors of all rows, where the arrays are in memory and the tensors take little of it.

        Rows of bytes stay bytes; `batch` and the compiled update make numbers of them.
        """
        some = [array for array in (self.x, self.y, self.weight) if array is not None]
        size = sum(len(self) * array[:1].size for array in some) * self.dtype.itemsize
        if self.tensors is not None or size > _LOADED or any(map(_is_mapped, some)):
            return
        if self.scale is not None or self.x.dtype != np.uint8:
            self.tensors = self.batch(slice(None))
        else:
            x = np.ascontiguousarray(self.x if self.rows is None else self.x[self.rows])
            self.tensors = (torch.tensor(x), *replace(self, x=self.x[:, :0]).batch(slice(None))[1:])

    def batch(self, which: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Inputs, targets and weights of some rows, as tensors of their own."""
        if self.tensors is not None:
            where = torch.from_numpy(which)
            x, y, weight = (None if t is None else t.index_select(0, where) for t in self.tensors)
            assert x is not None
            return x.to(self.dtype), y, weight
        index = which if self.rows is None else self.rows[which]
        scale_x = None if self.scale is None else self.scale.inputs
        scale_y = None if self.scale is None or self.labels else self.scale.targets
        x = _tensor(self.x, index, self.dtype, scale_x)
        kind = torch.long if self.labels else self.dtype
        y = None if self.y is None else _tensor(self.y, index, kind, scale_y)
        return x, y, None if self.weight is None else _tensor(self.weight, index, self.dtype)


def _is_mapped(array: Any) -> bool:
    """Whether an array is, or is a part of, a file."""
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def _tensor(array: Any, index: Any, dtype: torch.dtype, scale: Any = None) -> Tensor:
    part = torch.from_numpy(np.array(array[index]))
    return (part if scale is None else scale(part.double())).to(dtype)


def batches(size: int, batch_size: int, order: Any = None, *, pairs: bool = False) -> Iterator[Any]:
    """The numbers of the rows of each batch, in that order, or in theirs.

    With `pairs`, a last batch of one row joins the one before.
    """
    stops = [*range(batch_size, size, batch_size), size]
    if pairs and len(stops) > 1 and stops[-1] - stops[-2] == 1:
        del stops[-2]
    start = 0
    for stop in stops if size else ():
        yield np.arange(start, stop) if order is None else order[start:stop]
        start = stop


def generator(seed: int, *path: int) -> torch.Generator:
    """A generator of its own for a seed and a path of numbers, such as a purpose and an epoch."""
    text = ",".join(map(str, (seed, *path))).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(number)


def shuffled(size: int, seed: int, *path: int) -> Any:
    """The numbers from 0 to size - 1 in an order that seed and path determine."""
    return torch.randperm(size, generator=generator(seed, *path)).numpy()


def split(samples: Samples, part: float, seed: int) -> tuple[Samples, Samples]:
    """Training and validation samples, drawn by the seed; of class indices, each class in its proportion.

    Raises:
        PlanError: a part that isn't between 0 and 1, or that leaves one of them empty.
    """
    if not 0 < part < 1:
        raise PlanError(f"valid= is a part between 0 and 1, or validation data; got {part!r}")
    count = round(part * len(samples))
    if not 0 < count < len(samples):
        raise PlanError(f"valid={part!r} of {len(samples)} samples leaves none to validate on, or none to train on")
    rows = slice(None) if samples.rows is None else samples.rows
    labels = samples.y[rows] if samples.labels and samples.y.ndim == 1 else None
    train, valid = held_back(shuffled(len(samples), seed, 1), count, labels)
    return samples.part(train), samples.part(valid)


def held_back(order: Any, count: int, labels: Any = None) -> tuple[Any, Any]:
    """Rows to train on and `count` rows to validate with, each sorted.

    Args:
        order: the rows in random order; the first are held back.
        count: how many to hold back.
        labels: the class of each row, by its number. Each class is held back in its proportion, rounded by the largest
            remainders, as scikit-learn's `StratifiedShuffleSplit` does; at least one row of each is trained on.

    Raises:
        PlanError: that many rows can't be held back, with a row of each class left.
    """
    if labels is None:
        return np.sort(order[count:]), np.sort(order[:count])
    _, first, kinds, sizes = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    if len(order) - count < len(sizes):
        raise PlanError(
            f"holding back {count} of {len(order)} rows leaves fewer to train on than there are classes, {len(sizes)}: "
            "hold back fewer, or give validation data of their own"
        )
    exact, most = sizes * count / len(order), sizes - 1
    shares = np.minimum(np.floor(exact), most).astype(int)
    by_remainder = np.lexsort((first, np.floor(exact) - exact))  # equal ones as they come in the random order
    while shares.sum() < count:
        free = by_remainder[shares[by_remainder] < most[by_remainder]]
        shares[free[: count - shares.sum()]] += 1
    by_class = np.argsort(kinds, kind="stable")
    within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.zeros(len(order), bool)
    held[by_class] = within < np.repeat(shares, sizes)
    return np.sort(order[~held]), np.sort(order[held])


def warn_of_unheld(labels: Any, held: Any, names: Any) -> None:
    """Warn of classes of which no row is held back.

    Args:
        labels: the class of each row, by its number.
        held: those of the rows that are held back.
        names: the name of each class.
    """
    absent = np.setdiff1d(labels, held)
    if len(absent):
        shown = listed([repr(name) for name in np.asarray(names)[absent].tolist()])
        warnings.warn(
            f"no row is held back of {shown}: too few rows for that part, and at least one is trained on. Validation "
            "doesn't judge these classes; a larger valid=, or validation data of their own, would",
            RestrainWarning,
            stacklevel=2,
        )


def fingerprint(samples: Samples | None) -> list[Any]:
    """A few numbers that tell one set of samples from another: shapes, and a digest of some rows."""
    if samples is None:
        return []
    digest = hashlib.blake2b(digest_size=16)
    where = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), 256)).astype(int))
    for tensor in replace(samples, scale=None, tensors=None).batch(where):
        if tensor is not None:
            digest.update(tensor.numpy().tobytes())
    return [len(samples), list(samples.x.shape), digest.hexdigest()]
