"""Selections of activations: the outputs and inputs of layers, and their algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from restrain.errors import SelectionError
from restrain.fields import brief, is_whole
from restrain.named_tensors import Layer, near
from restrain.selections import Candidates, Glob, Object, Regex, Where, as_where, chosen, pattern, shown, spine

Calls = Literal["mean", "sum"]
Average = Literal["samples", "tokens"]
Argument = (
    str | int | Callable[..., Any]
)  # an argument of the model's forward by name or position, or a function of all


class Places:
    """Base of selections of activations; they are combined by `&`, `|` and `-`."""

    def __and__(self, other: Any) -> JoinedPlaces:
        return JoinedPlaces("and", self, _as_places(other))

    def __or__(self, other: Any) -> JoinedPlaces:
        return JoinedPlaces("or", self, _as_places(other))

    def __sub__(self, other: Any) -> JoinedPlaces:
        return JoinedPlaces("minus", self, _as_places(other))


@dataclass(frozen=True, eq=False)
class JoinedPlaces(Places):
    """Two selections of activations, combined by `&`, `|` or `-`."""

    operation: Literal["and", "or", "minus"]
    left: Places
    right: Places

    def __repr__(self) -> str:
        return shown(self)


@dataclass(frozen=True)
class Place(Places):
    """The outputs or inputs of the layers that `which` selects; see `outputs`."""

    kind: Literal["outputs", "inputs"]
    which: Where | None = None
    via: Callable[[Tensor], Tensor] | None = None
    index: int | str | None = None
    batch_dim: int | None = None
    calls: Calls = "mean"
    mask: Argument | None = None
    lengths: Argument | None = None
    average: Average = "samples"
    call: int | None = None

    @property
    def padded(self) -> bool:
        """True if a mask or lengths say which positions count."""
        return self.mask is not None or self.lengths is not None

    def __repr__(self) -> str:
        given = ["" if self.which is None else repr(self.which)]
        for key in ("via", "mask", "lengths"):
            value = getattr(self, key)
            shown = getattr(value, "__name__", value) if callable(value) else repr(value)
            given += [f"{key}={shown}"] * (value is not None)
        numbers = ("index", "batch_dim", "call")
        given += [f"{key}={getattr(self, key)!r}" for key in numbers if getattr(self, key) is not None]
        given += [f"calls={self.calls!r}"] * (self.calls != "mean")
        given += [f"average={self.average!r}"] * (self.average != "samples")
        return f"rs.{self.kind}({', '.join(filter(None, given))})"


def outputs(
    which: Any = None,
    *,
    via: Callable[[Tensor], Tensor] | None = None,
    index: int | str | None = None,
    batch_dim: int | None = None,
    calls: Calls = "mean",
    mask: Argument | None = None,
    lengths: Argument | None = None,
    average: Average = "samples",
    call: int | None = None,
) -> Place:
    """Select the outputs of layers; without an argument, the output of the whole model.

    A glob takes the outermost matching layers below the root; a type or a predicate takes all.

    Args:
        which: a glob over layer names, a list of them, a regex, a module, a type or a predicate
            f(name, module).
        via: a function such as `torch.relu`, applied to the layer's output; penalties see
            `via(output)`. It doesn't find calls of that function in the model.
        index: the position or key of a member of a tuple or dict output; by default its first
            floating-point tensor.
        batch_dim: the batch axis; by default 0, or 1 if the layer has `batch_first=False`.
        calls: the "mean" or "sum" over a layer's calls, also over those in separate forwards that
            one loss depends on.
        mask: the positions that count, to leave padding out: the name or position of an argument of
            the model's forward, or a function of all its arguments. "~" before the name inverts it.
            The mask is (batch, time), or has as many axes as the output; nonzero positions count.
        lengths: the sequence lengths, (batch,), in the same ways; instead of a mask.
        average: "samples" sums a penalty over all features of a sample, also over time, and
            averages over the batch; "tokens", for outputs (batch, time, features), averages over
            all tokens of this process's batch, those that a mask leaves.
        call: which of a layer's calls, counted from 0 over the forwards that one loss depends on;
            by default all.

    Raises:
        SelectionError: an invalid argument.

    >>> rs.outputs("relu*", calls="sum")
    rs.outputs('relu*', calls='sum')
    """
    return make_place(
        "outputs",
        which,
        via=via,
        index=index,
        batch_dim=batch_dim,
        calls=calls,
        mask=mask,
        lengths=lengths,
        average=average,
        call=call,
    )


def inputs(
    which: Any = None,
    *,
    via: Callable[[Tensor], Tensor] | None = None,
    index: int | str | None = None,
    batch_dim: int | None = None,
    calls: Calls = "mean",
    mask: Argument | None = None,
    lengths: Argument | None = None,
    average: Average = "samples",
    call: int | None = None,
) -> Place:
    """Select the inputs of layers; without an argument, the input of the whole model.

    Arguments are as in `outputs`.

    >>> rs.inputs()
    rs.inputs()
    """
    return make_place(
        "inputs",
        which,
        via=via,
        index=index,
        batch_dim=batch_dim,
        calls=calls,
        mask=mask,
        lengths=lengths,
        average=average,
        call=call,
    )


def make_place(
    kind: Literal["outputs", "inputs"],
    which: Any,
    *,
    via: Any = None,
    index: Any = None,
    batch_dim: Any = None,
    calls: Any = "mean",
    mask: Any = None,
    lengths: Any = None,
    average: Any = "samples",
    call: Any = None,
) -> Place:
    """Return the selection for the arguments of `outputs` or `inputs`.

    Raises:
        SelectionError: an invalid argument.
    """
    if not _is_word(calls, ("mean", "sum")):
        raise SelectionError(f"calls= is 'mean' or 'sum' (over the calls of one forward), got {brief(calls)}")
    if not _is_word(average, ("samples", "tokens")):
        raise SelectionError(f"average= is 'samples' or 'tokens', got {brief(average)}")
    if call is not None and not is_whole(call, 0):
        raise SelectionError(f"call= is the number of a call of the layer, from 0; got {brief(call)}")
    if call is not None and calls != "mean":
        raise SelectionError(f"call={call} is a single call: leave calls= out")
    if via is not None and not callable(via):
        raise SelectionError(f"via= is a function of the tensor, such as torch.relu; got {brief(via)}")
    if index is not None and not is_whole(index) and not isinstance(index, str):
        raise SelectionError(f"index= is the position or the key of a member of the output; got {brief(index)}")
    if batch_dim is not None and not is_whole(batch_dim):
        raise SelectionError(f"batch_dim= is the number of the batch axis, such as 0 or 1; got {brief(batch_dim)}")
    for key, value in (("mask", mask), ("lengths", lengths)):
        named = isinstance(value, str | int) and not isinstance(value, bool)
        if value is not None and not named and not callable(value):
            raise SelectionError(
                f"{key}= is the name of an argument of the model's forward, its position, or a function of all of "
                f"them; got {brief(value)}"
            )
    if mask is not None and lengths is not None:
        raise SelectionError("write mask= or lengths=, not both: they say the same")
    chosen_layers = None if which is None else as_where(which)
    return Place(kind, chosen_layers, via, index, batch_dim, calls, mask, lengths, average, call)


def _is_word(given: Any, known: Sequence[str]) -> bool:
    return isinstance(given, str) and given in known


def _as_places(given: Any) -> Places:
    if isinstance(given, Places):
        return given
    raise SelectionError(f"places join with places only, got {brief(given)}; write rs.outputs({brief(given)})")


@dataclass(frozen=True)
class Target:
    """The activation of one layer that a selection takes."""

    layer: Layer
    place: Place

    @property
    def name(self) -> str:
        """The layer's name; '' for the model itself."""
        return self.layer.name


def select_places(where: Places, layers: Sequence[Layer], optional: bool = False) -> list[Target]:
    """Return the activations that `where` selects, in the model's order, each layer once.

    Args:
        where: the selection.
        layers: all layers of the model.
        optional: allow it, or a part of it, to match nothing.

    Raises:
        SelectionError: it matches nothing, or only layers that are never called (a ModuleList).
    """
    if isinstance(where, Place):
        return _place_targets(where, layers, optional)
    nodes = spine(where)
    found = select_places(nodes[0].left, layers, optional)
    for node in nodes:
        right = select_places(node.right, layers, optional)
        if node.operation == "or":
            taken = {_tensor(target) for target in found}
            found = found + [target for target in right if _tensor(target) not in taken]
        else:
            keys = {(t.place.kind, id(t.layer.module)) for t in right}
            found = [t for t in found if ((t.place.kind, id(t.layer.module)) in keys) == (node.operation == "and")]
    return found


def _tensor(target: Target) -> tuple[Any, ...]:
    """Return a key that tells the tensors of two activations apart."""
    place = target.place
    return id(target.layer.module), place.kind, place.via, place.index, place.call


def _place_targets(place: Place, layers: Sequence[Layer], optional: bool) -> list[Target]:
    if place.which is None:
        return [Target(layers[0], place)]
    which, below = place.which, layers[1:]
    names, numbers = [layer.name for layer in below if layer.callable], {layer.name: i for i, layer in enumerate(below)}
    taken = chosen(which, Candidates([[(layer, None)] for layer in below], numbers, names), optional)
    hits = [below[i] for i in sorted(taken) if below[i].callable]
    if isinstance(which, Object) and which.target is layers[0].module:
        hits = [layers[0]]
    if isinstance(which, (Glob, Regex)):
        seen = {id(hit.module) for hit in hits}
        hits = [hit for hit in hits if not any(id(outer) in seen for outer in hit.chain[:-1])]
    targets = {id(hit.module): Target(hit, place) for hit in reversed(hits)}
    if not targets and not optional:
        why = " that is ever called (a ModuleList is not)" if taken else ""
        raise SelectionError(f"{place!r} matches no layer{why}{near(pattern(which), names)}")
    return list(reversed(targets.values()))
