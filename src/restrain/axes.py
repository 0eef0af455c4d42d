"""Resolve `per=` (an axis by name or dim, block sizes, lists of indices) to groups of entries.

Layers store their weights in different layouts, so an axis is named by its meaning:

    per=                   groups are the weights ...        Linear, ConvNd  ConvTransposeNd, Conv1D
    "out", "filter"        into one output unit or filter    dim 0           dim 1
    "in", "channel"        out of one input unit or channel  dim 1           dim 0
    "row", "column"        of one index of dim 0, of dim 1
    "head"                 of one head of nn.MultiheadAttention
    an integer             of one index of that dim
    (4, 4)                 of one block, 4 long in dim 0 and in dim 1, and whole in further dims
    [[0, 1], [2, 3, 4]]    of one list of indices of dim 0
    {"in": [[0], [1, 2]]}  of one list of indices of that axis; also ("in", [[0], [1, 2]])

Conv1D is the layer of Hugging Face transformers. The tokens of an `nn.Embedding` (its rows) are
"in", its features (its columns) "out". Indices in no list are in no group: penalties don't count
them, proxes and projections leave them unchanged. Groups don't overlap.

The axes of other modules' parameters are declared by `restrain.layout`, as in "expert out in" (see
`layouts`). Then "out" is one group for each output of each expert, and "expert" one for each
expert. A parameter without a known or declared layout has no named axes. A plain tensor has the
axes (out, in, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restrain.errors import PenaltyError
from restrain.layouts import SAME, WITHIN, base_name, inputs_first, is_word, knows
from restrain.named_tensors import Location
from restrain.torch_private import dispatched, wrapped

NAMES = ("out", "in", "filter", "channel", "head", "row", "column")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Lists:
    """Lists of indices that form groups; indices count through the dims `along`, `count` in all."""

    members: tuple[tuple[int, ...], ...]
    along: tuple[int, ...]
    count: int
    # group number by index
    ids: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = [len(self.members)] * self.count  # one more group, for indices in no list
        for group, indices in enumerate(self.members):
            for i in indices:
                ids[i] = group
        object.__setattr__(self, "ids", tuple(ids))

    def pooled(self, x: Tensor, pool: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return, for each index, the value that `pool` computes from its group's entries of x.

        `pool` gets (zeros, group numbers, entries). Dims of x other than `along` are unchanged.
        """
        last = tuple(range(-len(self.along), 0))
        moved = x.movedim(self.along, last)
        entries = moved.flatten(-len(self.along))
        ids = torch.tensor(self.ids, device=x.device, dtype=torch.long)
        zeros = entries.new_zeros((*entries.shape[:-1], len(self.members) + 1))
        return pool(zeros, ids, entries).index_select(-1, ids).reshape(moved.shape).movedim(last, self.along)


@dataclass(frozen=True)
class Grouping:
    """Groups of a tensor's entries: viewed as `shape`, each index of the dims `keep` is a group.

    With `lists`, the indices of a list are a group; a group's value then stands at each of its
    indices, so that it broadcasts to the group's entries.
    """

    shape: tuple[int, ...]
    keep: tuple[int, ...]
    lists: Lists | None = None
    said: Any = dataclasses.field(default=None, compare=False)  # the `per` it was made from
    stack: tuple[int, ...] = ()  # kept dims that number separate matrices, such as experts

    def __repr__(self) -> str:
        if self.said is not None:
            return repr(self.said)
        return f"Grouping(shape={self.shape}, keep={self.keep}, lists={self.lists})"

    @property
    def own(self) -> tuple[int, ...]:
        """The kept dims without those that number separate matrices."""
        return tuple([dim for dim in self.keep if dim not in self.stack])

    @property
    def reduced(self) -> tuple[int, ...]:
        """The dims inside a group."""
        return tuple([dim for dim in range(len(self.shape)) if dim not in self.keep])

    @property
    def count(self) -> int:
        """The number of groups."""
        along = () if self.lists is None else self.lists.along
        members = 1 if self.lists is None else len(self.lists.members)
        return members * prod([self.shape[dim] for dim in self.keep if dim not in along])

    def view(self, w: Tensor) -> Tensor:
        """Return the tensor in `shape`, in which groups are whole dims; 0 for entries in no group.

        Raises:
            PenaltyError: the tensor has another number of entries.
        """
        if w.numel() != prod(self.shape):
            raise PenaltyError(
                f"these groups are of a tensor viewed as {self.shape}, which one of shape {tuple(w.shape)} can't be: "
                "give per= by name or dim for it"
            )
        left = self._left(w)
        return w.reshape(self.shape) if left is None else torch.where(left, 0, w.reshape(self.shape))

    def restore(self, x: Tensor, w: Tensor) -> Tensor:
        """Return x, computed in `shape`, in w's shape; w itself for entries in no group."""
        left = self._left(x)
        return (x if left is None else torch.where(left, w.reshape(self.shape), x)).reshape(w.shape)

    def sum(self, x: Tensor) -> Tensor:
        """Return sums over each group, for x in `shape`; summed dims stay, of size one."""
        sums = x.sum(self.reduced, keepdim=True) if self.reduced else x
        return sums if self.lists is None else self.lists.pooled(sums, _add)

    def max(self, x: Tensor) -> Tensor:
        """Return maxima over each group of x ≥ 0 in `shape`; zero for groups without entries."""
        if self.reduced:
            x = x.amax(self.reduced, keepdim=True) if x.numel() else x.sum(self.reduced, keepdim=True)
        return x if self.lists is None else self.lists.pooled(x, _greatest)

    def once(self, x: Tensor) -> Tensor:
        """Return each group's value once, given values that stand at each index."""
        if self.lists is None:
            return x
        first = torch.tensor([indices[0] for indices in self.lists.members], device=x.device)
        along = self.lists.along
        return x.movedim(along, tuple(range(-len(along), 0))).flatten(-len(along)).index_select(-1, first)

    def spread(self, mask: Tensor) -> Tensor:
        """Return a mask of groups, one row in the order of `once`, for the entries in `shape`.

        It is true for entries in no group.
        """
        kept = [self.shape[dim] if dim in self.keep else 1 for dim in range(len(self.shape))]
        if self.lists is None:
            return mask.reshape(kept)
        along = self.lists.along
        others = [length for dim, length in enumerate(kept) if dim not in along]
        rows = mask.reshape(*others, len(self.lists.members))
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        ids = torch.tensor(self.lists.ids, device=mask.device, dtype=torch.long)
        spread = rows.index_select(-1, ids).reshape(*others, *[self.shape[dim] for dim in along])
        return spread.movedim(tuple(range(-len(along), 0)), along)

    def sizes(self, x: Tensor) -> float | Tensor:
        """Return the number of entries per group, at least 1: a float if equal, else a tensor."""
        # A list: Dynamo can't trace a generator here
        size = max(prod([self.shape[dim] for dim in self.reduced]), 1)
        if self.lists is None:
            return float(size)
        counts = [*[float(len(indices) * size) for indices in self.lists.members], 1.0]
        return self._per_index([counts[group] for group in self.lists.ids], x)

    def _left(self, x: Tensor) -> Tensor | None:
        """Return the mask of entries in no group; None if each entry is in a group."""
        if self.lists is None or len(self.lists.members) not in self.lists.ids:
            return None
        return self._per_index([float(group == len(self.lists.members)) for group in self.lists.ids], x) == 1

    def _per_index(self, values: list[float], x: Tensor) -> Tensor:
        """Return a value for each index of the lists, of x's dtype, broadcastable to `shape`."""
        along = () if self.lists is None else self.lists.along
        shape = [length if dim in along else 1 for dim, length in enumerate(self.shape)]
        return torch.tensor(values, dtype=x.real.dtype, device=x.device).reshape(shape)


def _add(zeros: Tensor, ids: Tensor, entries: Tensor) -> Tensor:
    return zeros.index_add(-1, ids, entries)


def _greatest(zeros: Tensor, ids: Tensor, entries: Tensor) -> Tensor:
    return zeros.scatter_reduce(-1, ids.expand_as(entries), entries, "amax")


class AcrossTensors:
    """Base of groups of entries of several tensors; `rs.units` makes them."""


class Grouped:
    """Base of penalties and constraints on groups, which may be units across tensors."""

    per: Any

    @property
    def joint(self) -> bool:
        """True if it acts on several tensors together."""
        return self.over_units

    @property
    def over_units(self) -> bool:
        """True if its groups are units across tensors."""
        return isinstance(self.per, AcrossTensors)


Dim: TypeAlias = str | int | Grouping
Per: TypeAlias = str | int | Grouping | AcrossTensors | Iterable[Any] | Mapping[Any, Any]


def checked(per: Per) -> Per:
    """Return `per` in a hashable form: names, dims and groupings unchanged, all else as tuples.

    Raises:
        PenaltyError: `per` isn't valid, or groups overlap.
    """
    if isinstance(per, Grouping | AcrossTensors) or _is_axis(per):
        return per if isinstance(per, str | Grouping | AcrossTensors) else int(per)  # type: ignore[arg-type]
    if isinstance(per, Mapping) and len(per) == 1:
        per = next(iter(per.items()))
    if isinstance(per, Iterable) and not isinstance(per, str | Mapping | Tensor):
        members = tuple(per)
        if len(members) == 2 and _is_axis(members[0]) and not _is_axis(members[1]):
            return (checked(members[0]), _checked_lists(members[1]))
        if members and all(_is_dim(size) and size > 0 for size in members):
            return tuple(int(size) for size in members)
        if members and not any(isinstance(member, str) or _is_dim(member) for member in members):
            return _checked_lists(members)
    raise PenaltyError(
        f"per= is one of {', '.join(map(repr, NAMES))}, a dim such as 0, block sizes such as (4, 4), or lists of "
        f"indices such as [[0, 1], [2, 3, 4]] (of dim 0) or {{'in': [[0, 1], [2, 3, 4]]}}; got {per!r}"
    )


def checked_dim(dim: Any) -> Dim:
    """Return `dim`, a dim of a tensor by number or by the meaning of its axis.

    Raises:
        PenaltyError: `dim` is neither a number, nor a name, nor a grouping.
    """
    if isinstance(dim, Grouping) or _is_axis(dim):
        found: Dim = dim
        return found
    raise PenaltyError(f"dim= is a dim such as 0, or an axis by name such as 'in'; got {dim!r}")


def _checked_lists(lists: Any) -> tuple[tuple[int, ...], ...]:
    groups = [tuple(indices) if isinstance(indices, Iterable) else () for indices in tuple(lists)]
    seen: set[int] = set()
    for indices in groups:
        if not indices or not all(_is_dim(i) and i >= 0 and not isinstance(i, str) for i in indices):
            raise PenaltyError(
                f"per= by index needs lists of whole numbers from 0, none of them empty, such as [[0, 1], [2, 3, 4]]; "
                f"got {lists!r}"
            )
        for i in indices:
            if i in seen:
                raise PenaltyError(
                    f"per= names the index {i} twice, and groups can't overlap: put it into one list only, or add up "
                    "penalties of groups that don't overlap, with how='loss'"
                )
            seen.add(int(i))
    return tuple([tuple([int(i) for i in indices]) for indices in groups])


def _is_dim(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_axis(value: Any) -> bool:
    """Return True for an axis by name, or a dim."""
    return value in NAMES or is_word(value) if isinstance(value, str) else _is_dim(value)


def grouping(
    per: Per,
    tensor_shape: tuple[int, ...],
    owner: nn.Module | None = None,
    attribute: str = "",
    heads: int | None = None,
) -> Grouping:
    """Return the groups that `per` means for a tensor.

    Args:
        per: an axis, block sizes or lists of indices (see the module's table); a grouping is
            returned unchanged.
        tensor_shape: the tensor's shape.
        owner: the module whose parameter the tensor is, which determines the layout; with None the
            axes are (out, in, ...).
        attribute: the parameter's name in `owner`.
        heads: the number of heads of the attention that contains `owner`, for "head".

    Raises:
        PenaltyError: the tensor doesn't have the axis; the message says what to write.

    >>> grouping("in", (8, 4, 3, 3), nn.ConvTranspose2d(8, 4, 3), "weight").keep
    (0,)
    """
    return _grouping(per, _Place(tuple(tensor_shape), owner, attribute, heads))


def grouping_at(per: Per, at: Location) -> Grouping:
    """Return the groups that `per` means for a parameter of a model; see `grouping`.

    Raises:
        PenaltyError: `per` names an axis, and the layout is neither known nor declared.
    """
    return _grouping(per, _Place(tuple(at.tensor.shape), at.owner, at.attribute, at.heads, at.axes, at.name))


@dataclass(frozen=True)
class _Place:
    """A tensor's shape, and the context that determines the meaning of its axes."""

    shape: tuple[int, ...]
    owner: nn.Module | None = None
    attribute: str = ""
    heads: int | None = None
    axes: tuple[str, ...] | None = None
    name: str = ""

    def __str__(self) -> str:
        """Return the parameter's name and owner in brackets, for messages; "" without an owner."""
        if self.owner is None:
            return ""
        return f" ({(self.name or self.attribute)!r} of {type(self.owner).__name__})"


def _grouping(per: Per, at: _Place) -> Grouping:
    per = checked(per)
    if isinstance(per, AcrossTensors):
        raise PenaltyError(
            f"per={per!r} are groups across the tensors of a model, and here is one tensor of shape {at.shape}{at}: "
            "attach a rule with them"
        )
    return per if isinstance(per, Grouping) else dataclasses.replace(_groups(per, at), said=per)


def _groups(per: Any, at: _Place) -> Grouping:
    shape = at.shape
    if isinstance(per, tuple) and _is_dim(per[0]) and _is_dim(per[-1]):
        return _blocks(per, shape)
    if isinstance(per, tuple):
        axis, lists = per if _is_axis(per[0]) else (0, per)
        return _by_index(lists, _grouping(axis, at), axis)
    if isinstance(per, int):
        if not -len(shape) <= per < len(shape):
            raise PenaltyError(f"per={per} needs a tensor with that dim, got one of shape {shape}{at}")
        return Grouping(shape, (per % len(shape),))
    if len(shape) < 2:
        raise PenaltyError(
            f"per={per!r} needs a weight with two axes or more, got a tensor of shape "
            f"{shape}{at}: select rs.weights" + (", or write per=0 for one group an entry" if shape else "")
        )
    if per in ("row", "column"):
        return Grouping(shape, (0 if per == "row" else 1,))
    if at.axes is not None:
        return _by_layout(per, at.axes, at)
    if per == "head":
        return _heads(at)
    if per not in NAMES or not knows(at.owner):
        raise _unknown(per, at)
    return _by_meaning(per in ("out", "filter"), str(per), shape, at.owner, base_name(at.attribute))


def _unknown(per: str, at: _Place) -> PenaltyError:
    if at.owner is None or knows(at.owner):
        return PenaltyError(
            f"{per!r} is no axis of a tensor of shape {at.shape}{at}: write 'out', 'in' or a dim such as 0, or declare "
            "by rs.layout what the axes mean"
        )
    name, owner = at.name or at.attribute, type(at.owner)
    example = "expert out in" if len(at.shape) == 3 else "out in"
    of_type = f" or rs.layout({owner.__name__}, {at.attribute}={example!r})"
    return PenaltyError(
        f"{per!r} is no known axis of {name!r}, a parameter of shape {at.shape} of {owner.__name__}: declare what its "
        f"axes mean, as in rs.layout({name!r}, {example!r}){'' if owner.__module__.startswith('torch.') else of_type}, "
        "or name a dim, such as 0"
    )


def _by_layout(per: str, axes: tuple[str, ...], at: _Place) -> Grouping:
    """Return groups along an axis of a layout, for each of the matrices if there are several."""
    word = SAME.get(per, per)
    if axes.count(word) != 1:
        raise PenaltyError(
            f"{per!r} is no axis of {' '.join(axes)!r}, the layout of a tensor of shape {at.shape}{at}: write one of "
            f"{', '.join(map(repr, dict.fromkeys(axes)))}, or a dim"
        )
    own = axes.index(word)
    if word not in WITHIN:
        return Grouping(at.shape, (own,))
    stack = tuple([dim for dim, other in enumerate(axes) if other not in WITHIN])
    return Grouping(at.shape, tuple(sorted((*stack, own))), stack=stack)


def grouping_of_samples(per: Per, shape: tuple[int, ...], batch: int) -> Grouping:
    """Return the groups within each sample of an output; `per` counts dims with the batch axis.

    Raises:
        PenaltyError: `per` is neither a dim, nor lists of indices of a dim, nor blocks within a
            sample.
    """
    per = checked(per)
    check_place(per)
    batch, groups = batch % len(shape), grouping(per, shape)
    if isinstance(per, tuple) and _is_dim(per[-1]):
        if batch >= len(per) or per[batch] != 1:
            raise PenaltyError(
                f"on outputs, blocks are of one sample: per={per!r} needs a 1 at the batch axis, dim {batch}"
            )
        return groups
    if groups.lists is not None and batch in groups.keep:
        raise PenaltyError(f"dim {batch} is the batch axis of the output, whose samples can't be grouped: per={per!r}")
    return dataclasses.replace(groups, keep=tuple(sorted({batch, *groups.keep})))


def check_place(per: Per) -> None:
    """Check that `per` is possible on outputs, whose axes have no names.

    Raises:
        PenaltyError: `per` is neither a dim, nor lists of indices of a dim, nor block sizes.
    """
    if isinstance(per, int) or (isinstance(per, tuple) and isinstance(per[0], int)):
        return
    raise PenaltyError(
        f"on outputs, per= is a dim of the output, not {per!r}: write for instance per=1 for the channels of "
        "(batch, channel, height, width), or per=(1, [[0, 1], [2, 3]]) for lists of them"
    )


def _blocks(sizes: tuple[int, ...], shape: tuple[int, ...]) -> Grouping:
    """Return a grouping by blocks of the given sizes in the first dims, whole in the other dims."""
    if len(sizes) > len(shape):
        raise PenaltyError(f"per={sizes!r} are the sizes of blocks in {len(sizes)} dims, got a tensor of shape {shape}")
    for length, size in zip(shape, sizes, strict=False):
        if length % size:
            raise PenaltyError(
                f"blocks must divide a tensor evenly: per={sizes!r} doesn't fit the shape {shape}, as {size} doesn't "
                f"divide {length}; use lists of indices for groups of different sizes"
            )
    split = [part for length, size in zip(shape, sizes, strict=False) for part in (length // size, size)]
    return Grouping((*split, *shape[len(sizes) :]), tuple(range(0, 2 * len(sizes), 2)))


def _by_index(lists: tuple[tuple[int, ...], ...], groups: Grouping, axis: str | int) -> Grouping:
    """Return a grouping that unites the indices of each list along an axis."""
    count = prod([groups.shape[dim] for dim in groups.own])
    greatest = max([max(indices) for indices in lists])
    if greatest >= count:
        where = f"dim {axis}" if isinstance(axis, int) else repr(axis)
        raise PenaltyError(f"per= names the index {greatest} of {where}, which has {count}, counted from 0")
    return dataclasses.replace(groups, lists=Lists(lists, groups.own, count))


def _by_meaning(out: bool, per: str, shape: tuple[int, ...], owner: nn.Module | None, attribute: str) -> Grouping:
    """Return groups by output (if `out`) or by input, in the layout of the owner's weight."""
    weight = attribute == "weight"
    if weight and isinstance(owner, nn.Bilinear) and not out:
        raise PenaltyError(f"per={per!r}: nn.Bilinear has two inputs; write per=1 for the first, per=2 for the second")
    if weight and isinstance(owner, _CONVOLUTIONS) and owner.groups > 1 and not out:
        # dim 1 numbers the inputs within each group; dims 0 and 2 of this view number all inputs
        return Grouping((owner.groups, shape[0] // owner.groups, *shape[1:]), (0, 2))
    if weight and isinstance(owner, _TRANSPOSED) and owner.groups > 1 and out:
        return Grouping((owner.groups, shape[0] // owner.groups, *shape[1:]), (0, 2))
    swapped = weight and inputs_first(owner)
    return Grouping(shape, (0 if out is not swapped else 1,))


def _heads(at: _Place) -> Grouping:
    """Return groups by head, of a weight of nn.MultiheadAttention or of its out_proj."""
    shape, owner, attribute = at.shape, at.owner, at.attribute
    number = owner.num_heads if isinstance(owner, nn.MultiheadAttention) else at.heads
    if number is not None and len(shape) == 2:
        if attribute == "in_proj_weight" and shape[0] % (3 * number) == 0:
            return Grouping((3, number, shape[0] // (3 * number), shape[1]), (1,))
        if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight") and shape[0] % number == 0:
            return Grouping((number, shape[0] // number, shape[1]), (0,))
        # out_proj
        if attribute == "weight" and isinstance(owner, nn.Linear) and shape[1] % number == 0:
            return Grouping((shape[0], number, shape[1] // number), (1,))
    raise PenaltyError(
        "per='head' is for weights of nn.MultiheadAttention (in_proj_weight, q_proj_weight, k_proj_weight, "
        "v_proj_weight, out_proj.weight) reached through a rule, got a tensor of shape "
        f"{shape}{at}: of another attention, write a head's rows or columns as lists, {{'out': [[0, 1], [2, 3]]}} or "
        f"{{'in': ...}}, or as a block: with 64 features in a head, per={(64,)} for rows, per={(*shape[:1], 64)} for "
        "columns (of Hugging Face's Conv1D, columns are the outputs)"
    )


def squared(w: Tensor) -> Tensor:
    """Return |x|² of each entry."""
    return w.real.square() + w.imag.square() if w.is_complex() else w.square()


def group_size(groups: Grouping) -> int:
    """Return the number of entries in each group.

    Raises:
        PenaltyError: groups are lists of indices, which differ in size; see `Grouping.sizes`.
    """
    if groups.lists is not None:
        raise PenaltyError("this isn't defined for groups by lists of indices; give per= by name, dim or block sizes")
    return prod([groups.shape[dim] for dim in groups.reduced])


def group_norms(w: Tensor, groups: Grouping) -> Tensor:
    """Return the Euclidean norm of each group, in the viewed shape with reduced dims of size one.

    If squares could overflow or vanish, entries are divided by the greatest of their group first.
    The gradient is zero, not NaN, where a norm is zero. NaN entries give NaN.
    """
    x = groups.view(w)
    plain = groups.reduced and groups.lists is None and not x.is_complex()
    if plain and not torch.compiler.is_compiling() and _ordinary.get():
        wide: Tensor = torch.linalg.vector_norm(x, dim=groups.reduced, keepdim=True, dtype=torch.float64)
        return wide.to(x.dtype)
    squares = groups.sum(squared(x))
    if not all_in_range(squares):
        unit = peaks(x, groups)
        scaled = _root(groups.sum(squared(x / unit)))
        return torch.where(scaled == 0, 0.0, unit * scaled)
    return _root(squares)


_ordinary: ContextVar[bool] = ContextVar("_ordinary", default=False)


@contextmanager
def ordinary_entries() -> Iterator[None]:
    """Context in which group norms take one operation, in float64.

    Squares of float64 entries overflow there beyond 1e154, and vanish below 1e-162.
    """
    token = _ordinary.set(True)
    try:
        yield
    finally:
        _ordinary.reset(token)


def peaks(x: Tensor, groups: Grouping) -> Tensor:
    """Return the greatest |entry| of each group, detached: a normal number, or 1 if infinite."""
    peak = groups.max(x.detach().abs()).clamp_min(torch.finfo(x.real.dtype).tiny)
    return torch.where(peak.isinf(), 1, peak)


def all_in_range(squares: Tensor) -> bool:
    """Return True if no sum of squares can have overflowed or lost small entries.

    Also False where reading the sums would wait for a GPU or break a compiled graph.
    """
    traced = torch.compiler.is_compiling() or type(squares) is not Tensor or wrapped(squares)
    traced = traced or dispatched() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if traced or squares.device.type != "cpu" or not squares.numel():
        return False
    least, greatest = squares.detach().aminmax()
    return float(least) > 1e-24 and float(greatest) < 1e30


def _root(squares: Tensor) -> Tensor:
    """Return the square root, with a zero gradient at zero."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
