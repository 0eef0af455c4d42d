"""When Python may look for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it no garbage is collected: thousands of new objects would set off passes over all objects there are."""
    collecting = gc.isenabled()
    try:
        try:
            gc.disable()
            yield
        finally:
            _collect_again(collecting)
    finally:  # an interrupt may have come in place of the line above
        _collect_again(collecting)


def _collect_again(collecting: bool) -> None:
    if collecting:
        gc.enable()
