"""A language model like GPT-2, with rules, on one process or on many by FSDP2.

    python examples/gpt2_fsdp.py                     # tiny, on a CPU, half a minute
    torchrun --nproc-per-node 2 examples/gpt2_fsdp.py --checkpoint /tmp/gpt  # the same losses
    torchrun --nproc-per-node 4 examples/gpt2_fsdp.py --checkpoint /tmp/gpt --resume --steps 400
    torchrun ... examples/gpt2_fsdp.py --layers 12 --heads 12 --width 768 --context 1024 --mixed

The last is GPT-2 small; GPT-2 XL is --layers 48 --heads 25 --width 1600, a model of 6.5 billion
weights --layers 32 --heads 32 --width 4096. It learns the bytes of a text that ships with Python,
its own help. Three proximal rules take whole attention heads and whole units of the MLPs out; one
in the loss makes the MLPs' activations small. Lines that are restrain's say so.
"""

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

import restrain as rs

BYTES = 256  # kinds of tokens


class Attention(nn.Module):
    """Head h has the rows of `qkv` from h · 3 · size and the columns of `out` from h · size."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Of which a unit is a row of `into`."""

    def __init__(self, width):
        super().__init__()
        self.into, self.relu = nn.Linear(width, 4 * width, bias=False), nn.ReLU()
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.out(self.relu(self.into(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, bias=False), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, bias=False), MLP(width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 without biases, and with a ReLU, whose zeros are zeros; its head is the embedding."""

    def __init__(self, layers, heads, width, context):
        super().__init__()
        self.token, self.position = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)


def rules(options):
    """restrain: the plan. Proximal strengths have the unit of a gradient."""
    size = options.width // options.heads
    group = options.group_lasso * rs.schedules.WarmUp(options.warm_up)
    return [
        group * rs.GroupLasso(per=(3 * size,)).on("*.attention.qkv.weight", how="proximal"),  # heads: blocks of rows
        group * rs.GroupLasso(per=(options.width, size)).on("*.attention.out.weight", how="proximal"),  # of columns
        group * rs.GroupLasso(per="out").on("*.mlp.into.weight", how="proximal"),  # units
        options.activation_l1 * rs.L1().on(rs.outputs("*.mlp.relu")),
    ]


def split(model, options, ranks, device):
    """FSDP2, a block at a time; with --replicas, on so many copies.

    By default a weight is split along dim 0. `out` is split along dim 1 where that keeps heads
    whole: then its rule acts on each process's own part. Otherwise restrain gathers that tensor at
    each step, and reg.table() says so.
    """
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if options.mixed else {}
    end = {"output_dtype": torch.float32} if options.mixed else {}
    copies, parts = options.replicas, ranks // options.replicas
    mesh = dist.init_device_mesh(device.type, (copies, parts), mesh_dim_names=("copies", "parts"))
    by_head = {id(block.attention.out.weight) for block in model.blocks} if options.heads % parts == 0 else set()
    how = {"mesh": mesh if copies > 1 else mesh["parts"]}
    how["shard_placement_fn"] = lambda p: Shard(1) if id(p) in by_head else None
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**half), **how)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**half, **end), **how)


@torch.no_grad()
def initialise(model, seed):
    """The same weights on any number of processes; at most one of them is whole at any time."""
    for number, p in enumerate(model.parameters()):
        full = torch.ones(p.shape)
        if p.dim() > 1:
            full.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed + number))
        full = full.to(p.device)
        sharded = isinstance(p, DTensor)
        p.copy_(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None) if sharded else full)


class Training(Stateful):
    """All that a checkpoint holds."""

    def __init__(self, model, optimizer, reg):
        self.model, self.optimizer, self.reg, self.step = model, optimizer, reg, 0

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "rules": self.reg.state_dict(), "step": self.step}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.reg.load_state_dict(state["rules"])
        self.step = state["step"]


def text():
    return torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()


def batch(data, options, step, rank, ranks):
    """This process's part of the batch of a step, which depends on nothing but the step."""
    draws = torch.Generator().manual_seed(options.seed + step)
    begins = torch.randint(len(data) - options.context - 1, (options.batch,), generator=draws).chunk(ranks)[rank]
    rows = torch.stack([data[i : i + options.context + 1] for i in begins.tolist()])
    return rows[:, :-1], rows[:, 1:]


def mean(number, device):
    """Of a number that each process has its own of."""
    if dist.is_initialized():
        number = torch.tensor(number, device=device)
        dist.all_reduce(number)
        number = float(number) / dist.get_world_size()
    return number


def train(options):
    """Train, or go on; the data loss of each step, and the training as it ended."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(options.device)
    with torch.device("meta"):
        model = GPT(options.layers, options.heads, options.width, options.context)
    if ranks > 1:
        split(model, options, ranks, device)
    initialise(model.to_empty(device=device), options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    reg = rs.attach(model, rules(options), optimizer)  # restrain: after fully_shard, with the optimizer
    training, data, losses = Training(model, optimizer, reg), text(), []
    if options.resume:
        latest = max(Path(options.checkpoint).glob("step-*"), key=lambda path: int(path.name[5:]))
        dcp.load({"training": training}, checkpoint_id=latest)
    while training.step < options.steps:
        x, y = (t.to(device) for t in batch(data, options, training.step, rank, ranks))
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed and ranks == 1):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        reg.loss(loss).backward()  # restrain: the loss with the penalties
        optimizer.step()  # restrain: the proximal rules act after it, by its hooks
        optimizer.zero_grad()
        training.step += 1
        losses.append(mean(float(loss.detach()), device))
        if training.step % options.every == 0 or training.step == options.steps:
            penalties = {name: mean(value, device) for name, value in reg.values().items()}  # on all processes
            if rank == 0:
                print(f"step {training.step}: loss {losses[-1]:.4f}, penalties {sum(penalties.values()):.4f}")
            if options.checkpoint:
                path = Path(options.checkpoint, f"step-{training.step}")
                dcp.save({"training": training}, checkpoint_id=path)
    return losses, training


def zeroed(model, options):
    """How many heads and units are exactly zero."""

    def full(p):
        return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()

    heads = [full(b.attention.out.weight).unflatten(1, (options.heads, -1)).abs().amax((0, 2)) for b in model.blocks]
    units = [full(b.mlp.into.weight).abs().amax(1) for b in model.blocks]
    return [int((torch.cat(sizes) == 0).sum()) for sizes in (heads, units)]


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"layers": 2, "heads": 4, "width": 64, "context": 64, "batch": 8, "replicas": 1, "seed": 0}
    numbers |= {"steps": 200, "every": 50, "lr": 2e-3, "group_lasso": 1e-4, "warm_up": 50, "activation_l1": 1e-5}
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--mixed", action="store_true", help="compute in bfloat16; weights and rules stay in float32")
    parser.add_argument("--checkpoint", metavar="DIR", help="save there each --every steps, and at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint DIR")
    return options


def main(arguments=None):
    options = parsed(arguments)
    if "RANK" in os.environ:  # torchrun
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    _, training = train(options)
    table = training.reg.table(values=True)  # on all processes
    heads, units = zeroed(training.model, options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(table)
        print(f"exactly zero: {heads} of {options.layers * options.heads} heads, ", end="")
        print(f"{units} of {4 * options.layers * options.width} units")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
