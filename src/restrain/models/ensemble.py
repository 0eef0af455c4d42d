"""Several networks side by side, trained at once and joined to one.

The mean of the outputs of k networks with a hidden layer is the output of one network with k times
as many hidden units, whose output weights are theirs divided by k. While they are trained, each has
its own output and its own loss; each leaves out another part of the samples, on which it is
validated, so that together they learn from all. Joined, they are a network like any other.

Sources: Hansen and Salamon (1990), "Neural network ensembles"; Krogh and Vedelsby (1995), "Neural
network ensembles, cross validation, and active learning".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from restrain.models.data import Samples, shuffled
from restrain.models.layers import Dense, Network
from restrain.models.losses import Loss


class Apart(nn.Module):
    """Output layer of several networks: unit j of n reads for network ⌊j k / n⌋.

    Takes (batch, n) and returns (batch, k, outputs). The bias is the same for all.
    """

    def __init__(self, layer: Dense, members: int) -> None:
        super().__init__()
        self.members, self.joined = members, (layer,)  # in a tuple, so that it isn't a submodule
        self.weight = nn.Parameter(layer.weight.detach() * members**0.5)  # the spread that fits n / k units
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        units, weights = (t.unflatten(-1, (self.members, -1)) for t in (x, self.weight))
        return torch.bmm(units.transpose(0, 1), weights.permute(1, 2, 0)).transpose(0, 1) + self.bias


@dataclass(frozen=True)
class Members(Loss):
    """A loss of each of several networks, shape (batch, members)."""

    loss: Loss
    members: int

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss.losses(*self._flat(output, target)).view(-1, self.members)

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = self.loss.scores(*self._flat(output, target))
        return {key: value.view(-1, self.members) for key, value in found.items()}

    def _flat(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return output.flatten(0, 1), target.repeat_interleave(self.members, 0)


def part(network: Network, members: int) -> None:
    """Give each of so many groups of hidden units its own output."""
    name, layer = list(network.named_children())[-1]
    network.add_module(name, Apart(layer, members))  # type: ignore[arg-type]


def join(network: Network) -> bool:
    """Make one network of several, with the mean of their outputs; return whether it was parted."""
    name, layer = list(network.named_children())[-1]
    if not isinstance(layer, Apart):
        return False
    (joined,) = layer.joined
    with torch.no_grad():
        joined.weight.copy_(layer.weight / layer.members)
    network.add_module(name, joined)
    return True


def shared_out(samples: Samples, members: int, seed: int) -> tuple[Samples, Samples]:
    """Return (training, validation) samples, whose weights are those of each network.

    Each network leaves another part out and is validated on it. Classes are parted in proportion.
    """
    order = shuffled(len(samples), seed, 1)
    rows = slice(None) if samples.rows is None else samples.rows
    if samples.labels and samples.y.ndim == 1:
        order = order[np.argsort(samples.y[rows][order], kind="stable")]
    held = np.zeros((samples.x.shape[0], members))
    which = np.arange(samples.x.shape[0])[rows][order]
    held[which, np.arange(len(order)) % members] = 1
    weight = 1.0 if samples.weight is None else np.asarray(samples.weight)[:, None]
    return replace(samples, weight=weight * (1 - held)), replace(samples, weight=weight * held)
