"""Base class of penalties (tensor → number) and their algebra: `c * p` and `p + q` are penalties.

Penalties of the whole network have a base of their own, `NetworkPenalty`.
"""

from __future__ import annotations

import functools
import inspect
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from restrain import registry
from restrain.activation_points import Places
from restrain.errors import NoProxError, PenaltyError, SelectionError
from restrain.fields import is_iterable, is_number, is_whole, shown_number
from restrain.named_tensors import Location
from restrain.operations import Absolute, Square, Terms, slope, total
from restrain.penalties import keras_objects
from restrain.penalties.algebra import Algebra, Combination, Multiple, Total
from restrain.penalties.shrink import as_step, at_least_float32, check_dtype, check_step, shrink_entries
from restrain.rules import How
from restrain.schedule import Strength, checked_number


def checked_strength(strength: Any) -> float:
    """Return a strength as a float.

    Raises:
        PenaltyError: the strength isn't a finite real number, zero or more.
    """
    if isinstance(strength, Strength):
        raise PenaltyError(
            f"{strength!r} moves, so it multiplies a penalty, as in {strength!r} * rs.L1(); write a number here"
        )
    return checked_number("a strength", strength)


def at_hand(strength: Any, penalty: object) -> Any:
    """Return the current strength: a number, or the tensor with the present value of a schedule.

    Raises:
        PenaltyError: the strength is a schedule, and its penalty isn't attached to a model.
    """
    if isinstance(strength, Strength):
        raise PenaltyError(
            f"the strength of {penalty!r} moves with the steps of a training: attach a rule with it, or take it at one "
            "step, as in schedule.at(100) * rs.L1()"
        )
    return strength


def times(strength: Any, value: Tensor) -> Tensor:
    """Return strength · value in the dtype of `value`."""
    result: Tensor = value * (strength.to(value.dtype) if isinstance(strength, Tensor) else strength)
    return result


def is_off(strength: Any) -> bool:
    """Return whether a scheduled strength is zero now, so that its penalty can be skipped."""
    return isinstance(strength, Tensor) and not torch.compiler.is_compiling() and not strength


def nothing(w: Tensor) -> Tensor:
    """Return a differentiable zero, connected to `w` in the autograd graph."""
    return w.flatten()[:0].abs().sum()


def checked_setting(name: str, number: float, low: float, high: float = inf, *, closed: bool = False) -> None:
    """Check that a setting is a finite number in (low, high), or in [low, high) if `closed`.

    Raises:
        PenaltyError: the setting is no number, or lies outside the interval.
    """
    if not is_number(number) or not (low < number < high or (closed and number == low)):
        least = f" {'from' if closed else 'above'} {low:g}" if isfinite(low) else ""
        most = f"{' and' if least else ''} below {high:g}" if isfinite(high) else ""
        raise PenaltyError(f"{name}= is a finite number{least}{most}; got {shown_number(number)}")


def batch_size(h: Tensor, dim: int) -> int:
    """Return the length of the batch axis `dim` of `h`.

    Raises:
        PenaltyError: `h` has no axis `dim`.
    """
    if not -h.dim() <= dim < h.dim():
        raise PenaltyError(f"an output of shape {tuple(h.shape)} has no batch axis {dim}: say which by batch_dim=")
    return h.shape[dim]


def checked_axis(name: str, axis: Any) -> int | None:
    """Return the axis given as a setting: a whole number, or None for the default.

    Raises:
        PenaltyError: the axis is of another type.
    """
    if axis is None or is_whole(axis):
        return axis
    raise PenaltyError(f"{name}= is an axis of the output, such as 1 or -1; got {axis!r}")


Tensors: TypeAlias = Any
"""Argument of a penalty: a tensor, or an iterable or mapping of tensors; of a formula: a tensor."""


def in_float32(formula: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """Return formula(w), computed in float32 or wider and outside autocast.

    Raises:
        PenaltyError: `w` isn't of a floating-point or complex dtype.
    """
    check_dtype(w)
    device = w.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return formula(at_least_float32(w))
    return formula(at_least_float32(w))


def of_tensors(formula: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensors], Tensor]:
    """Return a `__call__` that sums a formula of one tensor over an iterable or mapping of tensors.

    `Penalty.__init_subclass__` wraps the `__call__` of every subclass in it, so that the author of
    a penalty writes only the formula. It is plain tensor code, which torch.compile traces with
    fullgraph=True.
    """

    @functools.wraps(formula)
    def call(self: Any, w: Tensors) -> Tensor:
        if not isinstance(w, Tensor) and type(w).__module__.partition(".")[0] == "keras":
            keras_objects.register(Penalty)
            w = w.value  # the tensor of a Keras 3 variable, on the torch backend
        if isinstance(w, Tensor):
            return _scalar(self, in_float32(functools.partial(formula, self), w))
        if isinstance(w, nn.Module) or not is_iterable(w):
            hint = ": pass model.parameters()" if isinstance(w, nn.Module) else ""
            raise PenaltyError(
                f"{self!r} takes a tensor, or an iterable or mapping of them, got {type(w).__name__}{hint}"
            )
        members = list(w.values() if isinstance(w, Mapping) else w)
        for member in members:
            if not isinstance(member, Tensor):
                raise PenaltyError(f"{self!r} got an iterable with {type(member).__name__} in it; it takes tensors")
        if not members:
            raise PenaltyError(f"{self!r} got an empty iterable of tensors: one that was already used up?")
        values = [_scalar(self, in_float32(functools.partial(formula, self), member)) for member in members]
        return functools.reduce(operator.add, [value.to(values[0].device) for value in values])

    return call


def _scalar(penalty: object, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise PenaltyError(f"the __call__ of {type(penalty).__name__} must return a 0-d tensor, got {came}: sum it")


def taking_masks(over_batch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an `over_batch` that takes a mask; if it has no mask argument, h is masked with zeros.

    `Penalty.__init_subclass__` wraps the `over_batch` of every subclass in it.
    """
    if "mask" in inspect.signature(over_batch).parameters:
        return over_batch

    @functools.wraps(over_batch)
    def call(self: Any, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return over_batch(self, h if mask is None else self.without_padding(h, mask), dim)

    return call


def checking_steps(prox: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `prox` that refuses integer tensors, and steps that aren't finite and ≥ 0.

    `Penalty.__init_subclass__` wraps the `prox` of every subclass in it; `unchecked_prox` calls the
    original.
    """

    @functools.wraps(prox)
    def call(self: Any, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        check_dtype(w)
        check_step(step)
        return prox(self, w, step)

    call.unchecked = prox  # type: ignore[attr-defined]
    return call


def checking_tensors(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `gradient` that refuses sparse tensors, integer tensors and objects of other types.

    `Penalty.__init_subclass__` wraps the `gradient` of every subclass in it.
    """

    @functools.wraps(gradient)
    def call(self: Any, w: Tensor) -> Tensor:
        check_dtype(w)
        return gradient(self, w)

    return call


def unchecked_prox(penalty: Penalty, w: Tensor, step: float | Tensor) -> Tensor:
    """Return the prox without checking the entries of `step`.

    Within an optimizer's step the entries may be on a GPU, where a check would wait for them, and
    are NaN where the gradient was NaN.
    """
    checked = type(penalty).prox
    found: Tensor = getattr(checked, "unchecked", checked)(penalty, w, step)
    return found


class Penalty(Algebra["Penalty"], register=False):
    """Base of penalties: functions of one tensor whose value is a number.

    A subclass needs only `__call__(self, w)`, the formula for one tensor `w` (which is float32 or
    wider); then it can be called with many tensors, scaled, added, and attached to a model by `on`.
    Plan files and keywords of models refer to it by its name in lower case, and by the names in
    `keywords`.

    >>> class WeightInverse(rs.Penalty):
    ...     def __call__(self, w):
    ...         return (1 / w.square().sum(1)).sum()
    >>> (0.5 * WeightInverse())([torch.ones(3, 2), torch.ones(1, 4)])
    tensor(0.8750)
    """

    uniform: bool = True
    """If entrywise: all entries share one function, so that parts of a tensor can stand alone."""

    weighs_elastic: bool = False
    """The value is Σ aᵢ|xᵢ| + Σ cᵢ|xᵢ|², with weights for each entry: see `elastic_at`."""

    groupwise: bool = False
    """The prox also takes a step for each entry, and is exact in that diagonal metric."""

    operations: Terms | None = None
    """Weighted terms that sum to the value, for fast backends; None if there is a formula only."""

    concavity: float = 0.0
    """The least r, as far as it is known, for which value + r/2 Σ|x|² is convex: r-concave."""

    soft_after: bool = False
    """The prox of f + a Σ|x| is the prox of f, then a soft threshold: see `Sum.prox`."""

    at_outputs: ClassVar[bool] = False
    """Meant for activations: as a keyword of models it acts on hidden layers, not on weights."""

    needs_model: ClassVar[bool] = False
    """The value depends on other tensors of the model, which `bound_in` finds."""

    by_steps: bool = False
    """The value changes with the optimizer's steps, which `stepped` counts."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "prox" in vars(cls):
            cls.prox = checking_steps(vars(cls)["prox"])  # type: ignore[method-assign]
        if "gradient" in vars(cls):
            cls.gradient = checking_tensors(vars(cls)["gradient"])  # type: ignore[method-assign]
        if "__call__" in vars(cls):
            _forget_declared(cls)
            cls.__call__ = of_tensors(vars(cls)["__call__"])  # type: ignore[method-assign, assignment]
        if "over_batch" in vars(cls):
            cls.over_batch = taking_masks(vars(cls)["over_batch"])  # type: ignore[method-assign]

    def get_config(self) -> dict[str, Any]:
        """Return the penalty as plain data, with which Keras saves and clones a model.

        Raises:
            PlanError: the penalty holds tensors or functions.
        """
        keras_objects.register(Penalty)
        return keras_objects.Forms.write(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Penalty:
        """Return the penalty described by the result of `get_config`."""
        return keras_objects.Forms.read(config)  # type: ignore[no-any-return]

    @abstractmethod
    def __call__(self, w: Tensors) -> Tensor:
        """Return the differentiable value at a tensor, or its sum over an iterable or mapping.

        Raises:
            PenaltyError: an empty iterable, or a member that isn't a floating-point or complex
                tensor.
        """

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        """Whether the value is Σᵢ fᵢ(xᵢ); then the prox also takes a step for each entry."""
        return self.operations is not None and all(one.by_entry for _, one in self.operations)

    @property
    def shrinks(self) -> bool:
        """Whether the prox scales each entry by a factor in [0, 1]; then a Σ|x| can be added.

        `Sum.prox` says how.
        """
        return self.elastic is not None

    @property
    def elastic(self) -> tuple[float, float] | None:
        """(a, c) if the value is a Σ|x| + c Σ|x|², else None."""
        l1 = l2 = 0.0
        for factor, one in self.operations or ((0.0, None),):
            if isinstance(one, Absolute):
                l1 += factor
            elif isinstance(one, Square):
                l2 += factor
            else:
                return None
        return l1, l2

    def elastic_at(self, w: Tensor) -> tuple[Any, Any] | None:
        """Return (a, c) if the value is Σ aᵢ|xᵢ| + Σ cᵢ|xᵢ|², else None.

        a and c are numbers, or tensors with a number for each entry.
        """
        return self.elastic

    @property
    def has_prox(self) -> bool:
        """Whether the proximal operator is known."""
        return type(self).prox is not Penalty.prox or self.elastic is not None

    @property
    def by_entry(self) -> bool:  # type: ignore[override]
        """Whether acting on parts of a tensor equals acting on the whole."""
        return self.entrywise and self.uniform

    @checking_steps
    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return the proximal operator argmin_z ½‖z - w‖² + step · value(z), in the dtype of `w`.

        Args:
            w: a tensor.
            step: a number or 0-d tensor; if the penalty is entrywise or groupwise, also a tensor of
                the shape of `w`. Then the result is argmin_z Σ |z - w|² / (2 step) + value(z).

        Raises:
            NoProxError: no prox is known; the message names the penalties that have one.
            PenaltyError: an integer tensor; a step that isn't finite and real, zero or more.
        """
        if (elastic := self.elastic) is not None:
            return shrink_entries(w, step, *elastic)
        raise NoProxError(
            f"{self!r} has no known prox; these have one: {', '.join(_with_prox())}. "
            "Use how='loss' or how='gradient', or define prox(self, w, step) in its class"
        )

    @checking_tensors
    def gradient(self, w: Tensor) -> Tensor:
        """Return the gradient of the value at `w`, in its dtype.

        For complex entries it follows autograd's convention.
        """
        if self.operations is not None:
            return slope(self.operations, at_least_float32(w.detach())).to(w.dtype)
        check_dtype(w)
        with torch.enable_grad():
            point = w.detach().requires_grad_()
            value = self(point)
            if not value.requires_grad:
                return torch.zeros_like(point)
            return torch.autograd.grad(value, point, materialize_grads=True)[0]

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        """Return the value for a layer's outputs: a sum over features, a mean over the batch axis.

        Args:
            h: the outputs.
            dim: the batch axis; with None the result is the plain value. An empty batch gives zero.
            mask: a boolean tensor, broadcastable to `h` and of as many axes, true at the entries
                that count. The mean is still over all samples.

        Raises:
            PenaltyError: `h` has no axis `dim`, or the penalty can't leave entries out.
        """
        if mask is not None:
            h = self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        return self(h) / size if size else in_float32(lambda x: x.abs().sum(), h)

    @property
    def takes_mask(self) -> bool:
        """Whether `over_batch` takes a mask: by its own means, or because zeros add nothing."""
        return self.groupwise or (self.entrywise and self.uniform and not self(torch.zeros(1, device="cpu")))

    def without_padding(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return `h` with zeros outside a mask, for a penalty to whose value zeros add nothing.

        Raises:
            PenaltyError: zeros change the value of this penalty.
        """
        if not torch.compiler.is_compiling() and not self.takes_mask:
            raise PenaltyError(
                f"{self!r} can't leave padding out: its value isn't a sum over entries or groups in which zeros add "
                "nothing. Define over_batch(self, h, dim, mask), and takes_mask = True, in its class"
            )
        return torch.where(mask, h, 0)

    @property
    def by_token(self) -> bool:
        """Whether tokens can be the samples of an output: see `over_tokens`."""
        return type(self).over_batch is Penalty.over_batch

    def over_tokens(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the value of each token, averaged over the tokens that count.

        Args:
            h: the outputs; each row along the last axis is a token.
            mask: as of `over_batch`, the same for all features of a token.
        """
        rows = h.flatten(0, -2)
        if mask is None:
            return self.over_batch(rows, 0)
        kept = mask.expand(*h.shape[:-1], 1).flatten(0, -2)
        return self.over_batch(rows, 0, kept) * rows.shape[0] / kept.sum().clamp_min(1)

    def mean(self, w: Tensor) -> Tensor:
        """Return value / number of entries, of an entrywise penalty; zero for an empty tensor.

        Raises:
            PenaltyError: the penalty isn't entrywise.
        """
        if not self.entrywise:
            raise PenaltyError(f"reduce='mean' is for entrywise penalties (L1, L2, ElasticNet), not for {self!r}")
        return self(w) / max(w.numel(), 1)

    def bound_to(self, at: Location) -> Penalty:
        return self

    def bound_at_place(self) -> Penalty:
        return self

    def bound_in(self, model: nn.Module) -> Penalty:
        """Return the penalty with the model's tensors that its value needs."""
        return self

    def moments(self, at_places: bool) -> tuple[How, ...]:
        return ("loss",) if at_places else ("loss", "gradient", "decoupled", "proximal")

    def leaves(self) -> list[tuple[Any, Penalty]]:
        """Return the terms of the sum as (strength, penalty) pairs."""
        return [(1.0, self)]

    def split(self) -> tuple[Any, Any, list[tuple[Any, Penalty]]]:
        """Return (a, c, others): the weights of Σ|x| and Σ|x|², and the other terms.

        The other terms are (strength, penalty) pairs as of `leaves`, equal penalties joined.
        Weights and strengths are numbers, or 0-d tensors if scheduled.
        """
        l1: Any = 0.0
        l2: Any = 0.0
        others: list[tuple[Any, Penalty]] = []
        places: dict[Any, int] = {}
        for strength, leaf in self.leaves():
            if (elastic := leaf.elastic) is not None:
                l1, l2 = l1 + strength * elastic[0], l2 + strength * elastic[1]
                continue
            key = _equal(leaf)
            if key in places:
                others[places[key]] = (others[places[key]][0] + strength, leaf)
            else:
                places[key] = len(others)
                others.append((strength, leaf))
        return l1, l2, others

    def _forms(self) -> Any:
        return Scaled, Sum


def _forget_declared(cls: type[Penalty]) -> None:
    """Reset the attributes that belong to a parent's formula in a class with a formula of its own.

    Otherwise the class would inherit a prox and operations that don't fit its formula.
    """
    old = next((base for base in cls.__mro__[1:] if "__call__" in vars(base)), Penalty)
    if inspect.isabstract(old):
        return
    for name in _OF_FORMULA:
        if name not in vars(cls):
            setattr(cls, name, vars(Penalty)[name])


# Attributes that belong to a formula
_OF_FORMULA = (
    *("operations", "elastic", "weighs_elastic", "entrywise", "groupwise", "shrinks", "soft_after", "concavity"),
    *("gradient", "prox", "has_prox"),
)


def _equal(leaf: Penalty) -> Any:
    """Return the key by which equal penalties are joined: the penalty, or its id if unhashable."""
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf


def joined(penalties: Sequence[Penalty]) -> Penalty:
    """Return the sum of penalties, equal members joined; scheduled penalties stay as they are."""
    moving = [one for one in penalties if any(isinstance(strength, Tensor) for strength, _ in one.leaves())]
    fixed = [one for one in penalties if not any(one is other for other in moving)]
    if len(fixed) < 2:
        return penalties[0] if len(penalties) == 1 else Sum(tuple(penalties))
    l1, l2, others = Sum(tuple(fixed)).split()
    elastic = [_Elastic(((l1, Absolute()), (l2, Square())))] if l1 or l2 or not (others or moving) else []
    terms = (*elastic, *[Scaled(strength, leaf) for strength, leaf in others], *moving)
    return terms[0] if len(terms) == 1 else Sum(terms)


def _with_prox() -> list[str]:
    classes = {registry.lookup(name) for name in registry.names()}
    return sorted(c.__name__ for c in classes if issubclass(c, Penalty) and c.prox is not Penalty.prox)


class _Combined(Combination[Penalty], Penalty, register=False):
    """Base of multiples and sums of penalties: a property holds if it holds for all members.

    Binding to a model binds each member.
    """

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return all(member.entrywise for member in self.members)

    @property
    def uniform(self) -> bool:  # type: ignore[override]
        return all(member.uniform for member in self.members)

    @property
    def takes_mask(self) -> bool:
        return all(member.takes_mask for member in self.members)

    @property
    def by_token(self) -> bool:
        return all(member.by_token for member in self.members)

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return any(member.joint for member in self.members)

    @property
    def over_units(self) -> bool:  # type: ignore[override]
        return any(member.over_units for member in self.members)

    def bound_to(self, at: Location) -> Penalty:
        return self.mapped(lambda member: member.bound_to(at))  # type: ignore[no-any-return]

    def bound_at_place(self) -> Penalty:
        return self.mapped(lambda member: member.bound_at_place())  # type: ignore[no-any-return]

    def bound_in(self, model: nn.Module) -> Penalty:
        return self.mapped(lambda member: member.bound_in(model))  # type: ignore[no-any-return]

    def stepped(self, w: Tensor | None) -> None:
        for member in self.members:
            member.stepped(w)


@dataclass(frozen=True, repr=False)
class Scaled(Multiple[Penalty], _Combined, register=False):
    """The product strength · penalty, written `strength * penalty`."""

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        return self.penalty.groupwise

    @property
    def has_prox(self) -> bool:
        return self.penalty.has_prox

    def __call__(self, w: Tensors) -> Tensor:
        if is_off(self.strength):
            return in_float32(nothing, w)
        return times(at_hand(self.strength, self), self.penalty(w))

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        strength = at_hand(self.strength, self)
        if is_off(strength) and self.has_prox:
            return w.clone()
        return unchecked_prox(
            self.penalty, w, strength * (at_least_float32(step) if isinstance(step, Tensor) else step)
        )

    def gradient(self, w: Tensor) -> Tensor:
        if is_off(self.strength):
            return torch.zeros_like(w)
        x = at_least_float32(w)
        return times(at_hand(self.strength, self), self.penalty.gradient(x)).to(w.dtype)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        if is_off(self.strength):
            return in_float32(nothing, h)
        return times(at_hand(self.strength, self), self.penalty.over_batch(h, dim, mask))

    def over_tokens(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        if is_off(self.strength):
            return in_float32(nothing, h)
        return times(at_hand(self.strength, self), self.penalty.over_tokens(h, mask))

    def state(self) -> dict[str, Tensor]:
        return self.penalty.state()

    def leaves(self) -> list[tuple[Any, Penalty]]:
        return [(self.strength * strength, leaf) for strength, leaf in self.penalty.leaves()]


@dataclass(frozen=True, repr=False)
class Sum(Total[Penalty], _Combined, register=False):
    """The sum of penalties of the same tensor, written `p + q`."""

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        return self.has_prox and all(leaf.entrywise or leaf.groupwise for _, leaf in self.leaves())

    @property
    def has_prox(self) -> bool:
        leaves = [leaf for _, leaf in self.leaves()]
        others, weighted = self._others()
        if weighted:
            return all(leaf.has_prox and leaf.shrinks and (leaf.entrywise or leaf.groupwise) for _, leaf in others)
        soft = any(leaf.elastic is not None and leaf.elastic[0] for leaf in leaves)
        return len(others) <= 1 and all(
            leaf.has_prox and (leaf.shrinks or leaf.soft_after or not soft) for _, leaf in others
        )

    def _others(self) -> tuple[list[tuple[Any, Penalty]], list[tuple[Any, Penalty]]]:
        """Return (others, weighted): the terms other than a Σ|x| + c Σ|x|².

        Terms with weights for each entry are set apart if at most one other term remains then.
        """
        others = self.split()[2]
        weighted = [pair for pair in others if pair[1].weighs_elastic]
        rest = [pair for pair in others if not pair[1].weighs_elastic]
        return (rest, weighted) if len(others) > 1 and len(rest) < 2 else (others, [])

    def __call__(self, w: Tensors) -> Tensor:
        return functools.reduce(operator.add, [term(w) for term in self.terms])

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return the prox of a Σ|x| + c Σ|x|² + f, with at most one other term f.

        The square scales w and step by 1 / (1 + 2 c step). The absolute value is a soft threshold
        before the prox of f, which is exact if prox f keeps signs and zeros (Yu 2013, "On
        decomposing the proximal map"), or after it, if f declares `soft_after`. Both hold entry by
        entry, hence also with a step, a and c for each entry.

        Raises:
            NoProxError: there is more than one other term, or the prox of f isn't known or doesn't
                shrink.
        """
        l1, l2, _ = self.split()
        others, weighted = self._others()
        if not self.has_prox:
            members = ", ".join(repr(leaf) for _, leaf in self.leaves())
            raise NoProxError(
                f"no prox is known for the sum of {members}: it is for L1, L2 and ElasticNet, joined by one "
                "that has a prox (which must shrink every entry, or be a total variation, if there is an L1). Use "
                "how='loss' or how='gradient' for one of them"
            )
        x = at_least_float32(w)
        step = as_step(step, x)
        for strength, leaf in weighted:
            own = leaf.elastic_at(x) or (0.0, 0.0)
            l1, l2 = l1 + strength * own[0], l2 + strength * own[1]
        after = any(leaf.soft_after for _, leaf in others)
        x = shrink_entries(x, step, 0.0 if after else l1, l2)
        rest = step / (1 + 2 * l2 * step)
        for strength, leaf in (pair for pair in others if not is_off(pair[0])):
            x = unchecked_prox(leaf, x, strength * rest)
        return (shrink_entries(x, rest, l1, 0.0) if after else x).to(w.dtype)

    def gradient(self, w: Tensor) -> Tensor:
        x = at_least_float32(w)
        return functools.reduce(operator.add, [term.gradient(x) for term in self.terms]).to(w.dtype)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return functools.reduce(operator.add, [term.over_batch(h, dim, mask) for term in self.terms])

    def over_tokens(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return functools.reduce(operator.add, [term.over_tokens(h, mask) for term in self.terms])

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": kept for i, term in enumerate(self.terms) for name, kept in term.state().items()}

    def leaves(self) -> list[tuple[Any, Penalty]]:
        return [pair for term in self.terms for pair in term.leaves()]


@dataclass(frozen=True)
class _Elastic(Penalty, register=False):
    """The sum a Σ|x| + c Σ|x|² of several joined penalties."""

    operations: Terms

    def __call__(self, w: Tensors) -> Tensor:
        return total(self.operations, w)


class OfRows(Penalty, register=False):
    """Base of penalties that see a tensor as one row of entries.

    On outputs each sample is a row, and the values are averaged over the batch.
    """

    by_token = True

    @abstractmethod
    def over_rows(self, rows: Tensor) -> Tensor:
        """Return the sum of the values of a matrix's rows; the matrix is float32 or wider."""

    def __call__(self, w: Tensors) -> Tensor:
        return self.over_rows(w.reshape(1, -1))

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        h = h if mask is None else self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        rows = h.movedim(dim, 0).reshape(size, prod(h.shape) // max(size, 1))
        return in_float32(lambda x: self.over_rows(x) / max(size, 1), rows)


class NetworkPenalty(Algebra["NetworkPenalty"], register=False):
    """Base of penalties that see the whole network; they act in the loss only.

    A subclass needs only `__call__(self, parameters, outputs)`; then it can be scaled and added to
    other network penalties. `.on(where, outputs=rs.outputs(...))` selects the parameters and
    outputs that it is given.

    >>> class Energy(rs.NetworkPenalty):
    ...     def __call__(self, parameters, outputs):
    ...         return sum(h.square().mean() for h in outputs.values())
    >>> (0.5 * Energy())({}, {"relu": torch.tensor([1.0, 3.0])})
    tensor(2.5000)
    """

    takes_outputs = True
    apart = "is a function of the whole network"

    takes_frozen: bool = False
    """Whether `__call__` is also given frozen parameters."""

    @abstractmethod
    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the value, a differentiable 0-d tensor.

        Args:
            parameters: the selected parameters by name, without frozen ones (but see
                `takes_frozen`).
            outputs: the selected layers' outputs by the layers' names; the output of a second call
                of "relu" is named "relu#2".
        """

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Check, when a rule is attached, that the penalty can take the selected parameters.

        Raises:
            SelectionError, PenaltyError: a parameter is unfit, for example of a wrong shape.
        """

    def parameter_names(self) -> tuple[str, ...]:
        """Return the names of parameters that it takes if its rule selects outputs."""
        return ()

    def further_places(self) -> tuple[Places, ...]:
        """Return the activations that it takes after those that its rule selects."""
        return ()

    def bound_at_place(self) -> NetworkPenalty:
        return self

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} sees the whole network: .on(...) takes its parameters, and its outputs go into "
                "outputs=, "
                "as in .on(rs.weights, outputs=rs.outputs('relu*'))"
            )
        return ("loss",)

    def _forms(self) -> Any:
        return ScaledNetwork, NetworkSum


class _CombinedNetwork(Combination[NetworkPenalty], NetworkPenalty, register=False):
    """Base of multiples and sums of penalties on a network."""

    @property
    def takes_frozen(self) -> bool:  # type: ignore[override]
        return any(member.takes_frozen for member in self.members)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        for member in self.members:
            member.check(parameters)

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for member in self.members for name in member.parameter_names()))

    def further_places(self) -> tuple[Places, ...]:
        return tuple(dict.fromkeys(place for member in self.members for place in member.further_places()))

    def bound_at_place(self) -> NetworkPenalty:
        bound: NetworkPenalty = self.mapped(lambda member: member.bound_at_place())
        return bound

    def meet(self, activation: Any) -> None:
        for member in self.members:
            member.meet(activation)


@dataclass(frozen=True, repr=False)
class ScaledNetwork(Multiple[NetworkPenalty], _CombinedNetwork, register=False):
    """strength · penalty; made by `strength * penalty`."""

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        if is_off(self.strength):
            return nothing(next(iter((*parameters.values(), *outputs.values())), torch.zeros((), device="cpu")))
        return times(at_hand(self.strength, self), self.penalty(parameters, outputs))


@dataclass(frozen=True, repr=False)
class NetworkSum(Total[NetworkPenalty], _CombinedNetwork, register=False):
    """The sum of penalties on the same network; made by `p + q`."""

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        value, *others = [term(parameters, outputs) for term in self.terms]
        for other in others:
            value = value + other.to(value.device)
        return value
