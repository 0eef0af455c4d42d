"""Recorders at layers with rules, and the hooks by which they see outputs and inputs.

A later in-place operation would overwrite the tensor that a penalty's graph has saved. The first
forward therefore penalises a copy and compares version counters; if nothing overwrites the tensor,
later forwards don't copy. The L1 of a ReLU's output is its sum: the ReLU stops the gradient at
zeros, so nothing is saved. The L1 of an output that is overwritten saves signs, a byte each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

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
from restrain.transforms.layout import Layout


@dataclass(frozen=True)
class Point:
    """An activation of a model: a layer's name and path, and the part of its outputs or inputs."""

    name: str
    path: tuple[str, ...]
    place: Place

    @classmethod
    def of(cls, target: Target) -> Point:
        """Return the activation of a target, without its module."""
        return cls(target.name, target.layer.path, target.place)

    def find(self, root: nn.Module) -> nn.Module:
        """Return the layer."""
        for key in self.path:
            root = root._modules[key]  # type: ignore[assignment]
        return root

    @property
    def key(self) -> str:
        """The tensor's name in a dict, such as `relu`, `relu:inputs`, or `fc3:tanh` for `via`."""
        via = "" if self.place.via is None else f":{getattr(self.place.via, '__name__', 'via')}"
        call = f"#{self.place.call + 1}" if self.place.call else ""
        return self.name + (":inputs" if self.place.kind == "inputs" else "") + via + call

    def seen(self, tensor: Tensor) -> Tensor:
        """Return the layer's tensor as a penalty sees it, after `via`."""
        return tensor if self.place.via is None else self.place.via(tensor)

    def __str__(self) -> str:
        return f"{self.place.kind} of {self.name!r}" if self.name else f"{self.place.kind} of the model"


class Recorder:
    """Recorder of an activation with rules; its records go to the running forward.

    Args:
        rule: the first of its rules, which installs it.
        point: the activation.
        optional: True if the layer need not be called.
    """

    way_out = "Call reg.loss inside the function that is transformed"

    def __init__(self, rule: str, point: Point, optional: bool) -> None:
        self.rule, self.point, self.optional = rule, point, optional
        self.factors = {rule: 1.0}  # factor of the value, by rule
        self.fired = False  # True after the first record
        self.compiled: list[Any] = []  # values of compiled code that aren't noted yet
        self._last: list[tuple[Any, float]] = []  # last collected value, in detached parts

    def last(self, rule: str) -> list[Tensor]:
        """Return the last collected value for a rule, in detached parts."""
        own = self.factors[rule]
        return [
            (part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.float64, device="cpu"))
            * (factor * own)
            for part, factor in self._last
        ]

    def remember(self, parts: list[tuple[Any, float]]) -> None:
        """Store detached parts of a value, pairs (tensor or number, factor), as last collected."""
        self._last = parts

    def of_call(self, records: Sequence[Record]) -> Sequence[Record]:
        """Return the records of the call that the activation names; all without `call=`.

        Raises:
            CaptureError: the layer wasn't called so often, or values of its calls are summed.
        """
        call = self.point.place.call
        if call is None or not records:
            return records
        if any(not isinstance(record.calls, int) or record.calls != 1 or not record.graph for record in records):
            raise CaptureError(
                f"{self.rule}: call={call} needs the values of the {self.point} call by call, which compiled code and "
                "reentrant checkpoints give as a sum: leave the layer out of them, or use calls="
            )
        if call >= len(records):
            raise CaptureError(
                f"{self.rule}: call={call} of the {self.point} is asked for, counted from 0, and the loss depends on "
                f"{len(records)} of them"
            )
        return records[call : call + 1]

    def check(self, records: Sequence[Record]) -> None:
        """Check that records can be used.

        Raises:
            CaptureError: a later operation has overwritten a recorded tensor in place.
        """
        if any(record.changed for record in records):
            raise CaptureError(
                f"{self.rule}: the {self.point} are overwritten by a later in-place op, so they can't be given to the "
                "penalty as they were; make that op out of place (inplace=False)"
            )


def blank(device: torch.device) -> Tensor:
    """Return a zero of the dtype and shape of penalty recorders' totals, on a device."""
    # of shape (1,): torch.compile treats 0-d float64 tensors as numbers, and loses additions to
    # them
    return torch.zeros(1, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class PenaltyRecorder(Recorder):
    """A penalty on an activation, for all rules that scale it; records the penalty's values.

    `weight` scales its value (1 / number of activations with `reduce="mean"`). Activations of a
    rule may share `at_place`. Compiled code adds the values and their number to `total`.
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
        # of which a target counts the active entries; None: the activation itself
        self.measured: Callable[[Tensor], Tensor] | None = None
        self._at_place = at_place
        self.tokens = point.place.average == "tokens"
        self.simple = not (mean or self.tokens or point.place.padded or point.place.via is not None)
        # a value without a graph was recorded since the last collection, or counted by it
        self.rooted = False
        # a later operation overwrites the tensor; None before the first forward
        self.copies: bool | None = None
        self.total = empty.new_zeros(2)
        self.cell = torch.zeros_like(empty)
        # the only cheap sign of compiled code's additions in place
        self._version = version(self.total)

    def on_the_way(self, h: Tensor, way: structures.Way, module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
        """Return (output, value, factor), where `output` replaces the layer's output; or None.

        It may be h itself. None if no such form is known; outputs other than a single tensor aren't
        replaced.
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
        """Return the penalty's value on the tensor at `way`: sum over features, mean over batch.

        `inputs` are the model's, if the activation has a mask.
        """
        h = structures.get(structure, way)
        if not torch.compiler.is_compiling() and self.copies is not False:
            h = h.clone()
        h = self.point.seen(h)
        packed = structures.packed(structure, way)
        if packed is not None:
            return masks.of_packed(self.penalty, packed._replace(data=h), self.mean, self.tokens)
        batch = batch_dim(self.point.place.batch_dim, module, h)
        mask = None if inputs is None else masks.mask_of(self.point.place, inputs, h, batch)
        if self.tokens:
            h = masks.tokens_at(self.point.place, h, mask)
            if mask is not None:
                return self.penalty.over_tokens(h, mask)
            h, batch = h.flatten(0, -2), 0
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
        """Decide after the first forward whether later operations overwrite the tensor."""
        watched = [record for record in records if record.watched is not None]
        if watched and self.copies is None:
            overwritten = any(record.changed for record in watched)
            # without version counters: always copy
            self.copies = overwritten or "version" in MISSING
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
        """Return the record of compiled code's additions since the last call, or None."""
        if version(self.total) == self._version:
            return None
        record = self.of_compiled(self.total.clone())
        self.total.zero_()
        self._version = version(self.total)
        return record

    def of_compiled(self, added: Tensor) -> Record | None:
        """Return the record of compiled code's additions; None if there are none, on a CPU.

        Other devices aren't waited for.
        """
        value, calls = added.tolist() if added.is_cpu else added
        return Record(value, graph=False, calls=calls) if isinstance(calls, Tensor) or calls else None


def batch_dim(given: int | None, module: nn.Module, h: Tensor) -> int | None:
    """Return the batch axis of a layer's tensor, as activation or layer say; None without any."""
    if given is not None:
        return given
    if h.dim() == 0:
        return None
    if module.__dict__.get("batch_first", getattr(type(module), "batch_first", True)) is False:
        # (time, batch, features), or (time, features) of a single sequence
        return 1 if h.dim() > 2 else None
    return 0


class Gate(Protocol):
    """State that a hook reads before it records; implemented by `Forwards`."""

    def mode(self) -> str:
        """Return 'record', 'compiled', 'recompute' or 'off'."""

    def forward(self) -> Forward:
        """Return the running forward, or a new forward for a layer that is called alone."""

    def plain(self) -> Forward | None:
        """Return the running training forward if plain eager code runs; else None."""

    def may_replace(self, mode: str) -> bool:
        """Return True if a hook may replace a layer's output."""

    def inputs(self) -> Inputs | None:
        """Return the inputs of the running forward of the model; None outside of a forward."""


class Transforming(Protocol):
    """Noise, or an activation function bound to a layer."""

    lasting: ClassVar[bool]

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        """Return the transformed tensor."""


class Probe(Protocol):
    """Observer of an activation for a derivative; implemented by `jacobians.Seen` and `Moved`."""

    def act(self, module: nn.Module, structure: Any, result: Any) -> Any:
        """Return the result, possibly with another tensor as the activation."""


class LayerHook(Draws, Hook):
    """Hook on a layer's output: evaluates penalties on the clean tensor, then transforms it.

    Noise acts in training only, and inside `rs.sampling`, where no penalty does, in any mode of the
    layer; activation functions always act.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        self.penalty_recorders: list[PenaltyRecorder] = []
        self.output_recorders: list[Recorder] = []
        self.probes: list[Probe] = []
        self.transforms: list[tuple[Transforming, Point]] = []
        # the only recorder, if it is simple and there is no noise
        self.lone: PenaltyRecorder | None = None

    @property
    def random(self) -> bool:
        """True if the hook adds noise."""
        return not all(what.lasting for what, _ in self.transforms)

    @property
    def lasting(self) -> bool:
        """True if the hook acts in evaluation, too."""
        return any(what.lasting for what, _ in self.transforms)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.lone is not None and module.training and type(output) is Tensor and not self.sampling.depth:
            forward = self.gate.plain()
            found = None if forward is None else self.lone.on_the_way(output, (), module)
            if forward is not None and found is not None:
                forward.keep(self.lone, Record.of(*found[1:]), output)
                return found[0]
        if not self.draws(module) and not self.lasting:
            return None
        return self.act(module, output, args, kwargs)

    def act(self, module: nn.Module, structure: Any, args: Any, kwargs: Any) -> Any:
        """Return the structure with penalties injected and transformed; itself if unchanged.

        In evaluation only activation functions act.
        """
        if not self.draws(module):
            return self._transformed(module, structure, structure, args, kwargs)
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
        return self._transformed(module, structure, result, args, kwargs) if self.transforms else result

    def _transformed(self, module: nn.Module, structure: Any, result: Any, args: Any, kwargs: Any) -> Any:
        """Return the result after noise, if it is drawn now, and activation functions."""
        drawn = self.draws(module)
        for what, point in self.transforms:
            if not (drawn or what.lasting):
                continue
            way = way_to(structure, point)
            x = structures.get(result, way)
            layout = Layout(
                batch_dim(point.place.batch_dim, module, x),
                *structures.rows(structure, way),
                module,
                structures.arguments(args, kwargs),
                drawn and module.training,
            )
            y = what.at(x, layout)
            result = result if y is x else structures.put(result, way, y)
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
            return result  # layer called alone: valid positions are unknown
        if mode != "recompute":
            self._measure(recorder, forward, seen)
        h = structures.get(result, way)
        passed = recorder.on_the_way(h, way, module) if self.gate.may_replace(mode) else None
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

    def _measure(self, recorder: PenaltyRecorder, forward: Forward | None, seen: Any) -> None:
        """Measure the fraction of active entries for targets."""
        with torch.no_grad():  # a checkpoint's recomputation wouldn't build this graph
            for activity in recorder.activities:
                h = recorder.point.seen(seen)
                fraction = activity.of(h if recorder.measured is None else recorder.measured(h))
                if fraction is not None and forward is not None:
                    forward.active.append((activity, fraction))
                elif fraction is not None:
                    activity.add(fraction)

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
    """Hook on a layer's inputs, keyed by position, or by name for keyword arguments."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:  # type: ignore[override]
        if not self.draws(module) and not self.lasting:
            return None
        given = structures.arguments(args, kwargs)
        result = self.act(module, given, args, kwargs)
        # key by key: Dynamo of torch 2.10 doesn't compare dicts by `is`
        if all(result[key] is one for key, one in given.items()):
            return None
        return tuple(result[i] for i in range(len(args))), {key: result[key] for key in kwargs}


def way_to(structure: Any, point: Point) -> structures.Way:
    """Return the way to a point's tensor in the structure.

    Raises:
        CaptureError: there is no such tensor.
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
    """Reset torch.compile if anything was compiled: code made before our hooks would skip them."""
    compiled = anything_compiled()
    if compiled is False:
        return
    torch.compiler.reset()
    if compiled is None:
        return  # whether anything was compiled is unknown
    warnings.warn(
        "something was compiled before these hooks came; torch.compiler.reset() was called, so that "
        "compiled models notice the new hooks, and they compile anew at their next call; coming before the first "
        "call spares that",
        RestrainWarning,
        stacklevel=level_of_caller(),
    )
