"""Rules at the steps of an optimizer whose update the caller carries out itself.

`Stepper` finds out at each step what the optimizer holds, which rules are due, and which backend
acts. Where the same update is repeated on the same tensors, as a recorded one is, only the scalars
of a step are new: the metric, the learning rate, the count. The rest is found once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.backends import Compile, Repeated
from restrain.engine.ops import Metric, StepScalars, Taken, Tensors, counted, metric_of, state_names
from restrain.engine.step.projection import single
from restrain.engine.step.stepper import Stepper, without_metric
from restrain.engine.step.worklist import Member, ParameterRules, Task

_BEFORE, _AFTER = ("decoupled",), ("proximal", "project")
_EUCLIDEAN = StepScalars()
_LEAST, _MOST = 4, 256  # steps whose calls are made at once


@dataclass
class _Step:
    """The calls of a step, and the states of the metrics after it.

    `at` is (learning rate, number of the step, count of the update).
    """

    at: tuple[float, int, float]
    before: list[Callable[[], object]]
    after: list[Callable[[], object]]
    kept: list[tuple[ParameterRules, dict[str, Any]]]


def can_be_replayed(stepper: Stepper, optimizer: Optimizer) -> bool:
    """Return True if decay, prox and single projections are all that rules do at the steps."""
    works = [work for work, _, _ in stepper.members(optimizer)]
    others = ("joint", "cautious", "held", "sharp")
    plain = all(type(p) is nn.Parameter and p.is_cpu and not p.is_complex() for _, p, _ in stepper.members(optimizer))
    return (
        plain
        and stepper.is_alone(optimizer)
        and len(works) == len(stepper.works)
        and not any(getattr(work, kind) for work in works for kind in others)
        and not any(map(stepper.changes_gradients, works))
        and all(not work.project or single(work.project) for work in works)
    )


class Replayed:
    """The decay before an optimizer's updates, prox and projection after them.

    Args:
        stepper: of the rules; see `can_be_replayed`.
        optimizer: SGD, Adam or AdamW with one group; its parameters have their state.
        compile: whether loops are compiled.
        count: called after each step that isn't of learning rate zero.
    """

    def __init__(self, stepper: Stepper, optimizer: Optimizer, compile: Compile, count: Callable[[], None]) -> None:
        self.optimizer, self.group = optimizer, optimizer.param_groups[0]
        self.decays = any(work.decoupled for work in stepper.works)  # before the update
        self._stepper, self._compile, self._count, self._measure = stepper, compile, count, metric_of(optimizer)
        self._members: list[Member] = []
        self._addresses: list[int] = []
        self._alike: list[list[Member]] = []  # with equal metrics
        self._found: dict[int, tuple[list[Task], Repeated]] = {}  # by the tasks that are due
        self._metrics: dict[int, list[int | None]] = {}  # of the parts of a Repeated; None: Euclidean
        self._steps: list[_Step] = []  # the coming one is the last
        self._ahead = _LEAST

    def begin(self) -> None:
        """Look at the tensors, before the next updates."""
        members = self._stepper.members(self.optimizer)
        addresses = [t.data_ptr() for _, p, _ in members for t in (p, *self._state(p))]
        alike = all(one[0].kept == some[0][0].kept for some in self._alike for one in some)
        if members is self._members and addresses == self._addresses and alike:
            return
        self._members, self._addresses = members, addresses
        self._found, self._metrics, self._steps = {}, {}, []
        found: dict[Any, list[Member]] = {}
        for member in members:
            if self._stepper.follows(member[0]):
                found.setdefault(tuple(member[0].kept.items()), []).append(member)
        self._alike = list(found.values())

    def _state(self, p: nn.Parameter) -> list[Tensor]:
        return [self.optimizer.state[p][name] for name in state_names(self.group)]

    def before(self, count: float) -> None:
        """Decay, after the gradients and before the update with this count, the first being one."""
        if self.group["lr"]:
            for call in self._coming(count).before:
                call()

    def after(self, count: float) -> None:
        """Apply prox, then projection, after the update with this count."""
        if not self.group["lr"]:
            return
        step = self._coming(count)
        for call in step.after:
            call()
        for work, kept in step.kept:
            work.kept = dict(kept)
        self._steps.pop()
        self._stepper.took()
        self._count()

    def _coming(self, count: float) -> _Step:
        """Return the calls of the coming step; if needed, make those of some steps at once."""
        at = self.group["lr"], self._stepper.steps, count if counted(self.group) else 0.0
        if not self._steps or self._steps[-1].at != at:
            self._ahead = _LEAST if self._steps else min(2 * self._ahead, _MOST)
            self._steps = [*self._made(self._ahead, *at)][::-1]
        return self._steps[-1]

    def _made(self, steps: int, rate: float, first: int, count: float) -> Iterator[_Step]:
        states = [dict(some[0][0].kept) for some in self._alike]
        for number in range(steps):
            at = rate, first + number, count + number if counted(self.group) else 0.0
            metrics = [
                StepScalars(metric=self._metric(some[0], at[2], kept))
                for some, kept in zip(self._alike, states, strict=True)
            ]
            before, after = self._due(_BEFORE, at[1]), self._due(_AFTER, at[1])
            found = zip(self._alike, states, strict=True)
            yield _Step(
                at,
                before.prepared([StepScalars(rate)] * len(before.parts), at[1]),
                after.prepared(
                    [_EUCLIDEAN if one is None else metrics[one] for one in self._metrics[id(after)]], at[1]
                ),
                [(work, dict(kept)) for some, kept in found if kept for work, _, _ in some],
            )

    def _metric(self, member: Member, count: float, kept: dict[str, Any]) -> Metric:
        """Return the metric of a step; `kept`, its state, becomes that of the next one."""
        _, p, group = member
        return self._measure(Taken(group, {**self.optimizer.state[p], "step": count}, p, kept))

    def _due(self, kinds: tuple[str, ...], step: int) -> Repeated:
        tasks = self._stepper.due(kinds, step)
        if id(tasks) not in self._found:
            parts = [part for task in tasks for part in self._parts(task, kinds)]
            repeated = Repeated([(changes, members) for _, changes, members in parts], self._compile)
            self._found[id(tasks)] = tasks, repeated
            self._metrics[id(repeated)] = [number for number, _, _ in parts]
        return self._found[id(tasks)][1]

    def _parts(self, task: Task, kinds: tuple[str, ...]) -> Iterator[tuple[int | None, Any, list[Tensors]]]:
        """Yield (number of the metric, changes, members) of parameters that share their scalars."""
        numbers = {id(work): number for number, some in enumerate(self._alike) for work, _, _ in some}
        found: dict[Any, list[Tensors]] = {}
        for work, p in task.members:
            number = numbers.get(id(work)) if kinds is _AFTER else None
            moments: Tensors = ()
            if number is not None:
                taken = Taken(task.group, {**self.optimizer.state[p], "step": 1.0}, p, dict(work.kept))
                moments = self._measure(taken).moments
            if p.numel():
                found.setdefault((number, p.dtype), []).append((p.detach(), *moments))
        for (number, _), members in found.items():
            changes = without_metric(task.changes) if kinds is _AFTER and number is None else task.changes
            if changes:
                yield number, changes, members
