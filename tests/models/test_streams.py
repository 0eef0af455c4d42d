"""Loaders, datasets and iterators as data; later batches on another scale."""

import gc
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import restrain as rs
from restrain.errors import FileAccessError, PlanError, RestrainWarning
from restrain.models import streams
from restrain.models.data import Samples
from restrain.models.shift import warn_of_shift

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(90, 3)).astype("float32")
Y = (X[:, 0] > 0).astype("int64")
QUICK = {"hidden": (4,), "random_state": 0, "epochs": 3}


def dataset():
    return TensorDataset(torch.as_tensor(X), torch.as_tensor(Y))


def batches(size=20, weights=None):
    for start in range(0, len(X), size):
        part = slice(start, start + size)
        yield (X[part], Y[part]) if weights is None else (X[part], Y[part], weights[part])


class Stream(IterableDataset):
    def __iter__(self):
        return iter((torch.as_tensor(x), int(y)) for x, y in zip(X, Y, strict=True))


SOURCES = {
    "loader": lambda: DataLoader(dataset(), batch_size=7),
    "dataset": dataset,
    "iterable": Stream,
    "generator": batches,
}


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_stream_gives_the_model_of_its_arrays(kind, large, monkeypatch):
    if large:
        monkeypatch.setattr(streams, "LOADED", 100)
    wanted = rs.Classifier(**QUICK).fit(X, Y).predict_proba(X)
    model = rs.Classifier(**QUICK).fit(SOURCES[kind]())
    np.testing.assert_allclose(model.predict_proba(X), wanted, rtol=1e-6)
    twin = rs.Classifier(**QUICK)
    twin.train(SOURCES[kind](), valid=SOURCES[kind](), epochs=1)
    other = rs.Classifier(**QUICK).train((X, Y), valid=(X, Y), epochs=1)
    assert twin.history_[0]["valid_acc"] == other.history_[0]["valid_acc"]


def test_what_is_large_lies_on_disk(monkeypatch):
    monkeypatch.setattr(streams, "LOADED", 100)
    x, y, weight = streams.read(batches(weights=np.ones(90)), True)
    assert isinstance(x, np.memmap)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert weight.shape == (90,)
    del x, y, weight
    gc.collect()
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(streams.tempfile, "tempdir", None)
    monkeypatch.setattr(streams.tempfile, "TemporaryFile", full)
    with pytest.raises(FileAccessError, match="No space left on device; make room there, or set TMPDIR"):
        streams.read(batches(), True)


def full():
    raise OSError(28, "No space left on device")


def test_weights_labels_and_models_without_targets():
    w = DRAW.uniform(0.5, 2, 90)
    model = rs.Classifier(**QUICK).fit(batches(weights=w))
    np.testing.assert_allclose(model.predict_proba(X), rs.Classifier(**QUICK).fit(X, Y, w).predict_proba(X))
    words = np.where(Y, "up", "down")
    named = rs.Classifier(**QUICK).fit((X[k : k + 30], words[k : k + 30]) for k in (0, 30, 60))
    assert named.classes_.tolist() == ["down", "up"]
    for source in (dataset(), (X[k : k + 30] for k in (0, 30, 60)), DataLoader(torch.as_tensor(X), batch_size=9)):
        coder = rs.Autoencoder(**QUICK).fit(source)
        np.testing.assert_allclose(coder.predict(X), rs.Autoencoder(**QUICK).fit(X).predict(X))


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (iter(()), "no samples; an iterator that was used before is at its end"),
        (iter([X]), r"a batch is \(X, y\).*batch 0 is \(ndarray\)"),
        (iter([(X, 3)]), r"batch 0 is \(ndarray, int\)"),
        (iter([(X, Y), (X,)]), "a batch is"),
        (iter([(X, Y), (X, Y, Y)]), "batch 1 has 3 members, and the first has 2"),
        (iter([(X, Y[:5])]), "batch 0 has members of 5 and 90 samples"),
        (iter([(X, Y), (X[:, :2], Y)]), r"X of batch 1 has samples of shape \(2,\)"),
        (iter([(X, Y), (X.astype(int), Y)]), "type int64, and the first .* float32"),
        (iter([(np.array([["a"], ["b"]]), Y[:2])]), r"encode tables before, by rs.TableEncoder\(\)"),
    ],
)
def test_streams_that_are_none(stream, said):
    with pytest.raises(PlanError, match=said):
        rs.Classifier(**QUICK).fit(stream)


# A shift of scale


def test_a_later_batch_on_another_scale_is_told():
    model = rs.Regressor(hidden=(4,), normalize=True, random_state=0)
    table = pd.DataFrame(X, columns=["age", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(table[:30], X[:30, 1])
        model.partial_fit(table[30:60], X[30:60, 1])
        for row in range(60, 64):  # single samples vary
            model.partial_fit(table[row : row + 1], X[row : row + 1, 1])
    with pytest.warns(
        RestrainWarning, match=r"far from the first.*: age is -?\d.* and was .*begin with a larger first"
    ):
        model.partial_fit(table.assign(age=table.age + 10), X[:, 1])
    with pytest.warns(RestrainWarning, match="c is "):
        model.partial_fit(table.assign(c=table.c * 100), X[:, 1])
    with pytest.warns(RestrainWarning, match="y is 50"):
        model.train((table, X[:, 1] + 50), epochs=1)


def test_no_scale_no_warning():
    model = rs.Regressor(hidden=(4,), random_state=0).partial_fit(X, X[:, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(X + 100, X[:, 1])


def test_data_from_the_same_distribution_are_rarely_told():
    """Of 500 batches each of 1, 2, 5 and 50 normal samples in 10 columns none is: 8 deviations are far."""
    draw = np.random.default_rng(1)
    scale = rs.Standardize().fit(draw.normal(size=(1000, 10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 2, 5, 50):
            for _ in range(500):
                warn_of_shift(Samples(draw.normal(size=(count, 10))), scale, None, list("abcdefghij"))
