"""The training of the models: batches, optimizers, early stopping, history, weights, seeds, sequences."""

import copy
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import restrain as rs
from restrain.errors import PlanError, TrainingError
from restrain.models import optimizers
from restrain.models.data import Samples, batches, split

DIGITS = load_digits()
X, Y = (DIGITS.data / 16).astype("f4")[:400], DIGITS.target[:400]
TRAIN, VALID = (X[:300], Y[:300]), (X[300:], Y[300:])


def weights(model):
    return {name: p.detach().clone() for name, p in model.module_.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# What is random


RULES = {"input_noise": 0.1, "hidden_dropout": 0.2, "weight_l1": {"strength": 1e-4, "how": "proximal"}}


def test_the_seed_says_everything_and_torchs_generator_stays():
    models = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        models.append(rs.Classifier(hidden=(20,), epochs=3, random_state=5, **RULES).fit(*TRAIN))
        assert torch.equal(before, torch.get_rng_state())
    assert same(weights(models[0]), weights(models[1]))
    other = rs.Classifier(hidden=(20,), epochs=3, random_state=6, **RULES).fit(*TRAIN)
    assert not same(weights(models[0]), weights(other))
    torch.manual_seed(1)
    free = [rs.Classifier(hidden=(20,), epochs=1).fit(*TRAIN) for _ in range(2)]
    assert not same(weights(free[0]), weights(free[1]))  # a seed from the generator, which moves on


def test_between_epochs_the_generator_is_the_users():
    model = rs.Classifier(hidden=(20,), epochs=3, random_state=5, **RULES)
    torch.manual_seed(3)
    expected = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(3)
    assert [torch.rand(1).item() for _ in model.itertrain(TRAIN)] == expected


@pytest.mark.parametrize("algo", ["adam", "sgd"])
def test_two_trainings_are_one_that_is_as_long(algo):
    model = rs.Classifier(hidden=(20,), random_state=5, algo=algo, **RULES)
    once = weights(model.fit(*TRAIN, epochs=4))
    twice = weights(model.fit(*TRAIN, epochs=2).train(TRAIN, epochs=2))
    assert same(once, twice)
    assert [row["epoch"] for row in model.history_] == [1, 2, 3, 4]
    assert model.n_iter_ == 4


def test_partial_fit_goes_on_for_an_epoch():
    model = rs.Classifier(hidden=(20,), random_state=5, **RULES)
    once = weights(model.set_params(normalize=False).fit(*TRAIN, epochs=3))
    model = rs.Classifier(hidden=(20,), random_state=5, **RULES)
    for _ in range(3):
        model.partial_fit(*TRAIN, classes=range(10))
    assert same(once, weights(model))


# Optimizers


@pytest.mark.parametrize("algo", sorted(set(optimizers.NAMES) - {"lbfgs"}))
def test_every_optimizer_by_its_name(algo):
    model = rs.Classifier(hidden=(20,), random_state=0, algo=algo, weight_l1=1e-4)
    model.fit(*TRAIN, epochs=5)
    assert model.history_[-1]["loss"] < model.history_[0]["loss"]


def test_lbfgs_takes_whole_batches():
    model = rs.Regressor(hidden=(), algo="lbfgs", batch_size=300, weight_l2=0.1, normalize=False, random_state=0)
    x, y = X[:300].astype("f8"), Y[:300].astype("f8")
    model.fit(x, y, epochs=20)
    bias = np.c_[x, np.ones(300)]
    ridge = np.linalg.solve(bias.T @ bias / 300 + 0.1 * np.diag([*[1.0] * 64, 0]), bias.T @ y / 300)
    np.testing.assert_allclose(model.module_.out.weight.detach()[0], ridge[:-1], atol=1e-5)


def test_settings_of_optimizers():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    made = optimizers.make("nag", parameters, learning_rate=0.1, momentum=0.8)
    assert (made.defaults["nesterov"], made.defaults["momentum"], made.defaults["lr"]) == (True, 0.8, 0.1)
    assert type(optimizers.make("RMSprop", parameters)) is torch.optim.RMSprop
    assert optimizers.make(torch.optim.AdamW, parameters, learning_rate=0.5).defaults["lr"] == 0.5
    for bad, message in (
        ({"algo": "adamm"}, r"got 'adamm' \(near it: adam, "),
        ({"algo": "Muon"}, r"algo='Muon' moves matrices only, and networks have biases; there are: .*adam.*nag"),
        ({"algo": torch.optim.SparseAdam}, "takes sparse gradients only"),
        ({"algo": lambda params, lr=1: torch.optim.SGD(params, lr=-1.0)}, "can't be made of the parameters"),
        ({"algo": 3}, "a name such as 'adam'"),
        ({"algo": "adam", "momentum": 0.9}, r"has no momentum=; these have: .*sgd"),
        ({"algo": "sgd", "momentum": 1.0}, "from 0 to below 1"),
        ({"algo": "sgd", "learning_rate": -1.0}, "zero or more"),
        ({"algo": "sgd", "learning_rate": "fast"}, "finite number"),
    ):
        with pytest.raises(PlanError, match=message):
            optimizers.make(bad.pop("algo"), parameters, **bad)


def steps_of(optimizer, step, w, count=3):
    """The weights after some steps, and how often hooks were called."""
    seen = []
    optimizer.register_step_pre_hook(lambda *given: seen.append("before"))
    optimizer.register_step_post_hook(lambda *given: seen.append("after"))
    for number in range(count):
        w.grad = torch.linspace(-1, 1, 6).double().view(2, 3) + number
        step()
    return w.detach(), seen


@pytest.mark.parametrize("name", [name for name in optimizers.NAMES if name not in ("lbfgs", "sparseadam")])
def test_an_optimizer_without_torchs_compiler_makes_the_same_steps(name):
    kind = optimizers._CLASSES["sgd" if name == "nag" else name]
    start = torch.linspace(-2, 3, 6).double().view(2, 3)
    one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    light = optimizers.make(name, [one], learning_rate=0.1)
    plain = kind([other], **{"lr": 0.1, **({"nesterov": True, "momentum": 0.9} if name == "nag" else {})})
    assert type(light) is kind
    found, seen = steps_of(light, optimizers.method(light, "step"), one)
    expected, _ = steps_of(plain, plain.step, other)
    assert torch.equal(found, expected)
    assert not torch.equal(found, start)
    assert seen == ["before", "after"] * 3
    assert light.state_dict()["state"].keys() == optimizers.method(light, "state_dict")()["state"].keys()
    optimizers.method(light, "zero_grad")()
    assert one.grad is None


@pytest.mark.parametrize("name", optimizers._FUSED)
def test_fused_optimizers_make_the_same_steps_and_take_any_state(name):
    start = torch.linspace(-2, 3, 6).double().view(2, 3)
    one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    fused, plain = (
        optimizers.make(name, [p], learning_rate=0.1, fused=fused) for p, fused in ((one, True), (other, False))
    )
    assert fused.param_groups[0]["fused"]
    for _ in range(2):
        found, expected = (steps_of(made, made.step, p)[0] for made, p in ((fused, one), (plain, other)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        state = copy.deepcopy(plain.state_dict())
        optimizers.load(fused, state)
        assert fused.param_groups[0]["fused"]
        assert not state["param_groups"][0].get("fused")


def test_a_schedule_of_learning_rates():
    seen = []

    def rate(epoch):
        seen.append(epoch)
        return 0.1 if epoch < 2 else 0.0

    model = rs.Classifier(hidden=(), algo="sgd", learning_rate=rate, random_state=0)
    states = [weights(model) for _ in model.itertrain(TRAIN, epochs=4)]
    assert seen[-4:] == [0, 1, 2, 3]
    assert not same(states[0], states[1])
    assert same(states[1], states[3])


def test_long_gradients_are_cut():
    model = rs.Regressor(hidden=(), algo="sgd", learning_rate=1.0, batch_size=300, random_state=0)
    model.fit(X[:300], 1000.0 * Y[:300], epochs=1, learning_rate=0.0)
    before = weights(model)
    model.train((X[:300], 1000.0 * Y[:300]), epochs=1, max_gradient_norm=0.5)
    moved = sum((p - before[name]).square().sum() for name, p in weights(model).items()) ** 0.5
    assert moved.item() == pytest.approx(0.5, rel=1e-3)


def test_a_loss_that_leaves_the_numbers_is_an_error():
    with pytest.raises(TrainingError, match="a smaller learning_rate="):
        rs.Regressor(hidden=(50,), algo="sgd", learning_rate=1e6, epochs=50).fit(X, Y)


# Validation


def test_early_stopping_puts_the_best_weights_back():
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 10, 60)
    model = rs.Classifier([64, 200, 10], learning_rate=0.01, patience=4, epochs=200, random_state=0)
    model.fit(X[:60], noisy, valid=VALID)
    losses = [row["valid_data_loss"] for row in model.history_]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 4 < 200
    p = model.predict_proba(VALID[0])[np.arange(100), VALID[1]]
    assert -np.log(p).mean() == pytest.approx(losses[best], rel=1e-4)


def test_validation_is_without_noise_and_has_every_rule_apart():
    rules = {"hidden_l1": 0.1, "weight_l2": 1e-3, "contractive": 1e-3, "input_noise": 3.0, "hidden_dropout": 0.9}
    model = rs.Classifier([64, (20, "tanh"), 10], random_state=0, **rules)
    (_, valid), *_ = list(model.itertrain(TRAIN, VALID, epochs=1))
    p = model.predict_proba(VALID[0])[np.arange(100), VALID[1]]
    h, w = model.activations(VALID[0])["hid1"], weights(model)
    assert valid["data_loss"] == pytest.approx(-np.log(p).mean(), rel=1e-4)
    assert valid["acc"] == pytest.approx(model.score(*VALID))
    assert valid["hidden_l1"] == pytest.approx(0.1 * np.abs(h).sum(1).mean(), rel=1e-4)
    squares = sum((w[f"{layer}.weight"] ** 2).sum().item() for layer in ("hid1", "out"))
    assert valid["weight_l2"] == pytest.approx(1e-3 * squares, rel=1e-4)
    lengths = (w["hid1.weight"] ** 2).sum(1).numpy()
    assert valid["contractive"] == pytest.approx(1e-3 * ((1 - h**2) ** 2 @ lengths).mean(), rel=1e-4)
    assert valid["loss"] == pytest.approx(sum(valid[k] for k in ("data_loss", "hidden_l1", "weight_l2", "contractive")))
    assert {f"valid_{key}" for key in valid} < set(model.history_[0])


def test_validation_now_and_then():
    model = rs.Classifier(hidden=(5,), epochs=7, validate_every=3)
    pairs = list(model.itertrain(TRAIN, 0.2))
    assert [row["epoch"] for row in model.history_ if "valid_loss" in row] == [1, 3, 6, 7]
    assert pairs[3][1] == pairs[2][1] != pairs[5][1]  # the last one that there was
    assert all(valid == {} for _, valid in rs.Classifier(hidden=(5,), epochs=2).itertrain(TRAIN))


def test_small_improvements_do_not_count():
    model = rs.Regressor(hidden=(), algo="sgd", learning_rate=1e-4, epochs=50, patience=3, min_improvement=0.5)
    model.fit(X, Y.astype("f8"), valid=0.25)
    assert len(model.history_) == 4


def test_a_part_held_back():
    samples = Samples(X, Y)
    train, valid = split(samples, 0.25, seed=1)
    assert (len(train), len(valid)) == (300, 100)
    assert sorted([*train.rows, *valid.rows]) == list(range(400))
    for bad, message in ((1.5, "between 0 and 1"), (0.0001, "leaves none")):
        with pytest.raises(PlanError, match=message):
            rs.Classifier(valid=bad).fit(X, Y)
    with pytest.raises(PlanError, match="patience= needs validation data"):
        rs.Classifier(epochs=5, patience=3).fit(X, Y)


# Data


def test_batches():
    assert [len(rows) for rows in batches(10, 4)] == [4, 4, 2]
    assert [len(rows) for rows in batches(9, 4)] == [4, 4, 1]
    assert [len(rows) for rows in batches(9, 4, pairs=True)] == [4, 5]
    assert [len(rows) for rows in batches(1, 4, pairs=True)] == [1]
    assert list(batches(0, 4)) == []
    rs.Classifier([64, 20, "batchnorm", 10], batch_size=64, epochs=1).fit(X[:65], Y[:65])


def test_memory_mapped_data_are_never_copied_whole(tmp_path):
    rows, features = 40_000, 256
    data = np.memmap(tmp_path / "x", dtype="f8", mode="w+", shape=(rows, features))
    data[:] = np.arange(features) + np.random.default_rng(0).standard_normal((rows, 1))
    data.flush()
    labels = np.arange(rows) % 3
    mapped = np.memmap(tmp_path / "x", dtype="f8", mode="r", shape=(rows, features))
    model = rs.Classifier([256, 8, 3], batch_size=500, epochs=1, normalize=True, weight_l2=1e-4, valid=0.1)
    tracemalloc.start()
    model.fit(mapped, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.nbytes / 5
    assert not isinstance(model.input_scale_, type(None))


def test_weights_of_samples_count_as_repetitions():
    times = np.random.default_rng(0).integers(0, 4, 100)
    given = {"hidden": (10,), "batch_size": 300, "epochs": 20, "random_state": 0}
    x = X[:100].astype("f8")
    one = rs.Classifier(**given).fit(x, Y[:100], sample_weight=times)
    other = rs.Classifier(**given).fit(x.repeat(times, 0), Y[:100].repeat(times))
    np.testing.assert_allclose(one.predict_proba(x), other.predict_proba(x), rtol=1e-6)
    third = rs.Classifier(normalize=True, **given).train((x, Y[:100], 5.0 * times))  # their scale doesn't matter
    np.testing.assert_allclose(one.predict_proba(x), third.predict_proba(x), rtol=1e-6)
    with pytest.raises(ValueError, match="egative"):
        rs.Classifier().fit(x, Y[:100], sample_weight=-np.ones(100))
    with pytest.raises(ValueError, match="at least one non-zero"):
        rs.Classifier().fit(x, Y[:100], sample_weight=np.zeros(100))
    assert len(rs.Autoencoder(hidden=(5,), epochs=1).fit(x, sample_weight=times).predict(x)) == 100


def test_standardised_inside_and_undone_outside():
    x, y = X[:, :9].astype("f8") * 1000 + 500, 1e6 * X[:, 9].astype("f8") - 3e7
    x[:, 0] = 7.0  # without variance
    model = rs.Regressor(hidden=(20,), normalize=True, epochs=60, learning_rate=0.01, valid=0.2, random_state=0)
    model.fit(x, y)
    assert model.score(x, y) > 0.5
    train, _ = split(Samples(x, y), 0.2, model.seed_)
    np.testing.assert_allclose(model.input_scale_.mean, x[train.rows].mean(0))
    np.testing.assert_allclose(model.target_scale_.deviation, [y[train.rows].std()])
    assert 0 < model.history_[-1]["data_loss"] < 2  # on the standardised scale
    auto = rs.Autoencoder(hidden=(9,), activation="linear", normalize=True, epochs=200, learning_rate=0.01).fit(x)
    assert auto.score(x) > 0.9
    np.testing.assert_allclose(auto.decode(auto.encode(x)), auto.predict(x))
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.where(x > 1000, np.nan, x), y)


def test_the_type_of_numbers_follows_the_data():
    for dtype, kind in (("f4", torch.float32), ("f8", torch.float64), ("i8", torch.float32), ("f2", torch.float32)):
        model = rs.Classifier(hidden=(3,), epochs=1).fit((X * 16).astype(dtype), Y)
        assert model.module_.out.weight.dtype == kind
        assert model.predict_proba(X).dtype == str(kind)[6:]
    assert rs.Classifier(hidden=(3,), epochs=1, precision="64").fit(X, Y).predict_proba(X).dtype == "float64"


def test_integer_labels_are_class_indices_where_layers_are_given():
    model = rs.Classifier([64, 12], epochs=1).train(TRAIN)
    assert list(model.classes_) == list(range(12))
    assert rs.Classifier(hidden=(), epochs=1).fit(X, Y * 2 + 1).classes_.tolist() == list(range(1, 20, 2))
    words = np.array(["no", "yes"])[Y % 2]
    model = rs.Classifier([64, 2], epochs=3).train((X, words))
    assert set(model.predict(X)) <= {"no", "yes"}
    with pytest.raises(PlanError, match=r"the labels \['maybe'\], which are not among"):
        model.train((X, np.full(400, "maybe")))
    for layers, message in (
        ([64, 5], "class indices from 0 to 4; got 0 to 9"),
        ([60, 10], "'in' has the size 60, the data have 64 features"),
    ):
        with pytest.raises(PlanError, match=message):
            rs.Classifier(layers).train(TRAIN)


def test_sequences():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 6, 3))
    total = x.sum((1, 2))
    given = {"epochs": 60, "learning_rate": 0.01, "random_state": 0, "recurrent_state": 1e-4, "recurrent_norm": 1e-4}
    model = rs.Regressor([3, (16, "gru"), 1], **given).fit(x, total)
    assert model.score(x, total) > 0.9
    assert [layer["name"] for layer in model.layers_] == ["in", "hid1", "last", "out"]
    steps = x.sum(2).cumsum(1)
    model = rs.Regressor(hidden=((16, "lstm"),), **given).fit(x, steps)
    assert model.predict(x).shape == (200, 6)
    assert ((model.predict(x) - steps) ** 2).mean() < 0.3 * steps.var()
    classifier = rs.Classifier([3, (16, "rnn"), 2], **given)
    assert classifier.fit(x, (total > 0).astype(int)).score(x, (total > 0).astype(int)) > 0.9
    assert classifier.fit(x, (steps > 0).astype(int)).predict(x).shape == (200, 6)
    assert classifier.history_[-1]["acc"] > 0.8
    coder = rs.Autoencoder([3, (8, "rnn"), 3], epochs=2, hidden_l1=1e-3).fit(x)
    assert coder.predict(x).shape == (200, 6, 3)
    for bad, message in ((x[:, 0], r"take X of shape \(batch, time, features\)"), (x[:, :, :2], "has 2 features")):
        with pytest.raises(PlanError, match=message):
            coder.predict(bad)
    with pytest.raises(PlanError, match="without recurrent layers"):
        rs.Regressor(hidden=(5,)).fit(x, total)


# Being watched


def test_the_bar_is_quiet_unless_asked_for(capsys):
    rs.Classifier(hidden=(3,), epochs=2).fit(*TRAIN)
    assert capsys.readouterr() == ("", "")
    rs.Classifier(hidden=(3,), epochs=2, progress=True).fit(*TRAIN)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(("kernel", "shown"), [(object(), True), (None, False)])
def test_the_bar_is_shown_in_a_notebook(kernel, shown, monkeypatch, capsys):
    """In IPython without a kernel stderr decides, which is no terminal here."""
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    rs.Classifier(hidden=(3,), epochs=2).fit(*TRAIN)
    assert ("2/2" in capsys.readouterr().err) is shown


def test_stopping_in_the_middle_leaves_nothing_behind():
    model = rs.Classifier(hidden=(3,), epochs=9, hidden_noise=5.0, max_norm=0.1)
    for epoch, _ in enumerate(model.itertrain(TRAIN)):
        if epoch == 1:
            break
    assert model.n_iter_ == 2 == len(model.history_)
    assert not model.module_.hid1._forward_hooks
    assert not model.module_.training
    with pytest.raises(PlanError, match=r"data are \(X, y\)"):
        model.train(X)
    with pytest.raises(PlanError, match="no layer is called 'hid7'; there are: hid1, out"):
        model.encode(X, "hid7")
