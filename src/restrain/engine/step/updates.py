"""Rules that depend on the optimizer's own update: cautious decay, and Hyperball.

Both need the weights as the optimizer finds them. They are copied before the step, one copy of each
tensor with such a rule; where Hyperball knows the optimizer's formula, the new weights are computed
then and there, in float32 or wider, so that no difference of weights is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import RMSprop

from restrain.axes import Grouping, all_in_range, peaks, squared
from restrain.engine.distributed import local, part, ranks_of, totals, whole
from restrain.engine.ops import OPTIMIZERS, Batch, Change, Group, StepScalars, counted, state_names
from restrain.engine.step.worklist import Member, ParameterRules, total
from restrain.errors import HowError, OptimizerError
from restrain.named_tensors import is_sharded
from restrain.penalties.shrink import at_least_float32
from restrain.rules import Rule
from restrain.transforms.hyperball import HeldNorm

Act = Callable[[Iterable[Batch]], None]


@dataclass
class Earlier:
    """Weights as the optimizer finds them; or, if these are known by then, the new weights."""

    weights: Tensor
    final: bool = False


def _due(timed: Iterable[tuple[Rule, Any]], step: int) -> bool:
    return any(rule.due(step) for rule, _ in timed)


def waits(works: Iterable[ParameterRules]) -> bool:
    """Return True if a parameter has such a rule."""
    return any(work.cautious or work.held for work in works)


def remember(optimizer: Any, members: Sequence[Member], step: int) -> None:
    """Keep what the rules that are due need, before the optimizer's step."""
    turned = []
    for work, p, group in members:
        work.earlier = None
        grad = p.grad
        if grad is None or group["lr"] == 0 or not (_due(work.cautious, step) or _due(work.held, step)):
            continue
        if grad.is_sparse:
            raise HowError(
                f"{work.handle.name!r} has got a sparse gradient; cautious decay and Hyperball need dense ones: make "
                "the layer with sparse=False"
            )
        if _due(work.held, step) and (u := direction(optimizer, p, group)) is not None:
            turned.append((work, p, group, u))
        else:
            work.earlier = Earlier(p.detach().clone())
    for (work, *_), new in zip(turned, turns([(work, p, g, u) for work, p, g, u in turned]), strict=True):
        work.earlier = Earlier(new, final=True)


@torch.no_grad()
def finish(optimizer: Any, members: Sequence[Member], step: int, act: Act) -> None:
    """Act on the weights that the optimizer has moved."""
    turned = []
    for work, p, group in members:
        earlier, work.earlier = work.earlier, None
        if earlier is None:
            continue
        if earlier.final:
            p.copy_(earlier.weights)
        elif work.held:
            turned.append((work, p, group, earlier.weights))
        else:
            _decay(work, p, group, earlier.weights, step, act)
    moved = [(work, w, group, _movement(optimizer, p, group, w)) for work, p, group, w in turned]
    for (_, p, _, _), new in zip(turned, turns(moved), strict=True):
        p.copy_(new)


# Cautious decay


def _decay(work: ParameterRules, p: Tensor, group: Group, before: Tensor, step: int, act: Act) -> None:
    """Decay the coordinates that the optimizer's step moved towards zero, or not at all."""
    decayed = before.clone()
    change = Change("decay", total([what for rule, what in work.cautious if rule.due(step)]))
    act([Batch([change], StepScalars(group["lr"]), [(decayed,)])])
    now, was, aim = (_real(local(t)) for t in (p, before, decayed))
    towards = was.sign() * (was - now).sign() >= 0  # signs: a product could vanish
    now.add_(torch.where(towards, aim - was, 0))


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


# Hyperball


def has_direction(optimizer: Any) -> bool:
    """Return True if an optimizer's update is known by a formula, not by the movement alone."""
    known = OPTIMIZERS.get(type(optimizer))
    return type(optimizer) is RMSprop or (known is not None and known.update is not None)


def direction(optimizer: Any, p: Tensor, group: Group) -> Tensor | None:
    """Return the coming update of SGD, Adam or AdamW, up to its length and decay; else None."""
    known = OPTIMIZERS.get(type(optimizer))
    if known is None or known.update is None or p.grad is None or p.is_complex():
        return None
    state, wide = optimizer.state.get(p, {}), at_least_float32
    g, scale = wide(local(p.grad)), getattr(optimizer, "grad_scale", None)
    g = g if scale is None else g / scale.to(g.dtype)
    decay = group["weight_decay"]
    if decay and not group.get("decoupled_weight_decay"):
        w = wide(local(p.detach()))
        g = g + (-decay if group["maximize"] else decay) * w
    kept = [wide(local(state[name])) if _has(state, name) else torch.zeros_like(g) for name in state_names(group)]
    scalars = known.update.scalars(group, float(state.get("step", 0)) + 1 if counted(group) else 0.0)
    new, _ = known.update.step({**group, "weight_decay": 0}, scalars, torch.zeros_like(g), g, kept)
    return -new  # type: ignore[no-any-return]


def _has(state: Mapping[str, Any], name: str) -> bool:
    return isinstance(state.get(name), Tensor)


def _movement(optimizer: Any, p: Tensor, group: Group, before: Tensor) -> Tensor:
    """Return the update that an optimizer has made, up to its length."""
    w, now = at_least_float32(local(before)), at_least_float32(local(p))
    if type(optimizer) is RMSprop and p.grad is not None:
        state, g = optimizer.state[p], at_least_float32(local(p.grad))
        if group["momentum"]:
            kept: Tensor = at_least_float32(local(state["momentum_buffer"]))
            return kept
        g = (-g if group["maximize"] else g) + group["weight_decay"] * w
        second = at_least_float32(local(state["square_avg"]))
        if group["centered"]:
            second = second - at_least_float32(local(state["grad_avg"])).square()
        found: Tensor = g / (second.clamp_min(0).sqrt() + group["eps"])
        return found
    if p.dtype.itemsize < 4:
        raise OptimizerError(
            f"Hyperball: of {type(optimizer).__name__} only the movement of the weights is known, which {p.dtype} "
            "rounds away: keep weights in float32, or use SGD, Adam, AdamW or RMSprop"
        )
    shrunk = _decoupled_decay(optimizer, group)
    return w * shrunk - now


def _decoupled_decay(optimizer: Any, group: Group) -> float:
    """Return the factor by which an optimizer's decoupled weight decay scales the weights."""
    decoupled = group.get("decoupled_weight_decay", type(optimizer).__name__ in ("Muon", "Adafactor"))
    return 1 - float(group["lr"]) * float(group.get("weight_decay", 0)) if decoupled else 1.0


def turns(moves: Sequence[tuple[ParameterRules, Tensor, Group, Tensor]]) -> list[Tensor]:
    """Return R · N(w - lr · R · N(u)) for (rules, w, group, u), with own parts w and u.

    Of sharded tensors held as a whole three sums are needed, of all tensors in one message.
    """
    works = [work.held[0][1] for work, *_ in moves]
    parts = [_Turn.of(held, w, u) for held, (_, w, _, u) in zip(works, moves, strict=True)]
    terms = [[(one, turn.ranks)] for turn in parts for one in turn.sums()]
    summed = totals(terms) if any(turn.ranks for turn in parts) else [value for ((value, _),) in terms]
    return [
        turn.result(float(group["lr"]), summed[3 * at : 3 * at + 3])
        for at, (turn, (_, _, group, _)) in enumerate(zip(parts, moves, strict=True))
    ]


@dataclass
class _Turn:
    """One weight with its update, viewed by groups; own parts of a sharded one."""

    held: HeldNorm
    like: Tensor  # the parameter
    w: Tensor
    u: Tensor
    groups: Grouping | None  # None: sums over the own part of a whole tensor
    ranks: Any
    gathered: bool = False

    @classmethod
    def of(cls, held: HeldNorm, w: Tensor, u: Tensor) -> _Turn:
        groups, own = held.groups, at_least_float32(local(w.detach()))
        if not is_sharded(w):
            made = cls(held, w, groups.view(own), groups.view(u), groups, ())
        elif not groups.keep:
            made = cls(held, w, own, u, None, ranks_of(w))
        else:
            full = at_least_float32(whole(w.detach()))
            update = whole(_as_part(u, w))
            made = cls(held, w, groups.view(full), groups.view(update), groups, (), gathered=True)
        return made

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Σ |w|², Σ w u, Σ |u|² of each group, with u in a range where squares exist."""
        total = self.groups.sum if self.groups is not None else torch.sum
        squares = total(squared(self.u))
        if self.groups is not None and not all_in_range(squares):
            self.u = self.u / peaks(self.u, self.groups)
            squares = total(squared(self.u))
        product = (self.w * self.u.conj()).real if self.u.is_complex() else self.w * self.u
        return total(squared(self.w)), total(product), squares

    def result(self, rate: float, sums: Sequence[Tensor]) -> Tensor:
        """Return the new weight in the dtype and layout of the parameter."""
        ww, wu, uu = sums
        radius = self.held.radius.to(uu.device)
        radius = radius.reshape(uu.shape) if self.groups is None else radius
        moves = uu != 0
        length = rate * radius / torch.where(moves, uu, 1).sqrt()
        squares = ww - 2 * length * wu + length.square() * uu
        moves = moves & ~(squares <= 0)  # below zero by rounding, where w and the update cancel
        scale = radius / torch.where(moves, squares, 1).sqrt()
        new = torch.where(moves, (self.w - length * self.u) * scale, self.w).to(self.like.dtype)
        if self.groups is None:
            return _as_part(new, self.like)
        new = new.reshape(self.like.shape)
        return _as_part(part(new, self.like), self.like) if self.gathered else new


def _as_part(own: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor with this own part, laid out as `like`."""
    made = like.detach().clone()
    if made.dtype != own.dtype:
        made = made.to(own.dtype)
    local(made).copy_(own)
    return made
