"""Rules on several tensors together: units across tensors, and one budget for all tensors.

The entries of the units are gathered as rows of a matrix, with the rows of all members side by
side. The groups of one tensor's formulas are then the rows, so values, gradients, proxes in a
diagonal metric and projections are exact for units, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from restrain.axes import Grouping
from restrain.engine.ops.instructions import decayed
from restrain.errors import HowError
from restrain.named_tensors import Handle
from restrain.penalties.base import unchecked_prox
from restrain.penalties.shrink import at_least_float32
from restrain.penalties.unfold import from_matrix, to_matrix
from restrain.rules import Rule
from restrain.transforms.sparsity import Kept

Named: TypeAlias = Mapping[str, Tensor]
Steps: TypeAlias = Mapping[str, "float | Tensor"]


@dataclass(frozen=True, eq=False)
class Piece:
    """The entries of one tensor that belong to a block of units."""

    name: str
    groups: Grouping | None = None
    """The tensor's groups, numbered; None: the whole tensor, as it is."""
    index: Tensor | None = None
    """(units, groups a unit): the numbers of each unit's groups; None: each group is a unit."""

    def rows(self, w: Tensor) -> Tensor:
        """Return the entries as a matrix with a row for each unit."""
        if self.groups is None:
            return w
        matrix = to_matrix(w, self.groups)
        if self.index is None:
            return matrix
        index = self.index.to(w.device)
        return matrix[index.flatten()].reshape(len(index), index.shape[1] * matrix.shape[1])

    @property
    def units(self) -> int:
        """The number of units; a whole tensor is one."""
        if self.index is not None:
            return len(self.index)
        return 1 if self.groups is None else self.groups.count

    def width(self, w: Tensor) -> int:
        """Return the number of entries of the tensor in each unit."""
        if self.groups is None:
            return w.numel()
        each = w.numel() // max(self.groups.count, 1)
        return each if self.index is None else each * self.index.shape[1]

    def put(self, rows: Tensor, w: Tensor) -> Tensor:
        """Return the tensor with its entries replaced: the inverse of `rows`."""
        if self.groups is None:
            return rows
        if self.index is None:
            return from_matrix(rows, self.groups, tuple(w.shape))
        matrix, index = to_matrix(w, self.groups).clone(), self.index.to(w.device).flatten()
        matrix[index] = rows.reshape(len(index), matrix.shape[1]).to(matrix.dtype)
        return from_matrix(matrix, self.groups, tuple(w.shape))


@dataclass(frozen=True, eq=False)
class Block:
    """Units with equally many entries: a matrix with a row for each, and what acts on it."""

    pieces: tuple[Piece, ...]
    what: Any

    def gather(self, tensors: Named) -> Tensor:
        """Return the matrix of the units; a single whole tensor as it is."""
        found = [piece.rows(tensors[piece.name]) for piece in self.pieces]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def scatter(self, x: Tensor, tensors: dict[str, Tensor]) -> None:
        """Replace the tensors by tensors that hold the entries of the matrix."""
        if len(self.pieces) == 1:
            parts: Sequence[Tensor] = [x]
        else:
            parts = x.split([piece.width(tensors[piece.name]) for piece in self.pieces], 1)
        for piece, part in zip(self.pieces, parts, strict=True):
            old = tensors[piece.name]
            tensors[piece.name] = piece.put(part.to(old.dtype), old)

    def steps(self, steps: Steps, tensors: Named) -> float | Tensor:
        """Return the step of all entries: a number if all members have the same, else a matrix."""
        first = steps[self.pieces[0].name]
        if all(not isinstance(steps[piece.name], Tensor) and steps[piece.name] == first for piece in self.pieces):
            return first
        whole = {piece.name: _whole(steps[piece.name], tensors[piece.name]) for piece in self.pieces}
        return self.gather(whole)


def _whole(step: float | Tensor, w: Tensor) -> Tensor:
    """Return a step as a tensor of the shape of `w`, real, in float32 or wider."""
    like = at_least_float32(w).real
    number = step if isinstance(step, Tensor) else torch.full((), step, dtype=like.dtype, device=like.device)
    return number.to(like).expand(w.shape)


@dataclass(eq=False)
class Joint:
    """A rule that acts on several parameters together.

    Args:
        rule: the bound rule.
        handles: its parameters.
        blocks: its units; without units, a block for each tensor.
        budgets: the numbers of the blocks that share a budget, of constraints.
        told: the notes on its units for the table of rules.
    """

    rule: Rule
    handles: tuple[Handle, ...]
    blocks: tuple[Block, ...]
    budgets: tuple[tuple[int, ...], ...] = ()
    told: tuple[str, ...] = ()

    def of(self, trained: Collection[str]) -> Joint:
        """Return the rule on the blocks whose members are trained; others are left out.

        Raises:
            HowError: some members of a unit are trained, and some aren't.
        """
        left = [self._trained(block, trained) for block in self.blocks]
        if all(left):
            return self
        numbers = [number for number, whole in enumerate(left) if whole]
        budgets = [tuple([numbers.index(number) for number in own if left[number]]) for own in self.budgets]
        blocks, handles = [self.blocks[number] for number in numbers], self.handles
        return Joint(self.rule, handles, tuple(blocks), tuple([own for own in budgets if own]), self.told)

    def holds(self, name: str) -> bool:
        """Return True if a parameter is a member of a block."""
        return any(piece.name == name for block in self.blocks for piece in block.pieces)

    def _trained(self, block: Block, trained: Collection[str]) -> bool:
        """Return True if all members of a block are trained, False if none is."""
        missing = [piece.name for piece in block.pieces if piece.name not in trained]
        if missing and len(missing) < len(block.pieces):
            raise HowError(
                f"{self.rule.label}: {', '.join(map(repr, missing))} isn't trained (frozen, or in no given optimizer), "
                "while other members of its units are, so these units can't change as a whole: freeze or train all of "
                "them, or leave it out of the units"
            )
        return not missing

    def value(self, tensors: Named) -> Tensor:
        """Return the value, differentiable."""
        terms = [block.what(block.gather(tensors)) for block in self.blocks]
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def gradients(self, tensors: Named) -> dict[str, Tensor]:
        """Return the gradient of the value in each tensor."""
        found = {name: torch.zeros_like(w) for name, w in tensors.items()}
        for block in self.blocks:
            own = {piece.name: torch.zeros_like(tensors[piece.name]) for piece in block.pieces}
            block.scatter(block.what.gradient(block.gather(tensors)), own)
            for name, gradient in own.items():
                found[name] += gradient
        return found

    def decayed(self, tensors: Named, rates: Steps) -> dict[str, Tensor]:
        """Return w - rate · gradient for each tensor; see `decayed` of one tensor."""
        return self._changed(tensors, lambda block, x: decayed(x, block.what, block.steps(rates, tensors)))

    def shrunk(self, tensors: Named, steps: Steps) -> dict[str, Tensor]:
        """Return the prox of all tensors together, in the metric of their steps."""
        return self._changed(tensors, lambda block, x: unchecked_prox(block.what, x, block.steps(steps, tensors)))

    def _changed(self, tensors: Named, change: Callable[[Block, Tensor], Tensor]) -> dict[str, Tensor]:
        found = dict(tensors)
        for block in self.blocks:
            block.scatter(change(block, block.gather(tensors)), found)
        return found

    def projected(self, tensors: Named) -> dict[str, Tensor]:
        """Return the nearest tensors that together satisfy the constraint."""
        found = dict(tensors)
        for numbers in self.budgets:
            blocks = [self.blocks[number] for number in numbers]
            new = Kept.project_together([block.what for block in blocks], [block.gather(tensors) for block in blocks])
            for block, x in zip(blocks, new, strict=True):
                block.scatter(x, found)
        return found


def overlapping(blocks: Iterable[Block], tensors: Named) -> str | None:
    """Return the name of a tensor with an entry in two units; None if no entry is."""
    pieces: dict[str, list[Piece]] = {}
    for block in blocks:
        for piece in block.pieces:
            pieces.setdefault(piece.name, []).append(piece)
    for name, own in pieces.items():
        if len(own) > 1:
            none = torch.zeros(tensors[name].shape, dtype=torch.int16, device="cpu")
            count = none.clone()
            for piece in own:
                count += piece.put(torch.ones_like(piece.rows(none)), none)
            if int(count.max()) > 1:
                return name
    return None
