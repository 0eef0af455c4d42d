"""Where a rule acts: selections of parameters and of layers, and their algebra.

A selection is a glob, a list of names, a compiled regex, a module, a parameter, a module type or union of types,
a predicate `f(name, tensor_or_module)`, a role (`weights`, `biases`, `norms`, `embeddings`), or any of these
joined by `&`, `|` and `-`. Places (layer outputs and inputs) are selected by the same means in `places`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from restrain.errors import SelectionError
from restrain.named_tensors import Layer, Slot, near
from restrain.torch_private import NORMALIZATIONS

Site: TypeAlias = tuple[Layer, str | None]  # a parameter's layer and its key there; of a layer itself, None

SYMBOLS = {"and": "&", "or": "|", "minus": "-"}


class Where:
    """Base of the selections of parameters and modules; joins with others by `&`, `|` and `-`."""

    def takes(self, layer: Layer, key: str | None) -> bool:
        """Whether it selects the parameter `key` of `layer`; with `key` None, whether it selects the layer."""
        raise NotImplementedError

    def named(self, names: Collection[str]) -> Iterable[str] | None:
        """Those of the names that it takes; None if it looks at more than names."""
        return None

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

    def named(self, names: Collection[str]) -> Iterable[str]:
        return filter(re.compile(translate(self.pattern)).match, names)

    def __repr__(self) -> str:
        return repr(self.pattern)


@dataclass(frozen=True)
class Names(Where):
    """Exactly these names: what a bound plan is written with."""

    names: tuple[str, ...]

    def named(self, names: Collection[str]) -> Iterable[str]:
        return [name for name in self.names if name in names]

    def __repr__(self) -> str:
        return repr(list(self.names))


@dataclass(frozen=True)
class Regex(Where):
    """Names in which the regular expression is found (`re.search`)."""

    pattern: str
    flags: int = re.compile("").flags

    def named(self, names: Collection[str]) -> Iterable[str]:
        return filter(re.compile(self.pattern, self.flags).search, names)

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
    *NORMALIZATIONS,
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


class Parameters:
    """The parameters of a model, of which selections take some."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._sites, self._names = [slot.sites for slot in slots], [slot.name for slot in slots]
        self._numbers = {name: i for i, slot in enumerate(slots) for name in slot.names}

    def select(self, where: Where) -> list[Slot]:
        """Those that it selects, in the model's order.

        Raises:
            SelectionError: it, or a part of it, matches nothing; near names and what there is are listed.
        """
        taken = chosen(where, self._sites, self._numbers, self._names)
        if not taken:
            places = f"; the outputs of such layers are rs.outputs({where!r})" if isinstance(where, OfType) else ""
            raise SelectionError(f"{where!r} selects no parameter{places}{near(_pattern(where), self._names)}")
        return [self.slots[i] for i in sorted(taken)]


def chosen(where: Where, sites: Sequence[Sequence[Site]], numbers: Mapping[str, int], names: Sequence[str]) -> set[int]:
    """The numbers of the parameters or layers that a selection takes.

    A member of a list, or what is to be left out, that matches nothing is a misspelling: an error.

    Args:
        where: the selection.
        sites: where each of them stands.
        numbers: {name: number}; one may have several names.
        names: those that an error tells of.
    """
    if not isinstance(where, Joined):
        named = where.named(numbers.keys())
        if named is not None:
            return {numbers[name] for name in named}
        return {i for i, own in enumerate(sites) if any(where.takes(*site) for site in own)}
    left, right = (chosen(side, sites, numbers, names) for side in (where.left, where.right))
    if where.operation == "and":
        return left & right
    for side, taken in ((where.left, left), (where.right, right)):
        if not taken:
            raise SelectionError(f"{side!r}, a part of {where!r}, matches nothing{near(_pattern(side), names)}")
    return left | right if where.operation == "or" else left - right


def _pattern(where: Where) -> str:
    return where.pattern if isinstance(where, (Glob, Regex)) else ""
