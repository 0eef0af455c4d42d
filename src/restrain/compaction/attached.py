"""Attached rules of a model that is made smaller: their settings and state for smaller tensors."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import floor, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.axes import Grouped, Grouping, grouping, grouping_at
from restrain.connections import Graph
from restrain.engine import Attachment, Point, attached_to, continued
from restrain.errors import CompactionError, RestrainError, RestrainWarning
from restrain.fields import is_whole
from restrain.named_tensors import Location, parameters
from restrain.penalties import Penalty
from restrain.penalties.stateful import Distance, Weighted, given_tensor
from restrain.penalties.structured import SLOPE, FusedLasso, TotalVariation
from restrain.plans import Plan
from restrain.rules import Rule, What
from restrain.schedule import Strength, Target
from restrain.transforms.activation import Activation
from restrain.transforms.entries import Fixed, Signs
from restrain.transforms.sparsity import NM, Kept, TopGroups, TopK
from restrain.unit_sets import Units, per_of

_STILL = 1e-5  # largest change of a weight by attaching, relative to the tensor's largest entry


class _NotCarriedError(Exception):
    """Reason why a rule can't go along."""


@dataclass(frozen=True)
class Cut:
    """Indices of a tensor that stay: its shape before, and {axis: indices} of shorter axes.

    Args:
        shape: the shape before.
        axes: {axis: indices that stay}.
        at: the parameter; None for an activation.
    """

    shape: tuple[int, ...]
    axes: Mapping[int, Tensor]
    at: Location | None = None

    def of(self, tensor: Tensor, what: str = "its tensor") -> Tensor:
        """Return the entries that stay of a tensor that broadcasts to the shape.

        Raises:
            _NotCarriedError: it doesn't.
        """
        for dim, indices in self.axes.items():
            own = dim - len(self.shape) + tensor.dim()
            if own >= 0 and tensor.shape[own] > 1:
                if tensor.shape[own] != self.shape[dim]:
                    raise _NotCarriedError(
                        f"{what} has the shape {tuple(tensor.shape)}, and {self.name} {self.shape}, so its entries "
                        "aren't known one by one"
                    )
                tensor = tensor.index_select(own, indices.to(tensor.device))
        return tensor

    @property
    def name(self) -> str:
        """The parameter's name in quotes, or "the output"."""
        return "the output" if self.at is None else repr(self.at.name)

    def groups(self, per: Any) -> Grouping:
        """Return the groups of the tensor before."""
        return grouping(per, self.shape) if self.at is None else grouping_at(per, self.at)

    def numbers(self, per: Any) -> Tensor:
        """Return the number of each remaining entry's group; -1 for entries in none."""
        groups = self.groups(0 if isinstance(per, str) and len(self.shape) == 1 else per)
        if groups.lists is None:
            kept = [size if dim in groups.keep else 1 for dim, size in enumerate(groups.shape)]
            found = torch.arange(prod(kept), device="cpu").reshape(kept)
        else:
            ids = torch.tensor(groups.lists.ids, device="cpu")
            ids[ids == len(groups.lists.members)] = -1
            found = ids.reshape([n if dim in groups.lists.along else 1 for dim, n in enumerate(groups.shape)])
        return self.of(found.expand(groups.shape).reshape(self.shape))


@dataclass(frozen=True)
class Carried:
    """The rules of an attachment for the smaller model, with their state.

    Args:
        reg: the attachment.
        plan: its rules for the smaller tensors.
        state: its state, cut in the same way.
    """

    reg: Attachment
    plan: Plan
    state: dict[str, Any]

    def bound(self, model: nn.Module, optimizer: Optimizer | None) -> Attachment:
        """Return the attachment of the smaller copy of the model.

        Raises:
            CompactionError: the rules can't be attached there, or would change the weights.
        """
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        try:
            with _quietly():
                new = continued(self.reg, model, self.plan, optimizer if self.reg.optimizers else None, self.state)
        except RestrainError as error:
            raise _refused(str(error)) from error
        try:
            new.values()
        except (RestrainError, RuntimeError) as error:
            new.detach()
            raise _refused(str(error)) from error
        for name, p in model.named_parameters():
            old = before[name]
            if p.numel() and float((p.detach() - old).abs().max()) > _STILL * float(old.abs().max()):
                new.detach()
                raise _refused(
                    f"without the removed units, a constraint doesn't hold for {name!r} any more, so it would change "
                    "the outputs"
                )
        return new

    def rebind(self) -> Attachment:
        """Bind the rules to the given model, after it was made smaller; return its attachment."""
        with _quietly():
            self.reg.rebind(self.plan, self.state)
        return self.reg


@contextmanager
def _quietly() -> Iterator[None]:
    """Context without our warnings, which were given when the rules were attached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)
        yield


def attachment_of(model: nn.Module, optimizer: Optimizer | None) -> Attachment | None:
    """Return the model's attachment that goes along with a compaction; None if there is none.

    An attachment with optimizers only goes along with its optimizer.

    Raises:
        CompactionError: there are several, or one with several optimizers.
    """
    found = [reg for reg in attached_to(model) if optimizer is not None or not reg.optimizers]
    if len(found) > 1:
        raise _refused(f"{type(model).__name__} has {len(found)} attachments: put their rules into one plan")
    for reg in found:
        if reg.optimizers and not any(one is optimizer for one in reg.optimizers):
            raise _refused("they act at the steps of another optimizer than the given one")
        if len(reg.optimizers) > 1:
            raise _refused(f"they act at the steps of {len(reg.optimizers)} optimizers, and compact takes one")
    return found[0] if found else None


def acted_on(model: nn.Module, reg: Attachment | None) -> dict[str, str]:
    """Return {path of a layer: why its units stay} where activation functions act.

    They act in evaluation, too: they change constants, or compare units with each other.

    Args:
        model: the model with its attachments.
        reg: the attachment that goes along, or None.

    Raises:
        CompactionError: a function doesn't go along, or acts on inputs.
    """
    found: dict[str, str] = {}
    for other in attached_to(model):
        for one in other.rules:
            what = one.rule.what
            if not (one.rule.at_places and isinstance(what, Activation | TopK)):
                continue
            if other is not reg:
                raise _refused(f"{one.key} is an activation function, and acts with an optimizer that isn't given")
            for point in one.points:
                path = ".".join(point.path)
                if point.place.kind != "outputs":
                    raise _refused(f"on which units {what!r} acts isn't known, at the {point.place.kind} of {path!r}")
                found[path] = f"{what!r} acts on it, at the outputs of {path!r}"
    return found


def graph_of(model: nn.Module, args: tuple[Any, ...], functions: Mapping[str, str]) -> Graph:
    """Return the graph of a model; the units at `functions`, by `acted_on`, stay.

    Raises:
        CompactionError: the output of a layer with a function isn't in the graph, as that of an
            nn.Identity.
    """
    graph = Graph(model, args, acted_on=functions)
    for path in functions:
        if path not in graph.given:
            raise _refused(f"the output of {path!r}, on which an activation function acts, isn't in the exported graph")
    return graph


def carried(reg: Attachment, model: nn.Module, graph: Graph, keep: Mapping[str, Mapping[int, Tensor]]) -> Carried:
    """Return the rules of an attachment for the smaller model.

    Args:
        reg: the attachment.
        model: the model, before it is made smaller.
        graph: its graph.
        keep: {name of a parameter: {axis: indices that stay}}.

    Raises:
        CompactionError: a rule can't go along; the message says why.
    """
    own = {id(p): name for name, p in model.named_parameters() if name in keep}
    cuts = {}
    for slot in parameters(model):
        tensors = slot.handle.stored(model)
        axes = keep.get(own.get(id(tensors[0]), ""), {}) if len(tensors) == 1 else {}
        cuts[slot.name] = Cut(tuple(slot.tensor().shape), axes, slot.location())
    known: dict[str, Cut] = {}

    def cut_of(whose: str | Point) -> Cut:
        if isinstance(whose, str):
            return cuts[whose]
        path = ".".join(whose.path)
        if not keep or (whose.place.kind == "inputs" and not path):
            return Cut((), {})
        if whose.place.kind != "outputs":
            raise _NotCarriedError("which inputs of a layer stay isn't known")
        if path not in known:
            known[path] = _output(graph, keep, path)
        return known[path]

    def changed(whose: str | Point, key: str, tensor: Tensor) -> Tensor:
        return cut_of(whose).of(tensor, f"its state {key!r}") if tensor.numel() > 1 else tensor

    rules: list[Rule] = []
    at = ""
    try:
        for one in reg.rules:
            at = one.key
            targets: Sequence[str | Point] = one.points or one.names
            rules.append(_rule(one.rule, [partial(cut_of, whose) for whose in targets], cuts))
        at = "their state"
        state = reg.resized(changed)
    except _NotCarriedError as error:
        raise _refused(f"{at}: {error}") from None
    return Carried(reg, Plan(tuple(rules), reg.plan.layouts), state)


def _refused(why: str) -> CompactionError:
    return CompactionError(
        f"the attached rules can't go along: {why.rstrip('.')}. Compact with rules=False, and attach rules to "
        "result.model"
    )


def _output(graph: Graph, keep: Mapping[str, Mapping[int, Tensor]], path: str) -> Cut:
    """Return which entries of a layer's output stay."""
    gone = set[int]()
    for name, axes in keep.items():
        for dim, indices in axes.items():
            units = graph.labels.units(graph.axes[name][dim])
            left = set(indices.tolist())
            gone |= {unit for index, unit in enumerate(units) if index not in left}
    found = []
    for shape, labels in graph.given.get(path, ()):
        axes = {}
        for dim, size in enumerate(() if labels is None else labels.shape):
            if labels is None or size < 2:
                continue
            units = graph.labels.units(labels.movedim(dim, 0).reshape(size, -1)[:, 0])
            staying = [index for index, unit in enumerate(units) if unit not in gone]
            if len(staying) < len(units):
                axes[dim] = torch.tensor(staying, device="cpu")
        found.append(Cut(shape, axes))
    if not found:
        raise _NotCarriedError(f"which entries of the output of {path!r} stay isn't known")
    alike = [{dim: indices.tolist() for dim, indices in one.axes.items()} for one in found]
    if any(one != alike[0] for one in alike):
        raise _NotCarriedError(f"the calls of {path!r} lose different entries")
    return found[0]


# ---------------------------------------------------------------- rules


def _rule(rule: Rule, targets: Sequence[Callable[[], Cut]], cuts: Mapping[str, Cut]) -> Rule:
    """Return a rule for the smaller tensors.

    Args:
        rule: the bound rule.
        targets: functions that return the cuts of its parameters and activations.
        cuts: the cuts of all parameters by name.
    """

    def change(what: What) -> What:
        settings = [make(what, cuts) for cls, make in _OVER_UNITS if isinstance(what, cls) and what.over_units]
        if not settings:
            acting = [(cls, make) for cls, make in _SETTINGS if isinstance(what, cls)]
            known = [one() for one in targets] if acting else []
            if any(cut.axes for cut in known):
                settings = [make(what, known) for _, make in acting]
        fields = {key: value for one in settings for key, value in one.items()}
        return dataclasses.replace(what, **fields) if fields else what  # type: ignore[type-var]

    if rule.how == "parametrize":
        raise _NotCarriedError("how='parametrize' computes the weight, and its layer can't be made smaller")
    _check_targets(rule, targets)
    return dataclasses.replace(rule, what=_mapped(rule.what, change))


def _mapped(what: Any, change: Callable[[What], What]) -> Any:
    """Return `what` with a function applied to it and to the penalties and transforms in it."""
    if isinstance(what, tuple):
        return tuple([_mapped(one, change) for one in what])
    if not (isinstance(what, What) and dataclasses.is_dataclass(what)):
        return what
    fields = {field.name: getattr(what, field.name) for field in dataclasses.fields(what) if field.init}
    inner = {
        key: _mapped(value, change)
        for key, value in fields.items()
        if isinstance(value, What) or (isinstance(value, tuple) and any(isinstance(one, What) for one in value))
    }
    return change(dataclasses.replace(what, **inner) if inner else what)


def _check_targets(rule: Rule, targets: Sequence[Callable[[], Cut]]) -> None:
    """Check that no target is a fraction of entries of which some are removed."""
    strengths = [strength for strength, _ in rule.what.leaves()] if isinstance(rule.what, Penalty) else []
    wanted = [part for one in strengths if isinstance(one, Strength) for part in one.parts[1]]
    for target in wanted:
        if isinstance(target, Target) and target.kind in ("zeros", "active") and any(one().axes for one in targets):
            raise _NotCarriedError(f"{target!r} is a fraction of entries of which some are removed")


def _alike(settings: Sequence[Any], what: Any) -> Any:
    """Return the setting that all tensors of a rule have in common."""
    if any(one != settings[0] for one in settings):
        raise _NotCarriedError(f"{what!r} would need another setting for each of its tensors: write a rule for each")
    return settings[0]


def _of_groups(what: Any, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Return `per` for the smaller tensors; names and dims of axes go on."""
    if what.per is None or isinstance(what.per, int) or (isinstance(what.per, str) and what.per != "head"):
        return {}
    return {"per": _alike([_per(what.per, cut) for cut in cuts], what)}


def _per(per: Any, cut: Cut) -> Any:
    """Return the groups of a tensor by lists of the remaining indices, or as blocks."""
    dim, line = _along(cut.numbers(per), per)
    lists = [[i for i, one in enumerate(line) if one == group] for group in sorted(set(line) - {-1})]
    if not lists:
        raise _NotCarriedError(f"none of its groups, per={per!r}, is left")
    shape = [len(cut.axes[i]) if i in cut.axes else size for i, size in enumerate(cut.shape)]
    return per_of(dim, lists, tuple(shape))


def _along(numbers: Tensor, per: Any) -> tuple[int, list[int]]:
    """Return the axis along which groups differ, and the group of each of its indices."""
    wide = [dim for dim in range(numbers.dim()) if bool((numbers != numbers.narrow(dim, 0, 1)).any())]
    if len(wide) > 1:
        raise _NotCarriedError(f"its groups, per={per!r}, are blocks along several axes, which lose entries")
    dim = wide[0] if wide else 0
    return dim, numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)[:, 0].tolist()


def _of_units(what: Any, cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """Return units without those that are removed."""
    sets = [_remaining(members, cuts) for members in what.per.sets]
    left = tuple([members for members in sets if members])
    if not left:
        raise _NotCarriedError("none of its units is left")
    return {"per": Units(left)}


def _remaining(members: Any, cuts: Mapping[str, Cut]) -> Any:
    """Return the members of a set of units, with the groups of the units that stay."""
    if not any(cuts[name].axes for name, _ in members):
        return members
    lines = [(name, per, *_along(cuts[name].numbers(per), per)) for name, per in members]
    staying = sorted({group for *_, line in lines for group in line} - {-1})
    found = []
    for name, per, dim, line in lines:
        lists = [[i for i, one in enumerate(line) if one == group] for group in staying]
        if not all(lists):
            raise _NotCarriedError(f"units over {name!r} (per={per!r}) lose their entries there, but not elsewhere")
        cut = cuts[name]
        shape = [len(cut.axes[i]) if i in cut.axes else size for i, size in enumerate(cut.shape)]
        new = per_of(dim, lists, tuple(shape))
        found.append((name, per if new == dim and isinstance(per, str | int) else new))
    return tuple(found) if staying else ()


def _budget(what: Kept, candidates: Sequence[int]) -> dict[str, Any]:
    """Return the number of candidates that a fraction meant before."""
    if is_whole(what.k):
        return {}
    if not isinstance(what.k, float):
        raise _NotCarriedError(f"k={what.k!r} moves as a fraction of entries of which some are removed")
    counts = [sum(candidates)] if what.budget == "all" else candidates
    return {"k": _alike([max(floor(what.k * count + 0.5), 1) for count in counts], what)}


def _of_unit_budget(what: Any, cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """Return the number of units for a fraction of units."""
    if not any(cuts[name].axes for members in what.per.sets for name, _ in members):
        return {}
    whole = {name: dataclasses.replace(cut, axes={}) for name, cut in cuts.items()}
    numbers = [whole[members[0][0]].numbers(members[0][1]) for members in what.per.sets]
    return _budget(what, [len(set(one.flatten().tolist()) - {-1}) for one in numbers])


def _of_budget(what: Kept, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Return the number of entries or groups for a fraction of them."""
    counts = [1 if what.per is None else cut.groups(what.per).count for cut in cuts]
    entries = [prod(cut.shape) for cut in cuts]
    if isinstance(what, TopGroups):
        return _budget(what, counts)
    return _budget(what, [size // max(count, 1) for size, count in zip(entries, counts, strict=True)])


def _of_neighbours(what: Any, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Check that the axis along which entries are neighbours is whole."""
    for cut in cuts:
        groups = cut.groups(what.dim)
        if any(dim in cut.axes for dim in groups.own):
            raise _NotCarriedError(f"{what!r} compares neighbours in {cut.name}, between which entries are removed")
    return {}


def _of_ranks(what: SLOPE, cuts: Sequence[Cut]) -> dict[str, Any]:
    if what.weights:
        raise _NotCarriedError(f"{what!r} has a weight for each rank of more entries than are left")
    return {}


def _of_entries(what: Weighted | Distance, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Return tensors given for parameters as a mapping from names; state replaces all others."""
    key = "weights" if isinstance(what, Weighted) else "to"
    given = what.weights if isinstance(what, Weighted) else what.to
    if given is None or callable(given):
        return {}
    return {key: {cut.at.name: cut.of(given_tensor(what, given, cut.at)) for cut in cuts if cut.at is not None}}


def _of_pattern(what: Signs | Fixed, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Return patterns, masks and values of the remaining entries."""
    keys = ("pattern",) if isinstance(what, Signs) else ("mask", "values")
    found = {}
    for key in keys:
        given = getattr(what, key)
        if isinstance(given, tuple):
            found[key] = _alike([cut.of(torch.tensor(given, device="cpu")).tolist() for cut in cuts], what)
    return found


_OVER_UNITS: tuple[tuple[type[Any], Any], ...] = ((Grouped, _of_units), (TopGroups, _of_unit_budget))
_SETTINGS: tuple[tuple[type[Any], Any], ...] = (
    (Grouped, _of_groups),
    (Kept, _of_budget),
    (TotalVariation, _of_neighbours),
    (FusedLasso, _of_neighbours),
    (NM, _of_neighbours),
    (SLOPE, _of_ranks),
    (Weighted, _of_entries),
    (Distance, _of_entries),
    (Signs, _of_pattern),
    (Fixed, _of_pattern),
)
"""Functions that return the changed settings of a penalty or transform, by its class."""
