"""Loops of C, held to the same steps in torch."""

import math

import pytest
import torch

from restrain.engine import native
from restrain.engine.kernels import Decay, Gradient, Project, Prox, RootedShrink, Shrink, quickly
from restrain.engine.statements import body
from restrain.penalties import Huber
from restrain.transforms import Box, NonNegative

LOWERED = {
    "gradient": [(Gradient(True, True), (0.3, 0.2))],
    "gradient of L1": [(Gradient(True, False), (0.3,))],
    "decay": [(Decay(Gradient(True, True), shrinks=False), (0.3, -0.2))],
    "decay that stops": [(Decay(Gradient(True, True), shrinks=True), (0.3, 0.2))],
    "shrink": [(Shrink(True, True), (0.9, 0.2))],
    "scale": [(Shrink(True, False), (0.9,))],
    "rooted": [(RootedShrink(True, True), (3.0, 1e-8, 0.2, 0.1))],
    "box": [(Project(Box(-0.5, math.inf)), ())],
    "several": [(Gradient(False, True), (0.2,)), (Shrink(False, True), (0.2,)), (Project(NonNegative()), ())],
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


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize("name", LOWERED)
def test_loops_do_what_torch_does(name, dtype, threads):
    lowered = LOWERED[name]
    statements, numbers, changed = body(lowered)
    loop = native.loop((dtype, dtype), statements, len(numbers), changed)
    given = members(dtype, None if name == "rooted" else True)
    wanted = [[t.clone() for t in one] for one in given]
    versions = [t._version for one in given for t in one]
    loop(given, numbers * len(given))
    for mine, theirs in zip(given, wanted, strict=True):
        quickly(lowered, theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
            if name in ("shrink", "rooted", "box"):
                assert not ((a == 0) & a.signbit()).any()
    after = [t._version for one in given for t in one]
    assert [now > was for was, now in zip(versions, after, strict=True)] == [
        r in changed for _ in given for r in (0, 1)
    ]


def test_dtypes_mix():
    w, o = torch.randn(100, dtype=torch.bfloat16), torch.randn(100)
    statements, numbers, changed = body(LOWERED["gradient"])
    wanted = o + 0.3 * w.float().sgn() + 0.2 * w.float()
    native.loop((w.dtype, o.dtype), statements, len(numbers), changed)([(w, o)], numbers)
    assert torch.allclose(o, wanted)


def test_bfloat16_is_rounded_as_torch_does():
    x = torch.randn(100_000)
    out = torch.zeros(len(x), dtype=torch.bfloat16)
    native.loop((torch.bfloat16, torch.float32), "w = o0;", 0, (0,))([(out, x)], ())
    assert torch.equal(out, x.bfloat16())


def test_what_is_not_written_in_c():
    assert body([(Gradient(False, False, (Huber(0.5),)), (0.2,))]) is None
    assert body([(Prox(True, False), (0.1, 0.2))]) is None
    assert native.loop((torch.complex64,), "w = w;", 0, (0,)) is None


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native.compiled("int nothing;") is None
    monkeypatch.setenv("CC", "/bin/false")
    assert native.compiled("int nothing at all;") is None
