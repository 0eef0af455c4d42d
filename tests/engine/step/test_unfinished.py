"""A step that is interrupted before the optimizer's own update, and called again, against one that wasn't."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError

PLANS = {
    "gradient": lambda: [0.3 * rs.L2().on("*.weight", how="gradient")],
    "decoupled": lambda: [0.3 * rs.L1().on("*.weight", how="decoupled")],
    "proximal": lambda: [0.3 * rs.L1().on("*.weight", how="proximal")],
    "noise": lambda: [rs.GradientNoise(0.1).on("*.weight")],
    "all": lambda: [
        0.3 * rs.L2().on("*.weight", how="gradient"),
        0.2 * rs.L1().on("*.weight", how="decoupled"),
        0.1 * rs.L1().on("0.weight", how="proximal"),
        rs.Box(-0.2, 0.2).on("2.weight"),
        rs.GradientNoise(0.1).on("0.*"),
    ],
}
OPTIMIZERS = {"SGD": (torch.optim.SGD, 0.1), "Adam": (torch.optim.Adam, 0.01), "RMSprop": (torch.optim.RMSprop, 0.01)}


@contextmanager
def stopped(cls):
    """Within it, an optimizer's own code is interrupted before anything moves."""

    def stop(*given):
        raise KeyboardInterrupt

    once, cls._init_group = cls._init_group, stop
    try:
        yield
    finally:
        cls._init_group = once


def run(plan, kind, interrupted=(), redone="the step", compile="auto", closure=False):
    """Train four steps, of which some are interrupted in the optimizer's own code; return the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    cls, lr = OPTIMIZERS[kind]
    optimizer = cls(model.parameters(), lr=lr)
    data = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]

    def backward(x):
        optimizer.zero_grad()
        # linear: a backward that is done again, at weights that have decayed, gives the same gradient
        loss = sum((p * c).sum() for p, c in zip(model.parameters(), x, strict=True))
        loss.backward()
        return loss

    backward(data[0])
    optimizer.step()  # its state is there
    rs.attach(model, plan, optimizer, compile=compile)
    torch.manual_seed(1)
    for number, x in enumerate(data):
        given = (partial(backward, x),) if closure else ()
        if not closure:
            backward(x)
        if number in interrupted:
            with stopped(cls), pytest.raises(KeyboardInterrupt):
                optimizer.step(*given)
            if redone == "all of it" and not closure:
                backward(x)
        optimizer.step(*given)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_called_again_changes_nothing_twice(plan, kind, closure):
    if closure and plan in ("noise", "all"):
        pytest.skip("each call of a closure draws noise of its own")
    found = run(PLANS[plan](), kind, (1, 3), closure=closure)
    torch.testing.assert_close(found, run(PLANS[plan](), kind, closure=closure))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("plan", ["gradient", "decoupled", "proximal"])
def test_a_backward_and_step_done_again_change_nothing_twice(plan, kind):
    found = run(PLANS[plan](), kind, (0, 2), "all of it")
    torch.testing.assert_close(found, run(PLANS[plan](), kind))


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("plan", ["gradient", "decoupled", "proximal"])
def test_a_step_in_one_pass_with_its_rules_isnt_done_twice(plan, kind):
    found = run(PLANS[plan](), kind, (1, 2), compile=True)
    torch.testing.assert_close(found, run(PLANS[plan](), kind, compile=True))


@pytest.mark.parametrize("how", ["gradient", "noise"])
def test_the_same_rule_on_gradients_of_one_optimizer_is_refused_of_another_it_isnt(how):
    def rule(number=1.0):
        return number * rs.L2().on("weight", how=how) if how == "gradient" else rs.GradientNoise(number).on("weight")

    model = nn.Linear(3, 2)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    reg = rs.attach(model, rule(), optimizer)
    with pytest.raises(HowError, match=r"same rule.*'weight'.*reg\.detach\(\)"):
        rs.attach(model, rule(), optimizer)
    rs.attach(model, rule(2.0), optimizer).detach()
    rs.attach(model, rule(), other).detach()
    reg.detach()
    rs.attach(model, rule(), optimizer)
