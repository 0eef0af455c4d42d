"""Pause of Python's cyclic garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Context without garbage collection: thousands of new objects would trigger full passes."""
    collecting = gc.isenabled()
    try:
        try:
            gc.disable()
            yield
        finally:
            _collect_again(collecting)
    finally:  # an interrupt may have prevented the line above
        _collect_again(collecting)


def _collect_again(collecting: bool) -> None:
    if collecting:
        gc.enable()
