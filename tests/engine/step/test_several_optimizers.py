"""Several given optimizers: a training step is one, and strengths move once it has ended."""

import pytest
import torch
from torch import nn

import restrain as rs


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def halves(model, lr=0.1):
    return [torch.optim.SGD(model[number].parameters(), lr=lr) for number in (0, 2)]


def backward(model, reg):
    for p in model.parameters():
        p.grad = None
    loss = reg.loss(model(torch.ones(2, 3, dtype=torch.float64)).square().mean())
    loss.backward()
    return loss.item()


MOVING = {
    "schedule": rs.schedules.Linear(0.1, 0.5, steps=5),
    "zeros": rs.Target(zeros=0.5, every=1, start=0.02),
    "norm": rs.Target(norm=0.5, every=1, start=0.02),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("strength", MOVING.values(), ids=MOVING)
def test_one_strength_a_training_step(strength, turned):
    """As one optimizer for all, in whatever order the two step."""

    def trained(make):
        model = network()
        optimizers = make(model)
        reg = rs.attach(model, strength * rs.L1().on("*.weight", how="proximal", name="rule"), optimizers)
        seen = []
        for _ in range(5):
            backward(model, reg)
            for optimizer in optimizers:
                optimizer.step()
            seen.append(reg.strengths()["rule"])
        return [p.detach() for p in model.parameters()], seen

    found = trained(lambda model: halves(model)[:: -1 if turned else 1])
    expected = trained(lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)])
    assert len(set(expected[1])) == 5
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_what_rules_keep_is_brought_up_to_date_once():
    def trained(make):
        model = network()
        optimizers = make(model)
        reg = rs.attach(model, 0.1 * rs.Distance(decay=0.5).on("*", name="near"), optimizers)
        for _ in range(3):
            backward(model, reg)
            for optimizer in optimizers:
                optimizer.step()
        return list(reg.state_dict()["kept"].values())

    expected = trained(lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)])
    torch.testing.assert_close(trained(halves), expected, rtol=1e-12, atol=0)


COUNTED = rs.schedules.Function(lambda step: 1.0 + step)


def counting(model, optimizers, how="loss"):
    return rs.attach(model, COUNTED * rs.L2().on("*.weight", how=how, name="rule"), optimizers)


def test_an_optimizer_that_steps_now_and_then():
    """Its training steps end with the next loss; at the step, before the other steps again; in a checkpoint, too."""
    model = network()
    often, seldom = halves(model)
    reg = counting(model, [often, seldom])
    for number in range(6):
        data = model(torch.ones(2, 3, dtype=torch.float64)).square().mean()
        penalty = reg.loss(data).item() - data.item()
        backward(model, reg)
        squares = model[0].weight.square().sum() + model[2].weight.square().sum()
        assert penalty == pytest.approx((1 + number) * squares.item(), rel=1e-12)
        often.step()
        if number % 2:
            seldom.step()
            assert reg.strengths() == {"rule": number + 2}
    often.step()
    assert reg.strengths() == {"rule": 7}
    assert reg.state_dict()["strengths"]["rule"]["strength"] == 8


def test_outputs_too():
    """Here the next forward ends it, as what it measures has its strength already."""
    model = network()
    often, seldom = halves(model, lr=0.01)
    reg = rs.attach(model, COUNTED * rs.L2().on(rs.outputs("1"), name="rule"), [often, seldom])
    for number in range(4):
        hidden = model[:2](torch.ones(2, 3, dtype=torch.float64)).detach()
        data = model(torch.ones(2, 3, dtype=torch.float64)).square().mean()
        loss = reg.loss(data)
        assert (loss - data).item() == pytest.approx((1 + number) * hidden.square().sum().item() / 2, rel=1e-12)
        loss.backward()
        often.step()
        if number == 1:
            seldom.step()


def test_without_a_loss_the_next_step_ends_the_one_before():
    model = network()
    often, seldom = halves(model, lr=0.01)
    counting(model, [often, seldom], how="proximal")
    seen = []
    for number in range(4):
        before = model[0].weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        often.step()
        seen.append((before / model[0].weight.detach()).mean().item())  # 1 + 2 · lr · strength
        if number == 2:
            seldom.step()
    assert seen == pytest.approx([1 + 0.02 * (1 + number) for number in range(4)], rel=1e-12)


@pytest.mark.parametrize("rest", ["frozen", "no rate", "no gradient"])
def test_an_optimizer_with_nothing_to_do_holds_nothing_up(rest):
    model = network()
    one, other = halves(model)
    reg = counting(model, [one, other])
    if rest == "frozen":
        model[2].requires_grad_(False)
    if rest == "no rate":
        other.param_groups[0]["lr"] = 0.0
    for number in range(3):
        backward(model, reg)
        one.step()
        if rest == "no gradient":
            other.zero_grad()
            other.step()
        assert reg.strengths() == {"rule": number + 2}


def test_a_stranger_and_what_is_left_behind():
    model = network()
    given, stranger = halves(model), torch.optim.SGD(model.parameters(), lr=0.1)
    reg = counting(model, given)
    for number in range(3):
        backward(model, reg)
        stranger.step()
        assert reg.strengths() == {"rule": number + 2}
    reg.detach()
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in given)
