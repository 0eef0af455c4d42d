"""Exact paths beside scikit-learn, celer, skglm and adelie: at every point, each judged by optimality.

The targets are such that the least eigenvalue μ of the Hessian is known, so that the distance d of -∇
from the subdifferential bounds the error of the weights: ‖w - w*‖ ≤ ‖d‖ / μ. It is computed here, in
NumPy. What differs from ours by more than 1e-6 must itself be further from the minimum than that.
"""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, MultiTaskLasso, enet_path, lasso_path

import restrain as rs
from restrain.models.linear import Linear

DRAW = np.random.default_rng(0)
N, P, SIZE = 150, 60, 5
X = DRAW.standard_normal((N, P)) + 0.7 * DRAW.standard_normal((N, 1))
X = np.asfortranarray(X - X.mean(0))
Y = X @ (DRAW.standard_normal(P) * (DRAW.random(P) < 0.3)) + 2 * DRAW.standard_normal(N)
Y -= Y.mean()
LEAST = np.linalg.eigvalsh(X.T @ X / N)[0]
STARTS = np.arange(0, P, SIZE)
GROUPS = rs.GroupLasso(per={"in": [list(range(k, k + SIZE)) for k in STARTS]})
ALPHAS = np.abs(X.T @ Y).max() / N * np.geomspace(1, 1e-2, 12)
ROOT = SIZE**0.5


def error(w, alpha, ridge=0.0, groups=False):
    """A bound of ‖w - w*‖, of ‖y - x w‖² / 2n + alpha Σ|w| (or Σ √size ‖w_g‖) + ridge ‖w‖² / 2."""
    slope = X.T @ (Y - X @ w) / N - ridge * w
    rows, sizes = (slope.reshape(-1, SIZE), w.reshape(-1, SIZE)) if groups else (slope[:, None], w[:, None])
    alpha, length = alpha * (ROOT if groups else 1), np.linalg.norm(sizes, axis=1, keepdims=True)
    inside = rows * (1 - np.minimum(1, alpha / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)))
    outside = rows - alpha * sizes / np.where(length, length, 1)
    return np.linalg.norm(np.where(length > 0, outside, inside)) / (LEAST + ridge)


def ours(penalty, strengths):
    return np.array([w.numpy()[0] for w, _ in Linear.of(X, Y, 0).path(penalty, strengths)])


def compared(mine, theirs, exact=True, **given):
    """Ours within 1e-7 of the minimum at every point; theirs within 1e-6 of ours, or as far off as they are."""
    mine_off = [error(w, a, **given) for w, a in zip(mine, ALPHAS, strict=True)]
    off = [error(w, a, **given) for w, a in zip(theirs, ALPHAS, strict=True)]
    assert max(mine_off) < 1e-7
    apart = np.linalg.norm(mine - theirs, axis=1)
    assert (apart <= 1e-7 + np.array(off)).all()
    if exact:
        np.testing.assert_allclose(theirs, mine, atol=1e-6)
    assert error(1.01 * mine[5], ALPHAS[5], **given) > 1e-4


def mixed(theirs):
    """Compared with a Σ|w| + a Σw² / 2."""
    mine = ours(rs.L1() + 0.5 * rs.L2(), 2 * ALPHAS)
    np.testing.assert_allclose(theirs, mine, atol=1e-6)
    assert max(error(w, a, ridge=a) for w, a in zip(mine, ALPHAS, strict=True)) < 1e-7


def test_lasso_and_elastic_net_of_scikit_learn():
    given = {"tol": 1e-14, "max_iter": 10**6}
    compared(ours(rs.L1(), 2 * ALPHAS), lasso_path(X, Y, alphas=ALPHAS, **given)[1].T)
    mixed(enet_path(X, Y, l1_ratio=0.5, alphas=2 * ALPHAS, **given)[1].T)


def test_lasso_elastic_net_and_groups_of_celer():
    celer = pytest.importorskip("celer")
    compared(ours(rs.L1(), 2 * ALPHAS), celer.celer_path(X, Y, pb="lasso", alphas=ALPHAS, tol=1e-13)[1].T)
    mixed(celer.celer_path(X, Y, pb="lasso", l1_ratio=0.5, alphas=2 * ALPHAS, tol=1e-13)[1].T)
    given = {"groups": SIZE, "weights": np.full(len(STARTS), ROOT), "tol": 1e-13, "max_iter": 1000}
    theirs = celer.celer_path(X, Y, pb="grouplasso", alphas=ALPHAS, **given)[1].T
    compared(ours(GROUPS, 2 * ALPHAS), theirs, groups=True)


@pytest.mark.slow  # numba
def test_lasso_and_elastic_net_of_skglm():
    pytest.importorskip("skglm")
    from skglm.datafits import Quadratic
    from skglm.penalties import L1, L1_plus_L2
    from skglm.solvers import AndersonCD

    solver = AndersonCD(tol=1e-12, fit_intercept=False, max_iter=1000)
    theirs = np.array([solver.solve(X, Y, Quadratic(), L1(a))[0] for a in ALPHAS])
    compared(ours(rs.L1(), 2 * ALPHAS), theirs)
    mixed(np.array([solver.solve(X, Y, Quadratic(), L1_plus_L2(2 * a, 0.5))[0] for a in ALPHAS]))


def test_groups_of_adelie():
    """Its tolerance is of the objective, so that weights are exact to its root: 1e-14 isn't 1e-6 everywhere."""
    adelie = pytest.importorskip("adelie")
    given = {"groups": STARTS, "penalty": np.full(len(STARTS), ROOT), "intercept": False, "lmda_path": ALPHAS}
    given |= {"progress_bar": False, "early_exit": False, "n_threads": 1, "min_ratio": 1e-4}
    mine = ours(GROUPS, 2 * ALPHAS)
    for tolerance, exact in ((1e-7, False), (1e-12, False), (1e-16, True)):
        theirs = adelie.grpnet(X, adelie.glm.gaussian(Y), tol=tolerance, **given).betas.toarray()
        compared(mine, theirs, exact, groups=True)
        print(tolerance, np.abs(theirs - mine).max())


@pytest.mark.parametrize("count", [2, 3])
def test_logistic_and_multinomial_paths_of_adelie_and_scikit_learn(count):
    """Of cross-entropies: the conditions of optimality, and the weights of both."""
    classes = np.digitize(Y, np.quantile(Y, np.linspace(0, 1, count + 1)[1:-1]))
    problem = Linear.of(X, classes, count)
    strengths = problem.greatest(rs.L1()) * np.geomspace(1, 5e-2, 6)
    found = problem.path(rs.L1(), strengths)
    for (w, b), s in zip(found, strengths, strict=True):
        w, b = w.numpy(), b.numpy()
        powers = np.exp(X @ w.T + b)
        miss = powers / powers.sum(1, keepdims=True) - np.eye(count)[classes]
        slope = miss.T @ X / N
        off = np.where(w == 0, np.maximum(np.abs(slope) - s, 0), slope + s * np.sign(w))
        assert np.abs(off).max() < 1e-7 * strengths[0]
        assert np.abs(miss.mean(0)).max() < 1e-8
    for (w, _), s in list(zip(found, strengths, strict=True))[1:4]:
        given = {"l1_ratio": 1.0, "C": 1 / (N * s), "solver": "saga", "tol": 1e-11, "max_iter": 10**5}
        theirs = LogisticRegression(**given).fit(X, classes).coef_
        np.testing.assert_allclose(w[1:] - w[:1] if count == 2 else w, theirs, atol=1e-6)


@pytest.mark.parametrize(("count", "penalty"), [(2, rs.L1()), (3, rs.GroupLasso(per="in"))])
def test_logistic_lasso_and_multinomial_groups_of_adelie(count, penalty):
    """Its `irls_tol` is of the objective: 1e-18 isn't 1e-6 at the end. Its multinomial loss is divided by classes."""
    adelie = pytest.importorskip("adelie")
    classes = np.digitize(Y, np.quantile(Y, np.linspace(0, 1, count + 1)[1:-1]))
    problem = Linear.of(X, classes, count)
    strengths = problem.greatest(penalty) * np.geomspace(1, 5e-2, 6)
    found = [w.numpy() for w, _ in problem.path(penalty, strengths)]
    given = {"tol": 1e-16, "irls_tol": 1e-14, "min_ratio": 1e-4, "progress_bar": False, "early_exit": False}
    if count == 2:
        glm = adelie.glm.binomial(classes.astype(float), link="logit")
        mine = [w[1] - w[0] for w in found]
    else:
        glm, strengths = adelie.glm.multinomial(np.eye(count)[classes]), strengths / count
        given |= {"tol": 1e-14, "irls_tol": 1e-22}
        mine = [w.T.ravel() for w in found]
    theirs = adelie.grpnet(X, glm, lmda_path=strengths, n_threads=1, irls_max_iters=10**6, **given).betas.toarray()
    np.testing.assert_allclose(theirs, mine, atol=1e-6)
    assert np.abs(theirs[-1] - mine[-2]).max() > 1e-2


def test_groups_over_outputs_are_those_of_scikit_learn():
    both = np.stack([Y, Y - X[:, 1]], 1)
    problem, penalty = Linear.of(X, both, 0), rs.GroupLasso(per="in")
    strengths = problem.greatest(penalty) * np.geomspace(1, 1e-2, 5)
    for (w, _), s in list(zip(problem.path(penalty, strengths), strengths, strict=True))[1:]:
        theirs = MultiTaskLasso(alpha=s * 2**0.5, tol=1e-14, max_iter=10**6).fit(X, both).coef_
        np.testing.assert_allclose(w, theirs, atol=1e-6)
