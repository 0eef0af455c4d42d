"""Penalties on outputs in eager code: the ways by which a value and its gradient go, against the plain formula."""

import copy
import functools
import operator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.engine.loss import outputs

BOTH = 0.3 * rs.L1() + 0.2 * rs.L2()
PENALTIES = {"l1": 0.3 * rs.L1(), "both": BOTH, "huber": 0.5 * rs.Huber(0.1), "log": 0.2 * rs.LogSum(0.5)}

pytestmark = pytest.mark.filterwarnings("ignore:.*overwritten by a later in-place op:restrain.errors.RestrainWarning")


def model(act=nn.ReLU, inplace=False, dtype=torch.float64):
    torch.manual_seed(0)
    act = act(inplace) if act is nn.ReLU else act()
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), act, nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).to(dtype)


def by_formula(net, x, penalty, place):
    """The penalty's value, the loss, gradients: by layers that are called one after the other, on copies."""
    net, kept = copy.deepcopy(net), None
    h = x
    for number, layer in enumerate(net):
        h = layer(h.clone())
        if number == place:
            kept = h.clone()
    value = penalty(kept) / len(kept)
    loss = h.square().mean() + value
    return value.item(), loss, torch.autograd.grad(loss, list(net.parameters()))


def same(found, expected, rtol=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def check(net, x, penalty, place, rtol=1e-12):
    value, expected_loss, expected = by_formula(net, x, penalty, place)
    with rs.attach(net, penalty.on(rs.outputs(str(place)))) as reg:
        for _ in range(3):  # the first forward penalises a copy; from then on it is known whether one is needed
            loss = reg.loss(net(x).square().mean())
            same([loss, *torch.autograd.grad(loss, list(net.parameters()))], [expected_loss, *expected], rtol)
            assert reg.values().popitem()[1] == pytest.approx(value, rel=rtol)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("place", "inplace"), [(0, False), (0, True), (1, False), (1, True)])
def test_values_and_gradients_are_those_of_the_formula(penalty, place, inplace):
    check(model(inplace=inplace), torch.randn(5, 2, 4, 4, dtype=torch.float64), PENALTIES[penalty], place)


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Hardtanh, nn.ReLU6, nn.LeakyReLU])
def test_after_other_activations(act):
    check(model(act), torch.randn(5, 2, 4, 4, dtype=torch.float64), 0.3 * rs.L1(), 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("penalty", ["l1", "both"])
def test_large_outputs_go_in_blocks(penalty, inplace, layout, monkeypatch):
    monkeypatch.setattr(outputs, "_BLOCK", 50)
    net = model(inplace=inplace).to(memory_format=layout)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64).to(memory_format=layout)
    check(net, x, PENALTIES[penalty], 0)


@pytest.mark.parametrize("inplace", [False, True])
def test_in_half_precision(inplace):
    net = model(inplace=inplace, dtype=torch.bfloat16)
    check(net, torch.randn(5, 2, 4, 4, dtype=torch.bfloat16), BOTH, 0, rtol=0.05)


def after_two(net, x, penalty=BOTH, place=0):
    """An attachment that knows the place, and the data loss of one more forward."""
    reg = rs.attach(net, penalty.on(rs.outputs(str(place))))
    reg.loss(net(x).square().mean()).backward()
    net.zero_grad()
    return reg, net(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("penalty", ["l1", "both"])
def test_value_and_output_are_differentiated_apart_too(penalty, inplace):
    net, x = model(inplace=inplace), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    penalty = PENALTIES[penalty]
    reg, out = after_two(net, x, penalty)
    first = list(net[0].parameters())
    data = torch.autograd.grad(out.square().mean(), first, retain_graph=True)
    plain = copy.deepcopy(net)
    same(data, torch.autograd.grad(plain(x).square().mean(), list(plain[0].parameters())))
    own = torch.autograd.grad(reg.penalty(), first, retain_graph=True)
    h = plain[0](x)
    same(own, torch.autograd.grad(penalty(h) / 5, list(plain[0].parameters())))


class Cut(nn.Module):
    def forward(self, h):
        return h.detach()


@pytest.mark.parametrize("penalty", ["l1", "both"])
def test_a_consumer_that_detaches_costs_nothing(penalty):
    penalty = PENALTIES[penalty]
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Cut(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for place in (0, 1):
        with rs.attach(net, penalty.on(rs.outputs(str(place)))) as reg:
            for _ in range(2):
                net.zero_grad()
                reg.loss(net(x).square().mean()).backward()
        expected = torch.autograd.grad(penalty(net[: place + 1](x)) / 5, net[0].weight)
        same([net[0].weight.grad], expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("penalty", ["l1", "both"])
def test_twice_and_many_at_once(penalty, inplace):
    penalty = PENALTIES[penalty]
    net, x = model(inplace=inplace), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    reg, out = after_two(net, x, penalty)
    weight = net[0].weight
    loss = reg.loss(out.square().mean())
    (once,) = torch.autograd.grad(loss, weight, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), weight, retain_graph=True)
    plain = copy.deepcopy(net)
    h = plain[0](x)
    value = plain[1:](h.clone()).square().mean() + penalty(h) / 5
    (expected,) = torch.autograd.grad(value, plain[0].weight, create_graph=True)
    same([once, twice], [expected, *torch.autograd.grad(expected.square().sum(), plain[0].weight)], 1e-10)
    factors = torch.tensor([1.0, -2.0, 0.0], dtype=loss.dtype)
    (many,) = torch.autograd.grad(loss, weight, factors, is_grads_batched=True)
    same([many], [factors.reshape(3, 1, 1, 1, 1) * once])


class Checked(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("penalty", ["l1", "both"])
def test_in_checkpoints(penalty, inplace, place, reentrant):
    net = model(inplace=inplace)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    _, _, expected = by_formula(net, x, PENALTIES[penalty], place)
    checked = Checked(net, reentrant)
    with rs.attach(checked, PENALTIES[penalty].on(rs.outputs(f"inner.{place}"))) as reg:
        for _ in range(3):
            checked.zero_grad()
            reg.loss(checked(x.clone().requires_grad_()).square().mean()).backward()
            same([p.grad for p in net.parameters()], expected)


def kept_bytes(net, x, rule):
    """What is saved for the backward by a model with a rule, beyond what it saves without, in bytes."""
    sizes = []
    for plan in (None, rule):
        reg = None if plan is None else rs.attach(net, plan)
        if reg is not None:
            reg.loss(net(x).square().mean()).backward()
        out, seen, total = net(x), {}, 0
        waiting = [out.grad_fn] + ([reg.penalty().grad_fn] if reg is not None else [])
        done = set()
        while waiting:
            node = waiting.pop()
            if node in done:
                continue
            done.add(node)
            saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            saved += list(getattr(node, "saved_tensors", ()))
            for tensor in saved:
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter) and tensor.numel() > 1:
                    seen[tensor.data_ptr()] = tensor.nbytes
            waiting += [following for following, _ in node.next_functions if following is not None]
        total = functools.reduce(operator.add, seen.values(), 0)
        sizes.append(total)
        if reg is not None:
            reg.detach()
    return sizes[1] - sizes[0]


def test_what_is_kept_for_the_backward():
    x = torch.randn(5, 2, 4, 4)
    size = 5 * 3 * 4 * 4
    found = {
        (penalty, place, inplace): kept_bytes(
            model(inplace=inplace, dtype=torch.float32), x, PENALTIES[penalty].on(rs.outputs(str(place)))
        )
        for penalty in ("l1", "both")
        for place, inplace in ((1, False), (0, True))
    }
    assert found == {
        ("l1", 1, False): 0,  # ReLU keeps its result anyway
        ("both", 1, False): 0,
        ("l1", 0, True): size,  # signs, a byte each
        ("both", 0, True): 4 * size,  # one copy
    }


def test_signs_under_transforms_and_twice():
    x = torch.tensor([3.0, -4.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    value, signs = outputs.Absolute.apply(x)
    assert value.item() == 7.5
    assert signs.tolist() == [1, -1, 0, 1]
    assert torch.autograd.grad(value * 2, x)[0].tolist() == [2, -2, 0, 2]
    batch = torch.stack([x.detach(), -x.detach()])
    slopes = torch.func.vmap(torch.func.grad(lambda row: outputs.Absolute.apply(row)[0]))(batch)
    assert slopes.tolist() == [[1, -1, 0, 1], [-1, 1, 0, -1]]
