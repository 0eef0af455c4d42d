"""Layer specifications, as a user writes them, resolved to plain data.

    specification                   layer
    50                              50 units, relu (the last layer: linear)
    (50, "tanh")                    the same with another activation (see `functions`); also
                                    (20, "lstm"), (20, "rnn", "tanh")
    (28, 28, 1)                     as the first: images (height, width, channels); (20, 3):
                                    sequences of 20 steps, (None, 3): of any number of steps
    "tied", (4, "tied")             multiplies by the transposed weight of its partner, the nearest
                                    earlier dense layer without a partner
    "batchnorm", "layernorm"        normalises over the batch or over the features
    (20, "bidirectional")           half of the units read forwards, half backwards; worker="lstm"
    dict(form="conv2", size=8,      convolution over images, channels last; "conv1" over sequences.
    kernel_size=3)                  stride=1, padding=0, or "same"
    "pool2", "pool1"                greatest number of each window; kernel_size=2, stride the same
    "flatten"                       all numbers of a sample on one axis
    dict(form="reshape", shape=)    the numbers of a sample in another shape
    "product", "concatenate"        of several inputs=
    nn.Module                       a layer of your own, of tensors (samples, ..., features); also
                                    dict(module=, name=, inputs=)
    dict(size=, name=, activation=, form=, partner=, inputs=, ...)

The first specification is the input, the last one the output. `inputs=("hid1", "in")` names the
layers that a layer reads, where they aren't the one before; a layer with weights multiplies each of
several inputs by weights of its own, and adds. Further inputs, dict(form="input", size=3,
name="more"), take the columns of X after those of the inputs before. dict(direction="backward")
lets a recurrent layer begin at the last step. First values of weights: std=, mean=, sparsity=,
radius=, diagonal= (see `initial`).

Resolved, each is a dict of text and numbers, but for modules of the user's.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from torch import nn

from restrain.errors import PlanError
from restrain.fields import brief, is_whole
from restrain.models import functions, initial, shapes
from restrain.models.shapes import Shape

ALIASES = {"batch_norm": "batchnorm", "layer_norm": "layernorm", "feedforward": "dense", "ff": "dense"}
ALIASES |= {"prod": "product", "concat": "concatenate", "flat": "flatten", "bd": "bidirectional"}
NORMS = ("batchnorm", "layernorm")
RECURRENT = ("rnn", "lstm", "gru")
READING = (*RECURRENT, "bidirectional")  # forms that read sequences, and put them out
CONVOLUTIONS = ("conv1", "conv2")
POOLS = ("pool1", "pool2")
IMAGES = ("conv2", "pool2", "flatten", "reshape")  # forms that read images
FORMS = ("dense", "tied", *READING, *NORMS, *CONVOLUTIONS, *POOLS, "flatten", "reshape", "product", "concatenate")
COMPUTING = ("dense", "tied", *READING, *CONVOLUTIONS, "module")
KEYS: tuple[str, ...] = (
    "size",
    "name",
    "activation",
    "form",
    "partner",
    "inputs",
    "shape",
    "kernel_size",
    "stride",
    "padding",
)
KEYS += ("worker", "direction", "module", *initial.KEYS)
EXOTIC = ("rrnn", "mrnn", "clockwork", "mut1", "scrn", "bcrnn")
_WORDS = {
    "filter_size": "kernel_size=",
    "pool_size": "kernel_size=",
    "border_mode": 'padding=, a number or "same"',
    "rng": "random_state= of the model",
    "h_0": "nothing: the first state is zero",
    "bptt_limit": "nothing: gradients go through all steps; cut the sequences instead",
    "sparse": "nothing: X may be sparse",
    "ndim": "shape=, as in (None, 3) for sequences",
    "nout": "size=",
    "units": "size=",
    "filters": "size=",
}

LayerData = dict[str, Any]


def resolve(specifications: Any, *, activation: str = "relu") -> list[LayerData]:
    """Return the layers as dicts of name, form, size, activation, and partner if tied.

    The input layer, the first, has name, form, size, and shape where it isn't a table's.

    Args:
        specifications: a list with at least input and output.
        activation: for hidden layers that don't name one.

    Raises:
        PlanError: a specification can't be read, sizes don't fit, or a name can't be used.
    """
    if isinstance(specifications, (str, bytes, Mapping)) or not isinstance(specifications, Sequence):
        raise PlanError(f"layers are a list such as [784, 100, 10], got {specifications!r}")
    activation = functions.read(activation, "activation=")
    given = [_read(spec, first=not number) for number, spec in enumerate(specifications)]
    if len(given) < 2:
        raise PlanError(f"layers are at least an input and an output, as in [784, 10]; got {specifications!r}")
    layers, found = [_input(given[0], "in")], {}
    found[layers[0]["name"]] = shapes.of_input(layers[0], given)
    for number, layer in enumerate(given[1:], 1):
        last = number == len(given) - 1
        done = _complete(layer, layers, found, last=last, activation=activation)
        found[done["name"]] = shapes.of_input(done, given) if done["form"] == "input" else _shaped(done, layers, found)
        layers.append(done)
    _check_names(layers)
    _check_inputs(layers)
    return layers


def as_list(specifications: Any) -> list[Any]:
    """Return specifications as a list; a single size or module becomes a list of one."""
    single = isinstance(specifications, (Integral, str, Mapping, nn.Module))
    return [specifications] if single else list(specifications)


def forms(specifications: Any) -> list[str]:
    """Return the form of each layer.

    Raises:
        PlanError: a specification can't be read.
    """
    some = as_list(specifications)
    return [_read(spec, first=not number).get("form", "dense") for number, spec in enumerate(some)]


def sample_shape(specifications: Any) -> Shape | None:
    """Return the shape of a sample that the first of all layers states, or else None."""
    shape = _read(as_list(specifications)[0], first=True).get("shape")
    return None if shape is None else tuple(shape)


def names_of_inputs(layers: Any) -> list[str]:
    """Return the names of the inputs of layers, resolved or not; None has one input."""
    some = [_read(spec, first=not number) for number, spec in enumerate([1] if layers is None else as_list(layers))]
    found = [some[0].get("name", "in")]
    return found + [str(layer.get("name")) for layer in some[1:] if layer.get("form") == "input"]


def first_layer(hidden: Any, shape: tuple[int, ...], features: int) -> Any:
    """Return the specification of the input that fits hidden layers and the shape of a sample."""
    within = set(forms(hidden))
    if len(shape) > 2 and math.prod(shape) == features:
        return shape
    if len(shape) == 2 and within & {*shapes.SEQUENCES, "module"}:
        return (shape[0] if within & {"flatten", "reshape", "module"} else None, features)
    return features


def with_last_step(layers: list[LayerData]) -> list[LayerData]:
    """Return the layers with the last step chosen before an output that would have steps."""
    if len(output_shape(layers)) < 2:
        return layers
    out, before = dict(layers[-1]), layers[-2]
    last: LayerData = {"name": "last", "form": "last", "size": before["size"], "activation": "linear"}
    if "inputs" in out:
        sizes = {layer["name"]: layer["size"] for layer in layers}
        last |= {"inputs": out["inputs"], "size": sum(sizes[name] for name in out.pop("inputs"))}
    return [*layers[:-1], last, out]


def checked(layers: Any) -> list[LayerData]:
    """Return layers read from a file, checked to have the form that `resolve` returns.

    Raises:
        PlanError: the layers have another form.
    """
    if not isinstance(layers, list) or len(layers) < 2 or not all(isinstance(layer, dict) for layer in layers):
        raise PlanError(f"layers are a list of dicts, from input to output; got {brief(layers)}")
    dense: list[str] = []
    found: dict[str, Shape] = {}
    _check_names(layers)
    for number, layer in enumerate(layers):
        form = layer.get("form")
        allowed = ("input",) if not number else ("input", *FORMS, "last", "ordinal", "bins")
        if form not in allowed or not _is_size(layer.get("size")):
            raise PlanError(f"a layer has a form, and a size from 1 to {_LARGEST:,}; got {brief(layer)}")
        _check_saved(layer, list(found))
        if form == "tied" and layer.get("partner") not in dense:
            raise PlanError(f"a tied layer has an earlier dense one as its partner; got {brief(layer)}")
        dense += [layer["name"]] * (form == "dense")
        before = layers[number - 1] if number else layer
        given = [found[name] for name in layer.get("inputs", [before["name"]])] if form != "input" else []
        shape = shapes.after(layer, given) if given else shapes.of_input(layer, layers)
        if shape[-1] != layer["size"] or math.prod(size or 1 for size in shape) > _LARGEST:
            raise PlanError(f"a layer of the shape {shapes.text(shape)} has another size; got {brief(layer)}")
        found[layer["name"]] = shape
    _check_inputs(layers)
    return layers


_LARGEST = 2**31 - 1


def _is_size(value: Any) -> bool:
    return is_whole(value, 1) and value <= _LARGEST


def _check_saved(layer: Mapping[str, Any], before: list[str]) -> None:
    """Check the entries of a layer from a file, by themselves.

    Raises:
        PlanError: an entry can't be.
    """
    form, activation = layer["form"], layer.get("activation", "linear")
    count = int(form[-1]) if form in (*CONVOLUTIONS, *POOLS) else 0
    known = ("tanh", "relu") if form == "rnn" else ("tanh",) if form == "bidirectional" else None
    if not isinstance(activation, str) or not (activation in known if known else functions.is_known(activation)):
        raise PlanError(f"a layer has another activation; got {brief(layer)}")
    windows = all(_are_sizes(layer.get(key), count) for key in ("kernel_size", "stride") if count)
    padding = layer.get("padding", "same" if form in POOLS or not count else None)
    inputs = layer.get("inputs", before[-1:])
    right = {
        "inputs": isinstance(inputs, list) and all(name in before for name in inputs) and bool(inputs or not before),
        "kernel_size or stride": windows,
        "padding": padding == "same" or _are_sizes(padding, count, 0),
        "shape": _is_shape(layer.get("shape"), free=form == "input") or "shape" not in layer,
        "worker": layer.get("worker", "rnn") in RECURRENT,
        "direction": layer.get("direction", "backward") == "backward",
        "size": form != "bidirectional" or layer["size"] % 2 == 0,
    }
    wrong = [name for name, fits in right.items() if not fits]
    if wrong or (form == "reshape" and "shape" not in layer) or "module" in layer:
        raise PlanError(f"a layer's {wrong[0] if wrong else 'form'} can't be; got {brief(layer)}")
    initial.check(layer)


def _are_sizes(value: Any, count: int, least: int = 1) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_whole(v, least) and v <= _LARGEST for v in value)


def _is_shape(value: Any, *, free: bool) -> bool:
    free = free and isinstance(value, list) and len(value) == 2 and value[0] is None and _is_size(value[1])
    return free or (isinstance(value, list) and len(value) > 0 and all(map(_is_size, value)))


# ---------------------------------------------------------------- reading


def _read(spec: Any, *, first: bool = False) -> LayerData:
    """Return a specification as a dict of the keys that it states.

    Raises:
        PlanError: the specification can't be read.
    """
    if isinstance(spec, nn.Module):
        return {"form": "module", "module": spec}
    if isinstance(spec, Mapping):
        layer = _of_mapping(spec)
    elif first and isinstance(spec, (tuple, list)) and len(spec) > 1 and _is_shape(_plain(spec), free=True):
        layer = {"shape": _plain(spec)}
    else:
        layer = {}
        for part in spec if isinstance(spec, (tuple, list)) else [spec]:
            key, value = _part(part, spec)
            if key in layer:
                raise PlanError(f"the layer {spec!r} says its {key} twice; write a dict(size=, activation=, form=)")
            layer[key] = value
    if "activation" in layer and layer["activation"] != "softmax":
        layer["activation"] = functions.read(layer["activation"], spec)
    if "form" in layer:
        layer["form"] = _form(layer["form"], spec)
    if "size" in layer and (isinstance(layer["size"], bool) or not isinstance(layer["size"], Integral)):
        raise PlanError(f"a layer's size is a whole number above zero, got {layer['size']!r}")
    if "size" in layer and layer["size"] < 1:
        raise PlanError(f"a layer's size is a whole number above zero, got {layer['size']!r}")
    return {**layer, "size": int(layer["size"])} if "size" in layer else layer


def _plain(shape: Sequence[Any]) -> list[Any]:
    """Return a shape with numbers of NumPy as Python's."""
    return [int(v) if isinstance(v, Integral) and not isinstance(v, bool) else v for v in shape]


def _of_mapping(spec: Mapping[str, Any]) -> LayerData:
    layer = {key: value for key, value in spec.items() if value is not None}
    unknown = sorted({str(key) for key in layer if key not in KEYS and not initial.is_key(key)})
    hints = [f"{key!r}: write {_WORDS[key]}" for key in unknown if key in _WORDS]
    if hints:
        raise PlanError(f"a layer has no {'; '.join(hints)}")
    if unknown:
        raise PlanError(f"a layer has no {', '.join(map(repr, unknown))}; it has {', '.join(KEYS)}")
    initial.check(layer)
    if layer.get("form") in ("classifier", "softmax"):
        layer |= {"form": "dense", "activation": "softmax"}
    if "module" in layer:
        if not isinstance(layer["module"], nn.Module):
            raise PlanError(f"module= of a layer is an nn.Module; got {brief(layer['module'])}")
        other = sorted(set(layer) - {"module", "name", "inputs", "form"})
        if other or layer.get("form", "module") != "module":
            raise PlanError(f"a module of your own has name= and inputs= only, got {', '.join(other) or 'form'}=")
        layer["form"] = "module"
    if "shape" in layer:
        shape = _plain(layer["shape"]) if isinstance(layer["shape"], (tuple, list)) else []
        if not _is_shape(shape, free=True):
            raise PlanError(
                f"shape= of a layer is of whole numbers above zero, as in (28, 28, 1); got {layer['shape']!r}"
            )
        layer["shape"] = shape
    return layer


def _part(part: Any, spec: Any) -> tuple[str, Any]:
    if isinstance(part, Integral) and not isinstance(part, bool):
        return "size", int(part)
    if isinstance(part, str):
        text = ALIASES.get(part.lower(), part.lower())
        if text in (*FORMS, *EXOTIC):
            return "form", text
        if text in ("softmax", "classifier"):
            return "activation", "softmax"
        if text.startswith("bi"):
            _form(part, spec)
        return "activation", functions.read(part, spec, FORMS)
    if isinstance(part, nn.Module):
        raise PlanError(f"a module of your own is a layer by itself, without {spec!r} around it")
    raise PlanError(f"can't read {part!r} in the layer {spec!r}; write 50, (50, 'tanh'), 'tied' or dict(size=50)")


def _form(given: Any, spec: Any) -> str:
    """Return the canonical name of a form.

    Raises:
        PlanError: there is no such form; the message lists near names.
    """
    name = ALIASES.get(str(given).lower(), str(given).lower())
    if name in (*FORMS, "module", "input"):
        return name
    if name in EXOTIC:
        raise PlanError(f"{given!r}, in {spec!r}, isn't built in: use your own nn.Module as a layer")
    if name.startswith("bi"):
        raise PlanError(
            f"{given!r}, in {spec!r}: write dict(form='bidirectional', worker='lstm', size=20), with worker "
            f"{' or '.join(RECURRENT)}"
        )
    near = get_close_matches(name, FORMS)
    hint = f" (near it: {', '.join(near)})" if near else ""
    raise PlanError(f"no form is called {given!r}{hint}, in {spec!r}; there are: {', '.join(FORMS)}")


def _input(layer: LayerData, name: str) -> LayerData:
    unexpected = sorted(set(layer) - {"size", "name", "shape", "form"})
    if unexpected or layer.get("form", "input") != "input" or ("size" in layer) == ("shape" in layer):
        raise PlanError(f"the first layer is the input: its size, or dict(size=, name=), or its shape; got {layer!r}")
    found = {"name": layer.get("name", name), "form": "input", "size": layer.get("size") or layer["shape"][-1]}
    return found if len(layer.get("shape", [1])) == 1 else {**found, "shape": layer["shape"]}


# ---------------------------------------------------------------- completing


def _complete(
    layer: LayerData, before: list[LayerData], found: Mapping[str, Shape], *, last: bool, activation: str
) -> LayerData:
    """Return the layer with name, size and activation filled in.

    Raises:
        PlanError: the layer lacks a size, or doesn't fit the layers before it.
    """
    form = layer.get("form", "dense")
    name = layer.get("name") or _name(form, before, last)
    if form == "input":
        return _input(layer, name)
    done: LayerData = {"name": name, "form": form, **_wiring(layer, name, before)}
    given = [found[source] for source in done.get("inputs", [before[-1]["name"]])]
    _refuse_keys(layer, form, name)
    if form == "module":
        return {**done, "module": layer["module"], "size": shapes.probed(layer["module"], name, given)[-1]}
    incoming = shapes.joint(done, given)[-1] or 0
    if form in NORMS:
        done["size"] = layer.get("size", incoming)
        if done["size"] != incoming:
            raise PlanError(f"{form!r} keeps the size of what comes, {incoming}; got size={done['size']}")
    elif form == "tied":
        done.update(_tied(layer, before, incoming))
    elif form in _COMPUTED:
        done |= {"shape": layer["shape"]} if form == "reshape" else {}
    elif "size" in layer:
        done["size"] = layer["size"]
    else:
        raise PlanError(f"the layer {name!r} needs a size: write dict(size=50, ...) or (50, ...)")
    done |= _windows(layer, form, name) | {key: value for key, value in layer.items() if initial.is_key(key)}
    if form in _COMPUTED:
        done["size"] = shapes.after(done, given)[-1]
    done["activation"] = _activation(layer, form, activation, last=last)
    return done | _reading(layer, form, done)


_COMPUTED = (*POOLS, "flatten", "reshape", "product", "concatenate")
_OF_FORMS = {
    "partner": ("tied",),
    "shape": ("reshape", "input"),
    "kernel_size": (*CONVOLUTIONS, *POOLS),
    "stride": (*CONVOLUTIONS, *POOLS),
    "padding": CONVOLUTIONS,
    "worker": ("bidirectional",),
    "direction": RECURRENT,
    "size": tuple(form for form in FORMS if form not in _COMPUTED),
}


def _refuse_keys(layer: LayerData, form: str, name: str) -> None:
    for key, where in _OF_FORMS.items():
        if key in layer and form not in where:
            shown = "tied layers" if key == "partner" else f"form={' or '.join(where)}"
            raise PlanError(f"{key}= is for {shown}, got it with form={form!r} in the layer {name!r}")
    own = [key for key in layer if initial.is_key(key)]
    if own and form not in ("dense", *READING, *CONVOLUTIONS):
        raise PlanError(f"{own[0]}= is for layers with weights of their own, got it with form={form!r}")
    if form == "reshape" and "shape" not in layer:
        raise PlanError(f"the layer {name!r} needs its shape: write dict(form='reshape', shape=(4, 4, 1))")


def _wiring(layer: LayerData, name: str, before: list[LayerData]) -> LayerData:
    """Return the entry `inputs` of a layer that reads others than the one before it.

    Raises:
        PlanError: a name is no earlier layer's.
    """
    if "inputs" not in layer:
        if layer.get("form") in ("product", "concatenate"):
            raise PlanError(f"the layer {name!r} needs its inputs: write dict(form=, inputs=('hid1', 'hid2'))")
        return {}
    given = [layer["inputs"]] if isinstance(layer["inputs"], str) else list(layer["inputs"])
    there = [other["name"] for other in before]
    for source in given:
        if isinstance(source, str) and ":" in source:
            raise PlanError(f"inputs={source!r} is theanets' name: write {source.partition(':')[0]!r}")
        if source not in there:
            raise PlanError(
                f"inputs= of the layer {name!r} are earlier layers, got {source!r}; there are: {', '.join(there)}"
            )
    if not given:
        raise PlanError(f"inputs= of the layer {name!r} is empty; there are: {', '.join(there)}")
    return {} if given == there[-1:] else {"inputs": given}


def _windows(layer: LayerData, form: str, name: str) -> LayerData:
    """Return kernel_size, stride and padding as lists, a number for each axis.

    Raises:
        PlanError: one of them is missing, or isn't of whole numbers.
    """
    if form not in (*CONVOLUTIONS, *POOLS):
        return {}
    count, pools = int(form[-1]), form in POOLS
    if not pools and "kernel_size" not in layer:
        raise PlanError(f"the layer {name!r} needs a kernel_size, as in dict(form={form!r}, size=8, kernel_size=3)")
    found: LayerData = {"kernel_size": _numbers(layer.get("kernel_size", 2), count, 1, "kernel_size")}
    found["stride"] = _numbers(layer.get("stride", found["kernel_size"] if pools else 1), count, 1, "stride")
    if pools:
        return found
    padding = layer.get("padding", 0)
    if padding in ("same", "valid"):
        found["padding"] = "same" if padding == "same" else [0] * count
        if padding == "same" and found["stride"] != [1] * count:
            raise PlanError(f"padding='same' goes with stride=1; got stride={layer['stride']!r} in the layer {name!r}")
        return found
    return {**found, "padding": _numbers(padding, count, 0, "padding")}


def _numbers(given: Any, count: int, least: int, key: str) -> list[int]:
    some = [given] * count if is_whole(given, least) else list(given) if isinstance(given, (tuple, list)) else []
    if len(some) != count or not all(is_whole(value, least) for value in some):
        raise PlanError(f"{key}= is a whole number, at least {least}, or {count} of them; got {given!r}")
    return [int(value) for value in some]


def _activation(layer: LayerData, form: str, usual: str, *, last: bool) -> str:
    """Return the activation of a layer.

    Raises:
        PlanError: the form takes no such activation.
    """
    default = "linear" if last or form in (*NORMS, *_COMPUTED) else usual
    if form in READING:
        rnn = form == "rnn" or layer.get("worker", "rnn" if form == "bidirectional" else form) == "rnn"
        allowed = ("relu", "tanh") if form == "rnn" else ("tanh",)
        default = usual if rnn and form == "rnn" and usual in allowed else "tanh"
        if layer.get("activation", default) not in allowed:
            raise PlanError(f"form={form!r} has the activation {' or '.join(allowed)}; got {layer['activation']!r}")
    found: str = layer.get("activation", default)
    if found == "softmax":
        if not last:
            raise PlanError("softmax is for the output of a Classifier; hidden layers have one of the others")
        return "linear"  # the output is logits; the loss and predict_proba apply softmax
    return found


def _reading(layer: LayerData, form: str, done: LayerData) -> LayerData:
    """Return worker and direction of a layer that reads sequences.

    Raises:
        PlanError: one of them can't be.
    """
    if form == "bidirectional":
        worker = str(layer.get("worker", "rnn")).lower()
        if worker in EXOTIC:
            _form(worker, f"worker={worker!r}")
        if worker not in RECURRENT:
            raise PlanError(f"worker= is {', '.join(RECURRENT)}; got {layer['worker']!r}")
        if done["size"] % 2:
            raise PlanError(
                f"half of the units of {done['name']!r} read backwards: its size is even; got {done['size']}"
            )
        return {"worker": worker}
    direction = layer.get("direction", "forward")
    if direction not in ("forward", "backward", "backwards"):
        raise PlanError(f"direction= is 'forward' or 'backward'; got {direction!r}")
    return {} if direction == "forward" else {"direction": "backward"}


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
    sizes = {other["name"]: other["size"] for other in before}
    size = sum(sizes[name] for name in before[number].get("inputs", [before[number - 1]["name"]]))
    if before[number]["size"] != incoming or layer.get("size", size) != size:
        raise PlanError(
            f"tied to {wanted!r}, which maps {size} to {before[number]['size']}, a layer maps {before[number]['size']} "
            f"to {size}; here {incoming} come and {layer.get('size', size)} are to go"
        )
    return {"size": size, "partner": wanted}


def _shaped(layer: LayerData, before: list[LayerData], found: Mapping[str, Shape]) -> Shape:
    """Return the shape of a resolved layer's output."""
    return shapes.after(layer, [found[name] for name in layer.get("inputs", [before[-1]["name"]])])


_WORDS_OF_NAMES = {"input": "in", "pool1": "pool", "pool2": "pool", "flatten": "flat", "concatenate": "concat"}


def _name(form: str, before: list[LayerData], last: bool) -> str:
    if last:
        return "out"
    kind = "norm" if form in NORMS else "hid" if form in COMPUTING else _WORDS_OF_NAMES.get(form, form)
    same = [other for other in before if _kind(other["form"]) == kind]
    return f"{kind}{1 + len(same)}"


def _kind(form: str) -> str:
    return "norm" if form in NORMS else "hid" if form in COMPUTING else _WORDS_OF_NAMES.get(form, form)


def _check_names(layers: list[LayerData]) -> None:
    names = [layer.get("name") for layer in layers]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.isidentifier():
            raise PlanError(f"a layer's name is a word of letters, digits and _, got {name!r}")
        if names.count(name) > 1:
            raise PlanError(f"two layers are called {name!r}; the names are {', '.join(map(str, names))}")
        if number and (keyword.iskeyword(name) or hasattr(_EMPTY, name)):
            raise PlanError(f"{name!r} means something else in Python or in nn.Module; give the layer another name")


_EMPTY = nn.Module()


def _check_inputs(layers: list[LayerData]) -> None:
    """Check that inputs are all tables or all sequences, where there are several.

    Raises:
        PlanError: they aren't, or the last layer is an input.
    """
    inputs = [layer for layer in layers if layer["form"] == "input"]
    if layers[-1]["form"] == "input":
        raise PlanError("the last layer is the output, and here it is an input")
    if len(inputs) > 1 and any("shape" in layer for layer in inputs):
        raise PlanError("several inputs are parts of the columns of X: give each its size, not a shape")


# ---------------------------------------------------------------- what a list of layers says


def hidden(layers: list[LayerData]) -> list[str]:
    """Return the names of the hidden layers, without normalisation and choice of the last step."""
    return [layer["name"] for layer in layers[1:-1] if layer["form"] in COMPUTING]


def steps(layers: list[LayerData]) -> bool:
    """Return True if the network reads sequences, (samples, steps, features)."""
    return len(shapes.of_input(layers[0], layers)) == 2


def image(layers: list[LayerData]) -> tuple[int, ...] | None:
    """Return the shape of a sample of three axes or more; None for tables and sequences."""
    shape = layers[0].get("shape", ())
    return tuple(shape) if len(shape) > 2 else None


def features(layers: list[LayerData]) -> int:
    """Return the number of columns of X: all numbers of an image, those of a step of a sequence."""
    shape = image(layers)
    return math.prod(shape) if shape else sum(layer["size"] for layer in layers if layer["form"] == "input")


def output_shape(layers: list[LayerData]) -> Shape:
    """Return the shape of the output of a sample."""
    found: dict[str, Shape] = {}
    for number, layer in enumerate(layers):
        if layer["form"] == "input":
            found[layer["name"]] = shapes.of_input(layer, layers)
        else:
            found[layer["name"]] = shapes.after(
                layer, [found[name] for name in layer.get("inputs", [layers[number - 1]["name"]])]
            )
    return found[layers[-1]["name"]]


def outputs(layers: list[LayerData]) -> int:
    """Return the number of outputs of a sample; of a sequence those of a step."""
    shape = output_shape(layers)
    return math.prod(size or 0 for size in shape) if image(layers) else layers[-1]["size"]


def resized(layers: list[LayerData], modules: Mapping[str, nn.Module]) -> list[LayerData]:
    """Return the layers with the sizes of their modules, some of which have lost units."""
    found: list[LayerData] = []
    seen: dict[str, Shape] = {}
    for layer in layers:
        now = dict(layer)
        module: Any = modules.get(now["name"])
        if now["form"] in ("dense", *CONVOLUTIONS):
            now["size"] = module.weight.shape[0]
        elif now["form"] == "tied":
            now["size"] = module.weight.shape[1]
        if now["form"] == "input":
            seen[now["name"]] = shapes.of_input(now, layers)
        else:
            seen[now["name"]] = shapes.after(now, [seen[name] for name in now.get("inputs", [found[-1]["name"]])])
            now["size"] = seen[now["name"]][-1]
        found.append(now)
    return found
