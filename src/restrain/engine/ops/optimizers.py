"""One table of optimizers: the metric, update and state of each, for prox steps and folding.

The metric is how far a step moves an entry for a constant gradient of one. A proximal rule must
use that length as the step of its prox; with any other, the point where the optimizer and the prox
balance isn't the minimiser of loss + penalty. Plain SGD moves by the learning rate; momentum
multiplies that in the long run; the adaptive optimizers divide each entry by the root of a second
moment. Of an optimizer that isn't in the table, the length is measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from restrain.penalties.shrink import at_least_float32

ENDLESS = 1e18  # a step this long is as good as infinite, and its products with strengths stay finite in float32
Group: TypeAlias = "dict[str, Any]"
MEMORY = 0.98  # of the averages by which an unknown metric is measured


@dataclass(slots=True)  # not frozen, as making one for each tensor and step would take four times as long
class Metric:
    """The step of each entry: scale / size(*moments, *numbers); without moments the scale."""

    scale: float | Tensor
    moments: tuple[Tensor, ...] = ()
    size: Callable[..., Tensor] = torch.sqrt  # gives a new tensor; one of this module, so that it can be compiled
    numbers: tuple[float | Tensor, ...] = ()

    def like(self, other: Metric) -> bool:
        """Return True if its numbers are the same objects, as for most tensors of a group."""
        return self.numbers is other.numbers and self.scale is other.scale and self.size is other.size

    @property
    def key(self) -> Any:
        """Equal for metrics with equal numbers; those on another device aren't read."""
        found = [self.size, self.scale, *self.numbers]
        for at, number in enumerate(found):
            if isinstance(number, Tensor):
                if number.device.type != "cpu":
                    return id(self)
                found[at] = float(number)
        return tuple(found)

    def steps(self, *moments: Tensor) -> float | Tensor:
        """The steps of the entries whose moments are given."""
        if not moments:
            return self.scale
        size = self.size(*map(at_least_float32, moments), *self.numbers)
        return size.reciprocal_().mul_(self.scale).clamp_max_(ENDLESS)


@dataclass(slots=True)
class Taken:
    """A step that was taken for one parameter."""

    group: dict[str, Any]
    state: dict[str, Any]
    w: Tensor
    kept: dict[str, Any] = field(default_factory=dict)  # ours, from step to step
    before: tuple[Tensor, Tensor] | None = None  # weights and gradient before it, for metrics that need them
    same: dict[Any, tuple[float | Tensor, ...]] = field(default_factory=dict)  # numbers by count, for all of the group

    @property
    def gradient(self) -> Tensor:
        """The gradient as it is now."""
        assert self.w.grad is not None
        return self.w.grad


def _gain(taken: Taken, dampening: float = 0.0, nesterov: bool = False) -> float:
    """Return what momentum makes of a constant gradient of one.

    It is 1 / (1 - momentum), with a lag where momentum changes.
    """
    momentum = float(taken.group["momentum"])
    if not momentum:
        return 1.0
    last = float(taken.kept.get("gain", (1 - dampening) / (1 - momentum)))
    gain = taken.kept["gain"] = momentum * last + 1 - dampening
    return 1 + momentum * gain if nesterov else gain


def _count(step: float | Tensor) -> float | Tensor:
    if isinstance(step, Tensor):
        return step.item() if step.is_cpu else step  # much faster than float(step)
    return float(step)


def rooted(second: Tensor, root: float | Tensor, eps: float) -> Tensor:
    """√second / root + eps."""
    return second.sqrt().div_(root).add_(eps)


def _sgd(taken: Taken) -> Metric:
    group = taken.group
    return Metric(group["lr"] * _gain(taken, float(group["dampening"]), group["nesterov"]))


def _asgd(taken: Taken) -> Metric:
    # the state holds the rate of the next step; the first one's is lr
    now = taken.kept.get("eta", taken.group["lr"] if float(taken.state["step"]) == 1 else float(taken.state["eta"]))
    taken.kept["eta"] = float(taken.state["eta"])
    return Metric(now)


def _adam(taken: Taken) -> Metric:
    group, state = taken.group, taken.state
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    count = _count(state["step"])
    if (numbers := taken.same.get(count)) is None:
        numbers = taken.same[count] = ((1 - group["betas"][1] ** count) ** 0.5, group["eps"])
    return Metric(group["lr"], (second,), rooted, numbers)


def _nadam(taken: Taken) -> Metric:
    # it moves along (1 - mu) / (1 - P) · gradient + mu' / (1 - P mu') · its average, with P the
    # product of all mu so far
    group, state = taken.group, taken.state
    count, (beta1, beta2), product = _count(state["step"]), group["betas"], _count(state["mu_product"])
    now, coming = (beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (count, count + 1))
    gain = (1 - now) / (1 - product) + coming * (1 - beta1**count) / (1 - product * coming)
    return Metric(group["lr"] * gain, (state["exp_avg_sq"],), rooted, ((1 - beta2**count) ** 0.5, group["eps"]))


def _radam(taken: Taken) -> Metric:
    # Liu and others (2020), algorithm 2: SGD until the variance is tractable, then Adam times the
    # rectification
    group, state = taken.group, taken.state
    count, beta2 = _count(state["step"]), group["betas"][1]
    most, bias = 2 / (1 - beta2) - 1, 1 - beta2**count
    length = most - 2 * count * (1 - bias) / bias
    if most <= 5 or (not isinstance(length, Tensor) and length <= 5):
        return Metric(group["lr"])
    known = length.clamp_min(5) if isinstance(length, Tensor) else length
    rectified = ((known - 4) * (known - 2) * most / ((most - 4) * (most - 2) * known) * bias) ** 0.5
    return Metric(group["lr"], (state["exp_avg_sq"],), _rectified, (length, rectified, group["eps"]))


def _rectified(second: Tensor, length: float | Tensor, rectified: float | Tensor, eps: float) -> Tensor:
    adapted = second.sqrt().add_(eps).div_(rectified)
    return torch.where(length > 5, adapted, 1.0) if isinstance(length, Tensor) else adapted


def _adamax(taken: Taken) -> Metric:
    # the bias correction of the average is what a constant gradient lacks; the peak includes eps
    return Metric(taken.group["lr"], (taken.state["exp_inf"],), torch.clone)


def _rmsprop(taken: Taken) -> Metric:
    group, state = taken.group, taken.state
    scale, eps = group["lr"] * _gain(taken), group["eps"]
    if not group["centered"]:
        return Metric(scale, (state["square_avg"],), rooted, (1.0, eps))
    return Metric(scale, (state["square_avg"], state["grad_avg"]), _centered, (eps,))


def _centered(second: Tensor, first: Tensor, eps: float) -> Tensor:
    return second.addcmul(first, first, value=-1).clamp_min_(0).sqrt_().add_(eps)


def _adagrad(taken: Taken) -> Metric:
    group, state = taken.group, taken.state
    rate = group["lr"] / (1 + (_count(state["step"]) - 1) * group["lr_decay"])
    return Metric(rate, (state["sum"],), rooted, (1.0, group["eps"]))


def _adadelta(taken: Taken) -> Metric:
    # the step used the average of squared movements from before it, which this finds again: with
    # r = g² / (second + eps) that average became rho · before + (1 - rho) (before + eps) r. With
    # weight decay g isn't known any more
    group, state = taken.group, taken.state
    if group["weight_decay"] != 0:
        return Metric(group["lr"], (state["square_avg"], state["acc_delta"]), _moved_least, (group["eps"],))
    moments = (state["square_avg"], state["acc_delta"], taken.gradient)
    return Metric(group["lr"], moments, _moved_before, (group["eps"], group["rho"]))


def _moved_least(second: Tensor, movement: Tensor, eps: float) -> Tensor:
    return (second + eps).div_(movement + eps).sqrt_()


def _moved_before(second: Tensor, movement: Tensor, grad: Tensor, eps: float, rho: float) -> Tensor:
    ratio = grad.square().div_(second + eps).mul_(1 - rho)
    return _moved_least(second, (movement - eps * ratio).div_(ratio + rho).clamp_min_(0), eps)


def _adafactor(taken: Taken) -> Metric:
    # Shazeer and Stern (2018), algorithms 4 and 5, as in torch: relative steps, clipped updates
    assert taken.before is not None
    group, state, (w, gradient) = taken.group, taken.state, map(at_least_float32, taken.before)
    least, floor = group["eps"]
    least = torch.finfo(taken.w.dtype).eps if least is None else least
    if w.dim() > 1:
        row = at_least_float32(state["row_var"])
        second = row @ at_least_float32(state["col_var"]) / row.mean(-2, keepdim=True).clamp_min(least)
    else:
        second = at_least_float32(state["variance"])
    root = second.clamp_min(least**2).sqrt()
    rate = min(float(group["lr"]), float(state["step"]) ** -0.5)
    clipped = ((gradient / root).square().mean().sqrt() / group["d"]).clamp_min(1)
    return Metric(w.square().mean().sqrt().clamp_min(floor) * rate / clipped, (root,), torch.clone)


def _measured(taken: Taken) -> Metric:
    """Movement / gradient: of each entry, the root mean squares of their running averages.

    The average of the gradient goes through the same filter as that of the movement, so that the
    quotient is the length itself where that and the gradient are steady, and little less under
    noise, if the optimizer's own memory is short beside this one's. When the learning rate changes,
    so do the movements of earlier steps: they would lag behind it.
    """
    assert taken.before is not None
    kept, (w, gradient), rate = taken.kept, map(at_least_float32, taken.before), float(taken.group.get("lr") or 1.0)
    change = rate / kept.get("rate", rate)
    if change != 1 and "movement" in kept:
        kept["movement"].mul_(change)
        kept["movement_square"].mul_(change**2)
    kept["rate"] = rate
    for name, now in (("movement", taken.w.detach() - w), ("gradient", gradient)):
        mean = kept.setdefault(name, torch.zeros_like(now))
        square = kept.setdefault(f"{name}_square", torch.zeros_like(now))
        mean.lerp_(now, 1 - MEMORY)
        square.lerp_(mean.square(), 1 - MEMORY)
    return Metric(1.0, (kept["movement_square"], kept["gradient_square"]), _quotient)


def _quotient(movement: Tensor, gradient: Tensor) -> Tensor:
    still = (movement == 0) | (gradient == 0)
    return torch.where(still, torch.inf, gradient / torch.where(still, 1, movement)).sqrt_()


# Updates: one step of one entry, in arithmetic for tensors and for expressions of C, see
# `backends/c_updates.py`


def plain(group: Group) -> bool:
    """Return True if a group's settings are numbers and none changes how torch does a step."""
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
    """Return True if the optimizer counts its steps."""
    return "betas" in group


def state_names(group: Group) -> list[str]:
    """Return the names of what SGD, Adam or AdamW keeps of each entry; a second moment is last."""
    if counted(group):
        return ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
    return ["momentum_buffer"] * (group["momentum"] != 0)


def _coupled(group: Group, decay: float, w: Any, g: Any) -> Any:
    """The gradient that the optimizer takes: to be minimised, with coupled weight decay."""
    g = -g if group["maximize"] else g
    return g + decay * w if decay else g


def _sgd_scalars(group: Group, count: float) -> tuple[float, ...]:
    return (float(group["lr"]),)


def _sgd_update(group: Group, scalars: Sequence[Any], w: Any, g: Any, state: Sequence[Any]) -> tuple[Any, list[Any]]:
    """b = μ b + (1 - dampening) g;  w -= lr (g + μ b if nesterov else b)."""
    g, kept = _coupled(group, group["weight_decay"], w, g), []
    if group["momentum"] != 0:
        kept = [group["momentum"] * state[0] + (1 - group["dampening"]) * g]
        g = g + group["momentum"] * kept[0] if group["nesterov"] else kept[0]
    return w - scalars[0] * g, kept


def _adam_scalars(group: Group, count: float) -> tuple[float, ...]:
    rate, (beta1, beta2) = float(group["lr"]), group["betas"]
    decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0
    return 1 - rate * decay, rate / (1 - beta1**count), 1 / (1 - beta2**count) ** 0.5


def _adam_update(group: Group, scalars: Sequence[Any], w: Any, g: Any, state: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return the weight and the state after a step of Adam.

    m += (1 - β₁) (g - m);  v = β₂ v + (1 - β₂) g²;
    w -= lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε).
    """
    kept, (beta1, beta2), decay = scalars[0], group["betas"], group["weight_decay"]
    g = _coupled(group, 0 if group["decoupled_weight_decay"] else decay, w, g)
    if group["decoupled_weight_decay"] and decay:
        w = kept * w
    # as lerp computes it, which is exact at both ends
    mean = state[0] + (1 - beta1) * (g - state[0]) if beta1 > 0.5 else g - beta1 * (g - state[0])
    moments = [mean, beta2 * state[1] + (1 - beta2) * g * g]
    if group["amsgrad"]:
        moments.append(moments[1].maximum(state[2]))
    return w - _adam_movement(group, scalars, moments), moments


def _adam_movement(group: Group, scalars: Sequence[Any], moments: Sequence[Any]) -> Any:
    """lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε), with the moments after the step."""
    return scalars[1] * moments[0] / (moments[-1].sqrt() * scalars[2] + group["eps"])


@dataclass(frozen=True)
class Update:
    """The step of an optimizer for one entry.

    Args:
        scalars: the numbers that change from step to step, by the settings and the count of the
            steps with this one.
        step: (settings, scalars, weight, gradient, state) → (weight, state), where the state is
            what `state_names` names. It is arithmetic alone, for tensors and expressions of C.
        movement: (settings, scalars, state after the step) → what the step takes from the weight
            besides decay, in arithmetic alone; None if the state doesn't tell.
    """

    scalars: Callable[[Group, float], tuple[float, ...]]
    step: Callable[[Group, Sequence[Any], Any, Any, Sequence[Any]], tuple[Any, list[Any]]]
    movement: Callable[[Group, Sequence[Any], Sequence[Any]], Any] | None = None


@dataclass(frozen=True)
class Known:
    """An optimizer's metric and, for some, its update, which folding and the models carry out."""

    metric: Callable[[Taken], Metric]
    update: Update | None = None


_ADAM = Known(_adam, Update(_adam_scalars, _adam_update, _adam_movement))
OPTIMIZERS: dict[type[Optimizer], Known] = {
    SGD: Known(_sgd, Update(_sgd_scalars, _sgd_update)),
    Adam: _ADAM,
    AdamW: _ADAM,
    ASGD: Known(_asgd),
    NAdam: Known(_nadam),
    RAdam: Known(_radam),
    Adamax: Known(_adamax),
    RMSprop: Known(_rmsprop),
    Adagrad: Known(_adagrad),
    Adadelta: Known(_adadelta),
    Adafactor: Known(_adafactor),
}


def metric_of(optimizer: Optimizer) -> Callable[[Taken], Metric]:
    """Return the metric of an optimizer as a function of a step; measured where it isn't known."""
    cls = type(optimizer)
    bases = (base for base in cls.__mro__ if base in OPTIMIZERS and _step_of(cls) is _step_of(base))
    return next((OPTIMIZERS[base].metric for base in bases), _measured)


def common(measure: Callable[[Taken], Metric], group: dict[str, Any]) -> bool:
    """Whether all parameters of a group have one metric, which follows from its settings alone."""
    return measure is _sgd and not float(group["momentum"])


def known(optimizer: Optimizer) -> bool:
    """Return True if its metric is known by a formula.

    That is the formula of the first of its bases whose step it has not overridden.
    """
    return metric_of(optimizer) is not _measured


def looks_before(optimizer: Optimizer) -> bool:
    """Whether its metric needs weights and gradient from before the step."""
    return metric_of(optimizer) in (_measured, _adafactor)


def diagonal(optimizer: Optimizer) -> bool:
    """Whether its metric differs from entry to entry."""
    return metric_of(optimizer) not in (_sgd, _asgd)


_MIXING = ("Muon", "Shampoo", "SOAP", "Kron", "KFAC", "SPlus")


def mixes(optimizer: Optimizer) -> bool:
    """Return True if the class, or a base, is named like an optimizer that moves entries together.

    Its step is a matrix times the gradient, for which no prox and no projection by entry is right.
    """
    return any(word in base.__name__ for base in type(optimizer).__mro__ for word in _MIXING)


def by_metric(optimizer: Optimizer) -> bool:
    """Return True if constraints are held in its metric.

    They are where it differs from entry to entry and a gradient of zero is its rest.

    LBFGS moves along a line of its own, Rprop by signs, and SparseAdam where a gradient has
    entries.
    """
    return diagonal(optimizer) and not isinstance(optimizer, LBFGS | Rprop | SparseAdam)


def _step_of(cls: type[Optimizer]) -> Any:
    return inspect.unwrap(cls.step)
