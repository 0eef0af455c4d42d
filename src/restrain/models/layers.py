"""Networks of the keyword models, built from layers as data (see `specs`).

Each layer is one module that holds weight and bias and applies the activation: `rs.outputs("hid1")`
is the output after the activation, and the parameters are `hid1.weight` and `hid1.bias`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrain.errors import PlanError
from restrain.models.specs import ACTIVATIONS, NORMS, RECURRENT, LayerData


class Dense(nn.Linear):
    """activation(W x + b)."""

    def __init__(self, before: int, size: int, activation: str) -> None:
        super().__init__(before, size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class Tied(nn.Module):
    """activation(Wᵀ x + b), with W the weight of another layer: one parameter with two names."""

    def __init__(self, partner: Dense, activation: str) -> None:
        super().__init__()
        self.weight, self.activation = partner.weight, activation
        self.bias = nn.Parameter(torch.zeros(partner.in_features, device=partner.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](F.linear(x, self.weight.t(), self.bias))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} to {self.weight.shape[1]}, activation={self.activation}"


class Normalized(nn.Module):
    """activation(normalised x), normalised over the batch or the features.

    x is (batch, features) or (batch, time, features).
    """

    def __init__(self, form: str, size: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size) if form == "batchnorm" else nn.LayerNorm(size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2:
            return ACTIVATIONS[self.activation](self.norm(x.flatten(0, -2)).view_as(x))  # type: ignore[no-any-return]
        return ACTIVATIONS[self.activation](self.norm(x))  # type: ignore[no-any-return]


class Cumulative(nn.Linear):
    """log P(k) of classes in order, P(class ≤ k) = 1 / (1 + exp(w x - θₖ)).

    The rising θ are `thresholds[0]` plus sums of the exponentials of the others.
    """

    def __init__(self, before: int, size: int) -> None:
        super().__init__(before, 1, bias=False)
        start = (torch.arange(1, size, device=self.weight.device, dtype=torch.float64) / size).logit()  # even classes
        self.thresholds = nn.Parameter(torch.cat([start[:1], start.diff().log()]).to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        upper = self.rising() - super().forward(x)  # logits of class ≤ k
        above, below = F.pad(F.logsigmoid(upper), (0, 1)), F.pad(F.logsigmoid(-upper), (1, 0))
        step = F.pad((-(-self.thresholds[1:].exp()).expm1()).log(), (1, 1))
        return above + below + step  # σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a))

    def rising(self) -> Tensor:
        """Return the θ."""
        return self.thresholds[:1] + F.pad(self.thresholds[1:].exp().cumsum(0), (1, 0))

    def extra_repr(self) -> str:
        return f"{self.in_features} to {len(self.thresholds) + 1} classes in order"


class Rnn(nn.RNN):
    """States of all steps of hₜ = activation(W xₜ + U hₜ₋₁ + b), with activation tanh or relu."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Lstm(nn.LSTM):
    """States h of all steps of a long short-term memory."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Gru(nn.GRU):
    """States of all steps of a gated recurrent unit."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class LastStep(nn.Module):
    """Last step of sequences (batch, time, features)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x[:, -1]."""
        return x[:, -1]


class Network(nn.Module):
    """Sequential network whose submodules have the names of the layers.

    Args:
        layers: plain data as returned by `specs.resolve`, the input first.
    """

    def __init__(self, layers: list[LayerData]) -> None:
        super().__init__()
        for before, layer in pairwise(layers):
            self.add_module(layer["name"], self._build(before["size"], layer))

    def _build(self, before: int, layer: LayerData) -> nn.Module:
        form, size, activation = layer["form"], layer["size"], layer.get("activation", "linear")
        if form == "dense":
            return Dense(before, size, activation)
        if form == "tied":
            return Tied(self.get_submodule(layer["partner"]), activation)  # type: ignore[arg-type]
        if form in NORMS:
            return Normalized(form, size, activation)
        if form == "rnn":
            return Rnn(before, size, nonlinearity=activation, batch_first=True)
        if form in RECURRENT:
            return (Lstm if form == "lstm" else Gru)(before, size, batch_first=True)
        if form == "ordinal":
            return Cumulative(before, size)
        if form == "last":
            return LastStep()
        raise PlanError(f"no form of layer is called {form!r}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last layer."""
        for layer in self.children():
            x = layer(x)
        return x

    def after(self, name: str, h: Tensor) -> Tensor:
        """Return the network's output, given the output h of a named layer.

        A name that no module has, such as that of the input layer, takes h as the input.
        """
        names = [key for key, _ in self.named_children()]
        for layer in list(self.children())[names.index(name) + 1 if name in names else 0 :]:
            h = layer(h)
        return h

    @property
    def needs_pairs(self) -> bool:
        """True if training needs batches of at least two samples (batch normalisation)."""
        return any(isinstance(module, nn.BatchNorm1d) for module in self.modules())


def outputs_of(network: Network, x: Tensor) -> dict[str, Any]:
    """Return the output of each layer by name, in order."""
    found = {}
    for name, layer in network.named_children():
        x = found[name] = layer(x)
    return found
