"""Binding of a plan's rules to a model's tensors and layers, with checks that they can act."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from restrain import operations
from restrain.activation_points import Place, Places, Target, select_places
from restrain.engine.backends import Compile
from restrain.engine.binding.blocks import joint_of, members_of, named_units
from restrain.engine.core import Overrides
from restrain.engine.distributed import shards
from restrain.engine.forward import Derivative, PenaltyRecorder, Point, Recorder, blank, masks
from restrain.engine.loss import AtPlace
from restrain.engine.ops import Joint
from restrain.engine.strengths import Moving, tensor_of
from restrain.engine.weights import Use, check_computable, uses_of
from restrain.errors import DetachedError, HowError, RestrainError, SelectionError
from restrain.fields import brief
from restrain.named_tensors import Handle, Location, Slot, device_of, is_sharded, layers, parameters
from restrain.penalties import NetworkPenalty, Penalty
from restrain.penalties.derivative import OnDerivatives
from restrain.penalties.functorch import trained
from restrain.rules import Rule, What
from restrain.selections import Names, Object, Parameters, Where
from restrain.transforms.activation import AtLayer
from restrain.transforms.base import Constraint, Noise
from restrain.unit_sets import Units


@dataclass
class Bound:
    """A rule bound to a model: its parameters or activations, by name.

    Its rule selects by names too; no module or tensor of the model is held.
    """

    rule: Rule
    key: str
    compile: Compile = "auto"
    # with the penalty or transform, axes resolved
    parameters: list[tuple[Handle, Any]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    penalty_recorders: list[PenaltyRecorder] = field(default_factory=list)
    output_recorders: list[Recorder] = field(default_factory=list)
    noisy: list[tuple[Use, Noise]] = field(default_factory=list)  # weights with noise in forwards
    # noise and activation functions at layers
    transforms: list[tuple[Point, Noise | AtLayer]] = field(default_factory=list)
    derivative: Derivative | None = None
    joint: Joint | None = None  # how it acts on its parameters together
    notes: list[str] = field(default_factory=list)  # notes for the report's table
    moving: list[Moving] = field(default_factory=list)  # moving strengths of the rule
    what: Any = None  # the rule's `what`, with tensors for moving strengths
    overridden: Overrides = field(default_factory=Overrides)  # tensors substituted for parameters
    given: Rule | None = None  # rule before binding, objects replaced by names

    @property
    def recorders(self) -> list[Recorder]:
        """All recorders of the rule."""
        return [
            *self.penalty_recorders,
            *self.output_recorders,
            *(self.derivative.recorders if self.derivative is not None else ()),
        ]

    @property
    def is_penalty(self) -> bool:
        """True if the rule has a value."""
        return isinstance(self.rule.what, Penalty | NetworkPenalty | OnDerivatives)

    @property
    def names(self) -> list[str]:
        """The names of the parameters and activations."""
        return [handle.name for handle, _ in self.parameters] + [point.name for point in self.points]

    def tensors(self, root: nn.Module, frozen: bool = False) -> list[tuple[Tensor, Any]]:
        """Return (parameter, what) for the current parameters that are neither frozen nor lazy."""
        return [(p, what) for _, p, what in self.standing(root, frozen)]

    def standing(self, root: nn.Module, frozen: bool = False) -> list[tuple[Handle, Tensor, Any]]:
        """Return (handle, parameter, what) for the current parameters; see `tensors`."""
        whats = {handle.name: what for handle, what in self.parameters}
        handles = [handle for handle, _ in self.parameters]
        return [(handle, p, whats[handle.name]) for handle, p in self.trained(handles, root, frozen)]

    def trained(
        self, handles: Iterable[Handle], root: nn.Module, frozen: bool = False
    ) -> Iterator[tuple[Handle, Tensor]]:
        """Yield (handle, parameter) for the current parameters that are neither frozen nor lazy."""
        overridden = self.overridden.now(root)
        for handle in handles:
            p = overridden[handle.name] if handle.name in overridden else handle.find(root)
            moves = frozen or (trained(p) if handle.name in overridden else trains(handle, p, root))
            if moves and not is_lazy(p):
                yield handle, p


def trains(handle: Handle, p: Tensor, root: nn.Module) -> bool:
    """Return True if a parameter isn't frozen.

    A tensor computed under `no_grad` requires no gradient, but its stored tensors do.
    """
    return p.requires_grad or (not isinstance(p, nn.Parameter) and any(t.requires_grad for t in handle.stored(root)))


def bind(
    rules: Iterable[Rule], model: nn.Module, compile: Compile = "auto", flattened: Collection[int] = ()
) -> list[Bound]:
    """Return the rules bound to the model's tensors, each with a unique key.

    `flattened` has the ids of parameters that FSDP1 has flattened.

    Raises:
        SelectionError: a rule matches nothing and isn't optional, or selects a layer whose hooks
            never fire.
        HowError: a `how` that is impossible for a tensor.
    """
    shards.at_rest(model)
    index = _ModelIndex(model, flattened)
    bounds: dict[str, Bound] = {}
    for rule in rules:
        label = key = rule.label
        number = 2
        while key in bounds:
            key, number = f"{label} #{number}", number + 1
        bounds[key] = _bind(Bound(rule, key, compile), index)
        _check_network(bounds[key], model)
    _check_parametrized(list(bounds.values()))
    introduce(list(bounds.values()))
    return list(bounds.values())


def parametrized(bounds: Iterable[Bound]) -> Iterator[tuple[Handle, Any]]:
    """Yield (handle, reparametrisation) for rules with how="parametrize"."""
    return (pair for bound in bounds if bound.rule.how == "parametrize" for pair in bound.parameters)


def noisy(bounds: Sequence[Bound]) -> Iterator[tuple[Use, Noise, bool]]:
    """Yield (weight, noise, True if it is an error that the layer is never called).

    It is no error if a penalty trains the weight anyway, or the rule is optional.
    """
    penalised = {h.name for b in bounds if b.rule.how in ("loss", "gradient") for h, _ in b.parameters}
    for bound in bounds:
        for use, noise in bound.noisy:
            yield use, noise, not (bound.rule.optional or use.name in penalised)


class _ModelIndex:
    """Index of a model during binding: each selection and each tensor is looked up once."""

    def __init__(self, model: nn.Module, flattened: Collection[int] = ()) -> None:
        self.flattened = flattened
        self.layers, self._parameters = list(layers(model)), Parameters(parameters(model))
        self.device = device_of(self.layers[0].module)
        self._chosen: dict[tuple[Where, bool], _Chosen] = {}
        self._targets: dict[tuple[Places, bool], _Targets] = {}
        self._locations: dict[str, Location] = {}
        self._points: dict[Any, Point] = {}
        self._recorders: dict[Any, dict[int, PenaltyRecorder]] = {}
        self._units: dict[Units, Units] = {}  # named member by member

    def chosen(self, where: Where, optional: bool) -> _Chosen:
        """Return the parameters of a selection."""
        if (where, optional) not in self._chosen:
            slots = self._parameters.select(where, optional)
            plain = all(not slot.parametrized and self._plain(slot) for slot in slots)
            by_name = Names(tuple([slot.name for slot in slots])) if slots else where
            self._chosen[where, optional] = _Chosen(slots, by_name, plain)
        return self._chosen[where, optional]

    def _plain(self, slot: Slot) -> bool:
        tensor = self.location(slot).tensor
        known = not (tensor.is_meta or is_lazy(tensor) or is_sharded(tensor) or id(tensor) in self.flattened)
        return known and getattr(slot.owner, "sparse", False) is not True

    def with_units(self, rule: Rule) -> tuple[What, Collection[str] | None]:
        """Return (what, members) of a rule, its units named; members None for a rule without units.

        Raises:
            SelectionError: units that the model doesn't have, unless the rule is optional.
        """
        if not rule.what.over_units:
            return rule.what, None
        try:
            named = named_units(rule.what, self.layers[0].module, self._units)
        except SelectionError:
            if rule.optional:
                return rule.what, ()
            raise
        return named, members_of(named)

    def location(self, slot: Slot) -> Location:
        """Return the parameter's location, for `bound_to`."""
        if slot.name not in self._locations:
            self._locations[slot.name] = slot.location()
        return self._locations[slot.name]

    def targets(self, where: Places, optional: bool) -> _Targets:
        """Return the activations of a selection."""
        if (where, optional) not in self._targets:
            found = select_places(where, self.layers, optional)
            for target in found if not optional else ():
                _check_caught(target)
            points = [self._point(Point.of(target)) for target in found]
            self._targets[where, optional] = _Targets(found, points, _places_by_name(points))
        return self._targets[where, optional]

    def _point(self, point: Point) -> Point:
        """Return a shared object for all points of the same tensor, however they were selected."""
        return self._points.setdefault((point.path, replace(point.place, which=None)), point)

    def shared(
        self, what: Penalty, mean: bool, optional: bool, moving: Sequence[Moving]
    ) -> tuple[float, Penalty, dict[int, PenaltyRecorder]]:
        """Return (strength, penalty, recorders by point).

        Rules that differ only in strength share their recorders.
        """
        (strength, leaf), *others = what.leaves()
        if others or moving or isinstance(strength, Tensor) or leaf.state():
            return 1.0, what, {}
        try:
            return strength, leaf, self._recorders.setdefault((leaf, mean, optional), {})
        except TypeError:  # not hashable
            return 1.0, what, {}


@dataclass(frozen=True)
class _Chosen:
    """Parameters of a selection."""

    slots: list[Slot]
    where: Where  # selection by name
    # all are ordinary: not meta, lazy, sharded, parametrised or with sparse gradients
    plain: bool = False


@dataclass(frozen=True)
class _Targets:
    """Activations of a selection."""

    found: list[Target]
    points: list[Point]
    where: Places | None  # selection by name; None if empty


def _check_declared(what: What) -> None:
    """Compare the declaration of a penalty or constraint with its formula, once per class."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    for leaf in leaves if isinstance(what, Penalty | Constraint) else ():
        operations.check(leaf)


def _check_network(bound: Bound, model: nn.Module) -> None:
    """Call a penalty on the whole network with its parameters once, before training."""
    if isinstance(bound.rule.what, NetworkPenalty):
        found = {handle.name: handle.find(model) for handle, _ in bound.parameters}
        if found and not any(map(is_lazy, found.values())):
            bound.what.check(found)


def _check_parametrized(bounds: Sequence[Bound]) -> None:
    """Check that no rule acts on the temporary tensor of a parametrisation in the same plan."""
    computed = {
        handle.name: bound for bound in bounds if bound.rule.how == "parametrize" for handle, _ in bound.parameters
    }
    for bound in bounds if computed else ():
        for handle, _ in bound.parameters:
            first = computed.get(handle.name, bound)
            if first is not bound and bound.rule.how != "loss":
                ways = (
                    "only the last would be sure to hold"
                    if bound.rule.how == "parametrize"
                    else ("it is computed anew at each forward, so the other would act on a temporary")
                )
                raise HowError(
                    f"{handle.name!r} is parametrised by {first.key!r}, and {bound.key!r} has how={bound.rule.how!r}: "
                    f"{ways}. Give the constraint how='project', or the other rule how='loss'"
                )


def _bind(bound: Bound, index: _ModelIndex) -> Bound:
    rule = bound.rule
    _check_declared(rule.what)
    bound.what = rule.what.with_strengths(lambda source: tensor_of(source, bound.moving, rule, bound.key, index.device))
    if rule.what.joint and not isinstance(rule.where, Places):
        return _bind_joint(bound, rule, index)
    if isinstance(rule.where, Places):
        targets = _targets(rule, rule.where, index)
        bound.points = targets.points
        bound.given = rule if not _by_identity(rule.where) else replace(rule, where=targets.where or rule.where)
        if isinstance(rule.what, Penalty):
            bound.penalty_recorders = _penalty_recorders(bound, index)
        if isinstance(rule.what, NetworkPenalty):
            _bind_of_outputs(bound, index)
        if rule.how == "forward":
            bound.transforms = [(point, _at_layer(bound.what, point, index)) for point in bound.points]
        bound.rule = replace(rule, where=targets.where or rule.where, name=bound.key)
        if isinstance(rule.what, OnDerivatives):
            _bind_derivative(bound, targets, index)
        return bound
    chosen = index.chosen(rule.where, rule.optional)
    bound.parameters = _resolved(rule, bound.what, chosen, index)
    if rule.how == "forward":
        pairs = zip(chosen.slots, bound.parameters, strict=True)
        bound.noisy = [(use, what) for slot, (_, what) in pairs for use in uses_of(slot)]
    outputs = None if rule.outputs is None else _targets(rule, rule.outputs, index)
    bound.given = rule if not _by_identity(rule.where) else replace(rule, where=chosen.where)
    if outputs is not None and rule.outputs is not None and _by_identity(rule.outputs):
        bound.given = replace(bound.given, outputs=outputs.where or rule.outputs)
    bound.output_recorders = (
        [Recorder(bound.key, point, rule.optional) for point in outputs.points] if outputs is not None else []
    )
    by_name = None if outputs is None else outputs.where
    bound.rule = replace(rule, where=chosen.where, outputs=by_name, name=bound.key)
    return bound


def _bind_of_outputs(bound: Bound, index: _ModelIndex) -> None:
    """Bind a penalty of several outputs, with the parameters that it names."""
    bound.what = what = bound.what.bound_at_place()
    further = [point for where in what.further_places() for point in _targets(bound.rule, where, index).points]
    bound.output_recorders = [Recorder(bound.key, point, bound.rule.optional) for point in (*bound.points, *further)]
    names = what.parameter_names()
    slots = index.chosen(Names(names), bound.rule.optional).slots if names else []
    bound.parameters = [(slot.handle, what) for slot in slots]


def _at_layer(what: Any, point: Point, index: _ModelIndex) -> Noise | AtLayer:
    """Return noise, or an activation function with its state for the layer."""
    if isinstance(what, Noise):
        return what
    bound: AtLayer = what.bound_in_layer(point.find(index.layers[0].module), point.place.kind, index.device)
    return bound


def introduce(bounds: Sequence[Bound]) -> None:
    """Give penalties at places with an activation function this function.

    Raises:
        SelectionError: a penalty needs another one.
    """
    acting = {_spot(point): what for bound in bounds for point, what in bound.transforms if isinstance(what, AtLayer)}
    for bound in bounds:
        for recorder in bound.penalty_recorders:
            found = acting.get(_spot(recorder.point))
            for _, leaf in recorder.penalty.leaves():
                recorder.measured = leaf.meet(found) or recorder.measured
        if isinstance(bound.rule.what, NetworkPenalty) and bound.points:
            bound.what.meet(acting.get(_spot(bound.points[0])))


def _spot(point: Point) -> tuple[Any, ...]:
    return point.path, point.place.kind, point.place.index


def _bind_joint(bound: Bound, rule: Rule, index: _ModelIndex) -> Bound:
    """Bind a rule that acts on its parameters together; its units are named member by member."""
    assert not isinstance(rule.where, Places)
    slots = index.chosen(rule.where, rule.optional).slots
    named, members = index.with_units(rule)
    slots = slots if members is None else [slot for slot in slots if slot.name in members]
    if not slots and not rule.optional:
        raise SelectionError(
            f"{rule.label}: none of the units' members is selected by {rule.where!r}: {brief(members)}"
        )
    bound.what = named.with_strengths(lambda source: tensor_of(source, bound.moving, rule, bound.key, index.device))
    for slot in slots:
        _resolve(rule, bound.what, slot, True, False, index)
    names = Names(tuple([slot.name for slot in slots]))
    bound.rule = bound.given = replace(rule, what=named, where=names if slots else rule.where, name=bound.key)
    if slots:
        bound.joint = joint_of(bound.rule, bound.what, slots, {slot.name: index.location(slot) for slot in slots})
        bound.parameters = [(handle, bound.what) for handle in bound.joint.handles]
    return bound


def _penalty_recorders(bound: Bound, index: _ModelIndex) -> list[PenaltyRecorder]:
    model = index.layers[0].module
    mean = bound.rule.reduce == "mean"
    weight = 1 / len(bound.points) if mean and bound.points else 1.0
    what = bound.what.bound_in(model)
    for place in {point.place for point in bound.points if point.place.padded}:
        masks.check(place, what, model)
    for place in {point.place for point in bound.points}:
        masks.check_tokens(place, what, mean)
    activities = [moving.activity for moving in bound.moving if moving.activity is not None]
    empty, optional = blank(index.device), bound.rule.optional
    strength, known = 1.0, dict[int, PenaltyRecorder]()
    if same := _same_anywhere(what, "bound_at_place"):
        strength, what, known = index.shared(what, mean, optional, bound.moving)
    at_place = AtPlace(what, bound.compile)
    penalty_recorders = []
    for point in bound.points:
        if id(point) not in known:
            own = at_place if same else AtPlace(what.bound_at_place(), bound.compile)
            known[id(point)] = PenaltyRecorder(
                bound.key, point, optional, own, empty, mean=mean, weight=weight, activities=activities
            )
        known[id(point)].factors[bound.key] = strength
        penalty_recorders.append(known[id(point)])
    return penalty_recorders


def _bind_derivative(bound: Bound, at: _Targets, index: _ModelIndex) -> None:
    what: OnDerivatives = bound.what
    targets = at if what.leaf.of_loss else _targets(bound.rule, what.leaf.by, index)
    by = targets.points
    if any(point.place.via is not None for point in by):
        raise SelectionError(f"{bound.key}: via= is for what is looked at; wrt= takes the layer's own output or input")
    bound.rule = replace(bound.rule, what=what.named(targets.where))
    if bound.points and by:
        of = [] if what.leaf.of_loss else bound.points
        bound.derivative = Derivative(bound.key, what, of, by, bound.rule.optional, bound.notes)


def _places_by_name(points: Sequence[Point]) -> Places | None:
    """Return the selection of these activations by their names."""
    places: list[Places] = []
    for place in dict.fromkeys(point.place for point in points):
        names = tuple(point.name for point in points if point.place == place)
        places += [replace(place, which=None)] * ("" in names)
        places += [replace(place, which=Names(names))] * (names != ("",))
    return functools.reduce(operator.or_, places) if places else None


def _check_caught(target: Target) -> None:
    """Check that the model calls the layer, so that hooks fire."""
    chain = target.layer.chain
    if len(chain) > 1 and isinstance(chain[-2], nn.MultiheadAttention):
        raise SelectionError(
            f"{target.name!r} is used by nn.MultiheadAttention past its hooks, so nothing can be caught there; "
            f"select the attention itself: rs.{target.place.kind}({target.name.rpartition('.')[0]!r})"
        )


def _targets(rule: Rule, where: Places, index: _ModelIndex) -> _Targets:
    targets = index.targets(where, rule.optional)
    for target in targets.found if not isinstance(rule.what, Penalty) else ():
        if rule.how == "forward" and target.place.via is not None:
            raise SelectionError(
                f"{rule.what!r} can't act inside the model's own call of via=; without via= it acts before it"
            )
        if isinstance(rule.what, Noise):
            rule.what.suits(target.layer.module, target.place.kind)
        if target.place.padded:
            raise SelectionError(f"mask= and lengths= are for penalties at one place, not for {rule.what!r}")
        if target.place.average != "samples" or (target.place.call is not None and not rule.what.takes_outputs):
            raise SelectionError(f"average= and call= are for penalties at one place, not for {rule.what!r}")
    return targets


def _same_anywhere(what: What, binding: str = "bound_to") -> bool:
    """Return True if binding doesn't depend on the tensor or activation."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else []
    return bool(leaves) and all(getattr(type(leaf), binding) is getattr(Penalty, binding) for leaf in leaves)


def _resolved(rule: Rule, what: What, chosen: _Chosen, index: _ModelIndex) -> list[tuple[Handle, Any]]:
    """Return (handle, bound what) per parameter; ordinary parameters need no checks."""
    anywhere, looks = _same_anywhere(what), shards.looks(what)
    if not (chosen.plain and isinstance(what, Penalty | Constraint) and rule.how != "parametrize"):
        return [(slot.handle, _resolve(rule, what, slot, anywhere, looks, index)) for slot in chosen.slots]
    if anywhere:
        return [(slot.handle, what) for slot in chosen.slots]
    return [(slot.handle, what.bound_to(shards.location(index.location(slot), looks))) for slot in chosen.slots]


def _resolve(rule: Rule, what: What, slot: Slot, anywhere: bool, looks: bool, index: _ModelIndex) -> What:
    """Return the penalty or transform with axes resolved for a parameter, after checks."""
    if slot.parametrized and rule.how != "loss":
        raise HowError(
            f"{slot.name!r} is parametrised: it is computed anew at each use, so how={rule.how!r} would act on a "
            "temporary. Use how='loss', which acts on the effective weight, or remove the parametrisation"
        )
    if rule.how not in ("loss", "project") and getattr(slot.owner, "sparse", False) is True:
        way = "use how='loss'" if isinstance(what, Penalty) else "make the layer with sparse=False"
        raise HowError(f"{slot.name!r} has sparse gradients (sparse=True); how={rule.how!r} needs dense ones: {way}")
    if rule.how in ("parametrize", "forward"):
        check_computable(slot)
    if rule.how == "parametrize" and len(slot.owners) > 1:
        raise HowError(
            f"{slot.name!r} is tied ({', '.join(slot.names)}): parametrising it at one place would untie it. Use "
            "how='project', or tie the layers by calling one module twice"
        )
    tensor = index.location(slot).tensor
    shards.check(rule, slot, tensor)
    if id(tensor) in index.flattened:
        shards.check_flattened(rule, what, slot)
    if rule.how not in ("loss", "forward") and tensor.is_meta:
        raise HowError(
            f"{slot.name!r} is on the meta device, where it has no values yet, and to_empty() puts another tensor in "
            f"its place, so how={rule.how!r} can't be attached now: to_empty(), load, make the optimizer, then attach"
        )
    if rule.how == "loss" and not isinstance(what, Penalty):
        return what
    if is_lazy(tensor):
        if rule.how == "loss" and what.entrywise:
            return what
        raise HowError(
            f"{slot.name!r} has no shape yet (a lazy module): run one forward before attaching {rule.what!r}"
        )
    bound = what if anywhere else what.bound_to(shards.location(index.location(slot), looks))
    if tensor.is_meta and bound.state():
        raise HowError(
            f"{slot.name!r} is on the meta device, and {rule.what!r} keeps tensors of it: to_empty(), load, then attach"
        )
    return bound


# ---------------------------------------------------------------- after a change of the model


def _by_identity(where: Where | Places) -> bool:
    """Return True if a selection refers to a module or tensor object.

    A bound rule must not keep it alive.
    """
    stack: list[Any] = [where]
    while stack:
        one = stack.pop()
        if isinstance(one, Object):
            return True
        stack += [getattr(one, part) for part in ("left", "right", "which") if hasattr(one, part)]
    return False


@dataclass(frozen=True)
class Whereabouts:
    """Layer and shape of a parameter when its rules were bound."""

    owner: weakref.ref[nn.Module]
    shape: torch.Size | None  # None: a lazy parameter

    @classmethod
    def of(cls, handle: Handle, model: nn.Module) -> Whereabouts | None:
        """Return layer and shape of a parameter now; None if it is gone."""
        owner = handle.find_owner(model)
        stored = None if owner is None else owner._parameters.get(handle.attribute)
        if owner is None:
            return None
        return cls(weakref.ref(owner), None if stored is None or is_lazy(stored) else stored.shape)

    def flattened(self, earlier: Whereabouts) -> bool:
        """Return True if the same layer's parameter has another number of axes than earlier."""
        shapes = (self.shape, earlier.shape)
        return self.owner() is earlier.owner() and None not in shapes and len(shapes[0]) != len(shapes[1])  # type: ignore[arg-type]


def whereabouts(bounds: Iterable[Bound], model: nn.Module) -> dict[str, Whereabouts | None]:
    """Return {name: layer and shape} of the parameters with rules."""
    handles = {handle.name: handle for bound in bounds for handle, _ in bound.parameters}
    return {name: Whereabouts.of(handle, model) for name, handle in handles.items()}


@dataclass
class Followed:
    """The changes that adapt a bound rule to a changed model."""

    bound: Bound
    parameters: list[tuple[Handle, Any]]
    points: dict[tuple[str, Place], Point]  # by name and place
    joint: Joint | None = None

    @property
    def paths(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """{path: current path} of the rule's layers."""
        points = [*self.bound.points, *(recorder.point for recorder in self.bound.recorders)]
        return {point.path: self.now(point).path for point in points}

    def now(self, point: Point) -> Point:
        """Return the current activation for an activation of the rule."""
        return self.points.get(_key(point), point)

    def adopt(self) -> None:
        """Apply the changes to the bound rule."""
        bound = self.bound
        bound.parameters, bound.joint = self.parameters, self.joint
        whats = {handle.name: what for handle, what in self.parameters}
        bound.noisy = [(use, whats[use.name]) for use, _ in bound.noisy]
        bound.points = [self.now(point) for point in bound.points]
        for recorder in bound.recorders:
            recorder.point = self.now(recorder.point)
        for recorder in bound.penalty_recorders:
            recorder.copies = None  # the next layer may be another one, which overwrites the place


def followed(bounds: Sequence[Bound], model: nn.Module, known: Mapping[str, Whereabouts | None]) -> list[Followed]:
    """Return the changes for bound rules after layers or tensors of the model were replaced.

    Each rule must select the same names as before, of which several may now share a tensor. Rules
    on tensors of another layer or shape are resolved again; their state stays.

    Args:
        bounds: the bound rules.
        model: the current model.
        known: `whereabouts` of the rules before.

    Raises:
        DetachedError: a rule selects other names now, or can't act on a current tensor.
    """
    index, found = _ModelIndex(model), []
    for bound in bounds:
        try:
            if bound.joint is not None:
                found.append(_joint_again(bound, index))
                continue
            parameters = _again(bound, index, known)
            if isinstance(bound.rule.what, NetworkPenalty):
                bound.what.check({handle.name: handle.find(model) for handle, _ in parameters})
            found.append(Followed(bound, parameters, _points_again(bound, index)))
        except DetachedError:
            raise
        except RestrainError as error:
            raise _left_behind(bound, str(error)) from error
    return found


def _left_behind(bound: Bound, why: str) -> DetachedError:
    return DetachedError(
        f"the model's layers were changed since the rules were attached, and {bound.key!r} can't follow: {why}. After "
        "the change write reg.detach(), then rs.attach(model, plan, optimizer)"
    )


def _compare(bound: Bound, before: Collection[str], now: Sequence[Collection[str]]) -> None:
    """Check that selected tensors, each with all its names, have the same names as before.

    Raises:
        DetachedError: they haven't.
    """
    known = set(before)
    more = [min(names) for names in now if not known & set(names)]
    lost = sorted(known - {name for names in now for name in names})
    if more or lost:
        told = [f"it doesn't select {brief(lost)} any more"] * bool(lost) + [
            f"it would select {brief(more)} too"
        ] * bool(more)
        raise _left_behind(bound, " and ".join(told))


def _again(bound: Bound, index: _ModelIndex, known: Mapping[str, Whereabouts | None]) -> list[tuple[Handle, Any]]:
    """Return (handle, what) for the current parameters of a rule, each tensor once."""
    given = bound.given or bound.rule
    if isinstance(given.where, Places):
        return bound.parameters  # read by name
    before = {handle.name: what for handle, what in bound.parameters}
    slots = index.chosen(given.where, given.optional).slots
    _compare(bound, before, [slot.names for slot in slots])
    found = []
    for slot in slots:
        names = [name for name in slot.names if name in before]
        what = before[names[0]]
        now = Whereabouts.of(slot.handle, index.layers[0].module)
        same = [now == known.get(name) for name in names]
        for earlier in (known.get(name) for name in names):
            if now is not None and earlier is not None and now.flattened(earlier):
                raise _left_behind(
                    bound,
                    f"{slot.name!r} had the shape {tuple(earlier.shape or ())} and has {tuple(now.shape or ())}, as by "
                    "FullyShardedDataParallel, which is to wrap the model first",
                )
        if len(names) > 1 and _state(what):
            raise _left_behind(bound, f"{', '.join(map(repr, names))} are one tensor now, and it keeps a state of each")
        found.append((slot.handle, what if all(same) else _replaced(bound, slot, what, index)))
    if bound.rule.how == "forward" and {s for slot in slots for s in uses_of(slot)} != {s for s, _ in bound.noisy}:
        raise _left_behind(bound, "its weights are used at other places now")
    return found


def _joint_again(bound: Bound, index: _ModelIndex) -> Followed:
    """Return the changes for a rule that acts on its parameters together, bound again."""
    before = {handle.name for handle, _ in bound.parameters}
    given = replace(bound.given or bound.rule, name=bound.rule.name)
    now = _bind_joint(Bound(given, bound.key, moving=bound.moving, what=bound.what), given, index)
    _compare(bound, before, [[handle.name] for handle, _ in now.parameters])
    return Followed(bound, now.parameters, {}, now.joint)


def _state(what: Any) -> Mapping[str, Tensor]:
    return what.state() if isinstance(what, What) else {}


def _replaced(bound: Bound, slot: Slot, before: Any, index: _ModelIndex) -> Any:
    """Return the penalty or transform for a parameter whose layer or shape has changed."""
    if bound.rule.how == "parametrize":
        raise _left_behind(bound, f"{slot.name!r} belongs to another layer, or has another shape, now")
    rule, what = bound.rule, bound.what
    now = _resolve(rule, what, slot, _same_anywhere(what), shards.looks(what), index)
    state, own = _state(before), _state(now)
    if not state:
        return now
    if {key: t.shape for key, t in state.items()} != {key: t.shape for key, t in own.items()}:
        raise _left_behind(bound, f"it keeps tensors of {slot.name!r}, which has another shape now")
    return before


def _points_again(bound: Bound, index: _ModelIndex) -> dict[tuple[str, Place], Point]:
    """Return {(name, place): point} of a rule's current activations."""
    given = bound.given or bound.rule
    groups: list[tuple[Sequence[Point], Sequence[Point]]] = []
    if isinstance(given.where, Places):
        groups.append((bound.points, _targets(given, given.where, index).points))
        if bound.derivative is not None and not bound.derivative.penalty.of_loss:
            by = [probe.point for probe in bound.derivative.moved]
            groups.append((by, _targets(given, bound.derivative.penalty.by, index).points))
    if given.outputs is not None:
        before = [recorder.point for recorder in bound.output_recorders]
        groups.append((before, _targets(given, given.outputs, index).points))
    found = {}
    for earlier, now in groups:
        _compare(bound, [str(point) for point in earlier], [(str(point),) for point in now])
        found.update({_key(point): point for point in now})
    return found


def _key(point: Point) -> tuple[str, Place]:
    return point.name, replace(point.place, which=None)
