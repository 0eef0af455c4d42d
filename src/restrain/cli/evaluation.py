"""What a model does on a table: importance of columns, confusion, residuals, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from restrain.tables import Encoding

BINS = 10  # of calibration
REPEATS = 5  # shuffles of a column


@dataclass(frozen=True)
class Importance:
    """By how much the score falls when a column is shuffled, and the error of that mean."""

    column: str
    fall: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """Predictions in bins: mean prediction, mean of what was observed, number of rows.

    Of a classifier they are the probability of the predicted class, and how often it is right. Of a
    regressor they are the predictions, and the targets. `gap` is the mean of |predicted - observed|
    over rows: the expected calibration error of a classifier.
    """

    predicted: Any
    observed: Any
    rows: Any

    @property
    def gap(self) -> float:
        """Mean distance over rows."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.rows))


def importances(model: Any, encoding: Encoding, x: Any, y: Any, *, seed: int = 0) -> list[Importance]:
    """Return the importance of each column of a table, greatest first.

    All inputs of a category are shuffled together.

    Source: Breiman (2001), "Random forests".
    """
    draw, whole, found = np.random.default_rng(seed), model.score(x, y), []
    for feature, place in zip(encoding.features, encoding.places(), strict=True):
        falls = []
        for _ in range(REPEATS):
            shuffled = x.copy()
            shuffled[:, place] = x[draw.permutation(len(x)), place]
            falls.append(whole - model.score(shuffled, y))
        found.append(Importance(feature.name, float(np.mean(falls)), float(np.std(falls, ddof=1) / REPEATS**0.5)))
    return sorted(found, key=lambda one: -one.fall)


def selected(model: Any, encoding: Encoding) -> tuple[list[str], list[str]]:
    """Return (columns with a weight in the first layer that isn't zero, the others)."""
    used = set(model.selected_features_.tolist())
    kept: list[str] = []
    left: list[str] = []
    for feature, place in zip(encoding.features, encoding.places(), strict=True):
        (kept if used & set(range(place.start, place.stop)) else left).append(feature.name)
    return kept, left


def confusion(model: Any, x: Any, y: Any) -> tuple[list[str], Any]:
    """Return (classes, counts of rows by true and by predicted class)."""
    classes = model.classes_
    places = {value: number for number, value in enumerate(classes.tolist())}
    counts = np.zeros((len(classes), len(classes)), int)
    for true, said in zip(np.asarray(y).tolist(), model.predict(x).tolist(), strict=True):
        counts[places[true], places[said]] += 1
    return [str(value) for value in classes.tolist()], counts


def residuals(model: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Return (predictions, targets minus predictions), of all targets of a regressor in a row."""
    predicted = np.asarray(model.predict(x), np.float64).reshape(len(x), -1)
    return predicted.ravel(), (np.asarray(y, np.float64).reshape(len(x), -1) - predicted).ravel()


def calibration(model: Any, x: Any, y: Any) -> Calibration:
    """Return the calibration, in bins of as many rows each.

    Source: Guo, Pleiss, Sun and Weinberger (2017), "On calibration of modern neural networks".
    """
    if hasattr(model, "classes_"):
        p = model.predict_proba(x)
        predicted, observed = p.max(1), (model.classes_[p.argmax(1)] == np.asarray(y)).astype(float)
    else:
        predicted, rest = residuals(model, x, y)
        observed = predicted + rest
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    means = [(predicted[part].mean(), observed[part].mean(), len(part)) for part in parts]
    return Calibration(*(np.array(column) for column in zip(*means, strict=True)))
