"""Tracked steps of two gloo processes that share parameters by FSDP2 are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import restrain as rs
from spawning import spawned

RULES = [
    0.02 * rs.L1().on("*.weight", how="proximal", name="l1"),
    0.5 * rs.GroupLasso(per="out").on("0.weight", how="gradient", name="rows"),
    0.5 * rs.GroupLasso(per="in").on("2.weight", how="gradient", name="columns"),
]


def train(rank, sharded):
    """The table of three steps of a network with zero rows and columns; 5 rows are unevenly split."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        model[0].weight[0] = model[2].weight[:, 0] = 0
        model[0].bias[0] = -1  # so both stay
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = rs.attach(model, RULES, optimizer)
    reg.track(1, shares=True)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        reg.loss(model(x).square().mean()).backward()
        optimizer.step()
    return list(reg.history)


def run_rank(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results[rank] = train(rank, True)
    dist.destroy_process_group()


def test_both_processes_have_the_table_of_one():
    found, alone = spawned(run_rank, 2), train(0, False)
    assert alone[-1]["dead/0.weight"] != alone[-1]["zeros/0.weight"] > 0
    assert 0 < alone[-1]["zero_groups/2.weight"] != alone[-1]["dead/2.weight"]
    for rank in range(2):
        for row, expected in zip(found[rank], alone, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, nan_ok=True)
