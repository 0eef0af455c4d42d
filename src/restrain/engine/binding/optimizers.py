"""Checks of the optimizers given to `attach`, against the rules on their parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.binding.binding import Bound
from restrain.engine.binding.wrappers import Unwrapped
from restrain.engine.ops import by_metric, diagonal, known, looks_before, mixes
from restrain.engine.step import has_direction, in_metric, in_tangent, total
from restrain.errors import HowError, NoProxError, OptimizerError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.named_tensors import is_sharded
from restrain.penalties import Penalty
from restrain.transforms.hyperball import HeldNorm, Hyperball
from restrain.transforms.sharpness import MomentumSharpness, Sharpness


@dataclass(frozen=True)
class _Standing:
    """A parameter, with the optimizer and group that hold it."""

    p: Tensor
    holder: Optimizer | None
    group: dict[str, Any] | None
    alike: int  # equal for parameters that checks treat equally
    given: Unwrapped | None = None  # the optimizer as it was given


def check_optimizers(bounds: Sequence[Bound], root: nn.Module, optimizers: Sequence[Unwrapped]) -> None:
    """Check that optimizers can carry out the rules; warn of likely mistakes.

    Raises:
        OptimizerError: no given optimizer holds a parameter, or it can't carry out the rule.
        NoProxError: the sum of proximal rules on a tensor has no known prox.
        HowError: a prox that is neither by entry nor by group, with a metric that differs by entry.
    """
    holders = {id(p): (o, group) for o in optimizers[::-1] for group in o.counts.param_groups for p in group["params"]}
    _check_counted(bounds, root, holders)
    standing, alike = dict[str, _Standing](), dict[Any, int]()
    for handle in {handle.name: handle for bound in bounds for handle, _ in bound.parameters}.values():
        p = handle.find(root)
        given, group = holders.get(id(p), (None, None))
        holder = None if given is None else given.optimizer
        key = (id(holder), id(group), p.requires_grad, is_sharded(p), p.dtype)
        standing[handle.name] = _Standing(p, holder, group, alike.setdefault(key, len(alike)), given)
    computed = {handle.name for bound in bounds if bound.rule.how == "parametrize" for handle, _ in bound.parameters}
    low = {name for name, at in standing.items() if at.p.dtype in (torch.bfloat16, torch.float16)}
    for bound in bounds:
        _check_bound(bound, standing, computed)
        _warn_of_rounding(bound, [h.name for h, _ in bound.parameters if h.name in low] if low else [], standing)
    for bound in bounds:
        _check_one_optimizer(bound, standing)
    _check_proximal([bound for bound in bounds if bound.rule.how == "proximal"], standing)
    _check_held(bounds, standing)
    for bound in bounds:
        if (
            bound.is_penalty
            and not bound.parameters
            and optimizers
            and all(ascends(o.counts, root) for o in optimizers)
        ):
            raise OptimizerError(ASCENDS.format(rule=bound.key))


ASCENDS = "{rule!r}: an optimizer with maximize=True would ascend the penalty; minimise -loss instead"


def ascends(optimizer: Optimizer, root: nn.Module) -> bool:
    """Return True if an optimizer maximises by all parameters of the model that it holds."""
    own = {id(p) for p in root.parameters()}
    groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
    return bool(groups) and all(group.get("maximize") for group in groups)


def _check_bound(bound: Bound, standing: dict[str, _Standing], computed: set[str]) -> None:
    """Check a rule, once for parameters that are alike."""
    seen = dict[int, bool]()  # by `alike`: the optimizer has weight_decay
    decays, decayed = dict[int, bool](), []
    for handle, what in bound.parameters:
        at = standing[handle.name]
        if at.alike not in seen:
            seen[at.alike] = bool(at.group is not None and at.group.get("weight_decay"))
            _check_holder(bound, handle.name, at)
        if not seen[at.alike]:
            continue
        if bound.rule.how == "parametrize" and what.decays_to:
            _warn(
                f"the optimizer's weight_decay pulls {handle.name!r} to {what.decays_to}, as it decays the free tensor "
                f"behind it ({what!r}): put it into a parameter group with weight_decay=0, and write 1e-4 * rs.L2() in "
                "the loss"
            )
        if id(what) not in decays:
            decays[id(what)] = _decays(what)
        if decays[id(what)] and handle.name not in computed:
            decayed.append(handle.name)
    if decayed:
        _warn(f"{bound.key!r} decays what the optimizer's weight_decay decays, too: {', '.join(decayed[:5])}")


def _check_counted(bounds: Sequence[Bound], root: nn.Module, holders: dict[int, Any]) -> None:
    """Check that a given optimizer holds a parameter of the model, if steps are counted."""
    if not holders or any(id(p) in holders for p in root.parameters()):
        return
    for bound in bounds:
        what = bound.rule.what
        stateful = isinstance(what, Penalty) and any(leaf.by_steps for _, leaf in what.leaves())
        if bound.moving or bound.rule.every > 1 or bound.rule.start or stateful:
            raise OptimizerError(
                f"{bound.key!r} changes with the optimizer's steps, but no given optimizer holds any parameter of the "
                "model, so none would be counted: train the model's own parameters, or use a constant strength, and "
                "no running means"
            )


def _check_one_optimizer(bound: Bound, standing: dict[str, _Standing]) -> None:
    """Check that one optimizer holds all parameters of a rule that acts on them together."""
    if bound.joint is None or bound.rule.how == "loss":
        return
    blocks = [[piece.name for piece in block.pieces] for block in bound.joint.blocks]
    shares = [[name for number in own for name in blocks[number]] for own in bound.joint.budgets]
    for names in shares or blocks:
        found: dict[int, str] = {}
        for at, name in [(standing[name], name) for name in names if standing[name].p.requires_grad]:
            found.setdefault(id(at.holder), name)
        if len(found) > 1:
            raise OptimizerError(
                f"{bound.key!r} acts on tensors together, but several optimizers hold them "
                f"({', '.join(found.values())}), whose steps come one after the other: give them one optimizer, or use "
                "how='loss'"
            )
        _check_not_split(bound, names, standing)


def _check_not_split(bound: Bound, names: Sequence[str], standing: dict[str, _Standing]) -> None:
    """Check that the optimizer steps all of these parameters in this process, unlike ZeRO's."""
    for name in names:
        at = standing[name]
        if at.holder is not None and not any(p is at.p for group in at.holder.param_groups for p in group["params"]):
            raise OptimizerError(
                f"{bound.key!r} acts on tensors together, but the optimizer steps {name!r} in another process "
                "(ZeroRedundancyOptimizer): train by FSDP2, or use how='loss'"
            )


def _decays(what: Any) -> bool:
    """Return True for a penalty that contains a sum of squares."""
    return isinstance(what, Penalty) and any(leaf.elastic is not None and leaf.elastic[1] for _, leaf in what.leaves())


def _warn_of_rounding(bound: Bound, low: Sequence[str], standing: dict[str, _Standing]) -> None:
    """Warn of parameters in 16-bit dtypes on which a penalty acts at the optimizer's step."""
    low = [name for name in low if standing[name].p.requires_grad]
    if low and bound.rule.how != "loss" and isinstance(bound.rule.what, Penalty):
        more = f", like {len(low) - 1} more" if len(low) > 1 else ""
        _warn(
            f"{low[0]!r} is {str(standing[low[0]].p.dtype)[6:]}{more}: small changes by {bound.key!r} are lost to "
            "rounding; keep weights in float32"
        )


def _check_holder(bound: Bound, name: str, at: _Standing) -> None:
    """Check that the optimizer of a parameter can carry out the rule on it."""
    p, holder, group, how = at.p, at.holder, at.group, bound.rule.how
    acts = how in ("gradient", "decoupled", "proximal", "project") and p.requires_grad
    if holder is None or group is None:
        if acts:
            raise OptimizerError(
                f"{bound.key!r} acts at the optimizer's step (how={how!r}), but no given optimizer holds {name!r}: "
                "write rs.attach(model, plan, optimizer) with the one that trains it, or a list"
            )
        return
    if at.given is not None and p.requires_grad:
        at.given.check(bound.key, how)
    if acts or (how == "loss" and p.requires_grad and isinstance(holder, torch.optim.SparseAdam)):
        _check_kind(bound, holder, group)
    if acts and is_sharded(p):
        _check_sharded(bound, name, holder)
    joins = acts or (how == "loss" and p.requires_grad)
    if joins and bound.is_penalty and group.get("maximize"):
        raise OptimizerError(ASCENDS.format(rule=bound.key))
    if isinstance(bound.rule.what, Hyperball):
        return  # it moves the weight by the optimizer's own direction
    if acts and mixes(holder) and how in ("proximal", "project"):
        _warn_of_mixing(bound, holder)
    if how == "project":
        bound.notes = _notes_on_metric(bound, p, holder)
    if bound.rule.momentum == "tangent" and not (group.get("momentum") or group.get("betas")):
        _warn(f"{bound.key!r} has momentum='tangent', but {type(holder).__name__} keeps none as it is set")


def _warn_of_mixing(bound: Bound, holder: Optimizer) -> None:
    """Warn that the weights end elsewhere than at the minimum under a rule by entry."""
    rule, name = bound.rule, type(holder).__name__
    what: Any = rule.what
    if rule.how == "proximal":
        way = "its zeros are exact but may be others; for the lasso's use Adam or SGD, or how='gradient' without zeros"
    elif in_tangent(rule, what, by_metric(holder)):
        return
    else:
        way = "the weights stay in the set; for the constrained minimum use Adam or SGD, or how='parametrize'"
    _warn(
        f"{bound.key!r}: {name} moves entries together, and no prox or projection in its metric is known, so training "
        f"ends near the minimum (docs/how.md has figures): {way}"
    )


def _notes_on_metric(bound: Bound, p: Tensor, holder: Optimizer) -> list[str]:
    """Return notes for the table on projections that aren't exactly in the optimizer's metric."""
    rule, name = bound.rule, type(holder).__name__
    what: Any = rule.what
    if not diagonal(holder) or what.separable or in_tangent(rule, what, by_metric(holder)):
        return []
    if in_metric(rule, what, by_metric(holder)) and not (p.is_complex() or (is_sharded(p) and looks_before(holder))):
        return [] if known(holder) else [f"{bound.key}: the steps of {name} are measured"]
    way = "; gradient='tangent' reaches the constrained minimiser" if what.has_tangent and by_metric(holder) else ""
    return [f"{bound.key}: a Euclidean projection, while {name} moves each entry by a step of its own{way}"]


def _check_sharded(bound: Bound, name: str, holder: Optimizer) -> None:
    how = bound.rule.how
    if isinstance(holder, torch.optim.LBFGS) or (how == "proximal" and looks_before(holder)):
        raise OptimizerError(
            f"{bound.key!r}: {name!r} is sharded, where how={how!r} isn't known with {type(holder).__name__}: use "
            "how='loss', how='gradient' or how='decoupled', or Adam, AdamW, SGD"
        )


def _check_kind(bound: Bound, optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Check that the optimizer can carry out the rule on any parameter."""
    how, name = bound.rule.how, type(optimizer).__name__
    if how in ("decoupled", "proximal") and isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            f"{bound.key!r}: {name} calls its closure several times a step and searches along a line, which "
            f"how={how!r} knows nothing of. Use how='loss' or how='gradient', whose value and gradient join each call"
        )
    if isinstance(bound.rule.what, Sharpness) and isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            f"{bound.key!r}: {name} calls its closure several times a step and searches along a line of one loss; use "
            "another optimizer"
        )
    if how == "proximal" and isinstance(optimizer, torch.optim.Rprop):
        raise OptimizerError(
            f"{bound.key!r}: {name} follows the sign of the data's gradient alone, and lengthens its steps as long as "
            "that stays, so how='proximal' never settles. Use another optimizer, or how='loss'"
        )
    if how != "project" and isinstance(optimizer, torch.optim.SparseAdam):
        ways = "use Adam, for an embedding with sparse=False, or leave its weight out of the rule"
        raise OptimizerError(f"{bound.key!r}: {name} takes sparse gradients; how={how!r} makes them dense: {ways}")
    if group.get("differentiable"):
        raise OptimizerError(
            f"{bound.key!r}: with differentiable=True the step becomes part of the graph, how={how!r} doesn't: use "
            "how='loss'"
        )
    if how == "proximal" and float(group.get("momentum", 0)) >= 1:
        raise OptimizerError(f"{bound.key!r}: with momentum={group['momentum']} a gradient is never forgotten")


def _check_proximal(bounds: Sequence[Bound], standing: dict[str, _Standing]) -> None:
    """Check the sum of proximal rules on each parameter, once for parameters that are alike."""
    together: dict[tuple[str, str], list[Penalty]] = {}  # joint rules are alone, see `check_alone`
    measured = set[str]()
    for bound in bounds:
        pairs = [(handle.name, what) for handle, what in bound.parameters if standing[handle.name].holder is not None]
        for name, what in pairs:
            together.setdefault((name, "" if bound.joint is None else bound.key), []).append(what)
        holders = {id(holder): holder for name, _ in pairs if (holder := standing[name].holder) is not None}
        own = {type(holder).__name__ for holder in holders.values() if not known(holder)}
        if own:
            bound.notes = [f"{bound.key}: the steps of {', '.join(sorted(own))} are measured"]
        measured |= own
    seen = set()
    for (name, _), penalties in together.items():
        at = standing[name]
        key = (at.alike, at.p.shape, *map(id, penalties))
        if key not in seen and at.holder is not None:
            seen.add(key)
            _check_prox(name, at.p, total(penalties), at.holder)
    if measured:
        _warn(
            f"how='proximal' with {', '.join(sorted(measured))}: no formula is known for the steps that it takes, so "
            "they are measured, as movement / gradient of each entry, averaged over about 50 steps. That is right "
            "where the optimizer settles, for weight_decay=0, and an estimate before (docs/how.md)"
        )


def _check_held(bounds: Sequence[Bound], standing: dict[str, _Standing]) -> None:
    """Check the parameters whose norm and update Hyperball holds.

    Raises:
        HowError: another rule changes the weight at the step.
        OptimizerError: the direction of the optimizer isn't known.
    """
    held = {handle.name: bound for bound in bounds for handle, what in bound.parameters if isinstance(what, HeldNorm)}
    for bound in bounds if held else ():
        for handle, _ in bound.parameters:
            first = held.get(handle.name, bound)
            if first is not bound and bound.rule.how in ("decoupled", "proximal", "project", "parametrize"):
                raise HowError(
                    f"{first.key!r} holds the norm of {handle.name!r} and of its update, and {bound.key!r} "
                    f"(how={bound.rule.how!r}) would change it after that: leave one of them out"
                )
    for bound in bounds:
        if isinstance(bound.rule.what, Sharpness | MomentumSharpness):  # one norm of all
            _check_not_split(bound, [handle.name for handle, _ in bound.parameters], standing)
        for handle, what in bound.parameters if isinstance(bound.rule.what, MomentumSharpness) else ():
            _check_momentum(bound, what, handle.name, standing[handle.name])
    for name, bound in held.items():
        at = standing[name]
        if at.holder is None or at.group is None or not at.p.requires_grad:
            continue
        kind = type(at.holder).__name__
        if isinstance(at.holder, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise OptimizerError(f"{bound.key!r}: {kind} has no direction of its own at a step: use Adam, SGD or Muon")
        if at.p.dtype.itemsize < 4 and not has_direction(at.holder):
            raise OptimizerError(
                f"{bound.key!r}: of {kind} only the movement of {name!r} would be known, which {at.p.dtype} rounds "
                "away: keep the weight in float32, or use SGD, Adam, AdamW or RMSprop"
            )
        if at.group.get("weight_decay"):
            _warn(
                f"{bound.key!r} holds the norm of {name!r}, so the optimizer's weight_decay does nothing there but, "
                "where it is coupled, turn the gradient: put the weight into a group with weight_decay=0"
            )
            return


def _check_momentum(bound: Bound, what: Any, name: str, at: _Standing) -> None:
    """Check that a parameter's optimizer keeps the momentum that `MomentumSharpness` follows.

    Raises:
        OptimizerError: it doesn't, or no given optimizer holds the parameter.
        HowError: the parameter is sharded.
    """
    if not at.p.requires_grad:
        return
    if is_sharded(at.p):
        raise HowError(
            f"{bound.key!r}: {name!r} is sharded, and forwards use it whole, where each process has its part of the "
            "momentum alone: train by DDP, or use rs.Sharpness with a closure"
        )
    if at.holder is None or at.group is None:
        raise OptimizerError(
            f"{bound.key!r} follows an optimizer's momentum, but no given optimizer holds {name!r}: write "
            "rs.attach(model, plan, optimizer)"
        )
    if not (at.group.get("momentum") or at.group.get("betas")):
        raise OptimizerError(
            f"{bound.key!r} follows the momentum of {name!r}, and {type(at.holder).__name__} keeps none as it is set: "
            "use SGD with momentum=0.9, Adam, AdamW or Muon, or rs.Sharpness with a closure"
        )


def _check_prox(name: str, p: Tensor, penalty: Penalty, optimizer: Optimizer) -> None:
    by_entry = diagonal(optimizer)
    if by_entry and p.is_complex():
        raise HowError(
            f"how='proximal' on {name!r}: {type(optimizer).__name__} moves the real and the imaginary part of "
            "a complex entry by steps of their own, for which no prox is known. Use SGD, or how='gradient'"
        )
    if not penalty.has_prox:
        try:
            penalty.prox(torch.zeros_like(p))
        except NoProxError as error:
            raise NoProxError(f"how='proximal' on {name!r}: {error}") from None
    if by_entry and not (penalty.entrywise or penalty.groupwise):
        raise HowError(
            f"how='proximal' on {name!r}: {type(optimizer).__name__} moves each entry by a step of its own, for which "
            f"{penalty!r} has no prox (it is neither entrywise nor by group). Use SGD, or how='gradient'"
        )


def _warn(message: str) -> None:
    warnings.warn(message, RestrainWarning, stacklevel=level_of_caller())
