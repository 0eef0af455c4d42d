"""Rules folded into the optimizer's own pass, held to torch's own step with the rules around it."""

from dataclasses import replace

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

import restrain as rs
from folding import ALL, SHAPES, Run, adam, both, give_gradients, plain_sgd
from restrain.engine.backends import c_compiler
from restrain.engine.ops.optimizers import OPTIMIZERS
from restrain.engine.step import folded

pytestmark = pytest.mark.skipif(c_compiler.compiled("int something;") is None, reason="there is no C compiler")

SETTINGS = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "foreach": True}),
    "nesterov": (SGD, {"momentum": 0.8, "nesterov": True, "fused": True}),
    "adam": (Adam, {"weight_decay": 0.1}),
    "adam, fused": (Adam, {"fused": True, "betas": (0.2, 0.9), "eps": 1e-3}),
    "adam, without a first moment": (Adam, {"betas": (0.0, 0.99), "foreach": True}),
    "amsgrad": (Adam, {"amsgrad": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": torch.tensor(0.05, dtype=torch.float64)}),
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Folded from the first step on that can be, without a compilation of the rules' own passes."""
    monkeypatch.setattr(folded, "COST", 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_folded_is_the_step_with_its_rules(name):
    kind, settings = SETTINGS[name]
    run = both(lambda ps: kind(ps, **{"lr": 0.1, **settings}), ALL, 12)
    has_state = kind is not SGD or "momentum" in settings
    assert run.folded == [0] * has_state + [len(SHAPES)] * (12 - has_state)


@pytest.mark.parametrize("name", ["nesterov", "amsgrad"])
def test_float32(name):
    kind, settings = SETTINGS[name]
    run = both(lambda ps: kind(ps, **{"lr": 0.1, **settings}), ALL[2], 12, torch.float32)
    assert run.folded[1] == len(SHAPES)


def test_the_comparison_notices_another_formula(monkeypatch):
    right = OPTIMIZERS[SGD].update
    wrong = replace(right, scalars=lambda group, count: (group["lr"] * 1.001,))
    monkeypatch.setitem(OPTIMIZERS, SGD, replace(OPTIMIZERS[SGD], update=wrong))
    with pytest.raises(AssertionError):
        both(plain_sgd, ALL[2])


def test_maximize():
    both(lambda ps: SGD(ps, lr=0.1, maximize=True, weight_decay=0.1), rs.Box(-1.0, 1.0).on("*"))


def test_not_a_number_stays_where_it_is():
    def spoil(run):
        run.model.p4.grad[3] = torch.nan

    runs = [Run(adam, ALL[2], compile).steps(3, spoil) for compile in ("auto", False)]
    for mine, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.allclose(mine, theirs, equal_nan=True)
    assert runs[0].model.p4.isnan().sum() == 1


@pytest.mark.parametrize("make", [plain_sgd, adam])
def test_closures(make):
    losses = {}

    def step(run):
        def closure():
            assert torch.is_grad_enabled()
            give_gradients(run.model, run.step)
            return torch.tensor(1.0, dtype=torch.float64)

        run.optimizer.zero_grad()
        losses.setdefault(run.reg, []).append(run.optimizer.step(closure))

    run = both(make, ALL, 5, step=step)
    assert run.folded == [6 * (make is plain_sgd), 6, 6, 6, 6]
    mine, theirs = losses.values()
    assert torch.allclose(torch.stack(mine), torch.stack(theirs))
    assert mine[0] > 1
