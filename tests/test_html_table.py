"""Tables in notebooks: the cells of the text tables, and names that are markup stay text."""

import gc
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.compaction.report import Cost, Layer, Report
from restrain.html_table import html_table
from restrain.paths.greatest import Greatest
from restrain.paths.points import Point
from restrain.paths.result import Path

NAME = "<script>alert('1') & \"2\"</script>"


class Reader(HTMLParser):
    """Rows of cells as a browser sees them, and the tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.notes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.notes.append(data)


def script():
    """A model with a layer whose name is markup, and its rules, named so, too."""
    model = nn.Module()
    model.add_module("<script>", nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.1 * rs.L2().on("<script>.weight", how="gradient", name=NAME), optimizer, track=1)
    model.get_submodule("<script>")(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, reg


def shown():
    """(The model, {kind: object} whose names are markup.)"""
    (model, reg), cost = script(), Cost(1, 2, 0.1)
    return model, {
        "attachment": reg,
        "plan": reg.plan,
        "history": reg.history,
        "compaction": Report([Layer(NAME, (2, 3), (1, 3), {NAME: 1})], cost, cost, 0.0),
    }


@pytest.mark.parametrize("kind", ["attachment", "plan", "history", "compaction"])
def test_names_that_are_markup_are_text(kind):
    model, found = shown()
    text = found[kind]._repr_html_()
    found = Reader(text)
    assert model is not None
    assert set(found.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert any("<script>" in cell for row in found.rows for cell in row)
    assert len({len(row) for row in found.rows if len(row) == len(found.rows[0])}) == 1


def test_cells_are_those_of_the_text():
    model, reg = script()
    point = Point(0, 0.5, "up", 0.25, None, 3, 4, 1.5, float("nan"), 0.1, None)
    path = Path([point], Greatest(2.0, "formula"), None)
    assert Reader(path._repr_html_()).rows[1][1:4] == ["0.5", "0.25", "3"]
    for one in (reg, reg.history, path):
        found = Reader(one._repr_html_())
        for row in found.rows:
            assert all(cell in str(one) for cell in row)
        assert all(note in str(one) for note in found.notes)
    assert Reader(reg.history._repr_html_()).notes == [reg.history.summary()]
    first = Reader(reg._repr_html_()).rows
    assert first[0] == ["rule", "how", "strength", "tensors", "elements", "where"]
    assert reg.model is model
    assert first[1] == [NAME, "gradient", "0.1", "1", "6", "<script>.weight"]


def test_without_its_model_an_attachment_has_no_table():
    model, reg = script()
    del model
    gc.collect()
    assert reg._repr_html_() is None


def test_the_reader_sees_markup_where_it_is():
    assert "script" in Reader(f"<table><tr><td>{NAME}</td></tr></table>").tags
    assert Reader(html_table([["a", NAME], ["1", "&amp;"]], {0}, [NAME])).rows == [["a", NAME], ["1", "&amp;"]]
