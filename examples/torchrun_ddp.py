"""Plain torchrun: the same training alone and on several processes, with DistributedDataParallel.

    python examples/torchrun_ddp.py
    torchrun --nproc-per-node 2 examples/torchrun_ddp.py

Both print the same numbers: penalties on parameters are the same on every process; those on
activations are means over a process's part of the batch, which DDP averages, as it does with the
loss. That takes parts of equal size, and as many batches on every process: docs/trainers.md says
what to do where there aren't.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import restrain as rs

PLAN = [
    2e-3 * rs.GroupLasso("in").on("0.weight", how="proximal", name="inputs"),
    1e-3 * rs.L1().on(rs.outputs("1"), name="sparse"),
    1e-4 * rs.L2().on("*.weight", name="decay"),
]


def main():
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    torch.manual_seed(0)  # the same model everywhere
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 1))
    x = torch.randn(512, 20)
    y = x[:, :3].sum(1, keepdim=True)  # the other 17 inputs don't matter
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reg = rs.attach(wrapped, PLAN, optimizer)
    for epoch in range(30):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch))  # the same everywhere
        for batch in order.split(64):
            mine = batch.chunk(ranks)[rank]
            loss = (wrapped(x[mine]) - y[mine]).square().mean()
            optimizer.zero_grad()
            reg.loss(loss).backward()
            optimizer.step()
    values = reg.values()  # on every process, before the `if`
    if rank == 0:
        with torch.no_grad():
            error = float((model(x) - y).square().mean())
        unused = int((model[0].weight == 0).all(0).sum())
        print(f"processes: {ranks}")
        print(f"mean squared error: {error:.5f}")
        print(f"inputs that nothing reads: {unused} of 20")
        print(f"decay: {values['decay']:.5f}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
