"""Fitted models saved and loaded: everything that was learned is there, and nothing but data is needed for it."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone

import restrain as rs
from restrain import registry
from restrain.errors import FileError, PlanError
from restrain.models import files

UNSAVED = {"_optimizer"}


def data(count=60, features=4, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, features)) * [1, 10, 0.1, 1][:features] + 3
    return x, np.array(["low", "mid", "high"])[np.digitize(x[:, 0] + x[:, 3], [5, 7])], x @ draw.normal(size=features)


X, LABELS, NUMBERS = data()
STEPS = X.astype("f4").reshape(20, 3, 4)
QUICK = {"epochs": 2, "random_state": 0}
MODELS = {
    "classifier": lambda: rs.Classifier(hidden=(5, (3, "tanh")), weight_l2=1e-3, **QUICK).fit(X, LABELS),
    "class indices": lambda: rs.Classifier([4, 5, 3], **QUICK).fit(X, np.digitize(X[:, 0], [2, 4])),
    "truths": lambda: rs.Classifier(hidden=(3,), **QUICK).fit(X, X[:, 0] > 3),
    "normalized": lambda: rs.Classifier(hidden=(5,), normalize=True, valid=0.2, patience=1, **QUICK).fit(X, LABELS),
    "regressor": lambda: rs.Regressor(hidden=(5,), normalize=True, **QUICK).fit(X, NUMBERS),
    "regressor of two": lambda: rs.Regressor(hidden=(5,), normalize=True, **QUICK).fit(X, np.stack([NUMBERS] * 2, 1)),
    "float32": lambda: rs.Regressor(hidden=(5,), **QUICK).fit(X.astype("f4"), NUMBERS),
    "autoencoder": lambda: rs.Autoencoder([4, (8, "relu"), (4, "tied")], hidden_l1=1e-3, **QUICK).fit(X),
    "batch norm": lambda: rs.Autoencoder([4, 6, "batchnorm", 4], normalize=True, **QUICK).fit(X),
    "sequences": lambda: rs.Classifier(hidden=((5, "gru"),), **QUICK).fit(STEPS, LABELS[:20]),
    "labels of steps": lambda: rs.Classifier(hidden=((5, "rnn"),), **QUICK).fit(STEPS, LABELS.reshape(20, 3)),
    "partial": lambda: rs.Classifier(hidden=(3,), **QUICK).partial_fit(X[:9], LABELS[:9], classes=np.unique(LABELS)),
    "rules": lambda: rs.Regressor(
        hidden=(5,),
        how="proximal",
        weight_l1={"strength": 1e-3, "on": "hid*"},
        noise={"hid*": 0.1},
        hidden_dropout=rs.Dropout(0.1, same_over=(0,)),
        gradientnoise=1e-3,
        max_norm=2.0,
        regularizers=[1e-3 * rs.GroupLasso(per="in").on("hid1.weight", how="proximal"), "l2:1e-4"],
        algo=torch.optim.Adam,
        **QUICK,
    ).fit(X, NUMBERS),
}
each = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def inputs(model):
    return STEPS if any(layer["form"] in ("gru", "rnn") for layer in model.layers_) else X


@each
def test_predictions_come_back(make, tmp_path):
    model = make()
    model.save(tmp_path / "m")
    twin = rs.load(tmp_path / "m")
    assert type(twin) is type(model)
    x = inputs(model)
    np.testing.assert_array_equal(twin.predict(x), model.predict(x))
    if isinstance(model, rs.Classifier):
        np.testing.assert_array_equal(twin.predict_proba(x), model.predict_proba(x))
    if isinstance(model, rs.Autoencoder):
        np.testing.assert_array_equal(twin.transform(x), model.transform(x))
    for name, found in twin.activations(x).items():
        np.testing.assert_array_equal(found, model.activations(x)[name])


@each
def test_everything_learned_comes_back(make, tmp_path):
    model = make()
    model.save(tmp_path / "m")
    twin = rs.load(tmp_path / "m")
    assert set(vars(twin)) == set(vars(model)) - UNSAVED
    assert repr(twin.get_params(deep=False)) == repr(model.get_params(deep=False))
    for name in set(vars(twin)) - set(twin.get_params()):
        found, wanted = vars(twin)[name], vars(model)[name]
        assert type(found) is type(wanted), name
        if isinstance(wanted, torch.nn.Module):
            assert all(found.state_dict()[key].equal(value) for key, value in wanted.state_dict().items())
        elif isinstance(wanted, np.ndarray):
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
        else:
            assert repr(found) == repr(wanted)
    assert repr(clone(twin)) == repr(clone(model))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(twin)).predict(inputs(model)), model.predict(inputs(model)))


def test_training_goes_on(tmp_path):
    """With an optimizer without a state, as if nothing had been between."""
    settings = {"algo": "sgd", "learning_rate": 0.1, "random_state": 0, "input_noise": 0.1}
    model = rs.Classifier(hidden=(5,), epochs=2, **settings).fit(X, LABELS)
    model.save(tmp_path / "m")
    twin = rs.load(tmp_path / "m")
    for one in (model, twin):
        one.train((X, LABELS), epochs=3)
    assert twin.n_iter_ == model.n_iter_ == 5
    assert repr(twin.history_) == repr(model.history_)
    assert all(p.equal(q) for p, q in zip(twin.module_.parameters(), model.module_.parameters(), strict=True))


def test_names_of_features_are_kept(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(X, columns=["a", "b", "c", "d"])
    rs.Regressor(hidden=(3,), **QUICK).fit(table, NUMBERS).save(tmp_path / "m")
    twin = rs.load(tmp_path / "m")
    twin.predict(table)
    with pytest.raises(ValueError, match="feature names"):
        twin.predict(table[["b", "a", "c", "d"]])


def test_wrong_data_are_still_refused(tmp_path):
    MODELS["classifier"]().save(tmp_path / "m")
    twin = rs.load(tmp_path / "m")
    with pytest.raises(ValueError, match="5 features"):
        twin.predict(np.ones((2, 5)))
    with pytest.raises(PlanError, match="not among"):
        twin.train((X, np.array(["other"] * len(X))))


def test_penalties_of_your_own_are_found_by_name(tmp_path):
    class SavedPenalty(rs.Penalty):
        def __call__(self, w):
            return w.square().sum()

    model = rs.Regressor(hidden=(3,), savedpenalty=1e-3, **QUICK).fit(X, NUMBERS)
    other = rs.Regressor(hidden=(3,), **QUICK).fit(X, NUMBERS)
    model.save(tmp_path / "m")
    other.save(tmp_path / "other")
    assert rs.load(tmp_path / "m").savedpenalty == 1e-3
    del registry._classes["savedpenalty"]
    rs.load(tmp_path / "other")
    with pytest.raises(FileError, match=r"no keyword 'savedpenalty' here.*import the module that defines it"):
        rs.load(tmp_path / "m")


def test_subclasses_are_not_written(tmp_path):
    class Own(rs.Classifier):
        pass

    with pytest.raises(FileError, match=r"Own is a class of your own.*Autoencoder, Classifier or Reg"):
        Own(hidden=(3,), **QUICK).fit(X, LABELS).save(tmp_path / "m")


def test_not_fitted(tmp_path):
    with pytest.raises(FileError, match="this Classifier has learned nothing yet"):
        rs.Classifier().save(tmp_path / "m")


def test_only_three_classes_are_ever_loaded(tmp_path):
    files.write(tmp_path / "m", "model", {"class": "Network", "settings": {}, "learned": {}, "notes": {}}, {})
    with pytest.raises(FileError, match="a model is one of Autoencoder, Classifier, Regressor; the file has 'Network'"):
        rs.load(tmp_path / "m")


def test_load_and_save_are_public():
    assert (rs.load.__module__, rs.save.__module__) == ("restrain.saved", "restrain.saved")
    assert {"load", "save"} <= set(dir(rs))


def test_a_header_of_any_length(tmp_path):
    model = rs.Regressor(hidden=(), epochs=1).fit(np.eye(4), np.arange(4.0))
    firsts = set()
    for length in range(0, 256, 8):  # of 0x80 the file begins as a pickle does
        path = files.save(model, tmp_path / "m", {"x": "-" * length})
        firsts.add(path.read_bytes()[0])
        assert rs.load(path).n_features_in_ == 4
    assert 0x80 in firsts
