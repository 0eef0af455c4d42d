"""Tables as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence


def html_table(rows: Sequence[Sequence[str]], right: Collection[int] = (), notes: Sequence[str] = ()) -> str:
    """Return rows of cells, head first, as an HTML table; every text is escaped.

    Args:
        rows: as for `text_table`: at least one row; all have as many cells.
        right: numbers of the columns that are aligned to the right.
        notes: paragraphs after the table.

    >>> html_table([("layer",), ("<b>",)])
    '<table><thead><tr><th>layer</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """
    head, *body = [_row(row, "td" if number else "th", right) for number, row in enumerate(rows)]
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>{paragraphs}"


def _row(cells: Sequence[str], tag: str, right: Collection[int]) -> str:
    found = []
    for number, cell in enumerate(cells):
        style = ' style="text-align: right"' if number in right else ""
        found.append(f"<{tag}{style}>{html.escape(cell)}</{tag}>")
    return f"<tr>{''.join(found)}</tr>"
