"""What the command line does with real tables: reads them as told, remembers how, and checks them first."""

import shlex

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import restrain as rs
from restrain.cli.commands import restrain as command
from restrain.models import files

FAST = ("--epochs", "2", "--batch-size", "32", "--hidden", "4")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0, given=None):
    result = CliRunner().invoke(command, [str(word) for word in words], input=given)
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    return result


def table(count=80, seed=0):
    draw = np.random.default_rng(seed)
    found = pd.DataFrame({"age": draw.integers(20, 70, count), "color": draw.choice(["red", "blue"], count)})
    return found.assign(y=np.where(found.age > 45, "old", "young"))


def fit(*more, data=("data.csv",), model="classifier", target="y", fast=FAST, code=0):
    return run("fit", *data, "--target", target, "--model", model, "--out", "run/", *fast, *more, code=code)


# fit


GERMAN = "n;d;zip;y\n" + "".join(
    f"{k},5;{k % 28 + 1}.{k % 12 + 1}.2024;0{k % 3};{'ja' if k % 2 else 'nein'}\n" for k in range(60)
)
DRESS = ("--separator", ";", "--encoding", "latin-1")
WRITTEN = ("--decimal", ",", "--date-format", "%d.%m.%Y", "--na-values", "-99,?", "--categories", "zip")


def test_a_table_as_people_have_it(here):
    (here / "data.csv").write_bytes(GERMAN.replace("ja", "já").encode("latin-1"))
    out = fit(*DRESS, *WRITTEN, "--missing", "fill").stdout
    assert "Note: d is read as dates: days since 1970-01-01, and places in week" in out
    model = rs.load("run")
    assert model.classes_.tolist() == ["já", "nein"]
    assert model.input_names_.tolist() == ["n", "d", "d.week.sin", "d.week.cos", "zip=00", "zip=01", "zip=02"]
    marks = files.read_notes("run")["marks"]
    assert marks == {"decimal": ",", "thousands": "", "date": "%d.%m.%Y", "gaps": ["-99", "?"]}
    # what was said of values holds at prediction, what was said of the file doesn't
    (here / "new.csv").write_text("n;d;zip\n1,5;1.2.2024;01\n-99;?;02\n")
    found = run("predict", "run/", "new.csv", "--separator", ";").stdout.split()
    assert len(found) == 3
    assert "write --separator ';'" in run("predict", "run/", "new.csv", code=1).stderr
    frame = pd.DataFrame({"n": [1.5, None], "d": pd.to_datetime(["2024-02-01", None]), "zip": ["01", "02"]})
    assert model.predict(frame).tolist() == found[1:]


def test_rows_with_gaps_may_be_left_out(here):
    some = table()
    some.loc[[2, 3], "age"], some.loc[3, "color"], some.loc[5, "y"] = None, None, None
    some.to_csv("data.csv", index=False)
    out = fit("--drop-missing").stdout
    assert "left out: 3 of 80 rows with missing values (2 in 'age', 1 in 'color', 1 in 'y')" in out
    assert "data.csv: 77 rows" in out
    some.assign(age=None).to_csv("data.csv", index=False)
    said = fit("--drop-missing", "--overwrite", code=1).stderr
    assert "each row has a missing value" in said


def test_rows_that_fit_holds_back_are_shown(here):
    table().to_csv("data.csv", index=False)
    out = fit(fast=("--hidden", "4", "--learning-rate", "0.1")).stdout
    assert "held back: 16 of 80 rows to validate with, which end the training" in out
    assert "accuracy in validation" in out
    assert files.read_notes("run")["rows"] == [64, 16]
    assert "valid_acc" in rs.load("run").history_[0]
    assert "64 rows to train on, 16 to validate with" in run("explain", "run").stdout
    assert "held back" not in fit("--valid", "none", "--overwrite").stdout
    assert files.read_notes("run")["rows"] == [80, 0]
    assert rs.load("run").valid is None


def test_several_files_and_standard_input(here):
    table(40, 1).to_csv("a.csv", index=False)
    table(40, 2).to_csv("b.csv", index=False)
    out = fit(data=("a.csv", "b.csv")).stdout
    assert "a.csv, b.csv: 80 rows, 2 columns" in out
    both = run("predict", "run/", "a.csv", "b.csv").stdout.split()
    assert both == run("predict", "run/", "a.csv").stdout.split() + run("predict", "run/", "b.csv").stdout.split()[1:]
    assert run("predict", "run/", "-", given=(here / "a.csv").read_bytes()).stdout.split() == both[:41]
    words = ("fit", "-", "--target", "y", "--model", "classifier", "--out", "run/", "--overwrite", *FAST)
    assert "standard input: 40 rows" in run(*words, given=(here / "a.csv").read_bytes()).stdout
    words = ("path", "-", "--target", "y", "--points", "3", "--cv", "2")
    assert "standard input: 40 rows" in run(*words, given=(here / "a.csv").read_bytes()).stdout


def test_workbooks_as_data(here):
    pytest.importorskip("openpyxl")
    table().to_excel("data.xlsx", index=False)
    fit(data=("data.xlsx",))
    table().to_csv("data.csv", index=False)
    assert run("predict", "run/", "data.xlsx").stdout == run("predict", "run/", "data.csv").stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--date-format", "dd.mm.yyyy"), "as in '%d.%m.%Y'; got 'dd.mm.yyyy'"),
        (("--set", "encoder=3"), "write --missing, --categories, --unknown"),
        (("--encoding", "utf-9"), "there is no encoding 'utf-9'"),
    ],
)
def test_options_that_cannot_be(here, more, said):
    table().to_csv("data.csv", index=False)
    assert said in " ".join(fit(*more, code=1 if more[0] == "--encoding" else 2).stderr.split())
    assert not (here / "run").exists()


def test_unknown_categories_are_always_counted(here):
    table().to_csv("data.csv", index=False)
    fit()
    table(10).assign(color=["mauve"] * 3 + ["red"] * 7).to_csv("odd.csv", index=False)
    said = run("predict", "run/", "odd.csv", code=1).stderr
    assert "'mauve' was not there in training, only blue, red (3 rows of 10 have such values)" in said
    assert "3 rows of 10 with values" in run("predict", "run/", "odd.csv", "--unknown", "zeros").stderr


# check


def dirty():
    draw, count = np.random.default_rng(0), 60
    found = table(count).assign(
        id=range(1, count + 1),
        always=7,
        nothing=None,
        colour=lambda t: t.color.map({"red": "rouge", "blue": "bleu"}),
        late=lambda t: t.y.map({"old": "A", "young": "B"}),
        price=[f"{k},5" for k in range(count)],
        group=draw.integers(1, 4, count),
        when=pd.date_range("2023-01-01", periods=count, freq="W").astype(str),
        gap=[None, None, *range(count - 2)],
    )
    return pd.concat([found, found[:0]])


def test_check_finds_what_is_wrong(here):
    dirty().to_csv("data.csv", index=False)
    out = run("check", "data.csv", "--target", "y").stdout
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "data.csv: 60 rows, 12 columns" in out
    for name, said in {
        "age": "number",
        "color": "category",
        "when": "2023-01-01 … 2024-02-18",
        "gap": "2 (3%)",
        "y": "target",
    }.items():
        assert said in rows[name]
    for said in (
        "id: counts the rows; leave it out: --ignore id",
        "always: is constant, 7",
        "nothing: has no values at all",
        "colour: says the same as 'color', value by value",
        "late: is another name of the target 'y'",
        "age: parts by thresholds the classes of the target 'y'",
        "price: row 1, column 'price': expected a number or a category, got '0,5'",
        "group: 3 different whole numbers; if they are names of groups, write --categories group",
        "2 rows of 60 with missing values: --missing fill",
    ):
        assert f"- {said}" in out, said


def test_the_command_that_check_proposes_runs(here):
    dirty().to_csv("data.csv", index=False)
    out = run("check", "data.csv", "--target", "y", "--ignore", "late,age").stdout
    words = shlex.split(out.rpartition("then: restrain ")[2])
    assert words[0] == "fit"
    ignored = {"late", "age", "id", "always", "nothing", "price", "colour"}
    assert set(words[words.index("--ignore") + 1].split(",")) == ignored
    assert "accuracy in training" in run(*words, *FAST).stdout


def test_check_proposes_the_form_of_dates(here):
    some = table().assign(day=[f"2024/{k % 12 + 1:02d}/{k % 28 + 1:02d}" for k in range(80)])
    some.to_csv("data.csv", index=False)
    out = run("check", "data.csv", "--target", "y").stdout
    assert "day: row 1, column 'day'" in out
    command = out.splitlines()[-1]
    assert "--date-format %Y/%m/%d" in command
    assert "day" not in command
    assert "day is read as dates" in run(*shlex.split(command)[2:], *FAST).stdout


def test_gaps_at_prediction_are_told_as_such(here):
    table().to_csv("data.csv", index=False)
    fit()
    some = table()
    some.loc[[2, 3], "age"] = None
    some.to_csv("gaps.csv", index=False)
    said = run("predict", "run/", "gaps.csv", code=1).stderr
    assert "(and in 1 other row); fill it in, leave these rows out, or fit with --missing fill" in " ".join(
        said.split()
    )


def test_check_of_rows_and_targets(here):
    some = table().assign(n=lambda t: t.age % 7, t=lambda t: 3.0 * t.age + 1)
    some = pd.concat([some, some[:5]])
    some.to_csv("data.csv", index=False)
    out = run("check", "data.csv", "--target", "t", "--ignore", "y").stdout
    assert "age: is another name of the target 't'" in out
    assert "--model regressor" in out
    assert "rows equal to another row" in out
    rare = table().assign(y=["a"] * 78 + ["b", "c"], age=1.5)
    rare.to_csv("data.csv", index=False)
    out = run("check", "data.csv", "--target", "y").stdout
    assert "y: rare classes, 'b' (1 row), 'c' (1 row)" in out
    assert "97.5% of the rows are of one class, 'a'" in out
    assert "with the inputs of another and a different target" in out
    assert "--model autoencoder" in run("check", "data.csv").stdout


def test_a_clean_table_has_nothing_to_mend(here):
    draw = np.random.default_rng(0)
    pd.DataFrame({"a": draw.normal(size=50), "b": draw.normal(size=50), "y": draw.normal(size=50)}).to_csv(
        "t.csv", index=False
    )
    out = run("check", "t.csv", "--target", "y").stdout
    assert "nothing to mend was found" in out
    assert "then: restrain fit t.csv --target y --model regressor --out run/" in out
    assert "has no column 'z'" in run("check", "t.csv", "--target", "z", code=2).stderr
