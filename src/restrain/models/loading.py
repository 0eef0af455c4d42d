"""`rs.load`: the classes allowed in a model file, and checks of their learned attributes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from restrain.errors import FileError
from restrain.fields import brief, is_whole
from restrain.models import files, specs
from restrain.models.base import READERS, KeywordModel
from restrain.models.estimators import Autoencoder, Classifier, Regressor
from restrain.models.layers import Network
from restrain.tables import TableEncoder
from restrain.transforms.normalization import Standardize

_CLASSES = {cls.__name__: cls for cls in (Autoencoder, Classifier, Regressor)}


def load(path: str | os.PathLike[str]) -> Autoencoder | Classifier | Regressor:
    """Load a model written by `model.save(path)`; no code from the file is run.

    The optimizer's state isn't saved: `train` continues with a fresh one. If a keyword is a penalty
    of your own, import the module that defines it first.

    Args:
        path: the file, or a folder with `model.safetensors`.

    Raises:
        MissingFileError: the file doesn't exist.
        FileError: the file is truncated, damaged, foreign, newer than this library, or
            inconsistent.
    """
    model = files.load(path, _CLASSES)
    for name, (expected, fits) in _learned(model).items():
        value = vars(model).get(name, _ABSENT)
        if value is _ABSENT or not fits(value):
            came = "nothing" if value is _ABSENT else brief(value)
            raise FileError(f"{files.place(path)} is damaged: {name} is {expected}, and it has {came}; fetch it again")
    return model  # type: ignore[no-any-return]


READERS["load"] = load
_ABSENT = object()


def _learned(model: KeywordModel) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Return (description, check) of each learned attribute; later checks rely on earlier ones."""
    layers = vars(model).get("layers_") or []
    first, last = (specs.features(layers), specs.outputs(layers)) if layers else (None, None)
    encoder = vars(model).get("encoder_")  # its own content is checked where it is read
    columns = getattr(encoder, "n_features_in_", first)
    found: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "module_": ("a network", lambda v: isinstance(v, Network)),
        "n_features_in_": (f"{columns}, the size of the input layer", lambda v: is_whole(v) and v == columns),
        "n_iter_": ("a number of epochs", lambda v: is_whole(v, 0)),
        "seed_": ("a whole number", lambda v: is_whole(v, 0) and v < 2**63),
        "compiled_": ("text", lambda v: isinstance(v, str)),
        "history_": ("a list with a dict of numbers for each epoch", _is_history),
        "input_scale_": (f"None, or what scales {first} features", lambda v: _scales(v, first)),
        "target_scale_": (f"None, or what scales {last} targets", lambda v: _scales(v, last)),
    }
    if "feature_names_in_" in vars(model):
        found["feature_names_in_"] = (f"{columns} names of columns", lambda v: _is_names(v, columns))
    if encoder is not None:
        found["encoder_"] = (f"an encoder of {first} inputs", lambda v: _encodes(v, first))
    if isinstance(model, Classifier):
        found["labels_of_steps_"] = ("true or false", lambda v: isinstance(v, bool))
        found["classes_"] = (f"an array of {last} classes, sorted", lambda v: _is_classes(v, last))
        if "_classes" in vars(model):
            found["_classes"] = found["classes_"]
    if isinstance(model, Regressor):
        for name in ("is_flat_", "targets_of_steps_"):
            found[name] = ("true or false", lambda v: isinstance(v, bool))
        found["n_outputs_"] = (
            f"a number of targets that needs {last} outputs",
            lambda v: is_whole(v, 1) and model.loss_function().outputs(v) == last,
        )
        targets = vars(model).get("n_outputs_")
        found["target_scale_"] = (f"None, or what scales {targets} targets", lambda v: _scales(v, targets))
    return found


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(isinstance(k, str) and isinstance(v, int | float) for k, v in row.items())
        for row in value
    )


def _scales(value: Any, size: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Standardize) and value.fitted and value.mean.shape in ((), (size,))


def _is_names(value: Any, size: Any) -> bool:
    return isinstance(value, np.ndarray) and value.shape == (size,) and all(isinstance(name, str) for name in value)


def _encodes(value: Any, size: Any) -> bool:
    return isinstance(value, TableEncoder) and value.is_fitted and len(value.get_feature_names_out()) == size


def _is_classes(value: Any, size: Any) -> bool:
    if not isinstance(value, np.ndarray) or value.shape != (size,):
        return False
    return all(a < b for a, b in zip(value.tolist(), value.tolist()[1:], strict=False))
