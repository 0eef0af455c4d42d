"""Tensors that `torch.func.functional_call` substitutes for a model's parameters in a forward.

Penalties on parameters act on the tensors that the last forward used.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from restrain.named_tensors import Handle, fully_sharded
from restrain.torch_private import life, over


class Overrides:
    """Record of the tensors that `functional_call` substitutes for parameters with penalties."""

    def __init__(self, handles: Iterable[Handle] = ()) -> None:
        self.handles = list(dict.fromkeys(handles))
        self._own: list[tuple[weakref.ref[nn.Module], str, weakref.ref[Tensor]]] = []
        self._of_forward: dict[str, Tensor] = {}
        self._life: Any = None

    def remember(self, root: nn.Module) -> None:
        """Record the current parameters as the model's own."""
        owners = {id(m): m for handle in self.handles for m in _owners(handle, root)}
        cells = [(m, key, p) for m in owners.values() for key, p in m._parameters.items() if p is not None]
        self._own = [(weakref.ref(m), key, weakref.ref(p)) for m, key, p in cells]

    def look(self, root: nn.Module) -> None:
        """Record the substituted tensors, if any; called when a forward begins."""
        self._of_forward = {}
        if all((m := owner()) is not None and m._parameters.get(key) is own() for owner, key, own in self._own):
            return
        if not fully_sharded(root.modules()):  # FSDP swaps parameters, too
            self._of_forward = {handle.name: handle.find(root) for handle in self.handles}
            self._life = life()

    def forget(self) -> None:
        """Forget the tensors of the last forward."""
        self._of_forward = {}

    def now(self, root: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that the last forward used for parameters, by parameter name.

        Empty if the forward used the model's own, or its torch.func transform has ended.
        """
        if self._of_forward and all(self._of_forward[h.name] is h.find(root) for h in self.handles):
            self.remember(root)  # still there after the forward: replaced for good
            self._of_forward = {}
        return {} if over(self._life) else self._of_forward


def _owners(handle: Handle, root: nn.Module) -> Sequence[nn.Module]:
    """Return the modules that hold a parameter, or its parametrisation's original tensors."""
    owner: Any = handle.find_owner(root)
    if owner is None:
        return []
    if handle.attribute in owner._parameters:
        return [owner]
    return list(owner.parametrizations[handle.attribute].modules())
