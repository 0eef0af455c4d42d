"""Checkpoints of a training: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from restrain.errors import PlanError

VERSION = 1


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write the state to a file, which at any instant holds either the state before or this one, whole."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save({"version": VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: str | Path, belongs_to: dict[str, Any]) -> dict[str, Any] | None:
    """The state in a file; None if there is no such file.

    Args:
        path: the file.
        belongs_to: what the training is, to be found in the file under "training".

    Raises:
        PlanError: the file is something else, or of another training.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise PlanError(f"checkpoint={str(path)!r}: there is no folder {str(path.parent)!r}")
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        version = state["version"]
    except Exception as error:  # whatever a foreign file makes torch raise
        raise PlanError(f"{str(path)!r} is not a checkpoint of a training ({error}); name another file") from error
    if version != VERSION:
        raise PlanError(f"the checkpoint {str(path)!r} is of version {version}, this library reads {VERSION}")
    other = [key for key in belongs_to if state["training"].get(key) != belongs_to[key]]
    if other:
        raise PlanError(
            f"the checkpoint {str(path)!r} is of another training: {', '.join(other)} differ. Delete it to begin "
            "anew, or name another file"
        )
    return state  # type: ignore[no-any-return]


def seed(path: str | Path | None) -> int | None:
    """The seed of the training in a file; None where there is none to be read."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")["training"]["seed"] if path else None
    except Exception:  # no such file, or a foreign one, of which `read` tells
        return None
    return found if isinstance(found, int) else None
