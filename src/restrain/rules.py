"""Rules: what × where × how. `What` is the base of penalties and transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from restrain import registry
from restrain.activation_points import Places
from restrain.errors import HowError, PlanError
from restrain.fields import brief, call_text, check_flags, is_whole, shortened
from restrain.named_tensors import Location
from restrain.schedule import Strength
from restrain.selections import Where, as_where, weights

How = Literal["loss", "gradient", "decoupled", "proximal", "project", "parametrize", "forward"]


def same(a: Any, b: Any) -> bool:
    """Return True if two settings are equal.

    Tensors and arrays, also in lists and mappings, are compared by shape and value.
    """
    if a is b:
        return True
    if hasattr(a, "dtype") or hasattr(b, "dtype"):
        kinds = [type(a) is type(b), *[getattr(a, k, 0) == getattr(b, k, 0) for k in ("shape", "dtype", "device")]]
        return all(kinds) and not getattr(a, "is_meta", False) and bool((a == b).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class What:
    """Base of penalties and transforms; it has a registered name and makes rules by `on`."""

    keywords: ClassVar[tuple[str, ...]] = ()  # further names beside the lower-case class name
    entrywise: bool = False  # a sum of a function of each entry
    by_entry: bool = False  # any part of a tensor can be treated alone
    has_tangent: bool = False  # a constraint with a formula for `tangent`
    takes_outputs: ClassVar[bool] = False  # called with named parameters and named outputs
    joint: bool = False  # acts on all tensors of its rule together
    over_units: bool = False  # its groups are units across tensors

    def __init_subclass__(cls, register: bool = True, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "__repr__" not in vars(cls):
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]  # a dataclass then writes none
        if cls.__eq__ in (object.__eq__, What.__eq__) and "__eq__" not in vars(cls):
            cls.__eq__, cls.__hash__ = What.__eq__, What.__hash__  # type: ignore[method-assign]  # nor these
        registry.register(cls, (cls.__name__.lower(), *cls.keywords) if register else ())

    def __repr__(self) -> str:
        return call_text(self)

    def __eq__(self, other: object) -> bool:
        """Return True for a dataclass of the same class with equal settings, tensors by value."""
        made = getattr(type(self), "__dataclass_params__", None)
        if self is other or made is None or not made.eq:
            return self is other
        if type(other) is not type(self):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)  # type: ignore[arg-type]

    def __hash__(self) -> int:
        made = getattr(type(self), "__dataclass_params__", None)
        if made is None or not made.eq:
            return object.__hash__(self)
        if not made.frozen:
            raise TypeError(f"{type(self).__name__} can be changed, so it has no hash")
        # None: Dynamo up to torch 2.12 hashes what it is making
        values = [getattr(self, f.name, None) for f in fields(self) if f.compare]  # type: ignore[arg-type]
        return hash((type(self), *[value for value in values if not isinstance(value, Tensor)]))

    def moments(self, at_places: bool) -> tuple[How, ...]:
        """Return the allowed values of `how` on parameters, or on activations; the default first.

        Raises:
            SelectionError: it can't act on them at all.
            PlanError: a base class, which doesn't say.
        """
        raise PlanError(
            f"{type(self).__name__} is a base for classes of your own and can't be a rule: take a subclass, such as "
            "rs.GaussianNoise, or write one that has `moments`"
        )

    def bound_to(self, at: Location) -> What:
        """Return the object bound to a parameter: axes named by meaning resolved, state allocated.

        Raises:
            PenaltyError: the parameter has no such axis.
        """
        return self

    def bound_at_place(self) -> What:
        """Return the object bound to an activation, with its state allocated."""
        return self

    def meet(self, activation: Any) -> Callable[[Tensor], Tensor] | None:
        """Take the activation function at the same place, or None, after `bound_at_place`.

        Returns:
            What a target measures of the place's tensor; None for the tensor itself.

        Raises:
            SelectionError: it needs another one.
        """
        return None

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> Any:
        """Return the object with each moving strength replaced by the 0-d tensor that holds it."""
        return self

    def selected(self, where: Any) -> tuple[What, Where | Places]:
        """Return (what, selection) for the first argument of `on`."""
        everything = "*" if self.over_units else weights
        return self, where if isinstance(where, Places) else as_where(everything if where is None else where)

    def state(self) -> dict[str, Tensor]:
        """Return tensors kept from step to step, for `reg.state_dict()`; loading fills them."""
        return {}

    def stepped(self, w: Tensor | None) -> None:
        """Update the state after a real optimizer step; `w` is the parameter, or None."""

    def on(
        self,
        where: Any = None,
        *,
        how: How | None = None,
        reduce: Literal["sum", "mean"] = "sum",
        name: str | None = None,
        every: int = 1,
        start: int = 0,
        optional: bool = False,
        momentum: Literal["keep", "tangent"] = "keep",
        outputs: Places | None = None,
        metric: Literal["optimizer", "euclidean"] = "optimizer",
        gradient: Literal["keep", "tangent"] | None = None,
        cautious: bool = False,
    ) -> Rule:
        """Return the rule that applies this to `where`.

        Args:
            where: what it acts on: a glob over parameter names, a list of names, a compiled regex,
                a module, a parameter, a module type, a predicate f(name, tensor), a role
                (`rs.weights`, the default), any of these joined by `& | -`, or activations:
                `rs.outputs(...)`, `rs.inputs(...)`.
            how: the moment of action: "loss", "gradient", "decoupled" or "proximal" for penalties,
                "project" or "parametrize" for constraints, "forward" for noise.
            reduce: "mean" for value / number of entries of each tensor, then the mean over tensors.
            name: its key in `values()`.
            every: act on every k-th optimizer step only.
            start: do nothing in the first `start` optimizer steps.
            optional: True if it is no error that nothing matches, or a layer is never called.
            momentum: for constraints, "tangent" projects the optimizer's momentum after each
                projection, so that it doesn't lead out of the set.
            outputs: for a penalty on the whole network, the layers whose outputs it gets.
            metric: for constraints, the distances of projections after a step: in the optimizer's
                own steps if this projection is known, so that training ends at the constrained
                minimiser; or "euclidean", as at attach.
            gradient: for constraints, "tangent" removes from the gradient, before each step, the
                part that leads out of the set. None: only if `metric="optimizer"` needs it, for
                UnitNorm, Orthogonal and LowRank under optimizers such as Adam.
            cautious: with how="decoupled", decay only entries that the optimizer's own step moves
                towards zero or not at all: those with w · u ≥ 0, u = w before - w after that step.
                Chen and others (2025), Cautious weight decay, arXiv 2510.12402.

        Raises:
            HowError: a `how` that is impossible for it.
            SelectionError: a selection of the wrong kind.
            PlanError: an option with an invalid value.
        """
        what, selection = self.selected(where)
        moments = self.moments(isinstance(selection, Places))
        if how is not None and not (isinstance(how, str) and how in moments):
            raise HowError(f"{self!r} acts there by how={' or '.join(map(repr, moments))}, got how={brief(how)}")
        moment = how or moments[0]
        rule = Rule(
            what, selection, moment, reduce, name, every, start, optional, momentum, outputs, metric, gradient, cautious
        )
        _check(rule)
        return rule


@dataclass(frozen=True)
class Rule:
    """A rule: what acts, where, and how. Made by `.on(...)` of a penalty or transform."""

    what: What
    where: Where | Places
    how: How
    reduce: Literal["sum", "mean"] = "sum"
    name: str | None = None
    every: int = 1
    start: int = 0
    optional: bool = False
    momentum: Literal["keep", "tangent"] = "keep"
    outputs: Places | None = None
    metric: Literal["optimizer", "euclidean"] = "optimizer"
    gradient: Literal["keep", "tangent"] | None = None
    cautious: bool = False

    def due(self, step: int) -> bool:
        """Return True if the rule acts at a step; steps are counted from zero."""
        return step >= self.start and (step - self.start) % self.every == 0

    @property
    def at_places(self) -> bool:
        """True if it acts on activations."""
        return isinstance(self.where, Places)

    @property
    def label(self) -> str:
        """Its name, or a text made of what and where."""
        return self.name or f"{shortened(repr(self.what))} on {self.where!r}"

    def __mul__(self, strength: float | Strength) -> Rule:
        return replace(self, what=strength * self.what)  # type: ignore[operator, arg-type]

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Rule:
        what: Any = self.what
        return replace(self, what=what / divisor)

    def __add__(self, other: object) -> Rule:
        raise PlanError(
            "a rule can't be added to: add penalties before .on(...), as in (1e-3 * rs.L1() + 1e-4 * rs.L2()).on(...), "
            "or put the rules into one list"
        )

    __radd__ = __add__

    def __repr__(self) -> str:
        given = [repr(self.where), f"how={self.how!r}"]
        given += [f"reduce={self.reduce!r}"] * (self.reduce != "sum") + [f"name={self.name!r}"] * (
            self.name is not None
        )
        given += [f"every={self.every}"] * (self.every != 1) + [f"start={self.start}"] * (self.start != 0)
        given += ["optional=True"] * self.optional + [f"momentum={self.momentum!r}"] * (self.momentum != "keep")
        given += [f"outputs={self.outputs!r}"] * (self.outputs is not None)
        given += [f"metric={self.metric!r}"] * (self.metric != "optimizer")
        given += [f"gradient={self.gradient!r}"] * (self.gradient is not None)
        given += ["cautious=True"] * self.cautious
        what = f"({self.what!r})" if " " in repr(self.what) else repr(self.what)
        return f"{what}.on({', '.join(given)})"


_WORDS = {
    "reduce": ("sum", "mean"),
    "momentum": ("keep", "tangent"),
    "metric": ("optimizer", "euclidean"),
    "gradient": ("keep", "tangent"),
}


def _check_cautious(rule: Rule) -> None:
    what = rule.what
    check_flags(PlanError, cautious=rule.cautious)
    if rule.cautious and rule.how != "decoupled":
        raise PlanError(f"cautious=True goes with how='decoupled'; {what!r} acts by how={rule.how!r}")
    if rule.cautious and what.joint:
        raise PlanError(f"cautious=True isn't known for {what!r}, which acts on several tensors together")


def _check(rule: Rule) -> None:
    what = rule.what
    if rule.name is not None and not isinstance(rule.name, str):
        raise PlanError(f"name= is text, by which values() calls the rule; got {brief(rule.name)}: put it into quotes")
    check_flags(PlanError, optional=rule.optional)
    _check_cautious(rule)
    for key, known in _WORDS.items():
        value = getattr(rule, key)
        if (value is not None or key != "gradient") and not (isinstance(value, str) and value in known):
            raise PlanError(f"{key}= is {' or '.join(map(repr, known))}, got {brief(value)}")
    if rule.reduce == "mean" and not what.entrywise:
        raise PlanError(f"reduce='mean' is for entrywise penalties such as L1 and L2, not for {what!r}")
    if not is_whole(rule.every, 1):
        raise PlanError(f"every= is a whole number of optimizer steps, at least 1; got {brief(rule.every)}")
    if not is_whole(rule.start, 0):
        raise PlanError(f"start= is a whole number of optimizer steps, zero or more; got {brief(rule.start)}")
    if (rule.every != 1 or rule.start) and rule.how in ("forward", "parametrize"):
        raise PlanError(
            f"how={rule.how!r} acts at each forward; every= and start= are for what acts at a step or a loss"
        )
    for key in ("momentum", "gradient"):
        if getattr(rule, key) == "tangent" and not (rule.how == "project" and what.has_tangent):
            raise PlanError(
                f"{key}='tangent' goes with how='project' and a constraint with a formula for it (`tangent`), not with "
                f"{what!r} by how={rule.how!r}: leave it at 'keep'"
            )
    if rule.how != "project" and (rule.metric != "optimizer" or rule.gradient is not None):
        raise PlanError(
            f"metric= and gradient= say how a constraint is held by how='project'; {what!r} acts by how={rule.how!r}: "
            "leave them out"
        )
    if rule.outputs is not None and rule.at_places:
        raise PlanError(f"{what!r} is of the outputs in .on(...): join them there by |, and leave outputs= out")
    if rule.outputs is not None and not (what.takes_outputs and isinstance(rule.outputs, Places)):
        raise PlanError("outputs=rs.outputs(...) goes with a penalty on the whole network (rs.NetworkPenalty)")
