"""The prox-gradient map of a model under rules: one proximal step on data loss + rules.

A trained tensor w has the penalties with a prox and the convex sets that act on it, whatever their
`how`; the tensors of units are one. With ∇ the gradient of the data loss and of all other rules, a
step of length t gives z = prox(w - t ∇, t). Stationary points of data loss + rules are those where
z = w.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from restrain.engine.attach.evaluation import Evaluation
from restrain.engine.attach.groups import groups_of, lengths
from restrain.engine.binding import Bound, at_steps, joint_terms
from restrain.engine.distributed import Term, totals
from restrain.engine.ops import Joint, overlapping
from restrain.engine.step import nearest
from restrain.errors import HowError, NeverFiredError, PenaltyError
from restrain.fields import brief
from restrain.named_tensors import Handle, device_of, is_sharded
from restrain.penalties import Penalty
from restrain.penalties.base import joined
from restrain.penalties.shrink import exact
from restrain.transforms import Constraint, Sharpness

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Repeatable:
    """Data loss that was found to be the same at two calls, which isn't checked again."""

    loss: Loss

    def __call__(self) -> Tensor:
        return self.loss()


class Part(ABC):
    """Trained tensors that a proximal step changes together, with the rules on them by their keys.

    Functions take and return lists of tensors in the order of `names`, of float64 or complex128.
    """

    computed: bool  # by a parametrisation

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return the current tensors."""

    @property
    @abstractmethod
    def keys(self) -> list[str]:
        """The rules that act on the tensors."""

    @property
    @abstractmethod
    def strengths(self) -> list[tuple[str, float]]:
        """(rule, least strength above zero of its terms) of the penalties."""

    @property
    @abstractmethod
    def penalised_by(self) -> list[str]:
        """The rules among `keys` that make groups zero."""

    @property
    def concavity(self) -> float:
        """The r for which the penalties + r/2 Σ|x|² are convex, as far as it is known."""
        return 0.0

    @abstractmethod
    def moved(self, ws: Sequence[Tensor], gradients: Sequence[Tensor], t: float) -> list[Tensor]:
        """Return prox(w - t · gradient, t)."""

    @abstractmethod
    def value(self, ws: Sequence[Tensor]) -> float:
        """Return the value of the penalties."""

    @abstractmethod
    def groups(self, ws: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor | None]]:
        """Return (name, lengths, numbers) of the groups; numbers None: the lengths' own indices."""


@dataclass
class Member(Part):
    """A trained tensor, with the penalties and convex sets that act on it."""

    name: str
    tensor: Callable[[], Tensor]  # looked up at each evaluation, where it may be computed
    computed: bool = False
    penalties: list[tuple[str, Penalty]] = field(default_factory=list)
    sets: list[tuple[str, Constraint]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def tensors(self) -> list[Tensor]:
        return [self.tensor()]

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in (*self.penalties, *self.sets)]

    @property
    def penalty(self) -> Penalty | None:
        """The sum of the penalties; None without penalties."""
        return joined([penalty for _, penalty in self.penalties]) if self.penalties else None

    @property
    def concavity(self) -> float:
        leaves = [pair for _, penalty in self.penalties for pair in penalty.leaves()]
        return sum(float(strength) * leaf.concavity for strength, leaf in leaves if leaf.concavity and strength)

    @property
    def strengths(self) -> list[tuple[str, float]]:
        return [pair for key, penalty in self.penalties for pair in _least(key, penalty)]

    @property
    def penalised_by(self) -> list[str]:
        return [key for key, _ in self.penalties]

    def moved(self, ws: Sequence[Tensor], gradients: Sequence[Tensor], t: float) -> list[Tensor]:
        (w,), (gradient,) = ws, gradients
        x, penalty = w - t * gradient, self.penalty
        sets = [one for _, one in self.sets]
        if penalty is not None and sets and not _by_entry(penalty):  # cones first, see `unknown`
            return [penalty.prox(nearest(x, sets).point, t)]
        x = x if penalty is None else penalty.prox(x, t)
        return [nearest(x, sets).point if sets else x]

    def value(self, ws: Sequence[Tensor]) -> float:
        return 0.0 if self.penalty is None else float(self.penalty(ws[0]))

    def groups(self, ws: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor | None]]:
        if self.penalty is None or not ws[0].numel():
            return []
        return [(self.name, lengths(ws[0], groups_of(self.penalty, ws[0])), None)]

    def unknown(self) -> str:
        """Return why no prox is known for all of the member's rules together; "" if it is.

        Entry by entry, the prox of a convex function on an interval is its prox, clamped. The prox
        of a group's norm on a cone of signs is that of the norm, after the projection.
        """
        penalty, sets = self.penalty, [one for _, one in self.sets]
        if penalty is None:
            return ""
        if not penalty.has_prox:
            return f"no prox is known for the sum {penalty!r}"
        signs = all(one.separable and one.cone for one in sets) and penalty.groupwise
        if sets and not (_by_entry(penalty) and all(one.separable for one in sets)) and not signs:
            return f"no prox is known for {penalty!r} within {', '.join(map(repr, sets))}"
        return ""


@dataclass
class Units(Part):
    """The tensors of units, with the penalty that makes whole units zero."""

    key: str
    joint: Joint
    looks: Mapping[str, Callable[[], Tensor]]
    cones: dict[str, list[tuple[str, Constraint]]] = field(default_factory=dict)  # by tensor
    smooth: list[str] = field(default_factory=list)  # other rules on them, which act by gradient

    computed = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.looks)

    def tensors(self) -> list[Tensor]:
        return [look() for look in self.looks.values()]

    @property
    def keys(self) -> list[str]:
        return [self.key, *dict.fromkeys(self.smooth + [key for own in self.cones.values() for key, _ in own])]

    @property
    def strengths(self) -> list[tuple[str, float]]:
        return _least(self.key, self.joint.blocks[0].what)

    @property
    def penalised_by(self) -> list[str]:
        return [self.key]

    def moved(self, ws: Sequence[Tensor], gradients: Sequence[Tensor], t: float) -> list[Tensor]:
        found = {name: w - t * g for name, w, g in zip(self.names, ws, gradients, strict=True)}
        for name, cones in self.cones.items():
            found[name] = nearest(found[name], [one for _, one in cones]).point
        moved = self.joint.shrunk(found, dict.fromkeys(found, t))
        return [moved[name] for name in self.names]

    def value(self, ws: Sequence[Tensor]) -> float:
        return float(self.joint.value(dict(zip(self.names, ws, strict=True))))

    def groups(self, ws: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor | None]]:
        tensors, found = dict(zip(self.names, ws, strict=True)), list[tuple[str, Tensor, Tensor | None]]()
        for block in self.joint.blocks:
            x = block.gather(tensors)
            found.append((block.name, lengths(x, groups_of(block.what, x)), torch.tensor(block.numbers, device="cpu")))
        return found

    def take(self, member: Member, rest: Rest) -> str:
        """Take over the other rules on a tensor; return why that isn't known, or "".

        A multiple of the squares acts by its gradient; a cone of signs comes before the prox.
        """
        for key, penalty in member.penalties:
            if any(leaf.elastic is None or leaf.elastic[0] for _, leaf in penalty.leaves()):
                return f"no prox is known for the sum of units and {penalty!r}: write both as one rule's sum"
            rest.penalties.append((member.tensor, penalty))
            self.smooth.append(key)
        for key, one in member.sets:
            if not (one.separable and one.cone):
                return f"no prox is known for units within {one!r}"
            self.cones.setdefault(member.name, []).append((key, one))
        return ""


def _least(key: str, penalty: Penalty) -> list[tuple[str, float]]:
    strengths = [float(strength) for strength, _ in penalty.leaves() if float(strength) > 0]
    return [(key, min(strengths))] if strengths else []


def _by_entry(penalty: Penalty) -> bool:
    """Return True for a Σ aᵢ|xᵢ| + Σ cᵢ|xᵢ|²."""
    return all(leaf.elastic is not None or leaf.weighs_elastic for _, leaf in penalty.leaves())


@dataclass
class Rest:
    """Penalties that act through their gradient, and reasons why rules aren't certified."""

    penalties: list[tuple[Callable[[], Tensor], Penalty]] = field(default_factory=list)
    joint: list[Callable[[], list[Term]]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # by rule
    unknown: set[str] = field(default_factory=set)  # names of tensors of which no step is known


def members_of(bounds: Sequence[Bound], root: nn.Module) -> tuple[list[Part], Rest]:
    """Return the parts of tensors under rules with a prox, and what is left of the rules.

    Raises:
        HowError: a rule with `every`, sharded parameters, or a penalty on derivatives.
    """
    members, rest = dict[str, Member](), Rest()
    convex = {
        handle.name
        for b in bounds
        if b.rule.how == "parametrize"
        for handle, what in b.parameters
        if isinstance(what, Constraint) and what.convex
    }
    for bound in bounds:
        _check_bound(bound, root)
        if bound.joint is not None:
            continue
        standing = {handle.name for handle, _, _ in bound.standing(root)}
        for handle, what in at_steps(bound, root) if bound.rule.how != "forward" else ():
            if handle.name in standing:
                _sort(bound, handle, what, convex, root, members, rest)
    units = _units(bounds, root, members, rest)
    for name, member in list(members.items()):
        why = "another set, which isn't convex, holds for it" if name in rest.unknown else member.unknown()
        if why:
            rest.left_out.update(dict.fromkeys(member.keys, f"{name}: {why}"))
            rest.unknown.add(name)
            del members[name]
    return [*members.values(), *units], rest


def _units(bounds: Sequence[Bound], root: nn.Module, members: dict[str, Member], rest: Rest) -> list[Units]:
    """Return the parts of units across tensors, which take over the members that they hold."""
    parts: list[Units] = []
    for bound in bounds:
        looks = {handle.name: functools.partial(handle.find, root) for handle, _, _ in bound.standing(root)}
        if bound.joint is None or not looks:
            continue
        if not isinstance(bound.what, Penalty):
            rest.left_out[bound.key] = f"{', '.join(looks)}: the set of {bound.rule.what!r} isn't convex"
            rest.unknown |= set(looks)
            continue
        part = Units(bound.key, bound.joint.of(looks), looks)
        if why := _why_not(part, bound.what, parts):
            rest.joint.append(functools.partial(joint_terms, bound, root))
            rest.left_out[bound.key] = f"{', '.join(looks)}: {why}; its gradient counts"
        else:
            parts.append(part)
    for part in list(parts):
        held = [members.pop(name) for name in part.names if name in members]
        whys = [why for member in held if (why := part.take(member, rest))]
        whys += ["another set, which isn't convex, holds for it"] * any(name in rest.unknown for name in part.names)
        if whys:
            keys = [part.key, *(key for member in held for key in member.keys)]
            rest.left_out.update(dict.fromkeys(keys, f"{', '.join(part.names)}: {whys[0]}"))
            rest.unknown |= set(part.names)
            parts.remove(part)
    return parts


def _why_not(part: Units, what: Penalty, others: Sequence[Units]) -> str:
    """Return why no prox of units is known; "" if it is."""
    tensors = dict(zip(part.names, part.tensors(), strict=True))
    if not what.has_prox:
        return f"{what!r} has no known prox"
    if not all(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
        return "a tensor is computed by a parametrisation"
    if overlapping(part.joint.blocks, tensors) is not None:
        return "units share entries, so no prox of all of them is known"
    if any(set(part.names) & set(other.names) for other in others):
        return "another rule of units acts on a tensor of it, so no prox of both is known"
    return ""


def _sort(
    bound: Bound,
    handle: Handle,
    what: Any,
    convex: Iterable[str],
    root: nn.Module,
    members: dict[str, Member],
    rest: Rest,
) -> None:
    """Put a rule on a tensor among the members, or among the rest."""
    look = functools.partial(handle.find, root)
    computed = not isinstance(look(), nn.Parameter)
    reachable = not computed or handle.name in convex
    if isinstance(what, Penalty):
        if what.has_prox and reachable:
            members.setdefault(handle.name, Member(handle.name, look, computed)).penalties.append((bound.key, what))
            return
        rest.penalties.append((look, what))
        why = f"{what!r} has no known prox" if reachable else "the tensor is computed by a parametrisation"
        rest.left_out[bound.key] = f"{handle.name}: {why}; its gradient counts"
    elif isinstance(what, Constraint) and what.convex:
        members.setdefault(handle.name, Member(handle.name, look, computed)).sets.append((bound.key, what))
    elif isinstance(what, Constraint):
        rest.left_out[bound.key] = f"{handle.name}: the set of {what!r} isn't convex"
        rest.unknown.add(handle.name)


def _check_bound(bound: Bound, root: nn.Module) -> None:
    if bound.rule.every != 1:
        raise HowError(
            f"{bound.key!r} acts on every {bound.rule.every}th step only, so it belongs to no fixed objective that a "
            "certificate could be of: attach it with every=1 and a strength divided by that number"
        )
    if bound.rule.cautious or isinstance(bound.rule.what, Sharpness):
        raise HowError(
            f"{bound.key!r} depends on the optimizer's steps, so it belongs to no fixed objective that a certificate "
            "could be of: attach the other rules alone for it"
        )
    if any(is_sharded(handle.find(root)) for handle, _ in bound.parameters):
        raise HowError(f"{bound.key!r}: a certificate needs whole parameters, and these are sharded: gather them first")
    if bound.derivative is not None:
        raise HowError(
            f"{bound.key!r}: a certificate isn't known for penalties on derivatives; attach the other rules alone, and "
            "add its value to loss()"
        )


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Set a model to eval() in the block; then restore modes, buffers and generators."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


@dataclass
class Objective:
    """Data loss + rules of a model: parts, the penalties that act by gradient, free tensors."""

    bounds: Sequence[Bound]
    model: nn.Module
    loss: Loss
    parts: Sequence[Part]
    rest: Rest
    free: dict[str, Tensor]
    length: float = 1.0  # of a step to begin polishing with, / 100

    @classmethod
    def of(cls, bounds: Sequence[Bound], model: nn.Module, loss: Loss, trained: set[int] | None) -> Objective:
        """Return the objective of an attachment.

        Args:
            bounds: the bound rules.
            model: the model.
            loss: the data loss, a function without arguments.
            trained: ids of the optimizers' parameters; None counts all parameters.
        """
        parts, rest = members_of(bounds, model)
        handles = {handle.name: handle for b in bounds for handle, _ in b.parameters}
        names = [name for part in parts for name in part.names]
        known = {id(t) for name in (*names, *rest.unknown) for t in handles[name].stored(model)}
        free: dict[str, Tensor] = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in known and (trained is None or id(p) in trained)
        }
        return cls(bounds, model, loss, parts, rest, free)

    @property
    def names(self) -> list[str]:
        """The names of all tensors that the objective is a function of."""
        return [*(name for part in self.parts for name in part.names), *self.free]

    def tensors(self) -> list[Tensor]:
        """Return the current tensors, in the order of `names`."""
        return [*(tensor for part in self.parts for tensor in part.tensors()), *self.free.values()]

    @property
    def held(self) -> int:
        """The number of tensors of all parts, which come first in `names`."""
        return sum(len(part.names) for part in self.parts)

    def split(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Part, list[Tensor]]]:
        """Yield (part, its tensors), given tensors in the order of `names`."""
        start = 0
        for part in self.parts:
            yield part, list(tensors[start : start + len(part.names)])
            start += len(part.names)

    def moved(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor], t: float) -> list[Tensor]:
        """Return the tensors after a proximal step of length t."""
        pairs = zip(self.split(tensors), self.split(gradients), strict=True)
        own = [z for (part, ws), (_, gs) in pairs for z in part.moved(ws, gs, t)]
        rest = zip(tensors[self.held :], gradients[self.held :], strict=True)
        return [*own, *(w - t * g for w, g in rest)]

    def check(self) -> None:
        """Check that the data loss is the same twice.

        Raises:
            PenaltyError: it isn't, or it is no scalar.
        """
        if isinstance(self.loss, Repeatable):
            return
        first, second = (float(self._data_loss().detach()) for _ in range(2))
        eps = torch.finfo(torch.float32).eps
        if not abs(first - second) <= 64 * eps * max(abs(first), abs(second)):
            raise PenaltyError(
                f"loss() gave {first:.8g} and then {second:.8g}: a certificate is of a loss that stays the same. Give "
                "it the same data each time, and leave out what is random (the model is in eval() there)"
            )

    def _data_loss(self) -> Tensor:
        with parametrize.cached():
            return self._called()

    def _called(self) -> Tensor:
        found = self.loss()
        if not isinstance(found, Tensor) or found.dim() != 0:
            came = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else brief(found)
            raise PenaltyError(
                f"loss() returns the data loss, a 0-d tensor with its graph; got {came}: write for instance "
                "reg.certificate(lambda: F.cross_entropy(model(x), y))"
            )
        if any(module.training for module in self.model.modules()):
            raise PenaltyError(
                "loss() set the model, or a part of it, to train(): a certificate is of the model in eval(), where "
                "nothing is random; leave the mode alone in it"
            )
        return found

    def value(self) -> float:
        """Return data loss + penalties that act by their gradient."""
        with ExitStack() as stack:
            return float(self._total(stack).detach())

    def evaluate(self) -> tuple[float, float, list[Tensor]]:
        """Return (data loss, that + penalties by gradient, gradients in the order of `names`)."""
        with ExitStack() as stack:
            total = self._total(stack)
            tensors = self.tensors()
            if not total.requires_grad:
                raise PenaltyError(
                    "loss() has no graph to the model's parameters: compute it from model(x) itself, without "
                    "torch.no_grad(), .detach() or .item()"
                )
            found = torch.autograd.grad(total, tensors, allow_unused=True)
        gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
        gradients = [exact(g.to_dense() if g.is_sparse else g).detach() for g in gradients]
        return self.last_loss, float(total.detach()), gradients

    def _total(self, stack: ExitStack) -> Tensor:
        stack.enter_context(parametrize.cached())
        evaluation = stack.enter_context(Evaluation(self.bounds, self.model).attached())
        loss = self._called()
        self.last_loss = float(loss.detach())
        self._check_calls(evaluation)
        terms = [*evaluation.with_graph(), *(penalty(look()) for look, penalty in self.rest.penalties)]
        terms += [totals([joint()])[0] for joint in self.rest.joint]
        for term in terms:
            loss = loss.to(torch.promote_types(loss.dtype, term.dtype)) + term.to(loss.device)
        return loss

    def _check_calls(self, evaluation: Evaluation) -> None:
        """Check that each layer under rules was called once."""
        for bound in self.bounds:
            for recorder in bound.recorders:
                calls = evaluation.counts.get(id(recorder), 0)
                if calls == 0 and not bound.rule.optional:
                    raise NeverFiredError(f"{bound.key!r}: loss() never called {recorder.point.name!r} of the model")
                mean = recorder in bound.penalty_recorders and recorder.point.place.call is None
                if evaluation.forwards > 1 or (calls > 1 and mean):
                    raise HowError(
                        f"{bound.key!r}: loss() called {recorder.point.name!r} {calls} times; a certificate knows "
                        "penalties on activations for one call: run the model once, on all the data"
                    )
