"""Layout of activations: where samples and time lie, and dims over which a draw is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from restrain.errors import TransformError
from restrain.fields import is_whole

Same: TypeAlias = str | int | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the samples of an activation lie, and the layer that the activation belongs to."""

    batch_dim: int | None = 0  # None: a single sample
    sequence: Tensor | None = None  # of each row of a packed sequence, the sequence's number
    sequences: int = 0  # number of packed sequences
    owner: nn.Module | None = None  # the layer
    given: Mapping[Any, Any] = field(default_factory=dict)  # the layer's arguments
    training: bool = True  # the layer is in training mode, and isn't being exported


PLAIN = Layout()


def checked_same(same: Any) -> Same:
    """Return `same_over` with a list as a tuple.

    Raises:
        TransformError: it is neither a known name nor dims.
    """
    dims = tuple(same) if isinstance(same, (tuple, list)) else (same,)
    if same in (None, "time", "space") or (dims and all(map(is_whole, dims))):
        return dims if isinstance(same, (tuple, list)) else same
    raise TransformError(f"same_over= is 'time', 'space', a dim or a tuple of dims; got {same!r}")


def blank(x: Tensor, same: Same, layout: Layout) -> Tensor:
    """Return ones to draw from for x, of size one in the dims that share a draw.

    For a packed sequence with a draw shared over time: a row per sequence; see `spread`.
    """
    if layout.sequence is None:
        shared = _shared(x, same, layout.batch_dim)
        return x.new_ones([1 if dim in shared else size for dim, size in enumerate(x.shape)])
    if same is None or same == "space":
        return x.new_ones([size if dim < 2 else 1 for dim, size in enumerate(x.shape)])
    if same == "time":
        return x.new_ones((layout.sequences, *x.shape[1:]))
    if same == "sample":
        return x.new_ones((layout.sequences, *[1] * (x.dim() - 1)))
    raise TransformError(f"a packed sequence has no dims {same!r} of its own: write same_over='time'")


def spread(drawn: Tensor, same: Same, layout: Layout) -> Tensor:
    """Return draws made from `blank` in a shape that multiplies x."""
    return drawn[layout.sequence] if layout.sequence is not None and same in ("time", "sample") else drawn


def _shared(x: Tensor, same: Same, batch_dim: int | None) -> list[int]:
    """Return the dims over which a draw is shared."""
    dims = list(range(x.dim()))
    if same is None:
        return []
    if isinstance(same, str):
        others = [dim for dim in dims if dim != batch_dim]
        if same == "time":
            return [_time(x, batch_dim)]
        return others if same == "sample" else others[1:]
    wanted = [same] if isinstance(same, int) else list(same)
    if not all(-len(dims) <= dim < len(dims) for dim in wanted):
        raise TransformError(f"same_over={same!r} needs a tensor with such dims, got one of shape {tuple(x.shape)}")
    return [dim % len(dims) for dim in wanted]


def _time(x: Tensor, batch_dim: int | None) -> int:
    if x.dim() == 3 and batch_dim in (0, 1):
        return 1 - batch_dim
    if x.dim() == 2 and batch_dim is None:
        return 0
    raise TransformError(
        f"same_over='time' needs sequences of shape (batch, time, features), or (time, batch, features) where the "
        f"layer says batch_first=False or the place batch_dim=1; got a tensor of shape {tuple(x.shape)}: give the dim "
        "of time instead, as in same_over=2"
    )
