"""Gradients that are added in place at the end of a backward: nobody can tell, or they aren't."""

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.engine.loss import parameters, sums


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    monkeypatch.setattr(parameters, "LOOPS", 1)


@pytest.fixture
def added(monkeypatch):
    """The calls that add in place, by how many tensors each."""
    calls, real = [], sums.PenaltySum._add
    monkeypatch.setattr(sums.PenaltySum, "_add", lambda self, *a: calls.append(len(a[0])) or real(self, *a))
    return calls


def made(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Module()
    for number, shape in enumerate(shapes or ((5, 3), (4,))):
        model.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape, dtype=dtype)))
    return list(model.parameters()), model, rs.attach(model, (0.5 * rs.L2()).on("*"))


def data_loss(ps):
    return sum(p.square().square().sum() for p in ps)


def whole(p):
    x = p.detach()
    return 4 * x**3 + x


def is_whole(p, before=0.0):
    torch.testing.assert_close(p.grad, (whole(p) + before).to(p.dtype))


def test_in_one_call_and_in_place(added):
    ps, _, reg = made()
    for p in ps:
        p.grad = torch.ones_like(p)
    held, versions = [p.grad for p in ps], [p.grad._version for p in ps]
    reg.loss(data_loss(ps)).backward()
    assert added == [2]
    for p, gradient, version in zip(ps, held, versions, strict=True):
        assert p.grad is gradient
        assert gradient._version > version
        is_whole(p, 1)


@pytest.mark.parametrize("reaches", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_where_there_was_none(reaches, times, added):
    ps, _, reg = made()
    loss = reg.loss(data_loss(ps[:1]) if not reaches else data_loss(ps))
    for number in range(times):
        loss.backward(retain_graph=number + 1 < times)
    assert added == [2] * times
    torch.testing.assert_close(ps[0].grad, times * whole(ps[0]))
    torch.testing.assert_close(ps[1].grad, times * (whole(ps[1]) if reaches else ps[1].detach()))


def test_scaled_and_in_bfloat16(added):
    ps, _, reg = made(dtype=torch.bfloat16)
    (8 * reg.loss(data_loss(ps))).backward()
    assert added == [2]
    for p in ps:
        torch.testing.assert_close(p.grad.float(), 8 * whole(p.detach().float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["strides", "sparse", "with a graph"])
def test_gradients_of_other_kinds(kind, added):
    ps, _, reg = made((5, 3))
    (p,) = ps
    p.grad = torch.ones_like(p)
    if kind == "strides":
        p.grad = torch.ones(3, 5).T
    if kind == "sparse":
        p.grad = p.grad.to_sparse()
    if kind == "with a graph":
        p.grad = torch.ones_like(p).requires_grad_() * 1.0
    reg.penalty().backward()
    assert added == [1]
    torch.testing.assert_close(p.grad.to_dense().detach(), 1 + p.detach())


def hook(p, seen):
    p.register_hook(lambda gradient: seen.append(gradient.clone()))


def afterwards(p, seen):
    p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))


@pytest.mark.parametrize("register", [hook, afterwards])
@pytest.mark.parametrize("early", [True, False])
def test_hooks_are_told_the_whole(register, early, added):
    ps, _, reg = made()
    seen = []
    if early:
        register(ps[0], seen)
    loss = reg.loss(data_loss(ps))
    if not early:
        register(ps[0], seen)
    loss.backward()
    torch.testing.assert_close(seen, [whole(ps[0])])
    for p in ps:
        is_whole(p)
    assert added == ([1] if early else [])


def test_processes_that_wait_for_gradients(monkeypatch, added):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ps, _, reg = made()
    reg.loss(data_loss(ps)).backward()
    assert added == []
    for p in ps:
        is_whole(p)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_are_given_back(added):
    ps, _, reg = made()
    found = torch.autograd.grad(reg.loss(data_loss(ps)), ps)
    torch.testing.assert_close(found, tuple(map(whole, ps)))
    torch.testing.assert_close(torch.autograd.grad(reg.loss(data_loss(ps)), ps[1:]), (whole(ps[1]),))
    assert [p.grad for p in ps] == [None, None]
    reg.loss(data_loss(ps)).backward(inputs=ps[:1])
    is_whole(ps[0])
    assert ps[1].grad is None
    ps[0].grad = None
    reg.loss(data_loss(ps)).backward(create_graph=True)
    for p in ps:
        torch.testing.assert_close(p.grad.detach(), whole(p))
        assert p.grad.requires_grad
        p.grad = None
    assert added == []
    reg.loss(data_loss(ps)).backward(inputs=ps)
    assert added == [2]
    for p in ps:
        is_whole(p)


def test_frozen_between_forward_and_backward(added):
    ps, _, reg = made()
    loss = reg.loss(data_loss(ps))
    ps[0].requires_grad_(False)
    loss.backward()
    assert added == []
    assert ps[0].grad is None
    is_whole(ps[1])


def test_a_backward_that_fails_adds_nothing(added):
    ps, _, reg = made()
    loss = reg.loss(data_loss(ps))
    hidden = ps[0] * 1.0
    hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (loss + hidden.sum()).backward()
    assert added == []


def test_tensors_that_are_no_parameters(added):
    ps, model, reg = made((5, 3), (4,))
    nn.utils.parametrize.register_parametrization(model, "p0", nn.Tanh())
    free = model.parametrizations.p0.original
    reg.penalty().backward()
    assert added == [1]
    x = free.detach()
    torch.testing.assert_close(free.grad, x.tanh() * (1 - x.tanh() ** 2))
    torch.testing.assert_close(ps[1].grad, ps[1].detach())
