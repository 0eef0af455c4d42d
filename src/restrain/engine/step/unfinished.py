"""Record of the changes that rules make before the optimizer's update, kept until the step ends.

Ctrl-C may interrupt a step between both. When the step is called again, three changes aren't made a
second time: a penalty's gradient that is still in `.grad`, a decay that is still in the weights,
and a joint update of parameters and their rules. A tensor that has been changed since, by a
backward or an update, has another version, and is part of a new step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import eq
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.distributed import local
from restrain.engine.step.folded import Fold
from restrain.torch_private import version


@dataclass
class Made:
    """Tensors that a rule has changed, with their versions after the change."""

    kind: str  # "gradient": of `.grad`; "decay": of the weights
    tensors: list[Tensor]
    versions: list[Any] = field(default_factory=list)

    def look(self) -> None:
        """Record the current versions."""
        self.versions = _versions(self.tensors)

    def standing(self) -> list[Tensor]:
        """Return the tensors that are unchanged since `look`."""
        now = _versions(self.tensors)
        return list(compress(self.tensors, map(eq, now, self.versions)))


def _versions(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the versions of tensors, of sharded ones those of the process's own parts."""
    parts = tensors if set(map(type, tensors)) <= {Tensor, nn.Parameter} else [local(tensor) for tensor in tensors]
    return [*map(version, parts)]


class Again:
    """A fold that an interrupted step has already run; `run` only returns the remaining groups."""

    def __init__(self, done: set[int], groups: list[dict[str, Any]], tensors: Sequence[Tensor]) -> None:
        self.done, self.groups, self._made = done, groups, Made("fold", list(tensors))
        self._made.look()

    @property
    def stands(self) -> bool:
        """True if the folded weights and their gradients are unchanged since."""
        return len(self._made.standing()) == len(self._made.tensors)

    def run(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Return the parameter groups that are left to torch's own step."""
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
        """Record a fold that has been run."""
        if isinstance(fold, Fold):
            parameters = [p for part in fold.parts for p in part.bundle.parameters]
            grads = [p.grad for p in parameters if p.grad is not None]
            self._fold = Again(set(fold.done), groups, [*parameters, *grads])

    def end(self) -> None:
        """Forget all changes: the step has ended."""
        self._made, self._fold = [], None
