"""Packages that only parts of the library need: `pip install 'restrain[models]'` and the like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from restrain.errors import MissingExtraError


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Name the extra to install where an import within it finds that a package is missing.

    Args:
        extra: the name in `restrain[extra]`.
        what: what needs it: a module's `__name__`, or a plain name.

    Raises:
        MissingExtraError: a package that isn't ours isn't installed.

    >>> with needing("models", "the example"):
    ...     import no_such_package
    Traceback (most recent call last):
    restrain.errors.MissingExtraError: the example needs no_such_package: pip install 'restrain[models]'
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
    """Return a class that raises the error when it is called, in the place of one that can't be imported."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> None:
        raise MissingExtraError(*error.args, name=error.name)

    return type(name, (), {"__doc__": str(error), "__module__": "restrain", "__new__": refuse})
