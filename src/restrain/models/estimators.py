"""The estimators Classifier, Regressor and Autoencoder."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor
from torch.nn import functional as F

from restrain.errors import PlanError, RestrainWarning
from restrain.fields import level_of_caller, listed
from restrain.models.base import KeywordModel
from restrain.models.data import Samples, as_numbers, warn_of_unheld


class _CrossEntropy:
    """Cross-entropy of logits and accuracy, averaged over the steps of a sequence."""

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Return -log softmax(output)[target] of each sample, shape (batch,)."""
        return _per_sample(F.cross_entropy(output.movedim(-1, 1), target, reduction="none"))

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"acc": accuracy of each sample, shape (batch,)}."""
        return {"acc": _per_sample((output.argmax(-1) == target).to(output.dtype))}


class _SquaredError:
    """Squared error, averaged over features and steps."""

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean of (output - target)² of each sample, shape (batch,)."""
        return _per_sample((output - target).square())

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return no scores."""
        return {}


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.dim() > 1 else values


class Classifier(ClassifierMixin, KeywordModel):  # type: ignore[misc]
    """Neural-network classifier regularised by keyword; minimises the softmax cross-entropy.

    Args:
        layers: all layers, as in [784, (100, "tanh"), 10] (see `restrain.models.specs`); None takes
            `hidden`, and the sizes of input and output from the data. With `layers` given, integer
            labels are class indices.
        hidden: the hidden layers, a size or a list as in `layers`.
        activation: activation of hidden layers that don't name one.
        normalize: standardise the inputs by mean and deviation of the training data.
        how: moment at which penalties on weights act, such as "proximal", unless the dict of a
            keyword has its own.
        valid: fraction of the data held back for validation, or validation data (X, y).
        random_state: seed; None draws one from torch's global generator.

    Further keywords: settings of training (see `restrain.models.settings`), rules (see
    `restrain.models.keywords`), and the name of every registered penalty or transform.

    >>> X, y = torch.randn(20, 3).numpy(), [0, 1] * 10
    >>> rs.Classifier(hidden=(8,), weight_l2=1e-3, epochs=2).fit(X, y).predict(X).shape
    (20,)
    """

    _labels = True

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, valid: Any = None, **given: Any) -> Self:
        """Train from scratch; return self. Keywords replace the constructor's for this call."""
        self.__dict__.pop("_classes", None)
        return self._fit(X, y, sample_weight, valid, given)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None, **given: Any) -> Self:
        """Train one more epoch; `classes` at the first call lists all classes of later data too."""
        fresh = "module_" not in vars(self)
        if fresh and classes is not None:
            self._classes = np.unique(classes)
        return self._fit(X, y, sample_weight, None, {"epochs": 1, **given}, fresh=fresh)

    def predict(self, X: Any) -> Any:
        """Return the most likely class of each sample, or of each step if steps are labelled."""
        indices = self._forward(X).argmax(-1).numpy()
        return self.classes_[indices]

    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class, in the order of `classes_`."""
        return torch.softmax(self._forward(X), -1).numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy over samples, or over steps if steps are labelled.

        Raises:
            PlanError: labels are text where the classes are numbers, or the other way round.
        """
        check_is_fitted(self, "module_")
        self._check_kind(np.asarray(y))
        if not self.labels_of_steps_:
            return float(super().score(X, y, sample_weight))
        right = (self.predict(X) == np.asarray(y)).mean(1)
        return float(np.average(right, weights=sample_weight))

    def _check_kind(self, labels: Any) -> None:
        """Check that labels are text or numbers as `classes_` are.

        Raises:
            PlanError: a label is of the other kind.
        """
        known, given = self.classes_.ravel().tolist(), labels.ravel().tolist()
        kind = {isinstance(value, str) for value in known}
        other = [
            value for value in given if isinstance(value, str) not in kind and value is not None and value == value
        ]
        if other:
            raise PlanError(
                f"y has labels such as {other[0]!r}, where the classes of the training are "
                f"{listed([repr(value) for value in known])}: give labels of that kind"
            )

    def _finished(self, output: Tensor) -> Any:
        return torch.softmax(output, -1).numpy()

    def _task(self) -> _CrossEntropy:
        return _CrossEntropy()

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        y = np.asarray(y)
        steps = x.ndim == 3 and y.shape == x.shape[:2]
        labels = y.reshape(-1) if steps else column_or_1d(y, warn=True)
        check_array(labels, ensure_2d=False, dtype=None, input_name="y")
        if self.layers is None or labels.dtype.kind not in "iu":
            check_classification_targets(labels)
        if reset:
            self.labels_of_steps_ = steps
            self.classes_ = self._learned_classes(labels)
        elif steps != self.labels_of_steps_:
            raise PlanError("a label for each step of a sequence, or one for the whole: as in the first training")
        else:
            self._check_kind(labels)
        indices = np.searchsorted(self.classes_, labels).clip(max=len(self.classes_) - 1)
        if (self.classes_[indices] != labels).any():
            new = np.setdiff1d(labels, self.classes_)
            raise PlanError(f"y has the labels {new[:10].tolist()}, which are not among {self.classes_[:20].tolist()}")
        return indices.reshape(y.shape[:2] if steps else -1)

    def _check_split(self, part: Samples, held: Samples) -> None:
        if held.y.ndim == 1:
            warn_of_unheld(part.y[part.rows], held.y[held.rows], self.classes_)

    def _learned_classes(self, labels: Any) -> Any:
        known = self._known_classes(labels)
        found = np.unique(labels)
        if len(known) < 2:
            raise PlanError(
                f"a classifier tells at least two classes apart, got one class only: {found.tolist()}; for data of one "
                "kind there is rs.Autoencoder"
            )
        if len(found) == 1 and len(labels) > 1 and "_classes" not in vars(self):
            warnings.warn(
                f"all {len(labels)} labels are of one class, {found[0].item()!r}: any network learns to say that",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
        return known

    def _known_classes(self, labels: Any) -> Any:
        """Return all classes, sorted.

        They are the `classes` of `partial_fit`, else with `layers` and integer labels the indices
        below the size of the output, else the labels that occur.

        Raises:
            PlanError: an integer label isn't an index of the given output layer.
        """
        if "_classes" in vars(self):
            return self._classes
        if self.layers is not None and labels.dtype.kind in "iu":
            last = self.layers[-1]
            members = last.values() if isinstance(last, dict) else last if isinstance(last, (tuple, list)) else [last]
            size = next((member for member in members if isinstance(member, (int, np.integer))), 0)
            if labels.min() < 0 or labels.max() >= size:
                raise PlanError(
                    f"with layers given, integer labels are class indices from 0 to {size - 1}; got "
                    f"{labels.min()} to {labels.max()}. Other labels go with hidden= instead of layers="
                )
            return np.arange(size)
        return np.unique(labels)

    def _outputs(self) -> int:
        return len(self.classes_)

    @property
    def _steps(self) -> bool:
        return bool(self.labels_of_steps_)


class Regressor(RegressorMixin, KeywordModel):  # type: ignore[misc]
    """Neural-network regressor regularised by keyword; minimises mean squared error.

    Arguments as in `Classifier`. `normalize=True` standardises targets too and converts predictions
    back; strengths then refer to the standardised data.

    >>> X = torch.randn(50, 3, dtype=torch.float64).numpy()
    >>> linear = rs.Regressor(hidden=(), algo="lbfgs", batch_size=50, epochs=20, random_state=0)
    >>> model = linear.fit(X, X @ [1, 2, 3])
    >>> model.module_.out.weight.detach()
    tensor([[1.00, 2.00, 3.00]], dtype=torch.float64)
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, valid: Any = None, **given: Any) -> Self:
        """Train from scratch; return self. Keywords replace the constructor's for this call."""
        return self._fit(X, y, sample_weight, valid, given)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, **given: Any) -> Self:
        """Train one more epoch."""
        return self._fit(X, y, sample_weight, None, {"epochs": 1, **given}, fresh="module_" not in vars(self))

    def predict(self, X: Any) -> Any:
        """Return the prediction for each sample, in the shape of the targets."""
        return self._finished(self._forward(X))

    def _finished(self, output: Tensor) -> Any:
        found = super()._finished(output)
        return found[..., 0] if self.is_flat_ else found

    def _task(self) -> _SquaredError:
        return _SquaredError()

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        given = {"ensure_2d": False, "allow_nd": True, "dtype": "numeric", "input_name": "y"}
        y = as_numbers(y, lambda: check_array(y, **given), "the target y of a Regressor")
        steps = x.ndim == 3 and y.ndim > 1 and y.shape[:2] == x.shape[:2]
        flat = y.ndim == (2 if steps else 1)
        if y.ndim > (3 if steps else 2):
            raise PlanError(f"y of shape {y.shape} doesn't fit X of shape {x.shape}")
        size = 1 if flat else y.shape[-1]
        if reset:
            self.is_flat_, self.targets_of_steps_, self.n_outputs_ = flat, steps, size
        elif (steps, size) != (self.targets_of_steps_, self.n_outputs_):
            raise PlanError(f"y of shape {y.shape} doesn't fit the {self.n_outputs_} targets of the first training")
        return y[..., None] if flat else y

    def _outputs(self) -> int:
        return int(self.n_outputs_)

    @property
    def _steps(self) -> bool:
        return bool(self.targets_of_steps_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class Autoencoder(TransformerMixin, KeywordModel):  # type: ignore[misc]
    """Autoencoder regularised by keyword; minimises the mean squared error of the reconstruction.

    Under noise, the reconstruction is compared with the clean input. Arguments as in `Classifier`.
    `transform` returns the output of the middle layer.

    >>> X = torch.randn(20, 4).numpy()
    >>> model = rs.Autoencoder([4, (8, "relu"), (4, "tied")], hidden_l1=1e-3, epochs=2).fit(X)
    >>> model.transform(X).shape, model.predict(X).shape
    ((20, 8), (20, 4))
    """

    _has_targets = False

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, valid: Any = None, **given: Any) -> Self:
        """Train from scratch; `y` is ignored. Keywords replace the constructor's for this call."""
        return self._fit(X, None, sample_weight, valid, given)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None, **given: Any) -> Self:
        """Train one more epoch; `y` is ignored."""
        return self._fit(X, None, sample_weight, None, {"epochs": 1, **given}, fresh="module_" not in vars(self))

    def transform(self, X: Any, layer: str | None = None) -> Any:
        """Return the codes of the samples: the output of the middle or the named layer."""
        return self.encode(X, layer)

    def inverse_transform(self, Z: Any, layer: str | None = None) -> Any:
        """Return the reconstructions of codes; see `decode`."""
        return self.decode(Z, layer)

    def predict(self, X: Any) -> Any:
        """Return the reconstruction of each sample."""
        return self._finished(self._forward(X))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return R² of the reconstruction.

        It is 1 - Σ (x - x̂)² / Σ (x - mean)², sums over samples and features.
        """
        check_is_fitted(self, "module_")
        x = self._inputs(X, reset=False)
        flat = x.reshape(-1, x.shape[-1])
        found = self.predict(X).reshape(flat.shape)
        return float(r2_score(flat, found, sample_weight=sample_weight, multioutput="variance_weighted"))

    def _task(self) -> _SquaredError:
        return _SquaredError()

    def _outputs(self) -> int:
        return int(self.n_features_in_)
