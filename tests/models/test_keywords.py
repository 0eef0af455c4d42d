"""Keywords of the models: what each one adds, by its formula in NumPy; and what is refused."""

import re

import numpy as np
import pytest
import torch

import restrain as rs
from restrain import registry
from restrain.errors import HowError, PenaltyError, PlanError, RestrainError, RestrainWarning, SelectionError
from restrain.models import keywords
from restrain.models.layers import Network
from restrain.models.specs import resolve

RNG = np.random.default_rng(0)
X, Y = RNG.random((40, 784)).astype("f4"), RNG.integers(0, 784, 40)
IRIS, SEQUENCES = RNG.standard_normal((30, 4)), RNG.standard_normal((6, 5, 3))


class Quartic(rs.Penalty):
    """A penalty of one's own."""

    def __call__(self, w):
        return w.pow(4).sum()


class Centered(rs.NetworkPenalty):
    """One on the whole network."""

    def __call__(self, parameters, outputs):
        return outputs["hid1"].mean(0).square().sum() + 0 * sum(p.sum() for p in parameters.values())


EACH = [
    {"weight_l1": 1e-4},
    {"weight_l1": {"strength": 1e-4, "how": "proximal"}},
    {"weight_l2": 1e-4},
    {"weight_decay": {"strength": 1e-4, "on": "hid*", "reduce": "mean"}},
    {"hidden_l1": 1e-3},
    {"contractive": 1e-4},
    {"contractive": {"strength": 1e-4, "estimator": "jvp", "projections": 2}},
    {"jacobiannorm": 1e-4},
    {"jacobian_norm": {"strength": 1e-4, "on": "hid1"}},
    {"gradientpenalty": {"strength": 1e-4, "of": "loss"}},
    {"input_noise": 0.1},
    {"hidden_noise": 0.1},
    {"output_noise": 0.1},
    {"input_dropout": 0.2},
    {"hidden_dropout": 0.5},
    {"output_dropout": 0.2},
    {"noise": {"in": 0.1, "hid*": 0.2}},
    {"dropout": {"*": 0.1}},
    {"nonnegative": True},
    {"nonnegative": "out.weight"},
    {"max_norm": 0.3},
    {"max_norm": {"strength": 0.3, "per": "in", "on": "hid1.weight"}},
    {"quartic": 1e-4},
    {"centered": 1e-4},
    {"l1": 1e-4},
    {"grouplasso": {"strength": 1e-4, "per": "in"}},
    {"elasticnet": {"l1": 1e-4, "l2": 1e-4}},
    {"norm": {"strength": 1e-4, "p": 2}},
    {"unitnorm": True},
    {"gaussiannoise": 0.1},
    {"regularizers": [1e-4 * rs.L1().on("hid1.*", name="mine"), "l2:1e-4"]},
]


@pytest.mark.parametrize("given", EACH, ids=str)
def test_a_wide_classifier_trains_with_each_keyword(given):
    plain = rs.Classifier([784, 1000, 784], epochs=1, batch_size=20, random_state=0).train((X, Y))
    model = rs.Classifier([784, 1000, 784], epochs=1, batch_size=20, random_state=0, **given).train((X, Y))
    row = model.history_[0]
    assert np.isfinite(row["loss"])
    assert not torch.equal(plain.module_.hid1.weight, model.module_.hid1.weight)
    penalties = set(row) - {"epoch", "loss", "data_loss", "acc"}
    assert row["loss"] == pytest.approx(row["data_loss"] + sum(row[name] for name in penalties))
    if next(iter(given)) in ("weight_l1", "hidden_l1", "contractive", "quartic", "centered"):
        assert penalties == set(given)
        assert row[next(iter(given))] > 0


def test_an_autoencoder_under_hidden_l1_and_a_penalty_of_ones_own():
    model = rs.Autoencoder([4, (8, "linear"), (4, "tied")]).train(IRIS, hidden_l1=0.1, quartic=1e-3, epochs=3)
    assert set(model.history_[0]) == {"epoch", "loss", "data_loss", "hidden_l1", "quartic"}
    assert model.history_[0]["loss"] > model.history_[2]["loss"]


def test_an_autoencoder_with_named_layers_under_noise():
    names = [{"size": size, "name": name} for size, name in ((8, "a"), (3, "b"), (4, "o"))]
    model = rs.Autoencoder([4, *names], random_state=0).train(IRIS, input_noise=0.1, hidden_noise=0.1, epochs=5)
    assert list(model.activations(IRIS)) == ["a", "b", "o"]
    assert model.encode(IRIS, "a").shape == (30, 8)
    assert model.encode(IRIS).shape == (30, 3)
    np.testing.assert_allclose(model.decode(model.encode(IRIS, "a"), "a"), model.predict(IRIS))


# Formulas


def measured(specs, given, x, draws=False):
    """The value that the keywords add, for a network with these layers; with the network, and its layers' outputs."""
    torch.manual_seed(1)
    layers = resolve(specs)
    model = Network(layers).double()
    plan = keywords.rules(given, keywords.Context(layers))
    tensor = torch.tensor(x, requires_grad=True)
    with rs.attach(model, plan) as reg:
        model(tensor)
        value = reg.penalty()
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    found = {name: h.detach().numpy() for name, h in rs.activations(model, tensor).items()}
    return value.item(), model, found, gradients


def test_weights_by_their_formulas():
    value, model, _, _ = measured([4, 8, 3], {"weight_l1": 0.1, "weight_l2": 0.2}, IRIS)
    weights = [model.hid1.weight.detach().numpy(), model.out.weight.detach().numpy()]
    assert value == pytest.approx(sum(0.1 * np.abs(w).sum() + 0.2 * (w**2).sum() for w in weights))


def test_a_tied_weight_counts_once():
    value, model, _, _ = measured([4, 8, "tied"], {"weight_l2": 1.0}, IRIS)
    assert value == pytest.approx((model.hid1.weight.detach().numpy() ** 2).sum())
    mean, _, _, _ = measured([4, 8, "tied"], {"weight_l2": {"strength": 1.0, "reduce": "mean"}}, IRIS)
    assert mean == pytest.approx(value / 32)


def test_hidden_l1_sums_over_units_and_layers_and_averages_over_samples():
    value, _, h, _ = measured([4, 8, "batchnorm", (5, "tanh"), 3], {"hidden_l1": 0.1}, IRIS)
    assert value == pytest.approx(0.1 * (np.abs(h["hid1"]).sum() + np.abs(h["hid2"]).sum()) / 30)
    mean, _, _, _ = measured([4, 8, (5, "tanh"), 3], {"hidden_l1": {"strength": 0.1, "reduce": "mean"}}, IRIS)
    _, _, h, _ = measured([4, 8, (5, "tanh"), 3], {"hidden_l1": 0.1}, IRIS)
    assert mean == pytest.approx(0.1 * (np.abs(h["hid1"]).mean() + np.abs(h["hid2"]).mean()) / 2)


def squared_jacobian(model, layers, x):
    """Σ ‖∂h/∂x‖_F² / batch by central differences, a feature at a time."""
    total, eps = 0.0, 1e-5
    for index in np.ndindex(x.shape[1:]):
        step = np.zeros_like(x)
        step[(slice(None), *index)] = eps
        up, down = (rs.activations(model, torch.tensor(x + sign * step)) for sign in (1, -1))
        for name in layers:
            total += (((up[name] - down[name]) / (2 * eps)) ** 2).sum().item()
    return total / len(x)


@pytest.mark.parametrize("first", ["linear", "relu", "tanh", "sigmoid", "softplus"])
def test_contractive_is_the_jacobian_of_every_hidden_layer(first):
    value, model, _, _ = measured([4, (8, first), (5, "tanh"), 3], {"contractive": 0.1}, IRIS)
    assert value == pytest.approx(0.1 * squared_jacobian(model, ["hid1", "hid2"], IRIS), rel=1e-6)


def test_contractive_of_states_over_time():
    for form in ("rnn", "lstm", "gru"):
        value, model, _, _ = measured([3, (4, form), 2], {"contractive": 1.0}, SEQUENCES)
        assert value == pytest.approx(squared_jacobian(model, ["hid1"], SEQUENCES), rel=1e-6)


def test_contractive_has_the_gradient_of_its_value_by_both_ways():
    given = {"strength": 0.1, "on": ["hid1"]}
    closed, model, _, gradients = measured([4, (8, "tanh"), 3], {"contractive": given}, IRIS)
    general, _, _, others = measured([4, (8, "tanh"), 3], {"contractive": given, "input_dropout": 0.0001}, IRIS)
    assert closed == pytest.approx(general, rel=0.01)
    for one, other in zip(gradients, others, strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=0.05, atol=1e-4)
    weight, eps = model.hid1.weight, 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 1] += sign * eps
            values.append(0.1 * squared_jacobian(model, ["hid1"], IRIS))
            weight[2, 1] -= sign * eps
    assert gradients[0][2, 1].item() == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-3)


def test_contractive_under_dropout_of_the_input_sees_the_mask():
    torch.manual_seed(0)
    layers = resolve([4, (8, "linear"), 3])
    model = Network(layers).double()
    plan = keywords.rules({"contractive": 1.0, "input_dropout": 0.5}, keywords.Context(layers))
    values = []
    with rs.attach(model, plan) as reg:
        for _ in range(400):
            model(torch.tensor(IRIS, requires_grad=True))
            values.append(reg.penalty().item())
    exact = 2 * (model.hid1.weight.detach() ** 2).sum().item()  # a mask of 0 or 2: E[m²] = 2
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / 20


def test_changes_over_time():
    for form in ("rnn", "gru"):
        value, _, h, _ = measured([3, (4, form), 2], {"recurrent_state": 0.1}, SEQUENCES)
        change = np.diff(h["hid1"], axis=1)
        assert value == pytest.approx(0.1 * (change**2).sum(-1).mean())
        value, _, h, _ = measured([3, (4, form), 2], {"recurrent_norm": 0.1}, SEQUENCES)
        lengths = (h["hid1"] ** 2).sum(-1)
        assert value == pytest.approx(0.1 * (np.diff(lengths, axis=1) ** 2).mean())
    mean = {"strength": 0.1, "reduce": "mean"}
    value, _, h, _ = measured([3, (4, "rnn"), (5, "lstm"), 2], {"recurrent_state": mean}, SEQUENCES)
    layers = [(np.diff(h[name], axis=1) ** 2).mean() for name in ("hid1", "hid2")]
    assert value == pytest.approx(0.1 * np.mean(layers))
    value, _, _, _ = measured([3, (4, "rnn"), 2], {"recurrent_state": 0.1, "recurrent_norm": 0.1}, SEQUENCES[:, :1])
    assert value == 0


def test_noise_acts_at_its_places_and_in_training_only():
    layers = resolve([4, (4, "linear"), (4, "linear"), 4])
    model = Network(layers).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.eye(4) if name.endswith("weight") else torch.zeros(4))
    x = torch.zeros(4000, 4, dtype=torch.float64)
    for given, places in (
        ({"input_noise": 0.5}, 1),
        ({"hidden_noise": 0.5}, 2),
        ({"output_noise": 0.5}, 1),
        ({"noise": {"*": 0.5}}, 4),
        ({"noise": {"hid1": 0.5, "out": 0.5}}, 2),
        ({"hidden_noise": {"strength": 0.5, "on": "hid2"}}, 1),
        ({"hidden_noise": rs.UniformNoise(0.75**0.5)}, 2),
        ({"noise": {"hid*": rs.UniformNoise(0.75**0.5), "out": 0.5}}, 3),
        ({"uniformnoise": 0.75**0.5}, 2),
    ):
        with rs.attach(model, keywords.rules(given, keywords.Context(layers))):
            assert model.train()(x).std().item() == pytest.approx(0.5 * places**0.5, rel=0.03)
            assert not model.eval()(x).any()


# What is refused


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"weight_l3": 0.1}, PlanError, r"no keyword 'weight_l3' \(near it: weight_l2, weight_l1, weighted\)$"),
        ({"weight_l1": -0.1}, PenaltyError, "weight_l1=-0.1: a strength is a finite number, zero or more"),
        ({"weight_l1": "0.1"}, PlanError, "expected a number, or a dict"),
        ({"weight_l1": True}, PlanError, "expected a number"),
        ({"weight_l1": float("nan")}, PenaltyError, "finite"),
        ({"weight_l1": {"on": "hid1.*"}}, PlanError, "needs a strength"),
        ({"weight_l1": {"strength": 0.1, "at": "hid1"}}, PlanError, "has no at; a dict has strength, on, how"),
        ({"weight_l1": {"strength": 0.1, "on": "hidden*"}}, SelectionError, r"selects no parameter.*'hid1\.weight'"),
        ({"weight_l2": {"strength": 0.1, "on": "*.bias"}}, SelectionError, "selects no parameter"),
        (
            {"weight_l2": {"strength": 0.1, "how": "sometimes"}},
            HowError,
            "'loss' or 'gradient' or 'decoupled' or 'proximal'",
        ),
        (
            {"weight_l2": 0.1, "weight_decay": 0.1},
            PlanError,
            r"^weight_l2 and weight_decay are names of one thing, L2 on weights: write one.*regularizers=\[.*rs\.L2\(",
        ),
        ({"hidden_l1": {"strength": 0.1, "on": "hidden"}}, PlanError, "matches no layer.*'in', 'hid1', 'out'"),
        ({"hidden_dropout": 1.0}, RestrainError, "from 0 to below 1; got 1.0"),
        ({"dropout": {"hid1": -0.1}}, RestrainError, "from 0 to below 1"),
        ({"dropout": 0.3}, PlanError, "dict of globs over layers.*hidden_dropout"),
        ({"noise": {"hid9": 0.1}}, PlanError, "'hid9' matches no layer.*'hid1'"),
        ({"input_noise": -0.1}, RestrainError, "standard deviation"),
        ({"max_norm": 0.0}, RestrainError, "max_norm=0.0: max_norm= is a finite number above zero"),
        ({"nonnegative": {"on": "hid3.weight"}}, SelectionError, "selects no parameter"),
        ({"contractive": {"strength": 0.1, "reduce": "mean"}}, PlanError, "entrywise"),
        ({"recurrent_norm": 0.1}, PlanError, "needs a recurrent layer.*there are: in, hid1, out"),
        ({"norm": 0.1}, PlanError, r"Norm needs p: write dict\(strength=..., p=...\)"),
        ({"block_dropout": 0.1}, PlanError, r"needs rate, size: write dict\(rate=..., size=...\)"),
        ({"non_negative": 0.1}, PlanError, "NonNegative has no amount: write True, or a dict"),
        ({"weight_norm": True}, PlanError, "train model.module_ in a loop of your own"),
        ({"regularizers": rs.L1()}, PlanError, r"write \.on"),
    ],
    ids=str,
)
def test_refused_with_what_exists(given, error, message):
    model = rs.Classifier([4, 8, 3])
    with pytest.raises(error, match=message):
        model.train((IRIS, RNG.integers(0, 3, 30)), epochs=1, **given)


TWICE = [
    ("weight_l2", "l2"),
    ("weight_decay", "l2"),
    ("weight_l1", "l1"),
    ("grouplasso", "group_lasso"),
    ("tv", "total_variation"),
    ("totalvariation", "tv"),
    ("max_norm", "maxnorm"),
    ("nonnegative", "non_negative"),
    ("slope", "owl"),
    ("hidden_noise", "gaussiannoise"),
    ("gaussian_noise", "gaussiannoise"),
    ("drop_path", "stochastic_depth"),
    ("kl_sparsity", "klsparsity"),
    ("recurrent_state", "state_change"),
    ("recurrent_norm", "normchange"),
    ("decov", "decorrelation"),
]


@pytest.mark.parametrize("names", TWICE, ids="+".join)
def test_two_names_of_one_thing_are_refused(names):
    layers = resolve([4, (5, "rnn"), 3])
    for pair in (names, names[::-1]):
        with pytest.raises(PlanError, match=f"^{pair[0]} and {pair[1]} are names of one thing, "):
            keywords.rules(dict.fromkeys(pair, 0.1), keywords.Context(layers))
        one = {pair[0]: 0.1, pair[1]: None}
        for off in (None, False, *([] if pair[1] in keywords.CONSTRAINTS else [0, 0.0])):
            keywords._refuse_aliases(
                [name for name, value in {**one, pair[1]: off}.items() if keywords._acts(name, value)]
            )


def test_every_two_names_of_one_class_are_names_of_one_thing():
    """Whatever is registered; and what acts elsewhere, or is of another class, goes together."""
    known = keywords.names()
    for name in registry.names():
        same = {other for other in registry.names() if registry.lookup(other) is registry.lookup(name)}
        if name not in keywords.OWN:
            assert same - set(keywords.OWN) <= set(keywords.aliases(name, known)), name
    together = ["weight_l1", "hidden_l1", "weight_l2", "input_noise", "hidden_noise", "output_noise", "noise",
                "input_dropout", "hidden_dropout", "dropout", "max_norm", "grouplasso", "contractive", "jacobiannorm",
                "recurrent_norm", "recurrent_state", "nonnegative", "quartic", "unitnorm"]  # fmt: skip
    for name in together:
        assert keywords.aliases(name, together) == [name]


def test_an_alias_in_a_call_takes_the_place_of_the_models_own():
    model = rs.Classifier([4, 8, 3], weight_l2=0.1, group_lasso=0.1, epochs=1)
    data = (IRIS, RNG.integers(0, 3, 30))
    model.train(data, l2=0.2).train(data, grouplasso=0.3).train(data)
    rows = [sorted(set(row) & {"weight_l2", "l2", "group_lasso", "grouplasso"}) for row in model.history_]
    assert rows == [["group_lasso", "l2"], ["grouplasso", "weight_l2"], ["group_lasso", "weight_l2"]]
    with pytest.raises(PlanError, match="weight_l2 and l2 are names of one"):
        model.set_params(l2=0.1).fit(*data)


def test_a_network_without_hidden_layers_has_no_hidden_keywords():
    with pytest.raises(PlanError, match="needs a layer between input and output; there are: in, out"):
        rs.Regressor(hidden=(), hidden_l1=0.1).fit(IRIS, IRIS[:, 0])


def test_the_moment_of_all_penalties_on_weights():
    model = rs.Regressor(hidden=(20,), weight_l1=0.05, how="proximal", epochs=150, random_state=0)
    with pytest.warns(RestrainWarning, match="has emptied|all zeros"):
        model.fit(IRIS, 0.01 * IRIS[:, 0], weight_l1=10.0)
    assert not model.module_.hid1.weight.any()
    model.fit(IRIS, IRIS[:, 0])
    zeros = [(p == 0).float().mean().item() for name, p in model.module_.named_parameters() if "weight" in name]
    assert 0.1 < zeros[0] < 1


def test_a_code_that_a_rule_empties_is_warned_about():
    model = rs.Autoencoder([4, (6, "relu"), 4], algo="sgd", learning_rate=0.05, epochs=40, random_state=0)
    with pytest.warns(RestrainWarning, match="'hidden_l1' has emptied 'hid1'"):
        model.fit(IRIS, hidden_l1=30.0)


def test_keywords_of_train_last_for_that_call():
    model = rs.Classifier([4, 8, 3], weight_l2=0.1, epochs=1)
    data = (IRIS, RNG.integers(0, 3, 30))
    model.train(data, weight_l2=None, hidden_l1=0.1).train(data, weight_decay=0.2).train(data)
    assert [sorted(set(row) & {"weight_l2", "weight_decay", "hidden_l1"}) for row in model.history_] == [
        ["hidden_l1"],
        ["weight_decay"],
        ["weight_l2"],
    ]
    assert model.weight_l2 == 0.1


def test_contractive_behind_a_batchnorm_is_refused():
    with pytest.raises(PlanError, match="depend on the other samples: use layernorm"):
        rs.Autoencoder([4, 8, "batchnorm", 4]).train(IRIS, contractive=0.1)
    rs.Autoencoder([4, 8, "layernorm", 5, 4], epochs=1).train(IRIS, contractive=0.1)


# Words of other libraries


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("kind", "factor", "scale"), [("Classifier", 2, 1), ("Regressor", 1, 2)])
def test_alpha_of_scikit_learn_is_what_the_error_says(kind, factor, scale):
    """Its loss is ours (of a regressor half of ours), for its alpha = weight_l2 · factor · batch size."""
    from sklearn import neural_network

    alpha, y = 0.7, RNG.integers(0, 3, 30)
    settings = {"alpha": alpha, "solver": "sgd", "learning_rate_init": 1e-12, "momentum": 0, "max_iter": 1}
    reference = getattr(neural_network, f"MLP{kind}")(
        hidden_layer_sizes=(8,), activation="tanh", batch_size=30, **settings
    )
    reference.fit(IRIS, y)
    given = {"algo": "sgd", "learning_rate": 0.0, "epochs": 1, "batch_size": 30, "normalize": False}
    model = getattr(rs, kind)(hidden=(8,), activation="tanh", **given)
    model.fit(IRIS, y, weight_l2=alpha / (factor * 30))
    with torch.no_grad():
        for name, weight, bias in zip(("hid1", "out"), reference.coefs_, reference.intercepts_, strict=True):
            model.module_.get_submodule(name).weight.copy_(torch.tensor(weight.T))
            model.module_.get_submodule(name).bias.copy_(torch.tensor(bias))
    loss = model.train((IRIS, y), weight_l2=alpha / (factor * 30)).history_[-1]["loss"]
    assert loss == pytest.approx(scale * reference.loss_, rel=1e-9)


@pytest.mark.parametrize("word", keywords.WORDS)
def test_a_word_of_another_library_is_told_in_ours_in_one_line(word):
    assert word not in rs.Classifier().get_params()
    for call in (lambda: rs.Regressor(**{word: 1}), lambda: rs.Regressor([4, 1]).fit(IRIS, IRIS[:, 0], **{word: 1})):
        with pytest.raises(PlanError, match=f"^Regressor has no keyword '{word}': write ") as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 200
    ours = set(re.findall(r"(\w+)=", keywords.WORDS[word]))
    assert ours <= set(rs.Regressor().get_params())
    assert ours


def test_words_beside_other_mistakes():
    with pytest.raises(PlanError, match=r"no keyword 'max_iter': write epochs=; 'epoch' \(near it: epochs\)$"):
        rs.Classifier(max_iter=3, epoch=3)
    with pytest.raises(PlanError, match=r"no keyword 'zzz'; there are: layers, hidden, .* and \d+ more$") as caught:
        rs.Classifier(zzz=3)
    assert len(str(caught.value)) < 300
