"""Catches activations: one hook a layer, which evaluates its penalties at once and then applies its noise.

A penalty's value joins the loss by the plainest way that is exact where the layer runs:

* in eager code the value itself, with its graph, is kept until the loss is collected;
* where a value can't take its graph along (compiled code, reentrant checkpointing) it is added up in a tensor, and
  its gradient is injected at the layer when the loss's backward comes by (see `injection`).

Nothing is kept outside a training forward, in a recomputation, or after a forward that failed.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from restrain.engine import structures
from restrain.engine.draws import Draws
from restrain.engine.hanging import Hook
from restrain.engine.injection import Inject, recomputing_saved_tensors
from restrain.engine.padding import Inputs
from restrain.engine.taps import Spot, Tap, Watch, batch_dim
from restrain.errors import CaptureError, RestrainWarning
from restrain.penalties.wrapped import wrapped
from restrain.transforms.base import Noise
from restrain.transforms.layout import Layout


class Gate(Protocol):
    """What a hook asks before it records; the attachment's `Capture`."""

    def forward_of(self, tensor: Tensor) -> int:
        """The number of the forward that gave the tensor."""

    def mode(self) -> str:
        """'record', 'compiled', 'recompute' or 'off'."""

    number: int  # of the forward that runs

    def plain(self) -> bool:
        """Whether a layer is called in a training forward in eager code, and nothing else is going on."""

    def passes(self, mode: str) -> bool:
        """Whether another tensor may go on in the place of a layer's output."""

    def inputs(self) -> Inputs | None:
        """What the model's forward was called with; None outside of one."""


class Probe(Protocol):
    """What looks at a place for a derivative; the `Seen` and `Moved` of `derivative`."""

    def act(self, module: nn.Module, structure: Any, result: Any) -> Any:
        """The result, or one with another tensor at the place."""


class LayerHook(Draws, Hook):
    """What happens at one layer's output: its penalties are evaluated on the clean tensor, then its noise acts.

    Inside `rs.sampling` its noise alone, in whatever mode the layer is.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        self.taps: list[Tap] = []
        self.raws: list[Watch] = []
        self.probes: list[Probe] = []
        self.noises: list[tuple[Noise, Spot]] = []
        self.lone: Tap | None = None  # the one thing that happens here, if it is a simple one

    @property
    def random(self) -> bool:
        """Whether there is noise here."""
        return bool(self.noises)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.lone is not None and module.training and self.gate.plain() and not self.sampling.depth:
            found = self.lone.on_the_way(output, (), module) if type(output) is Tensor else None
            if found is not None:
                self.lone.keep(self.gate.number, *found[1:])
                return found[0]
        return self.act(module, output, args, kwargs) if self.draws(module) else None

    def act(self, module: nn.Module, structure: Any, args: Any, kwargs: Any) -> Any:
        """The structure with penalties injected and noise added; the same object where neither was."""
        result = structure
        if (self.taps or self.raws) and not self.sampling.depth:
            mode = self.gate.mode()
            if mode != "off":
                for tap in self.taps:
                    result = self._penalize(tap, mode, module, structure, result)
                for raw in self.raws:
                    self._watch(raw, mode, structure)
        if self.probes and not torch.compiler.is_compiling():
            for probe in self.probes:
                result = probe.act(module, structure, result)
        for noise, spot in self.noises:
            way = way_to(structure, spot)
            x = structures.get(result, way)
            layout = Layout(
                batch_dim(spot.place.batch_dim, module, x),
                *structures.rows(structure, way),
                module,
                structures.arguments(args, kwargs),
            )
            result = structures.put(result, way, noise.at(x, layout))
        return result

    def _penalize(self, tap: Tap, mode: str, module: nn.Module, structure: Any, result: Any) -> Any:
        way = way_to(structure, tap.spot)
        if mode == "recompute" and wrapped(structures.get(structure, way)):
            return result
        inputs = None
        if tap.spot.place.padded:
            if mode != "recompute" or recomputing_saved_tensors():
                inputs = self.gate.inputs()
            if inputs is None:
                return result  # a layer that is called alone: which positions count isn't known
        if mode != "recompute":
            with torch.no_grad():  # a graph would be missed in a checkpoint's recomputation
                for activity in tap.activities:
                    activity.add(tap.spot.seen(structures.get(structure, way)))
        h = structures.get(result, way)
        passed = tap.on_the_way(h, way, module) if self.gate.passes(mode) else None
        if passed is not None:
            if mode == "record":
                tap.keep(self.gate.forward_of(structures.get(structure, way)), *passed[1:])
            return result if passed[0] is h else passed[0]
        value = tap.evaluate(structure, way, module, inputs)
        if mode == "record":
            tap.record(self.gate.forward_of(structures.get(structure, way)), value)
            return result
        if mode == "compiled":
            if tap.total.device != value.device:
                raise CaptureError(
                    "the model was moved to another device after its rules were attached: attach after .to(...)"
                )
            tap.total.add_(torch.cat([value.detach().reshape(1), value.new_ones(1)]))
        elif not tap.rooted or recomputing_saved_tensors():
            return result
        injected = Inject.apply(h, value, tap.cell, tap.copies is not False)  # type: ignore[no-untyped-call]
        return structures.put(result, way, injected)

    def _watch(self, raw: Watch, mode: str, structure: Any) -> None:
        if mode == "recompute":
            return
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"{raw.rule}: the {raw.spot} are inside a reentrant checkpoint, where they have no graph; "
                "use checkpoint(..., use_reentrant=False)"
            )
        tensor = raw.spot.seen(structures.get(structure, way_to(structure, raw.spot)))
        raw.keep(self.gate.forward_of(tensor), tensor)
        if mode != "compiled":
            raw.versions.append((tensor, tensor._version))


class InputHook(LayerHook):
    """The same at a layer's inputs: positional ones have numbers, keyword ones names."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:  # type: ignore[override]
        if not self.draws(module):
            return None
        given = structures.arguments(args, kwargs)
        result = self.act(module, given, args, kwargs)
        if result is given:
            return None
        return tuple(result[i] for i in range(len(args))), {key: result[key] for key in kwargs}


def way_to(structure: Any, spot: Spot) -> structures.Way:
    """The way to the tensor that is meant at a place.

    Raises:
        CaptureError: there is none.
    """
    way = structures.find(structure, spot.place.index)
    if way is None:
        what = "no floating-point tensor" if spot.place.index is None else f"no tensor at index={spot.place.index!r}"
        raise CaptureError(
            f"the {spot} have {what}; they are of type {type(structure).__name__}. Say which member is meant by "
            "index=, or select another layer (of token ids, the embedding's outputs)"
        )
    return way


def forget_compiled_code() -> None:
    """Compiled code that was made before our hooks came would silently pass them by: have it made anew."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not len(dynamo.convert_frame.output_codes.seen):
        return  # nothing has been compiled in this process
    torch.compiler.reset()
    warnings.warn(
        "something was compiled before these hooks came; torch.compiler.reset() was called, so that "
        "compiled models notice the new hooks, and they compile anew at their next call; coming before the first "
        "call spares that",
        RestrainWarning,
        stacklevel=5,
    )
