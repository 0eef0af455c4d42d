"""Counter-based random numbers for recorded updates: a hash of position and two keys.

torch's generator is sequential; a function of the position is vectorised, and 64 × 784 normal
numbers take less than half of the time. Position and keys pass two rounds of a 32-bit mixing
function, in which a change of any bit flips every output bit with a probability near one half. The
keys, 64 bits for each draw of each update, come from torch's generator. Uniform numbers have 24
bits, like torch's; a dropout rate is exact to 2⁻³²; normal numbers are by Box and Muller (1958),
within ±5.9 deviations.

Compiled code computes the numbers within the update. Updates that run operation by operation get
them as arguments, made for many updates at once (`supplies`), with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    drawn = _box_muller(bits(0, half, key), bits(half, half, key))[: like.numel()]
    return drawn.view(like.shape).to(like.dtype)


def _box_muller(first: Tensor, second: Tensor) -> Tensor:
    """Return twice as many normal numbers along the last dim, of bits as int32."""
    inner = ((first >> 8) & 0xFFFFFF).float() * 2.0**-24 + 2.0**-25
    length, angle = torch.sqrt(-2 * torch.log(inner)), second.float() * (math.pi * 2.0**-31)
    return torch.cat([length * torch.cos(angle), length * torch.sin(angle)], -1)


def dropped(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Return x with entries zeroed with probability `rate`, the others divided by 1 - rate."""
    return torch.where(bits(0, x.numel(), key).view(x.shape) >= _least(rate), x / (1 - rate), 0.0)


def _least(rate: float) -> int:
    """Return the least int32 of the entries that are kept."""
    return min(round(rate * 2**32) - 2**31, 2**31 - 1)


class Drawing(TorchFunctionMode):
    """Context in which `randn_like`, `rand_like` and `F.dropout` draw by the keys of an update.

    Draws for complex tensors still come from torch's generator.

    Args:
        key: the keys of the update, (DRAWS, 2).
        supply: instead of keys, the tensors of `supplies`, one for each draw.
    """

    def __init__(self, key: Tensor | None, supply: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.key, self.asked = key, list[Draw]()
        self._supply = iter(supply)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        asked = _ASKED.get(func)
        if asked is None or args[0].is_complex():
            return func(*args, **given)
        if len(self.asked) == DRAWS:
            raise ValueError(f"more than {DRAWS} draws of random numbers in an update")
        draw = asked(*args, **given)
        self.asked.append(draw)
        if draw.kind == "none":
            return args[0]
        if self.key is None:
            drawn = next(self._supply)
            return args[0] * drawn if draw.kind == "dropout" else drawn
        key = self.key[len(self.asked) - 1]
        return dropped(args[0], draw.rate, key) if draw.kind == "dropout" else _LIKE[draw.kind](args[0], key)


@dataclass(frozen=True)
class Draw:
    """A draw of an update.

    Args:
        kind: "normal", "uniform", "dropout", or "none": dropout that is off.
        shape: of the tensor.
        dtype: of the tensor.
        rate: of dropout.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rate: float = 0.0

    @property
    def entries(self) -> int:
        """The number of random numbers; 0 of a draw that is off."""
        return 0 if self.kind == "none" else math.prod(self.shape)

    def tensors(self, keys: Any) -> Tensor:
        """Return the numbers, (updates, *shape), for this draw's keys, an array (updates, 2).

        Of dropout they are factors: 0 with probability `rate`, else 1 / (1 - rate).
        """
        count = self.entries
        if self.kind == "dropout":
            left = _bits(0, count, keys).view(np.int32) >= np.int32(_least(self.rate))
            wide = np.float64 if self.dtype == torch.float64 else np.float32
            drawn = torch.from_numpy(np.multiply(left, wide(1 / (1 - self.rate)), dtype=wide))
        elif self.kind == "uniform":
            drawn = torch.from_numpy((_bits(0, count, keys) >> 8).view(np.int32)).float() * 2.0**-24
        else:
            half = (count + 1) // 2
            bits = [torch.from_numpy(_bits(first, half, keys).view(np.int32)) for first in (0, half)]
            drawn = _box_muller(*bits)[:, :count]
        return drawn.to(self.dtype).reshape(-1, *self.shape)


def supplies(draws: Sequence[Draw], keys: Tensor) -> Iterator[list[Tensor]]:
    """Yield the tensors of each update's draws, for keys (updates, DRAWS, 2).

    They are made for several updates at once, as far as these fit the processor's cache.
    """
    some = [(number, draw) for number, draw in enumerate(draws) if draw.kind != "none"]
    size = max(1, _BLOCK // max(1, sum([draw.entries for _, draw in some])))
    every = keys.numpy().view(np.uint32)
    for first in range(0, len(every), size):
        part = every[first : first + size]
        made = [draw.tensors(part[:, number]).unbind() for number, draw in some]
        for update in range(len(part)):
            yield [tensors[update] for tensors in made]


_BLOCK = 2**17  # random numbers that are made at once


def _bits(first: int, count: int, keys: Any) -> Any:
    """Return the bits of `bits` for several updates, as an array of uint32, (updates, count)."""
    h = np.add(keys[:, :1], np.arange(first, first + count, dtype=np.uint32))
    other = np.empty_like(h)
    _mix(h, other)
    h ^= keys[:, 1:]
    _mix(h, other)
    return h


def _mix(h: Any, other: Any) -> None:
    """Do what `_mixed` does, in place; `other` is overwritten."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        np.right_shift(h, shift, out=other)
        np.bitwise_xor(h, other, out=h)
        np.multiply(h, np.uint32(factor), out=h)
    np.right_shift(h, 15, out=other)
    np.bitwise_xor(h, other, out=h)


def _normal(like: Tensor) -> Draw:
    return Draw("normal", tuple(like.shape), like.dtype)


def _uniform(like: Tensor) -> Draw:
    return Draw("uniform", tuple(like.shape), like.dtype)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Draw:
    return Draw("dropout" if training else "none", tuple(x.shape), x.dtype, p)


_ASKED: dict[Any, Callable[..., Draw]] = {torch.randn_like: _normal, torch.rand_like: _uniform, F.dropout: _dropout}
_LIKE: dict[str, Callable[..., Tensor]] = {"normal": normal, "uniform": uniform}
