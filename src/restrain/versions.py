"""Versions of torch: those on which the tests were run, the least supported first."""

from __future__ import annotations

import re
import warnings

from restrain.errors import RestrainWarning, VersionError

TESTED = ((2, 10), (2, 12), (2, 13), (2, 15))  # see docs/versions.md
OLDEST = TESTED[0]


def number(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version of torch.

    >>> number("2.15.0a0+git1234")
    (2, 15)
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else OLDEST


def untested(version: str) -> bool:
    """Return True if the tests weren't run on a version of torch.

    >>> untested("2.14.1"), untested("2.15.0+cpu")
    (True, False)
    """
    return number(version) not in TESTED


def check(version: str) -> None:
    """Raise an error if the version of torch is too old, warn if it is newer than the tested ones.

    Args:
        version: `torch.__version__`.

    Raises:
        VersionError: the version is below `OLDEST`.

    >>> check("2.1.2")
    Traceback (most recent call last):
    restrain.errors.VersionError: restrain needs torch 2.10 or newer, this is 2.1.2: ...
    """
    oldest = ".".join(map(str, OLDEST))
    if number(version) < OLDEST:
        raise VersionError(f"restrain needs torch {oldest} or newer, this is {version}: pip install 'torch>={oldest}'")
    if number(version) > TESTED[-1]:
        tested = ".".join(map(str, TESTED[-1]))
        warnings.warn(
            f"restrain was tested up to torch {tested}, this is {version}: compiled code is compared with the formulas "
            "before it is used; for the rest, see whether there is a newer restrain",
            RestrainWarning,
            stacklevel=3,
        )
