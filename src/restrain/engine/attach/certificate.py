"""Certificates: how far a model under rules is from a stationary point of data loss + rules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from restrain.engine.attach.stationarity import Objective, Part, as_found
from restrain.errors import HowError, NoProxError, PlanError, RestrainWarning
from restrain.fields import brief, is_number, is_whole, level_of_caller
from restrain.penalties.shrink import exact
from restrain.text_table import text_table

_GROWTH = 1.1  # of the step's length from step to step, as curvature changes
_SHARE = 0.02  # of a rule's strength: the residual at which polishing ends
_NO_STRENGTH = 1e-3  # of the greatest gradient at its start, where no rule has a strength


@dataclass(frozen=True)
class Returning:
    """The zero groups of a tensor that the next proximal step would move away from zero.

    Args:
        name: the tensor; of units across tensors the names of all, joined by " + ".
        groups: the groups' indices along the axes that tell groups apart, shape (groups, axes); of
            an entrywise penalty the indices of entries, of units their numbers.
        excess: ‖z_g‖ / t of each, the length by which its gradient exceeds what holds it at zero.
    """

    name: str
    groups: Tensor
    excess: Tensor


@dataclass(frozen=True)
class RuleCertificate:
    """Part of a certificate: residual of a rule and of its tensors, groups that re-enter."""

    residual: float
    tensors: dict[str, float]
    returning: tuple[Returning, ...] = ()


@dataclass(frozen=True)
class Certificate:
    """Distance from a stationary point of data loss + rules; made by `Attachment.certificate`.

    Args:
        residual: the greatest |w - prox(w - t ∇, t)| / t of all tensors, zero at stationary points.
        rules: {key: certificate} of each rule with a prox and each convex constraint.
        free: the greatest |∇| of trained tensors without such a rule, where the prox is w itself.
        step: t, the length of the step.
        loss: the data loss.
        left_out: {key: reason} of rules of which only the gradient, or nothing, is certified.
        steps: the number of proximal steps taken by `polish`.
    """

    residual: float
    rules: dict[str, RuleCertificate]
    free: float
    step: float
    loss: float
    left_out: dict[str, str]
    steps: int = 0

    def __str__(self) -> str:
        rows = [["rule", "residual", "zero groups that re-enter", "by at most"]]
        for key, one in self.rules.items():
            count = sum(len(group.excess) for group in one.returning)
            most = max((float(group.excess.max()) for group in one.returning), default=0.0)
            rows.append([key, f"{one.residual:.3g}", f"{count:,}", f"{most:.3g}"])
        rows.append(["(other trained tensors)", f"{self.free:.3g}", "", ""])
        head = f"residual {self.residual:.3g} at step {self.step:.3g}, data loss {self.loss:.6g}"
        notes = [f"{key}: not certified: {why}" for key, why in self.left_out.items()]
        return "\n".join([head, text_table(rows, {1, 2, 3}), *notes])


def certify(objective: Objective, polish: bool, step: float | None, steps: int, tolerance: float | None) -> Certificate:
    """Return the certificate of an objective; see `Attachment.certificate`."""
    if tolerance is not None and not (is_number(tolerance) and tolerance > 0):
        raise PlanError(f"tolerance= is a residual, a number above zero; got {brief(tolerance)}")
    if step is not None and not (is_number(step) and step > 0):
        raise PlanError(f"step= is the length of the proximal step, a number above zero; got {brief(step)}")
    if not is_whole(steps, 1):
        raise PlanError(f"steps= is a whole number of proximal steps, at least 1; got {brief(steps)}")
    if not objective.parts and objective.rest.left_out:
        why = "; ".join(f"{key}: {why}" for key, why in objective.rest.left_out.items())
        raise NoProxError(f"there is no rule to certify, as none has a known prox or a convex set: {why}")
    with as_found(objective.model):
        objective.check()
        found = _certificate(objective, step)
        if polish:
            found = _Polish(objective, found, tolerance).run(steps)
    return found


def _certificate(objective: Objective, step: float | None) -> Certificate:
    loss, _, gradients = objective.evaluate()
    tensors = [exact(tensor.detach()) for tensor in objective.tensors()]
    t = _step(tensors[: objective.held], gradients) if step is None else float(step)
    objective.length = t
    steepest = max((part.concavity for part in objective.parts), default=0.0)
    if 0 < steepest < math.inf and t * steepest >= 1:
        if step is not None:
            raise PlanError(
                f"step= is below {1 / steepest:.4g}, beyond which the prox of a penalty that isn't convex jumps, and "
                f"would move stationary points; got {step:g}"
            )
        t = 0.5 / steepest
    return _at(objective, tensors, gradients, t, loss)


def _at(
    objective: Objective, tensors: Sequence[Tensor], gradients: Sequence[Tensor], t: float, loss: float
) -> Certificate:
    """Return the certificate of exact tensors with given gradients."""
    rules: dict[str, RuleCertificate] = {}
    for (part, ws), (_, own) in zip(objective.split(tensors), objective.split(gradients), strict=True):
        zs = part.moved(ws, own, t)
        residuals = {name: _greatest([(w - z) / t]) for name, w, z in zip(part.names, ws, zs, strict=True)}
        returning = _returning(part, ws, zs, t)
        for key in part.keys:
            known = rules.get(key, RuleCertificate(0.0, {}))
            back = returning if key in part.penalised_by else ()
            most = _most([known.residual, *residuals.values()])
            rules[key] = RuleCertificate(most, {**known.tensors, **residuals}, (*known.returning, *back))
    free = _greatest(gradients[objective.held :])
    residual = _most([free, *(one.residual for one in rules.values())])
    return Certificate(residual, rules, free, t, loss, objective.rest.left_out)


def _greatest(tensors: Sequence[Tensor]) -> float:
    return _most([float(tensor.abs().max()) for tensor in tensors if tensor.numel()])


def _most(numbers: Sequence[float]) -> float:
    """Return the greatest number; NaN if one is, 0 if there are none."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers, default=0.0)


def _step(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
    """Return the default t: 1/1000 of max |w| / max |∇|."""
    size, slope = _greatest(tensors), _greatest(gradients)
    return 1e-3 * size / slope if 0 < size < math.inf and 0 < slope < math.inf else 1.0


def _returning(part: Part, ws: Sequence[Tensor], zs: Sequence[Tensor], t: float) -> tuple[Returning, ...]:
    """Return the zero groups of a part that aren't zero after the step; () if there are none."""
    found = []
    for (name, before, numbers), (_, after, _) in zip(part.groups(ws), part.groups(zs), strict=True):
        excess = after / t
        back = (before == 0) & (excess > 0)
        if bool(back.any()):
            where = back.nonzero()
            found.append(Returning(name, where if numbers is None else numbers.to(where.device)[where], excess[back]))
    return tuple(found)


class _Polish:
    """Full-batch proximal steps on a model's trained tensors, until its certificate is small.

    The steps are accelerated and restarted (Beck and Teboulle 2009; O'Donoghue and Candès 2015).
    Their length t is halved until the value lies below the quadratic bound
    f(y) + ⟨∇f(y), z - y⟩ + ‖z - y‖² / (2t), up to rounding.
    """

    def __init__(self, objective: Objective, begin: Certificate, tolerance: float | None) -> None:
        computed = [part.names[0] for part in objective.parts if part.computed]
        if computed:
            raise HowError(
                f"polish=True moves parameters themselves, and {computed[0]!r} is computed by a parametrisation: give "
                "its constraint how='project'"
            )
        self.objective, self.found = objective, begin
        self.tensors = objective.tensors()
        self.t = objective.length * 100
        self.slack = 64 * torch.finfo(self.tensors[0].dtype).eps
        strengths = {key: s for part in objective.parts for key, s in part.strengths}
        least = min(strengths.values(), default=_NO_STRENGTH / _SHARE * begin.residual)
        self.bounds = {key: tolerance or _SHARE * strengths.get(key, least) for key in begin.rules}
        self.free = tolerance or _SHARE * least

    def settled(self, one: Certificate) -> bool:
        """Return True if every residual is at most 0.02 of the rule's strength."""
        return one.free <= self.free and all(rule.residual <= self.bounds[key] for key, rule in one.rules.items())

    def run(self, steps: int) -> Certificate:
        """Take at most `steps` steps; return the last certificate, and warn if it is large."""
        count = 0
        if not self.settled(self.found):
            count = self._run(steps)
        found = replace(_certificate(self.objective, self.found.step), steps=count)
        if not self.settled(found):
            warnings.warn(
                f"after {count} proximal steps the residual is {found.residual:.3g}, above what was asked for "
                f"({min([self.free, *self.bounds.values()]):.3g}): give more by steps=",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
        return found

    def _run(self, steps: int) -> int:
        x = self._now()
        y, theta, last = x, 1.0, math.inf
        for count in range(1, steps + 1):
            _, value, gradients = self._evaluate(y)
            z, whole = self._backtracked(y, value, gradients)
            if whole > last + self.slack * abs(last) and theta > 1:  # overshot: begin again from x
                y, theta = x, 1.0
                continue
            if self._quick(y, z) and self.settled(self._certificate(z)):
                self._put(z)
                return count
            turned = sum(float(((a - b).conj() * (b - c)).real.sum()) for a, b, c in zip(y, z, x, strict=True)) > 0
            following = 1.0 if turned else (1 + math.sqrt(1 + 4 * theta**2)) / 2
            momentum = 0.0 if turned else (theta - 1) / following
            y = [b + momentum * (b - c) for b, c in zip(z, x, strict=True)]
            x, theta, last = z, following, whole
        self._put(x)
        return steps

    def _quick(self, y: Sequence[Tensor], z: Sequence[Tensor]) -> bool:
        """Return True if the step's own length lets a certificate pass."""
        most = max([self.free, *self.bounds.values()])
        return _greatest([(a - b) / self.t for a, b in zip(y, z, strict=True)]) <= 4 * most

    def _backtracked(
        self, y: Sequence[Tensor], value: float, gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], float]:
        """Return (tensors after a step, their value with all penalties); t is halved if needed."""
        self.t *= _GROWTH
        while True:
            z = self._stepped(y, gradients)
            self._put(z)
            z = self._now()  # rounded to the parameters' dtype
            moves = [a - b for a, b in zip(z, y, strict=True)]
            slope = sum(float((g.conj() * d).real.sum()) for g, d in zip(gradients, moves, strict=True))
            squares = sum(float(d.abs().square().sum()) for d in moves)
            found = self.objective.value()
            if found <= value + slope + squares / (2 * self.t) + self.slack * abs(value) or self.t < 1e-12:
                return z, found + self._penalties(z)
            self.t /= 2

    def _stepped(self, y: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        return self.objective.moved(y, gradients, self.t)

    def _penalties(self, tensors: Sequence[Tensor]) -> float:
        return sum(part.value(ws) for part, ws in self.objective.split(tensors))

    def _certificate(self, tensors: Sequence[Tensor]) -> Certificate:
        loss, _, gradients = self._evaluate(tensors)
        return _at(self.objective, tensors, gradients, self.found.step, loss)

    def _evaluate(self, tensors: Sequence[Tensor]) -> tuple[float, float, list[Tensor]]:
        self._put(tensors)
        return self.objective.evaluate()

    def _now(self) -> list[Tensor]:
        return [exact(tensor.detach()).clone() for tensor in self.tensors]

    @torch.no_grad()
    def _put(self, tensors: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, tensors, strict=True):
            tensor.copy_(value)
