"""Recorders at the places that rules look at, and the hooks by which they see what layers give there.

A later in-place operation would overwrite the tensor that a penalty's graph has saved. The first
forward therefore penalises a copy and compares version counters; where nothing overwrites, later
forwards don't copy. The L1 of a ReLU's output is its sum: the gradient at zeros is stopped by the
ReLU, so nothing is saved. The L1 of an output that is overwritten saves signs, a byte each.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from restrain.activation_points import Place, Target
from restrain.engine.core import Draws, Hook, Inject, structures
from restrain.engine.forward import masks
from restrain.engine.forward.masks import Inputs
from restrain.engine.forward.records import Forward, Record
from restrain.engine.loss import AtPlace
from restrain.engine.strengths import Activity
from restrain.errors import CaptureError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.torch_private import MISSING, anything_compiled, recomputing_saved_tensors, version, wrapped
from restrain.transforms.base import Noise
from restrain.transforms.layout import Layout


@dataclass(frozen=True)
class Point:
    """A place in a model: a layer's name and the way to it, and what is caught there."""

    name: str
    path: tuple[str, ...]
    place: Place

    @classmethod
    def of(cls, target: Target) -> Point:
        """The place of a target, without its module."""
        return cls(target.name, target.layer.path, target.place)

    def find(self, root: nn.Module) -> nn.Module:
        """The layer."""
        for key in self.path:
            root = root._modules[key]  # type: ignore[assignment]
        return root

    @property
    def key(self) -> str:
        """What its tensor is called in a dict: the layer's name; `relu:inputs` for inputs, `fc3:tanh` after `via`."""
        via = "" if self.place.via is None else f":{getattr(self.place.via, '__name__', 'via')}"
        return self.name + (":inputs" if self.place.kind == "inputs" else "") + via

    def seen(self, tensor: Tensor) -> Tensor:
        """What a penalty sees of the layer's tensor."""
        return tensor if self.place.via is None else self.place.via(tensor)

    def __str__(self) -> str:
        return f"{self.place.kind} of {self.name!r}" if self.name else f"{self.place.kind} of the model"


class Recorder:
    """A place that rules look at. What is seen there, the recorder gives to the forward that runs.

    Args:
        rule: the first of these rules, which installs it.
        point: the place.
        optional: whether the place need not be reached.
    """

    way_out = "Call reg.loss inside the function that is transformed"

    def __init__(self, rule: str, point: Point, optional: bool) -> None:
        self.rule, self.point, self.optional = rule, point, optional
        self.factors = {rule: 1.0}  # by rule: what the rule takes of the value times
        self.fired = False  # ever
        self.compiled: list[Any] = []  # what compiled code saw since that was last noted
        self._last: list[tuple[Any, float]] = []  # the value that was last collected, in parts without a graph

    def last(self, rule: str) -> list[Tensor]:
        """The value for a rule that was last collected, in parts without a graph."""
        own = self.factors[rule]
        return [
            (part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.float64, device="cpu"))
            * (factor * own)
            for part, factor in self._last
        ]

    def remember(self, parts: list[tuple[Any, float]]) -> None:
        """Remember these parts, each a tensor or a number times another, as the value that was last collected."""
        self._last = parts

    def check(self, records: Sequence[Record]) -> None:
        """Before records are used.

        Raises:
            CaptureError: a later op has overwritten one of them in place.
        """
        if any(record.changed for record in records):
            raise CaptureError(
                f"{self.rule}: the {self.point} are overwritten by a later in-place op, so they can't be given to the "
                "penalty as they were; make that op out of place (inplace=False)"
            )


def blank(device: torch.device) -> Tensor:
    """A tensor like those that penalty_recorders add to, on a device."""
    # of one entry, not 0-d: torch.compile takes 0-d float64 tensors for numbers, and what is added to them is lost
    return torch.zeros(1, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class PenaltyRecorder(Recorder):
    """A penalty at one place, for all rules that multiply it by a number; its records are the penalty's values.

    `weight` scales its value (1 / number of places under `reduce="mean"`). Places of one rule may share `at_place`.
    What compiled code measures, it adds to `total`: the sum of the values, and their number.
    """

    def __init__(
        self,
        rule: str,
        point: Point,
        optional: bool,
        at_place: AtPlace,
        empty: Tensor,
        *,
        mean: bool = False,
        weight: float = 1.0,
        activities: Sequence[Activity] = (),
    ) -> None:
        super().__init__(rule, point, optional)
        self.penalty, self.mean, self.weight, self.activities = at_place.penalty, mean, weight, activities
        self._at_place = at_place
        self.simple = not (mean or point.place.padded or point.place.via is not None)
        self.rooted = False  # whether a value without a graph was recorded since the last collection, or counted by it
        self.copies: bool | None = None  # whether a later op overwrites the place; unknown before the first forward
        self.total = empty.new_zeros(2)
        self.cell = torch.zeros_like(empty)
        self._version = version(self.total)  # compiled code adds in place, of which this is the only cheap sign

    def on_the_way(self, h: Tensor, way: structures.Way, module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
        """What goes on in the place of a layer's output (h itself, even), and the value, in two factors.

        None where that isn't known. Where the output isn't a single tensor, nothing else is put in its place.
        """
        if not self.simple:
            return None
        batch = batch_dim(self.point.place.batch_dim, module, h)
        found = self._at_place.of_relu(h, batch)
        if found is not None:
            return h, *found
        if way or self.copies is None:
            return None
        return self._at_place.through(h, batch, self.copies)

    def evaluate(self, structure: Any, way: structures.Way, module: nn.Module, inputs: masks.Inputs | None) -> Tensor:
        """The penalty's value on the tensor at the end of the way: over features a sum, over the batch a mean.

        `inputs` are those of the model, where the place asks for a mask.
        """
        h = structures.get(structure, way)
        if not torch.compiler.is_compiling() and self.copies is not False:
            h = h.clone()
        h = self.point.seen(h)
        packed = structures.packed(structure, way)
        if packed is not None:
            return masks.of_packed(self.penalty, packed._replace(data=h), self.mean)
        batch = batch_dim(self.point.place.batch_dim, module, h)
        mask = None if inputs is None else masks.mask_of(self.point.place, inputs, h, batch)
        if torch.compiler.is_compiling() and not self.mean and mask is None:
            value = self._at_place.by_signs(h, batch)
            if value is not None:
                return value
        if not self.mean:
            return self._at_place.value(h, batch) if mask is None else self.penalty.over_batch(h, batch, mask)
        if mask is None:
            return self.penalty.mean(h)
        return self.penalty(self.penalty.without_padding(h, mask)) / mask.expand(h.shape).sum().clamp_min(1)

    def check(self, records: Sequence[Record]) -> None:
        """After the first forward: whether a later op overwrote the tensor in place."""
        watched = [record for record in records if record.watched is not None]
        if watched and self.copies is None:
            overwritten = any(record.changed for record in watched)
            self.copies = overwritten or "version" in MISSING  # by a copy of what another op may have left alone
            if overwritten:
                warnings.warn(
                    f"{self.rule}: the {self.point} are overwritten by a later in-place op; the penalty acts on a copy "
                    "of it, at the price of one copy a forward (inplace=False there would spare it)",
                    RestrainWarning,
                    stacklevel=level_of_caller(),
                )
        for record in watched:
            record.watched = None

    def take_total(self) -> Record | None:
        """What compiled code has added to the total since it was last taken."""
        if version(self.total) == self._version:
            return None
        record = self.of_compiled(self.total.clone())
        self.total.zero_()
        self._version = version(self.total)
        return record

    def of_compiled(self, added: Tensor) -> Record | None:
        """The record of what compiled code has added, if that is known to be anything: no one waits but for a CPU."""
        value, calls = added.tolist() if added.is_cpu else added
        return Record(value, graph=False, calls=calls) if isinstance(calls, Tensor) or calls else None


def batch_dim(given: int | None, module: nn.Module, h: Tensor) -> int | None:
    """The batch axis of a tensor at a layer, by what the place or the layer says; None where there is none."""
    if given is not None:
        return given
    if h.dim() == 0:
        return None
    if module.__dict__.get("batch_first", getattr(type(module), "batch_first", True)) is False:
        return 1 if h.dim() > 2 else None  # (time, batch, features), or (time, features) of a single sequence
    return 0


class Gate(Protocol):
    """What a hook asks before it records; the attachment's `Forwards`."""

    def mode(self) -> str:
        """'record', 'compiled', 'recompute' or 'off'."""

    def forward(self) -> Forward:
        """The forward to which a layer belongs that is called now."""

    def plain(self) -> Forward | None:
        """The training forward that a layer belongs to, if eager code runs and nothing else goes on; else None."""

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
        self.penalty_recorders: list[PenaltyRecorder] = []
        self.output_recorders: list[Recorder] = []
        self.probes: list[Probe] = []
        self.noises: list[tuple[Noise, Point]] = []
        self.lone: PenaltyRecorder | None = None  # the one thing that happens here, if it is a simple one

    @property
    def random(self) -> bool:
        """Whether there is noise here."""
        return bool(self.noises)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.lone is not None and module.training and type(output) is Tensor and not self.sampling.depth:
            forward = self.gate.plain()
            found = None if forward is None else self.lone.on_the_way(output, (), module)
            if forward is not None and found is not None:
                forward.keep(self.lone, Record.of(*found[1:]), output)
                return found[0]
        return self.act(module, output, args, kwargs) if self.draws(module) else None

    def act(self, module: nn.Module, structure: Any, args: Any, kwargs: Any) -> Any:
        """The structure with penalties injected and noise added; the same object where neither was."""
        result = structure
        if (self.penalty_recorders or self.output_recorders) and not self.sampling.depth:
            mode = self.gate.mode()
            if mode != "off":
                forward = self.gate.forward() if mode == "record" else None
                for recorder in self.penalty_recorders:
                    result = self._penalize(recorder, mode, forward, module, structure, result)
                for outputs in self.output_recorders:
                    self._watch(outputs, mode, forward, structure)
        if self.probes and not torch.compiler.is_compiling():
            for probe in self.probes:
                result = probe.act(module, structure, result)
        for noise, point in self.noises:
            way = way_to(structure, point)
            x = structures.get(result, way)
            layout = Layout(
                batch_dim(point.place.batch_dim, module, x),
                *structures.rows(structure, way),
                module,
                structures.arguments(args, kwargs),
            )
            result = structures.put(result, way, noise.at(x, layout))
        return result

    def _penalize(
        self,
        recorder: PenaltyRecorder,
        mode: str,
        forward: Forward | None,
        module: nn.Module,
        structure: Any,
        result: Any,
    ) -> Any:
        way = way_to(structure, recorder.point)
        seen = structures.get(structure, way)
        if mode == "recompute" and wrapped(seen):
            return result
        asks = recorder.point.place.padded and (mode != "recompute" or recomputing_saved_tensors())
        inputs = self.gate.inputs() if asks else None
        if recorder.point.place.padded and inputs is None:
            return result  # a layer that is called alone: which positions count isn't known
        if mode != "recompute":
            with torch.no_grad():  # a graph would be missed in a checkpoint's recomputation
                for activity in recorder.activities:
                    activity.add(recorder.point.seen(seen))
        h = structures.get(result, way)
        passed = recorder.on_the_way(h, way, module) if self.gate.passes(mode) else None
        if passed is not None:
            if forward is not None:
                forward.keep(recorder, Record.of(*passed[1:]), seen)
            return result if passed[0] is h else passed[0]
        value = recorder.evaluate(structure, way, module, inputs)
        if forward is not None:
            forward.keep(recorder, Record.of(value, watched=seen if recorder.copies is None else None), seen)
            recorder.rooted = recorder.rooted or not torch.is_grad_enabled()
            return result
        if mode == "compiled":
            _add(recorder, value)
        elif not recorder.rooted or recomputing_saved_tensors():
            return result
        injected = Inject.apply(h, value, recorder.cell, recorder.copies is not False)  # type: ignore[no-untyped-call]
        return structures.put(result, way, injected)

    def _watch(self, recorder: Recorder, mode: str, forward: Forward | None, structure: Any) -> None:
        if mode == "recompute":
            return
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"{recorder.rule}: the {recorder.point} are inside a reentrant checkpoint, where they have no graph; "
                "use checkpoint(..., use_reentrant=False)"
            )
        tensor = recorder.point.seen(structures.get(structure, way_to(structure, recorder.point)))
        if forward is not None:
            forward.keep(recorder, Record.of(tensor, watched=tensor), tensor)
        else:
            recorder.compiled.append(tensor)


def _add(recorder: PenaltyRecorder, value: Tensor) -> None:
    """Add a value to the recorder's total, in compiled code."""
    if recorder.total.device != value.device:
        raise CaptureError("the model was moved to another device after its rules were attached: attach after .to(...)")
    recorder.total.add_(torch.cat([value.detach().reshape(1), value.new_ones(1)]))


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


def way_to(structure: Any, point: Point) -> structures.Way:
    """The way to the tensor that is meant at a place.

    Raises:
        CaptureError: there is none.
    """
    way = structures.find(structure, point.place.index)
    if way is None:
        what = "no floating-point tensor" if point.place.index is None else f"no tensor at index={point.place.index!r}"
        raise CaptureError(
            f"the {point} have {what}; they are of type {type(structure).__name__}. Say which member is meant by "
            "index=, or select another layer (of token ids, the embedding's outputs)"
        )
    return way


def forget_compiled_code() -> None:
    """Compiled code that was made before our hooks came would silently pass them by: have it made anew."""
    compiled = anything_compiled()
    if compiled is False:
        return
    torch.compiler.reset()
    if compiled is None:
        return  # it may be in vain
    warnings.warn(
        "something was compiled before these hooks came; torch.compiler.reset() was called, so that "
        "compiled models notice the new hooks, and they compile anew at their next call; coming before the first "
        "call spares that",
        RestrainWarning,
        stacklevel=level_of_caller(),
    )
