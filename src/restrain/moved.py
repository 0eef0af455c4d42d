"""Old names of modules, as they occur in pickles of version 0.1, mapped to today's modules."""

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
    """Import hook that loads a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, __doc__)
        module.__dict__.update(vars(importlib.import_module(MOVED[spec.name])))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` has filled the module."""


def install() -> None:
    """Add the import hook for old names, once."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
