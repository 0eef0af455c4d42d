"""`rs.load`: the classes that a model on file may have."""

from __future__ import annotations

import os

from restrain.models import files
from restrain.models.estimators import Autoencoder, Classifier, Regressor

_CLASSES = {cls.__name__: cls for cls in (Autoencoder, Classifier, Regressor)}


def load(path: str | os.PathLike[str]) -> Autoencoder | Classifier | Regressor:
    """The model that `model.save(path)` wrote. Runs no code from the file.

    The optimizer's state isn't kept: `train` goes on with a fresh one. Where a keyword is a penalty of your own,
    import the module that defines it first.

    Args:
        path: the file, or the folder that it is in as `model.safetensors`.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is cut off, foreign, newer than this library, or doesn't fit together.
    """
    return files.load(path, _CLASSES)  # type: ignore[no-any-return]
