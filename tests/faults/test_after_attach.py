"""What changes after attach: the model (A7), the default device (A12), tensors that rules were given (A14)."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from faults.helpers import right_or_refused, sgd
from restrain.errors import DetachedError

# A7: rules that stay behind the model


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def stepped(plan):
    """Return a model with rules after a step, and the rules."""
    model = net()
    optimizer = sgd(model, lr=0.01)
    reg = rs.attach(model, plan, optimizer)
    reg.loss(model(torch.randn(3, 4)).square().mean()).backward()
    optimizer.step()
    return model, reg


def test_a_rule_on_outputs_follows_a_layer_that_is_replaced_or_says_so():
    model, reg = stepped([rs.L1().on(rs.outputs("2"), name="last"), rs.L1().on(rs.outputs("1"), name="hidden")])
    model[2] = nn.Linear(8, 2)
    x = torch.randn(5, 4)

    def penalty():
        loss = model(x).square().mean()
        return (reg.loss(loss) - loss).detach()

    right = (model(x).abs().sum() + F.relu(model[0](x)).abs().sum()).detach() / 5
    right_or_refused(penalty, right, names="2")


def test_noise_follows_a_layer_that_is_replaced_or_says_so():
    model, reg = stepped([rs.Dropout(0.5).on(rs.outputs("2")), rs.L1().on("0.weight")])
    model[2] = nn.Linear(8, 200)

    def share():
        out = model(torch.randn(50, 4))
        reg.loss(out.sum())
        return (out == 0).float().mean()

    right_or_refused(share, 0.5, names="2", rtol=0, atol=0.05)  # 10,000 draws: 0.005


def test_noise_on_weights_follows_a_layer_that_is_replaced_or_says_so():
    model, reg = stepped([rs.DropConnect(0.5).on("2.weight"), rs.L1().on("0.weight")])
    model[2] = nn.Linear(8, 2)

    def varies():
        out = torch.stack([model(torch.ones(1, 4)) for _ in range(20)])
        reg.loss(out.sum())
        return out.std(0).max() > 1e-3

    right_or_refused(varies, True, names="2")


def test_a_rule_on_parameters_follows_a_layer_that_is_replaced():
    model, reg = stepped([rs.L1().on("2.weight")])
    model[2] = nn.Linear(8, 2)
    torch.testing.assert_close(reg.penalty().detach(), model[2].weight.detach().abs().sum())


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)

    def tie_weights(self):
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


RESIZED = {
    "groups": (lambda: rs.GroupLasso(per="out").on("weight"), 5 * 2 * 4**0.5),
    "entries": (lambda: rs.L2().on("weight"), 20.0),
    "a distance": (lambda: rs.Distance().on("weight"), None),
    "weights by entry": (lambda: rs.Weighted(rs.L1(), torch.ones(3, 4)).on("weight"), None),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_parameter_that_is_resized_in_place_is_followed_or_refused(name):
    rule, right = RESIZED[name]
    model = nn.Linear(4, 3, bias=False)
    reg = rs.attach(model, rule())
    reg.loss(model(torch.ones(1, 4)).sum())
    model.weight.data = torch.ones(5, 4)
    if right is not None:
        assert reg.loss(torch.zeros(())).item() == pytest.approx(right)
    else:
        with pytest.raises(DetachedError, match=r"can't follow.*reg\.detach\(\)"):
            reg.loss(torch.zeros(()))


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_weights_that_are_tied_after_attach_count_once(how):
    model = Language()
    optimizer = sgd(model, lr=1.0)
    reg = rs.attach(model, 0.5 * rs.L2().on("*.weight", how=how, name="decay"), optimizer)
    model.tie_weights()
    before = model.embedding.weight.detach().clone()
    right = 0.5 * before.square().sum().item()
    assert reg.values()["decay"] == pytest.approx(right, rel=1e-5)
    loss = reg.loss(0 * model(torch.arange(7)).sum())
    assert loss.item() == pytest.approx(right if how == "loss" else 0.0, rel=1e-5)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.embedding.weight.detach(), torch.zeros(7, 4))  # w - lr · 2 · w / 2


# A12: another default device than the model's


@contextlib.contextmanager
def another_default(on):
    """Let tensors without a device land on "meta", where any use of their numbers fails."""
    if on:
        torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def plans():
    return {
        "none": [0.0 * rs.L2().on("*.weight")],
        "proximal": [0.05 * rs.L1().on("0.weight", how="proximal")],
        "gradient": [0.05 * rs.L2().on("*.weight", how="gradient")],
        "decoupled": [0.05 * rs.L1().on("0.weight", how="decoupled")],
        "loss": [0.05 * rs.L2().on("*.weight"), 0.1 * rs.L1().on(rs.outputs("1"))],
        "schedule": [rs.schedules.Linear(0, 0.1, steps=4) * rs.L1().on("0.weight", how="proximal")],
        "schedule in the loss": [rs.schedules.Linear(0, 0.1, steps=4) * rs.L2().on("*.weight")],
        "target": [rs.Target(norm=1.0, every=1) * rs.L2().on("0.weight", how="gradient")],
        "constraint": [rs.MaxNorm(0.5).on("*.weight")],
        "two constraints": [rs.MaxNorm(0.5).on("0.weight"), rs.NonNegative().on("0.weight")],
        "groups": [0.05 * rs.GroupLasso("in").on("0.weight", how="proximal")],
        "total variation": [0.05 * rs.FusedLasso(1.0, 1.0).on("0.weight", how="loss")],
        "statistics": [0.1 * rs.Decorrelation().on(rs.outputs("1"))],
        "noise": [rs.GaussianNoise(0.1).on(rs.outputs("1")), rs.Dropout(0.1).on(rs.inputs())],
        "distance": [0.1 * rs.Distance(decay=0.5).on("*.weight")],
    }


def trained(name, other, compile="auto", kind=torch.optim.Adam):
    """Train four steps; after the first, the default device is another one. Return weights, values and strengths."""
    torch.manual_seed(0)
    model = net()
    optimizer = kind(model.parameters(), lr=0.05)
    with another_default(False):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()  # the optimizer's own state is made on the model's device
    x = torch.randn(6, 4)
    with another_default(other):
        reg = rs.attach(model, plans()[name], optimizer, compile=compile)
        for _ in range(4):
            optimizer.zero_grad()
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
        values, strengths = list(reg.values().values()), list(reg.strengths().values())
        total = reg.penalty()
        assert total.device.type == "cpu"
    return [p.detach().clone() for p in model.parameters()], values, strengths


@pytest.mark.parametrize("name", plans())
def test_another_default_device_changes_nothing(name):
    for found, right in zip(trained(name, True), trained(name, False), strict=True):
        torch.testing.assert_close(found, right, equal_nan=True)


@pytest.mark.parametrize("name", ["proximal", "gradient", "decoupled"])
def test_another_default_device_changes_nothing_in_rules_folded_into_adam(name):
    for found, right in zip(trained(name, True, True), trained(name, False, False), strict=True):
        torch.testing.assert_close(found, right)


# A14: tensors that rules were given


GIVEN = {
    "Distance of Weighted": lambda t: rs.Distance(rs.Weighted(rs.L2(), t), to=torch.zeros(2, 3)),
    "Distance of Weighted by name": lambda t: rs.Distance(rs.Weighted(rs.L2(), {"weight": t}), to=torch.zeros(2, 3)),
    "Weighted": lambda t: rs.Weighted(rs.L1(), t),
    "Weighted by name": lambda t: rs.Weighted(rs.L1(), {"weight": t}),
    "Distance": lambda t: rs.Distance(to=-t),
    "Distance to it": lambda t: rs.Distance(to=t),
    "Distance by name": lambda t: rs.Distance(to={"weight": t}),
}


def test_the_fisher_information_of_a_task_may_be_reused():
    """Elastic weight consolidation: the buffer is filled anew for the next task."""
    model, fisher = nn.Linear(3, 2, bias=False), torch.full((2, 3), 2.0)
    nn.init.zeros_(model.weight)
    reg = rs.attach(model, rs.Distance(rs.Weighted(rs.L2(), fisher)).on("weight"), sgd(model))
    nn.init.constant_(model.weight, 0.5)
    right = 6 * 2.0 * 0.25
    assert reg.penalty().item() == pytest.approx(right)
    fisher.zero_()
    assert reg.penalty().item() == pytest.approx(right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GIVEN)
def test_a_tensor_that_a_penalty_was_given_may_be_reused(name, dtype):
    model, given = nn.Linear(3, 2, bias=False, dtype=dtype), torch.full((2, 3), 2.0, dtype=dtype)
    nn.init.ones_(model.weight)
    reg = rs.attach(model, GIVEN[name](given).on("weight"), sgd(model))
    before = reg.penalty().item()
    assert before > 0
    given.zero_()
    assert reg.penalty().item() == pytest.approx(before)


CONSTRAINTS = {
    "Fixed to values": (lambda t: rs.Fixed(torch.ones(2, 3, dtype=torch.bool), t), torch.full((2, 3), 2.0)),
    "mask of Fixed": (lambda t: rs.Fixed(t, 7.0), torch.ones(2, 3, dtype=torch.bool)),
    "Signs": (lambda t: rs.Signs(t), -torch.ones(2, 3)),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_tensor_that_a_constraint_was_given_may_be_reused(name):
    make, given = CONSTRAINTS[name]
    given = given.clone()
    model = nn.Linear(3, 2, bias=False)
    optimizer = sgd(model)
    reg = rs.attach(model, make(given).on("weight"), optimizer)
    held = model.weight.detach().clone()
    given.zero_()
    (1e-3 * model(torch.ones(1, 3)).sum()).backward()
    optimizer.step()
    with reg:
        torch.testing.assert_close(model.weight.detach(), held, rtol=0, atol=2e-3)
