"""Selections of parameters and layers for rules, and their algebra.

A selection is a glob, a list of names, a compiled regex, a module, a parameter, a module type or
union of types, a predicate `f(name, tensor_or_module)`, a role (`weights`, `biases`, `norms`,
`embeddings`), or any of these joined by `&`, `|` and `-`. Activations (outputs and inputs of
layers) are selected by the same means in `activation_points`.
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
from restrain.fields import brief, is_iterable, shortened
from restrain.named_tensors import Layer, Slot, near
from restrain.torch_private import NORMALIZATIONS

Site: TypeAlias = tuple[Layer, str | None]  # a parameter's layer and key; key None for a layer

SYMBOLS = {"and": "&", "or": "|", "minus": "-"}


class Where:
    """Base of selections of parameters and modules; joined by `&`, `|` and `-`."""

    def takes(self, layer: Layer, key: str | None) -> bool:
        """Return True if it selects parameter `key` of `layer`; for `key` None, the layer."""
        raise NotImplementedError

    def takes_any(self, sites: Sequence[Site]) -> bool:
        """Return True if it selects a parameter or layer that stands at these places."""
        return any(self.takes(*site) for site in sites)

    def named(self, names: Collection[str]) -> Iterable[str] | None:
        """Return the selected names; None if the selection depends on more than names."""
        return None

    def check(self, among: Candidates) -> None:
        """Check that a list with matching members has no member that matches nothing.

        Raises:
            SelectionError: it has; similar names are listed.
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
    """Return the joins down to the leftmost selection, innermost first: for a - b - c, a - b first.

    A loop over them needs no recursion, however many there are.
    """
    nodes, kind = [], type(joined)
    while type(joined) is kind:
        nodes.append(joined)
        joined = joined.left
    return nodes[::-1]


def shown(joined: Any) -> str:
    """Return the text of joined selections."""
    nodes = spine(joined)
    rest = [f" {SYMBOLS[node.operation]} {node.right!r})" for node in nodes]
    return shortened(f"{'(' * len(nodes)}{nodes[0].left!r}{''.join(rest)}")


@dataclass(frozen=True)
class Glob(Where):
    """Names that match a shell pattern: `*` any text, `?` a character, `[ab]` a choice.

    `*` also matches dots.
    """

    pattern: str

    def named(self, names: Collection[str]) -> Iterable[str]:
        return filter(re.compile(translate(self.pattern)).match, names)

    def __repr__(self) -> str:
        return repr(self.pattern)


@dataclass(frozen=True)
class Names(Where):
    """Exactly these names, as in a bound plan."""

    names: tuple[str, ...]

    def named(self, names: Collection[str]) -> Iterable[str]:
        return [name for name in self.names if name in names]

    def check(self, among: Candidates) -> None:
        missing = [name for name in self.names if name not in among.numbers]
        if 0 < len(missing) < len(self.names):
            raise SelectionError(f"{brief(missing)}, in a list, matches nothing{near(missing[0], among.names)}")

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


# time for all names; bits per name; characters of a pattern
_SECONDS, _MOST_EFFORT, _LONGEST = 5, 22, 10_000
_REPEAT = r"(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d*\})[?+]?"
_OPEN = r"\((?:\?(?:\([^)]*\)|P?<?[=!]|P?<|P=|[>:a-zA-Z-]+))?"  # a group's opening, with its kind
_TOKEN = re.compile(
    r"\(\?#[^)]*\)|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a comment, an escape, a set of characters
    rf"|(?P<open>{_OPEN})|(?P<close>\))|(?P<or>\|)|(?P<repeat>{_REPEAT})|.",
    re.DOTALL,
)


def _effort(pattern: str, flags: int) -> float:
    """Return the log2 of the ways in which Python may try to match a name, as a bound.

    Each repetition without a bound counts as 5 bits, an optional part as one, a choice as the
    logarithm of its members. A repeated group that contains one of them counts as infinite: it can
    take exponential time in the length of the name.
    """
    if len(pattern) > _LONGEST or (flags & re.VERBOSE and "#" in pattern):
        return inf  # comments may contain brackets
    # per open group: choices and unbounded repetitions in it, members of its choice
    bits, groups = 0.0, [[0, 1]]
    last: list[int] = [0, 1]  # the group that has just been closed
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
    """Return the least and greatest number of repetitions."""
    if repeat[0] != "{":
        return {"*": (0, inf), "+": (1, inf), "?": (0, 1)}[repeat[0]]
    least, comma, most = repeat.rstrip("?+")[1:-1].partition(",")
    low = float(least or 0)
    return low, (float(most) if most else inf) if comma else low


@dataclass(frozen=True)
class OfType(Where):
    """Parameters in modules of these types, or the modules; types or class names."""

    types: tuple[type[nn.Module] | str, ...]

    def takes(self, layer: Layer, key: str | None) -> bool:
        modules = layer.chain if key is not None else layer.chain[-1:]
        return any(self._is(module) for module in modules)

    def _is(self, module: nn.Module) -> bool:
        bases = type(module).__mro__
        return any(t in bases if isinstance(t, type) else t in {b.__name__ for b in bases} for t in self.types)

    def check(self, among: Candidates) -> None:
        texts = [name for name in self.types if isinstance(name, str)]
        if len(self.types) < 2 or not texts:
            return
        modules = {m for own in among.sites for layer, key in own for m in (layer.chain if key else (layer.module,))}
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
    """A module (with all its parameters) or a parameter of the model, by identity."""

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
    """Parameters for which `function(name, tensor)` is true; layers: `function(name, module)`."""

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

    `weights` are the parameters of two axes or more of layers that multiply: not those of
    normalisation layers or embeddings, whatever their names. A weight that is tied to an embedding
    is an embedding.
    """

    role: str

    def takes(self, layer: Layer, key: str | None) -> bool:
        if key is None:
            raise SelectionError(f"rs.{self.role} selects parameters; a place is a layer: write its name or type")
        return _role(layer, key) == self.role

    def takes_any(self, sites: Sequence[Site]) -> bool:
        tied = self.role == "weights" and any(key and _role(layer, key) == "embeddings" for layer, key in sites)
        return not tied and Where.takes_any(self, sites)

    def __repr__(self) -> str:
        return f"rs.{self.role}"


weights = Role("weights")
biases = Role("biases")
norms = Role("norms")
embeddings = Role("embeddings")
ROLES = ("weights", "biases", "norms", "embeddings")


def glob(pattern: str) -> Glob:
    """Return a selection by shell pattern, to join with others: `rs.weights & rs.glob("fc*")`."""
    return Glob(pattern)


def _full(layer: Layer, key: str | None) -> str:
    return layer.name if key is None else f"{layer.name}.{key}" if layer.name else key


def as_where(given: Any) -> Where:
    """Return the selection for a glob, list, regex, module, parameter, type, union or predicate."""
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
    if is_iterable(given):
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
    """The parameters of a model, from which selections choose."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._candidates = Candidates(
            [slot.sites for slot in slots],
            {name: i for i, slot in enumerate(slots) for name in slot.names},
            [slot.name for slot in slots],
        )

    def select(self, where: Where, optional: bool = False) -> list[Slot]:
        """Return the selected parameters in the model's order.

        Args:
            where: the selection.
            optional: True if the selection, or a part of it, may match nothing.

        Raises:
            SelectionError: the selection, or a part of it, matches nothing; similar and existing
                names are listed.
        """
        taken = chosen(where, self._candidates, optional)
        if not taken and not optional:
            places = f"; the outputs of such layers are rs.outputs({where!r})" if isinstance(where, OfType) else ""
            raise SelectionError(
                f"{where!r} selects no parameter{places}{near(pattern(where), self._candidates.names)}"
            )
        slots = [self.slots[i] for i in sorted(taken)]
        if _by_role(where, "weights"):
            _check_whole(slots)
        return slots


def _by_role(where: Where, role: str) -> bool:
    """Return True if a role is part of a selection.

    Each part is looked at once, however often it is used.
    """
    left, seen = [where], set[int]()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Role) and part.role == role:
            return True
        if isinstance(part, Joined):
            left += [part.left, part.right]
    return False


def _check_whole(slots: Sequence[Slot]) -> None:
    """Refuse the length and direction of torch's old weight_norm as weights.

    Raises:
        SelectionError: there are such parameters among the slots.
    """
    parts = [slot for slot in slots if slot.attribute.endswith(("_g", "_v")) and _is_normed(slot)]
    if parts:
        names, layer = ", ".join(repr(slot.name) for slot in parts[:4]), parts[0].sites[0][0].name
        raise SelectionError(
            f"{names}: of these torch.nn.utils.weight_norm computes the weight, so rs.weights would act on its parts. "
            "Use torch.nn.utils.parametrizations.weight_norm, whose weight rules see, or leave them out: rs.weights - "
            f"rs.glob({(layer + '.' if layer else '') + 'weight_*'!r})"
        )


def _is_normed(slot: Slot) -> bool:
    base = slot.attribute[:-2]
    return {f"{base}_g", f"{base}_v"} <= set(slot.owner._parameters) and base not in slot.owner._parameters


@dataclass(frozen=True)
class Candidates:
    """The parameters or layers of a model, numbered, from which selections choose.

    Args:
        sites: (layer, key) pairs of each.
        numbers: {name: number}; a parameter may have several names.
        names: the names to list in errors.
    """

    sites: Sequence[Sequence[Site]]
    numbers: Mapping[str, int]
    names: Sequence[str]


def chosen(where: Where, among: Candidates, optional: bool = False) -> set[int]:
    """Return the numbers of the parameters or layers that a selection takes.

    A part of a joined selection that matches nothing is a misspelling: an error, unless `optional`.
    """
    if not isinstance(where, Joined):
        return _chosen(where, among, optional)
    nodes = spine(where)
    taken = chosen(nodes[0].left, among, optional)
    for node in nodes:
        more = chosen(node.right, among, optional)
        if node.operation != "and" and not optional and not (taken and more):
            part = node.right if taken else node.left
            raise SelectionError(f"{part!r}, a part of {where!r}, matches nothing{near(pattern(part), among.names)}")
        taken = {"and": taken & more, "or": taken | more, "minus": taken - more}[node.operation]
    return taken


def _chosen(where: Where, among: Candidates, optional: bool) -> set[int]:
    if not optional:
        where.check(among)
    named = where.named(among.numbers.keys())
    if named is not None:
        return {among.numbers[name] for name in named}
    return {i for i, own in enumerate(among.sites) if where.takes_any(own)}


def pattern(where: Where | None) -> str:
    """Return the text of a selection by pattern, or ""."""
    return where.pattern if isinstance(where, (Glob, Regex)) else ""
