"""Values of rules in evaluation, where the training hooks don't measure activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine.binding import Bound, network_value, parameter_values
from restrain.engine.core import structures
from restrain.engine.forward import Inputs, LayerHook, PenaltyRecorder, Recorder, positional
from restrain.named_tensors import device_of
from restrain.penalties import NetworkPenalty
from restrain.penalties.statistics import resting


class Evaluation:
    """Values of an attachment's rules in evaluation forwards; made by `Attachment.evaluating`."""

    def __init__(self, bounds: Sequence[Bound], model: nn.Module) -> None:
        self._bounds, self._model = bounds, model
        self._seen: dict[int, Tensor] = {}  # recorder -> tensor of the last forward
        self._calls: dict[int, list[Tensor]] = {}  # the same of each call, for recorders of outputs
        self._inputs: Inputs | None = None  # arguments of the model's last forward
        self.forwards = 0  # of the model
        self.counts: dict[int, int] = {}  # recorder -> number of its calls, in all forwards

    @property
    def needs_graph(self) -> bool:
        """True if a rule takes derivatives, so that the forward must record a graph."""
        return any(bound.output_recorders or bound.derivative for bound in self._bounds)

    @contextmanager
    def attached(self) -> Iterator[Evaluation]:
        """Set hooks on the model and its layers within the block."""
        with ExitStack() as stack:
            for recorder in {id(recorder): recorder for bound in self._bounds for recorder in bound.recorders}.values():
                stack.callback(self._hook(recorder).remove)
            stack.callback(self._model.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
            yield self

    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = (args, kwargs, positional(module))
        self._calls.clear()
        self.forwards += 1

    def _hook(self, recorder: Recorder) -> Any:
        place, module = recorder.point.place, recorder.point.find(self._model)

        def keep(structure: Any) -> None:
            way = structures.find(structure, place.index)
            if way is not None:
                calls = self._calls.setdefault(id(recorder), [])
                calls.append(structures.get(structure, way))
                self.counts[id(recorder)] = self.counts.get(id(recorder), 0) + 1
                if place.call in (None, len(calls) - 1):
                    self._seen[id(recorder)] = calls[-1]

        hooks = module._forward_pre_hooks if place.kind == "inputs" else module._forward_hooks
        # an activation function of ours comes after the penalties
        first = any(isinstance(hook, LayerHook) and hook.lasting for hook in hooks.values())
        if place.kind == "inputs":
            return module.register_forward_pre_hook(lambda module, args: keep(dict(enumerate(args))), prepend=first)
        return module.register_forward_hook(lambda module, args, output: keep(output), prepend=first)

    def values(self) -> dict[str, Tensor]:
        """Return {rule: strength × value} of every penalty for the model's last forward.

        Rules on the derivative of the data loss are left out.
        """
        values: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}  # by recorder, shared by rules
        for bound in self._bounds:
            if bound.penalty_recorders:
                with torch.no_grad():
                    values[bound.key] = self._on_activations(bound, known)
            elif bound.derivative is not None and bound.derivative.penalty.of_loss:
                continue  # the data loss belongs to another mode and other weights
            elif bound.derivative is not None:
                values[bound.key] = bound.derivative.of_tensors(self._seen)
            elif isinstance(bound.rule.what, NetworkPenalty):
                values[bound.key] = network_value(bound, self._model, self._outputs(bound))
            elif bound.is_penalty:
                values[bound.key] = parameter_values([bound], self._model)[0]
        return values

    def with_graph(self) -> list[Tensor]:
        """Return strength × value, with its graph, of penalties on activations and on the network.

        Rules on derivatives are left out.
        """
        known: dict[int, Tensor] = {}
        found = [self._on_activations(bound, known) for bound in self._bounds if bound.penalty_recorders]
        network = [bound for bound in self._bounds if isinstance(bound.rule.what, NetworkPenalty)]
        return found + [network_value(bound, self._model, self._outputs(bound)) for bound in network]

    def _on_activations(self, bound: Bound, known: dict[int, Tensor]) -> Tensor:
        """Return a rule's value; `known` has values by recorder, which rules share."""
        with resting():
            for recorder in bound.penalty_recorders:
                if id(recorder) not in known:
                    known[id(recorder)] = self._value(recorder)
        return torch.stack([known[id(one)] * one.factors[bound.key] for one in bound.penalty_recorders]).sum()

    def _outputs(self, bound: Bound) -> dict[str, Tensor]:
        """Return the named outputs of the last forward, as in training; of several calls all."""
        outputs = {}
        for recorder in bound.output_recorders:
            calls = self._calls.get(id(recorder), []) if recorder.point.place.call is None else []
            for number, tensor in enumerate(calls or [self._seen[id(recorder)]]):
                outputs[recorder.point.key + (f"#{number + 1}" if number else "")] = recorder.point.seen(tensor)
        return outputs

    def _value(self, recorder: PenaltyRecorder) -> Tensor:
        inputs = self._inputs if recorder.point.place.padded else None
        return (
            recorder.evaluate(self._seen[id(recorder)], (), recorder.point.find(self._model), inputs) * recorder.weight
        )


def latest(bounds: Sequence[Bound], model: nn.Module) -> dict[str, Tensor]:
    """Return the value of each penalty at the last collected loss, as tensors on the device."""
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for bound in bounds:
            if bound.recorders:
                parts = [part.reshape(()) for recorder in bound.recorders for part in recorder.last(bound.key)]
                values[bound.key] = torch.stack(parts).sum() if parts else torch.zeros((), device=device_of(model))
            elif isinstance(bound.rule.what, NetworkPenalty):
                values[bound.key] = network_value(bound, model, {})
            elif bound.is_penalty:
                values[bound.key] = parameter_values([bound], model)[0]
    return values
