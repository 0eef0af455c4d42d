"""Several networks side by side: trained apart, each validated on samples of its own, and joined to one."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris

import restrain as rs
from restrain.errors import PlanError, TrainingError
from restrain.models import defaults, ensemble
from restrain.models.data import Samples
from restrain.models.layers import Network
from restrain.models.specs import resolve

X, Y = load_diabetes(return_X_y=True)
X, Y = X[:100], Y[:100]
FLOWERS, KINDS = load_iris(return_X_y=True)


@pytest.fixture
def short(monkeypatch):
    """Trainings of some updates, of three networks."""
    few = {"UPDATES": 12, "PATIENCE": 6, "EVERY": 2, "MEMBERS": 3, "FALL": 10.0, "UPDATES_EACH": 0, "PATIENCE_EACH": 0}
    for name, value in few.items():
        monkeypatch.setattr(defaults, name, value)


def test_the_joined_network_puts_out_the_mean():
    torch.manual_seed(0)
    network = Network(resolve([4, 6, 2])).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    ensemble.part(network, 3)
    apart = network(x).detach().numpy()
    hidden = np.maximum(x.numpy() @ network.hid1.weight.detach().numpy().T + network.hid1.bias.detach().numpy(), 0)
    weights, bias = network.out.weight.detach().numpy(), network.out.bias.detach().numpy()
    for k in range(3):
        units = slice(2 * k, 2 * k + 2)
        np.testing.assert_allclose(apart[:, k], hidden[:, units] @ weights[:, units].T + bias, rtol=1e-12)
    assert ensemble.join(network)
    np.testing.assert_allclose(network(x).detach().numpy(), apart.mean(1), rtol=1e-12)
    assert list(network.state_dict()) == list(Network(resolve([4, 6, 2])).state_dict())
    assert not ensemble.join(network)


def test_first_weights_are_those_of_the_small_network():
    torch.manual_seed(0)
    network = Network(resolve([3, 4000, 1]))
    ensemble.part(network, 10)
    greatest = network.out.weight.abs().max().item()
    assert 0.99 / 400**0.5 < greatest <= 1 / 400**0.5  # uniform up to 1/√units


def trained_alone(start, x, y, rate, epochs):
    """Predictions by gradient descent on each network's mean squared error, their mean; all in NumPy."""
    w, b, v, c = start
    for _ in range(epochs):
        a = x @ w.T + b  # (samples, networks × units)
        h = np.maximum(a, 0).reshape(len(x), len(v), -1)
        error = 2 * (np.einsum("nku,ku->nk", h, v) + c - y[:, None]) / (len(x) * len(v))
        back = (error[:, :, None] * v).reshape(len(x), -1) * (a > 0)
        v = v - rate * np.einsum("nk,nku->ku", error, h)
        w, b, c = w - rate * back.T @ x, b - rate * back.sum(0), c - rate * error.sum()
    h = np.maximum(x @ w.T + b, 0).reshape(len(x), len(v), -1)
    return (np.einsum("nku,ku->nk", h, v) + c).mean(1)


def test_each_is_trained_on_its_own_loss():
    given = {"hidden": (4,), "ensemble": 3, "algo": "sgd", "batch_size": 100, "normalize": False, "random_state": 0}
    x, y = 20 * X, (Y - Y.mean()) / Y.std()
    first = rs.Regressor(learning_rate=1e-30, epochs=1, **given).fit(x, y)
    find = [first.find(*name).detach().numpy() for name in (("hid1",), ("hid1", "bias"), ("out",), ("out", "bias"))]
    start = (find[0], find[1], 3 * find[2].reshape(3, 4), find[3][0])
    model = rs.Regressor(learning_rate=0.3, epochs=40, **given).fit(x, y)
    wanted = trained_alone(start, x, y, 0.3, 40)
    np.testing.assert_allclose(model.predict(x), wanted, rtol=1e-8)
    assert np.abs(wanted - first.predict(x)).max() > 0.1


def test_each_leaves_out_another_part():
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    part, held = ensemble.shared_out(Samples(np.zeros((84, 2)), labels, labels=True), 4, seed=1)
    np.testing.assert_array_equal(part.weight + held.weight, 1)
    np.testing.assert_array_equal(held.weight.sum(1), 1)
    for label, count in ((0, 50), (1, 30), (2, 4)):
        parts = held.weight[labels == label].sum(0)
        assert set(parts) <= {count // 4, -(-count // 4)}
    weight = np.linspace(1, 2, 84)
    part, held = ensemble.shared_out(Samples(np.zeros((84, 2)), labels, weight, labels=True), 4, seed=1)
    np.testing.assert_allclose((part.weight + held.weight).T, np.tile(weight, (4, 1)))


def test_validation_is_of_the_samples_left_out():
    model = rs.Regressor(random_state=0, ensemble="auto", learning_rate=1e-30, normalize=False)
    first = model._start(X, Y, None, None, {}, fresh=True, auto=True)
    rows = [row for row, _ in zip(first.epochs(), range(1), strict=False)]
    _, held = ensemble.shared_out(Samples(X, Y[:, None]), defaults.MEMBERS, model.seed_)
    each = model.module_(torch.from_numpy(X))[..., 0].detach().numpy()
    assert each.shape == (100, defaults.MEMBERS)
    wanted = (np.square(each - Y[:, None]) * held.weight).sum(1).mean()
    assert rows[0][1]["data_loss"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", ["classifier", "regressor", "several targets", "labels"])
def test_fit_trains_several_where_nothing_is_said(short, kind):
    model = rs.Classifier(random_state=0) if kind in ("classifier", "labels") else rs.Regressor(random_state=0)
    y = {"classifier": KINDS, "labels": np.eye(3, dtype=int)[KINDS]}.get(kind, FLOWERS[:, :2])
    y = y[:, 0] if kind == "regressor" else y
    model.fit(FLOWERS, y)
    assert [layer["name"] for layer in model.layers_] == ["in", "bins", "hid1", "out"]
    assert model.module_.hid1.weight.shape == (300, model.layers_[1]["size"])
    row = model.history_[0]
    assert {"weight_l2", "valid_data_loss"} <= set(row)
    predict = model.predict_proba if kind in ("classifier", "labels") else model.predict
    found = predict(FLOWERS)
    assert found.shape == {"regressor": (150,), "several targets": (150, 2)}.get(kind, (150, 3))
    np.testing.assert_array_equal(found, getattr(clone(model).fit(FLOWERS, y), predict.__name__)(FLOWERS))
    np.testing.assert_allclose(model.to_torch()(torch.from_numpy(FLOWERS)).numpy(), found, rtol=1e-9)


def test_what_is_said_makes_one(short):
    for given in (
        {"ensemble": None},
        {"ensemble": 1},
        {"hidden": (20,)},
        {"hidden": (100,)},
        {"hidden": ()},
        {"weight_l1": 1e-3},
        {"hidden_dropout": 0.1},
        {"epochs": 2},
        {"loss": "absolute"},
        {"activation": "tanh"},
    ):
        model = rs.Regressor(random_state=0, **given).fit(X, Y)
        assert [layer["size"] for layer in model.layers_[1:-1]] == list(given.get("hidden", (100,))), given
    assert rs.Regressor(random_state=0).fit(X[:49], Y[:49]).layers_[1]["size"] == 100  # too few to leave any out
    assert defaults.members(defaults.MOST) == 3
    assert defaults.members(defaults.MOST + 1) == 1
    assert rs.Regressor(random_state=0).train((X, Y), epochs=1).layers_[1]["size"] == 100
    held = rs.Regressor(random_state=0).fit(X[20:], Y[20:], valid=(X[:20], Y[:20]))
    assert held.layers_[2]["size"] == 300
    assert "valid_data_loss" in held.history_[0]


def test_a_joined_model_is_like_any_other(tmp_path):
    given = {"hidden": (5,), "ensemble": 3, "epochs": 4, "random_state": 0}
    model = rs.Classifier(**given).fit(FLOWERS, KINDS)
    assert model.get_params()["ensemble"] == 3
    wanted = model.predict_proba(FLOWERS)
    read = rs.load(model.save(tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(read.predict_proba(FLOWERS), wanted)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(FLOWERS), wanted)
    with torch.no_grad():
        model.module_.hid1.weight[0] = model.module_.hid1.bias[0] = 0
    before = model.predict_proba(FLOWERS)
    model.compact()
    assert model.layers_[1]["size"] == 14
    np.testing.assert_allclose(model.predict_proba(FLOWERS), before, rtol=1e-9)
    assert model.train((FLOWERS, KINDS), epochs=2).n_iter_ == 6


def test_a_broken_off_fit_is_joined():
    for rate, error in ((1e30, TrainingError), (-1.0, PlanError)):
        model = rs.Regressor(hidden=(5,), ensemble=3, epochs=3, learning_rate=rate, algo="sgd", random_state=0)
        with pytest.raises(error):
            model.fit(X, Y)
        assert model.module_(torch.from_numpy(X)).shape == (100, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ensemble": "many"}, '"auto" or None for one'),
        ({"ensemble": 0}, '"auto" or None for one'),
        ({"ensemble": True}, '"auto" or None for one'),
        ({"ensemble": 3, "hidden": (5, 5)}, "one hidden layer"),
        ({"ensemble": 3, "hidden": ()}, "one hidden layer"),
        ({"ensemble": 3, "hidden": ("batchnorm",)}, "one hidden layer"),
        ({"ensemble": 3, "layers": [10, 5, (1, "softplus")]}, "one hidden layer"),
        ({"ensemble": 3, "hidden": 5, "activation": "norm:max"}, "one hidden layer"),
        ({"ensemble": 3, "weight_l1": 0.1}, "without rules"),
    ],
)
def test_what_can_not_be_an_ensemble_is_told(given, said):
    with pytest.raises(PlanError, match=said):
        rs.Regressor(epochs=1, **given).fit(X, Y)


def test_training_without_fit_has_no_ensemble():
    for call in (lambda model: model.train((X, Y)), lambda model: model.partial_fit(X, Y)):
        with pytest.raises(PlanError, match="ensemble=3 is of fit"):
            call(rs.Regressor(hidden=(5,), ensemble=3, epochs=1))


def test_strengths_and_lengths_by_samples():
    def chosen(samples, **given):
        return defaults.network(samples, 50, True, "auto", 1, rules=False, members=5, **given)

    few, many = chosen(200), chosen(8000)
    assert few["weight_l2"] * 5 == pytest.approx(2e-3)  # the loss is the mean of five
    assert many["weight_l2"] * 5 == pytest.approx(1 / 8000)
    assert few["epochs"] * 4 == 4000  # updates: four an epoch
    assert many["epochs"] * 160 == 2 * 8000
    assert few["patience"] * few["validate_every"] * 4 == 400
    assert many["patience"] * many["validate_every"] * 160 >= 8000 / 4
    assert [chosen(200, classes=classes)["hidden_dropout"] for classes in (False, True)] == [0.2, 0.4]
    alone = defaults.network(8000, 50, True, "auto", 1, rules=False)
    assert alone["weight_l2"] == 1e-4
    assert alone["epochs"] * 160 == 4000
