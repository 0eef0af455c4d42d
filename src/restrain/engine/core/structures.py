"""Find and replace a tensor in a nested output or input.

A structure is a tensor, a packed sequence, or a tuple, list, dict or dataclass of structures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Step = int | str
Way = tuple[Step, ...]  # keys from a structure to a tensor in it


def find(structure: Any, index: Step | None) -> Way | None:
    """Return the way to the first floating-point or complex tensor, within member `index` if given.

    None if there is no such tensor.
    """
    if index is None:
        return _first(structure)
    members = dict(_members(structure))
    if index not in members:
        return None
    way = _first(members[index])
    return None if way is None else (index, *way)


def _first(structure: Any) -> Way | None:
    if isinstance(structure, PackedSequence):
        return ("data",)
    if isinstance(structure, Tensor):
        return () if structure.is_floating_point() or structure.is_complex() else None
    for step, member in _members(structure):
        way = _first(member)
        if way is not None:
            return (step, *way)
    return None


def _members(structure: Any) -> list[tuple[Step, Any]]:
    if isinstance(structure, Mapping):
        return list(structure.items())
    if isinstance(structure, (tuple, list)) and not isinstance(structure, PackedSequence):
        return list(enumerate(structure))
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        return [(field.name, getattr(structure, field.name)) for field in dataclasses.fields(structure)]
    return []


def tensors(structure: Any) -> Iterator[Tensor]:
    """Yield all tensors in a structure."""
    return (tensor for _, tensor in each(structure))


def each(structure: Any) -> Iterator[tuple[Way, Tensor]]:
    """Yield all tensors in a structure, each with the path to it."""
    if isinstance(structure, Tensor):
        yield (), structure
    elif isinstance(structure, PackedSequence):
        yield ("data",), structure.data
    else:
        for step, member in _members(structure):
            for way, tensor in each(member):
                yield (step, *way), tensor


def arguments(args: tuple[Any, ...], kwargs: Mapping[Any, Any]) -> dict[Step, Any]:
    """Return the inputs of a layer as one dict: positional by number, keyword by name."""
    return {**dict(enumerate(args)), **kwargs}


def get(structure: Any, way: Way) -> Any:
    """Return the member at the end of the way."""
    for step in way:
        structure = _step(structure, step)
    return structure


def _step(structure: Any, step: Step) -> Any:
    return getattr(structure, str(step)) if _by_attribute(structure) else structure[step]


def _by_attribute(structure: Any) -> bool:
    return isinstance(structure, PackedSequence) or not isinstance(structure, (tuple, list, Mapping))


def put(structure: Any, way: Way, new: Tensor) -> Any:
    """Return a copy of the structure with `new` at the end of the way."""
    if not way:
        return new
    step, rest = way[0], way[1:]
    member = put(_step(structure, step), rest, new)
    if isinstance(structure, PackedSequence):
        return structure._replace(data=member)
    if isinstance(structure, tuple):
        members = [member if i == step else m for i, m in enumerate(structure)]
        return type(structure)(*members) if hasattr(structure, "_fields") else type(structure)(members)
    if isinstance(structure, list):
        return [member if i == step else m for i, m in enumerate(structure)]
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        return dataclasses.replace(structure, **{str(step): member})
    return type(structure)({key: member if key == step else m for key, m in structure.items()})


def rows(structure: Any, way: Way) -> tuple[Tensor | None, int]:
    """Return (sequence index of each row, number of sequences) of a packed sequence.

    (None, 0) if the way doesn't lead to the data of a packed sequence.
    """
    found = packed(structure, way)
    if found is None:
        return None, 0
    sizes = found.batch_sizes.tolist()  # number of sequences at each step, longest first
    return torch.cat([torch.arange(size, device=found.data.device) for size in sizes]), sizes[0]


def packed(structure: Any, way: Way) -> PackedSequence | None:
    """Return the packed sequence if the way leads to its data, else None."""
    if not way or way[-1] != "data":
        return None
    found = get(structure, way[:-1])
    return found if isinstance(found, PackedSequence) else None
