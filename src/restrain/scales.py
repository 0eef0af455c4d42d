"""Weights whose scale the network was found to ignore, by model, for the tables of attachments."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

_found: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def remember(model: Any, names: Sequence[str]) -> None:
    """Store the names that `scale_invariant` has found for a model."""
    _found[model] = frozenset(names)


def ignored(model: Any) -> frozenset[str]:
    """Return the names that were found for a model; empty if it was never looked at."""
    return _found.get(model, frozenset())
