"""The whole update of a parameter in one pass: rules before the step, the optimizer's own formula, rules after it.

torch's step reads weights, gradients and moments, and rules at the step read the weights once more. Here a loop of C
(`native`) does all of it to each entry, and to the optimizer's own state in place, whose names, dtypes and meaning stay
torch's. The optimizer's step then runs for a stand-in that holds the parameters that are left. So nothing is hidden
from those who look at gradients, groups or state, and nothing needs to be put back.

What isn't known to give the same is left to torch and to the rules' own passes, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode

from restrain.engine import native
from restrain.engine.blocks import dense, simple
from restrain.engine.held import Job, Work
from restrain.engine.kernels import Given, Lowered, lower
from restrain.engine.metric import Metric, Taken, metric_of
from restrain.engine.passes import Compile
from restrain.engine.statements import body

WORTH = 10**9  # entries × steps: an estimate of when a loop makes up for the fraction of a second that compiling takes

Group: TypeAlias = "dict[str, Any]"
Number: TypeAlias = Callable[[float], str]  # gives a number its name in C
Tensors: TypeAlias = "tuple[Tensor, ...]"


class Folding:
    """Finds, before each step of one optimizer, what can be done in one pass."""

    def __init__(self, optimizer: Optimizer, compile: Compile) -> None:
        self.possible = compile is not False and type(optimizer) in _FORMULAS
        self._at_once = compile is True
        self._separate: Any = None  # addresses that were seen to lie apart

    def __call__(self, optimizer: Optimizer, jobs: Sequence[Job], steps: int) -> Fold | None:
        """What is folded at a step, if anything is; nothing is done yet.

        Args:
            optimizer: about to step, without a closure.
            jobs: all that rules do at this step, before and after it.
            steps: how many were taken.
        """
        if not (self.possible and (self._at_once or steps * _entries(jobs) >= WORTH)) or _observed(optimizer):
            return None
        batches = [batch for job in jobs if _plain(job.group) for batch in _batches(optimizer, job)]
        fold = Fold([part for batch in batches if (part := _part(optimizer, batch))])
        return fold if fold.done and self._apart(optimizer, fold) else None

    def _apart(self, optimizer: Optimizer, fold: Fold) -> bool:
        """Whether what is written shares no memory: else the order matters, and torch has one."""
        written = [t for part in fold.parts for tensors in part.batch.members for t in (tensors[0], *tensors[2:])]
        written += [p for group in optimizer.param_groups for p in fold.left(group) if p.is_cpu and _plain_type(p)]
        spans = list(map(_span, written))
        if spans != self._separate:
            order = sorted(span for span in spans if span[1])
            if any(at + size > after for (at, size), (after, _) in pairwise(order)):
                return False
            self._separate = spans
        return True


class Fold:
    """What is done in one pass at one step."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self.done = {id(p) for part in parts for p in part.batch.parameters}

    def run(self, optimizer: Optimizer) -> Optimizer:
        """Do it.

        Returns:
            An optimizer of the same class, with the same settings and state, that holds the parameters which are left
            to torch's step.
        """
        counts = [count for part in self.parts for count in part.batch.counts]
        if counts:
            torch._foreach_add_(counts, 1)
        for part in self.parts:
            members = [tensors for tensors in part.batch.members if tensors[0].numel()]
            if members:
                part.loop(members, part.numbers * len(members))
            for work in part.batch.works:
                work.kept = dict(part.kept)
        groups = [{**group, "params": left} for group in optimizer.param_groups if (left := self.left(group))]
        rest = object.__new__(type(optimizer))
        rest.__dict__.update({**vars(optimizer), "param_groups": groups})
        return rest

    def left(self, group: Group) -> list[nn.Parameter]:
        """The parameters of a group that aren't folded."""
        return [p for p in group["params"] if id(p) not in self.done]


@dataclass
class _Batch:
    """Parameters of a job whose numbers are the same."""

    job: Job
    count: float  # of the optimizer's steps, with this one
    kept: dict[str, Any]  # by the metric, from step to step
    followed: bool  # whether there is a metric to be followed
    parameters: list[nn.Parameter] = field(default_factory=list)
    members: list[Tensors] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    batch: _Batch
    loop: native.Loop
    numbers: list[float]
    kept: dict[str, Any]


def _entries(jobs: Sequence[Job]) -> int:
    return sum(p.numel() for job in jobs for _, p in job.members)


def _observed(optimizer: Optimizer) -> bool:
    """Whether a loss scaler gave the step something to do, or somebody watches or changes torch's operations."""
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    return scaled or _get_current_dispatch_mode() is not None


def _plain(group: Group) -> bool:
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


def _batches(optimizer: Optimizer, job: Job) -> Iterator[_Batch]:
    """The parameters that can be folded."""
    names = _moments(job.group)
    found: dict[Any, _Batch] = {}
    for work, p in job.members:
        state = optimizer.state.get(p, {})
        tensors = _fitting(p, state, names)
        count = state.get("step") if "betas" in job.group else None
        if tensors is None or not ("betas" not in job.group or _counts(count)):
            continue
        number = 0.0 if count is None else float(count) + 1
        followed = bool(work.proximal)
        key = (p.dtype, number, followed, *work.kept.items())
        if key not in found:
            found[key] = _Batch(job, number, work.kept, followed)
        batch = found[key]
        batch.parameters.append(p)
        batch.members.append(tensors)
        if count is not None:
            batch.counts.append(count)
        if followed:
            batch.works.append(work)
    yield from found.values()


def _span(t: Tensor) -> tuple[int, int]:
    """Where it lies in memory: address and bytes."""
    if t.is_contiguous() or not t.numel():
        return t.data_ptr(), t.nbytes
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), reach * t.itemsize


def _plain_type(p: Tensor) -> bool:
    return type(p) is nn.Parameter and p.layout == torch.strided


def _counts(count: Any) -> bool:
    return type(count) is Tensor and count.is_cpu and count.numel() == 1


def _fitting(p: nn.Parameter, state: Mapping[str, Any], names: Sequence[str]) -> Tensors | None:
    """Weights, gradient and moments, if they are plain and lie alike in memory."""
    grad = p.grad
    if grad is None or not _plain_type(p) or not p.is_cpu or not simple(p) or grad.is_neg():
        return None
    others: list[Any] = [grad, *map(state.get, names)]
    shape, dtype = p.shape, p.dtype
    for t in others:
        if (
            type(t) is not Tensor
            or t.dtype is not dtype
            or t.shape != shape
            or t.layout != torch.strided
            or not t.is_cpu
        ):
            return None
    if not (p.is_contiguous() and all(t.is_contiguous() for t in others)):
        stride = p.stride()
        if any(t.stride() != stride for t in others) or not dense(p):
            return None
    return (p, *others)


def _part(optimizer: Optimizer, batch: _Batch) -> _Part | None:
    """The loop that does it, with its numbers; None if there is none."""
    group, acts, (p, *_), kept = batch.job.group, batch.job.acts, batch.parameters, dict(batch.kept)
    metric = Metric(0.0)
    if batch.followed:
        coming = {**optimizer.state[p], "step": batch.count}
        metric = metric_of(optimizer)(Taken(group, coming, p, kept))
    early = lower([act for act in acts if act.kind in ("gradient", "decay")], Given(group["lr"]), p)
    late = lower([act for act in acts if act.kind in ("prox", "project")], Given(metric=metric), p)
    found = None if early is None or late is None else _statements(type(optimizer), early, late, group, batch.count)
    if found is None or not all(map(isfinite, found[1])):
        return None
    lines, numbers = found
    roles = len(batch.members[0])
    loop = native.loop((p.dtype,) * roles, lines, len(numbers), (0, *range(2, roles)))
    return None if loop is None else _Part(batch, loop, numbers, kept)


def _statements(
    kind: type[Optimizer], early: Lowered, late: Lowered, group: Group, count: float
) -> tuple[str, list[float]] | None:
    """Statements on w, the gradient o0 and the moments o1, ..., with their numbers."""
    before, after = body(early), body(late)
    if before is None or after is None:
        return None
    numbers = list(before[1])

    def number(value: float) -> str:
        numbers.append(float(value))
        return f"n{len(numbers) - 1}"

    lines = [before[0], *_FORMULAS[kind](group, count, number)]
    # what follows calls its numbers n0, ..., too, and the second moment o0
    own = [f"n{place} = n{len(numbers) + place}" for place in range(len(after[1]))]
    own += [f"o0 = o{len(_moments(group))}"] * ("betas" in group)
    lines += ["{", *[f"const wide {name};" for name in own], after[0], "}"]
    return "\n".join(lines), numbers + after[1]


def _moments(group: Group) -> list[str]:
    """What the state holds of each entry, the second moment of the metric last."""
    if "betas" in group:
        return ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
    return ["momentum_buffer"] * (group["momentum"] != 0)


# The formulas of torch.optim, on the weight w, the gradient o0 and the moments o1, ...


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


_FORMULAS: dict[type[Optimizer], Callable[[Group, float, Number], list[str]]] = {SGD: _sgd, Adam: _adam, AdamW: _adam}
