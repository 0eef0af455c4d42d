"""Data frames as inputs of the models: numbers, booleans, dates, categories, by one encoder with the command line."""

import datetime
import pickle
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils.estimator_checks import parametrize_with_checks

import restrain as rs
from restrain.cli import tables
from restrain.cli.commands import restrain as command
from restrain.errors import DataError, FileError, PlanError, RestrainWarning
from restrain.tables import Encoding

QUICK = {"epochs": 3, "random_state": 0}


def frame(count=60, seed=0):
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": draw.integers(20, 70, count),
            "color": draw.choice(["red", "green", "blue"], count),
            "member": draw.random(count) < 0.5,
            "day": pd.Timestamp("2023-01-01") + pd.to_timedelta(draw.integers(0, 800, count), "D"),
            "size": pd.Categorical(draw.choice(["S", "M", "L"], count), ["S", "M", "L", "XL"]),
        }
    )


X = frame()
Y = np.where(X.color == "red", "yes", "no")
PRICE = X.age * 2.0 + (X.color == "red") * 30 - (X["size"] == "L") * 7
NAMES = ["age", "color=blue", "color=green", "color=red", "member", "day", "day.year.sin", "day.year.cos",
         "day.week.sin", "day.week.cos", "size=L", "size=M", "size=S"]  # fmt: skip


def by_hand(table):
    """The same inputs by pandas alone."""
    day = table.day
    year = (day - day.dt.to_period("Y").dt.start_time).dt.days / (365 + day.dt.is_leap_year)
    week = day.dt.day_of_week / 7
    found = {"age": table.age, **{f"color={c}": table.color == c for c in ("blue", "green", "red")}}
    found |= {"member": table.member, "day": (day - pd.Timestamp("1970-01-01")).dt.days}
    found |= {"day.year.sin": np.sin(2 * np.pi * year), "day.year.cos": np.cos(2 * np.pi * year)}
    found |= {"day.week.sin": np.sin(2 * np.pi * week), "day.week.cos": np.cos(2 * np.pi * week)}
    found |= {f"size={s}": table["size"] == s for s in ("L", "M", "S")}
    return pd.DataFrame(found).astype(float)


# The encoder


def test_the_inputs_are_those_by_hand():
    encoder = rs.TableEncoder().fit(X)
    assert encoder.get_feature_names_out().tolist() == NAMES == by_hand(X).columns.tolist()
    np.testing.assert_allclose(encoder.transform(X), by_hand(X), atol=1e-12)
    np.testing.assert_allclose(encoder.transform(frame(9, 5)), by_hand(frame(9, 5)), atol=1e-12)
    assert encoder.feature_names_in_.tolist() == list(X)
    with pytest.raises(NotFittedError):
        rs.TableEncoder().transform(X)


def test_categories_are_those_of_scikit_learns_encoder():
    ours = rs.TableEncoder().fit(X[["color", "size"]])
    theirs = OneHotEncoder(sparse_output=False).fit(X[["color", "size"]].astype(str))
    np.testing.assert_array_equal(
        ours.transform(X[["color", "size"]]), theirs.transform(X[["color", "size"]].astype(str))
    )
    names = theirs.get_feature_names_out()
    assert [name.replace("=", "_") for name in ours.get_feature_names_out()] == names.tolist()


DATES = {  # column, inputs
    "whole years": (
        ["2020-01-01", "2021-01-01", "2022-01-01"],
        ["d", "d.year.sin", "d.year.cos", "d.week.sin", "d.week.cos"],
    ),
    "one week": (["2020-01-06", "2020-01-08"], ["d"]),
    "mondays": (["2020-01-06", "2020-01-20"], ["d"]),
    "hours": (["2020-01-06 06:00", "2020-01-06 18:00"], ["d", "d.day.sin", "d.day.cos"]),
}


@pytest.mark.parametrize("kind", DATES)
def test_dates_have_the_cycles_that_they_show(kind):
    values, names = DATES[kind]
    for column in (values, pd.to_datetime(values), pd.to_datetime(values).tz_localize("Asia/Tokyo")):
        assert rs.TableEncoder().fit(pd.DataFrame({"d": column})).get_feature_names_out().tolist() == names


def test_times_of_day_and_types_of_dates():
    frames = [pd.to_datetime(["2020-01-06 06:00", "2020-01-06 18:00"]), ["2020-01-06T06:00", "2020-01-06T18:00:00"]]
    for column in frames:
        found = rs.TableEncoder().fit_transform(pd.DataFrame({"d": column}))
        np.testing.assert_allclose(found, [[18267.25, 1, 0], [18267.75, -1, 0]], atol=1e-9)
    days = [datetime.date(1970, 1, 2), datetime.date(1970, 1, 4)]
    for column in (days, pd.PeriodIndex(days, freq="D"), pd.to_datetime(days)):
        assert rs.TableEncoder().fit_transform(pd.DataFrame({"d": column})).tolist() == [[1], [3]]
    for column in (pd.to_timedelta(["1D", "12h"]), [1.0, 0.5]):
        assert rs.TableEncoder().fit_transform(pd.DataFrame({"d": column, "c": ["u", "v"]}))[:, 0].tolist() == [1, 0.5]


def test_missing_values_are_refused_or_filled():
    table = pd.DataFrame(
        {"n": [1.0, None, 3.0], "c": ["u", None, "v"], "d": pd.to_datetime(["2020-01-01", None, "2020-01-03"]),
         "b": pd.array([True, None, False], "boolean")}
    )  # fmt: skip
    for name in table:
        with pytest.raises(
            DataError, match=rf"X, row 1, column '{name}': the value is missing.*TableEncoder\(missing="
        ):
            rs.TableEncoder().fit(table[[name]])
    encoder = rs.TableEncoder(missing="fill").fit(table)
    assert encoder.get_feature_names_out().tolist() == ["n", "c=u", "c=v", "c=(missing)", "d", "b"]
    assert encoder.transform(table)[1].tolist() == [2, 0, 0, 1, 18263, 0.5]
    model = rs.Regressor(hidden=(), encoder=rs.TableEncoder(missing="fill")).fit(table, [1.0, 2.0, 3.0])
    assert np.isfinite(model.predict(table)).all()
    with pytest.raises(ValueError, match="NaN"):
        rs.Regressor(hidden=()).fit(table[["n"]], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (["1,5", "2,5", "3"], r"X, row 0, column 'c': .*decimal commas: write pandas.read_csv\(\.\.\., decimal=','\)"),
        (["1.2.2024", "13.2.2024", "x"], r"row 2, column 'c': expected a date, as in 2 other rows|look like dates"),
        (["31/1/24", "1/2/24", "3/2/24"], r"dates: write pandas.to_datetime\(X\['c'\], format='%d/%m/%y'\)"),
        (["2024-01-01", "2024-01-02", "soon"], r"row 2, column 'c': expected a date, as in 2 other rows, got 'soon'"),
        ([f"n{k}" for k in range(30)], r"30 different texts in 30 rows.*X.drop\(columns='c'\).*astype\('category'\)"),
        ([str(k) for k in range(30)], r"30 different texts in 30 rows, all of them numbers, too many"),
        ([[1], [2], [3]], r"row 0, column 'c': expected a number, text or a date, got \[1\]"),
        ([1 + 2j] * 3, "'c' is of type complex128"),
    ],
)
def test_columns_that_are_no_inputs(column, said):
    table = pd.DataFrame({"c": column})
    with pytest.raises(DataError, match=said):
        rs.TableEncoder().fit(table)
    with pytest.raises(ValueError, match=r"(?s).*"):
        rs.Classifier(**QUICK).fit(table, np.arange(len(table)) % 2)


@pytest.mark.parametrize("given", [{"missing": "drop"}, {"unknown": None}, {"missing": np.ones(2)}])
def test_settings_that_are_none(given):
    with pytest.raises(PlanError, match=f"{next(iter(given))}= is 'error' or|{next(iter(given))}= is 'zeros' or"):
        rs.TableEncoder(**given).fit(X)


def test_numbers_may_be_categories():
    table = pd.DataFrame({"zip": [2, 10, 2], "n": [1.0, 2.0, 3.0]})
    assert rs.TableEncoder(categories="zip").fit(table).get_feature_names_out().tolist() == ["zip=2", "zip=10", "n"]
    with pytest.raises(DataError, match=r"no column is called 'zap'.*near it: zip"):
        rs.TableEncoder(categories=["zap"]).fit(table)
    coded = table.assign(zip=pd.Categorical(table.zip))  # its type says so
    assert rs.Regressor(hidden=()).fit(coded, [1, 2, 3]).input_names_.tolist() == ["zip=2", "zip=10", "n"]


@pytest.mark.filterwarnings("default")
@parametrize_with_checks([rs.TableEncoder()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_in_a_column_transformer_and_as_pandas():
    mixed = ColumnTransformer([("t", rs.TableEncoder(), ["color", "day"])], remainder="passthrough")
    mixed.set_output(transform="pandas").fit(X[["age", "color", "day"]])
    assert mixed.transform(X[["age", "color", "day"]]).columns[0] == "t__color=blue"
    model = make_pipeline(rs.TableEncoder(), LinearRegression()).fit(X, PRICE)
    assert model.score(X, PRICE) > 0.999


# The models


def test_coefficients_have_the_names_of_their_inputs():
    model = rs.Regressor(hidden=()).fit(X, PRICE)
    assert model.score(X, PRICE) > 0.9999
    assert model.input_names_.tolist() == NAMES
    assert model.coef_.shape == (len(NAMES),)
    found = dict(zip(model.input_names_, model.coef_, strict=True))
    assert found["age"] == pytest.approx(2, abs=1e-3)
    assert found["color=red"] - found["color=blue"] == pytest.approx(30, abs=1e-2)
    assert model.feature_names_in_.tolist() == list(X)
    assert model.n_features_in_ == 5
    with torch.no_grad():
        model.module_.out.weight[:, 1:] = 0
    assert model.input_names_[model.selected_features_].tolist() == ["age"]
    assert model.importances(X, PRICE, random_state=0).shape == (5,)


def test_plain_inputs_have_names_too():
    assert rs.Regressor(hidden=()).fit(X[["age", "member"]], PRICE).input_names_.tolist() == ["age", "member"]
    model = rs.Regressor(hidden=()).fit(np.eye(3), [1.0, 2.0, 3.0])
    assert model.input_names_.tolist() == ["x0", "x1", "x2"]
    assert model.encoder_ is None


@pytest.mark.parametrize("make", [rs.Classifier, rs.Regressor, rs.Autoencoder])
def test_a_model_of_a_table_is_that_of_its_inputs(make):
    y = {rs.Classifier: Y, rs.Regressor: PRICE, rs.Autoencoder: None}[make]
    table, matrix = X, by_hand(X).to_numpy()
    model = make(hidden=(4,), **QUICK).fit(table, y)
    twin = make(hidden=(4,), **QUICK).fit(matrix, y)
    np.testing.assert_allclose(model.predict(table), twin.predict(matrix)) if make is not rs.Classifier else None
    if make is rs.Classifier:
        np.testing.assert_allclose(model.predict_proba(table), twin.predict_proba(matrix))
    assert model.score(table, y) == pytest.approx(twin.score(matrix, y))
    more = model.train((table, y) if y is not None else table, epochs=1).history_[-1]["loss"]
    assert more == pytest.approx(twin.train((matrix, y) if y is not None else matrix, epochs=1).history_[-1]["loss"])
    assert model.to_torch().network is not None
    assert model.compact() is not None


def test_columns_are_those_of_the_training():
    model = rs.Classifier(hidden=(4,), **QUICK).fit(X, Y)
    for wrong, said in (
        (X[["color", "age", "member", "day", "size"]], "this table has them in the order color, age"),
        (X.drop(columns="day"), "this table lacks 'day'"),
        (X.assign(more=1), r"also has 'more'; choose the columns: X\[list\(model.feature_names_in_\)\]"),
        (X.rename(columns={"age": "Age"}), "lacks 'age' and also has 'Age'"),
        (by_hand(X).to_numpy(), "X is a table with the columns of the training, age, color.*got ndarray"),
    ):
        with pytest.raises(DataError, match=said):
            model.predict(wrong)
    with pytest.raises(DataError, match=r"X, row 0, column 'age': expected a number, got 'old'"):
        model.predict(X.assign(age="old"))
    with pytest.raises(DataError, match=r"row 0, column 'day': expected a date"):
        model.predict(X.assign(day=3))
    plain = rs.Classifier(hidden=(4,), **QUICK).fit(X[["age"]], Y)
    with pytest.raises(PlanError, match="its columns 'age'"):
        plain.predict(X[["age"]].astype(str))


def test_unknown_categories_are_counted():
    model = rs.Classifier(hidden=(4,), **QUICK).fit(X, Y)
    odd = X.assign(color=["mauve", "beige", *X.color[2:]])
    with pytest.warns(RestrainWarning, match=r"X, column 'color': 2 rows of 60 with values .*: 'mauve', 'beige'"):
        found = model.predict_proba(odd)
    zeros = by_hand(odd)
    twin = rs.Classifier(hidden=(4,), **QUICK).fit(by_hand(X).to_numpy(), Y)
    np.testing.assert_allclose(found, twin.predict_proba(zeros.to_numpy()))
    strict = rs.Classifier(hidden=(4,), encoder=rs.TableEncoder(unknown="error"), **QUICK).fit(X, Y)
    with pytest.raises(DataError, match=r"row 0, column 'color': 'mauve' was not.*\(2 rows of 60 have such values\)"):
        strict.predict(odd)


def as_polars(table):
    polars = pytest.importorskip("polars")
    return polars.from_arrow(pa.Table.from_pandas(table))


FRAMES = {"arrow": pa.Table.from_pandas, "batch": pa.RecordBatch.from_pandas, "polars": as_polars,
          "lazy": lambda table: as_polars(table).lazy()}  # fmt: skip


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_of_others_are_those_of_pandas(kind):
    model, other = rs.Classifier(hidden=(4,), **QUICK).fit(X, Y), FRAMES[kind](X)
    np.testing.assert_array_equal(model.predict_proba(other), model.predict_proba(X))
    twin = rs.Classifier(hidden=(4,), **QUICK).fit(other, Y)
    np.testing.assert_array_equal(twin.predict_proba(X), model.predict_proba(X))
    numbers = FRAMES[kind](X[["age", "member"]])
    plain = rs.Regressor(hidden=()).fit(numbers, PRICE)
    assert plain.encoder_ is None
    assert plain.feature_names_in_.tolist() == ["age", "member"]
    np.testing.assert_allclose(
        plain.predict(numbers), rs.Regressor(hidden=()).fit(X[["age", "member"]], PRICE).predict(X[["age", "member"]])
    )
    if kind == "arrow":
        assert model.importances(other, Y, random_state=0, repeats=1).shape == (5,)


def test_copies_and_files_carry_the_encoder(tmp_path):
    settings = rs.TableEncoder(missing="fill", categories=["age"])
    model = rs.Classifier(hidden=(4,), encoder=settings, **QUICK).fit(X, Y)
    assert "encoding_" not in vars(settings)  # the user's own isn't changed
    model.save(tmp_path / "m")
    for twin in (pickle.loads(pickle.dumps(model)), rs.load(tmp_path / "m")):
        np.testing.assert_array_equal(twin.predict_proba(X), model.predict_proba(X))
        assert twin.input_names_.tolist() == model.input_names_.tolist()
        assert repr(clone(twin)) == repr(clone(model))
    assert clone(model).encoder.get_params() == settings.get_params()
    found = GridSearchCV(rs.Classifier(hidden=(4,), encoder=rs.TableEncoder(), **QUICK),
                         {"encoder__missing": ["error", "fill"]}, cv=2).fit(X, Y)  # fmt: skip
    assert found.best_params_["encoder__missing"] in ("error", "fill")
    assert rs.Classifier(hidden=(4,), **QUICK).fit(X, Y).fit(by_hand(X).to_numpy(), Y).encoder_ is None
    with pytest.raises(PlanError, match=r"encoder= is a rs.TableEncoder"):
        rs.Classifier(encoder="fill").fit(X, Y)


def test_a_damaged_encoder_is_told(tmp_path, monkeypatch):
    model = rs.Classifier(hidden=(4,), **QUICK).fit(X, Y)
    whole = rs.TableEncoder.to_dict
    for change in (
        lambda data: {**data, "missing": "x"},
        lambda data: {**data, "encoding": {**data["encoding"], "features": data["encoding"]["features"][:3]}},
        lambda data: {**data, "encoding": {**data["encoding"], "features": [{"name": 3, "kind": "number", "fill": 0}]}},
        lambda data: {**data, "encoding": None},
    ):
        monkeypatch.setattr(rs.TableEncoder, "to_dict", lambda self, change=change: change(whole(self)))
        model.save(tmp_path / "m")
        with pytest.raises(FileError, match="/m"):
            rs.load(tmp_path / "m")


def test_batches_of_tables():
    model = rs.Classifier(hidden=(4,), random_state=0).partial_fit(X[:40], Y[:40], classes=["no", "yes"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)
        model.partial_fit(X[40:], Y[40:])
    assert model.n_iter_ == 2


@pytest.mark.parametrize("make", [rs.RegressorCV, rs.ClassifierCV])
def test_paths_over_tables(make):
    y = PRICE if make is rs.RegressorCV else Y
    model = make(points=5, cv=2, normalize=True).fit(X, y)
    twin = make(points=5, cv=2, normalize=True).fit(by_hand(X).to_numpy(), y)
    np.testing.assert_allclose(model.coef_, twin.coef_, atol=1e-8)
    assert model.input_names_.tolist() == NAMES
    assert (model.predict(X) == twin.predict(by_hand(X).to_numpy())).all()
    assert [list(names) for names in model.view().labels.values()] == [NAMES]


# The same as the command line's


def test_python_and_the_command_line_encode_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X.assign(y=Y).to_csv("t.csv", index=False)
    table = tables.read("t.csv")
    names = [name for name in table.columns if name != "y"]
    encoding = Encoding.learn(table, names, [], "error", np.arange(len(table)))
    ours = rs.TableEncoder().fit(X)
    assert encoding == ours.encoding_
    np.testing.assert_array_equal(encoding.apply(table), ours.transform(X))


def test_a_model_of_the_command_line_takes_data_frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X.assign(y=Y).to_csv("t.csv", index=False)
    words = [
        "fit",
        "t.csv",
        "--target",
        "y",
        "--model",
        "classifier",
        "--epochs",
        "2",
        "--hidden",
        "4",
        "--out",
        "run/",
    ]
    assert CliRunner().invoke(command, words).exit_code == 0
    model = rs.load("run/")
    assert model.input_names_.tolist() == NAMES
    shown = CliRunner().invoke(command, ["predict", "run/", "t.csv"])
    assert shown.stdout.split()[1:] == model.predict(X).tolist()
