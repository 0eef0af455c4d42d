"""Files as people have them: each is read right, or refused in one to three lines that say what to do."""

import io
import zipfile

import numpy as np
import pandas as pd
import pytest

from restrain.cli import tables
from restrain.errors import DataError
from restrain.tables import Encoding, Marks

PLAIN = "age,color\n30,red\n41,blue\n52,red\n"
AGES, COLORS = [30, 41, 52], ["red", "blue", "red"]
DECOYS = "age,color\n30,red\n41,blue\n52,"


def read(tmp_path, content, name="t.csv", **marks):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.read(path, marks=Marks(**marks))


RIGHT = {
    "crlf": (PLAIN.replace("\n", "\r\n"), {}),
    "old mac": (PLAIN.replace("\n", "\r"), {}),
    "byte order mark": (b"\xef\xbb\xbf" + PLAIN.encode(), {}),
    "no last line end": (PLAIN.rstrip(), {}),
    "blank lines": (PLAIN.replace("41", "\n\n41") + "\n\n", {}),
    "spaces after commas": (PLAIN.replace(",", ", "), {}),
    "spaces in the header": (PLAIN.replace("age,", " age ,"), {}),
    "quotes": (PLAIN.replace("red", '"red"').replace("30", '"30"'), {}),
    "utf-16": (PLAIN.encode("utf-16"), {"encoding": "utf-16"}),
    "latin-1": (PLAIN.encode("latin-1"), {"encoding": "latin-1"}),
    "semicolons": (PLAIN.replace(",", ";"), {"separator": ";"}),
    "decimal commas": (PLAIN.replace(",", ";").replace("30", "30,0"), {"separator": ";", "decimal": ","}),
    "thousands": (PLAIN.replace(",", ";"), {"separator": ";", "thousands": " "}),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_read(tmp_path, kind):
    content, marks = RIGHT[kind]
    table = read(tmp_path, content, **marks)
    assert list(table.columns) == ["age", "color"]
    assert table.numbers("age").tolist() == AGES
    assert table.texts("color").tolist() == COLORS


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (PLAIN, "t.txt"),
        (PLAIN.replace(",", "\t"), "t.txt"),
        (PLAIN.replace(",", "|"), "t.txt"),
        (PLAIN.replace(",", "   "), "t.txt"),
        (PLAIN.replace(",", " "), "t.txt"),
    ],
)
def test_text_files_by_their_header(tmp_path, content, name):
    table = read(tmp_path, content, name)
    assert table.numbers("age").tolist() == AGES
    assert table.texts("color").tolist() == COLORS


def test_gaps_dates_and_numbers_as_told(tmp_path):
    text = "t;n;d;c\n?;1.234,5;31.01.2024;x\n5;-99;1.2.2024;-99\n7;2,5;-99;y\n"
    table = read(tmp_path, text, separator=";", decimal=",", thousands=".", date="%d.%m.%Y", gaps=("?", "-99"))
    np.testing.assert_array_equal(table.numbers("t"), [np.nan, 5, 7])
    np.testing.assert_array_equal(table.numbers("n"), [1234.5, np.nan, 2.5])
    assert table.texts("c").tolist() == ["x", None, "y"]
    encoding = Encoding.learn(table, ["t", "n", "d", "c"], [], "fill", np.arange(3))
    assert [feature.kind for feature in encoding.features] == ["number", "number", "date", "category"]
    assert encoding.apply(table)[:, 2].tolist() == [19753, 19754, 19753.5]
    assert read(tmp_path, text.replace("?", "-99.0"), separator=";", gaps=("-99",)).missing("t").tolist() == [1, 0, 0]


def test_text_is_a_category_unless_all_of_it_are_dates(tmp_path):
    text = "a,b\n2024-01-31,2024-01-31\n2024-02-01 12:30:00,no\n2024-03-01T12:30,2024-01-31\n,2024-01-31\n"
    table = read(tmp_path, text)
    assert Encoding.learn(table, ["a"], [], "fill", np.arange(4)).features[0].kind == "date"
    assert Encoding.learn(table, ["a"], ["a"], "fill", np.arange(4)).features[0].kind == "category"
    with pytest.raises(DataError, match="row 2, column 'b': expected a date, as in 3 other rows, got 'no'"):
        Encoding.learn(table, ["b"], [], "fill", np.arange(4))


REFUSED = {
    "empty": ("", {}, "the file is empty"),
    "only blanks": ("\n\n\n", {}, "the file is empty"),
    "only a header": ("age,color\n", {}, "there are no rows"),
    "a name twice": ("a,b, a\n1,2,3\n", {}, "two columns are called 'a'"),
    "a column without a name": (",a\n0,1\n1,2\n", {}, "'Unnamed: 0' has no name.*--ignore"),
    "commas at the ends": ("a,b,\n1,2,\n3,4,\n", {}, "'Unnamed: 2' has no name"),
    "one value too many": ("a,b\n1,2\n1,2,3\n", {}, "line 3 has 3 values, and those before it 2; correct that line"),
    "cut off": (DECOYS.rstrip(",") + "\n", {}, "line 4 has 1 value, and the header 2 names; correct that line"),
    "semicolons": ("a;b\n1;2\n", {}, "only one column, called 'a;b'; write --separator ';'"),
    "tabs": ("a\tb\n1\t2\n", {}, "write --separator tab"),
    "an open quotation mark": ('a,b\n1,"2\n3,4\n', {}, "a quotation mark that opens at line 2 isn't closed"),
    "latin-1": ("a,ü\n1,é\n".encode("latin-1"), {}, r"line 1 isn't in UTF-8 \(byte 0xfc\).*write --encoding latin-1"),
    "utf-16": (PLAIN.encode("utf-16"), {}, "is in UTF-16, not in UTF-8; write --encoding utf-16"),
    "utf-16 without a mark": (PLAIN.encode("utf-16-le"), {}, "line 1 has a null character.*--encoding utf-16"),
    "null characters": (b"a,b\n1,2\n1,\0\n", {}, "line 3 has a null character"),
    "no encoding": (PLAIN, {"encoding": "utf-9"}, "there is no encoding 'utf-9'; write --encoding latin-1"),
    "infinity": ("a,b\n1,2\ninf,3\n", {}, "row 2, column 'a': expected a finite number, got inf"),
    "a huge number": (f"a,b\n1,2\n{'9' * 400},3\n", {}, "'a' has numbers too large for float64|finite number"),
    "mixed": ("a\n1\n2\nabc\n4\n5\n", {}, "row 3, column 'a': expected a number, as in 4 other rows, got 'abc'"),
    "decimal commas": ('a;b\n1,5;x\n2,5;y\n', {"separator": ";"}, "decimal commas: write --decimal ,"),
    "thousands": ('a;b\n1 000;x\n2 500;y\n', {"separator": ";"}, "spaces at thousands: write --thousands ' '"),
    "percent": ("a,b\n12%,x\n5%,y\n", {}, "percent signs: turn them into plain numbers"),
    "dates of two readings": ("a,b\n1/2/2024,1\n3/4/2024,2\n", {}, "'%d/%m/%Y', or --date-format '%m/%d/%Y'"),
    "dates of one reading": ("a,b\n31.12.2024,1\n1.2.2024,2\n", {}, "look like dates: write --date-format '%d.%m.%Y'"),
    "a day that is none": ("a\n2024-01-31\n2024-02-01\n2024-02-30\n", {}, "row 3, .* expected a date.*'2024-02-30'"),
    "the other date format": ("a\n2024-01-31\n2024-02-01\n", {"date": "%d.%m.%Y"}, "--date-format '%Y-%m-%d'"),
    "a gap": ("a,b\n1,2\n,3\n", {}, "row 2, column 'a': the value is missing.*--missing fill, or --drop-missing"),
    "no values": ("a,b\n,2\n,3\n", {}, "'a' has no values at all.*--ignore 'a'"),
    "identifiers": ("a\n" + "\n".join(f"n{k}" for k in range(50)), {}, "50 different texts in 50 rows.*--ignore 'a'"),
    "a web page": ("<!doctype html>\n<html><body>a, b</body></html>\n", {}, "line 2 has|expected|can't be read"),
}  # fmt: skip


def learned(reader, *args, **marks):
    table = reader(*args, **marks)
    return Encoding.learn(table, list(table.columns), [], "error", np.arange(len(table)))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    content, marks, said = REFUSED[kind]
    with pytest.raises(DataError, match=said) as caught:
        learned(read, tmp_path, content, **marks)
    text = str(caught.value)
    assert "t.csv" in text or "encoding" in text
    assert len(text) - len(str(tmp_path)) < 300
    assert "Traceback" not in text


# Workbooks


def workbook(tmp_path, **sheets):
    pytest.importorskip("openpyxl")
    with pd.ExcelWriter(tmp_path / "t.xlsx", engine="openpyxl") as book:
        for name, frame in sheets.items():
            frame.to_excel(book, sheet_name=name, index=False)
    return tmp_path / "t.xlsx"


FRAME = pd.DataFrame(
    {"n": [1, 2, 3], "x": [0.5, None, 2.0], "s": ["a", None, "c"], "b": [True, False, True],
     "d": pd.to_datetime(["2024-01-31", "2024-02-01", None]), "e": [1.0, "#DIV/0!", 3.0], "q": ["?", 2, 3]}
)  # fmt: skip


def test_workbooks(tmp_path):
    path = workbook(tmp_path, one=FRAME)
    table = tables.read(path, marks=Marks(gaps=("?",)))
    assert list(table.columns) == list(FRAME)
    np.testing.assert_array_equal(table.numbers("x"), [0.5, np.nan, 2])
    assert table.texts("s").tolist() == ["a", None, "c"]
    assert table.dates("d").astype("M8[D]").astype(str).tolist() == ["2024-01-31", "2024-02-01", "NaT"]
    np.testing.assert_array_equal(table.numbers("e"), [1, np.nan, 3])
    np.testing.assert_array_equal(table.numbers("q"), [np.nan, 2, 3])
    assert table.numbers("b").tolist() == [1, 0, 1]


def test_sheets(tmp_path):
    path = workbook(tmp_path, one=FRAME[["n"]], two=FRAME[["x", "s"]])
    with pytest.warns(UserWarning, match="has 2 sheets, and 'one' is read; --sheet names another: two"):
        assert list(tables.read(path).columns) == ["n"]
    assert list(tables.read(path, marks=Marks(sheet="two")).columns) == ["x", "s"]
    with pytest.raises(DataError, match="has no sheet 'three'; there are: one, two"):
        tables.read(path, marks=Marks(sheet="three"))
    with pytest.raises(DataError, match="has no sheets: leave out --sheet"):
        read(tmp_path, PLAIN, sheet="one")
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(DataError, match="two columns are called 'a'"):
        tables.read(workbook(tmp_path, one=twice))
    with pytest.raises(DataError, match="there are no rows"):
        tables.read(workbook(tmp_path, one=FRAME[:0]))


def test_workbooks_that_are_none(tmp_path):
    pytest.importorskip("openpyxl")
    for content in (b"", b"PK\x03\x04 a workbook", b"a,b\n1,2\n"):
        with pytest.raises(DataError, match="can't be read as Excel"):
            read(tmp_path, content, "t.xlsx")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", bytes(2**20))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(tables, "_SMALL", 2**10)
    monkey.setattr(tables, "_RATIO", 1)
    with pytest.raises(DataError, match="unpacks to 1,048,576 bytes"):
        read(tmp_path, bomb.getvalue(), "t.xlsx")
    monkey.undo()


# Several files, and standard input


def test_several_files_are_one_table(tmp_path):
    (tmp_path / "a.csv").write_text("n,c\n1,x\n2,7\n")
    (tmp_path / "b.csv").write_text("c,n\n8,3\n,4\n")
    table = tables.read([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert table.numbers("n").tolist() == [1, 2, 3, 4]
    assert table.texts("c").tolist() == ["x", "7", "8", None]
    with pytest.raises(DataError, match=r"b\.csv, row 2, column 'c': the value is missing"):
        Encoding.learn(table, ["c"], ["c"], "error", np.arange(4))
    (tmp_path / "c.csv").write_text("n\n1\n")
    with pytest.raises(DataError, match=r"c\.csv has no column 'c', which .*a\.csv has"):
        tables.read([tmp_path / "a.csv", tmp_path / "c.csv"])


@pytest.mark.parametrize("kind", ["csv", "gz", "parquet", "npz"])
def test_standard_input_is_of_any_format(tmp_path, monkeypatch, kind):
    frame, path = pd.DataFrame({"age": AGES, "color": COLORS}), tmp_path / "t"
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, age=AGES, color=COLORS)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, compression="gzip" if kind == "gz" else None)
    monkeypatch.setattr(tables.sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    table = tables.read("-")
    assert table.source == "standard input"
    assert table.numbers("age").tolist() == AGES
    assert table.texts("color").tolist() == COLORS
