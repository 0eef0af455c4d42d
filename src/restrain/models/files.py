"""Models on file: one safetensors file, whose header holds everything but the tensors as JSON.

Reading runs no code from the file: classes are looked up in the caller's table, penalties in the registry, and there
is no pickle. A file is written beside its place and moved there when it is whole, so nobody ever reads half of one.
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

from restrain import registry
from restrain.errors import FileError, RestrainError
from restrain.extras import needing
from restrain.models import plain
from restrain.models.layers import Network
from restrain.transforms.normalization import Standardize

FORMAT, VERSION = "restrain", 1
FILE_NAME = "model.safetensors"  # in a folder
_UNSAVED = ("_optimizer",)  # as long as the weights again, or twice
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}


def place(path: str | os.PathLike[str]) -> Path:
    """The file that a path means: itself, or `model.safetensors` in the folder that it is."""
    found = Path(path)
    folder = found.is_dir() or os.fspath(path).endswith(("/", os.sep))
    return found / FILE_NAME if folder else found


# ---------------------------------------------------------------- any content


def write(path: str | os.PathLike[str], kind: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write data and tensors, atomically: there is the old file or the new one, whole, whenever the power fails.

    Args:
        path: the file, or a folder (existing, or with a slash at the end) for `model.safetensors`.
        kind: what it is; `read` asks for it.
        data: what `json` can write.
        tensors: copied to memory; of any dtype and device.

    Raises:
        FileError: the folder doesn't exist, or data that JSON can't hold.
    """
    with needing("models", "a model's file"):
        from safetensors import torch as safetensors

    target = Path(os.path.realpath(place(path)))
    if place(path) != Path(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.is_dir():
        raise FileError(f"the folder {target.parent} doesn't exist; create it first")
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FileError(f"can't be written as JSON: {error}") from error
    header = {"format": FORMAT, "kind": kind, "version": str(VERSION), "restrain": _here(), "data": text}
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    _replace(target, safetensors.save(own, header))
    return target


def _replace(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name too
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The data and tensors that `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is cut off, foreign, of another kind, or newer than this version.
    """
    with needing("models", "a model's file"):
        from safetensors import SafetensorError
        from safetensors import torch as safetensors

    file = place(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected one that a model's save(path) wrote")
    content = file.read_bytes()
    data = _data(file, _header(file, content), kind)
    try:
        return data, safetensors.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{file} is damaged ({error}); write it anew, or fetch it again") from error


def _header(file: Path, content: bytes) -> dict[str, Any]:
    """The header of a safetensors file that is as long as it says."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or length > 100_000_000:  # the format's own bound; else the length may look like a magic
        for magic, what in _FOREIGN.items():
            if content.startswith(magic):
                raise _foreign(file, what)
        if len(content) < 9:
            raise _cut(file, len(content), "at least 9")
        raise _foreign(file, "no safetensors file")
    if len(content) < 8 + length:
        raise _cut(file, len(content), f"at least {8 + length:,}")
    try:
        header = json.loads(content[8 : 8 + length])
        ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FileError(f"{file} is damaged: its header can't be read ({error}); fetch it again") from error
    if len(content) < whole:
        raise _cut(file, len(content), f"{whole:,}")
    return header  # type: ignore[no-any-return]


def _data(file: Path, header: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found = header.get("__metadata__") or {}
    if found.get("format") != FORMAT:
        names = ", ".join([key for key in header if key != "__metadata__"][:3])
        raise _foreign(file, f"a safetensors file of something else (with {names or 'no tensors'})")
    try:
        version = int(found["version"])
    except (LookupError, ValueError) as error:
        raise FileError(f"{file} is damaged: it has no version number") from error
    if version > VERSION:
        raise FileError(
            f"{file} is newer than this library: restrain {found.get('restrain')} wrote it in format {version}, and "
            f"restrain {_here()} reads up to format {VERSION}: pip install --upgrade restrain"
        )
    if found.get("kind") != kind:
        raise FileError(f"{file} holds a {found.get('kind')}, where a {kind} was expected")
    try:
        data = json.loads(found["data"])
    except (LookupError, ValueError, RecursionError) as error:
        raise FileError(f"{file} is damaged: its data can't be read ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise FileError(f"{file} is damaged: expected a dict, got {type(data).__name__}")
    return data


def _here() -> str:
    """The version of this library."""
    return str(sys.modules["restrain"].__version__)  # loaded before any part of it


def _foreign(file: Path, what: str) -> FileError:
    return FileError(f"{file} isn't a file of restrain but {what}; expected what a model's save(path) wrote")


def _cut(file: Path, size: int, whole: str) -> FileError:
    return FileError(f"{file} is cut off: it has {size:,} bytes of {whole}; copy or download it again")


# ---------------------------------------------------------------- models


def save(estimator: Any, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> Path:
    """Write a fitted model: its settings, what it learned, and notes of yours.

    Args:
        estimator: a Classifier, Regressor or Autoencoder.
        path: the file, or a folder (existing, or with a slash at the end) for `model.safetensors`.
        notes: plain data that `read_notes` gives back.

    Returns:
        The file.

    Raises:
        FileError: the model isn't fitted, or a setting is code, which a file doesn't hold.
    """
    name, given = type(estimator).__name__, estimator.get_params(deep=False)
    if "module_" not in vars(estimator):
        raise FileError(f"this {name} has learned nothing yet: call fit or train, then save")
    # a registered name that isn't used may be unknown where the file is read
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
    """A learned attribute as JSON; the tensors of modules go to `tensors`."""
    if not isinstance(value, (Network, Standardize)):
        return plain.encode(value, key)
    tensors.update({f"{key}.{name}": tensor for name, tensor in value.state_dict().items()})
    if isinstance(value, Network):
        return {"$network": None}
    return {"$standardize": value.missing}


def load(path: str | os.PathLike[str], classes: Mapping[str, type]) -> Any:
    """The model that `save` wrote.

    Args:
        path: the file, or its folder.
        classes: the classes that it may have, by name; no other is ever looked up.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is cut off, foreign, newer, or doesn't fit together.
    """
    file = place(path)
    data, tensors = read(path, "model")
    try:
        return _put_together(data, tensors, classes)
    except FileError as error:
        raise FileError(f"{file}: {error}") from error
    except RestrainError as error:
        raise FileError(f"{file} can't be loaded: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(f"{file} is damaged: its parts don't fit together ({error}); fetch it again") from error


def _put_together(data: Mapping[str, Any], tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    name = data["class"]
    if name not in classes:
        raise FileError(f"a model is one of {', '.join(sorted(classes))}; the file has {name!r}")
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
        module: torch.nn.Module = Network(plain.decode(learned["layers_"]))
    elif isinstance(value, dict) and "$standardize" in value:
        module = Standardize(value["$standardize"])
    else:
        return plain.decode(value)
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    if floating and isinstance(module, Network):
        module.to(floating[0])
    module.load_state_dict(state)
    return module.eval()


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes that were saved with a model.

    Raises:
        FileNotFoundError, FileError: as in `load`.
    """
    return dict(plain.decode(read(path, "model")[0]["notes"]))
