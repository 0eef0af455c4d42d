"""A plan that is bound to a model: its hooks are put, follow the model, and are taken away."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.declare import declared_rules
from restrain.engine.attach import report
from restrain.engine.attach.conflicts import join, leave
from restrain.engine.attach.installation import Hooks
from restrain.engine.attach.structure import Look, Structure
from restrain.engine.attach.tracking import Tracker
from restrain.engine.attach.tripwire import Tripwire, UnknownOptimizers, Untrained
from restrain.engine.backends import Compile
from restrain.engine.binding import (
    LossRules,
    Unwrapped,
    at_steps,
    bind,
    check_optimizers,
    followed,
    noisy,
    parametrized,
    whereabouts,
)
from restrain.engine.distributed import ranks, shards
from restrain.engine.forward import Forwards, Parts, Point, forget_compiled_code
from restrain.engine.step import (
    Clock,
    ParameterRules,
    Replayed,
    Stepper,
    ascend,
    can_be_replayed,
    check_alone,
    hold_from_now,
    project_from_now,
)
from restrain.engine.strengths import Strengths
from restrain.engine.weights import Parametrized, WeightNoise
from restrain.errors import DetachedError
from restrain.garbage import uncollected
from restrain.layouts import attach_layouts
from restrain.named_tensors import Handle
from restrain.plans import Plan
from restrain.rules import Rule, What
from restrain.transforms import GradientNoise, Hyperball, MomentumSharpness, Noise, Sharpness
from restrain.transforms.activation import AtLayer

# Layers whose declared rules belong to an existing attachment; another doesn't count them again.
claimed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# The attachments that aren't detached, by the order in which they were made.
attached: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_order = itertools.count()


class Installed:
    """Rules bound to a model and installed; references the model weakly."""

    _tracker: Tracker | None = None
    _replayed: Replayed | None = None
    _number = -1

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        given: list[Unwrapped],
        declaring: list[nn.Module],
        declared: list[Rule],
        compile: Compile,
        flattened: Collection[int] = (),
    ) -> None:
        self._begin(model, plan, given, declaring, declared, compile, flattened)
        self._register()

    def _register(self) -> None:
        self._number = next(_order)
        attached[self._number] = self

    def _begin(
        self,
        model: nn.Module,
        plan: Plan,
        given: list[Unwrapped],
        declaring: list[nn.Module],
        declared: list[Rule],
        compile: Compile,
        flattened: Collection[int] = (),
    ) -> None:
        """Bind the plan and install its hooks."""
        self.compile, self._given = compile, [weakref.ref(one.outer) for one in given]
        optimizers, counting = [one.optimizer for one in given], [one.counts for one in given]
        self._model, self._optimizers = weakref.ref(model), [weakref.ref(optimizer) for optimizer in optimizers]
        self._layouts = plan.layouts
        attach_layouts(model, plan.layouts)
        self._bounds = bind(plan, model, compile, flattened)
        check_optimizers(self._bounds, model, given)
        report.note_gathered(self._bounds, model)
        self._forwards, self._detached = Forwards(), False
        self._hooks = Hooks(self._forwards)
        self._declaring, self._declared = [weakref.ref(module) for module in declaring], declared
        self._loss_rules = [b for b in self._bounds if b.rule.how == "loss" and (b.parameters or b.recorders)]
        self._on_parameters = LossRules(self._loss_rules)
        beside = [other for one in given for other in one.beside]
        self._clock = Clock(self._model, counting, self._keep_up, beside)
        self._tripwire = Tripwire(self._loss_rules, self._forwards, self._clock)
        self._parametrized, self._weight_noise, self._parts = Parametrized(), WeightNoise(), Parts()
        self._strengths, self._steppers, self._rate_hooks = Strengths(self._bounds), list[Stepper](), list[Any]()
        self._keeping = [(what, handle) for _, _, what, handle in self._keepers()]
        self._works = list[ParameterRules]()  # rules at steps, shared by the steppers
        self._surgery = threading.RLock()
        claimed.update(declaring)
        try:
            self._install(model, optimizers, [*counting, *beside], compile)
        except BaseException:  # warnings as errors, an exception in a user's projection
            self.detach()  # remove all hooks
            raise
        self._structure, self._whereabouts = Structure(model), whereabouts(self._bounds, model)
        self._looked = False  # the structure was compared since the last step

    def _install(self, model: nn.Module, optimizers: list[Optimizer], known: list[Optimizer], compile: Compile) -> None:
        """Register all hooks; project constrained parameters now."""
        self._parametrized.begin(parametrized(self._bounds), model)
        self._begin_parts(model)
        self._hooks.put(self._bounds, model, bool(self._loss_rules), lambda: self._clock.steps)
        self._weight_noise.begin(noisy(self._bounds), model)
        self._listen()
        if self._hooks.at_layers or self._weight_noise.hooks:
            forget_compiled_code()
            self._hooks.first(Look(lambda module: self._look(module, begins=True)), model)
        self._attach_steps(model, optimizers, known, compile)
        noises = [b for b in self._bounds if isinstance(b.rule.what, Noise) and (b.points or b.noisy)]
        if any(not isinstance(bound.rule.what, MomentumSharpness) for bound in noises):
            ranks.warn_of_shared_random_state()

    def _begin_parts(self, model: nn.Module) -> None:
        points = [s for b in self._bounds for s in (*b.points, *(w.point for w in b.recorders))]
        self._parts.begin(points, model)

    def _listen(self) -> None:
        """Connect to beginnings of forwards and to real steps of the optimizers."""
        self._forwards.began, self._forwards.root = self._clock.end, self._model
        self._clock.on_step.append(self._stepped)
        self._clock.on_real += [self._tripwire.after] * bool(self._loss_rules)
        self._clock.on_real += [self._parametrized.watch(lambda: self._clock.steps)] * bool(self._parametrized)
        self._clock.on_real += [self._weight_noise.after] * bool(self._weight_noise.hooks)
        learning = [(point.name, what.parameters()) for point, what in self._activations() if what.parameters()]
        self._clock.on_real += [Untrained(learning, lambda: self._clock.steps).after] * bool(learning)
        self._clock.on_real += [ascend(b) for b in self._bounds if isinstance(b.rule.what, MomentumSharpness)]

    def _attach_steps(
        self, model: nn.Module, optimizers: list[Optimizer], known: list[Optimizer], compile: Compile
    ) -> None:
        """Install the rules at optimizer steps; project constrained parameters now."""
        self._works += self._rules_at_steps(model)
        join(self, self._works, model, optimizers)
        if self._strengths.follow_rates:
            self._rate_hooks = [one.register_step_pre_hook(self._follow_rates) for one in optimizers]
        if self._works:
            folds = not self._strengths.by_gradients
            self._steppers = [Stepper(one, self._works, self._model_at_step, compile, folds) for one in optimizers]
            self._clock.on_real.append(UnknownOptimizers(known, self._works).after)
        together = project_from_now([bound.joint for bound in self._bounds if bound.joint is not None], model)
        held = [(work.handle.find(model), work.handle.name, [*work.project, *work.held]) for work in self._works]
        notes = together | hold_from_now(held)
        for bound in self._bounds:
            bound.notes += notes.get(bound.key, [])

    def _follow_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Update strengths that follow the learning rate, before a step."""
        with torch.no_grad():
            self._strengths.before(optimizer, self.model)

    def _rules_at_steps(self, model: nn.Module) -> list[ParameterRules]:
        """Return the rules at the optimizer's step, by parameter."""
        works: dict[str, ParameterRules] = {}
        for bound in self._bounds:
            if bound.joint is not None and bound.rule.how != "loss":
                for handle in bound.joint.handles:
                    works.setdefault(handle.name, ParameterRules(handle)).joint.append(bound.joint)
            elif bound.rule.how in ("gradient", "decoupled", "proximal", "project"):
                kind = _kind_at_steps(bound.rule)
                for handle, what in at_steps(bound, model):
                    if handle.name not in works:
                        works[handle.name] = ParameterRules(handle)
                    getattr(works[handle.name], kind).append((bound.rule, what))
        check_alone(works.values())
        return list(works.values())

    def _stepped(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Note a step of an optimizer that was given or trains the model."""
        self._forwards.stepped()
        self._looked = False

    def _model_at_step(self) -> nn.Module:
        """Return the model at a step, after comparing its structure if no loss or forward has."""
        model = self.model
        if not self._looked:
            self._look(model)
        return model

    def _as_it_is(self) -> nn.Module:
        """Return the model, after adapting the rules to its current structure."""
        model = self.model
        self._look(model)
        return model

    def _look(self, model: nn.Module, begins: bool = False) -> None:
        """Adapt the rules if layers or tensors of the model have changed.

        Args:
            model: the model; a replica of it (`DataParallel`) is ignored.
            begins: True if a forward of the model begins, which calls its current layers.

        Raises:
            DetachedError: rules can't be adapted.
        """
        if model is self._model() and not self._detached:
            if self._structure.changed():
                with self._surgery, uncollected():
                    if self._structure.changed():
                        self._follow(model, begins)
            self._looked = True

    def _follow(self, model: nn.Module, begins: bool) -> None:
        """Bind rules again to the current model and move hooks to other layers; state stays."""
        if declared_rules(model, skip=claimed - set(filter(None, (r() for r in self._declaring))))[0] != self._declared:
            raise DetachedError(
                "declarations at the model's layers (rs.regularized, rs.scope) are others than when the rules were "
                "attached: after such a change write reg.detach(), then rs.attach(model, plan, optimizer)"
            )
        changes = followed(self._bounds, model, self._whereabouts)
        moves = self._hooks.moves({old: new for one in changes for old, new in one.paths.items()}, model)
        needed = [move for move in moves if move.needed]
        if (needed or self._weight_noise.moves(model)) and self._forwards.ran and not begins:
            raise DetachedError(
                "layers with rules were replaced since the last forward began, or in a compiled model, which passes "
                "the rules by: write reg.detach(), then rs.attach(model, plan, optimizer) after the change"
            )
        for change in changes:
            change.adopt()
        self._hooks.move(moves)
        self._weight_noise.move(noisy(self._bounds), model)
        if needed and self._parts.handles:
            self._parts.end()
            self._begin_parts(model)
        self._renew(model)

    def _renew(self, model: nn.Module) -> None:
        """Rebuild the caches that depend on bound rules."""
        self._on_parameters = LossRules(self._loss_rules)
        self._forwards.overridden.handles = [h for b in self._loss_rules for h, _ in b.parameters]
        self._keeping = [(what, handle) for _, _, what, handle in self._keepers()]
        metrics = {work.handle.name: work.kept for work in self._works}
        self._works[:] = self._rules_at_steps(model)
        for work in self._works:
            work.kept = metrics.get(work.handle.name, {})
        for stepper in self._steppers:
            stepper.renew()
        if self._tracker is not None:
            self._tracker.renew()
        self._structure.remember(model)
        self._whereabouts = whereabouts(self._bounds, model)

    @property
    def model(self) -> nn.Module:
        """The model, without wrappers.

        Raises:
            DetachedError: it no longer exists.
        """
        model = self._model()
        if model is None:
            raise DetachedError("the model of this attachment doesn't exist any more; attach the plan to the new one")
        return model

    def belongs_to(self, model: nn.Module) -> bool:
        """Return True if the rules are attached to a model, given without wrappers."""
        return self._model() is model

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers as given; those that no longer exist are left out."""
        return [one for reference in self._given if (one := reference()) is not None]

    @property
    def tracker(self) -> Tracker | None:
        """What fills the history; None if nothing is tracked."""
        return self._tracker

    @property
    def plan(self) -> Plan:
        """The plan as bound, with every selection as a list of names."""
        return Plan(tuple(bound.rule for bound in self._bounds), self._layouts)

    def _activations(self) -> Iterator[tuple[Point, AtLayer]]:
        """Yield the activation functions of the rules, each with its place."""
        for bound in self._bounds:
            for point, what in bound.transforms:
                if isinstance(what, AtLayer):
                    yield point, what

    def _keepers(self) -> Iterator[tuple[str, dict[str, Tensor], What, Handle | None]]:
        """Yield (name, tensors, what, handle or None) for every bound object with state."""
        for bound in self._bounds:
            acting: list[tuple[str, Any, Handle | None]] = [(h.name, what, h) for h, what in bound.parameters]
            acting += [(recorder.point.key, recorder.penalty, None) for recorder in bound.penalty_recorders]
            acting += [(point.key, what, None) for point, what in bound.transforms if isinstance(what, AtLayer)]
            states = {id(what): what.state() for what in {id(what): what for _, what, _ in acting}.values()}
            for name, what, handle in acting if any(states.values()) else ():
                if states[id(what)]:
                    yield f"{bound.key}: {name}", states[id(what)], what, handle

    def _keep_up(self, root: nn.Module) -> None:
        """Track a training step, then update the state of rules and moving strengths."""
        if self._tracker is not None:
            self._tracker.stepped(self._clock.steps, root)
        if self._keeping or self._strengths.bounds:
            with torch.no_grad():
                for what, handle in self._keeping:
                    what.stepped(None if handle is None else shards.whole(handle.find(root)))
                self._strengths.stepped(self._clock.steps, self._clock.epochs, root)

    def replayed(self, optimizer: Optimizer) -> Replayed | None:
        """Return the rules at the steps of an optimizer whose update the caller carries out.

        None if rules do more than decay, prox and projection with fixed strengths, or if others
        are at the optimizer's hooks: then its own `step` must be called.
        """
        changing = self._keeping or self._strengths.bounds or self._rate_hooks or self._tracker is not None
        listeners = len(self._clock.on_real) - bool(self._loss_rules)  # besides the check of optimizers
        steppers = self._steppers if len(self._optimizers) == 1 and self._optimizers[0]() is optimizer else []
        if not steppers or changing or listeners > 1 or not can_be_replayed(steppers[0], optimizer):
            return None
        if self._replayed is None:
            self._replayed = Replayed(steppers[0], optimizer, self.compile, lambda: self._clock.took(optimizer))
        return self._replayed

    def detach(self) -> None:
        """Remove every hook and restore the model. Further calls do nothing."""
        self._hooks.remove()
        self._parts.end()
        for hook in (*self._rate_hooks, *self._steppers):
            hook.remove()
        model = self._model()
        self._weight_noise.end()
        if model is not None:
            self._parametrized.end(model)
        self._clock.remove()
        for module in filter(None, (reference() for reference in self._declaring)):
            claimed.discard(module)
        self._steppers, self._replayed, self._detached = [], None, True
        attached.pop(self._number, None)
        leave(self)
        self._forwards.clear()


def _kind_at_steps(rule: Rule) -> str:
    """Return the list of `ParameterRules` that a rule at the optimizer's step enters."""
    for cls, kind in ((GradientNoise, "noise"), (Sharpness, "sharp"), (Hyperball, "held")):
        if isinstance(rule.what, cls):
            return kind
    return "cautious" if rule.cautious else rule.how
