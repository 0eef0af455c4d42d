"""Forwards that a loss counts: they join it in any way (A1), after others' steps (A2) and after interrupts (E1)."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from faults.helpers import Interrupt, sgd

X = torch.linspace(0, 3, 50, dtype=torch.float64)[:, None]
Z = torch.full((2, 1), 0.3, dtype=torch.float64)


def network(inputs=1, outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def sparsity(model, x):
    """Return the mean over samples of Σ|h|, h the hidden layer."""
    return torch.tanh(F.linear(x, model[0].weight, model[0].bias)).abs().sum() / len(x)


def slope(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]


# A1: forwards whose output isn't in the loss, and which the loss depends on all the same


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_counts_that_joins_the_loss_by_a_derivative(first):
    model = network()
    with rs.attach(model, rs.L1().on(rs.outputs("1"), name="sparse")) as reg:
        parts = [lambda: slope(model, X).square().mean(), lambda: model(Z).square().mean()]
        data = sum(part() for part in (parts if first else parts[::-1]))
        penalty = reg.loss(data) - data
    right = (sparsity(model, X) + sparsity(model, Z)) / 2
    torch.testing.assert_close(penalty, right)
    assert reg.values()["sparse"] == pytest.approx(right.item())
    wanted = torch.autograd.grad(right, model[0].weight)
    torch.testing.assert_close(torch.autograd.grad(penalty, model[0].weight), wanted)


def test_a_forward_counts_that_joins_the_loss_as_forces():
    """Energies of one batch and forces of another: the output of the second forward isn't in the loss."""
    model = network()
    with rs.attach(model, rs.L1().on(rs.outputs("1"))) as reg:
        data = (model(Z) - 1).square().mean() + (slope(model, X) + 1).square().mean()
        penalty = reg.loss(data) - data
    torch.testing.assert_close(penalty, (sparsity(model, X) + sparsity(model, Z)) / 2)


def test_a_forward_counts_whose_features_join_the_loss():
    model, taken = network(), []
    model[1].register_forward_hook(lambda layer, given, output: taken.append(output))
    with rs.attach(model, rs.L1().on(rs.outputs("1"))) as reg:
        model(X)  # for its features only
        data = taken[0].square().mean() + model(Z).square().mean()
        penalty = reg.loss(data) - data
    torch.testing.assert_close(penalty, (sparsity(model, X) + sparsity(model, Z)) / 2)


def test_a_forward_that_the_loss_does_not_depend_on_is_left_out():
    model = network()
    with rs.attach(model, rs.L1().on(rs.outputs("1"))) as reg:
        model(X)
        data = model(Z).square().mean()
        penalty = reg.loss(data) - data
    torch.testing.assert_close(penalty, sparsity(model, Z))


# A2: steps of optimizers that have nothing to do with the model


def pair(strength=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = sgd(model)
    return model, optimizer, rs.attach(model, strength * rs.L1().on(rs.outputs("1")), optimizer)


@pytest.mark.parametrize("attached_too", [False, True])
def test_one_forward_of_a_generator_serves_a_step_of_the_discriminator_and_its_own_loss(attached_too):
    model, optimizer, reg = pair()
    critic, z = nn.Linear(4, 1), torch.randn(16, 3)
    other = sgd(critic)
    rs.attach(critic, 0.1 * rs.L2().on("weight", how="gradient"), other) if attached_too else None
    for _ in range(3):
        fake = model(z)
        other.zero_grad()
        critic(fake.detach()).mean().backward()
        other.step()
        optimizer.zero_grad()
        loss = -critic(fake).mean()
        total = reg.loss(loss)
        right = F.relu(model[0](z)).sum() / len(z)
        torch.testing.assert_close(total - loss, right, rtol=1e-4, atol=1e-5)
        total.backward()
        optimizer.step()


SEEDED = threading.Lock()


def trained(own, turns=None):
    """Train one model; where there are turns, wait for one's own before each half of a step."""
    with SEEDED:  # of the process
        model, optimizer, reg = pair(0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(own))
    for number in range(8):
        assert turns is None or turns[own].acquire(timeout=20)
        if number % 2 == 0:
            out = model(x)
        else:
            optimizer.zero_grad()
            reg.loss(out.square().mean()).backward()
            optimizer.step()
        if turns is not None:
            turns[1 - own].release()
    return [p.detach().clone() for p in model.parameters()]


def test_two_models_that_train_in_two_threads_end_as_one_after_the_other():
    right = [trained(own) for own in (0, 1)]
    found, turns = {}, [threading.Semaphore(1), threading.Semaphore(0)]

    def work(own):
        try:
            found[own] = trained(own, turns)
        except Exception as error:
            found[own] = error
            turns[1 - own].release(100)

    threads = [threading.Thread(target=work, args=(own,), daemon=True) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for own in (0, 1):
        torch.testing.assert_close(found[own], right[own])


def test_a_step_of_the_models_own_optimizer_ends_what_its_forwards_gave():
    model, optimizer, reg = pair()
    x, z = torch.randn(5, 3), torch.randn(7, 3)
    stale = model(x)
    reg.loss(stale.sum()).backward()
    optimizer.step()
    loss = model(z).sum() + 0 * model[0].weight.sum()
    torch.testing.assert_close(reg.loss(loss) - loss, F.relu(model[0](z)).sum() / len(z), rtol=1e-4, atol=1e-4)


# E1: an interrupt inside a forward


def losses(hit=None, interrupt=None):
    """Return three losses of training and one after another forward; something comes in a forward before them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = sgd(model, lr=1e-4)
    reg = rs.attach(model, rs.L2().on(rs.outputs("1")), optimizer)
    large, x = 100 * torch.ones(64, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    if interrupt is not None:
        with interrupt:
            model(large)
    elif hit is not None:

        def stop(*given):
            raise hit

        handle = model[2].register_forward_pre_hook(stop)
        with pytest.raises(hit):
            model(large)
        handle.remove()
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = reg.loss(0 * model(x).sum())
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    model(100 * x)
    return [*found, reg.loss(0 * model(x).sum()).item()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupted_forward_leaves_later_losses_as_they_are(error):
    assert losses(error) == pytest.approx(losses())


def test_a_forward_that_raised_an_exception_leaves_later_losses_as_they_are():
    assert losses(ValueError) == pytest.approx(losses())


def test_an_interrupt_at_any_line_of_ours_in_a_forward_leaves_later_losses_as_they_are():
    right, seen, wrong = losses(), Interrupt(), {}
    losses(interrupt=seen)
    assert len(seen.lines) > 20
    for line in seen.lines:
        interrupt = Interrupt(line)
        try:
            found = losses(interrupt=interrupt)
        except Exception as error:
            wrong[line] = error
        else:
            wrong.update({} if found == pytest.approx(right) else {line: found})
        assert interrupt.raised
    assert not wrong


class Stops(nn.Linear):
    """A layer that is interrupted while its forward runs."""

    on = True

    def forward(self, x):
        if self.on:
            raise KeyboardInterrupt
        return F.linear(x, self.weight, self.bias)


def noisy():
    torch.manual_seed(0)
    model = nn.Sequential(Stops(4, 5), nn.Tanh(), nn.Linear(5, 2))
    right = copy.deepcopy(model.state_dict())
    reg = rs.attach(model, rs.DropConnect(0.5).on("0.weight"), sgd(model))
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(3, 4))
    model[0].on = False
    return model, reg, right


def test_weights_can_be_edited_after_an_interrupted_forward_with_noise_on_them():
    model, _, _ = noisy()
    assert model[0].weight is dict(model.named_parameters())["0.weight"]
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    model.eval()
    wanted = F.linear(torch.ones(1, 4), torch.full((5, 4), 2.0), model[0].bias)
    torch.testing.assert_close(model[0](torch.ones(1, 4)), wanted)


def test_a_model_can_be_copied_after_an_interrupted_forward_with_noise_on_its_weights():
    model, _, right = noisy()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(dict(twin.state_dict()), dict(right), rtol=0, atol=0)
    wanted = F.linear(torch.ones(1, 4), right["0.weight"], right["0.bias"])
    torch.testing.assert_close(twin.eval()[0](torch.ones(1, 4)), wanted)


def test_a_model_that_is_saved_after_an_interrupted_forward_with_noise_on_its_weights_can_be_trained(tmp_path):
    model, _, right = noisy()
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert twin[0].weight is dict(twin.named_parameters())["0.weight"]
    torch.testing.assert_close(dict(twin.state_dict()), dict(right), rtol=0, atol=0)
    twin(torch.ones(3, 4)).sum().backward()
    assert twin[0].weight.grad is not None


@pytest.mark.parametrize("layer", [nn.Linear, nn.GRU])
def test_an_interrupt_at_any_line_of_ours_leaves_the_stored_weights_in_sight(layer):
    name, x = ("0.weight", torch.ones(3, 4)) if layer is nn.Linear else ("0.weight_ih_l0", torch.ones(2, 3, 4))

    def left(interrupt):
        torch.manual_seed(0)
        model = nn.Sequential(layer(4, 5))
        right = [copy.deepcopy(model.state_dict()), model(x)]
        rs.attach(model, rs.DropConnect(0.5).on(name), sgd(model))
        with interrupt:
            model(x)
        named, own = dict(model.named_parameters()), name.partition(".")[2]
        assert getattr(model[0], own) is named[name]
        assert getattr(copy.deepcopy(model)[0], own).is_leaf
        torch.testing.assert_close([copy.deepcopy(model.eval()).state_dict(), model(x)], right)

    seen = Interrupt()
    left(seen)
    assert len(seen.lines) > 20
    for line in seen.lines:
        interrupt = Interrupt(line)
        left(interrupt)
        assert interrupt.raised
