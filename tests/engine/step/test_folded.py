"""Rules folded into the optimizer's own pass, held to torch's own step with the rules around it."""

from dataclasses import replace

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

import restrain as rs
from folding import ALL, SHAPES, Run, adam, both, give_gradients, model_of, plain_sgd, same
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


# Cautious decay and Hyperball

CAUTIOUS = 0.3 * rs.L2().on("*", how="decoupled", cautious=True)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("adam", [CAUTIOUS]),
        ("nesterov", [0.3 * (rs.L1() + rs.Huber(0.1)).on("*", how="decoupled", cautious=True)]),
        ("amsgrad", [CAUTIOUS, 0.2 * rs.L2().on("*", how="decoupled"), *ALL[::2], ALL[3]]),
    ],
)
def test_cautious_decay(name, rules):
    kind, settings = SETTINGS[name]
    run = both(lambda ps: kind(ps, **{"lr": 0.1, **settings}), rules, 6)
    assert run.folded[1:] == [len(SHAPES)] * 5


def test_cautious_decay_by_groups_is_not_folded():
    rule = 0.1 * rs.GroupLasso(per="row").on("p0", how="decoupled", cautious=True)
    assert both(adam, rule).folded == [0] * 4


def held_run(compile, make, rule, dtype=torch.float64, scale=1.0, count=6, shapes=((5, 3), (3, 70, 70), (130, 64))):
    """Odd sizes; groups of several blocks, of less than one, and of whole lanes."""
    model = model_of(list(shapes), dtype)
    if HELD["whole"] != rule:
        for p in model.parameters():
            p.data = p.data.contiguous()

    def scaled(run):
        for p in run.model.parameters():
            p.grad.mul_(scale)

    return Run(make, rule, compile, dtype, model).steps(count, scaled)


HELD = {
    "whole": rs.Hyperball().on("*"),
    "radius": rs.Hyperball(3.0).on("*"),
    "first dim": rs.Hyperball(per=0).on("*"),
    "with a gradient": [rs.Hyperball(per=0).on("*"), 0.3 * rs.L2().on("*", how="gradient")],
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [("adam", "whole"), ("adam", "radius"), ("amsgrad", "first dim"), ("adamw", "with a gradient")],
)
def test_norms_are_held(name, rule):
    kind, settings = SETTINGS[name]
    settings = {"lr": 0.1, **settings, "weight_decay": 0.0}
    runs = [held_run(compile, lambda ps: kind(ps, **settings), HELD[rule]) for compile in ("auto", False)]
    same(*runs, 1e-12)
    assert [run.folded for run in runs] == [[0, 3, 3, 3, 3, 3], [0] * 6]


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e12])
def test_held_norms_in_float32(scale):
    make = lambda ps: Adam(ps, lr=0.1, eps=1.0)  # noqa: E731, so that movements are as small as gradients
    runs = [held_run(compile, make, HELD["first dim"], torch.float32, scale) for compile in ("auto", False)]
    same(*runs, 1e-5)
    assert runs[0].folded[1:] == [3] * 5
    norms = [p.flatten(1).norm(dim=1) for p in runs[0].model.parameters()]
    expected = [p.flatten(1).norm(dim=1) for p in held_run(False, make, HELD["first dim"], count=0).model.parameters()]
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0, check_dtype=False)


def test_held_norms_do_not_depend_on_threads():
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(list(held_run("auto", adam, HELD["whole"], torch.float32).model.parameters()))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_held_weight_without_a_movement_stays():
    runs = [held_run(compile, adam, HELD["whole"], scale=0.0, count=3) for compile in ("auto", False)]
    start = held_run(False, adam, HELD["whole"], count=0)
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), start.model.parameters(), strict=True))


def test_groups_that_are_scattered_in_memory_are_held_unfolded():
    runs = [held_run(compile, adam, rs.Hyperball(per=1).on("*")) for compile in ("auto", False)]
    same(*runs, 1e-12)
    assert not any(runs[0].folded)


def test_the_comparison_notices_another_movement(monkeypatch):
    right = OPTIMIZERS[Adam].update
    wrong = replace(
        right, movement=lambda group, scalars, state: right.movement(group, scalars, state) + 1e-3 * state[0]
    )
    theirs = held_run(False, adam, HELD["whole"])
    monkeypatch.setitem(OPTIMIZERS, Adam, replace(OPTIMIZERS[Adam], update=wrong))
    with pytest.raises(AssertionError):
        same(held_run("auto", adam, HELD["whole"]), theirs, 1e-12)
