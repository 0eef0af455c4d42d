"""Networks of the keyword models, built from layers as data (see `specs`).

Each layer is one module that holds weight and bias and applies the activation: `rs.outputs("hid1")`
is the output after the activation, and the parameters are `hid1.weight` and `hid1.bias`. Images
have their channels last, as arrays of pictures do.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrain.errors import PlanError
from restrain.models import functions, initial
from restrain.models.bins import Bins
from restrain.models.specs import NORMS, RECURRENT, LayerData, image


class _Activated(nn.Module):
    """Base of layers with an activation function, whose parameters, if any, are in `learned`."""

    activation: str
    learned: nn.ModuleList | None

    def _activate_by(self, activation: str, size: int) -> None:
        """Set the activation function of a layer of so many features."""
        self.activation, self.learned = activation, functions.learned(activation, size)

    def _activated(self, x: Tensor) -> Tensor:
        """Return the activation function of x."""
        function = functions.FUNCTIONS.get(self.activation)
        return functions.apply(self.activation, x, self.learned) if function is None else function(x)


class Dense(_Activated, nn.Linear):
    """activation(W x + b)."""

    def __init__(self, before: int, size: int, activation: str) -> None:
        super().__init__(before, size)
        self._activate_by(activation, size)

    def forward(self, x: Tensor) -> Tensor:
        return self._activated(super().forward(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class Tied(_Activated):
    """activation(Wᵀ x + b), with W the weight of another layer: one parameter with two names."""

    def __init__(self, partner: Dense, activation: str) -> None:
        super().__init__()
        self.weight = partner.weight
        self.bias = nn.Parameter(torch.zeros(partner.in_features, device=partner.weight.device))
        self._activate_by(activation, partner.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self._activated(F.linear(x, self.weight.t(), self.bias))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} to {self.weight.shape[1]}, activation={self.activation}"


class Normalized(_Activated):
    """activation(normalised x), normalised over the batch or the features, the last axis of x."""

    def __init__(self, form: str, size: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size) if form == "batchnorm" else nn.LayerNorm(size)
        self._activate_by(activation, size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2:
            return self._activated(self.norm(x.flatten(0, -2)).view(x.shape))
        return self._activated(self.norm(x))


class _Convolution(_Activated):
    """activation(w ∗ x + b) with the channels of x last, around one of torch's convolutions."""

    def __init__(self, before: int, layer: LayerData) -> None:
        super().__init__(before, layer["size"], *_window(layer))
        self._activate_by(layer["activation"], layer["size"])

    def forward(self, x: Tensor) -> Tensor:
        return self._activated(super().forward(x.movedim(-1, 1)).movedim(1, -1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class Conv1(_Convolution, nn.Conv1d):
    """A convolution along the steps of sequences (batch, time, channels)."""


class Conv2(_Convolution, nn.Conv2d):
    """A convolution over images (batch, height, width, channels)."""


def _window(layer: LayerData) -> Any:
    padding = layer.get("padding", "same")
    return (
        tuple(layer["kernel_size"]),
        tuple(layer["stride"]),
        padding if padding == "same" else tuple(padding),
    )


class Pooled(_Activated):
    """activation(greatest of each window), over sequences or over images with channels last."""

    def __init__(self, layer: LayerData) -> None:
        super().__init__()
        kind = nn.MaxPool1d if layer["form"] == "pool1" else nn.MaxPool2d
        self.pool = kind(tuple(layer["kernel_size"]), tuple(layer["stride"]))
        self._activate_by(layer["activation"], layer["size"])

    def forward(self, x: Tensor) -> Tensor:
        return self._activated(self.pool(x.movedim(-1, 1)).movedim(1, -1))


class Reshaped(_Activated):
    """activation(the numbers of each sample in another shape)."""

    def __init__(self, shape: list[int], size: int, activation: str) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self._activate_by(activation, size)

    def forward(self, x: Tensor) -> Tensor:
        return self._activated(x.reshape(x.shape[0], *self.shape))

    def extra_repr(self) -> str:
        return f"{self.shape}, activation={self.activation}"


class Joined(_Activated):
    """activation(product of several inputs, or their features side by side)."""

    def __init__(self, form: str, size: int, activation: str) -> None:
        super().__init__()
        self.product = form == "product"
        self._activate_by(activation, size)

    def forward(self, *given: Tensor) -> Tensor:
        if not self.product:
            return self._activated(torch.cat(given, -1))
        found = given[0]
        for x in given[1:]:
            found = found * x
        return self._activated(found)


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


class _States(nn.Module):
    """The states of all steps that one of torch's recurrent layers puts out.

    `backward` begins at the last step; the states stay in the order of the steps.
    """

    backward = False

    def forward(self, x: Tensor) -> Tensor:
        if self.backward:
            return super().forward(x.flip(1))[0].flip(1)  # type: ignore[no-any-return]
        return super().forward(x)[0]  # type: ignore[no-any-return]


class Rnn(_States, nn.RNN):  # type: ignore[misc]
    """States of hₜ = activation(W xₜ + U hₜ₋₁ + b), with activation tanh or relu."""


class Lstm(_States, nn.LSTM):  # type: ignore[misc]
    """States h of a long short-term memory."""


class Gru(_States, nn.GRU):  # type: ignore[misc]
    """States of a gated recurrent unit."""


def _recurrent(before: int, layer: LayerData) -> nn.Module:
    """Return a recurrent layer."""
    both = layer["form"] == "bidirectional"
    form, size = (layer["worker"], layer["size"] // 2) if both else (layer["form"], layer["size"])
    given = {"batch_first": True, "bidirectional": both}
    if form == "rnn":
        made: nn.Module = Rnn(before, size, nonlinearity=layer.get("activation", "tanh"), **given)
    else:
        made = (Lstm if form == "lstm" else Gru)(before, size, **given)
    if layer.get("direction") == "backward":
        made.backward = True  # type: ignore[assignment]
    return made


class LastStep(nn.Module):
    """Last step that a layer reads, of its output (batch, time, features).

    Args:
        first: the number of features, from the end, that read backwards; they end at step 0.
    """

    first = 0  # of networks that version 0.1 pickled

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """Return x[:, -1], with x[:, 0] of the features that read backwards."""
        if not self.first:
            return x[:, -1]
        return torch.cat([x[:, -1, : -self.first], x[:, 0, -self.first :]], -1)


class Network(nn.Module):
    """Network whose submodules have the names of the layers.

    Args:
        layers: plain data as returned by `specs.resolve`, the input first. Modules of the user's
            are copied.
    """

    # (name, layers that it reads) in order, unless each layer reads the one before; and of inputs
    # (name, first column, columns). None in networks that version 0.1 pickled.
    wiring_of_layers: list[tuple[str, list[str]]] | None = None
    columns_of_inputs: list[tuple[str, int, int]] | None = None
    shape_of_images: tuple[int, ...] | None = None  # of images, which may come as rows

    def __init__(self, layers: list[LayerData]) -> None:
        super().__init__()
        sizes, start = {layers[0]["name"]: layers[0]["size"]}, 0
        self.shape_of_images, columns = image(layers), []
        for before, layer in pairwise(layers):
            sizes[layer["name"]] = layer["size"]
            if layer["form"] != "input":
                sources = layer.get("inputs", [before["name"]])
                self.add_module(layer["name"], self._build(sum(sizes[name] for name in sources), layer, before))
        for layer in layers:
            if layer["form"] == "input":
                columns.append((layer["name"], start, layer["size"]))
                start += layer["size"]
        if len(columns) > 1 or any("inputs" in layer or layer["form"] == "module" for layer in layers):
            pairs = [(a["name"], b) for a, b in pairwise(layers) if b["form"] != "input"]
            self.wiring_of_layers = [(layer["name"], layer.get("inputs", [before])) for before, layer in pairs]
            self.columns_of_inputs = columns

    def _build(self, size_before: int, layer: LayerData, before: LayerData) -> nn.Module:
        made = self._made(size_before, layer, before)
        if layer["form"] != "module":
            initial.set_values(made, layer)
        return made

    def _made(self, size_before: int, layer: LayerData, before: LayerData) -> nn.Module:
        form, size, activation = layer["form"], layer["size"], layer.get("activation", "linear")
        if form == "dense":
            return Dense(size_before, size, activation)
        if form == "tied":
            return Tied(self.get_submodule(layer["partner"]), activation)  # type: ignore[arg-type]
        if form in NORMS:
            return Normalized(form, size, activation)
        if form in (*RECURRENT, "bidirectional"):
            return _recurrent(size_before, layer)
        if form in ("conv1", "conv2"):
            return (Conv1 if form == "conv1" else Conv2)(size_before, layer)
        if form in ("pool1", "pool2"):
            return Pooled(layer)
        if form in ("flatten", "reshape"):
            return Reshaped([-1] if form == "flatten" else layer["shape"], size, activation)
        if form in ("product", "concatenate"):
            return Joined(form, size, activation)
        if form == "module":
            return copy.deepcopy(layer["module"])  # type: ignore[no-any-return]
        if form == "bins":
            return Bins(size_before, size)
        if form == "ordinal":
            return Cumulative(size_before, size)
        if form == "last":
            half = before["size"] // 2 if before["form"] == "bidirectional" else 0
            return LastStep(before["size"] if before.get("direction") == "backward" else half)
        raise PlanError(f"no form of layer is called {form!r}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last layer."""
        if self.wiring_of_layers is not None:
            *_, x = self.outputs_by_layer(x).values()
        else:
            x = self._shaped(x)
            for layer in self.children():
                x = layer(x)
        return x if self.shape_of_images is None else x.flatten(1)

    def outputs_by_layer(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of each layer by name, in order."""
        x, found = self._shaped(x), {}
        if self.wiring_of_layers is None:
            for name, layer in self.named_children():
                x = found[name] = layer(x)
            return found
        return self._wired({name: x[..., start : start + size] for name, start, size in self.columns_of_inputs or ()})

    def _shaped(self, x: Tensor) -> Tensor:
        return x if self.shape_of_images is None or x.dim() > 2 else x.reshape(x.shape[0], *self.shape_of_images)

    def _wired(self, seen: dict[str, Tensor], after: str | None = None) -> dict[str, Tensor]:
        """Return the outputs of the layers whose inputs are seen, from `after` on."""
        found, names = {}, [name for name, _ in self.wiring_of_layers or ()]
        start = names.index(after) + 1 if after in names else 0
        for name, sources in (self.wiring_of_layers or ())[start:]:
            if any(source not in seen for source in sources):
                missing = next(source for source in sources if source not in seen)
                raise PlanError(f"the layer {name!r} also reads {missing!r}, which {after!r} doesn't say")
            layer = self.get_submodule(name)
            given = [seen[source] for source in sources]
            if len(given) > 1 and isinstance(layer, _JOINING):
                given = [torch.cat(given, -1)]
            x = layer(*given)
            seen[name] = found[name] = x[0] if isinstance(x, tuple) else x
        return found

    def after(self, name: str, h: Tensor) -> Tensor:
        """Return the network's output, given the output h of a named layer.

        A name that no module has, such as that of the input layer, takes h as the input.

        Raises:
            PlanError: a later layer reads a layer before the named one.
        """
        names = [key for key, _ in self.named_children()]
        if name not in names:
            return self(h)  # type: ignore[no-any-return]
        if self.wiring_of_layers is not None:
            if name != names[-1]:
                *_, h = self._wired({name: h}, name).values()
        else:
            for layer in list(self.children())[names.index(name) + 1 :]:
                h = layer(h)
        return h if self.shape_of_images is None else h.flatten(1)

    @property
    def needs_pairs(self) -> bool:
        """True if training needs batches of at least two samples (batch normalisation)."""
        return any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for module in self.modules())


_JOINING = (Dense, Tied, Normalized, Cumulative, Rnn, Lstm, Gru, Conv1, Conv2, Pooled, Reshaped, LastStep)


def outputs_of(network: Network, x: Tensor) -> dict[str, Any]:
    """Return the output of each layer by name, in order."""
    return network.outputs_by_layer(x)
