"""Compaction: exact removal of units that don't contribute to a network's outputs."""

from restrain.compaction.compaction import Compaction, compact

__all__ = ["Compaction", "compact"]
