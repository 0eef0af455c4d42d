"""Changes that rules make before the optimizer's own update, remembered until the step ends.

Ctrl-C may come between the two. When the step is called again, a penalty's gradient that is still in
`.grad`, a decay that the weights still have, and parameters that were updated with their rules in one
pass aren't done a second time. A tensor that somebody has changed since, by a backward or an update,
has another version, and begins a new step.
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
    """Tensors that a change of a kind was made to, with their versions afterwards."""

    kind: str  # "gradient": of `.grad`; "decay": of the weights
    tensors: list[Tensor]
    versions: list[Any] = field(default_factory=list)

    def look(self) -> None:
        """Remember the versions as they are now."""
        self.versions = [version(local(tensor)) for tensor in self.tensors]

    def standing(self) -> list[Tensor]:
        """Return the tensors that nobody has changed since."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [tensor for tensor, then in pairs if version(local(tensor)) == then]


class Again:
    """A fold that was done in a step that was interrupted: `run` only returns what was left to torch."""

    def __init__(self, done: set[int], groups: list[dict[str, Any]], tensors: Sequence[Tensor]) -> None:
        self.done, self.groups, self._made = done, groups, Made("fold", list(tensors))
        self._made.look()

    @property
    def stands(self) -> bool:
        """True if neither the folded weights nor their gradients were changed since."""
        return len(self._made.standing()) == len(self._made.tensors)

    def run(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Return the groups with the parameters that are left to torch."""
        return self.groups


class Unfinished:
    """What the current step of an optimizer has done before the update; empty between steps."""

    def __init__(self) -> None:
        self._made: list[Made] = []
        self._fold: Again | None = None

    def standing(self) -> set[tuple[str, int]]:
        """Return (kind, id of the tensor) of the changes by an interrupted step that still stand."""
        return {(made.kind, id(tensor)) for made in self._made for tensor in made.standing()}

    def note(self, made: Sequence[Made], kinds: Sequence[str]) -> None:
        """Remember the changes of these kinds that a step has made, in place of earlier ones."""
        self._made = [*[one for one in self._made if one.kind not in kinds], *made]

    @property
    def fold(self) -> Again | None:
        """The fold of an interrupted step, if it still stands."""
        return self._fold if self._fold is not None and self._fold.stands else None

    def note_fold(self, fold: Fold | Again, groups: list[dict[str, Any]]) -> None:
        """Remember a fold that was done."""
        if isinstance(fold, Fold):
            parameters = [p for part in fold.parts for p in part.bundle.parameters]
            grads = [p.grad for p in parameters if p.grad is not None]
            self._fold = Again(set(fold.done), groups, [*parameters, *grads])

    def end(self) -> None:
        """Forget all: the step has ended."""
        self._made, self._fold = [], None
