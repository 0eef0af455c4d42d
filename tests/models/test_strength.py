"""Schedules and targets as values of the models' keywords."""

import numpy as np
import pytest
from sklearn.base import clone
from tests.models.test_resume import StopError, model, result, stopping_at

import restrain as rs
from restrain.errors import FileError

RNG = np.random.default_rng(0)
X, Y = RNG.random((120, 16)).astype("f4"), RNG.integers(0, 3, 120)
MOVING = {
    "weight_l1": {"strength": rs.Target(zeros=0.5, start=1e-3, every=3), "how": "proximal"},
    "weight_l2": rs.schedules.Linear(0, 1e-3, steps=50) * rs.schedules.WarmUp(10, unit="epoch"),
    "hidden_l1": {"strength": {"target": {"active": 0.3, "every": 7}}},
}
FEW = {"epochs": 12, "patience": None, **MOVING}


def test_a_fit_that_failed_goes_on_where_it_was(tmp_path):
    whole = model(None, learning_rate=stopping_at(-1), **FEW).fit(X, Y)
    path = tmp_path / "state"
    for stop in (3, 7):
        with pytest.raises(StopError):
            model(path, learning_rate=stopping_at(stop), **FEW).fit(X, Y)
    assert result(model(path, learning_rate=stopping_at(-1), **FEW).fit(X, Y)) == result(whole)


def test_a_target_is_reached_in_a_fit():
    target = rs.Target(norm=3.0, start=1e-3, every=5)
    found = rs.Classifier(
        hidden=(20,), weight_l2=target, epochs=120, batch_size=20, learning_rate=0.01, random_state=0
    ).fit(X, Y)
    square = sum(p.detach().square().sum() for p in found.module_.parameters() if p.dim() > 1)
    assert float(square) ** 0.5 == pytest.approx(3.0, rel=0.02)


def test_an_epoch_is_one_of_the_fit():
    seen = []
    rs.Regressor(
        hidden=(3,), weight_l2=rs.schedules.Function(lambda epoch: seen.append(epoch) or 0.1, unit="epoch"), epochs=3
    ).fit(X, X[:, 0])
    assert sorted(set(seen)) == [0, 1, 2, 3]


def test_cloned_saved_and_loaded(tmp_path):
    fitted = rs.Autoencoder(
        hidden=(3,), epochs=1, **MOVING | {"regularizers": [rs.schedules.WarmUp(3) * rs.L2().on("*")]}
    )
    assert repr(clone(fitted)) == repr(fitted)
    fitted.fit(X).save(tmp_path / "model")
    loaded = rs.load(tmp_path / "model")
    assert {key: getattr(loaded, key) for key in MOVING} == MOVING
    assert loaded.regularizers == fitted.regularizers
    with pytest.raises(FileError, match=r"weight_l2 can't be written: .*it is code"):
        fitted.set_params(weight_l2=rs.schedules.Function(float)).save(tmp_path / "model")
