"""Catches activations: one hook a layer, which evaluates its penalties at once and then applies its noise.

A penalty's value joins the loss by the plainest way that is exact where the layer runs:

* in eager code the value itself, with its graph, is kept until the loss is collected;
* where a value can't take its graph along (compiled code, reentrant checkpointing) it is added up in a tensor, and
  its gradient is injected at the layer when the loss's backward comes by (see `injection`).

Nothing is kept outside a training forward, in a recomputation, or after a forward that failed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from restrain.engine import structures
from restrain.engine.injection import Inject, recomputing_saved_tensors
from restrain.errors import CaptureError, RestrainWarning
from restrain.penalties import Penalty
from restrain.places import Place
from restrain.transforms.base import Noise

Record: TypeAlias = tuple[int, Tensor]  # the number of the forward, and what it gave


@dataclass(frozen=True)
class Spot:
    """A place in a model: a layer's name and the way to it, and what is caught there."""

    name: str
    path: tuple[str, ...]
    place: Place

    def find(self, root: nn.Module) -> nn.Module:
        """The layer."""
        for key in self.path:
            root = root._modules[key]  # type: ignore[assignment]
        return root

    def __str__(self) -> str:
        return f"{self.place.kind} of {self.name!r}" if self.name else f"{self.place.kind} of the model"


class Tap:
    """A penalty at one place, and what the forwards since the last collection gave there.

    `weight` scales its value (1 / number of places under `reduce="mean"`).
    """

    def __init__(
        self, rule: str, penalty: Penalty, spot: Spot, device: torch.device, *, mean: bool, weight: float, optional: bool
    ) -> None:
        self.rule, self.penalty, self.spot = rule, penalty, spot
        self.mean, self.weight, self.optional = mean, weight, optional
        self.records: list[Record] = []  # values with their graphs
        self.hidden: list[Record] = []  # values from inside a reentrant checkpoint, without
        self.probes: list[tuple[Tensor, int]] = []
        self.last: list[Tensor] = []  # what was last collected, without a graph
        self.copies: bool | None = None  # whether the place is overwritten by a later op; unknown before the first forward
        self.rooted = False  # whether some of the values since the last collection were hidden
        self.fired = False
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # of one entry, not 0-d: torch.compile takes 0-d float64 tensors for numbers, and what is added to them is lost
        self.total, self.count, self.cell = (torch.zeros(1, dtype=dtype, device=device) for _ in range(3))
        self.seen = self.count._version  # compiled code adds to `count` in place: no other sign, and no synchronisation

    def evaluate(self, structure: Any, way: structures.Way, module: nn.Module) -> Tensor:
        """The penalty's value on the tensor at the end of the way: over features a sum, over the batch a mean."""
        h = structures.get(structure, way)
        if not torch.compiler.is_compiling() and self.copies is not False:
            if self.copies is None:
                self.probes.append((h, h._version))
            h = h.clone()
        place = self.spot.place
        h = h if place.via is None else place.via(h)
        if self.mean:
            return self.penalty.mean(h)
        sequences = structures.sequences(structure, way)
        if sequences is not None:
            return self.penalty.over_batch(h, 0) * (h.shape[0] / sequences)
        return self.penalty.over_batch(h, _batch_dim(place.batch_dim, module, h))

    def record(self, forward: int, value: Tensor) -> None:
        """Keep a value that a forward gave."""
        if torch.is_grad_enabled():
            self.records.append((forward, value))
        else:
            self.hidden.append((forward, value))
            self.rooted = True

    def settle(self) -> None:
        """After the first forward: whether a later op overwrote the tensor in place."""
        if self.probes and self.copies is None:
            self.copies = any(h._version != version for h, version in self.probes)
            if self.copies:
                warnings.warn(
                    f"{self.rule}: the {self.spot} are overwritten by a later in-place op; the penalty acts on a copy "
                    "of it, at the price of one copy a forward (inplace=False there would spare it)",
                    RestrainWarning,
                    stacklevel=2,
                )
        self.probes.clear()

    def fired_compiled(self) -> bool:
        """Whether compiled code has added to the totals since they were last read."""
        return self.count._version != self.seen

    def clear(self) -> None:
        """Forget what was collected."""
        self.records, self.hidden, self.probes = [], [], []
        if self.fired_compiled():
            self.total.zero_()
            self.count.zero_()
            self.seen = self.count._version


def _batch_dim(given: int | None, module: nn.Module, h: Tensor) -> int | None:
    if given is not None:
        return given
    if h.dim() == 0:
        return None
    if getattr(module, "batch_first", True) is False:
        return 1 if h.dim() > 2 else None  # (time, batch, features), or (time, features) of a single sequence
    return 0


class RawTap:
    """The tensors themselves, for a penalty on the whole network."""

    def __init__(self, rule: str, spot: Spot, optional: bool) -> None:
        self.rule, self.spot, self.optional = rule, spot, optional
        self.records: list[Record] = []
        self.fired = False


class Gate(Protocol):
    """What a hook asks before it records; the attachment's `Capture`."""

    number: int
    """Which forward it is."""

    def mode(self) -> str:
        """'record', 'compiled', 'recompute' or 'off'."""


class LayerHook:
    """What happens at one layer's output: its penalties are evaluated on the clean tensor, then its noise acts.

    A copy or a pickle of a hook is dead: a copied model is free of the rules.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.taps: list[Tap] = []
        self.raws: list[RawTap] = []
        self.noises: list[tuple[Noise, Spot]] = []

    def __reduce__(self) -> tuple[type[DeadHook], tuple[()]]:
        return (DeadHook, ())

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.act(module, output) if module.training else None

    def act(self, module: nn.Module, structure: Any) -> Any:
        """The structure with penalties injected and noise added; the same object where neither was."""
        result = structure
        if self.taps or self.raws:
            mode = self.gate.mode()
            if mode != "off":
                for tap in self.taps:
                    result = self._penalize(tap, mode, module, structure, result)
                for raw in self.raws:
                    self._watch(raw, mode, structure)
        for noise, spot in self.noises:
            way = _way(structure, spot)
            result = structures.put(result, way, noise(structures.get(result, way)))
        return result

    def _penalize(self, tap: Tap, mode: str, module: nn.Module, structure: Any, result: Any) -> Any:
        way = _way(structure, tap.spot)
        if mode != "compiled" and torch._C._functorch.is_functorch_wrapped_tensor(structures.get(structure, way)):
            return result  # inside torch.func, a value can't leave
        value = tap.evaluate(structure, way, module)
        if mode == "record":
            tap.record(self.gate.number, value)
            return result
        if mode == "compiled":
            tap.total.add_(value.detach())
            tap.count.add_(1)
        elif not tap.rooted or recomputing_saved_tensors():
            return result
        return structures.put(result, way, Inject.apply(structures.get(result, way), value, tap.cell, tap.copies is not False))

    def _watch(self, raw: RawTap, mode: str, structure: Any) -> None:
        if mode == "recompute":
            return
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"{raw.rule}: the {raw.spot} are inside a reentrant checkpoint, where they have no graph; "
                "use checkpoint(..., use_reentrant=False)"
            )
        raw.records.append((self.gate.number, structures.get(structure, _way(structure, raw.spot))))


class InputHook(LayerHook):
    """The same at a layer's inputs: positional ones have numbers, keyword ones names."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        if not module.training:
            return None
        given = {**dict(enumerate(args)), **kwargs}
        result = self.act(module, given)
        if result is given:
            return None
        return tuple(result[i] for i in range(len(args))), {key: result[key] for key in kwargs}


class DeadHook:
    """What a hook becomes in a copy or a pickle of its model."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def _way(structure: Any, spot: Spot) -> structures.Way:
    way = structures.find(structure, spot.place.index)
    if way is None:
        what = "no floating-point tensor" if spot.place.index is None else f"no tensor at index={spot.place.index!r}"
        raise CaptureError(
            f"the {spot} have {what}; they are of type {type(structure).__name__}. Say which member is meant by "
            "index=, or select another layer (of token ids, the embedding's outputs)"
        )
    return way
