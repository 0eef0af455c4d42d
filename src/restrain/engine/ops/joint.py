"""Rules on several tensors together: units across tensors, and one budget for all tensors.

The entries of the units are gathered as rows of a matrix, with the rows of all members side by
side. The groups of one tensor's formulas are then the rows, so values, gradients, proxes in a
diagonal metric and projections are exact for units, too. Where units are only shortened or set to
zero, their lengths are taken tensor by tensor, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from restrain.axes import Grouping
from restrain.engine.ops.groups import Lengths, ShrinkRows
from restrain.engine.ops.instructions import Change, Gradient, StepScalars, decayed, lower
from restrain.engine.ops.optimizers import Metric
from restrain.errors import HowError
from restrain.named_tensors import Handle
from restrain.penalties.base import unchecked_prox
from restrain.penalties.shrink import at_least_float32
from restrain.penalties.unfold import from_matrix, to_matrix
from restrain.rules import Rule
from restrain.transforms.sparsity import Kept, TopGroups

LONGEST = 4096  # entries whose squares are summed in sequence, without loss of precision
_PART = 1 << 18  # entries of rows that are gathered at once, with their second moments
_LEAST = 1e-11  # of lengths: parts whose squares underflow are far below it

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

    def view(self, w: Tensor) -> Tensor | None:
        """Return a view of the tensor in which each group is an index of some dims, or None."""
        plain = self.groups is not None and self.groups.lists is None and w.is_contiguous()
        return w.view(self.groups.shape) if self.groups is not None and plain else None

    def lengths(self, view: Tensor) -> Tensor | None:
        """Return the length of each unit's part; None if rounding could add up."""
        assert self.groups is not None
        size, dims = view, self.groups.reduced
        if any(view.shape[dim] > LONGEST for dim in dims):
            return None
        at_once = prod([view.shape[dim] for dim in dims]) <= LONGEST
        for some in [dims] * bool(dims) if at_once else [(dim,) for dim in reversed(dims)]:
            size = torch.linalg.vector_norm(size, dim=some, keepdim=True)
        size = size.abs().reshape(-1)
        return size if self.index is None else torch.linalg.vector_norm(size[self.index.to(size.device)], dim=1)

    def factors(self, view: Tensor, factor: Tensor, other: float) -> Tensor:
        """Return a factor for each group, in the shape that broadcasts to the view.

        Args:
            view: the tensor by `view`.
            factor: the factor of each unit.
            other: that of groups in no unit.
        """
        assert self.groups is not None
        kept = [size if dim in self.groups.keep else 1 for dim, size in enumerate(view.shape)]
        if self.index is None:
            return factor.reshape(kept)
        found = factor.new_full((self.groups.count,), other)
        index = self.index.to(factor.device)
        found[index.flatten()] = factor.repeat_interleave(index.shape[1])
        return found.reshape(kept)

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
    numbers: tuple[int, ...] = ()
    """The number of each unit in its set of units; empty for whole tensors."""

    @property
    def name(self) -> str:
        """The names of the tensors, joined."""
        return " + ".join(piece.name for piece in self.pieces)

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

    def parts(self, own: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows of some units, the same rows of other tensors), which fit the cache.

        What is done with the first is written to the tensors before the next is given.

        Args:
            own: the tensors of the pieces.
            others: as many others of the same shapes.
        """
        matrices, second = ([p.rows(w) for p, w in zip(self.pieces, ws, strict=True)] for ws in (own, others))
        widths = [matrix.shape[1] for matrix in matrices]
        count = max(_PART // sum(widths), 1)
        for start in range(0, self.pieces[0].units, count):
            rows, more = (torch.cat([matrix[start : start + count] for matrix in ms], 1) for ms in (matrices, second))
            yield rows, more
            for matrix, part in zip(matrices, rows.split(widths, 1), strict=True):
                matrix[start : start + count] = part
        for piece, matrix, w in zip(self.pieces, matrices, own, strict=True):
            if matrix.untyped_storage().data_ptr() != w.untyped_storage().data_ptr():  # a copy, not a view
                w.copy_(piece.put(matrix, w))

    def views(self, tensors: Named) -> list[Tensor] | None:
        """Return views of tensors in which units can be changed in place; None without these."""
        own = [tensors[piece.name] for piece in self.pieces]
        plain = all(type(w) in (Tensor, Parameter) and w.dtype in (torch.float32, torch.float64) for w in own)
        if not plain or len({w.dtype for w in own}) > 1 or len({w.device for w in own}) > 1:
            return None
        views = [piece.view(w) for piece, w in zip(self.pieces, own, strict=True)]
        return None if any(view is None for view in views) else views  # type: ignore[return-value]

    def lengths(self, views: Sequence[Tensor]) -> Tensor | None:
        """Return the length of each unit; None if it isn't exact enough."""
        parts = [piece.lengths(view) for piece, view in zip(self.pieces, views, strict=True)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found), dim=0)

    def scale_(self, views: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply each unit by a factor, in place; -0.0 becomes +0.0."""
        for piece, view in zip(self.pieces, views, strict=True):
            torch.addcmul(view.new_zeros(()), view, piece.factors(view, factor, 1.0), out=view)

    def like(self, views: Sequence[Tensor]) -> Tensor:
        """Return a tensor without entries, in the shape of the matrix of the units."""
        width = sum(piece.width(view) for piece, view in zip(self.pieces, views, strict=True))
        return views[0].new_empty((self.pieces[0].units, width), device="meta")

    def cut(self, kind: Any, scalars: StepScalars, views: Sequence[Tensor]) -> float | None:
        """Return the number by which a change shortens each unit; None for other changes."""
        lowered = lower([Change(kind, self.what)], scalars, self.like(views))
        if lowered is None or len(lowered) != 1 or not isinstance(lowered[0][0], ShrinkRows):
            return None
        number = float(lowered[0][1][0])
        return number if _LEAST < number < float("inf") else None

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

    def shorten(self, tensors: Named, steps: Steps, kind: str) -> bool:
        """Change units in place, without gathering them, if a change shortens them by a number.

        Args:
            tensors: the parameters.
            steps: the step of each, or the rate of a decay.
            kind: "prox" or "decay".

        Returns:
            False if the change is another one; then nothing is changed.
        """
        made = []
        for block in self.blocks:
            own = {steps[piece.name] if not isinstance(steps[piece.name], Tensor) else None for piece in block.pieces}
            step = own.pop()
            views = block.views(tensors) if not own and step is not None else None
            if views is None or step is None:
                return False
            scalars = StepScalars(step) if kind == "decay" else StepScalars(metric=Metric(step))
            cut, lengths = block.cut(kind, scalars, views), block.lengths(views)
            if cut is None or lengths is None or bool(lengths.isinf().any()):
                return False
            scale = (1 - torch.full((), cut, dtype=lengths.dtype, device=lengths.device) / lengths).clamp_min_(0)
            made.append((block, views, torch.where(scale.isnan(), 1, scale)))
        for block, views, scale in made:
            block.scale_(views, scale)
        return True

    def add_slopes(self, tensors: Named, gradients: Named, scale: Tensor | None) -> bool:
        """Add the gradient of a sum of units' lengths to gradients, in place; see `shorten`.

        Args:
            tensors: the parameters.
            gradients: their gradients by name.
            scale: the scale of the gradients, or None.
        """
        made = []
        for block in self.blocks:
            views, into = block.views(tensors), block.views(gradients)
            if views is None or into is None or views[0].dtype != into[0].dtype:
                return False
            lowered = lower([Change("gradient", block.what)], StepScalars(scale=scale), block.like(views))
            if lowered is None or len(lowered) != 1 or lowered[0][0] != Gradient(False, False, (Lengths(),)):
                return False
            lengths = block.lengths(views)
            if lengths is None or not bool((lengths.isfinite() & ((lengths == 0) | (lengths > _LEAST))).all()):
                return False
            made.append((block, views, into, float(lowered[0][1][0]) / torch.where(lengths == 0, 1, lengths)))
        for block, views, into, factor in made:
            for piece, view, gradient in zip(block.pieces, views, into, strict=True):
                gradient.addcmul_(view, piece.factors(view, factor, 0.0))
        return True

    def keep(self, tensors: Named) -> bool:
        """Set the units to zero that a budget doesn't keep, in place; see `shorten`."""
        made = []
        for numbers in self.budgets:
            blocks = [self.blocks[number] for number in numbers]
            found = [(views, block.lengths(views)) for block in blocks if (views := block.views(tensors)) is not None]
            sizes = [size for _, size in found if size is not None]
            if len(sizes) < len(blocks) or not all(isinstance(block.what, TopGroups) for block in blocks):
                return False
            dtype = torch.promote_types(sizes[0].dtype, torch.float32)
            every = torch.cat([size.to(sizes[0].device, dtype) for size in sizes])
            if not (bool(every.isfinite().all()) and float(every.max()) > _LEAST):
                return False
            masks = blocks[0].what.kept(every).split([len(size) for size in sizes])
            made += [(block, views, mask) for block, (views, _), mask in zip(blocks, found, masks, strict=True)]
        for block, views, mask in made:
            if not bool(mask.all()):
                block.scale_(views, mask.to(views[0]))
        return True

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
