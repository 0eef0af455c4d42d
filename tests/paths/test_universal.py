"""The quantile universal threshold: simulated quantiles in NumPy, closed forms and skglm's square-root lasso."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import PlanError
from restrain.models.linear import Linear
from restrain.paths import universal_threshold

DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((50, 8)) * np.linspace(0.8, 1.2, 8)
XC = X - X.mean(0)
Y = 4 * X[:, 1] - 3 * X[:, 5] + DRAW.standard_normal(50)
SHARES = np.array([0.5, 0.3, 0.2])
MANY = 20_000


def simulated(statistic, many=MANY):
    """Statistics of many null targets, drawn by NumPy."""
    draw = np.random.default_rng(1)
    return np.array([statistic(draw) for _ in range(many)])


def of_root(draw, outputs=1):
    """(greatest |∇|, greatest ‖∇_column‖ / √outputs) of the root of the mean squared error of noise."""
    noise = draw.standard_normal((50, outputs))
    noise -= noise.mean(0)
    slopes = XC.T @ noise / 50 / outputs / np.sqrt(np.square(noise).mean())
    return np.abs(slopes).max(), np.linalg.norm(slopes, axis=1).max() / outputs**0.5


def of_classes(draw):
    """The greatest |∇| of the cross-entropy of labels without a signal."""
    labels = np.eye(3)[draw.choice(3, 50, p=SHARES)]
    return np.abs(XC.T @ (labels - labels.mean(0)) / 50).max()


def bounds(statistics, level, draws):
    """Where the quantile of fewer draws lies: order statistics at ± 4 standard deviations of their number."""
    spread = 4 * (level * (1 - level) / draws) ** 0.5
    return np.quantile(statistics, [1 - level - spread, min(1 - level + spread, 1.0)])


def null(draw):
    y = torch.randn(50, 1, generator=draw, dtype=torch.float64)
    return y - y.mean()


def root(model, y):
    return (model(torch.from_numpy(X)) - y).square().mean().sqrt()


def test_of_linear_regression_is_the_simulated_quantile():
    low, high = bounds(simulated(lambda draw: of_root(draw)[0]), 0.1, 400)
    model = nn.Linear(8, 1, bias=False).double()
    before = model.weight.detach().clone()
    given = {"level": 0.1, "draws": 400, "random_state": 0}
    rule = rs.L1().on("weight", how="proximal")
    found = universal_threshold(model, rule, root, null, **given)
    assert low < found < high
    assert (high - low) / low < 0.4
    assert torch.equal(model.weight, before)
    assert found == universal_threshold(model, rule, root, null, **given)
    assert found == pytest.approx(3 * universal_threshold(model, 3 * rule, root, null, **given))
    loud = universal_threshold(model, rule, root, lambda draw: 7 * null(draw), **given)
    assert loud == pytest.approx(found)  # pivotal
    assert not low < universal_threshold(model, rule, root, null, **{**given, "level": 0.5}) < high


def test_of_a_network_is_that_of_its_normalised_layers():
    """Of W₁ in w₂ᵀ tanh(W₁ x) with ‖w₂‖ = 1 the gradient at zero is w₂ times that of a linear model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        model[2].weight.div_(model[2].weight.norm())
    given = {"level": 0.1, "draws": 300, "random_state": 0}
    of_inputs = rs.GroupLasso(per="in").on("0.weight", how="proximal")
    linear = universal_threshold(
        nn.Linear(8, 1, bias=False).double(), rs.L1().on("weight", how="proximal"), root, null, **given
    )
    assert universal_threshold(model, of_inputs, root, null, **given) == pytest.approx(linear / 3**0.5)
    entry = universal_threshold(model, rs.L1().on("0.weight", how="proximal"), root, null, **given)
    assert entry == pytest.approx(linear * float(model[2].weight.detach().abs().max()))


def test_of_classes_is_the_simulated_quantile():
    low, high = bounds(simulated(of_classes), 0.1, 400)
    model = nn.Linear(8, 3).double()
    with torch.no_grad():
        model.bias.copy_(torch.from_numpy(np.log(SHARES)))

    def labels(draw):
        return torch.multinomial(torch.from_numpy(SHARES), 50, True, generator=draw)

    def loss(model, y):
        return F.cross_entropy(model(torch.from_numpy(XC)), y)

    rule = rs.L1().on("weight", how="proximal")
    found = universal_threshold(model, rule, loss, labels, level=0.1, draws=400, random_state=0)
    assert low * 0.98 < found < high * 1.02  # the bias is that of the shares, not of the labels drawn


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"level": 0.0}, "level= is a probability, between 0 and 1; got 0.0"),
        ({"draws": 0}, "draws= is a whole number, at least 1; got 0"),
        ({"random_state": 0.5}, "random_state= is a whole number or None"),
        ({"rules": rs.L2().on("weight", how="proximal")}, "makes no zeros"),
        ({"loss": lambda model, y: model.weight.square().sum()}, "the gradient vanishes at the origin"),
    ],
)
def test_refusals(given, said):
    usual = {"rules": rs.L1().on("weight", how="proximal"), "loss": root, "null": null, "draws": 3}
    with pytest.raises(PlanError, match=said):
        universal_threshold(nn.Linear(8, 1).double(), **{**usual, **given})


# ---------------------------------------------------------------- exact linear paths


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("outputs", [1, 2])
def test_of_linear_paths_is_the_simulated_quantile(outputs):
    problem = Linear.of(X, DRAW.standard_normal((50, outputs)), 0)
    columns = np.array([of_root(draw, outputs) for draw in [np.random.default_rng(1)] for _ in range(MANY // 4)])
    for penalty, statistics, draws in ((rs.L1(), columns[:, 0], 400), (rs.GroupLasso(per="in"), columns[:, 1], 100)):
        s = problem.universal(penalty, 0.1, draws, generator())
        low, high = bounds(statistics, 0.1, draws)
        ((w, b),) = problem.path(penalty, [s])
        left = float(problem.loss(w, b)) ** 0.5
        assert low < s / (2 * left) < high


@pytest.mark.slow  # numba
@pytest.mark.filterwarnings("ignore")  # of numba, on speed
def test_the_point_is_that_of_skglms_square_root_lasso():
    experimental = pytest.importorskip("skglm.experimental.sqrt_lasso")
    problem = Linear.of(X, Y, 0)
    s = problem.universal(rs.L1(), 0.05, 200, generator())
    ((w, b),) = problem.path(rs.L1(), [s])
    ratio = s / (2 * float(problem.loss(w, b)) ** 0.5)  # of r with r² the mean squared error; theirs is √n r
    fitted = experimental.SqrtLasso(alpha=ratio * 50**0.5, tol=1e-12, fit_intercept=False)
    fitted.fit(XC, Y - Y.mean())
    assert 0 < np.count_nonzero(fitted.coef_) < 8
    np.testing.assert_allclose(w[0], fitted.coef_, atol=1e-6)
    ((other, _),) = problem.path(rs.L1(), [1.01 * s])
    assert np.abs(other[0].numpy() - fitted.coef_).max() > 1e-4


def test_of_classes_of_linear_paths():
    labels = np.repeat([0, 1, 2], [25, 15, 10])
    problem = Linear.of(X, labels, 3)
    low, high = bounds(simulated(of_classes, MANY // 4), 0.1, 400)
    assert low < problem.universal(rs.L1(), 0.1, 400, generator()) < high


def test_without_a_signal_nothing_is_selected_with_the_probability_asked_for():
    """Of 60 targets without a signal 0.2 are expected to select something, ± 4 standard deviations."""
    draw, wrong = np.random.default_rng(2), 0
    for _ in range(60):
        problem = Linear.of(X, draw.standard_normal(50), 0)
        ((w, _),) = problem.path(rs.L1(), [problem.universal(rs.L1(), 0.2, 200, generator())])
        wrong += bool(w.count_nonzero())
    assert abs(wrong / 60 - 0.2) < 4 * (0.16 / 60) ** 0.5


def test_targets_that_are_interpolated_are_refused():
    x = DRAW.standard_normal((6, 40))
    with pytest.raises(PlanError, match="no noise is left"):
        Linear.of(x, 5 * x[:, 0], 0)._crossing(rs.L1(), 1e-3)


def test_the_choice_of_estimators():
    model = rs.RegressorCV(points=10, choice="qut", random_state=0).fit(X, Y)
    problem = Linear.of(X, Y, 0)
    assert model.strength_ == pytest.approx(problem.universal(rs.L1(), 0.05, 1000, generator()))
    assert model.selected_features_.tolist() == [1, 5]
    assert len(model.strengths_) == len(model.path_) == 11
    assert (np.diff(model.strengths_) < 0).all()
    assert np.isnan(model.scores_).all()
    ((w, _),) = problem.path(rs.L1(), [model.strength_])
    np.testing.assert_allclose(model.coef_, w[0], atol=1e-8)
    sparser = rs.RegressorCV(points=10, choice="qut", random_state=0, level=0.001).fit(X, Y)
    assert sparser.strength_ > model.strength_
    nothing = rs.RegressorCV(points=5, choice="qut").fit(X, DRAW.standard_normal(50))
    assert nothing.selected_features_.tolist() == []
    classes = rs.ClassifierCV(points=5, choice="qut").fit(X, Y > 0)
    assert set(classes.selected_features_.tolist()) == {1, 5}
    with pytest.raises(PlanError, match="for a network write the strengths="):
        rs.RegressorCV(hidden=(2,), strengths=[0.1], choice="qut", epochs=1).fit(X, Y)
    with pytest.raises(PlanError, match="level="):
        rs.RegressorCV(level=2.0).fit(X, Y)
