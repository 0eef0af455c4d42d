"""Numerics of proximal operators: shrinking entries, groups, and the largest entry.

All take the tensor of a step (or a step for each entry), compute at least in float32, return the tensor's own
dtype, give +0.0 for a zero and keep NaN.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from restrain.axes import Grouping, group_norms
from restrain.errors import NoProxError, PenaltyError

_BLOCK = 1 << 17  # entries
_NEWTON_STEPS = 12  # no random group with thresholds spread over 10 decades needed more than 7


def at_least_float32(w: Tensor) -> Tensor:
    """The tensor in a dtype of float32's precision or more."""
    if w.is_complex():
        return w.to(torch.complex64) if w.dtype == torch.complex32 else w
    return w.float() if w.dtype.itemsize < 4 else w


def as_step(step: float | Tensor, w: Tensor) -> float | Tensor:
    """The step in the precision of `w`; one for each entry has the shape of `w`.

    Raises:
        PenaltyError: a negative or non-finite number, or a tensor of another shape.
    """
    if not isinstance(step, Tensor):
        if not (step >= 0 and isfinite(step)):
            raise PenaltyError(f"step= is a finite number, zero or more; got {step!r}")
        return float(step)
    if step.dim() and step.shape != w.shape:
        raise PenaltyError(
            f"step= is a number, or a tensor of the shape {tuple(w.shape)} with a step for each entry; "
            f"got one of shape {tuple(step.shape)}"
        )
    return step.to(w.real)  # dtype and device


def one_step(step: float | Tensor, penalty: object) -> float | Tensor:
    """The step itself.

    Raises:
        NoProxError: a step for each entry, for a penalty that only has a prox with the same step for all.
    """
    if isinstance(step, Tensor) and step.dim():
        raise NoProxError(f"{penalty!r} has no known prox with a step for each entry: give one number for all")
    return step


def soft_threshold(w: Tensor, threshold: float | Tensor) -> Tensor:
    """w moved towards zero by the threshold, and zero where it is nearer: w - clamp(w, -t, t)."""
    if not w.is_complex():
        return w - w.clamp(-threshold, threshold)  # type: ignore[arg-type]
    size = w.abs()
    dead = size <= threshold
    return torch.where(dead, 0, w * (1 - threshold / torch.where(dead, 1, size)))


def shrink_entries(w: Tensor, step: float | Tensor, l1: float | Tensor, l2: float | Tensor) -> Tensor:
    """The prox of l1 Σ|x| + l2 Σ|x|²; the step may differ by entry."""
    x = at_least_float32(w)
    t, l1, l2 = (as_step(number, x) for number in (step, l1, l2))
    if isinstance(l2, Tensor) or l2:
        x, t = x / (1 + 2 * l2 * t), t / (1 + 2 * l2 * t)
    if isinstance(l1, Tensor) or l1:
        x = soft_threshold(x, l1 * t)
    return x.to(w.dtype, copy=x is w)


def shrink_groups(w: Tensor, groups: Grouping, strength: float, step: float | Tensor) -> Tensor:
    """The prox of strength · Σ_g ‖x_g‖₂; the step may differ by entry.

    With one step t: z_g = x_g max(0, 1 - strength t / ‖x_g‖) (Yuan and Lin 2006, eq. 2.4).
    """
    x = groups.view(at_least_float32(w))
    t = as_step(step, at_least_float32(w))
    if isinstance(t, Tensor) and t.dim():
        return _shrink_in_blocks(x, groups, strength * groups.view(t)).reshape(w.shape).to(w.dtype)
    norms = group_norms(x, groups)
    dead = norms <= strength * t
    kept = 1 - strength * t / torch.where(dead, 1, norms)
    return torch.where(dead, 0, x * kept).reshape(w.shape).to(w.dtype)


def _shrink_in_blocks(x: Tensor, groups: Grouping, t: Tensor) -> Tensor:
    """`_shrink_by_metric`; on a CPU some groups after the other, so that temporaries stay in its cache."""
    if x.numel() <= _BLOCK or len(groups.keep) != 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return _shrink_by_metric(x, groups, t)
    dim = groups.keep[0]
    count = max(_BLOCK * x.shape[dim] // x.numel(), 1)
    parts = zip(x.split(count, dim), t.split(count, dim), strict=True)
    return torch.cat([_shrink_by_metric(part, groups, steps).to(x.dtype) for part, steps in parts], dim)


def _shrink_by_metric(x: Tensor, groups: Grouping, t: Tensor) -> Tensor:
    """argmin_z Σ |z - x|² / (2 t) + Σ_g ‖z_g‖₂, for thresholds t of each entry, all in the viewed shape.

    Where z_g isn't zero, z = x r / (r + t) with r = ‖z_g‖, so that r solves ‖x_g / (r + t_g)‖ = 1. One over
    that norm is concave and grows with r; hence Newton's iteration for it, once below the root, stays below
    and converges quadratically (the secular equation of trust regions: Moré and Sorensen 1983). max(|x| - t)
    is below, and no quotient is above one there. z_g is zero if and only if ‖x_g / t_g‖ ≤ 1.
    """
    tolerance = torch.finfo(t.dtype).eps ** 0.5  # before the last step, which squares the error
    if x.device.type != "mps":  # which has no float64
        x, t = x.to(torch.complex128 if x.is_complex() else torch.float64), t.double()
    size = x.abs()
    with torch.no_grad():
        r = groups.max((size - t).clamp_min(0))
        square, slope = _secular(size, r, t, groups)
        dead = (r == 0) & (square <= 1)
        for _ in range(_NEWTON_STEPS):
            r = r + torch.where(square > 1, (square.sqrt() - 1) * slope, 0)
            square, slope = _secular(size, r, t, groups)
            if not torch.compiler.is_compiling() and bool((square <= 1 + tolerance).all()):
                break
    if torch.is_grad_enabled() and (x.requires_grad or t.requires_grad):
        # autograd sees all of the last step but the slope, and so finds the derivative of the root itself
        square = _secular(size, r, t, groups)[0]
    r = torch.where(dead, 1, r + (square - 1) / 2 * slope)
    return torch.where(dead, 0, x * (r / (r + t)))


def _secular(size: Tensor, r: Tensor, t: Tensor, groups: Grouping) -> tuple[Tensor, Tensor]:
    """s = ‖size / (r + t)‖² of each group, and s / Σ size² / (r + t)³: that times √s - 1 is a Newton step."""
    bottom = (r + t).clamp_min(torch.finfo(t.dtype).tiny)  # zero only where size is zero too
    squares = (size / bottom).square()
    square, cube = groups.sum(squares), groups.sum(squares / bottom)
    return square, square / torch.where(cube > 0, cube, 1)


def shrink_peak(w: Tensor, step: float | Tensor) -> Tensor:
    """The prox of max |x|: entries are cut at the level that takes `step` off in all.

    By Moreau's identity it is w minus the projection on an L1 ball; the level is that of Duchi and others
    (2008, fig. 1).
    """
    if not w.numel():
        return w.clone()
    x = at_least_float32(w)
    size = x.abs()
    ordered = size.flatten().sort(descending=True).values
    sums = ordered if x.device.type == "mps" else ordered.double()
    counts = torch.arange(1, w.numel() + 1, device=w.device)
    level = ((sums.cumsum(0) - as_step(step, x)) / counts).amax().clamp_min(0).to(size.dtype)
    if x.is_complex():
        inside = size <= level
        x = torch.where(inside, x, x * (level / torch.where(inside, 1, size)))
    else:
        x = x.clamp(-level, level)
    return (x + 0.0).to(w.dtype)  # -0.0 becomes +0.0
