"""Values of penalties on many parameters, for the loss, without a graph inside.

`_Total` is the value of some tensors together; its backward computes the gradient from the weights alone, in one pass
that reads and writes each once: by loops of C (`sums.py`) from `LOOPS` entries on, or in blocks that stay in the cache
(`blocks.py`). Tensors join in one such function as long as they are small, so that no more memory is needed than for
one tensor after the other. What isn't known here, and what autograd must see through (compilation, torch.func, forward
mode), is the formula itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restrain.axes import Grouping
from restrain.engine.backends import Sums
from restrain.engine.backends import known as sums_of
from restrain.engine.core import Parts, Piece, dense, flattened, fresh, pieces_of, scratch, simple
from restrain.engine.distributed import Term, own_part, value_on_part
from restrain.engine.loss.accumulate import at_the_end, give, reached, takes, unobserved
from restrain.engine.loss.passing import gradients
from restrain.penalties import GroupLasso, Penalty, Scaled
from restrain.penalties.base import Sum, is_off, times
from restrain.penalties.entrywise import Entrywise
from restrain.penalties.shrink import at_least_float32
from restrain.schedule import Strength
from restrain.torch_private import batched, flatten, foreach_mul, run_last, transformed, unflatten

SMALL, JOINED = 1 << 16, 1 << 18  # entries of tensors that are joined, and of what they are joined to
LOOPS, EACH = 1 << 18, 1 << 12  # entries of a rule from which on it takes compiled loops; what each tensor adds
JOINED_BY_LOOPS = 1 << 21  # entries of which the gradients are computed together


def values(pairs: Sequence[tuple[Tensor, Penalty]], mean: bool = False) -> list[Term]:
    """Terms whose sum is that of the penalties' values, each on its tensor (or those divided by numbers of entries)."""
    terms: list[Term] = []
    alike: dict[Any, list[_Member]] = {}
    known = by_blocks()
    for p, what in pairs:
        acts, x, ranks = own_part(what, p)
        key = _key(acts, x) if known and plain(x) and (acts.entrywise or not mean) else None
        if key is None:
            terms.append((value_on_part(acts, x, p, mean), ranks))
            continue
        member = _Member(x, acts, ranks, 1 / p.numel() if mean else 1.0)
        alike.setdefault((key, x.dtype, x.device, x.requires_grad, ranks), []).append(member)
    return terms + [(value, members[0].ranks) for members in alike.values() for value in _values(members)]


def _values(members: Sequence[_Member]) -> Iterator[Tensor]:
    """Values whose sum is that of members that are alike."""
    entries = sum([one.x.numel() for one in members]) + EACH * (len(members) - 1)
    large = entries >= LOOPS and all(in_one_stretch(one.x) for one in members)
    parts = members[0].what.leaves()
    loops = sums_of(parts, members[0].x.dtype) if large else None
    if loops is not None:
        yield from _by_loops(members, parts, loops)
        return
    of_width: dict[int, list[_Member]] = {}
    for one in members:
        of_width.setdefault(0 if one.what.entrywise else one.x.numel() // one.x.shape[0], []).append(one)
    for together in of_width.values():
        for bundle in _bundles(together, SMALL, JOINED):
            yield _value(bundle)


def job_at(h: Tensor, what: Penalty, weight: float, large: bool) -> Job | None:
    """What computes the weighted penalty on tensors like `h`, by loops if they are large; None if that isn't known."""
    if _key(what, h) is None:
        return None
    member = _Member(h, what, (), weight)
    parts = what.leaves()
    loops = sums_of(parts, h.dtype) if large else None
    return _blocks([member]) if loops is None else _loops([member], parts, loops)


def by_blocks() -> bool:
    """Whether plain eager code runs, without transformations of functions."""
    return not (torch.compiler.is_compiling() or transformed())


def plain(x: Tensor) -> bool:
    """Whether it is a dense tensor of torch's own class, with entries."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.numel() > 0


def in_one_stretch(x: Tensor) -> bool:
    """Whether the entries can be read where they are, one after the other."""
    return x.is_cpu and (x.is_contiguous() or dense(x)) and not x.is_neg()


@dataclass(eq=False, slots=True)
class _Member:
    x: Tensor
    what: Penalty
    ranks: Any
    weight: float  # of its value


def _key(what: Penalty, x: Tensor) -> Any:
    """Equal for penalties that are the same on all tensors; None for what isn't known here."""
    if isinstance(what, Scaled):
        off = isinstance(what.strength, Strength) or is_off(what.strength)
        inner = None if off else _key(what.penalty, x)
        strength = id(what.strength) if isinstance(what.strength, Tensor) else what.strength
        return None if inner is None else (strength, inner)
    if _is_entrywise(type(what)):
        return id(what)
    if isinstance(what, Sum):
        keys = tuple([_key(term, x) for term in what.terms])
        return None if None in keys else keys
    return GroupLasso if type(what) is GroupLasso and _rows(what.per, x) else None


@functools.cache
def _is_entrywise(kind: type[Penalty]) -> bool:
    """Whether it is one of ours: a subclass may be another formula."""
    return issubclass(kind, Entrywise) and kind.__module__ == Entrywise.__module__


def _rows(groups: Any, x: Tensor) -> bool:
    """Whether each group is a stretch of memory, and no other dtype is needed to add up its squares."""
    along = simple(x) and isinstance(groups, Grouping) and groups.keep == (0,) and groups.lists is None
    return along and groups.shape == tuple(x.shape) and dense(x) and x.stride(0) * x.shape[0] == x.numel()


def _bundles(members: Sequence[_Member], small: int, most: int) -> Iterator[list[_Member]]:
    """Small members together, large ones alone."""
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
    return applied(_blocks(bundle), None, *[one.x for one in bundle], last=True)


def _by_loops(members: Sequence[_Member], parts: Parts, loops: Sums) -> Iterator[Tensor]:
    """The values: one of all parameters whose gradients are added in place; others' gradients are made a few a time."""
    ends: list[_Member] = []
    others: list[_Member] = []
    for one in members:
        (ends if unobserved(one.x) else others).append(one)
    if ends:
        yield applied(_loops(ends, parts, loops), None, *[one.x for one in ends])
    if others:
        value = _loops(others, parts, loops).value([one.x for one in others])
        for bundle in _bundles(others, JOINED_BY_LOOPS, JOINED_BY_LOOPS):
            value = applied(_loops(bundle, parts, loops), value, *[one.x for one in bundle], last=True)
        yield value


def _blocks(bundle: Sequence[_Member]) -> _Blocks:
    parts, weights = bundle[0].what.leaves(), [one.weight for one in bundle]
    alike = len(set(weights)) == 1
    common = weights[0] if alike else 1.0
    pieces = pieces_of([(strength * common, leaf) for strength, leaf in parts], bundle[0].x)
    return _Blocks([one.what for one in bundle], weights, parts, alike, pieces)


def _loops(bundle: Sequence[_Member], parts: Parts, loops: Sums) -> _Loops:
    return _Loops([one.what for one in bundle], [one.weight for one in bundle], parts, loops)


def applied(job: Job, value: Tensor | None, *tensors: Tensor, last: bool = False) -> Tensor:
    """The job's value, added to one at hand that has it already; its backward is the last of all that are ready."""
    if torch.is_grad_enabled() and tensors[0].requires_grad:
        result: Tensor = _Total.apply(job, value, *tensors)  # type: ignore[no-untyped-call]
        if last and all(
            map(unobserved, tensors)
        ):  # each is added while it is in the cache, and its memory free for the next
            run_last(result.grad_fn)
        return result
    with torch.no_grad():
        return job.value(tensors) if value is None else value


class _Total(torch.autograd.Function):
    """The value of a job on some tensors, or one of many tensors, of which the job does the gradients of some."""

    @staticmethod
    def forward(ctx: Any, job: Job, value: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(*tensors)
        return job.value(tensors) if value is None else value

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        others = factor if ctx.needs_input_grad[1] else None
        fast, tensors = by_blocks() and not batched(factor), ctx.saved_tensors
        ends = [node for node, _ in ctx.next_functions[-len(tensors) :]]
        if fast and not torch.is_grad_enabled() and ctx.job.adds(tensors, factor, ends):
            return None, others, *[None] * len(tensors)
        return None, others, *gradients(ctx.job, tensors, factor, fast)


@dataclass
class Job:
    """The same penalty on some tensors, as bound to each, and by what its value on each is multiplied."""

    whats: list[Penalty]
    weights: list[float]
    parts: Parts  # of the first, with strengths as they are at the forward

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum of the values."""
        raise NotImplementedError

    def gradients(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """factor · gradient for each tensor, each in memory of its own."""
        raise NotImplementedError

    def adds(self, tensors: Sequence[Tensor], factor: Tensor, nodes: Sequence[Any]) -> bool:
        """Whether these are added in place, at the end of the backward, to the parameters at these nodes."""
        return False

    def differentiable(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """The same with a graph."""
        with torch.enable_grad():
            of_each = [times(strength, leaf(x)) * weight for x, strength, leaf, weight in self._each(tensors)]
            total = functools.reduce(operator.add, of_each)
        found: Sequence[Tensor] = torch.autograd.grad(total, tensors, factor, create_graph=True, materialize_grads=True)
        return found

    def by_formula(self, tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
        """The same for factors that transform what is done with them: vmap's batches, say."""
        found: dict[int, Tensor] = {}
        for x, strength, leaf, weight in self._each(tensors):
            more = leaf.gradient(at_least_float32(x)) * (times(strength, factor) * weight)
            found[id(x)] = found[id(x)] + more if id(x) in found else more
        return [found[id(x)].to(x.dtype) for x in tensors]

    def _each(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Any, Penalty, float]]:
        for x, what, weight in zip(tensors, self.whats, self.weights, strict=True):
            for (strength, _), (_, leaf) in zip(self.parts, what.leaves(), strict=True):
                yield x, strength, leaf, weight


@dataclass
class _Loops(Job):
    """By loops of C."""

    sums: Sums

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.sums.value(tensors, self.weights)

    def gradients(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        if not all(in_one_stretch(x) for x in tensors):  # hooks of saved tensors may have changed that
            return self.by_formula(tensors, factor)
        found = [fresh(x) for x in tensors]
        self.sums.gradients(tensors, self.weights, float(factor), found)
        return found

    def adds(self, tensors: Sequence[Tensor], factor: Tensor, nodes: Sequence[Any]) -> bool:
        ends = reached(nodes) if all(in_one_stretch(x) for x in tensors) else None
        if ends is not None:
            at_the_end(functools.partial(self._add, tensors, float(factor), ends))
        return ends is not None

    def _add(self, tensors: Sequence[Tensor], factor: float, ends: Sequence[Tensor]) -> None:
        ways: tuple[list[Any], list[Any]] = ([], [])
        for x, weight, p in zip(tensors, self.weights, ends, strict=True):
            ways[takes(p.grad, x)].append((x, weight, p))
        for adds, of_way in enumerate(ways):
            if of_way:
                xs, weights, own = zip(*of_way, strict=True)
                into = [p.grad for p in own] if adds else [fresh(x) for x in xs]
                self.sums.gradients(xs, weights, factor, into, adds=bool(adds))
                if not adds:
                    for p, found in zip(own, into, strict=True):
                        give(p, found)


@dataclass
class _Blocks(Job):
    """By operations of torch on joined tensors, or on blocks of large ones."""

    alike: bool  # all weights; then the pieces have it in their strengths
    pieces: list[Piece]

    @functools.cached_property
    def _simplest(self) -> Piece | None:
        """The piece, where it is one, of one tensor: a layer may be called thousands of times a second."""
        return self.pieces[0] if len(self.pieces) == len(self.whats) == 1 and self.alike else None

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        if (piece := self._simplest) is not None and tensors[0].numel() <= piece.block:
            return times(piece.strength, piece.value(flattened(tensors[0])))
        if self.alike:
            return self._of(_joined(tensors))
        of_each = [self._of(flattened(x)) * weight for x, weight in zip(tensors, self.weights, strict=True)]
        return torch.stack(of_each).sum()

    def _of(self, flat: Tensor) -> Tensor:
        parts = self._cut(flat)
        total: Tensor | None = None
        if len(parts) == 1:
            sums = [piece.value(flat) for piece in self.pieces]
        else:  # all that is to be done to a block at once
            found = [[piece.value(part) for piece in self.pieces] for part in parts]
            sums = [torch.stack(of_parts).sum() for of_parts in zip(*found, strict=True)]
        for piece, value in zip(self.pieces, sums, strict=True):
            own = times(piece.strength, value)
            total = own if total is None else total + own
        assert total is not None
        return total

    def _cut(self, flat: Tensor) -> Sequence[Tensor]:
        """Parts of a flat tensor that stay in a processor's cache; other devices have other ways to be fast."""
        block = min([piece.block for piece in self.pieces])
        if flat.numel() <= block or flat.device.type != "cpu":
            return (flat,)
        width = max([piece.width for piece in self.pieces])
        parts: Sequence[Tensor] = flat.split(max(block // width, 1) * width)
        return parts

    def gradients(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        if len(tensors) == 1:
            out = fresh(tensors[0])
            if (piece := self._simplest) is not None and out.numel() <= piece.block:
                piece.gradient(flattened(tensors[0]), times(piece.strength, factor), flattened(out))
                return (out,)
            self._put(flattened(tensors[0]), factor, flattened(out))
            return (out,)
        flat = _joined(tensors)
        out = torch.empty_like(flat)
        self._put(flat, factor, out)
        views = unflatten(out, tensors)
        return list(foreach_mul(views, [1.0] * len(tensors) if self.alike else self.weights))

    def _put(self, flat: Tensor, factor: Tensor, out: Tensor) -> None:
        factors = [times(piece.strength, factor) for piece in self.pieces]
        for x, o in zip(self._cut(flat), self._cut(out), strict=True):
            self.pieces[0].gradient(x, factors[0], o)
            for piece, own in zip(self.pieces[1:], factors[1:], strict=True):
                more = scratch.like(x, 2)
                piece.gradient(x, own, more)
                o.add_(more)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return flattened(tensors[0])
    return flatten(tensors)
