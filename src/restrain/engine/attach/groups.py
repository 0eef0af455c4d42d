"""Groups of a model's parameters under penalties: their lengths, zeros and entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restrain.axes import Grouping, group_norms
from restrain.engine.binding import Bound, at_steps
from restrain.engine.ops import Block, overlapping
from restrain.errors import HowError
from restrain.named_tensors import Handle
from restrain.penalties import Penalty
from restrain.penalties.base import joined
from restrain.penalties.group import GroupPenalty
from restrain.penalties.shrink import exact


def groups_of(penalty: Penalty, w: Tensor) -> Grouping | None:
    """Return the groups that a bound penalty of one tensor makes zero; None for single entries.

    A penalty that is neither entrywise nor by group (a nuclear norm) has one group, the tensor.
    """
    leaves = [leaf for _, leaf in penalty.leaves()]
    for leaf in leaves:
        if isinstance(leaf, GroupPenalty) and isinstance(leaf.per, Grouping):
            return leaf.per
    entrywise = any(leaf.entrywise or leaf.soft_after for leaf in leaves) or w.dim() == 0
    return None if entrywise else Grouping(tuple(w.shape), ())


def lengths(w: Tensor, groups: Grouping | None) -> Tensor:
    """Return the length of each group, over the axes that tell groups apart; |w| if None."""
    if groups is None:
        return w.abs()
    norms = group_norms(w, groups)
    if groups.lists is None:
        return norms.squeeze(groups.reduced)
    return groups.once(norms).reshape(-1)


class Penalised(ABC):
    """Entries of trained tensors with the sum of their penalties; see `Attachment.penalised`."""

    name: str
    root: nn.Module
    penalty: Penalty

    @property
    @abstractmethod
    def handles(self) -> tuple[Handle, ...]:
        """The addresses of the tensors."""

    @abstractmethod
    def gathered(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the entries of tensors by name as one tensor, of which `penalty` is a function."""

    @abstractmethod
    def put(self, x: Tensor) -> None:
        """Replace the entries of the parameters."""

    @abstractmethod
    def entries(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return the masks of the entries in the chosen groups, by tensor.

        Args:
            chosen: a mask of groups, in the shape of `lengths()`.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The current parameters by name."""
        return {handle.name: handle.find(self.root) for handle in self.handles}

    def now(self) -> Tensor:
        """Return the entries of the current parameters, in float64."""
        return self.gathered({name: exact(w.detach()) for name, w in self.tensors.items()})

    @property
    def selects(self) -> bool:
        """True if the penalty makes entries or groups zero, so that a mask says what is left."""
        return all(leaf.entrywise or leaf.groupwise or leaf.soft_after for _, leaf in self.penalty.leaves())

    def lengths(self) -> Tensor:
        """Return the length of each group, over the axes that tell groups apart, or of entries."""
        w = self.now()
        return lengths(w, groups_of(self.penalty, w))


@dataclass(frozen=True)
class PenalisedTensor(Penalised):
    """A trained tensor with the sum of its penalties."""

    name: str
    handle: Handle
    root: nn.Module
    penalty: Penalty

    @property
    def handles(self) -> tuple[Handle, ...]:
        return (self.handle,)

    def gathered(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[self.name]

    def put(self, x: Tensor) -> None:
        with torch.no_grad():
            self.handle.find(self.root).copy_(x)

    def entries(self, chosen: Tensor) -> dict[str, Tensor]:
        w = self.handle.find(self.root).detach()
        groups = groups_of(self.penalty, w)
        if groups is None:
            return {self.name: chosen}
        spread = groups.spread(chosen).expand(groups.shape)
        return {self.name: groups.restore(spread.to(w.real.dtype), torch.zeros_like(w.real)) == 1}


@dataclass(frozen=True)
class PenalisedUnits(Penalised):
    """Units across trained tensors, a row of a matrix each, with the sum of their penalties."""

    name: str
    block: Block
    own: tuple[Handle, ...]
    root: nn.Module
    penalty: Penalty

    @property
    def handles(self) -> tuple[Handle, ...]:
        return self.own

    def gathered(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.block.gather(tensors)

    def put(self, x: Tensor) -> None:
        with torch.no_grad():
            tensors = self.tensors
            new = {name: w.detach().clone() for name, w in tensors.items()}
            self.block.scatter(x, new)
            for name, w in tensors.items():
                w.copy_(new[name])

    def entries(self, chosen: Tensor) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(w.detach().real) for name, w in self.tensors.items()}
        width = self.block.gather(found).shape[1]
        self.block.scatter(chosen.to(torch.float32)[:, None].expand(-1, width), found)
        return {name: mask == 1 for name, mask in found.items()}


def penalised(bounds: Sequence[Bound], root: nn.Module) -> list[Penalised]:
    """Return the trained tensors and units under penalties, each with the sum of its penalties.

    Raises:
        HowError: units together with another penalty on the same tensors.
    """
    found: dict[str, list[tuple[Handle, Penalty]]] = {}
    units: list[PenalisedUnits] = []
    for bound in bounds:
        standing = {handle.name: handle for handle, _, _ in bound.standing(root)} if bound.parameters else {}
        if bound.joint is not None:
            units += _units(bound, standing, root) if bound.is_penalty and standing else []
            continue
        for handle, what in at_steps(bound, root) if standing else ():
            if isinstance(what, Penalty) and handle.name in standing:
                found.setdefault(handle.name, []).append((handle, what))
    held = [handle.name for one in units for handle in one.handles]
    for name in held:
        if name in found:
            raise HowError(
                f"{name!r} is under a penalty of units across tensors (rs.units) and under another one: write them as "
                "the sum of one rule, as in (rs.GroupLasso(per=units) + rs.L1()).on(), or take one of them only"
            )
    tensors = [
        PenalisedTensor(name, pairs[0][0], root, joined([penalty for _, penalty in pairs]))
        for name, pairs in found.items()
    ]
    return [*tensors, *units]


def _units(bound: Bound, standing: Mapping[str, Handle], root: nn.Module) -> list[PenalisedUnits]:
    """Return the units of a rule, by blocks of units of the same size.

    Raises:
        HowError: units share entries.
    """
    assert bound.joint is not None
    joint = bound.joint.of(standing)
    shared = overlapping(joint.blocks, {name: handle.find(root) for name, handle in standing.items()})
    if shared is not None:
        raise HowError(
            f"{bound.key!r}: entries of {shared!r} belong to several units, so units can't be made zero one by one: "
            "leave the weights that read the units out (readers=False with example=, or don't name them)"
        )
    found: list[PenalisedUnits] = []
    for block in joint.blocks:
        alike = sum(one.name.partition(" #")[0] == block.name for one in found)
        name = f"{block.name} #{alike + 1}" if alike else block.name
        handles = tuple(dict.fromkeys(standing[piece.name] for piece in block.pieces))
        found.append(PenalisedUnits(name, block, handles, root, block.what))
    return found
