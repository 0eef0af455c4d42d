"""The explorer of a path: a slider over its points, with all that changes along it.

The page has every number that the slider shows; `explorer.js` only moves them into place.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from restrain import plots
from restrain.html_table import html_table
from restrain.path_view import Column, PathView
from restrain.report.charts import Chart, drawn, legend_below

_MOST_BARS, _MOST_CELLS = 40, 1024
_LEVELS = 9  # shades of a group's length
_HIGH = 24  # units in a column of the network's drawing


def explorer(view: PathView, images: Mapping[str, tuple[int, int]]) -> str:
    """Return the section's HTML.

    Args:
        view: the path.
        images: {tensor: (height, width)} of groups that are the pixels of an image.
    """
    order = _order(view)
    charts = "".join(chart.figure() for chart in _charts(view, order))
    return "\n".join(
        [
            _controls(view, order),
            f'<div class="charts">{charts}</div>',
            '<div class="explored"><div><h3 id="bars-title">Greatest groups</h3><ol id="path-bars" '
            'aria-labelledby="bars-title"></ol></div><div><h3>What is left</h3><div id="path-left"></div>'
            '<h3>By name</h3><p id="path-names"></p></div></div>',
            _network(view),
            f"<details><summary>All points</summary>{_table(view, order)}</details>",
            f'<script type="application/json" id="path-data">{_as_json(_data(view, order, images))}</script>',
        ]
    )


def _network(view: PathView) -> str:
    """Return the place of the network's drawing; "" where its layers aren't a chain."""
    if not view.columns:
        return ""
    return (
        '<div id="network"><h3 id="network-title">The network that is left</h3>'
        '<div id="network-drawing" class="scroll" tabindex="0" role="application" aria-labelledby="network-title" '
        'aria-describedby="network-told network-now"></div><p class="told" id="network-told"></p>'
        '<p class="told" id="network-now" aria-live="polite">Arrow keys go from unit to unit.</p></div>'
    )


def _order(view: PathView) -> list[int]:
    """Return the points as the slider has them: by strength, a way after the other."""
    return [
        at
        for way in dict.fromkeys(view.ways)
        for at in sorted((i for i, one in enumerate(view.ways) if one == way), key=lambda i: view.strengths[i])
    ]


def _controls(view: PathView, order: Sequence[int]) -> str:
    """Return the slider, with buttons for the chosen points and the numbers of the present one."""
    best = order.index(view.best)
    buttons = [f'<button type="button" data-point="{best}">best</button>']
    if view.sparse is not None:
        buttons.append(f'<button type="button" data-point="{order.index(view.sparse)}">one standard error</button>')
    return (
        f'<div class="controls"><label for="point">{view.axis.capitalize()}</label>'
        f'<input type="range" id="point" min="0" max="{len(order) - 1}" step="1" value="{best}">'
        f'{"".join(buttons)}<output id="point-now" for="point" aria-live="off"></output></div>'
        "<noscript><p>The slider needs scripts; the table of all points doesn't.</p></noscript>"
    )


def _charts(view: PathView, order: Sequence[int]) -> list[Chart]:
    """Return the charts of lines and scores, each with a mark that the slider moves."""
    what = "Weights" if view.signed else "Lengths of groups"
    return [
        _marked("path-lines", f"{what} over the strength", plots.path, view, order),
        _marked("path-scores", "Score ± one standard error", plots.scores, view, order),
    ]


def _marked(name: str, title: str, draw: Any, view: PathView, order: Sequence[int]) -> Chart:
    """Return a chart with a vertical line, which knows where it stands at each point."""
    svg, axes = drawn(name, title, lambda axes: legend_below(draw(view, axes[0])))
    height = axes[0].figure.get_figheight() * 72
    places = [float(axes[0].transData.transform((view.strengths[at], 0.0))[0]) for at in order]
    top, bottom = height - axes[0].bbox.y1, height - axes[0].bbox.y0
    at = places[order.index(view.best)]
    line = (
        f'<line class="marker" x1="{at:.2f}" x2="{at:.2f}" y1="{top:.2f}" y2="{bottom:.2f}" '
        f'data-x="{" ".join(f"{x:.2f}" for x in places)}"/>'
    )
    return Chart(name, title, svg.replace("</svg>", f"{line}</svg>"))


def _table(view: PathView, order: Sequence[int]) -> str:
    rows = [[view.axis, "score", "±", "selected", ""]]
    for at in order:
        marks = ["best"] * (at == view.best) + ["one standard error"] * (at == view.sparse)
        numbers = [f"{view.strengths[at]:.4g}", f"{view.scores[at]:.4g}", f"{view.errors[at]:.2g}"]
        rows.append([*numbers, str(view.selected[at]), ", ".join(marks)])
    return f'<div class="scroll" tabindex="0">{html_table(rows, range(4))}</div>'


# ---------------------------------------------------------------- numbers for the script


def _data(view: PathView, order: Sequence[int], images: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return all that the script shows, in the order of the slider."""
    total = sum(lines.shape[1] for lines in view.lines.values())
    return {
        "strengths": _rounded([view.strengths[at] for at in order]),
        "scores": _rounded([view.scores[at] for at in order]),
        "errors": _rounded([view.errors[at] for at in order]),
        "selected": [view.selected[at] for at in order],
        "axis": view.axis,
        "ways": [view.ways[at] for at in order] if len(set(view.ways)) > 1 else [],
        "total": total,
        "best": order.index(view.best),
        "sparse": -1 if view.sparse is None else order.index(view.sparse),
        "bars": _bars(view, order),
        "tensors": [_cells(name, view, order, images.get(name)) for name in view.lines],
        "network": [_column(one, order, images) for one in view.columns],
    }


def _rounded(numbers: Sequence[float]) -> list[float | None]:
    """Return numbers of four digits; None where JSON has none."""
    return [float(f"{number:.4g}") if math.isfinite(number) else None for number in numbers]


def _bars(view: PathView, order: Sequence[int]) -> list[dict[str, Any]]:
    """Return the groups that are greatest anywhere, each with its numbers at all points."""
    found = [
        (float(most), name, number)
        for name, lines in view.lines.items()
        for number, most in enumerate(lines.abs().amax(0).tolist())
    ]
    several = len(view.lines) > 1
    bars = []
    for _, name, number in sorted(found, key=lambda one: -one[0])[:_MOST_BARS]:
        label = view.labels[name][number]
        values = _rounded(view.lines[name][list(order), number].tolist())
        bars.append({"name": f"{name}: {label}" if several else label, "values": values})
    return bars


def _cells(name: str, view: PathView, order: Sequence[int], size: tuple[int, int] | None) -> dict[str, Any]:
    """Return a tensor's groups as shades: a text a point, with a digit for each group."""
    lines = view.lines[name][list(order)].abs()
    shown = lines[:, :_MOST_CELLS]
    most = shown.max().clamp_min(1e-300)
    shades = (shown > 0).int() * (1 + (shown / most * (_LEVELS - 1)).floor().int())
    columns = size[1] if size is not None and size[0] * size[1] == lines.shape[1] else 0
    return {
        "name": name,
        "count": lines.shape[1],
        "columns": columns or min(32, max(1, round(math.sqrt(2 * shown.shape[1])))),
        "labels": list(view.labels[name][:_MOST_CELLS]),
        "shades": ["".join(map(str, row)) for row in shades.tolist()],
    }


def _column(column: Column, order: Sequence[int], images: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return the units of a layer: for each point a text with a 1 for each one that remains."""
    count = column.left.shape[1]
    sizes = [size for size in images.values() if size[0] * size[1] == count] if column.name == "inputs" else []
    reads = column.reads
    return {
        "name": column.name,
        "count": count,
        "wide": sizes[0][1] if sizes else -(-min(count, _MOST_CELLS) // _HIGH),
        "labels": list(column.labels[:_MOST_CELLS]),
        "left": [_bits(column.left[at, :_MOST_CELLS]) for at in order],
        "numbers": [int(column.left[at].sum()) for at in order],
        "reads": [_bits(reads[at].flatten()) for at in order] if reads is not None else None,
    }


def _bits(mask: Tensor) -> str:
    """Return a mask as text: "101"."""
    return "".join(map(str, mask.int().tolist()))


def _as_json(data: Any) -> str:
    """Return data as JSON that can't end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def title(view: PathView) -> str:
    """Return a sentence about the path, escaped."""
    lowest, highest = min(view.strengths), max(view.strengths)
    total = sum(lines.shape[1] for lines in view.lines.values())
    return html.escape(
        f"{len(view.strengths)} points, {view.axis} from {lowest:.3g} to {highest:.3g}; {total:,} groups. "
        "Arrow keys move the slider."
    )
