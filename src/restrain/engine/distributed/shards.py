"""Parameters sharded over processes: DTensors of FSDP2 and tensor parallelism, parts of FSDP1.

A penalty or constraint by entry, or by groups that lie within a shard, acts on each process's own
part. For others the tensor is gathered, and each process keeps its part of the result. Values of
all rules with the same mesh axes are summed over the processes together, an all-reduce per axis.
The gradient of the sum is local.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from restrain.axes import Grouping
from restrain.errors import HowError
from restrain.named_tensors import Location, Slot, fully_sharded, is_sharded
from restrain.penalties import NetworkPenalty, Penalty
from restrain.penalties.group import GroupPenalty
from restrain.rules import Rule, What
from restrain.torch_private import dense_gradient, version
from restrain.transforms import Noise
from restrain.transforms.sets import ByGroup

Ranks: TypeAlias = tuple[tuple[Any, int], ...]
"""Axes of device meshes over which a number must be summed; empty if it is already complete."""

Term: TypeAlias = tuple[Tensor, Ranks]


NOISE_ON_PARTS = (
    "{whose} by tensor parallelism: each process would draw noise for its part of it alone. Put noise on the layer's "
    "input, as in rs.GaussianNoise(0.1).on(rs.inputs(...)), or train by DDP or FSDP2"
)


class _OverRanks(torch.autograd.Function):
    """Sum over processes; each process's gradient is that of its own term."""

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
    """Return the process's own part, a view of the DTensor `t`; other tensors unchanged.

    Differentiable.
    """
    return dense_gradient(t.to_local()) if is_sharded(t) else t


def whole(t: Any) -> Tensor:
    """Return the gathered tensor; other tensors unchanged.

    Differentiable, if all processes compute the same from it.
    """
    return dense_gradient(t.full_tensor()) if is_sharded(t) else t


def part(full: Tensor, like: Any) -> Tensor:
    """Return this process's part, sharded as `like`, of a tensor equal on all processes."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def blank(t: Tensor) -> Tensor:
    """Return an uninitialised tensor with the shape of a sharded `t`; other tensors unchanged."""
    return torch.empty(t.shape, dtype=t.dtype, device=local(t).device) if is_sharded(t) else t


_flat: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Ranks by parameter that FSDP1 has flattened


def ranks_of(t: Any) -> Ranks:
    """Return the mesh axes over which a sum of the entries of own parts of `t` must be summed."""
    if is_sharded(t):
        return tuple((t.device_mesh, axis) for axis, _ in _split(t))
    return _flat.get(t, ()) if _flat else ()


def _split(t: Any) -> list[tuple[int, Any]]:
    """Return (mesh axis, placement) for the axes along which a tensor is split."""
    sizes = t.device_mesh.shape
    return [(i, how) for i, how in enumerate(t.placements) if not how.is_replicate() and sizes[i] > 1]


def fitted(what: Any, t: Any) -> Any:
    """Return `what` for a process's own part of `t`; None if it needs the whole tensor."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    if not all(leaf.by_entry or _within(leaf, t) for leaf in leaves):
        return None
    return _regrouped(what, lambda groups: _own_view(groups, t) or groups.shape)


def of_rows(what: Any, shape: tuple[int, ...], rows: int) -> Any:
    """Return `what` for a block of `rows` rows of a tensor of this shape; None if it needs more."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    for groups in [leaf.per for leaf in leaves if isinstance(leaf, GroupPenalty | ByGroup)]:
        if (
            not isinstance(groups, Grouping)
            or groups.lists is not None
            or groups.shape != shape
            or 0 not in groups.keep
        ):
            return None
    if not all(leaf.by_entry or (isinstance(leaf, GroupPenalty | ByGroup) and leaf.alone) for leaf in leaves):
        return None
    return _regrouped(what, lambda groups: (rows, *shape[1:]))


def _within(leaf: Any, t: Any) -> bool:
    """Return True if a penalty or constraint acts by group and no group of `t` is split."""
    groups = leaf.per if isinstance(leaf, GroupPenalty | ByGroup) and leaf.alone else None
    return isinstance(groups, Grouping) and _own_view(groups, t) is not None


def _own_view(groups: Grouping, t: Any) -> tuple[int, ...] | None:
    """Return the grouping's view shape for a process's own part of `t`; None if a group is split.

    None on one process means None on all.
    """
    from torch.distributed.tensor import Shard

    view, own, splits = list(groups.shape), t.to_local().shape, _split(t)
    for dim in {how.dim % max(t.dim(), 1) for _, how in splits}:
        at = _dim_of_view(groups, tuple(t.shape), dim)
        if groups.lists is not None or at is None or at not in groups.keep:
            return None
        block = t.shape[dim] // max(groups.shape[at], 1)
        if block > 1:  # parts must end where blocks end; computed only for a split by one mesh axis
            here = [(axis, how) for axis, how in splits if how.dim % t.dim() == dim]
            if len(here) > 1 or not isinstance(here[0][1], Shard):
                return None
            if -(-t.shape[dim] // t.device_mesh.shape[here[0][0]]) % block:
                return None
        view[at] = own[dim] // max(block, 1)
    return tuple(view)


def _dim_of_view(groups: Grouping, shape: tuple[int, ...], dim: int) -> int | None:
    """Return the first dim of the grouping's view that a tensor's dim becomes, or None."""
    if groups.shape == shape:
        return dim
    starts = [at for at in range(len(groups.shape)) if prod(groups.shape[:at]) == prod(shape[:dim])]
    ends = {prod(groups.shape[:at]) for at in range(len(groups.shape) + 1)}
    if not starts or prod(shape[: dim + 1]) not in ends:
        return None
    at = starts[0] if shape[dim] == 1 else starts[-1]
    return at if shape[dim] % max(groups.shape[at], 1) == 0 else None


def _regrouped(what: Any, view: Callable[[Grouping], tuple[int, ...]]) -> Any:
    """Return `what` with its groupings in another view, along the same dims."""
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
    """Yield (whats, tensors, ranks) to act in place on `p` and other tensors of its shape.

    Own parts are yielded if all of `whats` can act there, unless they are empty; else gathered
    tensors, whose own parts are written back afterwards. Sums must be summed over `ranks`.
    """
    tensors = [p, *others]
    if not is_sharded(p):
        yield whats, tensors, ranks_of(p)
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
    """Return (penalty, tensor, ranks) for the process's own part if possible, else gathered.

    Values must be summed over `ranks`.
    """
    if not is_sharded(p):
        return what, p, ranks_of(p)
    own = fitted(what, p)
    return (what, whole(p), ()) if own is None else (own, local(p), ranks_of(p))


def value_on_part(what: Penalty, x: Tensor, p: Tensor, mean: bool) -> Tensor:
    """Return the value on a process's own part x of p; `mean`: divided by p's number of entries.

    An empty part has the value zero.
    """
    if x is p:
        return what.mean(x) if mean else what(x)
    value = what(x) if x.numel() else x.abs().sum().to(torch.promote_types(x.real.dtype, torch.float32))
    return value / max(p.numel(), 1) if mean else value


def value_of(what: Penalty, p: Tensor) -> Term:
    """Return (value, ranks) of a penalty on a parameter."""
    own, x, ranks = own_part(what, p)
    return value_on_part(own, x, p, mean=False), ranks


def totals(rules: Sequence[Sequence[Term]]) -> list[Tensor]:
    """Return the sum over all processes of each list of terms.

    Terms of all lists with the same ranks are summed together, by an all-reduce per mesh axis;
    complete terms need no communication.
    """
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
    return [found.get((), torch.zeros((), device="cpu")) for found in sums]


def total(numbers: Sequence[float], like: Tensor) -> list[float]:
    """Return numbers computed on own parts of `like`, summed over the processes."""
    ranks = ranks_of(like)
    return [
        float(one)
        for one in totals([[(torch.tensor(one, dtype=torch.float64, device="cpu"), ranks)] for one in numbers])
    ]


# At attach


def at_rest(model: nn.Module) -> None:
    """Reshard FSDP2 modules in which an evaluation has left gathered weights."""
    for module in fully_sharded(model.modules()):
        module.reshard()


def flattened(model: nn.Module) -> frozenset[int]:
    """Return the ids of parameters of which FSDP1 gives this process a flat part.

    Their sums are over the processes that share them from now on. Parameters that it leaves alone
    have their own shape; of one axis, they can't be told apart.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    split = [m for m in model.modules() if isinstance(m, kind) and m.sharding_strategy.name != "NO_SHARD"]
    if not split:
        return frozenset()
    from torch.distributed.device_mesh import DeviceMesh

    found = set()
    for module in split:  # an outer one comes first, and leaves the parameters of inner ones to them
        ranks = ((DeviceMesh.from_group(module.process_group, module.compute_device.type), 0),)
        for p in module.parameters():
            if p.dim() < 2:
                _flat[p] = ranks
                found.add(id(p))
    return frozenset(found)


def check_flattened(rule: Rule, what: Any, slot: Slot) -> None:
    """Refuse a rule on a flat part of a parameter, unless it acts entry by entry at the step.

    Raises:
        HowError: the rule needs the whole tensor, or its value.
    """
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    moments = ("gradient", "decoupled", "proximal", "project")
    if rule.how in moments and rule.reduce != "mean" and all(leaf.by_entry for leaf in leaves):
        return
    raise HowError(
        f"{rule.label}: of {slot.name!r}, FullyShardedDataParallel gives each process a flat part, on which only rules "
        "that act entry by entry at the optimizer's step are right, such as rs.L2() with how='gradient'. Use FSDP2, "
        "torch.distributed.fsdp.fully_shard(model), where every rule acts on the whole parameter"
    )


def looks(what: What) -> bool:
    """Return True if binding may read a tensor's entries, not only its shape."""
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    return not all(leaf.by_entry or isinstance(leaf, GroupPenalty | ByGroup) for leaf in leaves)


def location(at: Location, looks: bool) -> Location:
    """Return the location at which a rule is bound; `looks`: with the gathered tensor."""
    return dataclasses.replace(at, tensor=whole(at.tensor.detach())) if looks else at


def check(rule: Rule, slot: Slot, tensor: Any) -> None:
    """Refuse a rule that a sharded parameter doesn't support.

    Raises:
        HowError: the rule can't act on a sharded parameter, or the parameter is a pending sum.
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
