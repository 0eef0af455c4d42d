"""The forwards of a model with rules on its activations: when to record, and what they add up to for the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine.capture import DeadHook, RawTap, Tap
from restrain.engine.injection import in_backward
from restrain.errors import NeverFiredError

_paused = 0


@contextmanager
def paused() -> Iterator[None]:
    """Within it, no attachment records: for forwards that only look (`rs.activations`)."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


@dataclass
class Collected:
    """What one tap gave since the last collection, weighted: `direct` with its graph, `hidden` without."""

    tap: Tap
    direct: Tensor | None
    hidden: Tensor | None
    share: Tensor | float  # the tap's gradient for a loss gradient of one, in its cell


class Forwards:
    """The training forwards of one model since its rules' values were last collected."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []
        self.raws: list[RawTap] = []
        self.ran = False  # a training forward ran since the last real optimizer step
        self.current: list[Collected] = []
        self.outputs: dict[str, dict[str, Tensor]] = {}  # rule -> named outputs, for penalties on the whole network
        self._depth = 0
        self._training = False  # inside a forward that began in training and with gradients on

    def mode(self) -> str:
        """What a layer that is called now should do with its penalties."""
        if torch.compiler.is_compiling():
            return "compiled" if torch.is_grad_enabled() else "off"
        if _paused:
            return "off"
        if in_backward():
            return "recompute" if torch.is_grad_enabled() else "off"
        return "record" if self._training or torch.is_grad_enabled() else "off"

    def begin(self, model: nn.Module) -> None:
        """A forward of the whole model begins."""
        if torch.compiler.is_compiling():
            if model.training and torch.is_grad_enabled():
                self.ran = True
            return
        self._depth += 1
        if self._depth == 1 and model.training and torch.is_grad_enabled() and not _paused and not in_backward():
            self.ran = self._training = True

    def end(self, failed: bool) -> None:
        """The forward ended; what a failed one left is dropped."""
        self._depth -= 1
        if self._depth == 0:
            self._training = False
        if failed:
            self.clear()

    def clear(self) -> None:
        """Forget what was recorded but not collected."""
        for tap in self.taps:
            tap.clear()
        for raw in self.raws:
            raw.records.clear()

    def stepped(self) -> None:
        """An optimizer took a step: what was not collected by then belongs to no loss to come."""
        self.clear()
        self.current, self.outputs = [], {}

    def last(self, rule: str) -> float:
        """The value of a rule on activations that was last collected; nan before the first."""
        parts = [part for tap in self.taps if tap.rule == rule for part in tap.last]
        return sum(float(part) for part in parts) if parts else float("nan")

    def collect(self) -> list[Collected]:
        """What the forwards since the last collection gave; the same again if there was none since.

        Raises:
            NeverFiredError: a place was never reached.
        """
        fresh = any(tap.records or tap.hidden or tap.fired_compiled() for tap in self.taps)
        if fresh or not self.current:
            self._check_fired()
            self.current = [_drain(tap) for tap in self.taps]
        if any(raw.records for raw in self.raws) or not self.outputs:
            self.outputs = _outputs(self.raws)
        return self.current

    def _check_fired(self) -> None:
        for tap in (*self.taps, *self.raws):
            tap.fired = tap.fired or bool(tap.records) or (isinstance(tap, Tap) and (bool(tap.hidden) or tap.fired_compiled()))
        never = [tap for tap in (*self.taps, *self.raws) if not tap.fired and not tap.optional]
        if never and not self.ran and len(never) == len(self.taps) + len(self.raws):
            raise NeverFiredError(
                "the model has run no training forward since the rules were attached, so there are no outputs to "
                "penalise: call reg.loss(...) after the model's forward, in train() mode and with gradients on"
            )
        if never:
            names = ", ".join(sorted({f"{tap.target.name!r} ({tap.rule})" for tap in never}))
            raise NeverFiredError(
                f"a training forward ran, but these places were never reached: {names}. The layer may be unused, in "
                "eval() mode, called past its hooks (F.linear(x, layer.weight), layer.forward(x)) or compiled before "
                "the rules were attached. Select a layer that is called, or say optional=True in .on(...)"
            )


def _drain(tap: Tap) -> Collected:
    tap.settle()
    calls: Tensor | int = len(tap.records) + len(tap.hidden)
    hidden = torch.stack(tap.hidden).sum() if tap.hidden else None
    if tap.fired_compiled():
        hidden = tap.total[0].clone() if hidden is None else tap.total[0] + hidden
        calls = tap.count[0].clone() + calls
    share = tap.weight / (calls if tap.target.place.calls == "mean" else 1) if tap.records or hidden is not None else 0.0
    direct = torch.stack(tap.records).sum() * share if tap.records else None
    hidden = None if hidden is None else hidden * share
    tap.rooted = bool(tap.hidden)
    tap.last = [part.detach() for part in (direct, hidden) if part is not None]
    tap.clear()
    return Collected(tap, direct, hidden, share)


def _outputs(raws: Sequence[RawTap]) -> dict[str, dict[str, Tensor]]:
    outputs: dict[str, dict[str, Tensor]] = {}
    for raw in raws:
        named = outputs.setdefault(raw.rule, {})
        for number, tensor in enumerate(raw.records):
            named[raw.target.name + (f"#{number + 1}" if number else "")] = tensor
        raw.records = []
    return outputs


def set_cells(collected: Sequence[Collected], gradient: Tensor | None) -> None:
    """Write into each tap's cell what its value's gradient is; None empties them."""
    for one in collected:
        if one.hidden is not None:
            # .data: the graph of the forward holds the cell, and may see another value in it than at the forward
            one.tap.cell.data.fill_(gradient * one.share) if gradient is not None else one.tap.cell.data.zero_()


class RootBegins:
    """Pre-hook of the model itself."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    def __reduce__(self) -> tuple[type[DeadHook], tuple[()]]:
        return (DeadHook, ())

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.forwards.begin(module)


class RootEnds(RootBegins):
    """Post-hook of the model itself; called after an exception too, with None for the output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # type: ignore[override]
        if not torch.compiler.is_compiling():  # where even a look at the output would be traced
            self.forwards.end(failed=output is None)
