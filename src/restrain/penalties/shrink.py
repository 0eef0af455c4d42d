"""Numerics of proximal operators: of |x| and |x|², and of L2, max and squared L1 norms of groups.

Each operator takes a tensor and a step (for all entries, or one for each), computes in float32 or
wider, returns the tensor's dtype, gives +0.0 for a zero, and keeps NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from restrain.axes import Grouping, group_norms
from restrain.errors import NoProxError, PenaltyError
from restrain.fields import brief, is_number

_BLOCK = 1 << 17  # entries
_NEWTON_STEPS = 12  # no random group with thresholds spread over 10 decades needed more than 7
_ROUNDS, _ROUNDS_COMPILED = 100, 12  # no random group of up to 30,000 entries needed more than 9


def unsigned_zeros(x: Tensor) -> Tensor:
    """Return a tensor with +0.0 in the place of -0.0; the gradient passes, also at zeros."""
    return x + 0.0 if _adds(x) else torch.where(x == 0, x - x.detach(), x)


def unsign_zeros_(x: Tensor) -> Tensor:
    """Write +0.0 in the place of -0.0, and return the tensor."""
    return x.add_(0.0) if _adds(x) else x.masked_fill_(x == 0, 0.0)


def _adds(x: Tensor) -> bool:
    """Return True if `x + 0.0` is computed as it is written.

    From torch 2.14 on, compiled code leaves it out, of Dynamo and of traces by fake tensors. It is
    the quickest way in eager code, by a factor of seven over a mask.
    """
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def at_least_float32(w: Tensor) -> Tensor:
    """Return the tensor in its own dtype, or in float32 or complex64 if that is narrower.

    Raises:
        PenaltyError: an integer or boolean tensor.
    """
    check_dtype(w)
    if w.is_complex():
        return w.to(torch.complex64) if w.dtype == torch.complex32 else w
    return w.float() if w.dtype.itemsize < 4 else w


def check_dtype(w: Any) -> None:
    """Check that an argument is a dense floating-point or complex tensor.

    Raises:
        PenaltyError: the argument is of another kind; the message has the conversion to write.
    """
    if not isinstance(w, Tensor):
        raise PenaltyError(f"a penalty needs a tensor, got {type(w).__name__}")
    if not (w.is_floating_point() or w.is_complex()):
        raise PenaltyError(f"a penalty needs a floating-point or complex tensor, got {w.dtype}: convert it by .float()")
    if w.layout is not torch.strided:
        raise PenaltyError(f"a penalty needs a dense tensor, got a sparse one ({w.layout}): convert it by .to_dense()")


def exact(x: Tensor) -> Tensor:
    """Return the tensor in float64 or complex128, if its device supports them."""
    if x.device.type == "mps":
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def check_step(step: Any) -> None:
    """Check that a step, or each entry of a tensor of steps, is real, finite and ≥ 0.

    Compiled code doesn't read the entries of tensors.

    Raises:
        PenaltyError: the step is negative, NaN, infinite or complex.
    """
    if isinstance(step, Tensor):
        if step.is_complex():
            raise PenaltyError(f"step= has real numbers, zero or more; got a tensor of {step.dtype}: write step.abs()")
        if step.layout is not torch.strided:
            raise PenaltyError("step= is a number or a dense tensor, got a sparse one: write step.to_dense()")
        if torch.compiler.is_compiling() or step.is_meta or bool(((step >= 0) & step.isfinite()).all()):
            return
        shown = brief(step.item()) if step.dim() == 0 else f"a tensor of shape {tuple(step.shape)} with others"
        raise PenaltyError(f"step= has finite numbers, zero or more; got {shown}")
    if not is_number(step) or step < 0:
        raise PenaltyError(f"step= is a finite number, zero or more; got {brief(step)}")


def as_step(step: float | Tensor, w: Tensor) -> float | Tensor:
    """Return a step as a float, or as a tensor in the real dtype of `w` and on its device.

    Raises:
        PenaltyError: a negative or non-finite number, or a tensor that is neither 0-d nor of the
            shape of `w`.
    """
    if not isinstance(step, Tensor):
        check_step(step)
        return float(step)
    if step.dim() and step.shape != w.shape:
        raise PenaltyError(
            f"step= is a number, or a tensor of the shape {tuple(w.shape)} with a step for each entry; "
            f"got one of shape {tuple(step.shape)}"
        )
    return step.to(w.real)  # dtype and device


def as_tensor(step: float | Tensor, w: Tensor) -> Tensor:
    """Return a result of `as_step` as a tensor in the real dtype of `w`."""
    if isinstance(step, Tensor):
        return step
    return torch.full((), float(in_range(step, w)), dtype=w.real.dtype, device=w.device)


@overload
def in_range(number: float, w: Tensor) -> float: ...
@overload
def in_range(number: Tensor, w: Tensor) -> Tensor: ...
def in_range(number: float | Tensor, w: Tensor) -> float | Tensor:
    """Return a number ≥ 0 clamped to the greatest of `w`'s dtype: torch refuses greater ones."""
    return number if isinstance(number, Tensor) else min(number, torch.finfo(w.dtype).max)


def one_step(step: float | Tensor, penalty: object) -> float | Tensor:
    """Return the step, of a penalty whose prox needs the same step for all entries.

    Raises:
        NoProxError: the step is a tensor with a step for each entry.
    """
    if isinstance(step, Tensor) and step.dim():
        raise NoProxError(f"{penalty!r} has no known prox with a step for each entry: give one number for all")
    return step


def is_zero(step: float | Tensor) -> bool:
    """Return whether a scalar step is zero."""
    return float(step.detach() if isinstance(step, Tensor) else step) == 0


def soft_threshold(w: Tensor, threshold: float | Tensor) -> Tensor:
    """Return w - clamp(w, -t, t): w moved towards zero by the threshold t, zero where |w| ≤ t."""
    threshold = in_range(threshold, w)
    if not w.is_complex():
        return w - w.clamp(-threshold, threshold)  # type: ignore[arg-type]
    size = w.abs()
    dead = size <= threshold
    return torch.where(dead, 0, w * (1 - threshold / torch.where(dead, 1, size)))


def resized(x: Tensor, size: Tensor) -> Tensor:
    """Return the tensor with absolute values replaced by `size`; +0.0 where `size` is zero."""
    if not x.is_complex():
        return unsigned_zeros(torch.where(x < 0, -size, size))
    old = x.abs()
    return torch.where(size == 0, 0, x * (size / torch.where(old == 0, 1, old)))


def shrink_entries(w: Tensor, step: float | Tensor, l1: float | Tensor, l2: float | Tensor) -> Tensor:
    """Return the prox of l1 Σ|x| + l2 Σ|x|²; the step may differ by entry."""
    x = at_least_float32(w)
    t, l1, l2 = (as_step(number, x) for number in (step, l1, l2))
    if isinstance(l2, Tensor) or l2:
        scale = 0.5 / (0.5 + l2 * t)  # 1 / (1 + 2 l2 t), where 2 t could overflow
        x, t = x * scale, scale * t
    if isinstance(l1, Tensor) or l1:
        x = soft_threshold(x, l1 * t)
    return unsigned_zeros(x).to(w.dtype)


def shrink_groups(w: Tensor, groups: Grouping, strength: float | Tensor, step: float | Tensor) -> Tensor:
    """Return the prox of Σ_g strength_g ‖x_g‖₂; the step may differ by entry.

    With one step t: z_g = x_g max(0, 1 - strength t / ‖x_g‖) (Yuan and Lin 2006, eq. 2.4).
    """
    wide = at_least_float32(w)
    x, t = groups.view(wide), as_step(step, wide)
    if isinstance(t, Tensor) and t.dim():
        z = _in_blocks(_shrink_by_metric, x, groups, strength * groups.view(t))
    else:
        norms = group_norms(x, groups)
        zero = norms == 0
        # The step is a tensor, since torch computes number / tensor by an inverse that can overflow
        scale = 1 - strength * (as_tensor(t, wide) / torch.where(zero, 1, norms))
        z = torch.where(zero | (scale <= 0), 0, x * scale)
    return unsigned_zeros(groups.restore(z, wide).to(w.dtype))


def _in_blocks(solve: Callable[..., Tensor], x: Tensor, groups: Grouping, t: Tensor) -> Tensor:
    """Return solve(x, groups, t), on a CPU in chunks of groups whose temporaries fit its cache."""
    simple = len(groups.keep) == 1 and groups.lists is None
    if x.numel() <= _BLOCK or not simple or x.device.type != "cpu" or torch.compiler.is_compiling():
        return solve(x, groups, t).to(x.dtype)
    dim = groups.keep[0]
    count = max(_BLOCK * x.shape[dim] // x.numel(), 1)
    parts = x.split(count, dim)
    steps = t.split(count, dim) if t.dim() else (t,) * len(parts)
    return torch.cat([solve(*part).to(x.dtype) for part in zip(parts, (groups,) * len(parts), steps, strict=True)], dim)


def _shrink_by_metric(x: Tensor, groups: Grouping, t: Tensor) -> Tensor:
    """Return argmin_z Σ |z - x|² / (2 t) + Σ_g ‖z_g‖₂, with a threshold t for each entry.

    All tensors are in the viewed shape. If z_g isn't zero, z = x r / (r + t) with r = ‖z_g‖, so
    that r solves ‖x_g / (r + t_g)‖ = 1. The inverse of this norm is concave and grows with r, so
    Newton's iteration for it stays below the root once it is below, and converges quadratically
    (the secular equation of trust regions: Moré and Sorensen 1983). It starts at r = max(|x| - t),
    which is below the root, and where no entry of x / (r + t) is above one. z_g is zero if and only
    if ‖x_g / t_g‖ ≤ 1.
    """
    tolerance = torch.finfo(t.dtype).eps ** 0.5  # of the loop; the final step squares the error
    x, t = exact(x), exact(t)
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
        # Autograd sees the last step with its slope held fixed, which gives the root's derivative
        square = _secular(size, r, t, groups)[0]
    r = torch.where(dead, 1, r + (square - 1) / 2 * slope)
    return torch.where(dead, 0, x * (r / (r + t)))


def _secular(size: Tensor, r: Tensor, t: Tensor, groups: Grouping) -> tuple[Tensor, Tensor]:
    """Return (s, c) of each group, for which c (√s - 1) is a Newton step in r.

    s = ‖size / (r + t)‖², and c = s / Σ size² / (r + t)³.
    """
    bottom = (r + t).clamp_min(torch.finfo(t.dtype).tiny)  # zero only where size is zero too
    squares = (size / bottom).square()
    square, cube = groups.sum(squares), groups.sum(squares / bottom)
    return square, square / torch.where(cube > 0, cube, 1)


def cut_groups(w: Tensor, groups: Grouping, step: float | Tensor) -> Tensor:
    """Return the prox of Σ_g max |x_g|: |x| is clamped to a level of the group.

    By Moreau's identity it is w minus the projection on L1 balls. With a step t for each entry, the
    level of a group is the root of Σ max(|x| - level, 0) / t = 1.
    """
    return _by_root(_cut, w, groups, step)


def _cut(x: Tensor, groups: Grouping, t: Tensor) -> Tensor:
    x, t = exact(x), exact(t)
    size = x.abs()
    level = _root(size, 1 / t.clamp_min(torch.finfo(t.dtype).tiny ** 0.5), torch.ones_like(t), 1.0, 0.0, groups)
    over = (size > level) & (t > 0)
    return torch.where(over, x * (level / torch.where(over, size, 1)), x)


def share_groups(w: Tensor, groups: Grouping, step: float | Tensor) -> Tensor:
    """Return the prox z of Σ_g (Σ|x_g|)²: a soft threshold at 2 t s, where s = Σ|z_g|."""
    return _by_root(_share, w, groups, step)


def _share(x: Tensor, groups: Grouping, t: Tensor) -> Tensor:
    x, t = exact(x), exact(t)
    return soft_threshold(x, 2 * t * _root(x.abs(), torch.ones_like(t), 2 * t, 0.0, 1.0, groups))


def _by_root(solve: Callable[..., Tensor], w: Tensor, groups: Grouping, step: float | Tensor) -> Tensor:
    x = at_least_float32(w)
    t = as_step(step, x)
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=exact(x.real).dtype, device=x.device)
    parts = groups.view(x)
    z = _in_blocks(solve, parts, groups, groups.view(t) if t.dim() else t)
    z = torch.where(groups.max(parts.detach().abs()).isnan(), torch.nan, z)
    return unsigned_zeros(groups.restore(z, x).to(w.dtype))


def _root(size: Tensor, a: Tensor, b: Tensor, c: float, d: float, groups: Grouping) -> Tensor:
    """Return s ≥ 0 of each group, the root of Σ a max(size - b s, 0) = c + d s.

    s is zero if the left side is smaller already at zero. The left side is the maximum over sets A
    of entries of Σ_A a (size - b s); hence s is the maximum over A of
    (Σ_A a size - c) / (Σ_A a b + d). Dinkelbach's (1967) iteration starts with all entries or with
    the best single one, and takes the A of the last s; s grows to the root in a finite number of
    steps. For `_cut` it is Michelot's (1986) projection on a simplex.
    """

    up, down = a * size, (a * b).expand_as(size)

    def quotient(on: Tensor) -> Tensor:
        bottom = groups.sum(torch.where(on, down, 0)) + d
        return ((groups.sum(torch.where(on, up, 0)) - c) / torch.where(bottom > 0, bottom, 1)).clamp_min(0)

    with torch.no_grad():
        on = size > 0
        s = quotient(on)
        single = groups.max(((up - c) / (down + d)).clamp_min(0)) * (1 - 8 * torch.finfo(size.dtype).eps)
        fewer = size > b * torch.maximum(s, single)
        for _ in range(_ROUNDS_COMPILED if torch.compiler.is_compiling() else _ROUNDS):
            grown = quotient(fewer)
            better = grown > s
            if not torch.compiler.is_compiling() and not bool(better.any()):
                break
            on, s = torch.where(better, fewer, on), torch.where(better, grown, s)
            fewer = size > b * s
    return quotient(on)  # repeated outside no_grad, for autograd
