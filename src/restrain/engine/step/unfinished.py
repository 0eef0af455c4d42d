"""Changes by rules before the optimizer's own update, recorded until the step ends.

Ctrl-C may come between the two. When the step is called again, a penalty's gradient that is still
in `.grad`, a decay that the weights still have, and parameters updated together with their rules
aren't changed a second time. A tensor that has been changed since, by a backward or an update, has
another version, and is part of a new step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from restrain.engine.distributed import local
from restrain.engine.step.folded import Fold
from restrain.torch_private import version


@dataclass
class Made:
    """Tensors after a change of a kind, with their versions."""

    kind: str  # "gradient": of `.grad`; "decay": of the weights
    tensors: list[Tensor]
    versions: list[Any] = field(default_factory=list)

    def look(self) -> None:
        """Record the current versions."""
        self.versions = [version(local(tensor)) for tensor in self.tensors]

    def standing(self) -> list[Tensor]:
        """Return the tensors that are unchanged since."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [tensor for tensor, then in pairs if version(local(tensor)) == then]


class Again:
    """A fold of an interrupted step, already done: `run` only returns the groups left to torch."""

    def __init__(self, done: set[int], groups: list[dict[str, Any]], tensors: Sequence[Tensor]) -> None:
        self.done, self.groups, self._made = done, groups, Made("fold", list(tensors))
        self._made.look()

    @property
    def stands(self) -> bool:
        """True if the folded weights and their gradients are unchanged since."""
        return len(self._made.standing()) == len(self._made.tensors)

    def run(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Return the groups with the parameters that are left to torch."""
        return self.groups


class Unfinished:
    """Changes of an optimizer's current step before the update; empty between steps."""

    def __init__(self) -> None:
        self._made: list[Made] = []
        self._fold: Again | None = None

    def standing(self) -> set[tuple[str, int]]:
        """Return (kind, tensor id) of the changes by an interrupted step that are still valid."""
        return {(made.kind, id(tensor)) for made in self._made for tensor in made.standing()}

    def note(self, made: Sequence[Made], kinds: Sequence[str]) -> None:
        """Record a step's changes of these kinds, replacing earlier ones."""
        self._made = [*[one for one in self._made if one.kind not in kinds], *made]

    @property
    def fold(self) -> Again | None:
        """The fold of an interrupted step, if it is still valid; else None."""
        return self._fold if self._fold is not None and self._fold.stands else None

    def note_fold(self, fold: Fold | Again, groups: list[dict[str, Any]]) -> None:
        """Record a fold that was done."""
        if isinstance(fold, Fold):
            parameters = [p for part in fold.parts for p in part.bundle.parameters]
            grads = [p.grad for p in parameters if p.grad is not None]
            self._fold = Again(set(fold.done), groups, [*parameters, *grads])

    def end(self) -> None:
        """Forget all changes: the step has ended."""
        self._made, self._fold = [], None
