"""The values of bound rules on parameters and on the whole network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from restrain.engine.bind import Bound


def parameter_value(bound: Bound, root: nn.Module, frozen: bool = False) -> Tensor:
    """Strength × value of a rule on parameters, summed over its tensors (averaged under `reduce="mean"`).

    Frozen tensors are left out unless asked for; a rule whose tensors all are has the value zero.
    """
    mean = bound.rule.reduce == "mean"
    terms = [what.mean(p) if mean else what(p) for p, what in bound.tensors(root, frozen)]
    if not terms:
        return torch.zeros(())
    value: Tensor = terms[0]
    for term in terms[1:]:
        value = value + term.to(value.device)
    return value / len(terms) if mean else value


def network_value(bound: Bound, root: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
    """Strength × value of a penalty on the whole network, given named outputs."""
    parameters = {handle.name: handle.find(root) for handle, _ in bound.parameters}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    return bound.what(trained, outputs)  # type: ignore[no-any-return]
