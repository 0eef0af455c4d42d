"""Training of a model: keywords and data → network, scales → `Training` → what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from restrain import progress
from restrain.errors import PlanError
from restrain.models import bins, checkpoints, defaults, ensemble, keywords, optimizers, shapes, specs
from restrain.models.data import (
    Samples,
    at_once,
    batches,
    called,
    dense,
    drawn,
    generator,
    per_channel,
    split,
    standardize,
)
from restrain.models.decisions import Decisions
from restrain.models.layers import Network
from restrain.models.losses import Loss, Ordinal, Shifted
from restrain.models.monitors import Monitors
from restrain.models.periodic import Saving
from restrain.models.running import Plain, new_seed, running, seeded
from restrain.models.settings import Settings
from restrain.models.shift import warn_of_shift
from restrain.models.specs import LayerData, resolve
from restrain.models.training import Training


class Fitting(Decisions):
    """Model that is fitted: `train`, `itertrain`, and what `fit` and `partial_fit` call."""

    history_: list[dict[str, Any]]
    n_iter_: int
    compiled_: str
    seed_: int

    # ---------------------------------------------------------------- overridden by subclasses

    def _outputs(self) -> int:
        """Return the size of the output layer that fits the targets."""
        raise NotImplementedError

    def _check_split(self, part: Samples, held: Samples) -> None:
        """Warn of classes that are missing from the validation data."""

    @property
    def _steps(self) -> bool:
        """True if each step of a sequence has its own target."""
        return True

    # ---------------------------------------------------------------- training

    def train(self, data: Any, valid: Any = None, **given: Any) -> Self:
        """Continue training from the current weights; the first call builds the network.

        Args:
            data: (X, y) or (X, y, sample_weight); of an Autoencoder X or (X, None, sample_weight).
                Or a DataLoader, a Dataset or an iterator of such batches, which is read once, into
                a temporary file where it is large (see `restrain.models.streams`).
                Or a callable that returns a batch: its `train_batches` calls are an epoch.
            valid: validation data in the same form, or the fraction of the data to hold back.
            given: keywords for training and rules that replace the constructor's for this call.

        Raises:
            PlanError: a keyword doesn't exist, or its value isn't allowed.
            SelectionError: a rule matches nothing.
        """
        for _ in self.itertrain(data, valid, **given):
            pass
        return self

    def itertrain(self, data: Any, valid: Any = None, **given: Any) -> Iterator[tuple[Monitors, Monitors]]:
        """Train like `train`; yield (training monitors, last validation monitors) after each epoch.

        Monitors are a dict with "loss" (data loss plus all rules), "data_loss", the value of each
        rule by its name, and "acc" for a Classifier. Without validation data the second dict is
        empty.
        """
        fresh = "module_" not in vars(self)
        if not callable(data):
            return self._run(self._start(*self._unpacked(data), valid, given, fresh=fresh))
        if isinstance(self.valid if valid is None else valid, (int, float)):
            raise PlanError(
                "a part can't be held back of a callable's data: give valid= data, or a callable of its own"
            )
        calls = self.split_keywords(given)[0].train_batches or 100

        def draw() -> tuple[Any, Any, Any]:
            return self._unpacked(drawn(data, calls))

        training = self._start(*draw(), valid, given, fresh=fresh)
        training.feed = lambda: replace(
            self._samples(*draw(), reset=False), scale=training.train.scale, dtype=training.train.dtype
        )
        return self._run(training)

    def _fit(
        self, x: Any, y: Any, weight: Any, valid: Any, given: dict[str, Any], *, fresh: bool = True, offset: Any = None
    ) -> Self:
        for _ in self._run(self._start(x, y, weight, valid, given, fresh=fresh, offset=offset)):
            pass
        return self

    def _fit_anew(self, x: Any, y: Any, weight: Any, valid: Any, given: dict[str, Any], offset: Any = None) -> Self:
        """Fit with the decisions of `restrain.models.defaults` where the user left them "auto"."""
        fresh = not (self.warm_start and "module_" in vars(self))
        losses: list[float] = []
        try:
            training = self._start(x, y, weight, valid, given, fresh=fresh, offset=offset, auto=True)
            for train, _ in self._run(training):
                losses.append(train["loss"])
                if training.settings.algo is defaults.EXACT and defaults.converged(losses):
                    break
        finally:
            if "module_" in vars(self) and ensemble.join(self.module_):
                self.__dict__.pop("_optimizer", None)  # its state is that of the parts
        self._warn_unless_converged(training, losses)
        return self

    def _start(
        self,
        x: Any,
        y: Any,
        weight: Any,
        valid: Any,
        given: dict[str, Any],
        *,
        fresh: bool,
        offset: Any = None,
        auto: bool = False,
    ) -> Training:
        """Check data and keywords, build the network if `fresh`, and return the Training.

        With `auto`, decide what is left "auto" as `restrain.models.defaults` says.
        """
        first, _, _ = self.split_keywords(given)
        samples = self._samples(x, y, weight, reset=fresh, offset=offset)
        valid = called(self.valid if valid is None else valid, first.valid_batches or 1)
        members = self._members(samples, given, fit=auto) if fresh else 1
        quiet, auto = isinstance(valid, str) and valid == "auto", auto and not checkpoints.is_of_0_1(first.checkpoint)
        found, valid = self._decided(samples, given, valid, members) if auto else ({}, None if quiet else valid)
        chosen, of_rules, how = self.split_keywords({**given, **found})
        place = running(chosen.device, chosen.precision)
        if fresh:
            self._build(x, samples, chosen, place, members, zero=defaults.is_linear(found))
        elif chosen.precision is not None:
            self.module_.to(torch.float64 if chosen.precision == "64" else torch.float32)
        part, held = self._parts(samples, valid, fresh, auto, shifted=offset is not None, quiet=quiet, members=members)
        _check_patience(chosen, held)
        return Training(
            network=self.module_,
            rules=keywords.rules(of_rules, keywords.Context(self.layers_, how)),
            decided=bool(found),
            task=self._task(offset is not None, members),
            train=part,
            valid=held,
            settings=chosen,
            seed=self.seed_,
            before=self.n_iter_,
            state=self._state_for(chosen),
            place=place,
        )

    def _state_for(self, chosen: Settings) -> dict[str, Any] | None:
        """Return the state to go on with of an optimizer of that kind, or None."""
        known = vars(self).get("_optimizer")
        return known[1] if known is not None and known[0] == _identity(chosen) else None

    def _task(self, shifted: bool, members: int) -> Loss:
        """Return the loss of a training: with known offsets, of several networks."""
        loss = self.loss_function()
        loss = Shifted(loss) if shifted and not loss.scaled else loss
        return loss if members == 1 else ensemble.Members(loss, members)

    def _run(self, training: Training) -> Iterator[tuple[Monitors, Monitors]]:
        chosen, saving = training.settings, Saving(training.settings)
        earlier = list(self.history_)
        bar = progress.bar(chosen.epochs, chosen.progress if training.place.rank == 0 else False)
        try:
            for train, valid in training.epochs():
                self.history_ = earlier + training.history
                bar.update(training.done - bar.n)
                bar.set_postfix(loss=f"{train['loss']:.4g}", compiled=training.said, refresh=False)
                if training.place.rank == 0 and saving.is_due(training.done):
                    self.n_iter_, self.compiled_ = training.before + training.done, training.said
                    self.save(saving.file(self.n_iter_))
                yield train, valid
        finally:
            bar.close()
            self.history_ = earlier + training.history
            self.n_iter_ = training.before + training.done
            self.compiled_ = training.said
            self._optimizer = (_identity(chosen), optimizers.method(training.optimizer, "state_dict")())

    # ---------------------------------------------------------------- data: parts and scales

    def _parts(
        self, samples: Samples, valid: Any, fresh: bool, auto: bool, *, shifted: bool, quiet: bool, members: int
    ) -> tuple[Samples, Samples | None]:
        """Return training and validation samples; if `fresh`, learn scales and an intercept.

        Where `fit` holds a part back for several networks, it is another part for each.
        """
        samples.dtype = next(self.module_.parameters()).dtype
        shared = members > 1 and quiet and valid is not None
        part, held = (samples, None) if shared else self._split(samples, valid, shifted, quiet=quiet)
        if fresh and self._normalizes(auto):
            self._learn_scales(part)
        if not fresh and self.input_scale_ is not None:
            warn_of_shift(part, self.input_scale_, self.target_scale_, self.input_names_)
        if fresh:
            self._set_intercept(part, shifted)
            self._set_bins(samples)
        if shared:
            part, held = ensemble.shared_out(samples, members, self.seed_)
        for some in (part, held):
            if some is not None:
                some.scale, some.dtype = self._scale, samples.dtype
        return part, held

    def _split(
        self, samples: Samples, valid: Any, shifted: bool, *, quiet: bool = False
    ) -> tuple[Samples, Samples | None]:
        if valid is None or (isinstance(valid, (int, float)) and valid is not False and valid == 0):
            return samples, None
        if isinstance(valid, (int, float, np.floating)):
            part, held = split(samples, float(valid), self.seed_)
            if not quiet:
                self._check_split(part, held)
            return part, held
        if shifted:
            raise PlanError("validation data have no offset or exposure of their own: write a part, as in valid=0.2")
        return samples, self._samples(*self._unpacked(valid), reset=False)

    def _learn_scales(self, samples: Samples) -> None:
        """Fit mean and deviation of the training inputs, and of numeric targets."""
        rows = samples.rows

        def chunks(array: Any) -> Iterator[Any]:
            for which in batches(len(samples), at_once(array)):
                yield dense(array[which if rows is None else rows[which]])

        weight, shape = None, specs.image(self.layers_)
        if samples.weight is not None:
            weight = samples.weight[slice(None) if rows is None else rows]
        if shape is None:
            self.input_scale_ = standardize(lambda: chunks(samples.x), weight)
        else:
            self.input_scale_ = per_channel(lambda: chunks(samples.x), weight, shape[-1])
        if self._has_targets and not self._labels and self.loss_function().scaled:
            self.target_scale_ = standardize(lambda: chunks(samples.y), weight)

    def _set_bins(self, samples: Samples) -> None:
        """Set the bins of the first layer, if it has some, in the units of its inputs."""
        scale = self.input_scale_
        for layer in self.module_.children():
            if isinstance(layer, bins.Bins):
                units = () if scale is None else (scale.mean, scale.deviation)
                layer.set(bins.edges(dense(samples.x), defaults.BINS), *units)

    def _set_intercept(self, samples: Samples, shifted: bool) -> None:
        """Set the bias of the output to the best constant, if the loss has one and isn't scaled."""
        bias = getattr(list(self.module_.children())[-1], "bias", None)
        if self.loss_function().scaled or self._labels or not self._has_targets or not isinstance(bias, Tensor):
            return
        rows = slice(None) if samples.rows is None else samples.rows
        y = np.asarray(samples.y[rows], np.float64)
        y, offset = (y[..., :-1], y[..., -1:]) if shifted else (y, np.zeros(1))
        weight = np.ones(1) if samples.weight is None else samples.weight[rows].reshape(-1, *[1] * (y.ndim - 1))
        best = self.loss_function().constant(y, weight * np.ones(y[..., :1].shape), offset)
        if best is not None:
            with torch.no_grad():
                bias.copy_(torch.as_tensor(best))

    # ---------------------------------------------------------------- the network

    def _build(self, x: Any, samples: Samples, chosen: Settings, place: Plain, members: int, *, zero: bool) -> None:
        """Build a new network from `layers`, or from `hidden` and the sizes of the data.

        With `zero`, its weights and biases start at zero; the thresholds of classes don't. Several
        `members` are one network with as many times the hidden units, parted for the training.
        """
        layers = self._layers_for(x, samples, members)
        self.seed_ = place.agreed(self._new_seed(chosen))
        with seeded(generator(self.seed_, 0).initial_seed()):
            network = Network(layers)
        with torch.no_grad():
            for name, p in network.named_parameters():
                if zero and not name.endswith("thresholds"):
                    p.zero_()
        double = samples.x.dtype == np.float64 and str(chosen.device or "cpu") == "cpu"
        precision = chosen.precision or ("64" if double else "32")
        self.layers_, self.module_ = layers, network.double() if precision == "64" else network.float()
        if members > 1:
            ensemble.part(self.module_, members)
        self.module_.eval()
        self.history_, self.n_iter_, self.input_scale_, self.target_scale_ = [], 0, None, None
        for name in ("_optimizer", "conformal_", "feature_importances_"):
            self.__dict__.pop(name, None)

    def _layers_for(self, x: Any, samples: Samples, members: int) -> list[LayerData]:
        """Return the layers, resolved: the user's, or those that fit the data."""
        given = self.layers
        if given is None:
            shape = tuple(getattr(x, "shape", ())[1:])
            first = specs.first_layer(self._hidden, shape, self._width)
            given = [first, *self._hidden, self._outputs()]
        layers = resolve(given, activation=self.activation)
        self._check_sizes(layers)
        if isinstance(self.loss_function(), Ordinal):
            layers[-1] = {**layers[-1], "form": "ordinal"}
        if samples.x.ndim == 3 and not self._steps:
            layers = specs.with_last_step(layers)
        self._check_output(layers)
        if members > 1:
            layers[1] = {**layers[1], "size": members * layers[1]["size"]}
        edges = self._edges(samples, members)
        if edges is not None:
            layers.insert(1, {"name": "bins", "form": "bins", "size": bins.size(edges), "activation": "linear"})
        return layers

    def _check_sizes(self, layers: list[LayerData]) -> None:
        for layer, found, size, what in (
            (layers[0], specs.features(layers), self._width, "features"),
            (layers[-1], specs.outputs(layers), self._outputs(), "outputs"),
        ):
            if found != size:
                raise PlanError(
                    f"the layer {layer['name']!r} has the size {found}, the data have {size} {what}: write {size} there"
                )

    def _check_output(self, layers: list[LayerData]) -> None:
        """Check that the output has an axis of steps if and only if targets have it.

        Raises:
            PlanError: it has another shape.
        """
        shape = specs.output_shape(layers)
        if self._has_targets and len(shape) != (2 if specs.steps(layers) and self._steps else 1):
            raise PlanError(
                f"the last layer puts out {shapes.text(shape)} for a sample, and the targets have another shape: write "
                "'flatten' before it"
            )

    def _new_seed(self, chosen: Settings) -> int:
        """Draw a seed from `random_state`.

        Without `random_state`, return the seed stored in the checkpoint, else one from torch's
        global generator.
        """
        if self.random_state is None:
            known = checkpoints.seed(chosen.checkpoint)
            return new_seed() if known is None else known
        return int(check_random_state(self.random_state).randint(2**31 - 1))


def _check_patience(chosen: Settings, held: Samples | None) -> None:
    if chosen.patience is not None and held is None:
        raise PlanError("patience= needs validation data: write valid=0.2, or valid=(X, y)")


def _identity(chosen: Settings) -> tuple[str, Any]:
    """Return what must be the same for an optimizer's state to be used again."""
    return chosen.algo if isinstance(chosen.algo, str) else repr(chosen.algo), chosen.momentum
