"""Let Keras 3 save, load and clone models with penalties as regularisers.

Keras looks classes up in a table of its own. Ours enter it when restrain is imported after Keras,
and else when a penalty is first called by a layer or saved. A process that loads a model must
therefore import Keras first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

_PACKAGE = "restrain"


class Forms:
    """Functions that turn a penalty into plain data and back; `plandata` sets them."""

    write: Callable[[Any], dict[str, Any]]
    read: Callable[[Any], Any]


def register(base: type) -> None:
    """Enter a class and its subclasses into Keras's table, if Keras is loaded."""
    keras = sys.modules.get("keras")
    saving = getattr(keras, "saving", None)
    if saving is None:
        return
    for cls in _subclasses(base):
        name = f"{_PACKAGE}>{cls.__name__}"
        if cls.__module__.partition(".")[0] == _PACKAGE and saving.get_registered_object(name) is None:
            saving.register_keras_serializable(package=_PACKAGE)(cls)


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for cls in base.__subclasses__():
        yield from _subclasses(cls)
