"""Rules declared at layers and by scopes: who has which, what overrides what, and what copies keep."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_parameter_registration_hooks
from torch.nn.utils import parametrizations

import restrain as rs
from restrain.errors import HowError, PenaltyError, PlanError, SelectionError


class DeclareQuartic(rs.Penalty):
    """A user's penalty without equality, settings or repr of its own."""

    def __call__(self, w):
        return w.pow(4).sum()


def declared(model, optimizer=None):
    """{what: names that it acts on} of all that a model declares."""
    with rs.attach(model, optimizer=optimizer) as reg:
        found = {}
        for rule in reg.plan:
            data = rs.Plan.of(rule).to_dict()["rules"][0]
            found.setdefault(repr(rule.what), []).append(data["on"])
        return found


L1, L2 = 0.1 * rs.L1(), 0.2 * rs.L2()


# At the layer


def test_parameters_by_name_and_by_role():
    linear = rs.regularized(nn.Linear(3, 2), weight=L1, bias=L2)
    assert declared(linear) == {"0.1 * L1()": [["weight"]], "0.2 * L2()": [["bias"]]}
    norm = rs.regularized(nn.LayerNorm(3), weight=L1)
    assert declared(norm) == {"0.1 * L1()": [["weight"]]}, "asked for by its name"
    lstm = rs.regularized(nn.LSTM(3, 2), weight=L1, bias_hh_l0=L2)
    assert declared(lstm) == {"0.1 * L1()": [["weight_ih_l0", "weight_hh_l0"]], "0.2 * L2()": [["bias_hh_l0"]]}
    attention = rs.regularized(nn.MultiheadAttention(4, 2), weight=L1, bias=L2)
    assert declared(attention) == {"0.1 * L1()": [["in_proj_weight"]], "0.2 * L2()": [["in_proj_bias"]]}
    parametrised = rs.regularized(parametrizations.weight_norm(nn.Linear(3, 2)), weight=L1)
    assert declared(parametrised) == {"0.1 * L1()": [["weight"]]}
    assert type(linear) is nn.Linear
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_the_values_are_those_of_the_loss_by_hand():
    torch.manual_seed(0)
    first = rs.regularized(nn.Linear(3, 4), weight=[L1, 0.3 * DeclareQuartic()], input=0.5 * rs.L2(), output=L2)
    model = nn.Sequential(first, nn.ReLU(), rs.regularized(nn.Linear(4, 2), weight=L1, bias=L1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    reg = rs.attach(model)
    got = reg.loss(model(x).sum())
    w0, w2, h = model[0].weight, model[2].weight, model[0](x)
    penalty = 0.1 * (w0.abs().sum() + w2.abs().sum() + model[2].bias.abs().sum()) + 0.3 * w0.pow(4).sum()
    penalty = penalty + 0.5 * x.square().sum() / 5 + 0.2 * h.square().sum() / 5
    expected = model[2](h.relu()).sum() + penalty
    torch.testing.assert_close(got, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))


def test_how_constraints_and_noise():
    torch.manual_seed(0)
    first = rs.regularized(nn.Linear(3, 4), how="proximal", weight=10 * rs.L1(), output=rs.L2())
    last = rs.regularized(nn.Linear(4, 2), weight=rs.NonNegative(), output=rs.Dropout(0.5), input=rs.GaussianNoise(1.0))
    model = nn.Sequential(first, nn.Tanh(), last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, optimizer=optimizer)
    assert [rule.how for rule in reg.plan] == ["proximal", "loss", "project", "forward", "forward"]
    assert (last.weight >= 0).all()
    x = torch.randn(6, 3)
    assert (model(x) == 0).any(), "dropped"
    reg.loss(model(x).sum()).backward()
    optimizer.step()
    assert (first.weight == 0).all(), "so strong a prox makes all zero"
    assert (last.weight >= 0).all()


def test_declaring_again_replaces_and_none_takes_back():
    layer = rs.regularized(rs.regularized(nn.Linear(3, 2), weight=L1, bias=L1), weight=L2)
    assert declared(layer) == {"0.2 * L2()": [["weight"]], "0.1 * L1()": [["bias"]]}
    assert declared(rs.regularized(layer, bias=None)) == {"0.2 * L2()": [["weight"]]}
    with pytest.raises(PlanError, match="nothing to attach"):
        rs.attach(rs.regularized(layer, weight=None))


def test_a_model_declares_for_itself_and_for_its_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    rs.regularized(model[0], output=L1, input=L2)
    rs.regularized(model, output=0.1 * rs.L1(), input=0.2 * rs.L2())  # the same, which are joined
    x = torch.randn(5, 3, dtype=torch.float64)
    reg = rs.attach(model)
    got = reg.loss(model(x).sum())
    h = model[0](x)
    out = model[2](h.relu())
    penalty = 0.1 * (h.abs().sum() + out.abs().sum()) / 5 + 0.2 * 2 * x.square().sum() / 5
    torch.testing.assert_close(got, out.sum() + penalty)


def test_a_shared_layer_and_a_tied_parameter_count_once():
    shared = rs.regularized(nn.Linear(3, 3), weight=L2)
    model = nn.Sequential(shared, nn.Tanh(), shared, rs.regularized(nn.Linear(3, 3), weight=L2))
    model[3].weight = shared.weight
    reg = rs.attach(model)
    torch.testing.assert_close(reg.penalty(), 0.2 * shared.weight.square().sum())
    assert declared(copy.deepcopy(model)) == {"0.2 * L2()": [["0.weight"]]}


# By a scope


def test_a_scope_means_roles():
    with rs.scope(weight=L1, bias=L2):
        model = nn.ModuleDict(
            {
                "linear": nn.Linear(2, 2),
                "conv": nn.Conv1d(2, 2, 1, bias=False),
                "batch": nn.BatchNorm1d(2),
                "layer": nn.LayerNorm(2),
                "group": nn.GroupNorm(1, 2),
                "words": nn.Embedding(3, 2),
                "lstm": nn.LSTM(2, 2),
                "attention": nn.MultiheadAttention(2, 1),
            }
        )
    found = declared(model)
    (weights,) = found["0.1 * L1()"]
    assert set(weights) == {
        *("linear.weight", "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
    }
    (biases,) = found["0.2 * L2()"]
    assert {name for name in biases if name.split(".")[0] not in ("batch", "layer", "group")} == {
        *("linear.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
        *("attention.in_proj_bias", "attention.out_proj.bias"),
    }


def test_scopes_nest_and_none_switches_off():
    with rs.scope(weight=L1, output=L2):
        outer = nn.Linear(2, 2)
        with rs.scope(weight=L2):
            inner = nn.Linear(2, 2)
            with rs.scope(weight=None, output=None, bias=L1):
                inmost = nn.Linear(2, 2)
        after = nn.Linear(2, 2)
        own = rs.regularized(nn.Linear(2, 2), weight=None, output=L1)
    outside = nn.Linear(2, 2)
    model = nn.Sequential(outer, inner, inmost, after, own, outside)
    assert declared(model) == {
        "0.1 * L1()": [["0.weight", "3.weight"], ["2.bias"], {"outputs": ["4"]}],
        "0.2 * L2()": [{"outputs": ["0", "1", "3"]}, ["1.weight"]],
    }


def test_taking_back_one_parameter_of_a_role_that_a_scope_declares():
    with rs.scope(weight=L1):
        lstm = nn.LSTM(3, 2)
    assert declared(rs.regularized(lstm, weight_hh_l0=None)) == {"0.1 * L1()": [["weight_ih_l0"]]}
    assert declared(rs.regularized(lstm, weight_hh_l0=L2)) == {
        "0.1 * L1()": [["weight_ih_l0"]],
        "0.2 * L2()": [["weight_hh_l0"]],
    }


def test_a_scope_sees_weights_that_are_parametrised_later():
    with rs.scope(weight=L2):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2), nn.BatchNorm1d(2))
    parametrizations.orthogonal(model[1])
    reg = rs.attach(model)
    expected = 0.2 * (model[0].weight.square().sum() + model[1].weight.square().sum())
    torch.testing.assert_close(reg.penalty(), expected)


def test_a_scope_declares_for_a_users_module_with_parameters_of_its_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 3))
            self.shift_bias = nn.Parameter(torch.ones(3))
            self.gain = nn.Parameter(torch.ones(3))
            self.register_parameter("none", None)
            self.inner = nn.Linear(3, 3)

    with rs.scope(weight=L1, bias=L2, gain=3.0 * rs.L2()):
        model = Mine()
    assert declared(model) == {
        "0.1 * L1()": [["table", "inner.weight"]],
        "0.2 * L2()": [["shift_bias", "inner.bias"]],
        "3.0 * L2()": [["gain"]],
    }


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_layers_built_in_a_scope():
    with rs.scope(weight=L2):
        model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyConv1d(2, 1))[:2]
    reg = rs.attach(model)
    x = torch.randn(4, 5)
    got = reg.loss(model(x).sum())
    torch.testing.assert_close(got, model(x).sum() + 0.2 * model[0].weight.square().sum())


def test_a_scope_ends_with_its_block_also_after_an_exception():
    built = []

    def build():
        with rs.scope(weight=L1):
            built.append(nn.Linear(2, 2))
            with rs.scope(bias=L2):
                raise KeyError

    with pytest.raises(KeyError):
        build()
    model = nn.Sequential(*built, nn.Linear(2, 2))
    assert declared(model) == {"0.1 * L1()": [["0.weight"]]}
    assert not _global_parameter_registration_hooks


def test_scopes_of_threads_are_their_own():
    barrier, models = threading.Barrier(2), {}

    def build(name, penalty):
        barrier.wait()
        with rs.scope(weight=penalty):
            barrier.wait()
            models[name] = nn.Linear(2, 2)
            barrier.wait()
        models[f"{name} after"] = nn.Linear(2, 2)

    with rs.scope(bias=L1):
        threads = [threading.Thread(target=build, args=pair) for pair in (("a", L1), ("b", L2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert declared(nn.ModuleDict({"a": models["a"], "b": models["b"]})) == {
        "0.1 * L1()": [["a.weight"]],
        "0.2 * L2()": [["b.weight"]],
    }
    with pytest.raises(PlanError, match="nothing to attach"):
        rs.attach(nn.ModuleList([models["a after"], models["b after"]]))


# Copies


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_declare_the_same(way):
    with rs.scope(weight=L2):
        model = nn.Sequential(nn.Linear(3, 3), rs.regularized(nn.Linear(3, 2), bias=0.3 * DeclareQuartic(), output=L1))
    original = declared(model)
    other = way(model)
    assert declared(other) == original
    rs.regularized(other[1], output=None)
    assert declared(model) == original, "each has its own"
    attached = rs.attach(model)
    assert len(declared(way(model))) == 3, "a copy of a model with an attachment is free of it"
    attached.detach()


def test_a_copy_of_one_layer_and_a_state_dict_carry_what_they_should():
    layer = rs.regularized(nn.Linear(3, 3), weight=L2)
    stack = nn.Sequential(*[copy.deepcopy(layer) for _ in range(3)])
    assert declared(stack) == {"0.2 * L2()": [["0.weight", "1.weight", "2.weight"]]}
    encoder = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)
    rs.regularized(encoder.linear1, weight=L1)
    assert declared(nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)) == {
        "0.1 * L1()": [["layers.0.linear1.weight", "layers.1.linear1.weight"]]
    }
    plain = nn.Linear(3, 3)
    plain.load_state_dict(layer.state_dict())
    with pytest.raises(PlanError, match="nothing to attach"):
        rs.attach(plain)


# What can't be


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rs.regularized(nn.Linear(2, 2, bias=False), bias=L1), SelectionError, "'bias'.*its own: weight"),
        (lambda: rs.regularized(nn.ReLU(), weight=L1), SelectionError, "none of its own"),
        (lambda: rs.regularized(nn.Sequential(nn.Linear(2, 2)), weight=L1), SelectionError, "none of its own"),
        (lambda: rs.regularized(nn.Linear(2, 2), weight="l2"), PlanError, "'l2'"),
        (lambda: rs.regularized(nn.Linear(2, 2), weight=L2.on("*")), PlanError, r"1e-4 \* rs.L2\(\)"),
        (lambda: rs.regularized(nn.Linear(2, 2), weight=[L2, 3]), PlanError, "got 3"),
        (lambda: rs.regularized(nn.Linear(2, 2), how="prox", weight=L2), (HowError, PlanError), "'proximal'"),
        (lambda: rs.regularized(nn.Linear(2, 2), weight=rs.Dropout(0.1)), SelectionError, "outputs or inputs"),
        (lambda: rs.regularized(nn.Linear(2, 2), output=rs.NonNegative()), SelectionError, "parameters"),
        (lambda: rs.regularized(nn.Linear(2, 2), output=rs.GroupLasso()), PenaltyError, "per= is a dim"),
        (lambda: rs.scope(weight=3).__enter__(), PlanError, "weight="),
        (lambda: rs.scope(output=rs.MaxNorm(1.0)).__enter__(), SelectionError, "parameters"),
        (lambda: rs.scope(weight=rs.Dropout(0.1)).__enter__(), SelectionError, "outputs or inputs"),
    ],
)
def test_bad_declarations_say_what_to_write(make, error, message):
    with pytest.raises(error, match=message):
        make()
    assert not _global_parameter_registration_hooks


def test_a_misspelt_keyword_of_a_scope_is_noticed():
    def build():
        with rs.scope(wieght=L2, bias=L1):
            model = nn.Linear(2, 2)
        rs.attach(model)

    with pytest.raises((SelectionError, PlanError), match="wieght"):
        build()
