"""The command line as a person uses it: from a file to a model, predictions, and what is told of it."""

import csv
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import restrain as rs
from restrain.cli import explain, options
from restrain.cli.commands import restrain as command
from restrain.models import files
from restrain.models.signature import DEFAULTS

FAST = ("--epochs", "3", "--batch-size", "32", "--hidden", "8")


def frame(count=120, seed=0):
    draw = np.random.default_rng(seed)
    table = pd.DataFrame({"age": draw.integers(20, 70, count), "color": draw.choice(["red", "green", "blue"], count)})
    table["wage"] = draw.normal(3e4, 1e4, count).round(2)
    score = (table.age - 45) / 15 + (table.color == "red") * 2 - 1
    return table.assign(y=np.where(score > 0.5, "high", np.where(score < -0.5, "low", "mid")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame().to_csv("data.csv", index=False)
    frame(30, 1).to_csv("new.csv", index=False)
    return tmp_path


def run(*arguments, code=0):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    return result


def fit(*more, data="data.csv", code=0, out="run/", model="classifier", target="y"):
    wanted = () if target is None else ("--target", target)
    return run("fit", data, *wanted, "--model", model, "--out", out, *FAST, *more, code=code)


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


# From a file to predictions


def test_fit_predict_explain(here):
    result = fit("--weight-l1", "1e-4", "--hidden-dropout", "0.3", "--valid", "0.2", "--learning-rate", "0.01")
    assert "120 rows, 3 columns that become 5 inputs" in result.stdout
    assert "accuracy in validation" in result.stdout
    assert [path.name for path in (here / "run").iterdir()] == ["model.safetensors"]
    model = rs.load("run/")
    assert (model.weight_l1, model.hidden_dropout, model.hidden) == (1e-4, 0.3, (8,))
    assert len(model.history_) == 3
    assert "valid_acc" in model.history_[-1]

    result = run("predict", "run/", "new.csv", "--proba")
    found = rows(result.stdout)
    assert list(found[0]) == ["y", "p(high)", "p(low)", "p(mid)"]
    assert len(found) == 30
    for row in found:
        chances = {name[2:-1]: float(value) for name, value in row.items() if name != "y"}
        assert abs(sum(chances.values()) - 1) < 1e-6
        assert max(chances, key=chances.get) == row["y"]
    right = np.mean([row["y"] == y for row, y in zip(found, frame(30, 1).y, strict=True)])
    assert f"accuracy {right:.4f} on 30 rows" in result.stderr

    text = run("explain", "run/").stdout
    for said in ("96 rows to train on, 24 to validate with", "high, low, mid", "color (blue, green, red)"):
        assert said in text
    for said in ("weight_l1", "hidden_dropout", "valid_data_loss", "hid1", "1 … 3"):
        assert said in text


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "npz"])
def test_formats_in_and_out(here, ending):
    table = frame()
    if ending == "parquet":
        table.to_parquet("table.parquet")
    elif ending == "npz":
        np.savez("table.npz", **{name: np.array(table[name].tolist()) for name in table})
    else:
        table.to_csv(f"table.{ending}", index=False, sep="\t" if ending == "tsv" else ",")
    fit(data="data.csv", out="reference/")
    fit(data=f"table.{ending}")
    for name, tensor in rs.load("reference").module_.state_dict().items():
        assert rs.load("run").module_.state_dict()[name].equal(tensor)
    run("predict", "run", f"table.{ending}", "--out", f"found.{ending}")
    expected = [row["y"] for row in rows(run("predict", "reference", "data.csv").stdout)]
    readers = {"csv": pd.read_csv, "tsv": lambda p: pd.read_csv(p, sep="\t"), "parquet": pd.read_parquet}
    found = np.load("found.npz")["y"] if ending == "npz" else readers[ending](f"found.{ending}").y
    assert list(found) == expected


def test_regressor_of_several_targets(here):
    table = frame().assign(b=lambda t: t.age * 2.0)
    table.to_csv("data.csv", index=False)
    fit("--target", "b", "--ignore", "y", model="regressor", target="wage")
    result = run("predict", "run", "data.csv")
    assert list(rows(result.stdout)[0]) == ["wage", "b"]
    assert "R²" in result.stderr
    assert "Note" not in result.stderr
    one = fit(model="regressor", target="wage", out="one/")
    assert "R² in training" in one.stdout
    assert list(rows(run("predict", "one", "data.csv").stdout)[0]) == ["wage"]


def test_autoencoder(here):
    np.savez("x.npz", X=np.random.default_rng(0).normal(size=(50, 4)), y=np.arange(50))
    run("fit", "x.npz", "--model", "autoencoder", "--ignore", "y", "--out", "run", "--epochs", 2, "--layers",
        '[4, [6, "relu"], [4, "tied"]]', "--hidden-l1", "1e-3")  # fmt: skip
    assert list(rows(run("predict", "run", "x.npz").stdout)[0]) == ["X[0]", "X[1]", "X[2]", "X[3]"]
    assert list(rows(run("predict", "run", "x.npz", "--code").stdout)[0]) == [f"code[{n}]" for n in range(6)]
    (line,) = [line for line in run("explain", "run").stdout.splitlines() if line.startswith("out")]
    assert line.split()[:5] == ["out", "tied", "4", "linear", "4"]  # its bias; the weight is hid1's


def test_numbers_as_classes_and_as_categories(here):
    frame().assign(y=lambda t: t.age % 3, zip=lambda t: t.age % 5).to_csv("data.csv", index=False)
    fit("--categories", "zip", "--ignore", "age,wage")
    assert rs.load("run").classes_.tolist() == [0, 1, 2]
    notes = files.read_notes("run")
    assert [one["name"] for one in notes["encoding"]["features"]] == ["color", "zip"]
    assert notes["encoding"]["features"][1]["values"] == ["0", "1", "2", "3", "4"]
    assert {row["y"] for row in rows(run("predict", "run", "data.csv").stdout)} <= {"0", "1", "2"}
    json.dumps(notes)


def test_missing_values(here):
    table = frame()
    table.loc[3, "age"], table.loc[5, "color"] = np.nan, None
    table.to_csv("holes.csv", index=False)
    message = fit(data="holes.csv", code=1).stderr
    assert message == (
        "Error: holes.csv, row 4, column 'age': the value is missing; fill it in, leave the column out, or fit with "
        "--missing fill, or --drop-missing\n"
    )
    fit("--missing", "fill", data="holes.csv")
    run("predict", "run", "holes.csv")


def test_unknown_values_and_columns(here):
    fit()
    frame(10, 2).assign(extra=1, color="mauve").to_csv("odd.csv", index=False)
    assert (
        "odd.csv, row 1, column 'color': 'mauve' was not there in training"
        in run("predict", "run", "odd.csv", code=1).stderr
    )
    result = run("predict", "run", "odd.csv", "--unknown", "zeros")
    assert "Note: odd.csv has columns that the model doesn't use: extra" in result.stderr
    frame(10, 2).drop(columns="age").to_csv("less.csv", index=False)
    assert "the model needs the columns 'age'" in run("predict", "run", "less.csv", code=1).stderr


def test_validation_from_a_file(here):
    fit("--valid", "new.csv", "--patience", "1")
    assert files.read_notes("run")["rows"] == [120, 30]


def test_plan_and_other_keywords(here):
    (here / "plan.yaml").write_text(
        "rules:\n- what: l1\n  strength: 1e-3\n  'on': hid1.weight\n  how: proximal\n"
        "- what: {name: gaussiannoise, std: 0.1}\n  'on': {inputs: ''}\n"
    )
    fit("--plan", "plan.yaml", "--set", "grouplasso=1e-3", "--weight-l2", "strength=1e-4,on=out.weight",
        "--noise", "hid*=0.1", "--dropout", "hid1=0.2", "--nonnegative", "out.weight", "--no-normalize")  # fmt: skip
    model = rs.load("run")
    assert model.grouplasso == 1e-3
    assert model.weight_l2 == {"strength": 1e-4, "on": "out.weight"}
    assert not model.normalize
    assert (model.module_.out.weight >= 0).all()
    before = {name: tensor.clone() for name, tensor in model.module_.state_dict().items()}
    text = run("explain", "run").stdout
    for said in ("proximal", "grouplasso", "noise hid*", "dropout hid1", "nonnegative", "weight_l2"):
        assert said in text
    explain.rules(model)
    assert all(before[name].equal(tensor) for name, tensor in model.module_.state_dict().items())


def test_zeros_are_counted(here):
    fit("--weight-l1", "10", "--how", "proximal")
    text = run("explain", "run").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("hid1")]
    assert line.split()[:6] == ["hid1", "dense", "8", "relu", "48", "40"]
    assert "Warning:" in fit("--weight-l1", "10", "--how", "proximal", "--overwrite").stderr


def test_curves_as_a_picture(here):
    fit("--valid", "0.2", "--validate-every", "2")
    run("explain", "run", "--picture", "curves.png")
    assert (here / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run("explain", "run", "--ascii").stdout.replace("…", "").isascii()
    assert "a picture ends in ." in run("explain", "run", "--picture", "curves.xyz", code=1).stderr
    assert "no/curves.png can't be written" in run("explain", "run", "--picture", "no/curves.png", code=1).stderr


def test_the_same_seed_gives_the_same_model(here):
    for out in ("a/", "b/"):
        fit("--valid", "0.2", "--seed", "7", out=out)
    assert files.read("a", "model")[0]["learned"] == files.read("b", "model")[0]["learned"]
    assert run("predict", "a", "new.csv").stdout == run("predict", "b", "new.csv").stdout


def test_resume_leaves_only_the_model(here):
    fit("--resume")
    assert [path.name for path in (here / "run").iterdir()] == ["model.safetensors"]
    fit(out="plain/")
    assert rs.load("run").module_.out.weight.equal(rs.load("plain").module_.out.weight)


def test_a_killed_fit_goes_on(here):
    """SIGKILL in the middle; the same command again gives what an undisturbed one gives."""
    words = [
        "fit",
        "data.csv",
        "--target",
        "y",
        "--model",
        "classifier",
        "--hidden",
        "8",
        "--epochs",
        "120",
        "--resume",
    ]
    found = {**os.environ, "PYTHONPATH": str(Path(rs.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-m", "restrain", *words, "--out", "run/"], env=found)
    checkpoint = here / "run" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0, "it was done before it could be killed"
    assert checkpoint.exists()
    assert not (here / "run" / "model.safetensors").exists()
    run(*words, "--out", "run/")
    assert not checkpoint.exists()
    run(*words[:-1], "--out", "plain/")
    assert files.read("run", "model")[0]["learned"] == files.read("plain", "model")[0]["learned"]
    assert rs.load("run").module_.out.weight.equal(rs.load("plain").module_.out.weight)


# What is refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--target", "age"), "a classifier has one --target, got 2: y, age"),
        (("--target", "age,wage"), "--target y --ignore age,wage"),
        (("--set", "valid=0.2"), "write --valid"),
        (("--set", "normalize=true"), "write --normalize or --no-normalize"),
        (("--decimal", ",", "--thousands", ","), "both be marked by"),
        (("--ignore", "colour"), "data.csv has no column 'colour' (near it: color); there are: age, color, wage, y"),
        (("--categories", "zip"), "has no column 'zip'"),
        (("--ignore", "age,color,wage"), "no column left to learn from"),
        (("--hidden", "0"), "expected whole numbers above zero"),
        (("--hidden", "ten"), "expected whole numbers above zero"),
        (("--layers", "[4"), "expected JSON"),
        (("--layers", "[5, 3]"), "--layers and --hidden exclude each other"),
        (("--valid", "1.5"), "a part between 0 and 1"),
        (("--valid", "none.csv"), "neither"),
        (("--weight-l1", "-1"), "zero or more"),
        (("--weight-l1", "much"), "zero or more, got 'much'"),
        (("--weight-l1", "strength="), "k=v"),
        (("--hidden-dropout", "1"), "from 0 to below 1, got '1'"),
        (("--dropout", "0.3"), "a glob over layers and a number"),
        (("--dropout", "hid*=1.5"), "from 0 to below 1"),
        (("--set", "epochs"), "expected keyword=value"),
        (("--set", "epochs=4"), "says again what --epochs says"),
        (("--epochs", "0"), "0 is not in the range"),
        (("--plan", "none.yaml"), "does not exist"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_command_lines_that_cannot_be(here, more, said):
    assert said in " ".join(fit(*more, code=2).stderr.split())
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit", "none.csv", "--model", "classifier", "--out", "run"), "does not exist"),
        (("fit", "data.csv", "--out", "run", "--target", "y"), "Missing option '--model'"),
        (("fit", "data.csv", "--out", "run", "--model", "regressor"), "a regressor has a --target"),
        (("fit", "data.csv", "--out", "run", "--model", "autoencoder", "--target", "y"), "has no --target"),
        (("fit", "data.csv", "--out", "run", "--model", "classifier", "--target", "z"), "has no column 'z'"),
        (("nothing",), "No such command"),
    ],
)
def test_commands_that_cannot_be(here, arguments, said):
    assert said in " ".join(run(*arguments, code=2).stderr.split())


def test_failures(here):
    assert "row 1, column 'y': expected a number, got" in fit(model="regressor", code=1).stderr
    assert "no keyword 'no_such'" in fit("--set", "no_such=1", code=1).stderr
    assert "matches no" in fit("--noise", "other*=0.1", code=1).stderr
    assert "needs validation data" in fit("--patience", "3", code=1).stderr
    for text in ("", "rules: 3", "rules: [{what: l9}]", "a: [", "[]"):
        (here / "plan.yaml").write_text(text)
        assert "plan.yaml" in fit("--plan", "plan.yaml", code=1).stderr
    diverging = ("--algo", "sgd", "--learning-rate", "1e30", "--no-normalize", "--ignore", "y")
    assert "the loss is" in fit(*diverging, model="regressor", target="wage", code=1).stderr
    assert not list(here.glob("run/*"))


def test_quantities_are_no_classes(here):
    frame(160).assign(y=np.arange(160) // 3).to_csv("data.csv", index=False)
    assert "54 different numbers in 160 rows, too many for classes" in fit(code=1).stderr
    frame(160).assign(y=np.arange(160) // 5).to_csv("data.csv", index=False)
    fit()
    assert "No rules.\n" in run("explain", "run").stdout
    run("fit", "data.csv", "--target", "y", "--model", "regressor", "--hidden", "4", "--out", "own")
    assert "No rules, but for fit's own: a small weight_l2" in run("explain", "own").stdout


def test_models_that_are_none(here):
    assert "no file" in run("predict", "run", "new.csv", code=1).stderr
    (here / "junk").write_text("junk, more of it")
    assert "isn't a file of restrain" in run("explain", "junk", code=1).stderr
    rs.Classifier(hidden=((3, "rnn"),), epochs=1).fit(np.ones((4, 2, 1)), [0, 1, 0, 1]).save("m")
    assert "m reads sequences" in run("predict", "m", "new.csv", code=1).stderr


# Models that were fitted in Python

MIXED = ["age", "color", "wage"]


def test_a_model_fitted_to_a_frame_in_python(here):
    table, new = frame(), frame(30, 1)
    model = rs.Classifier(hidden=(4,), epochs=3, random_state=0).fit(table[MIXED], table.y)
    model.save("m")
    expected, p = model.predict(new[MIXED]), model.predict_proba(new[MIXED])
    result = run("predict", "m", "new.csv", "--proba")
    found = rows(result.stdout)
    assert [row["prediction"] for row in found] == expected.tolist()
    np.testing.assert_allclose([float(row["p(low)"]) for row in found], p[:, 1], rtol=1e-6)
    assert "doesn't use: y" in result.stderr
    result = run("predict", "m", "new.csv", "--target", "y")
    assert [row["y"] for row in rows(result.stdout)] == expected.tolist()
    assert f"accuracy {(expected == new.y).mean():.4f} on 30 rows" in result.stderr
    told = run("explain", "m", "new.csv", "--target", "y").stdout
    assert "not known: fitted in Python" in told
    assert "importance on new.csv" in told
    assert "write --target" in run("explain", "m", "new.csv", code=1).stderr
    assert "fitted in Python" not in run("report", "m").stderr
    assert (here / "report.html").exists()
    new.assign(color="pink").to_csv("pink.csv", index=False)
    assert "'pink' was not there in training" in run("predict", "m", "pink.csv", code=1).stderr


def test_a_model_fitted_to_numbers_in_python(here):
    table, new = frame(), frame(30, 1)
    model = rs.Regressor(hidden=(4,), epochs=3, random_state=0).fit(table[["wage", "age"]], table.age)
    model.save("named")  # columns by name, whatever their order in the table
    found = [float(row["prediction"]) for row in rows(run("predict", "named", "new.csv").stdout)]
    np.testing.assert_allclose(found, model.predict(new[["wage", "age"]]), rtol=1e-6)
    x, y = table[["age", "wage"]].to_numpy(), np.stack([table.age, table.wage], 1)
    model = rs.Regressor(hidden=(4,), epochs=3, random_state=0).fit(x, y)
    model.save("array")
    said = run("predict", "array", "new.csv", code=1).stderr
    assert "array of 2 columns without names" in said
    assert "call them x0 to x1" in said
    expected = model.predict(new[["age", "wage"]].to_numpy())
    new[["wage", "age"]].set_axis(["x1", "x0"], axis=1).to_csv("x.csv", index=False)
    np.savez("x.npz", X=new[["age", "wage"]].to_numpy())
    for file in ("x.csv", "x.npz"):
        found = rows(run("predict", "array", file).stdout)
        np.testing.assert_allclose([[float(r["prediction[0]"]), float(r["prediction[1]"])] for r in found], expected)
    bands = rs.Regressor(hidden=(), loss="quantile", quantiles=[0.1, 0.9], epochs=3).fit(table[["age"]], table.wage)
    bands.save("bands")
    assert [*rows(run("predict", "bands", "new.csv", "--target", "wage").stdout)[0]] == ["wage[0.1]", "wage[0.9]"]
    codes = rs.Autoencoder(hidden=(1,), epochs=3, random_state=0).fit(table[["age", "wage"]])
    codes.save("codes")
    assert [*rows(run("predict", "codes", "new.csv").stdout)[0]] == ["age", "wage"]
    assert "has no target" in run("predict", "codes", "new.csv", "--target", "y", code=1).stderr
    fit()
    assert "was fitted to the target y" in run("predict", "run", "new.csv", "--target", "age", code=1).stderr


def test_options_for_another_kind(here):
    fit()
    assert "is for a model of the kind autoencoder" in run("predict", "run", "new.csv", "--code", code=2).stderr
    assert "written to .csv" in run("predict", "run", "new.csv", "--out", "found.txt", code=1).stderr


def test_models_are_not_overwritten_unasked(here):
    fit()
    assert "is there already: write --overwrite" in fit(code=2).stderr
    fit("--overwrite")


# Help


def test_help_shows_examples():
    for arguments in ((), ("check",), ("fit",), ("predict",), ("explain",), ("path",), ("demo",)):
        text = run(*arguments, "--help").stdout
        assert f"restrain {arguments[0] if arguments else 'fit'} " in text.partition("Example")[2]
        assert "Exit codes: 0 fine, 1 failed" in text
    assert rs.__version__ in run("--version").stdout


def test_examples_of_the_help_are_command_lines(here):
    """Each example parses, with files that exist."""
    for name in ("check", "fit", "predict", "explain", "path", "demo"):
        text = run(name, "--help").stdout.partition("Example")[2].partition("Options:")[0].replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("restrain ")]
        assert lines
        for line in lines:
            words = shlex.split(line)[2:]
            for word in words:
                if "." in word and not word[0].isdigit():
                    (here / word).touch()
            with command.commands[name].make_context(name, words):
                pass


def test_every_keyword_option_is_a_keyword():
    known = set(rs.Classifier().get_params())
    assert {*options.TRAINING, *options.RULES, "noise", "dropout", "nonnegative", "layers", "hidden"} <= known
    assert known >= set(DEFAULTS)
    flags = {flag for parameter in command.commands["fit"].params for flag in parameter.opts}
    assert {"--" + name.replace("_", "-") for name in (*options.TRAINING, *options.RULES)} <= flags


def test_as_a_process(here):
    """The exit codes of the command itself, and no words on standard output but the predictions."""
    fit()
    found = {**os.environ, "PYTHONPATH": str(Path(rs.__file__).parent.parent)}
    for arguments, code in ((["predict", "run", "new.csv"], 0), (["explain", "none"], 1)):
        words = [sys.executable, "-m", "restrain", *arguments]
        process = subprocess.run(words, capture_output=True, text=True, env=found)
        assert process.returncode == code, process.stderr
        assert "Traceback" not in process.stderr
        if code == 0:
            assert process.stdout.splitlines()[0] == "y"
            assert len(process.stdout.splitlines()) == 31


def test_without_the_packages_it_says_what_to_install():
    code = "import sys\nsys.modules['click'] = None\nfrom restrain.cli import main\nmain(['--help'])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    assert "pip install 'restrain[cli]'" in process.stderr
