"""The forwards of a model with rules on its activations: when to record, and which of them count for a loss.

A `Forward` is kept while a loss may depend on it: while one of its outputs or of its gradients
exists, as weak references to their marks tell. The node of an activation tells nothing, as our own
records keep it. Where the model hands activations on (a hook of somebody else, an attribute of a
layer), forwards whose outputs are gone are kept too, up to 16. A loss that depends on a forward that
was given up is an error. A graph that is cut by hand (split learning, cached gradients) can't be
followed: add `reg.penalty()` there.

Inside torch.func a value can't leave the transform: it is collected there, or that is an error.
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
from restrain.engine.core import Hook, Overrides, exporting
from restrain.engine.forward.marks import Mark, marks_before
from restrain.engine.forward.masks import Inputs
from restrain.engine.forward.recording import PenaltyRecorder, Recorder
from restrain.engine.forward.records import Forward, Record
from restrain.errors import CaptureError, NeverFiredError
from restrain.penalties.functorch import unwrapped
from restrain.torch_private import checkpoint_frame, in_backward, not_alone, recomputing_saved_tensors

_MOST_KEPT = 16  # forwards that no loss has counted, but one may yet depend on
_ENDED = "it was ended by an exception"
_keys = itertools.count()
_paused = Block()


def paused() -> Block:
    """Within it, no attachment records in this thread: for forwards that only look (`rs.activations`)."""
    return _paused


@dataclass
class Collected:
    """Weighted value of a recorder at a collection: `direct` × `factor` with its graph, `hidden` without."""

    recorder: PenaltyRecorder
    direct: Tensor | None
    factor: float
    hidden: Tensor | float | None
    share: Tensor | float  # the recorder's gradient for a loss gradient of one, in its cell

    def due(self, rules: Collection[str]) -> Collected | None:
        """The same for these rules together; None where none of them looks at the place."""
        factors = [factor for rule, factor in self.recorder.factors.items() if rule in rules]
        if not factors:
            return None
        factor = sum(factors)
        hidden = None if self.hidden is None else self.hidden * factor
        return Collected(self.recorder, self.direct, self.factor * factor, hidden, self.share * factor)


class Derived(Protocol):
    """A rule on derivatives; the `Derivative` of `jacobians`."""

    recorders: list[Recorder]

    def collect(self, forwards: Sequence[Forward]) -> None:
        """Take what these forwards gave; the same forwards again change nothing."""

    def forget(self) -> None:
        """Forget what was collected."""


class Further(Protocol):
    """A further forward for the sake of a derivative; the `Rerun` of `jacobians`."""

    call: Call


@dataclass
class _Running:
    """A forward of the model that runs; `forward` is that of the outermost one, None if that one isn't in training."""

    call: Call
    inputs: Inputs | None
    forward: Forward | None


class _Thread(threading.local):
    """What runs in this thread: forwards of the model, the innermost last, and a further forward for a derivative."""

    def __init__(self) -> None:
        self.running: list[_Running] = []
        self.further: Any = None


class Compiled:
    """A forward that ran as compiled code.

    Compiled code can't mark nodes, but it can store an object. The attachment notes it before the next loss, or when
    the next compiled forward takes its place.

    Args:
        forwards: those of the attachment.
        output: of the model.
        added: what it added to the total of each penalty's recorder.
        kept: what it gave to each recorder beside that.
    """

    forwards: Forwards | None = None

    def __init__(self, forwards: Forwards, output: Any, added: list[Tensor], kept: list[list[Any]]) -> None:
        self.forwards, self.output, self.added, self.kept = forwards, output, added, kept

    @not_alone
    def note(self) -> None:
        """Have it noted, once."""
        forwards, self.forwards = self.forwards, None
        if forwards is not None:
            forwards.note(self)

    @not_alone
    def __del__(self) -> None:
        self.note()


class Forwards:
    """The training forwards of one model from which losses are still to come."""

    def __init__(self) -> None:
        self.penalty_recorders: list[PenaltyRecorder] = []
        self.output_recorders: list[Recorder] = []
        self.derived: list[Derived] = []
        self.recorders: list[Recorder] = []  # all these
        self._reached = False  # whether each place was
        self.ran = False  # a training forward ran since the last real optimizer step
        self.pending: dict[int, Forward] = {}  # by number, in their order
        self._numbers, self._collections = itertools.count(1), itertools.count(1)
        self._key = f"restrain {next(_keys)}"
        self._lost: list[weakref.ref[Mark]] = []  # marks of forwards that were given up before any loss counted them
        self._thread = _Thread()
        self.current: list[Collected] = []  # of the last collection
        self.outputs: dict[str, dict[str, Tensor]] = {}  # rule -> named outputs, for penalties on the whole network
        self.names: tuple[str, ...] | None = None  # of the forward's positional parameters, if a place asks for a mask
        self.began: Callable[[], None] = lambda: None  # called when a training forward begins, in eager code
        self.overridden = Overrides()
        self._of_frames: weakref.WeakKeyDictionary[Any, Inputs] = weakref.WeakKeyDictionary()
        self._filled: list[PenaltyRecorder] = []  # whose cells aren't empty
        self.root: Callable[[], nn.Module | None] = lambda: None
        # Of compiled code:
        self.compiled: Compiled | None = None  # the last forward
        self._before: list[Tensor] = []  # totals
        self._compiled_inputs: list[Inputs] = []

    # What runs

    def running(self, below: FrameType | None = None) -> Forward | None:
        """The training forward that runs in this thread; those that an exception has ended are given up."""
        running = self._thread.running
        while running and not running[-1].call.runs(below or sys._getframe(1)):
            ended = running[-1]
            if len(running) == 1 and ended.forward is not None:
                self._give_up(ended.forward, _ENDED)
            del running[-1:]
        return running[-1].forward if running else None

    def outermost(self) -> Forward | None:
        """The training forward that runs in this thread, outside of any call of the model within it."""
        forward = self.running()
        return forward if len(self._thread.running) == 1 else None

    def mode(self) -> str:
        """What a layer that is called now should do with its penalties."""
        if torch.compiler.is_compiling():
            return "compiled" if torch.is_grad_enabled() else "off"
        if _paused.on:
            return "off"
        if in_backward():
            return "recompute" if torch.is_grad_enabled() else "off"
        return "record" if torch.is_grad_enabled() or self.running() is not None else "off"

    def plain(self) -> Forward | None:
        """The training forward that a layer belongs to, if eager code runs and nothing else goes on; else None."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_backward() or _paused.on:
            return None
        return self.running()

    def forward(self) -> Forward:
        """The forward to which a layer belongs that is called now; of a layer that is called alone, one of its own."""
        forward = self.running()
        return self._new() if forward is None else forward

    def _new(self, call: Call | None = None) -> Forward:
        return Forward(self.pending, self._key, next(self._numbers), call)

    def passes(self, mode: str) -> bool:
        """Whether, in this mode, another tensor may go on in the place of a layer's output.

        Rules on derivatives look at the graph between layers, which is to be the model's own.
        """
        return not self.derived and (mode == "record" or (mode == "recompute" and recomputing_saved_tensors()))

    @property
    def further(self) -> Any:
        """The further forward that runs in this thread for a derivative."""
        further = self._thread.further
        return further if further is not None and further.call.runs(sys._getframe(1)) else None

    @further.setter
    def further(self, further: Further | None) -> None:
        self._thread.further = further

    def begin(self, model: nn.Module, inputs: Inputs | None, frame: FrameType) -> None:
        """A forward of the whole model begins, in this frame."""
        outer, call = self.running(frame.f_back), Call(frame, model)
        nested, trains = bool(self._thread.running), model.training and torch.is_grad_enabled()
        if not nested and not _paused.on:
            self.overridden.look(model)
            if trains and not in_backward():
                self.began()
                self.ran = True
                self._tidy()
                outer = self._new(call)
        self._thread.running.append(_Running(call, inputs, outer))
        self._show_inputs()

    def _show_inputs(self) -> None:
        """Let compiled code below the model see what the innermost forward was called with."""
        if self.names is not None:
            shown = [running.inputs for running in self._thread.running[-1:]]
            self._compiled_inputs = [inputs for inputs in shown if inputs is not None]

    def _tidy(self) -> None:
        """Before a forward: empty cells, forget forwards whose outputs are gone, note what compiled code gave."""
        self._empty_cells()
        self._note_compiled()
        self._forget_gone()

    def end(self, output: Any, frame: FrameType) -> Any:
        """The forward that runs in this frame ended, with this output; in another frame, an exception ended one.

        Return the output, in which aliases may stand in the place of tensors.
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
        """What the model's forward was called with, for a layer that is called now; None outside of a forward.

        Raises:
            CaptureError: it can't be told.
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
        """A forward of the whole model begins, in compiled code, into which this is traced."""
        if inputs is not None:
            self._compiled_inputs.append(inputs)
        if model.training and torch.is_grad_enabled():
            self.ran = True
            self._before = [recorder.total.clone() for recorder in self.penalty_recorders]
            for recorder in self.penalty_recorders:
                recorder.total.zero_()

    def end_compiled(self, model: nn.Module, output: Any) -> None:
        """It ended."""
        if self._compiled_inputs:
            self._compiled_inputs.pop()
        if model.training and torch.is_grad_enabled() and self.recorders:
            added = [recorder.total.clone() for recorder in self.penalty_recorders]
            for penalised, before in zip(self.penalty_recorders, self._before, strict=True):
                penalised.total.copy_(before)
            kept = [recorder.compiled for recorder in self.recorders]
            self.compiled = Compiled(self, output, added, kept)  # a look at the output would be traced
            for recorder in self.recorders:
                recorder.compiled = []

    def note(self, compiled: Compiled) -> None:
        """Make a forward of one that ran as compiled code."""
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
        """Note compiled forwards, and what compiled layers gave outside of forwards."""
        compiled, self.compiled = self.compiled, None
        if compiled is not None:
            compiled.note()
        self._take_compiled(self._new())

    def _take_compiled(self, forward: Forward) -> None:
        """Give to a forward what compiled layers added to the totals."""
        for recorder in self.recorders:
            if recorder.compiled:
                kept, recorder.compiled = recorder.compiled, []
                for value in kept:
                    forward.keep(recorder, Record(value))
        for penalty in self.penalty_recorders:
            if (record := penalty.take_total()) is not None:
                forward.keep(penalty, record)

    # Which forwards count

    def watch(
        self,
        penalty_recorders: Sequence[PenaltyRecorder],
        output_recorders: Sequence[Recorder],
        others: Sequence[Recorder],
    ) -> None:
        """Look at the places of one more rule."""
        self.penalty_recorders += penalty_recorders
        self.output_recorders += output_recorders
        self.recorders += [*penalty_recorders, *output_recorders, *others]

    def _give_up(self, forward: Forward, why: str) -> None:
        """Forget a forward that no loss has counted; one that depends on it is an error."""
        forward.mark.lose(why)
        self.pending.pop(forward.number, None)
        self._lost = [mark for mark in self._lost if mark() is not None] + [weakref.ref(forward.mark)]

    def _forget(self, forward: Forward, why: str) -> None:
        if forward.collection:
            self.pending.pop(forward.number, None)
        else:
            self._give_up(forward, why)

    def _forget_gone(self) -> None:
        """Forget the forwards that nothing depends on any more.

        Of those whose outputs are gone, somebody may still hold an activation, which can't be told. Where the model
        hands activations on, to hooks or as attributes, some are kept for losses that depend on them.
        """
        for forward in list(self.pending.values()):
            if forward.call is not None and not forward.call.runs():  # in a thread that is over
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
        """An optimizer that holds the model's parameters, or was given to `attach`, took a step.

        What a loss has counted is forgotten. What none has counted by then, counts only for a loss that depends on it.
        Where it can't be told whether there may be one (layers called alone), it is forgotten after a later forward was
        counted, or another step was taken.
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
        """Forget all, as if no forward had ever run."""
        self._note_compiled()
        self.pending.clear()
        self._lost = []
        self.overridden.forget()
        self.current, self.outputs = [], {}
        for rule in self.derived:
            rule.forget()

    def last(self, rule: str) -> float:
        """The value of a rule on activations that was last collected; nan before the first."""
        parts = [part for recorder in self.recorders if rule in recorder.factors for part in recorder.last(rule)]
        return sum(float(part.mean()) for part in parts) if parts else float("nan")

    def collect(self, loss: Tensor | None = None) -> bool:
        """Put into `current` and `outputs` what those forwards gave that count for a loss; whether there are any.

        Args:
            loss: None, and a loss without a graph, counts all that no loss has counted since the last step.

        Raises:
            NeverFiredError: a place was never reached.
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
        return bool(counted)

    def _depended_on(self, ready: Sequence[Forward], loss: Tensor) -> list[Forward]:
        """The forwards that the loss depends on: those that no loss has counted, or where there is none, all."""
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
        """Refuse what was seen inside a transform of torch.func only, if it would be missing.

        Raises:
            CaptureError: so it is.
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
        """The weighted value of a recorder at these forwards."""
        records = [record for forward in forwards for record in forward.records.get(recorder, ())]
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
        """Write into each recorder's cell what its value's gradient is, for the backward that runs."""
        upstream: Any = gradient.item() if gradient.is_cpu else gradient
        for one in collected:
            if one.hidden is not None:
                # .data: the graph of the forward holds the cell, and may see another value in it than at the forward
                self._filled.append(one.recorder)
                one.recorder.cell.data.fill_(upstream * one.share)

    def empty_cells(self) -> None:
        """At the end of the backward: one without `reg.loss` adds nothing of ours."""
        filled, self._filled = self._filled, []
        for recorder in filled:
            recorder.cell.data.zero_()

    def _empty_cells(self) -> None:
        """After a backward that an exception ended."""
        if self._filled and not in_backward():
            self.empty_cells()


def _since(ready: Sequence[Forward]) -> list[Forward]:
    """The forwards since the last step that no loss has counted; where there is none, those that the last one did."""
    recent = [forward for forward in ready if not forward.past]
    numbers = [forward.collection for forward in recent]
    return [forward for forward in recent if forward.collection == (0 if 0 in numbers else max(numbers))]


def hands_on(model: nn.Module) -> bool:
    """Whether a hook of somebody else sees activations of the model, or one stands as an attribute of a layer."""
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
    """Whether a hook is one of torch itself: of FSDP2, of weight_norm."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")


def _outputs(output_recorders: Sequence[Recorder], forwards: Sequence[Forward]) -> dict[str, dict[str, Tensor]]:
    outputs: dict[str, dict[str, Tensor]] = {}
    for recorder in output_recorders:
        records = [record for forward in forwards for record in forward.records.get(recorder, ())]
        recorder.check(records)
        named = outputs.setdefault(recorder.rule, {})
        for call, record in enumerate(records):
            named[recorder.point.key + (f"#{call + 1}" if call else "")] = record.value
    return outputs


class RootBegins(Hook):
    """Pre-hook of the model itself."""

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
    """Post-hook of the model itself; called after an `Exception` too, from another frame."""

    @not_alone
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # type: ignore[override]
        if exporting():
            return None
        if torch.compiler.is_compiling():
            self.forwards.end_compiled(module, output)
            return None
        result = self.forwards.end(output, sys._getframe(1))
        return None if result is output else result
