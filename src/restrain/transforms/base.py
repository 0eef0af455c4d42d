"""The bases of transforms (tensor → tensor of the same shape): constraints, reparametrisations, noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from restrain import registry
from restrain.errors import ExportError, SelectionError, TransformError
from restrain.fields import is_number
from restrain.operations import Interval, LengthInterval
from restrain.penalties.base import in_float32
from restrain.penalties.shrink import at_least_float32
from restrain.rules import How, What
from restrain.transforms.layout import Layout
from restrain.transforms.metric import by_iteration


class Transform(What, ABC, register=False):
    """Base of constraints and noise. A transform has no strength: its settings say how much."""

    __array_ufunc__ = None  # NumPy's numbers leave `c * transform` to us

    def __mul__(self, strength: Any) -> NoReturn:
        raise TransformError(
            f"a transform has no strength, so {self!r} can't be scaled: write the amount into it, as in "
            "GaussianNoise(0.2)"
        )

    __rmul__ = __mul__


class Reparametrization(Transform, register=False):
    """Base of weights that are computed, at each forward, from a free tensor v that the optimizer trains.

    A subclass needs only `from_free(self, v)`.

    >>> class Mirrored(rs.Reparametrization):
    ...     def from_free(self, v):
    ...         return (v + v.T) / 2
    >>> layer = nn.Linear(3, 3)
    >>> with rs.attach(layer, Mirrored().on("weight")):
    ...     assert layer.weight.equal(layer.weight.T)
    """

    decays_to: ClassVar[str] = (
        ""  # what the weight becomes if the optimizer's weight_decay pulls v to zero; "": no harm
    )

    @abstractmethod
    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        """The weight, of the shape and dtype of v; differentiable. `learned` are the tensors of `learned(w)`."""

    def to_free(self, w: Tensor) -> Tensor:
        """The v to begin from, for a weight w: from_free(to_free(w)) is w, or near it where w can't be had."""
        return w

    def learned(self, w: Tensor) -> dict[str, Tensor]:
        """Further tensors that are learned beside v, {name: the value to begin from}; `reg.parameters()` has them."""
        return {}

    def parametrization(self, w: Tensor) -> nn.Module:
        """The module with forward(v) and right_inverse(w) that torch's parametrize is given for a weight w."""
        return Computed(self, w)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} holds for parameters, not for outputs or inputs: select parameters by a glob, a role such "
                "as rs.weights, a module or a type"
            )
        return ("parametrize",)


class Constraint(Reparametrization, register=False):
    """Base of constraints on parameters, which hold after every step of the optimizer.

    A subclass needs only `project(self, w)`. Say `convex = True` if the set is: with others of that kind on one tensor
    the result is then the nearest point of all sets. Under `how="parametrize"` the weight is `from_free(v)` of a free
    tensor v: the projection of v, unless a subclass knows a smooth map onto the set.

    >>> class Centered(rs.Constraint):
    ...     convex = True
    ...     def project(self, w):
    ...         return w - w.mean()
    >>> Centered().project(torch.tensor([1.0, 2.0]))
    tensor([-0.5000,  0.5000])
    """

    convex: bool = False
    """The set is convex."""

    interval: Interval | LengthInterval | None = None
    """The set, for backends that project onto it fast; None where `project` alone says it."""

    cone: bool = False
    """The set holds every nonnegative multiple of its members; of two sets, such a one is taken first."""

    by_tangent: bool = False
    """Under an optimizer with a step for each entry, keep gradients in the tangent, and project as under SGD."""

    @abstractmethod
    def project(self, w: Tensor) -> Tensor:
        """The nearest tensor (in the Euclidean sense) that satisfies the constraint, of the same dtype.

        The identity inside. NaN and infinite entries are not looked for; a result may be NaN where they are.
        """

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        """The tensor of the set that is nearest in the metric of steps: argmin Σ |z - w|² / step.

        After a step of an optimizer that moves each entry by a step of its own (Adam), this is the
        projection that ends at the constrained minimiser. With one step for all, and for separable
        sets, it is `project`. Convex sets without a formula take an iteration of ten to thirty
        projections.

        Raises:
            TransformError: the set isn't convex, and no formula is known; the message names those that have one.
        """
        if not (isinstance(step, Tensor) and step.dim()) or self.separable:
            return self.project(w)
        if self.convex:
            return self.project(w) if w.is_complex() else by_iteration(w, step, self.project)
        known = sorted(c.__name__ for c in _constraints() if c.project_by is not Constraint.project_by)
        raise TransformError(
            f"{self!r} has no formula for its projection with a step for each entry (`project_by`); these have one: "
            f"{', '.join(known)}, and all convex sets"
        )

    @property
    def separable(self) -> bool:
        """Whether the set says what each entry alone may be; its projection is then the same with any steps."""
        return self.by_entry

    @property
    def has_formula(self) -> bool:
        """Whether `project_by` is a formula, not an iteration."""
        return self.separable or type(self).project_by is not Constraint.project_by

    @property
    def has_metric(self) -> bool:
        """Whether `project_by` is known for steps that differ by entry."""
        return self.convex or self.has_formula

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return self.project(v)

    def to_free(self, w: Tensor) -> Tensor:
        return self.project(w)

    @property
    def by_entry(self) -> bool:  # type: ignore[override]
        """Whether it acts on any part of a tensor as on the whole."""
        return isinstance(self.interval, Interval)

    @property
    def has_tangent(self) -> bool:  # type: ignore[override]
        """Whether `tangent` is known."""
        return type(self).tangent is not Constraint.tangent

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        """The part of a movement `v` that doesn't leave the set at `w`, in the dtype of `v`.

        It is the vector nearest to `v` among the directions of the set there (its tangent cone). `w` is in the set.

        Raises:
            TransformError: no formula is known; the message names those that have one.
        """
        known = sorted(c.__name__ for c in _constraints() if c.tangent is not Constraint.tangent)
        raise TransformError(f"{self!r} has no formula for its tangent; these have one: {', '.join(known)}")

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} holds for parameters after a step, not for outputs or inputs: select parameters "
                "by a glob, "
                "a role such as rs.weights, a module or a type"
            )
        return ("project", "parametrize")


class Computed(nn.Module):
    """A reparametrisation as the module that torch's parametrize wants; it holds what is learned beside v."""

    def __init__(self, what: Reparametrization, w: Tensor) -> None:
        super().__init__()
        self.what = what
        for name, value in what.learned(w.detach()).items():
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=w.requires_grad))

    def forward(self, v: Tensor) -> Tensor:
        learned: dict[str, Any] = dict(self._parameters)
        return in_float32(lambda x: self.what.from_free(x, **learned), v).to(v.dtype)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """The v that gives w, when it is assigned; what is learned beside v begins anew."""
        for name, value in self.what.learned(w).items():
            self._parameters[name].copy_(value)  # type: ignore[union-attr]
        return in_float32(self.what.to_free, w).to(w.dtype)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ExportError(
            "torch.jit.script compiles no parametrisation: reg.detach() before it, which leaves the effective weights, "
            "and attach reg.plan again; or use torch.export or torch.jit.trace"
        )

    def extra_repr(self) -> str:
        return repr(self.what)


def _constraints() -> set[type[Constraint]]:
    return {c for name in registry.names() if issubclass(c := registry.lookup(name), Constraint)}


class Noise(Transform, register=False):
    """Base of noise on outputs and inputs of layers, in training only.

    A subclass needs only `__call__(self, x)`. Draw from torch's global generator (checkpointing and
    torch.compile need that), and keep no counters. With `on_weights = True` it may act on parameters, too: the
    forward then sees a disturbed weight, and the stored one never changes.

    >>> class Signs(rs.Noise):
    ...     def __call__(self, x):
    ...         return x * torch.randint_like(x, 2).mul(2).sub(1)
    >>> Signs()(torch.ones(4)).abs()
    tensor([1., 1., 1., 1.])
    """

    on_places: ClassVar[bool] = True  # whether it acts on outputs and inputs of layers
    on_weights: ClassVar[bool] = False  # whether it acts on parameters

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A disturbed tensor of the shape and dtype of `x`, which stays as it is."""

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        """What acts at a place, where it is known how `x` lies; see `Layout`."""
        return self(x)

    def of_weight(self, w: Tensor) -> Tensor:
        """What a forward sees of a parameter: by default what `__call__` makes of any tensor."""
        return self(w)

    def suits(self, owner: nn.Module, kind: str) -> None:
        """Refuse the outputs or inputs of a layer where it can't act.

        Raises:
            SelectionError: so it is.
        """

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places and not self.on_places:
            raise SelectionError(
                f"{self!r} acts on parameters, not on outputs or inputs of layers: write .on(rs.weights), or "
                "rs.Dropout, rs.GaussianNoise for these places"
            )
        if not at_places and not self.on_weights:
            raise SelectionError(
                f"{self!r} acts on outputs or inputs of layers, not on parameters: "
                "write .on(rs.outputs('fc*')), or .on(rs.inputs()) for the model's own input; weights take "
                "rs.DropConnect and rs.GaussianNoise"
            )
        return ("forward",)


def checked_number(name: str, number: Any, meaning: str, low: float, high: float, *, closed: bool) -> None:
    """Refuse a setting that isn't a finite number between `low` and `high` (`low` only where `closed`).

    Raises:
        TransformError: so it is.
    """
    if not is_number(number) or not (low < number < high or (closed and number == low)):
        raise TransformError(f"{name}= is {meaning}; got {number!r}")


def checked_type(noise: Noise, x: Tensor) -> None:
    """Refuse whole numbers, which take no noise.

    Raises:
        TransformError: so it is.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise TransformError(
            f"{noise!r} can't act on {x.dtype}: token ids and other whole numbers take no noise. Select the output of "
            "the embedding, as in rs.outputs('embedding')"
        )


def wide(w: Tensor, *, real: str = "") -> Tensor:
    """The tensor in float32 or wider; `real` says why it can't be complex.

    Raises:
        TransformError: an integer tensor; a complex one where `real` is given.
    """
    if w.is_complex() and real:
        raise TransformError(f"a complex tensor ({w.dtype}) has no order, {real}")
    if not (w.is_floating_point() or w.is_complex()):
        raise TransformError(f"a constraint needs a tensor of floating-point numbers, got {w.dtype}")
    return at_least_float32(w)


def slack(w: Tensor, size: float = 1.0) -> float:
    """How far beyond a boundary, relatively, a point counts as inside, as rounding may take it there.

    That is eps of the dtype for float16 and bfloat16, 8 eps for wider types; times `size`.
    """
    return torch.finfo(w.dtype).eps * size * (1 if w.dtype.itemsize == 2 else 8)  # halves are computed in float32
