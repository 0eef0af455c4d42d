"""SAM and ASAM by a closure, against loops written out; what is left as it was; what is refused."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import restrain as rs
from everywhere.workers import together
from restrain.errors import OptimizerError, SelectionError, TransformError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
}


def fresh(make=lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))):
    torch.manual_seed(0)
    return make().double()


def batches(steps=4):
    torch.manual_seed(1)
    return [(torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(steps)]


def reference(make, rho, adaptive, names=None):
    """The published update: climb, take the gradient there, go back, step."""
    net = fresh()
    optimizer = make(net.parameters())
    chosen = [p for name, p in net.named_parameters() if names is None or name in names]
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            scale = [p.abs() if adaptive else torch.ones_like(p) for p in chosen]
            norm = torch.stack([(s * p.grad).norm() for s, p in zip(scale, chosen, strict=True)]).norm()
            before = [p.clone() for p in chosen]
            for s, p in zip(scale, chosen, strict=True):
                p.add_(rho * s**2 * p.grad / norm)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p, w in zip(chosen, before, strict=True):
                p.copy_(w)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def closed(net, optimizer, reg, x, y):
    def closure():
        optimizer.zero_grad()
        loss = reg.loss(F.cross_entropy(net(x), y))
        loss.backward()
        return loss

    return closure


def train(make, plan, net=None):
    net = net or fresh()
    optimizer = make(net.parameters())
    reg = rs.attach(net, plan, optimizer)
    losses = [float(optimizer.step(closed(net, optimizer, reg, x, y)).detach()) for x, y in batches()]
    return [p.detach() for p in net.parameters()], losses


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_the_published_update(name, adaptive):
    found, _ = train(OPTIMIZERS[name], rs.Sharpness(0.3, adaptive).on("*"))
    expected = reference(OPTIMIZERS[name], 0.3, adaptive)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    other = reference(OPTIMIZERS[name], 0.3, not adaptive)
    assert max(float((a - b).abs().max()) for a, b in zip(found, other, strict=True)) > 1e-4


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_optimizer_that_maximises_looks_for_the_least_value_nearby(adaptive):
    """Gradients of -loss under maximize=True are those of the loss under maximize=False, uphill too."""
    found = []
    for sign in (1, -1):
        net = fresh()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, maximize=sign < 0)
        rs.attach(net, rs.Sharpness(0.3, adaptive).on("*"), optimizer)
        for x, y in batches():

            def closure(net=net, optimizer=optimizer, x=x, y=y, sign=sign):
                optimizer.zero_grad()
                (sign * F.cross_entropy(net(x), y)).backward()

            optimizer.step(closure)
        found.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], reference(OPTIMIZERS["SGD"], 0.3, adaptive))


def test_of_some_weights_and_every_second_step():
    found, _ = train(OPTIMIZERS["SGD"], rs.Sharpness(0.3).on("*.weight"))
    torch.testing.assert_close(found, reference(OPTIMIZERS["SGD"], 0.3, False, ("0.weight", "2.weight")))
    calls = []
    net = fresh()
    net.register_forward_hook(lambda *given: calls.append(1))
    train(OPTIMIZERS["SGD"], rs.Sharpness(0.3).on("*", every=2), net)
    assert len(calls) == 2 + 1 + 2 + 1


def test_penalties_beside_it():
    """The loss's penalty is climbed too; decoupled decay and prox act at the weights themselves."""
    net, plan = (
        fresh(),
        [rs.Sharpness(0.3).on("*"), 0.1 * rs.L2().on("*.weight", how="decoupled"), 0.2 * rs.L1().on(rs.outputs("1"))],
    )
    found, _ = train(lambda p: torch.optim.SGD(p, lr=0.1), plan, net)
    twin = fresh()

    def loss(x, y):
        return F.cross_entropy(twin(x), y) + 0.2 * twin[1](twin[0](x)).abs().sum() / len(x)

    for x, y in batches():
        parameters = list(twin.parameters())
        g = torch.autograd.grad(loss(x, y), parameters)
        norm = torch.stack([one.norm() for one in g]).norm()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, one in zip(parameters, g, strict=True):
                p.add_(0.3 * one / norm)
        g = torch.autograd.grad(loss(x, y), parameters)
        with torch.no_grad():
            for p, w, one in zip(parameters, before, g, strict=True):
                p.copy_(w - 0.1 * one - (0.1 * 0.2 * w if p.dim() > 1 else 0))
    torch.testing.assert_close(found, [p.detach() for p in twin.parameters()])


def test_counts_and_running_means_of_rules_move_once():
    x, found = batches()[0][0], []
    plan = [rs.BatchTopK(2).on(rs.outputs("0")), rs.LoadBalance(1, statistics="batch").on(rs.outputs("2"), name="b")]
    for sharp in ([], [rs.Sharpness(1e-9).on("*")]):
        net = fresh()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
        reg = rs.attach(net, [*plan, *sharp], optimizer)
        values = []

        def closure(net=net, optimizer=optimizer, reg=reg, values=values):
            optimizer.zero_grad()
            loss = reg.loss(0 * net(x).sum())
            values.append(float(loss.detach()))
            loss.backward()

        optimizer.step(closure)
        optimizer.step(closure)
        assert values == pytest.approx([values[0]] * len(values), rel=1e-6)
        found.append((len(values), reg.tokens_since_fired()["0"], reg.state_dict()["kept"]))
    assert [count for count, *_ in found] == [2, 4]
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])


def test_running_statistics_move_once_and_an_error_puts_weights_back():
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    net, twin = fresh(make), fresh(make)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0 + 0.1)
    reg = rs.attach(net, rs.Sharpness(0.3).on("*"), optimizer)
    x, y = batches(1)[0]
    optimizer.step(closed(net, optimizer, reg, x, y))
    twin(x)
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)
    assert net[1].num_batches_tracked == 1
    before = [p.detach().clone() for p in net.parameters()]
    inner, calls = closed(net, optimizer, reg, x, y), []

    def broken():
        calls.append(1)
        return inner() if len(calls) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    torch.testing.assert_close([p.detach() for p in net.parameters()], before, rtol=0, atol=0)


def parallel(rank, ranks, how):
    net = fresh()
    if how == "fsdp":
        for layer in (net[0], net[2], net):
            fully_shard(layer)
    run = DistributedDataParallel(net) if how == "ddp" else net
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1, momentum=0.9)
    reg = rs.attach(run, rs.Sharpness(0.3, adaptive=True).on("*"), optimizer)
    for x, y in batches():
        optimizer.step(closed(run, optimizer, reg, x.chunk(ranks)[rank], y.chunk(ranks)[rank]))
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in net.parameters()]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_several_processes(how):
    expected = reference(OPTIMIZERS["SGD"], 0.3, True)
    for found in together(2, parallel, how=how):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_refusals():
    net = fresh()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg = rs.attach(net, rs.Sharpness().on("*"), optimizer)
    net(batches(1)[0][0]).sum().backward()
    with pytest.raises(OptimizerError, match=r"optimizer.step\(closure\)"):
        optimizer.step()
    reg.detach()
    with pytest.raises(OptimizerError, match="several times"):
        rs.attach(net, rs.Sharpness().on("*"), torch.optim.LBFGS(net.parameters()))
    with pytest.raises(SelectionError, match="of parameters"):
        rs.Sharpness().on(rs.outputs("0"))
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(TransformError, match="rho="):
            rs.Sharpness(bad)
    with pytest.raises(TransformError, match="adaptive="):
        rs.Sharpness(adaptive=1)
    rule = rs.Sharpness(0.1, True).on("*")
    assert rs.Plan.from_dict(rs.Plan.of([rule]).to_dict()).rules[0] == rule


# By the momentum


MOMENTA = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.05), "exp_avg"),
    "Muon": (lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], lr=0.05), "momentum_buffer"),
}


def by_hand(name, rho=0.3):
    """Algorithm 1 of Momentum-SAM: the gradient at w - ρ v / ‖v‖, v after the last step."""
    make, key = MOMENTA[name]
    net = fresh()
    optimizer = make(net.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for x, y in batches():
        moments = [optimizer.state[p].get(key, torch.zeros_like(p)) for p in held]
        norm = torch.stack([v.norm() for v in moments]).norm()
        before = [p.detach().clone() for p in held]
        with torch.no_grad():
            for p, v in zip(held, moments, strict=True):
                p.sub_(rho * v / norm if norm > 0 else 0 * v)
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(net(x[part]), y[part]) / 2).backward()
        with torch.no_grad():
            for p, w in zip(held, before, strict=True):
                p.copy_(w)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("name", MOMENTA)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_momentum_in_place_of_a_second_forward(name, backend):
    net = fresh()
    optimizer = MOMENTA[name][0](net.parameters())
    where = "*.weight" if name == "Muon" else "*"
    reg = rs.attach(net, rs.MomentumSharpness(0.3).on(where), optimizer)
    run = torch.compile(net, backend=backend) if backend else net
    for x, y in batches():
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):  # accumulated
            (reg.loss(F.cross_entropy(run(x[part]), y[part])) / 2).backward()
        optimizer.step()
    near = 1e-3 if name == "Muon" else 1e-11
    torch.testing.assert_close([p.detach() for p in net.parameters()], by_hand(name), rtol=near, atol=near)
    torch.testing.assert_close(net.eval()(x), fresh_with(net)(x))  # no offset in evaluation
    saved = next(iter(reg.state_dict()["kept"].values()))["offset"]
    assert saved.abs().max() > 0
    torch.compiler.reset()


def fresh_with(net):
    twin = fresh()
    twin.load_state_dict(net.state_dict())
    return twin


def test_momentum_that_is_not_there_is_refused():
    net = fresh()
    with pytest.raises(OptimizerError, match="keeps none as it is set"):
        rs.attach(net, rs.MomentumSharpness().on("*"), torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(OptimizerError, match="no given optimizer holds"):
        rs.attach(net, rs.MomentumSharpness().on("*"))
    with pytest.raises(SelectionError):
        rs.MomentumSharpness().on(rs.outputs("0"))
    with pytest.raises(TransformError, match="rho="):
        rs.MomentumSharpness(0.0)
