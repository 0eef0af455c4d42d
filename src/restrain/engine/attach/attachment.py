"""Attaching a plan to a model, and the object that a user holds while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.declare import declared_rules
from restrain.engine.attach import resampling
from restrain.engine.attach.history import History
from restrain.engine.attach.installed import attached, claimed
from restrain.engine.attach.measured import Measured
from restrain.engine.attach.state import (
    VERSION,
    DetachedAttachment,
    by_new_names,
    checked,
    fill,
    metric_names,
    split_history,
)
from restrain.engine.attach.tracking import Tracker, checked_track
from restrain.engine.backends import Compile
from restrain.engine.binding import (
    given_optimizers,
)
from restrain.engine.distributed import shards
from restrain.engine.forward import Point
from restrain.engine.weights import refuse_wrapped
from restrain.errors import PlanError
from restrain.garbage import uncollected
from restrain.named_tensors import Handle, checked_module, unwrap
from restrain.plans import Plan


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
    declared, modules = declared_rules(model, skip=claimed)
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
    return [reg for _, reg in sorted(attached.items()) if reg.belongs_to(root)]


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
    declared, modules = declared_rules(model, skip=claimed)
    with uncollected(), torch.inference_mode(False):
        new = Attachment(unwrap(model), plan, given_optimizers(optimizer), modules, declared, reg.compile)
    try:
        new.take_over(reg.tracker, state)
    except BaseException:
        new.detach()
        raise
    return new


class Attachment(Measured):
    """A plan bound to a model. Made by `attach`; references the model weakly."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that rules learn: lengths of `WeightNormalization`, thresholds."""
        yield from self._parametrized.learned()
        for _, what in self._activations():
            yield from what.parameters()

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

    def next_epoch(self) -> None:
        """Count an epoch, for schedules with unit="epoch"; the first epoch has number zero."""
        self._clock.end()
        self._clock.epochs += 1
        self._strengths.refill(self._clock.steps, self._clock.epochs)

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

    def __reduce__(self) -> Any:
        return (DetachedAttachment, (self.plan,))
