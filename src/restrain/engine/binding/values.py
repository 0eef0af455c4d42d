"""Values of bound rules on parameters and on the whole network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from restrain.engine.binding.binding import Bound
from restrain.engine.distributed import Term, totals, whole
from restrain.engine.loss import parameters
from restrain.named_tensors import Handle
from restrain.penalties import NetworkPenalty, Penalty, Scaled
from restrain.penalties.base import joined
from restrain.rules import What


def parameter_values(bounds: Sequence[Bound], root: nn.Module, frozen: bool = False) -> list[Tensor]:
    """Return strength × value of rules on parameters, summed over tensors (or their mean).

    Frozen tensors are left out unless `frozen`; a rule without other tensors has the value zero.
    """
    means = [bound.rule.reduce == "mean" for bound in bounds]
    tensors = [bound.tensors(root, frozen) for bound in bounds]
    terms = [
        parameters.values(own, mean, bound.compile) if bound.joint is None else joint_terms(bound, root, frozen)
        for bound, own, mean in zip(bounds, tensors, means, strict=True)
    ]
    counts = [len(own) if mean and own else 1 for own, mean in zip(tensors, means, strict=True)]
    return [value if count == 1 else value / count for value, count in zip(totals(terms), counts, strict=True)]


def joint_terms(bound: Bound, root: nn.Module, frozen: bool = False) -> list[Term]:
    """Return the value of a rule on several parameters together; none if all are frozen.

    Raises:
        HowError: some of them are frozen.
    """
    tensors = {handle.name: whole(p) for handle, p, _ in bound.standing(root, frozen)}
    if bound.joint is None or not tensors:
        return []
    joint = bound.joint.of(tensors)
    return [(joint.value(tensors), ())] if joint.blocks else []


class LossRules:
    """Penalties on parameters in the loss; penalties on the same tensor are computed as a sum.

    The joined penalties are cached while the same rules are due; parameters are looked up at each
    loss.
    """

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self.bounds = [bound for bound in bounds if isinstance(bound.rule.what, Penalty) and bound.parameters]
        self._joined: dict[str, Penalty] = {}  # by parameter name
        self._due: list[str] = []
        self._handles: list[Handle] = []

    def value(self, root: nn.Module, due: Collection[str]) -> Tensor | None:
        """Return the sum of the due rules, with its graph; None if none is due."""
        bounds = [bound for bound in self.bounds if bound.key in due]
        if not bounds:
            return None
        summed = [bound for bound in bounds if bound.rule.reduce != "mean" and bound.joint is None]
        joints = [term for bound in bounds if bound.joint is not None for term in joint_terms(bound, root)]
        terms = parameters.values(self._pairs(summed, root), compile=bounds[0].compile) if summed else []
        for bound in bounds:
            if bound.rule.reduce == "mean":
                own = bound.tensors(root)
                found = parameters.values(own, True, bound.compile)
                terms += [(value / len(own), ranks) for value, ranks in found]
        return totals([terms + joints])[0]

    def _pairs(self, bounds: Sequence[Bound], root: nn.Module) -> list[tuple[Tensor, Penalty]]:
        """Return the trained tensors, each with the sum of its penalties."""
        keys = [bound.key for bound in bounds]
        if keys != self._due:
            self._due = keys
            self._handles = list({h.name: h for bound in bounds for h, _ in bound.parameters}.values())
            of_each: dict[str, list[Penalty]] = {handle.name: [] for handle in self._handles}
            for bound in bounds:
                for handle, what in bound.parameters:
                    of_each[handle.name].append(what)
            made: dict[Any, Penalty] = {}  # tensors with identical penalties share their sum
            self._joined = {}
            for name, whats in of_each.items():
                key = tuple(map(id, whats))
                if key not in made:
                    made[key] = joined(whats)
                self._joined[name] = made[key]
        return [(p, self._joined[handle.name]) for handle, p in bounds[0].trained(self._handles, root)]


def at_steps(bound: Bound, root: nn.Module) -> list[tuple[Handle, What]]:
    """Return (handle, what) for each parameter of a rule at a step, scaled for `reduce="mean"`.

    The mean is over the tensors that are trained when the rules are attached.
    """
    if bound.rule.reduce != "mean":
        return bound.parameters
    tensors = [(handle, handle.find(root), what) for handle, what in bound.parameters]
    trained = sum(p.requires_grad for _, p, _ in tensors)
    return [(handle, Scaled(1 / (max(p.numel(), 1) * max(trained, 1)), what)) for handle, p, what in tensors]


def network_value(bound: Bound, root: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
    """Return strength × value of a penalty on the whole network, given named outputs."""
    what: NetworkPenalty = bound.what
    return what({handle.name: whole(p) for handle, p, _ in bound.standing(root, frozen=what.takes_frozen)}, outputs)
