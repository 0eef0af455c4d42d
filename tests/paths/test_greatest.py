"""The greatest strength of a path: dual norms in closed form, scikit-learn's, and the search."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import PlanError
from restrain.paths.greatest import by_search, least_strength, origin

W = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 8)))
A = W.numpy()


def simon(a, l1, group):
    """Least s with ‖soft(g, s l1)‖ ≤ s group √n of each row, by bisection on a grid of its own."""

    def of_row(g):
        low, high = 0.0, 100.0
        for _ in range(200):
            s = (low + high) / 2
            left = np.linalg.norm(np.maximum(np.abs(g) - s * l1, 0)) - s * group * len(g) ** 0.5
            low, high = (s, high) if left > 0 else (low, s)
        return high

    return max(map(of_row, a))


def top_of_owl(a, weights):
    sizes = np.sort(np.abs(a).ravel())[::-1].cumsum()
    return (sizes / np.cumsum(weights)).max()


DUALS = {
    "l1": (rs.L1(), np.abs(A).max()),
    "twice": (2 * rs.L1(), np.abs(A).max() / 2),
    "elastic net": (rs.ElasticNet(0.5, 3.0), np.abs(A).max() / 0.5),
    "group": (rs.GroupLasso(per="row"), np.linalg.norm(A, axis=1).max() / 8**0.5),
    "columns": (rs.GroupLasso(per="column"), np.linalg.norm(A, axis=0).max() / 6**0.5),
    "blocks": (
        rs.GroupLasso(per=(3, 4)),
        max(np.linalg.norm(A[i : i + 3, j : j + 4]) for i in (0, 3) for j in (0, 4)) / 12**0.5,
    ),
    "sparse group": (rs.SparseGroupLasso(l1=0.3, group=0.7, per="row"), simon(A, 0.3, 0.7)),
    "group linf": (rs.GroupLInf(per="row"), np.abs(A).sum(1).max()),
    "norm": (rs.Norm(2), np.linalg.norm(A)),
    "linf": (rs.Norm(math.inf), np.abs(A).sum()),
    "nuclear": (rs.NuclearNorm(), np.linalg.svd(A)[1][0]),
    "spectral": (rs.SpectralNorm(), np.linalg.svd(A)[1].sum()),
    "weighted": (rs.Weighted(rs.L1(), W.abs() + 1), (np.abs(A) / (np.abs(A) + 1)).max()),
    "owl": (rs.SLOPE(weights=tuple(range(48, 0, -1))), top_of_owl(A, range(48, 0, -1))),
    "mcp": (rs.MCP(3.0), np.abs(A).max()),
    "mcp with an early knee": (rs.MCP(0.01), np.abs(A).max()),
    "scad": (rs.SCAD(0.01, 0.02), np.abs(A).max()),
    "log sum": (2 * rs.LogSum(0.1), 0.1 * np.abs(A).max() / 2),
    "weighted mcp": (rs.Weighted(rs.MCP(0.1), W.abs() + 1), (np.abs(A) / (np.abs(A) + 1)).max()),
}


@pytest.mark.parametrize("name", DUALS)
def test_least_strength_is_the_dual_norm(name):
    penalty, expected = DUALS[name]
    assert least_strength(penalty, W) == pytest.approx(expected, rel=1e-9)
    assert least_strength(penalty, 7 * W) == pytest.approx(7 * expected, rel=1e-9)
    assert least_strength(penalty, 1.001 * W) != pytest.approx(expected, rel=1e-5)  # the oracle at another tensor


@pytest.mark.parametrize("penalty", [rs.Lp(0.5), rs.Lp(0.99), 2 * rs.Lp(0.1)])
def test_an_infinite_slope_holds_the_origin_at_any_strength(penalty):
    assert least_strength(penalty, W) == 0


@pytest.mark.slow  # numba
@pytest.mark.parametrize("theirs", ["MCP", "SCAD"])
def test_zeros_of_mcp_and_scad_begin_where_those_of_skglm_do(theirs):
    """All of skglm's coefficients are zero from this strength on, and not 1 % below it."""
    penalties, skglm = pytest.importorskip("skglm.penalties"), pytest.importorskip("skglm")
    x, y = regression()
    gradient = x.T @ (y - y.mean()) / len(y)
    ours = {"MCP": rs.MCP(0.5), "SCAD": rs.SCAD(0.5, 1.0)}[theirs]
    top = least_strength(ours, torch.from_numpy(gradient))
    for factor, zero in ((1.0, True), (0.99, False)):
        s = factor * top
        penalty = penalties.MCPenalty(s, 3.0) if theirs == "MCP" else penalties.SCAD(s, 3.7)
        fitted = skglm.GeneralizedLinearEstimator(penalty=penalty).fit(x - x.mean(0), y - y.mean())
        assert (fitted.coef_ == 0).all() == zero


def test_a_path_under_mcp_ends_where_the_origin_is_stationary():
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(10 * y)[:, None]
    loss = lambda m: (m(X) - Y).square().mean() / 2  # noqa: E731
    found = greatest(nn.Linear(10, 1).double(), rs.MCP(1.0).on("weight", how="proximal"), loss)
    assert found.found == "dual norm"
    assert found.strength == pytest.approx(10 * np.abs((x - x.mean(0)).T @ (y - y.mean())).max() / 60, rel=1e-6)


@pytest.mark.slow
def test_where_any_strength_holds_the_origin_the_end_is_searched():
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    loss = lambda m: (m(X) - Y).square().mean() / 2  # noqa: E731
    assert greatest(nn.Linear(10, 1).double(), rs.Lp(0.5).on("weight", how="proximal"), loss).found == "search"


def test_entries_without_a_penalty_stay():
    weights = torch.ones(6, 8).index_fill(0, torch.tensor([2]), 0)
    penalty = rs.Weighted(rs.L1(), weights)
    assert origin(penalty, W)[2].equal(W[2])
    assert origin(penalty, W)[[0, 1, 3, 4, 5]].count_nonzero() == 0
    assert least_strength(penalty, W) == pytest.approx(np.abs(A[[0, 1, 3, 4, 5]]).max())


@pytest.mark.parametrize("penalty", [rs.L2(), rs.Huber(), rs.TotalVariation()])
def test_penalties_without_zeros(penalty):
    assert math.isnan(least_strength(penalty, W))
    model = nn.Linear(3, 1)
    with pytest.raises(PlanError, match="makes no zeros"):
        rs.path(model, penalty.on("weight", how="proximal"), print, loss=lambda m: m.weight.sum(), score=float)


def test_zero_gradients_need_no_strength():
    assert least_strength(rs.L1(), torch.zeros(3)) == 0.0


def test_search_doubles_then_bisects():
    asked = []

    def fit(strength):
        asked.append(strength)
        return strength >= 5.0

    restored = []
    high = by_search(1.0, fit, lambda: lambda: restored.append(len(asked)))
    assert asked[:4] == [1, 2, 4, 8]
    assert 5.0 <= high <= 5.0 * 2 ** (1 / 8)
    assert restored == [4, 5, 6]
    with pytest.raises(PlanError, match="groups still aren't zero"):
        by_search(1.0, lambda strength: False, lambda: lambda: None)


# ---------------------------------------------------------------- of a model


def regression(n=60, p=10):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, p))
    return x, 2 + x[:, :3].sum(1) + 0.1 * rng.standard_normal(n)


def trained(loss, steps=60, rate=0.1):
    def fit(model, reg):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        reg.use(optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            reg.loss(loss(model)).backward()
            optimizer.step()

    return fit


def greatest(model, rules, loss, **given):
    found = rs.path(
        model, rules, trained(loss), loss=loss, score=lambda m: -float(loss(m)), points=2, direction="down", **given
    )
    return found.greatest


def test_of_a_lasso_with_an_intercept():
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    model = nn.Linear(10, 1).double()
    found = greatest(model, rs.L1().on("weight", how="proximal"), lambda m: (m(X) - Y).square().mean() / 2)
    expected = np.abs((x - x.mean(0)).T @ (y - y.mean())).max() / 60
    assert found.found == "dual norm"
    assert found.strength == pytest.approx(expected, rel=1e-6)


def test_of_logistic_regression_and_groups_of_outputs():
    x, _ = regression()
    labels = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
    X, Y = torch.from_numpy(x), torch.from_numpy(labels)
    model = nn.Linear(10, 3).double()
    rule = rs.GroupLasso(per="in").on("weight", how="proximal")
    found = greatest(model, rule, lambda m: F.cross_entropy(m(X), Y))
    shares = np.bincount(labels) / 60
    gradient = (shares - np.eye(3)[labels]).T @ x / 60
    assert found.strength == pytest.approx(np.linalg.norm(gradient, axis=0).max() / 3**0.5, rel=1e-6)


def test_other_penalties_of_a_fixed_strength_count():
    """The bias, shrunk by fixed=, isn't the mean at the origin."""
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    model = nn.Linear(10, 1).double()
    given = {"fixed": 0.5 * rs.L2().on("bias")}
    found = greatest(model, rs.L1().on("weight", how="proximal"), lambda m: (m(X) - Y).square().mean() / 2, **given)
    bias = y.mean() / 2  # argmin (b - mean)² / 2 + b² / 2
    assert found.strength == pytest.approx(np.abs(x.T @ (y - bias)).max() / 60, rel=1e-6)


def test_of_the_first_layer_of_a_network():
    """At the greatest strength the origin is stationary, 2 % below it isn't."""
    torch.manual_seed(0)
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    loss = lambda m: F.mse_loss(m(X), Y)  # noqa: E731
    rule = rs.GroupLasso(per="in").on("0.weight", how="proximal", name="inputs")
    before = [p.detach().clone() for p in model.parameters()]
    found = rs.path(model, rule, trained(loss), loss=loss, score=lambda m: 0.0, points=2, direction="down")
    assert found.greatest.found == "dual norm"
    assert all(map(torch.equal, before, model.parameters()))
    state = torch.load(found.folder.path / "path.pt", weights_only=True)["origin"]
    model.load_state_dict(state)
    for factor, holds in ((1.0, True), (0.98, False)):
        with rs.attach(model, rs.GroupLasso(per="in").on("0.weight") * (factor * found.greatest.strength)) as reg:
            (rule,) = reg.certificate(lambda: loss(model)).rules.values()
        assert (rule.returning == ()) == holds


def test_a_saddle_is_searched():
    torch.manual_seed(0)
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    model = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    rule = rs.L1().on("*.weight", how="proximal")
    found = greatest(model, rule, lambda m: F.mse_loss(m(X), Y))
    assert found.found == "search"
    assert found.strength > 0


def test_constraints_beside_are_searched():
    x, y = regression()
    X, Y = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    model = nn.Linear(10, 1).double()
    loss = lambda m: (m(X) - Y).square().mean() / 2  # noqa: E731
    found = greatest(model, rs.L1().on("weight", how="proximal"), loss, fixed=rs.Box(0.0, 0.5).on("bias"))
    top = np.abs(x.T @ (y - 0.5)).max() / 60
    assert found.found == "search"
    assert top <= found.strength * 1.001
    assert found.strength <= top * 2 ** (1 / 8) * 1.02
