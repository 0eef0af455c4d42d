"""What it costs to track a training: steps with and without reg.track, in turns.

    python benchmarks/tracking.py [--quick] [--out folder]

Each job is a number of training steps with the same rules, without tracking and with every=10 and every=1; a tracked
step's own time is the difference over the tracked steps.
"""

import itertools

import torch
from measure import Section, judged, options, paired, quartiles, ratios, spread, times
from torch import nn
from torch.nn import functional as F

import restrain as rs


def network(sizes):
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def training(sizes, batch, steps, every):
    """A function that runs so many steps; every=None tracks nothing."""
    model = network(sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    plan = [
        1e-4 * rs.L2().on(rs.weights, name="small"),
        1e-5 * rs.GroupLasso(per="in").on("0.weight", how="proximal", name="inputs"),
    ]
    reg = rs.attach(model, plan, optimizer)
    if every is not None:
        reg.track(every=every, points=10**6)  # rows aren't thinned, which would make steps cheaper
    x, y = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))

    def run():
        for _ in range(steps):
            optimizer.zero_grad()
            reg.loss(F.cross_entropy(model(x), y)).backward()
            optimizer.step()

    return run


def main():
    given = options(__doc__)
    torch.set_num_threads(given.threads)
    section = Section(__file__, "Tracking", "What the history of a training costs.")
    cases = {
        "20-32-2, batch 50": ([20, 32, 2], 50, 200),
        "64-100-10, batch 64": ([64, 100, 10], 64, 200),
        "784-1000-10, batch 64": ([784, 1000, 10], 64, 40),
        "784-1000-1000-10, batch 128": ([784, 1000, 1000, 10], 128, 20),
    }
    rows = []
    for name, (sizes, batch, steps) in list(cases.items())[: 1 if given.quick else None]:
        jobs = {every: training(sizes, batch, steps, every) for every in (None, 10, 1)}
        seconds = paired(jobs, 2 if given.quick else 15, budget=20)
        plain = quartiles(seconds[None])[1] / steps
        own = quartiles([(b - a) / steps for a, b in zip(seconds[None], seconds[1], strict=True)])[1]
        over = ratios(seconds, 10, None)
        rows.append([name, spread(seconds[None], 1e3 / steps), f"{own * 1e3:.3f}", times(over), judged(over[1], 1.01)])
        rows[-1].append(f"{own / plain:.0%}")
    columns = ["network", "a step, ms", "a tracked step more, ms", "every=10, × a step", "goal", "every=1 adds"]
    section.table("Training steps with a history", columns, rows)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
