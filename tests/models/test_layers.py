"""Layers as a person writes them: what they mean, what they compute, what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PlanError
from restrain.models.layers import Network
from restrain.models.specs import hidden, resolve

ACTIVATIONS = {
    "linear": lambda a: a,
    "relu": lambda a: np.maximum(a, 0),
    "tanh": np.tanh,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "softplus": lambda a: np.log1p(np.exp(a)),
    "elu": lambda a: np.where(a > 0, a, np.expm1(a)),
    "silu": lambda a: a / (1 + np.exp(-a)),
    "leaky_relu": lambda a: np.where(a > 0, a, 0.01 * a),
}


def built(*specs):
    torch.manual_seed(0)
    return Network(resolve(list(specs))).double()


def arrays(model):
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def test_the_forms_of_a_specification():
    layers = resolve([784, 100, (50, "tanh"), ("sigmoid", 20), {"size": 30, "name": "a", "activation": "elu"}, 10])
    assert [layer["name"] for layer in layers] == ["in", "hid1", "hid2", "hid3", "a", "out"]
    assert [layer["size"] for layer in layers] == [784, 100, 50, 20, 30, 10]
    assert [layer.get("activation") for layer in layers] == [None, "relu", "tanh", "sigmoid", "elu", "linear"]
    assert hidden(layers) == ["hid1", "hid2", "hid3", "a"]
    layers = resolve([4, 8, "batchnorm", (5, "lstm"), "layernorm", (3, "rnn", "relu"), np.int64(2)])
    assert [layer["form"] for layer in layers[1:]] == ["dense", "batchnorm", "lstm", "layernorm", "rnn", "dense"]
    assert [layer["name"] for layer in layers] == ["in", "hid1", "norm1", "hid2", "norm2", "hid3", "out"]
    assert hidden(layers) == ["hid1", "hid2", "hid3"]
    assert resolve([{"size": 4, "name": "x"}, 2])[0]["name"] == "x"
    assert resolve([4, 8, (3, "softmax")])[-1]["activation"] == "linear"  # logits


def test_resolved_layers_are_plain_data_that_build_the_same():
    layers = resolve([4, 8, (5, "tanh"), "tied", "tied"])
    assert [layer.get("partner") for layer in layers] == [None, None, None, "hid2", "hid1"]
    assert all(type(value) in (str, int) for layer in layers for value in layer.values())
    assert list(Network(layers).state_dict()) == list(Network(layers).state_dict())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_layer_is_its_activation_of_w_x_plus_b(name):
    model = built(4, (8, name), 3)
    x = np.random.default_rng(0).standard_normal((5, 4))
    p = arrays(model)
    h = ACTIVATIONS[name](x @ p["hid1.weight"].T + p["hid1.bias"])
    seen = rs.activations(model, torch.tensor(x))
    np.testing.assert_allclose(seen["hid1"].detach(), h, rtol=1e-12)
    np.testing.assert_allclose(seen["out"].detach(), h @ p["out.weight"].T + p["out.bias"], rtol=1e-12)
    assert list(seen) == ["hid1", "out"]


def test_tied_layers_share_their_partners_weight():
    model = built(6, (5, "tanh"), (3, "sigmoid"), (5, "tied", "tanh"), "tied")
    assert [name for name, _ in model.named_parameters()] == [
        *("hid1.weight", "hid1.bias", "hid2.weight", "hid2.bias", "hid3.bias", "out.bias"),
    ]
    assert model.out.weight is model.hid1.weight
    assert model.hid3.weight is model.hid2.weight
    x = np.random.default_rng(0).standard_normal((4, 6))
    p = arrays(model)
    h = np.tanh(x @ p["hid1.weight"].T + p["hid1.bias"])
    h = 1 / (1 + np.exp(-(h @ p["hid2.weight"].T + p["hid2.bias"])))
    h = np.tanh(h @ p["hid2.weight"] + p["hid3.bias"])
    np.testing.assert_allclose(model(torch.tensor(x)).detach(), h @ p["hid1.weight"] + p["out.bias"], rtol=1e-12)
    model.float()
    assert model.out.weight is model.hid1.weight


def test_partners_by_name():
    layers = resolve([4, {"size": 4, "name": "a"}, {"size": 4, "name": "b"}, {"form": "tied", "partner": "a"}])
    assert layers[-1]["partner"] == "a"


def test_recurrent_layers_map_sequences_to_sequences():
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    for form, kind in (("rnn", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU)):
        model = built(3, (4, form, "tanh"), 2)
        assert isinstance(model.hid1, kind)
        assert model(x).shape == (2, 7, 2)
        alone = kind(3, 4, batch_first=True).double()
        alone.load_state_dict(model.hid1.state_dict())
        torch.testing.assert_close(model.hid1(x), alone(x)[0])
    with torch.no_grad():
        model = built(3, (4, "rnn", "relu"), 2)
        p, h = arrays(model), np.zeros((2, 4))
        for step in range(7):
            bias = p["hid1.bias_ih_l0"] + p["hid1.bias_hh_l0"]
            h = np.maximum(x[:, step].numpy() @ p["hid1.weight_ih_l0"].T + h @ p["hid1.weight_hh_l0"].T + bias, 0)
        np.testing.assert_allclose(model.hid1(x)[:, -1], h, rtol=1e-12)


def test_normalisation_layers():
    x = torch.randn(50, 3, dtype=torch.float64) * 5 + 2
    by_batch, by_features = built(3, "batchnorm", 2), built(3, ("layernorm", "relu"), 2)
    seen = rs.activations(by_batch, x)["norm1"]
    torch.testing.assert_close(seen.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(by_features.norm1(x), expected.relu())
    sequences = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(by_batch.norm1(sequences).mean((0, 1)), torch.zeros(3, dtype=torch.float64))
    with rs.attach(by_batch, rs.L2().on()) as reg:
        assert str(reg.plan.rules[0].where) == "['out.weight']"  # a norm's scale is no weight


def test_the_network_can_be_traced_by_fx():
    model = built(4, 8, 3)
    traced = torch.fx.symbolic_trace(model, concrete_args=None)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (784, "layers are a list"),
        ([784], "at least an input and an output"),
        ([0, 3], "whole number above zero, got 0"),
        ([4, 2.5, 3], r"can't read 2\.5"),
        ([4, True, 3], "can't read True"),
        ([4, (50, "tanhh"), 3], "no form or activation is called 'tanhh'.*near it: tanh"),
        ([4, (50, 20), 3], "says its size twice"),
        ([4, {"size": 8, "noise": 0.1}, 3], "a layer has no 'noise'; it has size, name, activation, form, partner"),
        ([4, {"size": 8, "form": "conv"}, 3], "no form is called 'conv'.*dense"),
        ([4, "tanh", 3], "'hid1' needs a size"),
        ([(4, "relu"), 3], "the first layer is the input"),
        ([4, (8, "softmax"), 3], "softmax is for the output"),
        ([4, "tied"], "needs an earlier dense layer that has no partner yet.*none"),
        ([4, 8, (5, "tied")], "tied to 'hid1', which maps 4 to 8.*5 are to go"),
        ([4, 8, 3, {"form": "tied", "partner": "hid1"}], "here 3 come"),
        ([4, 8, {"size": 3, "partner": "hid1"}], "partner= is for tied layers"),
        ([4, (8, "lstm", "relu"), 3], "form='lstm' has the activation tanh"),
        ([4, 8, ("batchnorm", 9), 3], "keeps the size of what comes, 8; got size=9"),
        ([4, {"size": 8, "name": "a"}, {"size": 8, "name": "a"}, 3], "two layers are called 'a'"),
        ([4, {"size": 8, "name": "a.b"}, 3], "word of letters"),
        ([4, {"size": 8, "name": "forward"}, 3], "means something else"),
        ([4, {"size": 8, "name": "in"}, 3], "two layers are called 'in'"),
    ],
    ids=str,
)
def test_refused(specs, message):
    with pytest.raises(PlanError, match=message):
        resolve(specs)
