"""Base of the keyword models: a scikit-learn estimator around a network, read and used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from restrain.compaction import Report, compact
from restrain.engine import Attachment, attach, contents_of
from restrain.errors import FileError, PlanError, SelectionError
from restrain.models import defaults, files, keywords, reading, settings, shapes, specs
from restrain.models.data import Samples, at_once, batches
from restrain.models.fitting import Fitting
from restrain.models.layers import Network, outputs_of
from restrain.models.losses import Loss
from restrain.models.portable import Portable, to_onnx
from restrain.models.signature import DEFAULTS, Init
from restrain.models.specs import hidden
from restrain.named_tensors import near
from restrain.report import Part, write
from restrain.sampling import sampling
from restrain.tables import to_pandas
from restrain.transforms import Noise

_NEW: dict[str, Any] = {  # not in 0.1
    "loss": None,
    "quantiles": None,
    "class_weight": None,
    "warm_start": False,
    "encoder": None,
    "ensemble": None,
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


class KeywordModel(Fitting):
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

    def __getattr__(self, name: str) -> Any:
        if name in _HINTS and ("module_" in vars(self) or not name.endswith("_")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{_HINTS[name]}")
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in set(_NEW) & set(self._get_param_names()) - set(state):
            setattr(self, name, _NEW[name])

    # ---------------------------------------------------------------- files and pages

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
                found = replace(found, notes=tuple(filter(None, [defaults.rules_of_fit(self.history_)])))
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

    # ---------------------------------------------------------------- reading

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

    # ---------------------------------------------------------------- predicting

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
            for rows in batches(len(samples), at_once(samples.x)):
                yield samples.batch(rows)[0]

    def _is_random(self) -> bool:
        """Return True if noise or dropout of the keywords, or of layers, acts under sampling."""
        try:
            with sampling(self):
                return True
        except SelectionError:
            return False

    def activations(self, X: Any) -> dict[str, Any]:
        """Return the output of each layer by name, in order, without noise and dropout.

        The last layer of a Classifier gives logits.
        """
        check_is_fitted(self, "module_")
        parts = [outputs_of(self.module_, batch) for batch in self._scaled(self._inputs(X, reset=False))]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

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
                self.module_.after(name, samples.batch(rows)[0]) for rows in batches(len(samples), at_once(samples.x))
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
