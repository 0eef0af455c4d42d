"""What it costs to begin: attaching a plan, and importing.

    python benchmarks/attach.py [--quick] [--out folder]

A plan of 50 rules on a model of 1,000 tensors, each rule on twenty tensors of its own, on all tensors, on all outputs;
`import restrain` against `import torch`, each in fresh processes that take turns.
"""

import os
import subprocess
import sys
import time

import torch
from measure import Section, judged, options, paired, quartiles, ratios, spread, times
from torch import nn

import restrain as rs

HOWS = ("loss", "gradient", "decoupled", "proximal")


def blocks(tensors, count):
    """A model of as many blocks as there are rules, of linear layers."""
    each = tensors // count // 2
    return nn.Sequential(*(nn.Sequential(*(nn.Linear(4, 4) for _ in range(each))) for _ in range(count)))


def plans(count):
    """{what: rules}."""
    own = [(number, HOWS[number % 4]) for number in range(count)]
    return {
        "each on a block of its own": [1e-4 * rs.L2().on(f"{n}.*", how=how, name=f"r{n}") for n, how in own],
        "each on every tensor": [1e-4 * rs.L2().on("*", how=how, name=f"r{n}") for n, how in own],
        "each on all outputs": [1e-4 * rs.L1().on(rs.outputs(nn.Linear), name=f"r{n}") for n, _ in own],
    }


def attaching(section, quick):
    tensors, count = (200, 5) if quick else (1000, 50)
    model = blocks(tensors, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made, jobs = [], {}
    for what, rules in plans(count).items():
        jobs[what] = lambda rules=rules: made.append(rs.attach(model, rules, optimizer))

    def before(name):
        while made:
            made.pop().detach()

    seconds = paired(jobs, 2 if quick else 15, budget=12, before=before)
    rows = []
    for what, found in seconds.items():
        rows.append([f"{count} rules, {what}", spread(found, 1e3), judged(quartiles(found)[1] * 1e3, 50)])
    section.table(f"Attaching to {tensors:,} tensors", ["plan", "ms", "goal, ms"], rows)


def chain(layers, width):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def step_of(model, where, count):
    """A training step with so many rules, L1 and L2 in turn, each of its own strength; no rule for 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    rules = [1e-6 * (n + 1) * (rs.L1() if n % 2 else rs.L2()).on(where, name=f"r{n}") for n in range(count)]
    reg, x = rs.attach(model, rules, optimizer), torch.randn(8, model[0].in_features)

    def step():
        optimizer.zero_grad()
        reg.loss(model(x).square().mean()).backward()
        optimizer.step()

    return step


def many(section, quick):
    """500 rules on the same tensors, against one and two; and the first step with them."""
    rows = []
    layers, count = (10, 20) if quick else (200, 500)
    for what, where, few in (("weights", "*.weight", 1), ("outputs", rs.outputs(nn.Linear), 2)):
        jobs = {str(n): step_of(chain(layers, 16), where, n) for n in (few, count)}
        began = time.perf_counter()
        jobs[str(count)]()
        first = time.perf_counter() - began
        seconds = paired(jobs, 2 if quick else 15, budget=8)
        over = ratios(seconds, str(count), str(few))
        cells = [spread(seconds[str(n)], 1e3) for n in (few, count)]
        rows.append([what, f"{few}", *cells, times(over), judged(over[1], 3), f"{1e3 * first:.0f}", judged(first, 2)])
    columns = ["on", "few", "few: ms", f"{count}: ms", "ratio", "goal", "first step, ms", "goal, s"]
    section.table(f"A training step with {count} rules on {layers} layers", columns, rows)
    model = chain(20 if quick else 500, 4)
    rules = [1e-6 * (n + 1) * rs.L1().on(rs.outputs(nn.Linear), name=f"r{n}") for n in range(50)]
    made = []
    seconds = paired(
        {"attach": lambda: made.append(rs.attach(model, rules))},
        5,
        before=lambda _: [made.pop().detach() for _ in made],
    )["attach"]
    row = [
        f"50 rules on the outputs of {len(model)} layers",
        spread(seconds, 1e3),
        judged(quartiles(seconds)[1] * 1e3, 100),
    ]
    section.table("Attaching many rules to many outputs", ["plan", "ms", "goal, ms"], [row])


def importing(section, quick):
    # bytecode is kept, as pip does it for what it installs; the first round, which isn't counted, writes ours
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def of(name):
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True, env=given)

    seconds = paired({"torch": of("torch"), "restrain": of("restrain")}, 2 if quick else 11)
    over = ratios(seconds, "restrain", "torch")
    rows = [["import torch", spread(seconds["torch"]), "", ""]]
    rows.append(["import restrain", spread(seconds["restrain"]), times(over), judged(over[1], 1.15)])
    section.table("Importing, in a fresh process", ["", "s", "× import torch", "goal"], rows)


def main():
    given = options(__doc__)
    torch.set_num_threads(given.threads)
    section = Section(__file__, "Attaching and importing", "What it costs to begin.")
    attaching(section, given.quick)
    many(section, given.quick)
    importing(section, given.quick)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
