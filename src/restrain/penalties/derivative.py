"""Base of penalties on the derivative of one activation of a network by another.

Called with a function and a batch of inputs, such a penalty returns its value there; attached to a
model, it takes the derivative between two activations in the model's own forward. `jacobian` has
the penalties, `estimators` how they are estimated.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from restrain.activation_points import Places, inputs, outputs
from restrain.errors import CaptureError, PenaltyError, PlanError, SelectionError
from restrain.fields import is_whole
from restrain.penalties.algebra import Algebra, Multiple
from restrain.penalties.base import at_hand, times
from restrain.penalties.estimators import Batch, Run, between, pushed
from restrain.penalties.replay import Randomness, plainly, spare_buffers
from restrain.penalties.tangents import pushed_by_graph
from restrain.rules import How, What
from restrain.selections import Where

Estimator = Literal["auto", "exact", "vjp", "jvp", "difference"]
RUNNING = ("jvp", "difference")  # run the model again (jvp: if the graph of the forward doesn't suffice)
REENTRANT, COMPILED, SHARDED = "a reentrant checkpoint", "compiled code", "sharded parameters"
CLOSED = "in closed form"


@dataclass(frozen=True)
class Choice:
    """An estimator, whether it runs the model again, and the reason."""

    estimator: str
    again: bool = False
    why: str = ""

    def __str__(self) -> str:
        runs = "two further forwards" if self.estimator == "difference" else "a second forward"
        return self.estimator + f", by {runs}" * self.again + (f" ({self.why})" if self.why else "")


class OnDerivatives(Algebra["OnDerivatives"], register=False):
    """Base of `DerivativePenalty` and of its product with a strength."""

    apart = "has places of its own"
    strength: Any

    @property
    @abstractmethod
    def leaf(self) -> DerivativePenalty:
        """The penalty without its strength."""

    @abstractmethod
    def named(self, wrt: Places | None) -> Self:
        """Return the penalty with `wrt` given by names, as in a plan bound to a model."""

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            raise SelectionError(
                f"{self!r} is of the outputs of a layer, not of parameters: write .on(rs.outputs('encoder')), and wrt= "
                "for the place by which the derivative is taken"
            )
        return ("loss",)

    def _forms(self) -> Any:
        return ScaledDerivative, None


@dataclass(frozen=True, repr=False)
class ScaledDerivative(Multiple[OnDerivatives], OnDerivatives, register=False):
    """strength · penalty; made by `strength * penalty`."""

    penalty: DerivativePenalty

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor, *, batch_dim: int = 0) -> Tensor:
        return times(at_hand(self.strength, self), self.penalty(function, x, batch_dim=batch_dim))

    @property
    def leaf(self) -> DerivativePenalty:
        return self.penalty

    def named(self, wrt: Places | None) -> Self:
        return dataclasses.replace(self, penalty=self.penalty.named(wrt))

    def selected(self, where: Any) -> tuple[What, Where | Places]:
        penalty, place = self.penalty.selected(where)
        return dataclasses.replace(self, penalty=penalty), place  # type: ignore[arg-type]


class DerivativePenalty(OnDerivatives, register=False):
    """Base of penalties on the derivative of some activations by others, averaged over the batch.

    `.on(place)` selects the activations whose derivative is taken, by default the model's outputs;
    `wrt=` selects the activations by which it is taken, by default the model's inputs. The penalty
    acts in the loss. `penalty(function, x)` is its value for a function of a batch, without a
    model.
    """

    strength = 1.0
    of: Any = None
    wrt: Places | None = None
    estimator: Estimator = "auto"
    projections: int = 1
    estimators: ClassVar[tuple[str, ...]] = ("auto", "exact", "vjp", "jvp", "difference")

    def __post_init__(self) -> None:
        if not (isinstance(self.estimator, str) and self.estimator in self.estimators):
            raise PenaltyError(f"estimator= is one of {', '.join(map(repr, self.estimators))}; got {self.estimator!r}")
        if not is_whole(self.projections, 1):
            raise PenaltyError(f"projections= is a whole number, at least 1; got {self.projections!r}")
        for name, place in (("of", self.of), ("wrt", self.wrt)):
            if not (place is None or isinstance(place, Places) or (name == "of" and self.of_loss)):
                raise PenaltyError(f"{name}= is a place such as rs.outputs('encoder'); got {place!r}")

    @property
    def leaf(self) -> DerivativePenalty:
        return self

    @property
    def of_loss(self) -> bool:
        """True for the derivative of the data loss."""
        return False

    @property
    def by(self) -> Places:
        """The activations by which the derivative is taken."""
        return inputs() if self.wrt is None else self.wrt

    def named(self, wrt: Places | None) -> Self:
        return dataclasses.replace(self, wrt=wrt) if self.wrt is not None else self  # type: ignore[type-var]

    def selected(self, where: Any) -> tuple[What, Where | Places]:
        if where is None:
            where = outputs() if self.of is None else self.of
        elif self.of not in (None, where):
            raise PlanError(f"{self!r} says of=; then .on() takes no further place, got {where!r}")
        leaf = self if self.of is None else dataclasses.replace(self, of=None)  # type: ignore[type-var]
        return leaf, What.selected(self, where)[1]

    # The value

    @abstractmethod
    def of_graph(self, ys: Sequence[Batch], xs: Sequence[Batch], estimator: str) -> Tensor:
        """Return the value from the graph between outputs and inputs."""

    @abstractmethod
    def of_direction(self, tangents: Sequence[Batch]) -> Tensor:
        """Return an estimate of the value from the outputs' derivative along random signs."""

    def of_tangents(self, ys: Sequence[Batch], xs: Sequence[Batch]) -> tuple[Tensor, bool] | None:
        """Return (value, bare) by random directions pushed along the graph of the forward.

        `bare` is True if that needs no gradient of the inputs. None if an operation isn't
        supported.
        """
        values, bare = [], True
        for _ in range(self.projections):
            found = pushed_by_graph(ys, xs)
            if found is None:
                return None
            values.append(self.of_direction(found[0]))
            bare = bare and found[1]
        return torch.stack(values).mean(), bare

    def of_runs(self, run: Run, estimator: str) -> Tensor:
        """Return the value by further runs of the function."""
        if estimator in RUNNING:
            return torch.stack([self.of_direction(pushed(run, estimator)) for _ in range(self.projections)]).mean()
        xs: list[Batch] = []
        ys = run(lambda x: _noted(x, xs))
        return self.of_graph(ys, xs, estimator)

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor, *, batch_dim: int = 0) -> Tensor:
        """Return the value for a function at a batch of inputs; differentiable.

        Args:
            function: maps a batch of inputs to their outputs (for the derivative of the loss: to
                the loss).
            x: the inputs, a floating-point tensor.
            batch_dim: the axis of samples, in inputs and outputs.

        Raises:
            PenaltyError: inputs that aren't a floating-point tensor.
        """
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise PenaltyError(f"{self!r} takes a function and a floating-point tensor, got {came}")
        given, randomness, xs = Batch.of(x, batch_dim), Randomness([x]), list[Batch]()

        def run(move: Any) -> list[Batch]:
            y = function(move(given))
            return [Batch.of(y, batch_dim if y.dim() else None)]

        with torch.enable_grad():
            if self.estimator in RUNNING:
                choice = Choice(self.estimator, again=True)
            else:
                ys = run(lambda batch: _noted(batch, xs))
                choice = self.choose(ys, xs)
            if choice.again:
                value = self.of_runs(replayed(run, randomness, function, x.device, choice.estimator), choice.estimator)
            else:
                value = self.of_graph(ys, xs, choice.estimator)
        return value if torch.is_grad_enabled() else value.detach()

    # The estimator

    def choose(self, ys: Sequence[Batch], xs: Sequence[Batch], obstacle: str = "") -> Choice:
        """Return the estimator, from the user's setting and the graph between outputs and inputs.

        Args:
            ys: outputs.
            xs: inputs.
            obstacle: a known obstacle to a second derivative.

        Raises:
            PenaltyError, CaptureError: the requested estimator is impossible, or no output depends
                on the inputs.
        """
        if self.estimator in RUNNING:
            return Choice(self.estimator, again=self.estimator != "jvp" or bool(obstacle), why=obstacle)
        found = None if obstacle else between(ys, xs)
        if found is not None and found.obstacles:
            obstacle = REENTRANT if REENTRANT in found.obstacles else min(found.obstacles)
        if not obstacle:
            choice = self._freely(ys, xs, mixes=found is not None and found.mixes)
        elif self.estimator == "auto":
            choice = self._around(obstacle)
        else:
            choice = Choice(self.estimator, True, obstacle)
        if choice.estimator not in RUNNING and obstacle in (REENTRANT, SHARDED):
            raise CaptureError(
                f"{self!r}: {obstacle} between the two places can't be differentiated twice: use "
                + ("use_reentrant=False" if obstacle == REENTRANT else "estimator='jvp'")
                + (", or estimator='difference'" if "difference" in self.estimators else "")
            )
        return choice

    @abstractmethod
    def _freely(self, ys: Sequence[Batch], xs: Sequence[Batch], mixes: bool) -> Choice:
        """Return the estimator for a twice differentiable graph; `mixes` if it has batch norms."""

    def _around(self, obstacle: str) -> Choice:
        """Return the estimator for "auto" with an obstacle to a second derivative."""
        return Choice({COMPILED: "vjp", SHARDED: "jvp"}.get(obstacle, "difference"), True, obstacle)


def _noted(x: Batch, xs: list[Batch]) -> Tensor:
    """Return a tensor that requires a gradient, and append it to `xs`."""
    h = x.tensor if x.tensor.requires_grad else x.tensor.detach().requires_grad_()
    xs.append(dataclasses.replace(x, tensor=h))
    return h


def replayed(run: Run, randomness: Randomness | None, module: Any, device: torch.device, estimator: str) -> Run:
    """Return a run with the same randomness and buffers each time, free of unsuitable kernels."""

    def again(move: Any) -> list[Batch]:
        with ExitStack() as stack:
            if randomness is not None:
                stack.enter_context(randomness.replayed())
            stack.enter_context(plainly(device.type, estimator))
            stack.enter_context(spare_buffers(module))
            return run(move)

    return again
