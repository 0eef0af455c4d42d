"""What it costs to notice that layers or tensors of a model were replaced since rules were attached.

    python benchmarks/structure.py

The time of `Structure.changed`, which is asked twice a step (at the forward and at the loss), as a part of a step of
training, for networks of 200 layers.
"""

import time

import torch
from torch import nn

from restrain.engine.attach.structure import Structure


def least(call, count=50):
    """The least seconds of a call."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main():
    for width in (16, 64, 256):
        model = nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(width, width), nn.ReLU())))
        optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(32, width)

        def step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        whole, look = least(step), least(Structure(model).changed)
        print(
            f"200 layers of {width}: step {whole * 1e3:.2f} ms, two looks {look * 2e3:.2f} ms, {2 * look / whole:.2%}"
        )


if __name__ == "__main__":
    main()
