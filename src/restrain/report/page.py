"""A report as one HTML file that loads nothing: style, charts and script are in it."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from restrain import storage
from restrain.errors import FileError
from restrain.html_table import html_table
from restrain.report import explorer
from restrain.report.advice import advice
from restrain.report.charts import Chart, drawn, features, trainings, weights
from restrain.report.content import Content, Part

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_RIGHT = (2, 3, 4, 6)  # columns of numbers in the table of rules


def write(content: Content, file: str | os.PathLike[str]) -> Path:
    """Write a report, whole or not at all; return its path.

    Raises:
        FileError: the name doesn't end in .html.
        FileAccessError: there is no such folder, no space or no permission.
        MissingExtraError: matplotlib isn't installed.
    """
    path = storage.as_path(file)
    if path.suffix.lower() not in (".html", ".htm"):
        raise FileError(f"a report ends in .html; got {path.name!r}")
    return storage.write(path, page(content).encode())


def page(content: Content) -> str:
    """Return a report as HTML."""
    parts = [(name, title, body) for name, title, make in _SECTIONS if (body := make(content))]
    there = [name for name, _, _ in parts]
    place = there.index("training") + 1 if "training" in there else min(1, len(parts))
    parts[place:place] = [(one.name, one.title, _part(one)) for one in content.parts]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in parts)
    sections = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}\n</section>'
        for name, title, body in parts
    )
    title, script = html.escape(content.title), f"<script>{_file('explorer.js')}</script>" if content.path else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{_file("page.css")}</style>
</head>
<body>
<header><h1>{title}</h1>
{_facts(content)}<nav aria-label="Contents"><ul>{links}</ul></nav></header>
<main>
{sections}
</main>
{script}
</body>
</html>
"""


def _file(name: str) -> str:
    """Return a file of this package."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _facts(content: Content) -> str:
    rows = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in content.facts.items())
    return f'<dl class="facts">{"".join(rows)}</dl>\n' if content.facts else ""


def _scrolling(table: str) -> str:
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _paragraphs(texts: Sequence[str], kind: str = "told") -> str:
    return "".join(f'<p class="{kind}">{html.escape(text)}</p>' for text in texts)


def _code(lines: str) -> str:
    return f'<pre tabindex="0"><code>{html.escape(lines)}</code></pre>' if lines else ""


def _charts(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(chart.figure() for chart in charts)}</div>' if charts else ""


# ---------------------------------------------------------------- sections


def _advice(content: Content) -> str:
    found = advice(content)
    if not found:
        return "<p>Nothing to warn of.</p>" if content.tensors else ""
    items = (f"<li>{html.escape(one.text)}{_code(one.line)}</li>" for one in found)
    return f'<ul class="advice">{"".join(items)}</ul>'


def _path(content: Content) -> str:
    if content.path is None:
        return ""
    return f'<p class="told">{explorer.title(content.path)}</p>{explorer.explorer(content.path, content.images)}'


def _rules(content: Content) -> str:
    if content.table:
        return _scrolling(html_table(content.table, _RIGHT)) + _paragraphs(content.notes)
    without = "<p>No rules: the network was trained without any.</p>" if content.tensors else ""
    return _paragraphs(content.notes) or without


def _training(content: Content) -> str:
    if content.rows:
        shares = any(name.startswith("shares/") for row in content.rows for name in row)
        more = "Shares of the gradient are measured by reg.track(every=10, shares=True)."
        missing = [more] if content.trained == "attachment" and not shares else []
        return _charts(trainings(content.rows)) + _paragraphs(missing)
    if content.trained == "attachment":
        return "<p>Nothing was tracked in this training. To see curves here, write</p>" + _code(
            "reg = rs.attach(model, plan, optimizer, track=10)"
        )
    return ""


def _part(one: Part) -> str:
    """Return a section of the caller's."""
    chart = ""
    if one.draw is not None:
        svg, _ = drawn(f"part-{one.name}", one.title, one.draw, one.size)
        chart = _charts([Chart(f"part-{one.name}", one.title, svg)])
    table = _scrolling(html_table([list(row) for row in one.rows], one.right)) if one.rows else ""
    return (_paragraphs([one.told]) if one.told else "") + chart + table


def _weights(content: Content) -> str:
    if not content.tensors:
        return ""
    table = _scrolling(html_table(list(_of_tensors(content)), range(1, 7)))
    return f"{_charts(weights(content))}<details><summary>All weights</summary>{table}</details>"


def _of_tensors(content: Content) -> Iterator[list[str]]:
    """Yield the rows of the table of weights, head first."""
    yield ["weight", "shape", "zeros", "%", "dead units", "zero groups", "norm", "rules"]
    for one in content.tensors:
        pairs = [f"{pair[0]:,} of {pair[1]:,}" if pair is not None else "" for pair in (one.dead, one.groups)]
        share = f"{100 * one.zeros / one.entries:.1f}" if one.entries else ""
        shape = " × ".join(map(str, one.shape))
        yield [one.name, shape, f"{one.zeros:,}", share, *pairs, f"{one.norm:.4g}", ", ".join(one.rules)]


def _features(content: Content) -> str:
    return _charts(features(content.tensors))


def _again(content: Content) -> str:
    code = _code(content.code)
    if not content.data:
        return code
    return (
        f"{code}<p>The plan as it was bound, to save as plan.json:</p>"
        f"<details><summary>plan.json</summary>{_code(content.data)}</details>"
    )


def _environment(content: Content) -> str:
    rows = [["what", "version"], *[[name, text] for name, text in content.environment.items()]]
    return _scrolling(html_table(rows)) if content.environment else ""


_SECTIONS: Sequence[tuple[str, str, Callable[[Content], Any]]] = (
    ("warnings", "Warnings", _advice),
    ("path", "Path", _path),
    ("rules", "Who gets what", _rules),
    ("training", "Training", _training),
    ("weights", "Weights", _weights),
    ("features", "Learned features", _features),
    ("again", "To do it again", _again),
    ("environment", "Environment", _environment),
)
