"""Tables as text, with aligned columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return rows of cells as lines of aligned columns.

    Args:
        rows: at least one row; all have as many cells.
        right: numbers of the columns that are aligned to the right.

    >>> print(text_table([("rule", "elements"), ("L1", "1,024")], {1}))
    rule  elements
    L1       1,024
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = (cell.rjust(width) if n in right else cell.ljust(width) for n, (cell, width) in enumerate(cells))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
