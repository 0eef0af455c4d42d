"""Attaching a plan to a model, and the object that a user holds while training."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.declare import declared_rules
from restrain.engine.attach import report, resampling
from restrain.engine.attach.certificate import Certificate, certify
from restrain.engine.attach.conflicts import join, leave
from restrain.engine.attach.evaluation import Evaluation, latest
from restrain.engine.attach.facts import contents_of, same_parameters
from restrain.engine.attach.groups import Penalised, penalised
from restrain.engine.attach.history import History
from restrain.engine.attach.installation import Hooks
from restrain.engine.attach.state import (
    VERSION,
    DetachedAttachment,
    by_new_names,
    checked,
    fill,
    metric_names,
    split_history,
)
from restrain.engine.attach.stationarity import Loss, Objective, as_found
from restrain.engine.attach.structure import Look, Structure
from restrain.engine.attach.tracking import POINTS, Tracker, checked_track
from restrain.engine.attach.tripwire import Tripwire, UnknownOptimizers, Untrained
from restrain.engine.backends import Compile
from restrain.engine.binding import (
    LossRules,
    Unwrapped,
    at_steps,
    bind,
    check_optimizers,
    followed,
    given_optimizers,
    network_value,
    noisy,
    parametrized,
    whereabouts,
)
from restrain.engine.core import Root, eagerly, refuse_capture
from restrain.engine.distributed import ranks, shards
from restrain.engine.forward import Forwards, Parts, Point, forget_compiled_code
from restrain.engine.step import (
    Clock,
    ParameterRules,
    Stepper,
    ascend,
    check_alone,
    hold_from_now,
    project_from_now,
)
from restrain.engine.strengths import Strengths
from restrain.engine.weights import Parametrized, WeightNoise, refuse_wrapped
from restrain.errors import DetachedError, PenaltyError, PlanError
from restrain.fields import check_flags
from restrain.garbage import uncollected
from restrain.html_table import html_table
from restrain.layouts import attach_layouts
from restrain.named_tensors import Handle, checked_module, device_of, unwrap
from restrain.penalties import NetworkPenalty
from restrain.plans import Plan
from restrain.report import Content, write
from restrain.rules import Rule, What
from restrain.transforms import GradientNoise, Hyperball, MomentumSharpness, Noise, Sharpness
from restrain.transforms.activation import AtLayer

# Layers whose declared rules belong to an existing attachment; another doesn't count them again.
_claimed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# The attachments that aren't detached, by the order in which they were made.
_attached: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
_order = itertools.count()


def attach(
    model: nn.Module,
    plan: Any = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    compile: Compile = "auto",
    track: int | None = None,
) -> Attachment:
    """Bind a plan and the rules declared by layers to a model and its optimizer.

    Args:
        model: any module, also inside wrappers (compiled, DDP). It isn't wrapped or changed.
        plan: rules made by `.on(...)`, text forms, dicts, a `Plan`, or a list of these.
        optimizer: the optimizer that trains the model, a list of them, or None if no rule acts at
            the optimizer's step.
        compile: whether rules at the optimizer's step are compiled, together with the update of
            SGD, Adam or AdamW if possible: True, False, or "auto", after as many steps as make up
            for the compiling. Results differ by rounding. Without a compiler, nothing is compiled.

    Returns:
        The attachment; also a context manager that detaches at its end.

    Raises:
        SelectionError: a rule matches nothing.
        HowError, OptimizerError, NoProxError: a rule that can't be carried out as written.
        PlanError: nothing to attach; an invalid `compile` or `track`.

    >>> model = nn.Linear(3, 2)
    >>> with rs.attach(model, 0.1 * rs.L2().on("weight")) as reg:
    ...     loss = reg.loss(model(torch.randn(4, 3)).square().mean())
    """
    checked_module(model)
    if compile != "auto" and not isinstance(compile, bool):
        raise PlanError(f"compile= is True, False or 'auto', got {compile!r}")
    if track is not None:
        checked_track(track)
    declared, modules = declared_rules(model, skip=_claimed)
    rules = Plan.of(plan) + Plan(tuple(declared))
    refuse_wrapped(model, rules)
    if not len(rules):
        raise PlanError("nothing to attach: the plan is empty and no layer of the model declares a rule")
    with uncollected(), torch.inference_mode(False):  # training goes on with the tensors that are made here
        flat = shards.flattened(model)
        reg = Attachment(unwrap(model), rules, given_optimizers(optimizer), modules, declared, compile, flat)
    if track is not None:
        reg.track(track)
    return reg


def attached_to(model: nn.Module) -> list[Attachment]:
    """Return the attachments of a model, or of the model in a wrapper, as they were made."""
    root = unwrap(model)
    return [reg for _, reg in sorted(_attached.items()) if reg.belongs_to(root)]


def continued(
    reg: Attachment, model: nn.Module, plan: Plan, optimizer: Optimizer | None, state: Mapping[str, Any]
) -> Attachment:
    """Return an attachment that goes on for a copy of a model where another one stands.

    Args:
        reg: the other attachment.
        model: the copy, whose tensors may have other shapes.
        plan: the rules for the copy, with the keys of `reg`.
        optimizer: the copy's optimizer, or None.
        state: the state of `reg`, with tensors of the copy's shapes.
    """
    declared, modules = declared_rules(model, skip=_claimed)
    with uncollected(), torch.inference_mode(False):
        new = Attachment(unwrap(model), plan, given_optimizers(optimizer), modules, declared, reg.compile)
    try:
        new.take_over(reg.tracker, state)
    except BaseException:
        new.detach()
        raise
    return new


def _kind_at_steps(rule: Rule) -> str:
    """Return the list of `ParameterRules` that a rule at the optimizer's step enters."""
    for cls, kind in ((GradientNoise, "noise"), (Sharpness, "sharp"), (Hyperball, "held")):
        if isinstance(rule.what, cls):
            return kind
    return "cautious" if rule.cautious else rule.how


@dataclass(frozen=True)
class BoundRule:
    """A bound rule: its key in `values()`, the names it acts on, and whether it has a value."""

    key: str
    rule: Rule
    names: tuple[str, ...]
    is_penalty: bool
    points: tuple[Point, ...] = ()
    """The activations among what it acts on."""


class Attachment:
    """A plan bound to a model. Made by `attach`; references the model weakly."""

    _tracker: Tracker | None = None
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
        _attached[self._number] = self

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
        _claimed.update(declaring)
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
        if (
            declared_rules(model, skip=_claimed - set(filter(None, (r() for r in self._declaring))))[0]
            != self._declared
        ):
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

    def loss(self, loss: Tensor, *, share: float | Tensor = 1.0) -> Tensor:
        """Return data loss + every penalty with how="loss", in full: a scalar for backward().

        Scale the result when you accumulate gradients: `reg.loss(l) / 4`. In evaluation (`eval()`,
        `no_grad()`) penalties on parameters are added; penalties on activations aren't measured.

        Args:
            loss: the scalar data loss.
            share: the part of the penalties to add: 1/4 if four losses are accumulated that are
                already divided by the number of items of all four.

        Raises:
            NeverFiredError: the forward never called a layer with rules.
            PenaltyError: the loss isn't a scalar.
            DetachedError: the rules were detached.
        """
        if torch.compiler.is_compiling():  # the whole step is compiled
            return eagerly(self.loss, loss, share=share)  # type: ignore[no-any-return]
        refuse_capture("a loss with rules")
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PenaltyError(
                f"reg.loss takes the scalar data loss, got {came}: average it first, as in losses.mean()"
            )
        if self._tracker is not None:
            self._tracker.collect(loss, share, self._clock.steps)
        all_of_it = isinstance(share, float | int) and share == 1
        direct, hidden = self._terms(loss if all_of_it else loss / share)
        for term, factor in direct:
            own = (term if isinstance(share, float | int) else share * term).to(loss.device)
            loss = torch.add(loss, own, alpha=factor * (share if isinstance(share, float | int) else 1))
        if not hidden:
            return loss
        value, write = self._hidden(hidden, loss, share)
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return Root.apply(loss, share * value, write)  # type: ignore[no-untyped-call, no-any-return]

    def penalty(self) -> Tensor:
        """Return the sum of penalties with how="loss", a differentiable scalar for the loss.

        In compiled models and inside reentrant checkpoints, the gradient of penalties on
        activations is computed in the backward of the data loss: there, add it to that loss and
        call `backward()` on the sum; `reg.loss` always works.
        """
        if torch.compiler.is_compiling():
            return eagerly(self.penalty)  # type: ignore[no-any-return]
        direct, hidden = self._terms()
        total = torch.zeros((), dtype=torch.float32, device=device_of(self.model))
        if direct:
            total = direct[0][0] * direct[0][1]
            for term, factor in direct[1:]:
                total = torch.add(total, term.to(total.device), alpha=factor)
        if not hidden:
            return total
        value, write = self._hidden(hidden, total)
        anchor = total if total.requires_grad else total.detach().clone().requires_grad_(torch.is_grad_enabled())
        return Root.apply(anchor, value, write)  # type: ignore[no-untyped-call, no-any-return]

    def _terms(self, loss: Tensor | None = None) -> tuple[list[tuple[Tensor, float]], list[Any]]:
        """Return the due terms of the loss.

        They are pairs (value with its graph, factor), and collected values without a graph.
        """
        model = self.model
        self._look(model)
        if (
            torch.is_grad_enabled() and not self._forwards.recorders
        ):  # values of a forward have the strength of that time
            self._clock.end()
        if self._detached:
            raise DetachedError(
                "these rules were detached: attach the plan again, rs.attach(model, reg.plan, optimizer)"
            )
        if not self._loss_rules:
            return [], []
        self._tripwire.collected = self._tripwire.collected or torch.is_grad_enabled()
        due = {bound.key: bound for bound in self._loss_rules if bound.rule.due(self._clock.steps)}
        on_parameters = self._on_parameters.value(model, due)
        terms = [] if on_parameters is None else [on_parameters]
        recorded = self._collect(loss)
        for bound in due.values():
            if isinstance(bound.rule.what, NetworkPenalty) and (recorded or not bound.output_recorders):
                terms.append(network_value(bound, model, self._forwards.outputs.get(bound.key, {})))
                for recorder in bound.output_recorders[:1]:
                    recorder.remember([(terms[-1].detach(), 1.0)])
        derived = [b.derivative.value(model, loss) for b in due.values() if b.derivative is not None and recorded]
        terms += [term for term in derived if term is not None]
        seen = [one.due(due) for one in self._forwards.current] if recorded else []
        collected = [one for one in seen if one is not None]
        factors = [(term, 1.0) for term in terms]
        factors += [(one.direct, one.factor) for one in collected if one.direct is not None]
        return factors, [one for one in collected if one.hidden is not None]

    def _collect(self, loss: Tensor | None) -> bool:
        """Collect the forwards that count for a loss; False if there are none, as in evaluation."""
        if self._forwards.recorders and self.model.training and torch.is_grad_enabled():
            return self._forwards.collect(loss)
        return False

    def _hidden(self, hidden: list[Any], joins: Tensor, share: float | Tensor = 1.0) -> tuple[Any, Any]:
        """Return the value of penalties with injected gradients, and a function for backward.

        Backward calls it with the gradient of the value, and at its end with None.
        """

        def write(gradient: Tensor | None) -> None:
            if self._detached and any(one.recorder.rooted for one in hidden):
                raise DetachedError(
                    "the rules were detached before backward(), which recomputes a checkpoint without them"
                )
            if gradient is None:
                self._forwards.empty_cells()
            else:
                self._forwards.fill_cells(hidden, gradient * share)

        value = sum([one.hidden for one in hidden])
        return value.to(joins.device, joins.dtype) if isinstance(value, Tensor) else value, write

    def values(self) -> dict[str, float]:
        """Return {rule: strength × value} of every penalty, computed now.

        For a penalty on activations it is the last collected value; nan before the first.
        """
        return report.values(self._bounds, self._as_it_is(), self._forwards)

    def measure(self, data_loss: Tensor | None = None) -> dict[str, report.Measure]:
        """Return each penalty's value, the norm of its gradient over all parameters, and its share.

        Args:
            data_loss: if given, its gradient's norm is part of the shares, under the key "data";
                call `measure` before backward(); the graph is kept.

        Raises:
            PenaltyError: a backward has freed the graph of the last forward, and with it that of a
                penalty on activations.
        """
        model = self._as_it_is()
        self._collect(data_loss)
        return report.measure(self._bounds, model, self._forwards, data_loss)

    @property
    def rules(self) -> list[BoundRule]:
        """The bound rules: key, rule, and names it acts on."""
        return [
            BoundRule(bound.key, bound.rule, tuple(bound.names), bound.is_penalty, tuple(bound.points))
            for bound in self._bounds
        ]

    def latest(self) -> dict[str, Tensor]:
        """Return {rule: strength × value} of every penalty as tensors, without synchronising.

        For a penalty on activations it is the last collected value; zero before the first.
        """
        return latest(self._bounds, self._as_it_is())

    @contextmanager
    def evaluating(self) -> Iterator[Evaluation]:
        """Return a context that measures rules in evaluation, even on activations.

        `reg.loss` leaves activations out there.

        >>> model = nn.Linear(3, 2)
        >>> reg = rs.attach(model, rs.L2().on(rs.outputs(), name="h"))
        >>> with reg.evaluating() as evaluation:
        ...     h = model.eval()(torch.ones(4, 3))
        ...     value = evaluation.values()["h"]
        >>> bool(value.isclose(h.square().sum(1).mean()))
        True
        """
        with Evaluation(self._bounds, self._as_it_is()).attached() as evaluation:
            yield evaluation

    def certificate(
        self,
        loss: Loss,
        *,
        polish: bool = False,
        step: float | None = None,
        steps: int = 1000,
        tolerance: float | None = None,
    ) -> Certificate:
        """Return how far the trained tensors are from a stationary point of data loss + rules.

        For every tensor under a penalty with a prox or a convex constraint, whatever its `how`, the
        residual is max |w - prox(w - t ∇, t)| / t with ∇ the gradient of the data loss and of all
        other rules. It doesn't grow with t, and for small t it is the distance from -∇ to the
        penalties' subdifferential. For decoupled rules, which minimise something else under most
        optimizers, it is still that of data loss + rules.

        The model is in eval() meanwhile, without noise, so batch normalisation has its running
        statistics. Modes, `.grad`, buffers and random states are as before afterwards.

        Args:
            loss: a function without arguments that runs the model on the data and returns the
                scalar data loss. It is called three times and must give the same each time.
            polish: first take full-batch proximal steps on all trained tensors (of the given
                optimizers, if any), until the residual is at most 0.02 of each rule's strength.
            tolerance: another residual at which polishing ends.
            step: t; None for 1/1000 of max |w| / max |∇|. Under penalties that aren't convex t is
                less than 1/r, where penalty + r/2 ‖w‖² is (of strength · MCP, r = strength / knee):
                then the map moves no stationary point, be it a minimum or not.
            steps: the most steps of `polish`; a warning says if they didn't do.

        Raises:
            PenaltyError: the loss is random, has no graph, or isn't a scalar.
            NoProxError: no rule has a prox or a convex set.
            PlanError: an invalid setting, or a step of 1/r or more.
            HowError: sharded parameters, rules with `every`, penalties on derivatives.

        Source: Beck and Teboulle (2009), eq. 1.4 and 2.6 for the map; Nesterov (2013) for its norm.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> reg = rs.attach(model, 3.0 * rs.L1().on("weight", name="l1"))
        >>> x, y = torch.ones(4, 1), 5 * torch.ones(4, 1)
        >>> cert = reg.certificate(lambda: (model(x) - y).square().mean(), polish=True)
        >>> model.weight.item(), cert.rules["l1"].residual < 0.06
        (3.5, True)
        """
        check_flags(PlanError, polish=polish)
        if self._detached:
            raise DetachedError("these rules were detached: attach the plan again, rs.attach(model, reg.plan)")
        model = self._as_it_is()
        given = [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]
        trained = {id(p) for optimizer in given for group in optimizer.param_groups for p in group["params"]}
        objective = Objective.of(self._bounds, model, loss, trained or None)
        return certify(objective, polish, step, steps, tolerance)

    def gradients(self, loss: Loss) -> dict[str, Tensor]:
        """Return the gradient of data loss + rules without a prox at each trained tensor, by name.

        Taken as for `certificate`, in float64. `.grad` stays as it is.

        Args:
            loss: see `certificate`.
        """
        objective = Objective.of(self._bounds, self._as_it_is(), loss, None)
        with as_found(objective.model):
            objective.check()
            return dict(zip(objective.names, objective.evaluate()[2], strict=True))

    def penalised(self) -> list[Penalised]:
        """Return the trained tensors and units under penalties, with their groups."""
        return penalised(self._bounds, self._as_it_is())

    def track(self, every: int = 10, *, points: int = POINTS, shares: bool = False) -> History:
        """Keep a history with a row for each k-th step, and return it; also `attach(track=k)`.

        Columns: "step"; "data_loss", the mean of the losses that `reg.loss` got since the step
        before (nan without any), of this process; "penalties/<rule>", strength × value;
        "strengths/<rule>"; and of each tensor under a rule "norms/<name>", and as fractions
        "zeros/<name>" (entries), "zero_groups/<name>" (of its first rule by group) and
        "dead/<name>" (units without an incoming weight that isn't zero). The loss is of the weights
        before the step, penalties on activations too, everything else of those after it.

        Steps that don't count (skipped by a loss scaler, learning rate zero) have no row. The
        history is in `reg.state_dict()`, goes on after `load_state_dict`, and can be read after
        `detach`. Called again, it goes on with other settings.

        Args:
            every: k.
            points: the greatest number of rows; when they are full, every second one goes and k
                doubles.
            shares: also measure "shares/<rule>" of penalties on single parameters:
                ‖g‖ / (‖g‖ + ‖r‖), g the rule's gradient, r the rest of `.grad` after the step.
                This waits for the device, and steps aren't folded with rules, which changes
                results by rounding.

        Raises:
            PlanError: `every` or `points` isn't a whole number, at least 1 and 2.
            DetachedError: the rules were detached.

        >>> model = nn.Linear(3, 2)
        >>> reg = rs.attach(model, rs.L1().on("weight", name="l1"))
        >>> reg.track(every=5)
        <History of 0 tracked steps, 2 columns>
        """
        checked_track(every, points)
        check_flags(PlanError, shares=shares)
        if self._detached:
            raise DetachedError("these rules were detached, and no step is seen any more: attach the plan again")
        if self._tracker is None:
            self._tracker = Tracker(self._bounds, History(every, points))
        self._tracker.history.change(every, points)
        self._tracker.shares = shares
        for stepper in self._steppers if shares else ():
            stepper.keep_gradients()
        return self._tracker.history

    @property
    def history(self) -> History:
        """The history of tracked steps.

        Raises:
            PlanError: nothing is tracked.
        """
        if self._tracker is None:
            raise PlanError(
                "there is no history, as no step is tracked: write rs.attach(..., track=10), or reg.track(every=10)"
            )
        return self._tracker.history

    @property
    def tracks(self) -> bool:
        """True if there is a history."""
        return self._tracker is not None

    def forget(self) -> None:
        """Forget all forwards since the last step, as if they had never run."""
        self._forwards.clear()
        self._tripwire.collected = self._forwards.ran = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that rules learn: lengths of `WeightNormalization`, thresholds."""
        yield from self._parametrized.learned()
        for _, what in self._activations():
            yield from what.parameters()

    def _activations(self) -> Iterator[tuple[Point, AtLayer]]:
        """Yield the activation functions of the rules, each with its place."""
        for bound in self._bounds:
            for point, what in bound.transforms:
                if isinstance(what, AtLayer):
                    yield point, what

    def tokens_since_fired(self) -> dict[str, Tensor]:
        """Return {layer: tokens since each unit was active} of activation functions that rules put.

        Whole numbers, (units,), of training forwards up to the last optimizer step, over all
        processes, all of which must call this; of no length before the first step. A unit is dead
        if its number is large.

        >>> sae = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> reg = rs.attach(sae, rs.TopK(2).on(rs.outputs("1")))
        >>> dead = reg.tokens_since_fired()["1"] > 1_000_000
        """
        self._clock.end()
        return {point.key: what.counts.idle.clone() for point, what in self._activations()}

    def resample(
        self, code: str, x: Tensor, losses: Tensor, *, encoder: str, decoder: str, dead_after: int, scale: float = 0.2
    ) -> int:
        """Begin anew with the dead units of a sparse autoencoder; return their number.

        Each dead unit gets an input that is reconstructed badly: drawn with a probability ∝ loss²,
        normalised. It becomes the unit's decoder weights, and, times `scale` times the mean norm of
        the other units' encoder weights, its encoder weights; its bias becomes zero, a learned
        threshold the first one. Optimizer state of these entries becomes zero, and the unit's count
        begins anew. Call it between `optimizer.step()` and the next forward, on all processes,
        which get what process 0 draws.

        Args:
            code: the layer with the activation function, as in `tokens_since_fired()`.
            x: inputs of the encoder, (samples, features).
            losses: the reconstruction errors of these samples, (samples,).
            encoder: the name of the encoder, an nn.Linear.
            decoder: the name of the decoder, an nn.Linear.
            dead_after: the number of tokens after which a unit is dead.

        Raises:
            PlanError: no activation function of a rule is at this layer.
            HowError: a layer that isn't an nn.Linear, or is sharded.
            PenaltyError: shapes that don't fit, or losses that can't be weights.

        Source: Bricken and others (2023), Towards monosemanticity, appendix "neuron resampling".
        """
        counted = {point.key: what for point, what in self._activations()}
        idle = self.tokens_since_fired().get(code)
        if idle is None:
            raise PlanError(
                f"no rule counts at {code!r}; {', '.join(map(repr, counted)) or 'no layer'} has an activation function "
                "that a rule put (rs.TopK, rs.BatchTopK, rs.JumpReLU, rs.Firings)"
            )
        model, dead = self._as_it_is(), idle >= dead_after
        if not bool(dead.any()):
            return 0
        optimizers = [one for reference in self._optimizers if (one := reference()) is not None]
        resampling.begin_anew(model, counted[code], dead, (x, losses), (encoder, decoder), optimizers, scale)
        return int(dead.sum())

    def strengths(self) -> dict[str, float]:
        """Return {rule: current strength} for moving strengths: schedules and targets."""
        return {moving.key: float(moving.now) for moving in self._strengths.moving}

    def next_epoch(self) -> None:
        """Count an epoch, for schedules with unit="epoch"; the first epoch has number zero."""
        self._clock.end()
        self._clock.epochs += 1
        self._strengths.refill(self._clock.steps, self._clock.epochs)

    def table(self, values: bool = False) -> str:
        """Return a table of rules: how, strength, tensors, elements, names; optionally values.

        Raises:
            PlanError: `values` isn't True or False.
        """
        check_flags(PlanError, values=values)
        return report.table(self._bounds, self._as_it_is(), self.values() if values else None)

    def contents(
        self,
        *,
        model: nn.Module | None = None,
        path: Any = None,
        history: Any = None,
        images: Any = None,
        inputs: Sequence[str] | None = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Content:
        """Return what `report` shows, as plain data. Arguments and errors as there."""
        root = self._as_it_is() if model is None else same_parameters(unwrap(checked_module(model)), self.model)
        rows = self.history if history is None and self._tracker is not None else history
        given = {"rows": rows, "path": path, "images": images, "inputs": inputs, "title": title, "facts": facts}
        found = contents_of(root, self._bounds, self.plan, **given)
        code = 'reg = rs.attach(model, rs.Plan.load("plan.json"), optimizer)' if found.data else ""
        return replace(found, trained="attachment", code=code)

    def report(
        self,
        file: str | FilePath,
        *,
        model: nn.Module | None = None,
        path: Any = None,
        history: Any = None,
        images: Any = None,
        inputs: Sequence[str] | None = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> FilePath:
        """Write a page about the training and its rules into one HTML file; return its path.

        It shows who gets what, curves, shares of the gradient, zeros by layer, lengths of groups,
        histograms, features, a path with a slider, warnings with the line to write, the plan and
        the environment, and loads nothing from elsewhere.

        Args:
            file: the file, which ends in .html.
            model: a model with the same parameters, whose weights are shown instead, such as an
                averaged one.
            path: the result of `rs.path`, or a fitted `RegressorCV` or `ClassifierCV`.
            history: rows of numbers by step or epoch; None: `reg.history`, if steps are tracked.
            images: (height, width) of the images that a weight's inputs or outputs are, or
                {name: (height, width)}; filters with one or three channels need no such word.
            inputs: names of the path's groups, such as those of the inputs.
            title: the title of the page.
            facts: further facts for its head, such as {"test accuracy": "97 %"}.

        Raises:
            PlanError: an argument of another kind, or parameters that are sharded.
            FileError: the name doesn't end in .html.
            FileAccessError: there is no such folder, no space or no permission.
            MissingExtraError: matplotlib isn't installed.
            DetachedError: the model no longer exists.
        """
        given = {"model": model, "path": path, "history": history, "images": images}
        return write(self.contents(**given, inputs=inputs, title=title, facts=facts), file)

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
            _claimed.discard(module)
        self._steppers, self._detached = [], True
        _attached.pop(self._number, None)
        leave(self)
        self._forwards.clear()

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

    def state_dict(self) -> dict[str, Any]:
        """Return counts and tensors of the rules, for a checkpoint."""
        self._clock.end()
        return {
            "version": VERSION,
            "rules": [bound.key for bound in self._bounds],
            "steps": self._clock.steps,
            "epochs": self._clock.epochs,
            "optimizer_steps": [stepper.steps for stepper in self._steppers],
            # a tuple: of a dict, torch.distributed.checkpoint loads only keys that a fresh
            # attachment has
            "metrics": tuple((work.handle.name, dict(work.kept)) for work in self._works if work.kept),
            "kept": {name: dict(state) for name, state, _, _ in self._keepers()},
            "strengths": self._strengths.state(),
        } | ({} if self._tracker is None else {"history": self._tracker.history.state()})

    def resized(self, change: Callable[[str | Point, str, Tensor], Tensor]) -> dict[str, Any]:
        """Return the state with a function applied to the tensors that rules keep.

        Args:
            change: gets the name of a parameter or the activation, the key of the tensor, and the
                tensor.
        """
        state = self.state_dict()
        points = {f"{b.key}: {r.point.key}": r.point for b in self._bounds for r in b.penalty_recorders}
        points |= {f"{b.key}: {point.key}": point for b in self._bounds for point, _ in b.transforms}
        kept = {}
        for name, tensors, _, handle in self._keepers():
            whose = points[name] if handle is None else handle.name
            kept[name] = {key: change(whose, key, tensor) for key, tensor in tensors.items()}
        metrics = [
            (name, {key: change(name, key, one) if isinstance(one, Tensor) else one for key, one in own.items()})
            for name, own in state["metrics"]
        ]
        return {**state, "kept": kept, "metrics": tuple(metrics)}

    def rebind(self, plan: Plan, state: Mapping[str, Any]) -> None:
        """Bind other rules to the model, whose tensors have other shapes now, and go on.

        Args:
            plan: the rules, with the same keys.
            state: the state by `resized`.
        """
        model, given, tracker = self.model, self.optimizers, self._tracker
        declaring = [module for reference in self._declaring if (module := reference()) is not None]
        self.detach()
        self._tracker = None
        with uncollected(), torch.inference_mode(False):
            self._begin(model, plan, given_optimizers(given), declaring, self._declared, self.compile)
        self._register()
        if tracker is not None:
            self._tracker = Tracker(self._bounds, tracker.history)
        self.take_over(tracker, state)

    def take_over(self, tracker: Tracker | None, state: Mapping[str, Any]) -> None:
        """Load a state, and track steps as another attachment does."""
        self.load_state_dict(dict(state))
        if tracker is not None:
            self.track(tracker.history.every, points=tracker.history.points, shares=tracker.shares)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            PlanError: it belongs to other rules or a newer version, or a part of it is missing or
                has another type, shape or kind; nothing is changed then.
        """
        with torch.inference_mode(False):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        mine = self.state_dict()
        mine.pop("history", None)
        state, history = split_history(state)
        metrics = {work.handle.name: self._metric_of(work.handle) for work in self._works}
        whole = checked(by_new_names(state), mine, metrics)
        self._strengths.check(whole["strengths"], whole["steps"], whole["epochs"])
        told = None if history is None else History.of(history, whole["steps"])
        before = {**mine, "kept": {name: {k: t.clone() for k, t in own.items()} for name, own in mine["kept"].items()}}
        try:
            self._resume(whole, mine["kept"])
        except BaseException:  # an interrupt
            self._resume(before, mine["kept"])
            raise
        if told is not None:  # the only change of an attachment that doesn't track
            self._tracker = self._tracker or Tracker(self._bounds, told)
            self._tracker.history.replace(told)
        elif self._tracker is not None:
            self._tracker.history.since(whole["steps"])

    def _metric_of(self, handle: Handle) -> tuple[Tensor, tuple[str, ...]]:
        """Return a parameter and the names of its optimizer's metric state."""
        p = handle.find(self.model)
        alive = [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]
        owner = next((o for o in alive if any(p is q for group in o.param_groups for q in group["params"])), None)
        return p, metric_names(owner)

    def _resume(self, state: dict[str, Any], kept: dict[str, dict[str, Tensor]]) -> None:
        """Restore a checked state."""
        self._clock.resume(state["steps"])
        for stepper, steps in zip(self._steppers, state["optimizer_steps"], strict=True):
            stepper.steps = steps
        metrics = dict(state["metrics"])
        for work in self._works:
            own, like = metrics.get(work.handle.name, {}), work.handle.find(self.model)
            wide = torch.promote_types(like.dtype, torch.float32)
            work.kept = {
                k: v.detach().to(like.device, wide, copy=True) if isinstance(v, Tensor) else v for k, v in own.items()
            }
        fill(kept, state["kept"])
        self._clock.epochs = state["epochs"]
        self._strengths.load(state["strengths"], self._clock.steps, self._clock.epochs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str | None:
        if self._model() is None:
            return None  # notebooks show repr instead
        rows, notes = report.cells(self._bounds, self._as_it_is(), None)
        return html_table(rows, report.RIGHT, notes)

    def __repr__(self) -> str:
        model = self._model()
        whose = "a model that is gone" if model is None else type(model).__name__
        return f"<Attachment of {len(self._bounds)} rules to {whose}>"

    def __reduce__(self) -> Any:
        return (DetachedAttachment, (self.plan,))
