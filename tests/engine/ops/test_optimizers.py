"""The metric of each optimizer, by which a proximal rule finds the minimiser; and what all ways of acting agree on."""

import copy
import warnings

import numpy as np
import pytest
import torch
from benchmarks.metric import MEASURED, OPTIMIZERS, STRENGTH, lasso, lasso_by
from torch import nn, optim

import restrain as rs
from layouts import explained
from restrain.engine.ops import optimizers
from restrain.engine.ops.optimizers import Metric, Taken, metric_of
from restrain.errors import RestrainWarning

PROBLEM = lasso()
GRAM, CORRELATION, SOLUTION = PROBLEM


def holder(*tensors):
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_parameter(f"w{number}", nn.Parameter(tensor))
    return explained(module)


def error(w):
    return float(abs(w.detach().numpy() - SOLUTION).max())


# The lasso


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_lasso_is_solved_in_the_metric_and_in_no_other_way(name):
    assert (SOLUTION == 0).sum() == 42
    row = lasso_by(name, "metric", 1400, PROBLEM, enough=1e-9)
    assert row.error < 1e-8
    assert row.same_zeros
    if name not in ("SGD", "ASGD"):  # whose metric is the learning rate
        wrong = lasso_by(name, "learning rate", 400, PROBLEM)
        assert 0.1 < wrong.error < 6
        assert not wrong.same_zeros
    in_loss = lasso_by(name, "loss", 300, PROBLEM)
    assert in_loss.error > 1e-3
    assert in_loss.zeros == 0


@pytest.mark.filterwarnings("ignore:.*moves entries together")  # Muon
@pytest.mark.parametrize("name", MEASURED)
def test_strangers_come_near_by_measuring(name):
    with pytest.warns(RestrainWarning, match="measured"):
        row = lasso_by(name, "metric", 3000 if name == "Lion" else 1500, PROBLEM, enough=1e-9)
    wrong = lasso_by(name, "learning rate", 400, PROBLEM)
    assert row.error < {"momentum, as a stranger": 1e-8, "Lion": 0.05}.get(name, 0.02) < 0.1 < wrong.error
    assert row.zeros in (41, 42, 43)
    assert wrong.zeros < 20


@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_measured_steps_are_nearly_right_in_noise(mean):
    p, kept = nn.Parameter(torch.zeros(500, dtype=torch.float64)), {}
    optimizer = MEASURED["Adam, as a stranger"]([p])
    for _ in range(400):
        w = p.detach().clone()
        p.grad = mean + torch.randn(500, dtype=torch.float64)
        optimizer.step()
        found = metric_of(optimizer)(Taken(optimizer.param_groups[0], optimizer.state[p], p, kept, (w, p.grad)))
    exact = optimizers.OPTIMIZERS[optim.Adam].metric(Taken(optimizer.param_groups[0], optimizer.state[p], p))
    ratio = found.steps(*found.moments) / exact.steps(*exact.moments)
    assert 0.85 < ratio.median() < 1.05
    assert 0.6 < ratio.quantile(0.05) < ratio.quantile(0.95) < 1.15


SCHEDULES = {
    "cosine to 0": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 1200),
    "exponential": lambda o: optim.lr_scheduler.ExponentialLR(o, 0.999),
    "one cycle": lambda o: optim.lr_scheduler.OneCycleLR(
        o, max_lr=[2 * g["lr"] for g in o.param_groups], total_steps=1200
    ),
}
SCHEDULED = {
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.05, betas=(0.9, 0.99)),
    "NAdam": lambda p: optim.NAdam(p, lr=0.05, betas=(0.9, 0.99)),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.7, alpha=0.97),
}


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_lasso_under_schedules(name, schedule):
    model = holder(torch.zeros(50, dtype=torch.float64))
    optimizer = SCHEDULED[name](model.parameters())
    rate = SCHEDULES[schedule](optimizer)
    rs.attach(model, STRENGTH * rs.L1().on("*", how="proximal"), optimizer)
    for _ in range(1200):
        model.w0.grad = GRAM @ model.w0.detach() - CORRELATION
        optimizer.step()
        rate.step()
    assert error(model.w0) < 1e-6
    assert ((model.w0.detach().numpy() == 0) == (SOLUTION == 0)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_measured_steps_follow_the_learning_rate(schedule):
    """Averages of movements that kept the lengths of earlier steps would end about 0.1 away."""
    model = holder(torch.zeros(50, dtype=torch.float64))
    optimizer = MEASURED["Adam, as a stranger"](model.parameters())
    rate = SCHEDULES[schedule](optimizer)
    with pytest.warns(RestrainWarning, match="measured"):
        rs.attach(model, STRENGTH * rs.L1().on("*", how="proximal"), optimizer)
    for _ in range(1200):
        model.w0.grad = GRAM @ model.w0.detach() - CORRELATION
        optimizer.step()
        rate.step()
    assert error(model.w0) < 0.02


def test_groups_and_optimizers_of_their_own():
    model = holder(*torch.zeros(50, dtype=torch.float64).split([10, 15, 25]))
    groups = [{"params": [model.w0], "lr": 0.02, "betas": (0.8, 0.99)}, {"params": [model.w1], "eps": 1e-4}]
    optimizers = [optim.Adam(groups, lr=0.05), optim.SGD([model.w2], lr=0.05, momentum=0.9)]
    rs.attach(model, STRENGTH * rs.L1().on("*", how="proximal"), optimizers)
    for _ in range(1000):
        gradient = GRAM @ torch.cat([p.detach() for p in model.parameters()]) - CORRELATION
        for p, g in zip(model.parameters(), gradient.split([10, 15, 25]), strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    w = torch.cat(list(model.parameters()))
    assert error(w) < 1e-8
    assert ((w.detach().numpy() == 0) == (SOLUTION == 0)).all()


# The formulas


def steps_of(optimizer, p, kept, before):
    found = metric_of(optimizer)(Taken(optimizer.param_groups[0], optimizer.state[p], p, kept, before))
    return found.steps(*found.moments)


FORMULAS = {name: build for name, build in OPTIMIZERS.items() if "momentum" not in name and "Nesterov" not in name}
FORMULAS["RAdam, soon adapted"] = lambda p: optim.RAdam(p, lr=0.05, betas=(0.9, 0.8))
FORMULAS["RAdam, never adapted"] = lambda p: optim.RAdam(p, lr=0.05, betas=(0.9, 0.5))
FORMULAS["NAdam, fast"] = lambda p: optim.NAdam(p, lr=0.05, momentum_decay=0.5)
FORMULAS["Adagrad, decayed"] = lambda p: optim.Adagrad(p, lr=0.5, lr_decay=0.1)
FORMULAS["ASGD, decayed"] = lambda p: optim.ASGD(p, lr=0.3, lambd=0.0)
FORMULAS["Adam, rate in a tensor"] = lambda p: optim.Adam(p, lr=torch.tensor(0.05, dtype=torch.float64), foreach=False)
del FORMULAS["SGD, dampened"]


@pytest.mark.parametrize("device_step", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_constant_gradient_moves_each_entry_by_its_step(name, shape, device_step, monkeypatch):
    """At every step; `device_step` reads counts as those of capturable optimizers on a GPU."""
    if device_step:
        monkeypatch.setattr(
            optimizers, "_count", lambda step: step.double() if isinstance(step, torch.Tensor) else step
        )
    gradient = torch.tensor([1e-3, -0.1, 0.5, 1.0, -3.0, 20.0], dtype=torch.float64).view(shape)
    if name == "Adafactor" and len(shape) == 2:
        gradient = gradient.sign()  # its factors are exact for rank one
    model = holder(torch.randn(shape, dtype=torch.float64))
    optimizer, kept = FORMULAS[name](model.parameters()), {}
    for _ in range(40):
        w = model.w0.detach().clone()
        model.w0.grad = gradient.clone()
        optimizer.step()
        steps = steps_of(optimizer, model.w0, kept, (w, gradient))
        torch.testing.assert_close(w - model.w0.detach(), steps * gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: optim.SGD(p, lr=0.05, momentum=0.5, dampening=0.3),
        lambda p: optim.SGD(p, lr=0.05, momentum=0.5, nesterov=True),
        lambda p: optim.RMSprop(p, lr=0.05, momentum=0.5, alpha=0.5),
    ],
    ids=["dampened", "Nesterov", "RMSprop"],
)
def test_momentum_may_change(build):
    """In the long run at first, and exactly ever after."""
    model = holder(torch.zeros(3, dtype=torch.float64))
    gradient = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    optimizer, kept = build(model.parameters()), {}
    for step in range(160):
        if step > 80:
            optimizer.param_groups[0]["momentum"] = 0.5 + 0.4 * np.sin(step / 5) ** 2
        w = model.w0.detach().clone()
        model.w0.grad = gradient.clone()
        optimizer.step()
        steps = steps_of(optimizer, model.w0, kept, None)
        if step >= 60:
            torch.testing.assert_close(w - model.w0.detach(), steps * gradient, rtol=1e-9, atol=1e-12)
    assert kept["gain"] != pytest.approx(1 / (1 - optimizer.param_groups[0]["momentum"]), rel=1e-2)


def test_asgd_and_adadelta_know_the_state_that_their_step_began_with():
    for build in (
        lambda p: optim.ASGD(p, lr=0.3, lambd=0.1, alpha=1.0, t0=1),
        lambda p: optim.Adadelta(p, lr=1.0, rho=0.5, eps=1e-2),
    ):
        model = holder(torch.zeros(3, dtype=torch.float64))
        optimizer, kept = build(model.parameters()), {}
        for step in range(10):
            w = torch.zeros(3, dtype=torch.float64)  # where ASGD's own decay does nothing
            with torch.no_grad():
                model.w0.zero_()
            optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)
            model.w0.grad = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64) * (1 + step % 3)
            optimizer.step()
            steps = steps_of(optimizer, model.w0, kept, None)
            torch.testing.assert_close(w - model.w0.detach(), steps * model.w0.grad, rtol=1e-6, atol=1e-12)
            if step == 0 and "eta" in kept:
                assert steps != kept["eta"], "the state's own rate is already the next one"


def test_what_was_never_seen_goes_to_zero_and_never_to_nan():
    for build in (*OPTIMIZERS.values(), *MEASURED.values()):
        model = holder(torch.randn(5, 10))
        optimizer = build(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)
            rs.attach(model, 0.01 * (rs.L1() + rs.L2() + rs.GroupLasso(0)).on("*", how="proximal"), optimizer)
        for _ in range(3):
            model.w0.grad = torch.zeros(5, 10)
            model.w0.grad[:2] = 0.1
            optimizer.step()
        assert model.w0.isfinite().all(), build
        if type(optimizer) in (optim.Adam, optim.AdamW, optim.NAdam, optim.Adamax, optim.RMSprop, optim.Adagrad):
            assert (model.w0[2:] == 0).all() == (optimizer.param_groups[0]["eps"] < 1e-3), build
    for moments in ((torch.zeros(3),), (torch.zeros(3, dtype=torch.bfloat16),)):
        steps = Metric(0.1, moments).steps(*moments)  # of eps = 0
        assert steps.isfinite().all()
        for penalty in (
            rs.L1(),
            10 * rs.L2(),
            rs.ElasticNet(1.0, 2.0),
            rs.GroupLasso(0) + rs.L1(),
            rs.Norm(2) + rs.L2(),
        ):
            assert (penalty.prox(torch.tensor([1.0, -2.0, 0.0]), steps).abs() < 1e-15).all()
    variance = torch.tensor([1.0, 1.0]), torch.tensor([1.0 + 1e-7, 0.5])
    optimizer = optim.RMSprop([nn.Parameter(torch.ones(2))], lr=0.1, centered=True)
    state = dict(zip(("square_avg", "grad_avg"), variance, strict=True))
    found = metric_of(optimizer)(Taken(optimizer.param_groups[0], state, torch.ones(2)))
    assert found.steps(*found.moments).isfinite().all()


# Going on


@pytest.mark.parametrize("name", ["SGD, momentum", "Adam, as a stranger", "ASGD", "Adafactor"])
def test_a_state_goes_on_to_the_same_bits(name):
    def go(model, optimizer, reg, steps):
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step / 10)
            if "momentum" in optimizer.param_groups[0]:
                optimizer.param_groups[0]["momentum"] = 0.9 - 0.02 * step
            model.w0.grad = GRAM @ model.w0.detach() - CORRELATION
            optimizer.step()
        return reg

    def begin():
        model = holder(torch.zeros(50, dtype=torch.float64))
        optimizer = {**OPTIMIZERS, **MEASURED}[name](model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)
            return model, optimizer, rs.attach(model, STRENGTH * rs.L1().on("*", how="proximal", every=2), optimizer)

    first, second = begin(), begin()
    go(*first, range(10))
    saved = copy.deepcopy([part.state_dict() for part in first])
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(copy.deepcopy(state))
    go(*first, range(10, 20))
    go(*second, range(10, 20))
    assert torch.equal(first[0].w0, second[0].w0)
    if saved[2].get("metrics"):
        third = begin()
        for part, state in zip(third, saved, strict=True):
            part.load_state_dict({**state, "metrics": {}} if part is third[2] else state)
        go(*third, range(10, 20))
        assert not torch.equal(third[0].w0, second[0].w0), "it takes the state of the metric to go on"


# One word


def ridge(how, build, steps):
    """The weights that minimise, or not, ½ mean squared error + 0.1 Σw² for the data of the lasso."""
    model = holder(torch.zeros(50, dtype=torch.float64))
    optimizer = build(model.parameters())
    rate = optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    reg = rs.attach(model, 0.1 * rs.L2().on("*", how=how), optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        w = model.w0
        reg.loss(w @ GRAM @ w / 2 - CORRELATION @ w).backward()
        optimizer.step()
        rate.step()
    return model.w0.detach()


def test_one_word_says_how():
    rule = 0.1 * rs.L2().on("*", how="loss")
    hows = ["loss", "gradient", "decoupled", "proximal"]
    assert [rs.L2().on("*", how=how).how for how in hows] == hows
    assert rule.what.moments(at_places=False) == tuple(hows)
    minimiser = torch.linalg.solve(GRAM + 0.2 * torch.eye(50, dtype=torch.float64), CORRELATION)
    sgd = {how: ridge(how, lambda p: optim.SGD(p, lr=0.3), 200) for how in hows}
    torch.testing.assert_close(sgd["loss"], sgd["gradient"], rtol=0, atol=1e-13)
    assert max(float((w - minimiser).abs().max()) for w in sgd.values()) < 1e-7
    adam = {how: ridge(how, lambda p: optim.Adam(p, lr=0.1), 1000) for how in hows}
    off = {how: float((w - minimiser).abs().max()) for how, w in adam.items()}
    assert max(off["loss"], off["gradient"], off["proximal"]) < 1e-5
    assert off["decoupled"] > 0.1
