"""Connections of a model: which layers produce and read its units."""

from restrain.connections import attention
from restrain.connections.found import removable, without_cache
from restrain.connections.graph import Graph, Read
from restrain.connections.trees import leaves, mapped

__all__ = ["Graph", "Read", "attention", "leaves", "mapped", "removable", "without_cache"]
