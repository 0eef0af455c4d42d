"""The history of a training: a table with a row for each tracked step, of bounded size."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from restrain.errors import PlanError
from restrain.extras import needing
from restrain.fields import brief, is_whole
from restrain.html_table import html_table
from restrain.text_table import text_table

_WAITING = 64  # rows left on the device until they are read
_SHOWN, _WIDTH = 20, 110  # greatest numbers of rows and characters of a line in `str`
_KINDS = ("step", "data_loss", "penalties", "shares", "zeros", "zero_groups", "dead", "norms", "strengths")
_STATE = ("every", "points", "columns", "rows")


class History:
    """Table of tracked steps: data loss, and values, zeros and norms; made by `reg.track`.

    When `points` rows are full, every second one goes and `every` doubles, so that the rows stay
    evenly spaced. `history[-1]` is the last row, a dict; `history["data_loss"]` a column, a list.

    Args:
        every: number of steps from one row to the next.
        points: the greatest number of rows.

    >>> model = nn.Linear(3, 2)
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> reg = rs.attach(model, rs.L2().on("weight", name="l2"), opt, track=1)
    >>> reg.loss(model(torch.ones(4, 3)).square().mean()).backward()
    >>> opt.step()
    >>> len(reg.history), reg.history["step"], "penalties/l2" in reg.history.columns
    (1, [1], True)
    """

    def __init__(self, every: int, points: int) -> None:
        self.every, self.points = every, points
        self._columns: list[str] = ["step", "data_loss"]
        self._rows: list[array[float]] = []  # of as many numbers as there were columns
        self._waiting: list[tuple[list[str], list[float], Tensor, Callable[[list[float]], list[float]]]] = []
        self._lock = threading.RLock()

    def add(
        self, known: Mapping[str, float], names: Sequence[str], tensors: Tensor, finish: Callable[..., list[float]]
    ) -> None:
        """Add a row, without waiting for the device.

        Args:
            known: the numbers that are on the host already; "step" is one of them.
            names: the columns of the other numbers.
            tensors: a vector with these, raw.
            finish: function of their list that returns the numbers of the row.
        """
        with self._lock:
            self._waiting.append(([*known, *names], list(known.values()), tensors, finish))
            if len(self._waiting) == _WAITING:
                self._settle()

    def _settle(self) -> None:
        """Read the waiting rows, and thin the table where it is full."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            for names, numbers, tensors, finish in waiting:
                row = dict(zip(names, [*numbers, *finish(tensors.tolist())], strict=True))
                new = sorted(set(row) - set(self._columns), key=list(row).index)
                self._columns += sorted(new, key=lambda name: _KINDS.index(name.partition("/")[0]))
                self._append(array("d", [row.get(name, math.nan) for name in self._columns]))

    def _append(self, row: array[float]) -> None:
        if row[0] % self.every:  # the table was thinned while the row was waiting
            return
        self._rows.append(row)
        self._thin()

    def _thin(self) -> None:
        """Drop every second row while there are too many."""
        while len(self._rows) > self.points:
            self.every *= 2
            even = [one for one in self._rows if one[0] % self.every == 0]
            # of unevenly spaced rows, after a change of `every`, every second
            self._rows = even if self.points // 4 < len(even) <= self.points else self._rows[1::2]

    def due(self, step: int) -> bool:
        """Return True if a step is tracked."""
        return step % self.every == 0

    # ---------------------------------------------------------------- the table

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, "step" and "data_loss" first."""
        self._settle()
        return tuple(self._columns)

    def __len__(self) -> int:
        self._settle()
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Yield {column: number} of each row; nan where nothing was measured."""
        self._settle()
        return iter([self._dict(row) for row in self._rows])

    @overload
    def __getitem__(self, which: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, which: str) -> list[float]: ...

    def __getitem__(self, which: int | str) -> dict[str, float] | list[float]:
        self._settle()
        if isinstance(which, str):
            if which not in self._columns:
                raise KeyError(f"no column {which!r}; there are: {brief(self._columns)}")
            at = self._columns.index(which)
            numbers = [row[at] if at < len(row) else math.nan for row in self._rows]
            return [int(step) for step in numbers] if which == "step" else numbers
        return self._dict(self._rows[which])

    def _dict(self, row: array[float]) -> dict[str, float]:
        numbers = [*row, *[math.nan] * (len(self._columns) - len(row))]
        return {**dict(zip(self._columns, numbers, strict=True)), "step": int(row[0])}

    def to_frame(self) -> Any:
        """Return a pandas table with a row for each tracked step."""
        with needing("cli", "a table of a history"):
            import pandas

        return pandas.DataFrame(list(self), columns=list(self.columns)).set_index("step")

    def cells(self) -> list[list[str]]:
        """Return the table as text: the first columns, and rows evenly spaced, head first."""
        self._settle()
        every = -(-len(self._rows) // _SHOWN) or 1
        rows = [self._dict(row) for row in self._rows[::-1][::every][::-1]]
        found: list[list[str]] = []
        for name in self._columns:
            column = [name, *[f"{row[name]:.6g}" for row in rows]]
            if found and sum(max(map(len, one)) + 2 for one in [*found, column]) > _WIDTH:
                break
            found.append(column)
        return [list(row) for row in zip(*found, strict=True)]

    def summary(self) -> str:
        """Return a line of the number of rows, and of columns that `cells` leaves out."""
        more = len(self._columns) - len(self.cells()[0])
        rest = f"; {more} more columns are in history.columns" if more else ""
        return f"{len(self)} tracked steps, one every {self.every}{rest}"

    def __str__(self) -> str:
        cells = self.cells()
        return f"{self.summary()}\n{text_table(cells, range(len(cells[0])))}"

    def _repr_html_(self) -> str:
        cells = self.cells()
        return html_table(cells, range(len(cells[0])), [self.summary()])

    def __repr__(self) -> str:
        return f"<History of {len(self)} tracked steps, {len(self._columns)} columns>"

    # ---------------------------------------------------------------- its state

    def state(self) -> tuple[tuple[str, Any], ...]:
        """Return the table as plain data.

        It is a tuple: of a dict, torch.distributed.checkpoint loads only the keys that a fresh
        attachment has.
        """
        self._settle()
        rows = [list(row) for row in self._rows]
        return (("every", self.every), ("points", self.points), ("columns", list(self._columns)), ("rows", rows))

    @classmethod
    def of(cls, state: Any, steps: int | None = None) -> History:
        """Return the history of a state.

        Args:
            state: as `state()` returns it, or read from JSON.
            steps: the number of steps of the training that goes on; None: any.

        Raises:
            PlanError: a part is missing or invalid.
        """
        parts = dict(state) if _is_pairs(state) else {}
        if set(parts) != set(_STATE):
            raise PlanError(f"the history of a state has the parts {', '.join(_STATE)}; got {brief(state)}")
        every, points, columns, rows = (parts[key] for key in _STATE)
        if not is_whole(every, 1) or not is_whole(points, 2):
            raise PlanError(f"a history has every=1 or more, points=2 or more; got {brief(every)}, {brief(points)}")
        names = isinstance(columns, (list, tuple)) and all(isinstance(name, str) for name in columns)
        if not names or list(columns[:2]) != ["step", "data_loss"] or len(set(columns)) < len(columns):
            raise PlanError(f"the columns of a history are names, step and data_loss first; got {brief(columns)}")
        _check_rows(rows, len(columns), points, steps)
        found = cls(int(every), int(points))
        found._columns, found._rows = list(columns), [array("d", row) for row in rows]
        return found

    def change(self, every: int, points: int) -> None:
        """Go on with other settings."""
        self._settle()
        with self._lock:
            self.every, self.points = every, points
            self._thin()

    def replace(self, other: History) -> None:
        """Take the settings and rows of another history; this object stays the one that is read."""
        self._settle()
        with self._lock:
            self.every, self.points, self._columns, self._rows = (
                other.every,
                other.points,
                list(other._columns),
                list(other._rows),
            )

    def since(self, steps: int) -> None:
        """Drop the rows of later steps: the training goes on from `steps`."""
        self._settle()
        with self._lock:
            self._rows = [row for row in self._rows if row[0] <= steps]

    def __reduce__(self) -> Any:
        return (History.of, (self.state(),))


def _is_pairs(state: Any) -> bool:
    if not isinstance(state, (list, tuple)):
        return False
    return all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in state)


def _check_rows(rows: Any, columns: int, points: int, steps: int | None) -> None:
    """Check the rows of a state: numbers, with rising steps up to `steps`."""
    if not isinstance(rows, (list, tuple)) or len(rows) > points:
        raise PlanError(f"the rows of a history are a list of up to {points}; got {brief(rows)}")
    before = 0.0
    for row in rows:
        numbers = isinstance(row, (list, tuple)) and all(isinstance(n, float | int) for n in row)
        if not numbers or not 2 <= len(row) <= columns or not float(row[0]).is_integer() or row[0] <= before:
            raise PlanError(f"a row of a history is up to {columns} numbers, the step first; got {brief(row)}")
        before = row[0]
    if steps is not None and before > steps:
        raise PlanError(f"this state has a history up to step {before:g}, but has taken {steps} steps")


def as_vector(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return 0-d tensors as a vector of the widest floats of a device, with few operations."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    if not tensors:
        return torch.empty(0, dtype=wide, device=device)
    kinds: dict[Any, list[int]] = {}
    for number, one in enumerate(tensors):
        kinds.setdefault((one.dtype, one.device), []).append(number)
    parts = [torch.stack([tensors[i] for i in those]).to(device, wide) for those in kinds.values()]
    order = [i for those in kinds.values() for i in those]
    joined = torch.cat(parts)
    if order == sorted(order):
        return joined
    places = torch.tensor(order, device="cpu").argsort().to(device)
    return joined[places]
