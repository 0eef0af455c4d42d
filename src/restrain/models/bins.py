"""Numbers cut into bins: a fixed first layer, by which a network sees steps and bends in a column.

A number x_j becomes itself and, for each bin of its column from a to b,

    max(0, min(1, (x_j - a) / (b - a))) - 1/2

which rises within the bin and is flat outside. A sum of these is any continuous function with bends
at the edges. The edges are quantiles of the training samples.

Source: Gorishniy, Rubachev and Babenko (2022), "On embeddings for numerical features in tabular
deep learning" (piecewise linear encoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Edges = list[np.ndarray[Any, np.dtype[np.float64]]]


class Bins(nn.Module):
    """The inputs, and the place of each input in its bins; nothing is learned by gradients.

    A row of `weight` is one bin: 1 / width in the column that it reads, zeros elsewhere. `bias` is
    -start / width. Both are buffers, which `set` fills.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        place = torch.get_default_device()  # that of the other layers
        self.register_buffer("weight", torch.zeros(size - inputs, inputs, device=place))
        self.register_buffer("bias", torch.zeros(size - inputs, device=place))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.linear(x, self.weight, self.bias).clamp(0, 1) - 0.5], -1)

    @torch.no_grad()
    def set(self, edges: Edges, mean: Any = 0.0, deviation: Any = 1.0) -> None:
        """Set the bins.

        Args:
            edges: of each input, in the units of the data, rising; fewer than three are no bins.
            mean, deviation: of each input, where inputs come standardised.
        """
        mean, deviation = (np.broadcast_to(np.asarray(v, np.float64), len(edges)) for v in (mean, deviation))
        self.weight.zero_()
        start = 0
        for column, own in enumerate(edges):
            count = _bins(own)
            if count:
                widths = torch.as_tensor(np.diff(own) / deviation[column])
                starts = torch.as_tensor((own[:-1] - mean[column]) / deviation[column])
                self.weight[start : start + count, column] = (1 / widths).to(self.weight)
                self.bias[start : start + count] = (-starts / widths).to(self.bias)
                start += count

    def read(self, features: Any) -> Any:
        """Return which inputs are read, True or False, given which features of the output are."""
        inputs = self.weight.shape[1]
        return features[:inputs] | (features[inputs:, None] & (self.weight != 0).numpy()).any(0)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} inputs, {self.weight.shape[0]} bins"


def edges(x: Any, most: int) -> Edges:
    """Return the edges of up to so many bins of each column: its quantiles at equal steps.

    Args:
        x: numbers, shape (samples, inputs).
        most: number of bins; equal edges, as of a column with few values, are one. An edge is one
            of the values.
    """
    found = np.quantile(np.asarray(x, np.float64), np.linspace(0, 1, most + 1), axis=0, method="nearest")
    return [np.unique(column) for column in found.T]


def size(found: Edges) -> int:
    """Return the size of the layer's output."""
    return len(found) + sum(map(_bins, found))


def _bins(own: Sequence[Any] | Any) -> int:
    return len(own) - 1 if len(own) > 2 else 0
