"""Work of `restrain report`: a page about a model of `restrain fit` or a path."""

from __future__ import annotations

import csv
from pathlib import Path as FilePath

from restrain.cli.comparing import Scores, folds_table, right_of, table_of, verdict
from restrain.cli.drawing import compared
from restrain.cli.jobs import Run, measure
from restrain.errors import DataError
from restrain.paths import Path
from restrain.report import Content, Part, environment
from restrain.report import write as write_page
from restrain.tables import counted


def write_scores(scores: list[Scores], data: FilePath, file: FilePath) -> FilePath:
    """Write a page with the scores of models over folds; return its path."""
    score, table = scores[0].measures[0], table_of(scores)
    right = tuple(right_of(table[0]))
    told = verdict(scores) if len(scores) > 1 else "Points are folds; bars are standard errors."
    size = (4.8, 1.2 + 0.35 * len(scores))
    parts = [Part("models", "Models", told, table, right, lambda axes: compared(axes[0], scores, score), size)]
    for number, one in enumerate(scores, 1):
        title = f"Folds of {number}: {one.name}" if len(scores) > 1 else "Folds"
        parts.append(Part(f"folds-{number}", title, "", folds_table(one), (0, 1, 2)))
    facts = {"data": str(data), "folds": str(len(scores[0].folds)), "models": str(len(scores))}
    title = f"{counted(len(scores), 'model')} on {data.name}"
    return write_page(Content(title, facts, environment=environment(), parts=parts), file)


def has_path(folder: FilePath) -> bool:
    """Return True if a folder holds a path."""
    return (folder / "path.pt").exists()


def write(folder: FilePath, file: FilePath, path: FilePath | None, images: tuple[int, int] | None) -> FilePath:
    """Write a page about the model or the path in a folder; return its path.

    Args:
        folder: the folder of `restrain fit` or `restrain path`.
        file: the page.
        path: the folder of a path to show with a model.
        images: height and width of images that the inputs are.
    """
    found = None if path is None else Path.load(path)
    if has_path(folder):
        return _of_path(folder, file, images)
    run = Run.load(folder)
    facts = {f"{measure(run.model)} in {part}": f"{score:.4f}" for part, score in run.notes["scores"].items()}
    if run.notes["rows"] is not None:
        facts |= {"data": f"{run.notes['data']}: {counted(run.notes['rows'][0], 'row')} to train on"}
    inputs = None if path is None else _names(path)
    written: FilePath = run.model.report(file, path=found, images=images, inputs=inputs, facts=facts)
    return written


def _of_path(folder: FilePath, file: FilePath, images: tuple[int, int] | None) -> FilePath:
    view, names = Path.load(folder).view(), _names(folder)
    view = view if names is None else view.named(names)
    counts = {name: lines.shape[1] for name, lines in view.lines.items()}
    sizes = {} if images is None else {name: images for name, count in counts.items() if _fits(count, images)}
    if images is not None and not sizes:
        found = ", ".join(map(str, counts.values()))
        raise DataError(f"--images {images[0]} {images[1]} are {images[0] * images[1]} inputs; the path has {found}")
    facts = {"points": str(len(view.strengths)), "best score": f"{view.scores[view.best]:.4g}"}
    content = Content(f"Path in {folder}", facts, path=view, images=sizes, environment=environment())
    return write_page(content, file)


def _fits(count: int, size: tuple[int, int]) -> bool:
    return count == size[0] * size[1]


def _names(folder: FilePath) -> list[str] | None:
    """Return the names of the columns that a path selects among, as `restrain path` writes them."""
    file = folder / "inputs.csv"
    if not file.exists():
        return None
    with file.open(newline="", encoding="utf-8") as stream:
        return [row["input"] for row in csv.DictReader(stream)]
