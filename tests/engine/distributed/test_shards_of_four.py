"""Four processes: every optimizer on uneven shards, replicas, tensor parallelism alone and with FSDP2 around it."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from tests.engine.distributed.test_shards import PLANS, SLOW, STEPS, W, equal, full, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import restrain as rs
from restrain.errors import RestrainWarning
from spawning import spawned

RANKS, MESHES = 4, ((1, 4), (2, 2))
NARROW = {"proximal by block", "units", "units by size", "units as gradient"}  # of blocks and units of five
WIDE = [case for case in SLOW if case[0] not in NARROW]


def train_parallel(plan, rank=0, mesh=None):
    """With tensor parallelism, alone or with FSDP2 around it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    if mesh is not None:
        mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if mesh.size(0) > 1:
            fully_shard(model, mesh=mesh["data"])
        x = x.chunk(mesh.size(0))[mesh.get_local_rank(0)]
    step = torch.optim.Adam(model.parameters(), lr=0.05)
    reg, told = rs.attach(model, plan, step), []
    for _ in range(STEPS):
        step.zero_grad()
        loss = model(x).square().mean()
        whole = reg.loss(loss)
        whole.backward()
        step.step()
        told += [(whole - loss).item(), *reg.values().values()]
    told += [m.gradient for m in reg.measure().values()]
    reg.detach()
    return [full(p) for p in model.parameters()], told


PARALLEL = {
    "loss": [0.1 * rs.L1().on("*"), 0.1 * rs.GroupLasso("out").on(W), 0.1 * rs.NuclearNorm().on(W)],
    "steps": [
        (0.1 * rs.L1() + 0.1 * rs.GroupLasso(per="in")).on(W, how="proximal"),
        rs.MaxNorm(0.3, per="out").on(W),
        rs.Box(-0.1, 0.1).on("*"),
    ],
}


def run_parallel(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RestrainWarning)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results[rank] = [[train_parallel(plan, rank, mesh) for mesh in MESHES] for plan in PARALLEL.values()]
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::restrain.errors.RestrainWarning")
def test_tensor_parallel():
    for found in spawned(run_parallel, RANKS).values():
        for plan, meshes in zip(PARALLEL.values(), found, strict=True):
            for mesh in meshes:
                torch.testing.assert_close(mesh, train_parallel(plan))


def run_many(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RestrainWarning)
    dist.init_process_group("gloo", rank=rank, world_size=4)
    found = {(plan, optimizer): train(PLANS[plan], optimizer, rank, 4, width=50) for plan, optimizer in WIDE}
    found["mesh"] = train(PLANS["loss"] + PLANS["constraints"], "Adam", rank, 4, mesh=(2, 2))
    results[rank] = found
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::restrain.errors.RestrainWarning")
def test_four_ranks_and_every_optimizer():
    found = spawned(run_many, 4)
    for case in WIDE:
        expected = train(PLANS[case[0]], case[1], width=50)
        for rank in range(4):
            weights, told, _ = found[rank][case]
            equal((weights, expected[1] if case[0] == "outputs" else told), expected)
    expected = train(PLANS["loss"] + PLANS["constraints"], "Adam")
    for rank in range(4):
        equal(found[rank]["mesh"], expected)
