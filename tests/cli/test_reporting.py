"""`restrain report`: pages of models and of paths."""

import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from report.pages import Reader
from restrain.cli.commands import restrain

pytest.importorskip("matplotlib")


def run(*arguments, code=0):
    found = CliRunner().invoke(restrain, arguments)
    assert found.exit_code == code, found.output
    return found


FAST = ("--epochs", "3", "--hidden", "8", "--weight-l2", "1e-3")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"age": draw.integers(20, 70, 120), "color": draw.choice(["red", "green"], 120)})
    table.assign(y=np.where(table.age > 45, "high", "low")).to_csv("data.csv", index=False)
    table = pd.DataFrame(draw.standard_normal((60, 4)), columns=["a", "<b>", "c", "d"])
    table.assign(y=table["a"] * 2 - table["<b>"]).to_csv("numbers.csv", index=False)
    return tmp_path


def test_pages_of_a_model_and_of_its_path(here):
    run("fit", "data.csv", "--target", "y", "--model", "classifier", "--out", "run", *FAST)
    assert "written: run/report.html" in run("report", "run").stdout
    text = (here / "run/report.html").read_text("utf-8")
    assert Reader(text).faults == []
    for said in ("accuracy in training", "data.csv: 120 rows", "weight_l2", "hid1.weight"):
        assert said in text
    assert "--overwrite" in run("report", "run", code=2).stderr
    run("report", "run/model.safetensors", "--overwrite")

    path = ("path", "numbers.csv", "--target", "y", "--points", "5", "--cv", "2", "--out", "path")
    run(*path)
    assert "written: path/report.html" in run("report", "path").stdout
    text = (here / "path/report.html").read_text("utf-8")
    assert re.findall(r"<h2[^>]*>([^<]*)<", text) == ["Warnings", "Path", "Environment"]
    assert '"labels":["a","\\u003cb\\u003e","c","d"]' in text
    run("report", "path", "--images", "2", "2", "--out", "images.html")
    assert '"columns":2' in (here / "images.html").read_text("utf-8")
    run("report", "run", "--path", "path", "--out", "both.html")
    assert 'id="path-data"' in (here / "both.html").read_text("utf-8")


def test_what_is_refused(here):
    run("path", "numbers.csv", "--target", "y", "--points", "3", "--cv", "2", "--out", "path")
    assert "leave out --path" in run("report", "path", "--path", "path", code=2).stderr
    assert "8 inputs; the path has 4" in run("report", "path", "--images", "2", "4", code=1).stderr
    assert "ends in .html" in run("report", "path", "--out", "a.pdf", code=1).stderr
    assert run("report", "nowhere", code=1).stderr.startswith("Error: ")
