"""The situations that people bring: each must be one line, and give the numbers of the loop written by hand."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso
from torch import nn
from torch.nn import functional as F

import restrain as rs


def classifier():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def data(n=9, features=5, classes=3):
    g = torch.Generator().manual_seed(4)
    return torch.randn(n, features, dtype=torch.float64, generator=g), torch.randint(classes, (n,), generator=g)


def gradients_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


# (a) Flux's plain functions over parameters and layer activations


def test_squared_norm_of_all_parameters_by_hand():
    model, (x, y) = classifier(), data()
    got = F.cross_entropy(model(x), y) + 0.1 * rs.L2()(model.parameters())
    expected = F.cross_entropy(model(x), y) + 0.1 * sum((p**2).sum() for p in model.parameters())
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model))


def test_squared_norm_of_one_layers_weight_by_hand():
    model, (x, y) = classifier(), data()
    got = F.cross_entropy(model(x), y) + 0.1 * rs.L2()(model[2].weight)
    expected = F.cross_entropy(model(x), y) + 0.1 * (model[2].weight ** 2).sum()
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model))


def test_penalty_on_every_layers_output_of_a_chain():
    model, (x, y) = classifier(), data()
    reg = rs.attach(model, 0.1 * rs.L1().on(rs.outputs("*")))
    got = reg.loss(F.cross_entropy(model(x), y))
    h, total = x, 0
    for layer in model:
        h = layer(h)
        total = total + 0.1 * h.abs().sum() / len(x)
    expected = F.cross_entropy(h, y) + total
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model))
    reg.detach()
    by_activations = F.cross_entropy(model(x), y) + 0.1 * rs.L1()(rs.activations(model, x)) / len(x)
    torch.testing.assert_close(by_activations, expected)


# (b) L1 on the output of one ReLU of a module whose code is not touched


class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU()

    def forward(self, x):
        a = self.relu(self.fc1(x))
        b = F.relu(self.fc2(self.relu(a - 0.1)))
        return self.fc3(b)


@pytest.mark.parametrize(
    ("place", "tensors"),
    [
        (rs.outputs("relu"), lambda a, again, b: (a, again)),
        (rs.outputs("fc2", via=torch.relu), lambda a, again, b: (b,)),
        (rs.outputs("fc2", via=F.relu), lambda a, again, b: (b,)),
    ],
    ids=["reused module", "torch.relu", "F.relu"],
)
def test_l1_on_the_output_of_one_relu(place, tensors):
    torch.manual_seed(0)
    model, (x, y) = Theirs().double(), data()
    reg = rs.attach(model, 0.2 * rs.L1().on(place))
    got = reg.loss(F.cross_entropy(model(x), y))
    a = model.fc1(x).relu()
    again = (a - 0.1).relu()
    b = model.fc2(again).relu()
    penalised = tensors(a, again, b)
    penalty = 0.2 * sum(t.abs().sum() / len(x) for t in penalised) / len(penalised)
    expected = F.cross_entropy(model.fc3(b), y) + penalty
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model))


def test_two_layers_with_different_strengths_and_one_layers_weights_only():
    model, (x, y) = classifier(), data()
    plan = [
        0.1 * rs.L1().on(rs.outputs("1")),
        0.7 * rs.L1().on(rs.outputs("3")),
        0.3 * rs.L2().on(model[4].weight),
    ]
    got = rs.attach(model, plan).loss(F.cross_entropy(model(x), y))
    a = torch.tanh(model[0](x))
    b = model[2](a).relu()
    penalty = 0.1 * a.abs().sum() / len(x) + 0.7 * b.abs().sum() / len(x) + 0.3 * model[4].weight.square().sum()
    expected = F.cross_entropy(model[4](b), y) + penalty
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model))


# (c) declared at the layer, or once for a scope


def test_declared_rules_are_collected_from_a_nested_model_and_its_deep_copy():
    with rs.scope(weight=0.1 * rs.L2()):
        inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        with rs.scope(weight=0.5 * rs.L1()):
            inner.append(nn.Linear(5, 4))
    layer = rs.regularized(nn.Linear(4, 3), weight=0.2 * rs.L2(), output=0.3 * rs.L1())
    model = nn.Sequential(inner, nn.Sequential(nn.ReLU(), layer)).double()
    x, y = data()
    for net in (model, copy.deepcopy(model)):
        with rs.attach(net) as reg:
            got = reg.loss(F.cross_entropy(net(x), y))
            last = net(x)
            penalty = (
                0.1 * net[0][0].weight.square().sum()
                + 0.5 * net[0][2].weight.abs().sum()
                + 0.2 * net[1][1].weight.square().sum()
                + 0.3 * last.abs().sum() / len(x)
            )
            expected = F.cross_entropy(last, y) + penalty
            torch.testing.assert_close(gradients_of(got, net), gradients_of(expected, net))


# (d) noise and dropout on inputs and hidden layers; own penalties


def test_noise_and_dropout_see_to_inputs_and_hidden_layers_but_not_to_targets():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(2000, 4, dtype=torch.float64)
    plan = [rs.GaussianNoise(0.5).on(rs.inputs()), rs.Dropout(0.25).on(rs.outputs("1"))]
    with rs.attach(model, plan) as reg, rs.recording(model, "0", copy=False), torch.no_grad():
        seen = []
        handles = [model[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))]
        handles += [model[2].register_forward_pre_hook(lambda m, a: seen.append(a[0]))]
        before = x.clone()
        rebuilt = model(x)
        assert torch.equal(x, before), "the clean input, which the loss compares with, must not change"
        noise = seen[0] - x
        assert abs(float(noise.mean())) < 4 * 0.5 / 8000**0.5
        assert abs(float(noise.std()) - 0.5) < 4 * 0.5 / 16000**0.5
        hidden = model[1](model[0](seen[0]))
        # the layers called alone are hooked too, so the clean value is the undropped entry's
        kept = seen[1] != 0
        alive = (model[0](seen[0]) > 0).double().mean()
        assert abs(float(kept.double().mean() / alive) - 0.75) < 0.03
        assert hidden.shape == seen[1].shape
        assert float(reg.loss((rebuilt - x).square().mean())) == pytest.approx(float((rebuilt - x).square().mean()))
        model.eval()
        assert torch.equal(model(x), model(x))
        for handle in handles:
            handle.remove()


def test_a_users_own_penalty_without_prox_and_with_one():
    class InverseLength(rs.Penalty):
        """Sum over units of one over the squared length of their incoming weights."""

        def __call__(self, w):
            return (1 / w.square().sum(1)).sum()

    class HalfSquare(rs.Penalty):
        """Half the sum of squares, with its prox."""

        entrywise = True

        def __call__(self, w):
            return w.square().sum() / 2

        def prox(self, w, step=1.0):
            return w / (1 + step)

    model, (x, y) = classifier(), data()
    got = rs.attach(model, 1e-2 * InverseLength().on("0.weight")).loss(F.cross_entropy(model(x), y))
    expected = F.cross_entropy(model(x), y) + 1e-2 * (1 / model[0].weight.square().sum(1)).sum()
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(rs.errors.NoProxError, match="L1"):
        rs.attach(model, InverseLength().on("0.weight", how="proximal"), optimizer)
    rs.attach(model, 0.5 * HalfSquare().on("0.weight", how="proximal"), optimizer)
    before = model[0].weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    grad = model[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), (before - 0.1 * grad) / (1 + 0.1 * 0.5))


# (e) L1 at each layer of a regression net; non-negative weights


def test_l1_at_each_layer_and_non_negative_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    x = data()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = rs.attach(model, [0.1 * rs.L1().on(rs.weights), rs.NonNegative().on(rs.weights)], optimizer)
    assert all((layer.weight >= 0).all() for layer in (model[0], model[2])), "holds from the beginning"
    for _ in range(20):
        loss = reg.loss((model(x) - x.sum(1, keepdim=True)).square().mean())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all((layer.weight >= 0).all() for layer in (model[0], model[2]))
    assert not (model[0].bias >= 0).all(), "biases are no weights"
    assert list(reg.values()) == ["0.1 * L1() on rs.weights"]


# scikit-learn's own answers on real data


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.5),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.5, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=20.0),
}


def fit_diabetes(make, plan, steps=6000):
    x, y = (torch.tensor(a, dtype=torch.float64) for a in load_diabetes(return_X_y=True))
    x = x / x.std(0, unbiased=False)
    model = nn.Linear(10, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, float(y.mean()))
    optimizer = make(model.parameters())
    rs.attach(model, plan, optimizer)
    schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if "Adam" in type(optimizer).__name__ else None
    )
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x)[:, 0] - y).square().mean() / 2).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model.weight.detach().numpy()[0], x.numpy(), y.numpy()


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "name",
    [one if one in ("SGD", "Adam", "RMSprop") else pytest.param(one, marks=pytest.mark.slow) for one in OPTIMIZERS],
)
def test_diabetes_lasso_is_scikit_learns(name):
    w, x, y = fit_diabetes(OPTIMIZERS[name], 5.0 * rs.L1().on("weight", how="proximal"))
    expected = Lasso(alpha=5.0, tol=1e-14, max_iter=10**6).fit(x, y).coef_
    assert np.array_equal(w == 0, expected == 0)
    assert 0 < (w == 0).sum() < 10
    np.testing.assert_allclose(w, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", pytest.param("momentum", marks=pytest.mark.slow), "Adam"])
def test_diabetes_positive_elastic_net_is_scikit_learns(name):
    alpha, ratio = 1.0, 0.8
    penalty = rs.ElasticNet(alpha * ratio, alpha * (1 - ratio) / 2)
    plan = [penalty.on("weight", how="proximal"), rs.NonNegative().on("weight")]
    w, x, y = fit_diabetes(OPTIMIZERS[name], plan)
    reference = ElasticNet(alpha=alpha, l1_ratio=ratio, positive=True, tol=1e-14, max_iter=10**6).fit(x, y)
    assert np.array_equal(w == 0, reference.coef_ == 0)
    assert 0 < (w == 0).sum() < 10
    np.testing.assert_allclose(w, reference.coef_, atol=1e-6)
