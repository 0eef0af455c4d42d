"""Modules of version 0.1 under the names that pickles of it hold; imported when one is read."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "restrain.sites": "restrain.named_tensors",
    "restrain.select": "restrain.selections",
    "restrain.places": "restrain.activation_points",
    "restrain.penalties.kept": "restrain.penalties.stateful",
    "restrain.penalties.pairs": "restrain.penalties.parameter_pairs",
    "restrain.penalties.network": "restrain.penalties.base",
    "restrain.penalties.sorted": "restrain.penalties.structured",
    "restrain.engine.hanging": "restrain.engine.core.hooks",
    "restrain.engine.detached": "restrain.engine.attach.state",
}


class Moved(MetaPathFinder, Loader):
    """Finds a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, __doc__)
        module.__dict__.update(vars(importlib.import_module(MOVED[spec.name])))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
