"""Estimators of squared Frobenius norms of Jacobians: by autograd, or along random directions.

J_i is the derivative of a sample's outputs by its inputs. For v or u of independent random signs,
E‖vᵀJ‖² = E‖Ju‖² = ‖J‖_F² (Hutchinson 1990): random directions give unbiased estimates (a difference
quotient up to the square of its width). All estimators are differentiable.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from restrain.errors import CaptureError, PenaltyError, RestrainError
from restrain.penalties.shrink import at_least_float32
from restrain.torch_private import MISSING, MissingError, result_shapes, saved, static_graph

_AT_ONCE = 2**22  # entries of a Jacobian computed together
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {  # dh/da of h = f(a), as a function of h
    "ReluBackward0": lambda h: (h > 0).to(h),
    "TanhBackward0": lambda h: 1 - h.square(),
    "SigmoidBackward0": lambda h: h * (1 - h),
}


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch: a tensor with its axis of samples.

    Args:
        tensor: the tensor.
        dim: its axis of samples; None if samples can't be told apart (packed sequences).
        count: the number of samples.
        weight: the factor of this tensor's Jacobian in the sum.
        forward: the number of the forward that made it.
    """

    tensor: Tensor
    dim: int | None
    count: int
    weight: float = 1.0
    forward: int = 0

    @classmethod
    def of(cls, tensor: Tensor, dim: int | None) -> Batch:
        """Return a tensor as a batch, with samples along `dim`; if `dim` is None, a single sample.

        Raises:
            PenaltyError: the tensor has no such axis.
        """
        if dim is not None and not -tensor.dim() <= dim < tensor.dim():
            raise PenaltyError(
                f"a tensor of shape {tuple(tensor.shape)} has no batch axis {dim}: say which by batch_dim="
            )
        return cls(tensor, dim, 1 if dim is None else tensor.shape[dim])

    def by_sample(self, tensor: Tensor | None = None) -> Tensor:
        """Return the tensor, or another of its shape, as (samples, entries)."""
        tensor = self.tensor if tensor is None else tensor
        if self.dim is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(self.dim, 0).reshape(self.count, tensor.numel() // max(self.count, 1))

    @property
    def entries(self) -> int:
        """Number of entries per sample."""
        return self.tensor.numel() // max(self.count, 1)


def signs(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return independent random signs with shape, dtype and device of a tensor."""
    drawn = torch.randint(2, like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return drawn.mul_(2).sub_(1)  # a quarter of the time of bernoulli_


def _square(tensors: Sequence[Tensor | None]) -> Tensor | float:
    return sum((at_least_float32(t).square().sum() for t in tensors if t is not None), 0.0)


# From the graph of the forward


def projected(ys: Sequence[Batch], xs: Sequence[Batch]) -> Tensor:
    """Return an estimate of Σ_y weight · mean ‖J_i‖_F² by one backward from all outputs."""
    vs = [signs(y.tensor) * (y.weight / max(y.count, 1)) ** 0.5 for y in ys]
    given = [x.tensor for x in xs]
    pulled = torch.autograd.grad([y.tensor for y in ys], given, vs, create_graph=True, allow_unused=True)
    return _square(pulled) + ys[0].tensor.new_zeros((), dtype=_wide(ys[0]))


def exact(ys: Sequence[Batch], xs: Sequence[Batch]) -> Tensor:
    """Return Σ_y weight · mean ‖J_i‖_F², for samples that don't depend on each other.

    Computed in closed form for a linear layer with or without activation; else by rows or columns
    of the Jacobian, whichever costs less.

    Raises:
        PenaltyError: samples can't be told apart, or don't agree in number.
    """
    _check_samples(ys, xs)
    total = ys[0].tensor.new_zeros((), dtype=_wide(ys[0]))
    for y in ys:
        near = of_the_same(y, xs)
        square = closed_form(y, near)
        if square is None:
            square = _by_rows(y, near) if y.entries <= 2 * sum(x.entries for x in near) else _by_columns(y, near)
        total = total + square * (y.weight / max(y.count, 1))
    return total


def of_the_same(y: Batch, xs: Sequence[Batch]) -> Sequence[Batch]:
    """Return the inputs from an output's forward, or all inputs (a layer was called alone)."""
    return [x for x in xs if x.forward == y.forward] or xs


def _wide(y: Batch) -> torch.dtype:
    return torch.promote_types(y.tensor.dtype, torch.float32)


def _check_samples(ys: Sequence[Batch], xs: Sequence[Batch]) -> None:
    if any(batch.dim is None and batch.tensor.dim() for batch in (*ys, *xs)):
        raise PenaltyError(
            "the samples of a packed sequence can't be told apart, as estimator='exact' must: use estimator='vjp'"
        )
    counts = {batch.count for batch in (*ys, *xs)}
    if len(counts) > 1 and not (counts == {y.count for y in ys} == {x.count for x in xs}):
        shapes = ", ".join(str(tuple(batch.tensor.shape)) for batch in (*ys, *xs))
        raise PenaltyError(
            f"outputs and inputs of shapes {shapes} don't have the same number of samples along their batch axes: say "
            "which axis is the batch by batch_dim= of the place, or take estimator='vjp'"
        )


def _by_rows(y: Batch, xs: Sequence[Batch]) -> Tensor:
    """Return Σ_i ‖J_i‖_F² by a backward per output unit of the sum over samples.

    The sum over samples suffices, since a sample's outputs depend on its own input alone.
    """
    units, given = y.by_sample().sum(0), [x.tensor for x in xs]
    total = units.new_zeros((), dtype=_wide(y))
    for basis in _bases(units.new_empty(1, len(units)), sum(x.tensor.numel() for x in xs)):
        total = total + _square(_pulled(units, given, basis.flatten(1)))
    return total


def _by_columns(y: Batch, xs: Sequence[Batch]) -> Tensor:
    """Return Σ_i ‖J_i‖_F² by two backwards per input entry: Jᵀv's derivative by v gives Ju."""
    v = torch.zeros_like(y.tensor, requires_grad=True)
    given = [x.tensor for x in xs]
    pulled = torch.autograd.grad(y.tensor, given, v, create_graph=True, allow_unused=True)
    total = y.tensor.new_zeros((), dtype=_wide(y))
    for x, rows in zip(xs, pulled, strict=True):
        if rows is None or not rows.requires_grad:
            continue
        for basis in _bases(x.by_sample(), y.tensor.numel()):
            total = total + _square(_pulled(x.by_sample(rows), [v], basis))
    return total


def _bases(like: Tensor, cost: int) -> list[Tensor]:
    """Return chunks of the unit vectors along the entries of a sample, the same for all samples."""
    samples, entries = like.shape
    some = max(1, _AT_ONCE // max(cost, 1))
    eye = torch.eye(entries, dtype=like.dtype, device=like.device)
    return [part.unsqueeze(1).expand(-1, samples, -1) for part in eye.split(some)] if entries else []


def _pulled(out: Tensor, given: Sequence[Tensor], basis: Tensor) -> Sequence[Tensor | None]:
    """Return vᵀJ for each v of a basis, in a loop if an operation can't be batched.

    Dropout in a checkpoint can't."""
    if not out.requires_grad:
        return []
    options = {"create_graph": True, "retain_graph": True, "allow_unused": True}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="There is a performance drop")
            return torch.autograd.grad(out, given, basis, is_grads_batched=True, **options)
    except (RuntimeError, UserWarning):
        pulled = [torch.autograd.grad(out, given, v, **options) for v in basis]
    return [t for each in pulled for t in each]


def closed_form(y: Batch, xs: Sequence[Batch]) -> Tensor | None:
    """Return Σ_i Σ_j f'(a_ij)² ‖w_j‖² if h = f(x Wᵀ + b) by the graph; else None."""
    found = linear(y, xs)
    if found is None:
        return None
    slopes, weight = found
    lengths, h = at_least_float32(weight).square().sum(1), at_least_float32(y.tensor)
    return (slopes(h).square().sum(0) if slopes is not None else h.new_full((h.shape[1],), len(h))) @ lengths


def linear(y: Batch, xs: Sequence[Batch]) -> tuple[Callable[[Tensor], Tensor] | None, Tensor] | None:
    """Return (f' as a function of h, W) if h = f(x Wᵀ + b) by the graph; else None.

    f is sigmoid, tanh, ReLU or the identity (then f' is None); a constant may be added to x. If x
    needs no gradient, it must be the very tensor that was multiplied.
    """
    node = y.tensor.grad_fn
    if node is None or len(xs) != 1 or any(b.tensor.dim() != 2 or b.dim not in (0, -2) for b in (y, *xs)):
        return None
    slopes, x = _SLOPES.get(node.name()), xs[0].tensor
    if slopes is not None:
        node = node.next_functions[0][0]
    kept = {"AddmmBackward0": "mat1", "MmBackward0": "self"}.get("" if node is None else node.name())
    if node is None or kept is None or "saved" in MISSING or saved(node, "alpha", 1) != 1:
        return None
    (before, number), (transposed, _) = node.next_functions[-2:]
    if x.requires_grad:
        while before is not None and before.name() == "AddBackward0" and before.next_functions[1][0] is None:
            before, number = before.next_functions[0]
        edge = torch.autograd.graph.get_gradient_edge(x)
        same = (before, number) == (edge.node, edge.output_nr)
    else:
        same = before is None and saved(node, kept) is x
    if not same or transposed is None or transposed.name() != "TBackward0":
        return None
    weight = getattr(transposed.next_functions[0][0], "variable", None)
    if not isinstance(weight, Tensor) or weight.shape != (y.tensor.shape[1], x.shape[1]):
        return None
    return slopes, weight


# Along random directions

Move = Callable[[Batch], Tensor]
Run = Callable[[Move], list[Batch]]
"""Run a function again with `move(x)` in place of each input x; return its outputs."""


class Direction:
    """Random signs for one input after another: the same for equal seeds, for every estimator."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def along(self, h: Tensor) -> Tensor:
        """Return random signs of the shape of an input."""
        if h.device not in self.generators:
            self.generators[h.device] = torch.Generator(h.device).manual_seed(self.seed)
        return signs(h, self.generators[h.device])


class _Shift(Direction):
    """x ↦ x + t width u, u of random signs, with a step width relative to the size of x."""

    def __init__(self, seed: int, t: float | Tensor) -> None:
        super().__init__(seed)
        self.t = t
        self.width: float | Tensor = 0.0

    def __call__(self, x: Batch) -> Tensor:
        u = self.along(x.tensor)
        if isinstance(self.width, float) and not self.width:
            self.width = _width(x.tensor)
        return x.tensor + u * (self.t * self.width)


class _Tangent(_Shift):
    """x ↦ dual number with tangent u, the derivative of `_Shift` at t = 0.

    Differentiation by t itself would take two more passes.
    """

    def __call__(self, x: Batch) -> Tensor:
        u, h = self.along(x.tensor), x.tensor
        first = forward_ad.unpack_dual(h).tangent is None  # else h depends on another moved input
        moved: Tensor = forward_ad.make_dual(h if first else torch.zeros_like(u), u)
        return moved if first else h + moved


def _width(h: Tensor) -> Tensor:
    """Return eps^(1/3) · RMS(h), the step width that balances truncation and rounding errors.

    An RMS of zero counts as one.

    Raises:
        PenaltyError: a dtype below float32.
    """
    _check_digits(h)
    scale = h.detach().square().mean().sqrt()
    third: float = torch.finfo(h.dtype).eps ** (1 / 3)
    return third * torch.where(scale > 0, scale, 1.0)


def _check_digits(h: Tensor) -> None:
    if h.dtype.itemsize < 4:
        raise PenaltyError(f"estimator='difference' needs float32 or more, got {h.dtype}, whose digits don't suffice")


def pushed(run: Run, estimator: str) -> list[Batch]:
    """Return Ju of a function's outputs for random signs u, by jvp or a central difference.

    Raises:
        CaptureError: an operation has no forward-mode derivative.
        PenaltyError: a dtype below float32 in central differences.
    """
    seed = Direction().seed
    if estimator == "difference":
        shifts = [_Shift(seed, t) for t in (1.0, -1.0)]
        up, down = (run(shift) for shift in shifts)
        for y in up:
            _check_digits(y.tensor)
        return [replace(a, tensor=(a.tensor - b.tensor) / (2 * shifts[0].width)) for a, b in zip(up, down, strict=True)]
    ys: list[Batch] = []

    def along(t: Tensor) -> tuple[Tensor, ...]:
        ys[:] = run(_Tangent(seed, t))
        return tuple(y.tensor for y in ys)

    _load_forward_mode()
    try:
        tangents = torch.func.jvp(along, (torch.zeros((), device="cpu"),), (torch.ones((), device="cpu"),))[1]
    except RestrainError:
        raise
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise CaptureError(f"estimator='jvp' can't be taken here ({why}): use estimator='difference'") from error
    return [replace(y, tensor=tangent) for y, tangent in zip(ys, tangents, strict=True)]


@cache
def _load_forward_mode() -> None:
    """Load torch's forward mode without the deprecation warnings of its decompositions."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros((), device="cpu"), torch.zeros((), device="cpu"))


# Obstacles in the graph

_OBSTACLES = {
    "CheckpointFunctionBackward": "a reentrant checkpoint",
    "CompiledFunctionBackward": "compiled code",
    "CudnnRnnBackward0": "cuDNN's recurrent layer",
    "MiopenRnnBackward0": "MIOpen's recurrent layer",
}


@dataclass(frozen=True)
class Between:
    """The graph between inputs and outputs: obstacles to a second derivative, mixing of samples."""

    obstacles: frozenset[str]
    mixes: bool


def between(ys: Sequence[Batch], xs: Sequence[Batch]) -> Between:
    """Return the properties of the graph between inputs and outputs.

    Raises:
        CaptureError: an output does not depend on any of the inputs.
    """
    ends = {torch.autograd.graph.get_gradient_edge(x.tensor).node for x in xs}
    passed: set[torch.autograd.graph.Node] = set()
    for y in ys:
        way = _way(y.tensor.grad_fn, ends) if y.tensor.grad_fn is not None else set()
        if not way & ends and not any(y.tensor is x.tensor for x in xs):
            raise CaptureError(
                "the output whose derivative is to be taken doesn't depend on the place of wrt=, the model's input "
                "unless said otherwise: wrt= is what comes earlier in the same forward, and nothing in between detaches"
            )
        passed |= way - ends
    names = {node.name() for node in passed}
    found = {_OBSTACLES[name] for name in names if name in _OBSTACLES}
    found |= {"fused attention" for name in names if name.startswith("ScaledDotProduct")}
    # DDP's node would take any backward for that of the training step
    found |= {"DDP's static_graph=True" for node in passed if static_graph(node)}
    return Between(frozenset(found), any(_mixes(node) for node in passed))


def _mixes(node: torch.autograd.graph.Node) -> bool:
    """Return True for batch normalisation in train() mode of more than one sample.

    Instance normalisation runs as batch normalisation of a single sample.
    """
    if "BatchNorm" not in node.name():
        return False
    try:
        trains, shapes = saved(node, "training", True), result_shapes(node)
    except MissingError:
        return True
    return trains and (not shapes or not shapes[0] or int(shapes[0][0]) > 1)


def _way(start: torch.autograd.graph.Node, ends: set[torch.autograd.graph.Node]) -> set[torch.autograd.graph.Node]:
    """Return the nodes on paths from a node back to `ends`, both included."""
    into: dict[torch.autograd.graph.Node, list[torch.autograd.graph.Node]] = {start: []}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is not None:
                if following not in into:
                    into[following] = []
                    waiting.append(following)
                into[following].append(node)
    found = {end for end in ends if end in into}
    waiting = list(found)
    while waiting:
        for node in into[waiting.pop()]:
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found
