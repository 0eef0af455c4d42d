"""Rules at the step by loops of C, held to one tensor after the other in float64."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.ops.test_instructions import BY_ROWS, PENALTIES, SHAPES, compare, gradients, on_rows, trained
from torch import nn

import restrain as rs
from layouts import model_of
from restrain.engine.backends import c, c_compiler, eager, formula, inductor
from restrain.engine.backends.backend import Decider
from restrain.engine.ops import instructions
from restrain.errors import RestrainWarning

ENTRYWISE = PENALTIES[:3]


@pytest.fixture
def only_loops(monkeypatch):
    """Nothing may go another way, where there is a compiler."""
    if c_compiler.compiled("int something;") is None:
        pytest.skip("no C compiler")
    for module, name in ((formula, "by_formulas"), (eager, "carry_out"), (inductor, "kernel")):
        monkeypatch.setattr(module, name, lambda *given, name=name: pytest.fail(name))


@pytest.fixture
def looped(monkeypatch):
    """Loops are called from the first step on, by "auto", for some tensors; others lie in ways that no loop takes."""
    monkeypatch.setattr(c, "COST", 0)
    members, call = [], c_compiler.Loop.__call__
    monkeypatch.setattr(c_compiler.Loop, "__call__", lambda *given: members.extend(given[1]) or call(*given))
    yield
    assert members or c_compiler.compiled("int something;") is None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("penalty", ENTRYWISE, ids=repr)
def test_entries_are_as_one_after_the_other(looped, penalty, kind):
    moments = {"gradient": penalty, "decoupled": penalty, "proximal": penalty}
    compare(SHAPES, (torch.float32, torch.float64), kind, moments, 0.8, compile="auto")


def test_halves_are_computed_wide(looped):
    for how in ("gradient", "decoupled", "proximal"):
        compare(SHAPES, (torch.bfloat16, torch.float32), torch.optim.SGD, {how: PENALTIES[2]}, compile="auto")


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=9), st.data())
def test_any_shapes(shapes, data):
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=1, max_size=3))
    how = data.draw(st.sampled_from(["gradient", "decoupled", "proximal"]))
    compare(shapes, dtypes, torch.optim.SGD, {how: PENALTIES[2]}, compile=True)


@pytest.mark.parametrize("layout", [False, True], ids=["matrices", "channels_last"])
@pytest.mark.parametrize("rules", BY_ROWS, ids=repr)
def test_rows_are_as_by_the_formulas(only_loops, rules, layout):
    for dtype, near in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        for found, wanted in zip(*on_rows(rules, dtype, layout, compile=True), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)
            assert not bool(((found == 0) & found.signbit()).any()) or rules[0][0] != "proximal"


@pytest.mark.parametrize("rules", [BY_ROWS[3], BY_ROWS[5], BY_ROWS[7]], ids=repr)
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e30], ids=str)
def test_what_is_not_finite_stays_in_its_place(only_loops, rules, spoil):
    for found, wanted in zip(*on_rows(rules, spoil=spoil, compile=True), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("per", ["in", "out"])
def test_groups_in_a_metric_and_groups_that_are_columns(monkeypatch, per, kind):
    if c_compiler.compiled("int something;") is None:
        pytest.skip("no C compiler")
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3))
        optimizer = kind(model.parameters(), lr=0.05)
        reg = rs.attach(model, 2.0 * rs.GroupLasso(per=per).on(rs.weights, how="proximal"), optimizer, compile=compile)
        if compile:
            monkeypatch.setattr(formula, "by_formulas", lambda *given: pytest.fail("a formula"))
            monkeypatch.setattr(eager, "carry_out", lambda *given: pytest.fail("torch"))
        trained(model, reg, optimizer, 12)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert 0 < sum(int((p == 0).sum()) for p in found[1]) < sum(p.numel() for p in found[1])


@pytest.mark.parametrize("rule", [0.1 * rs.L1().on("*", how="proximal"), rs.MaxNorm(0.5, per="row").on("w*")], ids=repr)
def test_all_tensors_of_one_kind_are_one_call(only_loops, monkeypatch, rule):
    calls, call = [], c_compiler.Loop.__call__
    monkeypatch.setattr(c_compiler.Loop, "__call__", lambda *given: calls.append(len(given[1])) or call(*given))
    model = nn.ParameterDict({f"w{number}": torch.randn(number + 2, 5) for number in range(4)})
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": 0.1 * (number + 1)} for number, p in enumerate(model.values())], lr=0.1
    )
    reg = rs.attach(model, rule, optimizer, compile=True)
    optimizer.register_step_pre_hook(lambda *_: None)  # else the proximal rule is folded into the optimizer's pass
    gradients(model, 0)
    optimizer.step()
    assert calls == [4]
    reg.detach()


def test_tensors_in_one_place_take_turns(only_loops):
    w = torch.randn(100_000)
    wanted = w / 8  # with a step of 1/2, the prox of the square halves
    scalars = instructions.StepScalars(metric=instructions.Metric(0.5))
    batch = instructions.Batch([instructions.Change("prox", rs.L2())], scalars, [(w,), (w.view(-1),), (w,)])
    assert c.C().carry_out([batch], Decider(True)) == []
    assert torch.equal(w, wanted)


class Kept(torch.Tensor):
    """A tensor of which memory isn't all."""


def left_of(what, kind, *others):
    """Which of some tensors a loop doesn't take, beside one that it does."""
    scalars = instructions.StepScalars(0.1, metric=instructions.Metric(0.1))
    batch = instructions.Batch([instructions.Change(kind, what)], scalars, [(w,) for w in others])
    left = c._take({}, batch)
    return [] if left is None else [tensors[0] for tensors in left.members]


def test_what_does_not_lie_flat_goes_another_way():
    flat, columns = torch.randn(4, 6), torch.randn(4, 12)[:, ::2]
    for odd in (columns, torch._neg_view(flat), flat.as_subclass(Kept), torch.randn(5, 6, 2).permute(1, 2, 0)):
        found = left_of(rs.L1(), "prox", flat, odd, torch.empty(0, 3))
        assert len(found) == (not odd.permute(2, 0, 1).is_contiguous() if odd.dim() == 3 else 1)
        assert all(one is odd for one in found)
    assert left_of(rs.MaxNorm(1.0, per=None), "project", flat, flat.t(), columns, torch.empty(0)) == [columns]
    long = torch.randn(1, c.LONG + 1)
    assert left_of(rs.MaxNorm(1.0, per=None), "project", flat, long)[0] is long
    assert left_of(rs.L1() + rs.Huber(0.5), "prox", flat)[0] is flat
    assert left_of(rs.L1(), "prox", flat.to("meta"))[0].is_meta


def test_halves_are_not_rounded_between_stages():
    half = torch.randn(3, 6).half()
    per = rs.axes.Grouping((3, 6), (0,))
    assert left_of(rs.GroupLasso(per), "prox", half) == []
    assert left_of(rs.L1() + rs.GroupLasso(per), "prox", half)[0] is half


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal"])
def test_rounding_apart_it_is_the_same_as_without(looped, how):
    found = []
    for compile in (False, "auto"):
        model = model_of(SHAPES)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        reg = rs.attach(model, rs.ElasticNet(0.1, 0.2).on("*", how=how), optimizer, compile=compile)
        trained(model, reg, optimizer, 3)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_comparison_finds_a_wrong_loop(looped, monkeypatch):
    monkeypatch.setattr(c, "numbers_of", lambda lowered: [1.01 * number for _, own in lowered for number in own])
    with pytest.raises(AssertionError, match=r"torch.float32"):
        compare(SHAPES, (torch.float32,), torch.optim.SGD, {"proximal": 0.3 * rs.L1()}, compile="auto")


def test_the_comparison_finds_wrong_rows(only_loops, monkeypatch):
    monkeypatch.setattr(c, "numbers_of", lambda lowered: [1.01 * number for _, own in lowered for number in own])
    found, wanted = on_rows(BY_ROWS[3], compile=True)
    assert any(not torch.allclose(a.double(), b, rtol=2e-6, atol=2e-6) for a, b in zip(found, wanted, strict=True))


# When it is compiled


@pytest.mark.parametrize("looped", [True, False], ids=["C", "inductor"])
def test_it_compiles_when_it_pays_and_leaves_no_trace(monkeypatch, looped):
    asked = []
    note = lambda *given: asked.append(reg._steppers[0].steps)  # noqa: E731
    monkeypatch.setattr(c_compiler, "loop", note if looped else lambda *given: None)
    monkeypatch.setattr(inductor, "kernel", (lambda *given: None) if looped else note)
    model = model_of([(10, 10)])
    monkeypatch.setattr(inductor, "COST", 300)
    monkeypatch.setattr(c, "COST", 3 * (100 + c.TENSOR))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.3 * rs.L1().on("*", how="proximal"), optimizer)
    trained(model, reg, optimizer, 5)
    assert asked == [3, 4]


def test_without_a_compiler_it_is_done_without(monkeypatch):
    def fails(*given, **settings):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(c_compiler, "loop", lambda *given: None)
    monkeypatch.setattr(torch._inductor, "standalone_compile", fails)
    monkeypatch.setattr(inductor, "_kernels", {})
    monkeypatch.setattr(inductor, "COST", 0)
    monkeypatch.setattr(c, "COST", 0)
    found = []
    for compile in (False, "auto", True):
        model = model_of(SHAPES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reg = rs.attach(model, 0.3 * rs.L1().on("*", how="proximal"), optimizer, compile=compile)
        with pytest.warns(RestrainWarning, match="can't be compiled") if compile is True else warnings.catch_warnings():
            trained(model, reg, optimizer, 3)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, *others in zip(*found, strict=True) for b in others)
