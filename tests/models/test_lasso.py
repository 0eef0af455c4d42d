"""Active sets for elastic nets: optimality conditions by hand, scikit-learn, and designs that break linear systems."""

import numpy as np
import pytest
from sklearn.linear_model import ElasticNet

from restrain.models import lasso
from restrain.models.lasso import elastic_net_path


def problem(n, p, seed=0, correlation=0.0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, p)) + correlation * draw.standard_normal((n, 1))
    y = x[:, : p // 4].sum(1) + draw.standard_normal(n)
    return x - x.mean(0), y - y.mean()


def violation(x, y, w, a, c):
    """The greatest distance of -∇ from the subdifferential, in units of a."""
    slope = x.T @ (y - x @ w) / len(y) - c * w
    return np.where(w == 0, np.maximum(np.abs(slope) - a, 0), np.abs(slope - a * np.sign(w))).max() / a


def grid(x, y, points, ratio):
    return np.abs(x.T @ y).max() / len(y) * np.geomspace(1, ratio, points)


@pytest.mark.parametrize("shape", [(60, 10), (30, 30), (25, 80), (2, 5), (40, 1)])
@pytest.mark.parametrize("correlation", [0.0, 3.0])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_conditions_hold_at_every_point(shape, correlation, ridge, monkeypatch):
    monkeypatch.setattr(lasso, "_descended", lambda *given: pytest.fail("coordinate descent"))
    x, y = problem(*shape, correlation=correlation)
    strengths = grid(x, y, 12, 1e-3)
    found = elastic_net_path(x, y, strengths, ridge * strengths)
    assert found.shape == (12, shape[1])
    assert not found[0].any()
    assert found[-1].any()
    for w, a in zip(found, strengths, strict=True):
        assert violation(x, y, w, a, ridge * a) < 1e-7
    assert violation(x, y, found[5], 1.01 * strengths[5], ridge * strengths[5]) > 1e-3


def test_the_order_of_strengths_and_long_ways_between_them_dont_matter():
    x, y = problem(40, 100, correlation=1.0)
    strengths = grid(x, y, 9, 1e-2)
    whole = elastic_net_path(x, y, strengths, 0 * strengths)
    mixed = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(elastic_net_path(x, y, strengths[mixed], 0 * strengths), whole[mixed], atol=1e-10)
    np.testing.assert_allclose(elastic_net_path(x, y, strengths[8:], [0.0])[0], whole[8], atol=1e-8)
    best = ElasticNet(alpha=strengths[8], l1_ratio=1.0, tol=1e-13, max_iter=10**6).fit(x, y).coef_
    np.testing.assert_allclose(whole[8], best, atol=1e-6)


def test_equal_features_are_left_to_coordinate_descent():
    x, y = problem(30, 8)
    x = np.concatenate([x, x[:, :2], np.zeros((30, 1))], 1)
    strengths = grid(x, y, 6, 1e-2)
    for w, a in zip(elastic_net_path(x, y, strengths, 0 * strengths), strengths, strict=True):
        assert violation(x, y, w, a, 0) < 1e-5
        assert w[-1] == 0
    ridged = elastic_net_path(x, y, strengths, strengths)
    np.testing.assert_allclose(ridged[:, 8:10], ridged[:, :2], atol=1e-9)  # strictly convex: equal shares


def test_without_a_signal_all_is_zero():
    assert not elastic_net_path(np.ones((5, 3)) * 0, np.arange(5.0) - 2, [1.0, 0.1], [0.0, 0.0]).any()
