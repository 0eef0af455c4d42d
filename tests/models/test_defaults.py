"""What `fit` decides: scaling, length in updates, validation, a small L2; linear models to convergence."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_linnerud, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

import restrain as rs
from restrain.errors import PlanError
from restrain.models import defaults

X, Y = load_diabetes(return_X_y=True)
X, Y = X[:120], Y[:120]
FLOWERS, KINDS = load_iris(return_X_y=True)


@pytest.fixture
def short(monkeypatch):
    """Trainings of some updates."""
    monkeypatch.setattr(defaults, "UPDATES", 60)
    monkeypatch.setattr(defaults, "PATIENCE", 20)
    monkeypatch.setattr(defaults, "EVERY", 4)
    monkeypatch.setattr(defaults, "FIXED", 12)


# ---------------------------------------------------------------- scaling


def test_units_of_the_data_do_not_matter():
    given = {"hidden": (5,), "epochs": 3, "random_state": 0}
    one, other = rs.Regressor(**given).fit(X, Y), rs.Regressor(**given).fit(1000 * X + 5, 1e-3 * Y - 4)
    np.testing.assert_allclose(other.predict(1000 * X + 5), 1e-3 * one.predict(X) - 4, rtol=1e-6)
    one, other = rs.Classifier(**given).fit(FLOWERS, KINDS), rs.Classifier(**given).fit(7 - FLOWERS / 9, KINDS)
    assert other.input_scale_ is not None
    assert rs.Classifier(normalize=False, **given).fit(FLOWERS, KINDS).input_scale_ is None


def test_train_partial_fit_and_outputs_with_an_activation_are_not_scaled():
    model = rs.Regressor(hidden=(3,), epochs=1)
    assert model.train((X, Y)).input_scale_ is None
    assert rs.Regressor(hidden=(3,)).partial_fit(X, Y).input_scale_ is None
    assert rs.Regressor([10, (1, "softplus")], epochs=1).fit(X, Y).input_scale_ is None
    assert rs.Regressor([10, (1, "softplus")], epochs=1, normalize=True).fit(X, Y).input_scale_ is not None
    assert model.fit(X, Y).train((X, Y)).target_scale_ is not None  # what fit learned, train keeps
    with pytest.raises(PlanError, match='True, False or "auto"'):
        rs.Regressor(normalize="yes", epochs=1).fit(X, Y)


# ---------------------------------------------------------------- length, validation, L2


def test_the_best_weights_of_a_part_held_back(short):
    model = rs.Classifier(hidden=(5,), random_state=0, learning_rate=0.3).fit(FLOWERS, KINDS)
    losses = [row["valid_data_loss"] for row in model.history_ if "valid_data_loss" in row]
    assert len(losses) > 3
    assert model.n_iter_ < 30  # 120 samples are two updates an epoch
    assert losses[-1] > min(losses)
    assert "weight_l2" in model.history_[0]
    best = model.history_[[row.get("valid_data_loss") for row in model.history_].index(min(losses))]
    assert best["valid_data_loss"] < losses[-1]
    twin = rs.Classifier(hidden=(5,), random_state=0, learning_rate=0.3).fit(FLOWERS, KINDS)
    np.testing.assert_array_equal(twin.predict_proba(FLOWERS), model.predict_proba(FLOWERS))


def test_updates_are_counted(short):
    for count, epochs in ((60, 60), (120, 30)):
        with pytest.warns(ConvergenceWarning, match=f"didn't converge in {epochs} epochs"):
            model = rs.Regressor(hidden=(5,), learning_rate=1e-4, random_state=0).fit(X[:count], X[:count, 0])
        assert model.n_iter_ == epochs


def test_one_word_trains_as_long_as_it_says(short):
    model = rs.Regressor(hidden=(5,), epochs=7, random_state=0).fit(X, Y)
    assert [set(row) for row in model.history_] == [{"epoch", "loss", "data_loss"}] * 7
    assert rs.Regressor(hidden=(5,), random_state=0).fit(X, Y, epochs=3).n_iter_ == 3
    with pytest.raises(PlanError, match="patience= needs validation data"):
        rs.Regressor(hidden=(5,), epochs=7, patience=3).fit(X, Y)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_is_given_is_kept(short):
    rows = rs.Regressor(hidden=(5,), hidden_dropout=0.1, random_state=0).fit(X, Y).history_
    assert "weight_l2" not in rows[0]
    assert "valid_data_loss" in rows[-1] or "valid_data_loss" in rows[0]
    assert "weight_l2" not in rs.Regressor(hidden=(5,), weight_l2=0, random_state=0).fit(X, Y).history_[0]
    model = rs.Regressor(hidden=(5,), valid=None, random_state=0).fit(X, Y)
    assert model.n_iter_ == 6  # of two updates
    assert "valid_data_loss" not in model.history_[0]
    assert (
        "valid_data_loss"
        in rs.Regressor(hidden=(5,), random_state=0).fit(X[20:], Y[20:], valid=(X[:20], Y[:20])).history_[0]
    )


def test_few_samples_are_all_trained_on(short):
    assert "valid_data_loss" not in rs.Regressor(hidden=(3,)).fit(X[:49], Y[:49]).history_[0]
    assert defaults.part(np.arange(60) % 55, 60) is None
    assert defaults.part(np.arange(60) % 2, 60) == 0.2


def test_train_is_as_it_was():
    model = rs.Classifier(hidden=(2,), random_state=0).train((FLOWERS[::10], KINDS[::10]))
    assert model.n_iter_ == 100
    assert [set(row) for row in model.history_] == [{"epoch", "loss", "data_loss", "acc"}] * 100


def test_a_warm_start_goes_on():
    model = rs.Regressor(hidden=(3,), warm_start=True, epochs=2, random_state=0).fit(X, Y)
    assert model.fit(X, Y).n_iter_ == 4
    assert len(model.history_) == 4
    assert model.set_params(warm_start=False).fit(X, Y).n_iter_ == 2


# ---------------------------------------------------------------- linear models


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_least_squares(dtype):
    x, y = X.astype(dtype), Y.astype(dtype)
    model, exact = rs.Regressor(hidden=()).fit(x, y), LinearRegression().fit(x.astype("f8"), Y)
    np.testing.assert_allclose(model.predict(x), exact.predict(x), rtol=1e-6)
    assert len(model.history_) < 6
    assert "valid_data_loss" not in model.history_[0]


def test_ridge_on_the_scale_of_the_data():
    model = rs.Regressor(hidden=(), weight_l2=0.1, normalize=False).fit(X, Y)
    exact = Ridge(alpha=0.1 * len(X), solver="svd").fit(X, Y)  # scikit-learn's data loss is the sum
    np.testing.assert_allclose(model.predict(X), exact.predict(X), rtol=1e-7)


def test_logistic_regression():
    y = FLOWERS[:, 1] > 3
    noisy = np.where(np.arange(150) % 7 == 0, ~y, y)
    model, exact = (
        rs.Classifier(hidden=()).fit(FLOWERS, noisy),
        LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000),
    )
    np.testing.assert_allclose(
        model.predict_proba(FLOWERS), exact.fit(FLOWERS, noisy).predict_proba(FLOWERS), atol=1e-6
    )


def test_more_features_than_samples_are_fitted():
    wide = np.random.default_rng(0).normal(size=(20, 50))
    model = rs.Regressor(hidden=()).fit(wide, Y[:20])
    np.testing.assert_allclose(model.predict(wide), Y[:20], rtol=1e-5)
    z = (wide - wide.mean(0)) / wide.std(0)
    least = np.linalg.pinv(z) @ (Y[:20] - Y[:20].mean()) / Y[:20].std()
    np.testing.assert_allclose(model.module_.out.weight.detach()[0], least, atol=1e-5)


def test_a_linear_model_that_is_not_there_yet_is_told(monkeypatch):
    monkeypatch.setattr(defaults, "ROUNDS", 1)
    with pytest.warns(ConvergenceWarning, match="didn't converge"):
        rs.Regressor(hidden=()).fit(X, Y)


def test_linear_medians_are_near_the_optimum():
    from sklearn.linear_model import QuantileRegressor

    model, exact = (
        rs.Regressor(hidden=(), loss="absolute").fit(X, Y),
        QuantileRegressor(quantile=0.5, alpha=0).fit(X, Y),
    )
    assert np.abs(model.predict(X) - Y).mean() < 1.002 * np.abs(exact.predict(X) - Y).mean()


def test_other_rules_of_linear_models_are_trained(short):
    model = rs.Regressor(hidden=(), weight_l1=0.3, how="proximal", random_state=0).fit(X, Y)
    assert model.n_iter_ == 6
    assert "valid_data_loss" not in model.history_[0]


# ---------------------------------------------------------------- convergence


def course(losses):
    return [{"valid_data_loss": loss} for loss in losses]


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        (np.linspace(1, 0, 100), True),  # a tenth of the fall in the last tenth
        (np.exp(-np.arange(100) / 10), False),
        (np.exp(-np.arange(100) / 30), True),  # 1.7 % of it
        (np.exp(-np.arange(100) / 20), False),  # .4 %
        (5 + 100 * np.exp(-np.arange(100) / 20), False),  # whatever the scale
        (np.r_[np.linspace(1, 0.1, 50), np.linspace(0.2, 0.11, 50)], False),  # the best loss was earlier
        (np.ones(100), False),
        ([1.0], False),
        ([], False),
    ],
)
def test_what_counts_as_still_falling(losses, falls):
    assert defaults.still_falling(course(losses)) is falls
    sparse = [row if number % 5 == 0 else {} for number, row in enumerate(course(losses), 1)]
    assert defaults.still_falling(sparse) is falls  # validated at every fifth epoch


TABLES = {
    "iris": (rs.Classifier, lambda: load_iris(return_X_y=True)),
    "wine": (rs.Classifier, lambda: load_wine(return_X_y=True)),
    "breast cancer": (rs.Classifier, lambda: load_breast_cancer(return_X_y=True)),
    "diabetes": (rs.Regressor, lambda: load_diabetes(return_X_y=True)),
    "linnerud": (rs.Regressor, lambda: load_linnerud(return_X_y=True)),
    "digits": (rs.Classifier, lambda: load_digits(return_X_y=True)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", TABLES)
def test_no_warning_where_the_defaults_converge(name):
    model, read = TABLES[name]
    for seed in range(3):
        model(random_state=seed).fit(*read())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "breast cancer", "diabetes"])
def test_a_warning_where_the_rate_is_too_small(name):
    model, read = TABLES[name]
    with pytest.warns(ConvergenceWarning, match="take a greater learning_rate="):
        model(random_state=0, learning_rate=3e-6).fit(*read())
