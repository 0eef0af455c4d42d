"""Compaction: units that do nothing are taken out of a network, exactly."""

from restrain.compaction.compaction import Compaction, compact

__all__ = ["Compaction", "compact"]
