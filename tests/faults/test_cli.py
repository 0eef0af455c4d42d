"""The command line: columns, categories and numbers of tables (A21); what it says where it fails (C)."""

import contextlib
import csv
import io
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import restrain as rs
from faults.helpers import SOURCE
from restrain.cli import main
from restrain.errors import RestrainError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs `restrain` with some words, and returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(word) for word in words])
            except SystemExit as end:
                code = end.code or 0
                if isinstance(code, str):
                    err.write(code)
                    code = 1
        return code, out.getvalue(), " ".join(err.getvalue().split())

    return run


FIT = ("--epochs", 40, "--batch-size", 16, "--hidden", 8, "--learning-rate", 0.03, "--seed", 0)


def fit(run, *more, data="data.csv", target="y", model="classifier"):
    return run("fit", data, "--target", target, "--model", model, "--out", "run/", *FIT, *more)


def predicted(run, file, *more):
    code, out, err = run("predict", "run/", file, *more)
    return code, [row["y"] for row in csv.DictReader(io.StringIO(out))] if code == 0 else [], err


def write(name, **columns):
    pd.DataFrame(columns).to_csv(name, index=False)


def share(found, right):
    return np.mean([a == b for a, b in zip(found, right, strict=True)])


# A21: columns of a classifier


def test_two_targets_in_one_option_are_refused_for_a_classifier(run):
    draws = np.random.default_rng(0)
    write("data.csv", a=draws.normal(size=40), y=["u", "v"] * 20, t=["p", "q"] * 20)
    code, _, err = fit(run, target="y,t")
    assert code != 0
    assert "t" in err


# A21: categories


def kinds(count=120):
    return np.random.default_rng(0).integers(1, 4, count)


def test_a_missing_value_in_training_changes_no_category(run):
    kind = kinds()
    y = np.where(kind == 1, "one", np.where(kind == 2, "two", "three"))
    write("data.csv", kind=[np.nan, *kind[1:]], y=y)  # a gap makes pandas write 1.0 instead of 1
    write("new.csv", kind=kind, y=y)
    assert fit(run, "--categories", "kind", "--missing", "fill")[0] == 0
    code, found, err = predicted(run, "new.csv", "--unknown", "zeros")
    assert code == 0, err
    assert share(found, y) > 0.95 or "kind" in err


def test_a_missing_value_at_prediction_changes_no_other_category(run):
    kind = kinds()
    y = np.where(kind == 1, "one", np.where(kind == 2, "two", "three"))
    write("data.csv", kind=kind, y=y)
    write("new.csv", kind=[np.nan, *kind[1:]], y=y)
    assert fit(run, "--categories", "kind")[0] == 0
    code, found, err = predicted(run, "new.csv", "--unknown", "zeros")
    assert (code == 0 and share(found[1:], y[1:]) > 0.95) or "kind" in err


def test_values_that_were_not_there_in_training_are_counted_in_a_note(run):
    kind = kinds()
    write("data.csv", kind=[f"k{k}" for k in kind], y=np.where(kind == 1, "one", "more"))
    write("new.csv", kind=["other", "k1", "other"], y=["one"] * 3)
    assert fit(run)[0] == 0
    code, _, err = predicted(run, "new.csv", "--unknown", "zeros")
    assert code == 0
    assert "kind" in err
    assert "2" in err


def test_zip_codes_as_classes_keep_their_zeros(run):
    x = kinds()
    zips = np.array(["01234", "98765"])[x % 2]
    write("data.csv", x=x % 2, y=zips)
    assert fit(run)[0] == 0
    _, found, err = predicted(run, "data.csv")
    assert set(found) == {"01234", "98765"} or "01234" in err


def test_zip_codes_keep_their_zeros(run):
    zips = np.array(["01234", "1234"])[kinds() % 2]
    y = np.where(zips == "01234", "east", "west")
    write("data.csv", zip=zips, y=y)
    assert fit(run, "--categories", "zip")[0] == 0
    code, found, err = predicted(run, "data.csv")
    assert code == 0, err
    assert share(found, y) == 1.0


SPELLINGS = {"numbers": ("1", "0"), "words": ("yes", "no"), "capitals": ("TRUE", "FALSE")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_booleans_in_another_spelling_are_the_same_or_are_refused(run, spelling):
    flag = kinds() % 2 == 1
    y = np.where(flag, "on", "off")
    write("data.csv", flag=np.where(flag, "True", "False"), y=y)
    yes, no = SPELLINGS[spelling]
    write("new.csv", flag=np.where(flag, yes, no), y=y)
    assert fit(run, "--categories", "flag")[0] == 0
    code, found, err = predicted(run, "new.csv", "--unknown", "zeros")
    assert "flag" in err if code else (share(found, y) == 1.0 or "flag" in err)


# A21: numbers written otherwise

WRITTEN = {
    "decimal comma": ["1,5", "2,5", "3,5", "10,25"],
    "thousands": ["1,000", "2,500", "3,000", "12,000"],
    "percent": ["2.5%", "5%", "7.5%", "10%"],
    "dates": ["2024-01-31", "2024-02-29", "2024-03-31", "2024-12-31"],
    "currency": ["$5", "$10", "$15", "$20"],
}


@pytest.mark.parametrize("form", WRITTEN)
def test_numbers_in_another_form_are_not_made_categories_without_a_word(run, form):
    which = np.random.default_rng(0).integers(0, 4, 120)
    write("data.csv", amount=np.array(WRITTEN[form])[which], y=np.where(which > 1, "high", "low"))
    _, out, err = fit(run)
    assert re.search(r"(?i)(note|warning|error)[^\n]*amount", out + "\n" + err)


def test_plain_words_are_categories_without_a_word(run):
    which = np.random.default_rng(0).integers(0, 4, 120)
    write("data.csv", amount=np.array(["few", "some", "many", "all"])[which], y=np.where(which > 1, "high", "low"))
    code, _, err = fit(run)
    assert code == 0
    assert "amount" not in err


# C: what the command line says


@pytest.fixture
def data(run):
    draws = np.random.default_rng(0)
    write("data.csv", a=draws.normal(size=60), b=draws.normal(size=60), y=["u", "v"] * 30)


def test_settings_of_a_penalty_can_be_typed(run, data):
    """Either they are taken, or what the error proposes is taken when it is typed."""
    code, _, err = fit(run, "--set", "grouplasso=strength=1e-3,per=in")
    if code:
        proposed = re.search(r"--set (\"[^\"]+\"|'[^']+'|\S+=\S+)", err)
        assert proposed, err
        assert fit(run, *shlex.split(proposed[0]))[0] == 0
    model = rs.load("run/")
    assert model.grouplasso["per"] == "in"


def test_errors_speak_of_options(run, data):
    code, _, err = fit(run, "--patience", 3)
    assert code != 0
    assert "--patience" in err
    assert "--valid" in err
    assert "valid=" not in err.replace("--valid=", "")


BROKEN = {
    "latin-1": ("a,y\n1,é\n2,u\n".encode("latin-1"), "UTF-8"),
    "ragged": (b"a,y\n1,u\n2,v,7,8\n3,u\n", "data.csv"),
    "empty": (b"", "data.csv"),
    "binary": (bytes(range(256)), "data.csv"),
    "quote": (b'a,y\n"1,u\n2,v\n', "data.csv"),
}


@pytest.mark.parametrize("form", BROKEN)
def test_files_that_are_no_tables_are_told_in_our_words(run, form):
    content, said = BROKEN[form]
    with open("data.csv", "wb") as file:
        file.write(content)
    code, _, err = fit(run)
    assert code != 0
    assert "data.csv" in err
    assert said.lower() in err.lower()
    assert not re.search(r"codec can't|Error tokenizing|C error|No columns to parse|EOF inside string|Traceback", err)


def test_one_row_is_no_rows(run, data):
    assert fit(run)[0] == 0
    write("one.csv", a=[0.1], b=[0.2], y=["u"])
    write("odd.csv", a=["x"], b=[0.2], y=["u"])
    for file in ("one.csv", "odd.csv"):
        _, out, err = run("predict", "run/", file, "--out", "found.csv")
        assert not re.search(r"\b1 rows\b|\b0 other rows\b", out + err)


def test_one_missing_target_has_no_other_rows(run):
    write("data.csv", a=range(40), y=["u", "v"] * 19 + ["u", ""])
    code, _, err = fit(run)
    assert code != 0
    assert "row 40" in err
    assert "0 other" not in err


def test_a_reader_that_stops_early_is_no_error(run, data):
    assert fit(run)[0] == 0
    draws = np.random.default_rng(0)
    write("new.csv", a=draws.normal(size=20_000), b=draws.normal(size=20_000))
    given = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "restrain", "predict", "run/", "new.csv"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=given)
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Errno" not in said
    assert "Broken pipe" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("ending", ["txt", "xlsx"])
def test_other_tables_are_read_or_the_error_says_how(run, data, ending):
    table = pd.read_csv("data.csv")
    if ending == "txt":
        table.to_csv("data.txt", index=False, sep="\t")
    else:
        with open("data.xlsx", "wb") as file:
            file.write(b"PK\x03\x04 a workbook")
    code, _, err = fit(run, data=f"data.{ending}")
    if ending == "txt":
        assert code == 0, err
    else:
        assert re.search(r"(?i)excel|spreadsheet|workbook|openpyxl", err)


WORDS = {"hidden_layer_sizes": "hidden", "alpha": "weight_l2", "max_iter": "epochs"}


@pytest.mark.parametrize("word", WORDS)
def test_scikit_learns_words_get_ours(run, data, word):
    code, _, err = fit(run, "--set", f"{word}=10")
    assert code != 0
    assert re.search(rf"\b{WORDS[word]}\b|--{WORDS[word].replace('_', '-')}", err[:400])
    assert len(err) < 800


@pytest.mark.parametrize("word", WORDS)
def test_scikit_learns_words_get_ours_in_python(word):
    X, y = np.zeros((4, 2)), np.arange(4) % 2
    with pytest.raises((RestrainError, TypeError)) as caught:
        rs.Classifier(**{word: 10}).fit(X, y)
    said = str(caught.value)
    assert re.search(rf"\b{WORDS[word]}\b", said[:400])
    assert len(said) < 800
