"""Conversions of docs/coming-from.md, held to scikit-learn and to glmnet's objective."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import Lasso, LogisticRegression, Ridge

import restrain as rs

RNG = np.random.default_rng(0)
N = 80
X = RNG.normal(size=(N, 3))
Y = X @ [2.0, -1.0, 0.0] + 0.3 * RNG.normal(size=N)
Y = Y / Y.std()
TWO = (X[:, 0] + RNG.normal(size=N) > 0).astype(int)
THREE = np.digitize(X[:, 0] + RNG.normal(size=N), [-0.5, 0.7])


def test_ridge():
    model, exact = rs.Regressor(hidden=(), weight_l2=7.0 / N, normalize=False).fit(X, Y), Ridge(alpha=7.0).fit(X, Y)
    np.testing.assert_allclose(model.coef_, exact.coef_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("labels", "factor"), [(TWO, 1.0), (THREE, 0.5)], ids=["two", "three"])
def test_logistic_regression(labels, factor):
    c = 0.05
    model = rs.Classifier(hidden=(), weight_l2=factor / (c * N), normalize=False).fit(X, labels)
    exact = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(X, labels)
    np.testing.assert_allclose(model.coef_, exact.coef_, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(model.predict_proba(X), exact.predict_proba(X), rtol=1e-5)


def test_lasso_and_the_lambda_of_glmnet():
    exact = Lasso(alpha=0.1, tol=1e-12, max_iter=100_000).fit(X, Y)  # its objective is glmnet's, alpha = lambda
    model = rs.RegressorCV(hidden=(), strengths=[0.2], normalize=False, cv=2).fit(X, Y)
    np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-8)
    assert (model.coef_ == 0).any()


def test_the_lambda_of_glmnet_for_binomial_and_ridge():
    lam, sign = 0.05, 2 * TWO - 1

    def ridge(w):  # binomial, alpha = 0
        return np.logaddexp(0, -sign * (X @ w[:3] + w[3])).mean() + lam / 2 * (w[:3] ** 2).sum()

    exact = minimize(ridge, np.zeros(4), tol=1e-14).x
    model = rs.Classifier(hidden=(), weight_l2=lam, normalize=False).fit(X, TWO)
    np.testing.assert_allclose(model.coef_[0], exact[:3], atol=1e-5)

    def squared(w):  # gaussian, alpha = 0, y of deviation 1
        return np.square(Y - X @ w[:3] - w[3]).mean() / 2 + lam / 2 * (w[:3] ** 2).sum()

    exact = minimize(squared, np.zeros(4), tol=1e-14).x
    np.testing.assert_allclose(
        rs.Regressor(hidden=(), weight_l2=lam, normalize=False).fit(X, Y).coef_, exact[:3], atol=1e-5
    )
