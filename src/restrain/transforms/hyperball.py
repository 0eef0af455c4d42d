"""Hyperball: weights of constant norm, moved by updates of constant norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.axes import Grouping, checked, group_norms, grouping_at
from restrain.errors import TransformError
from restrain.named_tensors import Location
from restrain.penalties.shrink import at_least_float32
from restrain.rules import How
from restrain.transforms.base import Constraint, checked_number
from restrain.transforms.sets import MaybePer, MinMaxNorm


@dataclass(frozen=True)
class Hyperball(Constraint):
    """W ← R · N(W - lr · R · N(u)), N(x) = x / ‖x‖_F: norms of a weight and of its update are held.

    u is the optimizer's direction, without its length and weight decay, so that lr is the angle, in
    radians, by which a step turns a weight: it takes the place of weight decay, which sets that
    angle in the long run. For SGD, Adam and AdamW u is computed before the step by their formula,
    for RMSprop after it from its state; of other optimizers (Muon) it is the movement of a step,
    which needs weights in float32. Nothing happens in a step that is skipped, at lr = 0, or where
    u = 0. W is the weight before the step.

    Args:
        radius: R; by default the norm when the rule is attached, which `reg.state_dict()` keeps.
        per: the entries that have a norm of their own: None for the whole tensor, "expert" for the
            matrices of a stack, "out" for units, or what else `per=` takes (see `axes`).

    Raises:
        TransformError: a radius that isn't above zero; a weight of zeros without radius=.
        PenaltyError: a tensor without this axis.
        OptimizerError: an optimizer whose direction isn't known.

    Source: Wen and others (2026), Hyperball optimization, arXiv 2606.16899.

    >>> w = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(w.parameters(), lr=0.1)
    >>> reg = rs.attach(w, rs.Hyperball(1.0).on("weight"), optimizer)
    >>> w(torch.ones(1, 2)).sum().backward(); optimizer.step(); w.weight.norm().round(decimals=4)
    tensor(1., grad_fn=<RoundBackward1>)
    """

    radius: float | None = None
    per: MaybePer = None

    def __post_init__(self) -> None:
        if self.radius is not None:
            checked_number("radius", self.radius, "a finite number above zero", 0, float("inf"), closed=False)
        if self.per is not None:
            object.__setattr__(self, "per", checked(self.per))

    def project(self, w: Tensor) -> Tensor:
        """Return the tensor with norms scaled to the radius; unchanged without one.

        A group of zeros becomes equal entries.
        """
        if self.radius is None:
            return w.clone()
        return MinMaxNorm(self.radius, self.radius, per=self.per).project(w)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        Constraint.moments(self, at_places)
        return ("project",)

    def bound_to(self, at: Location) -> Constraint:
        groups = Grouping(tuple(at.tensor.shape), ()) if self.per is None else grouping_at(self.per, at)
        if groups.lists is not None and len(groups.lists.members) in groups.lists.ids:
            raise TransformError(f"{self!r}: per= leaves entries of {at.name!r} in no group; name all of them")
        lengths = group_norms(at_least_float32(at.tensor.detach()), groups)
        if self.radius is not None:
            return HeldNorm(self, groups, torch.full_like(lengths, self.radius))
        if bool((lengths == 0).any()):
            raise TransformError(f"{self!r}: {at.name!r} has a norm of zero: say which it should have by radius=")
        return HeldNorm(self, groups, lengths.clone())


@dataclass(frozen=True, eq=False, repr=False)
class HeldNorm(Constraint, register=False):
    """`Hyperball` of one parameter, with the radius of each group."""

    hyperball: Hyperball
    groups: Grouping
    radius: Tensor  # in the viewed shape, reduced dims of size one

    def __repr__(self) -> str:
        return repr(self.hyperball)

    def project(self, w: Tensor) -> Tensor:
        radius = self.hyperball.radius
        return w.clone() if radius is None else MinMaxNorm(radius, radius, per=self.groups).project(w)

    def state(self) -> dict[str, Tensor]:
        return {"radius": self.radius}
