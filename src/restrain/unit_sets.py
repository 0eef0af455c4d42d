"""Units: groups of entries of several tensors, for `per=` of group penalties and `rs.TopGroups`.

A set of units is a list of members (parameter, `per`): the i-th groups of all members are one unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restrain.axes import AcrossTensors, Per, checked
from restrain.errors import CompactionError, PenaltyError, SelectionError
from restrain.fields import brief, check_flags, setting
from restrain.known_units import known_units
from restrain.named_tensors import near, parameters, unwrap

Members: TypeAlias = tuple[tuple[str, Any], ...]
"""The members of a set of units: (name of a parameter, `per` as for groups of one tensor)."""


@dataclass(frozen=True, eq=False, repr=False)
class Units(AcrossTensors):
    """Units of a model, made by `units`.

    Args:
        sets: the members of each set, by exact names or by globs with `*`.
        where: globs over layers and parameters, whose units are found in the graph of the model, or
            without an example, of known layers.
        example: the model's input for this graph, or a tuple of its inputs.
        readers: False to leave out the weights that read the units.
    """

    sets: tuple[Members, ...] = ()
    where: tuple[str, ...] = ()
    example: Any = None
    readers: bool = True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Units):
            return NotImplemented
        alike = [getattr(self, key) == getattr(other, key) for key in ("sets", "where", "readers")]
        return all(alike) and _equal(self.example, other.example)

    def __hash__(self) -> int:
        return hash((self.sets, self.where, self.readers))

    def __repr__(self) -> str:
        given = [f"{{{', '.join(f'{name!r}: {setting(per)}' for name, per in members)}}}" for members in self.sets]
        given += list(map(repr, self.where))
        given += [f"example={_shown(self.example)}"] * (self.example is not None)
        return f"units({', '.join([*given, *['readers=False'] * (not self.readers)])})"

    def named(self, model: nn.Module) -> Units:
        """Return the same units of a model, each member by its exact name, as plans write them.

        Raises:
            SelectionError: a member isn't in the model; no unit is found; torch.export can't follow
                the model.
        """
        root = unwrap(model)
        names = {name: slot.name for slot in parameters(root) for name in slot.names}
        sets = [found for members in self.sets for found in _by_stars(members, names)]
        if self.example is not None:
            sets += self._in_graph(root)
        elif self.where:
            sets += self._of_known_layers(root)
        return Units(tuple(dict.fromkeys(sets)))

    def _in_graph(self, model: nn.Module) -> list[Members]:
        """Return the sets of units that the graph of the model has."""
        from restrain.connections import removable  # loads the operations of torch.export

        args = self.example if isinstance(self.example, tuple) else (self.example,)
        try:
            found = removable(model, args, self.readers)
        except CompactionError as error:
            raise SelectionError(
                f"{self!r}: {error}. Name the members of the units instead, as in "
                "rs.units({'fc1.weight': 'out', 'fc1.bias': 0, 'fc2.weight': 'in'})"
            ) from error
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        own = {id(p): slot.name for slot in parameters(model) for p in slot.handle.stored(model)}
        names = {name: own.get(id(p), name) for name, p in model.named_parameters()}
        taken = [unit for unit in found if all(self._takes(names[name]) for name, _ in unit)]
        if not taken:
            kinds = list(dict.fromkeys(", ".join(sorted({names[name] for name, _ in unit})) for unit in found))
            raise SelectionError(
                f"{self!r}: no unit that could be removed lies wholly in these layers; units are in: "
                f"{'; '.join(kinds[:12]) or 'none of the parameters'}{' ...' * (len(kinds) > 12)}"
            )
        sets: dict[Any, list[dict[Any, list[int]]]] = {}
        for unit in taken:
            sets.setdefault(frozenset(unit), []).append(unit)
        return [
            tuple((names[name], per_of(dim, [unit[name, dim] for unit in own], shapes[name])) for name, dim in own[0])
            for own in sets.values()
        ]

    def _of_known_layers(self, model: nn.Module) -> list[Members]:
        """Return the sets of units of the layers that restrain knows."""
        own = {id(p): slot.name for slot in parameters(model) for p in slot.handle.stored(model)}
        sets: list[Members] = []
        kinds: dict[str, str] = {}
        for name, members in known_units(model):
            layer = model.get_submodule(name)
            named = {own[id(layer.get_parameter(key))]: per for key, per in members.items()}
            if all(map(self._takes, named)):
                sets.append(tuple(named.items()))
            kinds.setdefault(type(layer).__name__, name)
        if not sets:
            known = ", ".join(f"{kind} such as {name!r}" for kind, name in kinds.items()) or "none in this model"
            raise SelectionError(
                f"{self!r}: no layer in there has units that are known without an input of the model ({known}): give "
                "example=, an input, or name the members, as in "
                "rs.units({'fc1.weight': 'out', 'fc1.bias': 0, 'fc2.weight': 'in'})"
            )
        return sets

    def _takes(self, name: str) -> bool:
        return not self.where or any(fnmatchcase(name, one) or fnmatchcase(name, f"{one}.*") for one in self.where)


def units(*members: str | Mapping[str, Per], example: Any = None, readers: bool = True) -> Units:
    """Return units across tensors for `per=`: what hangs together, named or found in the model.

    A unit is a filter with its bias and the scale and shift of its normalisation; a neuron's row
    and the next layer's column; a head over queries, keys, values and outputs. Rules with
    `per=rs.units(...)` act on units as a whole, exactly, whatever tensors they lie in:
    `rs.GroupLasso`, `rs.SparseGroupLasso`, `rs.GroupLInf`, `rs.ExclusiveLasso` (and sums with `L1`
    and `L2`), and `rs.TopGroups`. Without an argument, `.on()` takes all members.

    Args:
        members: a mapping {name of a parameter: `per`} for each set of units: the i-th groups of
            all members are a unit. A `*` in names makes a set for each text that it stands for. Or
            globs over layers and parameters: units that lie wholly in these; none, with `example`,
            for all units that `rs.compact` could remove.
        example: the model's input, or a tuple of its inputs, by which its graph is found. Without
            it, globs find the units of known layers: hidden features of torch's transformer layers
            and of the MLPs of GPT-2, BERT, Llama, Mistral and Qwen 2, and of the last three heads.
        readers: with `example`, False to leave out the weights that read the units, so that the
            units of successive layers don't overlap.

    Raises:
        SelectionError: nothing to find units by.
        PenaltyError: a `per` that is none.

    >>> per = rs.units({"0.weight": "out", "0.bias": 0, "2.weight": "in"})
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with rs.attach(model, rs.TopGroups(3, per).on(), torch.optim.SGD(model.parameters())):
    ...     int(model[0].bias.count_nonzero()), int(model[2].weight.any(0).sum())
    (3, 3)
    """
    globs = [one for one in members if isinstance(one, str)]
    sets = [one for one in members if isinstance(one, Mapping)]
    if len(globs) + len(sets) < len(members):
        wrong = next(one for one in members if not isinstance(one, str | Mapping))
        raise SelectionError(
            "units are named by mappings, as in rs.units({'fc1.weight': 'out', 'fc2.weight': 'in'}), or by globs with "
            f"example=; got {brief(wrong)}"
        )
    if not members and example is None:
        raise SelectionError(
            "to find all units of a model, its graph is needed: give example=, an input of the model, or name the "
            "members, as in rs.units({'fc1.weight': 'out', 'fc1.bias': 0, 'fc2.weight': 'in'})"
        )
    check_flags(SelectionError, readers=readers)
    if example is None and not readers:
        raise SelectionError("readers=False goes with example=; of named units, leave out the weights that read them")
    if sets and example is not None:
        raise SelectionError("units are named by mappings or found with example=, not both: write one rule for each")
    if not all(sets):
        raise SelectionError("an empty mapping names no members of units: write {name of a parameter: per}")
    checked_sets = [tuple([(name, _checked(name, per)) for name, per in one.items()]) for one in sets]
    return Units(tuple(checked_sets), tuple(globs), example, readers)


def _checked(name: Any, per: Any) -> Any:
    if not isinstance(name, str):
        raise SelectionError(f"members of units are named by text, the names of parameters; got {brief(name)}")
    if isinstance(per, AcrossTensors):
        raise PenaltyError(f"{name!r}: per= of a member is a grouping of that tensor, not units; got {per!r}")
    return checked(per)


def _by_stars(members: Members, names: Mapping[str, str]) -> list[Members]:
    """Return the sets that members by globs stand for, each with exact names.

    Raises:
        SelectionError: a name or glob matches nothing, or a set lacks a member.
    """
    found: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
    for name, per in members:
        pattern = re.compile("(.*)".join(map(re.escape, name.split("*"))))
        matches = [(own, match.groups()) for own in names if (match := pattern.fullmatch(own))]
        if not matches:
            raise SelectionError(f"{name!r}, a member of units, is no parameter{near(name, list(names))}")
        for own, stars in matches:
            found.setdefault(stars, []).append((names[own], per))
    for stars, some in found.items():
        if len(some) < len(members):
            raise SelectionError(
                f"the members {[name for name, _ in members]} don't all match for the text {'*'.join(stars)!r}, only "
                f"{[name for name, _ in some]} do: write names with the same stars into one mapping, others into one "
                "of their own"
            )
    return [tuple(some) for some in found.values()]


def per_of(dim: int, indices: Sequence[Sequence[int]], shape: tuple[int, ...]) -> Any:
    """Return the `per` of groups along a dim: the dim, blocks, or lists of indices.

    Args:
        dim: the dim of a tensor.
        indices: the indices of each group along it.
        shape: the tensor's shape.
    """
    indices = list(map(list, indices))
    if indices == [[i] for i in range(shape[dim])]:
        return dim
    size = len(indices[0])
    even = all(own == list(range(i * size, (i + 1) * size)) for i, own in enumerate(indices))
    if even and size * len(indices) == shape[dim]:
        return (*shape[:dim], size) if prod(shape[:dim]) else (dim, tuple(map(tuple, indices)))
    return (dim, tuple(map(tuple, indices)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or bool(one == other)


def _shown(example: Any) -> str:
    parts: Iterable[Any] = example if isinstance(example, tuple) else (example,)
    shown = [setting(part) for part in parts]
    return f"({', '.join(shown)})" if isinstance(example, tuple) else shown[0]
