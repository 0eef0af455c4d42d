"""The compiled update of the models gives the numbers of the one that is written out.

The operations of an update are recorded, then compiled. Most tests stop after the recording, with a compiler that fails
on purpose, and let the operations run one by one in float64; a few compile for good.
"""

import functools
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import restrain as rs
from restrain.errors import PlanError, RestrainWarning
from restrain.models import program
from restrain.models.data import Samples

DIGITS = load_digits()
X, Y = DIGITS.data[:150] / 16, DIGITS.target[:150]  # float64; batches of 32 leave one of 22
WEIGHTS = np.random.default_rng(0).random(150) + 0.5


def broken(*args, **kwargs):
    raise RuntimeError("no compiler here\nsecond line")


@pytest.fixture
def recorded(monkeypatch):
    """A machine without a compiler."""
    monkeypatch.setattr(torch._inductor, "compile", broken)


def fitted(kind, compiled, data=(X, Y), valid=None, **given):
    settings = {"batch_size": 32, "epochs": 3, "random_state": 0, "learning_rate": 0.01, "compile": compiled}
    model = kind(**{**settings, **given})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no compiler here", category=RestrainWarning)
        return model.train(data, valid)


def assert_same(one, other, rtol=1e-9):
    """The same weights and history, to rounding."""
    mine, theirs = (model.module_.state_dict() for model in (one, other))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=rtol / 10)
    assert [row.keys() for row in one.history_] == [row.keys() for row in other.history_]
    for row, its in zip(one.history_, other.history_, strict=True):
        assert row == pytest.approx(its, rel=rtol, abs=rtol)


RULES = {
    "none": {},
    "l2": {"weight_l2": 1e-3},
    "l1": {"weight_l1": 1e-3},
    "both, mean": {"weight_l1": {"strength": 1.0, "reduce": "mean"}, "weight_l2": 1e-3},
    "hidden": {"hidden_l1": 1e-2},
    "contractive": {"contractive": 1e-3, "activation": "tanh"},
    "registered": {"grouplasso": 1e-3, "hoyer": {"strength": 1e-3, "optional": True}},
    "proximal": {"weight_l1": 1e-3, "how": "proximal", "max_norm": 1.0},
    "gradient": {"weight_l1": {"strength": 1e-3, "how": "gradient", "every": 3}, "weight_l2": 1e-3},
    "decoupled": {"weight_l2": {"strength": 1e-2, "how": "decoupled"}},
    "all": {"weight_l1": 1e-3, "weight_l2": 1e-3, "hidden_l1": 1e-3},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("algo", ["sgd", "adam"])
def test_every_rule(recorded, rules, algo):
    given = {"hidden": (20, 10), "algo": algo, **RULES[rules]}
    one, other = (fitted(rs.Classifier, compiled, **given) for compiled in (True, False))
    assert_same(one, other)
    assert one.compiled_.startswith("nothing: RuntimeError: no compiler here. The update's operations run one by one")


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = [
    "sgd",
    "nag",
    functools.partial(SGD, momentum=0.8, dampening=0.3, weight_decay=0.1),
    functools.partial(SGD, weight_decay=0.1, maximize=True),
    "adamw",
    functools.partial(ADAM, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1),
    functools.partial(ADAMW, weight_decay=0.3),
    functools.partial(ADAM, amsgrad=True),
    "rmsprop",
    "adagrad",
]


@pytest.mark.parametrize("algo", OPTIMIZERS, ids=lambda algo: repr(algo).replace("torch.optim.", ""))
def test_every_optimizer(recorded, algo):
    one, other = (
        fitted(rs.Classifier, compiled, algo=algo, hidden=(20,), learning_rate=lambda epoch: 0.02 / (1 + epoch))
        for compiled in (True, False)
    )
    assert_same(one, other)
    state, its = one._optimizer[1]["state"], other._optimizer[1]["state"]
    for p, kept in its.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(state[p][name], value, rtol=1e-9, atol=1e-10)


MODELS = {
    "batch norm": (rs.Classifier, {"layers": [64, 20, "batchnorm", 10]}, (X, Y)),
    "layer norm": (rs.Classifier, {"layers": [64, (20, "tanh"), "layernorm", 10]}, (X, Y)),
    "weights": (rs.Classifier, {"hidden": (20,)}, (X, Y, WEIGHTS)),
    "regressor": (rs.Regressor, {"hidden": (20,), "normalize": True}, (X[:, :50], X[:, 50:] * 7)),
    "tied": (rs.Autoencoder, {"layers": [64, (20, "relu"), (64, "tied")]}, X),
    "weights of pictures": (rs.Autoencoder, {"hidden": (20,)}, (X, None, WEIGHTS)),
    "long gradients": (rs.Classifier, {"hidden": (20,), "max_gradient_norm": 0.1}, (X, Y)),
    "in order": (rs.Classifier, {"hidden": (20,), "shuffle": False}, (X, Y)),
    "one batch": (rs.Classifier, {"hidden": (20,), "batch_size": 150}, (X, Y)),
    "not a whole batch": (rs.Classifier, {"hidden": (20,), "batch_size": 200}, (X, Y)),
    "the last batch often": (rs.Classifier, {"hidden": (20,), "epochs": 51, "hidden_l1": 1e-3}, (X[:50], Y[:50])),
    "bytes": (rs.Classifier, {"hidden": (20,), "precision": "64"}, (DIGITS.data[:150].astype("u1"), Y)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("algo", ["adam", "rmsprop"])
def test_every_model(recorded, name, algo):
    kind, given, data = MODELS[name]
    rtol = 1e-5 if name == "batch norm" else 1e-9  # Adam makes steps of the rounding of a gradient that is zero
    assert_same(*(fitted(kind, compiled, data, algo=algo, weight_l2=1e-3, **given) for compiled in (True, False)), rtol)


def test_validation_and_early_stopping(recorded):
    given = {"hidden": (30,), "learning_rate": 0.05, "patience": 3, "epochs": 60, "hidden_l1": 1e-4}
    one, other = (fitted(rs.Classifier, compiled, valid=0.3, **given) for compiled in (True, False))
    assert len(one.history_) < 60
    assert "valid_hidden_l1" in one.history_[0]
    assert_same(one, other, rtol=1e-7)


def test_two_trainings_are_one_that_is_as_long(recorded):
    given = {"hidden": (20,), "input_noise": 0.1, "hidden_dropout": 0.3}
    once, twice = (fitted(rs.Classifier, True, epochs=epochs, **given) for epochs in (4, 2))
    with pytest.warns(RestrainWarning, match="no compiler here"):
        twice.train((X, Y), epochs=2)
    assert_same(once, twice, rtol=0)


def test_rows_on_file_are_read_batch_by_batch(recorded, tmp_path):
    data = np.memmap(tmp_path / "x", dtype="f8", mode="w+", shape=X.shape)
    data[:] = X
    samples = Samples(data, Y)
    samples.load()
    assert samples.tensors is None
    assert_same(*(fitted(rs.Classifier, True, (x, Y), hidden=(20,)) for x in (data, X)), rtol=0)


def test_loaded_rows_are_those_that_are_read():
    for x in (X, X.astype("f4"), (X * 16).astype("u1")):
        samples = Samples(x, Y, WEIGHTS, dtype=torch.float64, labels=True).part(np.arange(3, 90, 2))
        expected, rows = samples.batch(np.array([5, 1])), np.array([5, 1])
        samples.load()
        for tensor, its in zip(samples.batch(rows), expected, strict=True):
            assert torch.equal(tensor, its)
            assert tensor.dtype == its.dtype


# What is not compiled


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"algo": "lbfgs", "batch_size": 150}, "LBFGS calls the loss"),
        ({"weight_l1": {"strength": 1e-3, "every": 2}}, "acts now and then"),
        ({"weight_l1": {"strength": rs.schedules.WarmUp(5) * 1e-3}}, "decides by a number"),
        ({"klsparsity": {"strength": 1e-2, "rate": 0.1}, "activation": "sigmoid"}, "decides by a number"),
        ({"regularizers": rs.DropConnect(0.1).on("hid1.weight")}, "noise on weights"),
    ],
)
def test_what_is_not_compiled_is_said_and_trained_as_ever(recorded, given, reason):
    with pytest.warns(RestrainWarning, match=f"compile=True, but compiled is nothing: .*{reason}"):
        one = rs.Classifier(hidden=(20,), epochs=2, random_state=0, compile=True, **given).fit(X, Y)
    assert_same(one, rs.Classifier(hidden=(20,), epochs=2, random_state=0, compile=False, **given).fit(X, Y), rtol=0)
    assert reason in one.compiled_


def test_auto_goes_by_the_length_of_the_training(recorded, monkeypatch):
    short = fitted(rs.Classifier, "auto", hidden=(20,))
    assert short.compiled_ == "nothing: the training is short"
    assert fitted(rs.Classifier, False, hidden=(20,)).compiled_ == "nothing: compile=False"
    monkeypatch.setattr("restrain.models.training._LONG", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said in `compiled_`, as nobody asked for a compiler
        long = rs.Classifier(hidden=(20,), batch_size=32, epochs=3).fit(X, Y)
    assert "no compiler here" in long.compiled_
    for bad in ("always", 2, None):
        with pytest.raises(PlanError, match='compile= is True, False or "auto"'):
            rs.Classifier(compile=bad).fit(X, Y)


# Checkpoints


class StopError(Exception):
    pass


def rate(stop):
    def learning_rate(epoch):
        if epoch == stop:
            raise StopError
        return 0.01 / (1 + epoch)

    return learning_rate


ALL = {
    "hidden": (20, "batchnorm"),
    "epochs": 7,
    "input_noise": 0.1,
    "hidden_dropout": 0.2,
    "hidden_l1": 1e-4,
    "weight_l2": 1e-4,
    "weight_l1": {"strength": 1e-4, "how": "proximal", "every": 3},
}


def test_a_training_that_was_stopped_goes_on_as_it_was_decided(recorded, monkeypatch, tmp_path):
    path = tmp_path / "state"
    whole = fitted(rs.Classifier, True, **{**ALL, "learning_rate": rate(-1)})
    for stop in (2, 5):
        with pytest.raises(StopError):
            fitted(rs.Classifier, True, **{**ALL, "learning_rate": rate(stop), "checkpoint": path})
    with pytest.raises(PlanError, match=r"of a training with compile=True, which rounds otherwise: write that, or"):
        fitted(rs.Classifier, False, **{**ALL, "learning_rate": rate(-1), "checkpoint": path})
    monkeypatch.setattr(torch._inductor, "compile", None)  # there is a compiler now; it isn't asked
    resumed = fitted(rs.Classifier, "auto", **{**ALL, "learning_rate": rate(-1), "checkpoint": path})
    assert_same(resumed, whole, rtol=0)
    assert "nothing: it was so before" in resumed.compiled_


# Random numbers (the draws themselves: test_models_drawing.py)


@pytest.mark.parametrize(
    "noise",
    [
        {"input_noise": 2.0},
        {"hidden_dropout": 0.5},
        {"input_noise": rs.UniformNoise(0.5), "hidden_noise": 0.3},
        {"hidden_dropout": rs.GaussianDropout(0.3), "input_dropout": 0.3},
    ],
    ids=str,
)
def test_noise_is_of_the_same_distribution(recorded, noise):
    """Of a network that doesn't move: the mean loss under noise, over 60 epochs of three full batches."""
    given = {"layers": [64, (20, "tanh"), 10], "learning_rate": 0.0, "algo": "sgd", "epochs": 60, "batch_size": 50}
    one, other = (fitted(rs.Classifier, compiled, **given, **noise) for compiled in (True, False))
    losses, its = (np.array([row["data_loss"] for row in model.history_]) for model in (one, other))
    error = (losses.var() / 60 + its.var() / 60) ** 0.5
    assert abs(losses.mean() - its.mean()) < 4 * error
    assert 0.5 < losses.std() / its.std() < 2
    assert len(set(losses)) == 60
    quiet = fitted(rs.Classifier, False, **{**given, "epochs": 1})
    assert abs(quiet.history_[0]["data_loss"] - losses.mean()) > 4 * error  # it is there


def test_torchs_generator_stays_and_the_seed_says_everything(recorded):
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        found.append(fitted(rs.Classifier, True, hidden=(20,), input_noise=0.1, hidden_dropout=0.3))
        assert torch.equal(before, torch.get_rng_state())
    assert_same(*found, rtol=0)
    other = fitted(rs.Classifier, True, hidden=(20,), input_noise=0.1, random_state=1)
    assert not torch.equal(other.module_.out.weight, found[0].module_.out.weight)


# Compiled for good


def compiled_equals(given, data=(X, Y), kind=rs.Classifier, rtol=1e-9):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestrainWarning)
        settings = {"batch_size": 32, "epochs": 3, "random_state": 0, "compile": True}
        one = kind(**{**settings, **given}).train(data)
    assert one.compiled_ in ("the whole update", "all but the optimizer's step")
    assert_same(one, fitted(kind, False, data, **{"learning_rate": None, **given}), rtol)


@pytest.mark.slow
def test_compiled(tmp_path):
    compiled_equals({"hidden": (20,), "weight_l1": 1e-3, "hidden_l1": 1e-3})


SMALL = {"learning_rate": 0.01, "hidden": (20,)}


@pytest.mark.slow
@pytest.mark.parametrize("rules", [rules for rules in RULES if rules != "contractive"])
def test_every_rule_compiled(rules):
    compiled_equals({"hidden": (20, 10), **RULES[rules]})


@pytest.mark.slow
def test_what_the_compiler_fails_of_is_said():
    """torch 2.13's compiler ends with a KeyError on the second derivatives of two layers; a later one may not."""
    given = {"hidden": (20, 10), **RULES["contractive"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*but compiled is nothing: InductorError", category=RestrainWarning)
        one = fitted(rs.Classifier, True, **given)
    assert_same(one, fitted(rs.Classifier, False, **given))
    assert one.compiled_ == "the whole update" or "The update's operations run one by one" in one.compiled_


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["sgd", "nag", "adamw", "rmsprop"])
def test_optimizers_compiled(algo):
    compiled_equals({**SMALL, "algo": algo})


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_compiled(name):
    kind, given, data = MODELS[name]
    settings = {"weight_l2": 1e-3, **given}
    if "batch_size" not in given:
        compiled_equals(settings, data, kind)


@pytest.mark.slow
def test_large_products_are_onednns_in_float32():
    x = np.random.default_rng(0).random((320, 256)).astype("f4")
    given = {"layers": [256, (128, "tanh"), 256], "hidden_l1": 1e-4, "learning_rate": 1e-3}
    graphs, improve = [], program.improve

    def looked(graph):
        improve(graph)
        graphs.append(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "improve", looked)
        compiled_equals(given, x, rs.Autoencoder, rtol=2e-4)
    products = [node for node in graphs[0].graph.nodes if "restrain.product" in str(node.target)]
    assert len(products) == (5 if program._product() is not None else 0)


@pytest.mark.slow
def test_compiled_noise_is_that_of_the_recorded_operations(monkeypatch):
    given = {"hidden": (21,), "input_noise": 0.3, "hidden_dropout": 0.4}
    one = fitted(rs.Classifier, True, **given)
    assert one.compiled_ == "the whole update"
    monkeypatch.setattr(torch._inductor, "compile", broken)
    assert_same(one, fitted(rs.Classifier, True, **given), rtol=1e-5)  # logarithm and cosine of float32


@pytest.mark.slow
def test_a_compiled_training_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "state"
    whole = fitted(rs.Classifier, True, **{**ALL, "learning_rate": rate(-1)})
    with pytest.raises(StopError):
        fitted(rs.Classifier, True, **{**ALL, "learning_rate": rate(3), "checkpoint": path})
    resumed = fitted(rs.Classifier, "auto", **{**ALL, "learning_rate": rate(-1), "checkpoint": path})
    assert_same(resumed, whole, rtol=0)
    assert resumed.compiled_ == "all but the optimizer's step"
