"""First values of a layer's parameters, where its specification states some.

    key           first values of each weight
    std, mean     normal numbers of this deviation and mean; one stated, the other is 1 or 0
    diagonal      this number on the diagonal, zeros elsewhere
    sparsity      this part of the entries is zero, chosen at random
    radius        scaled to this largest singular value; of a recurrent layer the square blocks of
                  weight_hh only

They mean the weights, unless the first letters of a parameter's name follow: std_bias,
radius_weight_hh. Without any of them the values are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from restrain.errors import PlanError
from restrain.fields import brief, is_number

KEYS = ("mean", "std", "sparsity", "radius", "diagonal")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "mean": (lambda v: True, "a finite number"),
    "std": (lambda v: v >= 0, "a number, zero or more"),
    "sparsity": (lambda v: 0 <= v < 1, "a part from 0 to below 1"),
    "radius": (lambda v: v > 0, "a number above zero"),
    "diagonal": (lambda v: True, "a finite number"),
}
_THEANETS = {"w": "weight", "b": "bias", "xh": "weight_ih", "hh": "weight_hh"}


def is_key(key: Any) -> bool:
    """Return True for a key of first values, such as std or std_bias."""
    return isinstance(key, str) and key.partition("_")[0] in KEYS


def check(layer: Mapping[str, Any]) -> None:
    """Check the first values that a layer states.

    Raises:
        PlanError: one of them can't be.
    """
    for key in filter(is_key, layer):
        kind, _, parameter = key.partition("_")
        fits, wanted = _RANGES[kind]
        if parameter in _THEANETS:
            raise PlanError(f"{key}= is theanets' word: write {kind}_{_THEANETS[parameter]}=")
        if not is_number(layer[key]) or not fits(layer[key]):
            raise PlanError(f"{key}= of a layer is {wanted}; got {brief(layer[key])}")


@torch.no_grad()
def set_values(module: nn.Module, layer: Mapping[str, Any]) -> None:
    """Set the parameters of a module as its layer states, by torch's global generator.

    Raises:
        PlanError: a key matches no parameter, or asks for the diagonal of something else.
    """
    keys = list(filter(is_key, layer))
    used: set[str] = set()
    for name, p in module.named_parameters() if keys else ():
        own = {key: key.partition("_") for key in keys}
        mine = {kind: key for key, (kind, _, of) in own.items() if not of and _is_weight(name, p, kind, module)}
        mine |= {kind: key for key, (kind, _, of) in own.items() if of and name.startswith(of)}
        used |= set(mine.values())
        if mine:
            p.copy_(_drawn(p, name, {kind: float(layer[key]) for kind, key in mine.items()}))
    if set(keys) - used:
        names = ", ".join(name for name, _ in module.named_parameters()) or "none"
        raise PlanError(f"{min(set(keys) - used)}= matches no parameter of the layer {layer['name']!r}; it has {names}")


def _is_weight(name: str, p: Tensor, kind: str, module: nn.Module) -> bool:
    recurrent = isinstance(module, nn.RNNBase)
    return (
        p.dim() > 1 and not name.startswith("learned.") and (kind != "radius" or not recurrent or "weight_hh" in name)
    )


def _drawn(p: Tensor, name: str, given: Mapping[str, float]) -> Tensor:
    if "diagonal" in given:
        if p.dim() != 2:
            raise PlanError(f"diagonal= is of matrices; {name} has {p.dim()} axes")
        found = given["diagonal"] * torch.eye(*p.shape, dtype=p.dtype, device=p.device)
    elif "mean" in given or "std" in given:
        found = given.get("mean", 0.0) + given.get("std", 1.0) * torch.randn_like(p)
    else:
        found = p.clone()
    if "sparsity" in given:
        gone = torch.randperm(p.numel(), device=p.device)[: round(given["sparsity"] * p.numel())]
        found.view(-1)[gone] = 0
    if "radius" in given:
        size = p.shape[1] if "weight_hh" in name else p.shape[0]
        for block in found.flatten(1).split(size):
            block.mul_(given["radius"] / torch.linalg.matrix_norm(block, 2).clamp_min(1e-12))
    return found
