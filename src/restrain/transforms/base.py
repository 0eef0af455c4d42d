"""Bases of transforms (tensor → tensor of equal shape): constraints, reparametrisations, noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from restrain import registry
from restrain.errors import ExportError, SelectionError, TransformError
from restrain.fields import is_number, shown_number
from restrain.operations import Interval, LengthInterval
from restrain.penalties.base import in_float32
from restrain.penalties.shrink import at_least_float32
from restrain.rules import How, What
from restrain.transforms.layout import Layout
from restrain.transforms.metric import by_iteration


class Transform(What, ABC, register=False):
    """Base of constraints, reparametrisations and noise: rules without a strength.

    The amount is a setting of the class, such as `GaussianNoise(0.2)`; `c * transform` is an error.
    """

    __array_ufunc__ = None  # so that NumPy scalars leave `c * transform` to __rmul__

    def __mul__(self, strength: Any) -> NoReturn:
        raise TransformError(
            f"a transform has no strength, so {self!r} can't be scaled: write the amount into it, as in "
            "GaussianNoise(0.2)"
        )

    __rmul__ = __mul__


class Reparametrization(Transform, register=False):
    """Base of weights computed at each forward from a free tensor v, which the optimizer trains.

    A subclass needs only `from_free(self, v)`.

    >>> class Mirrored(rs.Reparametrization):
    ...     def from_free(self, v):
    ...         return (v + v.T) / 2
    >>> layer = nn.Linear(3, 3)
    >>> with rs.attach(layer, Mirrored().on("weight")):
    ...     assert layer.weight.equal(layer.weight.T)
    """

    decays_to: ClassVar[str] = ""  # the weight at v = 0, where weight_decay pulls v; "": harmless

    @abstractmethod
    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        """Return the weight for v, differentiable, of v's shape and dtype.

        `learned` holds the further parameters by name, whose initial values are `learned(w)`.
        """

    def to_free(self, w: Tensor) -> Tensor:
        """Return the initial v for a weight w; from_free(v) is w, or near w if w is unreachable."""
        return w

    def learned(self, w: Tensor) -> dict[str, Tensor]:
        """Return initial values of further parameters by name; `reg.parameters()` yields them."""
        return {}

    def parametrization(self, w: Tensor) -> nn.Module:
        """Return the module for torch's parametrize, with forward(v) and right_inverse(w)."""
        return Computed(self, w)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} holds for parameters, not for outputs or inputs: select parameters by a glob, a role such "
                "as rs.weights, a module or a type"
            )
        return ("parametrize",)


class Constraint(Reparametrization, register=False):
    """Base of constraints on parameters, which hold after every optimizer step.

    A subclass needs only `project(self, w)`. Set `convex = True` if the set is convex: several
    convex constraints on a tensor are projected onto their intersection. With `how="parametrize"`
    the weight is `from_free(v)` of a free tensor v: the projection of v, unless a subclass defines
    a smooth map onto the set.

    >>> class Centered(rs.Constraint):
    ...     convex = True
    ...     def project(self, w):
    ...         return w - w.mean()
    >>> Centered().project(torch.tensor([1.0, 2.0]))
    tensor([-0.5000,  0.5000])
    """

    convex: bool = False
    """True if the set is convex."""

    interval: Interval | LengthInterval | None = None
    """The set as data, for fast backends; None if only `project` describes it."""

    cone: bool = False
    """True if the set is a cone (closed under scaling by c ≥ 0); cones are projected first."""

    by_tangent: bool = False
    """Under optimizers with a step for each entry, keep gradients in the tangent space.

    The projection is then the Euclidean one, as under SGD.
    """

    @abstractmethod
    def project(self, w: Tensor) -> Tensor:
        """Return the nearest tensor, in Euclidean distance, in the constraint set; same dtype.

        A tensor in the set keeps its values. NaN and infinite entries aren't checked; the result
        may be NaN there.
        """

    def project_by(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Return the nearest tensor of the set in the metric of steps: argmin_z Σ |z - w|² / step.

        After a step of an optimizer that has a step size for each entry (Adam), this projection
        converges to the constrained minimiser. With one step for all entries, and for separable
        sets, it equals `project`. For convex sets without a formula it is an iteration of ten to
        thirty projections.

        Raises:
            TransformError: the set isn't convex, and no formula is known; the message names
                constraints with a formula.
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
        """True if the set restricts each entry alone, so that all metrics have one projection."""
        return self.by_entry

    @property
    def has_formula(self) -> bool:
        """True if `project_by` is a formula, not an iteration."""
        return self.separable or type(self).project_by is not Constraint.project_by

    @property
    def has_metric(self) -> bool:
        """True if `project_by` is known for steps that differ by entry."""
        return self.convex or self.has_formula

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return self.project(v)

    def to_free(self, w: Tensor) -> Tensor:
        return self.project(w)

    @property
    def by_entry(self) -> bool:  # type: ignore[override]
        """True if any part of a tensor can be projected alone."""
        return isinstance(self.interval, Interval)

    @property
    def has_tangent(self) -> bool:  # type: ignore[override]
        """True if `tangent` has a formula."""
        return type(self).tangent is not Constraint.tangent

    def tangent(self, w: Tensor, v: Tensor) -> Tensor:
        """Return the projection of a movement `v` onto the set's tangent cone at `w`, in v's dtype.

        This is the vector nearest to `v` among the directions that don't leave the set. `w` must be
        in the set.

        Raises:
            TransformError: no formula is known; the message names constraints with a formula.
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
    """Module form of a reparametrisation for torch's parametrize; holds its learned parameters."""

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
        """Return the v for an assigned weight w; learned parameters are initialised again."""
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
    torch.compile need this), and keep no counters. With `on_weights = True` it may act on
    parameters too: the forward then sees a noisy weight, and the stored weight never changes.

    >>> class Signs(rs.Noise):
    ...     def __call__(self, x):
    ...         return x * torch.randint_like(x, 2).mul(2).sub(1)
    >>> Signs()(torch.ones(4)).abs()
    tensor([1., 1., 1., 1.])
    """

    lasting: ClassVar[bool] = False  # acts in evaluation, too
    on_places: ClassVar[bool] = True  # may act on outputs and inputs of layers
    on_weights: ClassVar[bool] = False  # may act on parameters
    random: ClassVar[bool] = True  # draws random numbers

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return a noisy tensor of x's shape and dtype; `x` itself is unchanged."""

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        """Return the noisy activation, given the layout of its samples (see `Layout`)."""
        return self(x)

    def of_weight(self, w: Tensor) -> Tensor:
        """Return the noisy weight for a forward; by default `self(w)`."""
        return self(w)

    def suits(self, owner: nn.Module, kind: str) -> None:
        """Check that the noise can act on the outputs or inputs (`kind`) of a layer.

        Raises:
            SelectionError: the noise doesn't fit this layer.
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
    """Check that a setting is finite and between `low` and `high`, or equal to `low` if `closed`.

    Raises:
        TransformError: the setting is no number, or out of range.
    """
    if not is_number(number) or not (low < number < high or (closed and number == low)):
        raise TransformError(f"{name}= is {meaning}; got {shown_number(number)}")


def checked_type(noise: Noise, x: Tensor) -> None:
    """Check that a tensor is floating-point or complex.

    Raises:
        TransformError: it holds integers or booleans, such as token ids.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise TransformError(
            f"{noise!r} can't act on {x.dtype}: token ids and other whole numbers take no noise. Select the output of "
            "the embedding, as in rs.outputs('embedding')"
        )


def wide(w: Tensor, *, real: str = "") -> Tensor:
    """Return the tensor in float32 or wider; `real` is the reason why it can't be complex.

    Raises:
        TransformError: an integer or sparse tensor; a complex tensor if `real` is given.
    """
    if not isinstance(w, Tensor) or w.layout is not torch.strided:
        kind = f"a sparse one ({w.layout}): convert it by .to_dense()" if isinstance(w, Tensor) else type(w).__name__
        raise TransformError(f"a constraint needs a dense tensor, got {kind}")
    if w.is_complex() and real:
        raise TransformError(f"a complex tensor ({w.dtype}) has no order, {real}")
    if not (w.is_floating_point() or w.is_complex()):
        raise TransformError(f"a constraint needs a tensor of floating-point numbers, got {w.dtype}")
    return at_least_float32(w)


def slack(w: Tensor, size: float = 1.0) -> float:
    """Return the relative tolerance within which a point counts as inside a boundary, for rounding.

    It is `size` times eps of the dtype for float16 and bfloat16, and 8 eps for wider dtypes.
    """
    # 16-bit results are rounded once, from float32
    return torch.finfo(w.dtype).eps * size * (1 if w.dtype.itemsize == 2 else 8)
