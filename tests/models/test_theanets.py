"""The numbers of theanets that have the same definition here, under `reduce="mean"`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import restrain as rs
from restrain.models import keywords
from restrain.models.layers import Network
from restrain.models.specs import resolve

DATA = json.loads((Path(__file__).parents[1] / "data" / "theanets.json").read_text("utf-8"))
CASES = [(case, penalty) for case in DATA["cases"] for penalty in case["penalties"]]
OURS = {"w": "weight", "b": "bias", "xh": "weight_ih_l0", "hh": "weight_hh_l0"}


class WeightInverse(rs.Penalty):
    """theanets' example of a penalty of one's own."""

    def __call__(self, w):
        return (1 / w.square().sum(1)).sum()


def our_name(name, layers):
    layer, kind = name.split(".")
    return f"{layer}.{'bias_ih_l0' if kind == 'b' and 'rnn' in str(layers) and layer == 'hid1' else OURS[kind]}"


def ours(tensors, layers):
    """theanets' parameters (or gradients) under our names and in our layout."""
    return {our_name(n, layers): torch.tensor(np.array(v).T) for n, v in tensors.items()}


def specifications(layers):
    return [tuple(layer) if isinstance(layer, list) else layer for layer in layers]


def network(layers, parameters):
    specs = [(5, "rnn", "relu") if layer == (5, "rnn") else layer for layer in specifications(layers)]
    made = resolve(specs)
    model = Network(made).double()
    state = ours(parameters, layers)
    for name, p in model.named_parameters():
        p.data = state.get(name, torch.zeros_like(p))
    return model, made


def data_loss(case, output):
    target = torch.tensor(np.array(case["x"] if case["target"] is None else case["target"]))
    if case["model"] == "Classifier":
        return F.cross_entropy(output, target)
    return (output - target.double()).square().mean()


def our_keywords(given):
    """theanets' keywords in our words, all by the mean."""
    if "regularizers" in given:
        return our_keywords(given["regularizers"])
    found = {}
    for name, value in given.items():
        spec = value if isinstance(value, dict) else {"weight": value}
        ours = {"strength": spec["weight"]}
        if name != "weightinverse":
            ours["reduce"] = "mean"
        if "pattern" in spec:
            patterns = [spec["pattern"]] if isinstance(spec["pattern"], str) else spec["pattern"]
            words = {"hid1.w": "hid1.weight", "out.w": "out.weight", "hid1.hh": "hid1.weight_hh*", "hid1:out": "hid1"}
            ours["on"] = [words.get(pattern, pattern) for pattern in patterns]
        found[name] = ours
    return found


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: case["name"])
def test_networks_and_data_losses(case):
    model, _ = network(case["layers"], case["params"])
    output = model(torch.tensor(case["x"], dtype=torch.float64))
    shown = torch.softmax(output, -1) if case["model"] == "Classifier" else output
    np.testing.assert_allclose(shown.detach(), case["output"], rtol=1e-10)
    assert data_loss(case, output).item() == pytest.approx(case["data_loss"]["value"], rel=1e-11)


@pytest.mark.parametrize(("case", "penalty"), CASES, ids=lambda one: one.get("name") or one["id"])
def test_penalties_and_their_gradients(case, penalty):
    model, layers = network(case["layers"], case["params"])
    plan = keywords.rules(our_keywords(penalty["kwargs"]), keywords.Context(layers))
    with rs.attach(model, plan) as reg:
        model(torch.tensor(case["x"], dtype=torch.float64))
        value = reg.penalty()
        assert value.item() == pytest.approx(penalty["weighted_value"], rel=1e-11)
        value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in ours(penalty["weighted_grads"], case["layers"]).items():
        found = gradients[name] if gradients[name] is not None else torch.zeros_like(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_the_comparison_notices_another_definition():
    case, penalty = next((c, p) for c, p in CASES if p["id"] == "hidden_l1")
    model, layers = network(case["layers"], case["params"])
    plan = keywords.rules({"hidden_l1": 0.1}, keywords.Context(layers))
    with rs.attach(model, plan) as reg:
        model(torch.tensor(case["x"], dtype=torch.float64))
        assert reg.penalty().item() == pytest.approx(8 * penalty["weighted_value"], rel=1e-11)  # 8 units a row


def started(case, **given):
    """An estimator with theanets' parameters, as yet untrained."""
    cls = {"Classifier": rs.Classifier, "Regressor": rs.Regressor}[case["model"]]
    model = cls(specifications(case["layers"]), batch_size=7, shuffle=False, **given)
    data = (np.array(case["x"]), np.array(case["target"]))
    model.train(data, algo="sgd", learning_rate=0.0, epochs=1)
    model.module_.load_state_dict(ours(case.get("start") or case["params"], case["layers"]))
    return model, data


@pytest.mark.parametrize("case", DATA["losses"], ids=lambda case: case["loss"])
def test_data_losses_with_and_without_weights(case):
    model, data = started(case)
    before = {name: p.detach().clone() for name, p in model.module_.named_parameters()}
    if case["weighted"]:
        data = (*data, np.array(case["weights"]))
    model.train(data, algo="sgd", learning_rate=1.0, epochs=1)
    assert model.history_[-1]["data_loss"] == pytest.approx(case["value"], rel=1e-11)
    for name, gradient in ours(case["grads"], case["layers"]).items():
        step = before[name] - model.module_.get_parameter(name).detach()
        np.testing.assert_allclose(step, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", DATA["trajectories"], ids=lambda case: case["algo"])
def test_trajectories(case):
    model, data = started(case)
    rules = {name: {"strength": s, "reduce": "mean"} for name, s in case["regularizers"].items()}
    # downhill's Adam is another from its second step on (its averages have half-lives)
    steps, tolerance = (case["steps"], 1e-10) if case["algo"] == "sgd" else (case["steps"][:1], 1e-6)
    run = model.itertrain(data, algo=case["algo"], epochs=len(steps), **case["hyper"], **rules)
    for step, (train, _) in zip(steps, run, strict=True):
        assert train["loss"] == pytest.approx(step["loss"], rel=tolerance)
        assert train["data_loss"] == pytest.approx(step["err"], rel=tolerance)
        assert train["acc"] == pytest.approx(step["acc"])
        for name, expected in ours(step["params"], case["layers"]).items():
            found = model.module_.get_parameter(name).detach()
            np.testing.assert_allclose(found, expected, rtol=10 * tolerance, atol=tolerance)
