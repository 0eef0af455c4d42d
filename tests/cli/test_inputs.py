"""`restrain path`: exact paths against scikit-learn and conditions of optimality, networks against NumPy."""

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from sklearn.linear_model import Lasso
from sklearn.model_selection import KFold

import restrain as rs
from restrain.cli import inputs, jobs
from restrain.cli.commands import restrain as command
from restrain.paths import Path

NAMES = list("abcde")
COLORS = ("blue", "green", "red")


def frame(count=90):
    draw = np.random.default_rng(0)
    table = pd.DataFrame(draw.standard_normal((count, 5)) * [1, 5, 1, 1, 0.1] + 3, columns=NAMES)
    table["color"] = draw.choice(COLORS, count)
    table["y"] = 2 * table.a - table.c + (table.color == "red") * 2 + draw.standard_normal(count) / 2
    table["kind"] = np.where(table.y > 4, "hi", np.where(table.y > 2.5, "mid", "lo"))
    return table.assign(few=(table.a > 3).astype(int), part=table.a + 7)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame().to_csv("data.csv", index=False)
    return tmp_path


def run(*more, target="y", ignore="kind,few,part", code=0):
    given = ["path", "data.csv", "--target", target, "--select", "inputs", "--points", "6", "--ignore", ignore, *more]
    result = CliRunner().invoke(command, list(map(str, given)))
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    return result.stdout if code == 0 else result.stderr


def standardised(x):
    return (x - x.mean(0)) / x.std(0)


def encoded(table=None):
    table = frame() if table is None else table
    return np.column_stack([table[NAMES], *[(table.color == color).astype(float) for color in COLORS]])


def test_scores_of_a_lasso_are_those_of_scikit_learn(here):
    text = run("--ignore", "color", "--out", "out", "--seed", "3")
    table, (x, y) = pd.read_csv("out/points.csv"), (frame()[NAMES].to_numpy(), frame().y.to_numpy())
    z = standardised(x)
    greatest = 2 * np.abs(z.T @ standardised(y)).max() / len(y)
    np.testing.assert_allclose(table.strength, greatest * np.geomspace(1, 1e-3, 6), rtol=1e-9)
    scores = np.empty((6, 5))
    for fold, (train, test) in enumerate(KFold(5, shuffle=True, random_state=3).split(x)):
        mean, spread, level, size = x[train].mean(0), x[train].std(0), y[train].mean(), y[train].std()
        for row, strength in enumerate(table.strength):
            model = Lasso(strength / 2, tol=1e-12, max_iter=10**6)
            model.fit((x[train] - mean) / spread, (y[train] - level) / size)
            found = model.predict((x[test] - mean) / spread) * size + level
            scores[row, fold] = -np.square(found - y[test]).mean()
    np.testing.assert_allclose(table.score, scores.mean(1), rtol=1e-7)
    np.testing.assert_allclose(table.error, scores.std(1, ddof=1) / 5**0.5, rtol=1e-7)
    best = scores.mean(1).argmax()
    coef = Lasso(table.strength[best] / 2, tol=1e-12).fit(z, standardised(y)).coef_
    assert pd.read_csv("out/inputs.csv").best.tolist() == (coef != 0).astype(int).tolist()
    listed = ", ".join(name for name, value in zip(NAMES, coef, strict=True) if value)
    assert f"best: strength {table.strength[best]:.4g}, {(coef != 0).sum()} of 5 columns: {listed}\n" in text
    assert table.inputs.iloc[0] == 0
    assert f"{table.score[best]:.4g} {table.error[best]:.2g}" in " ".join(text.split())
    assert (here / "out" / "path.png").stat().st_size > 5000
    refused = CliRunner().invoke(command, ["predict", "out", "data.csv"])
    assert refused.exit_code == 1
    assert "out holds a path, not a model: train one at the chosen strength (restrain fit" in refused.output


def test_the_sparse_point_is_the_fewest_columns_within_one_standard_error(here):
    frame(50).to_csv("data.csv", index=False)
    run("--out", "out", "--points", "12", "--cv", "4")
    path = Path.load("out")
    scores = np.stack([one.scores for one in path.points])
    best, counts = scores.mean(1).argmax(), np.array([one.selected for one in path.points])
    paired = scores[best] - scores
    near = paired.mean(1) <= paired.std(1, ddof=1) / 2
    fewest = counts[near].min()
    assert fewest < counts[best]
    assert pd.read_csv("out/inputs.csv").one_se.sum() == fewest


def residual(x, y, w, b, strength, groups, classes):
    """Greatest violation of the conditions of optimality of a group lasso, in NumPy."""
    output = x @ w.T + b
    if classes:
        chances = np.exp(output - output.max(1, keepdims=True))
        slope = (chances / chances.sum(1, keepdims=True) - np.eye(len(b))[y]).T @ x / len(x)
    else:
        slope = 2 * (output - y).T @ x / y.size
    found = []
    for one in groups:
        v, g = w[:, one], slope[:, one]
        size, length = strength * v.size**0.5, np.linalg.norm(v)
        found.append(np.linalg.norm(g + size * v / length) if length else max(np.linalg.norm(g) - size, 0))
    return max(found)


GROUPS = [[0], [1], [2], [3], [4], [5, 6, 7]]


@pytest.mark.parametrize("target", ["y", "kind"])
def test_points_with_a_category_are_minima_of_a_group_lasso(here, target):
    run("--out", "out", target=target, ignore="few,part," + {"y": "kind", "kind": "y"}[target])
    classes = np.unique(frame().kind, return_inverse=True)[1]
    y = classes if target == "kind" else standardised(frame().y.to_numpy())[:, None]
    path, used = Path.load("out"), set()
    for one in path.points:
        state = path.folder.read(one.index)["weights"]
        w, b = (state[name].numpy() for name in ("out.weight", "out.bias"))
        given = standardised(encoded()), y, w, b
        assert residual(*given, one.strength, GROUPS, target == "kind") < 1e-6
        if one.selected > 0:
            assert residual(*given, 1.01 * one.strength, GROUPS, target == "kind") > 1e-6
        zero = [not w[:, group].any() for group in GROUPS]
        assert path.selected(one)["inputs"].tolist() == [number for number in range(6) if not zero[number]]
        used.add(zero[5])
    assert used == {True, False}


def test_a_network_is_scored_as_numpy_scores_its_weights(here):
    given = ("--hidden", "8", "--epochs", "5", "--learning-rate", "0.02", "--valid", "0.3", "--seed", "2")
    text = run(*given, "--out", "out", ignore="kind,few,part")
    assert "a network of hidden layers (8,), regressor" in text
    train, held = jobs.split(90, 0.3, 2)
    x, y, path = encoded(), frame().y.to_numpy(), Path.load("out")
    z, level, size = (x - x[train].mean(0)) / x[train].std(0), y[train].mean(), y[train].std()
    for one in path.points:
        state = {name: tensor.numpy() for name, tensor in path.folder.read(one.index)["weights"].items()}
        hidden = np.maximum(z[held] @ state["hid1.weight"].T + state["hid1.bias"], 0)
        found = (hidden @ state["out.weight"].T + state["out.bias"])[:, 0] * size + level
        np.testing.assert_allclose(one.scores, -np.square(found - y[held]), rtol=1e-9)
        zero = [not state["hid1.weight"][:, group].any() for group in GROUPS]
        assert path.selected(one)["hid1.weight"].tolist() == [number for number in range(6) if not zero[number]]
    assert path.points[-1].selected == 0
    assert path.best().selected > 0


@pytest.mark.parametrize("classes", [False, True])
def test_a_network_is_trained_on_the_loss_of_the_estimators(classes):
    x, y = encoded(), (frame().kind if classes else frame().y).to_numpy()
    model = (rs.Classifier if classes else rs.Regressor)(hidden=(4,), normalize=True, epochs=1).fit(x, y)
    z, targets = model.tensors(x, y)
    torch.testing.assert_close(inputs._loss(model.module_(z), targets, classes), model.data_loss(x, y))


def test_a_network_classifies_and_the_path_is_drawn_from_its_seed(here):
    given = ("--hidden", "6", "--epochs", "2", "--points", "3")
    first = run(*given, target="kind", ignore="y,few,part")
    assert "score: accuracy" in first
    assert first == run(*given, target="kind", ignore="y,few,part")


def test_a_path_that_is_there_is_replaced_whole(here):
    run("--out", "out")
    assert "out has a path already: write --overwrite" in run("--out", "out", code=2)
    run("--out", "out", "--overwrite", "--points", "3")
    assert len(Path.load("out").points) == len(list((here / "out").glob("point-*.pt"))) == 3


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("--hidden", "8", "--cv", "3"), 2, "--cv is for linear models, which --hidden excludes"),
        (("--learning-rate", "0.1"), 2, "--learning-rate is for networks: write --hidden"),
        (("--select", "units"), 2, "'units' is not 'inputs'"),
        (("--hidden", "8,x"), 2, "expected whole numbers above zero"),
        (("--cv", "91"), 1, "the table has 90 rows, too few for 91 folds: write --cv and fewer"),
        (("--ratio", "1"), 2, "0<x<1"),
        (("--ignore", "nothing"), 2, "data.csv has no column 'nothing'"),
    ],
)
def test_refusals(here, given, code, said):
    assert said in " ".join(run(*given, code=code).split())


def test_a_target_that_may_be_either_is_refused(here):
    text = run(target="few", ignore="kind,y,part", code=1)
    assert "the target 'few' has 2 different whole numbers, which may be classes or quantities" in text
    assert "classifier" in run("--model", "classifier", target="few", ignore="kind,y,part")
    assert "regressor" in run("--model", "regressor", target="few", ignore="kind,y,part")


def test_rare_classes_are_refused(here):
    frame().assign(kind=["rare"] + ["other"] * 44 + ["more"] * 45).to_csv("data.csv", index=False)
    text = run(target="kind", ignore="y,few,part", code=1)
    assert "the rarest class has 1 row, too few for 5 folds" in text


def test_several_targets_share_their_columns(here):
    run("--target", "part", "--out", "out", ignore="kind,few")
    path = Path.load("out")
    y, x = standardised(frame()[["y", "part"]].to_numpy()), standardised(encoded())
    for one in path.points[1:4]:
        state = path.folder.read(one.index)["weights"]
        w, b = (state[name].numpy() for name in ("out.weight", "out.bias"))
        assert residual(x, y, w, b, one.strength, GROUPS, classes=False) < 1e-6
