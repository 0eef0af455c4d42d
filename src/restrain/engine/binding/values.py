"""The values of bound rules on parameters and on the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from restrain.engine.binding.binding import Bound
from restrain.engine.distributed import totals, whole
from restrain.engine.loss import parameters
from restrain.named_tensors import Handle
from restrain.penalties import NetworkPenalty, Scaled
from restrain.rules import What


def parameter_values(bounds: Sequence[Bound], root: nn.Module, frozen: bool = False) -> list[Tensor]:
    """Strength × value of rules on parameters, each summed over its tensors (averaged under `reduce="mean"`).

    Frozen tensors are left out unless asked for; a rule whose tensors all are has the value zero.
    """
    means = [bound.rule.reduce == "mean" for bound in bounds]
    tensors = [bound.tensors(root, frozen) for bound in bounds]
    terms = [
        parameters.values(own, mean, bound.compile) for bound, own, mean in zip(bounds, tensors, means, strict=True)
    ]
    counts = [len(own) if mean and own else 1 for own, mean in zip(tensors, means, strict=True)]
    return [value if count == 1 else value / count for value, count in zip(totals(terms), counts, strict=True)]


def at_steps(bound: Bound, root: nn.Module) -> list[tuple[Handle, What]]:
    """What a rule does to each parameter at a step; under `reduce="mean"` divided as its value is in the loss.

    The tensors are those that are trained when the rules are attached.
    """
    if bound.rule.reduce != "mean":
        return bound.parameters
    tensors = [(handle, handle.find(root), what) for handle, what in bound.parameters]
    trained = sum(p.requires_grad for _, p, _ in tensors)
    return [(handle, Scaled(1 / (max(p.numel(), 1) * max(trained, 1)), what)) for handle, p, what in tensors]


def network_value(bound: Bound, root: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
    """Strength × value of a penalty on the whole network, given named outputs."""
    what: NetworkPenalty = bound.what
    return what({handle.name: whole(p) for handle, p, _ in bound.standing(root, frozen=what.takes_frozen)}, outputs)
