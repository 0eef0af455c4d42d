"""The networks of keyword models: layers as data (see `specs`) made into modules.

Each layer is one module, which holds its weight and bias and applies its activation; so `rs.outputs("hid1")` is
what the layer puts out, and its parameters are `hid1.weight` and `hid1.bias`.
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
    """activation(Wᵀ x + b), where W is the weight of another layer: the same parameter, with two names."""

    def __init__(self, partner: Dense, activation: str) -> None:
        super().__init__()
        self.weight, self.activation = partner.weight, activation
        self.bias = nn.Parameter(torch.zeros(partner.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](F.linear(x, self.weight.t(), self.bias))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} to {self.weight.shape[1]}, activation={self.activation}"


class Normalized(nn.Module):
    """activation(normalised x), over the batch or over the features; of sequences (batch, time, features) too."""

    def __init__(self, form: str, size: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size) if form == "batchnorm" else nn.LayerNorm(size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2:
            return ACTIVATIONS[self.activation](self.norm(x.flatten(0, -2)).view_as(x))  # type: ignore[no-any-return]
        return ACTIVATIONS[self.activation](self.norm(x))  # type: ignore[no-any-return]


class Rnn(nn.RNN):
    """hₜ = activation(W xₜ + U hₜ₋₁ + b), activation tanh or relu; the states of all steps."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Lstm(nn.LSTM):
    """The states h of a long short-term memory, of all steps."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Gru(nn.GRU):
    """The states of a gated recurrent unit, of all steps."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class LastStep(nn.Module):
    """The last step of sequences (batch, time, features)."""

    def forward(self, x: Tensor) -> Tensor:
        """The last step."""
        return x[:, -1]


class Network(nn.Module):
    """The layers in a row, under their names; built by their data.

    Args:
        layers: as `specs.resolve` gives them, the input first.
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
        if form == "last":
            return LastStep()
        raise PlanError(f"no form of layer is called {form!r}")

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        for layer in self.children():
            x = layer(x)
        return x

    def after(self, name: str, h: Tensor) -> Tensor:
        """The output for what the layer of that name put out; the input's for a name that no layer has."""
        names = [key for key, _ in self.named_children()]
        for layer in list(self.children())[names.index(name) + 1 if name in names else 0 :]:
            h = layer(h)
        return h

    @property
    def needs_pairs(self) -> bool:
        """Whether it can't train on a batch of one sample."""
        return any(isinstance(module, nn.BatchNorm1d) for module in self.modules())


def outputs_of(network: Network, x: Tensor) -> dict[str, Any]:
    """Every layer's output by name."""
    found = {}
    for name, layer in network.named_children():
        x = found[name] = layer(x)
    return found
