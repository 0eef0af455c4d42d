"""Rules on several parameters together, around an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restrain.engine.distributed import local, of_rows, part, whole
from restrain.engine.ops import Batch, Change, Joint, Metric, RootedShrinkRows, StepScalars, lower, put
from restrain.engine.step.worklist import Member, ParameterRules
from restrain.errors import HowError
from restrain.named_tensors import is_sharded
from restrain.penalties.shrink import at_least_float32
from restrain.rules import Rule

Together = tuple[Joint, list[Member]]
Act: TypeAlias = Callable[[Iterable[Batch]], None]


def together(works: Iterable[Member]) -> list[Together]:
    """Return the joint rules on parameters, each with its members.

    Raises:
        HowError: some members of a unit aren't trained, so that it can't be changed.
    """
    found: dict[int, Together] = {}
    for member in works:
        for joint in member[0].joint:
            found.setdefault(id(joint), (joint, []))[1].append(member)
    trained = [(joint.of({work.handle.name for work, _, _ in members}), members) for joint, members in found.values()]
    return [(joint, [one for one in members if joint.holds(one[0].handle.name)]) for joint, members in trained]


def full(members: Sequence[Member]) -> dict[str, Tensor]:
    """Return the members' parameters by name, gathered if they are sharded."""
    return {work.handle.name: whole(p.detach()) for work, p, _ in members}


def replace(members: Sequence[Member], new: Mapping[str, Tensor]) -> None:
    """Set the parameters; entries where only the new value isn't finite stay."""
    for work, p, _ in members:
        put(local(p), part(new[work.handle.name], p))


def add_gradients(
    joint: Joint, members: Sequence[Member], scale: Tensor | None, standing: Collection[tuple[str, int]]
) -> list[Tensor]:
    """Add the gradient of a joint penalty to the members' gradients, and return these."""
    own = {work.handle.name: p.grad for work, p, _ in members if p.grad is not None}
    plain = len(own) == len(members) and not standing and not _sharded(members)
    if plain and joint.add_slopes(full(members), own, scale):
        return list(own.values())
    gradients = joint.gradients(full(members))
    found = []
    for work, p, _ in members:
        if p.grad is None:
            continue
        found.append(p.grad)
        if ("gradient", id(p.grad)) not in standing:
            added = part(gradients[work.handle.name], p.grad)
            local(p.grad).add_(added if scale is None else added * scale.to(added.dtype))
    return found


def decay(joint: Joint, members: Sequence[Member], standing: Collection[tuple[str, int]]) -> list[Tensor]:
    """Decay the members that have a gradient and a learning rate; return them."""
    moved = [(work, p, group) for work, p, group in members if p.grad is not None and group["lr"] != 0]
    if moved and ("decay", id(moved[0][1])) not in standing:
        rates = {work.handle.name: 0.0 for work, _, _ in members}
        rates |= {work.handle.name: group["lr"] for work, _, group in moved}
        if _sharded(members) or not joint.shorten(full(members), rates, "decay"):
            replace(moved, joint.decayed(full(members), rates))
    return [p for _, p, _ in moved]


def shrink(joint: Joint, members: Sequence[Member], metrics: Mapping[int, Metric], act: Act) -> None:
    """Apply the prox of a joint penalty; members that didn't move have steps of zero, and stay.

    Args:
        joint: the rule.
        members: its parameters.
        metrics: the metrics of the parameters that moved, by id.
        act: carries out changes of tensors in place.
    """
    if not any(id(p) in metrics for _, p, _ in members):
        return
    if not _sharded(members) and _shrink_rows(joint, members, metrics, act):
        return
    steps: dict[str, Any] = {}
    for work, p, _ in members:
        metric = metrics.get(id(p))
        steps[work.handle.name] = 0.0 if metric is None else metric.steps(*map(whole, metric.moments))
    if _sharded(members) or not joint.shorten(full(members), steps, "prox"):
        replace(members, joint.shrunk(full(members), steps))


def _shrink_rows(joint: Joint, members: Sequence[Member], metrics: Mapping[int, Metric], act: Act) -> bool:
    """Shorten units, gathered as rows of a matrix, by the loops for the rows of one tensor.

    False, with nothing changed, unless the penalty is a multiple of the units' lengths, and all
    members have the metric of roots of second moments with the same numbers.
    """
    found = [(work.handle.name, p.detach(), metrics.get(id(p))) for work, p, _ in members]
    tensors = {name: w for name, w, _ in found}
    seconds = {name: metric.moments[0] for name, _, metric in found if metric is not None and len(metric.moments) == 1}
    alike = {(w.dtype, w.device, None if metric is None else metric.key) for _, w, metric in found}
    first, like = found[0][2], found[0][1]
    if first is None or len(seconds) < len(found) or len(alike) > 1 or like.dtype not in (torch.float32, torch.float64):
        return False
    scalars = StepScalars(metric=first)
    for block in joint.blocks:
        rows = block.like([tensors[piece.name] for piece in block.pieces])
        lowered = lower([Change("prox", block.what)], scalars, rows)
        known = lowered is not None and [type(step) for step, _ in lowered] == [RootedShrinkRows]
        if not known or of_rows(block.what, tuple(rows.shape), 1) is None:
            return False
    for block in joint.blocks:
        own, others = ([given[piece.name] for piece in block.pieces] for given in (tensors, seconds))
        for rows, second in block.parts(own, others):
            what = of_rows(block.what, tuple(block.like(own).shape), len(rows))
            act([Batch([Change("prox", what)], scalars, [(rows, second)])])
    return True


def project(joint: Joint, members: Sequence[Member]) -> None:
    """Project the members on a joint constraint."""
    if _sharded(members) or not joint.keep(full(members)):
        replace(members, joint.projected(full(members)))


def _sharded(members: Sequence[Member]) -> bool:
    return any(is_sharded(p) for _, p, _ in members)


@torch.no_grad()
def project_from_now(joints: Iterable[Joint], model: nn.Module) -> dict[str, list[str]]:
    """Project when rules are attached, and return notes for the table by rule label.

    Raises:
        HowError: a parameter isn't finite.
    """
    notes: dict[str, list[str]] = {}
    for joint in joints:
        found = [(ParameterRules(handle), handle.find(model), dict[str, Any]()) for handle in joint.handles]
        found = [member for member in found if member[1].requires_grad]
        if joint.rule.how != "project" or joint.rule.start or not found:
            continue
        joint = joint.of({work.handle.name for work, _, _ in found})
        for work, p, _ in found:
            if not bool(p.isfinite().all()):
                raise HowError(
                    f"{work.handle.name!r}, which {joint.rule.what!r} is to hold for, has NaN or infinite entries"
                )
        members: Any = found
        before = {name: at_least_float32(w).clone() for name, w in full(members).items()}
        project(joint, members)
        after = full(members)
        way = sum(float((after[name] - w).abs().square().sum()) for name, w in before.items())
        size = sum(float(w.abs().square().sum()) for w in before.values())
        if way > 1e-10 * size:
            share = 100 * (way / size) ** 0.5
            notes[joint.rule.label] = [
                f"{joint.rule.label}: attaching moved its {len(found)} tensors by {share:.2g} % of their length"
            ]
    return notes


_ALONE = ("decoupled", "proximal", "project")


def check_alone(works: Iterable[ParameterRules]) -> None:
    """Check that no other rule of the same kind acts at the step on a member of a joint rule.

    Raises:
        HowError: one does; together they aren't one after the other.
    """
    for work in works:
        for joint in work.joint:
            kind = joint.rule.how
            own = [*work.at(kind), *(work.cautious if kind == "decoupled" else ())]
            others: list[Rule] = [rule for rule, _ in own if rule is not joint.rule]
            if kind in _ALONE and others:
                sums = (
                    "Add up the penalties of one rule, as in (rs.GroupLasso(per=units) + rs.L1()).on(), or give one of "
                    "them how='loss' or how='gradient'"
                )
                raise HowError(
                    f"{work.handle.name!r}: {joint.rule.label!r} acts on it together with other tensors, and "
                    f"{others[0].label!r} acts on it, too, both with how={kind!r}; one after the other, they don't "
                    f"give what both mean. {'Leave it out of one of them' if kind == 'project' else sums}"
                )
