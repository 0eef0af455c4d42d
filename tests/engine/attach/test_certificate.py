"""Certificates against scikit-learn's and SciPy's solutions, skglm's distances and closed forms in NumPy."""

import copy
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import (
    DetachedError,
    HowError,
    NeverFiredError,
    NoProxError,
    PenaltyError,
    PlanError,
    RestrainWarning,
)

HOWS = ("loss", "gradient", "decoupled", "proximal")


def regression(n=40, p=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x @ np.where(np.arange(p) < 4, 1.0, 0.0) + 0.1 * rng.standard_normal(n)


def linear(x, y, w, bias=None):
    """A layer with these weights, and its data loss ‖x w - y‖² / (2 n)."""
    model = nn.Linear(x.shape[1], 1, bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.atleast_2d(w)))
        if bias is not None:
            model.bias.fill_(bias)
    xs, ys = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    return model, lambda: (model(xs) - ys).square().mean() / 2


def attached(model, plan, how="loss"):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return rs.attach(model, [rs.Rule(one.what, one.where, how, name=one.name) for one in plan], optimizer)


def distance_l1(w, gradient, strength):
    """Distance of -gradient from the subdifferential of strength · Σ|w|, entry by entry."""
    return np.where(w == 0, np.maximum(np.abs(gradient) - strength, 0), np.abs(gradient + strength * np.sign(w)))


@pytest.mark.parametrize("how", HOWS)
def test_zero_at_the_lasso_of_scikit_learn(how):
    x, y = regression()
    found = Lasso(alpha=0.1, tol=1e-14, max_iter=100_000).fit(x, y)
    model, loss = linear(x, y, found.coef_, found.intercept_)
    reg = attached(model, [0.1 * rs.L1().on("weight", name="l1")], how)
    cert = reg.certificate(loss)
    assert cert.residual < 1e-9
    assert cert.residual == max(cert.free, cert.rules["l1"].residual)
    assert cert.rules["l1"].returning == ()
    with torch.no_grad():
        model.weight[0, 0] += 0.01
    assert reg.certificate(loss).residual > 1e-3


def test_zero_at_the_elastic_net_of_scikit_learn():
    x, y = regression()
    found = ElasticNet(alpha=0.2, l1_ratio=0.4, tol=1e-14, max_iter=100_000).fit(x, y)
    model, loss = linear(x, y, found.coef_, found.intercept_)
    reg = attached(model, [0.08 * rs.L1().on("weight"), 0.06 * rs.L2().on("weight", name="l2")])
    assert reg.certificate(loss).residual < 1e-9
    reg.detach()
    wrong = attached(model, [0.08 * rs.L1().on("weight"), 0.12 * rs.L2().on("weight", name="l2")])
    assert wrong.certificate(loss).residual > 1e-2


def test_zero_at_the_multinomial_logistic_regression_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5))
    y = (x[:, 0] > 0.3).astype(int) + (x[:, 1] > 0)
    strength = 0.02
    found = LogisticRegression(l1_ratio=1.0, C=1 / (60 * strength), solver="saga", tol=1e-12, max_iter=200_000)
    found.fit(x, y)
    model = nn.Linear(5, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(found.coef_))
        model.bias.copy_(torch.from_numpy(found.intercept_))
    assert (found.coef_ == 0).any()
    xs, ys = torch.from_numpy(x), torch.from_numpy(y)
    with rs.attach(model, strength * rs.L1().on("weight")) as reg:
        assert reg.certificate(lambda: F.cross_entropy(model(xs), ys)).residual < 1e-7


def test_distance_is_that_of_skglm_and_of_numpy():
    penalties = pytest.importorskip("skglm.penalties")
    x, y = regression()
    rng = np.random.default_rng(1)
    w = np.where(rng.random(12) < 0.5, 0.0, rng.standard_normal(12))
    gradient = x.T @ (x @ w - y) / len(y)
    model, loss = linear(x, y, w)
    with rs.attach(model, 0.3 * rs.L1().on("weight", name="l1")) as reg:
        cert = reg.certificate(loss, step=1e-7)
    theirs = penalties.L1(0.3).subdiff_distance(w, gradient, np.arange(12))
    assert cert.residual == pytest.approx(np.max(theirs), abs=1e-8)
    own = distance_l1(w, gradient, 0.3)
    assert cert.residual == pytest.approx(own.max(), abs=1e-8)
    (back,) = cert.rules["l1"].returning
    where = np.flatnonzero((w == 0) & (own > 0))
    assert back.groups[:, 1].tolist() == where.tolist()
    np.testing.assert_allclose(back.excess, own[where], atol=1e-8)
    assert abs(distance_l1(w, gradient, 0.6).max() - cert.residual) > 0.1  # the oracle at another strength


def test_groups_that_reenter():
    x, y = regression(p=12)
    w = np.r_[0.5, -0.2, 1.0, np.zeros(9)]
    gradient = (x.T @ (x @ w - y) / len(y)).reshape(4, 3)
    per = {"in": [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]}
    model, loss = linear(x, y, w)
    with rs.attach(model, 0.3 * rs.GroupLasso(per=per).on("weight", name="groups")) as reg:
        cert = reg.certificate(loss)
    own = w[:3] / np.linalg.norm(w[:3]) * 0.3 * 3**0.5
    excess = np.linalg.norm(gradient, axis=1)[1:] - 0.3 * 3**0.5
    assert (excess > 0).any()
    assert (excess < 0).any()
    (back,) = cert.rules["groups"].returning
    assert back.groups[:, 0].tolist() == (1 + np.flatnonzero(excess > 0)).tolist()
    np.testing.assert_allclose(back.excess, excess[excess > 0], rtol=1e-6)
    shrunk = [g * max(1 - 0.3 * 3**0.5 / np.linalg.norm(g), 0) for g in gradient[1:]]
    expected = max(np.abs(gradient[0] + own).max(), np.abs(shrunk).max())
    assert cert.residual == pytest.approx(expected, rel=1e-2)  # prox at t, not its limit
    assert "groups" in str(cert)


def test_rows_of_a_layer_that_reenter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        model[0].weight[2:4] = 0
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    with rs.attach(model, 1e-6 * rs.GroupLasso(per="out").on("0.weight", name="g")) as reg:
        (back,) = reg.certificate(lambda: F.mse_loss(model(x), y)).rules["g"].returning
    assert back.groups.tolist() == [[2], [3]]


def test_rules_on_one_tensor_are_joined():
    """At zero under L1 + group lasso, neither alone holds the tensor there."""
    x, y = regression()
    top = np.abs(x.T @ y / len(y)).max()
    model, loss = linear(x, y, np.zeros(12))
    plan = [0.7 * top * rs.L1().on("weight", name="l1"), 0.4 * top * rs.Norm(2).on("weight", name="g")]
    with rs.attach(model, plan) as reg:
        left = np.linalg.norm(np.maximum(np.abs(x.T @ y / len(y)) - 0.7 * top, 0))
        cert = reg.certificate(loss)
        assert left > 0.3 * top
        assert (cert.residual > 0) == (left > 0.4 * top)
        assert set(cert.rules) == {"l1", "g"}


def test_other_rules_count_by_their_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()

    class Spread(rs.NetworkPenalty):
        def __call__(self, parameters, outputs):
            return sum(h.square().mean() for h in outputs.values()) + sum(p.pow(4).sum() for p in parameters.values())

    plan = [
        0.1 * rs.L1().on("2.weight", name="l1"),
        0.3 * rs.L2().on(rs.outputs("1")),
        0.2 * Spread().on("0.weight", outputs=rs.outputs("0")),
        0.05 * rs.Orthogonality().on("0.weight", name="orthogonal"),
    ]
    with rs.attach(model, plan) as reg:
        cert = reg.certificate(lambda: F.mse_loss(model(x), y), step=1e-4)
        assert "orthogonal" in cert.left_out
        model.train()
        total = reg.loss(F.mse_loss(model(x), y))
    by_hand = torch.autograd.grad(total, [model[0].weight, model[0].bias, model[2].weight, model[2].bias])
    free = max(float(g.abs().max()) for i, g in enumerate(by_hand) if i != 2)
    assert cert.free == pytest.approx(free, rel=1e-9)
    assert cert.rules["l1"].residual == pytest.approx(float(by_hand[2].abs().max()), rel=1e-9)


@pytest.mark.parametrize("how", ["project", "parametrize"])
def test_convex_sets(how):
    x, y = regression()
    y = y - 2 * x[:, 5] if how == "project" else x @ np.ones(12)  # parametrised entries stay above zero
    best, _ = nnls(x, y)
    model, loss = linear(x, y, best)
    with rs.attach(model, rs.NonNegative().on("weight", how=how, name="signs"), _sgd(model)) as reg:
        assert reg.certificate(loss).rules["signs"].residual < 1e-9
        assert reg.certificate(loss).free == 0
        if how == "parametrize":
            with pytest.raises(HowError, match="how='project'"):
                reg.certificate(loss, polish=True)
    model, loss = linear(x, y, best + 0.01)
    with rs.attach(model, rs.NonNegative().on("weight", how=how, name="signs"), _sgd(model)) as reg:
        assert reg.certificate(loss).residual > 1e-3


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_l1_within_bounds():
    x, y = regression()
    found = Lasso(alpha=0.1, tol=1e-14, max_iter=100_000, positive=True, fit_intercept=False).fit(x, y - 2 * x[:, 5])
    model, loss = linear(x, y - 2 * x[:, 5], found.coef_)
    with rs.attach(model, [0.1 * rs.L1().on("weight"), rs.NonNegative().on("weight")], _sgd(model)) as reg:
        assert reg.certificate(loss).residual < 1e-9


def test_group_lasso_within_signs_is_polished_to_its_minimum():
    x, y = regression()
    y = y - 2 * x[:, 5]
    model, loss = linear(x, y, np.full(12, 0.1))
    per = {"in": [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]}
    plan = [0.2 * rs.GroupLasso(per=per).on("weight"), rs.NonNegative().on("weight")]
    with rs.attach(model, plan, _sgd(model)) as reg:
        reg.certificate(loss, polish=True)

        def value(w):
            groups = np.linalg.norm(w.reshape(4, 3), axis=1).sum()
            return np.square(x @ w - y).mean() / 2 + 0.2 * 3**0.5 * groups

        w = model.weight.detach().numpy()[0]
        rng, best = np.random.default_rng(0), value(w)
        assert all(value(np.maximum(w + 0.03 * rng.standard_normal(12), 0)) > best for _ in range(300))


def concave(name, knee):
    return {"mcp": rs.MCP(knee), "scad": rs.SCAD(0.2 * knee, knee), "log": rs.LogSum(knee)}[name]


@pytest.mark.parametrize("name", ["mcp", "scad", "log"])
def test_concavity_is_the_least_square_that_makes_a_penalty_convex(name):
    penalty = concave(name, 0.7)
    z = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
    curvature = lambda r: torch.stack([penalty(one) for one in z.split(1)]).add(r / 2 * z.square()).diff(n=2)  # noqa: E731
    assert curvature(penalty.concavity).min() > -1e-12
    assert curvature(0.95 * penalty.concavity).min() < -1e-11
    assert rs.L1().concavity == rs.GroupLasso().concavity == 0
    assert (rs.Weighted(penalty, torch.ones(3)).concavity, rs.Weighted(rs.L1(), 2.0).concavity) == (np.inf, 0)


@pytest.mark.parametrize("name", ["mcp", "scad", "log"])
def test_stationary_points_of_penalties_that_are_not_convex(name):
    """Zero at a point where ∇ = -slope by hand; the distance of skglm elsewhere; for any allowed step."""
    x, _ = regression()
    penalty = concave(name, 0.7)
    w = np.r_[0.02, -0.1, 0.3, 2.0, np.zeros(8)]
    slope = 0.3 * penalty.gradient(torch.from_numpy(w)).numpy()
    q = np.linalg.qr(x)[0] * 40**0.5  # orthonormal columns, so that any gradient can be had
    hold = 0.3 * (1 / 0.7 if name == "log" else 1.0)
    gradient = np.where(w == 0, 0.9 * hold * np.linspace(-1, 1, 12), -slope)
    model, loss = linear(q, q @ (w - gradient), w)
    with rs.attach(model, 0.3 * penalty.on("weight", name="p")) as reg:
        limit = 1 / (0.3 * penalty.concavity)
        for step in (None, 1e-6, 0.9 * limit):
            assert reg.certificate(loss, step=step).residual < 1e-8
        assert reg.certificate(loss).step < limit
        with pytest.raises(PlanError, match=r"step= is below"):
            reg.certificate(loss, step=limit)
        with torch.no_grad():
            model.weight[0, 4] = 0.1
            model.weight[0, 2] = 0.0
        cert = reg.certificate(loss, step=1e-7)
    v = model.weight.detach().numpy()[0]
    moved = q.T @ (q @ v - q @ (w - gradient)) / 40
    distance = np.where(
        v == 0, np.maximum(np.abs(moved) - hold, 0), np.abs(moved + 0.3 * penalty.gradient(model.weight).numpy()[0])
    )
    assert cert.residual == pytest.approx(distance.max(), rel=1e-4)
    assert distance.max() > 1e-2


def test_a_long_step_would_move_a_stationary_point_of_mcp():
    """The default step is cut: 1/1000 of max |w| / max |∇| alone is beyond 1/r here."""
    x, _ = regression()
    q = np.linalg.qr(x)[0] * 40**0.5
    w = np.r_[1e4, 2e-4, np.zeros(10)]
    gradient = np.r_[0.0, -0.1 * (1 - 2e-4 / 5e-4), np.zeros(10)]
    model, loss = linear(q, q @ (w - gradient), w)
    with rs.attach(model, 0.1 * rs.MCP(5e-4).on("weight")) as reg:
        cert = reg.certificate(loss)
    assert cert.step == pytest.approx(0.5 * 5e-4 / 0.1)
    assert cert.residual < 1e-6


def test_sets_that_are_not_convex_are_left_out():
    x, y = regression()
    model, loss = linear(x, y, np.zeros(12), 0.0)
    with rs.attach(model, [rs.TopK(3).on("weight", name="top"), 0.1 * rs.L2().on("bias")], _sgd(model)) as reg:
        cert = reg.certificate(loss)
        assert "isn't convex" in cert.left_out["top"]
        assert "top" not in cert.rules
        assert cert.free == 0
    with (
        rs.attach(model, rs.TopK(3).on("weight", name="top"), _sgd(model)) as reg,
        pytest.raises(NoProxError, match="top"),
    ):
        reg.certificate(loss)


@pytest.mark.parametrize(
    "plan",
    [
        [rs.GroupLasso(per="row").on("weight"), rs.NuclearNorm().on("weight")],
        [rs.GroupLasso(per="row").on("weight"), rs.L1Ball(1.0).on("weight")],
    ],
    ids=["sum", "set"],
)
def test_no_prox_of_several_rules(plan):
    x, y = regression()
    model, loss = linear(x, y, np.zeros(12))
    with rs.attach(model, plan, _sgd(model)) as reg, pytest.raises(NoProxError, match="no prox is known"):
        reg.certificate(loss)


def test_nuclear_norm_at_its_solution_in_float32():
    torch.manual_seed(0)
    target = torch.randn(8, 2) @ torch.randn(2, 6)
    model = nn.Linear(6, 8, bias=False)
    solution = (4.0 * rs.NuclearNorm()).prox(target)
    assert torch.linalg.matrix_rank(solution, atol=1e-4) < 3
    with torch.no_grad():
        model.weight.copy_(solution)
    with rs.attach(model, 4.0 * rs.NuclearNorm().on("weight")) as reg:
        assert reg.certificate(lambda: (model.weight - target).square().sum() / 2).residual < 0.02 * 4


def test_complex_weights():
    torch.manual_seed(0)
    target = torch.randn(5, dtype=torch.complex128)
    model = nn.Module()
    model.w = nn.Parameter((0.3 * rs.L1()).prox(target))
    loss = lambda: (model.w - target).abs().square().sum() / 2  # noqa: E731
    with rs.attach(model, 0.3 * rs.L1().on("w")) as reg:
        assert reg.certificate(loss).residual < 1e-9
        with torch.no_grad():
            model.w *= 1.1j
        assert reg.certificate(loss).residual > 0.1
        assert reg.certificate(loss, polish=True).residual < 0.006


# What it leaves alone


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("polish", [False, True])
def test_flags_gradients_buffers_and_generators_stay(polish):
    model = normalised()
    x, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    model(x)
    model[2].eval()
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy([list(model.buffers()), [p.grad for p in model.parameters()]])
    modes, seed = [m.training for m in model.modules()], torch.get_rng_state()
    plan = [1e-2 * rs.L1().on("0.weight"), rs.GaussianNoise(0.1).on(rs.inputs())]
    with rs.attach(model, plan) as reg:

        def loss():
            order = torch.randperm(50)  # draws, but the loss doesn't depend on it
            return F.cross_entropy(model(x[order]).double(), y[order])

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)  # three steps don't settle it
            assert reg.certificate(loss, polish=polish, steps=3).residual > 0
    after = [list(model.buffers()), [p.grad for p in model.parameters()]]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), seed)


def test_flags_are_restored_after_an_error():
    model = normalised()
    with rs.attach(model, 1e-2 * rs.L1().on("0.weight")) as reg:
        with pytest.raises(ZeroDivisionError):
            reg.certificate(lambda: 1 / 0)
        assert all(m.training for m in model.modules())
        with pytest.raises(PenaltyError, match=r"set the model.*to train"):
            reg.certificate(lambda: model.train()(torch.randn(9, 4)).mean())
        assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_frozen_and_untrained_tensors_do_not_count():
    x, y = regression()
    model, loss = linear(x, y, np.zeros(12), 5.0)
    model.weight.requires_grad_(False)
    with rs.attach(model, [0.1 * rs.L1().on("weight", name="l1"), 0.1 * rs.L1().on("bias", name="b")]) as reg:
        assert set(reg.certificate(loss).rules) == {"b"}
    model.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    with rs.attach(model, 0.1 * rs.L1().on("weight", name="l1"), optimizer) as reg:
        assert reg.certificate(loss).free == 0
        reg.certificate(loss, polish=True)
        assert model.bias.item() == 5.0


def test_tied_weights_count_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    x, y = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    with rs.attach(model, 0.01 * rs.L1().on("*", name="l1")) as reg:
        cert = reg.certificate(lambda: F.mse_loss(model(x), y))
    assert list(cert.rules["l1"].tensors) == ["0.weight"]
    assert cert.free == 0


# Polishing


def test_polishing_reaches_the_lasso():
    x, y = regression()
    found = Lasso(alpha=0.1, tol=1e-14, max_iter=100_000).fit(x, y)
    model, loss = linear(x, y, np.ones(12), 3.0)
    with rs.attach(model, 0.1 * rs.L1().on("weight", name="l1")) as reg:
        assert reg.certificate(loss).residual > 0.1
        cert = reg.certificate(loss, polish=True)
        assert 0 < cert.steps < 300
        assert cert.residual <= 0.002
        assert reg.certificate(loss).residual == cert.residual
    w = model.weight.detach().numpy()[0]
    assert (w == 0).tolist() == (found.coef_ == 0).tolist()
    np.testing.assert_allclose(w, found.coef_, atol=0.01)


def test_polishing_settles_a_network_after_minibatches():
    torch.manual_seed(0)
    x = torch.randn(300, 10)
    y = (x[:, 0] + x[:, 1].abs() > 0.8).long()
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    reg = rs.attach(model, 0.03 * rs.GroupLasso(per="in").on("0.weight", how="proximal", name="inputs"), optimizer)
    for _ in range(100):
        for rows in torch.randperm(300).split(30):
            optimizer.zero_grad()
            reg.loss(F.cross_entropy(model(x[rows]), y[rows])).backward()
            optimizer.step()
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    before = reg.certificate(loss)
    assert before.residual > 0.02 * 0.03
    cert = reg.certificate(loss, polish=True)
    assert cert.residual <= 0.02 * 0.03
    assert cert.loss + reg.values()["inputs"] < before.loss + 1.0


def test_polishing_says_when_it_has_not_settled():
    x, y = regression()
    model, loss = linear(x, y, np.ones(12))
    with rs.attach(model, 1e-7 * rs.L1().on("weight")) as reg, pytest.warns(RestrainWarning, match="after 2 proximal"):
        assert reg.certificate(loss, polish=True, steps=2).steps == 2


# Refusals


def test_random_losses_are_refused():
    x, y = regression()
    model, loss = linear(x, y, np.ones(12))
    with rs.attach(model, 0.1 * rs.L1().on("weight")) as reg:
        with pytest.raises(PenaltyError, match="and then"):
            reg.certificate(lambda: F.dropout(model(torch.from_numpy(x))).square().mean())
        with pytest.raises(PenaltyError, match="and then"):
            reg.certificate(lambda: model(torch.randn(5, 12).double()).square().mean())
        assert reg.certificate(loss).residual > 0


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda model: 3.0, "0-d tensor"),
        (lambda model: model.weight.square(), "shape"),
        (lambda model: model.weight.detach().sum(), "no graph"),
    ],
)
def test_losses_of_another_kind_are_refused(loss, match):
    model = nn.Linear(3, 1)
    with rs.attach(model, rs.L1().on("weight")) as reg, pytest.raises(PenaltyError, match=match):
        reg.certificate(lambda: loss(model))


@pytest.mark.parametrize("given", [{"step": 0}, {"step": "1"}, {"steps": 0}, {"steps": 1.5}])
def test_settings_of_another_kind_are_refused(given):
    model = nn.Linear(3, 1)
    with rs.attach(model, rs.L1().on("weight")) as reg, pytest.raises(PlanError, match="="):
        reg.certificate(lambda: model.weight.sum(), **given)


def test_rules_that_cannot_be_certified_are_refused():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3)
    with (
        rs.attach(model, [rs.L1().on("0.weight"), rs.Contractive().on(rs.outputs("1"))]) as reg,
        pytest.raises(HowError, match="derivatives"),
    ):
        reg.certificate(lambda: model(x).square().mean())


def test_layers_that_are_called_twice_or_never_are_refused():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3)
    loss = lambda: model(x).square().mean()  # noqa: E731
    with rs.attach(model, rs.L1().on("0.weight", every=2)) as reg, pytest.raises(HowError, match="every=1"):
        reg.certificate(loss)
    with (
        rs.attach(model, [rs.L1().on("0.weight"), rs.L1().on(rs.outputs("1"))]) as reg,
        pytest.raises(HowError, match="2 times"),
    ):
        reg.certificate(lambda: loss() + loss())
    with (
        rs.attach(model, [rs.L1().on("0.weight"), rs.L1().on(rs.outputs("1"))]) as reg,
        pytest.raises(NeverFiredError, match="never called"),
    ):
        reg.certificate(lambda: model[0](x).square().mean())
    reg = rs.attach(model, rs.L1().on("0.weight"))
    reg.detach()
    with pytest.raises(DetachedError):
        reg.certificate(loss)
