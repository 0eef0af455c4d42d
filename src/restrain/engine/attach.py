"""Attaching a plan to a model: the object that a person holds while training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.declare import declared_rules
from restrain.engine import ranks, report
from restrain.engine.bind import Bound, bind, check_optimizers
from restrain.engine.capture import InputHook, LayerHook, forget_compiled_code
from restrain.engine.clock import Clock
from restrain.engine.collect import Forwards, RootBegins, RootEnds, set_cells
from restrain.engine.injection import Root
from restrain.engine.steps import Stepper, Work
from restrain.engine.taps import Spot
from restrain.engine.terms import network_value, parameter_value
from restrain.engine.tripwire import Tripwire
from restrain.errors import DetachedError, PenaltyError, PlanError
from restrain.penalties import NetworkPenalty, Penalty
from restrain.plans import Plan
from restrain.rules import What
from restrain.sites import Handle, unwrap
from restrain.transforms.base import Noise

# Layers whose declarations a living attachment has picked up: a second attachment doesn't count them again.
_claimed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_WRAPPED_OPTIMIZERS = {"AcceleratedOptimizer": "optimizer", "LightningOptimizer": "_optimizer"}


def attach(model: nn.Module, plan: Any = None, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Attachment:
    """Bind a plan, and what the model's layers declare, to a model and its optimizer.

    Args:
        model: any module; wrappers (compiled, DDP) are seen through. It is neither wrapped nor changed.
        plan: rules made by `.on(...)`, text forms, dicts, a `Plan`, or a list of these.
        optimizer: the one that trains it, a list of them, or None if no rule acts at the optimizer's step.

    Returns:
        The attachment; also a context manager that detaches at the end.

    Raises:
        SelectionError: a rule matches nothing.
        HowError, OptimizerError, NoProxError: a rule that can't be carried out as said.
        PlanError: there is nothing to attach.

    >>> model = nn.Linear(3, 2)
    >>> with rs.attach(model, 0.1 * rs.L2().on("weight")) as reg:
    ...     loss = reg.loss(model(torch.randn(4, 3)).square().mean())
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise PlanError(f"rules attach to an nn.Module that isn't scripted, got {type(model).__name__}")
    declared, modules = declared_rules(model, skip=_claimed)
    rules = Plan.of(plan) + Plan(tuple(declared))
    if not len(rules):
        raise PlanError("nothing to attach: the plan is empty and no layer of the model declares a rule")
    return Attachment(unwrap(model), rules, _optimizers(optimizer), modules)


def _optimizers(given: Any) -> list[Optimizer]:
    members = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    inner = [getattr(o, _WRAPPED_OPTIMIZERS.get(type(o).__name__, ""), o) for o in members]
    for optimizer in inner:
        if not isinstance(optimizer, Optimizer):
            raise PlanError(f"optimizer= takes a torch optimizer or a list of them, got {type(optimizer).__name__}")
    return inner


def _timer(bound: Bound, clock: Clock) -> Callable[[], bool]:
    """Whether a rule is due now."""
    return lambda: bound.rule.due(clock.steps)


class Attachment:
    """A plan bound to a model. Made by `attach`; holds the model weakly."""

    def __init__(self, model: nn.Module, plan: Plan, optimizers: list[Optimizer], declaring: list[nn.Module]) -> None:
        self._model = weakref.ref(model)
        self._bounds = bind(plan, model)
        check_optimizers(self._bounds, model, optimizers)
        self._forwards = Forwards()
        self._handles: list[Any] = []
        self._detached = False
        self._steppers: list[Stepper] = []
        self._declaring = [weakref.ref(module) for module in declaring]
        self._loss_rules = [b for b in self._bounds if b.rule.how == "loss" and (b.parameters or b.watches)]
        self._clock = Clock(self._model)
        self._tripwire = Tripwire(self._loss_rules, self._forwards, self._clock)
        self._clock.on_any.append(lambda optimizer, root: self._forwards.stepped())
        self._clock.on_real += [self._keep_up] + [self._tripwire.after] * bool(self._loss_rules)
        self._keeping = [(what, handle) for _, what, handle in self._acting() if what.state()]
        _claimed.update(declaring)
        try:
            self._attach_hooks(model)
            self._attach_steps(model, optimizers)
            if any(isinstance(bound.rule.what, Noise) for bound in self._bounds):
                ranks.warn_of_shared_random_state()
        except BaseException:  # a warning that is an error, a user's projection that fails: leave no hook behind
            self.detach()
            raise

    def _attach_hooks(self, model: nn.Module) -> None:
        """One hook a layer and side, whatever the number of rules there; and two on the model for the loss rules."""
        if self._loss_rules:
            self._handles.append(model.register_forward_pre_hook(RootBegins(self._forwards), prepend=True))
        for bound in self._bounds:
            if bound.derivative is not None:
                bound.derivative.bind(self._forwards, _timer(bound, self._clock), self._model)
                hook = bound.derivative.arguments
                self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
        hooks: dict[tuple[int, str], LayerHook] = {}
        for bound in self._bounds:
            self._forwards.taps += bound.taps
            self._forwards.raws += bound.raws
            for tap in bound.taps:
                self._hook_at(hooks, model, tap.spot).taps.append(tap)
            for raw in bound.raws:
                self._hook_at(hooks, model, raw.spot).raws.append(raw)
            for probe in bound.derivative.probes if bound.derivative is not None else ():
                self._hook_at(hooks, model, probe.spot).probes.append(probe)
            if isinstance(bound.rule.what, Noise):
                for spot in bound.spots:
                    self._hook_at(hooks, model, spot).noises.append((bound.rule.what, spot))
        if self._loss_rules:
            self._handles.append(model.register_forward_hook(RootEnds(self._forwards), always_call=True))
        if hooks:
            forget_compiled_code()

    def _hook_at(self, hooks: dict[tuple[int, str], LayerHook], model: nn.Module, spot: Spot) -> LayerHook:
        module, kind = spot.find(model), spot.place.kind
        key = (id(module), kind)
        if key not in hooks and kind == "outputs":
            hooks[key] = LayerHook(self._forwards)
            self._handles.append(module.register_forward_hook(hooks[key]))
        elif key not in hooks:
            hooks[key] = InputHook(self._forwards)
            self._handles.append(module.register_forward_pre_hook(hooks[key], with_kwargs=True))
        return hooks[key]

    def _attach_steps(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        """The work at the optimizers' steps; constraints hold from now on."""
        works: dict[str, Work] = {}
        for bound in self._bounds:
            if bound.rule.how in ("gradient", "proximal", "project"):
                for handle, what in bound.parameters:
                    work = works.setdefault(handle.name, Work(handle))
                    getattr(work, bound.rule.how).append((bound.rule, what))
        if works:
            self._steppers = [Stepper(optimizer, list(works.values()), lambda: self.model) for optimizer in optimizers]
        for bound in self._bounds:
            if bound.rule.how == "project":
                with torch.no_grad():
                    for p, constraint in bound.tensors(model):
                        p.copy_(constraint.project(p))

    @property
    def model(self) -> nn.Module:
        """The model, below its wrappers.

        Raises:
            DetachedError: it doesn't exist any more.
        """
        model = self._model()
        if model is None:
            raise DetachedError("the model of this attachment doesn't exist any more; attach the plan to the new one")
        return model

    @property
    def plan(self) -> Plan:
        """The plan as bound: every selection by the names that it resolved to."""
        return Plan(tuple(bound.rule for bound in self._bounds))

    def loss(self, loss: Tensor) -> Tensor:
        """Data loss + every penalty whose how is "loss", each whole: a scalar to call backward() on.

        Scale the result by your accumulation: `reg.loss(l) / 4`. In evaluation (`eval()`, `no_grad()`) penalties on
        parameters are added, those on activations are not measured.

        Raises:
            NeverFiredError: a place was never reached by the forward.
            PenaltyError: the loss isn't a scalar.
            DetachedError: the rules were detached.
        """
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PenaltyError(
                f"reg.loss takes the scalar data loss, got {came}: average it first, as in losses.mean()"
            )
        direct, hidden = self._terms(loss)
        for term in direct:
            loss = loss + term.to(loss.device)
        if not hidden:
            return loss
        value, write = self._hidden(hidden)
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return Root.apply(loss, value.to(loss.device, loss.dtype), write)  # type: ignore[no-untyped-call, no-any-return]

    def penalty(self) -> Tensor:
        """Every penalty whose how is "loss", summed: a differentiable scalar to add to the data loss.

        In compiled models and inside reentrant checkpoints, the gradient of penalties on activations travels with the
        backward of the data loss: there use it in one sum with that loss, by `backward()`; `reg.loss` always works.
        """
        direct, hidden = self._terms()
        total = torch.zeros((), dtype=torch.float32)
        if direct:
            total = direct[0]
            for term in direct[1:]:
                total = total + term.to(total.device)
        if not hidden:
            return total
        value, write = self._hidden(hidden)
        anchor = total if total.requires_grad else total.detach().clone().requires_grad_(torch.is_grad_enabled())
        return Root.apply(anchor, value.to(total.device, total.dtype), write)  # type: ignore[no-untyped-call, no-any-return]

    def _terms(self, loss: Tensor | None = None) -> tuple[list[Tensor], list[Any]]:
        """The values of the loss rules that are due: those with their graphs, and the collected ones without."""
        model = self.model
        if self._detached:
            raise DetachedError(
                "these rules were detached: attach the plan again, rs.attach(model, reg.plan, optimizer)"
            )
        if not self._loss_rules:
            return [], []
        self._tripwire.collected = self._tripwire.collected or torch.is_grad_enabled()
        due = {bound.key: bound for bound in self._loss_rules if bound.rule.due(self._clock.steps)}
        on_parameters = [bound for bound in due.values() if isinstance(bound.rule.what, Penalty) and bound.parameters]
        terms = [parameter_value(bound, model) for bound in on_parameters]
        recorded = self._collect(loss)
        for bound in due.values():
            if isinstance(bound.rule.what, NetworkPenalty) and (recorded or not bound.raws):
                terms.append(network_value(bound, model, self._forwards.outputs.get(bound.key, {})))
                for raw in bound.raws[:1]:
                    raw.last = [terms[-1].detach()]
        derived = [b.derivative.value(model, loss) for b in due.values() if b.derivative is not None and recorded]
        terms += [term for term in derived if term is not None]
        collected = [one for one in self._forwards.current if recorded and one.tap.rule in due]
        terms += [one.direct for one in collected if one.direct is not None]
        return terms, [one for one in collected if one.hidden is not None]

    def _collect(self, loss: Tensor | None) -> bool:
        """Collect what the forwards recorded; false in evaluation, where they record nothing."""
        watching = bool(self._forwards.taps or self._forwards.raws or self._forwards.derived)
        if watching and self.model.training and torch.is_grad_enabled():
            self._forwards.collect(loss)
            return True
        return False

    def _hidden(self, hidden: list[Any]) -> tuple[Tensor, Any]:
        """The value of penalties whose gradient is injected, and what sets it off in backward."""

        def write(gradient: Tensor | None) -> None:
            if self._detached and any(one.tap.rooted for one in hidden):
                raise DetachedError(
                    "the rules were detached before backward(), which recomputes a checkpoint without them"
                )
            set_cells(hidden, gradient)

        return torch.stack([one.hidden for one in hidden]).sum(), write

    def values(self) -> dict[str, float]:
        """{rule: strength × value} of every penalty, computed now; one key a rule.

        Of a penalty on activations the value that was last collected; nan before the first.
        """
        return report.values(self._bounds, self.model, self._forwards)

    def measure(self, data_loss: Tensor | None = None) -> dict[str, report.Measure]:
        """Each penalty's value, the norm of its gradient over the model's parameters, and its share.

        Args:
            data_loss: if given, its gradient's norm takes part in the shares, under the key "data"; call it before
                backward(), whose graph is kept.
        """
        self._collect(data_loss)
        return report.measure(self._bounds, self.model, self._forwards, data_loss)

    def table(self, values: bool = False) -> str:
        """Who gets what: rule, how, strength, tensors, elements, names; with `values`, each one's value too."""
        return report.table(self._bounds, self.model, self.values() if values else None)

    def detach(self) -> None:
        """Take every hook away; nothing of ours stays behind. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        for stepper in self._steppers:
            stepper.remove()
        self._clock.remove()
        for module in filter(None, (reference() for reference in self._declaring)):
            _claimed.discard(module)
        self._handles, self._steppers, self._detached = [], [], True
        self._forwards.stepped()

    def _acting(self) -> Iterator[tuple[str, What, Handle | None]]:
        """All that acts, each under a name of its own, with the parameter that it is bound to if it is bound to one."""
        for bound in self._bounds:
            for handle, what in bound.parameters:
                yield f"{bound.key}: {handle.name}", what, handle
            for tap in bound.taps:
                yield f"{bound.key}: {tap.spot.key}", tap.penalty, None

    @torch.no_grad()
    def _keep_up(self, optimizer: Optimizer, root: nn.Module) -> None:
        """After a real step: let those that keep tensors bring them up to date."""
        for what, handle in self._keeping:
            what.stepped(None if handle is None else handle.find(root))

    def state_dict(self) -> dict[str, Any]:
        """What the rules have counted and keep: numbers and tensors for a checkpoint."""
        return {
            "version": 1,
            "rules": [bound.key for bound in self._bounds],
            "steps": self._clock.steps,
            "optimizer_steps": [stepper.steps for stepper in self._steppers],
            "kept": {name: state for name, what, _ in self._acting() if (state := dict(what.state()))},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` left off.

        Raises:
            PlanError: it belongs to other rules.
        """
        mine = self.state_dict()
        if (
            state.get("version") != 1
            or state.get("rules") != mine["rules"]
            or len(state["optimizer_steps"]) != len(self._steppers)
        ):
            raise PlanError(f"this state belongs to other rules: expected {mine['rules']}, got {state.get('rules')}")
        self._clock.resume(state["steps"])
        for stepper, steps in zip(self._steppers, state["optimizer_steps"], strict=True):
            stepper.steps = steps
        for name, kept in mine["kept"].items():
            for key, tensor in kept.items():
                tensor.copy_(state["kept"][name][key])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        model = self._model()
        whose = "a model that is gone" if model is None else type(model).__name__
        return f"<Attachment of {len(self._bounds)} rules to {whose}>"

    def __reduce__(self) -> Any:
        return (DetachedAttachment, (self.plan,))


class DetachedAttachment:
    """What an attachment becomes in a copy or a pickle: it knows its plan, and that it is attached to nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DetachedError(
            f"this is a copy of an attachment, attached to nothing: write rs.attach(model, copy.plan) before .{name}"
        )
