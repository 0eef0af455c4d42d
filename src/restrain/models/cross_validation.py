"""Estimators that choose the strength of one keyword by cross-validation along a path."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import ClassifierMixin, RegressorMixin, is_classifier
from sklearn.model_selection import check_cv
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data
from torch import Tensor

from restrain.errors import PlanError, RestrainWarning
from restrain.fields import brief, is_number, is_one_of, is_whole
from restrain.models import keywords, tabular
from restrain.models.base import KeywordModel
from restrain.models.estimators import Classifier, Regressor
from restrain.models.keywords import Context
from restrain.models.linear import Linear
from restrain.models.signature import BEFORE, Init, KeywordEstimator
from restrain.path_view import Column, PathView, columns
from restrain.paths import (
    Stability,
    by_dual_norm,
    check_level,
    simplicity,
    stability_selection,
    within_one_error,
)
from restrain.penalties import SLOPE, GroupLasso, GroupLInf, Norm, NuclearNorm, Penalty
from restrain.rules import Rule

_DEFAULT = {"weight_l1": {"how": "proximal"}}
_CONVEX = (SLOPE, GroupLasso, GroupLInf, NuclearNorm, Norm)  # and Σ|w|, Σw²
_DRAWS = 1000  # targets of the null model
_OWN = {
    "hidden": (),
    "path": None,
    "points": 50,
    "ratio": 1e-3,
    "strengths": None,
    "cv": 5,
    "choice": "best",
    "level": 0.05,
    "n_jobs": None,
}


@dataclass(frozen=True)
class _Way:
    """How the models of a path are made: a model, a keyword with its options, exact or trained."""

    model: KeywordModel
    keyword: str
    options: Mapping[str, Any]
    exact: bool

    def given(self, strength: float) -> dict[str, Any]:
        """Return the keyword at a strength."""
        return {self.keyword: {**self.options, "strength": strength}}

    def begun(self, x: Any, y: Any) -> KeywordModel:
        """Return a new model, fitted without the penalty (if exact, only built)."""
        found: KeywordModel = type(self.model)(**self.model.get_params())
        found.fit(x, y, **({"epochs": 1, "checkpoint": None} if self.exact else {}))
        return found

    def rules(self, model: KeywordModel) -> list[Rule]:
        """Return the rule of the keyword at strength 1."""
        return keywords.rules(self.given(1.0), Context(model.layers_, model.how))

    def greatest(self, x: Any, y: Any) -> float:
        """Return the least strength that makes all zero.

        Raises:
            PlanError: it isn't known, as at a saddle.
        """
        model = self.begun(x, y)
        rules = self.rules(model)
        if self.exact:
            top = _problem(model, x, y).greatest(_penalty(rules))
            if math.isnan(top):
                raise PlanError(f"{self.keyword} makes no zeros, so no strength ends its path: give the strengths=")
            return top
        found = by_dual_norm(model.module_, rules, (), lambda: model.data_loss(x, y))
        if found is None:
            raise PlanError(
                f"the gradient says nothing where the weights under {self.keyword} are zero, so the greatest strength "
                "isn't known from it: give the strengths= yourself, or penalise one layer, as in on='hid1.weight'"
            )
        return found

    def universal(self, x: Any, y: Any, level: float) -> float:
        """Return the quantile universal threshold.

        Raises:
            PlanError: a network, or a penalty that makes no zeros.
        """
        if not self.exact:
            raise PlanError(
                "choice='qut' is for exact linear paths; for a network write the strengths= that "
                "restrain.paths.universal_threshold(model, rules, loss, null) gives"
            )
        self.greatest(x, y)  # it makes zeros
        model, seed = self.begun(x, y), self.model.random_state
        seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        draw = torch.Generator(device="cpu").manual_seed(seed)
        return _problem(model, x, y).universal(_penalty(self.rules(model)), level, _DRAWS, draw)

    def points(self, x: Any, y: Any, strengths: Sequence[float]) -> Any:
        """Yield (model, weights of its first layer) at each strength; the model goes on."""
        model = self.begun(x, y)
        if self.exact:
            found = _problem(model, x, y).path(_penalty(self.rules(model)), strengths)
            for w, b in found:
                _put(model, w, b)
                yield model, w.numpy()
            return
        for strength in strengths:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* has emptied ", RestrainWarning)  # the end of every path
                model.train((x, y), **self.given(strength))
            yield model, next(p for p in model.module_.parameters() if p.dim() > 1).detach().numpy()

    def used(self, x: Any, y: Any, strengths: Sequence[float], most: int) -> Any:
        """Return which inputs are used (strengths, inputs), until more than `most` have been."""
        found = np.stack([(w != 0).any(0) for _, w in self.points(x, y, strengths)])
        kept: Any = np.logical_or.accumulate(found).sum(1, keepdims=True) <= most
        return found & kept

    def scores(self, x: Any, y: Any, train: Any, test: Any, strengths: Sequence[float]) -> list[float]:
        """Return the score on the test rows of the model at each strength."""
        found = []
        for model, _ in self.points(x[train], y[train], strengths):
            if model.loss is not None:
                found.append(float(model.score(x[test], y[test])))
                continue
            predicted = np.asarray(model.predict(x[test]))
            right = predicted == y[test] if isinstance(model, Classifier) else -np.square(predicted - y[test])
            found.append(float(np.mean(right)))
        return found


def _problem(model: KeywordModel, x: Any, y: Any) -> Linear:
    inputs, targets = model.tensors(x, y)
    return Linear.of(inputs, targets, len(model.classes_) if isinstance(model, Classifier) else 0)


def _penalty(rules: Sequence[Rule]) -> Penalty:
    what = rules[0].what
    assert isinstance(what, Penalty)
    return what


@torch.no_grad()
def _put(model: KeywordModel, w: Tensor, b: Tensor) -> None:
    """Give a model without hidden layers its weights and intercept."""
    weight, bias = model.module_.parameters()
    weight.copy_(w)
    bias.copy_(b)


class _Chosen(KeywordEstimator):
    """Base of RegressorCV and ClassifierCV."""

    if TYPE_CHECKING:

        def __init__(self, layers: Any = None, **keywords: Any) -> None: ...

    else:
        __init__ = Init(**_OWN, **BEFORE)

    _model: ClassVar[type[KeywordModel]]
    strength_: float
    strengths_: Any
    scores_: Any
    path_: list[dict[str, float]]
    selected_features_: Any
    weights_: dict[str, Any]
    classes_: Any
    estimator_: Any

    def fit(self, X: Any, y: Any) -> Self:
        """Fit paths on the folds, choose the strength, and fit on all data; return self.

        Raises:
            PlanError: a setting isn't allowed, or the greatest strength isn't known.
        """
        x, y = self._checked(X, y)
        way = self._way()
        self.strengths_ = self._strengths(way, x, y)
        if self.choice == "qut":
            candidates = self._insert(way.universal(x, y, self.level))
            self.scores_ = np.full((len(self.strengths_), 1), np.nan)
        else:
            folds = list(check_cv(self.cv, y, classifier=is_classifier(self)).split(x, y))
            jobs = [delayed(way.scores)(x, y, train, test, self.strengths_) for train, test in folds]
            self.scores_ = np.array(Parallel(n_jobs=self.n_jobs)(jobs)).T
            candidates = self._candidates()
        self._finish(way, x, y, candidates)
        return self

    def _insert(self, strength: float) -> Any:
        """Put a strength among the others, in their order; return the mask of it."""
        found = np.sort(np.union1d(self.strengths_, [strength]))[::-1].copy()
        self.strengths_ = found
        return found == strength

    def stability(
        self,
        X: Any,
        y: Any,
        *,
        most: int | None = None,
        pairs: int = 50,
        threshold: float = 0.75,
        random_state: int | None = None,
    ) -> Stability:
        """Return how often each input is used on halves of the data, at each of `strengths_`.

        Args:
            X, y: the data.
            most: each half's path ends before more inputs than these were used; None: the square
                root of (2 threshold - 1) inputs, so that at most one false input is to be expected.
            pairs, threshold, random_state: see `restrain.paths.stability_selection`.

        Raises:
            PlanError: invalid settings, or a network: its path doesn't begin where nothing is used.
        """
        check_is_fitted(self, "strengths_")
        x, y = self._checked(X, y, reset=False)
        way = self._way()
        if not way.exact:
            raise PlanError(
                "stability selection is for exact linear paths, which begin where nothing is used; a network's paths "
                "lead upwards: write restrain.paths.stability_selection(select, samples) with your own fits"
            )
        if most is not None and not is_whole(most, 1):
            raise PlanError(f"most= is a whole number, at least 1, or None; got {brief(most)}")
        given = {"pairs": pairs, "threshold": threshold, "random_state": random_state, "n_jobs": self.n_jobs}
        share = 2 * threshold - 1 if is_number(threshold) else 0.0  # else refused below
        top = max(1, int(math.sqrt(max(share, 0.0) * x.shape[1]))) if most is None else most
        return stability_selection(lambda rows: way.used(x[rows], y[rows], self.strengths_, top), len(x), **given)

    @property
    def input_names_(self) -> Any:
        """Names of the inputs, in the order of `coef_` and `selected_features_`; as a model's."""
        check_is_fitted(self, "estimator_")
        encoder, own = tabular.known(self), vars(self).get("feature_names_in_")
        return (
            self.estimator_.input_names_ if own is None else own if encoder is None else encoder.get_feature_names_out()
        )

    def view(self) -> PathView:
        """Return the numbers of the path that `rs.plots.path`, `rs.plots.scores` and reports show.

        The lines are the weights of the inputs in the first layer: signed if the layer has one
        output, else their lengths over the outputs.
        """
        check_is_fitted(self, "path_")
        name, weights = next((name, values) for name, values in self.weights_.items() if values.ndim == 3)
        lines = weights[:, 0] if weights.shape[1] == 1 else np.linalg.norm(weights, axis=1)
        names = range(lines.shape[1]) if "feature_names_in_" not in vars(self) else self.input_names_
        best, sparse = self._marks()
        return PathView(
            [point["strength"] for point in self.path_],
            [point["score"] for point in self.path_],
            [point["error"] for point in self.path_],
            [int(point["selected"]) for point in self.path_],
            {name: torch.as_tensor(lines, device="cpu")},
            {name: [str(one) for one in names]},
            best,
            sparse,
            ["down" if self.strengths_[0] > self.strengths_[-1] else "up"] * len(lines),
            self._columns([str(one) for one in names]),
        )

    def _columns(self, names: Sequence[str]) -> list[Column]:
        """Return the inputs and units of the network along the path."""
        matrices = {name: values for name, values in self.weights_.items() if values.ndim == 3}
        found = columns({name: torch.as_tensor(values, device="cpu") for name, values in matrices.items()})
        return [replace(one, labels=names) if one.name == "inputs" else one for one in found]

    def _marks(self) -> tuple[int, int | None]:
        """Return the numbers of the best point, and of the sparsest within one standard error.

        They are among the points of `path_`: networks are fitted as far as the chosen one.
        """
        count = len(self.path_)
        chosen = int(np.flatnonzero(self.strengths_[:count] == self.strength_)[0])
        scores = self.scores_[:count]
        if scores.shape[1] < 2 or not np.isfinite(scores).all():
            return chosen, None
        best = chosen if self.choice == "best" else int(scores.mean(1).argmax())
        if self.choice == "1se":
            return best, chosen
        near = np.flatnonzero(within_one_error(torch.as_tensor(scores, device="cpu")).numpy())
        return best, int(min(near, key=lambda i: simplicity(self.path_[i]["selected"], self.strengths_[i])))

    def report(
        self,
        file: str | os.PathLike[str],
        *,
        images: Any = None,
        inputs: Any = None,
        title: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> FilePath:
        """Write a page about the path, to explore by a slider, and the chosen model; return it.

        Arguments and errors as in `Classifier.report`.
        """
        check_is_fitted(self, "path_")
        name = f"Report on {type(self).__name__}" if title is None else title
        told = {"chosen strength": f"{self.strength_:.4g}", "selected": str(len(self.selected_features_))}
        given = {"images": images, "inputs": inputs, "title": name, "facts": {**told, **(facts or {})}}
        model = copy.copy(self.estimator_)
        if "coef_" in vars(self):  # solved exactly: its only epoch served to build it
            model.history_ = []
        found: FilePath = model.report(file, path=self, **given)
        return found

    def predict(self, X: Any) -> Any:
        """Return the predictions of the model at the chosen strength."""
        x = self._given(X)
        return self.estimator_.predict(x)

    def _given(self, X: Any) -> Any:
        check_is_fitted(self, "estimator_")
        x = tabular.encoded(self, X, reset=False)
        return x if tabular.known(self) is not None else validate_data(self, x, reset=False, dtype="numeric")

    def _checked(self, X: Any, y: Any, reset: bool = True) -> tuple[Any, Any]:
        if y is None:
            raise PlanError(f"requires y to be passed, but the target y is None: {type(self).__name__}.fit(X, y)")
        x, given = tabular.encoded(self, X, reset), {"multi_output": not is_classifier(self), "dtype": "numeric"}
        if tabular.known(self) is None:
            x, y = validate_data(self, x, y, reset=reset, **given)
        else:
            x, y = check_X_y(x, y, **given)
        if is_classifier(self):
            check_classification_targets(y)
            self.classes_ = np.unique(y) if reset else self.classes_
        else:
            y = y.astype(np.result_type(y, np.float32) if y.dtype.kind == "f" else np.float64)
        return x, y

    def _way(self) -> _Way:
        """Return how the path's models are made, after checks of the settings."""
        if not is_whole(self.points, 2):
            raise PlanError(f"points= is a whole number, at least 2; got {brief(self.points)}")
        if not is_number(self.ratio) or not 0 < self.ratio < 1:
            raise PlanError(f"ratio= is the least strength / the greatest, between 0 and 1; got {brief(self.ratio)}")
        if not is_one_of(self.choice, ("best", "1se", "qut")):
            raise PlanError(f"choice= is 'best', '1se' or 'qut'; got {brief(self.choice)}")
        check_level(self.level)
        given = _DEFAULT if self.path is None else self.path
        if not isinstance(given, Mapping) or len(given) != 1:
            raise PlanError(f"path= is one keyword with its options, as in {_DEFAULT}; got {brief(self.path)}")
        ((keyword, options),) = given.items()
        if not isinstance(options, Mapping) or "strength" in options or keyword == "regularizers":
            raise PlanError(
                f"path= has the options of a keyword, without its strength, as in {_DEFAULT}; got {brief(self.path)}"
            )
        params = {name: value for name, value in self.get_params(deep=False).items() if name not in _OWN}
        if params.get(keyword) is not None:
            raise PlanError(
                f"{keyword}= is the keyword of the path, whose strengths it tries: leave it out beside path="
            )
        model = self._model(hidden=self.hidden, **params)
        model.split_keywords({})
        return _Way(model, keyword, options, _is_exact(model, keyword, options))

    def _strengths(self, way: _Way, x: Any, y: Any) -> Any:
        """Return the strengths in the order of the walk: downwards if exact, else upwards."""
        if self.strengths is not None:
            found = np.array(sorted(float(one) for one in self.strengths))
            if not len(found) or not np.isfinite(found).all() or (found <= 0).any():
                raise PlanError(f"strengths= are numbers above zero; got {brief(self.strengths)}")
        else:
            top = way.greatest(x, y)
            found = max(top, 1e-300) * np.geomspace(self.ratio, 1.0, self.points)
        return found[::-1].copy() if way.exact else found

    def _candidates(self) -> Any:
        """Return the mask of the strengths among which the simplest model is chosen."""
        if self.choice == "best":
            means = self.scores_.mean(1)
            return means == means.max()
        return within_one_error(torch.as_tensor(self.scores_, device="cpu")).numpy()

    def _finish(self, way: _Way, x: Any, y: Any, candidates: Any) -> None:
        """Fit on all data, note the points, and keep the simplest model of the candidates."""
        last, simplest = np.flatnonzero(candidates)[-1], (math.inf, 0.0)
        counts, states = [], []
        for number, (model, w) in enumerate(way.points(x, y, self.strengths_)):
            used = (w != 0).any(0)
            counts.append(int(used.sum()))
            states.append({name: tensor.numpy().copy() for name, tensor in model.module_.state_dict().items()})
            key = simplicity(counts[-1], self.strengths_[number])
            if candidates[number] and key < simplest:
                simplest, self.strength_ = key, float(self.strengths_[number])
                self.estimator_ = copy.deepcopy(model)
                self.selected_features_ = np.flatnonzero(used)
            if number == last and not way.exact:  # exact points cost little, and are all in the table
                break
        self.weights_ = {name: np.stack([state[name] for state in states]) for name in states[0]}
        self._describe(way.exact)
        folds = self.scores_.shape[1]
        errors = self.scores_.std(1, ddof=1) / math.sqrt(folds) if folds > 1 else np.full(len(candidates), np.nan)
        rows = zip(self.strengths_, self.scores_.mean(1), errors, counts, strict=False)
        names = ("strength", "score", "error", "selected")
        self.path_ = [dict(zip(names, map(float, row), strict=True)) for row in rows]

    def _describe(self, linear: bool) -> None:
        """Set `coef_` and `intercept_` of a linear model, in the units of the data."""
        if not linear:
            return
        width = self.estimator_.n_features_in_
        at_zero, slopes = self._outputs(np.zeros((1, width))), np.eye(width)
        slopes = self._outputs(slopes) - at_zero
        kept = np.isin(np.arange(width), self.selected_features_)
        slopes = np.where(kept[:, None], slopes, 0.0).T  # differences of zeros aren't exact
        self.coef_, self.intercept_ = self._shaped(slopes), self._shaped(at_zero[0])

    def _outputs(self, x: Any) -> Any:
        raise NotImplementedError

    def _shaped(self, rows: Any) -> Any:
        return rows


class RegressorCV(RegressorMixin, _Chosen):  # type: ignore[misc]
    """Regressor whose strength of one keyword is chosen by cross-validation along a path.

    Without hidden layers and other rules the paths are exact: those of the lasso, elastic nets,
    group lassos and others, for mean squared error + strength × penalty. scikit-learn's alpha of a
    lasso is half of such a strength. Networks are trained from strength to strength, upwards, each
    for `epochs`, after a training without the penalty.

    Args:
        hidden: the hidden layers; () for a linear model.
        path: {keyword: options without a strength}; None for {"weight_l1": {"how": "proximal"}}.
        points, ratio: the grid, from ratio × the greatest strength to the greatest.
        strengths: the strengths, in place of the grid: `points` and `ratio` don't count then, as
            `eps` of scikit-learn's `LassoCV` doesn't beside an array of `alphas`.
        cv: folds, as scikit-learn's; n_jobs: processes or what `joblib.parallel_config` says.
        choice: "best" score, or "1se": the fewest inputs within one standard error of paired
            differences over folds, and of equal numbers the greatest strength, as in
            `Path.one_se`; or "qut": the quantile universal threshold of an exact linear path, which
            needs no folds (`scores_` are NaN): the least strength at which data without any signal
            select nothing with probability 1 - `level`. The squared error then counts by its root,
            as in the square-root lasso, so that the noise's scale needn't be known.
        level: see `choice`.

    Further keywords as in `Regressor`; with a `loss` the models are trained, not exact, and points
    have the model's score. Attributes: `strength_`, `strengths_`, `scores_` (strengths,
    folds; minus the squared error), `path_` (a dict per point), `weights_` (the network's tensors
    by name, an axis of points first), `estimator_`, `selected_features_`, and of linear models
    `coef_` and `intercept_`. Networks are fitted as far as the chosen point, or the last that "1se"
    may choose: so far go `path_` and `weights_`.

    >>> X = torch.randn(60, 5, dtype=torch.float64).numpy()
    >>> model = rs.RegressorCV(points=20).fit(X, 3 * X[:, 1])
    >>> model.selected_features_.tolist()
    [1]
    """

    _model = Regressor

    def _outputs(self, x: Any) -> Any:
        found = np.asarray(self.estimator_.predict(x))
        return found.reshape(len(found), -1)

    def _shaped(self, rows: Any) -> Any:
        return rows[0] if self.estimator_.is_flat_ else rows

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class ClassifierCV(ClassifierMixin, _Chosen):  # type: ignore[misc]
    """Classifier whose strength of one keyword is chosen by cross-validation along a path.

    Arguments and attributes as in `RegressorCV`; `scores_` are accuracies. Linear models are exact
    multinomial logistic regressions, for the mean cross-entropy + strength × penalty; of two
    classes `coef_` has one row, as scikit-learn's.

    >>> X = torch.randn(60, 5, dtype=torch.float64).numpy()
    >>> rs.ClassifierCV(points=5, choice="1se").fit(X, X[:, 1] > 0).selected_features_.tolist()
    [1]
    """

    _model = Classifier
    classes_: Any

    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class, in the order of `classes_`."""
        x = self._given(X)
        return self.estimator_.predict_proba(x)

    def _outputs(self, x: Any) -> Any:
        found = list(self.estimator_.activations(x).values())[-1]
        return found[:, 1:] - found[:, :1] if found.shape[1] == 2 else found


def _is_exact(model: KeywordModel, keyword: str, options: Mapping[str, Any]) -> bool:
    """Return True for a linear model under one convex penalty, and nothing else."""
    linear = model.layers is None and model.hidden in ((), []) and not set(options) & {"on", "every", "optional"}
    of_rules = model.split_keywords({})[1]
    others = [name for name, value in of_rules.items() if value is not None and value is not False]
    if not linear or others or model.loss is not None or model.valid is not None:
        return False
    if options.get("reduce", "sum") != "sum":
        return False
    what = keywords.rules({keyword: {**options, "strength": 1.0}}, Context(_LAYERS))[0].what
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else []
    known = all(leaf.elastic is not None or isinstance(leaf, _CONVEX) for leaf in leaves)
    return bool(leaves) and known and isinstance(what, Penalty) and what.has_prox


_LAYERS: Any = [{"name": "in", "form": "input"}, {"name": "out", "form": "ff"}]
