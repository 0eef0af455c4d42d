"""Training loops as people write them: accumulation, loss scaling, closures, tied and frozen parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs


def make(dtype=torch.float64):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(n=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(6)
    return torch.randn(n, 4, dtype=dtype, generator=g), torch.randint(3, (n,), generator=g)


PENALTY = 0.05 * rs.L1() + 0.1 * rs.L2()


def hand_written(model, x, y):
    h = torch.tanh(model[0](x))
    weights = [model[0].weight, model[2].weight]
    parameters = sum(0.05 * w.abs().sum() + 0.1 * w.square().sum() for w in weights)
    return F.cross_entropy(model[2](h), y) + parameters + 0.2 * h.square().sum() / len(x)


def plan(how="loss"):
    return [PENALTY.on("*.weight", how=how), 0.2 * rs.L2().on(rs.outputs("1"))]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def trained(model):
    return [p.detach().clone() for p in model.parameters()]


def reference_training(steps=5, make_optimizer=sgd):
    model, (x, y) = make(), batch()
    optimizer = make_optimizer(model)
    for _ in range(steps):
        optimizer.zero_grad()
        hand_written(model, x, y).backward()
        optimizer.step()
    return trained(model)


OPTIMIZERS = {
    "SGD": sgd,
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0, foreach=True),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, fused=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.1),
}


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_the_hand_written_loss(name, how):
    model, (x, y) = make(), batch()
    optimizer = OPTIMIZERS[name](model)
    reg = rs.attach(model, plan(how), optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    torch.testing.assert_close(trained(model), reference_training(make_optimizer=OPTIMIZERS[name]))


@pytest.mark.parametrize("how", ["loss", "gradient", "proximal"])
def test_four_accumulated_micro_batches_equal_one_batch(how):
    results = []
    for parts in (1, 4):
        model, (x, y) = make(), batch()
        optimizer = sgd(model)
        reg = rs.attach(model, plan(how), optimizer)
        for _ in range(3):
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (reg.loss(F.cross_entropy(model(xs), ys)) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(trained(model))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("how", ["loss", "gradient", "proximal"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler_with_skipped_steps(how, fused, unscale):
    def optimizer_of(model):
        return torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)

    results = []
    for scaled in (False, True):
        model, (x, y) = make(torch.float32), batch(dtype=torch.float32)
        optimizer = optimizer_of(model)
        reg = rs.attach(model, plan(how), optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=scaled)
        for step in range(6):
            optimizer.zero_grad()
            loss = scaler.scale(reg.loss(F.cross_entropy(model(x), y)))
            loss.backward()
            if step == 2:  # an overflow: the scaler must skip this step, and so must the rules
                if not scaled:
                    continue
                model[0].weight.grad[0, 0] = float("inf")
                before = trained(model)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if step == 2:
                torch.testing.assert_close(trained(model), before, rtol=0, atol=0)
        results.append(trained(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_lbfgs_closures(how):
    model, (x, y) = make(), batch()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn="strong_wolfe", max_iter=30)
    reg = rs.attach(model, plan(how), optimizer)

    def closure():
        optimizer.zero_grad()
        loss = reg.loss(F.cross_entropy(model(x), y))
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)

    other = make()
    optimizer = torch.optim.LBFGS(other.parameters(), lr=0.5, line_search_fn="strong_wolfe", max_iter=30)

    def closure_by_hand():
        optimizer.zero_grad()
        loss = hand_written(other, x, y)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure_by_hand)
    torch.testing.assert_close(trained(model), trained(other), rtol=1e-5, atol=1e-6)


def test_lbfgs_is_refused_for_proximal_rules():
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(rs.errors.OptimizerError, match=r"LBFGS.*closure"):
        rs.attach(model, PENALTY.on("*.weight", how="proximal"), optimizer)


def test_closures_of_other_optimizers():
    model, (x, y) = make(), batch()
    optimizer = sgd(model)
    reg = rs.attach(model, plan("gradient"), optimizer)

    def closure():
        optimizer.zero_grad()
        loss = reg.loss(F.cross_entropy(model(x), y))
        loss.backward()
        return loss

    for _ in range(5):
        value = optimizer.step(closure)
    assert torch.isfinite(value)
    torch.testing.assert_close(trained(model), reference_training())


def test_frozen_parameters_are_left_out_while_they_are_frozen():
    model, (x, y) = make(), batch()
    reg = rs.attach(model, 0.1 * rs.L2().on("*.weight"))
    model[0].weight.requires_grad_(False)
    loss = reg.loss(F.cross_entropy(model(x), y))
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y) + 0.1 * model[2].weight.square().sum())
    assert "left out while frozen: 0.weight" in str(reg)
    model[0].weight.requires_grad_(True)
    expected = F.cross_entropy(model(x), y) + 0.1 * rs.L2()([model[0].weight, model[2].weight])
    torch.testing.assert_close(reg.loss(F.cross_entropy(model(x), y)), expected)


def test_tied_parameters_count_once_under_any_of_their_names():
    model = nn.ModuleDict({"encode": nn.Linear(4, 4, bias=False), "decode": nn.Linear(4, 4, bias=False)})
    model["decode"].weight = model["encode"].weight
    for where in ("encode.weight", "decode.weight", "*.weight", rs.weights, model["decode"]):
        reg = rs.attach(model, rs.L2().on(where))
        torch.testing.assert_close(reg.penalty(), model["encode"].weight.square().sum())
        reg.detach()


def test_tuple_and_dict_outputs_and_packed_sequences():
    torch.manual_seed(0)
    model = nn.LSTM(3, 5, batch_first=True)
    x = torch.randn(4, 6, 3)
    with rs.attach(model, rs.L2().on(rs.outputs())) as reg:
        y, _ = model(x)
        torch.testing.assert_close(reg.penalty(), y.square().sum() / 4)
    with rs.attach(model, rs.L2().on(rs.outputs(index=1, batch_dim=1))) as reg:
        _, (h, _) = model(x)
        torch.testing.assert_close(reg.penalty(), h.square().sum() / 4)
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 5, 3, 1], batch_first=True)
    with rs.attach(model, rs.L2().on(rs.outputs())) as reg:
        out, _ = model(packed)
        torch.testing.assert_close(reg.penalty(), out.data.square().sum() / 4)
    time_first = nn.GRU(3, 5)
    with rs.attach(time_first, rs.L2().on(rs.outputs())) as reg:
        y, h = time_first(x)  # six sequences of length four
        torch.testing.assert_close(reg.penalty(), y.square().sum() / 6)


@pytest.mark.parametrize(("calls", "divisor"), [("mean", 3), ("sum", 1)])
def test_a_module_called_several_times(calls, divisor):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(3):
                x = self.cell(x)
            return x

    model, x = Net(), batch(dtype=torch.float32)[0]
    reg = rs.attach(model, rs.L1().on(rs.outputs("cell", calls=calls)))
    model(x)
    h, total = x, 0
    for _ in range(3):
        h = model.cell(h)
        total = total + h.abs().sum() / len(x)
    # the calls above are outside a forward of the model, and count nowhere after the collection
    torch.testing.assert_close(reg.penalty(), (total + total) / (6 if calls == "mean" else 1))
    model(x)
    torch.testing.assert_close(reg.penalty(), total / divisor)


def test_autocast_keeps_penalties_in_float32():
    model, (x, y) = make(torch.float32), batch(dtype=torch.float32)
    reg = rs.attach(model, [1e-2 * rs.L2().on(rs.outputs("0")), 1e-2 * rs.L2().on("*.weight")])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        h = model[0](x)
        loss = reg.loss(F.cross_entropy(out, y))
        value = reg.penalty()
    assert h.dtype == torch.bfloat16
    assert value.dtype == loss.dtype == torch.float32
    weights = 1e-2 * sum(p.square().sum() for n, p in model.named_parameters() if "weight" in n)
    torch.testing.assert_close(value, 1e-2 * h.float().square().sum() / len(x) + weights, rtol=1e-6, atol=1e-6)


def test_two_forwards_under_one_loss_are_averaged_and_a_step_clears_what_was_not_collected():
    model, (x, _) = make(), batch()
    optimizer = sgd(model)
    reg = rs.attach(model, 0.2 * rs.L2().on(rs.outputs("1")))
    both = [torch.tanh(model[0](z)) for z in (x, 2 * x)]
    reg._forwards.clear()
    model(x), model(2 * x)
    torch.testing.assert_close(reg.penalty(), 0.2 * sum(h.square().sum() / len(x) for h in both) / 2)
    model(5 * x)
    other = nn.Linear(1, 1)
    step_of_another = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 1)).sum().backward()
    step_of_another.step()  # as a generator's step, which ran the discriminator's forward
    model(x)
    torch.testing.assert_close(reg.penalty(), 0.2 * both[0].square().sum() / len(x))
    assert optimizer.state == {}


def test_autograd_grad_and_gradient_penalties_see_the_whole_loss():
    model, (x, y) = make(), batch()
    x.requires_grad_()
    reg = rs.attach(model, plan())
    loss = reg.loss(F.cross_entropy(model(x), y))
    expected = hand_written(model, x, y)
    for one, other in zip((loss, expected), (expected, loss), strict=True):
        (g,) = torch.autograd.grad(one, x, create_graph=True)
        (h,) = torch.autograd.grad(other, x, create_graph=True)
        got = torch.autograd.grad(g.square().sum(), list(model.parameters()), retain_graph=True)
        by_hand = torch.autograd.grad(h.square().sum(), list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(got, by_hand)
