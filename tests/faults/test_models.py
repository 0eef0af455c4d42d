"""Models by keyword: penalties of one's own in workers (A16), names of columns (A18), classes (A19), aliases (A20)."""

import numpy as np
import pandas as pd
import pytest

import restrain as rs
from faults.helpers import alone
from restrain.errors import RestrainError

# A16: a penalty of one's own, in workers that unpickle its class

IN_WORKERS = """
import sys, joblib, restrain as rs
from sklearn.datasets import load_iris

class Strong(rs.L2):
    def __call__(self, w):
        return 1000 * w.square().sum()

class Direct(rs.Penalty):
    def __call__(self, w):
        return 1000 * w.square().sum()

def value(model, name):
    X, y = load_iris(return_X_y=True)
    return model.fit(X, y).history_[-1][name]

if __name__ == "__main__":
    name = sys.argv[1]
    model = rs.Classifier(hidden=(8,), epochs=1, random_state=0, **{name: 1e-3})
    work = [joblib.delayed(value)(model, name) for _ in range(4)]
    print(*joblib.Parallel(n_jobs=2)(work), value(model, name))
"""

IN_ONE_PROCESS = """
import pickle, sys, types
import cloudpickle
import restrain as rs
from sklearn.datasets import load_iris

name = sys.argv[1]
formula = {"__call__": lambda self, w: 1000 * w.square().sum(), "__module__": "__main__"}
base = {"strong": rs.L2, "direct": rs.Penalty}[name]
cls = types.new_class(name.title(), (base,), exec_body=lambda body: body.update(formula))
model = rs.Classifier(hidden=(8,), epochs=1, random_state=0, **{name: 1e-3})
X, y = load_iris(return_X_y=True)
right = model.fit(X, y).history_[-1][name]
for _ in range(2):
    twin, again = pickle.loads(cloudpickle.dumps((model, cls)))
    found = twin.fit(X, y).history_[-1][name]
    assert abs(found - right) < 1e-6 * right, (found, right)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strong", "direct"])
def test_a_penalty_of_ones_own_has_its_formula_in_parallel_workers(name, tmp_path):
    (tmp_path / "study.py").write_text(IN_WORKERS)
    start = f"import runpy, sys; sys.argv = ['study.py', '{name}']; runpy.run_path('study.py', run_name='__main__')"
    done = alone(start, seconds=240, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *found, right = map(float, done.stdout.split())
    assert found == pytest.approx([right] * 4)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["strong", "direct"])
def test_a_penalty_of_ones_own_has_its_formula_after_its_class_was_unpickled(name):
    done = alone(IN_ONE_PROCESS, name, seconds=120)
    assert done.returncode == 0, done.stderr[-2000:]


# A18: names of columns

TABLE = pd.DataFrame({"a": [0.0, 1.0, 2.0, 5.0], "b": [100.0, 300.0, 500.0, 100.0]})


@pytest.mark.parametrize("kind", [rs.Standardize, rs.RobustScale])
@pytest.mark.parametrize("way", ["forward", "inverse", "inverse_std"])
def test_columns_in_another_order_are_scaled_by_their_own_statistics_or_refused(kind, way):
    scale = kind().fit(TABLE)
    right = np.asarray(getattr(scale, way)(TABLE))
    try:
        found = pd.DataFrame(np.asarray(getattr(scale, way)(TABLE[["b", "a"]])))
    except RestrainError as error:
        told = str(error)
    else:
        told = "a"
        swapped = np.allclose(found, right[:, ::-1])
        as_learned = np.allclose(found, right)
        assert swapped or as_learned
    assert "a" in told


@pytest.mark.parametrize("kind", [rs.Standardize, rs.RobustScale])
def test_columns_of_other_names_are_refused(kind):
    scale = kind().fit(TABLE)
    with pytest.raises(RestrainError, match="c"):
        scale(TABLE.rename(columns={"b": "c"}))


# A19: classes in validation and training


def rare(seed, minority=10, count=200):
    draws = np.random.default_rng(seed)
    y = np.zeros(count, int)
    y[draws.choice(count, minority, replace=False)] = 1
    return (draws.normal(size=(count, 3)) + 3 * y[:, None]).astype("float32"), y


def test_the_validation_split_has_each_class_in_proportion():
    """Of ten rows of the minority, a fifth is two; a constant prediction of the majority has accuracy 38 / 40."""
    accuracies = []
    for seed in range(12):
        X, y = rare(seed)
        model = rs.Classifier(hidden=(), epochs=1, learning_rate=0.0, valid=0.2, random_state=seed, algo="sgd")
        X = np.zeros_like(X)  # all predictions are one class
        model.fit(X, y)
        accuracies.append(model.history_[-1]["valid_acc"])
    assert {round(one, 6) for one in accuracies} <= {38 / 40, 2 / 40}


def test_a_class_of_one_row_stays_in_training():
    for seed in range(10):
        X, y = rare(seed, minority=1, count=20)
        try:
            model = rs.Classifier(hidden=(), epochs=60, learning_rate=0.3, valid=0.3, random_state=seed).fit(X, y)
        except (RestrainError, rs.errors.RestrainWarning) as told:
            assert "1" in str(told)  # noqa: PT017
            continue
        assert model.predict(X[y == 1])[0] == 1


def test_data_of_one_class_are_refused_or_told():
    X = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises((RestrainError, ValueError, UserWarning), match="class"):
        rs.Classifier(hidden=(4,), epochs=1).fit(X, np.zeros(20, int))


# A20: two names of one keyword

ALIASES = [
    ("weight_l2", "l2"),
    ("weight_l1", "l1"),
    ("weight_decay", "l2"),
    ("grouplasso", "group_lasso"),
    ("tv", "total_variation"),
    ("totalvariation", "tv"),
    ("max_norm", "maxnorm"),
    ("nonnegative", "non_negative"),
    ("elasticnet", "elastic_net"),
    ("klsparsity", "kl_sparsity"),
    ("nuclearnorm", "nuclear_norm"),
]
VALUES = {"max_norm": 1.0, "maxnorm": 1.0, "nonnegative": True, "non_negative": True}
VALUES |= {name: {"strength": 1e-3, "l1": 1.0, "l2": 1.0} for name in ("elasticnet", "elastic_net")}
VALUES |= {name: {"strength": 1e-3, "rate": 0.1} for name in ("klsparsity", "kl_sparsity")}
DATA = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 2


@pytest.mark.parametrize("pair", [("weight_decay", "weight_l2"), *ALIASES], ids=" and ".join)
def test_two_names_of_one_keyword_are_refused(pair):
    settings = {name: VALUES.get(name, 1e-3) for name in pair}
    with pytest.raises(RestrainError, match=rf"(?s){pair[0]}.*{pair[1]}|{pair[1]}.*{pair[0]}"):
        rs.Classifier(hidden=(5,), activation="sigmoid", epochs=1, **settings).fit(*DATA)


@pytest.mark.parametrize("pair", [("l2", "l1"), ("weight_l1", "grouplasso")], ids=" and ".join)
def test_two_keywords_of_different_penalties_both_act(pair):
    model = rs.Classifier(hidden=(5,), epochs=1, random_state=0, **dict.fromkeys(pair, 1e-3)).fit(*DATA)
    assert set(pair) <= set(model.history_[-1])


def test_two_names_are_refused_in_train_too():
    X, y = DATA
    net = rs.Classifier([4, 5, 2], random_state=0)
    with pytest.raises(RestrainError, match=r"weight_l2|l2"):
        net.train((X, y), epochs=1, weight_l2=1e-3, l2=1e-3)
