"""Layer specifications, as a user writes them, resolved to plain data.

    specification                   layer
    50                              50 units, relu (the last layer: linear)
    (50, "tanh")                    the same with another activation; also (20, "lstm"),
                                    (20, "rnn", "tanh")
    "tied", (4, "tied")             multiplies by the transposed weight of its partner, the nearest
                                    earlier dense layer without a partner
    "batchnorm", "layernorm"        normalises over the batch or over the features
    dict(size=, name=, activation=, form=, partner=)

The first specification is the input, the last one the output. Resolved, each is a dict of text and
numbers.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from restrain.errors import PlanError
from restrain.fields import brief, is_whole

ACTIVATIONS: dict[str, Any] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}
ALIASES = {"logistic": "sigmoid", "identity": "linear", "swish": "silu", "batch_norm": "batchnorm"}
ALIASES |= {"layer_norm": "layernorm", "feedforward": "dense", "ff": "dense"}
NORMS = ("batchnorm", "layernorm")
RECURRENT = ("rnn", "lstm", "gru")
FORMS = ("dense", "tied", *RECURRENT, *NORMS)
KEYS = ("size", "name", "activation", "form", "partner")

LayerData = dict[str, Any]


def resolve(specifications: Any, *, activation: str = "relu") -> list[LayerData]:
    """Return the layers as dicts of name, form, size, activation, and partner if tied.

    The input layer, the first, has name, form and size only.

    Args:
        specifications: a list with at least input and output.
        activation: for hidden layers that don't name one.

    Raises:
        PlanError: a specification can't be read, sizes don't fit, or a name can't be used.
    """
    if isinstance(specifications, (str, bytes, Mapping)) or not isinstance(specifications, Sequence):
        raise PlanError(f"layers are a list such as [784, 100, 10], got {specifications!r}")
    activation = _known(activation, tuple(ACTIVATIONS), "activation", "activation=")
    given = [_read(spec) for spec in specifications]
    if len(given) < 2:
        raise PlanError(f"layers are at least an input and an output, as in [784, 10]; got {specifications!r}")
    layers = [_input(given[0])]
    for number, layer in enumerate(given[1:], 1):
        last = number == len(given) - 1
        layers.append(_complete(layer, layers, last=last, activation=activation))
    _check_names(layers)
    return layers


def as_list(specifications: Any) -> list[Any]:
    """Return specifications as a list; a single size becomes a list of one."""
    return [specifications] if isinstance(specifications, Integral) else list(specifications)


def forms(specifications: Any) -> list[str]:
    """Return the form of each layer.

    Raises:
        PlanError: a specification can't be read.
    """
    return [_read(spec).get("form", "dense") for spec in as_list(specifications)]


def checked(layers: Any) -> list[LayerData]:
    """Return layers read from a file, checked to have the form that `resolve` returns.

    Raises:
        PlanError: the layers have another form.
    """
    if not isinstance(layers, list) or len(layers) < 2 or not all(isinstance(layer, dict) for layer in layers):
        raise PlanError(f"layers are a list of dicts, from input to output; got {brief(layers)}")
    dense: list[str] = []
    for number, layer in enumerate(layers):
        form, size = layer.get("form"), layer.get("size")
        if (
            form not in (("input",) if not number else (*FORMS, "last", "ordinal"))
            or not is_whole(size, 1)
            or size > _LARGEST
        ):
            raise PlanError(f"a layer has a form, and a size from 1 to {_LARGEST:,}; got {brief(layer)}")
        known = {"rnn": ("tanh", "relu")}.get(form, ACTIVATIONS)
        if layer.get("activation", "linear" if known is ACTIVATIONS else None) not in known:
            raise PlanError(f"the activation of a layer is one of {', '.join(known)}; got {brief(layer)}")
        if form == "tied" and layer.get("partner") not in dense:
            raise PlanError(f"a tied layer has an earlier dense one as its partner; got {brief(layer)}")
        dense += [layer.get("name")] * (form == "dense")
    _check_names(layers)
    return layers


_LARGEST = 2**31 - 1


def _read(spec: Any) -> LayerData:
    """Return a specification as a dict of the keys that it states.

    Raises:
        PlanError: the specification can't be read.
    """
    if isinstance(spec, Mapping):
        unknown = set(spec) - set(KEYS)
        if unknown:
            raise PlanError(f"a layer has no {', '.join(map(repr, sorted(unknown)))}; it has {', '.join(KEYS)}")
        layer = {key: value for key, value in spec.items() if value is not None}
    else:
        layer = {}
        for part in spec if isinstance(spec, (tuple, list)) else [spec]:
            key, value = _part(part, spec)
            if key in layer:
                raise PlanError(f"the layer {spec!r} says its {key} twice; write a dict(size=, activation=, form=)")
            layer[key] = value
    for key, known in (("activation", (*ACTIVATIONS, "softmax")), ("form", FORMS)):
        if key in layer:
            layer[key] = _known(layer[key], known, key, spec)
    if "size" in layer and (isinstance(layer["size"], bool) or not isinstance(layer["size"], Integral)):
        raise PlanError(f"a layer's size is a whole number above zero, got {layer['size']!r}")
    if "size" in layer and layer["size"] < 1:
        raise PlanError(f"a layer's size is a whole number above zero, got {layer['size']!r}")
    return {**layer, "size": int(layer["size"])} if "size" in layer else layer


def _part(part: Any, spec: Any) -> tuple[str, Any]:
    if isinstance(part, Integral) and not isinstance(part, bool):
        return "size", int(part)
    if isinstance(part, str):
        text = ALIASES.get(part.lower(), part.lower())
        if text in FORMS:
            return "form", text
        return "activation", _known(part, (*ACTIVATIONS, "softmax"), "form or activation", spec)
    raise PlanError(f"can't read {part!r} in the layer {spec!r}; write 50, (50, 'tanh'), 'tied' or dict(size=50)")


def _known(text: Any, known: Sequence[str], kind: str, spec: Any) -> str:
    name = ALIASES.get(str(text).lower(), str(text).lower())
    if name in known:
        return name
    if name.startswith("bi"):
        raise PlanError(f"{text!r}, in {spec!r}: layers read a sequence forwards only; write {' or '.join(RECURRENT)}")
    everything = [*dict.fromkeys((*known, *(FORMS if "or" in kind else ())))]
    near = get_close_matches(name, everything)
    hint = f" (near it: {', '.join(near)})" if near else ""
    raise PlanError(f"no {kind} is called {text!r}{hint}, in {spec!r}; there are: {', '.join(everything)}")


def _input(layer: LayerData) -> LayerData:
    unexpected = sorted(set(layer) - {"size", "name"})
    if unexpected or "size" not in layer:
        raise PlanError(f"the first layer is the input: its size, or dict(size=, name=); got {layer!r}")
    return {"name": layer.get("name", "in"), "form": "input", "size": layer["size"]}


def _complete(layer: LayerData, before: list[LayerData], *, last: bool, activation: str) -> LayerData:
    """Return the layer with name, size and activation filled in.

    Raises:
        PlanError: the layer lacks a size, or doesn't fit the layers before it.
    """
    form = layer.get("form", "dense")
    done: LayerData = {"name": layer.get("name") or _name(form, before, last), "form": form}
    incoming = before[-1]["size"]
    if form in NORMS:
        done["size"] = layer.get("size", incoming)
        done["activation"] = layer.get("activation", "linear")
        if done["size"] != incoming:
            raise PlanError(f"{form!r} keeps the size of what comes, {incoming}; got size={done['size']}")
    elif form == "tied":
        done.update(_tied(layer, before, incoming))
    elif "size" in layer:
        done["size"] = layer["size"]
    else:
        raise PlanError(f"the layer {done['name']!r} needs a size: write dict(size=50, ...) or (50, ...)")
    if form != "tied" and "partner" in layer:
        raise PlanError(f"partner= is for tied layers, got it with form={form!r}")
    default = "linear" if last else activation
    if form in RECURRENT:
        default = "tanh" if form != "rnn" or activation not in ("relu", "tanh") else activation
        allowed = ("relu", "tanh") if form == "rnn" else ("tanh",)
        if layer.get("activation", default) not in allowed:
            raise PlanError(f"form={form!r} has the activation {' or '.join(allowed)}; got {layer['activation']!r}")
    done.setdefault("activation", layer.get("activation", default))
    if done["activation"] == "softmax":
        if not last:
            raise PlanError("softmax is for the output of a Classifier; hidden layers have one of the others")
        done["activation"] = "linear"  # the output is logits; the loss and predict_proba apply softmax
    return done


def _tied(layer: LayerData, before: list[LayerData], incoming: int) -> LayerData:
    """Return partner and size of a tied layer.

    Raises:
        PlanError: no free dense layer fits.
    """
    taken = {other.get("partner") for other in before}
    free = [number for number, other in enumerate(before) if other["form"] == "dense" and other["name"] not in taken]
    names = [before[number]["name"] for number in free]
    wanted = layer.get("partner", names[-1] if names else None)
    if wanted not in names:
        raise PlanError(
            f"a tied layer needs an earlier dense layer that has no partner yet; wanted {wanted!r}, there are: "
            f"{', '.join(map(repr, names)) or 'none'}"
        )
    number = free[names.index(wanted)]
    size = before[number - 1]["size"]
    if before[number]["size"] != incoming or layer.get("size", size) != size:
        raise PlanError(
            f"tied to {wanted!r}, which maps {size} to {before[number]['size']}, a layer maps {before[number]['size']} "
            f"to {size}; here {incoming} come and {layer.get('size', size)} are to go"
        )
    return {"size": size, "partner": wanted}


def _name(form: str, before: list[LayerData], last: bool) -> str:
    if last:
        return "out"
    if form in NORMS:
        return f"norm{1 + sum(other['form'] in NORMS for other in before)}"
    return f"hid{1 + sum(other['form'] not in (*NORMS, 'input') for other in before)}"


def _check_names(layers: list[LayerData]) -> None:
    names = [layer.get("name") for layer in layers]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.isidentifier():
            raise PlanError(f"a layer's name is a word of letters, digits and _, got {name!r}")
        if names.count(name) > 1:
            raise PlanError(f"two layers are called {name!r}; the names are {', '.join(map(str, names))}")
        if number and (keyword.iskeyword(name) or hasattr(nn.Module(), name)):
            raise PlanError(f"{name!r} means something else in Python or in nn.Module; give the layer another name")


def hidden(layers: list[LayerData]) -> list[str]:
    """Return the names of the hidden layers, without normalisation and choice of the last step."""
    return [layer["name"] for layer in layers[1:-1] if layer["form"] in ("dense", "tied", *RECURRENT)]
