"""`rs.save` and `rs.load`: keyword models, and networks whose units were taken out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from restrain import storage
from restrain.errors import FileError

if TYPE_CHECKING:
    from restrain.models import Autoencoder, Classifier, Regressor

Model = TypeVar("Model", bound=nn.Module)


def save(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a model for `rs.load`, whole or not at all; return the path of the file.

    Of a network, such as `rs.compact(...).model`, all parameters and buffers are written, with
    shapes of their own; of a keyword model what its `save` writes. No code is.

    Args:
        model: an `nn.Module`, or a fitted Classifier, Regressor or Autoencoder.
        path: the file.

    Raises:
        FileError: the model isn't one of these, isn't fitted, or has state that isn't tensors.
        FileAccessError: the operating system refuses.
    """
    if isinstance(model, nn.Module):
        from restrain import compaction  # which loads torch's exporter

        return compaction.save(model, path)
    from restrain.models import Autoencoder, Classifier, Regressor

    if not isinstance(model, Autoencoder | Classifier | Regressor):
        raise FileError(
            f"rs.save(model, path) writes an nn.Module, a Classifier, a Regressor or an Autoencoder; got "
            f"{type(model).__name__}"
        )
    return model.save(path)


@overload
def load(path: str | os.PathLike[str]) -> Autoencoder | Classifier | Regressor: ...


@overload
def load(path: str | os.PathLike[str], model: Model) -> Model: ...


def load(path: str | os.PathLike[str], model: Any = None) -> Any:
    """Return a model written by `rs.save` or `model.save`; no code from the file is run.

    Of a keyword model the optimizer's state isn't saved: `train` continues with a fresh one. If a
    keyword is a penalty of your own, import the module that defines it first.

    Args:
        path: the file; of a keyword model also a folder with `model.safetensors`.
        model: for the file of a network: a network made by the same code as the one that was
            compacted, with all its units. A copy of it is returned, in the widths and with the
            tensors of the file; dtypes, devices and modes are the given one's.

    Raises:
        MissingFileError: the file doesn't exist.
        FileError: the file is truncated, damaged, foreign, newer than this library, or
            inconsistent; it is of another model than the given one.
    """
    if model is not None:
        if not isinstance(model, nn.Module):
            raise FileError(f"rs.load(path, model) takes the network as an nn.Module; got {type(model).__name__}")
        from restrain import compaction

        return compaction.load(path, model)
    if _is_network(path):
        raise FileError(
            f"{os.fspath(path)!r} is a zip archive, such as rs.save writes of a network: it holds tensors, no code, so "
            "write rs.load(path, model) with a network made as the one that was compacted"
        )
    from restrain.models import load as load_keyword_model

    return load_keyword_model(path)


def _is_network(path: Any) -> bool:
    """Return True for a file that begins as torch.save's do."""
    where = storage.as_path(path)
    if not where.is_file():
        return False
    with storage.opened(where) as file:
        return file.read(4) == b"PK\x03\x04"
