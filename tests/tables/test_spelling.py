"""Equal categories, classes and booleans in other spellings; numbers in other forms."""

import json

import numpy as np
import pandas as pd
import pytest

from restrain.cli import jobs, tables
from restrain.errors import DataError
from restrain.tables import Encoding, Marks, Table, spelling


def column(values):
    found = np.empty(len(values), object)
    found[:] = values
    return Table("t.csv", {"c": found})


def learned(values, **more):
    return Encoding.learn(column(values), ["c"], ["c"], more.pop("missing", "error"), np.arange(len(values)))


# Categories

EQUAL = [
    (["1", "2"], "1.0", "1"),
    (["1.0", "2.0"], "1", "1"),
    (["-3", "2"], "-3.00", "-3"),
    (["0", "7"], "-0.0", "0"),
    (["12345678901234567890", "1"], "12345678901234567890.0", "12345678901234567890"),
    (["yes", "no"], "1.0", "yes"),
    (["Y", "N"], "false", "N"),
    (["0", "1"], "True", "1"),
    (["t", "f"], "OFF", "f"),
]
OTHER = [
    (["01", "02"], "1"),
    (["1", "2"], "01"),
    (["1", "2"], "01.0"),
    (["1.10", "1.2"], "1.1"),
    (["0", "1", "2"], "True"),
    (["yes", "no", "maybe"], "1"),
    (["yes"], "true"),
    (["yes", "no"], "2"),
    (["1e3", "2"], "1000"),
    (["red", "blue"], "Red"),
]


@pytest.mark.parametrize(("known", "given", "value"), EQUAL)
def test_equal_values(known, given, value):
    encoding = learned(known)
    assert encoding.apply(column([given])).tolist() == encoding.apply(column([value])).tolist()
    again = Encoding.from_dict(json.loads(json.dumps(encoding.to_dict())))
    assert again.apply(column([given])).tolist() == encoding.apply(column([value])).tolist()


@pytest.mark.parametrize(("known", "given"), OTHER)
def test_other_values(known, given):
    with pytest.raises(DataError, match="was not there in training"):
        learned(known).apply(column([given]))


def test_one_value_in_several_spellings_is_one_input():
    assert learned(["1", "1.0", "01", "2"]).columns == ["c=01", "c=1", "c=2"]
    assert learned(["True", "TRUE", "false", "False"]).columns == ["c=False", "c=TRUE"]
    assert learned(["yes", "1", "no"]).columns == ["c=1", "c=no", "c=yes"]  # two pairs: three values
    assert learned(["1.10", "1.1"]).columns == ["c=1.1", "c=1.10"]


def test_a_model_of_version_0_1_that_tells_1_and_1_0_apart_goes_on_doing_so():
    old = {"features": [{"name": "c", "kind": "category", "values": ["1", "1.0", "x"]}], "missing": "error"}
    assert Encoding.from_dict(old).apply(column(["1.0", "1"])).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_categories_are_the_same_in_each_format(tmp_path):
    frame = pd.DataFrame({"n": [1, 2, 1], "f": [1.0, np.nan, 2.0], "b": [True, False, True], "h": [0.1, 2.5, 0.1]})
    frame["h"] = frame.h.astype("float32")
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", **{name: frame[name].to_numpy() for name in frame})
    found = [tables.read(tmp_path / name, list(frame)) for name in ("t.csv", "t.parquet", "t.npz")]
    rows, names = np.arange(3), list(frame)
    text, *others = (Encoding.learn(table, names, names, "fill", rows) for table in found)
    assert text.columns == ["n=1", "n=2", "f=1", "f=2", "f=(missing)", "b=False", "b=True", "h=0.1", "h=2.5"]
    for encoding, table in zip(others, found[1:], strict=True):
        assert encoding == text
        assert encoding.apply(table).tolist() == text.apply(found[0]).tolist()


# Classes


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["1", "2.0", "1.0"], [1, 2]),
        (["True", "FALSE"], [False, True]),
        (["01234", "98765"], ["01234", "98765"]),
        (["yes", "no"], ["no", "yes"]),
        (["-1", "1"], [-1, 1]),
        (["12345678901234567", "12345678901234568"], [12345678901234567, 12345678901234568]),
        (["123456789012345678901", "123456789012345678902"], ["123456789012345678901", "123456789012345678902"]),
        (["1e2", "2"], [2, 100]),
    ],
)
def test_classes(values, classes):
    found = jobs.labels(column(values), "c")
    assert np.unique(found).tolist() == classes
    assert jobs.labels(column(values), "c", np.unique(found)).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("known", "given", "found"),
    [
        ([1, 2], ["2.0", "1", "7"], [2, 1, 7]),
        ([False, True], ["yes", "0"], [True, False]),
        (["no", "yes"], ["1", "No"], ["yes", "no"]),
        (["01234", "98765"], ["98765", "98765.0", "1234"], ["98765", "98765", "1234"]),
    ],
)
def test_classes_are_those_of_the_training(known, given, found):
    assert jobs.labels(column(given), "c", np.array(known)).tolist() == found


@pytest.mark.parametrize(("known", "given"), [([1, 2], "red"), ([1, 2], "2.5"), ([False, True], "2")])
def test_a_class_of_another_kind_is_refused(known, given):
    with pytest.raises(DataError, match=r"row 2, column 'c': expected one of the classes .*, got"):
        jobs.labels(column([str(known[0]), given]), "c", np.array(known))


# Numbers

EXACT = [
    ("1,5", ",", "", 1.5),
    ("-1.234,5", ",", ".", -1234.5),
    ("1.234", ",", ".", 1234),
    ("1,234,567.25", ".", ",", 1234567.25),
    ("1 000", ".", " ", 1000),
    ("1'000.5", ".", "'", 1000.5),
    ("999", ".", ",", 999),
    ("1,5e-3", ",", "", 0.0015),
    (",5", ",", "", 0.5),
]


@pytest.mark.parametrize(("text", "decimal", "thousands", "number"), EXACT)
def test_numbers_with_other_marks(text, decimal, thousands, number):
    assert spelling.reader(decimal, thousands)(text) == number


@pytest.mark.parametrize(
    ("text", "decimal", "thousands"),
    [
        ("1,5", ".", ","),
        ("1.5", ",", "."),
        ("1,0000", ".", ","),
        ("12,34,567", ".", ","),
        ("1.5", ",", ""),
        ("", ".", ","),
    ],
)
def test_marks_elsewhere_are_no_number(text, decimal, thousands):
    assert np.isnan(spelling.reader(decimal, thousands)(text))


@pytest.mark.parametrize("ending", ["csv", "txt"])
def test_a_german_table(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    path.write_text("Preis;Menge;Ort;n\n1.234,50;1,5;Bonn;1\n;2;Ulm;2\n999,99;10,25;Ulm;3\n")
    table = tables.read(path, marks=Marks(";", ",", "."))
    np.testing.assert_array_equal(table.numbers("Preis"), [1234.5, np.nan, 999.99])
    assert table.numbers("Menge").tolist() == [1.5, 2, 10.25]
    assert table.numbers("n").tolist() == [1, 2, 3]
    assert table.columns["Ort"].tolist() == ["Bonn", "Ulm", "Ulm"]


def test_points_are_no_decimals_where_commas_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a;b\n1.5;1,5\n2.5;2.5\n")
    table = tables.read(path, marks=Marks(";", ","))
    for name in ("a", "b"):
        with pytest.raises(DataError, match=r"decimal points: write --decimal \."):
            Encoding.learn(table, [name], [], "error", np.arange(2))
        with pytest.raises(DataError, match=r"expected a number, got '[12]\.5'"):
            table.numbers(name)


OTHERWISE = {
    "1,5": "--decimal ,",
    "1,000": "--decimal ,, or --thousands ,",
    "1,000.5": "--thousands ,",
    "1.000.000": "--thousands . --decimal ,",
    "1.000,5": "--thousands . --decimal ,",
    "1 000": "--thousands ' '",
    "1'000": """--thousands "'" """[:-1],
    "5 %": "turn them into plain numbers",
    "€5": "turn them into plain numbers",
    "5,50 EUR": "turn them into plain numbers",
    "−5": "turn them into plain numbers",
    "2024-01-31": "look like dates",
    "31.01.2024 12:30": "look like dates",
    "1/31/24": "look like dates",
    "12:30": "look like times of day",
}


@pytest.mark.parametrize("text", OTHERWISE)
def test_numbers_in_another_form_are_told_with_the_way_out(text):
    table = column([text, "3", text, "4"])
    with pytest.raises(DataError) as caught:
        Encoding.learn(table, ["c"], [], "error", np.arange(4))
    said = str(caught.value)
    assert f"row 1, column 'c': expected a number or a category, got {text!r}" in said
    assert OTHERWISE[text] in said
    assert "--ignore 'c'" in said
    assert "--categories 'c'" in said
    with pytest.raises(DataError) as caught:  # as a target, or in a later table
        table.numbers("c")
    assert OTHERWISE[text] in str(caught.value)
    assert len(learned([text, "3", text, "4"]).columns) == 3


@pytest.mark.parametrize("text", ["red", "12A", "18-25", "A-1", "1/2", "192.168.0.1", "10115-12", "v1.2", ">5", "3rd"])
def test_categories_that_have_digits_are_categories(text):
    assert Encoding.learn(column([text, "b"] * 3), ["c"], [], "error", np.arange(6)).columns
    assert spelling.forms_of(text) == []
