"""The estimators Classifier, Regressor and Autoencoder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin, ClassNamePrefixFeaturesOutMixin, RegressorMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
from torch import Tensor

from restrain.errors import PlanError, RestrainWarning
from restrain.fields import brief, is_number, level_of_caller, listed
from restrain.models import intervals, losses
from restrain.models.base import KeywordModel
from restrain.models.data import Samples, as_numbers, dense, warn_of_unheld
from restrain.models.losses import Cox, Labels, Loss, Own
from restrain.models.running import seeded
from restrain.models.signature import Init
from restrain.sampling import sampling


class Classifier(ClassifierMixin, KeywordModel):  # type: ignore[misc]
    """Neural-network classifier regularised by keyword; minimises the softmax cross-entropy.

    With y of shape (samples, labels), zeros and ones, each label has its own logit: the loss is the
    mean of their cross-entropies, and `predict_proba` gives the probability of each.

    Args:
        layers: all layers, as in [784, (100, "tanh"), 10] (see `restrain.models.specs`); None takes
            `hidden`, and the sizes of input and output from the data. With `layers` given, integer
            labels are class indices.
        hidden: the hidden layers, a size or a list as in `layers`; "auto": one of 100.
        activation: activation of hidden layers that don't name one.
        loss: "cross_entropy", "ordinal" for classes in order, "hinge", or a function of logits and
            class indices (see `restrain.models.losses`).
        class_weight: {class: weight}, "balanced" for equal sums of the classes, or None; multiplies
            `sample_weight`.
        ensemble: number of networks of one hidden layer that `fit` trains side by side, each
            validated on another part of the samples, and joins to one with all their hidden units,
            whose outputs are the means of theirs. None: one network. "auto": 5 for 50 to 10,000
            samples where `layers`, `hidden`, `activation`, `loss`, `epochs`, `checkpoint` and rules
            are left as they are; in tables of up to 100 columns they read each number through bins
            of its quantiles, too (see `restrain.models.bins`).
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

    if not TYPE_CHECKING:
        __init__ = Init(class_weight=None, ensemble="auto")
    _labels = True

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, valid: Any = None, **given: Any) -> Self:
        """Train from scratch; return self. Keywords replace the constructor's for this call.

        X alone may be a DataLoader, a Dataset or an iterator of (X, y), as in `train`.
        """
        self.__dict__.pop("_classes", None)
        return self._fit_anew(X, y, sample_weight, valid, given)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None, **given: Any) -> Self:
        """Train one more epoch; `classes` at the first call lists all classes of later data too."""
        fresh = "module_" not in vars(self)
        if fresh and self.class_weight == "balanced":
            raise PlanError(
                'class_weight="balanced" counts the classes of all data, which partial_fit never sees: give a dict'
            )
        if fresh and classes is not None:
            self._classes = np.unique(classes)
        return self._fit(X, y, sample_weight, None, {"epochs": 1, **given}, fresh=fresh)

    def predict(self, X: Any) -> Any:
        """Return the most likely class of each sample, or of each step if steps are labelled."""
        output = self._forward(X)
        if self._is_multilabel:
            return (output > 0).numpy().astype(int)
        return self.classes_[output.argmax(-1).numpy()]

    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class, in the order of `classes_`; or of each label.

        Raises:
            PlanError: the loss gives no probabilities ("hinge").
        """
        return self._finished(self._forward(X))

    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithm of `predict_proba`, without rounding small ones to zero."""
        output, loss = self._forward(X), self.loss_function()
        if isinstance(loss, Labels):
            return torch.nn.functional.logsigmoid(output).numpy()
        if isinstance(loss, losses.Hinge):
            loss.mean(output)  # refuses
        return output.log_softmax(-1).numpy()

    def decision_function(self, X: Any) -> Any:
        """Return the outputs; of two classes that of the second minus that of the first."""
        output = self._forward(X)
        if output.shape[-1] == 2 and not self._is_multilabel:
            return (output[..., 1] - output[..., 0]).numpy()
        return output.numpy()

    def predict_logit(self, X: Any) -> Any:
        """Return the output for each class, of which `predict_proba` is the softmax."""
        return self._forward(X).numpy()

    def sample(self, X: Any, n: int = 1, *, random_state: Any = None) -> Any:
        """Return n classes drawn for each sample by `predict_proba`, shape (samples, n).

        Several labels are drawn apart, shape (samples, n, labels).
        """
        rng, p = np.random.default_rng(random_state), self.predict_proba(X)
        if self._is_multilabel:
            return (rng.uniform(size=(len(p), n, p.shape[1])) < p[:, None]).astype(int)
        u = rng.uniform(size=(*p.shape[:-1], n, 1))
        below = (np.cumsum(p, -1)[..., None, :] < u).sum(-1).clip(max=p.shape[-1] - 1)
        return self.classes_[below]

    def _shaped(self, slopes: Any, intercepts: Any) -> tuple[Any, Any]:
        if len(slopes) == 2 and not self._is_multilabel:
            return slopes[1:] - slopes[:1], intercepts[1:] - intercepts[:1]
        return slopes, intercepts

    def _finish(self) -> tuple[Loss | None, bool]:
        loss = self.loss_function()
        if isinstance(loss, losses.Hinge):
            return None, False
        return losses.CrossEntropy() if isinstance(loss, Own) else loss, False

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy over samples, or over steps if steps are labelled.

        Raises:
            PlanError: labels are text where the classes are numbers, or the other way round.
        """
        check_is_fitted(self, "module_")
        if not self._is_multilabel:
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
        loss = self.loss_function()
        return (torch.softmax(output, -1) if isinstance(loss, Own) else loss.mean(output)).numpy()

    def loss_function(self) -> Loss:
        """Return the data loss."""
        loss = losses.read(self.loss, losses.CLASSES, type(self).__name__)
        if self._is_multilabel and self.loss not in (None, "cross_entropy", "xe"):
            raise PlanError(f"several labels of a sample have the loss of each; write loss=None, got {self.loss!r}")
        return Labels() if self._is_multilabel else loss

    @property
    def _is_multilabel(self) -> bool:
        return bool(vars(self).get("multilabel_", False))

    def _class_weights(self, targets: Any, weight: Any, reset: bool) -> Any:
        if self.class_weight is None:
            return weight
        if self._is_multilabel or self.labels_of_steps_:
            raise PlanError("class_weight= is for one class a sample; weigh samples by sample_weight instead")
        if reset or "class_weight_" not in vars(self):
            self.class_weight_ = self._learned_weights(targets, weight)
        return self.class_weight_[targets] * (1.0 if weight is None else weight)

    def _learned_weights(self, targets: Any, weight: Any) -> Any:
        """Return the weight of each class.

        Raises:
            PlanError: `class_weight` is neither "balanced" nor numbers by class.
        """
        given, known = self.class_weight, self.classes_.tolist()
        if given == "balanced":
            sums = np.bincount(targets, weight, len(known))
            return np.divide(sums.sum() / (sums > 0).sum(), sums, out=np.ones(len(known)), where=sums > 0)
        right = isinstance(given, Mapping) and set(given) <= set(known)
        if not right or not all(is_number(value) and value >= 0 for value in given.values()):
            raise PlanError(
                f'class_weight= is "balanced", None, or numbers by class, as in {{{known[0]!r}: 2.0}}; got '
                f"{brief(given)}, and the classes are {listed([repr(value) for value in known])}"
            )
        return np.array([float(given.get(value, 1.0)) for value in known])

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        y = np.asarray(y)
        if reset:
            self.__dict__.pop("multilabel_", None)
        if x.ndim == 2 and y.ndim == 2 and y.shape[1] > 1:
            return self._label_columns(y, reset)
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

    def _label_columns(self, y: Any, reset: bool) -> Any:
        """Return zeros and ones of several labels of a sample.

        Raises:
            PlanError: the columns are other targets, or not those of the first training.
        """
        if type_of_target(y) != "multilabel-indicator":
            raise PlanError(
                f"y has {y.shape[1]} columns, which are labels if they are zeros and ones; for columns of classes, or "
                "of classes and numbers, fit a model for each column"
            )
        if reset:
            self.labels_of_steps_, self.multilabel_, self.classes_ = False, True, np.arange(y.shape[1])
        elif not self._is_multilabel or y.shape[1] != len(self.classes_):
            raise PlanError(f"y of shape {y.shape} doesn't fit the targets of the first training")
        return y.astype(np.int64)

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

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class Regressor(RegressorMixin, KeywordModel):  # type: ignore[misc]
    """Neural-network regressor regularised by keyword; minimises mean squared error, or `loss`.

    Arguments as in `Classifier`, but for these:

    Args:
        loss: "squared", "absolute", "huber", "quantile", "gaussian", "poisson", "gamma", "tweedie",
            "binomial" (y: successes, failures), "kl" (proportions), "mmd", "cox" (y: time, event,
            perhaps stratum); with a setting {"huber": 1.5}, {"tweedie": 1.3}, {"cox": "breslow"};
            or a function of outputs and targets (see `restrain.models.losses`).
        quantiles: of the loss "quantile", as in [.1, .5, .9].
        normalize: standardise the inputs, and for losses of differences (from squared to mmd) the
            targets; predictions come back in their units. Strengths then refer to the standardised
            data.

    >>> X = torch.randn(50, 3, dtype=torch.float64).numpy()
    >>> model = rs.Regressor(hidden=()).fit(X, X @ [1, 2, 3])
    >>> model.coef_.round(3)
    array([1., 2., 3.])
    """

    if not TYPE_CHECKING:
        __init__ = Init(quantiles=None, ensemble="auto")

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        valid: Any = None,
        offset: Any = None,
        exposure: Any = None,
        **given: Any,
    ) -> Self:
        """Train from scratch; return self. Keywords replace the constructor's for this call.

        Args:
            X: the inputs; alone also a DataLoader, a Dataset or an iterator of (X, y), as in
                `train`.
            y: the targets.
            sample_weight: of each sample, zero or more.
            valid: validation data, or the part to hold back.
            offset: a known part of the output of each sample, before the inverse link.
            exposure: above zero, of losses with the link log: the offset log(exposure).
        """
        return self._fit_anew(X, y, sample_weight, valid, given, self._offset(offset, exposure, X))

    def partial_fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, offset: Any = None, exposure: Any = None, **given: Any
    ) -> Self:
        """Train one more epoch."""
        fresh, shift = "module_" not in vars(self), self._offset(offset, exposure, X)
        return self._fit(X, y, sample_weight, None, {"epochs": 1, **given}, fresh=fresh, offset=shift)

    def predict(
        self,
        X: Any,
        *,
        interval: float | None = None,
        draws: int | None = None,
        random_state: Any = None,
        offset: Any = None,
        exposure: Any = None,
    ) -> Any:
        """Return the prediction for each sample, in the shape of the targets.

        Args:
            X: the inputs.
            interval: a probability: return (lower, upper) ends instead, shape (samples, 2), by
                `calibrate`, else by the loss "quantile" or "gaussian", else by Monte Carlo under
                the model's noise and dropout (see `restrain.models.intervals`).
            draws: take Monte Carlo in any case, with so many passes.
            random_state: seed of the passes; None takes torch's global generator.
            offset, exposure: as in `fit`.

        Raises:
            PlanError: there is nothing to make intervals by.
        """
        intervals.check(interval, draws, random_state)
        if interval is None:
            return self._predicted(self._forward(X), self._offset(offset, exposure, X))
        loss, predicted, std = self._distribution(X, offset, exposure)
        known = vars(self).get("conformal_")
        if draws is None and (intervals.has_basis(loss, interval, known) or not self._is_random()):
            return intervals.interval(loss, interval, predicted, std, known)
        if isinstance(loss, losses.Quantile):
            raise PlanError('draws= is for other losses: those of loss="quantile" are intervals themselves')
        if not self._is_random():
            raise PlanError(
                "draws= takes passes under noise and dropout, and this model's keywords have none: write some in the "
                "constructor, as in hidden_dropout=0.2, and fit anew"
            )
        passes = self._passes(X, draws or intervals.PASSES, random_state, self._offset(offset, exposure, X))
        return intervals.of_passes(interval, passes)

    def _predicted(self, output: Tensor, shift: Any) -> Any:
        """Return predictions for outputs of the network; `shift`: each sample's offset, or None."""
        if shift is None:
            return self._finished(output)
        column = shift.reshape(-1, *[1] * (output.dim() - 1))
        if not self.loss_function().scaled:
            return self._finished(output + torch.as_tensor(column))
        found = self._finished(output)
        return found + column.reshape(-1, *[1] * (found.ndim - 1))

    def _passes(self, x: Any, count: int, random_state: Any, shift: Any) -> Any:
        """Return targets or predictions by passes under noise, shape (passes, samples)."""
        loss, seed = self.loss_function(), None
        if random_state is not None:
            seed = int(check_random_state(random_state).randint(2**31 - 1))
        inputs = self._inputs(x, reset=False)
        with nullcontext() if seed is None else seeded(seed), sampling(self):
            outputs = (self._output_of(inputs) for _ in range(count))
            return np.stack([intervals.passed(loss, *self._single(output, shift)) for output in outputs])

    def calibrate(self, X: Any, y: Any, *, offset: Any = None, exposure: Any = None) -> Self:
        """Learn from samples that the model wasn't fitted on how wide intervals are; return self.

        Split conformal prediction: the intervals of `predict` then cover new targets as often as
        they say, if the samples are exchangeable.
        """
        loss, predicted, std = self._distribution(X, offset, exposure)
        y = np.asarray(self._targets(self._inputs(X, reset=False), y, reset=False), np.float64)[:, 0]
        check_consistent_length(predicted, y)
        self.conformal_ = intervals.scores(loss, y, predicted, std)
        return self

    def sample(self, X: Any, n: int = 1, *, random_state: Any = None, offset: Any = None, exposure: Any = None) -> Any:
        """Return n targets drawn for each sample, shape (samples, n).

        From the distribution of the loss "gaussian", "poisson" or "quantile", else from predictions
        plus residuals of `calibrate`.
        """
        known, rng = vars(self).get("conformal_"), np.random.default_rng(random_state)
        return intervals.draws(*self._distribution(X, offset, exposure), known, n, rng)

    def _distribution(self, x: Any, offset: Any, exposure: Any) -> tuple[Loss, Any, Any]:
        """Return (loss, predictions, σ of the loss "gaussian" or None) of one target.

        Raises:
            PlanError: there are several targets, or they aren't numbers.
        """
        check_is_fitted(self, "module_")
        loss = self.loss_function()
        if self.n_outputs_ != 1 or self.targets_of_steps_ or loss.joint or isinstance(loss, losses.KL):
            raise PlanError("intervals and draws are of one number a sample, and this model predicts others")
        predicted, std = self._single(self._forward(x), self._offset(offset, exposure, x))
        return loss, predicted, std

    def _single(self, output: Tensor, shift: Any) -> tuple[Any, Any]:
        """Return (predictions of one target, σ of the loss "gaussian" or None) for outputs.

        Predictions have one axis; of the loss "quantile" a column for each quantile.
        """
        loss, predicted = self.loss_function(), np.asarray(self._predicted(output, shift), np.float64)
        if isinstance(loss, losses.Quantile):
            return predicted.reshape(len(predicted), -1), None
        std = None
        if isinstance(loss, losses.Gaussian):
            raw, scale = output.chunk(2, -1)[1].exp(), None if self._scale is None else self._scale.y
            std = (raw if scale is None else scale.inverse_std(raw)).double().numpy()[:, 0]
        return predicted[:, 0] if predicted.ndim > 1 else predicted, std

    def _located(self) -> int | None:
        return int(self.n_outputs_) if isinstance(self.loss_function(), losses.Gaussian) else None

    def _shaped(self, slopes: Any, intercepts: Any) -> tuple[Any, Any]:
        flat = len(slopes) == 1 and (self.is_flat_ or self.loss_function().joint)
        return (slopes[0], float(intercepts[0])) if flat else (slopes, intercepts)

    def _finish(self) -> tuple[Loss | None, bool]:
        loss, size = self.loss_function(), self._outputs()
        size = int(self.n_outputs_) if isinstance(loss, losses.Gaussian) else size
        return loss, size == 1 and (self.is_flat_ or loss.joint)

    def score(self, X: Any, y: Any, sample_weight: Any = None, *, offset: Any = None, exposure: Any = None) -> float:
        """Return D², the part of the deviance explained; of squared, huber and gaussian losses R².

        D² is 1 - loss / loss of the best constant output, offsets aside. Of the loss "cox" it is
        the concordance, of "mmd" and functions minus the mean loss.
        """
        check_is_fitted(self, "module_")
        loss, shift = self.loss_function(), self._offset(offset, exposure, X)
        if loss.by_r2:
            y, predicted = np.asarray(y), self.predict(X)
            if shift is not None:
                y = y - shift.reshape(-1, *[1] * (y.ndim - 1))
            return float(r2_score(y, predicted, sample_weight=sample_weight))
        output = self._forward(X).double()
        samples = self._samples(X, y, None, reset=False, offset=shift if loss.scaled else None)
        samples.scale, samples.dtype = self._scale, torch.float64
        target = samples.batch(np.arange(len(samples)))[1]
        assert target is not None
        weight = np.ones(len(samples)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        column = np.zeros(1) if shift is None or loss.scaled else shift.reshape(-1, *[1] * (target.dim() - 1))
        best = loss.constant(target.numpy(), weight.reshape(-1, *[1] * (target.dim() - 1)), column)
        null = None if best is None else torch.as_tensor(best + column).expand_as(output)
        return loss.score(output + torch.as_tensor(column), target, torch.as_tensor(weight), null)

    def _offset(self, offset: Any, exposure: Any, x: Any) -> Any:
        """Return the offset of each sample, or None.

        Raises:
            PlanError: there are two, the loss takes none, or they aren't numbers, one a sample.
        """
        if offset is None and exposure is None:
            return None
        loss = losses.read(self.loss, losses.NUMBERS, type(self).__name__)
        if offset is not None and exposure is not None:
            raise PlanError("offset= and exposure= are one thing, offset = log(exposure): give one of them")
        if exposure is not None and loss.link != "log":
            raise PlanError(f'exposure= is for losses with the link log, such as "poisson"; got loss={self.loss!r}')
        if not loss.scaled and loss.link not in ("log", "logit") and not isinstance(loss, Cox):
            raise PlanError(f"loss={self.loss!r} takes no offset=")
        given = np.asarray(offset if exposure is None else exposure, np.float64)
        count = x.shape[0] if hasattr(x, "shape") else len(x)
        if given.shape != (count,) or not np.isfinite(given).all() or (exposure is not None and (given <= 0).any()):
            wanted = "finite numbers" if exposure is None else "finite numbers above zero"
            raise PlanError(f"offset= and exposure= are {wanted}, one a sample ({count}); got {brief(given)}")
        return given if exposure is None else np.log(given)

    def _finished(self, output: Tensor) -> Any:
        found, scale = self.loss_function().mean(output), None if self._scale is None else self._scale.y
        if scale is not None:
            wide = found.shape[-1] != self.n_outputs_  # several numbers of one target
            found = scale.inverse(found[..., None])[..., 0] if wide else scale.inverse(found)
        array = found.numpy()
        return array[..., 0] if array.shape[-1] == 1 and (self.is_flat_ or self.loss_function().joint) else array

    def loss_function(self) -> Loss:
        """Return the data loss."""
        loss = losses.read(self.loss, losses.NUMBERS, type(self).__name__)
        if self.quantiles is not None:
            if not isinstance(loss, losses.Quantile):
                raise PlanError(f'quantiles= goes with loss="quantile", got loss={self.loss!r}')
            return losses.Quantile(self.quantiles)
        if isinstance(loss, Cox) and "strata_" in vars(self):
            return losses.with_strata(loss, len(self.strata_))
        return loss

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        given = {"ensure_2d": False, "allow_nd": True, "dtype": "numeric", "input_name": "y"}
        loss = self.loss_function()
        y = losses.survival(y) if isinstance(loss, Cox) else y
        y = as_numbers(y, lambda: check_array(y, **given), "the target y of a Regressor")
        steps = x.ndim == 3 and y.ndim > 1 and y.shape[:2] == x.shape[:2]
        flat = y.ndim == (2 if steps else 1)
        if y.ndim > (3 if steps else 2):
            raise PlanError(f"y of shape {y.shape} doesn't fit X of shape {x.shape}")
        size = 1 if flat else y.shape[-1]
        if reset:
            self.is_flat_, self.targets_of_steps_, self.n_outputs_ = flat, steps, size
            self.__dict__.pop("strata_", None)
        elif (steps, size) != (self.targets_of_steps_, self.n_outputs_):
            raise PlanError(f"y of shape {y.shape} doesn't fit the {self.n_outputs_} targets of the first training")
        y = y[..., None] if flat else y
        loss.check(y)
        return self._with_strata(y, reset) if isinstance(loss, Cox) and size == 3 else y

    def _class_weights(self, targets: Any, weight: Any, reset: bool) -> Any:
        if weight is not None and isinstance(self.loss_function(), Cox):
            raise PlanError('loss="cox" takes no sample_weight: a sample would weigh in risk sets too')
        return weight

    def _with_strata(self, y: Any, reset: bool) -> Any:
        """Return the targets with the strata as 0, 1, ...

        Raises:
            PlanError: a stratum wasn't among those of the first training.
        """
        if reset:
            self.strata_ = np.unique(y[:, 2])
        if not np.isin(y[:, 2], self.strata_).all():
            raise PlanError(f"y has strata that are not among those of the training, {brief(self.strata_.tolist())}")
        return np.column_stack([y[:, :2], np.searchsorted(self.strata_, y[:, 2])])

    def _outputs(self) -> int:
        return self.loss_function().outputs(int(self.n_outputs_))

    @property
    def _steps(self) -> bool:
        return bool(self.targets_of_steps_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class Autoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, KeywordModel):  # type: ignore[misc]
    """Autoencoder regularised by keyword; minimises the mean squared error of the reconstruction.

    Under noise, the reconstruction is compared with the clean input. Arguments as in `Classifier`;
    `loss` is "squared", "absolute", "huber", "mmd" or a function.
    `transform` returns the output of the middle layer.

    >>> X = torch.randn(20, 4).numpy()
    >>> model = rs.Autoencoder([4, (8, "relu"), (4, "tied")], hidden_l1=1e-3, epochs=2).fit(X)
    >>> model.transform(X).shape, model.predict(X).shape
    ((20, 8), (20, 4))
    """

    _has_targets = False

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, valid: Any = None, **given: Any) -> Self:
        """Train from scratch; `y` is ignored. Keywords replace the constructor's for this call."""
        return self._fit_anew(X, None, sample_weight, valid, given)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None, **given: Any) -> Self:
        """Train one more epoch; `y` is ignored."""
        return self._fit(X, None, sample_weight, None, {"epochs": 1, **given}, fresh="module_" not in vars(self))

    def transform(self, X: Any, layer: str | None = None) -> Any:
        """Return the codes of the samples: the output of the middle or the named layer."""
        return self.encode(X, layer)

    @property
    def _n_features_out(self) -> int:
        name = self._layer(None)
        return int(next(layer["size"] for layer in self.layers_ if layer["name"] == name))

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
        x = dense(self._inputs(X, reset=False))
        flat = x.reshape(-1, x.shape[-1])
        found = self.predict(X).reshape(flat.shape)
        return float(r2_score(flat, found, sample_weight=sample_weight, multioutput="variance_weighted"))

    def loss_function(self) -> Loss:
        """Return the data loss."""
        return losses.read(self.loss, losses.RECONSTRUCTIONS, type(self).__name__)

    def _outputs(self) -> int:
        return self._width
