"""How a tensor at a place lies, and over which of its dims one draw is shared."""

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
    """Where the samples of a tensor are, and what gave the tensor."""

    batch_dim: int | None = 0  # None where it is of one sample
    sequence: Tensor | None = None  # of a packed sequence's rows: the number of the sequence that each belongs to
    sequences: int = 0  # their number
    owner: nn.Module | None = None  # the layer
    given: Mapping[Any, Any] = field(default_factory=dict)  # what that layer was called with


PLAIN = Layout()


def checked_same(same: Any) -> Same:
    """`same_over` itself, with a list as a tuple.

    Raises:
        TransformError: it is neither a known name nor dims.
    """
    dims = tuple(same) if isinstance(same, (tuple, list)) else (same,)
    if same in (None, "time", "space") or (dims and all(map(is_whole, dims))):
        return dims if isinstance(same, (tuple, list)) else same
    raise TransformError(f"same_over= is 'time', 'space', a dim or a tuple of dims; got {same!r}")


def blank(x: Tensor, same: Same, layout: Layout) -> Tensor:
    """Ones in the shape of what is to be drawn for x: of size one in the dims where the draw is the same.

    Of a packed sequence, a row for each sequence where the draw is the same over time; see `spread`.
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
    """What was drawn for a `blank`, so that it multiplies x."""
    return drawn[layout.sequence] if layout.sequence is not None and same in ("time", "sample") else drawn


def _shared(x: Tensor, same: Same, batch_dim: int | None) -> list[int]:
    """The dims over which a draw is the same."""
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
