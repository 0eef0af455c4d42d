"""The base of penalties (tensor → number), and their algebra: `c * p` and `p + q` are penalties again."""

from __future__ import annotations

import functools
import inspect
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from restrain import registry
from restrain.errors import NoProxError, PenaltyError, SelectionError
from restrain.fields import is_number, is_whole, shown_number
from restrain.named_tensors import Location
from restrain.operations import Absolute, Square, Terms, slope, total
from restrain.penalties import keras_objects
from restrain.penalties.algebra import Algebra, Combination, Multiple, Total
from restrain.penalties.shrink import as_step, at_least_float32, check_dtype, check_step, shrink_entries
from restrain.rules import How
from restrain.schedule import Strength, checked_number


def checked_strength(strength: Any) -> float:
    """A strength as a float.

    Raises:
        PenaltyError: it isn't a finite real number, zero or more.
    """
    if isinstance(strength, Strength):
        raise PenaltyError(
            f"{strength!r} moves, so it multiplies a penalty, as in {strength!r} * rs.L1(); write a number here"
        )
    return checked_number("a strength", strength)


def at_hand(strength: Any, penalty: object) -> Any:
    """The strength itself: a number, or the tensor that holds one that moves.

    Raises:
        PenaltyError: one that moves, of a penalty that isn't attached to a model.
    """
    if isinstance(strength, Strength):
        raise PenaltyError(
            f"the strength of {penalty!r} moves with the steps of a training: attach a rule with it, or take it at one "
            "step, as in schedule.at(100) * rs.L1()"
        )
    return strength


def times(strength: Any, value: Tensor) -> Tensor:
    """strength · value, in the value's own dtype."""
    result: Tensor = value * (strength.to(value.dtype) if isinstance(strength, Tensor) else strength)
    return result


def is_off(strength: Any) -> bool:
    """Whether it is a strength that moves and is zero now: then nothing need be computed."""
    return isinstance(strength, Tensor) and not torch.compiler.is_compiling() and not strength


def nothing(w: Tensor) -> Tensor:
    """Zero, with a graph to `w`."""
    return w.flatten()[:0].abs().sum()


def checked_setting(name: str, number: float, low: float, high: float = inf, *, closed: bool = False) -> None:
    """Refuse a setting that isn't a finite number above `low` (or that, if `closed`) and below `high`.

    Raises:
        PenaltyError: so it is.
    """
    if not is_number(number) or not (low < number < high or (closed and number == low)):
        least = f" {'from' if closed else 'above'} {low:g}" if isfinite(low) else ""
        most = f"{' and' if least else ''} below {high:g}" if isfinite(high) else ""
        raise PenaltyError(f"{name}= is a finite number{least}{most}; got {shown_number(number)}")


def checked_flag(name: str, flag: Any) -> None:
    """Refuse a setting that isn't true or false.

    Raises:
        PenaltyError: so it is.
    """
    if not isinstance(flag, bool):
        raise PenaltyError(f"{name}= is True or False, got {flag!r}")


def batch_size(h: Tensor, dim: int) -> int:
    """The length of the batch axis of `h`.

    Raises:
        PenaltyError: `h` has no such axis.
    """
    if not -h.dim() <= dim < h.dim():
        raise PenaltyError(f"an output of shape {tuple(h.shape)} has no batch axis {dim}: say which by batch_dim=")
    return h.shape[dim]


def checked_axis(name: str, axis: Any) -> int | None:
    """An axis, or None for the usual one.

    Raises:
        PenaltyError: it is something else.
    """
    if axis is None or is_whole(axis):
        return axis
    raise PenaltyError(f"{name}= is an axis of the output, such as 1 or -1; got {axis!r}")


Tensors: TypeAlias = Any
"""What a penalty is called with: a tensor, or an iterable or mapping of them (a formula: one tensor)."""


def in_float32(formula: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """formula(w), computed at least in float32 and outside autocast.

    Raises:
        PenaltyError: `w` isn't of a floating-point or complex type.
    """
    check_dtype(w)
    device = w.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return formula(at_least_float32(w))
    return formula(at_least_float32(w))


def of_tensors(formula: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensors], Tensor]:
    """A `__call__` for one tensor, made to take also an iterable or mapping of them, over which it sums.

    `Penalty.__init_subclass__` puts it around the `__call__` of every subclass, so that whoever writes a
    penalty writes its formula and nothing else. It is plain tensor code, which torch.compile traces with
    fullgraph=True.
    """

    @functools.wraps(formula)
    def call(self: Any, w: Tensors) -> Tensor:
        if not isinstance(w, Tensor) and type(w).__module__.partition(".")[0] == "keras":
            keras_objects.register(Penalty)
            w = w.value  # of a variable of a Keras 3 layer, on its torch backend
        if isinstance(w, Tensor):
            return _scalar(self, in_float32(functools.partial(formula, self), w))
        if isinstance(w, nn.Module) or not isinstance(w, Iterable):
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
    """An `over_batch` that takes a mask; one without that argument is given h with zeros under the mask.

    `Penalty.__init_subclass__` puts it around the `over_batch` of every subclass.
    """
    if "mask" in inspect.signature(over_batch).parameters:
        return over_batch

    @functools.wraps(over_batch)
    def call(self: Any, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return over_batch(self, h if mask is None else self.without_padding(h, mask), dim)

    return call


def checking_steps(prox: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `prox` that refuses whole numbers, and a step that is no length.

    `Penalty.__init_subclass__` wraps the `prox` of every subclass in it; `unchecked_prox` goes past it.
    """

    @functools.wraps(prox)
    def call(self: Any, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        check_dtype(w)
        check_step(step)
        return prox(self, w, step)

    call.unchecked = prox  # type: ignore[attr-defined]
    return call


def checking_tensors(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `gradient` that refuses sparse tensors, whole numbers and objects that are no tensors.

    `Penalty.__init_subclass__` wraps the `gradient` of every subclass in it.
    """

    @functools.wraps(gradient)
    def call(self: Any, w: Tensor) -> Tensor:
        check_dtype(w)
        return gradient(self, w)

    return call


def unchecked_prox(penalty: Penalty, w: Tensor, step: float | Tensor) -> Tensor:
    """Return the prox, without a look at the entries of `step`.

    At an optimizer's step they may be on a GPU, and NaN where the gradient was.
    """
    checked = type(penalty).prox
    found: Tensor = getattr(checked, "unchecked", checked)(penalty, w, step)
    return found


class Penalty(Algebra["Penalty"], register=False):
    """Base of penalties: functions of one tensor whose value is a number.

    A subclass needs only `__call__(self, w)`, the formula for one tensor `w` (which is float32 or wider);
    then it can be called with many tensors, scaled, added, and put to a model by `on`. Its name in lower
    case, and those in `keywords`, are what plans on file and keywords of models call it by.

    >>> class WeightInverse(rs.Penalty):
    ...     def __call__(self, w):
    ...         return (1 / w.square().sum(1)).sum()
    >>> (0.5 * WeightInverse())([torch.ones(3, 2), torch.ones(1, 4)])
    tensor(0.8750)
    """

    uniform: bool = True
    """Where `entrywise`: that function is the same for every entry, so that any part of a tensor can be taken alone."""

    weighs_elastic: bool = False
    """The value is Σ a|x| + Σ c|x|² with numbers a and c for each entry: see `elastic_at`."""

    groupwise: bool = False
    """Its prox also takes a step for each entry: it is then exact in that diagonal metric."""

    operations: Terms | None = None
    """What the value is a weighted sum of, for backends that compute it fast; None where the formula alone says it."""

    soft_after: bool = False
    """Its prox, followed by a soft threshold, is that of its sum with a Σ|x|: see `Sum.prox`."""

    at_outputs: ClassVar[bool] = False
    """It is meant for activations: as a keyword of the models it acts on hidden layers, not on weights."""

    needs_model: ClassVar[bool] = False
    """Its value depends on other tensors of the model, found by `bound_in`; it has none by itself."""

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
        """Return the penalty as plain data, by which Keras saves and clones a model.

        Raises:
            PlanError: it holds tensors or functions.
        """
        keras_objects.register(Penalty)
        return keras_objects.Forms.write(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Penalty:
        """Return the penalty of a `get_config`."""
        return keras_objects.Forms.read(config)  # type: ignore[no-any-return]

    @abstractmethod
    def __call__(self, w: Tensors) -> Tensor:
        """The value at a tensor, differentiable; summed over the tensors of an iterable or mapping.

        Raises:
            PenaltyError: an empty iterable, or something in it that isn't a floating-point or complex tensor.
        """

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        """The value is a sum over entries of a function of each; the prox also takes a step for each entry."""
        return self.operations is not None and all(one.by_entry for _, one in self.operations)

    @property
    def shrinks(self) -> bool:
        """Its prox scales each entry by a number from 0 to 1. Then a Σ|x| can be added: see `Sum.prox`."""
        return self.elastic is not None

    @property
    def elastic(self) -> tuple[float, float] | None:
        """(a, c) where the value is a Σ|x| + c Σ|x|²."""
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
        """Return (a, c) where the value is Σ a|x| + Σ c|x|²: numbers, or tensors of a number for each entry."""
        return self.elastic

    @property
    def has_prox(self) -> bool:
        """Whether `prox` is known."""
        return type(self).prox is not Penalty.prox or self.elastic is not None

    @property
    def by_entry(self) -> bool:  # type: ignore[override]
        """Whether it acts on any part of a tensor as on the whole."""
        return self.entrywise and self.uniform

    @checking_steps
    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return the proximal operator argmin_z ½‖z - w‖² + step · value(z), in the dtype of `w`.

        Args:
            w: a tensor.
            step: a number or 0-d tensor. Where the penalty is entrywise or groupwise also a tensor of the shape of
                `w`; then the result is argmin_z Σ |z - w|² / (2 step) + value(z).

        Raises:
            NoProxError: none is known; the message names those that have one.
            PenaltyError: a tensor of whole numbers; a step that isn't finite and real, zero or more.
        """
        if (elastic := self.elastic) is not None:
            return shrink_entries(w, step, *elastic)
        raise NoProxError(
            f"{self!r} has no known prox; these have one: {', '.join(_with_prox())}. "
            "Use how='loss' or how='gradient', or define prox(self, w, step) in its class"
        )

    @checking_tensors
    def gradient(self, w: Tensor) -> Tensor:
        """The gradient of the value at `w`, as autograd gives it (of complex entries too), in its dtype."""
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
        """The value for outputs of a layer: summed over features, averaged over the batch axis `dim`.

        Without a batch axis (`dim` None) the plain value; zero for an empty batch. A boolean mask, of as many axes as
        `h` and with lengths one or h's, is true where entries count; the batch is still all samples.

        Raises:
            PenaltyError: `h` has no such axis, or the penalty can't leave entries out.
        """
        if mask is not None:
            h = self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        return self(h) / size if size else in_float32(lambda x: x.abs().sum(), h)

    @property
    def takes_mask(self) -> bool:
        """Whether `over_batch` can leave entries out: by itself, or because entries of zero add nothing."""
        return self.groupwise or (self.entrywise and self.uniform and not self(torch.zeros(1, device="cpu")))

    def without_padding(self, h: Tensor, mask: Tensor) -> Tensor:
        """`h` with zeros under a mask, for a penalty to which zeros add nothing.

        Raises:
            PenaltyError: they do add.
        """
        if not torch.compiler.is_compiling() and not self.takes_mask:
            raise PenaltyError(
                f"{self!r} can't leave padding out: its value isn't a sum over entries or groups in which zeros add "
                "nothing. Define over_batch(self, h, dim, mask), and takes_mask = True, in its class"
            )
        return torch.where(mask, h, 0)

    def mean(self, w: Tensor) -> Tensor:
        """Value / number of entries, for entrywise penalties; zero for an empty tensor.

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
        """What acts at places of a model: with the model's tensors that its value needs."""
        return self

    def moments(self, at_places: bool) -> tuple[How, ...]:
        return ("loss",) if at_places else ("loss", "gradient", "decoupled", "proximal")

    def leaves(self) -> list[tuple[Any, Penalty]]:
        """The penalties that it is a sum of, each with its strength."""
        return [(1.0, self)]

    def split(self) -> tuple[Any, Any, list[tuple[Any, Penalty]]]:
        """a, c and the others, equal ones joined, each with its strength: numbers, or 0-d tensors of what moves."""
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
    """A new formula inherits nothing that was declared of the old one: not how it is computed, nor its prox."""
    old = next((base for base in cls.__mro__[1:] if "__call__" in vars(base)), Penalty)
    if inspect.isabstract(old):
        return
    for name in _OF_FORMULA:
        if name not in vars(cls):
            setattr(cls, name, vars(Penalty)[name])


# What belongs to a formula, and goes with it
_OF_FORMULA = (
    *("operations", "elastic", "weighs_elastic", "entrywise", "groupwise", "shrinks", "soft_after"),
    *("gradient", "prox", "has_prox"),
)


def _equal(leaf: Penalty) -> Any:
    """The penalty itself, to which equal ones are equal; of one that can't be hashed, its identity."""
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return leaf


def joined(penalties: Sequence[Penalty]) -> Penalty:
    """The sum of penalties with equal members joined; a penalty whose strength moves stays as it is."""
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
    """Base of multiples and sums of penalties: what holds for all members holds for it, and binding binds each."""

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return all(member.entrywise for member in self.members)

    @property
    def uniform(self) -> bool:  # type: ignore[override]
        return all(member.uniform for member in self.members)

    @property
    def takes_mask(self) -> bool:
        return all(member.takes_mask for member in self.members)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        first, *others = [member.moments(at_places) for member in self.members]
        return tuple(how for how in first if all(how in other for other in others))

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
    """strength · penalty; made by `strength * penalty`."""

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

    def state(self) -> dict[str, Tensor]:
        return self.penalty.state()

    def leaves(self) -> list[tuple[Any, Penalty]]:
        return [(self.strength * strength, leaf) for strength, leaf in self.penalty.leaves()]


@dataclass(frozen=True, repr=False)
class Sum(Total[Penalty], _Combined, register=False):
    """The sum of penalties of the same tensor; made by `p + q`."""

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
        """Return (others, weighted): the terms that aren't a Σ|x| + c Σ|x|², those with weights apart if they help."""
        others = self.split()[2]
        weighted = [pair for pair in others if pair[1].weighs_elastic]
        rest = [pair for pair in others if not pair[1].weighs_elastic]
        return (rest, weighted) if len(others) > 1 and len(rest) < 2 else (others, [])

    def __call__(self, w: Tensors) -> Tensor:
        return functools.reduce(operator.add, [term(w) for term in self.terms])

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The prox of a Σ|x| + c Σ|x|² + f, where a and c add up, and at most one other f remains.

        The square scales w and step by 1 / (1 + 2 c step). The absolute value is a soft threshold before the
        prox of f, which is exact where that keeps signs and zeros (Yu 2013, "On decomposing the proximal
        map"), or after it, where f says so. Both hold entry by entry, so also with a step, a and c for each.

        Raises:
            NoProxError: more remains, or the prox of f isn't known or doesn't shrink.
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

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": kept for i, term in enumerate(self.terms) for name, kept in term.state().items()}

    def leaves(self) -> list[tuple[Any, Penalty]]:
        return [pair for term in self.terms for pair in term.leaves()]


@dataclass(frozen=True)
class _Elastic(Penalty, register=False):
    """a Σ|x| + c Σ|x|², joined of several."""

    operations: Terms

    def __call__(self, w: Tensors) -> Tensor:
        return total(self.operations, w)


class OfRows(Penalty, register=False):
    """Base of penalties of a tensor as one row of entries; on outputs, of each sample, averaged over the batch."""

    @abstractmethod
    def over_rows(self, rows: Tensor) -> Tensor:
        """The sum of the values of the rows of a matrix, which is float32 or wider."""

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
    """Base of penalties that see the whole network. It acts in the loss only.

    A subclass needs only `__call__(self, parameters, outputs)`; then it can be scaled and added to others of
    its kind. `.on(where, outputs=rs.outputs(...))` says which parameters and outputs it is given.

    >>> class Energy(rs.NetworkPenalty):
    ...     def __call__(self, parameters, outputs):
    ...         return sum(h.square().mean() for h in outputs.values())
    >>> (0.5 * Energy())({}, {"relu": torch.tensor([1.0, 3.0])})
    tensor(2.5000)
    """

    takes_outputs = True
    apart = "is a function of the whole network"

    takes_frozen: bool = False
    """Whether it is given frozen parameters, too."""

    @abstractmethod
    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The value, a differentiable 0-d tensor.

        Args:
            parameters: the selected parameters by name, without frozen ones (but see `takes_frozen`).
            outputs: the selected layers' outputs by the layers' names; of a second call of "relu" by
            "relu#2".
        """

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse, when a rule is attached, parameters that it can't take.

        Raises:
            SelectionError, PenaltyError: so it is.
        """

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
