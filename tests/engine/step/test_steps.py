"""What rules do around the optimizer's step, against loops written out in NumPy or torch float64."""

from math import sqrt

import numpy as np
import pytest
import torch
from benchmarks.metric import OPTIMIZERS
from torch import nn

import restrain as rs
from layouts import explained
from restrain.engine.core.memory import BLOCK
from restrain.errors import HowError, RestrainWarning


def holder(**tensors):
    """A module of these parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))
    return explained(module)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def soft(w, t):
    return np.sign(w) * np.maximum(np.abs(w) - t, 0)


def pull(module, target=0.3):
    """Gradients of ½ Σ (w - target)² for all parameters."""
    for p in module.parameters():
        p.grad = (p.detach() - target).clone()


# every=


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("how", ["loss", "gradient", "proximal"])
def test_penalties_act_at_every_so_manieth_step(how, every):
    model = holder(w=normal(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [0.2 * rs.L1().on("w", how=how, every=every), 0.3 * rs.L2().on("w", how=how)]
    reg = rs.attach(model, rules, optimizer)
    w = model.w.detach().numpy().copy()
    for step in range(9):
        optimizer.zero_grad()
        reg.loss((model.w - 0.3).square().sum() / 2).backward()
        optimizer.step()
        l1 = 0.2 if step % every == 0 else 0.0
        if how == "proximal":
            w = soft(w - 0.1 * (w - 0.3), 0.1 * l1) / (1 + 2 * 0.1 * 0.3)
        else:
            w = w - 0.1 * ((w - 0.3) + l1 * np.sign(w) + 0.6 * w)
        np.testing.assert_allclose(model.w.detach().numpy(), w, rtol=1e-12, atol=1e-14)


def test_constraints_and_activation_penalties_every_third_step():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rules = [rs.MaxNorm(0.2).on("0.weight", every=3), 0.7 * rs.L2().on(rs.outputs("0"), every=2)]
    reg = rs.attach(model, rules, optimizer)
    w, x = model[0].weight.detach().numpy().copy(), normal(5, 4, seed=1)
    for step in range(8):
        optimizer.zero_grad()
        reg.loss((model(x) - 3).sum()).backward()
        optimizer.step()
        h = x.numpy() @ w.T
        w = w - 0.5 * (np.ones_like(h) + (2 * 0.7 / 5 * h if step % 2 == 0 else 0)).T @ x.numpy()
        if step % 3 == 0:
            w = w * np.minimum(1, 0.2 / np.linalg.norm(w, axis=1, keepdims=True))
        np.testing.assert_allclose(model[0].weight.detach().numpy(), w, rtol=1e-10)


def test_steps_that_move_nothing_are_not_counted():
    model = holder(w=normal(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.2 * rs.L1().on("w", how="proximal", every=2), optimizer)
    optimizer.step()  # no gradients
    optimizer.param_groups[0]["lr"] = 0.0
    pull(model)
    optimizer.step()
    assert reg.state_dict()["optimizer_steps"] == [0]
    optimizer.param_groups[0]["lr"] = 0.1
    w = model.w.detach().numpy().copy()
    optimizer.step()
    np.testing.assert_allclose(model.w.detach().numpy(), soft(w - 0.1 * (w - 0.3), 0.02), rtol=1e-12)


# Learning rates


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_prox_uses_the_learning_rate_of_the_group_and_of_now(as_tensor):
    model = holder(a=normal(3, 4), b=normal(5, seed=1), still=normal(2, seed=2))
    rates = {"a": 0.1, "b": 0.02, "still": 0.0}
    groups = [{"params": [getattr(model, k)], "lr": torch.tensor(v) if as_tensor else v} for k, v in rates.items()]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    rs.attach(model, 0.4 * rs.L1().on("*", how="proximal"), optimizer)
    expected = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    for step in range(6):
        pull(model)
        optimizer.step()
        schedule.step()
        for name, w in expected.items():
            rate = rates[name] * 0.5 ** (step // 2)
            expected[name] = soft(w - rate * (w - 0.3), rate * 0.4)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=1e-6, atol=1e-8)


# Large and oddly laid out tensors


LAYOUTS = {
    "contiguous": lambda t: t(600, 700),
    "one entry more than a block": lambda t: t(BLOCK + 1),
    "transposed": lambda t: t(700, 600).t(),
    "permuted": lambda t: t(70, 80, 90).permute(2, 0, 1),
    "channels_last": lambda t: t(80, 70, 9, 9).to(memory_format=torch.channels_last),
    "every other column": lambda t: t(600, 1400)[:, ::2],
    "part of another tensor": lambda t: t(602, 700)[1:601],
    "small": lambda t: t(3, 4).t(),
    "0-d": lambda t: t(),
    "empty": lambda t: t(0, 7),
}


def after_a_step(name, w, g, how):
    """One step at rate 0.1 of the penalty 0.3 Σ|w| + 0.2 Σw², in NumPy float64; Adam's first step is g / |g|."""
    if how == "gradient":
        g = g + 0.3 * np.sign(w) + 0.4 * w
    rate = 0.1 if name == "SGD" else 0.1 / (np.abs(g) + 1e-2)
    moved = w - rate * g
    return moved if how == "gradient" else soft(moved, rate * 0.3) / (1 + 2 * rate * 0.2)


@pytest.mark.parametrize("same_layout", [True, False])
@pytest.mark.parametrize("how", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer_name", ["SGD", "Adam"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_any_layout_equal_float64(layout, optimizer_name, how, same_layout):
    model = holder(w=LAYOUTS[layout](lambda *shape: normal(*shape, dtype=torch.float32)))
    options = {"eps": 1e-2} if optimizer_name == "Adam" else {}
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=0.1, **options)
    rs.attach(model, (0.3 * rs.L1() + 0.2 * rs.L2()).on("w", how=how), optimizer)
    w, g = model.w.detach().double().numpy(), normal(*model.w.shape, seed=1, dtype=torch.float32)
    model.w.grad = torch.empty_like(model.w).copy_(g) if same_layout else g.clone()
    optimizer.step()
    expected = after_a_step(optimizer_name, w, g.double().numpy(), how)
    np.testing.assert_allclose(model.w.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_the_float64_reference_notices_a_block_that_was_left_out():
    w, g = normal(BLOCK + 1).numpy(), normal(BLOCK + 1, seed=1).numpy()
    w[-1], g[-1] = 0.7, 0.1
    expected, left_out = after_a_step("SGD", w, g, "proximal"), w - 0.1 * g
    assert not np.isclose(expected[-1], left_out[-1], rtol=2e-5, atol=2e-6)


def test_a_part_of_a_tensor_is_changed_alone():
    base = normal(602, 700, dtype=torch.float32)
    model, before = holder(w=base[1:601]), base.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, rs.L1().on("w", how="proximal"), optimizer)
    pull(model)
    optimizer.step()
    assert torch.equal(base[[0, 601]], before[[0, 601]])
    assert not torch.isclose(base[1:601], before[1:601]).all(1).any()


@pytest.mark.parametrize("how", ["gradient", "proximal"])
def test_parameters_of_several_dtypes_under_one_rule(how):
    dtypes = [torch.float64, torch.float32, torch.complex128, torch.float16, torch.bfloat16]
    model = holder(**{f"p{i}": normal(4, 3, seed=i, dtype=d) for i, d in enumerate(dtypes)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.warns(RestrainWarning, match="lost to rounding"):
        rs.attach(model, 0.3 * rs.L1().on("*", how=how), optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pull(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        wide = torch.complex128 if p.is_complex() else torch.float64
        w, g = before[name].to(wide), grads[name].to(wide)
        moved = w - 0.5 * (g + (0.3 * w.sgn() if how == "gradient" else 0))
        if how == "proximal":
            moved = moved * (1 - 0.15 / moved.abs().clamp_min(0.15))
        loose = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-6}.get(p.dtype, 1e-12)
        torch.testing.assert_close(p.detach().to(wide), moved, rtol=loose, atol=loose)
        assert p.dtype == before[name].dtype


def test_complex_entries_have_no_one_step_under_a_per_coordinate_metric():
    model = holder(w=normal(4, dtype=torch.complex128))
    optimizer = torch.optim.Adam(model.parameters())
    for penalty in (rs.L1(), rs.GroupLasso(0)):
        with pytest.raises(HowError, match="complex"):
            rs.attach(model, penalty.on("w", how="proximal"), optimizer)


# Several rules on one tensor


PAIRS = [
    [0.2 * rs.L1(), 0.3 * rs.L2()],
    [0.2 * rs.L1(), 0.1 * rs.L1()],
    [0.2 * rs.L1(), 0.1 * rs.GroupLasso("in")],
    [0.3 * rs.L2(), 0.1 * rs.GroupLasso("out"), 0.05 * rs.L1(), 0.2 * rs.GroupLasso("out")],
    [0.2 * rs.Norm(2), 0.1 * rs.ElasticNet(0.3, 0.2)],
]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("penalties", PAIRS, ids=str)
def test_proximal_rules_on_one_tensor_are_the_rule_of_their_sum(penalties, make):
    models = []
    for plan in ([p.on("weight", how="proximal") for p in penalties], sum(penalties).on("weight", how="proximal")):
        torch.manual_seed(0)
        model = nn.Linear(5, 4).double()
        optimizer = make(model.parameters(), lr=0.05)
        rs.attach(model, plan, optimizer)
        for _ in range(5):
            pull(model)
            optimizer.step()
        models.append(model.weight.detach())
    torch.testing.assert_close(models[0], models[1], rtol=1e-12, atol=1e-14)


def test_first_the_prox_then_the_projection():
    model = nn.Linear(5, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [rs.UnitNorm().on("weight"), 0.5 * rs.L1().on("weight", how="proximal")]
    rs.attach(model, rules, optimizer)
    w = model.weight.detach().numpy().copy()
    np.testing.assert_allclose(np.linalg.norm(w, axis=1), 1, rtol=1e-12)
    pull(model)
    optimizer.step()
    moved = w - 0.1 * (w - 0.3)

    def unit(w):
        return w / np.linalg.norm(w, axis=1, keepdims=True)

    np.testing.assert_allclose(model.weight.detach().numpy(), unit(soft(moved, 0.05)), rtol=1e-12)
    assert not np.allclose(unit(soft(moved, 0.05)), soft(unit(moved), 0.05)), "the other order is another result"
    np.testing.assert_allclose(np.linalg.norm(model.weight.detach().numpy(), axis=1), 1, rtol=1e-12)


# The minimiser


def kkt_violation(w, x, y, strength, l1=0.0):
    """How far 0 is from the subdifferential of ‖xwᵀ - y‖² / 2n + strength Σ √d ‖w_:j‖ + l1 Σ|w|, at worst."""
    gradient, worst = (x @ w.T - y).T @ x / len(x), 0.0
    weight = strength * sqrt(len(w))
    for column, g in zip(w.T, gradient.T, strict=True):
        if np.linalg.norm(column) == 0:
            worst = max(worst, np.linalg.norm(soft(g, l1)) - weight)
            continue
        g = g + weight * column / np.linalg.norm(column) + l1 * np.sign(column)
        g = np.where(column == 0, soft(g, l1), g)
        worst = max(worst, np.linalg.norm(g))
    return worst


def least_squares():
    x, w = normal(60, 8), normal(3, 8, seed=1)
    w[:, [1, 4, 6]] = 0
    return x, x @ w.T + 0.1 * normal(60, 3, seed=2)


@pytest.mark.parametrize(("name", "l1"), [*((name, 0.0) for name in OPTIMIZERS), ("SGD, momentum", 0.1), ("Adam", 0.1)])
def test_group_lasso_reaches_the_minimiser(name, l1):
    x, y = least_squares()
    gram, correlation = x.T @ x / len(x), y.T @ x / len(x)
    model = nn.Linear(8, 3, bias=False).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    rules = [0.3 * rs.GroupLasso(per="in").on("weight", how="proximal")]
    rules += [l1 * rs.L1().on("weight", how="proximal")] * (l1 > 0)
    rs.attach(model, rules, optimizer)

    def violation(w):
        return kkt_violation(w, x.numpy(), y.numpy(), 0.3, l1)

    start = model.weight.detach().numpy().copy()
    for step in range(1500):
        model.weight.grad = model.weight.detach() @ gram - correlation
        optimizer.step()
        if step % 100 == 99 and violation(model.weight.detach().numpy()) < 1e-10:
            break
    w = model.weight.detach().numpy()
    assert violation(w) < 1e-10
    assert (np.linalg.norm(w, axis=0) == 0).sum() in (3, 4, 5), "whole inputs are switched off, and not all"
    for wrong in (start, w + 1e-6, np.where(np.abs(w) < 0.5, 0, w)):
        assert violation(wrong) > 1e-8, "the oracle notices"
