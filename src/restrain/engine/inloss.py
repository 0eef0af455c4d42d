"""Values of penalties on many parameters, for the loss: in blocks that stay in the cache, without a graph inside.

`_Total` is the value of some tensors together; its backward computes the gradient from the weights alone, in one pass
that reads and writes each once. Tensors join in one such function as long as they are small, so that no more memory is
needed than for one tensor after the other. What isn't known here, and what autograd must see through (compilation,
torch.func, forward mode), is the formula itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._utils
from torch import Tensor, nn
from torch.autograd import forward_ad

from restrain.axes import Grouping
from restrain.engine.blocks import Parts, Piece, dense, flattened, fresh, pieces_of, scratch, simple
from restrain.engine.injection import packs
from restrain.engine.shards import Term, own_part, value_on_part
from restrain.engine.through import Absolute, AbsoluteThrough, Through, batched, gradients
from restrain.penalties import GroupLasso, Penalty, Scaled
from restrain.penalties.base import Sum
from restrain.penalties.checks import batch_size, is_off, times
from restrain.penalties.entrywise import Entrywise
from restrain.penalties.shrink import at_least_float32
from restrain.schedule import Strength

SMALL, JOINED = 1 << 16, 1 << 18  # entries of tensors that are joined, and of what they are joined to

_KEPT = 32  # sizes of batches


def values(pairs: Sequence[tuple[Tensor, Penalty]], mean: bool = False) -> list[Term]:
    """Terms whose sum is that of the penalties' values, each on its tensor (or those divided by numbers of entries)."""
    terms: list[Term] = []
    alike: dict[Any, list[_Member]] = {}
    known = _by_blocks()
    for p, what in pairs:
        acts, x, ranks = own_part(what, p)
        key = _key(acts, x) if known and _plain(x) and (acts.entrywise or not mean) else None
        if key is None:
            terms.append((value_on_part(acts, x, p, mean), ranks))
            continue
        member = _Member(x, acts, ranks, 1 / p.numel() if mean else 1.0)
        alike.setdefault((key, x.dtype, x.device, x.requires_grad, ranks), []).append(member)
    bundles = [bundle for members in alike.values() for bundle in _bundles(members)]
    return terms + [(_value(bundle), bundle[0].ranks) for bundle in bundles]


class AtPlace:
    """A penalty on the outputs of a layer, averaged over the batch; what is known of it is kept from call to call."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty
        self._fixed = penalty.entrywise and all(isinstance(strength, float) for strength, _ in penalty.leaves())
        self._slope = _slope(penalty) if self._fixed else None
        self._jobs: dict[Any, _Job | None] = {}

    def value(self, h: Tensor, dim: int | None) -> Tensor:
        """`penalty.over_batch(h, dim)`."""
        job = self._known(h, dim)
        return self.penalty.over_batch(h, dim) if job is None else _apply(job, h)

    def of_relu(self, h: Tensor, dim: int | None) -> tuple[Tensor, float] | None:
        """The value, in two factors, where `h` comes of a ReLU and the penalty is an L1: the first is a plain sum.

        Its gradient is one at the zeros, too, where ReLU lets none through. Nothing is kept for the backward, so that
        `h` may be overwritten.
        """
        if self._slope is None or (node := h.grad_fn) is None or node.name() != "ReluBackward0":
            return None
        if not (torch.is_grad_enabled() and _plain(h) and simple(h)) or _transformed():
            return None
        return h.sum(), self._slope / (1 if dim is None else batch_size(h, dim))

    def by_signs(self, h: Tensor, dim: int | None) -> Tensor | None:
        """The value where the penalty is an L1 of real entries, and the code is compiled."""
        if self._slope is None or h.is_complex():
            return None
        value: Tensor = Absolute.apply(h)[0] * (self._slope / (1 if dim is None else batch_size(h, dim)))  # type: ignore[no-untyped-call]
        return value

    def through(self, h: Tensor, dim: int | None, copy: bool) -> tuple[Tensor, Tensor, float] | None:
        """What goes on in the place of `h` (equal to it, or a copy), and the value; None where that isn't known.

        The gradient of the value joins that of what goes on in one pass, where the two meet.
        """
        if not (torch.is_grad_enabled() and h.requires_grad) or (job := self._known(h, dim)) is None:
            return None
        if copy and self._slope is not None and _may_be_overwritten(h):
            h, value = AbsoluteThrough.apply(h, _by_blocks)  # type: ignore[no-untyped-call]
            return h, value, self._slope / (1 if dim is None else batch_size(h, dim))
        return *Through.apply(job, h, copy, _by_blocks), 1.0  # type: ignore[no-untyped-call]

    def _known(self, h: Tensor, dim: int | None) -> _Job | None:
        if not (self._fixed and _plain(h) and _by_blocks()):
            return None
        size = 1 if dim is None else batch_size(h, dim)
        known = h.dtype, size
        if known not in self._jobs:
            if len(self._jobs) == _KEPT:
                self._jobs.clear()
            member = _Member(h, self.penalty, (), 1 / size)
            self._jobs[known] = None if _key(self.penalty, h) is None else _job([member])
        return self._jobs[known]


def _may_be_overwritten(h: Tensor) -> bool:
    """Whether our function may say that it changes `h`; a checkpoint compares what is kept, which must be h itself."""
    return simple(h) and h.is_cpu and dense(h) and not (h.is_leaf or h._is_view() or packs())


def _slope(penalty: Penalty) -> float | None:
    """a where the penalty is a Σ|x|."""
    parts = penalty.leaves()
    if not all(type(leaf).__module__ == Entrywise.__module__ and leaf.elastic is not None for _, leaf in parts):
        return None
    l1, l2, _ = penalty.split()
    return None if l2 else float(l1)


def _by_blocks() -> bool:
    """Whether plain eager code runs, without transformations of functions."""
    return not (torch.compiler.is_compiling() or _transformed())


def _transformed() -> bool:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, and modes that count or look at operations
    )


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.numel() > 0


@dataclass(frozen=True, eq=False)
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
    if isinstance(what, Sum):
        keys = tuple([_key(term, x) for term in what.terms])
        return None if None in keys else keys
    if isinstance(what, Entrywise):
        return id(what) if type(what).__module__ == Entrywise.__module__ else None  # a subclass may be another formula
    if type(what) is GroupLasso and _rows(what.per, x):
        return GroupLasso, x.numel() // x.shape[0]
    return None


def _rows(groups: Any, x: Tensor) -> bool:
    """Whether each group is a stretch of memory, and no other dtype is needed to add up its squares."""
    along = simple(x) and isinstance(groups, Grouping) and groups.keep == (0,) and groups.lists is None
    return along and groups.shape == tuple(x.shape) and dense(x) and x.stride(0) * x.shape[0] == x.numel()


def _bundles(members: Sequence[_Member]) -> Iterator[list[_Member]]:
    """Small members together, large ones alone."""
    joined: list[_Member] = []
    size = 0
    for member in members:
        entries = member.x.numel()
        if entries > SMALL:
            yield [member]
            continue
        if size + entries > JOINED:
            yield joined
            joined, size = [], 0
        joined.append(member)
        size += entries
    if joined:
        yield joined


def _value(bundle: Sequence[_Member]) -> Tensor:
    return _apply(_job(bundle), *[one.x for one in bundle])


def _job(bundle: Sequence[_Member]) -> _Job:
    parts, weights = bundle[0].what.leaves(), [one.weight for one in bundle]
    alike = len(set(weights)) == 1
    common = weights[0] if alike else 1.0
    pieces = pieces_of([(strength * common, leaf) for strength, leaf in parts], bundle[0].x)
    return _Job([one.what for one in bundle], weights, alike, parts, pieces)


def _apply(job: _Job, *tensors: Tensor) -> Tensor:
    if torch.is_grad_enabled() and tensors[0].requires_grad:
        return _Total.apply(job, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    with torch.no_grad():
        return job.value(tensors)


class _Total(torch.autograd.Function):
    """The value of a job on some tensors."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(*tensors)
        return job.value(tensors)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients(ctx.job, ctx.saved_tensors, factor, _by_blocks() and not batched(factor))


@dataclass
class _Job:
    """The same penalty on some tensors, as bound to each, and by what its value on each is multiplied."""

    whats: list[Penalty]
    weights: list[float]
    alike: bool  # all weights; then the pieces have it in their strengths
    parts: Parts  # of the first, with strengths as they are at the forward
    pieces: list[Piece]

    @functools.cached_property
    def _simplest(self) -> Piece | None:
        """The piece, where it is one, of one tensor: a layer may be called thousands of times a second."""
        return self.pieces[0] if len(self.pieces) == len(self.whats) == 1 and self.alike else None

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum of the values."""
        if (piece := self._simplest) is not None and tensors[0].numel() <= piece.block:
            return times(piece.strength, piece.value(flattened(tensors[0])))
        if self.alike:
            return self._of(_joined(tensors))
        of_each = [self._of(flattened(x)) * weight for x, weight in zip(tensors, self.weights, strict=True)]
        return torch.stack(of_each).sum()

    def _of(self, flat: Tensor) -> Tensor:
        parts = self._blocks(flat)
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

    def _blocks(self, flat: Tensor) -> Sequence[Tensor]:
        """Parts of a flat tensor that stay in a processor's cache; other devices have other ways to be fast."""
        block = min([piece.block for piece in self.pieces])
        if flat.numel() <= block or flat.device.type != "cpu":
            return (flat,)
        width = max([piece.width for piece in self.pieces])
        parts: Sequence[Tensor] = flat.split(max(block // width, 1) * width)
        return parts

    def gradients(self, tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
        """factor · gradient for each tensor, each in memory of its own."""
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
        views = torch._utils._unflatten_dense_tensors(out, tensors)
        return list(torch._foreach_mul(views, [1.0] * len(tensors) if self.alike else self.weights))

    def _put(self, flat: Tensor, factor: Tensor, out: Tensor) -> None:
        factors = [times(piece.strength, factor) for piece in self.pieces]
        for x, o in zip(self._blocks(flat), self._blocks(out), strict=True):
            self.pieces[0].gradient(x, factors[0], o)
            for piece, own in zip(self.pieces[1:], factors[1:], strict=True):
                more = scratch.like(x, 2)
                piece.gradient(x, own, more)
                o.add_(more)

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


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return flattened(tensors[0])
    joined: Tensor = torch._utils._flatten_dense_tensors(tensors)
    return joined
