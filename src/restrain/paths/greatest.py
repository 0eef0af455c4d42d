"""The least strength at which all penalised groups are zero: the end of a path.

At the origin, where the penalised groups are zero and everything else is fitted, a group stays zero
if and only if -∇ lies in the strength times its subdifferential, which is where the proximal step
gives zero. For a norm this is the dual norm of the gradient: the greatest |∇| for L1, ‖∇_g‖ / √n_g
for a group lasso, the greatest singular value for a nuclear norm.

Penalties that aren't convex count by their slope at zero, so that the origin is stationary, a local
minimum, from this strength on (Breheny and Huang 2011, for MCP and SCAD). If the penalty isn't
r-concave with an r below the curvature of the loss, lower minima may lie elsewhere. Where the slope
is infinite, as of |x|^p with p < 1, the origin is stationary at every strength: no dual norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from restrain.engine import Attachment, Penalised, Repeatable, attach, restored
from restrain.errors import PlanError, RestrainWarning
from restrain.penalties import (
    SLOPE,
    GroupLasso,
    GroupLInf,
    Norm,
    NuclearNorm,
    Penalty,
    SparseGroupLasso,
    SpectralNorm,
)
from restrain.penalties.shrink import exact
from restrain.rules import Rule

_NORMS = (SLOPE, GroupLasso, GroupLInf, Norm, NuclearNorm, SpectralNorm, SparseGroupLasso)
_SMALL = (1e-8, 1e-12)  # times x: where the slope of a penalty at zero counts alone
_INFINITE = 1e12  # times the greatest entry: a strength that makes everything zero that it can
_ROUNDS = 60  # of bisection
_EXACT, _ROUNDED = 1e-8, 1e-4  # relative gradients of what is fitted at the origin, by dtype
_SADDLE = 1e-2  # relative gradient below which the origin is a saddle
_STEPS = 3000  # most proximal steps at the origin
_QUASI = 20  # most steps of L-BFGS before them
_DOUBLINGS, _BISECTIONS = 60, 3


@dataclass(frozen=True)
class Greatest:
    """The greatest strength of a path, and how it was found.

    By "dual norm", by "search", or "given"; of gradual "removal" it is 1, all groups.
    """

    strength: float
    found: str


def least_strength(penalty: Penalty, x: Tensor) -> float:
    """Return the least s at which a small x stays in s times the penalty's subdifferential at zero.

    For a norm it is the dual norm of x, and for MCP and SCAD, whose slope at zero is one, that of
    L1. NaN if no strength makes entries of x zero; zero if any does, as of |x|^p with p < 1.

    >>> round(least_strength(rs.Norm(2), torch.tensor([3.0, 4.0])), 6)
    5.0
    """
    x = exact(x)
    size = float(x.abs().max()) if x.numel() else 0.0
    if size == 0:
        return 0.0
    l1, _, others = penalty.split()
    if l1 and not others:
        return size / float(l1)
    found = _threshold(penalty, x, size)
    if not found > 0 or _is_norm(penalty):
        return found
    near, nearer = (_threshold(penalty, c * x, c * size) / c for c in _SMALL)
    return nearer if abs(near - nearer) <= 1e-3 * near else 0.0


def _is_norm(penalty: Penalty) -> bool:
    """Return True if penalty(s x) = s · penalty(x), as of norms: the length of x doesn't matter."""
    return all(isinstance(leaf, _NORMS) for _, leaf in penalty.leaves())


def _threshold(penalty: Penalty, x: Tensor, size: float) -> float:
    """Return the least s at which prox(x) of s · penalty is what it is at infinite strength."""
    held = origin(penalty, x)
    if held is None:
        return math.nan

    def holds(s: float) -> bool:
        return bool(((s * penalty).prox(x) - held).abs().max() <= 1e-14 * size)

    high = size
    while not holds(high):
        high *= 2
    while high > 1e-30 * size and holds(high / 2):
        high /= 2
    low = high / 2
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def origin(penalty: Penalty, w: Tensor) -> Tensor | None:
    """Return w with zeros where the penalty makes zeros; None if it makes none.

    Entries in no group, or with a weight of zero, stay.
    """
    x = exact(w)
    size = float(x.abs().max()) if x.numel() else 0.0
    held = ((_INFINITE * max(size, 1.0)) * penalty).prox(x)
    zero = held == 0
    return torch.where(zero, 0, x).to(w.dtype) if bool((zero | (held == x)).all()) and bool(zero.any()) else None


def in_loss(rules: Sequence[Rule], strength: float = 1.0) -> list[Rule]:
    """Return penalties as rules of the loss, times a strength."""
    return [replace(strength * rule, how="loss") for rule in rules]


def check_rules(model: nn.Module, rules: Sequence[Rule]) -> list[Penalised]:
    """Return the tensors that a path's rules penalise.

    Raises:
        PlanError: a rule isn't a penalty on parameters with a prox that makes zeros.
    """
    reg = attach(model, in_loss(rules))
    reg.detach()
    tensors = penalised_by(reg)
    for one in tensors:
        if not one.penalty.has_prox or origin(one.penalty, torch.ones_like(one.now())) is None:
            raise PlanError(
                f"{one.penalty!r} makes no zeros in {one.name!r}, so no strength ends its path: take a penalty such as "
                "rs.L1() or rs.GroupLasso(), put this one into fixed=, or give the strengths= yourself"
            )
    return tensors


def penalised_by(reg: Attachment) -> list[Penalised]:
    """Return the trained tensors under an attachment's penalties."""
    found = reg.penalised()
    if not found:
        raise PlanError("every tensor that the rules select is frozen: a path needs one that is trained")
    return found


def at_origin(tensors: Sequence[Penalised]) -> None:
    """Set the penalised groups to zero."""
    for one in tensors:
        held = origin(one.penalty, one.now())
        if held is not None:
            one.put(held)


def by_dual_norm(
    model: nn.Module, rules: Sequence[Rule], fixed: Sequence[Rule], loss: Callable[[], Tensor]
) -> float | None:
    """Return the greatest strength by the dual norm; None where that isn't the answer.

    It leaves the model at the origin, with everything else fitted. The origin is a saddle, and no
    answer, if a tensor's gradient vanishes there because other penalised tensors are zero.

    Args:
        model: the model.
        rules: the penalties of the path.
        fixed: penalties of a fixed strength.
        loss: the data loss.
    """
    tensors = check_rules(model, rules)
    alone = _alone(tensors, model, rules, loss) if sum(len(one.handles) for one in tensors) > 1 else {}
    at_origin(tensors)
    infinite = _INFINITE * max(1.0, *(float(t.detach().abs().max()) for t in model.parameters() if t.numel()))
    with attach(model, [*in_loss(rules, infinite), *in_loss(fixed)]) as reg:
        slope = max(float(g.abs().max()) for g in reg.gradients(loss).values() if g.numel())
        loss = Repeatable(loss)
        rounded = any(p.dtype.itemsize < 8 for p in model.parameters() if p.requires_grad)
        with warnings.catch_warnings(), _frozen(model, tensors):
            warnings.simplefilter("ignore", RestrainWarning)  # flat directions, which don't move the gradient
            share = _ROUNDED if rounded else _EXACT
            if not fixed:
                _descend(model, loss, share * slope)
            reg.certificate(loss, polish=True, steps=_STEPS, tolerance=share * max(slope, 1e-30))
        gradients = reg.gradients(loss)
    for one in tensors:
        if float(one.gathered(gradients).abs().max()) <= _SADDLE * alone.get(one.name, -1.0):
            return None
    found = max(least_strength(one.penalty, one.now() - one.gathered(gradients)) for one in tensors)
    return found * (1 + 10 * share) if found > 0 else None  # else rounding leaves groups at the end


@contextmanager
def _frozen(model: nn.Module, tensors: Sequence[Penalised]) -> Iterator[None]:
    """Freeze penalised parameters that are all zeros, which stay so: no gradients of them are due.

    They are left as they are if there is nothing else to fit.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = {id(tensor) for one in tensors for tensor in one.tensors.values() if not bool(tensor.any())}
    zeros = [p for p in trained if id(p) in ids]
    zeros = zeros if len(zeros) < len(trained) else []
    for p in zeros:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in zeros:
            p.requires_grad_(True)


def _descend(model: nn.Module, loss: Callable[[], Tensor], tolerance: float) -> None:
    """Take a few steps of L-BFGS on what is trained, in eval(): polishing has less left to do.

    The parameters stay if the data loss doesn't fall. There is no line search, as losses differ by
    rounding only near the end.
    """
    trained, modes = [p for p in model.parameters() if p.requires_grad], [(m, m.training) for m in model.modules()]
    before, gradients = [p.detach().clone() for p in trained], [p.grad for p in trained]
    optimizer = torch.optim.LBFGS(trained, max_iter=_QUASI, tolerance_grad=tolerance, tolerance_change=0)
    values = list[float]()

    def value() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        values.append(float(found.detach()))
        return found

    try:
        model.eval()
        optimizer.step(value)
    finally:
        for p, old, gradient in zip(trained, before, gradients, strict=True):
            if not values[-1] <= values[0]:
                p.detach().copy_(old)
            p.grad = gradient
        for module, training in modes:
            module.training = training


def _alone(
    tensors: Sequence[Penalised], model: nn.Module, rules: Sequence[Rule], loss: Callable[[], Tensor]
) -> dict[str, float]:
    """Return {name: greatest |∇|} with one tensor at its origin, all others as they are.

    Of units, the greatest of their tensors, each of which is set to zero alone.
    """
    found: dict[str, float] = {}
    for one in tensors:
        for name, tensor in one.tensors.items():
            with restored([tensor]):
                if len(one.handles) > 1:
                    with torch.no_grad():
                        tensor.zero_()
                else:
                    at_origin([one])
                with attach(model, in_loss(rules)) as reg:
                    own = float(reg.gradients(loss)[name].abs().max())
            found[one.name] = max(found.get(one.name, 0.0), own)
    return found


def by_search(start: float, fit: Callable[[float], bool], keep: Callable[[], Callable[[], None]]) -> float:
    """Return the least strength at which a fit makes all zero, within 10 %: doubled, then bisected.

    Args:
        start: the first strength.
        fit: fits the model at a strength from its current weights; True if all is zero then.
        keep: notes the current weights; returns a function that restores them.

    Raises:
        PlanError: there is no such strength.
    """
    high, restore = start, keep()
    for _ in range(_DOUBLINGS):
        if fit(high):
            break
        high, restore = 2 * high, keep()
    else:
        raise PlanError(
            f"at the strength {high:g} penalised groups still aren't zero: give the strengths= yourself, "
            "or see whether fit calls reg.use(optimizer) with the optimizer of all penalised parameters"
        )
    low = high / 2
    for _ in range(_BISECTIONS):
        restore()
        middle = math.sqrt(low * high)
        if fit(middle):
            high = middle
        else:
            low, restore = middle, keep()
    return high
