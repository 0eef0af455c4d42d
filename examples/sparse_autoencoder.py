"""A sparse autoencoder on the activations of another model, to read what they represent.

    pip install restrain
    python examples/sparse_autoencoder.py

The data are made up: each sample is a sum of a few of 32 directions in 16 dimensions, so that there
are more features than dimensions. An L1 on the code finds them; decoder columns of length one keep
the code from hiding in a large decoder, and the strength warms up so that features don't die at the
start.
"""

import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

FEATURES, DIMENSIONS = 32, 16


def samples(directions, count):
    active = torch.rand(count, FEATURES) < 0.05
    return (active * (0.5 + torch.rand(count, FEATURES))) @ directions


def main():
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(FEATURES, DIMENSIONS), dim=1)
    model = nn.Sequential(nn.Linear(DIMENSIONS, 64), nn.ReLU(), nn.Linear(64, DIMENSIONS))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    plan = [
        rs.schedules.WarmUp(500) * (0.3 * rs.L1()).on(rs.outputs("1"), name="sparse"),
        rs.UnitNorm("in").on("2.weight"),  # a column for each input of the decoder
    ]
    reg = rs.attach(model, plan, optimizer)
    for step in range(2000):
        x = samples(directions, 256)
        loss = (model(x) - x).square().sum(1).mean()
        optimizer.zero_grad()
        reg.loss(loss).backward()
        optimizer.step()
        if step % 500 == 499:
            print(f"step {step + 1}: data loss {loss:.4f}, penalty {reg.values()['sparse']:.4f}")
    with torch.no_grad():
        x = samples(directions, 2000)
        code = model[1](model[0](x))
        explained = 1 - (model(x) - x).square().sum() / x.square().sum()
        found = (directions @ model[2].weight).max(1).values > 0.9
    print(f"active in a sample: {float((code > 0).sum(1).float().mean()):.1f} of 64 units")
    print(f"explained: {float(explained):.3f}")
    print(f"directions found: {int(found.sum())} of {FEATURES}")


if __name__ == "__main__":
    main()
