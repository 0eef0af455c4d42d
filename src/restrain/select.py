"""Where a rule acts: selections of parameters and of layers, and their algebra.

A selection is a glob, a list of names, a compiled regex, a module, a parameter, a module type or union of types,
a predicate `f(name, tensor_or_module)`, a role (`weights`, `biases`, `norms`, `embeddings`), or any of these
joined by `&`, `|` and `-`. Places (layer outputs and inputs) are selected by the same means in `places`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from typing import Any, Literal

from torch import Tensor, nn

from restrain.errors import SelectionError
from restrain.sites import Layer, Slot, near

SYMBOLS = {"and": "&", "or": "|", "minus": "-"}


class Where:
    """Base of the selections of parameters and modules; joins with others by `&`, `|` and `-`."""

    def takes(self, layer: Layer, key: str | None) -> bool:
        """Whether it selects the parameter `key` of `layer`; with `key` None, whether it selects the layer."""
        raise NotImplementedError

    def __and__(self, other: Any) -> Joined:
        return Joined("and", self, as_where(other))

    def __rand__(self, other: Any) -> Joined:
        return Joined("and", as_where(other), self)

    def __or__(self, other: Any) -> Joined:
        return Joined("or", self, as_where(other))

    def __ror__(self, other: Any) -> Joined:
        return Joined("or", as_where(other), self)

    def __sub__(self, other: Any) -> Joined:
        return Joined("minus", self, as_where(other))

    def __rsub__(self, other: Any) -> Joined:
        return Joined("minus", as_where(other), self)


@dataclass(frozen=True, eq=False)
class Joined(Where):
    """Two selections joined by `&`, `|` or `-`."""

    operation: Literal["and", "or", "minus"]
    left: Where
    right: Where

    def __repr__(self) -> str:
        return f"({self.left!r} {SYMBOLS[self.operation]} {self.right!r})"


@dataclass(frozen=True)
class Glob(Where):
    """Names that match a shell pattern: `*` any text (dots too), `?` one character, `[ab]` a choice."""

    pattern: str

    def takes(self, layer: Layer, key: str | None) -> bool:
        return fnmatchcase(_full(layer, key), self.pattern)

    def taken(self, names: Sequence[Sequence[str]]) -> list[int]:
        """The numbers of those any of whose names it matches."""
        match = re.compile(translate(self.pattern)).match
        return [i for i, own in enumerate(names) if match(own[0]) or any(map(match, own[1:]))]

    def __repr__(self) -> str:
        return repr(self.pattern)


@dataclass(frozen=True)
class Names(Where):
    """Exactly these names: what a bound plan is written with."""

    names: tuple[str, ...]

    def takes(self, layer: Layer, key: str | None) -> bool:
        return _full(layer, key) in self.names

    def __repr__(self) -> str:
        return repr(list(self.names))


@dataclass(frozen=True)
class Regex(Where):
    """Names in which the regular expression is found (`re.search`)."""

    pattern: str
    flags: int = re.compile("").flags

    def takes(self, layer: Layer, key: str | None) -> bool:
        return re.search(self.pattern, _full(layer, key), self.flags) is not None

    def __repr__(self) -> str:
        return f"re.compile({self.pattern!r})"


@dataclass(frozen=True)
class OfType(Where):
    """The parameters in modules of these types, or the modules themselves; types may be given by class name."""

    types: tuple[type[nn.Module] | str, ...]

    def takes(self, layer: Layer, key: str | None) -> bool:
        modules = layer.chain if key is not None else layer.chain[-1:]
        return any(self._is(module) for module in modules)

    def _is(self, module: nn.Module) -> bool:
        bases = type(module).__mro__
        return any(t in bases if isinstance(t, type) else t in {b.__name__ for b in bases} for t in self.types)

    def __repr__(self) -> str:
        return " | ".join(t.__name__ if isinstance(t, type) else t for t in self.types)


@dataclass(frozen=True, eq=False)
class Object(Where):
    """A module (with all its parameters) or a parameter of the model itself, by identity."""

    target: nn.Module | Tensor

    def takes(self, layer: Layer, key: str | None) -> bool:
        if isinstance(self.target, Tensor):
            return key is not None and layer.module._parameters.get(key) is self.target
        modules = layer.chain if key is not None else layer.chain[-1:]
        return any(m is self.target for m in modules)

    def __repr__(self) -> str:
        shape = f" of shape {tuple(self.target.shape)}" if isinstance(self.target, Tensor) else ""
        return f"<this {type(self.target).__name__}{shape}>"


@dataclass(frozen=True, eq=False)
class Predicate(Where):
    """What `function(name, tensor)` (for places: `function(name, module)`) is true of."""

    function: Callable[[str, Any], bool]

    def takes(self, layer: Layer, key: str | None) -> bool:
        subject = layer.module if key is None else getattr(layer.module, key)
        return bool(self.function(_full(layer, key), subject))

    def __repr__(self) -> str:
        return f"<predicate {getattr(self.function, '__name__', self.function)!s}>"


_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def _role(layer: Layer, key: str) -> str:
    """The role of a parameter, from the type of its module, its own name and its rank."""
    module, kind, tensor = layer.module, type(layer.module).__name__, layer.module._parameters.get(key)
    rank = 2 if tensor is None or nn.parameter.is_lazy(tensor) else tensor.dim()
    if "bias" in key:
        return "biases"
    if isinstance(module, _NORMS) or (re.search(r"norm", kind, re.IGNORECASE) and rank < 2):
        return "norms"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "embed" in f"{kind} {key}".lower():
        return "embeddings"
    return "weights" if rank >= 2 or isinstance(module, nn.modules.linear.Linear) else "others"


@dataclass(frozen=True)
class Role(Where):
    """Parameters by what they do: `weights`, `biases`, `norms` or `embeddings`.

    `weights` are the parameters of rank two or more of layers that multiply: not those of normalisation layers or
    embeddings, whatever these are called; a tied weight that some layer multiplies by is one.
    """

    role: str

    def takes(self, layer: Layer, key: str | None) -> bool:
        if key is None:
            raise SelectionError(f"rs.{self.role} selects parameters; a place is a layer: write its name or type")
        return _role(layer, key) == self.role

    def __repr__(self) -> str:
        return f"rs.{self.role}"


weights = Role("weights")
biases = Role("biases")
norms = Role("norms")
embeddings = Role("embeddings")
ROLES = ("weights", "biases", "norms", "embeddings")


def glob(pattern: str) -> Glob:
    """A selection by shell pattern, to be joined with others: `rs.weights & rs.glob("fc*")`."""
    return Glob(pattern)


def _full(layer: Layer, key: str | None) -> str:
    return layer.name if key is None else f"{layer.name}.{key}" if layer.name else key


def as_where(given: Any) -> Where:
    """The selection that a glob, list, regex, module, parameter, type, union of types or predicate stands for."""
    if isinstance(given, Where):
        return given
    if isinstance(given, str):
        return Glob(given)
    if isinstance(given, re.Pattern):
        return Regex(given.pattern, given.flags)
    if isinstance(given, (nn.Module, Tensor)):
        return Object(given)
    types_of = given.__args__ if isinstance(given, types.UnionType) else (given,)
    if all(isinstance(t, type) for t in types_of):
        if not all(issubclass(t, nn.Module) for t in types_of):
            raise SelectionError(f"expected a type of nn.Module, got {given!r}")
        return OfType(tuple(types_of))
    if isinstance(given, Iterable):
        members = [as_where(member) for member in given]
        if not members:
            raise SelectionError("an empty list selects nothing; write what the rule is to act on")
        joined = members[0]
        for member in members[1:]:
            joined = joined | member
        return joined
    if callable(given):
        return Predicate(given)
    raise SelectionError(
        f"can't select by {given!r}; expected a glob, a list of them, a compiled regex, a module, a parameter, a "
        "module type, a predicate f(name, tensor) or a role such as rs.weights; places (rs.outputs, rs.inputs) don't "
        "join with parameters: write one rule for each"
    )


def select_parameters(where: Where, slots: Sequence[Slot]) -> list[Slot]:
    """The parameters that `where` selects, in the model's order.

    Raises:
        SelectionError: it, or a part of it, matches nothing; near names and what there is are listed.
    """
    names = [slot.name for slot in slots]

    def matches(leaf: Where) -> list[int]:
        if type(leaf) is Glob:
            return leaf.taken([slot.names for slot in slots])
        return [i for i, slot in enumerate(slots) if any(leaf.takes(*site) for site in slot.sites)]

    taken = chosen(where, matches, names)
    if not taken:
        places = f"; the outputs of such layers are rs.outputs({where!r})" if isinstance(where, OfType) else ""
        raise SelectionError(f"{where!r} selects no parameter{places}{near(_pattern(where), names)}")
    return [slots[i] for i in sorted(taken)]


def chosen(where: Where, matches: Callable[[Where], list[int]], names: Sequence[str]) -> set[int]:
    """The numbers that a selection takes, given those that each of its leaves matches.

    A member of a list, or what is to be left out, that matches nothing is a misspelling: an error.
    """
    if not isinstance(where, Joined):
        return set(matches(where))
    left, right = (chosen(side, matches, names) for side in (where.left, where.right))
    if where.operation == "and":
        return left & right
    for side, taken in ((where.left, left), (where.right, right)):
        if not taken:
            raise SelectionError(f"{side!r}, a part of {where!r}, matches nothing{near(_pattern(side), names)}")
    return left | right if where.operation == "or" else left - right


def _pattern(where: Where) -> str:
    return where.pattern if isinstance(where, (Glob, Regex)) else ""
