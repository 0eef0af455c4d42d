"""Processes with unequal parts of a batch, or unequal numbers of batches, as docs/trainers.md has it."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import restrain as rs
from spawning import spawned

RANKS = 2
PLAN = [
    0.1 * rs.L2().on("*.weight"),
    0.3 * rs.L1().on(rs.outputs("1")),
    0.05 * rs.GroupLasso("in").on("0.weight", how="proximal"),
]
IN_LOSS = PLAN[:2]
generator = torch.Generator().manual_seed(0)
X = torch.randn(8, 4, dtype=torch.float64, generator=generator)
BATCHES = torch.randn(3, 8, 4, dtype=torch.float64, generator=generator)


def start(plan, wrap=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    run = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return run, optimizer, rs.attach(run, plan, optimizer)


def error(run, x):
    return (run(x).squeeze(1) - x.sum(1)).square().mean()


def step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.parameters()])


def unequal_parts(rank, share):
    """Five and three samples: a loss that is the mean of a part counts by the part's size."""
    run, optimizer, reg = start(PLAN, wrap=True)
    x = X.split([5, 3])[rank]
    weight = len(x) * RANKS / len(X)
    for _ in range(3):
        step(reg.loss(weight * error(run, x), share=weight if share else 1.0), optimizer)
    return weights(run)


def unequal_numbers(rank, divide):
    """Three batches and two; torch's Join keeps the one that has none going."""
    run, optimizer, reg = start(IN_LOSS, wrap=True)
    with Join([run], divide_by_initial_world_size=divide):
        for batch in BATCHES[: 3 - rank]:
            step(reg.loss(error(run, batch.chunk(RANKS)[rank])), optimizer)
    return weights(run)


def run_rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    parts = {share: unequal_parts(rank, share) for share in (True, False)}
    numbers = {divide: unequal_numbers(rank, divide) for divide in (True, False)}
    results[rank] = (parts, numbers)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down


@pytest.fixture(scope="module")
def ranks():
    return spawned(run_rank, RANKS)


@pytest.mark.slow
def test_a_share_by_the_parts_size_makes_unequal_parts_one_batch(ranks):
    run, optimizer, reg = start(PLAN)
    for _ in range(3):
        step(reg.loss(error(run, X)), optimizer)
    for parts, _ in ranks.values():
        torch.testing.assert_close(parts[True], weights(run))
        assert (parts[False] - weights(run)).abs().max() > 1e-3  # activations' means would count alike


@pytest.mark.slow
@pytest.mark.parametrize("divide", [True, False])
def test_join_keeps_penalties_in_proportion_to_the_loss(ranks, divide):
    """In the third update only one process has a batch: by default torch halves its gradient, of loss and penalties."""
    run, optimizer, reg = start(IN_LOSS)
    for batch in BATCHES[:2]:
        step(reg.loss(error(run, batch)), optimizer)
    step(reg.loss(error(run, BATCHES[2].chunk(RANKS)[0])) / (RANKS if divide else 1), optimizer)
    for _, numbers in ranks.values():
        torch.testing.assert_close(numbers[divide], weights(run))
