"""Compaction: exact removal of units that don't contribute to a network's outputs."""

from restrain.compaction.compaction import Compaction, compact
from restrain.compaction.files import load, save
from restrain.compaction.report import Report

__all__ = ["Compaction", "Report", "compact", "load", "save"]
