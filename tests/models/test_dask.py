"""Folds and halves of samples on a Dask cluster of this machine: the same results as without it."""

import joblib
import numpy as np
import pytest

import restrain as rs
from restrain.paths import stability_selection

distributed = pytest.importorskip("distributed")

DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((60, 8))
Y = 2 * X[:, 1] + DRAW.standard_normal(60)


@pytest.fixture(scope="module")
def cluster():
    given = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**given) as local, distributed.Client(local) as client:
        yield client


def pid(*_):
    import os

    return os.getpid()


@pytest.mark.slow  # processes that import torch
def test_folds_and_halves_on_a_cluster(cluster):
    usual = rs.RegressorCV(points=8, cv=3).fit(X, Y)
    halves = usual.stability(X, Y, pairs=3, random_state=0)
    workers = set(cluster.run(pid).values())
    with joblib.parallel_config("dask"):
        found = rs.RegressorCV(points=8, cv=3).fit(X, Y)
        same = found.stability(X, Y, pairs=3, random_state=0)
        where = stability_selection(lambda rows: [pid() in workers], 10, pairs=2, random_state=0)
    np.testing.assert_array_equal(found.scores_, usual.scores_)
    np.testing.assert_array_equal(found.coef_, usual.coef_)
    assert same.frequencies.equal(halves.frequencies)
    assert where.frequencies.tolist() == [[1.0]]  # run by the workers, not here
    assert stability_selection(lambda rows: [pid() in workers], 10, pairs=2).frequencies.tolist() == [[0.0]]
