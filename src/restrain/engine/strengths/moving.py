"""Tensors of changing strengths, updated after each optimizer step, and controllers of targets.

The state of a controller is 0-d float64 tensors on the CPU, saved in `reg.state_dict()`. Compiled
code only reads the tensor of the strength.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restrain.engine.distributed import Term, acting, local, ranks_of, totals
from restrain.errors import HowError, PenaltyError, PlanError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.penalties import Penalty
from restrain.penalties.derivative import OnDerivatives
from restrain.penalties.functorch import as_plain
from restrain.rules import Rule
from restrain.schedule import LearningRate, Strength, Target
from restrain.torch_private import outside_functorch, transforming
from restrain.transforms import Transform

_SLOWEST = 1 / 4  # least rate, as a fraction of the greatest
_PATIENCE = 50  # measurements at a bound before a warning
_NEAR = 0.02  # relative tolerance of targets, and of bounds in a loaded state

Tensors = Sequence[tuple[Tensor, Any]]  # (parameter, penalty on it)


def _number(value: float = 0.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


FOLLOWERS = ("decoupled", "gradient", "proximal")  # moments of rules that can follow the learning rate


class Activity:
    """Fraction of active entries in a rule's activations, averaged since the last measurement."""

    def __init__(self, above: float, device: torch.device) -> None:
        self.above = above
        # One entry each, updated in place: see `PenaltyRecorder` in engine/forward/recording.py.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total, self.count = (torch.zeros(1, dtype=dtype, device=device) for _ in range(2))

    def of(self, h: Tensor) -> Tensor | None:
        """Return the active fraction of one output; None of an empty one."""
        if not h.numel():
            return None
        with as_plain(h) as plain:
            return (plain.abs() > self.above).to(self.total.dtype).mean()

    def add(self, fraction: Tensor) -> None:
        """Add the active fraction of an output of a forward that counts."""
        within = not torch.compiler.is_compiling() and transforming()  # a transform of torch.func runs
        with outside_functorch() if within else nullcontext():
            self.total.add_(fraction.to(self.total.device))  # the model may have moved since it was attached
            self.count.add_(1)

    def take(self) -> float | None:
        """Return the mean over all processes since the last call, and reset; None if empty."""
        both = torch.cat([self.total, self.count])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(both)
        total, count = both.tolist()
        self.total.zero_()
        self.count.zero_()
        return total / count if count else None


class Controller:
    """PI controller of the logarithm of a strength; see `Target` for the formula."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.log, self.rate = _number(math.log(target.start)), _number(target.gain)
        self.measured, self.error, self.stuck, self.warned = (_number(math.nan), _number(), _number(), _number())

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the controller by name."""
        return {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}

    def update(self, found: float) -> bool:
        """Move the strength by a measurement; return True, once, if the target is out of reach."""
        target, first = self.target, bool(self.measured.isnan())
        kept = 0.0 if first else target.smoothing
        measured = found if first else kept * float(self.measured) + (1 - kept) * found
        error, rate = target.error(measured), float(self.rate)
        before = error if first else float(self.error)
        rate = max(rate / 2, _SLOWEST * target.gain) if error * before < 0 else min(rate * 1.1, target.gain)
        low, high = math.log(target.low), math.log(target.high)
        wanted = float(self.log) + rate * error + target.damping * (error - before)
        log = min(max(wanted, low), high)
        stuck = float(self.stuck) + 1 if log in (low, high) and abs(measured / target.goal - 1) > _NEAR else 0.0
        for tensor, value in zip(
            (self.log, self.rate, self.measured, self.error, self.stuck),
            (log, rate, measured, error, stuck),
            strict=True,
        ):
            tensor.fill_(value)
        if stuck < _PATIENCE or self.warned:
            return False
        self.warned.fill_(1)
        return True


@dataclass
class Moving:
    """Changing strength of a rule, with its 0-d tensor `now`."""

    rule: Rule
    key: str
    source: Strength
    now: Tensor = field(default_factory=_number)
    controllers: list[Controller] = field(default_factory=list)
    activity: Activity | None = None
    rate: float = 1.0  # of `LearningRate`, at the last step

    @classmethod
    def of(cls, rule: Rule, key: str, source: Strength, device: torch.device) -> Moving:
        """Return the Moving of a strength of a rule, with controllers and its value at step 0.

        Raises:
            HowError: a target can't be measured for this rule.
            PenaltyError: the strength has several targets, or isn't a finite number, zero or more.
        """
        targets = [part for part in source.parts[1] if isinstance(part, Target)]
        if any(isinstance(part, LearningRate) for part in source.parts[1]) and rule.how not in FOLLOWERS:
            raise HowError(
                f"{source!r} follows the optimizer's steps, for how='decoupled', 'gradient' or 'proximal'; got a rule "
                f"with how={rule.how!r}"
            )
        for target in targets:
            _check(target, rule)
        if len(targets) > 1:
            raise PenaltyError(f"{source!r} has several targets, and one strength can't reach more than one")
        active = [Activity(target.above, device) for target in targets if target.kind == "active"]
        moving = cls(
            rule, key, source, controllers=[Controller(t) for t in targets], activity=active[0] if active else None
        )
        moving.refill(0, 0)
        return moving

    def refill(self, step: int, epoch: int) -> None:
        """Update the tensor to the strength at a step.

        Raises:
            PenaltyError: a schedule gives a value that isn't a finite number, zero or more.
        """
        self.now.fill_(self.value(step, epoch, [float(controller.log) for controller in self.controllers]))

    def value(self, step: int, epoch: int, logs: Sequence[float]) -> float:
        """Return the strength at a step: number × schedules × exp(logs), a log for each target.

        Raises:
            PenaltyError: the result, or a schedule's value, isn't a finite number, zero or more.
        """
        value = self.rest(step, epoch) * math.prod(map(math.exp, logs))
        if not math.isfinite(value):
            raise PenaltyError(
                f"{self.source!r} gives {value} at step {step}; a strength is a finite number, zero or more"
            )
        return value

    def check(self, state: Mapping[str, Tensor], step: int, epoch: int) -> None:
        """Check that training can continue from a saved state, tensors as returned by `state`.

        Raises:
            PlanError: a number is out of range.
        """
        numbers = {name: float(tensor) for name, tensor in state.items()}
        for one in self.controllers:
            low, high = (math.log(end) for end in (one.target.low, one.target.high))
            bounds = {"log": (low - _NEAR, high + _NEAR), "rate": (1e-9, 1e9), "error": (-1, 1), "warned": (0, 1)}
            for name, (least, most) in bounds.items():
                if not least <= numbers[name] <= most:
                    raise PlanError(
                        f"{self.key!r}: {name} of this state is {numbers[name]:g}, not in {least:g} to {most:g}"
                    )
        negative = [name for name in ("strength", "stuck", "active", "calls") if numbers.get(name, 0.0) < 0]
        if negative:
            raise PlanError(f"{self.key!r}: {', '.join(negative)} of this state is below zero")
        try:
            self.value(step, epoch, [numbers.get("log", 0.0)] * len(self.controllers))
        except Exception as error:  # whatever a user's schedule raises
            raise PlanError(f"{self.key!r} can't go on from step {step}, epoch {epoch}: {error}") from error

    def rest(self, step: int, epoch: int) -> float:
        """Return the strength without targets: number × schedules."""
        number, parts = self.source.parts
        timed = [part for part in parts if not isinstance(part, Target | LearningRate)]
        return number * self.rate * math.prod(part.at(step, epoch) for part in timed)

    def follow(self, groups: Sequence[Mapping[str, Any]], peaks: Mapping[int, float], step: int, epoch: int) -> None:
        """Update the strength to the learning rates of the groups that hold the rule's parameters.

        Raises:
            PenaltyError: a rate above its peak; groups with different ratios.
        """
        factor = 1.0
        for part in self.source.parts[1]:
            if isinstance(part, LearningRate) and groups:
                found = [part.at_rate(float(group["lr"]), part.peak or peaks[id(group)]) for group in groups]
                if max(found) > min(found) * (1 + 1e-9):
                    raise PenaltyError(
                        f"{self.key!r}: its parameters are in groups whose learning rates are different parts of their "
                        f"peaks ({min(found):g} and {max(found):g}): write one rule for each group"
                    )
                factor *= found[0]
        if factor != self.rate:
            self.rate = factor
            self.refill(step, epoch)

    @property
    def follows(self) -> bool:
        """True if the strength follows the learning rate."""
        return any(isinstance(part, LearningRate) for part in self.source.parts[1])

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that change from step to step, by name."""
        kept = {"strength": self.now}
        for controller in self.controllers:
            kept |= controller.state()
        if self.activity is not None:
            kept |= {"active": self.activity.total, "calls": self.activity.count}
        return kept

    def control(self, step: int, epoch: int, tensors: Callable[[], Tensors]) -> None:
        """After a step, counted from zero: measure and move the strength if a measurement is due.

        `tensors` returns the (parameter, penalty) pairs of the rule.
        """
        for controller in self.controllers:
            if step < self.rule.start or (step + 1) % controller.target.every or not self.rest(step, epoch):
                continue
            found = self._measure(controller.target, step, tensors())
            if found is not None and math.isfinite(found) and controller.update(found):
                warnings.warn(self._out_of_reach(controller), RestrainWarning, stacklevel=level_of_caller())

    def _measure(self, target: Target, step: int, tensors: Tensors) -> float | None:
        if self.activity is not None:
            return self.activity.take()
        if target.kind == "gradient_share":
            return gradient_share(self.rule, tensors) if self.rule.due(step) else None
        return _MEASURES[target.kind]([p for p, _ in tensors]) if tensors else None

    def _out_of_reach(self, controller: Controller) -> str:
        target, now = controller.target, float(controller.log.exp())
        end, way = ("high", "more") if controller.error > 0 else ("low", "less")
        return (
            f"{self.key!r}: {target!r} seems out of reach: the strength has stayed at its bound {end}={now:g}, where "
            f"{target.kind} is {float(controller.measured):.4g}. Allow {way} by {end}=, or ask for another value"
        )

    def __str__(self) -> str:
        told = [f"{c.target.kind} was {float(c.measured):.4g}" for c in self.controllers if not c.measured.isnan()]
        word = "setting" if isinstance(self.rule.what, Transform) else "strength"
        return f"{self.key}: its {word} {self.source!r} is now {float(self.now):.4g}{''.join(', ' + t for t in told)}"


def tensor_of(source: Strength, known: list[Moving], rule: Rule, key: str, device: torch.device) -> Tensor:
    """Return the tensor of a rule's strength: an equal one in `known`, or a new one added to it."""
    for moving in known:
        if moving.source == source:
            return moving.now
    known.append(Moving.of(rule, f"{key} [{len(known) + 1}]" if known else key, source, device))
    return known[-1].now


def _check(target: Target, rule: Rule) -> None:
    """Check that a target can be measured for a rule.

    Raises:
        HowError: it can't.
    """
    if isinstance(rule.what, OnDerivatives):
        raise HowError(
            f"{target!r} isn't known for a penalty on derivatives, {rule.what!r}: use a number or a schedule"
        )
    if (target.kind == "active") != rule.at_places:
        other = "zeros=, norm= or gradient_share=" if target.kind == "active" else "active="
        what = "outputs" if target.kind == "active" else "parameters"
        raise HowError(f"{target!r} is for rules on {what}, not for {rule!r}: use a target by {other}")
    if target.kind == "zeros" and rule.how != "proximal":
        raise HowError(f"{target!r} needs how='proximal': by how={rule.how!r} no entry becomes exactly zero")
    if target.kind == "gradient_share" and (rule.what.joint or not isinstance(rule.what, Penalty)):
        raise HowError(
            f"{target!r} isn't known for a penalty on the whole network, {rule.what!r}: use norm=, or a number"
        )


def _sums(*parts: Sequence[Term]) -> list[float]:
    """Return sums of 0-d tensors, over all processes for shards; waits for the device once."""
    return torch.stack(totals(parts)).tolist()


def _square(w: Tensor) -> Tensor:
    return w.abs().square().sum(dtype=torch.float32 if w.device.type == "mps" else torch.float64)


def _zeros(parameters: Sequence[Tensor]) -> float:
    own = [(local(p), ranks_of(p)) for p in parameters]
    nonzero, entries = _sums(
        [(w.count_nonzero(), ranks) for w, ranks in own],
        [(torch.full((), w.numel(), device=w.device), ranks) for w, ranks in own],
    )
    return 1 - nonzero / max(entries, 1)


def _norm(parameters: Sequence[Tensor]) -> float:
    return math.sqrt(*_sums([(_square(local(p)), ranks_of(p)) for p in parameters]))


_MEASURES = {"zeros": _zeros, "norm": _norm}


def gradient_share(rule: Rule, tensors: Tensors) -> float | None:
    """Return ‖g‖ / (‖g‖ + ‖r‖), with g the rule's gradient and r the rest of `.grad`, after a step.

    g is subtracted from `.grad` for rules whose moment puts it there ("loss", "gradient"). None if
    both are zero.
    """
    mean = rule.reduce == "mean"
    inside = rule.how in ("loss", "gradient")
    own, others = [], []
    for p, penalty in tensors:
        if p.grad is None:
            continue
        for (acts,), (w, grad), ranks in acting([penalty], p, p.grad):
            g = acts.gradient(w) / (max(p.numel(), 1) * len(tensors) if mean else 1)
            own.append((_square(g), ranks))
            others.append((_square(grad - g if inside else grad), ranks))
    size, rest = map(math.sqrt, _sums(own, others))
    return size / (size + rest) if size + rest else None


class Strengths:
    """All changing strengths of an attachment."""

    def __init__(self, bounds: Sequence[Any]) -> None:
        self.bounds = [bound for bound in bounds if bound.moving]
        self.done = 0  # steps taken
        self.epoch = 0
        self._peaks: dict[int, float] = {}  # greatest learning rates, by id of the group

    @property
    def follow_rates(self) -> bool:
        """True if a strength follows the learning rate."""
        return any(moving.follows for moving in self.moving)

    def before(self, optimizer: Any, root: nn.Module) -> None:
        """Update strengths that follow the learning rate, before a step of an optimizer."""
        rates = [group for group in optimizer.param_groups if group["lr"] != 0]
        for group in rates:
            known = group.get("max_lr", group.get("initial_lr", group["lr"]))
            self._peaks.setdefault(id(group), float(known))
        for bound in self.bounds:
            own = {id(p) for p, _ in bound.tensors(root)} if any(m.follows for m in bound.moving) else set()
            held = [group for group in rates if any(id(p) in own for p in group["params"])] if own else []
            for moving in bound.moving if held else ():
                moving.follow(held, self._peaks, self.done, self.epoch)

    @property
    def moving(self) -> list[Moving]:
        """Return all changing strengths."""
        return [moving for bound in self.bounds for moving in bound.moving]

    @property
    def by_gradients(self) -> bool:
        """True if a target measures the gradients that a step leaves behind."""
        return any(one.target.kind == "gradient_share" for moving in self.moving for one in moving.controllers)

    def stepped(self, steps: int, epoch: int, root: nn.Module) -> None:
        """Measure and update all strengths after a training step; to be called without gradients.

        `steps` is the number of steps taken so far.
        """
        if steps == self.done:
            return  # of an optimizer that has taken fewer steps than another
        self.done, self.epoch = steps, epoch
        for bound in self.bounds:
            for moving in bound.moving:
                moving.control(steps - 1, epoch, lambda bound=bound: bound.tensors(root))
        self.refill(steps, epoch)

    def refill(self, steps: int, epoch: int) -> None:
        """Update all tensors to the strengths at a step."""
        for moving in self.moving:
            moving.refill(steps, epoch)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of all state, for a checkpoint."""
        return {moving.key: {name: t.clone() for name, t in moving.state().items()} for moving in self.moving}

    def check(self, state: Mapping[str, Mapping[str, Tensor]], steps: int, epoch: int) -> None:
        """Check that training can continue from a state, tensors as returned by `state`.

        Raises:
            PlanError: a number is out of range.
        """
        for moving in self.moving:
            moving.check(state[moving.key], steps, epoch)

    def load(self, state: Mapping[str, Mapping[str, Tensor]], steps: int, epoch: int) -> None:
        """Load a state as returned by `state`, at a number of steps and an epoch."""
        for moving in self.moving:
            for name, tensor in moving.state().items():
                tensor.copy_(state[moving.key][name].detach())
        self.done, self.epoch = steps, epoch
        self.refill(steps, epoch)
