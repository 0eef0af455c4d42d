"""Sharpness-aware gradients: a second call of a step's closure, at weights uphill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.core import restored
from restrain.engine.distributed import local, ranks_of, totals
from restrain.engine.ops import norm_of
from restrain.engine.step.worklist import Member
from restrain.errors import OptimizerError
from restrain.penalties.shrink import at_least_float32
from restrain.penalties.statistics import resting
from restrain.torch_private import NORMALIZATIONS
from restrain.transforms.sharpness import Ascended, Sharpness


def needs_closure(optimizer: Optimizer, what: Sharpness) -> OptimizerError:
    """Return the error of a step without a closure."""
    return OptimizerError(
        f"{what!r} takes the gradient twice, so {type(optimizer).__name__}.step needs a closure that zeroes gradients, "
        "runs the model and calls backward: optimizer.step(closure). A GradScaler takes none: train in bfloat16 or "
        "float32"
    )


Slopes: TypeAlias = "list[tuple[nn.Parameter, float]]"  # with the sign of the way to a worse loss


def sharp(members: Sequence[Member], step: int) -> dict[int, tuple[Sharpness, Slopes]]:
    """Return the parameters with a gradient of each rule that is due, by the id of the rule.

    The sign is that of the gradient, or the other one under an optimizer that maximises.
    """
    found: dict[int, tuple[Sharpness, Slopes]] = {}
    for work, p, group in members:
        for rule, what in work.sharp if p.grad is not None else ():
            if rule.due(step):
                found.setdefault(id(rule), (what, []))[1].append((p, -1.0 if group.get("maximize") else 1.0))
    return found


def gradient_uphill(
    rules: dict[int, tuple[Sharpness, Slopes]],
    optimizer: Optimizer,
    root: nn.Module,
    closure: Callable[[], Any],
) -> None:
    """Call the closure at w + e, so that gradients are those there, and put the weights back."""
    with restored([p for _, slopes in rules.values() for p, _ in slopes]):
        with torch.no_grad():
            for what, slopes in rules.values():
                _climb(what, slopes)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
        # counts and running means, of norms and of rules, move in the first run alone
        with restored(_running_statistics(root)), resting(), torch.enable_grad():
            closure()


def _climb(what: Sharpness, slopes: Slopes) -> None:
    """Add e = ± ρ T² g / ‖T g‖ to the parameters; nothing where the norm is zero or not finite."""
    scaled: list[tuple[Tensor, Any, Tensor]] = []
    for p, sign in slopes:
        assert p.grad is not None
        w, g = local(p.detach()), at_least_float32(local(p.grad))
        factor = what.metric(at_least_float32(w))
        scaled.append((w, factor, g * factor * sign))
    squares = [(norm_of(one).square(), ranks_of(p)) for (p, _), (_, _, one) in zip(slopes, scaled, strict=True)]
    norm = totals([squares])[0].sqrt()
    if not bool((norm > 0) & norm.isfinite()):
        return
    for w, factor, one in scaled:
        w.add_((one * factor * (what.rho / norm.to(one.device))).to(w.dtype))


_MOMENTA = ("momentum_buffer", "exp_avg")


def ascend(bound: Any) -> Callable[[Optimizer, nn.Module], None]:
    """Return the listener that moves the offsets of `MomentumSharpness` after a step."""

    @torch.no_grad()
    def after(optimizer: Optimizer, root: nn.Module) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found: list[tuple[Ascended, Tensor]] = []
        for _, p, what in bound.standing(root):
            state = optimizer.state.get(p, {}) if id(p) in held else {}
            own = [state[key] for key in _MOMENTA if isinstance(state.get(key), Tensor)]
            found += [(what, at_least_float32(v)) for v in own[:1]]
        if not found:
            return
        norm = norm_of(torch.stack([norm_of(v).to(found[0][1].device) for _, v in found]))
        if bool((norm > 0) & norm.isfinite()):
            for what, v in found:
                torch.mul(v, -what.sharpness.rho / norm.to(v.device), out=what.offset)

    return after


def _running_statistics(root: nn.Module) -> list[Tensor]:
    """Return the buffers of normalisations in training."""
    norms = [module for module in root.modules() if isinstance(module, NORMALIZATIONS) and module.training]
    return [t for module in norms for t in module.buffers(recurse=False)]
