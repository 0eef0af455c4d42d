"""Sharpness-aware minimisation: the gradient at the worst point near the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restrain.errors import SelectionError, TransformError
from restrain.fields import check_flags
from restrain.named_tensors import Location
from restrain.rules import How
from restrain.transforms.base import Noise, Transform, checked_number


@dataclass(frozen=True)
class Sharpness(Transform):
    """Gradient at w + e, e = ρ g / ‖g‖: minimises the greatest loss within a distance ρ (SAM).

    g is the gradient at w, and its norm is over all parameters of the rule that an optimizer holds.
    With `adaptive`, e = ρ w² g / ‖w g‖, which doesn't change where weights are rescaled (ASAM). The
    optimizer takes the gradient at w + e, at the weights w. With maximize=True it is w - e.

    The gradient is taken twice, by the closure of `optimizer.step(closure)`, which zeroes
    gradients, runs the model and calls backward. Running statistics of BatchNorm move in the first
    run only, and so do counts and running means of rules, except in compiled code. A step without a
    closure, so also one by `GradScaler`, is an error; `MomentumSharpness` needs none.

    Args:
        rho: the distance ρ, above zero.
        adaptive: measure the distance relative to each entry.

    Raises:
        TransformError: a setting that can't be.
        OptimizerError: an optimizer that calls the closure several times; a step without a closure.

    Source: Foret and others (2021), SAM, eq. 2 and 3; Kwon and others (2021), ASAM, eq. 8.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> reg = rs.attach(model, rs.Sharpness(0.05).on(model), optimizer)
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        checked_number("rho", self.rho, "a finite number above zero", 0, float("inf"), closed=False)
        check_flags(TransformError, adaptive=self.adaptive)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(f"{self!r} is of parameters, not of outputs or inputs: write .on(rs.weights)")
        return ("gradient",)

    def metric(self, w: Tensor) -> Tensor | float:
        """Return the factor T of e = ρ T² g / ‖T g‖."""
        return w.abs() if self.adaptive else 1.0


@dataclass(frozen=True)
class MomentumSharpness(Noise):
    """Training forwards at w - ρ v / ‖v‖, v the optimizer's momentum: SAM without a second forward.

    v is the momentum buffer of SGD or Muon, or Adam's first moment, after the last step; its norm
    is over all parameters of the rule that the optimizer holds. The stored weights stay w: in
    evaluation, in checkpoints and for the optimizer. Before the first step v is zero. Scaled and
    accumulated gradients are those of the same point.

    Args:
        rho: the distance ρ, above zero.

    Raises:
        TransformError: a distance that can't be.
        OptimizerError: no given optimizer holds the parameters, or it keeps no momentum.
        HowError: sharded parameters.

    Source: Becker, Altrock and Risse (2024), Momentum-SAM, arXiv 2401.12033, algorithm 1.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> reg = rs.attach(model, rs.MomentumSharpness(0.5).on("weight"), optimizer)
    """

    rho: float = 0.05

    on_places = False
    on_weights = True
    random = False

    def __post_init__(self) -> None:
        checked_number("rho", self.rho, "a finite number above zero", 0, float("inf"), closed=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the tensor itself, as it has no momentum."""
        return x

    def bound_to(self, at: Location) -> Noise:
        return Ascended(self, torch.zeros_like(at.tensor.detach()))


@dataclass(frozen=True, eq=False, repr=False)
class Ascended(Noise, register=False):
    """`MomentumSharpness` of one parameter, with its present offset."""

    sharpness: MomentumSharpness
    offset: Tensor

    random = False

    def __repr__(self) -> str:
        return repr(self.sharpness)

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.offset.to(x)

    def state(self) -> dict[str, Tensor]:
        return {"offset": self.offset}
