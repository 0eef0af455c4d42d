"""Which parameters the rules at a step touch, and which they leave alone; gradient mode is loss mode."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import NoProxError


def make():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def train(model, optimizer, reg, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(model(X), Y)).backward()
        optimizer.step()


# Gradient mode

STRENGTHS = st.floats(0, 0.5)
LEAVES = st.sampled_from([rs.L1(), rs.L2(), rs.GroupLasso("in"), rs.GroupLasso("out"), rs.GroupLasso(0)])
LEAVES = LEAVES | st.builds(rs.Norm, st.floats(1, 4)) | st.builds(rs.ElasticNet, STRENGTHS, STRENGTHS)
PENALTIES = st.lists(st.builds(lambda c, p: c * p, STRENGTHS, LEAVES), min_size=1, max_size=3).map(sum)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.0, dampening=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True, momentum=0.3),
}
RULES = st.lists(
    st.tuples(PENALTIES, st.sampled_from(["*.weight", "0.weight", "2.*eight"]), st.integers(1, 3)),
    min_size=1,
    max_size=3,
)


def trained(how, rules, name, steps, strength=1.0):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    plan = [strength * penalty.on(where, how=how, every=every) for penalty, where, every in rules]
    with rs.attach(model, plan, optimizer) as reg:
        train(model, optimizer, reg, steps)
    return [p.detach() for p in model.parameters()]


@given(RULES, st.sampled_from(list(OPTIMIZERS)), st.integers(1, 6))
def test_gradient_mode_equals_loss_mode(rules, name, steps):
    by_loss, by_gradient = (trained(how, rules, name, steps) for how in ("loss", "gradient"))
    torch.testing.assert_close(by_gradient, by_loss, rtol=1e-8, atol=1e-10)


def test_a_slightly_different_strength_is_noticed():
    rules = [(0.1 * rs.L1() + 0.1 * rs.GroupLasso("in"), "*.weight", 2)]
    for name in OPTIMIZERS:
        by_loss, by_gradient = trained("loss", rules, name, 3), trained("gradient", rules, name, 3, 1.001)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(by_gradient, by_loss, rtol=1e-8, atol=1e-10)


# What is left alone


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_gradient_are_left_alone(name, how):
    model = make()
    model.append(nn.Linear(3, 3).double())
    optimizer = OPTIMIZERS[name](model.parameters())
    rs.attach(model, 0.3 * rs.L1().on("*.weight", how=how), optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model[2](model[1](model[0](X))).sum().backward()  # the last layer has no part in it
        optimizer.step()
    assert torch.equal(model[3].weight, before["3.weight"])
    assert model[3].weight.grad is None
    assert not torch.isclose(model[2].weight, before["2.weight"]).any()


@pytest.mark.parametrize("how", ["decoupled", "proximal", "project", "gradient", "loss"])
def test_gradients_of_other_parameters_stay_as_they_are(how):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rule = rs.MaxNorm(0.1).on("0.weight") if how == "project" else rs.L2().on("0.weight", how=how)
    reg = rs.attach(model, rule, optimizer)
    data_loss = F.cross_entropy(model(X), Y)
    expected = torch.autograd.grad(data_loss, list(model.parameters()), retain_graph=True)
    reg.loss(data_loss).backward()
    optimizer.step()
    acts_on_gradients = how in ("gradient", "loss")
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(p.grad, g) == (not (acts_on_gradients and name == "0.weight"))


def snapshot(optimizer):
    return copy.deepcopy([{**optimizer.state[p]} for g in optimizer.param_groups for p in g["params"]])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_state_is_left_alone(name):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(snapshot(optimizer)))  # before ours
    rules = [0.1 * rs.L1().on("*.weight", how="proximal"), rs.MaxNorm(0.5).on("*.weight")]
    reg = rs.attach(model, rules, optimizer)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in copy.deepcopy(optimizer.param_groups)]
    for _ in range(3):
        train(model, optimizer, reg, 1)
        for now, then in zip(snapshot(optimizer), seen[-1], strict=True):
            assert now.keys() == then.keys()
            torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups


# Frozen, unfrozen, added


def reference(w, how, rate=0.1, active=True):
    """A step of SGD for ½ Σ (w - 1)² with the rule 0.5 Σ|w|, or with all entries held at 0 or above."""
    gradient = w - 1 + (0.5 * np.sign(w) if active and how in ("loss", "gradient") else 0)
    decay = np.sign(w) * np.minimum(np.abs(w), rate * 0.5) if active and how == "decoupled" else 0
    w = w - decay - rate * gradient
    if active and how == "proximal":
        w = np.sign(w) * np.maximum(np.abs(w) - rate * 0.5, 0)
    return np.maximum(w, 0) if active and how == "project" else w


def rule(how, where="*"):
    return rs.NonNegative().on(where) if how == "project" else 0.5 * rs.L1().on(where, how=how)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(t) for t in torch.linspace(-2, 2, 10, dtype=torch.float64).view(2, 5))

    def forward(self):
        return sum((p - 1).square().sum() / 2 for p in (self.a, self.b) if p.requires_grad)


def step(model, optimizer, reg):
    optimizer.zero_grad()
    reg.loss(model()).backward()
    optimizer.step()


@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal", "project"])
def test_a_parameter_that_is_frozen_and_unfrozen_in_mid_training(how):
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rule(how), optimizer)
    a, b = (p.detach().numpy().copy() for p in (model.a, model.b))
    for t in range(9):
        frozen = 3 <= t < 6
        model.a.requires_grad_(not frozen)
        if t == 4:
            with torch.no_grad():
                model.a.fill_(-3.0)  # no constraint holds for what is frozen
            a[:] = -3.0
        step(model, optimizer, reg)
        a, b = a if frozen else reference(a, how), reference(b, how)
        np.testing.assert_allclose(model.a.detach().numpy(), a, rtol=1e-12)
        np.testing.assert_allclose(model.b.detach().numpy(), b, rtol=1e-12)


@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal", "project"])
def test_a_parameter_that_joins_the_optimizer_later(how):
    model = Two()
    model.a.requires_grad_(False)
    optimizer = torch.optim.SGD([model.b], lr=0.1)
    reg = rs.attach(model, rule(how), optimizer)
    a, b = (p.detach().numpy().copy() for p in (model.a, model.b))
    assert a.min() < 0, "a frozen parameter isn't projected"
    for t in range(6):
        if t == 3:
            model.a.requires_grad_(True)
            optimizer.add_param_group({"params": [model.a], "lr": 0.02})
        step(model, optimizer, reg)
        a, b = a if t < 3 else reference(a, how, rate=0.02), reference(b, how)
        np.testing.assert_allclose(model.a.detach().numpy(), a, rtol=1e-12)
        np.testing.assert_allclose(model.b.detach().numpy(), b, rtol=1e-12)


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal", "project"])
def test_rules_leave_a_frozen_parameter_alone_although_its_old_gradient_moves_it(how):
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rule(how), optimizer)
    model().backward()
    a, b = (p.detach().numpy().copy() for p in (model.a, model.b))
    model.a.requires_grad_(False)
    optimizer.step()
    np.testing.assert_allclose(model.a.detach().numpy(), reference(a, how, active=False), rtol=1e-12)
    np.testing.assert_allclose(model.b.detach().numpy(), reference(b, how), rtol=1e-12)
    assert reg.state_dict()["optimizer_steps"] == [1]


def test_two_optimizers_with_a_part_each():
    model = Two()
    optimizers = [torch.optim.SGD([model.a], lr=0.1), torch.optim.SGD([model.b], lr=0.02)]
    reg = rs.attach(model, [rule("proximal", "a"), rule("project", "b")], optimizers)
    a, b = model.a.detach().numpy().copy(), np.maximum(model.b.detach().numpy(), 0)
    for t in range(4):
        model.zero_grad()
        model().backward()
        optimizers[0].step()
        a = reference(a, "proximal")
        if t % 2:
            optimizers[1].step()
            b = reference(b, "project", rate=0.02)
        np.testing.assert_allclose(model.a.detach().numpy(), a, rtol=1e-12)
        np.testing.assert_allclose(model.b.detach().numpy(), b, rtol=1e-12)
    assert reg.state_dict()["optimizer_steps"] == [4, 2]


# Variants of Adam


VARIANTS = {
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "rate in a tensor": {"lr": torch.tensor(0.05, dtype=torch.float64), "foreach": False},
    "rate in a tensor, fused": {"lr": torch.tensor(0.05, dtype=torch.float64), "fused": True},
}


def proximal_adam(cls, device="cpu", **options):
    model = make().to(device)
    optimizer = cls(model.parameters(), **{"lr": 0.05, "weight_decay": 0.0, **options})
    rules = [0.05 * rs.GroupLasso("in").on("*.weight", how="proximal"), 0.1 * rs.L1().on("*.bias", how="proximal")]
    rs.attach(model, rules, optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(device)), Y.to(device)).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_adam_give_the_same(name, cls, amsgrad):
    expected = proximal_adam(cls, amsgrad=amsgrad)
    got = proximal_adam(cls, amsgrad=amsgrad, **VARIANTS[name])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert any((p == 0).any() for p in expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_variants_of_adam_on_a_gpu_give_the_same():
    expected = proximal_adam(torch.optim.Adam)
    for options in ({}, {"capturable": True}, {"fused": True, "capturable": True}, {"fused": True}, {"foreach": True}):
        got = proximal_adam(torch.optim.Adam, "cuda", **options)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


# Constraints


def lengths(w, axis):
    return np.sqrt((np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1) ** 2).sum(1))


HOLDS = {
    "MaxNorm out": (rs.MaxNorm(0.5), lambda w: (lengths(w, 0) <= 0.5 * (1 + 1e-12)).all()),
    "MaxNorm in": (rs.MaxNorm(0.5, per="in"), lambda w: (lengths(w, 1) <= 0.5 * (1 + 1e-12)).all()),
    "UnitNorm": (rs.UnitNorm(), lambda w: np.allclose(lengths(w, 0), 1, rtol=1e-12)),
    "UnitNorm column": (rs.UnitNorm("column"), lambda w: np.allclose(lengths(w, 1), 1, rtol=1e-12)),
    "NonNegative": (rs.NonNegative(), lambda w: (w >= 0).all()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("constraint", HOLDS)
def test_constraints_hold_after_every_step(constraint, name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3)).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    what, holds = HOLDS[constraint]
    weights = [model[0].weight, model[2].weight]
    assert not all(holds(w.detach().numpy()) for w in weights), "the oracle notices that it doesn't hold"
    rs.attach(model, what.on(rs.weights), optimizer)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    for _ in range(10):
        assert all(holds(w.detach().numpy()) for w in weights)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), Y[:6]) - weights[0].sum() - weights[1].square().sum()).backward()
        optimizer.step()
    assert all(holds(w.detach().numpy()) for w in weights)


@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal"])
def test_the_mean_is_the_same_at_every_moment(how):
    """Of a square under plain SGD: w (1 - 2 lr c / n), and for the prox w / (1 + 2 lr c / n)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reg = rs.attach(model, 0.7 * rs.L2().on("*.weight", how=how, reduce="mean"), optimizer)
    before = [layer.weight.detach().clone() for layer in model]
    reg.loss(0 * model(torch.ones(1, 3)).sum()).backward()
    optimizer.step()
    for layer, w in zip(model, before, strict=True):
        pull = 2 * 0.5 * 0.7 / w.numel() / 2
        torch.testing.assert_close(layer.weight.detach(), w / (1 + pull) if how == "proximal" else w * (1 - pull))


@pytest.mark.parametrize("strength", [0.1, rs.schedules.WarmUp(10)])
@pytest.mark.parametrize("penalty", [rs.Hoyer(), rs.Orthogonality(rows="out"), rs.Distance(rs.Hoyer())], ids=str)
def test_what_has_no_prox_is_refused_at_attach_whatever_its_strength(penalty, strength):
    layer = torch.nn.Linear(4, 3)
    with pytest.raises(NoProxError, match=r"how='proximal' on 'weight'.*has no known prox") as told:
        rs.attach(layer, (strength * penalty).on("weight", how="proximal"), torch.optim.SGD(layer.parameters(), lr=0.1))
    assert "Grouping" not in str(told.value)
