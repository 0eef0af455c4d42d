"""Detection of layers or tensors that were replaced, added, tied or re-declared after `attach`.

Selections are resolved at attach. `Structure.changed` compares the model's tree with the tree seen
then: the identities of all modules and of their parameters. It costs about 0.3 µs per module
(benchmarks/structure.py), and runs at each forward with hooks, each loss, and each step without a
loss. Only after a difference are selections resolved again.

Identities of parameters alone differ often, as FSDP2 and `functional_call` substitute tensors. Then
only shapes are compared, and which parameters share a tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, call
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from restrain.declare import declarations
from restrain.engine.core import Hook
from restrain.torch_private import not_alone

_CHILDREN, _PARAMETERS, _SHAPE = attrgetter("_modules"), attrgetter("_parameters"), attrgetter("shape")


class Structure:
    """The modules and parameters of a model when last seen, referenced weakly."""

    def __init__(self, model: nn.Module) -> None:
        self.remember(model)

    def remember(self, model: nn.Module) -> None:
        """Record the current modules and parameters of the model."""
        self._references = [weakref.ref(module) for module in model.modules()]
        self._modules, self._parameters = self._identities() or ([], [])
        self._shapes, self._pattern = _shapes(self._own()), self._pattern_now()
        self._declared = declarations.count

    def changed(self) -> bool:
        """Return True if modules or parameters were replaced, added, removed, tied or resized.

        Other tensors of the same shapes don't count.
        """
        found = self._identities()
        if found is None or found[0] != self._modules or declarations.count != self._declared:
            return True
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if found[1] == self._parameters and (traced or _shapes(self._own()) == self._shapes):
            return False  # `p.data = ...` can resize a parameter in place; in a trace, sizes are tensors
        if self._pattern_now() != self._pattern:
            return True
        self._parameters = found[1]  # other tensors of the same shapes
        return False

    def _identities(self) -> tuple[list[int], list[int]] | None:
        """Return the ids of all modules' children and parameters; None if a module is gone."""
        modules = [*map(call, self._references)]
        try:
            return (
                [*map(id, chain.from_iterable(map(dict.values, map(_CHILDREN, modules))))],
                [*map(id, chain.from_iterable(map(dict.values, map(_PARAMETERS, modules))))],
            )
        except AttributeError:
            return None

    def _own(self) -> Iterator[nn.Parameter | None]:
        """Yield the modules' own parameters."""
        return chain.from_iterable(map(dict.values, map(_PARAMETERS, map(call, self._references))))

    def _pattern_now(self) -> list[tuple[str, int, Any]]:
        """Return (name, number of the first parameter of the same tensor, shape) of each."""
        first: dict[int, int] = {}
        pattern: list[tuple[str, int, Any]] = []
        for module in [*map(call, self._references)]:
            for name, p in () if module is None else module._parameters.items():
                number = -1 if p is None else first.setdefault(id(p), len(pattern))
                pattern.append((name, number, None if p is None or is_lazy(p) else p.shape))
        return pattern


def _shapes(parameters: Iterable[nn.Parameter | None]) -> list[torch.Size]:
    """Return the shapes of parameters; an empty list if some are lazy."""
    try:
        return [*map(_SHAPE, filter(torch.is_tensor, parameters))]
    except RuntimeError:
        return []


class Look(Hook):
    """Pre-hook of the model that detects changes before layers are called.

    Hooks can then move to other layers in time.
    """

    def __init__(self, look: Callable[[nn.Module], None]) -> None:
        self.look = look

    @not_alone
    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.look(module)
