"""Batches of samples from an iterator, a `DataLoader` or a `Dataset`, read once into arrays.

The arrays lie in memory up to `LOADED` bytes. More goes into a temporary file (in `TMPDIR`), which
is read batch by batch, and is gone when nobody uses it. So samples can be shuffled, split and
scaled, however many they are; what a loader draws at random (augmentations) is drawn once.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from restrain.errors import FileAccessError, PlanError
from restrain.tables import is_frame

LOADED = 2**30  # bytes
_ROWS = 1024  # of a dataset, read at a time
_TITLES = ("X", "y", "sample_weight")


def is_stream(x: Any) -> bool:
    """Return True for a DataLoader, a Dataset or an iterator."""
    return isinstance(x, (DataLoader, Dataset, Iterator))


def read(stream: Any, targets: bool) -> tuple[Any, Any, Any]:
    """Return (X, y, sample_weight) of all batches; y and weights are None where there are none.

    Args:
        stream: yields X, (X, y) or (X, y, sample_weight), arrays or tensors with a common first
            axis.
        targets: False for a model without targets, which uses X alone.

    Raises:
        PlanError: a batch has another form, type or shape than the first.
        FileAccessError: there is no space for a temporary file.
    """
    columns: list[_Column] = []
    for number, batch in enumerate(_batches(stream)):
        members = _members(batch, targets, number)
        if number == 0:
            columns = [_Column(name, value) for name, value in zip(_TITLES, members, strict=False)]
        if len(members) != len(columns):
            raise PlanError(f"batch {number} has {len(members)} members, and the first has {len(columns)}")
        rows = {len(value) for value in members}
        if len(rows) > 1:
            raise PlanError(f"batch {number} has members of {' and '.join(map(str, sorted(rows)))} samples")
        for column, value in zip(columns, members, strict=True):
            column.add(value, number)
    if not columns or not columns[0].count:
        raise PlanError("the data have no samples; an iterator that was used before is at its end: make a new one")
    found = [column.array() for column in columns]
    x, y, weight = [*found, None, None][:3]
    return x, y, weight


def _batches(stream: Any) -> Iterable[Any]:
    if not isinstance(stream, Dataset):
        return stream  # type: ignore[no-any-return]
    return DataLoader(stream, batch_size=_ROWS)


def _members(batch: Any, targets: bool, number: int) -> list[Any]:
    """Return the arrays of a batch.

    Raises:
        PlanError: it isn't a batch.
    """
    members = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    wanted = "(X, y) or (X, y, sample_weight)" if targets else "X, or (X,)"
    arrays = [_array(member) for member in (members if targets else members[:1])]
    if (
        not all(isinstance(one, np.ndarray) and one.ndim > 0 for one in arrays)
        or not (2 if targets else 1) <= len(arrays) <= 3
    ):
        kinds = ", ".join(type(member).__name__ for member in members[:4])
        raise PlanError(f"a batch is {wanted}, arrays or tensors with an axis of samples; batch {number} is ({kinds})")
    return arrays


def _array(member: Any) -> Any:
    if isinstance(member, Tensor):
        return member.detach().cpu().numpy()
    if isinstance(member, (list, tuple)):
        return np.asarray(member)
    return np.asarray(member) if is_frame(member) or hasattr(member, "__array__") else member


class _Column:
    """One member of all batches: in memory, or beyond `LOADED` bytes in a temporary file."""

    def __init__(self, name: str, first: Any) -> None:
        self.name, self.shape, self.dtype = name, first.shape[1:], first.dtype
        self.parts: list[Any] = []
        self.file: Any = None
        self.count = 0
        if name == "X" and first.dtype.kind not in "biuf":
            raise PlanError(
                f"X is of numbers, got batches of {first.dtype}: encode tables before, by rs.TableEncoder().fit(table)"
            )

    def add(self, value: Any, number: int) -> None:
        """Add a batch."""
        kinds = (value.dtype.kind, self.dtype.kind)
        if value.shape[1:] != self.shape or (value.dtype != self.dtype and set(kinds) - set("UO")):
            raise PlanError(
                f"{self.name} of batch {number} has samples of shape {value.shape[1:]} and type {value.dtype}, and the "
                f"first {self.shape} and {self.dtype}"
            )
        self.parts.append(np.array(value))
        self.count += len(value)
        if self.dtype.kind in "biuf" and (self.file is not None or self._size > LOADED):
            self._spill()

    @property
    def _size(self) -> int:
        return int(self.count * math.prod(self.shape) * self.dtype.itemsize)

    def _spill(self) -> None:
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile()  # noqa: SIM115
            for part in self.parts:
                self.file.write(np.ascontiguousarray(part).tobytes())
        except OSError as error:
            raise FileAccessError(
                f"{self._size:,} bytes and more of data can't be written into {tempfile.gettempdir()}: "
                f"{error.strerror}; make room there, or set TMPDIR to another folder"
            ) from error
        self.parts.clear()

    def array(self) -> Any:
        """Return all batches as one array, or a memory-mapped one."""
        if self.file is None:
            return np.concatenate(self.parts)
        with contextlib.closing(self.file):
            self.file.flush()
            return np.memmap(self.file, self.dtype, "r", 0, (self.count, *self.shape))
