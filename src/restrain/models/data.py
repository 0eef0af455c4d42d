"""Samples for the network: arrays read batch by batch, split, shuffled and scaled."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from restrain.errors import PlanError, RestrainWarning
from restrain.fields import level_of_caller, listed
from restrain.tables import is_frame, odd_columns
from restrain.transforms.normalization import Standardize

_LOADED = 2**30  # bytes; larger data are converted batch by batch


def as_numbers(given: Any, check: Callable[[], Any], name: str) -> Any:
    """Return the result of `check`, scikit-learn's validation of `given`, if it is numeric.

    Raises:
        PlanError: the array, or a column of the table, isn't numeric (categories or dates, say).
    """
    try:
        array = check()
    except (TypeError, ValueError) as error:
        if not is_frame(given) or not odd_columns(given):
            raise
        raise _no_numbers(given, name) from error
    if array.dtype.kind not in "biuf" or (is_frame(given) and odd_columns(given)):
        raise _no_numbers(given if is_frame(given) else array, name)
    return array


def _no_numbers(given: Any, name: str) -> PlanError:
    if is_frame(given):
        return PlanError(
            f"{name} is of numbers, as in the training; its columns {listed(odd_columns(given))} aren't: give the "
            "columns and types of the training"
        )
    return PlanError(
        f"{name} is of numbers, got {given.dtype}: make numbers of it first, of categories by pandas.get_dummies, of "
        "dates as days since one of them"
    )


@dataclass(frozen=True)
class Scale:
    """Standardisation of inputs (`x`) and, unless None, of targets (`y`)."""

    x: Standardize
    y: Standardize | None

    def inputs(self, x: Tensor) -> Tensor:
        """Return the inputs, standardised."""
        return self.x(x)  # type: ignore[no-any-return]

    def targets(self, y: Tensor) -> Tensor:
        """Return the targets, standardised unless `y` is None."""
        return y if self.y is None else self.y(y)


def standardize(chunks: Callable[[], Iterator[Any]], weight: Any) -> Standardize:
    """Return the standardisation of samples by their mean and deviation, weighted.

    Args:
        chunks: returns blocks of samples, in order.
        weight: above zero, of each sample; None: all are equal.
    """
    found = Standardize().fit(chunks())
    if weight is None:
        return found

    def mean(formula: Callable[[Any], Any]) -> Any:
        start, total = 0, 0.0
        for block in chunks():
            rows = np.asarray(block, np.float64)
            w = np.asarray(weight[start : start + len(rows)], np.float64).reshape(-1, *[1] * (rows.ndim - 1))
            total = total + (w * formula(rows)).reshape(-1, rows.shape[-1]).sum(0) / (
                rows.size / len(rows) / rows.shape[-1]
            )
            start += len(rows)
        return total / np.sum(weight, dtype=np.float64)

    centre = mean(lambda rows: rows)
    deviation = np.sqrt(mean(lambda rows: np.square(rows - centre)))
    deviation = np.where(deviation <= 1e-12 * np.abs(centre), 1.0, deviation)
    found.load_state_dict({"mean": torch.as_tensor(centre), "deviation": torch.as_tensor(deviation)})
    return found


def per_channel(chunks: Callable[[], Iterator[Any]], weight: Any, channels: int) -> Standardize:
    """Return the standardisation of images as rows: one mean and deviation for each channel."""
    found = standardize(lambda: (chunk.reshape(len(chunk), -1, channels) for chunk in chunks()), weight)
    times = next(iter(chunks())).shape[1] // channels
    found.load_state_dict({name: tensor.repeat(times) for name, tensor in found.state_dict().items()})
    return found


def joined(given: Any, names: list[str]) -> Any:
    """Return the columns of several inputs side by side.

    Args:
        given: {name of an input: its columns}.
        names: the inputs of the network, in order.

    Raises:
        PlanError: the names are others.
    """
    if set(given) != set(names):
        raise PlanError(
            f"X of several inputs is a dict of {', '.join(map(repr, names))}; got {listed(list(map(repr, given)))}"
        )
    return np.concatenate([np.asarray(given[name]) for name in names], -1)


def drawn(call: Callable[[], Any], calls: int) -> Any:
    """Return the batches of several calls as one: an array, or a tuple of arrays.

    Raises:
        PlanError: a call returns something else.
    """
    some = [call() for _ in range(calls)]
    if not all(isinstance(batch, (tuple, list)) for batch in some):
        return np.concatenate([np.asarray(batch) for batch in some])
    if len({len(batch) for batch in some}) != 1 or not 1 <= len(some[0]) <= 3:
        raise PlanError("a callable returns a batch: (X, y), (X, y, sample_weight), or X of an Autoencoder")
    return tuple(
        None if parts[0] is None else np.concatenate([np.asarray(part) for part in parts])
        for parts in zip(*some, strict=True)
    )


def called(data: Any, calls: int) -> Any:
    """Return data, or of a callable what so many calls return, as by `drawn`."""
    return drawn(data, calls) if callable(data) else data


@dataclass
class Samples:
    """Inputs, targets and weights of samples, as arrays that may be memory-mapped.

    `rows` selects the samples that take part (None: all). `scale` standardises inputs and targets
    when they are read.
    """

    x: Any
    y: Any = None  # None: the target is the input
    weight: Any = None
    rows: Any = None
    dtype: torch.dtype = torch.float32
    labels: bool = False  # targets are class indices
    scale: Scale | None = None
    tensors: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # all rows, after `load`

    def __len__(self) -> int:
        return self.x.shape[0] if self.rows is None else len(self.rows)

    @property
    def mean_weight(self) -> float:
        """Return the mean weight of the selected rows; 1 without weights."""
        if self.weight is None:
            return 1.0
        weight = self.weight if self.rows is None else self.weight[self.rows]
        return float(np.mean(weight, dtype=np.float64))

    def part(self, rows: Any) -> Samples:
        """Return a subset of these samples; `rows` are indices into the selected rows."""
        rows = np.asarray(rows)
        return replace(self, tensors=None, rows=rows if self.rows is None else self.rows[rows])

    def load(self) -> None:
        """Convert all rows to tensors, unless they are memory-mapped or exceed `_LOADED` bytes.

        Inputs of dtype uint8 without a scale stay uint8; `batch` converts them.
        """
        some = [array for array in (self.x, self.y, self.weight) if array is not None]
        size = sum(len(self) * math.prod(array.shape[1:]) for array in some) * self.dtype.itemsize
        if self.tensors is not None or size > _LOADED or any(map(_is_mapped, some)):
            return
        if self.scale is not None or self.x.dtype != np.uint8:
            self.tensors = self.batch(slice(None))
        else:
            x = np.ascontiguousarray(dense(self.x if self.rows is None else self.x[self.rows]))
            self.tensors = (torch.tensor(x, device="cpu"), *replace(self, x=self.x[:, :0]).batch(slice(None))[1:])

    def batch(self, which: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (inputs, targets, weights) of the rows `which`, as new tensors."""
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


def dense(array: Any) -> Any:
    """Return a sparse matrix as an array; others as they are."""
    return array.toarray() if issparse(array) else array


def _is_mapped(array: Any) -> bool:
    """True if the array is memory-mapped, or a view of a memory-mapped one."""
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def _tensor(array: Any, index: Any, dtype: torch.dtype, scale: Any = None) -> Tensor:
    part = torch.from_numpy(np.array(dense(array[index])))
    return (part if scale is None else scale(part.double())).to(dtype)


def batches(size: int, batch_size: int, order: Any = None, *, pairs: bool = False) -> Iterator[Any]:
    """Yield the row indices of each batch, taken from `order` (None: 0, 1, ..., size - 1).

    With `pairs`, a last batch of a single row is merged into the batch before it.
    """
    stops = [*range(batch_size, size, batch_size), size]
    if pairs and len(stops) > 1 and stops[-1] - stops[-2] == 1:
        del stops[-2]
    start = 0
    for stop in stops if size else ():
        yield np.arange(start, stop) if order is None else order[start:stop]
        start = stop


def generator(seed: int, *path: int) -> torch.Generator:
    """Return an independent generator for a seed and a path of numbers (purpose, epoch)."""
    text = ",".join(map(str, (seed, *path))).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(number)


def shuffled(size: int, seed: int, *path: int) -> Any:
    """Return a permutation of 0, ..., size - 1 determined by seed and path."""
    return torch.randperm(size, generator=generator(seed, *path), device="cpu").numpy()


def split(samples: Samples, part: float, seed: int) -> tuple[Samples, Samples]:
    """Split into (training, validation) samples, by the seed; class labels are stratified.

    Raises:
        PlanError: `part` isn't between 0 and 1, leaves one side empty, or a class without training.
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
    """Split rows into (rows to train on, `count` rows to validate on), both sorted.

    Args:
        order: the row indices in random order; the first are held back.
        count: number of rows to hold back.
        labels: the class of each row, indexed by row, for a stratified split. Each class is held
            back in proportion, rounded by largest remainders as in scikit-learn's
            `StratifiedShuffleSplit`; at least one row of each class is trained on.

    Raises:
        PlanError: with `labels`, fewer rows than classes would be left to train on.
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
    by_remainder = np.lexsort((first, np.floor(exact) - exact))  # ties in the random order
    while shares.sum() < count:
        free = by_remainder[shares[by_remainder] < most[by_remainder]]
        shares[free[: count - shares.sum()]] += 1
    by_class = np.argsort(kinds, kind="stable")
    within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.zeros(len(order), bool)
    held[by_class] = within < np.repeat(shares, sizes)
    return np.sort(order[~held]), np.sort(order[held])


def warn_of_unheld(labels: Any, held: Any, names: Any) -> None:
    """Warn of classes without a row in the validation data.

    Args:
        labels: class index of each training row.
        held: class index of each row that is held back.
        names: name of each class, by class index.
    """
    absent = np.setdiff1d(labels, held)
    if len(absent):
        shown = listed([repr(name) for name in np.asarray(names)[absent].tolist()])
        warnings.warn(
            f"no row is held back of {shown}: too few rows for that part, and at least one is trained on. Validation "
            "doesn't judge these classes; a larger valid=, or validation data of their own, would",
            RestrainWarning,
            stacklevel=level_of_caller(),
        )


def fingerprint(samples: Samples | None) -> list[Any]:
    """Return length, shape of X and a digest of up to 256 rows, to recognise the same samples."""
    if samples is None:
        return []
    digest = hashlib.blake2b(digest_size=16)
    where = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), 256)).astype(int))
    for tensor in replace(samples, scale=None, tensors=None).batch(where):
        if tensor is not None:
            digest.update(tensor.numpy().tobytes())
    return [len(samples), list(samples.x.shape), digest.hexdigest()]


_AT_ONCE = 2**18  # numbers read at a time outside of training


def at_once(array: Any) -> int:
    """Return the number of samples to read at a time (at least 1)."""
    return int(max(1, _AT_ONCE // max(1, math.prod(array.shape[1:]))))
