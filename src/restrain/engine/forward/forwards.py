"""The forwards of a model with rules on its activations: when to record, and what they add up to for the loss."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from restrain.engine.core import (
    Hook,
    Overrides,
    exporting,
    structures,
)
from restrain.engine.forward.masks import Inputs
from restrain.engine.forward.recording import PenaltyRecorder, Recorder
from restrain.errors import CaptureError, NeverFiredError
from restrain.penalties.functorch import unwrapped
from restrain.torch_private import checkpoint_frame, in_backward, recomputing_saved_tensors


class _Pause(threading.local):
    """How many pauses this thread is in."""

    depth = 0


_pause = _Pause()


@contextmanager
def paused() -> Iterator[None]:
    """Within it, no attachment records in this thread: for forwards that only look (`rs.activations`)."""
    _pause.depth += 1
    try:
        yield
    finally:
        _pause.depth -= 1


@dataclass
class Collected:
    """Weighted value of a recorder since the last collection: `direct` × `factor` with its graph, `hidden` without."""

    recorder: PenaltyRecorder
    direct: Tensor | None
    factor: float
    hidden: Tensor | float | None
    share: Tensor | float  # the recorder's gradient for a loss gradient of one, in its cell


class Derived(Protocol):
    """A rule on derivatives; the `Derivative` of `derivative`."""

    recorders: list[Recorder]

    @property
    def known(self) -> bool:
        """Whether it has collected anything."""

    def collect(self, unrelated: set[int]) -> None:
        """Take what the forwards gave, but for some of them."""

    def forget(self) -> None:
        """Forget what was collected."""


class _End:
    """Hangs on the node of the autograd graph that a forward ended in."""

    def __init__(self, number: int) -> None:
        self.number = number


class Forwards:
    """The training forwards of one model since its rules' values were last collected."""

    def __init__(self) -> None:
        self.penalty_recorders: list[PenaltyRecorder] = []
        self.output_recorders: list[Recorder] = []
        self.derived: list[Derived] = []
        self.recorders: list[Recorder] = []  # all these
        self._reached = False  # whether each place was
        self.ran = False  # a training forward ran since the last real optimizer step
        self.current: list[Collected] = []
        self.outputs: dict[str, dict[str, Tensor]] = {}  # rule -> named outputs, for penalties on the whole network
        self.number = 0  # of the forward that runs or ran last
        self._ends: dict[int, list[weakref.ref[_End]]] = {}  # what lives as long as the ends of a forward's graph
        self._alone = 0  # the number of the last layer that was called outside a forward of the model; negative
        self._key = f"restrain {id(self)}"
        self.depth = 0  # of the forwards of the model that run in eager code
        self.rerun: Any = None  # a forward for the sake of a derivative
        self._training = False  # inside a forward that began in training and with gradients on
        self.names: tuple[str, ...] | None = None  # of the forward's positional parameters, if a place asks for a mask
        self._inputs: list[Inputs] = []  # of the forwards of the model that run, the innermost last
        self.began: Callable[[], None] = lambda: None  # called when a training forward begins, in eager code
        self.overridden = Overrides()
        self._of_frames: weakref.WeakKeyDictionary[Any, Inputs] = weakref.WeakKeyDictionary()

    def mode(self) -> str:
        """What a layer that is called now should do with its penalties."""
        if torch.compiler.is_compiling():
            return "compiled" if torch.is_grad_enabled() else "off"
        if _pause.depth:
            return "off"
        if in_backward():
            return "recompute" if torch.is_grad_enabled() else "off"
        return "record" if self._training or torch.is_grad_enabled() else "off"

    def passes(self, mode: str) -> bool:
        """Whether, in this mode, another tensor may go on in the place of a layer's output.

        Rules on derivatives look at the graph between layers, which is to be the model's own.
        """
        return not self.derived and (mode == "record" or (mode == "recompute" and recomputing_saved_tensors()))

    def plain(self) -> bool:
        """Whether a layer is called in a training forward in eager code, and nothing else is going on."""
        return (
            not torch.compiler.is_compiling()
            and self._training
            and torch.is_grad_enabled()
            and not in_backward()
            and not _pause.depth
        )

    @property
    def recording(self) -> bool:
        """Whether the outermost forward of the model begins or runs, in training and with gradients."""
        return self.depth == 1 and self._training

    def begin(self, model: nn.Module, inputs: Inputs | None = None) -> None:
        """A forward of the whole model begins."""
        if inputs is not None:
            self._inputs.append(inputs)
        if torch.compiler.is_compiling():
            if model.training and torch.is_grad_enabled():
                self.ran = True
            return
        self.depth += 1
        if self.depth == 1 and not _pause.depth:
            self.overridden.look(model)
        if self.depth == 1 and model.training and torch.is_grad_enabled() and not _pause.depth and not in_backward():
            self.began()
            self.ran = self._training = True
            self.number += 1
            if self._ends:
                self._drop({number for number, ends in self._ends.items() if ends and not any(end() for end in ends)})

    def inputs(self) -> Inputs | None:
        """What the model's forward was called with, for a layer that is called now; None outside of a forward.

        Raises:
            CaptureError: it can't be told.
        """
        if torch.compiler.is_compiling():
            return self._inputs[-1] if self._inputs else None
        if not torch.is_grad_enabled():
            raise CaptureError(
                "a place with mask= or lengths= is inside a reentrant checkpoint, whose recomputation doesn't know "
                "the model's arguments; use checkpoint(..., use_reentrant=False)"
            )
        frame = checkpoint_frame()
        if in_backward() and frame in self._of_frames:
            return self._of_frames[frame]
        if frame is not None and self._inputs:
            self._of_frames[frame] = self._inputs[-1]
        return self._inputs[-1] if self._inputs else None

    def end(self, output: Any) -> None:
        """The forward ended, with None for an output if it failed; what a failed one left is dropped."""
        if self._inputs:
            self._inputs.pop()
        if torch.compiler.is_compiling():  # where even a look at the output would be traced
            return
        self.depth -= 1
        if self.depth == 0:
            if self._training and self.recorders:
                tensors = (output,) if type(output) is Tensor else structures.tensors(output)
                nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
                self._ends[self.number] = [self._mark(node, self.number) for node in nodes]
            self._training = False
        if output is None:
            self.clear()

    def _mark(self, node: Any, number: int) -> weakref.ref[_End]:
        """Let something live as long as a node of the autograd graph, without keeping the node alive."""
        end = node.metadata[self._key] = _End(number)
        return weakref.ref(end)

    def _drop(self, forwards: set[int]) -> None:
        """Forget forwards whose outputs nothing depends on any more."""
        for number in forwards:
            del self._ends[number]
        for recorder in self.recorders if forwards else ():
            recorder.drop(forwards)

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

    def forward_of(self, tensor: Tensor) -> int:
        """The number of the forward of the model that gave the tensor; of a layer called alone, one of its own."""
        if self._training or tensor.grad_fn is None:
            return self.number
        known = tensor.grad_fn.metadata.get(self._key)  # type: ignore[attr-defined]  # of another rule at this place
        if isinstance(known, _End):
            return known.number
        self._alone -= 1
        self._ends[self._alone] = [self._mark(tensor.grad_fn, self._alone)]
        return self._alone

    def clear(self) -> None:
        """Forget what was recorded but not collected."""
        for recorder in self.recorders:
            recorder.clear()
        self._ends.clear()

    def stepped(self) -> None:
        """An optimizer took a step: what was not collected by then belongs to no loss to come."""
        self.clear()
        self.overridden.forget()
        self.current, self.outputs = [], {}
        for rule in self.derived:
            rule.forget()

    def last(self, rule: str) -> float:
        """The value of a rule on activations that was last collected; nan before the first."""
        parts = [part for recorder in self.recorders if recorder.rule == rule for part in recorder.last]
        return sum(float(part.mean()) for part in parts) if parts else float("nan")

    def collect(self, loss: Tensor | None = None) -> None:
        """Put what the forwards since the last collection gave into `current`; the same stays if there was none since.

        Given the loss, forwards that it does not depend on are left out: a look at a batch before training, say.

        Raises:
            NeverFiredError: a place was never reached.
        """
        lost = [recorder for recorder in self.recorders if recorder.leave()]
        fired = any(recorder.has_fired() for recorder in self.recorders)
        known = self.current or self.outputs or any(rule.known for rule in self.derived)
        if lost and (fired or not known):
            raise CaptureError(
                f"{lost[0].rule}: the {lost[0].point} were seen inside a transform of torch.func (grad, vmap, ...), "
                f"which nothing can leave. {lost[0].way_out}"
            )
        if fired:
            self._check_fired()
            unrelated = self._unrelated(loss)
            self.current = [_drain(recorder, unrelated) for recorder in self.penalty_recorders]
            self.outputs = _outputs(self.output_recorders, unrelated) if self.output_recorders else {}
            for rule in self.derived:
                rule.collect(unrelated)
            self._ends.clear()
        elif not self.current and not self.outputs:
            self._check_fired()

    def _unrelated(self, loss: Tensor | None) -> set[int]:
        """Of several forwards, those that the loss does not depend on.

        Layers that were called alone are such too, unless the model is only ever used by its layers.
        """
        if loss is None or loss.grad_fn is None or len(self._ends) < 2 or max(self._ends) < 0:
            return set()
        waiting, seen, reached = [loss.grad_fn], {loss.grad_fn}, set()
        while waiting:
            node = waiting.pop()
            reached.add(node.metadata.get(self._key))  # type: ignore[attr-defined]
            following = {node for node, _ in node.next_functions if node is not None} - seen
            seen |= following
            waiting += following
        return {n for n, ends in self._ends.items() if ends and not any(end() in reached for end in ends if end())}

    def _check_fired(self) -> None:
        if self._reached:
            return
        for recorder in self.recorders:
            recorder.fired = recorder.fired or recorder.has_fired()
        self._reached = all(recorder.fired for recorder in self.recorders)
        never = [recorder for recorder in self.recorders if not recorder.fired and not recorder.optional]
        if never and not self.ran and len(never) == len(self.recorders):
            raise NeverFiredError(
                "the model has run no training forward since the rules were attached, so there are no outputs to "
                "penalise: call reg.loss(...) after the model's forward, in train() mode and with gradients on"
            )
        if never:
            names = ", ".join(sorted({f"{recorder.point.name!r} ({recorder.rule})" for recorder in never}))
            raise NeverFiredError(
                f"a training forward ran, but these places were never reached: {names}. The layer may be unused, in "
                "eval() mode, called past its hooks (F.linear(x, layer.weight), layer.forward(x)) or compiled before "
                "the rules were attached. Select a layer that is called, or say optional=True in .on(...)"
            )


def _drain(recorder: PenaltyRecorder, unrelated: set[int]) -> Collected:
    recorder.settle()
    direct = [(value, factor) for number, value, factor in recorder.records if number not in unrelated]
    hidden = [value for number, value in recorder.hidden if number not in unrelated]
    calls: Any = len(direct) + len(hidden)
    unseen: Any = torch.stack(hidden).sum() if hidden else None
    if recorder.fired_compiled():
        total, count = (
            recorder.total.tolist() if recorder.total.is_cpu else recorder.total.clone()
        )  # no one waits for a CPU
        unseen, calls = total if unseen is None else unseen + total, count + calls
    share = (
        recorder.weight / (calls if recorder.point.place.calls == "mean" else 1)
        if direct or unseen is not None
        else 0.0
    )
    unseen = None if unseen is None else unseen * share
    seen, factor = direct[0] if len(direct) == 1 else (None, 1.0)
    if len(direct) > 1:
        seen = torch.stack([value * factor for value, factor in direct]).sum()
    if isinstance(share, Tensor) and seen is not None:
        seen = seen * share
    else:
        factor = factor * share
    recorder.rooted = bool(hidden)
    parts = ((seen, factor), (unseen, 1.0))
    recorder.remember([(unwrapped(x) if isinstance(x, Tensor) else x, times) for x, times in parts if x is not None])
    recorder.clear()
    return Collected(recorder, seen, factor, unseen, share)


def _outputs(output_recorders: Sequence[Recorder], unrelated: set[int]) -> dict[str, dict[str, Tensor]]:
    outputs: dict[str, dict[str, Tensor]] = {}
    for recorder in output_recorders:
        named = outputs.setdefault(recorder.rule, {})
        recorder.settle()
        for call, tensor in enumerate(tensor for number, tensor in recorder.records if number not in unrelated):
            named[recorder.point.key + (f"#{call + 1}" if call else "")] = tensor
        recorder.clear()
    return outputs


def set_cells(collected: Sequence[Collected], gradient: Tensor | None) -> None:
    """Write into each recorder's cell what its value's gradient is; None empties them."""
    upstream: Any = gradient.item() if gradient is not None and gradient.is_cpu else gradient
    for one in collected:
        if one.hidden is not None:
            # .data: the graph of the forward holds the cell, and may see another value in it than at the forward
            one.recorder.cell.data.fill_(
                upstream * one.share
            ) if upstream is not None else one.recorder.cell.data.zero_()


class RootBegins(Hook):
    """Pre-hook of the model itself."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if exporting():
            return
        names = self.forwards.names
        self.forwards.begin(module, None if names is None else (args, kwargs, names))


class RootEnds(RootBegins):
    """Post-hook of the model itself; called after an exception too, with None for the output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # type: ignore[override]
        if self.forwards.depth or (torch.compiler.is_compiling() and not exporting()):
            self.forwards.end(output)
