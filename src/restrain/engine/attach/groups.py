"""Groups of a model's parameters under penalties: their lengths, zeros and entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restrain.axes import Grouping, group_norms
from restrain.engine.binding import Bound, at_steps
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


@dataclass(frozen=True)
class PenalisedTensor:
    """A trained tensor with the sum of its penalties; made by `Attachment.penalised`."""

    name: str
    handle: Handle
    root: nn.Module
    penalty: Penalty

    @property
    def tensor(self) -> Tensor:
        """The current parameter."""
        return self.handle.find(self.root)

    @property
    def selects(self) -> bool:
        """True if the penalty makes entries or groups zero, so that a mask says what is left."""
        return all(leaf.entrywise or leaf.groupwise or leaf.soft_after for _, leaf in self.penalty.leaves())

    def lengths(self) -> Tensor:
        """Return the length of each group, over the axes that tell groups apart, or of entries."""
        w = exact(self.tensor.detach())
        return lengths(w, groups_of(self.penalty, w))

    def entries(self, chosen: Tensor) -> Tensor:
        """Return the mask of the tensor's entries in the chosen groups.

        Args:
            chosen: a mask of groups, in the shape of `lengths()`.
        """
        w = self.tensor.detach()
        groups = groups_of(self.penalty, w)
        if groups is None:
            return chosen
        spread = groups.spread(chosen).expand(groups.shape)
        return groups.restore(spread.to(w.real.dtype), torch.zeros_like(w.real)) == 1


def penalised(bounds: Sequence[Bound], root: nn.Module) -> list[PenalisedTensor]:
    """Return the trained tensors under penalties, each with the sum of its penalties.

    Raises:
        HowError: a penalty of several tensors together.
    """
    found: dict[str, list[tuple[Handle, Penalty]]] = {}
    for bound in bounds:
        if bound.joint is not None and bound.is_penalty:
            raise HowError(
                f"{bound.key!r}: groups across tensors (rs.units) aren't known here, only groups of each tensor: write "
                "per= of a tensor, such as per='out'"
            )
        standing = {handle.name for handle, _, _ in bound.standing(root)} if bound.parameters else set()
        for handle, what in at_steps(bound, root) if standing else ():
            if isinstance(what, Penalty) and handle.name in standing:
                found.setdefault(handle.name, []).append((handle, what))
    return [
        PenalisedTensor(name, pairs[0][0], root, joined([penalty for _, penalty in pairs]))
        for name, pairs in found.items()
    ]
