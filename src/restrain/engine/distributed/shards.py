"""Parameters that are sharded over processes: DTensors, as FSDP2 and tensor parallelism make them.

What acts on each entry alone, or on groups that lie wholly within a shard, acts on each process's own part. For all
else the tensor is gathered, and of what comes out each process keeps its part. Values of all rules are summed over the
processes by one message, outside the graph: the gradient of a sum is local.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restrain.axes import Grouping
from restrain.errors import HowError
from restrain.named_tensors import Location, Slot, fully_sharded, is_sharded
from restrain.penalties import NetworkPenalty, Penalty
from restrain.penalties.group import GroupPenalty
from restrain.rules import Rule, What
from restrain.torch_private import version
from restrain.transforms import Noise
from restrain.transforms.sets import ByGroup

Ranks: TypeAlias = tuple[tuple[Any, int], ...]
"""The axes of a mesh of processes along which a number has to be summed to be whole; none where it is."""

Term: TypeAlias = tuple[Tensor, Ranks]


NOISE_ON_PARTS = (
    "{whose} by tensor parallelism: each process would draw noise for its part of it alone. Put noise on the layer's "
    "input, as in rs.GaussianNoise(0.1).on(rs.inputs(...)), or train by DDP or FSDP2"
)


class _OverRanks(torch.autograd.Function):
    """The sums over processes; each one's own part of the gradient is that of its own term."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        total = own.clone()
        for mesh, axis in ranks:
            dist.all_reduce(total, group=mesh.get_group(axis))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def local(t: Any) -> Tensor:
    """The process's own part, which lies in the memory of `t`; of any other tensor all. Differentiable."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[no-any-return]


def whole(t: Any) -> Tensor:
    """The gathered tensor; any other one itself. Differentiable, where all processes compute the same of it."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[no-any-return]


def part(full: Tensor, like: Any) -> Tensor:
    """Of a tensor that is the same on all processes, the part that this one has of `like`."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def blank(t: Tensor) -> Tensor:
    """A tensor with the whole shape of `t`, with no values in it if `t` is sharded."""
    return torch.empty(t.shape, dtype=t.dtype, device=local(t).device) if is_sharded(t) else t


def ranks_of(t: Any) -> Ranks:
    """Over what a sum of the entries of each process's own part of `t` has to be summed."""
    return tuple((t.device_mesh, axis) for axis, _ in _split(t)) if is_sharded(t) else ()


def _split(t: Any) -> list[tuple[int, Any]]:
    """The axes of the mesh along which a tensor is split, each with how."""
    sizes = t.device_mesh.shape
    return [(i, how) for i, how in enumerate(t.placements) if not how.is_replicate() and sizes[i] > 1]


def fitted(what: Any, t: Any) -> Any:
    """What does to a process's own part of `t` what `what` does to all; None where that takes the whole tensor."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    if not all(leaf.by_entry or _within(leaf, t) for leaf in leaves):
        return None
    return _regrouped(what, lambda groups: _own_view(groups, t) or groups.shape)


def of_rows(what: Any, shape: tuple[int, ...], rows: int) -> Any:
    """What does to some rows of a tensor of this shape what `what` does to all; None where it takes more than rows."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    for groups in [leaf.per for leaf in leaves if isinstance(leaf, GroupPenalty | ByGroup)]:
        if (
            not isinstance(groups, Grouping)
            or groups.lists is not None
            or groups.shape != shape
            or 0 not in groups.keep
        ):
            return None
    if not all(leaf.by_entry or isinstance(leaf, GroupPenalty | ByGroup) for leaf in leaves):
        return None
    return _regrouped(what, lambda groups: (rows, *shape[1:]))


def _within(leaf: Any, t: Any) -> bool:
    """Whether no group of it is split, if it acts by group."""
    groups = leaf.per if isinstance(leaf, GroupPenalty | ByGroup) else None
    return isinstance(groups, Grouping) and _own_view(groups, t) is not None


def _own_view(groups: Grouping, t: Any) -> tuple[int, ...] | None:
    """The shape in which the groups of a process's own part of `t` lie along whole dims; None if any group is split.

    Whether it is None doesn't depend on the process.
    """
    from torch.distributed.tensor import Shard

    view, own, splits = list(groups.shape), t.to_local().shape, _split(t)
    for dim in {how.dim % max(t.dim(), 1) for _, how in splits}:
        at = _dim_of_view(groups, tuple(t.shape), dim)
        if groups.lists is not None or at is None or at not in groups.keep:
            return None
        block = t.shape[dim] // max(groups.shape[at], 1)
        if block > 1:  # its borders must be those of parts, too; these are simple where one axis of the mesh splits
            here = [(axis, how) for axis, how in splits if how.dim % t.dim() == dim]
            if len(here) > 1 or not isinstance(here[0][1], Shard):
                return None
            if -(-t.shape[dim] // t.device_mesh.shape[here[0][0]]) % block:
                return None
        view[at] = own[dim] // max(block, 1)
    return tuple(view)


def _dim_of_view(groups: Grouping, shape: tuple[int, ...], dim: int) -> int | None:
    """The first of those dims of a grouping's view that a tensor's dim becomes; None where it has no such."""
    if groups.shape == shape:
        return dim
    starts = [at for at in range(len(groups.shape)) if prod(groups.shape[:at]) == prod(shape[:dim])]
    ends = {prod(groups.shape[:at]) for at in range(len(groups.shape) + 1)}
    if not starts or prod(shape[: dim + 1]) not in ends:
        return None
    at = starts[0] if shape[dim] == 1 else starts[-1]
    return at if shape[dim] % max(groups.shape[at], 1) == 0 else None


def _regrouped(what: Any, view: Callable[[Grouping], tuple[int, ...]]) -> Any:
    """The same, for groups along the same dims of a tensor in another view."""
    if isinstance(what, Grouping):
        return dataclasses.replace(what, shape=view(what))
    if isinstance(what, tuple):
        return tuple(_regrouped(one, view) for one in what)
    if not (isinstance(what, What) and dataclasses.is_dataclass(what)):
        return what
    fields = {field.name: getattr(what, field.name) for field in dataclasses.fields(what)}
    members = {key: value for key, value in fields.items() if isinstance(value, Grouping | What | tuple)}
    return dataclasses.replace(what, **{key: _regrouped(value, view) for key, value in members.items()})


def acting(whats: Sequence[Any], p: Tensor, *others: Tensor) -> Iterator[tuple[Sequence[Any], list[Tensor], Ranks]]:
    """For a loop around what is done in place to `p` and others of its shape.

    It gives what acts, what it acts on, and over what sums of that have to be summed: own parts if all of `whats` can
    act there (not at all where that part is empty), else gathered tensors, whose own parts are then written back.
    """
    tensors = [p, *others]
    if not is_sharded(p):
        yield whats, tensors, ()
        return
    own = [fitted(what, p) for what in whats]
    if all(what is not None for what in own):
        if local(p).numel():
            yield own, [local(t) for t in tensors], ranks_of(p)
        return
    gathered = [whole(t) for t in tensors]
    versions = [version(t) for t in gathered]
    yield whats, gathered, ()
    for t, full, before in zip(tensors, gathered, versions, strict=True):
        if is_sharded(t) and version(full) != before:
            local(t).copy_(part(full, t))


def own_part(what: Penalty, p: Tensor) -> tuple[Penalty, Tensor, Ranks]:
    """What acts, on what, and over what its values have to be summed: on the process's own part if that can be."""
    if not is_sharded(p):
        return what, p, ()
    own = fitted(what, p)
    return (what, whole(p), ()) if own is None else (own, local(p), ranks_of(p))


def value_on_part(what: Penalty, x: Tensor, p: Tensor, mean: bool) -> Tensor:
    """The value on a process's own part of p, or that divided by the number of all entries; zero if it has none."""
    if x is p:
        return what.mean(x) if mean else what(x)
    value = what(x) if x.numel() else x.abs().sum().to(torch.promote_types(x.real.dtype, torch.float32))
    return value / max(p.numel(), 1) if mean else value


def value_of(what: Penalty, p: Tensor) -> Term:
    """The value of a penalty on a parameter."""
    own, x, ranks = own_part(what, p)
    return value_on_part(own, x, p, mean=False), ranks


def totals(rules: Sequence[Sequence[Term]]) -> list[Tensor]:
    """The sums of several lists of terms over all processes: one message for them all, none if all are whole."""
    sums: list[dict[Ranks, Tensor]] = []
    for terms in rules:
        found: dict[Ranks, Tensor] = {}
        for value, ranks in terms:
            found[ranks] = found[ranks] + value.to(found[ranks].device) if ranks in found else value
        sums.append(found)
    for ranks in dict.fromkeys(ranks for found in sums for ranks in found if ranks):
        having = [found for found in sums if ranks in found]
        dtype = functools.reduce(torch.promote_types, [found[ranks].dtype for found in having])
        own = torch.stack([found[ranks].to(ranks[0][0].device_type, dtype) for found in having])
        summed: Tensor = _OverRanks.apply(own, ranks)  # type: ignore[no-untyped-call]
        for found, value in zip(having, summed, strict=True):
            value = value.to(found[ranks].device, found[ranks].dtype)
            found[()] = found[()] + value.to(found[()].device) if () in found else value
    return [found.get((), torch.zeros(())) for found in sums]


def total(numbers: Sequence[float], like: Tensor) -> list[float]:
    """Sums over the own parts of `like`, summed over the processes."""
    ranks = ranks_of(like)
    return [float(one) for one in totals([[(torch.tensor(one, dtype=torch.float64), ranks)] for one in numbers])]


# At attach


def at_rest(model: nn.Module) -> None:
    """Let FSDP2 put the shards back into their places, where an evaluation has left gathered weights there."""
    for module in fully_sharded(model.modules()):
        module.reshard()


def looks(what: What) -> bool:
    """Whether what a rule does may look at a tensor's entries when it is bound, not at its shape alone."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    return not all(leaf.by_entry or isinstance(leaf, GroupPenalty | ByGroup) for leaf in leaves)


def location(at: Location, looks: bool) -> Location:
    """Where a rule is bound; the tensor is gathered for what looks at its entries."""
    return dataclasses.replace(at, tensor=whole(at.tensor.detach())) if looks else at


def check(rule: Rule, slot: Slot, tensor: Any) -> None:
    """Refuse what can't be done to a sharded parameter.

    Raises:
        HowError: so it is.
    """
    if not is_sharded(tensor):
        return
    whose = f"{slot.name!r} of shape {tuple(tensor.shape)} is sharded (FSDP2, a DTensor)"
    if rule.how == "parametrize":
        raise HowError(f"{whose}: attach rules with how='parametrize' before fully_shard(model), or use how='project'")
    if isinstance(rule.what, Noise) and rule.how == "forward" and not fully_sharded(slot.owners[0][0].chain):
        raise HowError(NOISE_ON_PARTS.format(whose=whose))
    if isinstance(rule.what, NetworkPenalty) and rule.outputs is not None:
        raise HowError(
            f"{whose}: a penalty of parameters and outputs together would have a gradient of its own on each process, "
            "which nothing averages. Leave outputs= out, give it no parameters (optional=True), or train by DDP"
        )
    if any(placement.is_partial() for placement in tensor.placements):
        raise HowError(f"{whose} as a pending sum ({tensor.placements}): redistribute it before attaching")
