"""Layouts: the meaning of each axis of a parameter, known for layers or declared by `layout`.

A layout has a word for each axis: `out` and `in` for the outputs and inputs that a weight connects,
`kernel` for positions within the weights of one output and input, and any other word for an axis
that numbers separate matrices, such as `expert`, `relation` or `head`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from restrain.errors import PlanError
from restrain.fields import brief

Axes = tuple[str, ...]

WITHIN = ("out", "in", "kernel")
"""Words of axes within one matrix; axes of other words number separate matrices."""

SAME = {"filter": "out", "channel": "in"}
"""Synonyms, by the words that they stand for."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OUT_FIRST = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_CONVOLUTIONS)
_IN_FIRST = (nn.Embedding, nn.EmbeddingBag, *_TRANSPOSED)

# Layers of other packages: (package, end of the class's name) → {(parameter, rank): layout}
_FOREIGN: dict[tuple[str, str], dict[tuple[str, int], str]] = {
    ("transformers", "Experts"): {
        ("gate_up_proj", 3): "expert out in",
        ("up_proj", 3): "expert out in",
        ("gate_proj", 3): "expert out in",
        ("down_proj", 3): "expert out in",
        ("gate_up_proj_bias", 2): "expert out",
        ("down_proj_bias", 2): "expert out",
    },
    ("transformers", "Router"): {("weight", 2): "out in"},
    ("torch_geometric", "HeteroLinear"): {("weight", 3): "type in out"},
    ("torch_geometric", "Linear"): {("weight", 2): "out in"},
    ("torch_geometric", "RGCNConv"): {("weight", 3): "relation in out", ("root", 2): "in out"},
    ("torch_geometric", "RGATConv"): {("weight", 3): "relation in out"},
}
# Classes with weights (expert, in, out), for releases of transformers without `is_transposed`
_INPUTS_FIRST = ("GptOssExperts", "Llama4TextExperts")


@dataclass(frozen=True)
class Layouts:
    """Layouts by globs over parameter names; the last glob that matches counts."""

    by_name: tuple[tuple[str, Axes], ...] = ()

    def find(self, names: Sequence[str]) -> Axes | None:
        """Return the layout for a parameter with these names; None if no glob matches."""
        for pattern, axes in reversed(self.by_name):
            if any(fnmatchcase(name, pattern) for name in names):
                return axes
        return None


NONE = Layouts()

_names: dict[str, Axes] = {}  # of every model
_types: dict[type[nn.Module], dict[str, Axes]] = {}
_ATTRIBUTE = "_restrain_layouts"  # of a module: plain data, which copies and pickles keep
# Layouts of attached plans, by model
_plans: weakref.WeakKeyDictionary[nn.Module, Layouts] = weakref.WeakKeyDictionary()
_words: set[str] = {*WITHIN, *SAME, "expert", "relation", "type"}


def layout(where: str | type[nn.Module] | nn.Module, axes: str | None = None, /, **parameters: str) -> None:
    """Declare the meaning of parameters' axes, for all rules that are attached afterwards.

    Each axis has a word: `out`, `in`, `kernel` for positions within a weight, any other word for
    an axis that numbers separate matrices. Then `per="out"` is one group for each output of each
    matrix, and `per="expert"` one for each expert; penalties and constraints of matrices act on
    each matrix. A later declaration replaces an earlier one. A plan's layouts take precedence over
    a module's, which take precedence over layouts by name and then by type.

    Args:
        where: a glob over parameter names, which holds in every model for parameters with as many
            axes; or a module type, or a module.
        axes: for a glob, the words, such as "expert out in".
        parameters: for a type or a module, the words of each parameter by its attribute name.

    Raises:
        PlanError: an argument has another type, or words are no layout.

    >>> experts = nn.ParameterDict({"up": torch.ones(2, 3, 4)})
    >>> rs.layout(experts, up="expert out in")
    >>> rule = rs.MaxNorm(1.0, per="out").on("up")
    >>> reg = rs.attach(experts, rule, torch.optim.SGD(experts.parameters()))
    >>> experts["up"].detach().norm(dim=2)
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    if isinstance(where, str):
        if axes is None or parameters:
            raise PlanError(f"of names, a layout is written as rs.layout({where!r}, 'expert out in')")
        _names.pop(where, None)  # so that the last declared is last
        _names[where] = checked_axes(axes, where)
        return
    is_type = isinstance(where, type) and issubclass(where, nn.Module)
    if not (is_type or isinstance(where, nn.Module)) or axes is not None or not parameters:
        raise PlanError(
            "rs.layout takes a glob and words, as in rs.layout('experts.*', 'expert out in'), or a module or its type "
            f"and words for each parameter, as in rs.layout(Experts, weight='expert out in'); got {brief(where)}"
        )
    words = {name: checked_axes(text, name) for name, text in parameters.items()}
    if is_type:
        _types.setdefault(where, {}).update(words)  # type: ignore[arg-type]
    else:
        vars(where).setdefault(_ATTRIBUTE, {}).update(words)


def checked_axes(words: Any, name: str) -> Axes:
    """Return the words of a layout.

    Raises:
        PlanError: `words` isn't a text of words, or has a word other than kernel twice.
    """
    found = tuple([SAME.get(word, word) for word in words.split()]) if isinstance(words, str) else ()
    once = [word for word in found if word != "kernel"]
    if not found or not all(word.isidentifier() for word in found) or len(set(once)) < len(once):
        raise PlanError(
            f"the layout of {name!r} is a word for each axis, each once (but kernel), such as 'expert out in' or "
            f"'out in kernel kernel'; got {brief(words)}"
        )
    _words.update(found)
    return found


def read_layouts(data: Any) -> Layouts:
    """Return the layouts of plan data, a mapping from globs to words.

    Raises:
        PlanError: the data are of another form.
    """
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise PlanError(f"layouts are {{'experts.*': 'expert out in'}}, words for each glob; got {brief(data)}")
    return Layouts(tuple((name, checked_axes(words, name)) for name, words in data.items()))


def write_layouts(layouts: Layouts) -> dict[str, str]:
    """Return layouts as plan data."""
    return {name: " ".join(axes) for name, axes in layouts.by_name}


def attach_layouts(root: nn.Module, layouts: Layouts) -> None:
    """Declare a plan's layouts for one model; no change if the plan has none."""
    if layouts.by_name:
        _plans[root] = layouts


def is_word(word: str) -> bool:
    """Return True if a layout has an axis of this name."""
    return word in _words


def axes_of(owner: nn.Module, attribute: str, names: Iterable[str], root: nn.Module, rank: int | None) -> Axes | None:
    """Return a parameter's declared layout, else the known one of its layer's type, else None.

    The rank of a lazy parameter is None.

    Raises:
        PlanError: a declared layout has another number of axes.
    """
    names = list(names)
    attribute = base_name(attribute)
    of_any = Layouts(tuple([(name, axes) for name, axes in _names.items() if rank in (None, len(axes))]))
    found = _plans.get(root, NONE).find(names) or vars(owner).get(_ATTRIBUTE, {}).get(attribute)
    found = found or of_any.find(names) or _of_type(owner, attribute)
    if found is not None and rank is not None and len(found) != rank:
        raise PlanError(f"the layout {' '.join(found)!r} has {len(found)} axes, and {names[0]!r} has {rank}")
    return found if found is not None else _foreign(owner, attribute, rank)


def base_name(attribute: str) -> str:
    """Return the attribute without the suffixes of old weight_norm, spectral_norm and pruning."""
    for suffix in ("_orig", "_v", "_g"):
        if attribute.startswith("weight") and attribute.endswith(suffix):
            return attribute.removesuffix(suffix)
    return attribute


def knows(owner: nn.Module | None) -> bool:
    """Return True for torch's and Hugging Face's layers whose first two axes are out and in."""
    return owner is None or isinstance(owner, (*_OUT_FIRST, *_IN_FIRST)) or is_hf_conv1d(owner)


def inputs_first(owner: nn.Module | None) -> bool:
    """Return True for layers whose weight has the inputs as its first axis."""
    return isinstance(owner, _IN_FIRST) or is_hf_conv1d(owner)


def is_hf_conv1d(owner: nn.Module | None) -> bool:
    """Return True for Hugging Face's Conv1D, a linear layer with weight (in, out)."""
    return any(base.__name__ == "Conv1D" for base in type(owner).__mro__)


def _of_type(owner: nn.Module, attribute: str) -> Axes | None:
    declared = (_types.get(base, {}).get(attribute) for base in type(owner).__mro__)
    return next((axes for axes in declared if axes is not None), None)


def _foreign(owner: nn.Module, attribute: str, rank: int | None) -> Axes | None:
    for base in type(owner).__mro__:
        for (package, end), layouts in _FOREIGN.items():
            if base.__module__.split(".")[0] == package and base.__name__.endswith(end):
                words = layouts.get((attribute, rank or 0))
                if words is None:
                    return None
                swapped = end == "Experts" and getattr(owner, "is_transposed", base.__name__ in _INPUTS_FIRST)
                return ("expert", "in", "out") if swapped and rank == 3 else tuple(words.split())
    return None
