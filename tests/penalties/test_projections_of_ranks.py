"""Jacobian penalties by random projections on two processes: each draws for its samples, as one does for both parts."""

import pytest
import torch

from everywhere.distributed import compared, train_ddp, train_fsdp
from everywhere.kinds import PROJECTED
from everywhere.training import plain
from everywhere.workers import together


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_ddp, train_fsdp])
def test_two_ranks_draw_as_two_parts(train):
    found, expected = compared(together(2, train, name=PROJECTED.name), plain(PROJECTED, parts=2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
