"""Counter-based random numbers for compiled updates: a hash of position and two keys.

torch's generator is sequential; a function of the position is vectorised, and 64 × 784 normal
numbers take less than half of the time. Position and keys pass two rounds of a 32-bit mixing
function, in which a change of any bit flips every output bit with a probability near one half. The
keys, 64 bits for each draw of each update, come from torch's generator. Uniform numbers have 24
bits, like torch's; a dropout rate is exact to 2⁻³²; normal numbers are by Box and Muller (1958),
within ±5.9 deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DRAWS = 16  # greatest number of draws in an update


def keys(updates: int) -> Tensor:
    """Return two int32 keys per draw and update, from torch's generator: (updates, DRAWS, 2)."""
    return torch.randint(-(2**31), 2**31, (updates, DRAWS, 2), dtype=torch.int32, device="cpu")


def _mixed(h: Tensor) -> Tensor:
    """Mix 32 bits bijectively; shifts and multipliers are from hash-prospector (C. Wellons)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x21F0AAAD
    h = (h ^ ((h >> 15) & 0x1FFFF)) * 0x735A2D97
    return h ^ ((h >> 15) & 0x1FFFF)


def bits(first: int, count: int, key: Tensor) -> Tensor:
    """Return 32 random bits, as int32, for each position from `first` to `first + count - 1`."""
    return _mixed(_mixed(torch.arange(first, first + count, dtype=torch.int32, device="cpu") + key[0]) ^ key[1])


def uniform(like: Tensor, key: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), in the shape and dtype of `like`."""
    drawn = ((bits(0, like.numel(), key) >> 8) & 0xFFFFFF).float() * 2.0**-24
    return drawn.view(like.shape).to(like.dtype)


def normal(like: Tensor, key: Tensor) -> Tensor:
    """Return standard normal numbers, in the shape and dtype of `like`."""
    half = (like.numel() + 1) // 2
    inner = ((bits(0, half, key) >> 8) & 0xFFFFFF).float() * 2.0**-24 + 2.0**-25
    length, angle = torch.sqrt(-2 * torch.log(inner)), bits(half, half, key).float() * (math.pi * 2.0**-31)
    drawn = torch.cat([length * torch.cos(angle), length * torch.sin(angle)])[: like.numel()]
    return drawn.view(like.shape).to(like.dtype)


def dropped(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Return x with entries zeroed with probability `rate`, the others divided by 1 - rate."""
    least = round(rate * 2**32) - 2**31
    return torch.where(bits(0, x.numel(), key).view(x.shape) >= least, x / (1 - rate), 0.0)


class Drawing(TorchFunctionMode):
    """Context in which `randn_like`, `rand_like` and `F.dropout` draw by the keys of an update.

    Draws for complex tensors still come from torch's generator.
    """

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key, self.count = key, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        one = _ONES.get(func)
        if one is None or args[0].is_complex():
            return func(*args, **given)
        if self.count == DRAWS:
            raise ValueError(f"more than {DRAWS} draws of random numbers in an update")
        self.count += 1
        return one(*args, key=self.key[self.count - 1], **given)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Tensor) -> Tensor:
    return dropped(x, p, key) if training else x


_ONES: dict[Any, Callable[..., Tensor]] = {torch.randn_like: normal, torch.rand_like: uniform, F.dropout: _dropout}
