"""Values of penalties on many parameters, for the loss.

Tensors with the same penalty are computed together: by C loops from `LOOPS` entries on, else by
torch, which joins small tensors in one autograd function of bounded memory. Other penalties run
their own formula under autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from restrain.axes import Grouping
from restrain.engine.backends import Compile, Parts, Sums, sums_of
from restrain.engine.core import dense, simple
from restrain.engine.distributed import Term, own_part, value_on_part
from restrain.engine.loss.accumulate import unobserved
from restrain.engine.loss.sums import PenaltySum, applied, eager, in_one_stretch, plain
from restrain.operations import Function, Length
from restrain.penalties import Penalty, Scaled
from restrain.penalties.base import Sum, is_off
from restrain.schedule import Strength

SMALL, JOINED = 1 << 16, 1 << 18  # greatest entries of a tensor that is joined, and of a bundle
LOOPS, EACH = 1 << 18, 1 << 12  # entries from which on loops are used; extra entries for each further tensor
JOINED_BY_LOOPS = 1 << 21  # entries whose gradients the loops compute together


def values(pairs: Sequence[tuple[Tensor, Penalty]], mean: bool = False, compile: Compile = "auto") -> list[Term]:
    """Return terms whose sum is the sum of the penalties' values.

    Args:
        pairs: (tensor, penalty on it).
        mean: divide each value by the number of entries of its tensor.
        compile: use of compiled loops.
    """
    terms: list[Term] = []
    alike: dict[Any, list[_Member]] = {}
    known = eager()
    for p, what in pairs:
        acts, x, ranks = own_part(what, p)
        key = _key(acts, x) if known and plain(x) and (acts.entrywise or not mean) else None
        if key is None:
            terms.append((value_on_part(acts, x, p, mean), ranks))
            continue
        member = _Member(x, acts, ranks, 1 / p.numel() if mean else 1.0)
        alike.setdefault((key, x.dtype, x.device, x.requires_grad, ranks), []).append(member)
    return terms + [(value, members[0].ranks) for members in alike.values() for value in _values(members, compile)]


def _values(members: Sequence[_Member], compile: Compile) -> Iterator[Tensor]:
    """Yield values whose sum is the sum over members with equal keys."""
    entries = sum([one.x.numel() for one in members]) + EACH * (len(members) - 1)
    parts = members[0].what.leaves()
    flat = all(in_one_stretch(one.x) for one in members)
    sums = sums_of(parts, members[0].x, entries if flat else 0, LOOPS, compile)
    if sums is not None and sums.adds:
        yield from _by_loops(members, parts, sums)
        return
    of_width: dict[int, list[_Member]] = {}
    for one in members:
        of_width.setdefault(0 if one.what.entrywise else one.x.numel() // one.x.shape[0], []).append(one)
    for together in of_width.values():
        for bundle in _bundles(together, SMALL, JOINED):
            yield _value(bundle)


def sum_at(h: Tensor, what: Penalty, weight: float, large: bool, compile: Compile) -> PenaltySum | None:
    """Return the PenaltySum of a weighted penalty on tensors like h, or None if no backend has it.

    `large` allows compiled loops.
    """
    if _key(what, h) is None:
        return None
    parts = what.leaves()
    sums = sums_of(parts, h, float(large), 1, compile)
    return None if sums is None else PenaltySum([what], [weight], parts, sums)


@dataclass(eq=False, slots=True)
class _Member:
    x: Tensor
    what: Penalty
    ranks: Any
    weight: float  # of its value


def _key(what: Penalty, x: Tensor) -> Any:
    """Return a key, equal for penalties that can be summed together; None if none can be."""
    if isinstance(what, Scaled):
        off = isinstance(what.strength, Strength) or is_off(what.strength)
        inner = None if off else _key(what.penalty, x)
        strength = id(what.strength) if isinstance(what.strength, Tensor) else what.strength
        return None if inner is None else (strength, inner)
    if isinstance(what, Sum):
        keys = tuple([_key(term, x) for term in what.terms])
        return None if None in keys else keys
    if what.operations is None:
        return None
    if any(isinstance(one, Function) for _, one in what.operations):
        return id(what) if what.by_entry else None
    if not all(one.by_entry or (isinstance(one, Length) and _rows(one.per, x)) for _, one in what.operations):
        return None
    return tuple([(factor, one if one.by_entry else Length) for factor, one in what.operations])


def _rows(groups: Any, x: Tensor) -> bool:
    """True if each group is a contiguous row of x, and its dtype is precise enough for squares."""
    along = simple(x) and isinstance(groups, Grouping) and groups.keep == (0,) and groups.lists is None
    return along and groups.shape == tuple(x.shape) and dense(x) and x.stride(0) * x.shape[0] == x.numel()


def _bundles(members: Sequence[_Member], small: int, most: int) -> Iterator[list[_Member]]:
    """Yield members in bundles: small ones together up to `most` entries, large ones alone."""
    joined: list[_Member] = []
    size = 0
    for member in members:
        entries = member.x.numel()
        if entries > small:
            yield [member]
            continue
        if size + entries > most:
            yield joined
            joined, size = [], 0
        joined.append(member)
        size += entries
    if joined:
        yield joined


def _value(bundle: Sequence[_Member]) -> Tensor:
    parts = bundle[0].what.leaves()
    sums = sums_of(parts, bundle[0].x, 0, 1, False)
    assert sums is not None
    return applied(_sum(bundle, parts, sums), None, *[one.x for one in bundle], last=True)


def _sum(bundle: Sequence[_Member], parts: Parts, sums: Sums) -> PenaltySum:
    return PenaltySum([one.what for one in bundle], [one.weight for one in bundle], parts, sums)


def _by_loops(members: Sequence[_Member], parts: Parts, loops: Sums) -> Iterator[Tensor]:
    """Yield two values: of the parameters whose gradients are added in place, and of the others.

    The gradients of the others are computed in bundles.
    """
    ends: list[_Member] = []
    others: list[_Member] = []
    for one in members:
        (ends if unobserved(one.x) else others).append(one)
    if ends:
        yield applied(_sum(ends, parts, loops), None, *[one.x for one in ends])
    if others:
        value = _sum(others, parts, loops).value([one.x for one in others])
        for bundle in _bundles(others, JOINED_BY_LOOPS, JOINED_BY_LOOPS):
            value = applied(_sum(bundle, parts, loops), value, *[one.x for one in bundle], last=True)
        yield value
