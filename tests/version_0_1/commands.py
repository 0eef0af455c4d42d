"""The command line, as a person uses it in a folder of their own."""

import csv
import io

from restrain import cli
from version_0_1.common import numbers

PLAN = """rules:
  - {what: l1, strength: 1e-3, on: "*.weight", how: proximal}
  - {what: l2, strength: {linear: {start: 0, end: 1e-3, steps: 10}}, on: {outputs: hid1}}
"""
FAST = ["--epochs", "4", "--batch-size", "20", "--learning-rate", "0.02"]
LAYERS = '[3, [5, "relu"], [3, "tied"]]'
FITS = {
    "classifier": "data.csv --target y --model classifier --hidden 5,4:tanh --hidden-dropout 0.2 --plan plan.yaml "
    "--valid 0.2 --categories zone --missing fill --weight-l2 strength=1e-4,on=hid1.weight",
    "regressor": "data.csv --target wage --target age --model regressor --hidden 5 --ignore y --ignore gap --valid 0.2 "
    "--set grouplasso=1e-3 --noise hid*=0.1 --patience 3",
    "autoencoder": "data.csv --model autoencoder --ignore y --ignore color --ignore gap --hidden-l1 1e-3",
    "resumed": "data.csv --target wage --model regressor --hidden 5 --ignore y --ignore gap --valid 0.2 --resume "
    "--plan plan.yaml --no-normalize --weight-l1 strength=1e-3,how=proximal",
}
PREDICTS = {"classifier": ["--proba"], "regressor": [], "autoencoder": ["--code"]}


def write_data(folder):
    """The tables and the plan, once and for all."""
    columns = numbers(60, 3, seed=6)
    rows = []
    for index, (age, wage, gap) in enumerate(columns.tolist()):
        kind = ("low", "mid", "high")[(age + wage > -1) + (age + wage > 1)]
        color = ("red", "green", "blue")[index * index % 7 % 3]
        gap = "" if index % 9 == 4 else f"{gap:.3f}"
        rows.append([f"{45 + 10 * age:.0f}", color, index % 4, f"{3 + wage:.3f}", gap, kind])
    for name, part in (("data.csv", rows[:48]), ("new.csv", rows[48:])):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["age", "color", "zone", "wage", "gap", "y"], *part])
    (folder / "plan.yaml").write_text(PLAN)


def run(*arguments):
    """A command that must end well."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{arguments}: {end.code}") from end


def fit(name):
    layers = ["--layers", LAYERS] if name == "autoencoder" else []
    run("fit", *FITS[name].split(), *layers, *FAST, "--seed", "5", "--out", f"{name}/")


def table(text):
    """Numbers as numbers, in columns."""
    rows = list(csv.DictReader(io.StringIO(text)))
    return {key: [_number(row[key]) for row in rows] for key in rows[0]}


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text
