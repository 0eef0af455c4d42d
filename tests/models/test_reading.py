"""Reading fitted models: coefficients, used inputs, importances, intervals, draws; plain modules, ONNX."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.datasets import load_diabetes, load_iris
from sklearn.feature_selection import SelectFromModel

import loss_data as data
import restrain as rs
from restrain.errors import PlanError

X, Y = load_diabetes(return_X_y=True)
X = 30 * X + 2
FLOWERS, KINDS = load_iris(return_X_y=True)
QUICK = {"hidden": (6,), "epochs": 3, "random_state": 0}
RNG = np.random.default_rng(0)

# ---------------------------------------------------------------- coefficients


def test_coefficients_are_in_the_units_of_the_data():
    model = rs.Regressor(hidden=(), weight_l2=0.1).fit(X, Y)
    assert model.coef_.shape == (10,)
    np.testing.assert_allclose(X @ model.coef_ + model.intercept_, model.predict(X))
    both = rs.Regressor(hidden=()).fit(X, np.stack([Y, -2 * Y + 1], 1))
    np.testing.assert_allclose(X @ both.coef_.T + both.intercept_, both.predict(X))
    counts = rs.Regressor(hidden=(), loss="poisson").fit(data.X, data.COUNTS)
    np.testing.assert_allclose(np.exp(data.X @ counts.coef_ + counts.intercept_), counts.predict(data.X))
    spread = rs.Regressor(hidden=(), loss="gaussian").fit(data.X, data.AMOUNTS)
    np.testing.assert_allclose(data.X @ spread.coef_ + spread.intercept_, spread.predict(data.X))


def test_coefficients_of_classes():
    several = rs.Classifier(hidden=(), weight_l2=0.01).fit(FLOWERS, KINDS)
    np.testing.assert_allclose(FLOWERS @ several.coef_.T + several.intercept_, several.decision_function(FLOWERS))
    two = rs.Classifier(hidden=(), weight_l2=0.01).fit(FLOWERS, KINDS > 1)
    assert two.coef_.shape == (1, 4)
    np.testing.assert_allclose(FLOWERS @ two.coef_[0] + two.intercept_, two.decision_function(FLOWERS), atol=1e-9)
    ordered = rs.Classifier(hidden=(), loss="ordinal", weight_l2=0.01).fit(FLOWERS, KINDS)
    below = 1 / (1 + np.exp(FLOWERS @ ordered.coef_.T + ordered.intercept_))
    np.testing.assert_allclose(below, np.cumsum(ordered.predict_proba(FLOWERS), 1)[:, :2], atol=1e-9)


def test_networks_have_no_coefficients():
    model = rs.Regressor(**QUICK).fit(X, Y)
    assert not hasattr(model, "coef_")
    with pytest.raises(AttributeError, match=r"only linear models have it \(hidden=\(\)\)"):
        _ = model.coef_
    with pytest.raises(AttributeError, match=r"call importances\(X, y\) first"):
        _ = model.feature_importances_
    assert not hasattr(rs.Regressor(hidden=()), "coef_")


def test_selected_features_are_those_with_weights():
    rule = 0.3 * rs.GroupLasso(per="in").on("hid1.weight", how="proximal")
    model = rs.Regressor(hidden=(4,), epochs=60, learning_rate=0.02, regularizers=[rule], random_state=0).fit(X, Y)
    zero = (model.module_.hid1.weight == 0).all(0).numpy()
    assert 0 < zero.sum() < 10
    assert model.selected_features_.tolist() == np.flatnonzero(~zero).tolist()


def test_importances_find_the_column():
    x = RNG.normal(size=(200, 4))
    model = rs.Regressor(hidden=()).fit(x[:100], 3 * x[:100, 2] + x[:100, 0])
    found = model.importances(x[100:], 3 * x[100:, 2] + x[100:, 0], random_state=0)
    # shuffling a column of variance v adds 2v to the squared error, of a total variance 10
    np.testing.assert_allclose(found, [0.2, 0, 1.8, 0], atol=0.4)
    assert model.feature_importances_ is found
    assert SelectFromModel(model, prefit=True, importance_getter="feature_importances_").get_support()[2]
    assert not hasattr(model.fit(x, x[:, 0]), "feature_importances_")


# ---------------------------------------------------------------- classes


def test_logits_and_logarithms():
    model = rs.Classifier(**QUICK).fit(FLOWERS, KINDS)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(FLOWERS)), model.predict_proba(FLOWERS))
    assert (model.decision_function(FLOWERS).argmax(1) == np.searchsorted(model.classes_, model.predict(FLOWERS))).all()
    two = rs.Classifier(**QUICK).fit(FLOWERS, KINDS > 0)
    assert ((two.decision_function(FLOWERS) > 0) == two.predict(FLOWERS)).all()
    far = two.predict_log_proba(1e6 * FLOWERS)
    assert np.isfinite(far).all()
    assert (two.predict_proba(1e6 * FLOWERS) == 0).any()  # of which there is no logarithm
    hinge = rs.Classifier(loss="hinge", **QUICK).fit(FLOWERS, KINDS)
    with pytest.raises(PlanError, match="no probabilities"):
        hinge.predict_log_proba(FLOWERS)
    labels = np.stack([KINDS > 0, KINDS > 1], 1).astype(int)
    several = rs.Classifier(**QUICK).fit(FLOWERS, labels)
    np.testing.assert_allclose(np.exp(several.predict_log_proba(FLOWERS)), several.predict_proba(FLOWERS))


def test_names_of_codes_and_tables():
    table = pd.DataFrame(FLOWERS, columns=list("abcd"))
    model = rs.Autoencoder(hidden=(3,), epochs=1).set_output(transform="pandas").fit(table)
    codes = model.transform(table)
    assert codes.columns.tolist() == model.get_feature_names_out().tolist() == [f"autoencoder{k}" for k in range(3)]
    np.testing.assert_array_equal(codes, model.set_output(transform="default").transform(table))


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_sparse_inputs_are_read_as_dense_ones(kind):
    x = np.where(RNG.uniform(size=FLOWERS.shape) < 0.5, 0.0, FLOWERS)
    for make, y in ((rs.Classifier, KINDS), (rs.Regressor, FLOWERS[:, 0])):
        model, plain = make(**QUICK).fit(kind(x), y), make(**QUICK).fit(x, y)
        np.testing.assert_array_equal(model.predict(kind(x)), plain.predict(x))
        assert model.score(kind(x), y) == plain.score(x, y)
        weighted = make(**QUICK).fit(kind(x), y, np.arange(150) % 3)
        np.testing.assert_array_equal(weighted.predict(x), make(**QUICK).fit(x, y, np.arange(150) % 3).predict(x))


# ---------------------------------------------------------------- intervals


def line(count, seed=1):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 2))
    return x, x[:, 0] + draw.standard_t(3, size=count) * np.exp(0.5 * x[:, 1])


@pytest.mark.parametrize(
    "given",
    [{}, {"loss": "gaussian"}, {"loss": "quantile", "quantiles": [0.2, 0.8]}],
    ids=["squared", "gaussian", "quantile"],
)
def test_calibrated_intervals_cover_as_often_as_they_say(given):
    """Of 4,000 samples the part covered has the mean (n + 1) p, a beta distribution by the 399 scores."""
    model = rs.Regressor(hidden=(), **given).fit(*line(300)).calibrate(*line(399, 2))
    x, y = line(4000, 3)
    ends = model.predict(x, interval=0.9)
    assert ends.shape == (4000, 2)
    covered = ((ends[:, 0] <= y) & (y <= ends[:, 1])).mean()
    beta = stats.beta(360, 40)  # the 360th of 399
    assert abs(covered - beta.mean()) < 4 * math.hypot(beta.std(), math.sqrt(0.9 * 0.1 / 4000))
    twin = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(twin.predict(x, interval=0.9), ends)


def test_the_interval_of_residuals_is_their_ordered_value():
    model = rs.Regressor(hidden=()).fit(*line(100))
    x, y = line(19, 2)
    ends = model.calibrate(x, y).predict(x, interval=0.9)
    residual = np.sort(np.abs(y - model.predict(x)))[math.ceil(20 * 0.9) - 1]
    np.testing.assert_allclose(ends, model.predict(x)[:, None] + [-residual, residual])
    assert np.abs(ends[0, 1] - ends[0, 0] - 2 * np.sort(np.abs(y - model.predict(x)))[-1]) > 1e-9
    with pytest.raises(PlanError, match="at least 39 samples in calibrate, there were 19"):
        model.predict(x, interval=0.975)


def test_intervals_by_the_loss():
    x, y = line(200)
    model = rs.Regressor(hidden=(), loss="gaussian").fit(x, y)
    std = model._forward(x).exp().numpy()[:, 1] * float(model.target_scale_.deviation)
    low, high = model.predict(x, interval=0.8).T
    np.testing.assert_allclose(low, stats.norm(model.predict(x), std).ppf(0.1), rtol=1e-6)
    np.testing.assert_allclose(high, stats.norm(model.predict(x), std).ppf(0.9), rtol=1e-6)
    bands = rs.Regressor(loss="quantile", quantiles=[0.05, 0.5, 0.95], **QUICK).fit(x, y)
    np.testing.assert_array_equal(bands.predict(x, interval=0.9), bands.predict(x)[:, [0, 2]])
    with pytest.raises(PlanError, match=r"calibrate\(X, y\) first.*quantiles=\[0.1, 0.9\]"):
        bands.predict(x, interval=0.8)
    with pytest.raises(PlanError, match="between 0 and 1"):
        bands.predict(x, interval=90)
    with pytest.raises(PlanError, match="one number a sample"):
        rs.Regressor(**QUICK).fit(x, np.stack([y, y], 1)).predict(x, interval=0.9)


def test_calibration_is_saved_and_forgotten(tmp_path):
    x, y = line(50)
    model = rs.Regressor(**QUICK).fit(x, y).calibrate(x, y)
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(rs.load(tmp_path / "m").predict(x, interval=0.9), model.predict(x, interval=0.9))
    with pytest.raises(PlanError, match="calibrate"):
        model.fit(x, y).predict(x, interval=0.9)


def test_intervals_by_monte_carlo_are_quantiles_of_a_loop_by_hand():
    x, y = line(40)
    model = rs.Regressor(**QUICK, hidden_dropout=0.3, input_noise=0.1).fit(x, y)
    torch.manual_seed(3)
    with rs.sampling(model):
        passes = np.stack([model.predict(x) for _ in range(50)])
    low, high = np.sort(passes, 0)[[5, 44]]  # of 51 gaps, in the middle of a draw's
    torch.manual_seed(3)
    ends = model.predict(x, interval=0.8, draws=50)
    np.testing.assert_allclose(ends, np.quantile(passes, [0.1, 0.9], axis=0).T, rtol=1e-12)  # rounding of products
    assert (np.abs(ends - np.stack([low, high], 1)) <= np.ptp(passes, 0)[:, None] / 2).all()
    again, other = (model.predict(x, interval=0.8, draws=50, random_state=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again, model.predict(x, interval=0.8, draws=50, random_state=0))
    assert not np.array_equal(again, other)
    assert model.predict(x, interval=0.8).shape == (40, 2)  # nothing else to go by
    model.calibrate(x, y)
    assert not np.array_equal(model.predict(x, interval=0.8), again)
    np.testing.assert_array_equal(model.predict(x, interval=0.8, draws=50, random_state=0), again)
    assert not model.module_.training


def test_intervals_by_monte_carlo_hold_the_predictions_of_all_masks():
    """Two inputs under dropout of a half are one of four masks: ends of 90 % are the least and the greatest."""
    x, y = line(60)
    model = rs.Regressor(hidden=(), input_dropout=0.5, epochs=3, learning_rate=0.1, random_state=0).fit(x, y)
    z = (x - x.mean(0)) / x.std(0)
    w = model.coef_ * x.std(0)
    masks = np.array([[0, 0], [0, 2], [2, 0], [2, 2]])
    every = model.intercept_ + model.coef_ @ x.mean(0) + (z[:, None] * masks) @ w
    ends = model.predict(x, interval=0.9, draws=400, random_state=0)
    np.testing.assert_allclose(ends, np.stack([every.min(1), every.max(1)], 1), atol=1e-6)
    # a normal deviate on each input moves a line by a normal deviate
    model = rs.Regressor(hidden=(), input_noise=0.5, epochs=3, learning_rate=0.1, random_state=0).fit(x, y)
    width = 0.5 * np.linalg.norm(model.coef_ * x.std(0))
    ends = model.predict(x, interval=0.9, draws=4000, random_state=0)
    expected = model.predict(x)[:, None] + width * stats.norm.ppf([0.05, 0.95])
    assert np.abs(ends - expected).max() < 5 * width * math.sqrt(0.05 * 0.95 / 4000) / stats.norm.pdf(1.645)


@pytest.mark.parametrize("loss", ["gaussian", "poisson"])
def test_monte_carlo_of_a_distribution_covers_its_targets(loss):
    """Targets made by NumPy from what the model says of noisy inputs, 4,000 in all, are covered 9 times in 10."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 2))
    y = draw.poisson(np.exp(2.5 + 0.5 * x[:, 0])).astype(float)
    model = rs.Regressor(hidden=(), loss=loss, input_noise=0.4, epochs=20, learning_rate=0.05, random_state=0).fit(x, y)
    ends = model.predict(x, interval=0.9, draws=2000, random_state=0)
    covered, atoms = [], []
    for _ in range(10):
        moved = x + 0.4 * x.std(0) * draw.normal(size=x.shape)
        mean = model.predict(moved)
        std = np.diff(model.predict(moved, interval=0.9))[:, 0] / 2 / 1.6448536 if loss == "gaussian" else None
        made = draw.poisson(mean) if loss == "poisson" else draw.normal(mean, std)
        covered.append((ends[:, 0] <= made) & (made <= ends[:, 1]))
        atoms.append((made == ends[:, 0]) | (made == ends[:, 1]))
    slack = 4 * math.sqrt(0.9 * 0.1 / 4000) + 0.01  # 2,000 passes; ends of counts hold more, up to their atoms
    assert 0.9 - slack < np.mean(covered) < 0.9 + slack + np.mean(atoms)
    if loss == "gaussian":  # the distribution alone, without the noise, is too narrow
        alone = model.predict(x, interval=0.9)
        assert (ends[:, 1] - ends[:, 0]).mean() > (alone[:, 1] - alone[:, 0]).mean()


def test_monte_carlo_says_what_it_needs():
    x, y = line(40)
    model = rs.Regressor(**QUICK).fit(x, y)
    with pytest.raises(PlanError, match=r"keywords have none: write some in the constructor, as in hidden_dropout"):
        model.predict(x, interval=0.9, draws=20)
    with pytest.raises(PlanError, match=r"calibrate\(X, y\) first.*noise or dropout among the model's keywords"):
        model.predict(x, interval=0.9)
    with pytest.raises(PlanError, match="draws= is the number of passes by Monte Carlo, 2 or more, as in 500; got 1"):
        model.predict(x, interval=0.9, draws=1)
    with pytest.raises(PlanError, match=r"write interval=, as in interval=0.9, too"):
        model.predict(x, draws=100)
    with pytest.raises(PlanError, match="a prediction draws nothing: write interval="):
        model.predict(x, random_state=0)
    with pytest.raises(PlanError, match="are intervals themselves"):
        rs.Regressor(**QUICK, loss="quantile", hidden_dropout=0.2).fit(x, y).predict(x, interval=0.7, draws=9)


# ---------------------------------------------------------------- draws


def near(draws, mean, std):
    assert (np.abs(draws.mean(1) - mean) < 5 * std / math.sqrt(draws.shape[1])).all()


def test_draws_have_the_predicted_distribution():
    x, y = line(200)
    model = rs.Regressor(hidden=(), loss="gaussian").fit(x, y)
    low, high = model.predict(x[:20], interval=0.9).T
    draws = model.sample(x[:20], 2000, random_state=0)
    near(draws, model.predict(x[:20]), (high - low) / 3.29)
    near((draws < low[:, None]).astype(float), 0.05, 0.22)
    counts = rs.Regressor(hidden=(), loss="poisson").fit(data.X, data.COUNTS)
    draws = counts.sample(data.X, 2000, random_state=0)
    near(draws, counts.predict(data.X), np.sqrt(counts.predict(data.X)))
    assert (draws == draws.round()).all()
    kinds = rs.Classifier(**QUICK).fit(FLOWERS, np.array(["a", "b", "c"])[KINDS])
    near(
        (kinds.sample(FLOWERS[::10], 2000, random_state=0) == "b").astype(float),
        kinds.predict_proba(FLOWERS[::10])[:, 1],
        0.5,
    )
    bands = rs.Regressor(loss="quantile", quantiles=[0.1, 0.5, 0.9], **QUICK).fit(x, y)
    near((bands.sample(x[:9], 2000, random_state=0) < bands.predict(x[:9])[:, 1:2]).astype(float), 0.5, 0.5)
    with pytest.raises(PlanError, match="calibrate"):
        rs.Regressor(**QUICK).fit(x, y).sample(x)
    assert rs.Regressor(**QUICK).fit(x, y).calibrate(x, y).sample(x, 3, random_state=0).shape == (200, 3)


# ---------------------------------------------------------------- modules

LABELS = np.stack([KINDS > 0, KINDS > 1], 1).astype(int)
MODELS = {
    "regressor": lambda: rs.Regressor(**QUICK).fit(FLOWERS, FLOWERS[:, 0] * 9),
    "two": lambda: rs.Regressor(**QUICK).fit(FLOWERS, FLOWERS[:, :2]),
    "plain": lambda: rs.Regressor(normalize=False, **QUICK).fit(FLOWERS, FLOWERS[:, 0]),
    "counts": lambda: rs.Regressor(loss="poisson", **QUICK).fit(FLOWERS, KINDS),
    "quantiles": lambda: rs.Regressor(loss="quantile", **QUICK).fit(FLOWERS, FLOWERS[:, 0]),
    "spread": lambda: rs.Regressor(loss="gaussian", **QUICK).fit(FLOWERS, FLOWERS[:, 0]),
    "classes": lambda: rs.Classifier([4, 5, "batchnorm", 3], epochs=3).fit(FLOWERS, KINDS),
    "order": lambda: rs.Classifier(loss="ordinal", **QUICK).fit(FLOWERS.astype("f4"), KINDS),
    "labels": lambda: rs.Classifier(**QUICK).fit(FLOWERS, LABELS),
    "autoencoder": lambda: rs.Autoencoder([4, (3, "tanh"), (4, "tied")], epochs=3).fit(FLOWERS),
}


def expected(model, x):
    return model.predict_proba(x) if isinstance(model, rs.Classifier) else model.predict(x)


@pytest.mark.parametrize("name", MODELS)
def test_a_module_gives_the_same_numbers(name):
    model = MODELS[name]()
    module = model.to_torch()
    x = FLOWERS.astype(model.predict(FLOWERS[:1]).dtype if name == "order" else "f8")
    found = module(torch.from_numpy(x))
    np.testing.assert_allclose(found, expected(model, x), rtol=1e-5 if name == "order" else 1e-12)
    assert found.shape == expected(model, x).shape
    with torch.no_grad():
        next(module.network.parameters()).zero_()
    assert next(model.module_.parameters()).any()  # a copy


def test_steps_of_sequences_too():
    x, y = RNG.normal(size=(20, 5, 3)), RNG.normal(size=(20, 5))
    model = rs.Regressor(hidden=((4, "rnn"),), epochs=1).fit(x, y)
    np.testing.assert_allclose(model.to_torch()(torch.from_numpy(x)), model.predict(x))
    with pytest.raises(PlanError, match="sequences"):
        model.to_onnx("x.onnx")


@pytest.mark.slow  # the exporter takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_gives_the_same_numbers(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = MODELS[name]()
    session = runtime.InferenceSession(model.to_onnx(tmp_path / "m.onnx"))
    kind = {"tensor(double)": "f8", "tensor(float)": "f4"}[session.get_inputs()[0].type]
    for count in (1, 150):
        x = FLOWERS[:count].astype(kind)
        (found,) = session.run(["prediction"], {"x": x})
        np.testing.assert_allclose(found, expected(model, x), rtol=1e-4, atol=1e-6)
