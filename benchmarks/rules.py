"""What rules cost: ratios of paired runs in one process, in the order A B A B, with medians and spread.

    python benchmarks/rules.py [--rounds 15]

Lists of parameters like those of an MLP (784-1000-1000-10), of ResNet-50 and of GPT-2 small; L1 as the loop that
everybody writes, against the same rule as loss, gradient, decoupled and proximal. Then whole training steps of the MLP:
with nothing attached against attachments with nothing to do, and with an output penalty.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

MLP = [(1000, 784), (1000,), (1000, 1000), (1000,), (10, 1000), (10,)]
GPT2 = [(50257, 768), (1024, 768), (768,), (768,)] + 12 * [
    *[(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)],
    *[(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)],
]


def resnet50():
    """The 161 shapes of ResNet-50's parameters."""
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for blocks, planes in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for out, into, k in ((planes, width, 1), (planes, planes, 3), (4 * planes, planes, 1)):
                shapes += [(out, into, k, k), (out,), (out,)]
            if block == 0:
                shapes += [(4 * planes, width, 1, 1), (4 * planes,), (4 * planes,)]
            width = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


def paired(rounds, **jobs):
    """{job: seconds of each round}; jobs take turns, after one round that isn't counted."""
    seconds = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title, seconds, base):
    """A line a job: median and spread in ms, and the median of the paired ratios base / job."""
    print(f"\n{title}")
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(seconds[base], times, strict=True))
        low, high = min(times) * 1e3, max(times) * 1e3
        print(
            f"  {name:42} {statistics.median(times) * 1e3:8.2f} ms ({low:.2f} - {high:.2f})  {base} / this {ratio:5.2f}"
        )


def model_of(shapes):
    """A model that holds parameters of these shapes, with gradients."""
    model = nn.Module()
    for number, shape in enumerate(shapes):
        p = nn.Parameter(torch.randn(shape) / 30)
        p.grad = torch.randn_like(p) / 30
        model.register_parameter(f"p{number}", p)
    return model


def lists(rounds):
    """L1 over all parameters of a list: in the loss, as gradient or decay before a step, as prox after it."""
    for title, shapes in (("MLP", MLP), ("ResNet-50", resnet50()), ("GPT-2 small", GPT2)):
        model = model_of(shapes)
        ps = list(model.parameters())
        entries = sum(p.numel() for p in ps)
        others = [torch.randn_like(p) for p in ps]
        # learning rate zero moves nothing, and skips the rules: so a tiny one
        optimizer = torch.optim.SGD(ps, lr=1e-30)
        in_loss = rs.attach(model, 1e-4 * rs.L1().on("*"))
        at_step = {
            how: rs.attach(model, 1e-4 * rs.L1().on("*", how=how), optimizer)
            for how in ("gradient", "decoupled", "proximal")
        }
        steppers = {how: reg._steppers[0] for how, reg in at_step.items()}

        def loop(ps=ps):
            (1e-4 * sum(p.abs().sum() for p in ps)).backward()

        def floor(ps=ps, others=others):
            with torch.no_grad():
                for p, other in zip(ps, others, strict=True):
                    p.add_(other, alpha=1e-30)

        seconds = paired(
            rounds,
            loop=loop,
            loss=lambda reg=in_loss: reg.penalty().backward(),
            gradient=lambda before=steppers["gradient"].before, optimizer=optimizer: before(optimizer, (), {}),
            decoupled=lambda before=steppers["decoupled"].before, optimizer=optimizer: before(optimizer, (), {}),
            proximal=lambda after=steppers["proximal"].after, optimizer=optimizer: after(optimizer, (), {}),
            floor=floor,
        )
        show(f"L1 on {title}: {len(ps)} tensors, {entries / 1e6:.1f} M entries", seconds, "loop")


def trainer(attach=None, compiled=False):
    """A job: one training step of the MLP at batch 64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reg = attach(model, optimizer) if attach else None
    run = torch.compile(model, fullgraph=True) if compiled else model
    x, y = torch.randn(64, 784), torch.randint(10, (64,))

    def step():
        for _ in range(10):
            loss = F.cross_entropy(run(x), y)
            (reg.loss(loss) if reg else loss).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def steps(rounds):
    """Ten training steps of the MLP, plain and with attachments."""
    idle = rs.L1().on("nothing*", optional=True)
    outputs = 1e-4 * rs.L1().on(rs.outputs(nn.ReLU))
    seconds = paired(
        rounds,
        **{
            "plain": trainer(),
            "plain again": trainer(),
            "a rule that matches nothing": trainer(lambda model, optimizer: rs.attach(model, idle, optimizer)),
            "attached and detached": trainer(lambda model, optimizer: rs.attach(model, outputs).detach()),
            "L1 on two outputs": trainer(lambda model, optimizer: rs.attach(model, outputs)),
        },
    )
    show("ten training steps of the MLP, batch 64", seconds, "plain")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    steps(rounds)
    lists(rounds)
