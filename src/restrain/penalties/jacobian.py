"""Penalties on Jacobians and gradients between activations of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from restrain.activation_points import Places
from restrain.errors import CaptureError, PenaltyError, PlanError
from restrain.fields import is_number
from restrain.penalties.derivative import CLOSED, COMPILED, RUNNING, Choice, DerivativePenalty, Estimator
from restrain.penalties.estimators import Batch, exact, linear, of_the_same, projected
from restrain.penalties.shrink import at_least_float32
from restrain.rules import What
from restrain.selections import Where

_SMALL = 16  # largest number of rows or columns for which "auto" is exact


class _Jacobian(DerivativePenalty, register=False):
    """mean_i ‖∂y_i/∂x_i‖_F²."""

    def of_graph(self, ys: Sequence[Batch], xs: Sequence[Batch], estimator: str) -> Tensor:
        if estimator == "exact":
            return exact(ys, xs)
        return torch.stack([projected(ys, xs) for _ in range(self.projections)]).mean()

    def of_direction(self, tangents: Sequence[Batch]) -> Tensor:
        return torch.stack(
            [at_least_float32(y.tensor).square().sum() * (y.weight / max(y.count, 1)) for y in tangents]
        ).sum()

    def _freely(self, ys: Sequence[Batch], xs: Sequence[Batch], mixes: bool) -> Choice:
        apart = not mixes and all(batch.dim is not None for batch in (*ys, *xs))
        why = "" if apart else "of the whole batch, whose samples depend on each other"
        if self.estimator == "exact" and mixes:
            raise PenaltyError(
                f"{self!r}: batch normalisation in train() mode makes samples depend on each other, so there is no "
                "Jacobian of each: put it into eval() or use layer or group normalisation, or take estimator='vjp', "
                "which is of the whole batch"
            )
        if self.estimator not in ("auto", "exact"):
            return Choice(self.estimator, why=why)
        size = sum(x.entries for x in xs)
        if apart and all(linear(y, of_the_same(y, xs)) is not None for y in ys):
            return Choice("exact", why=CLOSED)
        if self.estimator == "exact" or (
            apart and all(min(y.entries, size) <= max(_SMALL, self.projections) for y in ys)
        ):
            return Choice("exact")
        return Choice("vjp", why=why)


@dataclass(frozen=True, repr=False)
class Contractive(_Jacobian):
    """Batch mean of ‖∂h_i/∂x_i‖_F², the squared Frobenius norm of a code's Jacobian.

    Codes then change little except along the data. Write for instance
    `1e-2 * rs.Contractive().on(rs.outputs("encoder"))`.

    Args:
        wrt: the activations by which the derivative is taken; the model's input by default.
        estimator: "exact"; "vjp" (random projections by backward passes); "jvp" (forward mode,
            along the graph of the forward or, if that has an unsupported operation, in a second
            forward); "difference" (central differences, in two further forwards). "auto" is exact
            in closed form or if the Jacobian has at most 16 rows or columns; else it is an
            estimator that the model allows.
        projections: the number of random directions.

    Raises:
        PenaltyError: "exact" for samples that depend on each other (batch normalisation in train()
            mode).
        CaptureError: the derivative can't be taken through the model's graph.

    Source: Rifai and others (2011), contractive auto-encoders, eq. 2; Hutchinson (1990) for random
    signs.

    >>> layer = nn.Linear(3, 2)
    >>> value = rs.Contractive()(layer, torch.randn(8, 3))
    >>> torch.testing.assert_close(value, layer.weight.square().sum())
    """

    wrt: Places | None = None
    estimator: Estimator = "auto"
    projections: int = 1


@dataclass(frozen=True, repr=False)
class JacobianNorm(_Jacobian):
    """Batch mean of ‖∂y_i/∂x_i‖_F² between two activations of a network.

    Write `rs.JacobianNorm(wrt=rs.outputs("fc1")).on(rs.outputs("fc3"))`, or with both in the
    penalty, `rs.JacobianNorm(of=rs.outputs("fc3"), wrt=rs.outputs("fc1")).on()`.

    Args:
        of: the activations whose derivative is taken, if not given by `.on()`; the model's output
            by default.
        wrt, estimator, projections: see `Contractive`.

    Source: Hoffman, Roberts and Yaida (2019), eqs. 4 and 8, who halve it; Sokolic and others
    (2017).

    >>> x = torch.ones(5, 3)
    >>> rs.JacobianNorm()(lambda x: x.square(), x).item()
    12.0
    """

    of: Places | None = None
    wrt: Places | None = None
    estimator: Estimator = "auto"
    projections: int = 1

    keywords = ("jacobian_norm",)


@dataclass(frozen=True, repr=False)
class GradientPenalty(DerivativePenalty):
    """Batch mean of (‖∂s_i/∂x_i‖₂ - target)², s_i the sum of a sample's outputs.

    target=1 is the penalty of WGAN-GP. target=0 is the squared norm: R1 and R2 of GANs on real and
    generated inputs. With of="loss", s_i is the sample's data loss, assumed to be averaged over
    samples: double backpropagation; `.on()` then takes the activations by which the derivative is
    taken.

    Args:
        target: the target norm, zero or more.
        of: the activations whose derivative is taken, if not given by `.on()`; the model's output
            by default; or "loss".
        wrt: the activations by which the derivative is taken; the model's input by default.
        estimator: "exact", by one backward; for target=0 also "jvp" and "difference", see
            `Contractive`.
        projections: the number of random directions of "jvp" and "difference".

    Source: Gulrajani and others (2017), eq. 3; Mescheder and others (2018), eq. 9; Drucker and
    LeCun (1992).

    >>> critic, x = nn.Linear(3, 1, bias=False), torch.randn(8, 3)
    >>> value = rs.GradientPenalty(target=1.0)(critic, x)
    >>> torch.testing.assert_close(value, (critic.weight.norm() - 1) ** 2)
    """

    target: float = 0.0
    of: Places | Literal["loss"] | None = None
    wrt: Places | None = None
    estimator: Estimator = "auto"
    projections: int = 1

    keywords = ("gradient_penalty",)
    estimators = ("auto", "exact", "jvp", "difference")

    def __post_init__(self) -> None:
        if not is_number(self.target) or self.target < 0:
            raise PenaltyError(f"target= is a finite number, zero or more; got {self.target!r}")
        DerivativePenalty.__post_init__(self)
        if self.estimator in RUNNING and (self.target or self.of_loss):
            raise PenaltyError(
                f"estimator={self.estimator!r} is for target=0 and outputs: a norm has no unbiased estimate by random "
                "directions, and a loss no second forward; use estimator='exact'"
            )

    @property
    def of_loss(self) -> bool:
        return isinstance(self.of, str) and self.of == "loss"

    def selected(self, where: Any) -> tuple[What, Where | Places]:
        if not self.of_loss:
            return DerivativePenalty.selected(self, where)
        if where is not None and self.wrt not in (None, where):
            raise PlanError(f"{self!r} says wrt=; then .on() takes no further place, got {where!r}")
        return dataclasses.replace(self, wrt=None), What.selected(self, self.by if where is None else where)[1]

    def of_graph(self, ys: Sequence[Batch], xs: Sequence[Batch], estimator: str) -> Tensor:
        terms = [y.weight * self._of(y, xs) for y in ys]
        return torch.stack(terms).sum()

    def _of(self, y: Batch, xs: Sequence[Batch]) -> Tensor:
        gradients = torch.autograd.grad(y.tensor.sum(), [x.tensor for x in xs], create_graph=True, allow_unused=True)
        squares: dict[int, Tensor] = {}  # squared gradient norm per sample, by forward
        for x, gradient in zip(xs, gradients, strict=True):
            if gradient is not None:
                square = at_least_float32(x.by_sample(gradient)).square().sum(1)
                squares[x.forward] = squares[x.forward] + square if x.forward in squares else square
        values = [self._mean(s * len(s) ** 2 if self.of_loss else s) for s in squares.values()]
        return torch.stack(values).mean() if values else y.tensor.new_zeros(())

    def _mean(self, squares: Tensor) -> Tensor:
        if self.target:
            zero = squares == 0
            norms = torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
            squares = (norms - self.target).square()
        return squares.sum() / max(len(squares), 1)

    def of_direction(self, tangents: Sequence[Batch]) -> Tensor:
        sums = [(y, at_least_float32(y.by_sample()).sum(1)) for y in tangents]
        return torch.stack([s.square().sum() * (y.weight / max(y.count, 1)) for y, s in sums]).sum()

    def choose(self, ys: Sequence[Batch], xs: Sequence[Batch], obstacle: str = "") -> Choice:
        choice = DerivativePenalty.choose(self, ys, xs, obstacle)
        if self.of_loss and choice.again:
            raise CaptureError(
                f"{self!r}: {choice.why} between the two can't be differentiated twice, and a loss has no second "
                "forward: run the forward without it (attention: within "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))"
            )
        return choice

    def _freely(self, ys: Sequence[Batch], xs: Sequence[Batch], mixes: bool) -> Choice:
        return Choice("exact", why="of the batch's sum, whose samples depend on each other" if mixes else "")

    def _around(self, obstacle: str) -> Choice:
        if self.target or self.of_loss or obstacle == COMPILED:
            return Choice("exact", True, obstacle)
        return DerivativePenalty._around(self, obstacle)
