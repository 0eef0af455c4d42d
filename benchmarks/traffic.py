"""What rules send between processes in a training step under FSDP2: counted on gloo processes, beside the formulas.

    python benchmarks/traffic.py [--ranks 4]

A message is one call of a collective, its size what it leaves on each process: of an all-gather the whole tensor, of an
all-reduce the numbers. Counted is the GPT of `examples/gpt2_fsdp.py` with one kind of rule at a time, less what the
same step sends without rules. Then the formulas' figures for 6.5 billion weights on 64 processes; `docs/scale.md`
explains them.
"""

import argparse
import os
import socket
import sys
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import restrain as rs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import gpt2_fsdp as example

SIZES = {"tiny": "--layers 1 --heads 4 --width 16", "wider": "--layers 2 --heads 4 --width 48"}
LARGE = "--layers 32 --heads 32 --width 4096 --context 2048"
PHASES = ("forward", "loss", "backward", "step", "values")
ALL, OUT, INTO = "*.weight", "*.attention.out.weight", "*.mlp.into.weight"


@dataclass(frozen=True)
class Kind:
    """A rule, and what it sends by the formula: {phase: what}, in phases where it sends anything."""

    what: rs.rules.What
    where: object
    how: str | None = None
    gathers: dict = field(default_factory=dict)  # so many tensors of a parameter's size, for each parameter
    numbers: dict = field(default_factory=dict)  # messages of so many bytes, for all parameters together
    each: dict = field(default_factory=dict)  # so many bytes for each parameter, in one message for all
    after: int = 1  # steps

    @property
    def rule(self):
        return self.what.on(self.where, **({"how": self.how} if self.how else {}))

    def expected(self, shapes, ranks):
        """{phase: (messages, bytes)} for float32 parameters of these shapes, split along dim 0."""
        found = {}
        whole = sum(4 * -(-shape[0] // ranks) * ranks * prod(shape[1:]) for shape in shapes)
        for phase in PHASES:
            times = self.gathers.get(phase, 0)
            sent = [*self.numbers.get(phase, ()), *([self.each[phase] * len(shapes)] if phase in self.each else [])]
            found[phase] = (times * len(shapes) + len(sent), times * whole + sum(sent))
        return found


TOLD = {"values": (4,)}
IN_LOSS, GATHERED = {"loss": (4,), "values": (4,)}, {"loss": 1, "values": 1}
KINDS = {
    "entrywise, in the loss": Kind(rs.L2(), ALL, numbers=IN_LOSS),
    "entrywise, at the step": Kind(rs.L1(), ALL, "proximal", numbers=TOLD),
    "whole groups, in the loss": Kind(rs.GroupLasso("out"), INTO, numbers=IN_LOSS),
    "whole groups, at the step": Kind(rs.GroupLasso("out"), INTO, "proximal", numbers=TOLD),
    "split groups, in the loss": Kind(rs.GroupLasso("in"), INTO, gathers=GATHERED),
    "split groups, gradient": Kind(rs.GroupLasso("in"), INTO, "gradient", {"step": 2, "values": 1}),
    "split groups, decoupled": Kind(rs.GroupLasso("in"), INTO, "decoupled", {"step": 1, "values": 1}),
    "split groups, proximal, Adam": Kind(rs.GroupLasso("in"), INTO, "proximal", {"step": 2, "values": 1}),
    "constraint on split groups": Kind(rs.MaxNorm(1.0, per="in"), INTO, gathers={"step": 2}),  # and what Adam keeps
    "matrices, in the loss": Kind(rs.NuclearNorm(), INTO, gathers=GATHERED),
    "constraint on matrices": Kind(rs.SpectralBall(1.0), INTO, gathers={"step": 2}),
    "outputs": Kind(rs.L1(), rs.outputs("*.mlp.relu")),
    "target of zeros": Kind(rs.Target(zeros=0.5, every=1) * rs.L1(), INTO, "proximal", numbers=TOLD | {"step": (16,)}),
    "target of activity": Kind(
        rs.Target(active=0.5, every=1) * rs.L1(), rs.outputs("*.mlp.relu"), numbers={"step": (16,)}
    ),
    "target of a gradient's share": Kind(
        rs.Target(gradient_share=0.1, every=1) * rs.L1(), INTO, "gradient", numbers=TOLD | {"step": (16,)}
    ),
    "look for empty layers": Kind(rs.L1(), INTO, "proximal", numbers=TOLD, each={"step": 8}, after=49),
}


class Traffic(TorchDispatchMode):
    """Counts the collectives that are called within it, and the bytes that they leave."""

    def __init__(self):
        super().__init__()
        self.messages, self.bytes = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it has become an op on own parts
        result = op(*args, **(kwargs or {}))
        if op.namespace in ("c10d", "_c10d_functional") and not op._opname.startswith(("wait", "_wrap")):
            self.messages += 1
            left = args[0] if op.namespace == "c10d" else result  # c10d's write into their first argument
            tensors = left if isinstance(left, list | tuple) else [left]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return result


def options_of(text):
    return example.parsed(["--device", "cpu", "--context", "8", "--batch", "8", *text.split()])


def step_of(options, rank, ranks, kind=None):
    """{phase: (messages, bytes)} of the second step, with one rule or without any; and its parameters' shapes."""
    with torch.device("meta"):
        model = example.GPT(options.layers, options.heads, options.width, options.context)
    example.split(model, options, ranks, torch.device("cpu"))
    example.initialise(model.to_empty(device="cpu"), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reg = rs.attach(model, kind.rule, optimizer) if kind else None
    x, y = example.batch(example.text(), options, 0, rank, ranks)
    for last in (False, True):
        if reg and last:  # as if so many steps had been
            reg.load_state_dict(reg.state_dict() | {"optimizer_steps": [kind.after] * len(reg._steppers)})
        counts = {phase: Traffic() for phase in PHASES}
        with counts["forward"]:
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        with counts["loss"]:
            loss = reg.loss(loss) if reg else loss
        with counts["backward"]:
            loss.backward()
        with counts["step"]:
            optimizer.step()
        with counts["values"]:
            _ = reg.values() if reg else None
        optimizer.zero_grad()
    shapes = [tuple(p.shape) for bound in reg._bounds for p, _ in bound.tensors(model)] if reg else []
    if reg:
        reg.detach()
    return {phase: (count.messages, count.bytes) for phase, count in counts.items()}, shapes


def measured(rank, ranks, sizes=SIZES, kinds=KINDS):
    """{(size, kind): ({phase: counted less those without rules}, the formula's)}, with those without under None."""
    found = {}
    for size, text in sizes.items():
        options = options_of(text)
        plain, _ = step_of(options, rank, ranks)
        found[size, None] = plain, plain
        for name, kind in kinds.items():
            counted, shapes = step_of(options, rank, ranks, kind)
            added = {phase: tuple(a - b for a, b in zip(counted[phase], plain[phase], strict=True)) for phase in PHASES}
            found[size, name] = added, kind.expected(shapes, ranks)
    return found


def shown(counts):
    told = [f"{phase} {messages} x, {size:,} bytes" for phase, (messages, size) in counts.items() if messages]
    return "; ".join(told) or "nothing"


def run_rank(rank, port, ranks):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for (size, kind), (counted, expected) in measured(rank, ranks).items():
        if rank == 0:
            same = "" if counted == expected else f"   BUT the formula gives {shown(expected)}"
            print(f"{size:6} {kind or '(FSDP2 itself)':36} {shown(counted)}{same}")
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down


def large(ranks=64):
    """The formulas for a large model."""
    options = options_of(LARGE)
    with torch.device("meta"):
        model = example.GPT(options.layers, options.heads, options.width, options.context)
    entries = sum(p.numel() for p in model.parameters())
    print(f"\nby the formulas: {entries / 1e9:.1f} billion weights on {ranks} processes, a step")
    for name, kind in KINDS.items():
        shapes = [tuple(p.shape) for key, p in model.named_parameters() if fnmatch(key, str(kind.where))]
        print(f"{name:36} {shown(kind.expected(shapes, ranks))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    ranks = parser.parse_args().ranks
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    print(f"counted on {ranks} processes: what a step sends more with a rule than without")
    torch.multiprocessing.spawn(run_rank, (port, ranks), nprocs=ranks)
    large()


if __name__ == "__main__":
    main()
