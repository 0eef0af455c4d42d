"""In-place forms of gradient and prox that read and write each weight about once.

A uniform entrywise penalty may be run on any part of a tensor, so that large ones are done in blocks which stay in the
cache; its temporaries then cost no memory traffic. Other penalties take the tensor whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restrain.engine.metric import Metric
from restrain.penalties import Penalty

BLOCK = 1 << 18  # entries


def add_gradient(grad: Tensor, w: Tensor, penalty: Penalty, scale: Tensor | None = None) -> None:
    """grad += gradient of the penalty at w, times `scale` where the gradients are scaled."""
    for g, x in zip(*_parts(penalty, grad, w), strict=True):
        added = penalty.gradient(x)
        g.add_(added if scale is None else added * scale.to(added.dtype))


def apply_prox(w: Tensor, penalty: Penalty, metric: Metric) -> None:
    """w = prox of the penalty at w, with the steps of the optimizer's metric."""
    if metric.second is None:
        for (x,) in zip(*_parts(penalty, w), strict=True):
            x.copy_(penalty.prox(x, metric.scale))
        return
    for x, second in zip(*_parts(penalty, w, metric.second), strict=True):
        x.copy_(penalty.prox(x, metric.steps(second)))


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
