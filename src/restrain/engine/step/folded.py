"""The whole update of a parameter in one pass: rules before the step, the optimizer's own formula, rules after it.

torch's step reads weights, gradients and moments, and rules at the step read the weights once more. Here a loop of C
(`native`) does all of it to each entry, and to the optimizer's own state in place, whose names, dtypes and meaning stay
torch's. The optimizer's step then runs for a stand-in that holds the parameters that are left. So nothing is hidden
from those who look at gradients, groups or state, and nothing needs to be put back.

What isn't known to give the same is left to torch and to the rules' own passes, parameter by parameter.
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

from restrain.engine.backends import FORMULAS, Group, compiler, counted, moments, plain, update
from restrain.engine.core import alike, simple
from restrain.engine.ops import Given, Metric, Taken, lower, metric_of
from restrain.engine.step.executor import Compile
from restrain.engine.step.worklist import Job, Work
from restrain.torch_private import dispatched, foreach_add_

WORTH = 10**9  # steps × entries: an estimate of when a loop makes up for the fraction of a second that compiling takes
EACH = 500_000  # entries that a step counts for beside its own: calls that are saved


class Folding:
    """Finds, before each step of one optimizer, what can be done in one pass."""

    def __init__(self, optimizer: Optimizer, compile: Compile) -> None:
        self.possible = compile is not False and type(optimizer) in FORMULAS
        self._at_once = compile is True
        self._measure = metric_of(optimizer)
        self._seen = weakref.WeakKeyDictionary[Optimizer, _Seen]()  # as it holds what the optimizer holds

    def __call__(self, optimizer: Optimizer, jobs: Sequence[Job], steps: int) -> Fold | None:
        """What is folded at a step, if anything is; nothing is done yet.

        Args:
            optimizer: about to step; its closure, if there is one, was called.
            jobs: all that rules do at this step, before and after it; the same list for as long as these are the same.
            steps: how many were taken.
        """
        if not self.possible or not jobs or _observed(optimizer):
            return None
        if not self._at_once and steps * (EACH + sum(p.numel() for job in jobs for _, p in job.members)) < WORTH:
            return None
        seen = self._seen.get(optimizer)
        if seen is None or not seen.stands(optimizer, jobs):
            seen = self._seen[optimizer] = _Seen(optimizer, jobs)
        parts = [part for batch in seen.batches if (part := self._part(optimizer, batch))] if seen.apart else []
        return Fold(parts) if parts else None

    def _part(self, optimizer: Optimizer, batch: _Batch) -> _Part | None:
        """The loop that does it, with its numbers; None if there is none."""
        group, acts, p, kept = batch.job.group, batch.job.acts, batch.parameters[0], dict(batch.works[0].kept)
        metric = Metric(0.0)
        if batch.followed:
            metric = self._measure(Taken(group, {**optimizer.state[p], "step": batch.count}, p, kept))
        early = lower([act for act in acts if act.kind in ("gradient", "decay")], Given(group["lr"]), p)
        late = lower([act for act in acts if act.kind in ("prox", "project")], Given(metric=metric), p)
        found = None if early is None or late is None else update(type(optimizer), early, late, group, batch.count)
        if found is None:
            return None
        lines, numbers = found
        roles = 2 + len(batch.names)
        loop = compiler.loop((p.dtype,) * roles, lines, len(numbers), (0, *range(2, roles)))
        return None if loop is None else _Part(batch, loop, numbers, kept)


class Fold:
    """What is done in one pass at one step."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self.done = {id(p) for part in parts for p in part.batch.parameters}

    def run(self, optimizer: Optimizer) -> list[Group]:
        """Do it.

        Returns:
            The optimizer's groups with the parameters that are left to torch.
        """
        counts = [count for part in self.parts for count in part.batch.counts]
        if counts:
            foreach_add_(counts, torch.ones(()), alpha=1.0)  # a number would be made a tensor for each
        for part in self.parts:
            members = [tensors for tensors in part.batch.members() if tensors[0].numel()]
            if members:
                part.loop(members, part.numbers * len(members))
            for work in part.batch.works if part.kept else ():
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
    batch: _Batch
    loop: compiler.Loop
    numbers: list[float]
    kept: dict[str, Any]  # by the metric, from step to step


@dataclass
class _Batch:
    """Parameters of a job whose numbers are the same."""

    job: Job
    works: list[Work] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)  # of the first parameter, of the second, and so on
    counts: list[Tensor] = field(default_factory=list)
    count: float = 0.0  # of the optimizer's steps, with the coming one

    def __post_init__(self) -> None:
        self.names = moments(self.job.group)

    @property
    def followed(self) -> bool:
        """Whether there is a metric, to be followed at each step."""
        return bool(self.works[0].proximal)

    def members(self) -> list[tuple[Tensor, ...]]:
        """Weights, gradient and moments of each."""
        size = len(self.names)
        found = enumerate((p, p.grad) for p in self.parameters)
        return [(p, g, *self.moments[at * size : (at + 1) * size]) for at, (p, g) in found if g is not None]

    def seen(self) -> _Batch:
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
        """Whether it is the same batch at a later step, whose count it takes up."""
        states = [optimizer.state.get(p, {}) for p in self.parameters]
        found = [state.get(name) for state in states for name in self.names]
        steps = [state.get("step") for state in states] if self.counts else []
        alike = all(map(is_, found, self.moments)) and all(map(is_, steps, self.counts))
        if not alike or self._look() != self._places or moments(self.job.group) != self.names:
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
    """What was found for some jobs, with what it depends on."""

    def __init__(self, optimizer: Optimizer, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.batches = [batch for job in jobs if plain(job.group) for batch in _batches(optimizer, job)]
        done = {id(p) for batch in self.batches for p in batch.parameters}
        left = [p for group in optimizer.param_groups for p in _left(group, done)]
        self._left = [p for p in left if _ordinary(p, nn.Parameter) and p.is_cpu]
        self._places = list(map(Tensor.data_ptr, self._left))
        self._whole = len(done) == sum(len(job.members) for job in jobs)
        spans = [*map(_span, self._left), *[span for batch in self.batches for span in batch.spans()]]
        spans = sorted(span for span in spans if span[1])
        # where tensors share memory, the order in which they are written matters, and torch has one
        self.apart = all(at + size <= after for (at, size), (after, _) in pairwise(spans))

    def stands(self, optimizer: Optimizer, jobs: Sequence[Job]) -> bool:
        """Whether the same would be found at a later step."""
        return (
            self._whole
            and jobs is self._jobs
            and all(plain(job.group) for job in jobs)
            and all(batch.stands(optimizer) for batch in self.batches)
            and list(map(Tensor.data_ptr, self._left)) == self._places
        )


def _batches(optimizer: Optimizer, job: Job) -> list[_Batch]:
    """The parameters that fit, by their numbers."""
    found: dict[Any, _Batch] = {}
    for work, p in job.members:
        state = optimizer.state.get(p, {})
        own, count = [state.get(name) for name in moments(job.group)], state.get("step")
        if not _fits(p, own) or (counted(job.group) and not (_ordinary(count, Tensor) and count.is_cpu)):
            continue
        steps = float(count) + 1 if counted(job.group) else 0.0
        batch = found.setdefault((p.dtype, steps, bool(work.proximal), *work.kept.items()), _Batch(job))
        batch.works.append(work)
        batch.parameters.append(p)
        batch.moments += own
        batch.counts += [count] * counted(job.group)
        batch.count = steps
    return [batch.seen() for batch in found.values()]


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
