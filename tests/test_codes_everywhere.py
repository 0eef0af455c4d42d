"""Activation functions of sparse codes in ways of running that `everywhere` has; they have no rows in its tables."""

import warnings

import pytest

from everywhere import COLUMNS
from everywhere.column import outcome
from everywhere.kinds import APART, CODES
from restrain.errors import RestrainWarning

FAST = (
    "checkpoint_non_reentrant",
    "checkpoint_reentrant",
    "compiled_aot_eager",
    "ddp_2",
    "fsdp_2",
)
SLOW = (
    "compiled_inductor",
    "compiled_checkpoint",
    "whole_step",
    "ddp_4",
    "ddp_compiled",
    "ddp_of_inductor",
    "fsdp_checkpoint_2",
    "fsdp_compiled",
)


def cells():
    for names, marks in ((FAST, ()), (SLOW, pytest.mark.slow)):
        for name in names:
            yield from (
                pytest.param(kind, COLUMNS[name], id=f"{name}-{kind.name}", marks=marks) for kind in CODES.values()
            )


@pytest.mark.parametrize(("kind", "column"), list(cells()))
def test_equal_to_the_plain_run(kind, column):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)
        assert outcome(kind, column) == ("equal", "")


@pytest.mark.parametrize("kind", APART.values(), ids=APART)
def test_what_each_process_does_alone_is_seen(kind):
    with pytest.raises(AssertionError, match="not close"):
        outcome(kind, COLUMNS["ddp_2"])
