"""The bases of transforms (tensor → tensor of the same shape): constraints, reparametrisations, noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite
from numbers import Real
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from restrain.errors import SelectionError, TransformError
from restrain.penalties.base import in_float32
from restrain.rules import How, What


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

    >>> class Symmetric(rs.Reparametrization):
    ...     def from_free(self, v):
    ...         return (v + v.T) / 2
    >>> layer = nn.Linear(3, 3)
    >>> with rs.attach(layer, Symmetric().on("weight")):
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

    A subclass needs only `project(self, w)`. Under `how="parametrize"` the weight is `from_free(v)` of a free tensor v:
    the projection of v, unless a subclass knows a smooth map onto the set.

    >>> class Symmetric(rs.Constraint):
    ...     def project(self, w):
    ...         return (w + w.T) / 2
    >>> Symmetric().project(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[1., 1.],
            [1., 1.]])
    """

    @abstractmethod
    def project(self, w: Tensor) -> Tensor:
        """The nearest tensor (in the Euclidean sense) that satisfies the constraint, of the same dtype.

        The identity inside. NaN and infinite entries are not looked for; a result may be NaN where they are.
        """

    def from_free(self, v: Tensor, **learned: Tensor) -> Tensor:
        return self.project(v)

    def to_free(self, w: Tensor) -> Tensor:
        return self.project(w)

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

    def extra_repr(self) -> str:
        return repr(self.what)


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

    def of_weight(self, w: Tensor) -> Tensor:
        """What a forward sees of a parameter: by default what `__call__` makes of any tensor."""
        return self(w)

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
    inside = isinstance(number, Real) and not isinstance(number, bool) and isfinite(number)
    if not inside or not (low < number < high or (closed and number == low)):
        raise TransformError(f"{name} must be {meaning}; got {number!r}")
