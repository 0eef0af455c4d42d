"""Checkpoints of a training, written whole or not at all and read without running code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restrain import storage
from restrain.errors import FileError, MissingFileError, PlanError
from restrain.fields import brief, is_whole
from restrain.models.settings import NEW

VERSION = 1
_NEW = ("scaled",)  # parts of the identity that version 0.1 didn't write
_PARTS = ("training", "done", "network", "optimizer", "rules", "best", "history")


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write the state to a file atomically: the file holds the old state or the new one.

    Raises:
        FileAccessError: the folder doesn't exist, or there is no space or no permission.
    """
    storage.write_torch(path, {"version": VERSION, **state})


def read(path: str | Path, belongs_to: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state of a training from a file; return None if the file doesn't exist.

    Args:
        path: the file.
        belongs_to: identity of the training, compared with the entry "training" of the file.

    Raises:
        PlanError: the folder doesn't exist, or the file isn't a checkpoint, is damaged, has another
            version, or belongs to another training.
        FileAccessError: the file can't be opened.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise PlanError(f"checkpoint={str(path)!r}: there is no folder {str(path.parent)!r}")
    try:
        state = storage.read_torch(path)
    except MissingFileError:
        return None
    except FileError as error:
        if isinstance(error, OSError):
            raise
        raise PlanError(f"{str(path)!r} is not a checkpoint of a training ({error}); name another file") from error
    _check(state, path)
    found = {**dict.fromkeys(NEW), **{key: belongs_to.get(key) for key in _NEW}, **state["training"]}
    other = [key for key in belongs_to if not _same(found.get(key), belongs_to[key])]
    if other:
        raise PlanError(
            f"the checkpoint {str(path)!r} is of another training: {', '.join(other)} differ. Delete it to begin "
            "anew, or name another file"
        )
    return state  # type: ignore[no-any-return]


def _check(state: Any, path: Path) -> None:
    """Raise PlanError unless `state` is a complete checkpoint of this version."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if not is_whole(version):
        raise PlanError(f"{str(path)!r} is not a checkpoint of a training: it has no version; name another file")
    if version != VERSION:
        newer = ": pip install --upgrade restrain" if version > VERSION else ""
        raise PlanError(f"the checkpoint {str(path)!r} is of version {version}, this library reads {VERSION}{newer}")
    lost = [part for part in _PARTS if part not in state]
    if lost or not isinstance(state["training"], Mapping) or not isinstance(state["history"], list):
        raise PlanError(
            f"{str(path)!r} is not a whole checkpoint of a training: it has {brief(sorted(map(str, state)))}, where "
            f"{', '.join(_PARTS)} were expected; delete it to begin anew"
        )


def _same(found: Any, wanted: Any) -> bool:
    try:
        return bool(found == wanted)
    except Exception:  # for example, the truth value of a tensor
        return False


def check_content(path: str | Path, state: Mapping[str, Any], network: Mapping[str, Tensor]) -> None:
    """Check that a training of the given network can continue from the state.

    Args:
        path: the file, for the message.
        state: as returned by `read`.
        network: the `state_dict()` of the network.

    Raises:
        PlanError: a part has the wrong type, shape or range.
    """
    best = state["best"] if isinstance(state["best"], Mapping) else {}
    fits = {
        "done": is_whole(state["done"], 0),
        "network": alike(state["network"], network),
        "best": set(best) == {"loss", "weights", "worse"}
        and isinstance(best["loss"], float)
        and is_whole(best["worse"], 0)
        and (best["weights"] is None or alike(best["weights"], network)),
        "history": all(isinstance(row, dict) and all(map(_is_numbered, row.items())) for row in state["history"]),
        "compiled": any(state.get("compiled", False) is known for known in (False, True))
        or _same(state["compiled"], "later")
        or _same(state["compiled"], "recorded"),
    }
    wrong = [part for part, right in fits.items() if not right]
    if wrong:
        raise PlanError(
            f"the checkpoint {str(path)!r} isn't what this training wrote: {', '.join(wrong)} can't be; delete it to "
            "begin anew"
        )


def _is_numbered(pair: tuple[Any, Any]) -> bool:
    return isinstance(pair[0], str) and isinstance(pair[1], int | float)


def alike(found: Any, wanted: Mapping[str, Tensor]) -> bool:
    """True if `found` holds dense tensors with the names, shapes and dtypes of `wanted`."""
    if not isinstance(found, Mapping) or found.keys() != wanted.keys():
        return False
    return all(
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and (tensor.shape, tensor.dtype) == (wanted[name].shape, wanted[name].dtype)
        for name, tensor in found.items()
    )


def is_of_0_1(path: str | Path | None) -> bool:
    """True if there is a checkpoint that version 0.1 wrote."""
    try:
        found = storage.read_torch(path)["training"] if path else None
    except (FileError, LookupError, TypeError):  # `read` reports a foreign file later
        return False
    return isinstance(found, Mapping) and not set(_NEW) <= set(found)


def seed(path: str | Path | None) -> int | None:
    """Return the seed stored in a checkpoint, or None if it can't be read."""
    try:
        found = storage.read_torch(path)["training"]["seed"] if path else None
    except (FileError, LookupError, TypeError):  # `read` reports a foreign file later
        return None
    return found if is_whole(found, 0) else None
