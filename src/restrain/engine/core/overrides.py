"""Other tensors in the place of a model's parameters, where `torch.func.functional_call` has put them for a forward.

Penalties on parameters act on those that the last forward used.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from restrain.named_tensors import Handle, fully_sharded
from restrain.torch_private import life, over


class Overrides:
    """The tensors that `functional_call` puts in the place of parameters with penalties."""

    def __init__(self, handles: Iterable[Handle] = ()) -> None:
        self.handles = list(dict.fromkeys(handles))
        self._own: list[tuple[weakref.ref[nn.Module], str, weakref.ref[Tensor]]] = []
        self._of_forward: dict[str, Tensor] = {}
        self._life: Any = None

    def remember(self, root: nn.Module) -> None:
        """Take what stands in the model now for its own."""
        owners = {id(m): m for handle in self.handles for m in _owners(handle, root)}
        cells = [(m, key, p) for m in owners.values() for key, p in m._parameters.items() if p is not None]
        self._own = [(weakref.ref(m), key, weakref.ref(p)) for m, key, p in cells]

    def look(self, root: nn.Module) -> None:
        """A forward begins."""
        self._of_forward = {}
        if all((m := owner()) is not None and m._parameters.get(key) is own() for owner, key, own in self._own):
            return
        if not fully_sharded(root.modules()):  # which swaps parameters, too
            self._of_forward = {handle.name: handle.find(root) for handle in self.handles}
            self._life = life()

    def forget(self) -> None:
        """What a forward used is of no interest any more."""
        self._of_forward = {}

    def now(self, root: nn.Module) -> dict[str, Tensor]:
        """What the last forward used in the place of parameters, by their names.

        Empty where it used the model's own, and after the transform of torch.func that it ran in.
        """
        if self._of_forward and all(self._of_forward[h.name] is h.find(root) for h in self.handles):
            self.remember(root)  # they were replaced for good
            self._of_forward = {}
        return {} if over(self._life) else self._of_forward


def _owners(handle: Handle, root: nn.Module) -> Sequence[nn.Module]:
    """The modules that hold a parameter, or what it is computed from."""
    owner: Any = handle.find_owner(root)
    if owner is None:
        return []
    if handle.attribute in owner._parameters:
        return [owner]
    return list(owner.parametrizations[handle.attribute].modules())
