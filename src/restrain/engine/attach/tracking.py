"""Measuring of a tracked step: data loss, and values, zeros and norms of what rules act on.

Nothing waits for the device, except for shares. Tensors of FSDP2 are measured in each process's own
part where groups allow that, and summed over the processes, which all take the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from restrain.axes import Grouping, grouping_at
from restrain.engine.attach.evaluation import latest
from restrain.engine.attach.groups import lengths
from restrain.engine.attach.history import History, as_vector
from restrain.engine.attach.report import strength_of
from restrain.engine.binding import Bound
from restrain.engine.distributed import Term, local, own_part, ranks_of, total, totals
from restrain.engine.ops import norm_of
from restrain.engine.strengths import gradient_share
from restrain.errors import PenaltyError, PlanError
from restrain.fields import brief, is_whole
from restrain.named_tensors import device_of, is_sharded, parameters
from restrain.penalties import GroupLasso, Penalty
from restrain.penalties.group import GroupPenalty
from restrain.transforms import Noise
from restrain.transforms.sets import ByGroup

POINTS = 1000  # rows by default
_BLOCK = 2**18  # entries counted at a time


def checked_track(every: Any, points: Any = POINTS) -> tuple[int, int]:
    """Return (every, points).

    Raises:
        PlanError: they aren't whole numbers, at least 1 and 2.
    """
    if not is_whole(every, 1):
        raise PlanError(f"track every k-th step, k a whole number such as 10; got {brief(every)}")
    if not is_whole(points, 2):
        raise PlanError(f"points= is the greatest number of rows, a whole number from 2; got {brief(points)}")
    return every, points


@dataclass
class Tracker:
    """Fills a history at the steps of an attachment.

    Args:
        bounds: its rules.
        history: the table to fill.
        shares: measure shares of the gradient, too.
    """

    bounds: Sequence[Bound]
    history: History
    shares: bool = False
    _loss: Tensor | None = None  # sum of the data losses since the last step
    _count: int = 0
    _units: dict[tuple[str, tuple[int, ...]], Grouping | None] = field(default_factory=dict)

    def collect(self, loss: Tensor, share: float | Tensor, steps: int) -> None:
        """Add a data loss to the mean of the next step, after `steps` steps.

        Args:
            loss: the data loss as given.
            share: the part of the penalties that goes with it: of a loss divided by four it is 1/4.
            steps: the number of steps so far.
        """
        if self.history.due(steps + 1) and torch.is_grad_enabled():
            part = (loss.detach() / share).to(torch.promote_types(loss.dtype, torch.float32))
            self._loss = part if self._loss is None else self._loss + part.to(self._loss.device)
            self._count += 1

    def stepped(self, steps: int, root: nn.Module) -> None:
        """Add a row after a training step, if one is due."""
        loss, self._loss = self._loss, None
        count, self._count = self._count, 0
        if self.history.due(steps):
            with torch.no_grad():
                self._measure(steps, root, None if loss is None else loss / count)

    def _measure(self, steps: int, root: nn.Module, loss: Tensor | None) -> None:
        """Add a row for the current weights."""
        known: dict[str, float] = {"step": steps} | ({} if loss is not None else {"data_loss": math.nan})
        known |= {f"strengths/{key}": value for key, value in _strengths(self.bounds)}
        if self.shares:
            known |= {f"shares/{key}": value for key, value in _shares(self.bounds, root)}
        found = {} if loss is None else {"data_loss": loss}
        found |= {f"penalties/{key}": value for key, value in latest(self.bounds, root).items()}
        terms, sizes = self._of_tensors(root)
        found |= dict(zip(terms, totals(list(terms.values())), strict=True))
        names = list(found)

        def finish(numbers: list[float]) -> list[float]:
            return [_finished(name, number, sizes.get(name, 0)) for name, number in zip(names, numbers, strict=True)]

        self.history.add(known, names, as_vector([value.detach() for value in found.values()], device_of(root)), finish)

    def renew(self) -> None:
        """Forget what was found out about layers, after they have changed."""
        self._units.clear()

    def _of_tensors(self, root: nn.Module) -> tuple[dict[str, list[Term]], dict[str, int]]:
        """Return ({column: terms of its raw number}, {column: greatest number}) of the tensors."""
        terms: dict[str, list[Term]] = {}
        sizes: dict[str, int] = {}
        tensors = tensors_of(self.bounds, root)
        self._find_units({(name, tuple(p.shape)) for name, (p, _) in tensors.items()}, root)
        for name, (p, groups) in tensors.items():
            w, ranks, units = local(p), ranks_of(p), self._units[name, tuple(p.shape)]
            terms[f"norms/{name}"] = [(_square(w), ranks)]
            whole = units is not None and not is_sharded(p)
            counts = _nonzero(w, units if whole and units is not None else Grouping((w.numel(),), ()))
            terms[f"zeros/{name}"], sizes[f"zeros/{name}"] = [(counts.sum(), ranks)], _entries(p)
            if groups is not None:
                terms[f"zero_groups/{name}"] = [_zero_groups(p, groups)]
                sizes[f"zero_groups/{name}"] = groups.count
            if units is not None:
                terms[f"dead/{name}"] = [((counts == 0).sum(), ranks) if whole else _zero_groups(p, units)]
                sizes[f"dead/{name}"] = units.count
        return terms, sizes

    def _find_units(self, tensors: set[tuple[str, tuple[int, ...]]], root: nn.Module) -> None:
        """Find which entries are the weights into one unit, for tensors that are new."""
        new = {name for name, shape in tensors - set(self._units)}
        for slot in parameters(root) if new else ():
            if slot.name in new:
                location = slot.location()
                self._units[slot.name, tuple(location.tensor.shape)] = into_units(location)
        self._units |= dict.fromkeys(tensors - set(self._units))


def into_units(location: Any) -> Grouping | None:
    """Return the groups of weights into one unit; None where an entry is a group, or none known."""
    try:
        groups = grouping_at("out", location)
    except PenaltyError:
        return None
    return groups if groups.lists is None and groups.reduced else None


def tensors_of(bounds: Sequence[Bound], root: nn.Module) -> dict[str, tuple[Tensor, Grouping | None]]:
    """Return {name: (tensor, groups of its first rule by group)} of the tensors with rules.

    Frozen tensors are among them. Groups across tensors aren't.
    """
    found: dict[str, tuple[Tensor, Grouping | None]] = {}
    for bound in bounds:
        if isinstance(bound.rule.what, Noise):
            continue
        for handle, what in bound.parameters:
            p, groups = found.get(handle.name) or (handle.find(root), None)
            own = None if bound.joint is not None else _groups_of(what)
            if not is_lazy(p):
                found[handle.name] = (p, own if groups is None else groups)
    return found


def _groups_of(what: Any) -> Grouping | None:
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else [what]
    found = [leaf.per for leaf in leaves if isinstance(leaf, GroupPenalty | ByGroup)]
    return next((per for per in found if isinstance(per, Grouping)), None)


def _entries(p: Tensor) -> int:
    """Return the number of entries on all processes; FSDP1 has each hold a flat part."""
    flat = ranks_of(p) and not is_sharded(p)
    return round(total([p.numel()], p)[0]) if flat else p.numel()


def _square(w: Tensor) -> Tensor:
    """Return the sum of squares, without a copy of the tensor."""
    return norm_of(w).to(torch.float32 if w.device.type == "mps" else torch.float64).square()


def _zero_groups(p: Tensor, groups: Grouping) -> Term:
    """Return (the number of groups that are exactly zero, ranks to sum over)."""
    own, w, ranks = own_part(GroupLasso(per=groups), p)
    return _empty(w, own.per), ranks  # type: ignore[attr-defined]


def _empty(w: Tensor, groups: Grouping) -> Tensor:
    return (lengths(w, groups) == 0).sum() if groups.lists is not None else (_nonzero(w, groups) == 0).sum()


def _nonzero(w: Tensor, groups: Grouping) -> Tensor:
    """Return the number of entries that aren't zero in each group, which isn't by lists.

    On the CPU the comparison writes floats, in blocks that stay in the cache: ten times as fast as
    `count_nonzero`, which has a branch for each entry.
    """
    x, reduced = w.reshape(groups.shape), groups.reduced
    if not reduced:
        return x != 0
    if x.device.type != "cpu" or x.is_complex() or not x.numel():
        counts: Tensor = torch.linalg.vector_norm(x, 0, dim=reduced, dtype=torch.promote_types(x.dtype, torch.float32))
        return counts
    if x.numel() <= _BLOCK:
        return torch.ne(x, 0, out=torch.empty(x.shape, device="cpu")).sum(reduced)
    parts = x.split(max(1, _BLOCK * len(x) // x.numel()))
    ones = torch.empty(parts[0].shape, device="cpu")
    found = [torch.ne(part, 0, out=ones[: len(part)]).sum(reduced, keepdim=True).double() for part in parts]
    return torch.stack(found).sum(0) if 0 in reduced else torch.cat(found)


def _finished(name: str, number: float, size: int) -> float:
    """Return a column's number: norms are roots, zeros fractions of the entries or groups."""
    kind = name.partition("/")[0]
    if kind == "norms":
        return math.sqrt(number)
    if kind == "zeros":
        return 1 - number / size if size else 0.0
    if kind in ("zero_groups", "dead"):
        return number / size if size else 0.0
    return number


def _strengths(bounds: Sequence[Bound]) -> Iterator[tuple[str, float]]:
    for bound in bounds:
        if bound.moving:
            yield from ((moving.key, float(moving.now)) for moving in bound.moving)
        elif bound.is_penalty:
            yield bound.key, strength_of(bound)


def _shares(bounds: Sequence[Bound], root: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield (rule, share of the gradient) of penalties on parameters, by what the step has left."""
    for bound in bounds:
        if isinstance(bound.rule.what, Penalty) and bound.parameters and bound.joint is None:
            found = gradient_share(bound.rule, bound.tensors(root))
            yield bound.key, math.nan if found is None else found
