"""Every row of theanets' features: it works here, or is refused with the reason and the words to write instead."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import restrain as rs
from restrain.errors import FileError, PlanError, RestrainError
from restrain.models.layers import Network
from restrain.models.specs import resolve

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
LABELS = (X[:, 0] + X[:, 1] > 0).astype(int)
NUMBERS = X @ [1.0, -1.0, 0.5, 0.0]
STEPS = RNG.normal(size=(20, 6, 3))
IMAGES = RNG.normal(size=(20, 8, 6, 2))
QUICK = {"epochs": 2, "random_state": 0, "progress": False}


def built(*specs):
    torch.manual_seed(0)
    return Network(resolve(list(specs))).double().eval()


def draw(*shape):
    return torch.as_tensor(np.random.default_rng(1).normal(size=shape))


def same(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected.detach()), rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- activations, against NumPy


def scaled(x, of):
    return x / (of.std(-1, keepdims=True) + 1e-8)


def centred(x):
    return x - x.mean(-1, keepdims=True)


ACTIVATIONS = {
    "rect:max": lambda x: np.maximum(x, 0),
    "rect:min": lambda x: np.minimum(x, 1),
    "rect:minmax": lambda x: np.clip(x, 0, 1),
    "norm:mean": centred,
    "norm:max": lambda x: x / (np.abs(x).max(-1, keepdims=True) + 1e-8),
    "norm:std": lambda x: scaled(x, x),
    "norm:z": lambda x: scaled(centred(x), x),
    "relu+norm:z": lambda x: scaled(centred(np.maximum(x, 0)), np.maximum(x, 0)),
    "norm:mean+relu+tanh": lambda x: np.tanh(np.maximum(centred(x), 0)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    model, x = built(4, (7, name), 2), draw(5, 4)
    w, b = model.hid1.weight.detach().numpy(), model.hid1.bias.detach().numpy()
    same(model.outputs_by_layer(x)["hid1"], torch.as_tensor(ACTIVATIONS[name](x.numpy() @ w.T + b)))


def test_learned_activations():
    x, model = draw(5, 4), built(4, (7, "prelu"), (6, "lgrelu"), (5, "relu+maxout:3"), 2)
    seen = model.outputs_by_layer(x)
    h = F.linear(x, model.hid1.weight, model.hid1.bias)
    same(seen["hid1"], F.prelu(h, model.hid1.learned[0].slope))
    lines = model.hid2.learned[0]
    with torch.no_grad():
        lines.gain.copy_(draw(6)), lines.slope.copy_(draw(6))
    h = F.linear(seen["hid1"], model.hid2.weight, model.hid2.bias)
    same(model.hid2(seen["hid1"]), torch.where(h > 0, lines.gain * h, lines.slope * h))
    lines, z = model.hid3.learned[0], seen["hid2"]
    h = F.linear(z, model.hid3.weight, model.hid3.bias).relu()
    slopes, offsets = lines.slopes.detach().numpy().reshape(3, 5), lines.offsets.detach().numpy().reshape(3, 5)
    expected = np.max([m * h.detach().numpy() + b for m, b in zip(slopes, offsets, strict=True)], 0)
    same(model.hid3(z), torch.as_tensor(expected))
    names = {name for name, _ in model.named_parameters()}
    assert {"hid1.learned.0.slope", "hid2.learned.0.gain", "hid3.learned.0.slopes"} <= names
    net = rs.Regressor(hidden=((6, "prelu"), (4, "relu+maxout:2")), weight_l1=1e-3, **QUICK).fit(X, NUMBERS)
    assert not torch.equal(net.find("hid1", "learned.0.slope"), torch.full((6,), 0.25, dtype=torch.float64))
    with net.attached() as reg:  # slopes are no weights
        assert set(reg.rules[0].names) == {"hid1.weight", "hid2.weight", "out.weight"}


def test_constant_rows_of_norms_have_finite_gradients():
    model, x = built(4, (7, "relu+norm:z"), 2), torch.zeros(3, 4, dtype=torch.float64)
    with torch.no_grad():
        model.hid1.bias.fill_(-1)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------- layers, against torch's


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
def test_conv1(padding):
    model, x = built((6, 3), {"form": "conv1", "size": 5, "kernel_size": 3, "padding": padding}, 2), draw(4, 6, 3)
    conv = model.hid1
    h = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=0 if padding == "valid" else padding)
    same(model.outputs_by_layer(x)["hid1"], h.relu().transpose(1, 2))
    free = built(3, {"form": "conv1", "size": 5, "kernel_size": 3, "padding": padding}, 2)  # of any number of steps
    assert free(draw(4, 9, 3)).shape == (4, h.shape[2] + 3, 2)


@pytest.mark.parametrize("given", [{}, {"stride": 2}, {"padding": (1, 0)}, {"padding": "same"}])
def test_conv2_pool2_flatten(given):
    kernel = (3, 3) if "same" in given.values() else (3, 2)
    model = built((8, 6, 2), {"form": "conv2", "size": 5, "kernel_size": kernel, **given}, "pool2", "flatten", 3)
    conv, x = model.hid1, draw(4, 8, 6, 2)
    h = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, **given).relu()
    seen = model.outputs_by_layer(x)
    same(seen["hid1"], h.permute(0, 2, 3, 1))
    h = F.max_pool2d(h, 2).permute(0, 2, 3, 1)
    same(seen["pool1"], h)
    same(seen["flat1"], h.reshape(4, -1))
    same(model(x), F.linear(h.reshape(4, -1), model.out.weight, model.out.bias))
    same(model(x.reshape(4, -1)), model(x))  # images as rows


def test_pool1_and_reshape():
    x = draw(4, 6, 3)
    model = built((6, 3), {"form": "pool1", "kernel_size": 3, "stride": 2}, {"form": "reshape", "shape": (3, 2)}, 1)
    h = F.max_pool1d(x.transpose(1, 2), 3, 2).transpose(1, 2)
    same(model.outputs_by_layer(x)["reshape1"], h.reshape(4, 3, 2))


@pytest.mark.parametrize("worker", ["rnn", "lstm", "gru"])
def test_bidirectional(worker):
    model, x = built(3, {"form": "bidirectional", "size": 8, "worker": worker}, 2), draw(4, 6, 3)
    theirs = getattr(nn, worker.upper())(3, 4, batch_first=True, bidirectional=True).double()
    theirs.load_state_dict(model.hid1.state_dict())
    same(model.hid1(x), theirs(x)[0])
    with torch.no_grad():  # unlike theanets', the backward half is in the order of the steps
        pulse = x.clone()
        pulse[:, -1] += 1
        moved = (model.hid1(pulse) - model.hid1(x)).abs().sum((0, 2))
        forward, backward = (model.hid1(pulse) - model.hid1(x)).abs().sum(0).split(4, -1)
    assert (moved > 0).all()
    assert not forward[:-1].any()
    assert (backward.sum(-1) > 0).all()


def test_a_layer_that_reads_backward_and_the_last_step_that_is_read():
    model, x = built(3, {"form": "gru", "size": 4, "direction": "backward"}, 2), draw(4, 6, 3)
    theirs = nn.GRU(3, 4, batch_first=True).double()
    theirs.load_state_dict(model.hid1.state_dict())
    same(model.hid1(x), theirs(x.flip(1))[0].flip(1))
    for layer, expected in (
        ({"form": "gru", "size": 4, "direction": "backward"}, lambda h: h[:, 0]),
        ({"form": "bidirectional", "size": 4}, lambda h: torch.cat([h[:, -1, :2], h[:, 0, 2:]], -1)),
        ((4, "gru"), lambda h: h[:, -1]),
    ):
        net = rs.Classifier(hidden=[layer], normalize=False, **QUICK).fit(STEPS, LABELS[:20])
        seen = net.module_.outputs_by_layer(torch.as_tensor(STEPS))
        same(seen["last"], expected(seen["hid1"]))


def test_product_concatenate_and_sums_of_several_inputs():
    model = built(
        4,
        {"size": 3, "name": "a"},
        {"size": 3, "name": "b", "inputs": "in", "activation": "tanh"},
        {"form": "product", "inputs": ("a", "b"), "name": "ab"},
        {"form": "concatenate", "inputs": ("a", "in"), "name": "ain"},
        {"size": 2, "inputs": ("ab", "ain", "b")},
    )
    x = draw(5, 4)
    seen, w = model.outputs_by_layer(x), model.out.weight
    a, b = F.linear(x, model.a.weight, model.a.bias).relu(), F.linear(x, model.b.weight, model.b.bias).tanh()
    same(seen["ab"], a * b)
    same(seen["ain"], torch.cat([a, x], 1))
    same(model(x), (a * b) @ w[:, :3].T + torch.cat([a, x], 1) @ w[:, 3:10].T + b @ w[:, 10:].T + model.out.bias)


def test_several_inputs_as_a_graph():
    layers = [
        {"size": 3, "name": "near"},
        {"size": 1, "name": "far", "form": "input"},
        {"size": 5, "name": "hid", "inputs": ("near", "far")},
        {"size": 1, "inputs": ("hid", "far")},
    ]
    net = rs.Regressor(layers, normalize=False, **QUICK).fit(X, NUMBERS)
    x = torch.as_tensor(X)
    h = F.linear(x, net.find("hid"), net.find("hid", "bias")).relu()
    expected = F.linear(torch.cat([h, x[:, 3:]], 1), net.find("out"), net.find("out", "bias"))
    np.testing.assert_allclose(net.predict(X), expected.detach()[:, 0], rtol=1e-9)
    np.testing.assert_array_equal(net.predict({"near": X[:, :3], "far": X[:, 3:]}), net.predict(X))
    assert set(net.activations(X)) == {"hid", "out"}
    with pytest.raises(PlanError, match="also reads 'far', which 'hid' doesn't say"):
        net.decode(net.encode(X, "hid"), "hid")
    with pytest.raises(PlanError, match="dict of 'near', 'far'"):
        net.predict({"near": X})


class Residual(nn.Module):
    """A user's own layer."""

    def __init__(self, size):
        super().__init__()
        self.inner, self.drop = nn.Linear(size, size), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.inner(x).tanh())


def test_a_users_own_module_as_a_layer():
    module = Residual(4)
    before = module.inner.weight.detach().clone()
    net = rs.Regressor([4, module, 8, 1], weight_l2=1e-3, normalize=False, **QUICK).fit(X, NUMBERS)
    assert torch.equal(module.inner.weight, before)
    assert not torch.equal(net.find("hid1", "inner.weight").float(), before)
    assert [layer["size"] for layer in net.layers_] == [4, 4, 8, 1]
    x = torch.as_tensor(X)
    h = x + F.linear(x, net.find("hid1", "inner.weight"), net.find("hid1", "inner.bias")).tanh()
    h = F.linear(h, net.find("hid2"), net.find("hid2", "bias")).relu()
    expected = F.linear(h, net.find("out"), net.find("out", "bias"))[:, 0].detach()
    np.testing.assert_allclose(net.predict(X), expected, rtol=1e-9)
    with net.attached() as reg:
        assert "hid1.inner.weight" in reg.rules[0].names
    again = rs.Regressor([4, module, 8, 1], weight_l2=1e-3, normalize=False, **QUICK).fit(X, NUMBERS)
    np.testing.assert_array_equal(again.predict(X), net.predict(X))  # fit begins with the module as it was given


def test_modules_that_give_states_too_read_sequences():
    net = rs.Classifier(hidden=[nn.LSTM(3, 5, batch_first=True)], normalize=False, **QUICK).fit(STEPS, LABELS[:20])
    h = net.module_.hid1(torch.as_tensor(STEPS))[0][:, -1]
    expected = F.linear(h, net.find("out"), net.find("out", "bias"))
    np.testing.assert_allclose(net.predict_logit(STEPS), expected.detach(), rtol=1e-9)


@pytest.mark.parametrize("form", ["rrnn", "mrnn", "clockwork", "mut1", "scrn", "bcrnn"])
def test_exotic_cells_are_left_to_modules_of_ones_own(form):
    for spec in ((5, form), {"size": 5, "form": form}, {"size": 6, "form": "bidirectional", "worker": form}):
        with pytest.raises(PlanError, match=r"isn't built in: use your own nn\.Module as a layer"):
            resolve([3, spec, 2])


# ---------------------------------------------------------------- images and sequences to estimators


def test_images():
    layers = [{"form": "conv2", "size": 4, "kernel_size": 3}, "pool2", "flatten", 8]
    clf = rs.Classifier(hidden=layers, weight_l2=1e-3, **QUICK).fit(IMAGES, LABELS[:20])
    assert clf.n_features_in_ == 96
    assert clf.layers_[0]["shape"] == [8, 6, 2]
    np.testing.assert_array_equal(clf.predict_proba(IMAGES), clf.predict_proba(IMAGES.reshape(20, -1)))
    stated = rs.Classifier([(8, 6, 2), *layers, 2], weight_l2=1e-3, **QUICK).fit(IMAGES.reshape(20, -1), LABELS[:20])
    np.testing.assert_array_equal(stated.predict_proba(IMAGES), clf.predict_proba(IMAGES))
    per_channel = IMAGES.reshape(-1, 2)
    np.testing.assert_allclose(clf.input_scale_.mean.reshape(8, 6, 2)[3, 4], per_channel.mean(0), rtol=1e-9)
    np.testing.assert_allclose(clf.input_scale_.deviation[:2], per_channel.std(0), rtol=1e-9)
    module = clf.to_torch()
    np.testing.assert_allclose(module(torch.as_tensor(IMAGES)), clf.predict_proba(IMAGES), rtol=1e-9)
    with pytest.raises(PlanError, match=r"samples of shape \(6, 8, 2\), and the first layer says \(8, 6, 2\)"):
        clf.predict(IMAGES.transpose(0, 2, 1, 3))


def test_an_autoencoder_of_images():
    conv = {"form": "conv2", "kernel_size": 3, "padding": "same"}
    ae = rs.Autoencoder([(8, 6, 2), dict(conv, size=3), dict(conv, size=2)], input_noise=0.1, **QUICK).fit(IMAGES)
    assert ae.predict(IMAGES).shape == (20, 96)
    assert ae.encode(IMAGES).shape == (20, 8, 6, 3)
    np.testing.assert_allclose(ae.decode(ae.encode(IMAGES)), ae.predict(IMAGES), rtol=1e-9)


def test_sequences_of_one_length():
    layers = [{"form": "conv1", "size": 4, "kernel_size": 3}, "pool1", "flatten"]
    net = rs.Regressor(hidden=layers, **QUICK).fit(STEPS, STEPS.sum((1, 2)))
    assert [layer["size"] for layer in net.layers_] == [3, 4, 4, 8, 1]
    assert net.predict(STEPS).shape == (20,)
    with pytest.raises(PlanError, match="6 steps"):
        net.predict(STEPS[:, :5])


def test_saved_and_loaded(tmp_path):
    layers = [
        {"form": "conv2", "size": 4, "kernel_size": 3, "activation": "prelu"},
        "pool2",
        "flatten",
        (8, "maxout:2+norm:z"),
    ]
    clf = rs.Classifier(hidden=layers, **QUICK).fit(IMAGES, LABELS[:20])
    again = rs.Classifier.load(clf.save(tmp_path / "images.safetensors"))
    np.testing.assert_array_equal(again.predict_proba(IMAGES), clf.predict_proba(IMAGES))
    rnn = {"form": "bidirectional", "size": 4, "worker": "gru", "std": 0.1}
    graph = [
        {"shape": (None, 3)},
        rnn,
        {"form": "concatenate", "inputs": ("in", "hid1")},
        {"size": 5, "form": "lstm"},
        2,
    ]
    graph[0] = (None, 3)
    net = rs.Classifier(graph, **QUICK).fit(STEPS, LABELS[:20])
    again = rs.load(net.save(tmp_path / "steps.safetensors"))
    np.testing.assert_array_equal(again.predict_proba(STEPS), net.predict_proba(STEPS))
    with pytest.raises(FileError, match=r"holds a Classifier; write rs\.Classifier\.load"):
        rs.Regressor.load(tmp_path / "steps.safetensors")
    own = rs.Regressor([4, Residual(4), 1], **QUICK).fit(X, NUMBERS)
    with pytest.raises(FileError, match="it is code"):
        own.save(tmp_path / "own.safetensors")


# ---------------------------------------------------------------- first values


def test_initialisers():
    model = built(
        50,
        {"size": 60, "std": 0.1, "mean": 2.0, "std_bias": 0.5},
        {"size": 40, "sparsity": 0.9},
        {"size": 40, "diagonal": 0.5},
        {"size": 30, "radius": 0.7},
        3,
    )
    w = model.hid1.weight
    assert abs(w.mean() - 2) < 4 * 0.1 / 3000**0.5
    assert abs(w.std() - 0.1) < 4 * 0.1 / 6000**0.5
    assert 0.2 < model.hid1.bias.std() < 0.8
    assert (model.hid2.weight == 0).sum() == round(0.9 * 60 * 40)
    same(model.hid3.weight, 0.5 * torch.eye(40))
    assert np.linalg.svd(model.hid4.weight.detach().numpy())[1][0] == pytest.approx(0.7, rel=1e-6)
    recurrent = built(
        3, {"form": "lstm", "size": 5, "radius": 0.9}, {"form": "conv1", "size": 4, "kernel_size": 3, "std": 0.2}, 2
    )
    for block in recurrent.hid1.weight_hh_l0.detach().numpy().reshape(4, 5, 5):
        assert np.linalg.svd(block)[1][0] == pytest.approx(0.9, rel=1e-6)
    assert np.linalg.svd(recurrent.hid1.weight_ih_l0.detach().numpy())[1][0] != pytest.approx(0.9, rel=1e-3)
    torch.manual_seed(0)
    a, b = built(4, {"size": 4, "std": 0.1}, {"size": 4, "std": 0.1}, 2).named_children(), None
    a, b, _ = (layer.weight for _, layer in a)
    assert not torch.equal(a, b)  # unlike theanets', layers of equal shape begin with other weights


# ---------------------------------------------------------------- training


def test_monitors():
    net = rs.Classifier([4, 8, 2], **QUICK)
    watched = {"hid1": (0.0, 0.5), "*.weight": {"mean": torch.mean}}
    net.train(
        (X, LABELS),
        valid=(X, LABELS),
        monitors=watched,
        monitor_gradients=True,
        algo="sgd",
        learning_rate=0.0,
        shuffle=False,
    )
    row, h, w = net.history_[-1], net.activations(X)["hid1"], net.find("hid1").detach()
    assert row["hid1<0"] == pytest.approx((h < 0).mean()) == 0
    assert row["hid1<0.5"] == pytest.approx((h < 0.5).mean()) == pytest.approx(row["valid_hid1<0.5"])
    assert row["mean(hid1.weight)"] == pytest.approx(w.mean().item(), rel=1e-6)
    loss = net.data_loss(X, LABELS)
    gradient = torch.autograd.grad(loss, net.find("out"))[0]
    assert row["grad(out.weight)"] == pytest.approx(gradient.square().sum().item(), rel=1e-6)
    assert not net.find("hid1")._backward_hooks
    assert not net.module_.hid1._forward_hooks
    noisy = rs.Classifier([4, 8, 2], hidden_noise=100.0, **QUICK).train((X, LABELS), monitors={"hid1": 0})
    assert noisy.history_[-1]["hid1<0"] == 0  # without the noise
    with pytest.raises(PlanError, match=r"match no layer or parameter.*theanets' 'hid1:out' is 'hid1' here"):
        net.train((X, LABELS), monitors={"hid1:out": 0.1})
    with pytest.raises(PlanError, match="levels of monitors are numbers"):
        net.train((X, LABELS), monitors={"hid1": "low"})


@pytest.mark.parametrize(("most", "epochs", "last"), [(7, 2, 3), (8, 2, 4), (100, 5, 4)])
def test_max_updates(most, epochs, last):
    counts = []
    net = rs.Classifier([4, 3, 2], random_state=0)

    def counting(parameters, lr=0.1):
        class Counted(torch.optim.SGD):
            def step(self, closure=None):
                counts.append(0)
                return super().step(closure)

        return Counted(parameters, lr=lr)

    net.train((X, LABELS), algo=counting, batch_size=16, epochs=5, max_updates=most, compile=False)
    assert len(counts) == min(most, 20)
    assert net.n_iter_ == epochs
    assert len(counts) - 4 * (epochs - 1) == last


def test_train_batches_and_valid_batches():
    net = rs.Classifier([4, 3, 2], random_state=0)
    counts = []
    hook = register_optimizer_step_post_hook(lambda *_: counts.append(0))
    try:
        net.train(
            (X, LABELS), valid=(X, LABELS), batch_size=16, epochs=3, train_batches=2, valid_batches=1, compile=False
        )
    finally:
        hook.remove()
    assert len(counts) == 6
    with pytest.raises(PlanError, match="train_batches= is a whole number"):
        net.train((X, LABELS), train_batches=0)


def test_callables_as_data():
    draws = []

    def data():
        draws.append(0)
        rows = np.arange(10) + 10 * (len(draws) % 5)
        return [X[rows], LABELS[rows]]

    net = rs.Classifier([4, 8, 2], random_state=0)
    net.train(data, valid=lambda: (X, LABELS), train_batches=5, batch_size=10, epochs=4, shuffle=False, compile=False)
    assert len(draws) == 20
    assert "valid_data_loss" in net.history_[-1]
    order = np.concatenate([np.arange(10) + 10 * (i % 5) for i in range(1, 6)])
    other = rs.Classifier([4, 8, 2], random_state=0).train(
        (X[order], LABELS[order]), valid=(X, LABELS), batch_size=10, epochs=4, shuffle=False, compile=False
    )
    np.testing.assert_array_equal(net.predict_proba(X), other.predict_proba(X))
    rs.Autoencoder([4, 2, 4], random_state=0).train(lambda: X, train_batches=1, epochs=1)
    with pytest.raises(PlanError, match="a part can't be held back of a callable's data"):
        net.train(data, valid=0.2)


def test_save_every(tmp_path):
    net = rs.Classifier([4, 3, 2], random_state=0)
    seen = {}
    for train, _ in net.itertrain((X, LABELS), epochs=5, save_every=2, save_as=tmp_path / "net-{}.safetensors"):
        seen[net.n_iter_ if "n_iter_" in vars(net) else 0] = train
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net-2.safetensors", "net-4.safetensors"]
    other = rs.Classifier([4, 3, 2], random_state=0).train((X, LABELS), epochs=4)
    again = rs.load(tmp_path / "net-4.safetensors")
    np.testing.assert_array_equal(again.predict_proba(X), other.predict_proba(X))
    assert again.n_iter_ == 4
    again.train((X, LABELS), epochs=1)  # in theanets this fails
    net.train((X, LABELS), epochs=1, save_every=1e-9, save_as=tmp_path / "minutes.safetensors")
    assert (tmp_path / "minutes.safetensors").exists()
    with pytest.raises(PlanError, match="save_every= and save_as= go together"):
        net.train((X, LABELS), save_every=2)


def test_a_checkpoint_knows_the_new_settings(tmp_path):
    given = {"checkpoint": tmp_path / "c.pt", "batch_size": 16}
    rs.Classifier([4, 3, 2], random_state=0).train((X, LABELS), epochs=3, train_batches=2, **given)
    with pytest.raises(PlanError, match="of another training: train_batches differ"):
        rs.Classifier([4, 3, 2], random_state=0).train((X, LABELS), epochs=3, **given)


# ---------------------------------------------------------------- use


def test_find_and_params():
    net = rs.Classifier([4, 8, 2], **QUICK).fit(X, LABELS)
    assert net.find("hid1", "bias") is net.module_.hid1.bias
    assert net.find("out") is net.module_.out.weight
    assert list(net.params) == ["hid1.weight", "hid1.bias", "out.weight", "out.bias"]
    assert net.params["out.bias"] is net.module_.out.bias
    with pytest.raises(PlanError, match=r"theanets' 'hid1\.w' is 'hid1\.weight' here"):
        net.find("hid1", "w")
    with pytest.raises(PlanError, match=r"no parameter is called 'hid2\.weight'"):
        net.find("hid2")
    tied = rs.Autoencoder([4, 3, "tied"], **QUICK).fit(X)
    assert tied.find("out") is tied.find("hid1")
    assert not hasattr(rs.Classifier(), "params")


def test_predict_logit_and_sampled_codes():
    net = rs.Classifier([4, (8, "sigmoid"), 2], **QUICK).fit(X, LABELS)
    logits = net.predict_logit(X)
    np.testing.assert_allclose(net.predict_proba(X), np.exp(logits) / np.exp(logits).sum(1, keepdims=True), rtol=1e-9)
    p, found = net.encode(X, "hid1"), 0
    for seed in range(200):
        drawn = net.encode(X, "hid1", sample=True, random_state=seed)
        assert set(np.unique(drawn)) <= {0, 1}
        found = found + drawn / 200
    assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / 200) + 1e-9).all()  # 480 numbers, 5 deviations each
    with pytest.raises(PlanError, match="give it the activation 'sigmoid'"):
        net.encode(X, "out", sample=True)


# ---------------------------------------------------------------- refused, with what to write instead


def fit(**given):
    return lambda: rs.Classifier(**{"hidden": (8,), **QUICK, **given}).fit(X, LABELS)


def train(**given):
    return lambda: rs.Classifier([4, 8, 2], random_state=0).train((X, LABELS), **{"epochs": 1, **given})


def attribute(name):
    return lambda: getattr(rs.Classifier([4, 8, 2], **QUICK).fit(X, LABELS), name)


REFUSED = {
    "hid1:out": (fit(hidden_l1={"strength": 1e-3, "on": "hid1:out"}), "theanets' 'hid1:out' is 'hid1' here"),
    "hid1.w": (fit(weight_l1={"strength": 1e-3, "on": "hid1.w"}), "theanets' 'hid1.w' is 'hid1.weight' here"),
    "hid1.hh": (fit(weight_l1={"strength": 1, "on": ["hid1.hh"]}), "is 'hid1.weight_hh_l0' here"),
    "noise pattern": (fit(noise={"hid1:out": 0.1}), "theanets' 'hid1:out' is 'hid1' here"),
    "weight=": (fit(weight_l1={"weight": 1e-3}), "weight= is theanets' word: write strength="),
    "pattern=": (
        fit(weight_l1={"weight": 1e-3, "pattern": "*"}),
        "weight=, pattern= is theanets' word: write strength=, on=",
    ),
    "regularizers dict": (fit(regularizers={"weight_l1": 1e-3}), r"as keywords, as in \*\*"),
    "nesterov": (train(nesterov=True), "'nesterov': write algo='nag'"),
    "rng": (train(rng=13), "'rng': write random_state="),
    "weighted": (train(weighted=True), r"\(X, y, sample_weight\) are weighted"),
    "misspelt": (train(weight_l3=0.1), "no keyword 'weight_l3'.*near"),
    "weight_sparsity": (train(weight_sparsity=0.1), "write weight_l1="),
    "weightl2": (train(weightl2=0.1), "write weight_l2="),
    "hidden_sparsity": (train(hidden_sparsity=0.1), "write hidden_l1="),
    "bernoullidropout": (train(bernoullidropout=0.1), "write dropout="),
    "noise": (train(noise=0.1), r"dict of globs over layers.*hidden_noise"),
    "negative": (train(weight_l2=-1.0), "weight_l2=-1.0"),
    "max_gradient_elem": (train(max_gradient_elem=1.0), "write max_gradient_norm="),
    "save_progress": (train(save_progress="x"), "write save_as="),
    "layerwise": (train(algo="layerwise"), "fit an Autoencoder for each layer"),
    "pretrain": (train(algo="pretrain"), "fit an Autoencoder for each layer"),
    "sample": (train(algo="sample"), "copy samples into find"),
    "esgd": (train(algo="esgd"), "write 'adam', 'rmsprop'"),
    "leaky-relu": (fit(hidden=((8, "leaky-relu"),)), "theanets' leaky-relu is 'prelu' here"),
    "maxout": (fit(hidden=((8, "maxout"),)), "as in 'maxout:5'"),
    "rnn of maxout": (lambda: resolve([3, (10, "rnn", "maxout:10"), 2]), "has the activation relu or tanh"),
    "layer keys": (fit(hidden=({"size": 8, "input_noise": 0.3},)), "a layer has no 'input_noise'; it has size"),
    "filter_size": (fit(hidden=({"form": "conv2", "size": 8, "filter_size": 3},)), "'filter_size': write kernel_size="),
    "border_mode": (fit(hidden=({"form": "conv2", "size": 8, "border_mode": "full"},)), "write padding="),
    "h_0": (lambda: resolve([3, {"form": "rnn", "size": 4, "h_0": "in"}, 2]), "the first state is zero"),
    "bptt_limit": (lambda: resolve([3, {"form": "rnn", "size": 4, "bptt_limit": 5}, 2]), "cut the sequences"),
    "std_w": (lambda: resolve([3, {"size": 4, "std_w": 0.1}, 2]), "theanets' word: write std_weight="),
    "inputs": (lambda: resolve([3, {"size": 4, "inputs": "in:out"}, 2]), "theanets' name: write 'in'"),
    "bilstm": (lambda: resolve([3, (8, "bilstm"), 2]), "form='bidirectional', worker='lstm'"),
    "kernel_size": (lambda: resolve([(8, 8, 1), (4, "conv2"), 2]), "needs a kernel_size"),
    "no image": (
        lambda: resolve([64, {"form": "conv2", "size": 4, "kernel_size": 3}, 2]),
        r"of images, the first layer is",
    ),
    "odd": (lambda: resolve([3, (5, "bidirectional"), 2]), "its size is even"),
    "too wide": (
        lambda: resolve([(8, 8, 1), {"form": "conv2", "size": 4, "kernel_size": 9}, 2]),
        "a window of 9, and 8",
    ),
    "free flatten": (lambda: resolve([3, (4, "rnn"), "flatten", 2]), "needs sequences of one length"),
    "own module": (lambda: resolve([3, nn.Linear(4, 5), 2]), "your Linear, fails on samples of shape"),
    "lazy module": (lambda: resolve([3, nn.LazyLinear(5), 2]), "is lazy: run your LazyLinear once"),
    "std of nothing": (
        lambda: Network(resolve([3, {"size": 4, "std_gain": 1.0}, 2])),
        "std_gain= matches no parameter",
    ),
    "std of tied": (lambda: resolve([3, 4, {"form": "tied", "std": 0.1}]), "for layers with weights of their own"),
    "unlike inputs": (
        lambda: resolve([3, 4, {"form": "product", "inputs": ("in", "hid1")}, 2]),
        "outputs that don't fit",
    ),
    "image out": (
        lambda: rs.Classifier([(8, 6, 2), {"form": "conv2", "size": 2, "kernel_size": (8, 6)}], **QUICK).fit(
            IMAGES, LABELS[:20]
        ),
        "write 'flatten' before it",
    ),
    "flat rows to an rnn": (fit(hidden=((5, "rnn"),)), r"X of shape \(batch, time, features\), got \(60, 4\)"),
    "feed_forward": (attribute("feed_forward"), r"write activations\(X\)"),
    "classify": (attribute("classify"), r"write predict\(X\)"),
    "predict_sequence": (attribute("predict_sequence"), r"write predict\(X\)"),
    "add_loss": (attribute("add_loss"), "write loss="),
    "inputs of a model": (attribute("inputs"), r"layers_\[0\]"),
    "build_graph": (attribute("build_graph"), "write module_"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_hint(name):
    call, message = REFUSED[name]
    with pytest.raises((RestrainError, AttributeError), match=message):
        call()


def test_penalties_noise_and_algorithms_by_theanets_keywords():
    every = {"weight_l2": 1e-4, "weight_l1": 1e-4, "hidden_l1": 1e-4, "contractive": 1e-4, "weight_decay": None}
    every |= {f"{place}_{kind}": 0.1 for place in ("input", "hidden", "output") for kind in ("noise", "dropout")}
    net = rs.Regressor([4, 8, 1], **QUICK).train((X, NUMBERS), noise={"hid*": 0.1}, dropout={"in": 0.1}, **every)
    assert np.isfinite(net.history_[-1]["loss"])
    net = rs.Regressor([3, (4, "rnn"), 1], **QUICK)
    net.train((STEPS, STEPS.sum(2)), recurrent_norm=1e-3, recurrent_state=1e-3)
    for algo in ("sgd", "nag", "rprop", "rmsprop", "adagrad", "adadelta", "adam"):
        rs.Regressor([4, 2, 1], **QUICK).train((X, NUMBERS), algo=algo, learning_rate=1e-3, epochs=1)
    for loss in ("mse", "mae", "gll", "mmd"):
        rs.Regressor([4, 2, 2 if loss == "gll" else 1], loss=loss, **QUICK).train((X, NUMBERS), epochs=1)
    for loss in ("xe", "hinge"):
        rs.Classifier([4, 2, 2], loss=loss, **QUICK).train((X, LABELS), epochs=1)
    partial = functools.partial(torch.optim.Adam, betas=(0.5, 0.9))
    rs.Classifier([4, 2, 2], **QUICK).train((X, LABELS), algo=partial, epochs=1)
