"""The whole update of a parameter in one pass: rules before the step, the optimizer's own formula, rules after it.

torch's step reads weights, gradients and moments, and rules at the step read the weights once more. Here a loop of C
does all of it to each entry, and to the optimizer's own state in place, whose names, dtypes and meaning stay
torch's. The optimizer's step then runs for a stand-in that holds the parameters that are left. So nothing is hidden
from those who look at gradients, groups or state, and nothing needs to be put back.

What isn't known to give the same is left to torch and to the rules' own passes, parameter by parameter.

It is done only where ours is the last pre-hook and the first post-hook, without a loss scaler's
`found_inf`, a dispatch mode or a compiled `step`, for dense CPU tensors of float32 or float64 that
lie alike and share no memory, with a state that torch has made (not at Adam's first step), and for
instructions that C knows. With a closure it comes at the closure's end. `"auto"` folds when steps ×
(entries + 500,000) reach 10⁹, which depends on the count of steps and not on the past, so a resumed
run is bit-identical. Differences that remain: after a folded step `.grad` lacks the gradient of
`how="gradient"`; a profiler sees no torch operation; torch's foreach SGD with Nesterov momentum adds
the momentum to `.grad`, the loop doesn't. A target by `gradient_share=` needs `.grad`, so nothing
is folded then.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.backends import Compile, Decider, Loop, loop, update
from restrain.engine.core import alike, simple
from restrain.engine.ops import (
    OPTIMIZERS,
    Group,
    Metric,
    StepScalars,
    Taken,
    counted,
    lower,
    metric_of,
    plain,
    state_names,
)
from restrain.engine.step.worklist import ParameterRules, Task
from restrain.torch_private import dispatched, foreach_add_

COST = 10**9  # steps × entries: an estimate of when a loop makes up for the fraction of a second that compiling takes
EACH = 500_000  # entries that a step counts for beside its own: calls that are saved


class Folding:
    """Finds, before each step of one optimizer, what can be done in one pass."""

    def __init__(self, optimizer: Optimizer, compile: Compile) -> None:
        self.possible = (
            compile is not False and type(optimizer) in OPTIMIZERS and OPTIMIZERS[type(optimizer)].update is not None
        )
        self._compile: Compile = compile
        self._measure = metric_of(optimizer)
        self._seen = weakref.WeakKeyDictionary[Optimizer, _Seen]()  # as it holds what the optimizer holds

    def __call__(self, optimizer: Optimizer, tasks: Sequence[Task], steps: int) -> Fold | None:
        """What is folded at a step, if anything is; nothing is done yet.

        Args:
            optimizer: about to step; its closure, if there is one, was called.
            tasks: all that rules do at this step, before and after it; the same list for as long as these are the same.
            steps: how many were taken.
        """
        if not self.possible or not tasks or _observed(optimizer):
            return None
        work = EACH + sum(p.numel() for task in tasks for _, p in task.members)
        if not Decider(self._compile, steps).makes(work, COST):
            return None
        seen = self._seen.get(optimizer)
        if seen is None or not seen.stands(optimizer, tasks):
            seen = self._seen[optimizer] = _Seen(optimizer, tasks)
        parts = [part for bundle in seen.bundles if (part := self._part(optimizer, bundle))] if seen.apart else []
        return Fold(parts) if parts else None

    def _part(self, optimizer: Optimizer, bundle: _Bundle) -> _Part | None:
        """The loop that does it, with its numbers; None if there is none."""
        group, changes, p, kept = (
            bundle.task.group,
            bundle.task.changes,
            bundle.parameters[0],
            dict(bundle.works[0].kept),
        )
        metric = Metric(0.0)
        if bundle.followed:
            metric = self._measure(Taken(group, {**optimizer.state[p], "step": bundle.count}, p, kept))
        early = lower(
            [change for change in changes if change.kind in ("gradient", "decay")], StepScalars(group["lr"]), p
        )
        late = lower(
            [change for change in changes if change.kind in ("prox", "project")], StepScalars(metric=metric), p
        )
        found = None if early is None or late is None else update(type(optimizer), early, late, group, bundle.count)
        if found is None:
            return None
        lines, numbers = found
        roles = 2 + len(bundle.names)
        made = loop((p.dtype,) * roles, lines, len(numbers), (0, *range(2, roles)))
        return None if made is None else _Part(bundle, made, numbers, kept)


class Fold:
    """What is done in one pass at one step."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self.done = {id(p) for part in parts for p in part.bundle.parameters}

    def run(self, optimizer: Optimizer) -> list[Group]:
        """Do it.

        Returns:
            The optimizer's groups with the parameters that are left to torch.
        """
        counts = [count for part in self.parts for count in part.bundle.counts]
        if counts:
            foreach_add_(counts, torch.ones((), device="cpu"), alpha=1.0)  # a number would be made a tensor for each
        for part in self.parts:
            members = [tensors for tensors in part.bundle.members() if tensors[0].numel()]
            if members:
                part.loop(members, part.numbers * len(members))
            for work in part.bundle.works if part.kept else ():
                work.kept = dict(part.kept)
        groups = [{**group, "params": _left(group, self.done)} for group in optimizer.param_groups]
        return [group for group in groups if group["params"]]


def stand_in(optimizer: Optimizer) -> Optimizer:
    """What takes the optimizer's place in its own step: of the same class, with the same state, and groups of its own.

    The step of the classes that are folded calls the closure, if there is one, and goes over the groups after that.
    """
    made = object.__new__(type(optimizer))
    made.__dict__.update(vars(optimizer))
    return made


@dataclass
class _Part:
    bundle: _Bundle
    loop: Loop
    numbers: list[float]
    kept: dict[str, Any]  # by the metric, from step to step


@dataclass
class _Bundle:
    """Parameters of a task whose numbers are the same."""

    task: Task
    works: list[ParameterRules] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)  # of the first parameter, of the second, and so on
    counts: list[Tensor] = field(default_factory=list)
    count: float = 0.0  # of the optimizer's steps, with the coming one

    def __post_init__(self) -> None:
        self.names = state_names(self.task.group)

    @property
    def followed(self) -> bool:
        """Whether there is a metric, to be followed at each step."""
        return bool(self.works[0].proximal)

    def members(self) -> list[tuple[Tensor, ...]]:
        """Weights, gradient and moments of each."""
        size = len(self.names)
        found = enumerate((p, p.grad) for p in self.parameters)
        return [(p, g, *self.moments[at * size : (at + 1) * size]) for at, (p, g) in found if g is not None]

    def seen(self) -> _Bundle:
        """Itself, once it is whole: remembers where its tensors are."""
        self._written = [*self.parameters, *self.moments]
        self._places = self._look()
        return self

    def _look(self) -> list[Any]:
        written = self._written
        return [*map(Tensor.stride, written), *map(Tensor.data_ptr, written), *map(Tensor.numel, written)]

    def spans(self) -> list[tuple[int, int]]:
        """What is written: addresses and bytes."""
        return list(map(_span, self._written))

    def stands(self, optimizer: Optimizer) -> bool:
        """Whether it is the same bundle at a later step, whose count it takes up."""
        states = [optimizer.state.get(p, {}) for p in self.parameters]
        found = [state.get(name) for state in states for name in self.names]
        steps = [state.get("step") for state in states] if self.counts else []
        alike = all(map(is_, found, self.moments)) and all(map(is_, steps, self.counts))
        if not alike or self._look() != self._places or state_names(self.task.group) != self.names:
            return False
        counts = set(map(Tensor.item, self.counts))
        if len(counts) > 1 or (self.followed and any(work.kept != self.works[0].kept for work in self.works)):
            return False
        self.count = counts.pop() + 1 if counts else 0.0
        gradients: list[Any] = [p.grad for p in self.parameters]
        dtype = self.parameters[0].dtype
        return all(
            _ordinary(grad, Tensor) and grad.dtype is dtype and grad.stride() == stride and not grad.is_neg()
            for grad, stride in zip(gradients, self._places, strict=False)
        )


class _Seen:
    """What was found for some tasks, with what it depends on."""

    def __init__(self, optimizer: Optimizer, tasks: Sequence[Task]) -> None:
        self._jobs = tasks
        self.bundles = [bundle for task in tasks if plain(task.group) for bundle in _bundles(optimizer, task)]
        done = {id(p) for bundle in self.bundles for p in bundle.parameters}
        left = [p for group in optimizer.param_groups for p in _left(group, done)]
        self._left = [p for p in left if _ordinary(p, nn.Parameter) and p.is_cpu]
        self._places = list(map(Tensor.data_ptr, self._left))
        self._whole = len(done) == sum(len(task.members) for task in tasks)
        spans = [*map(_span, self._left), *[span for bundle in self.bundles for span in bundle.spans()]]
        spans = sorted(span for span in spans if span[1])
        # where tensors share memory, the order in which they are written matters, and torch has one
        self.apart = all(at + size <= after for (at, size), (after, _) in pairwise(spans))

    def stands(self, optimizer: Optimizer, tasks: Sequence[Task]) -> bool:
        """Whether the same would be found at a later step."""
        return (
            self._whole
            and tasks is self._jobs
            and all(plain(task.group) for task in tasks)
            and all(bundle.stands(optimizer) for bundle in self.bundles)
            and list(map(Tensor.data_ptr, self._left)) == self._places
        )


def _bundles(optimizer: Optimizer, task: Task) -> list[_Bundle]:
    """The parameters that fit, by their numbers."""
    found: dict[Any, _Bundle] = {}
    for work, p in task.members:
        state = optimizer.state.get(p, {})
        own, count = [state.get(name) for name in state_names(task.group)], state.get("step")
        if not _fits(p, own) or (counted(task.group) and not (_ordinary(count, Tensor) and count.is_cpu)):
            continue
        steps = float(count) + 1 if counted(task.group) else 0.0
        bundle = found.setdefault((p.dtype, steps, bool(work.proximal), *work.kept.items()), _Bundle(task))
        bundle.works.append(work)
        bundle.parameters.append(p)
        bundle.moments += own
        bundle.counts += [count] * counted(task.group)
        bundle.count = steps
    return [bundle.seen() for bundle in found.values()]


def _fits(p: nn.Parameter, own: Sequence[Any]) -> bool:
    """Whether a parameter has a gradient and moments, and all are plain and lie alike in memory."""
    if not _ordinary(p, nn.Parameter) or not simple(p) or not all(_ordinary(t, Tensor) for t in (p.grad, *own)):
        return False
    tensors = [p, p.grad, *own]
    if any(t.dtype != p.dtype or t.shape != p.shape or not t.is_cpu or t.is_neg() for t in tensors):
        return False
    return alike(tensors)


def _ordinary(t: Any, kind: type[Tensor]) -> bool:
    return type(t) is kind and t.layout is torch.strided


def _span(t: Tensor) -> tuple[int, int]:
    """Where it lies in memory: address and bytes."""
    if t.is_contiguous() or not t.numel():
        return t.data_ptr(), t.nbytes
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), reach * t.itemsize


def _left(group: Group, done: set[int]) -> list[nn.Parameter]:
    """The parameters of a group that aren't folded."""
    return [p for p in group["params"] if id(p) not in done]


def _observed(optimizer: Optimizer) -> bool:
    """Whether a loss scaler gave the step something to do, or somebody watches or changes torch's operations."""
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    return scaled or dispatched()
