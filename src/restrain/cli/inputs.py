"""Work of `restrain path --select inputs`: the path over a table's input columns, and its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F

import restrain as rs
from restrain.cli import jobs
from restrain.errors import DataError
from restrain.models import Classifier, ClassifierCV, Regressor, RegressorCV
from restrain.paths import Path, Point, of_points
from restrain.paths import path as along
from restrain.tables import Encoding, Table, counted
from restrain.text_table import text_table

_FEW = 20  # whole numbers with so many values at most may be classes or quantities


@dataclass(frozen=True)
class Settings:
    """Settings of a path.

    Args:
        classes: True for a classifier.
        hidden: the hidden layers; () for a linear model.
        activation: of the hidden layers; None for the default.
        points, ratio: the grid; see `rs.path`.
        cv, jobs: folds and processes of a linear model's cross-validation.
        valid: the part of the rows that a network is validated with.
        epochs, learning_rate, batch_size: of a network's training at each point, by Adam.
        normalize: standardise inputs and numeric targets.
        seed: of the folds, the split and the training.
    """

    classes: bool
    hidden: tuple[Any, ...] = ()
    activation: str | None = None
    points: int = 50
    ratio: float = 1e-3
    cv: int = 5
    jobs: int | None = None
    valid: float = 0.2
    epochs: int = 20
    learning_rate: float = 1e-3
    batch_size: int = 64
    normalize: bool = True
    seed: int = 0


def kind_of(table: Table, names: Sequence[str]) -> str:
    """Return "classifier" for a target of text or booleans, "regressor" for numbers.

    Raises:
        DataError: the target is a column of few whole numbers, which may be either.
    """
    values = table.column(names[0])
    if len(names) > 1:
        return "regressor"
    if values.dtype.kind in "bOU":
        return "classifier"
    numbers = table.numbers(names[0])
    numbers = numbers[np.isfinite(numbers)]
    if len(np.unique(numbers)) <= _FEW and (numbers == np.trunc(numbers)).all():
        raise DataError(
            f"{table.source}: the target {names[0]!r} has {len(np.unique(numbers))} different whole numbers, which "
            "may be classes or quantities: write --model classifier, or --model regressor"
        )
    return "regressor"


def groups_of(encoding: Encoding) -> list[list[int]]:
    """Return the numbers of each column's inputs: one of a number, several of a category."""
    return [list(range(place.start, place.stop)) for place in encoding.places()]


def find(x: Any, y: Any, groups: Sequence[Sequence[int]], settings: Settings) -> Path:
    """Return the path; group g of a point is column g.

    Args:
        x: inputs (rows, inputs).
        y: classes, or numbers.
        groups: the inputs of each column, which are zero together.
        settings: see `Settings`.
    """
    return (_of_network if settings.hidden else _of_linear)(x, y, [list(one) for one in groups], settings)


# ---------------------------------------------------------------- linear models


def _of_linear(x: Any, y: Any, groups: list[list[int]], s: Settings) -> Path:
    """Return the exact path of ClassifierCV or RegressorCV, its scores over shuffled folds."""
    _check_folds(y, s)
    folds = (StratifiedKFold if s.classes else KFold)(s.cv, shuffle=True, random_state=s.seed)
    lasso = not s.classes and y.ndim == 1 and len(groups) == x.shape[1]
    l1, by_column = {"weight_l1": {"how": "proximal"}}, {"how": "proximal", "per": {"in": groups}}
    model = (ClassifierCV if s.classes else RegressorCV)(
        hidden=(),
        path=l1 if lasso else {"group_lasso": by_column},
        points=s.points,
        ratio=s.ratio,
        cv=folds,
        n_jobs=s.jobs,
        normalize=s.normalize,
    ).fit(x, y)
    points, weights, lengths = [], [], []
    for index, strength in enumerate(model.strengths_):
        state = {name: torch.as_tensor(values[index], device="cpu") for name, values in model.weights_.items()}
        w = next(tensor for tensor in state.values() if tensor.dim() == 2)
        lengths.append({"inputs": torch.stack([w[:, one].norm() for one in groups])})
        weights.append(state)
        scores = torch.as_tensor(model.scores_[index], device="cpu")
        used, mean = int((lengths[-1]["inputs"] > 0).sum()), float(scores.mean())
        points.append(_point(index, float(strength), mean, scores, used, len(groups)))
    return of_points(points, weights, lengths)


def _check_folds(y: Any, s: Settings) -> None:
    least = int(np.unique(y, return_counts=True)[1].min()) if s.classes else len(y)
    if s.cv > least:
        rows = "the rarest class" if s.classes else "the table"
        raise DataError(f"{rows} has {counted(least, 'row')}, too few for {s.cv} folds: write --cv and fewer")


def _point(index: int, strength: float, mean: float, scores: Tensor, used: int, count: int) -> Point:
    return Point(index, strength, "down", mean, scores, used, count, math.nan, math.nan, math.nan, mean)


# ---------------------------------------------------------------- networks


def _of_network(x: Any, y: Any, groups: list[list[int]], s: Settings) -> Path:
    """Return the path of `rs.path` upwards, scored on a part of the rows."""
    train, held = jobs.split(len(x), s.valid, s.seed, y if s.classes else None)
    given = {} if s.activation is None else {"activation": s.activation}
    model = (Classifier if s.classes else Regressor)(
        hidden=s.hidden, normalize=s.normalize, random_state=s.seed, **given
    )
    model.fit(x[train], y[train], epochs=1)  # builds the network, and learns the scales
    inputs, targets = model.tensors(x[train], y[train])
    weight = f"{model.layers_[1]['name']}.weight"

    def score(_: nn.Module) -> Any:
        found = np.asarray(model.predict(x[held]))
        if s.classes:
            return torch.as_tensor(found == y[held], device="cpu").double()
        return -torch.as_tensor(np.square(found - y[held]).reshape(len(found), -1).mean(1), device="cpu")

    return along(
        model.module_,
        rs.GroupLasso(per={"in": groups}).on(weight, how="proximal"),
        lambda network, reg: _train(network, reg, inputs, targets, s),
        loss=lambda network: _loss(network(inputs), targets, s.classes),
        score=score,
        points=s.points,
        ratio=s.ratio,
        certificate=False,
        random_state=s.seed,
    )


def _loss(output: Tensor, targets: Tensor, classes: bool) -> Tensor:
    return F.cross_entropy(output, targets) if classes else F.mse_loss(output, targets)


def _train(network: nn.Module, reg: Any, inputs: Tensor, targets: Tensor, s: Settings) -> None:
    """Train at one strength by Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=s.learning_rate)
    reg.use(optimizer)
    network.train()
    for _ in range(s.epochs):
        for rows in torch.randperm(len(inputs), device="cpu").split(s.batch_size):
            optimizer.zero_grad()
            reg.loss(_loss(network(inputs[rows]), targets[rows], s.classes)).backward()
            optimizer.step()


# ---------------------------------------------------------------- tables and files


def columns_at(path: Path, point: Point, names: Sequence[str]) -> list[str]:
    """Return the names of the columns that are used at a point."""
    (used,) = path.selected(point).values()
    return [names[number] for number in used.tolist()]


def text(path: Path, names: Sequence[str], classes: bool) -> str:
    """Return the table of points, and the two chosen points with the names of their columns."""
    best, sparse = path.best(), path.one_se()
    measure = "accuracy" if classes else "minus the squared error"
    rows = [["strength", "score", "±", "inputs", ""]]
    for one in path.points:
        marks = [mark for mark, chosen in (("best", best), ("one standard error", sparse)) if one is chosen]
        numbers = [f"{one.strength:.4g}", f"{one.score:.4g}", f"{error(one):.2g}", str(one.selected)]
        rows.append([*numbers, ", ".join(marks)])
    parts = [f"score: {measure}, ± its standard error", text_table(rows, {0, 1, 2, 3})]
    for title, one in (("best", best), ("within one standard error", sparse)):
        used = columns_at(path, one, names)
        listed = ", ".join(used) if used else "none"
        parts.append(f"{title}: strength {one.strength:.4g}, {len(used)} of {len(names)} columns: {listed}")
    return "\n".join(parts)


def error(point: Point) -> float:
    """Return the standard error of a point's score, over folds or rows."""
    assert point.scores is not None
    return float(point.scores.std()) / math.sqrt(len(point.scores)) if len(point.scores) > 1 else math.nan


def write(path: Path, names: Sequence[str], folder: FilePath) -> None:
    """Write the path, `points.csv`, `inputs.csv` (columns used) and `path.png` into a folder.

    Points of a path that was there before are removed.
    """
    for old in (*folder.glob("point-*.pt"), folder / "path.pt"):
        old.unlink(missing_ok=True)
    path.save(folder)
    found = path.points
    points = {
        "strength": [one.strength for one in found],
        "score": [one.score for one in found],
        "error": [error(one) for one in found],
        "inputs": [one.selected for one in found],
    }
    jobs.write(points, folder / "points.csv", _NOWHERE)
    best, sparse = columns_at(path, path.best(), names), columns_at(path, path.one_se(), names)
    used = {"best": [int(name in best) for name in names], "one_se": [int(name in sparse) for name in names]}
    jobs.write({"input": list(names), **used}, folder / "inputs.csv", _NOWHERE)
    path.plot(folder / "path.png")


_NOWHERE: Any = None  # `jobs.write` needs a stream only where there is no file
