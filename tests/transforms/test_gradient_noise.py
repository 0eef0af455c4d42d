"""Noise on gradients: how much, when, and for which parameters."""

import math

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import OptimizerError, SelectionError, TransformError


class Many(nn.Module):
    """A parameter with many entries, so that one step measures the deviation."""

    def __init__(self, size=40_000):
        super().__init__()
        self.w, self.idle = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.ones(3))


def step(model, optimizer):
    """One step on a loss whose gradient is 2 everywhere; what the optimizer saw beyond that."""
    optimizer.zero_grad()
    (2 * model.w).sum().backward()
    optimizer.step()
    return model.w.grad - 2


def check_deviation(noise, std):
    assert abs(float(noise.std()) / std - 1) < 4.5 / math.sqrt(2 * noise.numel())
    assert abs(float(noise.mean())) < 4.5 * std / math.sqrt(noise.numel())


@pytest.mark.parametrize("decay", [0.0, 0.55, 2.0])
def test_the_variance_falls_with_the_steps(decay):
    torch.manual_seed(0)
    model = Many()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.GradientNoise(0.3, decay).on("*", start=1), optimizer)
    assert reg.plan.rules[0].how == "gradient"
    assert step(model, optimizer).eq(0).all(), "not before its start"
    for t in range(4):
        check_deviation(step(model, optimizer), 0.3 * (1 + t) ** (-decay / 2))
    assert model.idle.grad is None
    assert torch.equal(model.idle, torch.ones(3))


def test_deviation_oracle():
    torch.manual_seed(0)
    noise = rs.GradientNoise(1.0).draw(torch.zeros(40_000), step=1)
    check_deviation(noise, 2**-0.275)
    with pytest.raises(AssertionError):
        check_deviation(noise, 2**-0.55)


def test_goes_on_from_a_state():
    torch.manual_seed(0)

    def made():
        model = Many(500)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, rs.attach(model, rs.GradientNoise(1.0, 1.0).on("w", every=2), optimizer)

    model, optimizer, reg = made()
    for _ in range(3):
        step(model, optimizer)
    state, generator = reg.state_dict(), torch.get_rng_state()
    expected = [step(model, optimizer) for _ in range(3)]
    model, optimizer, reg = made()
    reg.load_state_dict(state)
    torch.set_rng_state(generator)
    for e in expected:
        assert torch.equal(step(model, optimizer), e)
    assert [bool(e.any()) for e in expected] == [False, True, False]


def test_steps_that_are_none_do_not_count():
    model = Many(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg = rs.attach(model, rs.GradientNoise(1.0).on("w"), optimizer)
    step(model, optimizer)
    assert reg.state_dict()["optimizer_steps"] == [0]
    model.w.requires_grad_(False)
    optimizer.param_groups[0]["lr"] = 0.1
    before = model.w.grad.clone()
    model.idle.sum().backward()
    optimizer.step()
    assert torch.equal(model.w.grad, before), "frozen"


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients(fused):
    torch.manual_seed(0)
    model = Many()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    rs.attach(model, rs.GradientNoise(0.5).on("w"), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((2 * model.w).sum()).backward()
    scaler.step(optimizer)
    check_deviation(-model.w.detach() - 2, 0.5)


def test_joins_penalties_closures_and_complex_or_maximized_parameters():
    torch.manual_seed(0)
    model = Many()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = [
        rs.GradientNoise(0.2).on("w"),
        3.0 * rs.L2().on("w", how="gradient"),
        rs.GradientNoise(0.1).on("w", name="b"),
    ]
    rs.attach(model, plan, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (2 * model.w).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        model.w.fill_(0.5)
    assert torch.isclose(optimizer.step(closure), torch.tensor(40_000 * (1 + 0.75)))
    check_deviation(model.w.grad - 2 - 3, 0.05**0.5)
    turned = nn.ParameterDict({"w": nn.Parameter(torch.zeros(30_000, dtype=torch.complex64))})
    optimizer = torch.optim.SGD(turned.parameters(), lr=0.1, maximize=True)
    rs.attach(turned, rs.GradientNoise(0.2).on("w"), optimizer)
    turned["w"].grad = torch.zeros_like(turned["w"])
    optimizer.step()
    assert abs(float(turned["w"].grad.abs().square().mean()) / 0.04 - 1) < 0.03


def test_a_shared_generator_draws_the_same():
    noise, grads = rs.GradientNoise(0.3), [torch.zeros(3), torch.zeros(2, 2, dtype=torch.complex64)]
    for grad in grads:
        first, again, other = (noise.draw(grad, 0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.dtype == grad.dtype


def test_refused():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="sparse gradients"):
        rs.attach(model, rs.GradientNoise(0.1).on("0.weight"), optimizer)
    with pytest.raises(OptimizerError, match="no given optimizer"):
        rs.attach(model, rs.GradientNoise(0.1).on("1.weight"))
    with pytest.raises(SelectionError, match="gradients of parameters"):
        rs.GradientNoise(0.1).on(rs.outputs("1"))
    for wrong in (-1, math.inf, "1", None):
        with pytest.raises(TransformError):
            rs.GradientNoise(wrong)
        with pytest.raises(TransformError):
            rs.GradientNoise(0.1, wrong)
    free = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, 3))})
    optimizer = torch.optim.SGD(free.parameters(), lr=0.1)
    rs.attach(free, rs.GradientNoise(0.1).on("w"), optimizer)
    nn.functional.embedding(torch.tensor([1]), free["w"], sparse=True).sum().backward()
    with pytest.raises(OptimizerError, match="sparse gradient"):
        optimizer.step()


def test_plan_round_trip(tmp_path):
    plan = rs.Plan((rs.GradientNoise(0.1, 1.5).on("*.weight", start=3),))
    plan.save(tmp_path / "plan.yaml")
    assert rs.Plan.load(tmp_path / "plan.yaml") == plan
