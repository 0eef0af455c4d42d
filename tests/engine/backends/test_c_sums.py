"""Values and gradients by loops of C, held to the formulas in float64, one tensor at a time."""

import math

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.engine.backends import c, c_compiler
from restrain.engine.loss import outputs, parameters

PENALTIES = [
    rs.L1(),
    0.3 * rs.L2(),
    rs.ElasticNet(0.5, 0.2),
    rs.Huber(0.5) + 0.1 * rs.Huber(0.1),
    0.3 * rs.GroupLasso(per=0),
    0.1 * rs.L1() + rs.GroupLasso(per=0) + 0.2 * rs.L2(),
]
SHAPES = [(7,), (3, 5), (64, 3), (130, 70), (2, 9001), (5000, 2), (4096,), (1, 1), (40, 8, 3, 3), (12_289,)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def known(penalty, dtype):
    """What computes it by C; None where that isn't known."""
    return c.C().sums(penalty.leaves(), torch.empty(2, 2, dtype=dtype))


def tensors(dtype, shapes=SHAPES):
    draws = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=draws).to(dtype) for shape in shapes]
    for x in found[::2]:
        x[0] = 0
    return [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in found]


def wanted(penalty, xs, weights):
    """The value and gradients in float64."""
    wide = [x.detach().double().requires_grad_() for x in xs]
    value = sum(weight * penalty(x) for x, weight in zip(wide, weights, strict=True))
    return value.detach(), torch.autograd.grad(value, wide)


def of(loops, xs, weights, factor=1.0):
    into = [torch.empty_like(x) for x in xs]
    loops.gradients(xs, weights, torch.tensor(factor), into)
    return loops.value(xs, weights), into


def close(a, b, tolerance):
    return torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("dtype", c_compiler.TYPES, ids=str)
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_equals_the_formula(penalty, dtype, threads):
    xs = tensors(dtype)
    if "Group" in repr(penalty):  # rows of a tensor in channels_last are rows in memory, too
        assert all(x.stride(0) * x.shape[0] == x.numel() for x in xs)
    weights = [0.5 + number for number in range(len(xs))]
    loops = known(penalty, dtype)
    value, gradients = of(loops, xs, weights, factor=2.0)
    right, slopes = wanted(penalty, xs, weights)
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert float(value) == pytest.approx(float(right), rel=1e-13 if dtype == torch.float64 else 3e-7)
    assert all(close(g, 2 * s, TOLERANCE[dtype]) for g, s in zip(gradients, slopes, strict=True))
    assert not close(gradients[0], 2.1 * slopes[0], TOLERANCE[dtype])  # the comparison would notice


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_the_same_to_the_bit_by_any_number_of_threads(penalty):
    xs = tensors(torch.float32, [*SHAPES, (700, 700)])
    weights, before, found = [1.0] * len(xs), torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(of(known(penalty, torch.float32), xs, weights))
    torch.set_num_threads(before)
    for value, gradients in found[1:]:
        assert torch.equal(value, found[0][0])
        assert all(map(torch.equal, gradients, found[0][1]))


def test_the_same_to_the_bit_wherever_it_lies_in_memory():
    memory = torch.randn(100_008, generator=torch.Generator().manual_seed(0))
    loops, x = known(rs.L2(), torch.float32), memory[:100_000].clone()
    for start in range(1, 8):
        moved = memory[start : start + 100_000].copy_(x)
        assert torch.equal(loops.value([moved], [1.0]), loops.value([x], [1.0]))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_what_is_not_finite(penalty, special):
    x = torch.randn(70, 70)
    x[3, 66] = special
    value, (gradient,) = of(known(penalty, torch.float32), [x], [1.0])
    right, slope = penalty(x), penalty.gradient(x)
    assert value.isnan() == right.isnan()
    assert value.isinf() == right.isinf()
    if "Huber" in repr(penalty) or "Group" in repr(penalty):  # of what is cut at a number, and inf / inf
        slope[3, 66] = math.nan if "Group" in repr(penalty) or math.isnan(special) else slope[3, 66]
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_long_sums_of_float32():
    x = torch.full((3_000_000,), 0.1)
    value = known(rs.L1(), torch.float32).value([x], [1.0])
    assert float(value) == pytest.approx(float(x.double().sum()), rel=1e-6)  # one after the other: 1e-2


def test_what_is_not_written_in_c():
    for penalty in (rs.LogSum(0.5), rs.L1() + rs.MCP(), rs.ElasticNet(0.0, 0.0), rs.GroupLasso() + rs.GroupLasso()):
        assert known(penalty, torch.float32) is None
    assert known(rs.L1(), torch.complex64) is None


def test_without_a_compiler(monkeypatch):
    c._compiled_sum.cache_clear()
    monkeypatch.setattr(c, "compiled", lambda source: None)
    monkeypatch.setattr(parameters, "LOOPS", 1)
    assert known(rs.L1(), torch.float32) is None
    layer = nn.Linear(3, 2)
    rs.attach(layer, rs.L1().on("weight")).penalty().backward()
    assert torch.equal(layer.weight.grad, layer.weight.detach().sign())
    c._compiled_sum.cache_clear()


def value_and_gradient(at_place, h):
    h = h.detach().requires_grad_()
    value = at_place.value(h, 0)
    (gradient,) = torch.autograd.grad(3 * value, h)
    return value.detach(), gradient


@pytest.mark.parametrize("layout", ["plain", "channels_last", "gaps"])
@pytest.mark.parametrize("penalty", PENALTIES[:4], ids=repr)
def test_at_places(penalty, layout, monkeypatch):
    h = torch.randn(6, 5, 4, 4)
    if layout == "channels_last":
        h = h.to(memory_format=torch.channels_last)
    if layout == "gaps":
        h = h[:, ::2]
    found = {}
    for name, least in (("loops", 1), ("blocks", 1 << 60)):
        monkeypatch.setattr(outputs, "LOOPS_AT_PLACES", least)
        found[name] = value_and_gradient(outputs.AtPlace(penalty), h)
    right, (slope,) = wanted(penalty, [h], [1 / 6])
    for value, gradient in found.values():
        assert float(value) == pytest.approx(float(right), rel=1e-6)
        assert close(gradient, 3 * slope, 1e-6)
    job = outputs.AtPlace(penalty)
    monkeypatch.setattr(outputs, "LOOPS_AT_PLACES", 1)
    job.value(h, 0)
    assert [one.sums.adds for one in job._jobs.values()] == [layout != "gaps"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_tensors_that_come_back_otherwise():
    w = torch.nn.Parameter(torch.randn(40, 30))
    member = parameters._Member(w, rs.L1(), (), 1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        (value,) = parameters._by_loops([member], rs.L1().leaves(), known(rs.L1(), torch.float32))
    value.backward()
    assert torch.equal(w.grad, w.detach().sign())
