"""What a column is: a way of running, what it is compared with, and which kinds it refuses."""

import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

import restrain as rs
from everywhere.training import PROGRESS
from restrain.errors import RestrainError

COLUMNS = {}
ATTACHING = {"attach", "__enter__"}  # functions of engine/attach/attachment.py in which a refusal is in time


@dataclass(frozen=True)
class Column:
    """A way of running.

    `run(kind)` gives what was found and what the reference gives: nested lists, tuples and dicts of tensors and
    numbers, compared by `torch.testing.assert_close` with `rtol` and `atol`.
    """

    name: str
    title: str  # in the table
    group: str  # of the table: one table a group
    run: object
    rounding: float = 1e-12  # rtol and atol
    refuses: dict = field(default_factory=dict)  # {kind: a pattern of what the error says}
    senseless: dict = field(default_factory=dict)  # {kind: why there is nothing to run}
    fast: object = ()  # kinds that `make test` runs; True: all
    cuda: bool = False  # runs on a GPU only


def column(title, group, name=None, **options):
    """Make the decorated function a column; its name is the function's unless one is given."""

    def add(run):
        made = Column(name or run.__name__, title, group, run, **options)
        assert made.name not in COLUMNS, f"two columns {made.name}"
        COLUMNS[made.name] = made
        return run

    return add


def outcome(kind, column):
    """`equal`, `refused` (at attach) or `refused at first` (in the first forward), and what the error says.

    Any other end of a cell is an error.
    """
    PROGRESS.clear()
    try:
        found, expected = column.run(kind)
    except RestrainError as refusal:
        return refused(refusal, column.refuses.get(kind.name))
    assert kind.name not in column.refuses, "runs, though it is declared as refused"
    near = column.rounding
    torch.testing.assert_close(found, expected, rtol=near, atol=near, check_dtype=near < 1e-6)
    return "equal", ""


def refused(refusal, wanted):
    """When a declared refusal came, and what it says."""
    said = " ".join(str(refusal).split())
    assert wanted is not None, f"refused, though it isn't declared: {said}"
    assert re.search(wanted, said), f"refused for another reason than {wanted!r}: {said}"
    assert at_attach(refusal) or not PROGRESS, f"not refused when attached but after steps: {said}"
    return "refused" if at_attach(refusal) else "refused at first", said


def at_attach(error):
    """Whether an error was raised while rules were being attached, here or on other ranks (see `workers`)."""
    if hasattr(error, "attaching"):
        return error.attaching
    here = str(Path(rs.__file__).parent / "engine" / "attach" / "attachment.py")
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == here and frame.name in ATTACHING for frame in frames)
