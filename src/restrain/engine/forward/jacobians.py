"""Penalties on derivatives, bound to activations of a model.

A probe at each activation records its tensor in the forward. If the derivative is taken by a tensor
that needs no gradient (the model's input), the probe replaces it by a tensor in the same storage
that does. If the forward's graph can be differentiated twice, it suffices; else the model is
replayed on the same inputs, with active probes.

The graph's nodes between the activations show obstacles (reentrant checkpoints, fused attention,
compiled code), which samples depend on each other, and whether there is a closed form. The replay
has the same random state, copies of the buffers, no autocast and no compiled code; other rules
don't see it.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from restrain.activation_points import Place
from restrain.callstack import Call
from restrain.engine.core import Hook, structures
from restrain.engine.forward.forwards import Forwards, paused
from restrain.engine.forward.recording import Point, Recorder, batch_dim, way_to
from restrain.engine.forward.records import Forward, Record
from restrain.errors import CaptureError
from restrain.named_tensors import fully_sharded, is_sharded
from restrain.penalties.base import times
from restrain.penalties.derivative import CLOSED, COMPILED, SHARDED, Choice, OnDerivatives, replayed
from restrain.penalties.estimators import Batch, linear, of_the_same
from restrain.penalties.replay import Randomness
from restrain.torch_private import checkpoint_frame, exporting, in_checkpoint, module_compiled, transforming, version


@dataclass(frozen=True)
class Replayable:
    """Arguments of a forward, with the random state, tensor versions and the model's tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    randomness: Randomness | None  # None in compiled code
    versions: tuple[int, ...] | None
    # (module, "_parameters" or "_buffers", key, tensor)
    stored: Sequence[tuple[weakref.ref[nn.Module], str, str, Tensor]] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], root: nn.Module) -> Replayable:
        """Return the arguments with the current random state, versions, and the model's tensors.

        Under `functional_call` these are the substituted tensors. Under FSDP2 none are stored, as
        it substitutes tensors of its own.
        """
        tensors = list(structures.tensors([args, kwargs]))
        modules = [] if fully_sharded(root.modules()) else list(root.modules())
        stored = [
            (weakref.ref(module), kind, key, tensor)
            for module in modules
            for kind in ("_parameters", "_buffers")
            for key, tensor in vars(module)[kind].items()
            if tensor is not None
        ]
        return cls(args, kwargs, Randomness(tensors), tuple(map(version, tensors)), stored)

    @contextmanager
    def substituted(self) -> Iterator[None]:
        """Context in which the model has the forward's tensors instead of its current ones."""
        own = []
        for reference, kind, key, tensor in self.stored:
            cells: Any = {} if (module := reference()) is None else vars(module)[kind]
            now = cells.get(key)
            # On another device the model has been moved since
            if now is not None and now is not tensor and now.device == tensor.device:
                own.append((cells, key, now, tensor))
        try:
            for cells, key, _, tensor in own:
                cells[key] = tensor
            yield
        finally:
            for cells, key, now, _ in own:
                cells[key] = now

    def check(self) -> None:
        """Check that the arguments can be used again.

        Raises:
            CaptureError: the forward changed a tensor in place.
        """
        now = tuple(map(version, structures.tensors([self.args, self.kwargs])))
        if self.versions not in (None, now):
            raise CaptureError(
                "the model's inputs were changed in place since its forward, so it can't run on them again: change a "
                "copy, or take estimator='vjp'"
            )


@dataclass
class Rerun:
    """A running replay: the function that perturbs inputs, and the outputs recorded by probes."""

    whose: Derivative
    call: Call
    move: Callable[[Batch], Tensor]
    outputs: dict[Point, list[Batch]] = field(default_factory=dict)
    moved: int = 0


class Probe(Recorder):
    """Recorder of an activation for a rule on derivatives; its records are batches."""

    way_out = "Penalties on derivatives aren't known there: use loss.backward() on a plain call of the model"

    def __init__(self, rule: Derivative, point: Point, optional: bool) -> None:
        super().__init__(rule.key, point, optional)
        self.whose = rule

    def act(self, module: nn.Module, structure: Any, result: Any) -> Any:
        """Record the layer's tensor; return its outputs or inputs, in which it may be replaced."""
        mode = self.whose.mode()
        if mode == "off":
            return result
        self.fired = True
        if mode != "again" and not self.whose.due():
            return result
        way = self._way(structure)
        h = structures.get(result, way)  # with replacements by earlier rules
        if mode != "again" and transforming():
            self.whose.forwards.forward().lose(self)
            return result  # values can't leave a torch.func transform
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"{self.rule}: the {self.point} are inside a reentrant checkpoint, where they have no graph; "
                "use checkpoint(..., use_reentrant=False)"
            )
        if h.is_complex():
            raise CaptureError(f"{self.rule}: the {self.point} are complex; derivatives are of real tensors")
        packed = structures.packed(structure, way)
        if packed is not None:
            batch = Batch(h, None, int(packed.batch_sizes[0]))
        else:
            batch = Batch.of(h, batch_dim(self.point.place.batch_dim, module, h))
        return self.look(mode, batch, way, result)

    def _way(self, structure: Any) -> structures.Way:
        try:
            return way_to(structure, self.point)
        except CaptureError as error:
            raise CaptureError(f"{self.rule}: {error}") from None

    def look(self, mode: str, batch: Batch, way: structures.Way, result: Any) -> Any:
        """Record or replace the batch found at `way`; return the layer's outputs or inputs."""
        raise NotImplementedError

    def note(self, batch: Batch) -> None:
        """Record a batch of the running forward."""
        forward, tensor = self.whose.forwards.forward(), batch.tensor
        own = dataclasses.replace(batch, forward=forward.number)
        forward.keep(self, Record(own, watched=tensor, version=version(tensor)), tensor)


class Seen(Probe):
    """Probe of an activation whose derivative is taken."""

    def look(self, mode: str, batch: Batch, way: structures.Way, result: Any) -> Any:
        if mode == "recompute":
            return result
        batch = dataclasses.replace(batch, tensor=self.point.seen(batch.tensor))
        if mode == "again":
            self.whose.forwards.further.outputs.setdefault(self.point, []).append(batch)
        else:
            self.note(batch)
        return result


class Moved(Probe):
    """Probe of an activation with respect to which the derivative is taken."""

    def look(self, mode: str, batch: Batch, way: structures.Way, result: Any) -> Any:
        if mode == "again":
            self.whose.forwards.further.moved += 1
            h = self.whose.forwards.further.move(batch)
            if h is not batch.tensor and in_checkpoint():
                raise CaptureError(
                    f"{self.rule}: the {self.point} are inside a checkpoint, whose recomputation would not see how "
                    "they are moved; use estimator='exact' or 'vjp', or a place outside of it"
                )
        else:
            keep = batch.tensor.requires_grad or self._light(mode)
            h = batch.tensor if keep else batch.tensor.detach().requires_grad_()
            if mode == "record":
                self.note(dataclasses.replace(batch, tensor=h))
        return result if h is batch.tensor else structures.put(result, way, h)

    def _light(self, mode: str) -> bool:
        """Return True if inputs need no gradient; a recomputation gives the first run's answer."""
        frame = checkpoint_frame()
        if frame is None:
            return self.whose.light
        if mode == "record":
            self.whose.light_of[frame] = self.whose.light
        return self.whose.light_of.get(frame, self.whose.light)


class Arguments(Recorder, Hook):
    """Pre-hook of the model that keeps its arguments for a possible replay."""

    def __init__(self, rule: Derivative) -> None:
        super().__init__(rule.key, Point("", (), Place("inputs")), optional=True)
        self.whose = rule

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if exporting():
            return
        if torch.compiler.is_compiling():
            if module.training and torch.is_grad_enabled():
                self.compiled.append((args, kwargs))
            return
        forward = self.whose.forwards.outermost()
        if forward is not None and self.whose.runs_again and self.whose.due():
            forward.keep(self, Record(Replayable.of(args, kwargs, module)))


class Derivative:
    """A rule on derivatives, bound to a model.

    Args:
        key: key of the rule.
        what: the penalty with its strength.
        of: activations whose derivative is taken; empty for the derivative of the loss.
        by: activations with respect to which it is taken.
        optional: True if layers may never be called.
        notes: the rule's notes in the report's table.
    """

    def __init__(
        self, key: str, what: OnDerivatives, of: Sequence[Point], by: Sequence[Point], optional: bool, notes: list[str]
    ) -> None:
        self.key, self.strength, self.penalty, self.notes = key, what.strength, what.leaf, notes
        self.forwards = Forwards()  # replaced in `bind`, like the next two
        self.due: Callable[[], bool] = lambda: True
        self._root: Callable[[], nn.Module | None] = lambda: None
        self.seen = [Seen(self, point, optional) for point in of]
        self.moved = [Moved(self, point, optional) for point in by]
        self.arguments = Arguments(self)
        self.recorders: list[Recorder] = [*self.probes, self.arguments]
        self.choice: Choice | None = None
        self.light = False  # the chosen estimator needs no gradient of inputs
        # by checkpoint frame
        self.light_of: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._pending: tuple[list[Batch], list[Batch], list[Replayable]] | None = None
        self._blind = False  # pending records come from compiled code, unseen by probes
        self._term: Tensor | None = None
        self._collected: list[int] = []  # numbers of the forwards that are pending or in the term
        self._say("chosen at the first loss" if self.penalty.estimator == "auto" else self.penalty.estimator)

    def _say(self, estimator: str) -> None:
        """Write the estimator into the rule's notes."""
        projections, exact = self.penalty.projections, estimator.startswith(("exact", "chosen"))
        signs = f", {projections} random direction{'s' * (projections > 1)}"
        self.notes[:] = [f"{self.key}: estimator {estimator}{'' if exact else signs}"]

    def mode(self) -> str:
        """Return a probe's current mode: `Forwards.mode`, or 'again' in a replay for this rule."""
        further = self.forwards.further
        if further is None:
            return self.forwards.mode()
        return "again" if further.whose is self else "off"

    @property
    def probes(self) -> list[Probe]:
        """Probes at layers, `moved` first: at the same activation `seen` gets the moved tensor."""
        return [*self.moved, *self.seen]

    @property
    def runs_again(self) -> bool:
        """True if the rule replays the model, or may have to."""
        if self.penalty.of_loss:
            return False
        return self.choice is None or self.choice.again or self.light or self.choice.estimator == "jvp"

    def _unseen(self, forwards: Sequence[Forward]) -> list[Probe]:
        """Return the probes that compiled code hides in these forwards."""
        arguments = [record for forward in forwards for record in forward.records.get(self.arguments, ())]
        if any(not isinstance(record.value, Replayable) for record in arguments):
            return self.probes
        root = self._root() if arguments else None
        return [] if root is None else [probe for probe in self.probes if _compiled(root, probe.point)]

    def bind(self, forwards: Forwards, due: Callable[[], bool], root: Callable[[], nn.Module | None]) -> None:
        """Bind the rule to an attachment's forwards, schedule and model."""
        self.forwards, self.due, self._root = forwards, due, root
        forwards.derived.append(self)

    def collect(self, forwards: Sequence[Forward]) -> None:
        """Take the records of the given forwards; no effect if these are already taken."""
        numbers = [forward.number for forward in forwards]
        if numbers == self._collected:
            return
        kept: list[list[Any]] = []
        for recorder in self.recorders:
            records = [record for forward in forwards for record in forward.records.get(recorder, ())]
            recorder.check(records)
            kept.append([record.value for record in records])
        moved, by_place, given = kept[: len(self.moved)], kept[len(self.moved) : -1], kept[-1]
        ys = [_weighted(probe, batches) for probe, batches in zip(self.seen, by_place, strict=True)]
        arguments = [g if isinstance(g, Replayable) else Replayable(g[0], g[1], None, None) for g in given]
        self._pending = ([y for some in ys for y in some], [x for some in moved for x in some], arguments)
        unseen = self._unseen(forwards)
        for probe in unseen:
            probe.fired = True
        self._blind, self._term, self._collected = bool(unseen), None, numbers
        if not self._blind and not (moved and any(moved) and (any(by_place) or self.penalty.of_loss)):
            self._pending = None  # not due, or optional layers that weren't called

    def forget(self) -> None:
        """Forget the collected records and the value."""
        self._pending = self._term = None
        self._collected = []

    def value(self, root: nn.Module, loss: Tensor | None) -> Tensor | None:
        """Return strength × value at the collected forwards, with its graph; None if none are due.

        Raises:
            CaptureError, PenaltyError: the derivative can't be taken as requested.
        """
        if self._pending is not None and not (self.penalty.of_loss and loss is None):
            ys, xs, given = self._pending
            self._term = times(self.strength, self._value(root, ys, xs, given, loss))
            self.recorders[0].remember([(self._term.detach(), 1.0)])
            self._pending = None
        return self._term

    def _value(
        self, root: nn.Module, ys: list[Batch], xs: list[Batch], given: list[Replayable], loss: Tensor | None
    ) -> Tensor:
        if self.penalty.of_loss:
            assert loss is not None
            ys = [Batch.of(loss, None)]
        if self.choice is None:
            self.choice = self.penalty.choose(ys, xs, SHARDED if _sharded(root) else COMPILED if self._blind else "")
            self._say(str(self.choice))
            self.light = self.choice.why == CLOSED or self.choice.again
        choice = self.choice
        if choice.estimator == "jvp" and not choice.again:
            return self._by_tangents(root, ys, xs, given)
        if self.light and not choice.again and any(linear(y, of_the_same(y, xs)) is None for y in ys):
            # The model's function has changed, and the closed form doesn't hold any more
            self.light, choice = False, Choice("exact", again=True)
        return self._by_runs(root, given, choice) if choice.again else self.penalty.of_graph(ys, xs, choice.estimator)

    def _by_tangents(self, root: nn.Module, ys: list[Batch], xs: list[Batch], given: list[Replayable]) -> Tensor:
        """Return the value from the forward's graph, or by a replay if that is impossible.

        If it is impossible although inputs needed a gradient, all later steps replay.
        """
        for one in given:
            one.check()
        before = torch.get_rng_state()
        found = self.penalty.of_tangents(ys, xs)
        if found is None:
            torch.set_rng_state(before)  # the replay draws what it will draw at all later steps
            if not self.light:
                self.choice = Choice("jvp", again=True)
                self._say(str(self.choice))
            self.light = not self.light
            return self._by_runs(root, given, Choice("jvp", again=True))
        value, self.light = found
        return value

    def _by_runs(self, root: nn.Module, given: list[Replayable], choice: Choice) -> Tensor:
        if not given:
            raise CaptureError(
                f"{self.key}: estimator={choice.estimator!r} runs the model again, but only layers of it were "
                "called, not the model itself"
            )
        device = next((p.device for p in root.parameters()), torch.device("cpu"))
        values = []
        for one in given:
            run = replayed(self._run(root, one), one.randomness, root, device, choice.estimator)
            with one.substituted():
                values.append(self.penalty.of_runs(run, choice.estimator))
        mean = all(probe.point.place.calls == "mean" for probe in self.seen)
        return torch.stack(values).mean() if mean else torch.stack(values).sum()

    def _run(self, root: nn.Module, given: Replayable) -> Callable[[Any], list[Batch]]:
        def run(move: Callable[[Batch], Tensor]) -> list[Batch]:
            given.check()
            rerun = self.forwards.further = Rerun(self, Call(sys._getframe()), move)
            try:
                with paused():
                    root(*given.args, **given.kwargs)
            finally:
                self.forwards.further = None
            missing = [probe.point for probe in self.seen if probe.point not in rerun.outputs]
            if missing or not rerun.moved:
                point = missing[0] if missing else self.moved[0].point
                raise CaptureError(f"{self.key}: the {point} were not reached when the model ran again")
            found = [_weighted(probe, rerun.outputs[probe.point]) for probe in self.seen]
            return [y for some in found for y in some]

        return run

    def of_tensors(self, tensors: dict[int, Tensor]) -> Tensor:
        """Return strength × value for given activations: {id of a probe: tensor}."""
        root = self._root()
        assert root is not None
        found = []
        for probe in self.probes:
            h = probe.point.seen(tensors[id(probe)])
            found.append(Batch.of(h, batch_dim(probe.point.place.batch_dim, probe.point.find(root), h)))
        xs, ys = found[: len(self.moved)], found[len(self.moved) :]
        return times(self.strength, self.penalty.of_graph(ys, xs, self.penalty.choose(ys, xs).estimator))


def _weighted(probe: Seen, batches: Sequence[Batch]) -> list[Batch]:
    """Return a probe's batches, each with its weight among the layer's calls."""
    weight = 1 / len(batches) if batches and probe.point.place.calls == "mean" else 1.0
    return [dataclasses.replace(batch, weight=weight) for batch in batches]


def _compiled(root: nn.Module, point: Point) -> bool:
    """Return True if a layer, or a layer that contains it, was compiled."""
    chain = [root]
    for key in point.path:
        chain.append(chain[-1]._modules[key])  # type: ignore[arg-type]
    return any(type(m).__name__ == "OptimizedModule" or module_compiled(m) for m in chain)


def _sharded(root: nn.Module) -> bool:
    return bool(fully_sharded(root.modules())) or any(map(is_sharded, root.parameters()))
