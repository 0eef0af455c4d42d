"""Places that rules look at, and what the forwards since the last collection gave there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from restrain.activation_points import Place, Target
from restrain.engine.core import Draws, Hook, Inject, structures
from restrain.engine.forward import masks
from restrain.engine.forward.masks import Inputs
from restrain.engine.loss import AtPlace
from restrain.engine.strengths import Activity
from restrain.errors import CaptureError, RestrainWarning
from restrain.torch_private import MISSING, anything_compiled, life, over, recomputing_saved_tensors, version, wrapped
from restrain.transforms.base import Noise
from restrain.transforms.layout import Layout

Record: TypeAlias = tuple[int, Tensor]  # the number of the forward, and what it gave


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
    """A place that a rule looks at, and what the forwards since the last collection gave there.

    For a penalty on the whole network these are the tensors themselves.
    """

    way_out = "Call reg.loss inside the function that is transformed"

    def __init__(self, rule: str, point: Point, optional: bool) -> None:
        self.rule, self.point, self.optional = rule, point, optional
        self.records: list[Any] = []  # with their graphs, each after the number of its forward
        self.lives: dict[int, Any] = {}  # of the records that live inside a transform of torch.func
        self.versions: list[tuple[Tensor, int]] = []  # those of tensors that must not change until they are used
        self._last: list[tuple[Any, float]] = []  # the value that was last collected, in parts without a graph
        self.fired = False  # ever
        self.lost = False  # whether a transform of torch.func kept what was seen since the last collection

    def has_fired(self) -> bool:
        """Whether it gave anything since the last collection."""
        return bool(self.records)

    @property
    def last(self) -> list[Tensor]:
        """The value that was last collected, in parts without a graph."""
        return [
            torch.as_tensor(part, dtype=None if isinstance(part, Tensor) else torch.float64) * factor
            for part, factor in self._last
        ]

    def remember(self, parts: list[tuple[Any, float]]) -> None:
        """Remember these parts, each a tensor or a number times another, as the value that was last collected."""
        self._last = parts

    def drop(self, forwards: set[int]) -> None:
        """Forget what some forwards gave."""
        self.records = [record for record in self.records if record[0] not in forwards]

    def clear(self) -> None:
        """Forget what was collected."""
        if self.records or self.versions or self.lives or self.lost:
            self.records, self.versions, self.lives, self.lost = [], [], {}, False

    def keep(self, forward: int, tensor: Tensor) -> None:
        """Keep what a forward gave."""
        self.records.append((forward, tensor))
        if torch.compiler.is_compiling():
            return
        if self.lives:
            self.lives.pop(id(tensor), None)  # of a tensor that is gone, in whose place this one may stand
        if wrapped(tensor):
            self.lives[id(tensor)] = life()

    def leave(self) -> bool:
        """Forget what lived inside a transform of torch.func that is over; whether nothing is left for that."""
        if not (self.lives or self.lost):
            return False
        alive = [record for record in self.records if not over(self.lives.get(id(record[1])))]
        lost = (self.lost or len(alive) < len(self.records)) and not alive
        self.records, self.lost = alive, False
        return lost

    def settle(self) -> None:
        """Before the records are used.

        Raises:
            CaptureError: a later op has overwritten one of them in place.
        """
        if any(version(tensor) != before for tensor, before in self.versions):
            raise CaptureError(
                f"{self.rule}: the {self.point} are overwritten by a later in-place op, so they can't be given to the "
                "penalty as they were; make that op out of place (inplace=False)"
            )


def blank(device: torch.device) -> Tensor:
    """A tensor like those that penalty_recorders add to, on a device."""
    # of one entry, not 0-d: torch.compile takes 0-d float64 tensors for numbers, and what is added to them is lost
    return torch.zeros(1, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class PenaltyRecorder(Recorder):
    """A penalty at one place; its records are the penalty's values.

    `weight` scales its value (1 / number of places under `reduce="mean"`). Places of one rule may share `at_place`.
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
        self.records: list[tuple[int, Tensor, float]] = []  # a value is the tensor times the number
        self.hidden: list[Record] = []  # values from inside a reentrant checkpoint, without their graphs
        self.rooted = False  # whether there were such since the last collection
        self.probes: list[tuple[Tensor, int]] = []
        self.copies: bool | None = None  # whether a later op overwrites the place; unknown before the first forward
        self.total = empty.new_zeros(2)  # of the values, and how many there are
        self.cell = torch.zeros_like(empty)
        self._version = version(self.total)  # compiled code adds in place, of which this is the only cheap sign

    def has_fired(self) -> bool:
        return bool(self.records or self.hidden) or self.fired_compiled()

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
            if self.copies is None:
                self.probes.append((h, version(h)))
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

    def keep(self, forward: int, tensor: Tensor, factor: float = 1.0) -> None:
        super().keep(forward, tensor)
        self.records[-1] = forward, tensor, factor

    def record(self, forward: int, value: Tensor) -> None:
        """Keep a value that a forward gave."""
        if torch.is_grad_enabled():
            self.keep(forward, value)
        else:
            self.hidden.append((forward, value))
            self.rooted = True

    def drop(self, forwards: set[int]) -> None:
        super().drop(forwards)
        self.hidden = [record for record in self.hidden if record[0] not in forwards]

    def settle(self) -> None:
        """After the first forward: whether a later op overwrote the tensor in place."""
        if self.probes and self.copies is None:
            overwritten = any(version(h) != before for h, before in self.probes)
            self.copies = overwritten or "version" in MISSING  # by a copy of what another op may have left alone
            if overwritten:
                warnings.warn(
                    f"{self.rule}: the {self.point} are overwritten by a later in-place op; the penalty acts on a copy "
                    "of it, at the price of one copy a forward (inplace=False there would spare it)",
                    RestrainWarning,
                    stacklevel=2,
                )
        self.probes.clear()

    def fired_compiled(self) -> bool:
        """Whether compiled code has added to the totals since they were last read."""
        return bool(version(self.total) != self._version)

    def clear(self) -> None:
        super().clear()
        if self.hidden or self.probes:
            self.hidden, self.probes = [], []
        if self.fired_compiled():
            self.total.zero_()
            self._version = version(self.total)


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
        if self.lone is not None and module.training and self.gate.plain() and not self.sampling.depth:
            found = self.lone.on_the_way(output, (), module) if type(output) is Tensor else None
            if found is not None:
                self.lone.keep(self.gate.number, *found[1:])
                return found[0]
        return self.act(module, output, args, kwargs) if self.draws(module) else None

    def act(self, module: nn.Module, structure: Any, args: Any, kwargs: Any) -> Any:
        """The structure with penalties injected and noise added; the same object where neither was."""
        result = structure
        if (self.penalty_recorders or self.output_recorders) and not self.sampling.depth:
            mode = self.gate.mode()
            if mode != "off":
                for recorder in self.penalty_recorders:
                    result = self._penalize(recorder, mode, module, structure, result)
                for outputs in self.output_recorders:
                    self._watch(outputs, mode, structure)
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

    def _penalize(self, recorder: PenaltyRecorder, mode: str, module: nn.Module, structure: Any, result: Any) -> Any:
        way = way_to(structure, recorder.point)
        if mode == "recompute" and wrapped(structures.get(structure, way)):
            return result
        inputs = None
        if recorder.point.place.padded:
            if mode != "recompute" or recomputing_saved_tensors():
                inputs = self.gate.inputs()
            if inputs is None:
                return result  # a layer that is called alone: which positions count isn't known
        if mode != "recompute":
            with torch.no_grad():  # a graph would be missed in a checkpoint's recomputation
                for activity in recorder.activities:
                    activity.add(recorder.point.seen(structures.get(structure, way)))
        h = structures.get(result, way)
        passed = recorder.on_the_way(h, way, module) if self.gate.passes(mode) else None
        if passed is not None:
            if mode == "record":
                recorder.keep(self.gate.forward_of(structures.get(structure, way)), *passed[1:])
            return result if passed[0] is h else passed[0]
        value = recorder.evaluate(structure, way, module, inputs)
        if mode == "record":
            recorder.record(self.gate.forward_of(structures.get(structure, way)), value)
            return result
        if mode == "compiled":
            if recorder.total.device != value.device:
                raise CaptureError(
                    "the model was moved to another device after its rules were attached: attach after .to(...)"
                )
            recorder.total.add_(torch.cat([value.detach().reshape(1), value.new_ones(1)]))
        elif not recorder.rooted or recomputing_saved_tensors():
            return result
        injected = Inject.apply(h, value, recorder.cell, recorder.copies is not False)  # type: ignore[no-untyped-call]
        return structures.put(result, way, injected)

    def _watch(self, recorder: Recorder, mode: str, structure: Any) -> None:
        if mode == "recompute":
            return
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"{recorder.rule}: the {recorder.point} are inside a reentrant checkpoint, where they have no graph; "
                "use checkpoint(..., use_reentrant=False)"
            )
        tensor = recorder.point.seen(structures.get(structure, way_to(structure, recorder.point)))
        recorder.keep(self.gate.forward_of(tensor), tensor)
        if mode != "compiled":
            recorder.versions.append((tensor, version(tensor)))


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
        stacklevel=5,
    )
