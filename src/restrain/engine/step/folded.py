"""Folded update: rules before the step, the optimizer's update, and rules after it in one pass.

torch's step reads weights, gradients and moments, and rules at the step read the weights again.
Here a loop of C does everything per entry, on the optimizer's own state in place, whose names,
dtypes and meaning stay torch's. The optimizer's step then runs for a stand-in that holds the
remaining parameters. So gradients, groups and state look as usual to other code, and nothing must
be restored.

Cautious decay stands in the same loop. Hyperball takes a second one over weights and moments, as
the norm of an update is known after the first (`backends/c_held.py`).

Parameters for which the result isn't known to be the same are left to torch and the rules' own
passes.

Conditions: our hooks are the last pre-hook and the first post-hook; no loss scaler's `found_inf`,
dispatch mode or compiled `step`; dense CPU tensors of float32 or float64 with equal strides that
share no memory; a state that torch has made (not at Adam's first step); instructions that C
supports. With a closure it comes at the closure's end. `"auto"` folds when steps × (entries +
500,000) reach 10⁹, which depends on the count of steps and not on the past, so a resumed run is
bit-identical. Differences that remain: after a folded step `.grad` lacks the gradient of
`how="gradient"`; a profiler sees no torch operation; torch's foreach SGD with Nesterov momentum
adds the momentum to `.grad`, the loop doesn't. A target by `gradient_share=` needs `.grad`, so
nothing is folded then.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.axes import Grouping
from restrain.engine.backends import Compile, Decider, Hold, Loop, held, held_step, loop, update
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

COST = 10**9  # steps × entries: estimate of the work that outweighs compiling
EACH = 500_000  # entries that equal a step's saved calls


class Folding:
    """Decision, before each step of an optimizer, on what is folded."""

    def __init__(self, optimizer: Optimizer, compile: Compile) -> None:
        self.possible = (
            compile is not False and type(optimizer) in OPTIMIZERS and OPTIMIZERS[type(optimizer)].update is not None
        )
        self._compile: Compile = compile
        self._measure = metric_of(optimizer)
        # weak: it references the optimizer's tensors
        self._seen = weakref.WeakKeyDictionary[Optimizer, _Seen]()

    def __call__(self, optimizer: Optimizer, tasks: Sequence[Task], steps: int) -> Fold | None:
        """Return the fold of a step, not yet run; None if nothing is folded.

        Args:
            optimizer: about to step; a closure was called.
            tasks: all rules at this step, before and after it; the same list object while they are
                the same.
            steps: the number of steps taken.
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
        """Return the loop for a bundle, with its scalars; None if there is none."""
        group, changes, p, kept = (
            bundle.task.group,
            bundle.task.changes,
            bundle.parameters[0],
            dict(bundle.works[0].kept),
        )
        metric, rate, roles = Metric(0.0), StepScalars(group["lr"]), 2 + len(bundle.names)
        if bundle.followed:
            metric = self._measure(Taken(group, {**optimizer.state[p], "step": bundle.count}, p, kept))
        early = lower([change for change in changes if change.kind in ("gradient", "tangent", "decay")], rate, p)
        if bundle.holds:
            step = None if early is None else held_step(type(optimizer), early, group, bundle.count)
            hold = None if step is None else held(p.dtype, roles, *step[:2], len(step[2]))
            return None if step is None or hold is None else _Part(bundle, hold, step[2], kept)
        cautious = lower([replace(change, kind="decay") for change in changes if change.kind == "cautious"], rate, p)
        late = lower(
            [change for change in changes if change.kind in ("prox", "project", "fit")], StepScalars(metric=metric), p
        )
        if early is None or cautious is None or late is None:
            return None
        found = update(type(optimizer), early, late, group, bundle.count, cautious)
        if found is None:
            return None
        lines, numbers = found
        made = loop((p.dtype,) * roles, lines, len(numbers), (0, *range(2, roles)))
        return None if made is None else _Part(bundle, made, numbers, kept)


class Fold:
    """The folded part of a step."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        self.done = {id(p) for part in parts for p in part.bundle.parameters}

    def run(self, optimizer: Optimizer) -> list[Group]:
        """Update the folded parameters.

        Returns:
            The optimizer's groups with the parameters that are left to torch.
        """
        counts = [count for part in self.parts for count in part.bundle.counts]
        if counts:
            # a number would be converted to a tensor for each
            foreach_add_(counts, torch.ones((), device="cpu"), alpha=1.0)
        for part in self.parts:
            members = [tensors for tensors in part.bundle.members() if tensors[0].numel()]
            if members:
                part.run(members)
            for work in part.bundle.works if part.kept else ():
                work.kept = dict(part.kept)
        groups = [{**group, "params": _left(group, self.done)} for group in optimizer.param_groups]
        return [group for group in groups if group["params"]]


def stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of the same class and state that can get groups of its own.

    The step of foldable classes calls the closure, if there is one, before it reads the groups.
    """
    made = object.__new__(type(optimizer))
    made.__dict__.update(vars(optimizer))
    return made


@dataclass
class _Part:
    bundle: _Bundle
    loop: Loop | Hold
    numbers: list[float]
    kept: dict[str, Any]  # state of the metric

    def run(self, members: Sequence[tuple[Tensor, ...]]) -> None:
        if isinstance(self.loop, Hold):
            self.loop(members, self.bundle.radii(), self.numbers, float(self.bundle.task.group["lr"]))
        else:
            self.loop(members, self.numbers * len(members))


@dataclass
class _Bundle:
    """Parameters of a task that share their scalars."""

    task: Task
    works: list[ParameterRules] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    # of the first parameter, then the second, ...
    moments: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    count: float = 0.0  # number of the coming step

    def __post_init__(self) -> None:
        self.names = state_names(self.task.group)

    @property
    def followed(self) -> bool:
        """True if there is a metric, which every step must update."""
        return bool(self.works[0].proximal)

    @property
    def holds(self) -> bool:
        """True if the rules hold norms."""
        return any(change.kind == "hold" for change in self.task.changes)

    def radii(self) -> list[Tensor]:
        """Return the norms of each parameter's groups, in the order of memory."""
        kind = self.parameters[0].dtype
        return [work.held[0][1].radius.to("cpu", kind).flatten() for work in self.works]

    def members(self) -> list[tuple[Tensor, ...]]:
        """Return (weights, gradient, moments...) per parameter."""
        size = len(self.names)
        found = enumerate((p, p.grad) for p in self.parameters)
        return [(p, g, *self.moments[at * size : (at + 1) * size]) for at, (p, g) in found if g is not None]

    def seen(self) -> _Bundle:
        """Record the addresses of the tensors; return the bundle."""
        self._written = [*self.parameters, *self.moments]
        self._places = self._look()
        return self

    def _look(self) -> list[Any]:
        written = self._written
        return [*map(Tensor.stride, written), *map(Tensor.data_ptr, written), *map(Tensor.numel, written)]

    def spans(self) -> list[tuple[int, int]]:
        """Return (address, bytes) of each written tensor."""
        return list(map(_span, self._written))

    def stands(self, optimizer: Optimizer) -> bool:
        """Return True if the bundle is valid at a later step, and update its count."""
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
    """Cached bundles of tasks, with the state that they depend on."""

    def __init__(self, optimizer: Optimizer, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self.bundles = [bundle for task in tasks if plain(task.group) for bundle in _bundles(optimizer, task)]
        done = {id(p) for bundle in self.bundles for p in bundle.parameters}
        left = [p for group in optimizer.param_groups for p in _left(group, done)]
        self._left = [p for p in left if _ordinary(p, nn.Parameter) and p.is_cpu]
        self._places = list(map(Tensor.data_ptr, self._left))
        self._whole = len(done) == sum(len(task.members) for task in tasks)
        spans = [*map(_span, self._left), *[span for bundle in self.bundles for span in bundle.spans()]]
        spans = sorted(span for span in spans if span[1])
        # tensors that share memory must be written in torch's order
        self.apart = all(at + size <= after for (at, size), (after, _) in pairwise(spans))

    def stands(self, optimizer: Optimizer, tasks: Sequence[Task]) -> bool:
        """Return True if the bundles are valid at a later step."""
        return (
            self._whole
            and tasks is self._tasks
            and all(plain(task.group) for task in tasks)
            and all(bundle.stands(optimizer) for bundle in self.bundles)
            and list(map(Tensor.data_ptr, self._left)) == self._places
        )


def _bundles(optimizer: Optimizer, task: Task) -> list[_Bundle]:
    """Return the foldable parameters of a task, grouped by their scalars."""
    found: dict[Any, _Bundle] = {}
    for work, p in task.members:
        state = optimizer.state.get(p, {})
        own, count = [state.get(name) for name in state_names(task.group)], state.get("step")
        if not _fits(p, own) or (counted(task.group) and not (_ordinary(count, Tensor) and count.is_cpu)):
            continue
        if work.held and not _in_blocks(p, work.held[0][1].groups):
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
    """Return True if a parameter has gradient and moments, all plain and with equal strides."""
    if not _ordinary(p, nn.Parameter) or not simple(p) or not all(_ordinary(t, Tensor) for t in (p.grad, *own)):
        return False
    tensors = [p, p.grad, *own]
    if any(t.dtype != p.dtype or t.shape != p.shape or not t.is_cpu or t.is_neg() for t in tensors):
        return False
    return alike(tensors)


def _in_blocks(p: nn.Parameter, groups: Grouping) -> bool:
    """Return True if the groups are nonempty and lie one after another in memory."""
    first = groups.keep == tuple(range(len(groups.keep))) and groups.lists is None
    return first and p.numel() > 0 and (not groups.keep or p.is_contiguous())


def _ordinary(t: Any, kind: type[Tensor]) -> bool:
    return type(t) is kind and t.layout is torch.strided


def _span(t: Tensor) -> tuple[int, int]:
    """Return address and bytes of a tensor's memory."""
    if t.is_contiguous() or not t.numel():
        return t.data_ptr(), t.nbytes
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), reach * t.itemsize


def _left(group: Group, done: set[int]) -> list[nn.Parameter]:
    """Return the parameters of a group that aren't folded."""
    return [p for p in group["params"] if id(p) not in done]


def _observed(optimizer: Optimizer) -> bool:
    """Return True with a loss scaler at work, or a mode that sees or changes torch's operations."""
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    return scaled or dispatched()
