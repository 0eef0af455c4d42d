"""Binds the rules of a plan to a model's tensors and layers, and refuses at once what can't work."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from restrain.engine.derivative import Derivative
from restrain.engine.metric import diagonal
from restrain.engine.steps import total
from restrain.engine.taps import Spot, Tap, Watch
from restrain.errors import HowError, NoProxError, OptimizerError, RestrainWarning, SelectionError
from restrain.penalties import Penalty
from restrain.penalties.derivative import OnDerivatives
from restrain.places import Places, select_places
from restrain.rules import Rule, What
from restrain.select import Names, select_parameters
from restrain.sites import Handle, Layer, Slot, layers, parameters
from restrain.transforms.base import Noise


@dataclass
class Bound:
    """A rule bound to a model: the parameters or places that it acts on, by name.

    Its rule selects by names too; nothing here holds a module or tensor of the model.
    """

    rule: Rule
    key: str
    parameters: list[tuple[Handle, Any]] = field(default_factory=list)  # with what acts there, its axes resolved
    spots: list[Spot] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    raws: list[Watch] = field(default_factory=list)
    derivative: Derivative | None = None
    notes: list[str] = field(default_factory=list)  # what the table says of it

    @property
    def watches(self) -> list[Watch]:
        """All that looks at places for it."""
        return [*self.taps, *self.raws, *(self.derivative.watches if self.derivative is not None else ())]

    @property
    def names(self) -> list[str]:
        """The names of what it acts on."""
        return [handle.name for handle, _ in self.parameters] + [spot.name for spot in self.spots]

    def tensors(self, root: nn.Module, frozen: bool = False) -> list[tuple[Tensor, Any]]:
        """Its parameters as they stand now, with what acts on each; frozen and lazy ones are left out."""
        found = [(handle.find(root), what) for handle, what in self.parameters]
        return [(p, what) for p, what in found if (frozen or p.requires_grad) and not is_lazy(p)]


def bind(rules: Iterable[Rule], model: nn.Module) -> list[Bound]:
    """The rules bound to the model's tensors, each under a key of its own.

    Raises:
        SelectionError: a rule matches nothing and isn't optional, or a place where hooks can't fire.
        HowError: a moment that a tensor can't have.
    """
    sites, slots = list(layers(model)), parameters(model)
    bounds: list[Bound] = []
    for rule in rules:
        key, number = rule.label, 2
        while any(bound.key == key for bound in bounds):
            key, number = f"{rule.label} #{number}", number + 1
        bounds.append(_bind(Bound(rule, key), sites, slots))
    return bounds


def _bind(bound: Bound, sites: Sequence[Layer], slots: Sequence[Slot]) -> Bound:
    rule, mean = bound.rule, bound.rule.reduce == "mean"
    if isinstance(rule.where, Places):
        bound.spots = _spots(rule, rule.where, sites)
        if isinstance(rule.what, Penalty):
            weight = 1 / len(bound.spots) if mean and bound.spots else 1.0
            device = next((p.device for p in sites[0].module.parameters()), torch.device("cpu"))
            watches = [Watch(bound.key, spot, rule.optional) for spot in bound.spots]
            bound.taps = [Tap(watch, rule.what.bound_at_place(), device, mean=mean, weight=weight) for watch in watches]
        bound.rule = replace(rule, where=_places_by_name(bound.spots) or rule.where, name=bound.key)
        if isinstance(rule.what, OnDerivatives):
            _bind_derivative(bound, rule.what, sites)
        return bound
    try:
        chosen = select_parameters(rule.where, slots)
    except SelectionError:
        if not rule.optional:
            raise
        chosen = []
    bound.parameters = [(slot.handle, _resolve(rule, slot)) for slot in chosen]
    outputs = _spots(rule, rule.outputs, sites) if rule.outputs is not None else []
    bound.raws = [Watch(bound.key, spot, rule.optional) for spot in outputs]
    where = Names(tuple(slot.name for slot in chosen)) if chosen else rule.where
    bound.rule = replace(rule, where=where, outputs=_places_by_name(outputs), name=bound.key)
    return bound


def _bind_derivative(bound: Bound, what: OnDerivatives, sites: Sequence[Layer]) -> None:
    by = bound.spots if what.leaf.of_loss else _spots(bound.rule, what.leaf.by, sites)
    if any(spot.place.via is not None for spot in by):
        raise SelectionError(f"{bound.key}: via= is for what is looked at; wrt= takes the layer's own output or input")
    bound.rule = replace(bound.rule, what=what.named(_places_by_name(by)))
    if bound.spots and by:
        of = [] if what.leaf.of_loss else bound.spots
        bound.derivative = Derivative(bound.key, what, of, by, bound.rule.optional, bound.notes)


def _places_by_name(spots: Sequence[Spot]) -> Places | None:
    """The selection of these places by their names."""
    places: list[Places] = []
    for place in dict.fromkeys(spot.place for spot in spots):
        names = tuple(spot.name for spot in spots if spot.place == place)
        places += [replace(place, which=None)] * ("" in names)
        places += [replace(place, which=Names(names))] * (names != ("",))
    return functools.reduce(operator.or_, places) if places else None


def _spots(rule: Rule, where: Places, sites: Sequence[Layer]) -> list[Spot]:
    try:
        targets = select_places(where, sites)
    except SelectionError:
        if not rule.optional:
            raise
        return []
    for target in targets:
        chain = target.layer.chain
        if len(chain) > 1 and isinstance(chain[-2], nn.MultiheadAttention):
            raise SelectionError(
                f"{target.name!r} is used by nn.MultiheadAttention past its hooks, so nothing can be caught there; "
                f"select the attention itself: rs.{target.place.kind}({target.name.rpartition('.')[0]!r})"
            )
        if isinstance(rule.what, Noise) and target.place.via is not None:
            raise SelectionError("noise can't act inside the model's own call of via=; without via= it acts before it")
    return [Spot.of(target) for target in targets]


def _resolve(rule: Rule, slot: Slot) -> What:
    """What acts on this parameter, with axes named by meaning resolved; refuses what can't be."""
    if slot.parametrized and rule.how != "loss":
        raise HowError(
            f"{slot.name!r} is parametrised: it is computed anew at each use, so how={rule.how!r} would act on a "
            "temporary. Use how='loss', which acts on the effective weight, or remove the parametrisation"
        )
    if rule.how in ("gradient", "proximal") and getattr(slot.owner, "sparse", False) is True:
        raise HowError(
            f"{slot.name!r} has sparse gradients (sparse=True); how={rule.how!r} needs dense ones: use how='loss'"
        )
    if not isinstance(rule.what, Penalty) and rule.how != "project":
        return rule.what
    tensor = slot.tensor()
    if any(base.__name__ == "DTensor" for base in type(tensor).__mro__):
        raise HowError(
            f"{slot.name!r} is a sharded DTensor (FSDP2), which this version doesn't support: attach before sharding "
            "isn't enough either; use DDP"
        )
    if is_lazy(tensor):
        if rule.how == "loss" and rule.what.entrywise:
            return rule.what
        raise HowError(
            f"{slot.name!r} has no shape yet (a lazy module): run one forward before attaching {rule.what!r}"
        )
    return rule.what.bound_to(slot.location())


def check_optimizers(bounds: Sequence[Bound], root: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse rules that the optimizers can't carry out, and warn of what is likely not meant.

    Raises:
        OptimizerError: no given optimizer holds a parameter, or the one that does can't do it.
        NoProxError: proximal rules on one tensor whose sum has no known prox.
        HowError: a prox that isn't by entry or by group, under a metric that differs by entry.
    """
    holders = {id(p): (o, group) for o in reversed(optimizers) for group in o.param_groups for p in group["params"]}
    proximal: dict[str, tuple[Tensor, list[Penalty], Optimizer]] = {}
    for bound in bounds:
        decayed = []
        for handle, what in bound.parameters:
            p = handle.find(root)
            holder, group = holders.get(id(p), (None, None))
            if bound.rule.how in ("gradient", "proximal", "project") and p.requires_grad:
                _check_held(bound, handle, p, holder, group)
            if holder is None or group is None:
                continue
            if bound.rule.how == "proximal":
                proximal.setdefault(handle.name, (p, [], holder))[1].append(what)
            if group.get("weight_decay") and _decays(what):
                decayed.append(handle.name)
            if bound.rule.how == "project" and not isinstance(holder, torch.optim.SGD):
                metric = f"while {type(holder).__name__} moves each entry by a step of its own"
                bound.notes = [f"{bound.key}: a Euclidean projection, {metric}"]
        if decayed:
            _warn(f"{bound.key!r} decays what the optimizer's weight_decay decays, too: {', '.join(decayed[:5])}")
    for name, (p, penalties, optimizer) in proximal.items():
        _check_prox(name, p, total(penalties), optimizer)


def _decays(what: Any) -> bool:
    """Whether it is a penalty with a sum of squares in it."""
    return isinstance(what, Penalty) and any(leaf.elastic is not None and leaf.elastic[1] for _, leaf in what.leaves())


def _check_held(
    bound: Bound, handle: Handle, p: Tensor, holder: Optimizer | None, group: dict[str, Any] | None
) -> None:
    if holder is None or group is None:
        raise OptimizerError(
            f"{bound.key!r} acts at the optimizer's step (how={bound.rule.how!r}), but no given optimizer holds "
            f"{handle.name!r}: write rs.attach(model, plan, optimizer) with the one that trains it, or a list"
        )
    if group.get("maximize") and bound.rule.how != "project":
        raise OptimizerError(
            f"{bound.key!r}: an optimizer with maximize=True would ascend the penalty; minimise -loss instead"
        )
    if p.dtype in (torch.bfloat16, torch.float16) and bound.rule.how != "project":
        _warn(
            f"{handle.name!r} is {str(p.dtype)[6:]}: small changes by {bound.key!r} are lost to rounding; keep weights "
            "in float32"
        )


def _check_prox(name: str, p: Tensor, penalty: Penalty, optimizer: Optimizer) -> None:
    by_entry = diagonal(optimizer)  # raises for an optimizer of unknown metric
    if by_entry and p.is_complex():
        raise HowError(
            f"how='proximal' on {name!r}: {type(optimizer).__name__} moves the real and the imaginary part of "
            "a complex entry by steps of their own, for which no prox is known. Use SGD, or how='gradient'"
        )
    if not penalty.has_prox:
        try:
            penalty.prox(torch.zeros(1))
        except NoProxError as error:
            raise NoProxError(f"how='proximal' on {name!r}: {error}") from None
    if by_entry and not (penalty.entrywise or penalty.groupwise):
        raise HowError(
            f"how='proximal' on {name!r}: {type(optimizer).__name__} moves each entry by a step of its own, for which "
            f"{penalty!r} has no prox (it is neither entrywise nor by group). Use SGD, or how='gradient'"
        )


def _warn(message: str) -> None:
    warnings.warn(message, RestrainWarning, stacklevel=5)
