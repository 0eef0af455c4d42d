"""What rules do around an optimizer's step: add gradients and decay before it; prox, then projection after it.

All by the optimizer's own hooks, so that every trainer, schedule and loss scaler is served. Nothing is done in a step
that isn't one: skipped by a loss scaler, of learning rate zero, of a parameter without gradient.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.feasible import hold
from restrain.engine.kernels import add_gradient, apply_prox, decay
from restrain.engine.metric import Taken, looks_before, metric_of
from restrain.engine.ranks import agreed_seed, common_generator
from restrain.engine.shards import Term, acting, blank, local, part, ranks_of, totals, value_of
from restrain.errors import DetachedError, HowError, OptimizerError, RestrainWarning
from restrain.penalties import Penalty
from restrain.rules import Rule
from restrain.sites import Handle
from restrain.transforms import Constraint, GradientNoise


@dataclass
class Work:
    """All that is done to one parameter around a step."""

    handle: Handle
    gradient: list[tuple[Rule, Penalty]] = field(default_factory=list)
    noise: list[tuple[Rule, GradientNoise]] = field(default_factory=list)
    decoupled: list[tuple[Rule, Penalty]] = field(default_factory=list)
    proximal: list[tuple[Rule, Penalty]] = field(default_factory=list)
    project: list[tuple[Rule, Constraint]] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)  # what the metric keeps from step to step
    before: tuple[Tensor, Tensor] | None = None  # weights and gradient before the step, where the metric needs them


def due(timed: list[tuple[Rule, Any]], step: int) -> list[Any]:
    """What acts at a step (steps are counted from zero)."""
    return [what for rule, what in timed if rule.due(step)]


def _refuse_sparse(work: Work, p: Tensor) -> None:
    if p.grad is not None and p.grad.is_sparse:
        raise HowError(
            f"{work.handle.name!r} has got a sparse gradient; rules at the optimizer's step need dense ones: use "
            "how='loss' with an optimizer for dense gradients, or sparse=False"
        )


def total(penalties: list[Penalty]) -> Penalty:
    """The sum of penalties as one."""
    return functools.reduce(lambda a, b: a + b, penalties)


def real_step(optimizer: Optimizer) -> bool:
    """Whether a step moves, or has moved, anything: not skipped by a scaler, not of learning rate zero."""
    found = getattr(optimizer, "found_inf", None)  # set by GradScaler on fused optimizers, which skip by themselves
    if found is not None and float(found) > 0:
        return False
    return any(float(g["lr"]) != 0 and any(p.grad is not None for p in g["params"]) for g in optimizer.param_groups)


def nested(optimizer: Optimizer) -> bool:
    """Whether a hook is called for a step inside a step of the same optimizer.

    torch calls the hooks in both where a subclass's step calls that of its base; what we do belongs to the outer one.
    """
    steps = [vars(cls)["step"] for cls in type(optimizer).__mro__ if "step" in vars(cls)]
    if sum(bool(getattr(step, "hooked", False)) for step in steps) < 2:
        return False
    code, frame, found = type(optimizer).step.__code__, sys._getframe(1), 0
    while frame is not None:
        found += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found > 1


class Stepper:
    """The work of all rules on the parameters of one optimizer."""

    def __init__(self, optimizer: Optimizer, works: list[Work], root: Callable[[], nn.Module]) -> None:
        self.works, self.root, self.steps = works, root, 0
        self._empty: dict[Handle, int] = {}
        self._summed: dict[tuple[int, ...], Penalty] = {}
        self._handles = []
        self._looks = looks_before(optimizer)
        self._seed = agreed_seed() if any(work.noise for work in works) else None
        if any(w.gradient or w.noise or w.decoupled or (w.proximal and self._looks) for w in works):
            self._handles.append(optimizer.register_step_pre_hook(self.before))
        self._handles.append(optimizer.register_step_post_hook(self.after))

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the gradients, then decay; with a closure, wrap it, so that it is called at the weights as they were.

        Each call of it gives gradient and value; the decay follows the first.
        """
        if nested(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradients(optimizer)
            self._decay(optimizer)
            return None
        calls = itertools.count()

        def with_penalties() -> Any:
            loss = closure()
            added = self._add_gradients(optimizer, with_value=True)
            if next(calls) == 0:
                self._decay(optimizer)
            return loss if loss is None else loss + added.to(loss) if isinstance(loss, Tensor) else loss + float(added)

        return (args[0], with_penalties, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    @torch.no_grad()
    def _add_gradients(self, optimizer: Optimizer, with_value: bool = False) -> Tensor:
        scale, values = getattr(optimizer, "grad_scale", None), list[Term]()
        for work, p, _ in self._held(optimizer):
            penalties = due(work.gradient, self.steps)
            if p.grad is not None and work.noise:
                self._add_noise(work, p.grad, scale)
            if not penalties or p.grad is None:
                continue
            penalty = self._sum(penalties)
            _refuse_sparse(work, p)
            for (own,), (grad, w), _ in acting([penalty], p.grad, p):
                add_gradient(grad, w, own, scale)
            if with_value:
                values.append(value_of(penalty, p))
        return totals([values])[0]

    def _add_noise(self, work: Work, grad: Tensor, scale: Tensor | None) -> None:
        """Noise on a gradient; where there are several ranks, the same on each."""
        if grad.layout != torch.strided:
            raise OptimizerError(
                f"{work.handle.name!r} has a sparse gradient, which GradientNoise would fill: leave it out of the rule"
            )
        for number, (rule, noise) in enumerate(work.noise):
            if rule.due(self.steps):
                key = f"{self.steps} {work.handle.name} {number}"
                shared = None if self._seed is None else common_generator(self._seed, key, grad.device)
                added = part(noise.draw(blank(grad), self.steps - rule.start, shared), grad)
                local(grad).add_(added if scale is None else added * scale.to(added.dtype))

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer) -> None:
        """w -= lr · gradient of the penalty, of every parameter that the coming step will move."""
        if not real_step(optimizer):
            return
        for work, p, group in self._held(optimizer):
            if p.grad is None or group["lr"] == 0:
                continue
            penalties = due(work.decoupled, self.steps)
            if penalties:
                _refuse_sparse(work, p)
                for (own,), (w,), _ in acting([self._sum(penalties)], p):
                    decay(w, own, group["lr"])
            if work.proximal and self._looks:
                scale = getattr(optimizer, "grad_scale", None)
                work.before = (p.clone(), p.grad.clone() if scale is None else p.grad / scale.to(p.grad.dtype))

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Prox, then projection, of every parameter that the step moved."""
        if nested(optimizer) or not real_step(optimizer):
            return
        for work, p, group in self._held(optimizer):
            if work.proximal and p.grad is not None and group["lr"] != 0:
                self._prox(optimizer, work, p, group)
            constraints = [(rule, constraint) for rule, constraint in work.project if rule.due(self.steps)]
            if constraints:
                hold(work.handle.name, p, constraints, optimizer.state.get(p, {}))
        self.steps += 1
        if self.steps % 50 == 0:  # now and then, as a look at every weight costs a pass over it
            self._warn_of_empty()

    def _prox(self, optimizer: Optimizer, work: Work, p: Tensor, group: dict[str, Any]) -> None:
        """The prox of one parameter; its metric follows each step, also those where no rule is due."""
        _refuse_sparse(work, p)
        before, work.before = work.before, None
        if self._looks and before is None:  # the closure was never called
            return
        metric = metric_of(optimizer)(Taken(group, optimizer.state[p], p, work.kept, before))
        penalties = due(work.proximal, self.steps)
        if penalties:
            for (own,), (w, *moments), _ in acting([self._sum(penalties)], p, *metric.moments):
                apply_prox(w, own, replace(metric, moments=tuple(moments)))

    def _warn_of_empty(self) -> None:
        """Warn once of each weight that proximal rules and constraints have emptied."""
        root = self.root()
        looked = [(work, work.handle.find(root)) for work in self.works if work.proximal or work.project]
        looked = [(work, p) for work, p in looked if p.dim() > 1]
        counts = totals([[(local(p).count_nonzero(), ranks_of(p))] for _, p in looked])
        for (work, _), count in zip(looked, counts, strict=True):
            acts = work.proximal + work.project
            empty = 0 if count else self._empty.get(work.handle, 0) + 1
            self._empty[work.handle] = max(empty, self._empty.get(work.handle, 0))
            if empty == 2:  # at two looks running: weights may begin at zero
                warnings.warn(
                    f"after {self.steps} steps {work.handle.name!r} is all zeros, by {[what for _, what in acts]}: "
                    "the layer gives nothing but its bias; a smaller strength would keep some of it",
                    RestrainWarning,
                    stacklevel=2,
                )

    def _held(self, optimizer: Optimizer) -> Iterator[tuple[Work, Tensor, dict[str, Any]]]:
        """The parameters with work that the optimizer holds now and that aren't frozen, each with its group."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        root = self.root()
        for work in self.works:
            p = work.handle.find(root)
            if not isinstance(p, nn.Parameter):
                raise DetachedError(
                    f"{work.handle.name!r} was parametrised since rules were attached that would act on a temporary "
                    "at the step. Parametrise first, or in the same plan, and detach before"
                )
            group = groups.get(id(p))
            if group is not None and p.requires_grad:
                yield work, p, group

    def _sum(self, penalties: list[Penalty]) -> Penalty:
        """Their sum; kept, as composing it costs more than a small tensor's prox."""
        key = tuple(map(id, penalties))
        if key not in self._summed:
            self._summed[key] = total(penalties)
        return self._summed[key]
