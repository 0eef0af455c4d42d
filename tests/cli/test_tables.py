"""Tables from files, and their columns as numbers: what is read, and what is refused with its place."""

import datetime
import gzip
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from restrain.cli import jobs, tables
from restrain.errors import DataError, RestrainWarning
from restrain.tables import Encoding, Feature, Marks

TEXT = "age,color,wage\n30,red,1e3\n41,blue,2000.5\n52,red,-3\n"


@pytest.fixture
def csv(tmp_path):
    def write(text, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def learn(table, names=None, categories=(), missing="error", rows=None):
    names = list(table.columns) if names is None else names
    return Encoding.learn(table, names, categories, missing, np.arange(len(table)) if rows is None else rows)


# Formats


def test_csv(csv):
    table = tables.read(csv(TEXT))
    assert table.numbers("age").tolist() == [30, 41, 52]
    assert table.texts("color").tolist() == ["red", "blue", "red"]
    assert table.numbers("wage").tolist() == [1000, 2000.5, -3]
    assert len(table) == 3


@pytest.mark.parametrize(
    ("text", "name", "separator"),
    [
        (TEXT.replace(",", ";"), "t.csv", ";"),
        (TEXT.replace(",", "\t"), "t.tsv", None),
        (TEXT.replace(",", "\t"), "t.csv", "tab"),
        (TEXT.replace(",", "\t"), "t.csv", r"\t"),
        (TEXT.replace(",", "\t"), "t.txt", None),
        (TEXT.replace(",", ";"), "t.txt", None),
        (TEXT, "t.txt", None),
        (b"\xef\xbb\xbf" + TEXT.encode(), "t.csv", None),
        (gzip.compress(TEXT.encode(), mtime=0), "t.csv.gz", None),
        (TEXT.replace("\n", "\r\n"), "T.CSV", None),
        (TEXT.replace("red", '"red"'), "t.csv", None),
    ],
)
def test_csv_in_other_dress(csv, text, name, separator):
    table = tables.read(csv(text, name), marks=Marks(separator))
    assert list(table.columns) == ["age", "color", "wage"]
    assert table.texts("color").tolist() == ["red", "blue", "red"]


def test_numbers_are_exact(csv):
    values = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-100, 100)
    table = tables.read(csv("a\n" + "\n".join(map(repr, values.tolist()))))
    assert table.numbers("a").tolist() == values.tolist()


def test_all_formats_give_the_same(tmp_path):
    frame = pd.DataFrame({"n": [1, 2, 3], "x": [0.5, np.nan, 2.0], "s": ["a", None, "c"], "b": [True, False, True]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", n=frame.n, x=frame.x, s=np.array(["a", "", "c"]), b=frame.b.to_numpy())
    for name in ("t.csv", "t.parquet", "t.npz"):
        table = tables.read(tmp_path / name)
        assert table.numbers("n").tolist() == [1, 2, 3]
        np.testing.assert_array_equal(table.numbers("x"), [0.5, np.nan, 2])
        assert table.texts("s").tolist() == ["a", None, "c"]
        assert table.numbers("b").tolist() == [1, 0, 1]
        assert table.texts("n").tolist() == ["1", "2", "3"]
        assert learn(table, missing="fill").columns == ["n", "x", "s=a", "s=c", "s=(missing)", "b"]


def test_types_of_parquet(tmp_path):
    frame = pd.DataFrame(
        {
            "category": pd.Categorical(["b", "a"]),
            "numbered": pd.Categorical([3, 4]),
            "whole": pd.array([1, None], "Int64"),
            "decimal": [Decimal("1.5"), Decimal("2")],
            "flags": [True, None],
            "text": pd.array(["x", None], "string"),
        },
        index=pd.Index([7, 8], name="row"),
    )
    frame.to_parquet(tmp_path / "t.parquet")
    table = tables.read(tmp_path / "t.parquet")
    assert table.texts("category").tolist() == ["b", "a"]
    assert table.numbers("numbered").tolist() == [3, 4]
    np.testing.assert_array_equal(table.numbers("whole"), [1, np.nan])
    assert table.numbers("decimal").tolist() == [1.5, 2]
    np.testing.assert_array_equal(table.numbers("flags"), [1, np.nan])
    assert table.texts("text").tolist() == ["x", None]
    assert table.numbers("row").tolist() == [7, 8]


def test_matrices_of_npz_are_many_columns(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.arange(6, dtype="f4").reshape(3, 2), y=np.array(["a", "b", "a"]))
    table = tables.read(tmp_path / "t.npz")
    assert list(table.columns) == ["X[0]", "X[1]", "y"]
    np.testing.assert_array_equal(learn(table, ["X[0]", "X[1]"]).apply(table), np.arange(6).reshape(3, 2))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.xls", b"", "is a workbook of another kind than .xlsx: save it as .xlsx, or export its sheet as CSV"),
        ("t.dat", b"", r"a table is CSV \(.csv"),
        ("t", b"", r"a table is CSV"),
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"a,b\n", "there are no rows"),
        ("t.csv", b"a,a\n1,2\n", "two columns are called 'a'"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 values, and those before it 2"),
        ("t.csv", b"a,b\n1,2,3\n1,2,3\n", "can't be read as CSV"),
        ("t.csv", b'a,b\n"1,2\n', "can't be read as CSV"),
        ("t.csv", b"a;b\n1;2\n", "only one column, called 'a;b'; write --separator ';'"),
        ("t.csv", b"a,b\n\xff\xfe,1\n", "line 2 isn't in UTF-8.*write --encoding latin-1"),
        ("t.csv.gz", b"a,b\n1,2\n", "can't be read as CSV"),
        ("t.parquet", b"a,b\n1,2\n", "can't be read as Parquet"),
        ("t.npz", b"PK\x03\x04 and so on", r"can't be read as \.npz"),
        ("t.npz", b"a,b\n", r"can't be read as \.npz"),
    ],
)
def test_files_that_are_no_tables(csv, name, content, said):
    path = csv(content, name)
    with pytest.raises(DataError, match=said) as caught:
        tables.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.zeros((2, 2, 2))}, "'a' has the shape"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, r"same number of rows; got a \(2,\), b \(3,\)"),
        ({"a": np.array(3.0)}, "has the shape"),
        ({"a": np.array([{}, []], object)}, "can't be read"),
        ({"a": np.zeros(2, complex)}, "of type complex128"),
        ({"a": np.zeros(2, "m8[s]")}, "of type timedelta64.*--ignore 'a'"),
        ({}, "no columns"),
    ],
)
def test_arrays_that_are_no_tables(tmp_path, arrays, said):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(DataError, match=said):
        tables.read(tmp_path / "t.npz")


def test_pickles_in_npz_are_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code from a file')",))

    np.savez(tmp_path / "t.npz", a=np.array([Trap()], object))
    with pytest.raises(DataError, match="can't be read"):
        tables.read(tmp_path / "t.npz")


@pytest.mark.parametrize("values", [[[1], [2]], [b"a", b"b"], [datetime.time(1), datetime.time(2)]])
def test_parquet_columns_that_are_no_numbers(tmp_path, values):
    pd.DataFrame({"when": values}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'when'"):
        tables.read(tmp_path / "t.parquet")


# Columns as numbers


def test_categories_are_one_hot(csv):
    table = tables.read(csv(TEXT))
    encoding = learn(table)
    assert encoding.columns == ["age", "color=blue", "color=red", "wage"]
    assert encoding.apply(table)[1].tolist() == [41, 1, 0, 2000.5]
    assert encoding.categories == ["color"]


def test_numbers_may_be_categories(csv):
    table = tables.read(csv("zip,y\n01,1\n2,2\n10,3\n"), ["zip"])
    encoding = learn(table, ["zip"], categories=["zip"])
    assert encoding.columns == ["zip=01", "zip=2", "zip=10"]
    assert encoding.apply(table).tolist() == np.eye(3).tolist()


def test_order_of_columns_is_that_of_training(csv):
    encoding = learn(tables.read(csv(TEXT)))
    shuffled = tables.read(csv("more,wage,color,age\n9,3,red,1\n", "u.csv"))
    assert encoding.apply(shuffled).tolist() == [[1, 0, 1, 3]]


def test_missing_values_are_filled_from_the_training_rows(csv):
    table = tables.read(csv("a,c\n1,x\n,y\n3,\n100,x\n"))
    encoding = learn(table, missing="fill", rows=np.array([0, 1, 2]))
    assert encoding.apply(table)[:, 0].tolist() == [1, 2, 3, 100]
    assert encoding.columns == ["a", "c=x", "c=y", "c=(missing)"]
    assert encoding.apply(table)[2].tolist() == [3, 0, 0, 1]


@pytest.mark.parametrize("missing", ["error", "fill"])
def test_encoding_is_json(csv, missing):
    table = tables.read(csv(TEXT))
    encoding = learn(table, missing=missing)
    twin = Encoding.from_dict(json.loads(json.dumps(encoding.to_dict())))
    assert twin == encoding
    np.testing.assert_array_equal(twin.apply(table), encoding.apply(table))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n1\n2\nabc\n4\n5\n", r"t\.csv, row 3, column 'a': expected a number, as in 4 other rows, got 'abc'"),
        ("a,b\n1,2\n,3\n4,5\n,1\n", r"row 2, column 'a': the value is missing \(and in 1 other row\).*--missing fill"),
        ("c,b\nx,2\n,3\nx,5\n", "row 2, column 'c': the value is missing"),
        ("a,b\n1,2\ninf,3\n", "row 2, column 'a': expected a finite number, got inf"),
        ("a,b\n,2\n,3\n", "column 'a' has no values at all.*--ignore 'a'"),
        (",b\n0,2\n1,3\n", "column 'Unnamed: 0' has no name.*--ignore 'Unnamed: 0'"),
        ("id\n" + "\n".join(f"n{i}" for i in range(50)), "'id' has 50 different texts in 50 rows.*--ignore 'id'"),
    ],
)
def test_columns_that_are_no_features(csv, text, said):
    with pytest.raises(DataError, match=said):
        learn(tables.read(csv(text)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("age,color\n1,red\n", "the model needs the columns 'wage'; there are: age, color"),
        ("age,color,wage\n1,red,2\nold,red,3\n", r"u\.csv, row 2, column 'age': expected a number, got 'old'"),
        (
            "age,color,wage\n1,red,2\n2,mauve,3\n",
            "row 2, column 'color': 'mauve' was not there in training, only blue, ",
        ),
        ("age,color,wage\n1,red,2\n2,,3\n", "row 2, column 'color': the value is missing"),
        ("age,color,wage\n1,red,2\n,red,3\n", "row 2, column 'age': the value is missing"),
        ("age,color,wage\n1,7,2\n", "row 1, column 'color': '7' was not there in training"),
    ],
)
def test_rows_that_do_not_fit(csv, text, said):
    encoding = learn(tables.read(csv(TEXT)))
    with pytest.raises(DataError, match=said):
        encoding.apply(tables.read(csv(text, "u.csv")))


def test_unknown_values_may_be_zeros(csv):
    encoding = learn(tables.read(csv(TEXT)))
    table = tables.read(csv("age,color,wage\n1,mauve,2\n", "u.csv"))
    with pytest.warns(RestrainWarning, match=r"u\.csv, column 'color': 1 row of 1 .*: 'mauve'"):
        assert encoding.apply(table, unknown="zeros").tolist() == [[1, 0, 0, 2]]
    with pytest.raises(DataError, match="the value is missing"):
        encoding.apply(tables.read(csv("age,color,wage\n1,,2\n", "u.csv")), unknown="zeros")


def test_a_value_missing_only_later_is_unknown(csv):
    encoding = learn(tables.read(csv(TEXT)), missing="fill")
    table = tables.read(csv("age,color,wage\n,,2\n", "u.csv"))
    with pytest.raises(DataError, match="a missing value was not there in training"):
        encoding.apply(table)
    with pytest.warns(RestrainWarning, match="a missing value"):
        np.testing.assert_allclose(encoding.apply(table, unknown="zeros"), [[41, 0, 0, 2]])


def test_a_column_that_is_not_there(csv):
    with pytest.raises(
        DataError, match=r"no column is called 'colour' \(near it: color\); there are: age, color, wage"
    ):
        tables.read(csv(TEXT)).numbers("colour")


def test_feature_columns():
    assert Feature("c", values=("a", None)).columns == ["c=a", "c=(missing)"]


# Targets and splits


def test_targets(csv):
    table = tables.read(csv("t,n,f,b\na,1,1.0,True\nb,2,2.0,False\n"))
    assert jobs.labels(table, "t").tolist() == ["a", "b"]
    assert jobs.labels(table, "n").tolist() == jobs.labels(table, "f").tolist() == [1, 2]
    assert jobs.labels(table, "f").dtype.kind == "i"
    assert jobs.labels(table, "b").tolist() == [True, False]
    assert jobs.quantities(table, ["n"]).shape == (2,)
    assert jobs.quantities(table, ["n", "f"]).shape == (2, 2)
    assert jobs.targets(table, "autoencoder", []) is None


@pytest.mark.parametrize(
    ("text", "model", "said"),
    [
        ("y\na\n\nb\n".replace("\n\n", '\n""\n'), "classifier", "row 2, column 'y': the target is missing"),
        ("y,z\n1,1\n,2\n", "classifier", "row 2, column 'y': the target is missing"),
        ("y,z\n1,1\n,2\n", "regressor", "row 2, column 'y': the target is missing"),
        ("y\n1\n2.5\n", "classifier", "row 2, column 'y': expected a class.*--model regressor"),
        ("y\n" + "\n".join(map(str, range(30))), "classifier", "30 different numbers in 30 rows.*--model regressor"),
        ("y\n1\nhigh\n", "regressor", "row 2, column 'y': expected a number, got 'high'"),
    ],
)
def test_targets_that_are_none(csv, text, model, said):
    with pytest.raises(DataError, match=said):
        jobs.targets(tables.read(csv(text)), model, ["y"])


def test_split():
    train, valid = jobs.split(100, 0.2, seed=1)
    assert len(valid) == 20
    assert sorted([*train, *valid]) == list(range(100))
    assert jobs.split(100, 0.2, seed=1)[1].tolist() == valid.tolist()
    assert jobs.split(100, 0.2, seed=2)[1].tolist() != valid.tolist()
    y = np.array(["common"] * 90 + ["rare"] * 10)
    for seed in range(30):
        train, valid = jobs.split(100, 0.5, seed, y)
        assert (y[valid] == "rare").sum() == 5
        assert len(train) + len(valid) == 100
    with pytest.warns(RestrainWarning, match="no row is held back of 'once'"):
        train, valid = jobs.split(100, 0.5, 0, np.array(["often"] * 99 + ["once"]))
    assert 99 in train
    with pytest.raises(DataError, match="leaves none"):
        jobs.split(3, 0.1, 0)
