"""Losses by name: values by formulas written apart; linear models as statsmodels, scikit-learn, lifelines fit them."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats
from scipy.optimize import minimize
from sklearn import metrics
from sklearn.linear_model import (
    GammaRegressor,
    LogisticRegression,
    PoissonRegressor,
    QuantileRegressor,
    TweedieRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import loss_data as data
import restrain as rs
from restrain.errors import FileError, PlanError
from restrain.models import losses

REFERENCE = json.loads((Path(__file__).parent.parent / "data" / "losses.json").read_text())
X = data.X
Y = data.ETA + data.AMOUNTS
SURVIVAL = np.stack([data.TIMES, data.EVENTS], 1)
STRATA = np.column_stack([SURVIVAL, 10 * data.STRATA + 7])
BINOMIAL = np.stack([data.SUCCESSES, data.TRIALS - data.SUCCESSES], 1)
LABELS = np.stack([data.ETA > 0, X[:, 2] > 0.5, X[:, 0] > X[:, 1]], 1).astype(int)
EXACT = functools.partial(
    torch.optim.LBFGS, max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
)


def linear(kind=rs.Regressor, **given):
    return kind(hidden=(), algo=EXACT, batch_size=60, epochs=2, normalize=False, random_state=0, **given)


def line(model):
    """Intercept and coefficients."""
    out = model.module_.out
    return np.concatenate([out.bias.detach().numpy(), out.weight.detach().numpy()[0]])


# ---------------------------------------------------------------- values


def softmax(o):
    return special.softmax(o, -1)


def efron(o, t, ties="efron"):
    """Minus the log partial likelihood, event by event: the definition, in loops."""
    total = np.zeros(len(o))
    s = t[:, 2] if t.shape[1] > 2 else np.zeros(len(o))
    for i in np.flatnonzero(t[:, 1]):
        risk = np.exp(o[(t[:, 0] >= t[i, 0]) & (s == s[i]), 0]).sum()
        tied = np.flatnonzero((t[:, 0] == t[i, 0]) & (s == s[i]) & (t[:, 1] == 1))
        share = list(tied).index(i) / len(tied) if ties == "efron" else 0
        total[i] = np.log(risk - share * np.exp(o[tied, 0]).sum()) - o[i, 0]
    return total


DRAW = np.random.default_rng(1)
O1, O3 = DRAW.normal(size=(60, 1)), DRAW.normal(size=(60, 3))
COUNT, AMOUNT = DRAW.poisson(2.0, (60, 3)).astype(float), DRAW.gamma(1.0, 1.0, (60, 3))
CLASS = DRAW.integers(0, 3, 60)
PROPORTIONS = DRAW.dirichlet(np.ones(3), 60)
Q = np.array([0.1, 0.5, 0.9])
VALUES = {
    "squared": (O3, AMOUNT, lambda o, y: ((y - o) ** 2).mean(1)),
    "absolute": (O3, AMOUNT, lambda o, y: abs(y - o).mean(1)),
    "huber": (O3, AMOUNT, lambda o, y: special.huber(1.35, y - o).mean(1)),
    "quantile": (O3, AMOUNT[:, :1], lambda o, y: np.where(y > o, Q * (y - o), (1 - Q) * (o - y)).mean(1)),
    "gaussian": (O3[:, :2], AMOUNT[:, :1], lambda o, y: -stats.norm(o[:, 0], np.exp(o[:, 1])).logpdf(y[:, 0])),
    "poisson": (O3, COUNT, lambda o, y: half(metrics.mean_poisson_deviance, o, y)),
    "gamma": (O3, AMOUNT, lambda o, y: half(metrics.mean_gamma_deviance, o, y)),
    "tweedie": (O3, COUNT, lambda o, y: half(functools.partial(metrics.mean_tweedie_deviance, power=1.5), o, y)),
    "binomial": (
        O1,
        BINOMIAL,
        lambda o, y: (
            special.xlogy(y, y / y.sum(1, keepdims=True)).sum(1)
            - y[:, 0] * np.log(special.expit(o[:, 0]))
            - y[:, 1] * np.log(special.expit(-o[:, 0]))
        ),
    ),
    "kl": (O3, PROPORTIONS, lambda o, y: stats.entropy(y, softmax(o), axis=1)),
    "cox": (O1, SURVIVAL, efron),
    "cross_entropy": (O3, CLASS, lambda o, y: -np.log(softmax(o)[np.arange(60), y])),
    "hinge": (
        O3,
        CLASS,
        lambda o, y: [max(0, 1 + max(r[k] for k in range(3) if k != c) - r[c]) for r, c in zip(o, y, strict=True)],
    ),
}


def half(deviance, o, y):
    return [
        np.mean([deviance([b], [np.exp(a)]) for a, b in zip(r, s, strict=True)]) / 2 for r, s in zip(o, y, strict=True)
    ]


@pytest.mark.parametrize("name", VALUES)
def test_values_of_each_sample(name):
    output, target, expected = VALUES[name]
    loss = losses.read(name, {**losses.NUMBERS, **losses.CLASSES}, "A model")
    found = loss.losses(torch.as_tensor(output), torch.as_tensor(target if name in losses.CLASSES else 1.0 * target))
    np.testing.assert_allclose(found, expected(output, target), atol=1e-10)
    assert np.abs(found.numpy() - np.asarray(expected(1.1 * output, target))).max() > 1e-3


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_partial_likelihood_with_ties_and_strata(ties):
    target = np.column_stack([SURVIVAL, data.STRATA])
    loss = losses.Cox(ties, 3)
    o = torch.as_tensor(O1).requires_grad_()
    np.testing.assert_allclose(loss.losses(o, torch.as_tensor(target)).detach(), efron(O1, target, ties), atol=1e-9)
    assert torch.autograd.gradcheck(lambda o: loss.losses(o, torch.as_tensor(target)).sum(), o)
    wrong = losses.Cox("breslow" if ties == "efron" else "efron", 3)
    other = wrong.losses(o.detach(), torch.as_tensor(target))
    assert float((other - loss.losses(o.detach(), torch.as_tensor(target))).abs().sum()) > 1


def test_mean_discrepancy_is_that_of_the_kernels():
    o, y = O3[:, :2], AMOUNT[:, :2]
    kernel = lambda a, b: np.exp(-(metrics.pairwise.euclidean_distances(a, b) ** 2)).mean()  # noqa: E731
    expected = kernel(o, o) + kernel(y, y) - 2 * kernel(o, y)
    assert float(losses.MeanDiscrepancy().losses(torch.as_tensor(o), torch.as_tensor(y)).mean()) == pytest.approx(
        expected
    )


# ---------------------------------------------------------------- linear models


def test_poisson_with_exposure_is_that_of_statsmodels():
    known = REFERENCE["poisson"]
    model = linear(loss="poisson").fit(X, data.COUNTS, exposure=data.EXPOSURE)
    np.testing.assert_allclose(line(model), known["coef"], atol=1e-6)
    assert 120 * model.history_[-1]["data_loss"] == pytest.approx(known["deviance"], rel=1e-6)
    assert model.score(X, data.COUNTS, exposure=data.EXPOSURE) == pytest.approx(known["explained"], abs=1e-6)
    same = model.predict(X, offset=np.log(data.EXPOSURE))
    np.testing.assert_allclose(model.predict(X, exposure=data.EXPOSURE), same)
    np.testing.assert_allclose(model.predict(X) * data.EXPOSURE, same)


@pytest.mark.parametrize(
    ("name", "loss", "y"),
    [
        ("gamma", "gamma", data.AMOUNTS),
        ("tweedie", {"tweedie": 1.3}, data.MIXED),
        ("binomial", "binomial", BINOMIAL),
    ],
)
def test_generalised_linear_models_are_those_of_statsmodels(name, loss, y):
    known = REFERENCE[name]
    model = linear(loss=loss).fit(X, y)
    np.testing.assert_allclose(line(model), known["coef"], atol=1e-6)
    assert 120 * model.history_[-1]["data_loss"] == pytest.approx(known["deviance"], rel=1e-6)
    assert model.score(X, y) == pytest.approx(known["explained"], abs=1e-6)
    assert model.predict(X).shape == (60,)


@pytest.mark.parametrize(
    ("loss", "peer", "y"),
    [
        ("poisson", PoissonRegressor, data.COUNTS),
        ("gamma", GammaRegressor, data.AMOUNTS),
        ("tweedie", functools.partial(TweedieRegressor, power=1.5, link="log"), data.MIXED),
    ],
)
def test_weighted_and_penalised_they_are_those_of_scikit_learn(loss, peer, y):
    """scikit-learn's objective is half the deviance + alpha/2 ‖w‖², averaged by weight."""
    weight = data.EXPOSURE
    exact = peer(alpha=0.2, tol=1e-10, max_iter=10_000, solver="newton-cholesky").fit(X, y, weight)
    model = linear(loss=loss, weight_l2=0.1).fit(X, y, weight)
    np.testing.assert_allclose(line(model), [exact.intercept_, *exact.coef_], atol=1e-6)
    assert model.score(X, y, weight) == pytest.approx(exact.score(X, y, weight))


@pytest.mark.parametrize(("name", "loss", "y"), [
    ("cox", "cox", SURVIVAL), ("cox breslow", {"cox": "breslow"}, SURVIVAL), ("cox strata", "cox", STRATA),
])  # fmt: skip
def test_cox_is_that_of_lifelines_and_statsmodels(name, loss, y):
    known = REFERENCE[name]
    model = linear(loss=loss).fit(X, y)
    np.testing.assert_allclose(line(model), [0, *known["coef"]], atol=2e-6)
    if "concordance" in known:
        assert model.score(X, y) == pytest.approx(known["concordance"], abs=1e-9)
    together = np.array([(e, t) for t, e in SURVIVAL], dtype=[("event", bool), ("time", float)])
    if name == "cox":
        np.testing.assert_allclose(linear(loss=loss).fit(X, together).predict(X), model.predict(X))


def test_proportional_odds_are_those_of_statsmodels():
    known = REFERENCE["ordinal"]
    model = linear(rs.Classifier, loss="ordinal").fit(X, np.array(["a", "b", "c", "d"])[data.ORDERED])
    np.testing.assert_allclose(model.module_.out.weight.detach()[0], known["coef"], atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X)[:3], known["probabilities"], atol=1e-5)
    assert set(model.predict(X)) <= set("abcd")


def test_binary_ordinal_is_the_logistic_regression():
    exact = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(X, data.ORDERED > 1)
    model = linear(rs.Classifier, loss="ordinal").fit(X, data.ORDERED > 1)
    np.testing.assert_allclose(model.predict_proba(X), exact.predict_proba(X), atol=1e-6)


def test_quantiles_are_those_of_linear_programming():
    model = (
        linear(loss="quantile", quantiles=[0.2, 0.8])
        .set_params(algo="adam", learning_rate=lambda n: 0.05 * 0.997**n, epochs=2000)
        .fit(X, Y)
    )
    raw = model._forward(X).numpy()  # sorting may be better than both lines
    mine = [metrics.mean_pinball_loss(Y, raw[:, k], alpha=q) for k, q in enumerate((0.2, 0.8))]
    for k, q in enumerate((0.2, 0.8)):
        exact = QuantileRegressor(quantile=q, alpha=0).fit(X, Y)
        least = metrics.mean_pinball_loss(Y, exact.predict(X), alpha=q)
        assert least - 1e-9 <= mine[k] < 1.005 * least
    scores = [metrics.d2_pinball_score(Y, model.predict(X)[:, k], alpha=q) for k, q in enumerate((0.2, 0.8))]
    assert min(scores) < model.score(X, Y) < max(scores)


def test_the_median_is_the_least_absolute_error():
    model = (
        linear(loss="absolute").set_params(algo="adam", learning_rate=lambda n: 0.05 * 0.997**n, epochs=2000).fit(X, Y)
    )
    exact = QuantileRegressor(quantile=0.5, alpha=0).fit(X, Y)
    assert np.abs(Y - model.predict(X)).mean() < 1.001 * np.abs(Y - exact.predict(X)).mean()
    assert model.score(X, Y) == pytest.approx(metrics.d2_absolute_error_score(Y, model.predict(X)))


@pytest.mark.parametrize(("loss", "size", "formula"), [
    ("huber", 4, lambda p, z: special.huber(1.35, Y - z @ p).mean()),
    ({"huber": 0.5}, 4, lambda p, z: special.huber(0.5, Y - z @ p).mean()),
    ("gaussian", 8, lambda p, z: -stats.norm.logpdf(Y, z @ p[:4], np.exp(z @ p[4:])).mean()),
])  # fmt: skip
def test_others_are_the_minima_of_their_formulas(loss, size, formula):
    z = np.column_stack([np.ones(60), X])
    best = minimize(formula, np.zeros(size), (z,), method="BFGS", options={"gtol": 1e-9})
    model = linear(loss=loss).fit(X, Y)
    out = model.module_.out
    found = np.column_stack([out.bias.detach(), out.weight.detach()]).ravel()
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    assert model.score(X, Y) == pytest.approx(metrics.r2_score(Y, model.predict(X)))


def test_proportions_are_the_minimum_of_the_divergence():
    z = np.column_stack([np.ones(60), X])
    value = lambda p: stats.entropy(PROPORTIONS, softmax(z @ p.reshape(4, 3)), axis=1).mean()  # noqa: E731
    best = minimize(value, np.zeros(12), method="BFGS", options={"gtol": 1e-8})
    model = linear(loss="kl").fit(X, PROPORTIONS)
    np.testing.assert_allclose(model.predict(X), softmax(z @ best.x.reshape(4, 3)), atol=1e-5)
    even = stats.entropy(PROPORTIONS, PROPORTIONS.mean(0)[None], axis=1).mean()
    assert model.score(X, PROPORTIONS) == pytest.approx(1 - best.fun / even)


def test_hinge_is_no_worse_than_the_support_vector_machine():
    y = data.ETA + data.DRAW.normal(size=60) > 0.3
    exact = SVC(kernel="linear", C=1.0, tol=1e-10).fit(X, y)
    least = (
        np.maximum(0, 1 - np.where(y, 1, -1) * exact.decision_function(X)).mean()
        + 0.5 / 60 * np.square(exact.coef_).sum()
    )
    # f = o₁ - o₀ with o₁ = -o₀ at the optimum: ½‖w₁ - w₀‖² = ‖w₀‖² + ‖w₁‖²
    model = linear(rs.Classifier, loss="hinge", weight_l2=1 / 60)
    model.set_params(algo="adam", learning_rate=lambda n: 0.05 * 0.995**n, epochs=1500).fit(X, y)
    value = model.history_[-1]["loss"]
    assert least - 1e-9 <= value < 1.003 * least
    assert (model.predict(X) == exact.predict(X)).mean() > 0.95
    with pytest.raises(PlanError, match="no probabilities"):
        model.predict_proba(X)


# ---------------------------------------------------------------- classes


def test_several_labels_are_logistic_regressions():
    model = linear(rs.Classifier, weight_l2=0.01).fit(X, LABELS)
    for k in range(3):
        exact = LogisticRegression(C=1 / (2 * 0.01 * 3 * 60), tol=1e-10, max_iter=1000).fit(X, LABELS[:, k])
        np.testing.assert_allclose(model.predict_proba(X)[:, k], exact.predict_proba(X)[:, 1], atol=1e-6)
    predicted = model.predict(X)
    assert predicted.shape == LABELS.shape
    assert (
        model.score(X, LABELS) == metrics.accuracy_score(LABELS, predicted) == pytest.approx(model.history_[-1]["acc"])
    )


@pytest.mark.parametrize("weights", ["balanced", {0: 5.0, 2: 0.5}])
def test_class_weights_are_those_of_scikit_learn(weights):
    y = np.minimum(data.ORDERED, 2)
    mine = linear(rs.Classifier, class_weight=weights, weight_l2=0.01)
    share = data.EXPOSURE * mine.fit(X, y, data.EXPOSURE).class_weight_[y]
    exact = LogisticRegression(C=1 / (2 * 0.01 * share.sum()), tol=1e-10, max_iter=10_000, class_weight=weights)
    exact.fit(X, y, data.EXPOSURE)
    np.testing.assert_allclose(mine.predict_proba(X), exact.predict_proba(X), atol=1e-5)


# ---------------------------------------------------------------- of any network


def test_quantiles_do_not_cross():
    model = rs.Regressor(hidden=(8,), loss="quantile", quantiles=[0.1, 0.5, 0.9], normalize=True, epochs=3).fit(X, Y)
    found = model.predict(5 * DRAW.normal(size=(500, 3)))
    assert found.shape == (500, 3)
    assert (np.diff(found, axis=1) >= 0).all()
    raw = model._forward(5 * DRAW.normal(size=(500, 3))).numpy()
    assert (np.diff(raw, axis=1) < 0).any()  # without sorting they would


@pytest.mark.parametrize("loss", ["squared", "absolute", "huber", "quantile", "gaussian", "mmd"])
def test_losses_of_differences_have_scaled_targets_and_offsets(loss):
    given = {"hidden": (6,), "epochs": 4, "random_state": 0, "normalize": True}
    plain = rs.Regressor(loss=loss, **given).fit(X, Y)
    other = rs.Regressor(loss=loss, **given).fit(X, 100 * Y + 7)
    np.testing.assert_allclose(other.predict(X), 100 * plain.predict(X) + 7, rtol=1e-6)
    shift = X[:, 0] * 3
    moved = rs.Regressor(loss=loss, **given).fit(X, Y + shift, offset=shift)
    column = shift[:, None] if plain.predict(X).ndim > 1 else shift
    np.testing.assert_allclose(moved.predict(X, offset=shift), plain.predict(X) + column, atol=1e-8)
    assert moved.score(X, Y + shift, offset=shift) == pytest.approx(plain.score(X, Y), abs=1e-6)


@pytest.mark.parametrize("loss", ["poisson", "gamma", "tweedie", "binomial", "cox"])
def test_normalised_networks_learn(loss):
    y = {"poisson": data.COUNTS, "binomial": BINOMIAL, "cox": SURVIVAL}.get(loss, data.AMOUNTS)
    model = rs.Regressor(
        hidden=(8,), loss=loss, normalize=True, learning_rate=0.01, epochs=60, random_state=0, batch_size=60
    )
    assert model.fit(X, y).score(X, y) > (0.6 if loss == "cox" else 0.1)
    assert model.target_scale_ is None
    assert model.predict(X).shape == (60,)


def test_networks_start_at_the_best_constant():
    model = rs.Regressor(hidden=(), loss="poisson", epochs=1, learning_rate=0.0, normalize=True).fit(
        X, 1000 + data.COUNTS
    )
    assert model.module_.out.bias.item() == pytest.approx(np.log(np.mean(1000 + data.COUNTS)))


def test_a_function_is_a_loss():
    def quartic(output, target):
        return (output - target).pow(4).mean(1)

    z = np.column_stack([np.ones(60), X])
    best = minimize(lambda p: ((Y - z @ p) ** 4).mean(), np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    model = linear(loss=quartic).fit(X, Y)
    np.testing.assert_allclose(line(model), best.x, atol=1e-3)
    assert model.score(X, Y) == pytest.approx(-best.fun, rel=1e-5)
    with pytest.raises(PlanError, match=r"shape \(60,\); got \(\)"):
        linear(loss=lambda o, y: (o - y).mean()).fit(X, Y)
    with pytest.raises(FileError, match="code"):
        model.save("/nowhere")
    classes = linear(rs.Classifier, loss=lambda o, y: torch.nn.functional.cross_entropy(o, y, reduction="none"))
    plain = linear(rs.Classifier)
    y = data.ORDERED > 1
    np.testing.assert_allclose(classes.fit(X, y).predict_proba(X), plain.fit(X, y).predict_proba(X), atol=1e-6)


def test_reconstructions_have_losses():
    model = rs.Autoencoder([3, 2, 3], loss="absolute", epochs=2, random_state=0, normalize=True).fit(X)
    assert model.data_loss(X).item() == pytest.approx((model.tensors(X)[1] - model._forward(X)).abs().mean().item())


@pytest.mark.parametrize(
    ("make", "y"),
    [
        (lambda: rs.Regressor(hidden=(3,), loss="cox", epochs=2), STRATA),
        (lambda: rs.Regressor(hidden=(3,), quantiles=[0.2, 0.7], loss="quantile", epochs=2, normalize=True), Y),
        (lambda: rs.Regressor(hidden=(3,), loss={"tweedie": 1.2}, epochs=2), data.MIXED),
        (lambda: rs.Regressor(hidden=(3,), loss="gaussian", epochs=2, normalize=True), np.stack([Y, -Y], 1)),
        (lambda: rs.Classifier(hidden=(3,), loss="ordinal", epochs=2), data.ORDERED),
        (lambda: rs.Classifier(hidden=(3,), epochs=2), LABELS),
        (lambda: rs.Classifier(hidden=(3,), class_weight="balanced", epochs=2), data.ORDERED),
    ],
    ids=["cox", "quantile", "tweedie", "gaussian", "ordinal", "labels", "weights"],
)
def test_models_of_every_loss_are_saved_copied_and_trained_on(make, y, tmp_path):
    model = make().fit(X, y)
    model.save(tmp_path / "m")
    for twin in (rs.load(tmp_path / "m"), copy.deepcopy(model)):
        np.testing.assert_array_equal(twin.predict(X), model.predict(X))
        assert twin.score(X, y) == model.score(X, y)
    model.train((X, y), epochs=1)
    assert model.n_iter_ == 3


def test_a_search_slices_exposures():
    search = GridSearchCV(linear(loss="poisson"), {"weight_l2": [0.0, 10.0]}, cv=3)
    search.fit(X, data.COUNTS, exposure=data.EXPOSURE)
    assert search.best_params_ == {"weight_l2": 0.0}


def test_a_path_of_counts():
    model = rs.RegressorCV(loss="poisson", strengths=[0.01, 3.0], cv=2, epochs=30, learning_rate=0.05, random_state=0)
    model.fit(X, data.COUNTS)
    assert model.strength_ == 0.01
    assert (model.predict(X) > 0).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "given", "y", "match"),
    [
        (rs.Regressor, {"loss": "poison"}, Y, r"no loss= 'poison' \(near it: poisson\)"),
        (rs.Regressor, {"loss": "xe"}, Y, "is one of Classifier"),
        (rs.Classifier, {"loss": "poisson"}, data.ORDERED, "is one of Regressor"),
        (rs.Regressor, {"loss": {"squared": 2}}, Y, "no setting"),
        (rs.Regressor, {"loss": ["squared"]}, Y, "is a name"),
        (rs.Regressor, {"loss": "poisson"}, -data.AMOUNTS, "zero or more; got -"),
        (rs.Regressor, {"loss": "gamma"}, data.MIXED, "above zero; got 0"),
        (rs.Regressor, {"loss": {"tweedie": 2}}, data.MIXED, "2 is gamma"),
        (rs.Regressor, {"loss": "binomial"}, 2 + data.MIXED, "from 0 to 1"),
        (rs.Regressor, {"loss": "kl"}, AMOUNT, "sum to 1"),
        (rs.Regressor, {"loss": "cox"}, Y, "columns time, event"),
        (rs.Regressor, {"loss": "cox"}, SURVIVAL + 1, "1 .an event. or 0"),
        (rs.Regressor, {"loss": {"cox": "exact"}}, SURVIVAL, "efron"),
        (rs.Regressor, {"loss": {"huber": 0}}, Y, "above zero"),
        (rs.Regressor, {"quantiles": [0.1]}, Y, 'goes with loss="quantile"'),
        (rs.Regressor, {"loss": "quantile", "quantiles": [0.9, 0.1]}, Y, "rise"),
        (rs.Regressor, {"loss": "quantile", "quantiles": [0.0]}, Y, "between 0 and 1"),
        (rs.Regressor, {"loss": "quantile"}, AMOUNT, "one target"),
        (rs.Classifier, {}, np.stack([data.ORDERED, data.ORDERED], 1), "fit a model for each column"),
        (rs.Classifier, {"loss": "hinge"}, LABELS, "several labels"),
        (rs.Classifier, {"class_weight": "even"}, data.ORDERED, "numbers by class"),
        (rs.Classifier, {"class_weight": {9: 1.0}}, data.ORDERED, "the classes are 0, 1, 2, 3"),
        (rs.Classifier, {"class_weight": "balanced"}, LABELS, "one class a sample"),
        (rs.Autoencoder, {"loss": "poisson"}, None, "is one of Regressor"),
    ],
)  # fmt: skip
def test_what_a_loss_is_not_for_is_refused(kind, given, y, match):
    with pytest.raises(PlanError, match=match):
        kind(hidden=(2,), epochs=1, **given).fit(X, y)


@pytest.mark.parametrize(
    ("loss", "given", "match"),
    [
        ("poisson", {"offset": np.ones(60), "exposure": np.ones(60)}, "one of them"),
        ("squared", {"exposure": np.ones(60)}, "link log"),
        ("kl", {"offset": np.ones(60)}, "takes no offset"),
        ("poisson", {"exposure": np.zeros(60)}, "above zero"),
        ("poisson", {"offset": np.ones(59)}, "one a sample"),
        ("cox", {"sample_weight": np.ones(60)}, "no sample_weight"),
        ("poisson", {"offset": np.ones(60), "valid": (X, data.COUNTS)}, "no offset or exposure of their own"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(loss, given, match):
    with pytest.raises(PlanError, match=match):
        rs.Regressor(hidden=(), loss=loss, epochs=1).fit(X, SURVIVAL if loss == "cox" else data.COUNTS, **given)
