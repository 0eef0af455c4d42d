"""Compacted models on file: tensors and their shapes, no code."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from restrain import storage
from restrain.compaction import surgery
from restrain.connections import attention
from restrain.errors import FileError
from restrain.named_tensors import checked_module, unwrap

VERSION = 1
_KEYS = {"kind", "version", "tensors", "missing_ok", "attentions"}
Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the tensors of a model, of any widths, for `load`; return the path of the file.

    Args:
        model: the model, compacted or not.
        path: the file, written whole or not at all.

    Raises:
        FileError: the model has state that isn't tensors (`get_extra_state`).
        FileAccessError: the operating system refuses.
    """
    root = unwrap(checked_module(model))
    state = root.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise FileError(
            f"{others[0]!r} of {type(root).__name__} isn't a tensor, and only tensors are written: keep it yourself, "
            "or write torch.save(model, path)"
        )
    own = _tensors(root)
    fewer = [name for name, module in root.named_modules() if isinstance(module, attention.Attention)]
    data = {
        "kind": "network",
        "version": VERSION,
        "tensors": {name: tensor.detach() for name, tensor in own.items()},
        "missing_ok": sorted(set(own) - set(state)),  # buffers that aren't persistent
        "attentions": fewer,
    }
    return storage.write_torch(path, data)


def load(path: str | os.PathLike[str], model: Model) -> Model:
    """Return a copy of a model in the widths, and with the tensors, that `save` wrote.

    Args:
        path: the file.
        model: a model made by the same code as the one that was compacted, in its full widths; it
            stays as it is. dtypes, devices and modes are its own.

    Raises:
        MissingFileError: there is no such file.
        FileError: the file is damaged, foreign, or of a newer version, or another model's.
    """
    data = _read(path)
    tensors: dict[str, Tensor] = data["tensors"]
    checked_module(model)
    copied = copy.deepcopy(model)
    root = unwrap(copied)
    if any(tensor.is_meta for tensor in _tensors(root).values()):
        raise FileError("the given model is on the meta device, without memory for tensors: build it on another one")
    attention.replaced(root, data["attentions"])
    _add_biases(root, tensors)
    own = _tensors(root)
    _check_names(path, root, own, data)
    for name, tensor in tensors.items():
        if name in own:
            _check_shape(path, name, own[name], tensor)
            own[name].data = tensor.to(device=own[name].device, dtype=own[name].dtype, copy=True)
    surgery.tell_sizes(root)
    return copied


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by all their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _read(path: Any) -> dict[str, Any]:
    """Return what `save` wrote; no code in the file is run."""
    data = storage.read_torch(path)
    if not isinstance(data, dict) or data.get("kind") != "network":
        raise FileError(f"{path} isn't a network written by rs.save(model, path)")
    if data.get("version") != VERSION:
        raise FileError(f"{path} is of another version than {VERSION}: pip install --upgrade restrain")
    tensors, names = data.get("tensors"), [data.get("missing_ok"), data.get("attentions")]
    plain = isinstance(tensors, Mapping) and all(isinstance(t, Tensor) and not t.is_sparse for t in tensors.values())
    listed = all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in names)
    if set(data) != _KEYS or not (plain and listed):
        raise storage.damaged(path, "it has other entries than a network")
    return data


def _add_biases(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Add the biases that a compaction gave to layers without one."""
    known = _tensors(model)
    for name in [name for name in tensors if name not in known and name.rpartition(".")[2] == "bias"]:
        weight = name.removesuffix("bias") + "weight"
        if weight in known and surgery.may_have_bias(model, weight):
            surgery.add_bias(model, weight, len(known[weight]), None)


def _check_names(path: Any, model: nn.Module, own: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    spare, found = set(data["missing_ok"]), set(data["tensors"])
    wrong = sorted((found - set(own) - spare) | (set(own) & set(model.state_dict()) - found))
    if wrong:
        where = "the file" if wrong[0] in found else "the model"
        raise FileError(
            f"{path} is of another model than this {type(model).__name__}: only {where} has {wrong[0]!r}; give a model "
            "made by the same code as the one that was compacted"
        )


def _check_shape(path: Any, name: str, own: Tensor, tensor: Tensor) -> None:
    if tensor.dim() != own.dim() or any(new > old for new, old in zip(tensor.shape, own.shape, strict=True)):
        raise FileError(
            f"{path} is of another model: {name!r} has the shape {tuple(tensor.shape)} in the file and "
            f"{tuple(own.shape)} in the model, which is to have the widths from before the compaction"
        )
