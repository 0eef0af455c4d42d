"""Data and labels that a model can't take are refused in words of ours, not those of NumPy, torch or scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score

import restrain as rs
from restrain.errors import PlanError

RNG = np.random.default_rng(0)
X, NUMBERS = RNG.normal(size=(20, 2)), np.arange(20) % 2
TEXTS = np.array(["a", "b"])[NUMBERS]
DATES = pd.Series(pd.to_datetime(["2020-01-01", "2021-01-01"] * 10))
FRAME = pd.DataFrame({"x": X[:, 0]})
LABELS = {"int": NUMBERS, "str": TEXTS, "bool": NUMBERS == 1, "object": TEXTS.astype(object)}


@pytest.mark.parametrize(
    "column",
    [pd.Categorical(TEXTS), DATES, DATES - DATES[0], TEXTS, DATES.dt.to_period("D")],
    ids=["category", "datetime", "timedelta", "text", "period"],
)
def test_columns_that_are_no_numbers_where_numbers_were(column):
    table = FRAME.assign(when=column)
    fitted = rs.Classifier(hidden=(), epochs=1).fit(table[["x"]].rename(columns={"x": "when"}), NUMBERS)
    with pytest.raises(PlanError, match=r"^X is of numbers, as in the training; its columns 'when' \(.*\) aren't"):
        fitted.predict(table[["when"]])


@pytest.mark.parametrize("name", ["shuffle", "warm_start", "progress", "monitor_gradients"])
@pytest.mark.parametrize("model", [rs.Classifier, rs.ClassifierCV])
def test_flags_are_true_or_false(model, name):
    with pytest.raises(PlanError, match=f"{name}= is True or False, got 'no'"):
        model(**{"progress": False, name: "no"}).fit(X, NUMBERS)


def test_columns_that_numbers_can_be_made_of():
    table = FRAME.assign(b=NUMBERS == 1, i=pd.array(NUMBERS, "Int64"))
    found = rs.Classifier(hidden=(), epochs=1, random_state=0).fit(table, NUMBERS).predict_proba(table)
    plain = np.stack([X[:, 0], NUMBERS, NUMBERS], 1).astype(float)
    expected = rs.Classifier(hidden=(), epochs=1, random_state=0).fit(plain, NUMBERS).predict_proba(plain)
    np.testing.assert_allclose(found, expected)


def test_targets_that_are_no_numbers():
    for y in (DATES, pd.Series(pd.Categorical(TEXTS))):
        with pytest.raises(PlanError, match="the target y of a Regressor is of numbers, got"):
            rs.Regressor().fit(X, y)
    with pytest.raises(PlanError, match=r"the target y of a Regressor is of numbers.*its columns 'y'"):
        rs.Regressor().fit(X, pd.DataFrame({"y": TEXTS}))


@pytest.mark.parametrize(
    "known", [NUMBERS, TEXTS, NUMBERS == 1, TEXTS.astype(object)], ids=["int", "str", "bool", "obj"]
)
@pytest.mark.parametrize(
    "given", [NUMBERS, TEXTS, NUMBERS == 1, TEXTS.astype(object)], ids=["int", "str", "bool", "obj"]
)
def test_labels_of_another_kind(known, given):
    model = rs.Classifier(hidden=(), epochs=1).fit(X, known)
    if isinstance(known[0], str) == isinstance(given[0], str):
        assert model.score(X, given) == accuracy_score(given, model.predict(X))
        model.train((X, given))
        return
    for call in (lambda: model.score(X, given), lambda: model.train((X, given))):
        with pytest.raises(PlanError, match=r"y has labels such as .*where the classes of the training are"):
            call()


def test_the_score_of_labels_of_steps_is_the_part_of_right_steps():
    x, y = RNG.normal(size=(8, 5, 3)), RNG.integers(0, 2, (8, 5))
    model = rs.Classifier(hidden=((4, "rnn"),), epochs=1).fit(x, y)
    assert model.score(x, y) == pytest.approx(accuracy_score(y.ravel(), model.predict(x).ravel()))


def test_a_dict_of_inputs_is_for_layers_that_name_them():
    x = {"left": RNG.normal(size=(20, 2)), "right": RNG.normal(size=(20, 2))}
    with pytest.raises(PlanError, match="X of several inputs is a dict of 'in'; got"):
        rs.Classifier(hidden=(4,), epochs=1).fit(x, NUMBERS)
