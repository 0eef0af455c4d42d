"""The models inside the tools of scikit-learn, joblib and Optuna."""

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.inspection import partial_dependence, permutation_importance
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import restrain as rs
from restrain.errors import SelectionError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 4))
NOISE = RNG.normal(size=200)
LABELS = (X[:, 0] + 0.5 * X[:, 1] + 0.5 * NOISE > 0).astype(int)
NUMBERS = 3 * X[:, 0] + X[:, 1] + 0.1 * NOISE
QUICK = {"hidden": (8,), "epochs": 10, "learning_rate": 0.01, "random_state": 0, "progress": False}


def test_grid_search_in_a_pipeline_by_the_names_of_its_steps():
    model = make_pipeline(StandardScaler(), rs.Classifier(**QUICK))
    search = GridSearchCV(model, {"classifier__weight_l2": [1e-4, 10.0], "classifier__hidden": [(8,), (4, 4)]}, cv=2)
    search.fit(X, LABELS)
    assert search.best_params_["classifier__weight_l2"] == 1e-4
    assert search.best_estimator_[-1].layers_[1]["size"] == search.best_params_["classifier__hidden"][0]
    assert search.score(X, LABELS) > 0.8


def test_halving_over_epochs_as_the_resource():
    search = HalvingGridSearchCV(
        rs.Classifier(**QUICK),
        {"weight_l2": [1e-4, 1e-2, 100.0]},
        resource="epochs",
        min_resources=2,
        max_resources=12,
        factor=3,
        cv=2,
        random_state=0,
    ).fit(X, LABELS)
    assert search.best_params_["weight_l2"] < 100
    assert search.best_estimator_.n_iter_ == search.n_resources_[-1]


def test_column_transformer_and_names():
    table = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "kind": np.where(LABELS, "x", "y")})
    parts = ColumnTransformer(
        [("numbers", StandardScaler(), ["a", "b"]), ("kinds", OneHotEncoder(sparse_output=False), ["kind"])]
    )
    model = make_pipeline(parts, rs.Regressor(**{**QUICK, "hidden": ()})).fit(table, NUMBERS)
    assert model[-1].n_features_in_ == 4
    assert model.score(table, NUMBERS) > 0.9
    codes = make_pipeline(parts, rs.Autoencoder(hidden=(3,), epochs=2, random_state=0)).set_output(transform="pandas")
    assert list(codes.fit(table).transform(table).columns) == ["autoencoder0", "autoencoder1", "autoencoder2"]


def test_calibrated_probabilities():
    model = rs.Classifier(**{**QUICK, "epochs": 150, "hidden": (100,)}, weight_l2=0.0, normalize=False)
    train, test = slice(0, 100), slice(100, None)
    calibrated = CalibratedClassifierCV(model, cv=3, method="sigmoid").fit(X[train], LABELS[train])
    alone = model.fit(X[train], LABELS[train])
    p = calibrated.predict_proba(X[test])
    np.testing.assert_allclose(p.sum(1), 1)
    assert log_loss(LABELS[test], p) < log_loss(LABELS[test], alone.predict_proba(X[test]))


@pytest.mark.parametrize("backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_folds_by_joblib_are_those_of_one_process(backend):
    model = rs.Classifier(**QUICK, hidden_dropout=0.2)
    expected = cross_val_score(model, X, LABELS, cv=3)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        np.testing.assert_array_equal(cross_val_score(model, X, LABELS, cv=3), expected)


def test_permutation_importance_finds_the_inputs():
    model = rs.Regressor(**{**QUICK, "epochs": 40}).fit(X, NUMBERS)
    found = permutation_importance(model, X, NUMBERS, n_repeats=5, random_state=0).importances_mean
    assert found.argmax() == 0
    assert sorted(found.argsort()[-2:]) == [0, 1]
    np.testing.assert_array_equal(model.importances(X, NUMBERS, repeats=5, random_state=0), found)


def test_partial_dependence_of_a_linear_model_is_its_line():
    model = rs.Regressor(hidden=()).fit(X, NUMBERS)
    found = partial_dependence(model, X, [0], kind="average", grid_resolution=5)
    slopes = np.diff(found["average"][0]) / np.diff(found["grid_values"][0])
    np.testing.assert_allclose(slopes, model.coef_[0], rtol=1e-6)
    clf = rs.Classifier(**QUICK).fit(X, LABELS)
    found = partial_dependence(clf, X, [0], kind="average", grid_resolution=5)["average"][0]
    by_hand = []
    for value in partial_dependence(clf, X, [0], grid_resolution=5)["grid_values"][0]:
        moved = X.copy()
        moved[:, 0] = value
        by_hand.append(clf.predict_proba(moved)[:, 1].mean())
    np.testing.assert_allclose(found, by_hand)


def test_optuna_prunes_by_the_validation_of_each_epoch():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lengths = {}

    def objective(trial):
        strength = trial.suggest_categorical("weight_l2", [1e-4, 1e3])
        net = rs.Classifier([4, 8, 2], weight_l2=strength, learning_rate=0.02, random_state=0)
        for epoch, (_, valid) in enumerate(net.itertrain((X, LABELS), valid=0.3, epochs=8)):
            lengths[trial.number] = epoch + 1
            trial.report(valid["data_loss"], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return valid["data_loss"]

    sampler = optuna.samplers.GridSampler({"weight_l2": [1e-4, 1e3]}, seed=0)
    pruner = optuna.pruners.ThresholdPruner(upper=0.6, n_warmup_steps=3)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=2)
    assert study.best_params["weight_l2"] == 1e-4
    assert sorted(lengths.values()) == [4, 8]


def test_monte_carlo_of_a_fitted_models_own_dropout():
    net = rs.Regressor(**QUICK, hidden_dropout=0.3, weight_l2=1e-3).fit(X, NUMBERS)
    plain = net.predict(X)
    with rs.sampling(net):
        draws = np.stack([net.predict(X) for _ in range(20)])
    np.testing.assert_array_equal(net.predict(X), plain)
    assert (draws.std(0) > 0).all()
    import torch

    torch.manual_seed(0)
    with rs.sampling(net):
        found = net.predict(X)
    torch.manual_seed(0)
    with rs.attach(net.module_, rs.Dropout(0.3).on(rs.outputs("hid1"))), rs.sampling(net.module_):
        np.testing.assert_array_equal(net.predict(X), found)
    with (
        pytest.raises(SelectionError, match="nothing in this Network is random"),
        rs.sampling(rs.Regressor(**QUICK).fit(X, NUMBERS)),
    ):
        pass
