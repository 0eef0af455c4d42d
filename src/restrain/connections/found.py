"""Units of a model that can be removed, as indices along the axes of its parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from restrain.connections import attention
from restrain.connections.graph import Graph

Place: TypeAlias = tuple[str, int]
"""An axis of a parameter, by the parameter's name."""


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Context in which a model of transformers doesn't return its keys and values as outputs."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", False)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


def removable(model: nn.Module, args: tuple[Any, ...], readers: bool = True) -> list[dict[Place, list[int]]]:
    """Return the units that could be removed: for each, its indices along axes of parameters.

    These are the units that `rs.compact` removes where they do nothing.

    Args:
        model: the model; a copy of it is exported, in eval mode.
        args: its positional inputs.
        readers: False to leave out the axes along which weights read the units.

    Raises:
        CompactionError: torch.export can't follow the model.
    """
    large = copy.deepcopy(model).eval()
    with without_cache(large):
        attention.replaced(large)
        graph = Graph(large, args)
    read = set() if readers else {(one.weight, one.dim) for one in graph.reads}
    known = {unit for one in graph.reads for unit in graph.labels.units(one.features)}
    known |= {unit for one in graph.reads for unit in graph.labels.units(one.outputs)}
    units: dict[int, dict[Place, list[int]]] = defaultdict(dict)
    for name in dict(model.named_parameters()):
        for dim, labels in enumerate(graph.axes[name]):
            for index, unit in enumerate(graph.labels.units(labels) if (name, dim) not in read else ()):
                if unit in known and graph.labels.reason(unit) is None:
                    units[unit].setdefault((name, dim), []).append(index)
    return [units[unit] for unit in sorted(units)]
