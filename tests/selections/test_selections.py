"""Selections: what they take, their algebra, and what is said when they take nothing."""

import re

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.activation_points import select_places
from restrain.named_tensors import layers, parameters, unwrap
from restrain.selections import Parameters, as_where


def numbered(value):
    """Ids that every process gives alike: a predicate's text holds an address, a tensor's its random entries."""
    return str(value)[:30] if isinstance(value, str) else type(value).__name__


class HomeMadeRMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.rms = nn.LayerNorm(8), HomeMadeRMSNorm(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(2))
        self.rnn = nn.GRU(8, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.position = nn.Parameter(torch.zeros(3))
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 8))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def chosen(where, model=None):
    return [slot.name for slot in Parameters(parameters(model or Model())).select(as_where(where))]


def test_names_are_those_of_named_parameters():
    model = Model()
    assert [slot.name for slot in parameters(model)] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("fc*", ["fc1.weight", "fc1.bias", "fc2.weight"]),
        ("fc?.weight", ["fc1.weight", "fc2.weight"]),
        (["fc1.bias", "fc2.*"], ["fc1.bias", "fc2.weight"]),
        (re.compile(r"^fc\d\.w"), ["fc1.weight", "fc2.weight"]),
        (nn.LayerNorm, ["norm.weight", "norm.bias"]),
        (nn.LayerNorm | nn.Embedding, ["embed.weight", "norm.weight", "norm.bias"]),
        (lambda name, p: p.dim() == 3, ["pos_embed"]),
        ("head.weight", ["embed.weight"]),
        (rs.embeddings, ["pos_embed", "embed.weight"]),
        (rs.weights & nn.Linear, ["fc1.weight", "fc2.weight", "attention.out_proj.weight"]),
        (nn.Linear & rs.weights - nn.MultiheadAttention, ["fc1.weight", "fc2.weight"]),
        ("fc1.*" | rs.norms & "norm.*", ["fc1.weight", "fc1.bias", "norm.weight"]),
        (rs.norms, ["norm.weight", "rms.scale", "blocks.0.1.weight", "blocks.1.1.weight"]),
        (rs.biases & "rnn.*", ["rnn.bias_ih_l0", "rnn.bias_hh_l0"]),
        (rs.weights & nn.Conv2d, ["blocks.0.0.weight", "blocks.1.0.weight"]),
        (rs.weights & rs.glob("rnn*"), ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (
            rs.weights & nn.MultiheadAttention,
            ["attention.in_proj_weight", "attention.out_proj.weight"],
        ),
    ],
    ids=numbered,
)
def test_what_selections_take(where, expected):
    assert chosen(where) == expected


def test_modules_and_parameters_select_themselves():
    model = Model()
    assert chosen(model.fc1, model) == ["fc1.weight", "fc1.bias"]
    assert chosen(model.fc1.bias, model) == ["fc1.bias"]
    assert chosen(model.blocks[1], model) == [f"blocks.1.{i}.{k}" for i in (0, 1) for k in ("weight", "bias")]
    assert chosen(model, model) == [slot.name for slot in parameters(model)]


def test_a_bare_layer_has_weights():
    assert chosen(rs.weights, nn.Linear(2, 3)) == ["weight"]
    with pytest.raises(rs.errors.SelectionError, match="near it: 'weight'"):
        chosen("*.weight", nn.Linear(2, 3))


def test_wrappers_are_seen_through():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))
    wrapped = torch.optim.swa_utils.AveragedModel(torch.compile(model))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [slot.name for slot in parameters(wrapped)] == names
    for slot in parameters(model):
        assert slot.handle.find(unwrap(model)) is slot.tensor()


def test_a_users_own_child_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert chosen("module.weight", model) == ["module.weight"]


def test_parametrised_weights_have_their_plain_name_and_effective_value():
    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    assert chosen("0.weight", model) == ["0.weight"]
    value = rs.attach(model, rs.L2().on("0.weight")).penalty()
    torch.testing.assert_close(value, model[0].weight.square().sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rule in (rs.L1().on("0.weight", how="proximal"), rs.NonNegative().on("0.weight")):
        with pytest.raises(rs.errors.HowError, match="parametrised"):
            rs.attach(model, rule, optimizer)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("fc3.weight", r"selects no parameter; near it: .*'fc1.weight'.*; there are: .*'pos_embed'"),
        ("norn*", r"near it: |there are: "),
        (["fc1.*", "nothing.*"], r"'nothing\.\*', a part of .* matches nothing"),
        (rs.weights - "fc9.*", r"'fc9\.\*', a part of .* matches nothing"),
        (rs.norms & nn.Conv2d, r"rs.norms & Conv2d\) selects no parameter"),
        (nn.Conv3d, "Conv3d selects no parameter"),
        ([], "empty list"),
        (3.0, "can't select by 3.0"),
        (int, "expected a type of nn.Module"),
        (nn.Linear(2, 2).weight, "selects no parameter"),
    ],
    ids=numbered,
)
def test_what_matches_nothing_is_an_error_that_says_what_there_is(where, message):
    with pytest.raises(rs.errors.SelectionError, match=message):
        chosen(where)


def places(where, model=None):
    model = model or Model()
    return [target.name for target in select_places(where, list(layers(model)))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (rs.outputs("fc*"), ["fc1", "fc2"]),
        (rs.outputs(), [""]),
        (rs.inputs(), [""]),
        (rs.outputs("blocks*"), ["blocks.0", "blocks.1"]),
        (rs.outputs("blocks.0*"), ["blocks.0"]),
        (rs.outputs("blocks.0.?"), ["blocks.0.0", "blocks.0.1", "blocks.0.2"]),
        (rs.outputs(nn.ReLU), ["blocks.0.2", "blocks.1.2"]),
        (rs.outputs(["fc1", "norm"]), ["fc1", "norm"]),
        (rs.outputs(rs.glob("fc*") - "fc2"), ["fc1"]),
        (rs.outputs(lambda name, module: name.endswith(".2")), ["blocks.0.2", "blocks.1.2"]),
        (rs.outputs("fc*") | rs.outputs("norm"), ["fc1", "fc2", "norm"]),
        (rs.outputs("fc*") - rs.outputs("fc1"), ["fc2"]),
        (rs.outputs("fc*") & rs.outputs("*2"), ["fc2"]),
    ],
    ids=numbered,
)
def test_what_places_are_taken(where, expected):
    assert places(where) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: places(rs.outputs("relu*")), "matches no layer.*there are: 'embed', 'fc1'"),
        (lambda: places(rs.outputs("blocks")), "ModuleList is not"),
        (lambda: places(rs.outputs(rs.weights)), "rs.weights selects parameters"),
        (lambda: rs.outputs("fc1", calls="last"), "'mean' or 'sum'"),
        (lambda: rs.outputs("fc1", via=3), "via= is a function"),
        (lambda: rs.weights & rs.outputs("fc1"), "don't join with parameters"),
        (lambda: rs.outputs("fc1") & "fc2", "places join with places"),
        (
            lambda: rs.attach(Model(), rs.L1().on(rs.outputs("attention.out_proj"))),
            r"rs.outputs\('attention'\)",
        ),
    ],
)
def test_places_that_cannot_be(make, message):
    with pytest.raises(rs.errors.SelectionError, match=message):
        make()
