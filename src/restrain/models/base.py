"""Base of the keyword models: a scikit-learn estimator around a network trained under rules."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, validate_data
from torch import Tensor

from restrain import progress
from restrain.compaction import Report, compact
from restrain.engine import Attachment, attach, contents_of
from restrain.errors import FileError, PlanError, SelectionError
from restrain.fields import brief, is_number, level_of_caller
from restrain.models import (
    checkpoints,
    defaults,
    files,
    keywords,
    optimizers,
    reading,
    settings,
    shapes,
    specs,
    streams,
    tabular,
)
from restrain.models.data import (
    Samples,
    Scale,
    as_numbers,
    batches,
    called,
    dense,
    drawn,
    generator,
    joined,
    per_channel,
    split,
    standardize,
)
from restrain.models.layers import Network, outputs_of
from restrain.models.losses import Loss, Ordinal, Shifted
from restrain.models.monitors import Monitors
from restrain.models.periodic import Saving
from restrain.models.portable import Portable, to_onnx
from restrain.models.running import Plain, new_seed, running, seeded
from restrain.models.settings import Settings
from restrain.models.shift import warn_of_shift
from restrain.models.signature import BEFORE, DEFAULTS, RESERVED, Init, KeywordEstimator
from restrain.models.specs import LayerData, as_list, forms, hidden, resolve
from restrain.models.training import Training
from restrain.named_tensors import near
from restrain.report import Part, write
from restrain.sampling import sampling
from restrain.tables import to_pandas
from restrain.transforms import Noise
from restrain.transforms.normalization import Standardize

_OF_NETWORKS = (
    "algo",
    "learning_rate",
    "momentum",
    "batch_size",
    "max_gradient_norm",
    "checkpoint",
    "device",
    "how",
    "patience",
)
_MOST = 2**27  # numbers in the inputs of linear models that are fitted at once
_NEW: dict[str, Any] = {  # not in 0.1
    "loss": None,
    "quantiles": None,
    "class_weight": None,
    "warm_start": False,
    "encoder": None,
}
_NEW |= {name: DEFAULTS[name] for name in (*settings.NEW, "monitors", "monitor_gradients", "save_every", "save_as")}
_HINTS = {
    **dict.fromkeys(("coef_", "intercept_"), ": only linear models have it (hidden=())"),
    "feature_importances_": ": call importances(X, y) first, best with data that the model wasn't fitted on",
    "feed_forward": ": write activations(X)",
    "classify": ": write predict(X)",
    "predict_sequence": ": write predict(X) with X of shape (samples, steps, features)",
    "add_loss": ": write loss=, a function of outputs and targets, in the constructor",
    "set_loss": ": write loss= in the constructor, or set_params(loss=)",
    "monitors_": ": write history_",
    "variables": ": write activations(X)",
    "inputs": ": write layers_[0]",
    "updates": ": torch has no graph of updates; write algo=, or train module_ in a loop of your own",
    "build_graph": ": torch has no graph to build; write module_",
    "add_layer": ": write all layers in the constructor",
}
READERS: dict[str, Callable[[Any], Any]] = {}  # "load" is set by `restrain.models.loading`, which knows all classes
_AT_ONCE = 2**18  # numbers read at a time outside of training


class KeywordModel(KeywordEstimator):
    """Base of Classifier, Regressor and Autoencoder.

    Fitted attributes: `module_` (the network, an nn.Module), `layers_` (its layers as plain data),
    `history_` (a dict per epoch), `input_scale_` and `target_scale_` (a `Standardize`, or None),
    `encoder_` (the `TableEncoder` of a data frame that isn't of plain numbers, else None),
    `n_features_in_`, `n_iter_` (epochs so far), `seed_`, `compiled_` (which part of the update was
    compiled, or why none was).
    """

    if TYPE_CHECKING:

        def __init__(self, layers: Iterable[Any] | None = None, **keywords: Any) -> None: ...

    else:
        __init__ = Init()

    module_: Network
    layers_: list[LayerData]
    history_: list[dict[str, Any]]
    input_scale_: Standardize | None
    target_scale_: Standardize | None
    n_iter_: int
    compiled_: str
    seed_: int

    def __getattr__(self, name: str) -> Any:
        if name in _HINTS and ("module_" in vars(self) or not name.endswith("_")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{_HINTS[name]}")
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in set(_NEW) & set(self._get_param_names()) - set(state):
            setattr(self, name, _NEW[name])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._has_targets
        return tags

    # ---------------------------------------------------------------- overridden by subclasses

    def loss_function(self) -> Loss:
        """Return the data loss."""
        raise NotImplementedError

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        """Return the targets as the loss takes them; with `reset`, learn classes or shape first."""
        raise NotImplementedError

    def _outputs(self) -> int:
        """Return the size of the output layer that fits the targets."""
        raise NotImplementedError

    def _check_split(self, part: Samples, held: Samples) -> None:
        """Warn of classes that are missing from the validation data."""

    def _class_weights(self, targets: Any, weight: Any, reset: bool) -> Any:
        """Return the weights of samples times those of their classes; None: all are 1."""
        return weight

    _labels = False
    _has_targets = True

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
        training = self._start(x, y, weight, valid, given, fresh=fresh, offset=offset, auto=True)
        losses: list[float] = []
        for train, _ in self._run(training):
            losses.append(train["loss"])
            if training.settings.algo is defaults.EXACT and defaults.converged(losses):
                break
        self._warn_unless_converged(training, losses)
        return self

    def _warn_unless_converged(self, training: Training, losses: list[float]) -> None:
        """Warn as scikit-learn does if the loss was still falling when a training of ours ended."""
        chosen = training.settings
        if chosen.algo is defaults.EXACT:
            ended, hint = defaults.converged(losses), "normalize=True or a small weight_l2= would help"
        else:
            stopped = chosen.patience is None or training.best.worse >= chosen.patience
            ended = not training.decided or stopped or not defaults.still_falling(training.history)
            hint = "take a greater learning_rate=, or epochs= for a longer training"
        if not ended:
            warnings.warn(
                f"{type(self).__name__} didn't converge in {training.done} epochs, the loss was still falling: {hint}",
                ConvergenceWarning,
                stacklevel=level_of_caller(),
            )

    def _unpacked(self, data: Any) -> tuple[Any, Any, Any]:
        if streams.is_stream(data):
            return streams.read(data, self._has_targets)
        arrays = isinstance(data, list) and 0 < len(data) < 4 and all(hasattr(member, "shape") for member in data)
        members = list(data) if isinstance(data, tuple) or arrays else [data]
        if not 1 <= len(members) <= 3 or (self._has_targets and len(members) == 1):
            wanted = "(X, y) or (X, y, sample_weight)" if self._has_targets else "X, or (X, None, sample_weight)"
            raise PlanError(f"data are {wanted}; got {type(data).__name__} of {len(members)}")
        x, y, weight = [*members, None, None][:3]
        return x, y, weight

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
        quiet, auto = isinstance(valid, str) and valid == "auto", auto and not checkpoints.is_of_0_1(first.checkpoint)
        found, valid = self._decided(samples, given, valid) if auto else ({}, None if quiet else valid)
        chosen, of_rules, how = self.split_keywords({**given, **found})
        place = running(chosen.device, chosen.precision)
        if fresh:
            self._build(samples, chosen, place, tuple(getattr(x, "shape", ())[1:]), zero=defaults.is_linear(found))
        elif chosen.precision is not None:
            self.module_.to(torch.float64 if chosen.precision == "64" else torch.float32)
        part, held = self._parts(samples, valid, fresh, auto, shifted=offset is not None, quiet=quiet)
        _check_patience(chosen, held)
        loss, known = self.loss_function(), vars(self).get("_optimizer")
        return Training(
            network=self.module_,
            rules=keywords.rules(of_rules, keywords.Context(self.layers_, how)),
            decided=bool(found),
            task=loss if offset is None or loss.scaled else Shifted(loss),
            train=part,
            valid=held,
            settings=chosen,
            seed=self.seed_,
            before=self.n_iter_,
            state=known[1] if known is not None and known[0] == _identity(chosen) else None,
            place=place,
        )

    def _parts(
        self, samples: Samples, valid: Any, fresh: bool, auto: bool, *, shifted: bool, quiet: bool
    ) -> tuple[Samples, Samples | None]:
        """Return training and validation samples; if `fresh`, learn scales and an intercept."""
        samples.dtype = next(self.module_.parameters()).dtype
        part, held = self._split(samples, valid, shifted, quiet=quiet)
        if fresh and self._normalizes(auto):
            self._learn_scales(part)
        if not fresh and self.input_scale_ is not None:
            warn_of_shift(part, self.input_scale_, self.target_scale_, self.input_names_)
        if fresh:
            self._set_intercept(part, shifted)
        for some in (part, held):
            if some is not None:
                some.scale, some.dtype = self._scale, samples.dtype
        return part, held

    def _normalizes(self, auto: bool) -> bool:
        """Return whether to standardise; "auto": in `fit`, unless the output has an activation.

        Raises:
            PlanError: `normalize` is something else.
        """
        if self.normalize not in (True, False, "auto", None):
            raise PlanError(f'normalize= is True, False or "auto", got {brief(self.normalize)}')
        if self.normalize == "auto":
            return auto and self.layers_[-1].get("activation", "linear") == "linear"
        return bool(self.normalize)

    def _decided(self, samples: Samples, given: dict[str, Any], valid: Any) -> tuple[dict[str, Any], Any]:
        """Return (keywords, validation data) for what is left "auto" in this call."""
        values, automatic = {**vars(self), **given}, isinstance(valid, str) and valid == "auto"
        if not _is_left_to_us(values):
            return {}, None if automatic else valid
        of_rules = self.split_keywords(given)[1]
        rules = {name: value for name, value in of_rules.items() if value is not None and value is not False}
        if self._is_linear:
            valid = None if automatic else valid
            ridge = all(name in ("weight_l2", "weight_decay") and is_number(value) for name, value in rules.items())
            plain = valid is None and ridge and all(values[name] == DEFAULTS[name] for name in _OF_NETWORKS)
            if plain and math.prod(samples.x.shape) < _MOST:
                return defaults.linear(len(samples), values["precision"], smooth=self.loss_function().smooth), None
            rules.setdefault("none by default", True)
        elif automatic:
            labels = samples.y if samples.labels and samples.y.ndim == 1 else None
            valid = defaults.part(labels, len(samples))
        share = valid if isinstance(valid, float) and 0 < valid < 1 else 0.0
        sizes = (max(1, round(len(samples) * (1 - share))), values["batch_size"])
        every = (valid is not None, values["patience"], values["validate_every"])
        return defaults.network(*sizes, *every, rules=bool(rules)), valid

    def held_part(self, count: int, labels: Any = None) -> float | None:
        """Return the part of so many samples that `fit` holds back by itself to validate, or None.

        Args:
            count: number of samples.
            labels: their classes, of a classifier.
        """
        automatic = isinstance(self.valid, str) and self.valid == "auto"
        automatic = automatic and _is_left_to_us(vars(self)) and not self._is_linear
        return defaults.part(labels, count) if automatic and not checkpoints.is_of_0_1(self.checkpoint) else None

    @property
    def _is_linear(self) -> bool:
        """True if there are no hidden layers."""
        if self.layers is not None:
            return len(self.layers) == 2 and all(isinstance(layer, int) for layer in self.layers)
        return not as_list(self.hidden)

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

    def split_keywords(self, given: Mapping[str, Any]) -> tuple[Settings, dict[str, Any], Any]:
        """Return (settings of training, keywords of rules, `how`).

        Values in `given` replace the estimator's own.

        Raises:
            PlanError: a keyword doesn't exist, or a setting of training isn't allowed.
        """
        of_rules = keywords.names(RESERVED)
        known = (*settings.NAMES, "how", *of_rules)
        wrong = [name for name in given if name not in known]
        if wrong:
            raise keywords.unknown(wrong, known, type(self).__name__)
        own = {name: getattr(self, name) for name in known}
        for name in set(of_rules) & {name for name, value in given.items() if value is not None} - {"regularizers"}:
            own.update(dict.fromkeys(keywords.aliases(name, of_rules)))
        values = {**own, **given}
        usual = {name: BEFORE[name] for name in ("epochs", "patience") if values[name] == "auto"}
        values.update(usual)
        chosen = Settings(**{name: values[name] for name in settings.NAMES})
        return chosen, {name: values[name] for name in of_rules}, values["how"]

    # ---------------------------------------------------------------- data

    def _samples(self, x: Any, y: Any, weight: Any, *, reset: bool, offset: Any = None) -> Samples:
        if y is None and weight is None and streams.is_stream(x):
            x, y, weight = streams.read(x, self._has_targets)
        x = self._inputs(x, reset)
        if self._has_targets and y is None:
            raise PlanError(f"requires y to be passed, but the target y is None: {type(self).__name__}.fit(X, y)")
        rows = None
        if weight is not None:
            weight = _check_sample_weight(weight, x, dtype=np.float64, ensure_non_negative=True)
            rows = np.flatnonzero(weight) if not weight.all() else None
        if rows is not None and len(rows) < x.shape[0] and (y is None or x.shape[0] == len(np.asarray(y))):
            x, weight = x[rows], weight[rows]
            y = None if y is None else np.asarray(y)[rows]
            offset = None if offset is None else offset[rows]
        targets = self._targets(x, y, reset) if self._has_targets else None
        if targets is not None:
            check_consistent_length(x, targets, offset)
            weight = self._class_weights(targets, weight, reset)
        if offset is not None:
            targets = _shifted(targets, offset, self.loss_function().scaled)
        return Samples(x, targets, weight, labels=self._labels)

    def _inputs(self, x: Any, reset: bool) -> Any:
        """Return X as a checked array; an array of numbers isn't copied. Images come as rows."""
        x = tabular.encoded(self, self._rows_of(x, reset), reset)
        if tabular.known(self) is not None:
            return check_array(x)
        if getattr(x, "ndim", 2) != 3:
            kinds = {"dtype": "numeric", "accept_sparse": "csr" if self._has_targets else False}
            x = as_numbers(x, lambda: validate_data(self, x, reset=reset, **kinds), "X")
            if self._reads_steps if reset else specs.steps(self.layers_):
                raise PlanError(f"recurrent layers take X of shape (batch, time, features), got {x.shape}")
            return x
        x = as_numbers(x, lambda: check_array(x, dtype="numeric", allow_nd=True), "X")
        if reset:
            if not self._reads_steps and "module" not in forms(self._given):
                raise PlanError(
                    "Found array with dim 3, while dim <= 2 is required without recurrent layers; for sequences "
                    "(batch, time, features) write layers such as (20, 'lstm')"
                )
            self.n_features_in_ = x.shape[-1]
        stated = self.layers_[0].get("shape") if not reset else None
        if reset and self.layers is not None:
            stated = specs.sample_shape(self.layers)
        if stated is not None and stated[0] not in (None, x.shape[1]):
            raise PlanError(f"X has sequences of {x.shape[1]} steps, and the first layer reads {stated[0]} steps")
        if x.shape[-1] != self.n_features_in_:
            raise PlanError(
                f"X has {x.shape[-1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input"
            )
        return x

    @property
    def _width(self) -> int:
        """The number of the network's inputs."""
        encoder = tabular.known(self)
        return int(self.n_features_in_) if encoder is None else len(encoder.get_feature_names_out())

    @property
    def input_names_(self) -> Any:
        """Names of the network's inputs, in the order of `coef_` and `selected_features_`.

        They are the columns of X, but of a category color=red for each value, and of a date also
        its places in cycles, as day.week.sin; x0, x1, ... of columns without names.
        """
        check_is_fitted(self, "module_")
        encoder = tabular.known(self)
        if encoder is not None:
            return encoder.get_feature_names_out()
        own = vars(self).get("feature_names_in_")
        return np.array([f"x{k}" for k in range(self._width)], object) if own is None else own

    @property
    def _given(self) -> Any:
        return self.hidden if self.layers is None else self.layers

    @property
    def _reads_steps(self) -> bool:
        """True if the layers read sequences, by their specifications."""
        stated = None if self.layers is None else specs.sample_shape(self.layers)
        return len(stated) == 2 if stated else bool(set(forms(self._given)) & set(shapes.SEQUENCES))

    def _rows_of(self, x: Any, reset: bool) -> Any:
        """Return images as rows, and a dict of several inputs as columns side by side.

        Raises:
            PlanError: the images have another shape than the first layer says.
        """
        if isinstance(x, Mapping) and not hasattr(x, "shape"):  # a sparse matrix may be a dict of keys, too
            first = self.layers if reset else self.layers_
            return joined(x, specs.names_of_inputs(first))
        shape = tuple(getattr(x, "shape", ())[1:])
        if len(shape) < 3:
            return x
        stated: Any = specs.image(self.layers_) if not reset else None
        if reset and self.layers is not None:
            stated = specs.sample_shape(self.layers)
        elif reset and set(forms(self._given)) & {*specs.IMAGES, "module"}:
            stated = shape
        if stated is None or len(stated) < 3:
            return x  # scikit-learn's check says that it has too many axes
        if shape != stated:
            raise PlanError(f"X has samples of shape {shape}, and the first layer says {stated}")
        return x.reshape(len(x), -1)

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
            for which in batches(len(samples), _rows(array)):
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

    @property
    def _scale(self) -> Scale | None:
        if self.input_scale_ is None:
            return None
        return Scale(self.input_scale_, self.target_scale_ if self._has_targets else self.input_scale_)

    def tensors(self, X: Any, y: Any = None) -> tuple[Tensor, Tensor]:
        """Return inputs and targets as the fitted network and its loss see them, scaled."""
        check_is_fitted(self, "module_")
        samples = self._samples(X, y, None, reset=False)
        samples.scale, samples.dtype = self._scale, self._dtype
        x, target, *_ = samples.batch(np.arange(len(samples)))
        return x, x if target is None else target

    def data_loss(self, X: Any, y: Any = None) -> Tensor:
        """Return the data loss of the fitted network, averaged over samples, with its graph."""
        x, target = self.tensors(X, y)
        return self.loss_function().losses(self.module_(x), target).mean()

    # ---------------------------------------------------------------- the network

    def _build(
        self, samples: Samples, chosen: Settings, place: Plain, shape: tuple[int, ...], *, zero: bool = False
    ) -> None:
        """Build a new network from `layers`, or from `hidden` and the sizes of the data.

        With `zero`, its weights and biases start at zero; the thresholds of classes don't.
        """
        given = self.layers
        if given is None:
            first = specs.first_layer(self.hidden, shape, self._width)
            given = [first, *as_list(self.hidden), self._outputs()]
        layers = resolve(given, activation=self.activation)
        self._check_sizes(layers)
        if isinstance(self.loss_function(), Ordinal):
            layers[-1] = {**layers[-1], "form": "ordinal"}
        if samples.x.ndim == 3 and not self._steps:
            layers = specs.with_last_step(layers)
        self._check_output(layers)
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
        self.module_.eval()
        self.history_, self.n_iter_, self.input_scale_, self.target_scale_ = [], 0, None, None
        for name in ("_optimizer", "conformal_", "feature_importances_"):
            self.__dict__.pop(name, None)

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

    @property
    def _steps(self) -> bool:
        """True if each step of a sequence has its own target."""
        return True

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

    # ---------------------------------------------------------------- use

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model to a file for `rs.load`; return the path of the file.

        A folder gets `model.safetensors`. The file is written whole or not at all. The optimizer's
        state isn't saved.

        Raises:
            FileError: the model isn't fitted, is an instance of your own subclass, or has a setting
                that is code.
        """
        if not type(self).__module__.startswith("restrain."):
            raise FileError(
                f"{type(self).__qualname__} is a class of your own, which a file doesn't hold: save an Autoencoder, "
                "Classifier or Regressor, or keep module_.state_dict()"
            )
        return files.save(self, path)

    @contextmanager
    def attached(self) -> Iterator[Attachment | None]:
        """Return a context with the rules of the keywords attached to `module_`; None without any.

        It serves to look at them: `reg.table()`, `reg.values()`. The network stays as it is.
        """
        check_is_fitted(self, "module_")
        _, given, how = self.split_keywords({})
        rules = keywords.rules(given, keywords.Context(self.layers_, how))
        if not rules:
            yield None
            return
        before = {name: tensor.clone() for name, tensor in self.module_.state_dict().items()}
        try:
            with attach(self.module_, rules, torch.optim.SGD(self.module_.parameters(), lr=0.0)) as reg:
                yield reg
        finally:
            self.module_.load_state_dict(before)  # attaching a constraint projects

    @contextmanager
    def attached_noise(self) -> Iterator[Network]:
        """Return a context with the noise and dropout of the keywords attached to `module_`.

        They act in training mode, and under `rs.sampling`; the context yields `module_`.
        """
        check_is_fitted(self, "module_")
        _, given, how = self.split_keywords({})
        rules = keywords.rules(given, keywords.Context(self.layers_, how))
        noise = [rule for rule in rules if isinstance(rule.what, Noise) and rule.how == "forward"]
        if not noise:
            yield self.module_
            return
        with attach(self.module_, noise):
            yield self.module_

    def report(
        self,
        file: str | os.PathLike[str],
        *,
        path: Any = None,
        images: Any = None,
        inputs: Any = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
        parts: Sequence[Part] = (),
    ) -> Path:
        """Write a page about the model, its rules and its training into one HTML file; return it.

        Args:
            file: the file, which ends in .html.
            path, images, inputs, title, facts: as in `Attachment.report`.
            parts: further sections, each a `restrain.report.Part`.

        Raises:
            PlanError, FileError, MissingExtraError: as in `Attachment.report`.
            NotFittedError: the model isn't fitted.
        """
        given = {"path": path, "images": images, "inputs": inputs, "facts": facts}
        given["title"] = f"Report on {type(self).__name__}" if title is None else title
        with self.attached() as reg:
            if reg is None:
                found = contents_of(self.module_, rows=self.history_, **given)
            else:
                found = reg.contents(history=self.history_, **given)
            return write(replace(found, trained="estimator", code=repr(self), parts=tuple(parts)), file)

    def compact(self) -> Report:
        """Take out hidden units that contribute nothing, as `rs.compact` does; return its report.

        Outputs stay the same up to rounding, `layers_` has the new sizes, and `train` goes on with
        the optimizer's state, where this has a number for each entry of a weight.

        Raises:
            CompactionError: see `rs.compact`.

        >>> net = rs.Classifier([4, 8, 2], random_state=0)
        >>> net = net.train((np.eye(4), [0, 1, 0, 1]), epochs=1, progress=False)
        >>> with torch.no_grad(): net.module_.hid1.weight[3:] = 0
        >>> _ = net.compact()
        >>> [layer["size"] for layer in net.layers_]
        [4, 3, 2]
        """
        check_is_fitted(self, "module_")
        shape = shapes.of_input(self.layers_[0], self.layers_)
        example = torch.randn(
            (2, shape[0] or 3, self._width) if len(shape) == 2 else (2, self._width),
            generator=torch.Generator().manual_seed(0),
            dtype=self._dtype,
            device="cpu",
        ).to(next(self.module_.parameters()).device)
        own, known = list(self.module_.parameters()), vars(self).get("_optimizer")
        state = {} if known is None else known[1].get("state", {})
        carries = set(state) <= set(range(len(own))) and all(_by_entry(state[i], own[i]) for i in state)
        carrier = torch.optim.SGD(own)
        carrier.state.update({own[i]: dict(one) for i, one in state.items()} if carries else {})
        report = compact(self.module_, example, carrier, inplace=True, rules=False).report
        if known is not None and carries:
            self._optimizer = (known[0], {**known[1], "state": {i: carrier.state[own[i]] for i in state}})
        else:
            self.__dict__.pop("_optimizer", None)
        self.layers_ = specs.resized(self.layers_, dict(self.module_.named_children()))
        return report

    @property
    def coef_(self) -> Any:
        """Slopes of a linear model in the units of the data, shape (outputs, features).

        For one target of a Regressor (features,); for two classes one row, as of scikit-learn's. Of
        the link's scale: log odds of classes, log means of counts.
        """
        return self._line()[0]

    @property
    def intercept_(self) -> Any:
        """Intercept of a linear model; of the loss "ordinal" minus the thresholds θ."""
        return self._line()[1]

    def _line(self) -> tuple[Any, Any]:
        if "module_" not in vars(self) or not self._has_targets or not reading.is_linear(self.module_):
            raise AttributeError("only linear models have coefficients")
        return self._shaped(*reading.line(self.module_, self.input_scale_, self.target_scale_, self._located()))

    def _located(self) -> int | None:
        """Return the number of outputs that are predictions; None: all."""
        return None

    def _shaped(self, slopes: Any, intercepts: Any) -> tuple[Any, Any]:
        return slopes, intercepts

    @property
    def selected_features_(self) -> Any:
        """Indices of the inputs with a weight in the first layer that isn't zero."""
        check_is_fitted(self, "module_")
        return reading.selected(self.module_)

    def importances(self, X: Any, y: Any = None, *, repeats: int = 5, random_state: Any = None) -> Any:
        """Return the fall of the score when a column is shuffled; also `feature_importances_`.

        Args:
            X, y: data, best such that the model wasn't fitted on.
            repeats: shuffles per column, of a data frame those of `feature_names_in_`.
            random_state: seed of the shuffles.
        """
        check_is_fitted(self, "module_")
        self.feature_importances_ = reading.importances(self, to_pandas(X), y, repeats, random_state)
        return self.feature_importances_

    def to_torch(self) -> Portable:
        """Return one module from raw inputs to what `predict` returns, or `predict_proba`.

        Raw are those of `input_names_`, of a data frame `encoder_.transform(X)`. It is a copy, in
        evaluation mode, without gradients. It takes a float tensor (samples, features) and gives
        the same numbers; of a Classifier with the loss "hinge" outputs.
        """
        check_is_fitted(self, "module_")
        targets = None if self._scale is None or self._labels else self._scale.y
        return Portable(self.module_, self.input_scale_, targets, *self._finish())

    def to_onnx(self, path: str | os.PathLike[str]) -> Path:
        """Write the module of `to_torch` as ONNX: input "x", output "prediction"; return the path.

        Raises:
            MissingExtraError: onnx or onnxscript isn't installed.
            PlanError: the network reads sequences.
            FileError: the file can't be written.
        """
        if "layers_" in vars(self) and specs.steps(self.layers_):
            raise PlanError("to_onnx is for tables; of networks that read sequences export to_torch() yourself")
        return to_onnx(self.to_torch(), path, (self._width,))

    def _finish(self) -> tuple[Loss | None, bool]:
        """Return (loss whose inverse link gives the predictions, whether they have one axis)."""
        return self.loss_function(), False

    def _forward(self, x: Any) -> Tensor:
        """Return the network's output for all samples of x."""
        check_is_fitted(self, "module_")
        return self._output_of(self._inputs(x, reset=False))

    def _output_of(self, inputs: Any) -> Tensor:
        """Return the network's output for checked inputs (see `_inputs`)."""
        return torch.cat([self.module_(batch) for batch in self._scaled(inputs)])

    def _scaled(self, inputs: Any) -> Iterator[Tensor]:
        """Yield batches of scaled inputs, with the network in evaluation mode and gradients off."""
        samples = Samples(inputs, dtype=self._dtype, scale=self._scale)
        self.module_.eval()
        with torch.no_grad():
            for rows in batches(len(samples), _rows(samples.x)):
                yield samples.batch(rows)[0]

    def _is_random(self) -> bool:
        """Return True if noise or dropout of the keywords, or of layers, acts under sampling."""
        try:
            with sampling(self):
                return True
        except SelectionError:
            return False

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module_.parameters()).dtype

    def activations(self, X: Any) -> dict[str, Any]:
        """Return the output of each layer by name, in order, without noise and dropout.

        The last layer of a Classifier gives logits.
        """
        check_is_fitted(self, "module_")
        parts = [outputs_of(self.module_, batch) for batch in self._scaled(self._inputs(X, reset=False))]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def find(self, layer: str, parameter: str = "weight") -> Tensor:
        """Return a parameter of a layer, as in find("hid1", "bias"): the network's own tensor.

        Raises:
            PlanError: there is no such layer or parameter.
        """
        check_is_fitted(self, "module_")
        wanted, there = f"{layer}.{parameter}", dict(self.module_.named_parameters(remove_duplicate=False))
        if wanted not in there:
            raise PlanError(
                f"no parameter is called {wanted!r}{keywords.hint_of_name(wanted)}{near(wanted, list(there))}"
            )
        return there[wanted]

    @property
    def params(self) -> dict[str, Tensor]:
        """Parameters of the network by name, its own tensors."""
        if "module_" not in vars(self):
            raise AttributeError("a model has parameters once it is fitted")
        return dict(self.module_.named_parameters())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a model of this class, as `rs.load` does.

        Raises:
            MissingFileError, FileError: as in `rs.load`, or the model is of another class.
        """
        found = READERS["load"](path)
        if not isinstance(found, cls):
            raise FileError(f"{path} holds a {type(found).__name__}; write rs.{type(found).__name__}.load(path)")
        return found

    def encode(self, X: Any, layer: str | None = None, *, sample: bool = False, random_state: Any = None) -> Any:
        """Return the output of the named layer for X; by default of the middle layer.

        Args:
            X: the inputs.
            layer: the layer's name.
            sample: draw zeros and ones, with the outputs as probabilities of a one.
            random_state: seed of these draws.

        Raises:
            PlanError: no layer has that name, or the outputs are no probabilities.
        """
        check_is_fitted(self, "module_")
        name = self._layer(layer)
        found = self.activations(X)[name]
        if not sample:
            return found
        if found.min() < 0 or found.max() > 1:
            raise PlanError(
                f"sample=True draws ones with the outputs as probabilities, and those of {name!r} go from "
                f"{found.min():.3g} to {found.max():.3g}: give it the activation 'sigmoid'"
            )
        return (np.random.default_rng(random_state).uniform(size=found.shape) < found).astype(found.dtype)

    def decode(self, Z: Any, layer: str | None = None) -> Any:
        """Return the model's output, given the output Z of a layer (see `encode`).

        `decode(encode(X))` is the model's output for X.

        Raises:
            PlanError: no layer has that name, or Z doesn't fit its size.
        """
        check_is_fitted(self, "module_")
        name = self._layer(layer)
        codes = check_array(Z, dtype="numeric", allow_nd=True)
        size = next(one["size"] for one in self.layers_ if one["name"] == name)
        if codes.shape[-1] != size:
            raise PlanError(f"the layer {name!r} puts out {size} numbers, got codes of {codes.shape[-1]}")
        samples = Samples(codes, dtype=self._dtype)
        self.module_.eval()
        with torch.no_grad():
            parts = [
                self.module_.after(name, samples.batch(rows)[0]) for rows in batches(len(samples), _rows(samples.x))
            ]
        return self._finished(torch.cat(parts))

    def _finished(self, output: Tensor) -> Any:
        """Convert the network's output to the user's units, as an array."""
        scale = None if self._scale is None else self._scale.y
        return (output if scale is None else scale.inverse(output)).numpy()

    def _layer(self, name: str | None) -> str:
        names = [layer["name"] for layer in self.layers_[1:]]
        if name is None:
            computing = [self.layers_[0]["name"], *hidden(self.layers_), self.layers_[-1]["name"]]
            return str(computing[len(computing) // 2])
        if name not in names:
            raise PlanError(f"no layer is called {name!r}; there are: {', '.join(names)}")
        return name


def _by_entry(state: Mapping[str, Any], p: Tensor) -> bool:
    """Return True if an optimizer's tensors of a parameter have its shape, or one entry."""
    return all(one.shape == p.shape or one.numel() == 1 for one in state.values() if isinstance(one, Tensor))


def _is_left_to_us(values: Mapping[str, Any]) -> bool:
    """Return True if `fit` decides how long it trains, by the values of all keywords."""
    return bool(values["epochs"] == "auto") and "lbfgs" not in str(values["algo"]).lower()


def _check_patience(chosen: Settings, held: Samples | None) -> None:
    if chosen.patience is not None and held is None:
        raise PlanError("patience= needs validation data: write valid=0.2, or valid=(X, y)")


def _identity(chosen: Settings) -> tuple[str, Any]:
    """Return what must be the same for an optimizer's state to be used again."""
    return chosen.algo if isinstance(chosen.algo, str) else repr(chosen.algo), chosen.momentum


def _shifted(targets: Any, offset: Any, scaled: bool) -> Any:
    """Return the targets less the offset, or with it as a last column (see `losses.Shifted`)."""
    column = offset.reshape(-1, *[1] * (targets.ndim - 1))
    if scaled:
        return targets - column
    return np.concatenate([targets, np.broadcast_to(column, (*targets.shape[:-1], 1))], -1)


def _rows(array: Any) -> int:
    """Return the number of samples to read at a time (at least 1)."""
    return int(max(1, _AT_ONCE // max(1, math.prod(array.shape[1:]))))
