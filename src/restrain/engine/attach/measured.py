"""What an attachment tells: values, shares, certificates, history, tables and reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor, nn

from restrain.engine.attach import report
from restrain.engine.attach.certificate import Certificate, certify
from restrain.engine.attach.evaluation import Evaluation, latest
from restrain.engine.attach.facts import contents_of, same_parameters
from restrain.engine.attach.groups import Penalised, penalised
from restrain.engine.attach.history import History
from restrain.engine.attach.losses import InLoss
from restrain.engine.attach.stationarity import Loss, Objective, as_found
from restrain.engine.attach.tracking import POINTS, Tracker, checked_track
from restrain.engine.forward import Point
from restrain.errors import DetachedError, PlanError
from restrain.fields import check_flags
from restrain.html_table import html_table
from restrain.named_tensors import checked_module, unwrap
from restrain.report import Content, write
from restrain.rules import Rule


@dataclass(frozen=True)
class BoundRule:
    """A bound rule: its key in `values()`, the names it acts on, and whether it has a value."""

    key: str
    rule: Rule
    names: tuple[str, ...]
    is_penalty: bool
    points: tuple[Point, ...] = ()
    """The activations among what it acts on."""


class Measured(InLoss):
    """Installed rules, and what can be asked of them."""

    @property
    def rules(self) -> list[BoundRule]:
        """The bound rules: key, rule, and names it acts on."""
        return [
            BoundRule(bound.key, bound.rule, tuple(bound.names), bound.is_penalty, tuple(bound.points))
            for bound in self._bounds
        ]

    def values(self) -> dict[str, float]:
        """Return {rule: strength × value} of every penalty, computed now.

        For a penalty on activations it is the last collected value; nan before the first.
        """
        return report.values(self._bounds, self._as_it_is(), self._forwards)

    def measure(self, data_loss: Tensor | None = None) -> dict[str, report.Measure]:
        """Return each penalty's value, the norm of its gradient over all parameters, and its share.

        Args:
            data_loss: if given, its gradient's norm is part of the shares, under the key "data";
                call `measure` before backward(); the graph is kept.

        Raises:
            PenaltyError: a backward has freed the graph of the last forward, and with it that of a
                penalty on activations.
        """
        model = self._as_it_is()
        self._collect(data_loss)
        return report.measure(self._bounds, model, self._forwards, data_loss)

    def latest(self) -> dict[str, Tensor]:
        """Return {rule: strength × value} of every penalty as tensors, without synchronising.

        For a penalty on activations it is the last collected value; zero before the first.
        """
        return latest(self._bounds, self._as_it_is())

    @contextmanager
    def evaluating(self) -> Iterator[Evaluation]:
        """Return a context that measures rules in evaluation, even on activations.

        `reg.loss` leaves activations out there.

        >>> model = nn.Linear(3, 2)
        >>> reg = rs.attach(model, rs.L2().on(rs.outputs(), name="h"))
        >>> with reg.evaluating() as evaluation:
        ...     h = model.eval()(torch.ones(4, 3))
        ...     value = evaluation.values()["h"]
        >>> bool(value.isclose(h.square().sum(1).mean()))
        True
        """
        with Evaluation(self._bounds, self._as_it_is()).attached() as evaluation:
            yield evaluation

    def certificate(
        self,
        loss: Loss,
        *,
        polish: bool = False,
        step: float | None = None,
        steps: int = 1000,
        tolerance: float | None = None,
    ) -> Certificate:
        """Return how far the trained tensors are from a stationary point of data loss + rules.

        For every tensor under a penalty with a prox or a convex constraint, whatever its `how`, the
        residual is max |w - prox(w - t ∇, t)| / t with ∇ the gradient of the data loss and of all
        other rules. It doesn't grow with t, and for small t it is the distance from -∇ to the
        penalties' subdifferential. For decoupled rules, which minimise something else under most
        optimizers, it is still that of data loss + rules.

        The model is in eval() meanwhile, without noise, so batch normalisation has its running
        statistics. Modes, `.grad`, buffers and random states are as before afterwards.

        Args:
            loss: a function without arguments that runs the model on the data and returns the
                scalar data loss. It is called three times and must give the same each time.
            polish: first take full-batch proximal steps on all trained tensors (of the given
                optimizers, if any), until the residual is at most 0.02 of each rule's strength.
            tolerance: another residual at which polishing ends.
            step: t; None for 1/1000 of max |w| / max |∇|. Under penalties that aren't convex t is
                less than 1/r, where penalty + r/2 ‖w‖² is (of strength · MCP, r = strength / knee):
                then the map moves no stationary point, be it a minimum or not.
            steps: the most steps of `polish`; a warning says if they didn't do.

        Raises:
            PenaltyError: the loss is random, has no graph, or isn't a scalar.
            NoProxError: no rule has a prox or a convex set.
            PlanError: an invalid setting, or a step of 1/r or more.
            HowError: sharded parameters, rules with `every`, penalties on derivatives.

        Source: Beck and Teboulle (2009), eq. 1.4 and 2.6 for the map; Nesterov (2013) for its norm.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> reg = rs.attach(model, 3.0 * rs.L1().on("weight", name="l1"))
        >>> x, y = torch.ones(4, 1), 5 * torch.ones(4, 1)
        >>> cert = reg.certificate(lambda: (model(x) - y).square().mean(), polish=True)
        >>> model.weight.item(), cert.rules["l1"].residual < 0.06
        (3.5, True)
        """
        check_flags(PlanError, polish=polish)
        if self._detached:
            raise DetachedError("these rules were detached: attach the plan again, rs.attach(model, reg.plan)")
        model = self._as_it_is()
        given = [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]
        trained = {id(p) for optimizer in given for group in optimizer.param_groups for p in group["params"]}
        objective = Objective.of(self._bounds, model, loss, trained or None)
        return certify(objective, polish, step, steps, tolerance)

    def gradients(self, loss: Loss) -> dict[str, Tensor]:
        """Return the gradient of data loss + rules without a prox at each trained tensor, by name.

        Taken as for `certificate`, in float64. `.grad` stays as it is.

        Args:
            loss: see `certificate`.
        """
        objective = Objective.of(self._bounds, self._as_it_is(), loss, None)
        with as_found(objective.model):
            objective.check()
            return dict(zip(objective.names, objective.evaluate()[2], strict=True))

    def penalised(self) -> list[Penalised]:
        """Return the trained tensors and units under penalties, with their groups."""
        return penalised(self._bounds, self._as_it_is())

    def track(self, every: int = 10, *, points: int = POINTS, shares: bool = False) -> History:
        """Keep a history with a row for each k-th step, and return it; also `attach(track=k)`.

        Columns: "step"; "data_loss", the mean of the losses that `reg.loss` got since the step
        before (nan without any), of this process; "penalties/<rule>", strength × value;
        "strengths/<rule>"; and of each tensor under a rule "norms/<name>", and as fractions
        "zeros/<name>" (entries), "zero_groups/<name>" (of its first rule by group) and
        "dead/<name>" (units without an incoming weight that isn't zero). The loss is of the weights
        before the step, penalties on activations too, everything else of those after it.

        Steps that don't count (skipped by a loss scaler, learning rate zero) have no row. The
        history is in `reg.state_dict()`, goes on after `load_state_dict`, and can be read after
        `detach`. Called again, it goes on with other settings.

        Args:
            every: k.
            points: the greatest number of rows; when they are full, every second one goes and k
                doubles.
            shares: also measure "shares/<rule>" of penalties on single parameters:
                ‖g‖ / (‖g‖ + ‖r‖), g the rule's gradient, r the rest of `.grad` after the step.
                This waits for the device, and steps aren't folded with rules, which changes
                results by rounding.

        Raises:
            PlanError: `every` or `points` isn't a whole number, at least 1 and 2.
            DetachedError: the rules were detached.

        >>> model = nn.Linear(3, 2)
        >>> reg = rs.attach(model, rs.L1().on("weight", name="l1"))
        >>> reg.track(every=5)
        <History of 0 tracked steps, 2 columns>
        """
        checked_track(every, points)
        check_flags(PlanError, shares=shares)
        if self._detached:
            raise DetachedError("these rules were detached, and no step is seen any more: attach the plan again")
        if self._tracker is None:
            self._tracker = Tracker(self._bounds, History(every, points))
        self._tracker.history.change(every, points)
        self._tracker.shares = shares
        for stepper in self._steppers if shares else ():
            stepper.keep_gradients()
        return self._tracker.history

    @property
    def history(self) -> History:
        """The history of tracked steps.

        Raises:
            PlanError: nothing is tracked.
        """
        if self._tracker is None:
            raise PlanError(
                "there is no history, as no step is tracked: write rs.attach(..., track=10), or reg.track(every=10)"
            )
        return self._tracker.history

    @property
    def tracks(self) -> bool:
        """True if there is a history."""
        return self._tracker is not None

    def strengths(self) -> dict[str, float]:
        """Return {rule: current strength} for moving strengths: schedules and targets."""
        return {moving.key: float(moving.now) for moving in self._strengths.moving}

    def tokens_since_fired(self) -> dict[str, Tensor]:
        """Return {layer: tokens since each unit was active} of activation functions that rules put.

        Whole numbers, (units,), of training forwards up to the last optimizer step, over all
        processes, all of which must call this; of no length before the first step. A unit is dead
        if its number is large.

        >>> sae = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> reg = rs.attach(sae, rs.TopK(2).on(rs.outputs("1")))
        >>> dead = reg.tokens_since_fired()["1"] > 1_000_000
        """
        self._clock.end()
        return {point.key: what.counts.idle.clone() for point, what in self._activations()}

    def table(self, values: bool = False) -> str:
        """Return a table of rules: how, strength, tensors, elements, names; optionally values.

        Raises:
            PlanError: `values` isn't True or False.
        """
        check_flags(PlanError, values=values)
        return report.table(self._bounds, self._as_it_is(), self.values() if values else None)

    def contents(
        self,
        *,
        model: nn.Module | None = None,
        path: Any = None,
        history: Any = None,
        images: Any = None,
        inputs: Sequence[str] | None = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Content:
        """Return what `report` shows, as plain data. Arguments and errors as there."""
        root = self._as_it_is() if model is None else same_parameters(unwrap(checked_module(model)), self.model)
        rows = self.history if history is None and self._tracker is not None else history
        given = {"rows": rows, "path": path, "images": images, "inputs": inputs, "title": title, "facts": facts}
        found = contents_of(root, self._bounds, self.plan, **given)
        code = 'reg = rs.attach(model, rs.Plan.load("plan.json"), optimizer)' if found.data else ""
        return replace(found, trained="attachment", code=code)

    def report(
        self,
        file: str | FilePath,
        *,
        model: nn.Module | None = None,
        path: Any = None,
        history: Any = None,
        images: Any = None,
        inputs: Sequence[str] | None = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> FilePath:
        """Write a page about the training and its rules into one HTML file; return its path.

        It shows who gets what, curves, shares of the gradient, zeros by layer, lengths of groups,
        histograms, features, a path with a slider, warnings with the line to write, the plan and
        the environment, and loads nothing from elsewhere.

        Args:
            file: the file, which ends in .html.
            model: a model with the same parameters, whose weights are shown instead, such as an
                averaged one.
            path: the result of `rs.path`, or a fitted `RegressorCV` or `ClassifierCV`.
            history: rows of numbers by step or epoch; None: `reg.history`, if steps are tracked.
            images: (height, width) of the images that a weight's inputs or outputs are, or
                {name: (height, width)}; filters with one or three channels need no such word.
            inputs: names of the path's groups, such as those of the inputs.
            title: the title of the page.
            facts: further facts for its head, such as {"test accuracy": "97 %"}.

        Raises:
            PlanError: an argument of another kind, or parameters that are sharded.
            FileError: the name doesn't end in .html.
            FileAccessError: there is no such folder, no space or no permission.
            MissingExtraError: matplotlib isn't installed.
            DetachedError: the model no longer exists.
        """
        given = {"model": model, "path": path, "history": history, "images": images}
        return write(self.contents(**given, inputs=inputs, title=title, facts=facts), file)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str | None:
        if self._model() is None:
            return None  # notebooks show repr instead
        rows, notes = report.cells(self._bounds, self._as_it_is(), None)
        return html_table(rows, report.RIGHT, notes)

    def __repr__(self) -> str:
        model = self._model()
        whose = "a model that is gone" if model is None else type(model).__name__
        return f"<Attachment of {len(self._bounds)} rules to {whose}>"
