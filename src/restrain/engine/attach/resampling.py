"""Resampling of dead units of a sparse autoencoder, with the state of the optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.errors import HowError, PenaltyError, SelectionError
from restrain.named_tensors import is_sharded, layers, near
from restrain.penalties.all_reduce import several_processes
from restrain.transforms.activation import AtLayer


def _checked(encoder: Any, decoder: Any, units: int, x: Tensor, losses: Tensor) -> tuple[nn.Linear, nn.Linear]:
    """Return the layers, after a check of these and of the samples.

    Raises:
        HowError: a layer that isn't an nn.Linear, or is sharded.
        PenaltyError: shapes that don't fit, or losses that can't be weights.
    """
    for name, layer in (("encoder", encoder), ("decoder", decoder)):
        if not isinstance(layer, nn.Linear) or is_sharded(layer.weight):
            raise HowError(f"{name}= is the name of an nn.Linear that isn't sharded, got a {type(layer).__name__}")
    features = encoder.in_features
    if encoder.out_features != units or decoder.in_features != units or decoder.out_features != features:
        raise PenaltyError(
            f"an encoder of {features} to {encoder.out_features} and a decoder of {decoder.in_features} to "
            f"{decoder.out_features} don't fit a code of {units} units"
        )
    if x.dim() != 2 or x.shape[1] != features or losses.shape != x.shape[:1]:
        raise PenaltyError(
            f"x is (samples, {features}), the encoder's input, and losses (samples,); got {tuple(x.shape)} and "
            f"{tuple(losses.shape)}"
        )
    if not bool((losses.isfinite() & (losses >= 0)).all()) or not bool(losses.any()):
        raise PenaltyError("losses are finite numbers, zero or more, and not all zero")
    return encoder, decoder


@torch.no_grad()
def begin_anew(
    model: nn.Module,
    activation: AtLayer,
    dead: Tensor,
    samples: tuple[Tensor, Tensor],
    names: tuple[str, str],
    optimizers: list[Optimizer],
    scale: float,
) -> None:
    """Set weights, optimizer state and counts of dead units; see `Attachment.resample`.

    Raises:
        SelectionError: the model has no layer of this name.
        HowError, PenaltyError: see `Attachment.resample`.
    """
    found = {layer.name: layer.module for layer in layers(model)}
    if lost := [name for name in names if name not in found]:
        raise SelectionError(f"the model has no layer {lost[0]!r}{near(lost[0], list(found))}")
    x, losses = samples
    encoder, decoder = _checked(found[names[0]], found[names[1]], len(dead), x, losses)
    chosen = losses.double().square().multinomial(int(dead.sum()), replacement=True)
    directions = nn.functional.normalize(x[chosen].to(encoder.weight), dim=1)
    if several_processes():
        dist.broadcast(directions, 0)
    alive = encoder.weight[~dead].norm(dim=1)
    length = alive.mean() if len(alive) else encoder.weight.new_ones(())
    decoder.weight[:, dead] = directions.T.to(decoder.weight)
    encoder.weight[dead] = scale * length * directions
    changed = [(encoder.weight, 0), (decoder.weight, 1), *((p, 0) for p in activation.parameters())]
    if encoder.bias is not None:
        encoder.bias[dead] = 0
        changed.append((encoder.bias, 0))
    activation.reset(dead)
    for p, dim in changed:
        _forget(optimizers, p, dim, dead)


def _forget(optimizers: Iterable[Optimizer], p: Tensor, dim: int, units: Tensor) -> None:
    """Set the optimizers' state of some units of a parameter to zero: moments, momentum."""
    for optimizer in optimizers:
        # not .get: optimizers' state is a defaultdict in which an empty entry means a fresh start
        for kept in optimizer.state[p].values() if p in optimizer.state else ():
            if isinstance(kept, Tensor) and kept.shape == p.shape:
                kept.movedim(dim, 0)[units] = 0
