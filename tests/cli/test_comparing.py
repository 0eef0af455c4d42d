"""`restrain cv`, `compare` and what `explain` shows of a table: numbers against scikit-learn and by hand."""

import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.metrics import confusion_matrix

import restrain as rs
from report.pages import Reader
from restrain.cli import comparing, evaluation, explain, jobs
from restrain.cli.commands import restrain
from restrain.cli.comparing import Fold, Scores
from restrain.report import best_epoch
from restrain.tables import Marks

pytest.importorskip("matplotlib")
FAST = ("--epochs", "3", "--batch-size", "32")


def run(*arguments, code=0):
    found = CliRunner().invoke(restrain, arguments)
    assert found.exit_code == code, found.output
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"age": draw.integers(20, 70, 90), "color": draw.choice(["red", "green", "blue"], 90)})
    table["noise"] = draw.normal(size=90).round(3)
    table["price"] = (table["age"] * 2.0 + (table["color"] == "red") * 30 + draw.normal(size=90)).round(3)
    table.assign(y=np.where(table["age"] > 45, "high", "low")).to_csv("data.csv", index=False)
    return tmp_path


FEW = ("--ignore", "price")


def test_a_comparison(here):
    given = ("data.csv", "--target", "y", "--model", "classifier", "--folds", "3", *FEW)
    text = run("compare", *given, "--try", "--hidden none", "--try", "--hidden 4 --epochs 1 --learning-rate 0",
               "--report", "page.html").stdout  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "data.csv: 90 rows, 3 columns; classifier, 3 folds"
    first, second = (re.split(r"\s{2,}", line) for line in lines[3:5])
    assert first[:2] == ["1", "--hidden none"]
    assert float(first[2]) > 0.9 > float(second[2])
    assert float(second[6]) == pytest.approx(float(second[2]) - float(first[2]), abs=1.01e-4)
    assert "2 is worse than 1" in text
    page = (here / "page.html").read_text("utf-8")
    assert Reader(page).faults == []
    assert "--hidden none" in page
    assert "is there already" in run("compare", *given, "--try", "", "--try", "--hidden 3", "--report", "page.html",
                                     code=2).stderr  # fmt: skip


def test_cross_validation_is_scikit_learns(here):
    text = run("cv", "data.csv", "--target", "price", "--model", "regressor", "--ignore", "y,color", "--hidden", "none",
               "--folds", "4", "--seed", "3").stdout  # fmt: skip
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import RepeatedKFold, cross_val_score

    table = pd.read_csv("data.csv")
    folds = RepeatedKFold(n_splits=4, n_repeats=1, random_state=3)
    expected = cross_val_score(LinearRegression(), table[["age", "noise"]], table["price"], cv=folds)
    found = [float(line.split()[1]) for line in text.splitlines()[3:7]]
    np.testing.assert_allclose(found, expected, atol=6e-5)
    assert f"{expected.mean():.4f}" in text


def test_scores_are_named_by_the_loss(here):
    given = ("cv", "data.csv", "--target", "age", "--model", "regressor", "--ignore", "y,price", "--folds", "3",
             "--hidden", "none")  # fmt: skip
    lines = run(*given, "--set", "loss=poisson").stdout.splitlines()
    assert re.split(r"\s{2,}", lines[2]) == ["fold", "D²", "loss"]
    table = pd.read_csv("data.csv").assign(event=1)
    table.to_csv("data.csv", index=False)
    cox = (*given[:2], "--target", "age", "--target", "event", *given[4:], "--set", "loss=cox")
    assert re.split(r"\s{2,}", run(*cox).stdout.splitlines()[2]) == ["fold", "concordance", "loss"]
    said = run("compare", *given[1:-2], "--try", "--hidden none", "--try", "--hidden none --set loss=poisson", code=1)
    assert "models are compared by one score" in said.stderr


def test_paired_errors():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=5)
    one = Scores("1", [Fold(h, 0.0) for h in hard], 0.25, ("R²", "RMSE"))
    two = Scores(
        "2", [Fold(h + d, 0.0) for h, d in zip(hard, [0.1, 0.2, 0.1, 0.2, 0.15], strict=True)], 0.25, ("R²", "RMSE")
    )
    mean, error = two.over(one, "score")
    assert mean == pytest.approx(0.15)
    assert error == pytest.approx(np.std([0.1, 0.2, 0.1, 0.2, 0.15], ddof=1) * (1 / 5 + 0.25) ** 0.5)
    assert error < one.mean("score")[1] / 5
    assert "2 is better than 1" in comparing.verdict([one, two])
    assert "No model differs" in comparing.verdict([one, one])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compare", "--try", ""), "for one there is cv"),
        (("compare", "--try", "", "--try", ""), "for one there is cv"),
        (("compare", "--try", "", "--try", "--hiden 3"), "No such option"),
        (("compare", "--try", "", "--try", "--weight-l1 much"), "zero or more, got 'much'"),
        (("compare",), "Missing option '--try'"),
        (("cv", "--hidden", "ten"), "expected whole numbers above zero"),
        (("cv", "--report", "page.txt"), "ends in .html"),
        (("cv", "--folds", "1"), "is not in the range"),
    ],
)
def test_command_lines_that_cannot_be(here, arguments, said):
    command, *more = arguments
    text = run(command, "data.csv", "--target", "y", "--model", "classifier", *FEW, *more, code=2).stderr
    assert said in " ".join(text.split())


def test_failures_in_the_words_of_the_command_line(here):
    given = ("data.csv", "--target", "y", "--model", "classifier", *FEW)
    assert "too few for --folds 80" in run("cv", *given, "--folds", "80", code=1).stderr
    assert "can't be read" in run("compare", *given, "--try", "", "--try", "'", code=1).stderr
    assert "no keyword 'no_such'" in run("cv", *given, "--set", "no_such=1", code=1).stderr


# ---------------------------------------------------------------- explain


@pytest.fixture
def fitted(here):
    run("fit", "data.csv", "--target", "y", "--model", "classifier", "--hidden", "8", "--valid", "0.2", "--out", "run/",
        "--seed", "1", "--epochs", "20", "--learning-rate", "0.02", *FEW)  # fmt: skip
    return jobs.Run.load("run")


def test_explain_of_a_classifier(fitted, here):
    text = run("explain", "run", "data.csv", "--report", "page.html").stdout
    seen = explain.look(fitted, here / "data.csv", Marks(), 0)
    table = pd.read_csv("data.csv")
    x = fitted.encoding.apply(fitted.read(here / "data.csv", Marks()))
    y = table["y"].to_numpy().astype(str)
    names, counts = seen.confusion
    np.testing.assert_array_equal(counts, confusion_matrix(y, fitted.model.predict(x), labels=names))
    assert seen.importances[0].column == "age"
    alone = [one.column for one in seen.importances]
    assert sorted(alone) == ["age", "color", "noise"]
    found, p = seen.calibration, fitted.model.predict_proba(x)
    assert found.rows.sum() == 90
    assert np.average(found.observed, weights=found.rows) == pytest.approx(fitted.model.score(x, y))
    assert np.average(found.predicted, weights=found.rows) == pytest.approx(p.max(1).mean())
    for said in ("importance on", "true \\ predicted", "recall", "mean distance"):
        assert said in text
    page = (here / "page.html").read_text("utf-8")
    assert Reader(page).faults == []
    for title in ("Importance", "Confusion", "Calibration"):
        assert f">{title}</h2>" in page
    assert f"best epoch, {best_epoch(fitted.model.history_)}" in page


def test_shuffled_columns_are_whole_categories(fitted, here):
    """Of a model that only looks at the color, only the color is important, by its exact fall."""

    class OnlyColor:
        def score(self, x, y):
            return float((x[:, columns] == right).all(1).mean())

    x = fitted.encoding.apply(fitted.read(here / "data.csv", Marks()))
    ends = np.cumsum([len(feature.columns) for feature in fitted.encoding.features])
    columns = slice(ends[0], ends[1])
    right = x[:, columns].copy()
    found = evaluation.importances(OnlyColor(), fitted.encoding, x, None)
    assert found[0].column == "color"
    assert found[0].fall == pytest.approx(1 - sum(np.square(right.mean(0))), abs=0.1)  # three values, at random
    assert [one.fall for one in found[1:]] == [0, 0]


def test_explain_of_a_regressor_and_what_it_does_not_use(here):
    given = ("--hidden", "4", "--ignore", "y", "--weight-l1", "0.05", "--how", "proximal", *FAST)
    run("fit", "data.csv", "--target", "price", "--model", "regressor", "--out", "run/", *given)
    model = jobs.Run.load("run")
    with_zero = model.model.find("hid1")
    with_zero.data[:, -1] = 0
    kept, left = evaluation.selected(model.model, model.encoding)
    assert "noise" in left
    assert "noise" not in kept
    text = run("explain", "run", "data.csv").stdout
    assert "RMSE" in text
    seen = explain.look(model, here / "data.csv", Marks(), 0)
    rest = seen.residuals[1]
    table = pd.read_csv("data.csv")
    assert 1 - np.square(rest).sum() / np.square(table["price"] - table["price"].mean()).sum() == pytest.approx(
        seen.score
    )


def test_explain_needs_the_target(fitted, here):
    pd.read_csv("data.csv").drop(columns="y").to_csv("bare.csv", index=False)
    assert "has no column 'y', the target" in run("explain", "run", "bare.csv", code=1).stderr
    pd.read_csv("data.csv").assign(y="other").to_csv("other.csv", index=False)
    assert (
        "has the class 'other', which the model wasn't fitted to" in run("explain", "run", "other.csv", code=1).stderr
    )


def test_curves_of_training_and_validation_share_an_axis(fitted):
    import matplotlib.pyplot as plt

    from restrain.cli import drawing

    panels = drawing.panels_of(fitted.model.history_)
    assert panels["data loss"] == ["data_loss"]
    figure, ax = plt.subplots()
    drawing.curves(ax, fitted.model.history_, panels["data loss"])
    labels = [line.get_label() for line in ax.lines]
    best = best_epoch(fitted.model.history_)
    assert labels == ["training", "validation", f"best epoch, {best}"]
    valid = [row["valid_data_loss"] for row in fitted.model.history_ if "valid_data_loss" in row]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), valid)
    assert ax.lines[2].get_xdata()[0] == best
    plt.close(figure)
    assert rs.load("run").history_ == fitted.model.history_
