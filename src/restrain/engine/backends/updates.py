"""One step of torch's SGD, Adam and AdamW for one entry, as statements of C, with what rules do before and after it."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from restrain.engine.backends.statements import body
from restrain.engine.ops import Lowered

Group: TypeAlias = "dict[str, Any]"
Number: TypeAlias = Callable[[float], str]  # gives a number its name in C


def plain(group: Group) -> bool:
    """Whether a group's settings are numbers, and none of those that change how torch does a step."""
    numbers = [group[name] for name in ("momentum", "dampening", "weight_decay", "eps") if name in group]
    rate = group["lr"]
    if isinstance(rate, Tensor):
        if type(rate) is not Tensor or rate.numel() != 1 or not rate.is_cpu or rate.requires_grad:
            return False
        rate = rate.item()
    numbers += [rate, *group.get("betas", ())]
    known = all(isinstance(number, int | float) and isfinite(number) for number in numbers)
    return known and rate != 0 and not (group.get("capturable") or group.get("differentiable"))


def counted(group: Group) -> bool:
    """Whether the optimizer counts its steps."""
    return "betas" in group


def moments(group: Group) -> list[str]:
    """What the state holds of each entry; where there is a second moment that steps are divided by, it is the last."""
    if "betas" in group:
        return ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
    return ["momentum_buffer"] * (group["momentum"] != 0)


def update(
    kind: type[Optimizer], early: Lowered, late: Lowered, group: Group, count: float
) -> tuple[str, list[float]] | None:
    """Statements on the weight w, the gradient o0 and the moments o1, ..., and their numbers; None if there are none.

    Args:
        kind: of optimizer.
        early: what rules do before the step.
        late: what they do after it.
        group: the optimizer's settings.
        count: of the steps, with this one.
    """
    before, after = body(early), body(late)
    if before is None or after is None:
        return None
    numbers = list(before[1])

    def number(value: float) -> str:
        numbers.append(float(value))
        return f"n{len(numbers) - 1}"

    lines = [before[0], *FORMULAS[kind](group, count, number)]
    # what comes after calls its numbers n0, ..., too, and the second moment o0
    own = [f"n{place} = n{len(numbers) + place}" for place in range(len(after[1]))]
    own += [f"o0 = o{len(moments(group))}"] * counted(group)
    lines += ["{", *[f"const wide {name};" for name in own], after[0], "}"]
    numbers += after[1]
    return ("\n".join(lines), numbers) if all(map(isfinite, numbers)) else None


def _gradient(group: Group, number: Number, decay: float) -> list[str]:
    return ["o0 = -o0;"] * bool(group["maximize"]) + ([f"o0 += {number(decay)} * w;"] if decay else [])


def _sgd(group: Group, count: float, number: Number) -> list[str]:
    lines = _gradient(group, number, group["weight_decay"])
    if group["momentum"] != 0:
        momentum = number(group["momentum"])
        lines.append(f"o1 = {momentum} * o1 + {number(1 - group['dampening'])} * o0;")
        lines.append(f"o0 += {momentum} * o1;" if group["nesterov"] else "o0 = o1;")
    return [*lines, f"w -= {number(group['lr'])} * o0;"]


def _adam(group: Group, count: float, number: Number) -> list[str]:
    rate, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
    decoupled = group["decoupled_weight_decay"]
    lines = _gradient(group, number, 0 if decoupled else decay)
    if decoupled and decay:
        lines.append(f"w *= {number(1 - rate * decay)};")
    # as lerp does it, which is exact at both ends
    average = f"o1 += {number(1 - beta1)} * (o0 - o1);" if beta1 > 0.5 else f"o1 = o0 - {number(beta1)} * (o0 - o1);"
    lines += [average, f"o2 = {number(beta2)} * o2 + {number(1 - beta2)} * o0 * o0;"]
    second = "o2"
    if group["amsgrad"]:
        lines.append("o3 = o2 > o3 || o2 != o2 ? o2 : o3;")
        second = "o3"
    root, length = number(1 / (1 - beta2**count) ** 0.5), number(rate / (1 - beta1**count))
    return [*lines, f"w -= {length} * o1 / (SQRT({second}) * {root} + {number(group['eps'])});"]


# The formulas of torch.optim
FORMULAS: dict[type[Optimizer], Callable[[Group, float, Number], list[str]]] = {SGD: _sgd, Adam: _adam, AdamW: _adam}
