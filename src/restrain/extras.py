"""Optional packages, installed as extras such as `pip install 'restrain[models]'`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from restrain.errors import MissingExtraError


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Context for imports of optional packages; a missing package raises an error naming the extra.

    Args:
        extra: the name in `restrain[extra]`.
        what: the module or feature that needs the package, for the message.

    Raises:
        MissingExtraError: a package other than restrain isn't installed.

    >>> with needing("models", "it"):
    ...     import no_such_package
    Traceback (most recent call last):
    restrain.errors.MissingExtraError: it needs no_such_package: pip install 'restrain[models]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "restrain"):
            raise
        message = f"{what} needs {package}: pip install 'restrain[{extra}]'"
        raise MissingExtraError(message, name=package) from error


def stand_in(name: str, error: MissingExtraError) -> Any:
    """Return a class to stand in for one that can't be imported; calling it raises the error."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> None:
        raise MissingExtraError(*error.args, name=error.name)

    return type(name, (), {"__doc__": str(error), "__module__": "restrain", "__new__": refuse})
