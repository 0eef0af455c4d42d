"""The training loop of the keyword models.

Everything random in an epoch (order of the batches, noise, dropout) depends on the seed and the
number of the epoch alone. So an interrupted training continues exactly where it was, and torch's
global generator is left unchanged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from restrain.engine import Evaluation, attach
from restrain.errors import PlanError, RestrainWarning, TrainingError
from restrain.fields import level_of_caller
from restrain.models import checkpoints, optimizers
from restrain.models.data import Samples, batches, fingerprint, generator, shuffled
from restrain.models.layers import Network, outputs_of
from restrain.models.losses import Loss
from restrain.models.monitors import Means, Monitors, Watch, evaluating, penalties, training_values
from restrain.models.running import Plain
from restrain.models.settings import Settings
from restrain.penalties.derivative import OnDerivatives
from restrain.rules import Rule

_SOME = 1_000  # updates of a small network from which on recording them pays
_LONG = 20_000  # updates from which on compiling pays
_OFTEN = 50  # epochs from which on recording their last, smaller batch pays
_HEAVY = 1e7  # entries × samples for which an update counts twice
_WAITING = {"recorded": "the training is short", "later": "an eighth of the epochs comes first"}  # why not compiled


@dataclass
class Best:
    """Best validation so far: data loss, weights, and number of validations since (`worse`)."""

    loss: float = math.inf
    weights: dict[str, Tensor] | None = None
    worse: int = 0

    def take(self, loss: float, network: Network, improvement: float) -> None:
        """Add a validation; a loss counts as better if below (1 - improvement) × the best."""
        margin = improvement * abs(self.loss) if math.isfinite(self.loss) else 0.0
        if loss < self.loss - margin:
            self.loss, self.worse = loss, 0
            self.weights = {key: value.detach().clone() for key, value in network.state_dict().items()}
        else:
            self.worse += 1


@dataclass
class Training:
    """Training of a network on samples under rules.

    Args:
        network: trained in place.
        rules: the regularisation.
        task: loss and scores.
        train, valid: training and validation samples; valid may be None.
        settings: optimizer, epochs and so on.
        seed: seed of everything random.
        before: number of epochs already trained.
        state: state of the optimizer to continue with.
        place: where to run.
        history: a dict per epoch, filled during training.
        feed: returns the samples of the next epoch; None: the same in each.
        decided: the settings are those of `restrain.models.defaults`, not the user's.

    Raises:
        PlanError: the optimizer or a rule can't be used here.
    """

    network: Network
    rules: list[Rule]
    task: Loss
    train: Samples
    valid: Samples | None
    settings: Settings
    seed: int
    before: int = 0
    state: dict[str, Any] | None = None
    place: Plain = field(default_factory=Plain)
    history: list[dict[str, Any]] = field(default_factory=list)
    decided: bool = False
    feed: Callable[[], Samples] | None = None

    def __post_init__(self) -> None:
        self.network.to(self.place.device)
        self.optimizer = optimizers.make(
            self.settings.algo,
            self.network.parameters(),
            learning_rate=self.settings.learning_rate,
            momentum=self.settings.momentum,
            fused=type(self.place) is Plain,
        )
        if self.state is not None:
            optimizers.load(self.optimizer, self.state)
        self.done, self.best = 0, Best()
        self.programs: dict[int, Any] = {}  # by samples of a batch; None: such updates aren't recorded
        self.compiled: bool | str = self._by_length() if self.settings.compile == "auto" else self.settings.compile
        self.resumed = False  # True: `compiled` comes from a checkpoint
        self.said = "nothing: compile=False" if self.settings.compile is False else "nothing: the training is short"
        self.train.load()
        self.derivatives = any(isinstance(rule.what, OnDerivatives) for rule in self.rules)
        self.mean_weight = self.train.mean_weight
        for rule in self.rules:
            if rule.how == "parametrize":  # it would rename the weights in files and in `Best`
                raise PlanError(
                    f"{rule.label}: the models' own training takes no how='parametrize'. Constraints have "
                    "how='project'; for the rest train model.module_ in a loop of your own, with rs.attach"
                )
        self.watch = Watch(self.network, self.settings.monitors, self.settings.monitor_gradients)
        self.reg = attach(self.network, list(self.rules), self.optimizer) if self.rules else None

    def epochs(self) -> Iterator[tuple[Monitors, Monitors]]:
        """Train; yield (training monitors, last validation monitors) after each epoch.

        At the end, or when the caller stops, the network gets the best weights by validation.

        Raises:
            TrainingError: the loss isn't finite.
        """
        watching = self.watch.seeing()
        try:
            watching.__enter__()
            self._resume()
            self.model, self.stepper = self.place.setup(self.network, self.optimizer)
            self.step = optimizers.method(self.stepper, "step")
            self.forget = optimizers.method(self.optimizer, "zero_grad")
            valid: Monitors = {}
            while not self.finished:
                train = self._epoch()
                self.done += 1
                row: dict[str, Any] = {"epoch": self.before + self.done, **train}
                if self.valid is not None and self._is_due():
                    valid = self.evaluate(self.valid)
                    row.update({f"valid_{key}": value for key, value in valid.items()})
                    self.best.take(valid["data_loss"], self.network, self.settings.min_improvement)
                self.history.append(row)
                if self.reg is not None:
                    self.reg.next_epoch()
                self._checkpoint()
                yield train, dict(valid)
            self._warn_of_empty()
        finally:
            watching.__exit__(None, None, None)
            if self.reg is not None:
                self.reg.detach()
            if self.best.weights is not None:
                self.network.load_state_dict(self.best.weights)
            self.network.eval()
            self.network.to("cpu")

    @property
    def finished(self) -> bool:
        """True after all epochs, or when patience has run out."""
        patience = self.settings.patience
        ended = self.done >= self.settings.epochs or self._updates_left() == 0
        return ended or (patience is not None and self.best.worse >= patience)

    def _updates_left(self) -> int | None:
        """Return the number of updates until `max_updates`; None: there is no such limit."""
        most = self.settings.max_updates
        return None if most is None else max(0, most - self.done * self._updates_an_epoch())

    def _updates_an_epoch(self) -> int:
        whole = math.ceil(len(self.train) / self.settings.batch_size)
        few = self.settings.train_batches if self.feed is None else None
        return whole if few is None else min(whole, few)

    def _is_due(self) -> bool:
        ended = self.done in (1, self.settings.epochs) or self._updates_left() == 0
        return ended or self.done % self.settings.validate_every == 0

    def _epoch(self) -> Monitors:
        number, means = self.before + self.done, Means()
        if self.feed is not None and self.done:
            self.train = self.feed()
            self.train.load()
        if self.compiled == "later" and 8 * self.done >= self.settings.epochs:
            self.compiled, self.programs, self.resumed = True, {}, False
        optimizers.set_rate(self.optimizer, self.settings.learning_rate, self.done)
        order = shuffled(len(self.train), self.seed, 2, number) if self.settings.shuffle else None
        self.model.train()
        with self.place.seeded(generator(self.seed, 3, number).initial_seed() >> 1):
            self._updates(order, means)
        found = means.read(penalties(self.reg))
        if not math.isfinite(found["loss"]):
            raise TrainingError(
                f"the loss is {found['loss']} in epoch {number + 1}: a smaller learning_rate=, max_gradient_norm=1, "
                "normalize=True or a smaller strength would keep it finite"
            )
        return found

    def _updates(self, order: Any, means: Means) -> None:
        """Run the updates of an epoch: compiled or recorded if so decided, others by `_step`."""
        size, left = self.settings.batch_size, self._updates_left()
        most = self._updates_an_epoch() if left is None else min(left, self._updates_an_epoch())
        program, waiting = None, 0  # the last one, and its rows since it was settled
        for rows in islice(batches(len(self.train), size, order, pairs=self.network.needs_pairs), most):
            found = self._program(len(rows))
            if program is not None and found is not program:
                program.settle(means, waiting)
                waiting = 0
            program = found
            if program is None:
                self._step(rows, means)
            else:
                program.update(rows)
                waiting += len(rows)
        if program is not None:
            program.settle(means, waiting)

    def _program(self, rows: int) -> Any:
        """Return the recorded update of a batch of so many rows, made at its first use; or None."""
        if not self.compiled:
            return None
        if rows not in self.programs:
            if rows == min(self.settings.batch_size, len(self.train)):
                self._compile(rows)
            else:
                self._record_the_rest(rows)
        return self.programs.get(rows)

    def _record_the_rest(self, rows: int) -> None:
        """Record the update of an epoch's last batch, which has fewer rows, if it comes often."""
        from restrain.models import program
        from restrain.models.recording import UnfitError

        if self.settings.epochs < _OFTEN or not self.programs or not program.ready(self):
            return
        try:
            self.programs[rows] = program.Program(self, "the last batch of an epoch", rows)
        except UnfitError:
            self.programs[rows] = None

    def _step(self, rows: Any, means: Means) -> None:
        mine = rows[self.place.rank :: self.place.ranks]  # the rows of this process
        share = len(mine) * self.place.ranks / len(rows)
        x, y, weight = self._batch(self.train, mine if len(mine) else rows[:1])
        seen: list[dict[str, Tensor]] = []

        def closure() -> Tensor:
            self.forget()
            output = self.model(x)
            values = self.values(output, x if y is None else y, weight)
            values = {key: share * value for key, value in values.items()}
            if self.watch.items:
                values |= self.watch.values()
            loss = values["data_loss"]
            loss = loss if self.reg is None else self.reg.loss(loss)
            seen.append({**values, **training_values(self.reg)})
            self.place.backward(loss)
            seen[-1] |= self.watch.squared_gradients()
            if self.settings.max_gradient_norm is not None:
                self.place.unscaled(self.stepper)
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.max_gradient_norm)
            return loss.detach()

        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.step(closure)
        else:
            closure()
            self.step()
        means.add(self.place.mean({key: value.detach() for key, value in seen[0].items()}), len(rows))

    def _batch(self, samples: Samples, rows: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, y, weight = (None if t is None else t.to(self.place.device) for t in samples.batch(rows))
        assert x is not None
        return x, y, weight

    def values(self, output: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the mean data loss and scores of a batch.

        Weights are divided by the mean weight of the training samples.
        """
        target = target.detach()
        values = {"data_loss": self.task.losses(output, target), **self.task.scores(output, target)}
        if weight is not None:
            values = {key: value * (weight / self.mean_weight) for key, value in values.items()}
        return {key: value.mean() for key, value in values.items()}

    def evaluate(self, samples: Samples) -> Monitors:
        """Return the monitors of samples, with noise and dropout off."""
        self.network.eval()
        means = Means()
        with evaluating(self.reg) as evaluation, self._graph(evaluation):
            for rows in islice(batches(len(samples), max(self.settings.batch_size, 256)), self.settings.valid_batches):
                x, y, weight = self._batch(samples, rows)
                x.requires_grad_(self.derivatives)
                values = self.values(self.network(x), x if y is None else y, None)
                values = {**values, **({} if evaluation is None else evaluation.values())}
                values |= self.watch.values() if self.watch.items else {}
                if weight is not None:
                    values |= self._weighted(x, y, weight, samples.mean_weight)
                means.add({key: value.detach() for key, value in values.items()}, len(rows))
        return means.read(penalties(self.reg))

    def _graph(self, evaluation: Evaluation | None) -> Any:
        """Return a context with gradients off, unless a rule takes derivatives."""
        return nullcontext() if evaluation is not None and evaluation.needs_graph else torch.no_grad()

    def _weighted(self, x: Tensor, y: Tensor | None, weight: Tensor, mean: float) -> dict[str, Tensor]:
        """Return weighted data loss and scores; `mean` is the mean weight of these samples."""
        return self.values(self.network(x), x if y is None else y, weight * (self.mean_weight / mean))

    # ---------------------------------------------------------------- compilation

    def _by_length(self) -> bool | str:
        """Return whether compiling ("later") or recording ("recorded") pays, by the expected work.

        "later" compiles after an eighth of the epochs, as a training may stop early.
        """
        each = self._updates_an_epoch()
        if self.settings.epochs < _OFTEN:  # the last batch of an epoch isn't recorded
            each = min(each, max(1, len(self.train) // self.settings.batch_size))
        updates = self.settings.epochs * each
        updates = min(updates, self.settings.max_updates or updates)
        entries = sum(p.numel() for p in self.network.parameters())
        work = updates * (1 + entries * self.settings.batch_size / _HEAVY)
        return "later" if work >= _LONG else "recorded" if work >= _SOME else False

    def _compile(self, rows: int) -> None:
        """Record and compile the update once the optimizer has its state; else note why not."""
        from restrain.models import program
        from restrain.models.recording import UnfitError

        why = _WAITING.get(str(self.compiled), "")
        why = "it was so before" if why and self.resumed else why
        try:
            program.check(self)
            if not program.ready(self):
                return
            made = self.programs[rows] = program.Program(self, why)
        except UnfitError as reason:
            self._without(f"nothing: {reason}", False)
        else:
            self.said = "the whole update" if made.whole else "all but the optimizer's step"
            if made.recorded:
                said = f"nothing: {made.recorded}. The update's operations run one by one"
                self._without(said, self.compiled if why else "recorded", expected=bool(why))

    def _without(self, said: str, compiled: bool | str, *, expected: bool = False) -> None:
        """Continue without compiled code; warn if it was asked for, unless `expected`."""
        if not expected and (self.settings.compile is True or self.resumed):
            warnings.warn(
                f"compile={self.settings.compile!r}, but compiled is {said}; compile=False would say that you know",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
        self.said, self.compiled = said, compiled

    # ---------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        """Return the identity of this training, which a checkpoint must share."""
        return {
            **self.settings.identity(),
            "optimizer": type(self.optimizer).__name__,
            "network": {key: list(value.shape) for key, value in self.network.state_dict().items()},
            "rules": [] if self.reg is None else [_said(bound.rule, list(bound.names)) for bound in self.reg.rules],
            "data": fingerprint(self.train),
            "validation data": fingerprint(self.valid),
            "seed": self.seed,
            "epochs before": self.before,
            "scaled": self.train.scale is not None,
        }

    def _checkpoint(self) -> None:
        if self.settings.checkpoint is None or self.place.rank:
            return
        state = {
            "training": self._identity(),
            "done": self.done,
            "network": self.network.state_dict(),
            "optimizer": optimizers.method(self.optimizer, "state_dict")(),
            "rules": None if self.reg is None else self.reg.state_dict(),
            "best": vars(self.best),
            "history": self.history,
            "compiled": self.compiled,
        }
        checkpoints.write(self.settings.checkpoint, state)

    def _resume(self) -> None:
        if self.settings.checkpoint is None:
            return
        state = checkpoints.read(self.settings.checkpoint, self._identity())
        if state is None:
            return
        checkpoints.check_content(self.settings.checkpoint, state, self.network.state_dict())
        self._decided(state.get("compiled", False))
        self.network.load_state_dict(state["network"])
        optimizers.load(self.optimizer, state["optimizer"])
        if self.reg is not None:
            self.reg.load_state_dict(state["rules"])
        self.done, self.best = state["done"], Best(**state["best"])
        self.history[:] = state["history"]

    def _decided(self, compiled: bool | str) -> None:
        """Compile, or don't, as before the checkpoint: other code would round differently.

        Raises:
            PlanError: `compile=` contradicts the checkpoint.
        """
        if self.settings.compile not in ("auto", bool(compiled)):
            raise PlanError(
                f"the checkpoint {str(self.settings.checkpoint)!r} is of a training with compile={bool(compiled)}, "
                f'which rounds otherwise: write that, or compile="auto". Got compile={self.settings.compile}'
            )
        self.compiled, self.resumed = compiled, bool(compiled)

    # ---------------------------------------------------------------- what went wrong

    def _warn_of_empty(self) -> None:
        """Warn of weights and layer outputs that a rule has made all zeros."""
        if self.reg is None:
            return
        self.network.eval()
        empty = [name for name, p in self.network.named_parameters() if p.dim() > 1 and not p.any()]
        with torch.no_grad():
            x, _, _ = self._batch(self.train, next(batches(len(self.train), 256)))
            empty += [name for name, h in outputs_of(self.network, x).items() if not h.any()]
        for bound in self.reg.rules:
            mine = [name for name in bound.names if name in empty]
            if mine and (bound.is_penalty or bound.rule.how == "project"):
                warnings.warn(
                    f"{bound.key!r} has emptied {', '.join(map(repr, mine))}: nothing but zeros there. A smaller "
                    "strength would keep some of it",
                    RestrainWarning,
                    stacklevel=level_of_caller(),
                )


def _said(rule: Rule, names: list[str]) -> str:
    """Return the rule as text that is the same in each process."""
    what = repr(rule.what)
    what = type(rule.what).__name__ if " at 0x" in what else what
    return f"{what} on {names} how={rule.how} reduce={rule.reduce} every={rule.every}"
