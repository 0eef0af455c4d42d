"""The models as scikit-learn estimators: its own checks, searches, pipelines, copies."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Lasso
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import restrain as rs
from restrain.errors import PlanError

DIGITS = load_digits()
X, Y = DIGITS.data[:300] / 16, DIGITS.target[:300]


@pytest.mark.filterwarnings("default")  # scikit-learn's checks make warnings of their own
@parametrize_with_checks([rs.Classifier(epochs=100), rs.Regressor(epochs=100), rs.Autoencoder(hidden=(5,), epochs=100)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@parametrize_with_checks(
    [rs.Classifier(), rs.Regressor(), rs.Autoencoder(), rs.Classifier(hidden=()), rs.Regressor(hidden=())]
)
def test_scikit_learns_own_checks_of_what_fit_decides(estimator, check):
    check(estimator)


def test_grid_search_over_a_strength():
    search = GridSearchCV(
        rs.Classifier(hidden=(20,), epochs=10, learning_rate=0.01, random_state=0),
        {"weight_l2": [0.0, 1e-3, 10.0]},
        cv=3,
    )
    search.fit(X, Y)
    assert search.best_params_["weight_l2"] < 10
    assert search.best_score_ > 0.8
    assert min(search.cv_results_["mean_test_score"]) < 0.5  # the greatest strength holds it back


def test_in_a_pipeline():
    model = make_pipeline(StandardScaler(), rs.Autoencoder(hidden=(30,), epochs=20, random_state=0))
    codes = model.fit(X).transform(X)
    assert codes.shape == (300, 30)
    model = make_pipeline(StandardScaler(), rs.Classifier(hidden=(30,), hidden_dropout=0.2, epochs=60, random_state=0))
    assert cross_val_score(model, X, Y, cv=3).mean() > 0.85


def test_clone_takes_every_setting_and_nothing_learned():
    model = rs.Classifier([64, (5, "tanh"), 10], weight_l1=1e-4, noise={"in": 0.1}, regularizers=[1e-4 * rs.L2().on()])
    model.train((X, Y), epochs=1)
    twin = clone(model)
    assert str(twin.get_params()) == str(model.get_params())
    with pytest.raises(NotFittedError):
        twin.predict(X)


def test_a_penalty_that_is_registered_later_is_a_keyword_too():
    before = rs.Classifier(hidden=(5,), epochs=2)
    chosen = rs.RegressorCV(points=3)

    class LateComer(rs.Penalty):
        def __call__(self, w):
            return w.pow(4).sum()

    assert before.latecomer is None
    for model in (before, chosen):
        assert "latecomer" in clone(model).get_params()
    after = rs.Classifier(hidden=(5,), epochs=2, latecomer=0.1).fit(X, Y)
    assert "latecomer" in after.history_[-1]
    assert before.set_params(latecomer=0.2).fit(X, Y).history_[-1]["latecomer"] > 0


def test_an_unknown_keyword_is_an_error_that_lists_what_exists():
    with pytest.raises(PlanError, match=r"no keyword 'weight_l3' \(near it: weight_l2"):
        rs.Classifier(weight_l3=1.0)
    with pytest.raises(PlanError, match=r"no keyword 'epoch'.*epochs"):
        rs.Classifier().fit(X, Y, epoch=3)
    with pytest.raises(ValueError, match="weight_l3"):
        rs.Classifier().set_params(weight_l3=1.0)


def test_pickled_it_predicts_and_trains_the_same():
    model = rs.Regressor(hidden=(5,), epochs=3, random_state=0, weight_l1=1e-3, input_noise=0.1).fit(X, Y)
    twin = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(twin.predict(X), model.predict(X))
    np.testing.assert_array_equal(twin.train((X, Y)).predict(X), model.train((X, Y)).predict(X))


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_linear_regressor_with_proximal_l1_is_the_lasso(alpha):
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), y / y.std()
    exact = Lasso(alpha=alpha, tol=1e-14, max_iter=100_000).fit(x, y)
    # scikit-learn's data loss is half of ours
    l1 = {"strength": 2 * alpha, "on": "out.weight", "how": "proximal"}
    sgd = {"algo": "sgd", "learning_rate": 0.1, "batch_size": len(x), "epochs": 4000, "shuffle": False}
    model = rs.Regressor(hidden=(), normalize=False, **sgd).fit(x, y, weight_l1=l1)
    found = model.module_.out.weight.detach().numpy()[0]
    np.testing.assert_allclose(found, exact.coef_, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found == 0, exact.coef_ == 0)
    assert (found == 0).any()
    assert model.module_.out.bias.item() == pytest.approx(exact.intercept_, abs=1e-5)


class InWorkers(rs.Penalty):
    def __call__(self, w):
        return w.pow(4).sum()


def test_in_worker_processes_a_penalty_of_ones_own_still_acts():
    model = rs.Classifier(hidden=(5,), epochs=1, random_state=0)
    grid = {"inworkers": [1e-3]}
    search = GridSearchCV(model, grid, cv=2, n_jobs=2, scoring=rules_of_history).fit(X, Y)
    assert search.cv_results_["mean_test_score"][0] == 1


def rules_of_history(model, x, y):
    return float("inworkers" in model.history_[0])
