"""What rules do around an optimizer's step: add gradients before it; prox, then projection after it.

All by the optimizer's own hooks, so that every trainer, schedule and loss scaler is served. Nothing is done in a step
that isn't one: skipped by a loss scaler, of learning rate zero, of a parameter without gradient.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.feasible import hold
from restrain.engine.kernels import add_gradient, apply_prox
from restrain.engine.metric import metric_of
from restrain.engine.ranks import agreed_seed, common_generator
from restrain.errors import DetachedError, OptimizerError, RestrainWarning
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
    proximal: list[tuple[Rule, Penalty]] = field(default_factory=list)
    project: list[tuple[Rule, Constraint]] = field(default_factory=list)


def due(timed: list[tuple[Rule, Any]], step: int) -> list[Any]:
    """What acts at a step (steps are counted from zero)."""
    return [what for rule, what in timed if rule.due(step)]


def total(penalties: list[Penalty]) -> Penalty:
    """The sum of penalties as one."""
    return functools.reduce(lambda a, b: a + b, penalties)


def real_step(optimizer: Optimizer) -> bool:
    """Whether the step that was just taken moved anything: not skipped by a scaler, not of learning rate zero."""
    found = getattr(optimizer, "found_inf", None)  # set by GradScaler on fused optimizers, which skip by themselves
    if found is not None and float(found) > 0:
        return False
    return any(float(g["lr"]) != 0 and any(p.grad is not None for p in g["params"]) for g in optimizer.param_groups)


class Stepper:
    """The work of all rules on the parameters of one optimizer."""

    def __init__(self, optimizer: Optimizer, works: list[Work], root: Callable[[], nn.Module]) -> None:
        self.works, self.root, self.steps = works, root, 0
        self._empty: dict[Handle, int] = {}
        self._summed: dict[tuple[int, ...], Penalty] = {}
        self._handles = []
        self._seed = agreed_seed() if any(work.noise for work in works) else None
        if any(work.gradient or work.noise for work in works):
            self._handles.append(optimizer.register_step_pre_hook(self.before))
        self._handles.append(optimizer.register_step_post_hook(self.after))

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the gradients; with a closure, wrap it so that each of its calls gives gradient and value."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradients(optimizer)
            return None

        def with_penalties() -> Any:
            loss = closure()
            added = self._add_gradients(optimizer, with_value=True)
            return loss if loss is None else loss + added.to(loss) if isinstance(loss, Tensor) else loss + float(added)

        return (args[0], with_penalties, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    @torch.no_grad()
    def _add_gradients(self, optimizer: Optimizer, with_value: bool = False) -> Tensor:
        scale, value = getattr(optimizer, "grad_scale", None), torch.zeros(())
        for work, p, _ in self._held(optimizer):
            penalties = due(work.gradient, self.steps)
            if p.grad is not None and work.noise:
                self._add_noise(work, p.grad, scale)
            if not penalties or p.grad is None:
                continue
            penalty = self._sum(penalties)
            add_gradient(p.grad, p, penalty, scale)
            if with_value:
                value = value + penalty(p).to(value.device)
        return value

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
                added = noise.draw(grad, self.steps - rule.start, shared)
                grad.add_(added if scale is None else added * scale.to(added.dtype))

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Prox, then projection, of every parameter that the step moved."""
        if not real_step(optimizer):
            return
        for work, p, group in self._held(optimizer):
            penalties = due(work.proximal, self.steps)
            if penalties and p.grad is not None and group["lr"] != 0:
                apply_prox(p, self._sum(penalties), metric_of(optimizer)(group, optimizer.state[p]))
            constraints = [(rule, constraint) for rule, constraint in work.project if rule.due(self.steps)]
            if constraints:
                hold(work.handle.name, p, constraints, optimizer.state.get(p, {}))
        self.steps += 1
        if self.steps % 50 == 0:  # now and then, as a look at every weight costs a pass over it
            self._warn_of_empty()

    def _warn_of_empty(self) -> None:
        """Warn once of each weight that proximal rules and constraints have emptied."""
        root = self.root()
        for work in self.works:
            p = work.handle.find(root)
            acts = work.proximal + work.project
            empty = self._empty.get(work.handle, 0) + 1 if acts and p.dim() > 1 and not p.any() else 0
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
