"""Stability selection: counts by brute force on a lasso, bounds by linear programmes and by simulation."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.linear_model import Lasso, LogisticRegression

import restrain as rs
from restrain.errors import PlanError
from restrain.paths import Stability, stability_selection

DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((40, 12))
Y = 2 * X[:, 0] - X[:, 3] + 0.5 * X[:, 5] + DRAW.standard_normal(40)
ALPHAS = (0.6, 0.3)


def select(rows):
    return np.stack([Lasso(alpha).fit(X[rows], Y[rows]).coef_ != 0 for alpha in ALPHAS])


def brute_force(pairs, seed):
    """{(strength, feature): times selected}, and the mean number selected at any strength, in loops."""
    draw = torch.Generator().manual_seed(seed)
    counts, sizes = np.zeros((2, 12)), []
    for _ in range(pairs):
        order = torch.randperm(40, generator=draw).tolist()
        for rows in (order[:20], order[20:]):
            used = set()
            for row, alpha in enumerate(ALPHAS):
                for k, value in enumerate(Lasso(alpha).fit(X[rows], Y[rows]).coef_):
                    if value != 0:
                        counts[row, k] += 1
                        used.add(k)
            sizes.append(len(used))
    return counts / (2 * pairs), sum(sizes) / len(sizes)


def test_frequencies_of_a_lasso_are_those_counted_in_loops():
    found = stability_selection(select, 40, pairs=8, threshold=0.8, random_state=5)
    frequencies, mean = brute_force(8, 5)
    np.testing.assert_array_equal(found.frequencies, frequencies)
    assert found.mean_selected == mean
    assert found.stable.tolist() == [k for k in range(12) if max(frequencies[:, k]) >= 0.8]
    assert {0, 3} <= set(found.stable.tolist()) != set(range(12))
    assert found.bound == pytest.approx(mean**2 / (0.6 * 12))
    assert not np.array_equal(found.frequencies, brute_force(8, 6)[0])


def test_processes_and_single_strengths_dont_matter():
    one = stability_selection(select, 40, pairs=3, random_state=1)
    other = stability_selection(select, 40, pairs=3, random_state=1, n_jobs=2)
    assert one.frequencies.equal(other.frequencies)
    single = stability_selection(lambda rows: select(rows)[1], 40, pairs=3, random_state=1)
    assert single.frequencies.equal(one.frequencies[1:])


def test_halves_are_complementary():
    seen = []
    stability_selection(lambda rows: seen.append(set(rows.tolist())) or [True], 11, pairs=4, random_state=0)
    assert len(seen) == 8
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert len(one) == len(other) == 5
        assert not one & other
    assert seen[0] != seen[2]


def most(tail, mean, pairs):
    """Greatest P(X >= tail / pairs) of unimodal X on {0, 1/pairs, ..., 1} with mean <= `mean`."""
    grid, best = np.arange(pairs + 1), 0.0
    for mode in range(pairs + 1):
        rises = np.zeros((pairs, pairs + 1))
        for k in range(pairs):  # rows <= 0: up to the mode the chances grow, then they fall
            rises[k, k], rises[k, k + 1] = (1, -1) if k < mode else (-1, 1)
        found = linprog(
            -(grid >= tail).astype(float),
            A_ub=np.vstack([rises, grid / pairs]),
            b_ub=np.r_[np.zeros(pairs), mean],
            A_eq=np.ones((1, pairs + 1)),
            b_eq=[1.0],
        )
        best = max(best, -found.fun) if found.status == 0 else best
    return best


@pytest.mark.parametrize("tail", [3, 4, 5, 7, 8, 10])
def test_the_unimodal_bound_is_the_greatest_of_a_linear_programme(tail):
    """A feature of rate q / p is in both halves of a pair with chance (q / p)²."""
    pairs, p, q = 10, 50, 7.0
    threshold = (1 + tail / pairs) / 2
    found = Stability(torch.zeros(1, p), q, pairs, threshold)
    assert found.unimodal_bound == pytest.approx(p * most(tail, (q / p) ** 2, pairs), rel=1e-6)
    assert found.unimodal_bound < found.bound
    assert found.unimodal_bound != pytest.approx(p * most(tail - 1, (q / p) ** 2, pairs), rel=1e-3)


def test_where_the_unimodal_bound_says_nothing():
    assert Stability(torch.zeros(1, 10), 6.0, 50, 0.9).unimodal_bound == math.inf
    assert Stability(torch.zeros(1, 10), 5.0, 50, 0.65).unimodal_bound == math.inf


def test_errors_stay_below_the_bound():
    """Features without any signal: each half takes the 3 of 30 that correlate most."""
    wrong, bounds = [], []
    for seed in range(30):
        draw = np.random.default_rng(seed)
        x, y = draw.standard_normal((40, 30)), draw.standard_normal(40)

        def chosen(rows, x=x, y=y):
            size = np.abs((x[rows] - x[rows].mean(0)).T @ y[rows])
            return size >= np.sort(size)[-3]

        found = stability_selection(chosen, 40, pairs=20, threshold=0.6, random_state=seed)
        wrong.append(len(found.stable))
        bounds.append(found.bound)
    assert bounds == pytest.approx([9 / (0.2 * 30)] * 30)
    assert np.mean(wrong) < bounds[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pairs": 0}, "pairs= is a whole number, at least 1; got 0"),
        ({"threshold": 0.5}, "threshold= is above 0.5 and at most 1; got 0.5"),
        ({"threshold": 1.2}, "threshold= is above 0.5"),
        ({"random_state": "a"}, "random_state= is a whole number or None"),
        ({"samples": 1}, "samples is the number of samples, at least 2; got 1"),
        ({"select": lambda rows: [0, 2]}, r"select\(rows\) returns a mask, True for selected features"),
        ({"select": lambda rows: "a"}, r"select\(rows\) returns a mask"),
        ({"select": lambda rows: [True] * (1 + (0 in rows))}, "masks of one shape, whatever the rows"),
    ],
)
def test_refusals(given, said):
    with pytest.raises(PlanError, match=said):
        stability_selection(**{"select": select, "samples": 40, **given})


def test_of_estimators():
    model = rs.RegressorCV(points=20, cv=3).fit(X, Y)
    found = model.stability(X, Y, pairs=6, threshold=0.8, random_state=2)
    most_used = math.isqrt(int(0.6 * 12))
    seen, draw = np.zeros((20, 12)), torch.Generator().manual_seed(2)
    for _ in range(6):
        order = torch.randperm(40, generator=draw).numpy()
        for rows in (order[:20], order[20:]):
            used = set()
            for row, strength in enumerate(model.strengths_):
                coef = Lasso(strength / 2, tol=1e-12, max_iter=10**6).fit(X[rows], Y[rows]).coef_
                used |= set(np.flatnonzero(coef).tolist())
                if len(used) <= most_used:
                    seen[row] += coef != 0
    np.testing.assert_allclose(found.frequencies, seen / 12)
    assert found.mean_selected <= most_used
    assert found.bound <= 1
    assert 0 in found.stable
    with pytest.raises(PlanError, match="most= is a whole number"):
        model.stability(X, Y, most=0)
    with pytest.raises(PlanError, match="threshold= is above"):
        model.stability(X, Y, threshold="a")
    with pytest.raises(ValueError, match="3 features"):
        model.stability(X[:, :3], Y)
    assert model.n_features_in_ == 12
    with pytest.raises(PlanError, match="a network's paths lead upwards"):
        rs.RegressorCV(hidden=(2,), strengths=[1e-3], epochs=1, cv=2).fit(X, Y).stability(X, Y)


def test_of_classifiers():
    """By scikit-learn's logistic regression, in loops; classes stay those of the fit."""
    labels = np.where(Y > 0, "yes", "no")
    model = rs.ClassifierCV(points=6, cv=2, ratio=0.2).fit(X, labels)
    found = model.stability(X, labels, most=3, pairs=3, threshold=0.6, random_state=4)
    seen, draw = np.zeros((6, 12)), torch.Generator().manual_seed(4)
    for _ in range(3):
        order = torch.randperm(40, generator=draw).numpy()
        for rows in (order[:20], order[20:]):
            used = set()
            for row, strength in enumerate(model.strengths_):
                given = {"solver": "saga", "tol": 1e-9, "max_iter": 10**5, "C": 1 / (20 * strength)}
                coef = LogisticRegression(l1_ratio=1.0, **given).fit(X[rows], labels[rows]).coef_[0]
                used |= set(np.flatnonzero(coef).tolist())
                if len(used) <= 3:
                    seen[row] += coef != 0
    np.testing.assert_allclose(found.frequencies, seen / 6)
    assert 0 in found.stable
    assert found.frequencies.max() > 0.5
    assert model.classes_.tolist() == ["no", "yes"]
