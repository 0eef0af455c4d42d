"""In-place forms of gradient, decay and prox that read and write each weight about once.

A uniform entrywise penalty may be run on any part of a tensor, so that large ones are done in blocks which stay in the
cache; its temporaries then cost no memory traffic. Other penalties take the tensor whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restrain.engine.metric import Metric
from restrain.penalties import Penalty
from restrain.penalties.shrink import at_least_float32

BLOCK = 1 << 18  # entries


def add_gradient(grad: Tensor, w: Tensor, penalty: Penalty, scale: Tensor | None = None) -> None:
    """grad += gradient of the penalty at w, times `scale` where the gradients are scaled."""
    for g, x in zip(*_parts(penalty, grad, w), strict=True):
        added = penalty.gradient(x)
        g.add_(added if scale is None else added * scale.to(added.dtype))


def decay(w: Tensor, penalty: Penalty, rate: float | Tensor) -> None:
    """w -= rate · gradient of the penalty at w; entries that a penalty shrinks stop at zero.

    Entries that are NaN don't spread; see `put`.
    """
    shrinks = all(leaf.shrinks for _, leaf in penalty.leaves())
    for (x,) in zip(*_parts(penalty, w), strict=True):
        wide = at_least_float32(x)
        new = (penalty.gradient(wide) * -rate).add_(wide)
        if shrinks and wide.is_complex():
            new = torch.where((new * wide.conj()).real < 0, 0, new)
        elif shrinks:
            new.clamp_(wide.clamp_max(0), wide.clamp_min(0))  # much faster than `where`
        x.copy_(new) if penalty.entrywise else put(x, new)


def apply_prox(w: Tensor, penalty: Penalty, metric: Metric) -> None:
    """w = prox of the penalty at w, with the steps of the optimizer's metric; entries that are NaN don't spread."""
    for x, *moments in zip(*_parts(penalty, w, *metric.moments), strict=True):
        new = penalty.prox(x, metric.steps(*moments))
        x.copy_(new) if penalty.entrywise else put(x, new)


def put(w: Tensor, new: Tensor) -> None:
    """w = new, but where that isn't finite and w is: one NaN of a group or matrix would make all of it NaN."""
    w.copy_(torch.where(new.isfinite() | ~w.isfinite(), new, w))


def _parts(penalty: Penalty, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor in blocks of the same entries; in one part where it can't be cut."""
    if penalty.entrywise and penalty.uniform and tensors[0].numel() > BLOCK:
        strides = tensors[0].stride()
        if all(t.layout == torch.strided and t.stride() == strides for t in tensors) and _dense(tensors[0]):
            return [t.as_strided((t.numel(),), (1,)).split(BLOCK) for t in tensors]
    return [(t,) for t in tensors]


def _dense(t: Tensor) -> bool:
    """Whether the entries fill one stretch of memory, in whatever order (channels_last does)."""
    return torch.ops.aten.is_non_overlapping_and_dense(t)  # type: ignore[no-any-return]
