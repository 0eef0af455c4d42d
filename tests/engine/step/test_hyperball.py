"""Hyperball: equal to a reference in float64, for each optimizer; steps that do nothing; what is refused."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import restrain as rs
from everywhere.workers import together
from restrain.errors import HowError, OptimizerError, PlanError, RestrainWarning, TransformError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-3),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.05, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0.0),
}


def gradients(steps=6):
    torch.manual_seed(1)
    return [torch.randn(4, 6, dtype=torch.float64) for _ in range(steps)]


def fresh(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(6, 4, bias=False).to(dtype)


def reference(make, grads, radius=None, per=None, dtype=torch.float64):
    """20 lines: the optimizer on a shadow of the weight, reset to it before each step; u is what it moved by."""
    w = fresh(dtype).weight.detach().double()
    shadow = nn.Parameter(w.clone())
    optimizer = make([shadow])
    dims = (0, 1) if per is None else (1,)
    size = w.norm(dim=dims, keepdim=True)
    target = size if radius is None else torch.full_like(size, radius)
    w = w * target / size
    for grad in grads:
        shadow.data.copy_(w)
        shadow.grad = grad.clone()
        optimizer.step()
        u = w - shadow.detach()
        length = u.norm(dim=dims, keepdim=True)
        lr = optimizer.param_groups[0]["lr"]
        moved = w - lr * target * u / torch.where(length == 0, 1, length)
        w = torch.where(length == 0, w, target * moved / moved.norm(dim=dims, keepdim=True))
    return w


def train(make, grads, what, dtype=torch.float64):
    layer = fresh(dtype)
    optimizer = make(layer.parameters())
    rs.attach(layer, what.on("weight"), optimizer)
    for grad in grads:
        layer.weight.grad = grad.to(dtype)
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("radius", "per"), [(None, None), (2.5, None), (None, "out")])
def test_it_is_the_reference(name, radius, per):
    make = OPTIMIZERS[name]
    found = train(make, gradients(), rs.Hyperball(radius, per=per))
    expected = reference(make, gradients(), radius, per)
    near = 1e-2 if name == "Muon" else 1e-9  # torch's Muon orthogonalises in bfloat16
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    norm = found.norm() if per is None else found.norm(dim=1)
    held = fresh().weight.norm() if per is None else fresh().weight.norm(dim=1)
    torch.testing.assert_close(
        norm, held.detach() if radius is None else torch.full_like(norm, radius), rtol=1e-12, atol=0
    )


def test_the_reference_sees_what_is_wrong():
    make = OPTIMIZERS["Adam"]
    right = reference(make, gradients())
    layer = fresh()
    optimizer, size = make(layer.parameters()), layer.weight.detach().norm()
    for grad in gradients():  # the norm of the weight alone is held
        layer.weight.grad = grad
        optimizer.step()
        layer.weight.data.mul_(size / layer.weight.norm())
    assert (layer.weight - right).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_have_the_direction_of_the_formula(name, dtype):
    """To half a unit in the last place; of a movement of 2 % bfloat16 keeps less than 3 bits."""

    def short(parameters):
        optimizer = OPTIMIZERS[name](parameters)
        optimizer.param_groups[0]["lr"] = 0.02
        return optimizer

    found = train(short, gradients(1), rs.Hyperball(), dtype)
    expected = reference(short, gradients(1), dtype=dtype)
    near = 0.51 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=1e-7)


def test_scale_of_the_gradient_does_not_matter():
    for scale in (1e-30, 1e30):
        found = train(OPTIMIZERS["SGD"], [g * scale for g in gradients()], rs.Hyperball(), torch.float32)
        torch.testing.assert_close(found.double(), reference(OPTIMIZERS["SGD"], gradients()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_that_cancels_the_weight_leaves_no_nan(dtype, compile):
    """At lr = 1 and u along w nothing but rounding is left, whose square may come out below zero."""
    for seed in range(8):
        torch.manual_seed(seed)
        layer = nn.Linear(7, 5, bias=False).to(dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        rs.attach(layer, rs.Hyperball().on("weight"), optimizer, compile=compile)
        layer.weight.grad = 0.3 * layer.weight.detach().clone()
        optimizer.step()
        assert layer.weight.isfinite().all()


def test_nothing_happens_where_nothing_moves():
    layer = fresh()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rs.attach(layer, rs.Hyperball(per="out").on("weight"), optimizer)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(before)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    optimizer.param_groups[0]["lr"] = 0.0
    layer.weight.grad = torch.randn_like(before)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    optimizer.param_groups[0]["lr"] = 0.1
    layer.weight.grad[1:] = 0
    optimizer.step()
    assert torch.equal(layer.weight[1:], before[1:])
    assert not torch.equal(layer.weight[0], before[0])
    layer.weight.grad = None
    optimizer.step()


def test_a_skipped_step_of_a_scaler():
    layer = fresh(torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rs.attach(layer, rs.Hyperball().on("weight"), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = layer.weight.detach().clone()
    for value in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((value * layer(torch.ones(2, 6))).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) == (value == torch.inf)
    torch.testing.assert_close(layer.weight.norm(), before.norm())


def test_the_radius_is_kept_in_the_state():
    layer = fresh()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    reg = rs.attach(layer, rs.Hyperball().on("weight"), optimizer)
    state, size = reg.state_dict(), layer.weight.detach().norm()
    other = fresh()
    other.weight.data.mul_(3)
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    again = rs.attach(other, rs.Hyperball().on("weight"), second)
    again.load_state_dict(state)
    other.weight.grad = torch.ones_like(other.weight)
    second.step()
    torch.testing.assert_close(other.weight.detach().norm(), size)
    assert rs.Plan.from_dict(reg.plan.to_dict()).rules[0].what == rs.Hyperball()


def test_experts_have_norms_of_their_own():
    stack = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))})
    sizes = stack["w"].detach().norm(dim=(1, 2))
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.05)
    rs.attach(stack, rs.Hyperball(per=0).on("w"), optimizer)
    for _ in range(3):
        stack["w"].grad = torch.randn_like(stack["w"])
        optimizer.step()
    torch.testing.assert_close(stack["w"].detach().norm(dim=(1, 2)), sizes, rtol=1e-12, atol=0)


def sharded(rank, ranks, name, per, dtype=torch.float64):
    layer = fresh(dtype)
    fully_shard(layer)
    optimizer = OPTIMIZERS[name](layer.parameters())
    rs.attach(layer, rs.Hyperball(per=per).on("weight"), optimizer)
    for grad in gradients():
        # of each rank the same: averaged by FSDP2
        layer(torch.eye(6, dtype=dtype)).mul(grad.T.to(dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.weight.full_tensor().detach()


@pytest.mark.parametrize(("name", "per"), [("Adam", None), ("Adam", "out"), ("Adam", "in"), ("Adagrad", None)])
def test_shards_are_whole(name, per):
    layer = fresh()
    optimizer = OPTIMIZERS[name](layer.parameters())
    rs.attach(layer, rs.Hyperball(per=per).on("weight"), optimizer)
    for grad in gradients():
        layer.weight.grad = grad
        optimizer.step()
    for found in together(2, sharded, name=name, per=per):
        torch.testing.assert_close(found, layer.weight.detach(), rtol=1e-12, atol=1e-13)


def test_what_cannot_go_together():
    layer = fresh()
    optimizer = torch.optim.Adam(layer.parameters())
    for other in (
        rs.L1().on("weight", how="proximal"),
        rs.L2().on("weight", how="decoupled"),
        rs.NonNegative().on("weight"),
        rs.Hyperball(1.0).on("weight"),
    ):
        with pytest.raises(HowError, match="holds the norm"):
            rs.attach(layer, [rs.Hyperball().on("weight"), other], optimizer)
    with pytest.warns(RestrainWarning, match="weight_decay"):
        rs.attach(layer, rs.Hyperball().on("weight"), torch.optim.AdamW(layer.parameters())).detach()
    with pytest.raises(OptimizerError, match="LBFGS"):
        rs.attach(layer, rs.Hyperball().on("weight"), torch.optim.LBFGS(layer.parameters()))
    half = fresh(torch.bfloat16)
    with pytest.raises(OptimizerError, match="float32"):
        rs.attach(half, rs.Hyperball().on("weight"), torch.optim.Adagrad(half.parameters()))
    for bad in (0.0, -1.0, float("inf"), True):
        with pytest.raises(TransformError, match="radius="):
            rs.Hyperball(bad)
    nn.init.zeros_(layer.weight)
    with pytest.raises(TransformError, match="norm of zero"):
        rs.attach(layer, rs.Hyperball().on("weight"), optimizer)
    with pytest.raises(HowError, match="how="):
        rs.Hyperball().on("weight", how="parametrize")
    with pytest.raises(PlanError, match="momentum='tangent'"):
        rs.Hyperball().on("weight", momentum="tangent")
