"""Structures of lists, tuples and mappings: arguments of models and of operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the members of a structure that aren't structures, in order; None counts."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from leaves(part)
    else:
        yield tree


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a structure with a function applied to each member that isn't a structure."""
    if isinstance(tree, Mapping):
        return {key: mapped(function, part) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        found = [mapped(function, part) for part in tree]
        return type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)
    return function(tree)
