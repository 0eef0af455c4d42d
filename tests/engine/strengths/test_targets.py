"""Targets: that the controller reaches them, from far below and far above, and goes on where it was."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, PenaltyError, RestrainWarning


def lasso(start, make=torch.optim.SGD, **options):
    """90 of 100 weights of a linear regression zero, by proximal steps on all data."""
    x = torch.randn(120, 100)
    y = x[:, :30] @ torch.linspace(0.2, 2, 30)[:, None] + 0.5 * torch.randn(120, 1)
    model = nn.Linear(100, 1, bias=False)
    optimizer = make(model.parameters(), **options)
    rule = rs.Target(zeros=0.9, start=start, every=5) * rs.L1().on("weight", how="proximal", name="rule")
    return (
        model,
        optimizer,
        rule,
        lambda: (model(x) - y).square().mean(),
        lambda: 1 - model.weight.count_nonzero() / 100,
    )


def network(*sizes, activation=nn.Tanh):
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def norm(start, how="loss", make=torch.optim.Adam, lr=0.01):
    """Two thirds of the norm that the weights would have."""
    x = torch.randn(100, 10)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2]
    model = network(10, 20, 1)
    rule = rs.Target(norm=2.0, start=start) * rs.L2().on("*.weight", how=how, name="rule")
    length = lambda: torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach().norm()  # noqa: E731
    return model, make(model.parameters(), lr=lr), rule, lambda: (model(x) - y).square().mean(), length


def active(start):
    """A tenth of the code of an autoencoder active."""
    x = torch.randn(200, 6) @ torch.randn(6, 12)
    model = network(12, 40, 12, activation=nn.ReLU)
    rule = [
        rs.Target(active=0.1, start=start, every=4) * rs.L1().on(rs.outputs("1"), name="rule"),
        rs.UnitNorm("column").on("2.weight"),  # else the code shrinks on and on, and the decoder grows
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    share = lambda: (model[0](x) > 0).double().mean()  # noqa: E731
    return model, optimizer, rule, lambda: (model(x) - x).square().mean(), share


def gradient_share(start):
    """A fifth of the gradient's length from the penalty, on batches drawn anew (at a minimum it would be a half)."""
    x = torch.randn(400, 50)
    y = x[:, :1] + torch.randn(400, 1)
    model = nn.Linear(50, 1)
    rule = rs.Target(gradient_share=0.2, start=start) * rs.L2().on("weight", name="rule")
    shares = []

    def loss():
        rows = torch.randint(400, (40,))
        found = (model(x[rows]) - y[rows]).square().mean()
        (data,) = torch.autograd.grad(found, model.weight, retain_graph=True)
        own = loss.reg.strengths()["rule"] * 2 * model.weight.detach().norm()
        shares.append(own / (own + data.norm()))
        return found

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, rule, loss, lambda: torch.stack(shares[-800:]).mean()


TARGETS = {  # model, steps, goal
    "zeros-sgd": (lambda start: lasso(start, lr=0.05), 700, 0.9),
    "zeros-momentum": (lambda start: lasso(start, lr=0.01, momentum=0.9), 700, 0.9),
    "zeros-adam": (lambda start: lasso(start, torch.optim.Adam, lr=0.02), 700, 0.9),
    "norm-loss": (norm, 1000, 2.0),
    "norm-gradient": (lambda start: norm(start, "gradient", torch.optim.SGD, 0.05), 1900, 2.0),
    "active": (active, 1200, 0.1),
    "gradient_share": (gradient_share, 1800, 0.2),
}
OFTEN = {"zeros-sgd": (1e-6, 1e-3, 1e-1), "active": (1e-6, 1e-3, 1e-1)}  # of the others the outer two, or none
SELDOM = {"zeros-momentum": (), "norm-gradient": ()}
CASES = [
    pytest.param(name, start, marks=[pytest.mark.slow] * (start not in {**OFTEN, **SELDOM}.get(name, (1e-6, 1e-1))))
    for name in TARGETS
    for start in (1e-6, 1e-3, 1e-1)
]


def train(reg, optimizer, loss, steps):
    for _ in range(steps):
        reg.loss(loss()).backward()
        optimizer.step()
        optimizer.zero_grad()


def attached(name, start):
    model, optimizer, rule, loss, measured = TARGETS[name][0](start)
    loss.reg = rs.attach(model, rule, optimizer)
    return model, optimizer, loss, measured


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "start"), CASES)
def test_targets_are_reached(name, start):
    _, optimizer, loss, measured = attached(name, start)
    _, steps, goal = TARGETS[name]
    train(loss.reg, optimizer, loss, steps)
    found = []
    for _ in range(5):
        train(loss.reg, optimizer, loss, 20)
        found.append(float(measured()))
    assert sum(found) / 5 == pytest.approx(goal, rel=0.02)
    assert f"now {loss.reg.strengths()['rule']:.4g}, {name.split('-')[0]} was" in str(loss.reg)


@pytest.mark.parametrize("name", ["zeros-adam", "norm-loss", "active", "gradient_share"])
def test_a_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    def start():
        torch.manual_seed(3)
        return attached(name, 1e-2)

    model, optimizer, loss, _ = start()
    train(loss.reg, optimizer, loss, 100)
    model_2, optimizer_2, loss_2, _ = start()
    train(loss_2.reg, optimizer_2, loss_2, 43)  # between two measurements
    state = [model_2.state_dict(), optimizer_2.state_dict(), loss_2.reg.state_dict()]
    torch.save([*state, torch.get_rng_state()], tmp_path / "state")
    model_3, optimizer_3, loss_3, _ = start()
    train(loss_3.reg, optimizer_3, loss_3, 7)
    *state, random = torch.load(tmp_path / "state", weights_only=True)
    for thing, its in zip((model_3, optimizer_3, loss_3.reg), state, strict=True):
        thing.load_state_dict(its)
    torch.set_rng_state(random)
    train(loss_3.reg, optimizer_3, loss_3, 57)
    torch.testing.assert_close(model_3.state_dict(), model.state_dict(), rtol=0, atol=0)
    states = [reg.state_dict() for reg in (loss_3.reg, loss.reg)]
    torch.testing.assert_close(*(state.pop("strengths") for state in states), rtol=0, atol=0)
    assert states[0] == states[1]
    numbers = next(iter(loss.reg.state_dict()["strengths"].values()))
    assert all(t.shape == () for key, t in numbers.items() if key not in ("active", "calls"))
    assert numbers["strength"] != loss_2.reg.strengths()["rule"]


def line(target, how="loss", **options):
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = (target * rs.L2() if how != "proximal" else target * rs.L1()).on("weight", how=how, name="w", **options)
    reg = rs.attach(model, rule, optimizer)
    x = torch.randn(20, 4)

    def steps(n):
        train(reg, optimizer, lambda: (model(x) - x.sum(1, keepdim=True)).square().mean(), n)

    return reg, steps, model


@pytest.mark.parametrize(
    ("target", "end", "side"),
    [
        (rs.Target(norm=1.0, start=0.1, high=0.2, every=1), 0.2, "high"),
        (rs.Target(norm=9.0, low=1e-5, every=1), 1e-5, "low"),
    ],
)
def test_out_of_reach_is_said_once(target, end, side):
    reg, steps, _ = line(target)
    with pytest.warns(RestrainWarning, match=rf"'w': .* its bound {side}={end:g}, where norm is \d") as caught:
        steps(150)
    assert len(caught) == 1
    assert reg.strengths() == {"w": pytest.approx(end)}
    again, steps, _ = line(target)
    again.load_state_dict(reg.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(100)


def test_a_controller_waits_while_its_rule_is_off():
    target = rs.Target(norm=1.0, start=0.01, every=1)
    reg, steps, _ = line(target, start=5)
    steps(5)
    assert reg.strengths() == {"w": pytest.approx(0.01)}
    steps(1)
    assert reg.strengths()["w"] > 0.011
    reg, steps, _ = line(rs.schedules.Steps([0, 2], milestones=[5]) * target)
    steps(5)
    assert reg.strengths() == {"w": pytest.approx(0.02)}
    steps(1)
    assert reg.strengths()["w"] > 0.022


def test_what_is_measured():
    def measured(reg):
        return float(reg.state_dict()["strengths"]["w"]["measured"])

    reg, steps, model = line(rs.Target(norm=1.0, every=1))
    steps(1)
    assert measured(reg) == pytest.approx(model.weight.detach().norm().item())
    reg, steps, model = line(rs.Target(zeros=0.3, every=1, start=5.0), "proximal")
    steps(1)
    assert measured(reg) == 1 - model.weight.count_nonzero() / 4 > 0
    for how in ("loss", "gradient", "proximal"):
        reg, steps, model = line(rs.Target(gradient_share=0.2, every=2, start=0.3), how)
        steps(1)
        w = model.weight.detach().clone().requires_grad_()
        told = []
        model.weight.register_post_accumulate_grad_hook(lambda p, told=told: told.append(p.grad.clone()))
        steps(1)
        own = 0.3 * (2 * model.weight if how != "proximal" else model.weight.sign()).detach()
        rest = told[0] - (own if how == "loss" else 0)
        rest = rest + (0.6 * (w - model.weight).detach() if how == "gradient" else 0)
        assert measured(reg) == pytest.approx(float(own.norm() / (own.norm() + rest.norm())), rel=1e-5)


def test_what_is_active():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    target = rs.Target(active=0.5, above=0.1, every=2, smoothing=0)
    reg = rs.attach(model, target * rs.L1().on(rs.outputs(nn.ReLU), name="h"), optimizer)
    seen = []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step != 1)  # a step of learning rate zero is none
        x = torch.randn(5 + step, 3)
        seen += [(h.abs() > 0.1).double().mean() for name, h in rs.activations(model, x).items() if name in "13"]
        reg.loss(model(x).sum()).backward()
        optimizer.step()
        if step == 2:
            measured = float(reg.state_dict()["strengths"]["h"]["measured"])
            assert measured == pytest.approx(float(sum(seen) / 6))
    model.eval()
    model(x)
    state = reg.state_dict()["strengths"]["h"]
    assert state["calls"] == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rs.Target(), "is one of zeros=, norm=, active=, gradient_share=; got none"),
        (lambda: rs.Target(zeros=0.5, norm=1.0), "got zeros and norm"),
        (lambda: rs.Target(zeros=1.0), "zeros= of a target is a number above 0 and below 1; got 1.0"),
        (lambda: rs.Target(norm=0.0), "above 0"),
        (lambda: rs.Target(active=float("nan")), "above 0"),
        (lambda: rs.Target(norm=1.0, start=1e-9), "low <= start <= high"),
        (lambda: rs.Target(norm=1.0, low=0.0), "0 < low"),
        (lambda: rs.Target(norm=1.0, smoothing=1.0), "smoothing= below 1"),
        (lambda: rs.Target(norm=1.0, every=0), "every= is a whole number"),
        (lambda: rs.Target(norm=1.0).at(3), r"reg.strengths\(\) tells"),
        (
            lambda: rs.attach(nn.Linear(2, 2), rs.Target(norm=1) * rs.Target(norm=2) * rs.L2().on("weight")),
            "several targets",
        ),
    ],
)
def test_targets_that_cannot_be(make, words):
    with pytest.raises(PenaltyError, match=words):
        make()


class Sum(rs.NetworkPenalty, register=False):
    def __call__(self, parameters, outputs):
        return sum(p.square().sum() for p in parameters.values())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (rs.Target(zeros=0.5) * rs.L1().on("weight"), "needs how='proximal': by how='loss'"),
        (rs.Target(active=0.5) * rs.L1().on("weight"), "is for rules on outputs"),
        (rs.Target(norm=1.0) * rs.L1().on(rs.outputs()), "is for rules on parameters.*use a target by active="),
        (rs.Target(gradient_share=0.1) * Sum().on("weight"), "whole network"),
        (rs.Target(active=0.1) * rs.JacobianNorm().on(), "isn't known for a penalty on derivatives"),
    ],
)
def test_targets_that_a_rule_cannot_have(rule, words):
    with pytest.raises(HowError, match=words):
        rs.attach(nn.Linear(3, 2), rule)


def test_a_target_of_a_penalty_on_the_network():
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.Target(norm=0.5, start=0.01) * Sum().on("weight", name="w"), optimizer)
    x = torch.randn(50, 4)
    train(reg, optimizer, lambda: (model(x) - x.sum(1, keepdim=True)).square().mean(), 1000)
    assert float(model.weight.detach().norm()) == pytest.approx(0.5, rel=0.02)


def test_equal_strengths_of_a_rule_are_one_and_others_have_a_key_of_their_own():
    target = rs.Target(norm=1.0)
    what = target * rs.L1() + target * rs.L2() + rs.schedules.WarmUp(3) * rs.Norm(2)
    reg = rs.attach(nn.Linear(3, 2), what.on("weight", name="w"))
    assert list(reg.strengths()) == ["w", "w [2]"]


def test_only_forwards_that_count_are_measured():
    """Neither a look at a batch nor a forward that an interrupt broke off moves the strength."""

    def strength(disturbed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        target = rs.Target(active=0.55, every=1, start=0.1)
        reg = rs.attach(model, target * rs.L1().on(rs.outputs("1")), optimizer)

        def stop(module, args):
            raise KeyboardInterrupt

        for x in torch.randn(4, 50, 3):
            if disturbed:
                model(-100 * torch.ones(9, 3))  # a look: its output is gone before the loss
                handle = model[2].register_forward_pre_hook(stop)
                with pytest.raises(KeyboardInterrupt):
                    model(100 * torch.ones(7, 3))
                handle.remove()
            optimizer.zero_grad()
            reg.loss(model(x).mean()).backward()
            optimizer.step()
        return next(iter(reg.strengths().values()))

    assert strength(True) == strength(False) != 0.1
