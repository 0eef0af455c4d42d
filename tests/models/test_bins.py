"""Bins of numbers: the formula, their edges, which fits have them, and what else works with them."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris

import restrain as rs
from restrain.errors import FileError, RestrainError
from restrain.models import bins, defaults, files
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


def test_places_in_bins_are_those_of_interpolation():
    found = bins.edges(FLOWERS, 5)
    layer = bins.Bins(4, bins.size(found)).double()
    layer.set(found)
    x = np.concatenate([FLOWERS, FLOWERS[:3] + 100, FLOWERS[:3] - 100])
    out = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(out[:, :4], x)
    start = 4
    for column, own in enumerate(found):
        part = out[:, start : start + len(own) - 1] + 0.5
        # the places sum to the number of the bin, and by their widths to the number itself, within the edges
        np.testing.assert_allclose(part.sum(1), np.interp(x[:, column], own, range(len(own))), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(part @ np.diff(own) + own[0], x[:, column].clip(own[0], own[-1]), rtol=1e-12)
        start += len(own) - 1
    assert start == out.shape[1]


def test_edges_are_quantiles():
    x = np.column_stack([np.arange(17.0), np.arange(17) % 2, np.full(17, 3.0), np.arange(17) % 3])
    found = bins.edges(x, 4)
    assert [one.tolist() for one in found] == [[0, 4, 8, 12, 16], [0, 1], [3], [0, 1, 2]]
    assert bins.size(found) == 4 + 4 + 0 + 0 + 2
    layer = bins.Bins(4, 10)
    layer.set(found)
    assert (layer.weight != 0).sum(0).tolist() == [4, 0, 0, 2]


def test_bins_of_standardised_inputs_are_those_of_the_data():
    x = FLOWERS * [1, 1000, 1e-3, 1] + [0, 1e6, 0, -1e3]
    found = bins.edges(x, 8)
    raw, scaled = (bins.Bins(4, bins.size(found)).double() for _ in range(2))
    mean, deviation = x.mean(0), x.std(0)
    raw.set(found)
    scaled.set(found, mean, deviation)
    one = raw(torch.from_numpy(x))[:, 4:]
    other = scaled(torch.from_numpy((x - mean) / deviation))[:, 4:]
    np.testing.assert_allclose(other.numpy(), one.numpy(), atol=1e-6)


def test_fit_cuts_numbers_where_nothing_is_said(short, monkeypatch):
    model = rs.Regressor(random_state=0).fit(X, Y)
    assert [(layer["name"], layer["form"]) for layer in model.layers_] == [
        ("in", "input"),
        ("bins", "bins"),
        ("hid1", "dense"),
        ("out", "dense"),
    ]
    layer = model.module_.bins
    edges = np.unique(np.quantile(X[:, 2], np.linspace(0, 1, defaults.BINS + 1), method="nearest"))
    own = layer.weight[:, 2] != 0
    scale = model.input_scale_
    places = (torch.from_numpy(edges[:-1]) - scale.mean[2]) / scale.deviation[2]
    np.testing.assert_allclose((-layer.bias / layer.weight[:, 2])[own].numpy(), places.numpy(), rtol=1e-9)
    assert not [name for name, _ in model.module_.named_parameters() if name.startswith("bins")]
    for given in ({"ensemble": 3}, {"ensemble": None}, {"hidden": (100,)}, {"weight_l2": 1e-3}, {"loss": "absolute"}):
        assert "bins" not in dict(rs.Regressor(random_state=0, **given).fit(X, Y).module_.named_children()), given
    for x in (X > 0, X[:40]):  # two values a column; too few samples
        assert "bins" not in dict(rs.Regressor(random_state=0).fit(x, Y[: len(x)]).module_.named_children())
    raw = rs.Regressor(random_state=0, normalize=False).fit(X, Y).module_.bins
    np.testing.assert_allclose((-raw.bias / raw.weight[:, 2])[own].numpy(), edges[:-1], rtol=1e-9)
    monkeypatch.setattr(defaults, "WIDEST", 9)
    assert "bins" not in dict(rs.Regressor(random_state=0).fit(X, Y).module_.named_children())


def test_a_model_with_bins_is_like_any_other(short, tmp_path):
    model = rs.Classifier(random_state=0).fit(FLOWERS, KINDS)
    wanted = model.predict_proba(FLOWERS)
    np.testing.assert_allclose(model.to_torch()(torch.from_numpy(FLOWERS)).numpy(), wanted, rtol=1e-9)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(FLOWERS), wanted)
    read = rs.load(model.save(tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(read.predict_proba(FLOWERS), wanted)
    assert read.layers_ == model.layers_
    with torch.no_grad():
        model.module_.hid1.weight[:7] = model.module_.hid1.bias[:7] = 0
    before = model.predict_proba(FLOWERS)
    model.compact()
    assert [layer["size"] for layer in model.layers_[2:]] == [293, 3]
    np.testing.assert_allclose(model.predict_proba(FLOWERS), before, rtol=1e-9)
    places = model.module_.bins.weight.clone()
    assert model.train((FLOWERS, KINDS), epochs=2, weight_l2=0.1).n_iter_ > 2
    assert torch.equal(model.module_.bins.weight, places)


def test_an_input_is_read_through_its_bins():
    found = bins.edges(FLOWERS, 4)
    size = bins.size(found)
    layers = resolve([4, 3, 1])
    layers.insert(1, {"name": "bins", "form": "bins", "size": size})
    network = Network(layers)
    network.bins.set(found)
    with torch.no_grad():
        network.hid1.weight.zero_()
        network.hid1.weight[1, 3] = 1.0  # the fourth input itself
        network.hid1.weight[2, 4 + len(found[0]) - 1] = 1.0  # the first bin of the second
    model = rs.Regressor(hidden=(3,), random_state=0, epochs=1).fit(FLOWERS, KINDS)
    model.module_ = network
    assert model.selected_features_.tolist() == [1, 3]


def test_files_with_other_bins_are_refused(short, tmp_path):
    model = rs.Regressor(random_state=0).fit(X, Y)
    for size in (model.layers_[1]["size"] + 1, 10, 3):
        model.layers_[1]["size"] = size
        with pytest.raises(FileError):
            rs.load(files.save(model, tmp_path / "model.safetensors"))


def test_bins_are_fits_own():
    for spec in ("bins", {"form": "bins", "size": 20}):
        with pytest.raises(RestrainError, match="bins"):
            rs.Regressor([10, spec, 1]).fit(X, Y)


@pytest.mark.slow  # the exporter takes seconds
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_bins(short, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = rs.Regressor(random_state=0).fit(X, Y)
    session = runtime.InferenceSession(model.to_onnx(tmp_path / "m.onnx"))
    np.testing.assert_allclose(session.run(None, {"x": X})[0], model.predict(X), rtol=1e-9)
