"""Every kind of rule in every way of running: equal to the plain run, or refused when attached. See `everywhere/`.

`--outcomes FILE` appends what each cell gave to a file, from which docs/matrix.py draws the tables of docs/matrix.md.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch

import restrain as rs
from everywhere import COLUMNS, KINDS
from everywhere.column import Column, outcome
from everywhere.training import DEVICE, Run, attached, fresh, plain
from restrain.errors import RestrainWarning


def cells():
    return [
        pytest.param(
            kind,
            column,
            id=f"{column.name}-{kind.name}",
            marks=() if quick(column, kind, across + down) else pytest.mark.slow,
        )
        for across, column in enumerate(COLUMNS.values())
        for down, kind in enumerate(KINDS.values())
    ]


def quick(column, kind, number):
    """Whether `make test` runs a cell: every third one of a fast column."""
    return number % 3 == 0 if column.fast is True else kind.name in column.fast


@pytest.fixture
def note(request):
    """Writes what a cell gave."""
    file = request.config.getoption("--outcomes")

    def write(kind, column, found, said):
        if file:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps([column.group, column.title, kind.title, found, said, DEVICE]) + "\n")

    return write


@pytest.mark.parametrize(("kind", "column"), cells())
def test_equal_or_refused(kind, column, note, record_property):
    record_property("group", column.group)  # of docs/versions.md
    if column.cuda and DEVICE != "cuda":
        pytest.skip("on a GPU only")
    if kind.name in column.senseless:
        note(kind, column, "none", column.senseless[kind.name])
        pytest.skip(column.senseless[kind.name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)
        # Dynamo looks at every attribute of a tensor that is no leaf
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        found, said = outcome(kind, column)
    note(kind, column, found, said)


def test_the_page_tells_what_is_declared():
    """docs/matrix.md is written by `make matrix`; a column, kind or refusal that has come since is missing there."""
    page = (Path(__file__).parent.parent / "docs" / "matrix.md").read_text("utf-8")
    rows = {
        line.split(" | ")[0][2:]: line.rstrip(" |").split(" | ")[1:] for line in page.splitlines() if line[:2] == "| "
    }
    for number, kind in enumerate(KINDS.values(), 1):
        assert f"**{number}** {kind.title}" in page
    for column in (column for column in COLUMNS.values() if not column.cuda):
        signs = ["R" if kind in column.refuses else "–" if kind in column.senseless else "=" for kind in KINDS]
        assert [sign.upper() for sign in rows[column.title]] == signs, column.title


# The oracle, with wrong members


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_rule_that_is_missing_is_seen(kind):
    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)
        rest = kind.make()[:-1] or 0 * rs.L2().on("*")
        found = Run(model, optimizer, rs.attach(model, rest, optimizer)).steps().result()
        expected = plain(kind)
    for part in ("weights", "losses"):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-3, atol=1e-3)


def test_what_a_column_may_do():
    kind = KINDS["output-penalty"]

    def refusing(kind):
        rs.attach(fresh(), rs.L1().on(rs.outputs("nothing")))

    def late(kind):
        run = attached(kind, fresh()).steps()
        run.reg.loss("text")

    def wrong(kind):
        return 1.0, 1.1

    def made(run, **options):
        return Column("x", "x", "x", run, **options)

    declared = {kind.name: "nothing"}
    assert outcome(kind, made(refusing, refuses=declared))[0] == "refused"
    for column, error in (
        (made(refusing), "isn't declared"),
        (made(refusing, refuses={kind.name: "other"}), "another reason"),
        (made(late, refuses={kind.name: ""}), "after steps"),
        (made(lambda kind: (1, 1), refuses=declared), "declared as refused"),
        (made(wrong), "not close"),
    ):
        with pytest.raises(AssertionError, match=error):
            outcome(kind, column)
