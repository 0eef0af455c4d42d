"""What a fitted model says about its inputs: coefficients, used inputs, importances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.inspection import permutation_importance
from torch import Tensor

from restrain.models.bins import Bins
from restrain.models.layers import Cumulative, Dense, Network
from restrain.transforms.normalization import Standardize


def is_linear(network: Network) -> bool:
    """Return True for a single dense layer without an activation."""
    layers = list(network.children())
    return len(layers) == 1 and (
        isinstance(layers[0], Cumulative) or (isinstance(layers[0], Dense) and layers[0].activation == "linear")
    )


@torch.no_grad()
def line(
    network: Network, inputs: Standardize | None, targets: Standardize | None, outputs: int | None
) -> tuple[Any, Any]:
    """Return (slopes, intercepts) of a linear network in the units of the data, in float64.

    Args:
        network: `is_linear`.
        inputs, targets: what scales them, or None.
        outputs: read so many outputs; None: all.
    """
    (layer,) = network.children()
    assert isinstance(layer, Dense | Cumulative)
    w, b = layer.weight.double(), (-layer.rising() if isinstance(layer, Cumulative) else layer.bias).double()
    w, b = w[:outputs], b[:outputs] if w.shape[0] > 1 or outputs is None else b
    if inputs is not None:
        w = w / inputs.deviation
        b = b - w @ inputs.mean.expand(w.shape[1])
    if targets is not None:
        w, b = w * targets.deviation.reshape(-1, 1), b * targets.deviation + targets.mean
    return w.numpy(), b.numpy()


def selected(network: Network) -> Any:
    """Return the indices of the inputs with a weight that isn't zero.

    Raises:
        AttributeError: the inputs have no weights of their own in the first layer.
    """
    bins, first, *_ = [None, *network.children()]
    if isinstance(first, Bins):
        bins, first = first, list(network.children())[1]
    if not isinstance(first, Dense | Cumulative | torch.nn.RNNBase) or network.wiring_of_layers is not None:
        raise AttributeError("only networks that begin with a dense or recurrent layer select inputs")
    weight: Tensor = next(p for p in first.parameters() if p.dim() > 1)
    features = (weight != 0).any(0).numpy()
    return np.flatnonzero(features if bins is None else bins.read(features))


def importances(model: Any, x: Any, y: Any, repeats: int, random_state: Any) -> Any:
    """Return by how much the score falls when a column of x is shuffled, on average.

    Source: Breiman (2001), "Random forests"; scikit-learn's `permutation_importance`.
    """
    found = permutation_importance(model, x, y, n_repeats=repeats, random_state=random_state)
    return found.importances_mean
