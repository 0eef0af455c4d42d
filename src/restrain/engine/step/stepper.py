"""Rules at an optimizer's step: gradient and decay before it; prox, then projection after it.

All are hooks on the optimizer, so that every trainer, schedule and loss scaler is supported.
Nothing is done in a step that moves nothing: skipped by a loss scaler, with learning rate zero, or
for a parameter without gradient.

If a subclass's `step` calls `super().step()`, torch calls the hooks twice; the call stack
identifies the inner call.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.backends import Compile, Executor
from restrain.engine.core import eagerly, refuse_capture
from restrain.engine.distributed import (
    Term,
    acting,
    agreed_seed,
    blank,
    common_generator,
    local,
    part,
    ranks_of,
    totals,
    value_of,
)
from restrain.engine.ops import (
    Batch,
    Change,
    Metric,
    StepScalars,
    Taken,
    Tensors,
    by_metric,
    common,
    looks_before,
    metric_of,
)
from restrain.engine.step import climbing, updates
from restrain.engine.step.folded import Fold, Folding, stand_in
from restrain.engine.step.intersections import APART
from restrain.engine.step.masters import Masters
from restrain.engine.step.projection import Timed, hold, in_metric, not_nearest, single
from restrain.engine.step.together import Together, add_gradients, decay, full, project, shrink, together
from restrain.engine.step.unfinished import Again, Made, Unfinished
from restrain.engine.step.worklist import Member, ParameterRules, Task, Worklist
from restrain.errors import HowError, OptimizerError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.garbage import uncollected
from restrain.named_tensors import Handle, is_sharded
from restrain.torch_private import step_hooks


def without_metric(changes: Sequence[Change]) -> list[Change]:
    """Return the projections alone, Euclidean, for a step that moved nothing or is unknown."""
    projections = [change for change in changes if change.kind in ("project", "fit")]
    return [replace(change, kind="project") for change in projections]


def _refuse_sparse(members: Iterable[tuple[ParameterRules, Tensor]]) -> None:
    for work, p in members:
        if p.grad is not None and p.grad.is_sparse:
            raise HowError(
                f"{work.handle.name!r} has got a sparse gradient; rules at the optimizer's step need dense ones: use "
                "how='loss' with an optimizer for dense gradients, or sparse=False; for a constraint metric='euclidean'"
            )


def real_step(optimizer: Optimizer) -> bool:
    """Return True if a step moves anything: not skipped by a scaler, learning rate not zero."""
    # set by GradScaler on fused optimizers, which skip steps themselves
    found = getattr(optimizer, "found_inf", None)
    if found is not None and float(found) > 0:
        return False
    return any(float(g["lr"]) != 0 and any(p.grad is not None for p in g["params"]) for g in optimizer.param_groups)


def nested(optimizer: Optimizer) -> bool:
    """Return True if a hook is called for a step inside a step of the same optimizer.

    torch calls the hooks in both if a subclass's step calls that of its base; only the outer call
    acts.
    """
    steps = [cls.__dict__.get("step") for cls in type(optimizer).__mro__]
    if sum([getattr(step, "hooked", False) for step in steps]) < 2:
        return False
    code, frame, found = type(optimizer).step.__code__, sys._getframe(1), 0
    while frame is not None:
        found += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found > 1


def _by_metric(
    task: Task, metrics: dict[int, Metric], done: Collection[int]
) -> Iterable[tuple[Metric | None, list[Any]]]:
    """Return (metric, tensors) for a task's remaining parameters; None: the step moved nothing."""
    alike: dict[Any, tuple[Metric | None, list[Any]]] = {}
    last, own = None, list[Any]()
    for number, p in enumerate([p for _, p in task.members if id(p) not in done]):
        metric = metrics.get(id(p))
        if not number or (metric is not last and (metric is None or last is None or not metric.like(last))):
            last = metric
            own = alike.setdefault(None if metric is None else metric.key, (metric, []))[1]
        own.append((p,) if metric is None else (p, *metric.moments))
    return alike.values()


def _unmade(
    changes: list[Change],
    scalars: StepScalars,
    members: Sequence[tuple[nn.Parameter, Tensor]],
    standing: Collection[tuple[str, int]],
) -> list[Batch]:
    """Return the changes before the update, without those that an interrupted step has made."""
    if not standing:
        # else gradients aren't gathered
        adds = any(change.kind in _ON_GRADIENTS for change in changes)
        return [Batch(changes, scalars, [(p, grad) if adds else (p,) for p, grad in members])]
    batches = []
    for p, grad in members:
        done = {kind for kind, tensor in (("gradient", grad), ("decay", p)) if (kind, id(tensor)) in standing}
        found = {*done, *_ON_GRADIENTS} if "gradient" in done else done
        left = [change for change in changes if change.kind not in found]
        batches.append(Batch(left, scalars, [(p, grad) if "gradient" not in done else (p,)]))
    return batches


_ALL = ("gradient", "tangent", "decoupled", "cautious", "held", "proximal", "project")
_ON_GRADIENTS = ("gradient", "tangent")


class Stepper:
    """Rules on the parameters of an optimizer, carried out at its steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        works: list[ParameterRules],
        root: Callable[[], nn.Module],
        compile: Compile = "auto",
        folds: bool = True,
    ) -> None:
        self.works, self.root, self.steps = works, root, 0
        self._empty: dict[Handle, int] = {}
        self._by_metric = by_metric(optimizer)
        self._worklist = Worklist(works, root, self._by_metric)
        self._unsure: set[Handle] = set()
        self._executor = Executor(compile)
        self._waits = updates.waits(works)
        self._folding = Folding(optimizer, compile if folds else False)
        self._done: Collection[int] = ()  # ids of the parameters folded in this step
        self._unfinished = Unfinished()
        self._handles = []
        self._looks = looks_before(optimizer)
        self._keeps = self._looks or isinstance(optimizer, torch.optim.SGD | torch.optim.ASGD)  # state of the metric
        self.renew()
        self._seed = agreed_seed() if self._noisy else None
        self._masters = Masters(optimizer, any(w.changes_weights for w in works))
        before = any(w.at("gradient") or w.noise or w.at("decoupled") for w in works)
        before = before or any(w.of("tangent", self._by_metric) for w in works)
        before = before or self._masters.watches or self._waits or bool(self._sharp)
        if before or self._folding.possible or (self._followed and self._looks):
            self._handles.append(optimizer.register_step_pre_hook(self.before))
        self._handles.append(optimizer.register_step_post_hook(self.after))

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def keep_gradients(self) -> None:
        """Fold no more steps: afterwards `.grad` has the gradients of rules, too."""
        self._folding.possible = False

    def renew(self) -> None:
        """Rebuild the list of parameters, after `works` has changed."""
        self._worklist.forget()
        self._followed = {id(work) for work in self.works if work.follows_metric(self._by_metric)}
        self._noisy = any(work.noise for work in self.works)
        self._sharp = [work for work in self.works if work.sharp]
        self._has_joints = any(work.joint for work in self.works)
        self._idle = not self._keeps and all(work.changes_nothing for work in self.works)

    def members(self, optimizer: Optimizer) -> list[Member]:
        """Return the optimizer's parameters with rules: the same list while they are the same."""
        return self._worklist.by(optimizer)

    def due(self, kinds: tuple[str, ...], step: int) -> list[Task]:
        """Return the changes that are due at a step: the same list for the same rules."""
        return self._worklist.tasks(kinds, step)

    def changes_gradients(self, work: ParameterRules) -> bool:
        """Return True if a rule changes the gradient of a parameter."""
        return bool(work.gradient or work.noise or work.of("tangent", self._by_metric))

    def follows(self, work: ParameterRules) -> bool:
        """Return True if the rules on a parameter need the optimizer's metric."""
        return id(work) in self._followed

    def is_alone(self, optimizer: Optimizer) -> bool:
        """Return True if the optimizer has no other hooks, and its parameters are whole."""
        hooks, mine = step_hooks(optimizer), {handle.id for handle in self._handles}
        known = hooks is not None and set(hooks[0]) | set(hooks[1]) <= mine
        return known and not (self._worklist.sharded or self._masters.watches or self._looks)

    def took(self) -> None:
        """Count a step that moved something."""
        self.steps += 1
        if self.steps % 50 == 0:  # seldom, as counting takes a pass over all weights
            self._warn_of_empty()

    def _alone(self, optimizer: Optimizer) -> bool:
        """Return True if no foreign hook is between ours and the step, so folding is unseen."""
        hooks = step_hooks(optimizer)
        if hooks is None:
            return False
        ends = [next(reversed(hooks[0]), None), next(iter(hooks[1]), None)]
        return ends == [handle.id for handle in self._handles]

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], folds: bool = True) -> Any:
        """Add gradients, then decay; with a closure, wrap it, as it needs the weights before decay.

        Each call of the closure adds gradient and value; the decay follows the first call.
        """
        if torch.compiler.is_compiling():
            return eagerly(self.before, optimizer, args, kwargs, folds=False)
        if nested(optimizer):
            return None
        refuse_capture("a step of an optimizer with rules")
        if self._idle and self.steps:
            return None
        self._done = ()
        rest = stand_in(optimizer) if folds and self._folding.possible and self._alone(optimizer) else None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            for what in [what for work in self._sharp for rule, what in work.sharp if rule.due(self.steps)]:
                raise climbing.needs_closure(optimizer, what)
            self._begin(optimizer, ("gradient", "tangent", "decoupled"), rest)
            return ((rest, *args[1:]), kwargs) if self._done else None
        calls = itertools.count()

        def with_penalties() -> Any:
            loss = closure()
            if (rules := climbing.sharp(self._worklist.by(optimizer), self.steps)) and real_step(optimizer):
                climbing.gradient_uphill(rules, optimizer, self.root(), closure)
            if next(calls) == 0:
                added = self._begin(optimizer, ("gradient", "tangent", "decoupled"), rest, with_value=True)
            else:
                added = self._begin(optimizer, ("gradient", "tangent"), with_value=True)
            value = totals([added])[0]
            return loss if loss is None else loss + value.to(loss) if isinstance(loss, Tensor) else loss + float(value)

        kept = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0] if rest is None else rest, with_penalties, *args[2:]), kept

    @torch.no_grad()
    @uncollected()
    def _begin(
        self, optimizer: Optimizer, kinds: tuple[str, ...], rest: Optimizer | None = None, with_value: bool = False
    ) -> list[Term]:
        """Do the changes before the step; return the values of gradient penalties if `with_value`.

        With a stand-in `rest`, also do the folded step, last, so that nothing has moved if a rule
        fails. `rest` keeps the other parameters.
        """
        works = self._worklist.by(optimizer)
        self._masters.look(optimizer, works)
        fold: Fold | Again | None = None
        if rest is not None:
            again = self._unfinished.fold
            fold = again or self._folding(optimizer, self._worklist.tasks(_ALL, self.steps, folds=True), self.steps)
        self._done = () if fold is None else fold.done
        value = self._before(optimizer, works, kinds, with_value)
        self._masters.changed()
        if rest is not None and fold is not None:
            rest.param_groups = fold.run(optimizer)
            self._unfinished.note_fold(fold, rest.param_groups)
        return value

    def _before(
        self, optimizer: Optimizer, works: Sequence[Member], kinds: tuple[str, ...], with_value: bool
    ) -> list[Term]:
        scale, values = getattr(optimizer, "grad_scale", None), list[Term]()
        standing = self._unfinished.standing()  # of an interrupted step, which is called again
        made = [Made("gradient", self._add_noises(works, scale, standing))] if "gradient" in kinds else []
        moves = "decoupled" in kinds and real_step(optimizer)
        joints = self._joints(works)
        for joint, own in joints["gradient"] if "gradient" in kinds else ():
            _refuse_sparse([(work, p) for work, p, _ in own])
            made.append(Made("gradient", add_gradients(joint, own, scale, standing)))
            values += [(joint.value(full(own)), ())] if with_value else []
        batches = []
        for task in self._worklist.tasks(kinds, self.steps):
            members = [(p, grad) for _, p in task.members if (grad := p.grad) is not None]
            if any(grad.is_sparse for _, grad in members):
                _refuse_sparse(task.members)
            adds = [change for change in task.changes if change.kind in _ON_GRADIENTS]
            decays = moves and task.group["lr"] != 0
            if with_value:
                values += [value_of(one.what, p) for p, _ in members for one in adds if one.kind == "gradient"]
            left = [(p, grad) for p, grad in members if id(p) not in self._done] if self._done else members
            scalars, changes = StepScalars(task.group["lr"], scale), task.changes if decays else adds
            batches += _unmade(changes, scalars, left, standing)
            made += [Made("gradient", [grad for _, grad in left])] if adds else []
            made += [Made("decay", [p for p, _ in left])] if len(changes) > len(adds) else []
        self._act(batches)
        made += [Made("decay", decay(*one, standing)) for one in (joints["decoupled"] if moves else ())]
        for one in made:
            one.look()
        self._unfinished.note(made, ("gradient", "decay") if "decoupled" in kinds else ("gradient",))
        if moves and self._looks:
            self._remember(works, scale)
        if self._waits and "decoupled" in kinds:
            others = [member for member in works if id(member[1]) not in self._done] if self._done else works
            updates.remember(optimizer, others if moves else (), self.steps)
        return values

    def _joints(self, works: Sequence[Member]) -> dict[str, list[Together]]:
        """Return the due joint rules on the optimizer's parameters by their kind."""
        found: dict[str, list[Together]] = {"gradient": [], "decoupled": [], "proximal": [], "project": []}
        for one in together(works) if self._has_joints else ():
            if one[0].rule.due(self.steps):
                found[one[0].rule.how].append(one)
        return found

    def _add_noises(
        self, works: Sequence[Member], scale: Tensor | None, standing: Collection[tuple[str, int]]
    ) -> list[Tensor]:
        """Add noise to gradients; return these gradients."""
        if not self._noisy:
            return []
        grads = [(work, grad) for work, p, _ in works if work.noise and (grad := p.grad) is not None]
        for work, grad in grads:
            if ("gradient", id(grad)) not in standing:
                self._add_noise(work, grad, scale)
        return [grad for _, grad in grads]

    def _remember(self, works: Sequence[Member], scale: Tensor | None) -> None:
        """Store weights and gradients before the step, for metrics that need them."""
        for work, p, group in works:
            if id(work) in self._followed and p.grad is not None and group["lr"] != 0:
                if not work.at("proximal") and (p.grad.is_sparse or is_sharded(p) or p.is_complex()):
                    continue  # projected as under SGD
                work.before = (p.clone(), p.grad.clone() if scale is None else p.grad / scale.to(p.grad.dtype))

    def _act(self, batches: Iterable[Batch]) -> None:
        """Carry out changes on their members, of which some may be sharded."""
        batches = [batch for batch in batches if batch.changes and batch.members]
        if not batches:
            return
        if not self._worklist.sharded:
            self._executor(batches, self.steps)
            return
        for batch in batches:
            whole = [tensors for tensors in batch.members if not is_sharded(tensors[0])]
            self._executor([replace(batch, members=whole)], self.steps)
            for tensors in batch.members:
                if is_sharded(tensors[0]):
                    self._act_on_part(batch, tensors)

    def _act_on_part(self, batch: Batch, tensors: Tensors) -> None:
        for whats, parts, _ in acting([change.what for change in batch.changes], *tensors):
            own = [replace(change, what=what) for change, what in zip(batch.changes, whats, strict=True)]
            self._executor([Batch(own, batch.scalars, [tuple(parts)])], self.steps)

    def _add_noise(self, work: ParameterRules, grad: Tensor, scale: Tensor | None) -> None:
        """Add noise to a gradient; equal on all ranks."""
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
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Apply prox, then projection, to every parameter that the step moved."""
        if torch.compiler.is_compiling():
            return eagerly(self.after, optimizer, args, kwargs)  # type: ignore[no-any-return]
        if nested(optimizer):
            return
        self._unfinished.end()
        if real_step(optimizer):
            self.took() if self._idle and self.steps else self._after(optimizer)

    @uncollected()
    def _after(self, optimizer: Optimizer) -> None:
        works = self._worklist.by(optimizer)
        self._masters.check()
        self._masters.look(optimizer, works)
        if self._waits:
            updates.finish(optimizer, works, self.steps, self._act)
        metrics, joints = self._metrics(optimizer, works), self._joints(works)
        for one in joints["proximal"]:
            shrink(*one, metrics, self._act)
        batches = []
        for task in self._worklist.tasks(("proximal", "project"), self.steps):
            for metric, members in _by_metric(task, metrics, self._done):
                changes = task.changes if metric is not None else without_metric(task.changes)
                batches.append(Batch(changes, StepScalars(metric=metric or Metric(0.0)), members))
        self._act(batches)
        for work, p, _ in [one for one in works if one[0].project]:
            constraints = [(rule, constraint) for rule, constraint in work.project if rule.due(self.steps)]
            if constraints and not single(constraints):
                self._hold(work, p, constraints, optimizer.state.get(p, {}), metrics.get(id(p)))
        for one in joints["project"]:
            project(*one)
        self._masters.changed()
        self.took()

    def _hold(
        self, work: ParameterRules, p: Tensor, timed: Timed, state: Mapping[str, Any], metric: Metric | None
    ) -> None:
        """Project onto several constraints, or with tangent momentum.

        Warns once if the point may not be the nearest.
        """
        by = any(in_metric(rule, constraint, self._by_metric) for rule, constraint in timed)
        found = hold(work.handle.name, p, timed, state, metric if by else None)
        if found is not None and not found.sure and found.apart <= APART and work.handle not in self._unsure:
            self._unsure.add(work.handle)
            warnings.warn(not_nearest(work.handle.name, timed), RestrainWarning, stacklevel=level_of_caller())

    def _metrics(self, optimizer: Optimizer, works: Sequence[Member]) -> dict[int, Metric]:
        """Return metrics of moved parameters with proximal rules, also if no rule is due.

        Metrics with state must be updated at each step.
        """
        if not self._followed:
            return {}
        found, measure, shared = dict[int, Metric](), metric_of(optimizer), dict[int, Metric]()
        same: dict[int, dict[Any, Any]] = {id(group): {} for group in optimizer.param_groups}
        shares = {id(group): common(measure, group) for group in optimizer.param_groups}
        for work, p, group in works:
            left = id(work) in self._followed and id(p) not in self._done
            if not left or (grad := p.grad) is None or group["lr"] == 0 or (p.is_complex() and not work.at("proximal")):
                continue
            if grad.is_sparse and work.at("proximal"):
                _refuse_sparse([(work, p)])
            before = None
            if self._looks:
                before, work.before = work.before, None
                if before is None:  # the closure was never called
                    continue
            known = shared.get(id(group))
            if known is None:
                known = measure(Taken(group, optimizer.state[p], p, work.kept, before, same[id(group)]))
                if shares[id(group)]:
                    shared[id(group)] = known
            found[id(p)] = known
        return found

    def _warn_of_empty(self) -> None:
        """Warn once of each weight that proximal rules and constraints have made zero."""
        root = self.root()
        looked = [(work, work.handle.find(root)) for work in self.works if work.at("proximal") or work.at("project")]
        looked = [(work, p) for work, p in looked if p.dim() > 1]
        counts = totals([[(local(p).count_nonzero(), ranks_of(p))] for _, p in looked])
        for (work, _), count in zip(looked, counts, strict=True):
            changes = work.at("proximal") + work.at("project")
            empty = 0 if count else self._empty.get(work.handle, 0) + 1
            self._empty[work.handle] = max(empty, self._empty.get(work.handle, 0))
            if empty == 2:  # twice in a row: weights may begin at zero
                warnings.warn(
                    f"after {self.steps} steps {work.handle.name!r} is all zeros, by {[what for _, what in changes]}: "
                    "the layer gives nothing but its bias; a smaller strength would keep some of it",
                    RestrainWarning,
                    stacklevel=level_of_caller(),
                )
