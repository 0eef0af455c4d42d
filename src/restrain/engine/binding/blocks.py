"""Binding of rules that act on several parameters together: their units as blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from restrain.axes import Grouping, grouping_at
from restrain.engine.ops import Block, Joint, Piece, overlapping
from restrain.errors import HowError, PenaltyError
from restrain.named_tensors import Location, Slot
from restrain.penalties import Penalty
from restrain.rules import Rule, What
from restrain.transforms import Constraint
from restrain.transforms.sparsity import TopGroups
from restrain.unit_sets import Units

_OVERLAPS = ("loss", "gradient")  # moments that add up, so that units may share entries


def named_units(what: Any, model: nn.Module, known: dict[Units, Units]) -> Any:
    """Return a penalty or constraint with its units named member by member.

    Args:
        what: the penalty or constraint.
        model: the model.
        known: the named units so far, by units; those of a graph take long to find.
    """

    def named(per: Units) -> Units:
        if per not in known:
            known[per] = per.named(model)
        return known[per]

    return _mapped(what, named)


def members_of(what: Any) -> list[str]:
    """Return the names of the members of all units, each once."""
    return list(dict.fromkeys(name for units in _units(what) for members in units.sets for name, _ in members))


def joint_of(rule: Rule, what: What, slots: Sequence[Slot], locations: Mapping[str, Location]) -> Joint:
    """Return a rule on several parameters, bound to them.

    Args:
        rule: the rule, with its units named.
        what: its penalty or constraint, with tensors for moving strengths.
        slots: the parameters.
        locations: the location of each parameter by name.

    Raises:
        PenaltyError: members of units have different numbers of units.
        HowError: the parameters can't be changed together.
    """
    if isinstance(what, Constraint) and not what.over_units:
        blocks = [Block((Piece(slot.name),), what.bound_to(locations[slot.name])) for slot in slots]
        return Joint(rule, tuple(slot.handle for slot in slots), tuple(blocks), (tuple(range(len(blocks))),))
    if isinstance(what, Constraint) and not isinstance(what, TopGroups):
        raise HowError(
            f"{what!r} isn't known over units; the constraint of units is rs.TopGroups(k, per=rs.units(...))"
        )
    units = _one_units(rule, what)
    blocks, budgets, told = [], list[tuple[int, ...]](), list[str]()
    for members in units.sets:
        own = [(name, per) for name, per in members if name in locations]
        new = list(_blocks(what, own, locations)) if own else []
        budgets += [tuple(range(len(blocks), len(blocks) + len(new)))] if new else []
        blocks += new
        told += [_told(new, own)] if new else []
    for block in blocks:
        _check_together(rule, block, locations)
    handles = {slot.name: slot.handle for slot in slots}
    used = tuple(handle for name, handle in handles.items() if any(name == p.name for b in blocks for p in b.pieces))
    if rule.how not in _OVERLAPS:
        _check_overlaps(rule, blocks, locations)
    if isinstance(what, Constraint) and getattr(what, "budget", "each") == "all":
        budgets = [tuple(range(len(blocks)))]
    return Joint(rule, used, tuple(blocks), tuple(budgets), tuple(told))


def _units(what: Any) -> list[Units]:
    """Return the units of a penalty or constraint, equal ones once."""
    found: list[Units] = []

    def note(per: Units) -> Units:
        if per not in found:
            found.append(per)
        return per

    _mapped(what, note)
    return found


def _mapped(what: Any, change: Any) -> Any:
    """Return `what` with a function applied to the units in it."""
    if isinstance(what, Units):
        return change(what)
    if isinstance(what, tuple):
        return tuple([_mapped(one, change) for one in what])
    if not (isinstance(what, What) and dataclasses.is_dataclass(what)) or not what.over_units:
        return what
    fields = {field.name: getattr(what, field.name) for field in dataclasses.fields(what) if field.init}
    members = {key: value for key, value in fields.items() if isinstance(value, Units | What | tuple)}
    return dataclasses.replace(what, **{key: _mapped(value, change) for key, value in members.items()})


def _one_units(rule: Rule, what: Any) -> Units:
    """Return the units of a rule.

    Raises:
        PenaltyError: a sum of penalties of different groups.
    """
    found = _units(what)
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else []
    others = [leaf for leaf in leaves if not (leaf.by_entry or leaf.over_units)]
    if not found:
        raise PenaltyError(f"{type(what).__name__} holds units, but isn't a dataclass, whose settings can be replaced")
    if len(found) > 1 or others:
        raise PenaltyError(
            f"{rule.what!r}: penalties of different groups in one sum, of which some are units across tensors: write a "
            "rule for each (only one of them by how='proximal' on the same tensor)"
        )
    return found[0]


def _check_together(rule: Rule, block: Block, locations: Mapping[str, Location]) -> None:
    """Check that the members of a block can be changed together.

    Raises:
        HowError: they lie on different devices; some are frozen, or complex.
    """
    tensors = {piece.name: locations[piece.name].tensor for piece in block.pieces}
    for told, kinds in (
        ("lie on several devices", {name: str(t.device) for name, t in tensors.items()}),
        ("are partly frozen", {name: "trained" if t.requires_grad else "frozen" for name, t in tensors.items()}),
        ("are partly complex", {name: "complex" if t.is_complex() else "real" for name, t in tensors.items()}),
    ):
        found = {kind: name for name, kind in reversed(kinds.items())}
        if len(found) > 1:
            shown = ", ".join(f"{name!r} {kind}" for kind, name in reversed(found.items()))
            raise HowError(
                f"{rule.label} acts on the members of a unit together, but they {told}: {shown}. Move, freeze or train "
                "them alike, or leave some out by .on(...)"
            )


def _groups(name: str, per: Any, at: Location) -> tuple[Grouping, list[tuple[int, ...]]]:
    """Return (groups of a member without lists, the numbers of each unit's groups)."""
    groups = grouping_at(0 if isinstance(per, str) and at.tensor.dim() == 1 else per, at)
    if groups.lists is None:
        return groups, [(i,) for i in range(groups.count)]
    if groups.stack:
        raise PenaltyError(
            f"{name!r}: lists of indices aren't known as units of several matrices, {at.axes}: name a dim"
        )
    return dataclasses.replace(groups, lists=None), list(groups.lists.members)


def _blocks(what: Any, members: Sequence[tuple[str, Any]], locations: Mapping[str, Location]) -> Iterator[Block]:
    """Yield the blocks of a set of units: one for units of each size."""
    found = [(name, *_groups(name, per, locations[name])) for name, per in members]
    counts = {name: len(lists) for name, _, lists in found}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise PenaltyError(
            f"members of a set of units have different numbers of units: {shown}. "
            "A layer behind a flattened image has several columns for each filter: write them as a block, such as "
            "(out_features, height * width), or as lists"
        )
    alike: dict[tuple[int, ...], list[int]] = {}
    for unit in range(next(iter(counts.values()))):
        alike.setdefault(tuple([len(lists[unit]) for _, _, lists in found]), []).append(unit)
    for numbers in alike.values():
        pieces = []
        for name, groups, lists in found:
            rows = [lists[unit] for unit in numbers]
            every = [(i,) for i in range(len(rows))] == rows and len(rows) == groups.count
            pieces.append(Piece(name, groups, None if every else torch.tensor(rows, device="cpu")))
        width = sum(piece.width(locations[piece.name].tensor) for piece in pieces)
        matrix = Grouping((len(numbers), width), (0,))
        yield Block(tuple(pieces), _mapped(what, lambda per, matrix=matrix: matrix), tuple(numbers))


def _told(blocks: Sequence[Block], members: Sequence[tuple[str, Any]]) -> str:
    count = sum(block.pieces[0].units for block in blocks)
    return f"{count:,} units over {', '.join(f'{name} ({per})' for name, per in members)}"


def _check_overlaps(rule: Rule, blocks: Sequence[Block], locations: Mapping[str, Location]) -> None:
    name = overlapping(blocks, {name: at.tensor for name, at in locations.items()})
    if name is not None:
        raise HowError(
            f"{rule.label}: entries of {name!r} belong to several units, such as those that it reads and those that it "
            f"gives; how={rule.how!r} isn't known for overlapping units. Leave the weights that read the units out "
            "(readers=False with example=, or don't name them), take the units of fewer layers, or use how='loss' or "
            "how='gradient'"
        )
