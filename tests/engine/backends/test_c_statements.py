"""Loops of C, held to the same steps in torch."""

import math

import pytest
import torch

from restrain.engine.backends import c_compiler
from restrain.engine.backends.c import changed_by, numbers_of, stages, statements
from restrain.engine.ops.groups import FitRows, Lengths, RootedShrinkRows, ShrinkRows
from restrain.engine.ops.instructions import Decay, Gradient, Project, Prox, RootedShrink, Shrink, carry_out
from restrain.operations import Huber, Interval, Logarithm
from restrain.penalties import MCP

LOWERED = {
    "gradient": [(Gradient(True, True), (0.3, 0.2))],
    "gradient of operations": [(Gradient(False, True, (Huber(0.5),)), (0.2, 0.3))],
    "decay of an operation": [(Decay(Gradient(False, False, (Huber(0.5),)), shrinks=True), (0.3,))],
    "gradient of L1": [(Gradient(True, False), (0.3,))],
    "decay": [(Decay(Gradient(True, True), shrinks=False), (0.3, -0.2))],
    "decay that stops": [(Decay(Gradient(True, True), shrinks=True), (0.3, 0.2))],
    "shrink": [(Shrink(True, True), (0.9, 0.2))],
    "scale": [(Shrink(True, False), (0.9,))],
    "rooted": [(RootedShrink(True, True), (3.0, 1e-8, 0.2, 0.1))],
    "box": [(Project(Interval(-0.5)), ())],
    "several": [(Gradient(False, True), (0.2,)), (Shrink(False, True), (0.2,)), (Project(Interval(0.0)), ())],
}
SIZES = (1, 3, 0, 40_000, 17, 70_001)
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf)
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def members(dtype, special=False):
    draws = torch.Generator().manual_seed(0)
    found = [[torch.randn(size, generator=draws).to(dtype) for _ in "wo"] for size in SIZES if size]
    for w, o in found:
        o.square_() if special is None else None
        if special and len(w) > len(SPECIAL):
            w[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return found


@pytest.mark.parametrize("dtype", c_compiler.TYPES, ids=str)
@pytest.mark.parametrize("name", LOWERED)
def test_loops_do_what_torch_does(name, dtype, threads):
    lowered = LOWERED[name]
    numbers, changed = numbers_of(lowered), changed_by(lowered)
    loop = c_compiler.loop((dtype, dtype), statements(lowered), len(numbers), changed)
    given = members(dtype, None if name == "rooted" else True)
    wanted = [[t.clone() for t in one] for one in given]
    versions = [t._version for one in given for t in one]
    loop(given, numbers * len(given))
    for mine, theirs in zip(given, wanted, strict=True):
        carry_out(lowered, theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
            if name in ("shrink", "rooted", "box"):
                assert not ((a == 0) & a.signbit()).any()
    after = [t._version for one in given for t in one]
    assert [now > was for was, now in zip(versions, after, strict=True)] == [
        r in changed for _ in given for r in (0, 1)
    ]


BY_ROW = {
    "gradient": [(Gradient(True, False, (Lengths(),)), (0.1, 0.3))],
    "decay": [(Decay(Gradient(False, True, (Lengths(),)), shrinks=True), (0.1, 0.3))],
    "shrink": [(Shrink(True, True), (0.9, 0.01)), (ShrinkRows(), (0.3,))],
    "gradient, then decay": [(Gradient(False, False, (Lengths(),)), (0.3,)), (ShrinkRows(), (0.2,))],
    "at most": [(FitRows(0.0, 2.0, None), ())],
    "between": [(FitRows(1.0, 2.0, None), ())],
    "shrink, then fit": [(ShrinkRows(), (0.3,)), (FitRows(1.0, 1.0, None), ())],
}
LENGTHS = ((1, 300), (3, 7), (31, 40), (32, 1), (33, 50), (768, 90), (5000, 3))  # of rows, and how many


def row_by_row(lowered, w, o):
    """The steps on rows in float64, by their definition, their numbers already those of C."""
    for step, numbers in lowered:
        size = w.norm(dim=1, keepdim=True)
        unit = w / torch.where(size == 0, 1, size)
        if isinstance(step, Gradient):
            o = o + numbers[-1] * unit + (numbers[0] * w.sgn() if step.l1 else 0)
        elif isinstance(step, Decay):
            new = w - numbers[0] * w - numbers[1] * unit
            w = torch.where(new * w < 0, 0, new)
        elif isinstance(step, Shrink):
            w = (numbers[0] * w).sgn() * ((numbers[0] * w).abs() - numbers[1]).clamp_min(0)
        elif isinstance(step, ShrinkRows):
            w = unit * (size - numbers[0]).clamp_min(0)
        else:
            even = torch.full_like(w, w.shape[1] ** -0.5)
            w = torch.where(size == 0, even, unit) * size.clamp(step.low, step.high)
    return w, o


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_of_several_lengths(name, dtype, threads):
    lowered, draws = BY_ROW[name], torch.Generator().manual_seed(1)
    given = [[torch.randn(count, length, generator=draws).to(dtype) for _ in "wo"] for length, count in LENGTHS]
    for w, _ in given:
        w[len(w) // 2] = 0
        w[len(w) // 3] *= 1e-20 if dtype == torch.float32 else 1e-130 if dtype == torch.float64 else 1
    wanted = [row_by_row(lowered, w.double(), o.double()) for w, o in given]
    text, numbers, changed = stages(lowered), numbers_of(lowered), changed_by(lowered)
    c_compiler.rows((dtype, dtype), text, len(numbers), changed)(given, numbers * len(given), [n for n, _ in LENGTHS])
    near = TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 and len(text) > 1 else 2)
    for mine, theirs in zip(given, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=near, atol=near)


def shortened(w, second, root, eps, cut):
    """The prox of the rows' lengths in float64, its secular equation solved by bisection."""
    t, low = cut / (second.sqrt() * root + eps), torch.zeros(len(w), 1, dtype=torch.float64)
    high = w.norm(dim=1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        over = (w / (middle + t)).square().sum(1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    r = torch.where((w / t).square().sum(1, keepdim=True) > 1, high, 0)
    return w * (r / (r + t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_rows_in_a_metric_solve_their_equation(dtype, spread, threads):
    numbers, draws = (3.0, 1e-8, 0.3), torch.Generator().manual_seed(2)
    lowered = [(RootedShrinkRows(), numbers)]
    given = [[torch.randn(count, n, generator=draws).to(dtype) for _ in "wo"] for n, count in LENGTHS]
    for w, second in given:
        w.mul_(torch.rand(len(w), 1, generator=draws))
        w[len(w) // 2] = 0
        second.mul_(spread).exp_()
    given[-1][1][:] = 0  # steps without end
    wanted = [shortened(w.double(), second.double(), *numbers) for w, second in given]
    plain = [(w.clone(), second) for w, second in given]
    loop = c_compiler.rows((dtype, dtype), stages(lowered), len(numbers), (0,))
    loop(given, numbers * len(given), [n for n, _ in LENGTHS])
    zeros = 0
    for (w, _), theirs, same in zip(given, wanted, plain, strict=True):
        torch.testing.assert_close(w.double(), theirs, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
        carry_out(lowered, same)
        torch.testing.assert_close(w, same[0], rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
        assert not ((w == 0) & w.signbit()).any()
        assert ((w == 0).all(1) == (same[0] == 0).all(1)).all()
        zeros += int((w == 0).all(1).sum())
    assert 5 < zeros < sum(count for _, count in LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_groups_in_the_middle_are_as_rows(dtype, threads):
    """The same bits as of copies in which the groups lie as rows, which the formula checks above."""
    numbers, draws = (3.0, 1e-8, 0.3), torch.Generator().manual_seed(3)
    sizes = [(7, 37, 1), (1, 5, 40), (4, 19, 6), (300, 130, 1), (1, 1, 3)]
    given = [[torch.randn(size, generator=draws).to(dtype) for _ in "wo"] for size in sizes]
    for w, second in given:
        w.mul_(torch.rand(1, w.shape[1], 1, generator=draws))
        second.exp_()
    given[0][0][2, 3] = math.nan
    rows = [[t.movedim(1, 0).contiguous() for t in tensors] for tensors in given]
    lengths = [outer * inner for outer, _, inner in sizes]
    text = stages([(RootedShrinkRows(), numbers)])
    c_compiler.rows((dtype, dtype), text, 3, (0,))(rows, numbers * len(rows), lengths)
    before = [w.clone() for w, _ in given]
    c_compiler.middle((dtype, dtype))(given, numbers * len(given), [n for size in sizes for n in size])
    for (w, _), (wanted, _), old in zip(given, rows, before, strict=True):
        assert torch.equal(w.movedim(1, 0).nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert not torch.equal(w, old)
    assert any((w == 0).any() for w, _ in given)


def test_rows_that_arent_finite_in_a_metric_stay():
    w, second = torch.ones(3, 4), torch.ones(3, 4)
    w[0, 1], w[1, 2] = math.nan, math.inf
    before = w.clone()
    c_compiler.rows((w.dtype, w.dtype), stages([(RootedShrinkRows(), (1.0, 0.1, 0.2))]), 3, (0,))(
        [(w, second)], (1.0, 0.1, 0.2), [4]
    )
    assert torch.equal(w[:2].nan_to_num(7.0), before[:2].nan_to_num(7.0))
    assert (w[2] < 1).all()


def test_rows_that_fit_are_only_read(threads):
    w = torch.randn(50, 3000)
    loop = c_compiler.rows((w.dtype,), stages([(FitRows(0.0, 0.5, None), ())]), 0, (0,))
    loop([(w,)], (), [3000])
    once = w.clone()
    loop([(w,)], (), [3000])
    assert torch.equal(w, once)
    assert torch.allclose(w.norm(dim=1), torch.tensor(0.5))


def test_lengths_do_not_lose_squares():
    for size in (1e-30, 1e25):
        w = size * torch.randn(4, 100, dtype=torch.float64).float()
        wanted = w.double() / w.double().norm(dim=1, keepdim=True)
        c_compiler.rows((w.dtype,), stages([(FitRows(1.0, 1.0, None), ())]), 0, (0,))([(w,)], (), [100])
        torch.testing.assert_close(w.double(), wanted, rtol=1e-6, atol=0)
    w = torch.tensor([[1e300, 1e300], [1e-300, 1e-300]], dtype=torch.float64)
    c_compiler.rows((w.dtype,), stages([(FitRows(1.0, 1.0, None), ())]), 0, (0,))([(w,)], (), [2])
    torch.testing.assert_close(w, torch.full((2, 2), 0.5**0.5, dtype=torch.float64))


def test_dtypes_mix():
    w, o = torch.randn(100, dtype=torch.bfloat16), torch.randn(100)
    lowered = LOWERED["gradient"]
    numbers = numbers_of(lowered)
    wanted = o + 0.3 * w.float().sgn() + 0.2 * w.float()
    c_compiler.loop((w.dtype, o.dtype), statements(lowered), len(numbers), changed_by(lowered))([(w, o)], numbers)
    assert torch.allclose(o, wanted)


def test_bfloat16_is_rounded_as_torch_does():
    x = torch.randn(100_000)
    out = torch.zeros(len(x), dtype=torch.bfloat16)
    c_compiler.loop((torch.bfloat16, torch.float32), "w = o0;", 0, (0,))([(out, x)], ())
    assert torch.equal(out, x.bfloat16())


def test_what_is_not_written_in_c():
    assert statements([(Gradient(False, False, (MCP(0.5),)), (0.2,))]) is None
    assert statements([(Gradient(False, False, (Logarithm(0.5),)), (0.2,))]) is None
    assert statements([(Prox(True, False), (0.1, 0.2))]) is None
    assert c_compiler.loop((torch.complex64,), "w = w;", 0, (0,)) is None


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert c_compiler.compiled("int nothing;") is None
    monkeypatch.setenv("CC", "/bin/false")
    assert c_compiler.compiled("int nothing at all;") is None
