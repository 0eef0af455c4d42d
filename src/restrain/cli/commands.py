"""Commands of the command line, with their help and exit codes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import restrain as rs
from restrain import storage
from restrain.errors import DataError, RestrainError, RestrainWarning
from restrain.extras import needing

with needing("cli", __name__):
    import click
    import numpy as np

    from restrain.cli import checking, comparing, jobs, options, reporting, tables
    from restrain.cli import explain as explaining
    from restrain.cli import inputs as of_inputs
    from restrain.models import Autoencoder, Classifier, Regressor, adopt, files
    from restrain.tables import Marks, Table, TableEncoder, counted

_READABLE = click.Path(exists=True, dir_okay=False, path_type=Path)
_TABLE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
_FOLDER = click.Path(file_okay=True, path_type=Path)
_CODES = "Exit codes: 0 fine, 1 failed (the message says why), 2 the command line can't be read."


class Group(click.Group):
    """Group of commands that shows errors as one message and warnings as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RestrainWarning)
            warnings.showwarning = lambda message, *place: click.echo(f"Warning: {message}", err=True)
            with _messages():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result


@contextmanager
def _messages() -> Iterator[None]:
    """Context that turns errors for the user into click's, which exit with 1."""
    try:
        yield
    except (click.ClickException, BrokenPipeError):  # of a closed pipe, click exits silently
        raise
    except (DataError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except (RestrainError, ValueError) as error:
        raise click.ClickException(options.in_options(str(error))) from error
    except ImportError as error:
        raise click.ClickException(f"{error}; the command line needs: pip install 'restrain[cli]'") from error


@click.group(cls=Group, epilog=_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rs.__version__, prog_name="restrain")
def restrain() -> None:
    """Fit regularised networks to tables, and inspect the results.

    \b
    Examples:
      restrain check data.csv --target y
      restrain fit data.csv --target y --model classifier --hidden 100 \\
          --weight-l1 1e-4 --hidden-dropout 0.3 --valid 0.2 --out run/
      restrain predict run/ new.csv --out predictions.csv
      restrain explain run/ new.csv --report page.html
      restrain report run/
      restrain cv data.csv --target y --model classifier --hidden 100
      restrain compare data.csv --target y --model classifier \\
          --try '--hidden none' --try '--hidden 100 --weight-l2 1e-3'
      restrain path data.csv --target y --select inputs
      restrain demo
    """


@restrain.command(epilog=_CODES)
@click.argument("data", type=_TABLE, nargs=-1, required=True)
@click.option("--target", multiple=True, help="The column to predict; several for a regressor.")
@click.option("--model", type=click.Choice(["classifier", "regressor", "autoencoder"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write the model into.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is there already.")
@click.option("--hidden", type=options.Sizes(), help="Hidden layers, as in 100,50 or 100:tanh; 100, unless given.")
@click.option("--activation", help="Of hidden layers that say none; relu, unless given.")
@click.option("--layers", type=options.Json(), help="All layers in JSON, the input first, instead of --hidden.")
@click.option("--valid", type=options.Valid(), help="The part of the rows to validate with, a file of others, or none.")
@options.table_options
@click.option("--plan", type=_READABLE, help="Rules in a .yaml, .toml or .json file.")
@click.option(
    "--how", type=click.Choice(["loss", "gradient", "decoupled", "proximal"]), help="When penalties on weights act."
)
@options.keyword_options
@click.option("--noise", multiple=True, type=options.Pattern(), help="Noise on layers, as in 'hid*=0.1'.")
@click.option("--dropout", multiple=True, type=options.Pattern(), help="Dropout in layers, as in 'hid*=0.3'.")
@click.option("--nonnegative", metavar="GLOB", help="Parameters that stay zero or more, as 'out.weight'; or 'all'.")
@click.option(
    "--set",
    multiple=True,
    type=options.Setting(),
    help="Any other keyword, as grouplasso=1e-3 or grouplasso=strength=1e-3,per=in.",
)
@click.option("--resume", is_flag=True, help="Keep a checkpoint, and go on from one that a killed run left.")
def fit(data: tuple[Path, ...], **given: Any) -> None:
    """Fit a model to the table DATA: .csv, .tsv, .txt, .xlsx, .parquet or .npz, several files with
    the same columns, or - for standard input.

    A column of text is a category, with one input for each value; other columns are numbers, or
    dates: days since 1970-01-01, and their places in year, week and day. Values of a category are
    equal if their texts are equal, but 1.0 equals 1, and yes, true and 1 are equal in a column of
    two values that mean true and false. Leading zeros count: 01 isn't 1. `restrain check` looks at
    a table first. Strengths are numbers, or settings such as
    strength=1e-4,on=hid1.weight,how=proximal.

    Without --valid and --epochs a fifth of the rows is held back, and ends the training.

    \b
    Examples:
      restrain fit data.csv --target y --model classifier --hidden 100 \\
          --weight-l1 1e-4 --hidden-dropout 0.3 --valid 0.2 --out run/
      restrain fit houses.parquet --target price --model regressor \\
          --hidden 64,32 --weight-l2 1e-4 --valid 0.2 --patience 5 --out run/
      restrain fit messwerte.csv --separator ';' --decimal , --encoding latin-1 \\
          --na-values -99 --drop-missing --target y --model regressor --out run/
      restrain fit digits.npz --model autoencoder --ignore y \\
          --layers '[64, [200, "relu"], [64, "tied"]]' --hidden-l1 1e-3 --out run/
      restrain fit data.csv --target y --model classifier --plan plan.yaml --out run/
    """
    _check_targets(given)
    marks = options.marks_of(given)
    keywords = options.keywords_of(given)
    if given["plan"] is not None:
        keywords["regularizers"] = list(rs.Plan.load(given["plan"]))
    file = files.place(f"{given['out']}/")
    if file.exists() and not given["overwrite"]:
        raise click.UsageError(f"{file} is there already: write --overwrite, or another --out")
    table, features, notes = _features(data, given, marks)
    y = jobs.targets(table, given["model"], notes["targets"])
    model = _model(given, keywords, file)
    ready, other = _prepared(model, table, features, y, given, notes, marks)
    notes.update(encoding=ready.encoding.to_dict(), marks=options.told_marks(marks))
    columns, inputs = counted(len(features), "column"), counted(ready.x.shape[1], "input")
    become = "becomes" if len(features) == 1 else "become"
    click.echo(f"{table.source}: {counted(len(table), 'row')}, {columns} that {become} {inputs}")
    _tell_dates(ready.encoding)
    storage.make_folder(file.parent)
    notes["scores"] = jobs.fit(model, ready, other)
    for name, score in notes["scores"].items():
        click.echo(f"{jobs.measure(model)} in {name}: {score:.4f}")
    adopt(model, TableEncoder.of(ready.encoding, categories=notes["categories"]))
    _finish(model, file, notes)


def _prepared(
    model: Any, table: Table, features: list[str], y: Any, given: dict[str, Any], notes: dict[str, Any], marks: Marks
) -> tuple[jobs.Data, Any]:
    """Return training data, and validation data of their own or None; note the numbers of rows."""
    classes, part = given["model"] == "classifier", given["valid"] if isinstance(given["valid"], float) else None
    automatic = given["valid"] is None
    if automatic:
        part = model.held_part(len(table), y if classes else None)
    learning = {"categories": notes["categories"], "missing": given["missing"], "quiet": automatic}
    ready = jobs.prepare(table, features, y, valid=part, seed=given["seed"], classes=classes, **learning)
    other = _other(given["valid"], ready, notes, marks) if isinstance(given["valid"], Path) else None
    held = len(ready.valid) if ready.valid is not None else 0 if other is None else len(_inputs(other))
    notes["rows"] = [len(ready.train), held]
    if automatic and held:
        click.echo(
            f"held back: {held} of {counted(len(table), 'row')} to validate with, which end the training (--valid "
            "says otherwise)"
        )
    return ready, other


def _tell_dates(encoding: Any) -> None:
    for feature in encoding.features:
        if feature.cycles is not None:
            places = f", and places in {' and '.join(feature.cycles)}" if feature.cycles else ""
            click.echo(f"Note: {feature.name} is read as dates: days since 1970-01-01{places}")


@restrain.command(epilog=_CODES)
@click.argument("data", type=_TABLE, nargs=-1, required=True)
@click.option("--target", multiple=True, help="The column to predict; several for a regressor.")
@click.option("--categories", multiple=True, metavar="COLUMN", help="A column of numbers that are categories.")
@click.option("--ignore", multiple=True, metavar="COLUMN", help="A column to leave out.")
@options.marks_options
def check(data: tuple[Path, ...], **given: Any) -> None:
    """Check the table DATA before a fit: kinds of columns, gaps, constants, copies, leaks.

    Shown are each column's kind, number of values, gaps and range; columns that can't be inputs as
    they are, that are constant, say the same as another, or tell the target; equal rows; rare
    classes; and the command to fit with.

    \b
    Examples:
      restrain check data.csv
      restrain check data.csv --target y --ignore id
    """
    marks = options.marks_of(given)
    table = tables.read(data, [part for name in given["categories"] for part in (name, *name.split(","))], marks)
    columns = {
        name: options.chosen(f"--{name}", given[name], list(table.columns), table.source)
        for name in ("target", "ignore", "categories")
    }
    found = checking.check(table, columns["target"], columns["ignore"], columns["categories"])
    command = checking.command_of(table, found, {**given, **columns}, columns["target"], data)
    click.echo(checking.text(table, found, command))


_LINEAR, _NETWORK = ("cv", "jobs"), ("activation", "valid", "epochs", "learning_rate", "batch_size")


@restrain.command("path", epilog=_CODES)
@click.argument("data", type=_TABLE)
@click.option("--target", multiple=True, required=True, help="The column to predict; several for a regressor.")
@click.option("--select", type=click.Choice(["inputs"]), default="inputs", show_default=True, help="What to select.")
@click.option(
    "--model",
    type=click.Choice(["classifier", "regressor"]),
    help="Needed for a target of few whole numbers; else text is classified, and numbers are regressed.",
)
@click.option("--hidden", type=options.Hidden(), default="none", help="Hidden layers, as in 100,50; none: linear.")
@click.option("--points", type=click.IntRange(min=2), default=50, show_default=True, help="Strengths to try.")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=1e-3,
    show_default=True,
    help="The least strength / the greatest.",
)
@click.option("--cv", type=click.IntRange(min=2), help="Folds of a linear model; 5, unless given.")
@click.option("--jobs", type=int, help="Processes for the folds; -1 for all cores.")
@click.option(
    "--valid",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The part of the rows to validate a network with; 0.2, unless given.",
)
@click.option("--activation", help="Of a network's hidden layers; relu, unless given.")
@click.option("--epochs", type=click.IntRange(min=1), help="Of a network at each strength; 20, unless given.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="Adam's; 1e-3, unless given.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows a step of a network; 64, unless given.")
@options.table_options
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="The folder for tables and picture.")
@click.option("--overwrite", is_flag=True, help="Replace a path that is there already.")
def path_of(data: Path, **given: Any) -> None:
    """Select the input columns of the table DATA: a path of models from all columns to none.

    A linear model's path is exact: a lasso, or where a column has several weights (classes,
    several targets, the values of a category) a group lasso, so that each column is used as a whole
    or not at all; scores are over folds. Networks (--hidden) are trained from strength to strength
    under a group lasso on each column's weights, and scored on a part of the rows.

    Shown are the best point, and the point of the fewest columns whose score is within one standard
    error of that. --out takes points.csv, inputs.csv, path.png and the path, which
    restrain.paths.Path.load reads.

    \b
    Examples:
      restrain path data.csv --target y --select inputs
      restrain path houses.parquet --target price --cv 10 --jobs -1 --out path/
      restrain path data.csv --target y --hidden 100 --points 20 --valid 0.3 --out path/
    """
    other = [name for name in (_LINEAR if given["hidden"] else _NETWORK) if given[name] is not None]
    if other:
        kind = "linear models, which --hidden excludes" if given["hidden"] else "networks: write --hidden, as in 100"
        raise click.UsageError(f"--{other[0].replace('_', '-')} is for {kind}")
    out = given["out"]
    if out is not None and (out / "path.pt").exists() and not given["overwrite"]:
        raise click.UsageError(f"{out} has a path already: write --overwrite, or another --out")
    marks = options.marks_of(given)
    if given["model"] is None:
        table = tables.read(data, [], marks)
        wanted = options.chosen("--target", given["target"], list(table.columns), str(data))
        given["model"] = of_inputs.kind_of(table, wanted)
    table, features, notes = _features(data, given, marks)
    y, classes = jobs.targets(table, given["model"], notes["targets"]), given["model"] == "classifier"
    chosen = {"categories": notes["categories"], "missing": given["missing"]}
    ready = jobs.prepare(table, features, y, valid=None, seed=given["seed"], classes=classes, **chosen)
    settings = {name: given[name] for name in ("hidden", "points", "ratio", "normalize", "seed")}
    settings |= {name: given[name] for name in (*_LINEAR, *_NETWORK) if given[name] is not None}
    path = of_inputs.find(ready.x, y, of_inputs.groups_of(ready.encoding), of_inputs.Settings(classes, **settings))
    kind = f"a network of hidden layers {given['hidden']}" if given["hidden"] else "a linear model"
    click.echo(
        f"{table.source}: {counted(len(table), 'row')}, {counted(len(features), 'column')}; {kind}, {given['model']}"
    )
    click.echo(of_inputs.text(path, features, classes))
    if out is not None:
        of_inputs.write(path, features, out)
        click.echo(f"written: {out}")


def _finish(model: Any, file: Path, notes: dict[str, Any]) -> None:
    """Write the model to its file, and remove its checkpoint."""
    checkpoint, model.checkpoint = model.checkpoint, None
    files.save(model, file, notes)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    click.echo(f"written: {file}")


def _check_targets(given: dict[str, Any]) -> None:
    count, model = len(given["target"]), given["model"]
    if model == "autoencoder" and count:
        raise click.UsageError("an autoencoder has no --target; leave that column out by --ignore")
    if model == "classifier" and not count:
        raise click.UsageError("a classifier has a --target: write --target COLUMN")
    if model == "regressor" and not count:
        raise click.UsageError("a regressor has a --target, or several: write --target COLUMN")


def _features(
    data: Path | tuple[Path, ...], given: dict[str, Any], marks: Marks
) -> tuple[Table, list[str], dict[str, Any]]:
    """Return (table, names of the input columns, notes for the model's file)."""
    texts = [*given["categories"], *(given["target"] if given["model"] == "classifier" else ())]
    table = tables.read(data, [part for name in texts for part in (name, *name.split(","))], marks)
    there, source = list(table.columns), table.source
    ignored = options.chosen("--ignore", given["ignore"], there, source)
    categories = options.chosen("--categories", given["categories"], there, source)
    wanted = options.chosen("--target", given["target"], there, source)
    if given["model"] == "classifier" and len(wanted) != 1:
        raise click.UsageError(
            f"a classifier has one --target, got {len(wanted)}: {', '.join(wanted)}; write one of them, and leave the "
            f"others out by --ignore: --target {wanted[0]} --ignore {','.join(wanted[1:])}"
        )
    features = [name for name in there if name not in (*ignored, *wanted)]
    if not features:
        raise click.UsageError(f"{source} has no column left to learn from")
    if given["drop_missing"]:
        table, said = jobs.complete(table, [*features, *wanted])
        if said:
            click.echo(said)
    return (
        table,
        features,
        {
            "model": given["model"],
            "data": source,
            "targets": list(wanted),
            "ignored": list(ignored),
            "categories": list(categories),
        },
    )


def _other(path: Path, ready: jobs.Data, notes: dict[str, Any], marks: Marks) -> Any:
    """Return validation data from a file of their own, in the form of `fit`'s argument `valid`."""
    classes = notes["model"] == "classifier"
    table = tables.read(path, [*ready.encoding.categories, *(notes["targets"] if classes else [])], marks)
    known = np.unique(ready.y) if classes else None
    x, y = ready.encoding.apply(table), jobs.targets(table, notes["model"], notes["targets"], known)
    return x if y is None else (x, y)


def _inputs(data: Any) -> Any:
    return data[0] if isinstance(data, tuple) else data


def _model(given: dict[str, Any], keywords: dict[str, Any], file: Path) -> Any:
    if given["resume"]:
        keywords["checkpoint"] = str(file.with_name("checkpoint.pt"))
    if given["valid"] == "none":
        keywords["valid"] = None
    kinds = {"classifier": Classifier, "regressor": Regressor, "autoencoder": Autoencoder}
    return kinds[given["model"]](normalize=given["normalize"], random_state=given["seed"], **keywords)


_target_of_python = click.option(
    "--target", multiple=True, metavar="COLUMN", help="The target, of a model that was fitted in Python."
)


@restrain.command(epilog=_CODES)
@click.argument("model", type=_FOLDER)
@click.argument("data", type=_TABLE, nargs=-1, required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A .csv, .tsv, .parquet or .npz file.")
@click.option("--proba", is_flag=True, help="The probability of each class too.")
@click.option("--code", is_flag=True, help="An autoencoder's code instead of its reconstruction.")
@click.option(
    "--unknown",
    type=click.Choice(["error", "zeros"]),
    default="error",
    show_default=True,
    help="Values of a category that training never saw: refuse them, or take them as none of the known ones.",
)
@_target_of_python
@options.marks_options
def predict(
    model: Path,
    data: tuple[Path, ...],
    out: Path | None,
    proba: bool,
    code: bool,
    unknown: Any,
    target: tuple[str, ...],
    **given: Any,
) -> None:
    """Predict the rows of the table DATA by the model in the folder MODEL.

    Predictions go to standard output as CSV, or to --out; notes go to standard error. If the table
    has the target, too, the score is shown. DATA may be several files, or - for standard input.
    Numbers, dates and gaps are read as in the training, unless options say otherwise.

    MODEL may also be a file that model.save(path) wrote in Python. A model that was fitted to a
    data frame takes a table with its columns.

    \b
    Examples:
      restrain predict run/ new.csv
      restrain predict run/ new.csv --proba --out predictions.parquet
      restrain predict model.safetensors new.csv --target y
    """
    run = jobs.Run.load(model, target)
    kind = run.notes["model"]
    for flag, wanted, asked in (("--proba", "classifier", proba), ("--code", "autoencoder", code)):
        if asked and kind != wanted:
            raise click.UsageError(f"{flag} is for a model of the kind {wanted}; this is of the kind {kind}")
    table = run.read(data, options.marks_of(given, run.notes.get("marks")))
    unused = run.unused(table)
    if unused:
        click.echo(f"Note: {table.source} has columns that the model doesn't use: {', '.join(unused)}", err=True)
    x = run.encoding.apply(table, unknown)
    jobs.write(run.predict(x, proba, code), out, sys.stdout)
    score = run.score(table, x)
    if score is not None:
        click.echo(score, err=True)
    if out is not None:
        click.echo(f"written: {out}", err=True)


@restrain.command(epilog=_CODES)
@click.argument("model", type=_FOLDER)
@click.argument("data", type=_READABLE, required=False)
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves into this file.")
@click.option("--report", type=options.Page(), help="Write all of it, with charts, as one HTML page.")
@click.option("--overwrite", is_flag=True, help="Replace a page that is there already.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the shuffles of columns.")
@click.option("--ascii", "plain", is_flag=True, help="No signs beyond ASCII in the curves.")
@_target_of_python
@options.marks_options
def explain(model: Path, data: Path | None, **given: Any) -> None:
    """Show the model in the folder MODEL: layers and their zeros, rules, training curves.

    Of a table DATA that has the target, too, best one that the model wasn't fitted to, it also
    shows the columns by importance (by how much the score falls when a column is shuffled), the
    confusion of classes or the residuals, and the calibration. A --picture and a --report draw
    training and validation on one axis, with the best epoch marked.

    \b
    Examples:
      restrain explain run/
      restrain explain run/ --picture curves.png
      restrain explain run/ new.csv --report page.html
    """
    options.refuse_present(given["report"], overwrite=given["overwrite"])
    run = jobs.Run.load(model, given["target"])
    marks = options.marks_of(given, run.notes.get("marks"))
    seen = None if data is None else explaining.look(run, data, marks, given["seed"])
    click.echo(explaining.explain(run, given["plain"] or not _can_write("▁█…"), seen))
    if given["picture"] is not None:
        click.echo(f"\nwritten: {explaining.draw(run, given['picture'])}")
    if given["report"] is not None:
        click.echo(f"\nwritten: {explaining.report(run, given['report'], seen)}")


@restrain.command("report", epilog=_CODES)
@click.argument("folder", type=_FOLDER)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="The page; FOLDER/report.html, unless given."
)
@click.option(
    "--path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The folder of a path to show, too."
)
@click.option("--images", type=click.IntRange(min=1), nargs=2, help="Height and width, where the inputs are images.")
@click.option("--overwrite", is_flag=True, help="Replace a page that is there already.")
def report_of(
    folder: Path, out: Path | None, path: Path | None, images: tuple[int, int] | None, overwrite: bool
) -> None:
    """Write a page about the model, or the path, in FOLDER: one HTML file that loads nothing.

    It shows rules, curves, zeros by layer, histograms, features and warnings; of a path a slider
    with scores, weights and the selected columns.

    \b
    Examples:
      restrain report run/
      restrain report run/ --path path/ --out report.html
      restrain report digits/ --images 8 8
    """
    if path is not None and reporting.has_path(folder):
        raise click.UsageError(f"{folder} is a path itself: leave out --path")
    file = (folder.parent if folder.is_file() else folder) / "report.html" if out is None else out
    if file.exists() and not overwrite:
        raise click.UsageError(f"{file} is there already: write --overwrite, or another --out")
    reporting.write(folder, file, path, images)
    click.echo(f"written: {file}")


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


@restrain.command(epilog=_CODES)
@click.option("--out", type=click.Path(path_type=Path), default="demo-output", show_default=True)
def demo(out: Path) -> None:
    """Run a tour on handwritten digits; pictures go into a folder.

    \b
    Example:
      restrain demo --out pictures
    """
    from restrain import demo as tour

    tour.main(["--out", str(out)])


# ---------------------------------------------------------------- models over folds


_OF_MODELS = {"hidden", "activation", "layers", "plan", "how", "noise", "dropout", "nonnegative", "set"}


def _model_options() -> list[click.Parameter]:
    """Return the options of `restrain fit` that say what a model is and how it is trained."""
    known = {*_OF_MODELS, *options.TRAINING, *options.RULES}
    found: list[click.Parameter] = [
        click.Option(
            ["--hidden"], type=options.Hidden(), help="Hidden layers, as in 100,50; none: linear; 100, unless given."
        ),
        click.Option(["--valid"], type=click.FloatRange(0, 1), help="The part of the rows to stop early by."),
    ]
    return found + [one for one in fit.params if one.name in known - {"hidden"}]


def _made(given: dict[str, Any], model: str, *, normalize: bool, seed: int) -> Any:
    """Return a function that makes the model which options describe; it is tried once."""
    keywords = options.keywords_of(given)
    if given["plan"] is not None:
        keywords["regularizers"] = list(rs.Plan.load(given["plan"]))
    if given["valid"] is not None:
        keywords["valid"] = given["valid"]
    cls = Classifier if model == "classifier" else Regressor

    def make() -> Any:
        return cls(normalize=normalize, random_state=seed, progress=False, **keywords)

    make()
    return make


def _folded(data: Path, given: dict[str, Any], makes: dict[str, Any]) -> list[comparing.Scores]:
    """Return the scores of models over the folds of a table, and say what the table is."""
    _check_targets(given)
    table, features, notes = _features(data, given, options.marks_of(given))
    classes = given["model"] == "classifier"
    y = jobs.targets(table, given["model"], notes["targets"])
    folds = comparing.folds_of(y, given["folds"], given["repeats"], given["seed"], classes=classes)
    learning = {"categories": notes["categories"], "missing": given["missing"]}
    scores = comparing.score(table, features, y, folds, makes, given["jobs"], **learning)
    click.echo(
        f"{data}: {counted(len(table), 'row')}, {counted(len(features), 'column')}; {given['model']}, "
        f"{counted(len(folds), 'fold')}\n"
    )
    return scores


def _finish_folds(scores: list[comparing.Scores], data: Path, given: dict[str, Any]) -> None:
    click.echo("± is the standard error of a mean over folds that share their training rows (Nadeau and Bengio, 2003).")
    if given["report"] is not None:
        click.echo(f"\nwritten: {reporting.write_scores(scores, data, given['report'])}")


def _fold_options(command: Any) -> Any:
    """Add the options of `cv` and `compare` to a command."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace a page that is there already."),
        click.option("--report", type=options.Page(), help="Write the tables, with a chart, as one HTML page."),
        options.table_options,
        click.option("--jobs", type=int, help="Processes; -1 for all cores."),
        click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Of all folds."),
        click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Parts of the rows."),
        click.option("--model", type=click.Choice(["classifier", "regressor"]), required=True),
        click.option("--target", multiple=True, required=True, help="The column to predict; several for a regressor."),
        click.argument("data", type=_READABLE),
    ):
        command = option(command)
    return command


@restrain.command("cv", epilog=_CODES)
@_fold_options
def cv_of(data: Path, **given: Any) -> None:
    """Score a model by cross-validation on the table DATA.

    The rows are cut into --folds parts, of classes in proportion; a model is fitted to all parts
    but one and scored on that one. Scales, and means for missing values, are learned from the
    training rows of each fold. Options of the model are those of `restrain fit`.

    \b
    Examples:
      restrain cv data.csv --target y --model classifier --hidden 100 --weight-l2 1e-4
      restrain cv houses.csv --target price --model regressor --hidden none --folds 10 --jobs -1
    """
    options.refuse_present(given["report"], overwrite=given["overwrite"])
    make = _made(given, given["model"], normalize=given["normalize"], seed=given["seed"])
    scores = _folded(data, given, {"the model": make})
    click.echo(comparing.as_text(comparing.folds_table(scores[0])))
    click.echo("\n" + comparing.as_text(comparing.table_of(scores)))
    _finish_folds(scores, data, given)


cv_of.params[-1:-1] = _model_options()


@restrain.command("compare", epilog=_CODES)
@_fold_options
@click.option("--try", "tries", multiple=True, required=True, metavar="OPTIONS", help="A model: options of cv.")
def compare(data: Path, tries: tuple[str, ...], **given: Any) -> None:
    """Compare models, or plans, on the same folds of the table DATA, side by side.

    Each --try holds the options of one model, as `restrain cv` takes them, in quotes; '' is the
    default model. Differences are to the first one, fold by fold, so that what all models find hard
    cancels, with the standard error of their mean.

    \b
    Examples:
      restrain compare data.csv --target y --model classifier --try '' \\
          --try '--hidden none' --try '--hidden 100 --hidden-dropout 0.3' --report page.html
      restrain compare data.csv --target y --model classifier --folds 10 --jobs -1 \\
          --try '--plan weak.yaml' --try '--plan strong.yaml'
    """
    options.refuse_present(given["report"], overwrite=given["overwrite"])
    if len(tries) < 2 or len(set(tries)) < len(tries):
        raise click.UsageError("compare takes two or more models, each by a --try of its own; for one there is cv")
    parser, makes = click.Command("--try", params=_model_options(), add_help_option=False), {}
    for text in tries:
        params = parser.make_context("--try", comparing.words(text)).params
        makes[text or "(as it is)"] = _made(params, given["model"], normalize=given["normalize"], seed=given["seed"])
    scores = _folded(data, given, makes)
    click.echo(comparing.as_text(comparing.table_of(scores)))
    click.echo("\n" + comparing.verdict(scores))
    _finish_folds(scores, data, given)
