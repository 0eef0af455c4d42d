"""Where a rule acts: selections of parameters and of layers, and their algebra.

A selection is a glob, a list of names, a compiled regex, a module, a parameter, a module type or union of types,
a predicate `f(name, tensor_or_module)`, a role (`weights`, `biases`, `norms`, `embeddings`), or any of these
joined by `&`, `|` and `-`. Places (layer outputs and inputs) are selected by the same means in `places`.
"""

from __future__ import annotations

import re
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from math import inf, log2
from typing import Any, Literal, TypeAlias, Union, get_origin

from torch import Tensor, nn

from restrain.errors import SelectionError
from restrain.fields import brief, shortened
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

    def check(self, there: There) -> None:
        """Refuse a list in which a name stands that there isn't, beside others that there are.

        Raises:
            SelectionError: so it is; near names are listed.
        """

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
        return shown(self)


def spine(joined: Any) -> list[Any]:
    """The joins on the way to the leftmost selection, the innermost first: of a - b - c that of a - b, then the whole.

    Whoever goes along it needs no call for each of a thousand.
    """
    nodes, kind = [], type(joined)
    while type(joined) is kind:
        nodes.append(joined)
        joined = joined.left
    return nodes[::-1]


def shown(joined: Any) -> str:
    """The text of joined selections."""
    nodes = spine(joined)
    rest = [f" {SYMBOLS[node.operation]} {node.right!r})" for node in nodes]
    return shortened(f"{'(' * len(nodes)}{nodes[0].left!r}{''.join(rest)}")


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

    def check(self, there: There) -> None:
        missing = [name for name in self.names if name not in there.numbers]
        if 0 < len(missing) < len(self.names):
            raise SelectionError(f"{brief(missing)}, in a list, matches nothing{near(missing[0], there.names)}")

    def __repr__(self) -> str:
        return shortened(repr(list(self.names)))


@dataclass(frozen=True)
class Regex(Where):
    """Names in which the regular expression is found (`re.search`)."""

    pattern: str
    flags: int = re.compile("").flags

    def __post_init__(self) -> None:
        if _effort(self.pattern, self.flags) > _MOST_EFFORT:
            raise SelectionError(
                f"re.compile({brief(self.pattern)}) could take endless time: it repeats a group with a repetition or "
                "choice in it, has too many of these in a row, or comments. Write a glob, a list of names, or a "
                "predicate f(name, tensor)"
            )

    def named(self, names: Collection[str]) -> Iterator[str]:
        found, end = re.compile(self.pattern, self.flags).search, time.monotonic() + _SECONDS
        for name in names:
            if found(name):
                yield name
            if time.monotonic() > end:
                raise SelectionError(
                    f"{self!r} takes longer than {_SECONDS} s for {len(names)} names, by going back and forth: write a "
                    "glob, or a pattern with fewer repetitions"
                )

    def __repr__(self) -> str:
        given = re.RegexFlag(self.flags & ~re.UNICODE)
        flags = [f"re.{flag.name}" for flag in re.RegexFlag if flag in given and flag.name is not None]
        return f"re.compile({', '.join([repr(self.pattern), *[' | '.join(flags)] * bool(flags)])})"


_SECONDS, _MOST_EFFORT, _LONGEST = 5, 22, 10_000  # for all names; bits, for each of them; characters of a pattern
_REPEAT = r"(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d*\})[?+]?"
_OPEN = r"\((?:\?(?:\([^)]*\)|P?<?[=!]|P?<|P=|[>:a-zA-Z-]+))?"  # a group, with what says of which kind it is
_TOKEN = re.compile(
    r"\(\?#[^)]*\)|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a comment, an escape, a set of characters
    rf"|(?P<open>{_OPEN})|(?P<close>\))|(?P<or>\|)|(?P<repeat>{_REPEAT})|.",
    re.DOTALL,
)


def _effort(pattern: str, flags: int) -> float:
    """Two to which power a regular expression may have to go through ways to match a name, as Python does it.

    Each repetition of open length counts as 5 bits, an optional part as one, a choice as the logarithm of its members.
    What is repeated may hold neither: that takes exponential time in the length of the name.
    """
    if len(pattern) > _LONGEST or (flags & re.VERBOSE and "#" in pattern):
        return inf  # there may be brackets in comments
    bits, groups = 0.0, [[0, 1]]  # of each open group: choices and open repetitions in it, and members of its choice
    last: list[int] = [0, 1]  # the group that has just ended
    for token in _TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind == "open":
            groups.append([0, 1])
        elif kind == "close" and len(groups) > 1:
            last = groups.pop()
            bits += log2(last[1])
            groups[-1][0] += last[0]
            continue
        elif kind == "or":
            groups[-1][0] += 1
            groups[-1][1] += 1
        elif kind == "repeat":
            least, most = _times(token[0])
            if most > 1 and last[0]:
                return inf
            bits += 5 if most - least > 1 else most - least
            groups[-1][0] += most > least
        last = [0, 1]
    return bits


def _times(repeat: str) -> tuple[float, float]:
    """How often at least and at most."""
    if repeat[0] != "{":
        return {"*": (0, inf), "+": (1, inf), "?": (0, 1)}[repeat[0]]
    least, comma, most = repeat.rstrip("?+")[1:-1].partition(",")
    low = float(least or 0)
    return low, (float(most) if most else inf) if comma else low


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

    def check(self, there: There) -> None:
        texts = [name for name in self.types if isinstance(name, str)]
        if len(self.types) < 2 or not texts:
            return
        modules = {m for own in there.sites for layer, key in own for m in (layer.chain if key else (layer.module,))}
        known = {base.__name__ for kind in set(map(type, modules)) for base in kind.__mro__}
        missing = [name for name in texts if name not in known and not hasattr(nn, name)]
        if missing:
            raise SelectionError(
                f"{brief(missing)}, in a list of types, matches nothing{near(missing[0], sorted(known - {'object'}))}"
            )

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
        if not isinstance(given.pattern, str):
            raise SelectionError(f"names are text, and {given!r} is of bytes: write re.compile({'...'!r})")
        return Regex(given.pattern, given.flags)
    if isinstance(given, (nn.Module, Tensor)):
        return Object(given)
    union = isinstance(given, types.UnionType) or get_origin(given) is Union
    types_of = given.__args__ if union else (given,)
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
        self._there = There(
            [slot.sites for slot in slots],
            {name: i for i, slot in enumerate(slots) for name in slot.names},
            [slot.name for slot in slots],
        )

    def select(self, where: Where, optional: bool = False) -> list[Slot]:
        """Those that it selects, in the model's order.

        Args:
            where: the selection.
            optional: whether it, or a part of it, may match nothing.

        Raises:
            SelectionError: it, or a part of it, matches nothing; near names and what there is are listed.
        """
        taken = chosen(where, self._there, optional)
        if not taken and not optional:
            places = f"; the outputs of such layers are rs.outputs({where!r})" if isinstance(where, OfType) else ""
            raise SelectionError(f"{where!r} selects no parameter{places}{near(pattern(where), self._there.names)}")
        return [self.slots[i] for i in sorted(taken)]


@dataclass(frozen=True)
class There:
    """What a model has to be selected from, parameters or layers, by their numbers.

    Args:
        sites: where each of them stands.
        numbers: {name: number}; one may have several names.
        names: those that an error tells of.
    """

    sites: Sequence[Sequence[Site]]
    numbers: Mapping[str, int]
    names: Sequence[str]


def chosen(where: Where, there: There, optional: bool = False) -> set[int]:
    """The numbers of the parameters or layers that a selection takes.

    A member of a list, or what is to be left out, that matches nothing is a misspelling: an error, unless `optional`.
    """
    if not isinstance(where, Joined):
        return _chosen(where, there, optional)
    nodes = spine(where)
    taken = chosen(nodes[0].left, there, optional)
    for node in nodes:
        more = chosen(node.right, there, optional)
        if node.operation != "and" and not optional and not (taken and more):
            part = node.right if taken else node.left
            raise SelectionError(f"{part!r}, a part of {where!r}, matches nothing{near(pattern(part), there.names)}")
        taken = {"and": taken & more, "or": taken | more, "minus": taken - more}[node.operation]
    return taken


def _chosen(where: Where, there: There, optional: bool) -> set[int]:
    if not optional:
        where.check(there)
    named = where.named(there.numbers.keys())
    if named is not None:
        return {there.numbers[name] for name in named}
    return {i for i, own in enumerate(there.sites) if any(where.takes(*site) for site in own)}


def pattern(where: Where | None) -> str:
    """The text that a selection by pattern has."""
    return where.pattern if isinstance(where, (Glob, Regex)) else ""
