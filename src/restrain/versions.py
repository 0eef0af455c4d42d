"""Versions of torch: the oldest supported and the newest tested version."""

from __future__ import annotations

import re
import warnings

from restrain.errors import RestrainWarning, VersionError

OLDEST = (2, 10)
TESTED = (2, 15)  # the newest version on which the tests were run


def number(version: str) -> tuple[int, int]:
    """Return (major, minor) of a version of torch.

    >>> number("2.15.0a0+git1234")
    (2, 15)
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else OLDEST


def untested(version: str) -> bool:
    """Return True if a version of torch is newer than the tested versions."""
    return number(version) > TESTED


def check(version: str) -> None:
    """Check the version of torch: raise an error if it is too old, warn if it is untested.

    Args:
        version: `torch.__version__`.

    Raises:
        VersionError: the version is below `OLDEST`.

    >>> check("2.1.2")
    Traceback (most recent call last):
    restrain.errors.VersionError: restrain needs torch 2.13 or newer, this is 2.1.2: ...
    """
    oldest = ".".join(map(str, OLDEST))
    if number(version) < OLDEST:
        raise VersionError(f"restrain needs torch {oldest} or newer, this is {version}: pip install 'torch>={oldest}'")
    if untested(version):
        tested = ".".join(map(str, TESTED))
        warnings.warn(
            f"restrain was tested up to torch {tested}, this is {version}: compiled code is compared with the formulas "
            "before it is used; for the rest, see whether there is a newer restrain",
            RestrainWarning,
            stacklevel=3,
        )
