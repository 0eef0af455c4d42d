"""Work of `restrain cv` and `restrain compare`: models over the same folds, with paired errors."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import RepeatedKFold, RepeatedStratifiedKFold

from restrain.cli import jobs
from restrain.errors import DataError
from restrain.models import losses
from restrain.tables import Encoding, Table
from restrain.text_table import text_table


@dataclass(frozen=True)
class Fold:
    """Scores of a model on one fold."""

    score: float
    loss: float  # log loss, root of the mean squared error, or mean data loss (see `measures`)


@dataclass(frozen=True)
class Scores:
    """Scores of a model over all folds.

    Args:
        name: of the model, as it was given.
        folds: its scores, in the order of the folds.
        ratio: rows tested / rows trained on.
        measures: names of score and loss.
    """

    name: str
    folds: Sequence[Fold]
    ratio: float
    measures: tuple[str, str]

    def values(self, which: str) -> Any:
        """Return the "score" or the "loss" of each fold."""
        return np.array([getattr(fold, which) for fold in self.folds])

    def mean(self, which: str) -> tuple[float, float]:
        """Return (mean over folds, its standard error)."""
        return _mean(self.values(which), self.ratio)

    def over(self, other: Scores, which: str) -> tuple[float, float]:
        """Return (mean difference to another model on the same folds, its standard error)."""
        return _mean(self.values(which) - other.values(which), self.ratio)


def _mean(values: Any, ratio: float) -> tuple[float, float]:
    """Return mean and standard error of values on folds that share their training rows.

    The variance is that of the values times 1/k + test/train.

    Source: Nadeau and Bengio (2003), "Inference for the generalization error", equation 12.
    """
    return float(values.mean()), float(values.std(ddof=1) * (1 / len(values) + ratio) ** 0.5)


def folds_of(y: Any, count: int, repeats: int, seed: int, *, classes: bool) -> list[tuple[Any, Any]]:
    """Return (training rows, test rows) of each fold, drawn at random, of classes in proportion.

    Raises:
        DataError: there are fewer rows, or fewer rows of a class, than folds.
    """
    if classes:
        names, counts = np.unique(y, return_counts=True)
        if counts.min() < count:
            raise DataError(
                f"{counts.min()} rows of the class {str(names[counts.argmin()])!r} are too few for --folds {count}"
            )
    if len(y) < 2 * count:
        raise DataError(f"{len(y)} rows are too few for --folds {count}")
    kind = RepeatedStratifiedKFold if classes else RepeatedKFold
    return list(kind(n_splits=count, n_repeats=repeats, random_state=seed).split(np.zeros(len(y)), y))


def score(
    table: Table,
    features: Sequence[str],
    y: Any,
    folds: Sequence[tuple[Any, Any]],
    makes: dict[str, Callable[[], Any]],
    workers: int | None,
    **learning: Any,
) -> list[Scores]:
    """Return the scores of each model over the folds.

    Means for missing values and scales of a fold are learned from its training rows.

    Args:
        table, features, y: the data.
        folds: as from `folds_of`.
        makes: {name: function that makes the model}.
        workers: processes; None: one.
        learning: categories and missing, as in `Encoding.learn`.
    """

    def data(train: Any, test: Any) -> tuple[Any, ...]:
        encoding = Encoding.learn(table, features, rows=train, **learning)
        x = encoding.apply(table)
        return x[train], y[train], x[test], y[test]

    names = {name: measures(make()) for name, make in makes.items()}
    kinds = sorted(set(names.values()))
    if len(kinds) > 1:
        (one, _), (other, _) = kinds[:2]
        raise DataError(
            f"models are compared by one score, and these have {one} and {other}: compare those of one kind"
        )
    parts = [data(train, test) for train, test in folds]
    ratio = float(np.mean([len(test) / len(train) for train, test in folds]))
    tasks = [delayed(_fold)(make(), *part) for make in makes.values() for part in parts]
    found, count = Parallel(n_jobs=workers)(tasks), len(folds)
    return [Scores(n, found[k * count : (k + 1) * count], ratio, names[n]) for k, n in enumerate(makes)]


def _fold(model: Any, x: Any, y: Any, x_test: Any, y_test: Any) -> Fold:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    kind = measures(model)[1]
    if kind == "log loss":
        loss = log_loss(y_test, model.predict_proba(x_test), labels=model.classes_)
    elif kind == "RMSE":
        loss = np.sqrt(np.mean(np.square(model.predict(x_test) - y_test)))
    else:
        loss = model.data_loss(x_test, y_test).detach()
    return Fold(float(model.score(x_test, y_test)), float(loss))


def words(text: str) -> list[str]:
    """Return the words of a `--try`, as a shell would read them.

    Raises:
        DataError: a quote isn't closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise DataError(f"--try {text!r} can't be read: {error}") from error


def measures(model: Any) -> tuple[str, str]:
    """Return the names of score and loss of a model."""
    score, hinge = jobs.measure(model), isinstance(model.loss_function(), losses.Hinge)
    return score, "loss" if hinge else {"accuracy": "log loss", "R²": "RMSE"}.get(score, "loss")


def table_of(scores: Sequence[Scores]) -> list[list[str]]:
    """Return the rows of the table of models, head first; differences are to the first model."""
    score, loss = scores[0].measures
    several = len(scores) > 1
    rows = [["", "model", score, "±", loss, "±", *([f"{score} - that of 1", "±"] if several else [])]]
    for number, one in enumerate(scores, 1):
        cells = [*_numbers(one.mean("score")), *(f"{number:.5g}" for number in one.mean("loss"))]
        if several:
            cells += ["", ""] if number == 1 else _numbers(one.over(scores[0], "score"), "+")
        rows.append([str(number), one.name, *cells])
    return rows


def folds_table(one: Scores) -> list[list[str]]:
    """Return the rows of the table of folds, head first."""
    return [["fold", *one.measures]] + [
        [str(number), f"{fold.score:.4f}", f"{fold.loss:.5g}"] for number, fold in enumerate(one.folds, 1)
    ]


def right_of(head: Sequence[str]) -> set[int]:
    """Return the columns of numbers, which are aligned right."""
    return {number for number, name in enumerate(head) if name not in ("", "model")}


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of `table_of` or `folds_table` as text."""
    return text_table(rows, right=right_of(rows[0]))


def verdict(scores: Sequence[Scores]) -> str:
    """Return a sentence on which models differ by more than two standard errors."""
    differences = [(number, *one.over(scores[0], "score")) for number, one in enumerate(scores[1:], 2)]
    apart = [(n, mean) for n, mean, error in differences if abs(mean) > 2 * error]
    if not apart:
        return "No model differs from 1 by more than two standard errors."
    said = [f"{n} is {'better' if mean > 0 else 'worse'}" for n, mean in apart]
    return f"By more than two standard errors of the paired difference, {', '.join(said)} than 1."


def _numbers(pair: tuple[float, float], sign: str = "") -> list[str]:
    mean, error = pair
    return [f"{mean:{sign}.4f}", f"{error:.4f}"]
