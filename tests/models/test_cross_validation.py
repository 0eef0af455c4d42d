"""RegressorCV and ClassifierCV: exact linear paths against scikit-learn's and brute force, and the choice."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.linear_model import ElasticNet, Lasso, LassoCV, LogisticRegression, MultiTaskLasso
from sklearn.model_selection import KFold, ShuffleSplit
from sklearn.utils.estimator_checks import parametrize_with_checks

import restrain as rs
from restrain.errors import PlanError
from restrain.models.linear import Linear
from restrain.paths import Point, of_points

RNG = np.random.default_rng(0)
X = RNG.standard_normal((80, 10))
Y = X[:, :3].sum(1) + 2 + RNG.standard_normal(80)
LABELS = np.array(["a", "b", "c"])[(X[:, 0] > 0.3).astype(int) + (X[:, 1] > 0)]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # scikit-learn's checks make warnings of their own
@parametrize_with_checks([rs.RegressorCV(points=4, cv=3), rs.ClassifierCV(points=2, cv=2, ratio=0.5)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# ---------------------------------------------------------------- exact paths


def test_weights_of_every_point():
    model = rs.RegressorCV(points=6).fit(X, Y)
    for strength, w, b in zip(model.strengths_, *model.weights_.values(), strict=True):
        best = Lasso(alpha=strength / 2, tol=1e-13, max_iter=100_000).fit(X, Y)
        np.testing.assert_allclose(w[0], best.coef_, atol=1e-8)
        assert float(b[0]) == pytest.approx(best.intercept_, abs=1e-8)
    assert [name.partition(".")[2] for name in model.weights_] == ["weight", "bias"]


def strengths(problem, penalty, ratio=1e-2, points=8):
    return problem.greatest(penalty) * np.geomspace(1, ratio, points)


def test_every_point_of_a_lasso_path():
    problem = Linear.of(X, Y, 0)
    grid = strengths(problem, rs.L1(), 1e-3)
    assert grid[0] == pytest.approx(2 * np.abs((X - X.mean(0)).T @ (Y - Y.mean())).max() / 80, rel=1e-9)
    found = problem.path(rs.L1(), grid)
    for (w, b), s in zip(found, grid, strict=True):
        best = Lasso(alpha=s / 2, tol=1e-13, max_iter=100_000).fit(X, Y)
        np.testing.assert_allclose(w[0], best.coef_, atol=1e-8)
        assert float(b) == pytest.approx(best.intercept_, abs=1e-8)
    wrong = Lasso(alpha=1.001 * grid[4] / 2, tol=1e-13).fit(X, Y).coef_
    assert np.abs(found[4][0][0].numpy() - wrong).max() > 1e-6


def test_every_point_of_an_elastic_net_path():
    problem, penalty = Linear.of(X, Y, 0), rs.ElasticNet(0.7, 0.4)
    for (w, _), s in zip(problem.path(penalty, [1.0, 0.1, 0.01]), [1.0, 0.1, 0.01], strict=True):
        alpha = s * (0.7 / 2 + 0.4)
        best = ElasticNet(alpha=alpha, l1_ratio=0.35 * s / alpha, tol=1e-13, max_iter=100_000).fit(X, Y)
        np.testing.assert_allclose(w[0], best.coef_, atol=1e-8)


@pytest.mark.parametrize("outputs", [pytest.param(1, marks=pytest.mark.slow), 2])  # 1: numba
def test_every_point_of_a_group_lasso_path(outputs):
    """skglm's group lasso; with several outputs scikit-learn's, whose groups are the rows of an input."""
    y = np.stack([Y, Y - 2 * X[:, 5]], 1)[:, :outputs]
    problem, groups = Linear.of(X, y, 0), [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9]]
    penalty = rs.GroupLasso(per={"in": groups} if outputs == 1 else "in")
    grid = strengths(problem, penalty, points=5)
    for (w, b), s in list(zip(problem.path(penalty, grid), grid, strict=True))[1:]:
        if outputs == 1:
            pytest.importorskip("skglm")
            best = group_lasso_of_skglm(X - X.mean(0), Y - Y.mean(), groups, s / 2)
            np.testing.assert_allclose(w[0], best, atol=1e-6)
            continue
        best = MultiTaskLasso(alpha=s * 2**0.5, tol=1e-13, max_iter=100_000).fit(X, y)  # of Σ over outputs / (2 n)
        np.testing.assert_allclose(w, best.coef_, atol=1e-6)
        np.testing.assert_allclose(b, best.intercept_, atol=1e-6)


def group_lasso_of_skglm(x, y, groups, alpha):
    from skglm.datafits import QuadraticGroup
    from skglm.penalties import WeightedGroupL2
    from skglm.solvers import GroupBCD

    starts, order = np.cumsum([0, *map(len, groups)]).astype(np.int32), np.concatenate(groups).astype(np.int32)
    weights = np.array([len(one) ** 0.5 for one in groups])
    datafit, penalty = QuadraticGroup(starts, order), WeightedGroupL2(alpha, weights, starts, order)
    return GroupBCD(max_iter=1000, tol=1e-12).solve(np.asfortranarray(x), y, datafit, penalty)[0]


def test_every_point_of_a_logistic_path():
    problem = Linear.of(X, X[:, 0] + 0.5 * RNG.standard_normal(80) > 0, 2)
    grid = strengths(problem, rs.L1(), points=4)
    for (w, b), s in list(zip(problem.path(rs.L1(), grid), grid, strict=True))[1:]:
        best = LogisticRegression(l1_ratio=1.0, C=1 / (80 * s), solver="saga", tol=1e-11, max_iter=100_000)
        best.fit(X, problem.y[:, 1].numpy())
        np.testing.assert_allclose(w[1] - w[0], best.coef_[0], atol=1e-6)
        assert float(b[1] - b[0]) == pytest.approx(best.intercept_[0], abs=1e-6)


def test_every_point_of_a_multinomial_path():
    classes = np.unique(LABELS, return_inverse=True)[1]
    problem = Linear.of(X, classes, 3)
    grid = strengths(problem, rs.L1(), points=3)
    for (w, b), s in list(zip(problem.path(rs.L1(), grid), grid, strict=True))[1:]:
        best = LogisticRegression(l1_ratio=1.0, C=1 / (80 * s), solver="saga", tol=1e-11, max_iter=100_000)
        best.fit(X, classes)
        np.testing.assert_allclose(w, best.coef_, atol=1e-6)
        np.testing.assert_allclose(b - b.mean(), best.intercept_ - best.intercept_.mean(), atol=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [rs.GroupLasso(per="in"), rs.SparseGroupLasso(0.3, 0.5, per="in"), rs.GroupLInf(per="in"), rs.NuclearNorm()],
    ids=str,
)
@pytest.mark.parametrize("classes", [0, 3])
def test_points_are_minima_of_what_is_minimised(penalty, classes):
    """The certificate of an ordinary layer there, and no random step goes lower."""
    y = np.unique(LABELS, return_inverse=True)[1] if classes else np.stack([Y, Y - X[:, 5]], 1)
    problem = Linear.of(X, y, classes)
    grid = strengths(problem, penalty, points=3)
    assert problem.path(penalty, grid[:1])[0][0].abs().max() < 1e-7
    w, b = problem.path(penalty, grid)[1]
    assert w.count_nonzero()
    layer = torch.nn.Linear(10, len(w)).double()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
    with rs.attach(layer, float(grid[1]) * penalty.on("weight")) as reg:
        assert reg.certificate(lambda: problem.loss(layer.weight, layer.bias)).residual < 1e-6 * grid[0]
    value = lambda w, b: float(problem.loss(w, b) + grid[1] * penalty(w))  # noqa: E731
    torch.manual_seed(0)
    steps = [(0.01 * torch.randn_like(w), 0.01 * torch.randn_like(b)) for _ in range(50)]
    assert all(value(w + d, b + e) > value(w, b) for d, e in steps)


def test_proximal_gradient_agrees_with_coordinate_descent():
    problem = Linear.of(X, Y, 0)
    grid = strengths(problem, rs.L1(), points=4)
    whole = {"in": [[i] for i in range(10)]}  # groups of one: the same penalty, by the other solver
    for (v, _), (w, _) in zip(problem.path(rs.L1(), grid), problem.path(rs.GroupLasso(per=whole), grid), strict=True):
        np.testing.assert_allclose(v, w, atol=1e-7)


# ---------------------------------------------------------------- the estimators


def test_the_lasso_is_that_of_lassocv():
    found = rs.RegressorCV(points=20).fit(X, Y)
    best = LassoCV(alphas=found.strengths_ / 2, cv=5, tol=1e-12).fit(X, Y)
    assert found.strength_ == pytest.approx(2 * best.alpha_)
    np.testing.assert_allclose(-found.scores_, best.mse_path_, atol=1e-6)
    np.testing.assert_allclose(found.coef_, best.coef_, atol=1e-6)
    assert found.intercept_ == pytest.approx(best.intercept_, abs=1e-6)
    np.testing.assert_allclose(found.predict(X), best.predict(X), atol=1e-6)
    assert found.selected_features_.tolist() == np.flatnonzero(best.coef_).tolist()
    assert [point["strength"] for point in found.path_] == found.strengths_.tolist()


def test_one_standard_error_takes_a_greater_strength():
    folds = KFold(4, shuffle=True, random_state=0)
    best, one = (rs.RegressorCV(points=20, cv=folds, choice=choice).fit(X, Y) for choice in ("best", "1se"))
    np.testing.assert_array_equal(best.scores_, one.scores_)
    at = best.scores_.mean(1).argmax()
    differences = best.scores_[at] - best.scores_
    near = differences.mean(1) <= differences.std(1, ddof=1) / 2
    assert one.strength_ == best.strengths_[near].max()
    assert one.strength_ > best.strength_


@pytest.mark.parametrize("seed", range(4))
def test_one_standard_error_is_that_of_a_path(seed):
    """The rule of Path.one_se, with folds as samples and inputs as groups."""
    rng = np.random.default_rng(seed)
    y = 0.5 * X[:, 0] + rng.standard_normal(80)
    found = rs.RegressorCV(points=15, cv=4, choice="1se").fit(X, y)
    columns = [[i] for i in range(10)]
    points = [
        Point(k, s, "down", row.mean(), torch.as_tensor(row), int(one["selected"]), 10, *[float("nan")] * 4)
        for k, (s, row, one) in enumerate(zip(found.strengths_, found.scores_, found.path_, strict=True))
    ]
    path = of_points(points, [{}] * 15, [{"inputs": torch.zeros(len(columns))}] * 15)
    assert found.strength_ == path.one_se().strength
    assert rs.RegressorCV(points=15, cv=4).fit(X, y).strength_ == path.best().strength


def test_one_standard_error_of_ridge_and_of_networks():
    ridge = {"path": {"weight_l2": {}}, "strengths": np.geomspace(1e-3, 10, 8), "cv": 4}
    best, one = (rs.RegressorCV(choice=choice, **ridge).fit(X, Y) for choice in ("best", "1se"))
    differences = best.scores_.max(0) * 0 + best.scores_[best.scores_.mean(1).argmax()] - best.scores_
    near = differences.mean(1) <= differences.std(1, ddof=1) / 2
    assert one.strength_ == best.strengths_[near].max() > best.strength_
    path = {"group_lasso": {"how": "proximal", "per": "in", "on": "hid1.weight"}}
    given = {"path": path, "strengths": [0.003, 0.03, 30.0], "cv": 2, "epochs": 5, "learning_rate": 0.01}
    found = rs.RegressorCV(hidden=(4,), random_state=0, choice="1se", **given).fit(X, Y)
    counts = {one["strength"]: one["selected"] for one in found.path_}
    assert counts[found.strength_] == len(found.selected_features_)
    with pytest.raises(PlanError, match="two scores or more"):
        rs.RegressorCV(choice="1se", cv=ShuffleSplit(1, random_state=0), points=3).fit(X, Y)
    single = rs.RegressorCV(cv=ShuffleSplit(1, random_state=0), points=3).fit(X, Y)
    assert np.isnan([one["error"] for one in single.path_]).all()


def test_in_the_units_of_the_data():
    found = rs.RegressorCV(points=10, normalize=True).fit(5 * X + 3, 10 * Y)
    np.testing.assert_allclose((5 * X + 3) @ found.coef_ + found.intercept_, found.predict(5 * X + 3), atol=1e-8)
    assert (found.coef_[np.setdiff1d(np.arange(10), found.selected_features_)] == 0).all()


def test_two_classes_have_one_row():
    found = rs.ClassifierCV(points=4, cv=3, ratio=0.05).fit(X, X[:, 0] > 0)
    assert found.coef_.shape == (1, 10)
    best = LogisticRegression(l1_ratio=1.0, C=1 / (80 * found.strength_), solver="saga", tol=1e-11, max_iter=100_000)
    best.fit(X, X[:, 0] > 0)
    np.testing.assert_allclose(found.coef_, best.coef_, atol=1e-5)
    np.testing.assert_allclose(found.predict_proba(X), best.predict_proba(X), atol=1e-5)


def test_as_a_selector():
    model = rs.RegressorCV(points=6, cv=2, choice="1se")
    chosen = SelectFromModel(model).fit(X, Y).get_support()
    assert chosen[:3].all()
    assert RFE(model, n_features_to_select=3, step=4).fit(X, Y).get_support().nonzero()[0].tolist() == [0, 1, 2]


@pytest.mark.slow  # processes that import torch
def test_folds_in_other_processes():
    model = rs.RegressorCV(points=6, cv=2)
    apart = clone(model).set_params(n_jobs=2).fit(X, Y)
    assert apart.scores_.tolist() == clone(model).fit(X, Y).scores_.tolist()


def test_networks_are_trained_from_strength_to_strength():
    path = {"group_lasso": {"how": "proximal", "per": "in", "on": "hid1.weight"}}
    given = {"path": path, "strengths": [0.003, 0.03, 30.0], "cv": 2, "epochs": 20, "learning_rate": 0.01}
    found = rs.RegressorCV(hidden=(8,), random_state=0, **given).fit(X, Y)
    assert found.strengths_.tolist() == [0.003, 0.03, 30.0]
    assert found.scores_.shape == (3, 2)
    assert found.scores_[2].mean() < found.scores_[1].mean()
    assert set(found.selected_features_) >= {0, 1, 2}
    weight = found.estimator_.module_.state_dict()["hid1.weight"]
    assert weight.abs().sum(0).nonzero()[:, 0].tolist() == found.selected_features_.tolist()
    given["strengths"] = None
    grid = rs.RegressorCV(hidden=(8,), random_state=0, points=3, **given).fit(X, Y).strengths_
    assert grid[2] == pytest.approx(1000 * grid[0])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"points": 1}, "points="),
        ({"ratio": 2}, "ratio="),
        ({"choice": "first"}, "choice="),
        ({"strengths": [0.0]}, "strengths="),
        ({"path": {"weight_l1": 1.0}}, "options"),
        ({"path": {"weight_l1": {"strength": 1.0}}}, "without its strength"),
        ({"path": {"weight_l1": {}, "weight_l2": {}}}, "one keyword"),
        ({"path": {"weight_l3": {}}}, "weight_l"),
        ({"path": {"weight_l1": {}}, "weight_l1": 0.1}, "leave it out"),
        ({"alpha": 1.0}, "no keyword"),
    ],
)
def test_wrong_settings_are_refused(given, match):
    with pytest.raises(PlanError, match=match):
        rs.RegressorCV(**given).fit(X, Y)


def test_penalties_without_zeros_need_strengths():
    with pytest.raises(PlanError, match="strengths="):
        rs.RegressorCV(path={"weight_l2": {}}).fit(X, Y)
    found = rs.RegressorCV(path={"weight_l2": {}}, strengths=[0.1, 1.0]).fit(X, Y)
    xc, yc = X - X.mean(0), Y - Y.mean()
    ridge = np.linalg.solve(xc.T @ xc / 80 + found.strength_ * np.eye(10), xc.T @ yc / 80)
    np.testing.assert_allclose(found.coef_, ridge, atol=1e-8)
