"""Models on file: one safetensors file, with everything but the tensors as JSON in its header.

Reading runs no code from the file: classes are looked up in the caller's table, penalties in the
registry, and there is no pickle. `storage` writes the file whole or not at all, and detects a
truncated or damaged one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restrain import registry, storage
from restrain.errors import FileError, MissingFileError, RestrainError
from restrain.fields import brief
from restrain.models import plain, specs
from restrain.models.layers import Network
from restrain.transforms.normalization import Standardize

FORMAT, VERSION = "restrain", 1
FILE_NAME = "model.safetensors"  # when the path is a folder
_KEYS = {"format", "kind", "version", "restrain", "data"}
_DEEPEST = 100  # greatest nesting of the data
_UNSAVED = ("_optimizer",)  # its state can take up to twice the space of the weights
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def place(path: str | os.PathLike[str]) -> Path:
    """Return the path of the file: `path`, or `model.safetensors` in the folder `path`."""
    found = storage.as_path(path)
    folder = found.is_dir() or os.fspath(path).endswith(("/", os.sep))
    return found / FILE_NAME if folder else found


# ---------------------------------------------------------------- any content


def write(path: str | os.PathLike[str], kind: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write data and tensors atomically; return the path of the file.

    At any time, also after a power failure, the file is the old one or the new one, whole.

    Args:
        path: the file, or a folder (existing, or with a trailing slash) for `model.safetensors`.
        kind: type of the content, checked by `read`.
        data: JSON data.
        tensors: of any dtype and device.

    Raises:
        FileError: the data can't be written as JSON.
        FileAccessError: as in `storage.write_safetensors`.
    """
    target = place(path)
    if target != storage.as_path(path):
        storage.make_folder(target.parent)
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FileError(f"can't be written as JSON: {error}") from error
    header = {"format": FORMAT, "kind": kind, "version": str(VERSION), "restrain": _here(), "data": text}
    return storage.write_safetensors(target, tensors, header)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (data, tensors) as written by `write`.

    Raises:
        MissingFileError: the file doesn't exist.
        FileError: the file is truncated, damaged, foreign, of another kind, or of a newer version.
    """
    file = place(path)
    try:
        notes, tensors = storage.read_safetensors(file, "a file of restrain")
    except MissingFileError as error:
        if file.name == FILE_NAME and (file.parent / "path.pt").exists():
            raise MissingFileError(
                f"{file.parent} holds a path, not a model: train one at the chosen strength (restrain fit, or the "
                "keyword's strength), or take a point's, by restrain.paths.Path.load(folder).model(k)"
            ) from error
        raise MissingFileError(f"no file {file}: expected one that a model's save(path) wrote") from error
    return _data(file, notes, list(tensors), kind), tensors


def _data(file: Path, found: Mapping[str, str], names: list[str], kind: str) -> dict[str, Any]:
    if found.get("format") != FORMAT:
        with_names = ", ".join(names[:3]) or "no tensors"
        raise FileError(
            f"{file} isn't a file of restrain but a safetensors file of something else (with {with_names}); expected "
            "what a model's save(path) wrote"
        )
    try:
        version = int(found["version"])
    except (LookupError, ValueError) as error:
        raise storage.damaged(file, "it has no version number") from error
    if version > VERSION:
        raise FileError(
            f"{file} is newer than this library: restrain {found.get('restrain')} wrote it in format {version}, and "
            f"restrain {_here()} reads up to format {VERSION}: pip install --upgrade restrain"
        )
    if set(found) != _KEYS:
        raise storage.damaged(file, f"its header has {brief(sorted(found))} where {sorted(_KEYS)} were expected")
    if found["kind"] != kind:
        raise FileError(f"{file} holds a {found['kind']:.40}, where a {kind} was expected")
    try:
        data = json.loads(found["data"])
    except (ValueError, RecursionError) as error:
        raise storage.damaged(file, f"its data can't be read ({storage.first_line(error)})") from error
    if not isinstance(data, dict):
        raise storage.damaged(file, f"expected a dict, got {type(data).__name__}")
    storage.check_tree(data, str(file), len(found["data"]), _DEEPEST)
    return data


def _here() -> str:
    """Return the version of this library."""
    return str(sys.modules["restrain"].__version__)  # the package is loaded before its modules


# ---------------------------------------------------------------- models


def save(estimator: Any, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> Path:
    """Write a fitted model with its settings and learned attributes; return the path of the file.

    Args:
        estimator: a Classifier, Regressor or Autoencoder.
        path: the file, or a folder (existing, or with a trailing slash) for `model.safetensors`.
        notes: plain data, returned by `read_notes`.

    Raises:
        FileError: the model isn't fitted, or a setting is code.
        FileAccessError: as in `write`.
    """
    name, given = type(estimator).__name__, estimator.get_params(deep=False)
    if "module_" not in vars(estimator):
        raise FileError(f"this {name} has learned nothing yet: call fit or train, then save")
    # An unused registered name is left out: it may be unknown where the file is read.
    said = {key: value for key, value in given.items() if value is not None or key not in registry.names()}
    tensors: dict[str, Tensor] = {}
    learned = {
        key: _take_apart(key, value, tensors)
        for key, value in vars(estimator).items()
        if key not in given and key not in _UNSAVED
    }
    data = {
        "class": name,
        "settings": {key: plain.encode(value, key) for key, value in said.items()},
        "learned": learned,
        "notes": plain.encode(dict(notes or {}), "notes"),
    }
    return write(path, "model", data, tensors)


def _take_apart(key: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a learned attribute as JSON; tensors of modules are added to `tensors`."""
    if not isinstance(value, (Network, Standardize)):
        return plain.encode(value, key)
    tensors.update({f"{key}.{name}": tensor for name, tensor in value.state_dict().items()})
    if isinstance(value, Network):
        return {"$network": None}
    return {"$standardize": value.missing}


def load(path: str | os.PathLike[str], classes: Mapping[str, type]) -> Any:
    """Return the model written by `save`.

    Args:
        path: the file, or its folder.
        classes: the allowed classes by name; no other class is looked up.

    Raises:
        MissingFileError: the file doesn't exist.
        FileError: the file is truncated, damaged, foreign, of a newer version, or inconsistent.
    """
    file = place(path)
    data, tensors = read(path, "model")
    try:
        return _put_together(data, tensors, classes)
    except FileError as error:
        raise FileError(f"{file}: {error}") from error
    except RestrainError as error:
        raise FileError(f"{file} can't be loaded: {error}") from error
    except Exception as error:  # whatever foreign content makes Python, NumPy and torch raise
        raise storage.damaged(file, f"its parts don't fit together ({storage.first_line(error)})") from error


def _put_together(data: Mapping[str, Any], tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    name = data["class"]
    if not isinstance(name, str) or name not in classes:
        raise FileError(f"a model is one of {', '.join(sorted(classes))}; the file has {brief(name)}")
    settings = plain.decode(data["settings"])
    cls = classes[name]
    estimator = cls()
    unknown = sorted(set(settings) - set(estimator.get_params(deep=False)))
    if unknown:
        raise FileError(
            f"{name} has no keyword {', '.join(map(repr, unknown))} here; where that is a penalty of your own, import "
            "the module that defines it before loading"
        )
    estimator.set_params(**settings)
    for key, value in data["learned"].items():
        if hasattr(cls, key) or key in settings or key.startswith("__") or not key.isidentifier():
            raise FileError(f"{key!r} isn't the name of something learned")
        state = {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}
        setattr(estimator, key, _restored(value, state, data["learned"]))
    return estimator


def _restored(value: Any, state: Mapping[str, Tensor], learned: Mapping[str, Any]) -> Any:
    if isinstance(value, dict) and "$network" in value:
        return _network(plain.decode(learned["layers_"]), state)
    if isinstance(value, dict) and "$standardize" in value:
        scale = Standardize(value["$standardize"])
        scale.load_state_dict(state)
        return scale.eval()
    return plain.decode(value)


def _network(layers: Any, state: Mapping[str, Tensor]) -> Network:
    """Build the network and assign its tensors; names and shapes are checked before any allocation.

    Raises:
        FileError: the tensors don't fit the layers.
    """
    if isinstance(layers, list) and len(layers) > len(state) + 2:  # input and last step have no tensors
        raise FileError(f"there are {len(layers)} layers, and tensors of fewer")
    layers = specs.checked(layers)
    with torch.device("meta"):
        network = Network(layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in sorted({*shapes, *found}) if shapes.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise FileError(
            f"its parts don't fit together: by its layers {name!r} has the shape {shapes.get(name)}, and by its "
            f"tensors {found.get(name)}"
        )
    floats = {name: tensor.dtype for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    counts = {tensor.dtype for name, tensor in state.items() if name not in floats}
    if len(set(floats.values())) > 1 or not {*floats.values()} <= {*_FLOATS} or not counts <= {torch.int64}:
        raise FileError(f"its tensors are of {brief(sorted(map(str, {*floats.values(), *counts})))}, not of one type")
    network.load_state_dict(state, assign=True)
    for layer in layers:
        if layer["form"] == "tied":
            one, other = network.get_submodule(layer["name"]), network.get_submodule(layer["partner"])
            if not torch.equal(one.weight, other.weight):  # type: ignore[arg-type]
                raise FileError(f"the weights of {layer['name']!r} and {layer['partner']!r} are tied, but differ")
            one.weight = other.weight
    return network.eval()


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the notes saved with a model.

    Raises:
        MissingFileError, FileError: as in `load`.
    """
    try:
        return dict(plain.decode(read(path, "model")[0]["notes"]))
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, RestrainError):
            raise
        raise storage.damaged(place(path), "its notes aren't a dict") from error
