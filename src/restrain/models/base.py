"""Base of the keyword models: a scikit-learn estimator around a network trained under rules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, validate_data
from torch import Tensor

from restrain import progress, registry
from restrain.compaction import Report, compact
from restrain.engine import Attachment, attach, contents_of
from restrain.errors import FileError, PlanError
from restrain.models import checkpoints, files, keywords, optimizers, settings
from restrain.models.data import Samples, Scale, as_numbers, batches, generator, split
from restrain.models.layers import Dense, Network, outputs_of
from restrain.models.monitors import Monitors
from restrain.models.running import Plain, new_seed, running, seeded
from restrain.models.settings import Settings
from restrain.models.signature import DEFAULTS, Init
from restrain.models.specs import NORMS, RECURRENT, LayerData, as_list, forms, hidden, resolve
from restrain.models.training import Task, Training
from restrain.report import write
from restrain.transforms.normalization import Standardize

_AT_ONCE = 2**18  # numbers read at a time outside of training


class KeywordModel(BaseEstimator):  # type: ignore[misc]
    """Base of Classifier, Regressor and Autoencoder.

    Fitted attributes: `module_` (the network, an nn.Module), `layers_` (its layers as plain data),
    `history_` (a dict per epoch), `input_scale_` and `target_scale_` (a `Standardize`, or None),
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
        if not name.endswith("_") and name in keywords.names(tuple(DEFAULTS)):
            return None  # registered after this estimator was made
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # The user's classes come along, so that another process registers their names before
        # `clone` asks for them.
        meant = {name: registry.lookup(name) for name in keywords.registered(tuple(DEFAULTS))}
        kept = [cls for name, cls in meant.items() if vars(self).get(name) is not None or "<" not in cls.__qualname__]
        return {**super().__getstate__(), "_meant": [cls for cls in kept if not cls.__module__.startswith("restrain.")]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "_meant"})
        for cls in state.get("_meant", ()):
            registry.adopt(cls)

    # ---------------------------------------------------------------- overridden by subclasses

    def _task(self) -> Task:
        raise NotImplementedError

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        """Return the targets as the loss takes them; with `reset`, learn classes or shape first."""
        raise NotImplementedError

    def _outputs(self) -> int:
        """Return the size of the output layer that fits the targets."""
        raise NotImplementedError

    def _check_split(self, part: Samples, held: Samples) -> None:
        """Warn of classes that are missing from the validation data."""

    _labels = False
    _has_targets = True

    # ---------------------------------------------------------------- training

    def train(self, data: Any, valid: Any = None, **given: Any) -> Self:
        """Continue training from the current weights; the first call builds the network.

        Args:
            data: (X, y) or (X, y, sample_weight); of an Autoencoder X or (X, None, sample_weight).
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
        return self._run(self._start(*self._unpacked(data), valid, given, fresh=fresh))

    def _fit(self, x: Any, y: Any, weight: Any, valid: Any, given: dict[str, Any], *, fresh: bool = True) -> Self:
        for _ in self._run(self._start(x, y, weight, valid, given, fresh=fresh)):
            pass
        return self

    def _unpacked(self, data: Any) -> tuple[Any, Any, Any]:
        arrays = isinstance(data, list) and 0 < len(data) < 4 and all(hasattr(member, "shape") for member in data)
        members = list(data) if isinstance(data, tuple) or arrays else [data]
        if not 1 <= len(members) <= 3 or (self._has_targets and len(members) == 1):
            wanted = "(X, y) or (X, y, sample_weight)" if self._has_targets else "X, or (X, None, sample_weight)"
            raise PlanError(f"data are {wanted}; got {type(data).__name__} of {len(members)}")
        x, y, weight = [*members, None, None][:3]
        return x, y, weight

    def _start(self, x: Any, y: Any, weight: Any, valid: Any, given: dict[str, Any], *, fresh: bool) -> Training:
        """Check data and keywords, build the network if `fresh`, and return the Training."""
        chosen, of_rules, how = self.split_keywords(given)
        place = running(chosen.device, chosen.precision)
        samples = self._samples(x, y, weight, reset=fresh)
        if fresh:
            self._build(samples, chosen, place)
        elif chosen.precision is not None:
            self.module_.to(torch.float64 if chosen.precision == "64" else torch.float32)
        samples.dtype = next(self.module_.parameters()).dtype
        part, held = self._split(samples, self.valid if valid is None else valid)
        if chosen.patience is not None and held is None:
            raise PlanError("patience= needs validation data: write valid=0.2, or valid=(X, y)")
        if fresh and self.normalize:
            self._learn_scales(part)
        for some in (part, held):
            if some is not None:
                some.scale, some.dtype = self._scale, samples.dtype
        algo = chosen.algo if isinstance(chosen.algo, str) else repr(chosen.algo)
        known = vars(self).get("_optimizer")
        return Training(
            network=self.module_,
            rules=keywords.rules(of_rules, keywords.Context(self.layers_, how)),
            task=self._task(),
            train=part,
            valid=held,
            settings=chosen,
            seed=self.seed_,
            before=self.n_iter_,
            state=known[1] if known is not None and known[0] == (algo, chosen.momentum) else None,
            place=place,
        )

    def _run(self, training: Training) -> Iterator[tuple[Monitors, Monitors]]:
        chosen = training.settings
        earlier = list(self.history_)
        bar = progress.bar(chosen.epochs, chosen.progress if training.place.rank == 0 else False)
        try:
            for train, valid in training.epochs():
                self.history_ = earlier + training.history
                bar.update(training.done - bar.n)
                bar.set_postfix(loss=f"{train['loss']:.4g}", compiled=training.said, refresh=False)
                yield train, valid
        finally:
            bar.close()
            self.history_ = earlier + training.history
            self.n_iter_ = training.before + training.done
            self.compiled_ = training.said
            algo = chosen.algo if isinstance(chosen.algo, str) else repr(chosen.algo)
            self._optimizer = ((algo, chosen.momentum), optimizers.method(training.optimizer, "state_dict")())

    def split_keywords(self, given: Mapping[str, Any]) -> tuple[Settings, dict[str, Any], Any]:
        """Return (settings of training, keywords of rules, `how`).

        Values in `given` replace the estimator's own.

        Raises:
            PlanError: a keyword doesn't exist, or a setting of training isn't allowed.
        """
        of_rules = keywords.names(tuple(DEFAULTS))
        known = (*settings.NAMES, "how", *of_rules)
        wrong = [name for name in given if name not in known]
        if wrong:
            raise keywords.unknown(wrong, known, type(self).__name__)
        own = {name: getattr(self, name) for name in known}
        for name in set(of_rules) & {name for name, value in given.items() if value is not None} - {"regularizers"}:
            own.update(dict.fromkeys(keywords.aliases(name, of_rules)))
        values = {**own, **given}
        chosen = Settings(**{name: values[name] for name in settings.NAMES})
        return chosen, {name: values[name] for name in of_rules}, values["how"]

    # ---------------------------------------------------------------- data

    def _samples(self, x: Any, y: Any, weight: Any, *, reset: bool) -> Samples:
        x = self._inputs(x, reset)
        if self._has_targets and y is None:
            raise PlanError(f"requires y to be passed, but the target y is None: {type(self).__name__}.fit(X, y)")
        rows = None
        if weight is not None:
            weight = _check_sample_weight(weight, x, dtype=np.float64, ensure_non_negative=True)
            rows = np.flatnonzero(weight) if not weight.all() else None
        if rows is not None and len(rows) < len(x) and len(x) == len(np.asarray(y if y is not None else x)):
            x, weight = x[rows], weight[rows]
            y = None if y is None else np.asarray(y)[rows]
        targets = self._targets(x, y, reset) if self._has_targets else None
        if targets is not None:
            check_consistent_length(x, targets)
        return Samples(x, targets, weight, labels=self._labels)

    def _inputs(self, x: Any, reset: bool) -> Any:
        """Return X as a checked array; an array of numbers isn't copied."""
        if getattr(x, "ndim", 2) != 3:
            x = as_numbers(x, lambda: validate_data(self, x, reset=reset, dtype="numeric"), "X")
            layers = None if reset else self.layers_
            if layers and any(layer["form"] in RECURRENT for layer in layers):
                raise PlanError(f"recurrent layers take X of shape (batch, time, features), got {x.shape}")
            return x
        x = as_numbers(x, lambda: check_array(x, dtype="numeric", allow_nd=True), "X")
        if reset:
            if not set(forms(self.hidden if self.layers is None else self.layers)) & set(RECURRENT):
                raise PlanError(
                    "Found array with dim 3, while dim <= 2 is required without recurrent layers; for sequences "
                    "(batch, time, features) write layers such as (20, 'lstm')"
                )
            self.n_features_in_ = x.shape[-1]
        if x.shape[-1] != self.n_features_in_:
            raise PlanError(
                f"X has {x.shape[-1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input"
            )
        return x

    def _split(self, samples: Samples, valid: Any) -> tuple[Samples, Samples | None]:
        if valid is None or (isinstance(valid, (int, float)) and valid is not False and valid == 0):
            return samples, None
        if isinstance(valid, (int, float, np.floating)):
            part, held = split(samples, float(valid), self.seed_)
            self._check_split(part, held)
            return part, held
        return samples, self._samples(*self._unpacked(valid), reset=False)

    def _learn_scales(self, samples: Samples) -> None:
        """Fit mean and deviation of the training inputs, and of numeric targets."""
        rows = samples.rows

        def chunks(array: Any) -> Iterator[Any]:
            for which in batches(len(samples), _rows(array)):
                yield array[which if rows is None else rows[which]]

        self.input_scale_ = Standardize().fit(chunks(samples.x))
        if self._has_targets and not self._labels:
            self.target_scale_ = Standardize().fit(chunks(samples.y))

    @property
    def _scale(self) -> Scale | None:
        return None if self.input_scale_ is None else Scale(self.input_scale_, self.target_scale_ or self.input_scale_)

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
        return self._task().losses(self.module_(x), target).mean()

    # ---------------------------------------------------------------- the network

    def _build(self, samples: Samples, chosen: Settings, place: Plain) -> None:
        """Build a new network from `layers`, or from `hidden` and the sizes of the data."""
        given = self.layers
        if given is None:
            given = [self.n_features_in_, *as_list(self.hidden), self._outputs()]
        layers = resolve(given, activation=self.activation)
        self._check_sizes(layers)
        if samples.x.ndim == 3 and not self._steps:
            layers.insert(-1, {"name": "last", "form": "last", "size": layers[-2]["size"], "activation": "linear"})
        self.seed_ = place.agreed(self._new_seed(chosen))
        with seeded(generator(self.seed_, 0).initial_seed()):
            network = Network(layers)
        double = samples.x.dtype == np.float64 and str(chosen.device or "cpu") == "cpu"
        precision = chosen.precision or ("64" if double else "32")
        self.layers_, self.module_ = layers, network.double() if precision == "64" else network.float()
        self.module_.eval()
        self.history_, self.n_iter_, self.input_scale_, self.target_scale_ = [], 0, None, None
        self.__dict__.pop("_optimizer", None)

    @property
    def _steps(self) -> bool:
        """True if each step of a sequence has its own target."""
        return True

    def _check_sizes(self, layers: list[LayerData]) -> None:
        for layer, size, what in (
            (layers[0], self.n_features_in_, "features"),
            (layers[-1], self._outputs(), "outputs"),
        ):
            if layer["size"] != size:
                raise PlanError(
                    f"the layer {layer['name']!r} has the size {layer['size']}, the data have {size} {what}: "
                    f"write {size} there"
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

    def report(
        self,
        file: str | os.PathLike[str],
        *,
        path: Any = None,
        images: Any = None,
        inputs: Any = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a page about the model, its rules and its training into one HTML file; return it.

        Args:
            file: the file, which ends in .html.
            path, images, inputs, title, facts: as in `Attachment.report`.

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
            return write(replace(found, trained="estimator", code=repr(self)), file)

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
        steps = any(layer["form"] in RECURRENT for layer in self.layers_)
        example = torch.randn(
            (2, 3, self.n_features_in_) if steps else (2, self.n_features_in_),
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
        for before, layer in pairwise(self.layers_):
            layer["size"] = _size(self.module_.get_submodule(layer["name"]), layer, before["size"])
        return report

    def _forward(self, x: Any) -> Tensor:
        """Return the network's output for all samples of x."""
        return torch.cat([self.module_(batch) for batch in self._ready(x)])

    def _ready(self, x: Any) -> Iterator[Tensor]:
        """Yield batches of scaled inputs, with the network in evaluation mode and gradients off."""
        check_is_fitted(self, "module_")
        samples = Samples(self._inputs(x, reset=False), dtype=self._dtype, scale=self._scale)
        self.module_.eval()
        with torch.no_grad():
            for rows in batches(len(samples), _rows(samples.x)):
                yield samples.batch(rows)[0]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module_.parameters()).dtype

    def activations(self, X: Any) -> dict[str, Any]:
        """Return the output of each layer by name, in order, without noise and dropout.

        The last layer of a Classifier gives logits.
        """
        parts = [outputs_of(self.module_, batch) for batch in self._ready(X)]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def encode(self, X: Any, layer: str | None = None) -> Any:
        """Return the output of the named layer for X; by default of the middle layer.

        Raises:
            PlanError: no layer has that name.
        """
        check_is_fitted(self, "module_")
        name = self._layer(layer)
        return self.activations(X)[name]

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
        return (output if self._scale is None else self._scale.y.inverse(output)).numpy()

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


def _size(module: Any, layer: LayerData, before: int) -> int:
    """Return the number of outputs of a layer, given that of the layer before."""
    if isinstance(module, Dense):
        return module.out_features
    return before if layer["form"] in (*NORMS, "last") else int(layer["size"])


def _rows(array: Any) -> int:
    """Return the number of samples to read at a time (at least 1)."""
    return int(max(1, _AT_ONCE * len(array) // max(1, array.size)))
