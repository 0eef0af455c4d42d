"""Training forwards of a model with rules on activations, and the choice of forwards for a loss.

A `Forward` is kept while a loss may depend on it, which is while an output or an output's gradient
exists; weak references to marks in their graph show this. Activations don't show it, since the
records keep their nodes alive. If the model passes activations on (to a foreign hook, or in an
attribute of a layer), up to 16 forwards whose outputs are gone are kept, too. A loss that depends
on a forward given up earlier is an error. A graph that is cut by hand (split learning, cached
gradients) can't be followed: add `reg.penalty()` there.

Values can't leave a transform of torch.func: they are collected inside, or an error is raised.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from restrain.callstack import Block, Call
from restrain.engine.core import Hook, Overrides, refuse_capture
from restrain.engine.forward.marks import Mark, marks_before
from restrain.engine.forward.masks import Inputs
from restrain.engine.forward.recording import PenaltyRecorder, Recorder
from restrain.engine.forward.records import Forward, Record
from restrain.errors import CaptureError, NeverFiredError
from restrain.penalties.functorch import unwrapped
from restrain.torch_private import checkpoint_frame, exporting, in_backward, not_alone, recomputing_saved_tensors

_MOST_KEPT = 16  # uncounted forwards without outputs that are kept
_ENDED = "it was ended by an exception"
_keys = itertools.count()
_paused = Block()


def paused() -> Block:
    """Return a context in which no attachment records in this thread, as in `rs.activations`."""
    return _paused


@dataclass
class Collected:
    """Weighted value of a recorder: `direct` × `factor` with its graph, `hidden` without."""

    recorder: PenaltyRecorder
    direct: Tensor | None
    factor: float
    hidden: Tensor | float | None
    share: Tensor | float  # content of the recorder's cell for a loss gradient of 1

    def due(self, rules: Collection[str]) -> Collected | None:
        """Return the part that belongs to the given rules; None if no rule uses this recorder."""
        factors = [factor for rule, factor in self.recorder.factors.items() if rule in rules]
        if not factors:
            return None
        factor = sum(factors)
        hidden = None if self.hidden is None else self.hidden * factor
        return Collected(self.recorder, self.direct, self.factor * factor, hidden, self.share * factor)


class Derived(Protocol):
    """Protocol of a rule on derivatives; implemented by `jacobians.Derivative`."""

    recorders: list[Recorder]

    def collect(self, forwards: Sequence[Forward]) -> None:
        """Take the records of the given forwards; no effect if these are already taken."""

    def forget(self) -> None:
        """Forget what was collected."""


class Further(Protocol):
    """Protocol of a replay (second forward for a derivative); implemented by `jacobians.Rerun`."""

    call: Call


@dataclass
class _Running:
    """Running forward of the model; `forward` is the outermost's record, None outside training."""

    call: Call
    inputs: Inputs | None
    forward: Forward | None


class _Thread(threading.local):
    """Running forwards of this thread, the innermost last, and its replay for a derivative."""

    def __init__(self) -> None:
        self.running: list[_Running] = []
        self.further: Any = None


class Compiled:
    """A forward that ran as compiled code.

    Compiled code can't mark nodes, but it can store an object. `note` turns it into a `Forward`
    before the next loss, or when the next compiled forward replaces it.

    Args:
        forwards: the attachment's forwards.
        output: the model's output.
        added: what the forward added to each penalty recorder's total.
        kept: the further values of each recorder.
    """

    forwards: Forwards | None = None

    def __init__(self, forwards: Forwards, output: Any, added: list[Tensor], kept: list[list[Any]]) -> None:
        self.forwards, self.output, self.added, self.kept = forwards, output, added, kept

    @not_alone
    def note(self) -> None:
        """Pass this forward to `Forwards.note`, once."""
        forwards, self.forwards = self.forwards, None
        if forwards is not None:
            forwards.note(self)

    @not_alone
    def __del__(self) -> None:
        self.note()


class Forwards:
    """The training forwards of a model that later losses may count."""

    def __init__(self) -> None:
        self.penalty_recorders: list[PenaltyRecorder] = []
        self.output_recorders: list[Recorder] = []
        self.derived: list[Derived] = []
        self.recorders: list[Recorder] = []  # the two above and those of derivatives
        self._reached = False  # True after every recorder has fired
        self.ran = False  # a training forward ran since the last real optimizer step
        self.pending: dict[int, Forward] = {}  # uncollected forwards by number, in order
        self._numbers, self._collections = itertools.count(1), itertools.count(1)
        self._key = f"restrain {next(_keys)}"
        self._lost: list[weakref.ref[Mark]] = []  # marks of forwards given up uncounted
        self._thread = _Thread()
        self.current: list[Collected] = []  # values of the last collection
        # for penalties on the whole network: named outputs by rule
        self.outputs: dict[str, dict[str, Tensor]] = {}
        # positional parameters of the forward, if an activation has a mask
        self.names: tuple[str, ...] | None = None
        # called at the beginning of an eager training forward
        self.began: Callable[[], None] = lambda: None
        self.overridden = Overrides()
        self._of_frames: weakref.WeakKeyDictionary[Any, Inputs] = weakref.WeakKeyDictionary()
        self._filled: list[PenaltyRecorder] = []  # recorders whose cells are filled
        self.root: Callable[[], nn.Module | None] = lambda: None
        # For compiled code:
        self.compiled: Compiled | None = None  # the last forward
        self._before: list[Tensor] = []  # totals
        self._compiled_inputs: list[Inputs] = []

    # Running forwards

    def running(self, below: FrameType | None = None) -> Forward | None:
        """Return the training forward running in this thread.

        Forwards that an exception has ended are given up.
        """
        running = self._thread.running
        while running and not running[-1].call.runs(below or sys._getframe(1)):
            ended = running[-1]
            if len(running) == 1 and ended.forward is not None:
                self._give_up(ended.forward, _ENDED)
            del running[-1:]
        return running[-1].forward if running else None

    def outermost(self) -> Forward | None:
        """Return the training forward running in this thread; None inside a nested call."""
        forward = self.running()
        return forward if len(self._thread.running) == 1 else None

    def mode(self) -> str:
        """Return how a layer called now handles penalties: record, recompute, compiled or off."""
        if torch.compiler.is_compiling():
            return "compiled" if torch.is_grad_enabled() else "off"
        if _paused.on:
            return "off"
        if in_backward():
            return "recompute" if torch.is_grad_enabled() else "off"
        return "record" if torch.is_grad_enabled() or self.running() is not None else "off"

    def plain(self) -> Forward | None:
        """Return the running training forward if plain eager code runs; else None."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_backward() or _paused.on:
            return None
        return self.running()

    def forward(self) -> Forward:
        """Return the running forward, or a new forward for a layer that is called alone."""
        forward = self.running()
        return self._new() if forward is None else forward

    def _new(self, call: Call | None = None) -> Forward:
        return Forward(self.pending, self._key, next(self._numbers), call)

    def may_replace(self, mode: str) -> bool:
        """Return True if a hook may replace a layer's output in this mode.

        Rules on derivatives need the model's own graph between layers.
        """
        return not self.derived and (mode == "record" or (mode == "recompute" and recomputing_saved_tensors()))

    @property
    def further(self) -> Any:
        """The replay that runs in this thread for a derivative, or None."""
        further = self._thread.further
        return further if further is not None and further.call.runs(sys._getframe(1)) else None

    @further.setter
    def further(self, further: Further | None) -> None:
        self._thread.further = further

    def begin(self, model: nn.Module, inputs: Inputs | None, frame: FrameType) -> None:
        """Begin a forward of the whole model, called in `frame`."""
        outer, call = self.running(frame.f_back), Call(frame, model)
        nested, trains = bool(self._thread.running), model.training and torch.is_grad_enabled()
        if not nested and not _paused.on:
            self.overridden.look(model)
            if trains and not in_backward():
                refuse_capture("a forward of a model with rules")
                self.began()
                self.ran = True
                self._tidy()
                outer = self._new(call)
        self._thread.running.append(_Running(call, inputs, outer))
        self._show_inputs()

    def _show_inputs(self) -> None:
        """Give the innermost forward's inputs to compiled code below the model."""
        if self.names is not None:
            shown = [running.inputs for running in self._thread.running[-1:]]
            self._compiled_inputs = [inputs for inputs in shown if inputs is not None]

    def _tidy(self) -> None:
        """Empty cells, note compiled forwards, and forget forwards whose outputs are gone."""
        self._empty_cells()
        self._note_compiled()
        self._forget_gone()

    def end(self, output: Any, frame: FrameType) -> Any:
        """End the forward called in `frame`, and return its output, with aliases for some tensors.

        Nothing ends if the innermost forward was called in another frame: an exception ended it.
        """
        forward = self.running()
        if forward is None and not self._thread.running:
            return output
        innermost = self._thread.running[-1]
        if not innermost.call.is_at(frame):
            return output
        if forward is not None and len(self._thread.running) == 1 and self.recorders:
            self._take_compiled(forward)
            output = forward.end(output)
        del self._thread.running[-1:]
        self._show_inputs()
        return output

    def inputs(self) -> Inputs | None:
        """Return the inputs of the running forward of the model; None outside of a forward.

        Raises:
            CaptureError: a reentrant checkpoint hides the inputs.
        """
        if torch.compiler.is_compiling():
            return self._compiled_inputs[-1] if self._compiled_inputs else None
        if not torch.is_grad_enabled():
            raise CaptureError(
                "a place with mask= or lengths= is inside a reentrant checkpoint, whose recomputation doesn't know "
                "the model's arguments; use checkpoint(..., use_reentrant=False)"
            )
        self.running()
        running = self._thread.running
        frame = checkpoint_frame()
        if in_backward() and frame in self._of_frames:
            return self._of_frames[frame]
        if frame is not None and running and running[-1].inputs is not None:
            self._of_frames[frame] = running[-1].inputs
        return running[-1].inputs if running else None

    # Compiled code

    def begin_compiled(self, model: nn.Module, inputs: Inputs | None) -> None:
        """Begin a forward of the whole model in compiled code; this method is traced into it."""
        if inputs is not None:
            self._compiled_inputs.append(inputs)
        if model.training and torch.is_grad_enabled():
            self.ran = True
            self._before = [recorder.total.clone() for recorder in self.penalty_recorders]
            for recorder in self.penalty_recorders:
                recorder.total.zero_()

    def end_compiled(self, model: nn.Module, output: Any) -> None:
        """End a forward of the whole model in compiled code, and store it in `compiled`."""
        if self._compiled_inputs:
            self._compiled_inputs.pop()
        if model.training and torch.is_grad_enabled() and self.recorders:
            added = [recorder.total.clone() for recorder in self.penalty_recorders]
            for penalised, before in zip(self.penalty_recorders, self._before, strict=True):
                penalised.total.copy_(before)
            kept = [recorder.compiled for recorder in self.recorders]
            # an inspection of the output would be traced
            self.compiled = Compiled(self, output, added, kept)
            for recorder in self.recorders:
                recorder.compiled = []

    def note(self, compiled: Compiled) -> None:
        """Create the `Forward` of a forward that ran as compiled code."""
        self._forget_gone()
        forward = self._new()
        for recorder, kept in zip(self.recorders, compiled.kept, strict=True):
            for value in kept:
                forward.keep(recorder, Record(value))
        for penalty, added in zip(self.penalty_recorders, compiled.added, strict=True):
            if (record := penalty.of_compiled(added)) is not None:
                forward.keep(penalty, record)
        forward.end(compiled.output)

    def _note_compiled(self) -> None:
        """Note the last compiled forward, and values of compiled layers outside of forwards."""
        compiled, self.compiled = self.compiled, None
        if compiled is not None:
            compiled.note()
        self._take_compiled(self._new())

    def _take_compiled(self, forward: Forward) -> None:
        """Move the values that compiled layers added to totals into a forward's records."""
        for recorder in self.recorders:
            if recorder.compiled:
                kept, recorder.compiled = recorder.compiled, []
                for value in kept:
                    forward.keep(recorder, Record(value))
        for penalty in self.penalty_recorders:
            if (record := penalty.take_total()) is not None:
                forward.keep(penalty, record)

    # Choice of forwards

    def watch(
        self,
        penalty_recorders: Sequence[PenaltyRecorder],
        output_recorders: Sequence[Recorder],
        others: Sequence[Recorder],
    ) -> None:
        """Add the recorders of a rule."""
        self.penalty_recorders += penalty_recorders
        self.output_recorders += output_recorders
        self.recorders += [*penalty_recorders, *output_recorders, *others]

    def _give_up(self, forward: Forward, why: str) -> None:
        """Forget an uncounted forward; a loss that depends on it is an error from now on."""
        forward.mark.lose(why)
        self.pending.pop(forward.number, None)
        self._lost = [mark for mark in self._lost if mark() is not None] + [weakref.ref(forward.mark)]

    def _forget(self, forward: Forward, why: str) -> None:
        if forward.collection:
            self.pending.pop(forward.number, None)
        else:
            self._give_up(forward, why)

    def _forget_gone(self) -> None:
        """Forget forwards that no loss can depend on any more.

        A user may still hold an activation of a forward whose outputs are gone, which can't be
        detected. If the model passes activations on, to hooks or as attributes, up to `_MOST_KEPT`
        of these forwards are kept for losses that depend on them.
        """
        for forward in list(self.pending.values()):
            if forward.call is not None and not forward.call.runs():  # ended in another thread
                self._give_up(forward, _ENDED)
        gone = [forward for forward in list(self.pending.values()) if forward.gone]
        kept = [forward for forward in gone if not forward.collection][-_MOST_KEPT:]
        root = self.root() if kept else None
        if root is None or not hands_on(root):
            kept = []
        for forward in gone:
            if forward in kept:
                forward.past = True
            else:
                self._forget(forward, "its output was gone before the loss was computed")

    def stepped(self) -> None:
        """Note a step of an optimizer that holds the model's parameters or was given to `attach`.

        Counted forwards are forgotten. Uncounted forwards count from now on only for losses that
        depend on them. If the dependence can't be seen (layers called alone), they are forgotten
        once a later forward is counted, or at the next step.
        """
        self._empty_cells()
        self._note_compiled()
        over = [forward for forward in list(self.pending.values()) if forward.call is None]
        counted = max((forward.number for forward in over if forward.collection), default=0)
        kept = [f for f in over if not (f.collection or f.gone or (f.open_ended and (f.past or f.number < counted)))]
        kept = [forward for forward in kept if forward.marked][-_MOST_KEPT:]
        for forward in over:
            if forward not in kept:
                self._forget(forward, "the optimizer has taken steps since")
            forward.past = True
        self.overridden.forget()
        self.current, self.outputs = [], {}
        for rule in self.derived:
            rule.forget()

    def clear(self) -> None:
        """Forget everything, as if no forward had ever run."""
        self._note_compiled()
        self.pending.clear()
        self._lost = []
        self.overridden.forget()
        self.current, self.outputs = [], {}
        for rule in self.derived:
            rule.forget()

    def last(self, rule: str) -> float:
        """Return the last collected value of a rule on activations; nan before the first."""
        parts = [part for recorder in self.recorders if rule in recorder.factors for part in recorder.last(rule)]
        return sum(float(part.mean()) for part in parts) if parts else float("nan")

    def collect(self, loss: Tensor | None = None) -> bool:
        """Put records of the counted forwards into `current` and `outputs`; False if none counts.

        Args:
            loss: the loss. If it is None or has no graph, all uncounted forwards since the last
                step count.

        Raises:
            NeverFiredError: a layer with rules was never called.
            CaptureError: the loss depends on a forward that was given up.
        """
        running = self.running()
        self._empty_cells()
        self._note_compiled()
        ready = [f for f in list(self.pending.values()) if f.call is None or f is running]
        for forward in ready:
            forward.left_transform()
        given = [forward for forward in ready if any(forward.records.values())]
        counted = self._depended_on(given, loss) if loss is not None and loss.grad_fn is not None else _since(given)
        self._check_transforms(counted, ready)
        for rule in self.derived:
            rule.collect(counted)
        self._check_fired()
        self.current = [self._drained(recorder, counted) for recorder in self.penalty_recorders] if counted else []
        self.outputs = _outputs(self.output_recorders, counted)
        if any(not forward.collection for forward in counted):
            for forward in ready:
                if forward.collection and forward.open_ended:
                    self._forget(forward, "")
            collection = next(self._collections)
            for forward in counted:
                forward.collection = collection
                active, forward.active = forward.active, []
                with torch.no_grad():
                    for activity, fraction in active:
                        activity.add(fraction)
        return bool(counted)

    def _depended_on(self, ready: Sequence[Forward], loss: Tensor) -> list[Forward]:
        """Return the uncounted forwards that the loss depends on; if none, the counted ones."""
        new = {forward.number for forward in ready if forward.marked and not forward.collection}
        old = {forward.number for forward in ready if forward.marked}
        self._lost = [mark for mark in self._lost if mark() is not None]
        found = marks_before(loss, self._key, () if self._lost else new or old)
        for mark in found:
            if mark.lost:
                raise CaptureError(
                    f"the loss depends on a forward of the model whose activations were given up, as {mark.lost}. Keep "
                    "what the model returns (out = model(x)) until reg.loss(...)"
                )
        numbers = {mark.number for mark in found}
        depended_on = [f for f in ready if (f.number in numbers if f.marked else f.hidden and not f.past)]
        return [forward for forward in depended_on if not forward.collection] or depended_on

    def _check_transforms(self, counted: Sequence[Forward], ready: Sequence[Forward]) -> None:
        """Check that each recorder's values were seen outside torch.func transforms, if anywhere.

        Raises:
            CaptureError: a recorder saw values only inside a transform, which they can't leave.
        """
        asked = counted or [forward for forward in ready if not forward.collection]
        for recorder in self.recorders:
            seen = any(forward.records.get(recorder) for forward in asked)
            if not seen and any(recorder in forward.lost for forward in asked):
                for forward in asked:
                    self.pending.pop(forward.number, None)
                raise CaptureError(
                    f"{recorder.rule}: the {recorder.point} were seen inside a transform of torch.func (grad, vmap, "
                    f"...), which nothing can leave. {recorder.way_out}"
                )

    def _check_fired(self) -> None:
        if self._reached:
            return
        self._reached = all(recorder.fired for recorder in self.recorders)
        never = [recorder for recorder in self.recorders if not recorder.fired and not recorder.optional]
        if never and not self.ran and len(never) == len(self.recorders):
            raise NeverFiredError(
                "the model has run no training forward since the rules were attached, so there are no outputs to "
                "penalise: call reg.loss(...) after the model's forward, in train() mode and with gradients on"
            )
        if never:
            names = ", ".join(
                sorted({f"{recorder.point.name!r} ({', '.join(recorder.factors)})" for recorder in never})
            )
            raise NeverFiredError(
                f"a training forward ran, but these places were never reached: {names}. The layer may be unused, in "
                "eval() mode, called past its hooks (F.linear(x, layer.weight), layer.forward(x)) or compiled before "
                "the rules were attached. Select a layer that is called, or say optional=True in .on(...)"
            )

    def _drained(self, recorder: PenaltyRecorder, forwards: Sequence[Forward]) -> Collected:
        """Return the weighted value of a recorder at these forwards."""
        records = _records(recorder, forwards)
        recorder.check(records)
        direct, hidden = [r for r in records if r.graph], [r for r in records if not r.graph]
        calls: Any = sum([record.calls for record in records]) if recorder.point.place.calls == "mean" else 1
        share: Any = 0.0
        if records:
            share = recorder.weight / (calls.clamp_min(1) if isinstance(calls, Tensor) else calls)
        unseen: Any = sum([record.value for record in hidden]) * share if hidden else None
        seen, factor = (direct[0].value, direct[0].factor) if len(direct) == 1 else (None, 1.0)
        if len(direct) > 1:
            seen = torch.stack([record.value * record.factor for record in direct]).sum()
        if isinstance(share, Tensor) and seen is not None:
            seen = seen * share
        else:
            factor = factor * share
        recorder.rooted = bool(hidden)
        parts = ((seen, factor), (unseen, 1.0))
        recorder.remember([(unwrapped(x) if isinstance(x, Tensor) else x, by) for x, by in parts if x is not None])
        return Collected(recorder, seen, factor, unseen, share)

    # Cells

    def fill_cells(self, collected: Sequence[Collected], gradient: Tensor) -> None:
        """Write the gradient of each recorder's value into its cell, for the current backward."""
        upstream: Any = gradient.item() if gradient.is_cpu else gradient
        for one in collected:
            if one.hidden is not None:
                # .data keeps the version: the forward's graph holds the cell, with its new value
                self._filled.append(one.recorder)
                one.recorder.cell.data.fill_(upstream * one.share)

    def empty_cells(self) -> None:
        """Zero the cells at the end of a backward: a loss without `reg.loss` adds no penalty."""
        filled, self._filled = self._filled, []
        for recorder in filled:
            recorder.cell.data.zero_()

    def _empty_cells(self) -> None:
        """Zero the cells after a backward that an exception ended."""
        if self._filled and not in_backward():
            self.empty_cells()


def _since(ready: Sequence[Forward]) -> list[Forward]:
    """Return the uncounted forwards since the last step; if there are none, the last counted."""
    recent = [forward for forward in ready if not forward.past]
    numbers = [forward.collection for forward in recent]
    return [forward for forward in recent if forward.collection == (0 if 0 in numbers else max(numbers))]


def hands_on(model: nn.Module) -> bool:
    """Return True if the model passes activations on: to a foreign hook, or as an attribute."""
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not isinstance(hook, Hook) or hook.hands_on for hook in hooks if not _of_torch(hook)):
            return True
        own = [value for value in vars(module).values() if isinstance(value, Tensor | list | tuple)]
        members = [member for value in own for member in ((value,) if isinstance(value, Tensor) else value)]
        if any(isinstance(member, Tensor) and member.grad_fn is not None for member in members):
            return True
    return False


def _of_torch(hook: Any) -> bool:
    """Return True for a hook of torch itself, such as FSDP2's or weight_norm's."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")


def _records(recorder: Recorder, forwards: Sequence[Forward]) -> Sequence[Record]:
    """Return a recorder's records of these forwards, of the calls that it asks for."""
    return recorder.of_call([record for forward in forwards for record in forward.records.get(recorder, ())])


def _outputs(output_recorders: Sequence[Recorder], forwards: Sequence[Forward]) -> dict[str, dict[str, Tensor]]:
    outputs: dict[str, dict[str, Tensor]] = {}
    for recorder in output_recorders:
        records = _records(recorder, forwards)
        recorder.check(records)
        named = outputs.setdefault(recorder.rule, {})
        for call, record in enumerate(records):
            named[recorder.point.key + (f"#{call + 1}" if call else "")] = record.value
    return outputs


class RootBegins(Hook):
    """Pre-hook of the model: begins a forward."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    @not_alone
    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if exporting():
            return
        names = self.forwards.names
        inputs = None if names is None else (args, kwargs, names)
        if torch.compiler.is_compiling():
            self.forwards.begin_compiled(module, inputs)
        else:
            self.forwards.begin(module, inputs, sys._getframe(1))


class RootEnds(RootBegins):
    """Post-hook of the model: ends a forward.

    After an `Exception` it is called, too, from another frame.
    """

    @not_alone
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # type: ignore[override]
        if exporting():
            return None
        if torch.compiler.is_compiling():
            self.forwards.end_compiled(module, output)
            return None
        result = self.forwards.end(output, sys._getframe(1))
        return None if result is output else result
