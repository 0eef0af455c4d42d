"""Writes docs/matrix.md from the cells of tests/test_everywhere.py; `make matrix` runs both.

python docs/matrix.py OUTCOMES
"""

import json
import platform
import sys
from pathlib import Path

import torch

SIGNS = {"equal": "=", "refused": "R", "refused at first": "r", "none": "–"}
HEAD = """# Every rule, everywhere

Each cell is a test in `tests/everywhere/`: a short training in that way of running, compared with a plain one (one
process, eager, float64) in its weights, its losses and the values of its rules. This page is written by `make matrix`.

Where a way of running rounds more than that, its name says so, or the column in its file. `make matrix` takes a few
minutes; `make test` runs a fixed sample of the cells, `make test-cuda` that sample on a GPU.

`=` equal to stated rounding · `R` refused when attached, with the way out · `r` refused in the first forward, as no
attachment can know of it before · `–` nothing to run

"""


def table(title, rows, columns, cells):
    """One group: a row a way of running, a column a kind of rule, by number."""
    yield f"## {title}\n\n| | {' | '.join(str(number) for number, _ in enumerate(rows, 1))} |"
    yield f"|---|{'---|' * len(rows)}"
    for column in columns:
        signs = [SIGNS[cells[column, row][0]] if (column, row) in cells else " " for row in rows]
        yield f"| {column} | {' | '.join(signs)} |"
    yield ""
    for sign, words in (("refused", "Refused"), ("refused at first", "Refused"), ("none", "Nothing to run")):
        said = {}
        for column in columns:
            for number, row in enumerate(rows, 1):
                if cells.get((column, row), ("", ""))[0] == sign:
                    said.setdefault(cells[column, row][1], []).append(f"{column} {number}")
        for text, where in said.items():
            yield f"* {words} ({'; '.join(where)}): {text}"
    yield ""


def page(lines):
    """The whole page, of [group, way, kind, outcome, what was said, device] each."""
    kinds = list(dict.fromkeys(kind for _, _, kind, *_ in lines))
    groups = {}
    for group, way, kind, outcome, said, _ in lines:
        groups.setdefault(group, {})[way, kind] = outcome, said
    devices = ", ".join(sorted({line[-1] for line in lines}))
    yield (
        HEAD
        + f"Seen on {devices}: torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.\n"
    )
    yield "Kinds of rules: " + " · ".join(f"**{number}** {kind}" for number, kind in enumerate(kinds, 1)) + "\n"
    for group, cells in groups.items():
        yield from table(group, kinds, list(dict.fromkeys(way for way, _ in cells)), cells)


def main():
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
    order = {title: number for number, title in enumerate(titles())}
    lines.sort(key=lambda line: order[line[1], line[2]])
    (Path(__file__).parent / "matrix.md").write_text("\n".join(page(lines)).rstrip() + "\n", "utf-8")


def titles():
    """All cells in the order of the tables."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from everywhere import COLUMNS, KINDS

    return [(column.title, kind.title) for column in COLUMNS.values() for kind in KINDS.values()]


if __name__ == "__main__":
    main()
