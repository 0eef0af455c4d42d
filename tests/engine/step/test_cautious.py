"""Cautious decay, and strengths that follow the learning rate, against loops written out."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import restrain as rs
from everywhere.workers import together
from restrain.errors import HowError, PenaltyError, PlanError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def fresh(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(6, 4, bias=False).to(dtype)


def gradients(steps=8):
    torch.manual_seed(1)
    return [torch.randn(4, 6, dtype=torch.float64) for _ in range(steps)]


def reference(make, decay, cautious=True, schedule=lambda t: 1.0):
    """The optimizer alone gives u = before - after; then w = before - u - [w u ≥ 0] · decay(before)."""
    w, shadow = fresh().weight.detach().clone(), nn.Parameter(fresh().weight.detach().clone())
    optimizer = make([shadow])
    base = optimizer.param_groups[0]["lr"]
    for t, grad in enumerate(gradients()):
        lr = optimizer.param_groups[0]["lr"] = base * schedule(t)
        shadow.data.copy_(w)
        shadow.grad = grad.clone()
        optimizer.step()
        u = w - shadow.detach()
        mask = (w * u >= 0) if cautious else torch.ones_like(w)
        w = w - u - mask * decay(w, lr, t)
    return w


def train(make, rules, schedule=None, dtype=torch.float64):
    layer = fresh(dtype)
    optimizer = make(layer.parameters())
    rs.attach(layer, rules, optimizer)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for grad in gradients():
        layer.weight.grad = grad.to(dtype)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return layer.weight.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_coordinates_that_the_step_shrinks_decay(name):
    found = train(OPTIMIZERS[name], 0.3 * rs.L2().on("weight", how="decoupled", cautious=True))
    expected = reference(OPTIMIZERS[name], lambda w, lr, t: lr * 0.6 * w)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    plain = reference(OPTIMIZERS[name], lambda w, lr, t: lr * 0.6 * w, cautious=False)
    assert (found - plain).abs().max() > 1e-3


def test_any_penalty_and_the_clamp_at_zero():
    found = train(OPTIMIZERS["SGD"], 3.0 * rs.L1().on("weight", how="decoupled", cautious=True))

    def decay(w, lr, t):
        return torch.where((w - lr * 3.0 * w.sign()) * w < 0, w, lr * 3.0 * w.sign())  # not past zero

    torch.testing.assert_close(found, reference(OPTIMIZERS["SGD"], decay), rtol=1e-12, atol=1e-13)
    rows = train(OPTIMIZERS["Adam"], 0.5 * rs.GroupLasso().on("weight", how="decoupled", cautious=True))
    expected = reference(OPTIMIZERS["Adam"], lambda w, lr, t: lr * 0.5 * 6**0.5 * w / w.norm(dim=1, keepdim=True))
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-12)


def test_zero_movement_decays_and_skipped_steps_do_not():
    layer = fresh()
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rs.attach(layer, 0.5 * rs.L2().on("weight", how="decoupled", cautious=True, every=2), optimizer)
    layer.weight.grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), 0.9 * before)
    optimizer.step()  # not due
    torch.testing.assert_close(layer.weight.detach(), 0.9 * before)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), 0.9 * before)


def test_together_with_prox_and_constraint():
    layer = fresh()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    plan = [
        0.3 * rs.L2().on("weight", how="decoupled", cautious=True),
        0.2 * rs.L1().on("weight", how="proximal"),
        rs.Box(-0.3, 0.3).on("weight"),
    ]
    w = fresh().weight.detach().clamp(-0.3, 0.3)
    rs.attach(layer, plan, optimizer)
    for grad in gradients():
        layer.weight.grad = grad
        optimizer.step()
        u = 0.1 * grad
        w = w - u - (w * u >= 0) * 0.1 * 0.6 * w
        w = (w.sign() * (w.abs() - 0.02).clamp_min(0)).clamp(-0.3, 0.3)
    torch.testing.assert_close(layer.weight.detach(), w)


def sharded(rank, ranks):
    layer = fresh()
    fully_shard(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    rs.attach(layer, 0.3 * rs.L2().on("weight", how="decoupled", cautious=True), optimizer)
    for grad in gradients():
        layer(torch.eye(6, dtype=torch.float64)).mul(grad.T).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.weight.full_tensor().detach()


def test_shards():
    expected = reference(OPTIMIZERS["Adam"], lambda w, lr, t: lr * 0.6 * w)
    for found in together(2, sharded):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_refusals_and_plans():
    with pytest.raises(PlanError, match="cautious=True goes with how='decoupled'"):
        rs.L2().on("weight", cautious=True)
    with pytest.raises(PlanError, match="cautious= is True or False"):
        rs.L2().on("weight", how="decoupled", cautious=1)
    rule = 0.1 * rs.schedules.LearningRate(peak=0.1) * rs.L2().on("weight", how="decoupled", cautious=True)
    assert rs.Plan.from_dict(rs.Plan.of([rule]).to_dict()).rules[0] == rule
    assert "cautious=True" in repr(rule)


# Strengths that follow the learning rate


def ramp(t):
    return (0.25, 0.5, 1.0, 1.0, 0.7, 0.4, 0.2, 0.1, 0.1)[t]


@pytest.mark.parametrize("power", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("how", ["decoupled", "gradient", "proximal"])
def test_corrected_and_independent_decay(power, how):
    """AdamC: decay by γ_t / γ_max · γ_t λ; independent decay, power -1: by γ_max λ at each step."""
    rule = 0.3 * rs.schedules.LearningRate(power) * rs.L2().on("weight", how=how)
    found = train(OPTIMIZERS["SGD"], rule, ramp)
    w = fresh().weight.detach()
    for t, grad in enumerate(gradients()):
        lr, strength = 0.1 * ramp(t), 0.3 * ramp(t) ** power
        if how == "decoupled":
            w = w - lr * 2 * strength * w - lr * grad
        elif how == "gradient":
            w = w - lr * (grad + 2 * strength * w)
        else:
            w = (w - lr * grad) / (1 + 2 * strength * lr)
    torch.testing.assert_close(found, w)


def test_the_peak_is_the_schedulers_or_is_given():
    layer = fresh()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.8, total_steps=10)  # begins at 0.8 / 25
    reg = rs.attach(layer, rs.schedules.LearningRate() * rs.L2().on("weight", how="decoupled"), optimizer)
    layer.weight.grad = gradients(1)[0]
    optimizer.step()
    assert list(reg.strengths().values()) == pytest.approx([1 / 25])
    reg.detach()
    reg = rs.attach(layer, rs.schedules.LearningRate(peak=0.01) * rs.L2().on("weight", how="decoupled"), optimizer)
    with pytest.raises(PenaltyError, match=r"above peak=0\.01"):
        optimizer.step()


def test_groups_of_other_ratios_are_refused():
    net = nn.Sequential(fresh(), fresh())
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[1].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    reg = rs.attach(net, rs.schedules.LearningRate() * rs.L2().on("*.weight", how="decoupled"), optimizer)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # each at its own peak
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(PenaltyError, match="one rule for each group"):
        optimizer.step()
    reg.detach()


def test_it_needs_an_optimizers_step():
    layer = fresh()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(HowError, match="'decoupled', 'gradient' or 'proximal'"):
        rs.attach(layer, rs.schedules.LearningRate() * rs.L2().on("weight"), optimizer)
    for bad in (0.0, -1.0, "high"):
        with pytest.raises(PenaltyError):
            rs.schedules.LearningRate(peak=bad)
    with pytest.raises(PenaltyError, match="power="):
        rs.schedules.LearningRate("linear")
    with pytest.raises(PenaltyError, match="at a rate, not at a step"):
        rs.schedules.LearningRate().at(3)


def test_no_certificate_of_rules_that_depend_on_steps():
    layer = fresh()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for rule in (0.1 * rs.L2().on("weight", how="decoupled", cautious=True), rs.Sharpness().on("weight")):
        reg = rs.attach(layer, rule, optimizer)
        with pytest.raises(HowError, match="no fixed objective"):
            reg.certificate(lambda: layer(torch.ones(2, 6, dtype=torch.float64)).square().mean())
        reg.detach()
