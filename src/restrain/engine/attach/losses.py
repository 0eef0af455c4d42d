"""What the rules of a model add to its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restrain.engine.attach.installed import Installed
from restrain.engine.binding import (
    network_value,
)
from restrain.engine.core import Root, eagerly, refuse_capture
from restrain.errors import DetachedError, PenaltyError
from restrain.named_tensors import device_of
from restrain.penalties import NetworkPenalty


class InLoss(Installed):
    """Installed rules, whose penalties are added to the data loss."""

    def loss(self, loss: Tensor, *, share: float | Tensor = 1.0) -> Tensor:
        """Return data loss + every penalty with how="loss", in full: a scalar for backward().

        Scale the result when you accumulate gradients: `reg.loss(l) / 4`. In evaluation (`eval()`,
        `no_grad()`) penalties on parameters are added; penalties on activations aren't measured.

        Args:
            loss: the scalar data loss.
            share: the part of the penalties to add: 1/4 if four losses are accumulated that are
                already divided by the number of items of all four.

        Raises:
            NeverFiredError: the forward never called a layer with rules.
            PenaltyError: the loss isn't a scalar.
            DetachedError: the rules were detached.
        """
        if torch.compiler.is_compiling():  # the whole step is compiled
            return eagerly(self.loss, loss, share=share)  # type: ignore[no-any-return]
        refuse_capture("a loss with rules")
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PenaltyError(
                f"reg.loss takes the scalar data loss, got {came}: average it first, as in losses.mean()"
            )
        if self._tracker is not None:
            self._tracker.collect(loss, share, self._clock.steps)
        all_of_it = isinstance(share, float | int) and share == 1
        direct, hidden = self._terms(loss if all_of_it else loss / share)
        for term, factor in direct:
            own = (term if isinstance(share, float | int) else share * term).to(loss.device)
            loss = torch.add(loss, own, alpha=factor * (share if isinstance(share, float | int) else 1))
        if not hidden:
            return loss
        value, write = self._hidden(hidden, loss, share)
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return Root.apply(loss, share * value, write)  # type: ignore[no-untyped-call, no-any-return]

    def penalty(self) -> Tensor:
        """Return the sum of penalties with how="loss", a differentiable scalar for the loss.

        In compiled models and inside reentrant checkpoints, the gradient of penalties on
        activations is computed in the backward of the data loss: there, add it to that loss and
        call `backward()` on the sum; `reg.loss` always works.
        """
        if torch.compiler.is_compiling():
            return eagerly(self.penalty)  # type: ignore[no-any-return]
        direct, hidden = self._terms()
        total = torch.zeros((), dtype=torch.float32, device=device_of(self.model))
        if direct:
            total = direct[0][0] * direct[0][1]
            for term, factor in direct[1:]:
                total = torch.add(total, term.to(total.device), alpha=factor)
        if not hidden:
            return total
        value, write = self._hidden(hidden, total)
        anchor = total if total.requires_grad else total.detach().clone().requires_grad_(torch.is_grad_enabled())
        return Root.apply(anchor, value, write)  # type: ignore[no-untyped-call, no-any-return]

    def _terms(self, loss: Tensor | None = None) -> tuple[list[tuple[Tensor, float]], list[Any]]:
        """Return the due terms of the loss.

        They are pairs (value with its graph, factor), and collected values without a graph.
        """
        model = self.model
        self._look(model)
        if (
            torch.is_grad_enabled() and not self._forwards.recorders
        ):  # values of a forward have the strength of that time
            self._clock.end()
        if self._detached:
            raise DetachedError(
                "these rules were detached: attach the plan again, rs.attach(model, reg.plan, optimizer)"
            )
        if not self._loss_rules:
            return [], []
        self._tripwire.collected = self._tripwire.collected or torch.is_grad_enabled()
        due = {bound.key: bound for bound in self._loss_rules if bound.rule.due(self._clock.steps)}
        on_parameters = self._on_parameters.value(model, due)
        terms = [] if on_parameters is None else [on_parameters]
        recorded = self._collect(loss)
        for bound in due.values():
            if isinstance(bound.rule.what, NetworkPenalty) and (recorded or not bound.output_recorders):
                terms.append(network_value(bound, model, self._forwards.outputs.get(bound.key, {})))
                for recorder in bound.output_recorders[:1]:
                    recorder.remember([(terms[-1].detach(), 1.0)])
        derived = [b.derivative.value(model, loss) for b in due.values() if b.derivative is not None and recorded]
        terms += [term for term in derived if term is not None]
        seen = [one.due(due) for one in self._forwards.current] if recorded else []
        collected = [one for one in seen if one is not None]
        factors = [(term, 1.0) for term in terms]
        factors += [(one.direct, one.factor) for one in collected if one.direct is not None]
        return factors, [one for one in collected if one.hidden is not None]

    def _collect(self, loss: Tensor | None) -> bool:
        """Collect the forwards that count for a loss; False if there are none, as in evaluation."""
        if self._forwards.recorders and self.model.training and torch.is_grad_enabled():
            return self._forwards.collect(loss)
        return False

    def _hidden(self, hidden: list[Any], joins: Tensor, share: float | Tensor = 1.0) -> tuple[Any, Any]:
        """Return the value of penalties with injected gradients, and a function for backward.

        Backward calls it with the gradient of the value, and at its end with None.
        """

        def write(gradient: Tensor | None) -> None:
            if self._detached and any(one.recorder.rooted for one in hidden):
                raise DetachedError(
                    "the rules were detached before backward(), which recomputes a checkpoint without them"
                )
            if gradient is None:
                self._forwards.empty_cells()
            else:
                self._forwards.fill_cells(hidden, gradient * share)

        value = sum([one.hidden for one in hidden])
        return value.to(joins.device, joins.dtype) if isinstance(value, Tensor) else value, write

    def forget(self) -> None:
        """Forget all forwards since the last step, as if they had never run."""
        self._forwards.clear()
        self._tripwire.collected = self._forwards.ran = False
