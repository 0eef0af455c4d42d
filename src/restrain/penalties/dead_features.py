"""Auxiliary loss of dead features: units of a sparse code that no token activates any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from restrain.activation_points import Place, Places, inputs, outputs
from restrain.axes import Per, checked, grouping
from restrain.errors import PenaltyError, SelectionError
from restrain.fields import is_whole
from restrain.penalties.base import NetworkPenalty
from restrain.penalties.shrink import at_least_float32
from restrain.rules import How


class Counted(Protocol):
    """An activation function that counts; implemented by `transforms.AtLayer`."""

    counts: Any


class _Nothing(torch.autograd.Function):
    """Zero that depends on a tensor and gives it no gradient: zeros would be as large as that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return at_least_float32(h.new_zeros(()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def nothing(h: Tensor) -> Tensor:
    """Return the value for a code without dead units: zero, which can be differentiated."""
    return _Nothing.apply(h)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class AuxK(NetworkPenalty):
    """Mean over tokens of ‖e - ê‖²: dead units should reconstruct the error e of the autoencoder.

    e = target - reconstruction, without a gradient; ê = Σ W_i h_i over the k units with the
    largest max(0, h_i) among the dead: those that no token has activated for `dead_after` tokens.
    W_i is the decoder's weight out of unit i. h is the selected output, before an activation
    function of this library there, which counts: `rs.TopK`, `rs.BatchTopK`, `rs.JumpReLU`, or
    `rs.Firings`. The value is zero without dead units, and a sum over features, like a data loss
    that sums squares over features; Gao and others use a strength of 1/32, where both are divided
    by the same.

    Args:
        k: the number of dead units for each token; Gao and others use half of the target's width.
        dead_after: the number of tokens, of all processes, after which a unit is dead.
        decoder: the name of the decoder's weight.
        per: the axis of the units in that weight: "in" for an nn.Linear, 0 for (units, features).
        target: the activation that is reconstructed; by default the model's input.
        reconstruction: the reconstruction; by default the model's output.

    Raises:
        PenaltyError: a setting that can't be; shapes that don't fit each other.
        SelectionError: nothing counts at the selected output; no such parameter.

    Source: Gao and others (2024), Scaling and evaluating sparse autoencoders, arXiv 2406.04093,
    section 2.4 and appendix A.2.

    >>> sae = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> code = rs.outputs("1")
    >>> aux = rs.AuxK(2, dead_after=10_000, decoder="2.weight")
    >>> reg = rs.attach(sae, [rs.TopK(2).on(code), 1 / 32 * aux.on(code)])
    """

    k: int
    dead_after: int
    decoder: str = "decoder.weight"
    per: Per = "in"
    target: Places = field(default_factory=inputs)
    reconstruction: Places = field(default_factory=outputs)

    keywords = ("aux_k",)

    def __post_init__(self) -> None:
        checked(self.per)
        for name in ("k", "dead_after"):
            if not is_whole(getattr(self, name), 1):
                raise PenaltyError(f"{name}= is a whole number, at least 1; got {getattr(self, name)!r}")
        if not isinstance(self.decoder, str):
            raise PenaltyError(f"decoder= is the name of a parameter, got {type(self.decoder).__name__}")
        for name in ("target", "reconstruction"):
            if not isinstance(getattr(self, name), Place):
                raise PenaltyError(f"{name}= is rs.inputs(...) or rs.outputs(...), got {getattr(self, name)!r}")

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if not at_places:
            raise SelectionError(f"{self!r} is of a code: write .on(rs.outputs('encoder'))")
        return ("loss",)

    def parameter_names(self) -> tuple[str, ...]:
        return (self.decoder,)

    def further_places(self) -> tuple[Places, ...]:
        return self.target, self.reconstruction

    def bound_at_place(self) -> NetworkPenalty:
        return _CountedAuxK(self)

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        raise PenaltyError(f"{self!r} needs its model: write rs.attach(model, [..., {self!r}.on(rs.outputs(...))])")

    def of(self, dead: Tensor, decoder: Tensor, h: Tensor, x: Tensor, found: Tensor) -> Tensor:
        """Return the value.

        Args:
            dead: which units are dead, (units,), boolean.
            decoder: the decoder's weight.
            h: the code before its activation function, (..., units).
            x: the target, (..., features).
            found: the reconstruction, of the target's shape.
        """
        rows = decoder.movedim(grouping(self.per, tuple(decoder.shape)).keep[0], 0).flatten(1)
        if rows.shape[0] != h.shape[-1] or rows.shape[1] != x.shape[-1] or x.shape != found.shape:
            raise PenaltyError(
                f"{self!r}: a decoder of shape {tuple(decoder.shape)} for a code of shape {tuple(h.shape)}, a target "
                f"of shape {tuple(x.shape)} and a reconstruction of shape {tuple(found.shape)}: say per=, target= or "
                "reconstruction="
            )
        if not bool(dead.any()):
            return nothing(h)
        code = at_least_float32(h.flatten(0, -2)[:, dead]).relu()
        if code.shape[1] > self.k:
            indices = code.detach().topk(self.k, sorted=False).indices
            code = torch.zeros_like(code).scatter_(-1, indices, code.gather(-1, indices))
        error = (at_least_float32(x.detach()) - at_least_float32(found.detach())).flatten(0, -2)
        rest = error - code @ rows[dead].to(code.dtype)
        return rest.square().sum() / max(rest.shape[0], 1)


class _CountedAuxK(NetworkPenalty, register=False):
    """`AuxK` with the counts of the activation function at its place."""

    takes_frozen = True
    counted: Counted

    def __init__(self, penalty: AuxK) -> None:
        self.penalty = penalty

    def __repr__(self) -> str:
        return repr(self.penalty)

    def parameter_names(self) -> tuple[str, ...]:
        return self.penalty.parameter_names()

    def further_places(self) -> tuple[Places, ...]:
        return self.penalty.further_places()

    def meet(self, activation: Any) -> None:
        if activation is None:
            raise SelectionError(
                f"{self!r} needs counts of which units are active, and nothing counts at its place: add rs.TopK(k), "
                "rs.BatchTopK(k), rs.JumpReLU(...) or rs.Firings() with the same selection to the plan"
            )
        self.counted = activation

    def __call__(self, parameters: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        if len(outputs) != 3:
            raise PenaltyError(
                f"{self!r} takes one call each of a code, its target and its reconstruction in one forward; got "
                f"{', '.join(outputs)}"
            )
        h, x, found = outputs.values()
        idle = self.counted.counts.idle
        if not idle.numel():
            return nothing(h)
        dead = idle.to(h.device) >= self.penalty.dead_after
        with torch.autocast(h.device.type, enabled=False):
            return self.penalty.of(dead, next(iter(parameters.values())), h, x, found)
