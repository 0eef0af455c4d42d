"""Activation functions of sparse codes in ways of running that `everywhere` has; they have no rows in its tables."""

import warnings

import pytest
import torch

from everywhere import COLUMNS
from everywhere.column import outcome
from everywhere.kinds import APART, CODES
from everywhere.running import checkpointed
from everywhere.training import attached, fresh, plain
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
        # Dynamo looks at every attribute of a tensor that is no leaf
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        assert outcome(kind, column) == ("equal", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODES.values(), ids=CODES)
def test_compiled_checkpoints_after_an_eager_forward(kind):
    """The counts are tensors of the first forward, and Dynamo makes none in a checkpoint."""
    model = fresh(checkpointed(False))
    run = attached(kind, model).steps(1)
    run.call = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run.steps(2, start=1).result()
    torch.compiler.reset()
    torch.testing.assert_close(found, plain(kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", APART.values(), ids=APART)
def test_what_each_process_does_alone_is_seen(kind):
    with pytest.raises(AssertionError, match="not close"):
        outcome(kind, COLUMNS["ddp_2"])
