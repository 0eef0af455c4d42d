"""The fast ways of rules at the optimizer's step, held to one tensor after the other in float64."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import restrain as rs
from layouts import explained, model_of
from restrain.engine.backends import c_compiler, eager, formula, inductor
from restrain.engine.core import memory
from restrain.engine.ops import groups, instructions
from restrain.errors import PlanError, RestrainWarning

SHAPES = [(3, 5), (), (0, 4), (2, 2, 3, 3), (40,), (7, 30), (1,), (6,), (5, 0)]
PENALTIES = [
    0.3 * rs.L1(),
    0.2 * rs.L2(),
    rs.ElasticNet(0.2, 0.3),
    0.1 * rs.L1() + 0.2 * rs.Huber(0.5),
    0.3 * rs.SCAD(0.3, 1.1),
    0.1 * rs.SoftBox(-0.5, 0.5),
    0.2 * rs.GroupLasso(0) + 0.1 * rs.L1(),
]
RATE, STEPS = 0.1, 3


def few_entries(patch):
    for module in (memory, eager, formula):
        patch.setattr(module, "BLOCK", 32)
    patch.setattr(eager, "SMALL", 16)


@pytest.fixture
def small_blocks(monkeypatch):
    """Few entries in a block, so that the tensors of the tests are cut, and some are gathered."""
    few_entries(monkeypatch)


@pytest.fixture
def by_inductor(monkeypatch):
    """No loops of C: kernels of inductor are what is compiled."""
    for name in ("loop", "rows"):
        monkeypatch.setattr(c_compiler, name, lambda *given: None)


def gradients(model, seed):
    draws = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draws, dtype=torch.float64).to(p.dtype)


def adam_steps(optimizer, p):
    if isinstance(optimizer, torch.optim.SGD):
        return RATE
    state = optimizer.state[p]
    return RATE / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8)


@torch.no_grad()
def slowly(model, kind, penalties, box):
    """What the rules say, of each tensor alone, in float64."""
    optimizer = kind(model.parameters(), lr=RATE)
    for step in range(STEPS):
        gradients(model, step)
        for p in model.parameters():
            if "gradient" in penalties:
                p.grad += penalties["gradient"].gradient(p)
            if "decoupled" in penalties:
                new = p - RATE * penalties["decoupled"].gradient(p)
                shrinks = all(leaf.shrinks for _, leaf in penalties["decoupled"].leaves())
                p.copy_(torch.where((new * p < 0) & shrinks, 0, new))
        optimizer.step()
        for p in model.parameters():
            if "proximal" in penalties and p.numel():
                p.copy_(penalties["proximal"].prox(p, adam_steps(optimizer, p)))
            if box:
                p.clamp_(-box, box)


def compare(shapes, dtypes, kind, penalties, box=None, compile=False):
    """Train by the library and by the formulas."""
    model = model_of(shapes, dtypes)
    reference = copy.deepcopy(model).double()
    plan = [penalty.on("*", how=how) for how, penalty in penalties.items()]
    plan += [rs.Box(-box, box).on("*")] if box else []
    optimizer = kind(model.parameters(), lr=RATE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(small changes|Euclidean)", RestrainWarning)
        reg = rs.attach(model, plan, optimizer, compile=compile)
    if box:
        with torch.no_grad():
            for p in reference.parameters():
                p.clamp_(-box, box)
    for step in range(STEPS):
        gradients(model, step)
        optimizer.step()
    slowly(reference, kind, penalties, box)
    for p, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        near = {torch.float32: 3e-5, torch.float64: 1e-12, torch.bfloat16: 6e-2}[p.dtype]
        torch.testing.assert_close(p.double(), wanted, rtol=near, atol=near, msg=lambda told, p=p: f"{p.dtype} {told}")
    reg.detach()


def of_groups(penalty):
    return any(leaf.groupwise for _, leaf in penalty.leaves())


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_blocks_and_gathered_tensors_are_as_one_after_the_other(small_blocks, penalty, how, kind):
    shapes = [shape for shape in SHAPES if len(shape) > 1 and 0 not in shape] if of_groups(penalty) else SHAPES
    compare(shapes, (torch.float32, torch.float64), kind, {how: penalty}, 0.8)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_all_moments_at_once(small_blocks, kind):
    penalties = {"gradient": 0.1 * rs.L1(), "decoupled": rs.ElasticNet(0.1, 0.2), "proximal": 0.05 * rs.L1()}
    for compile in (False, True):
        compare(SHAPES, (torch.float64,), kind, penalties, 0.7, compile)


def test_half_precision_is_computed_wide(small_blocks):
    for how in ("gradient", "decoupled", "proximal"):
        compare(SHAPES, (torch.bfloat16,), torch.optim.SGD, {how: rs.ElasticNet(0.2, 0.3)}, compile=how == "proximal")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    "penalty", [penalty if i in (0, 2, 4) else pytest.param(penalty, marks=pytest.mark.slow) for i, penalty in
                enumerate(PENALTIES[:-1])], ids=repr,
)  # fmt: skip
def test_compiled_kernels_are_as_one_after_the_other(small_blocks, by_inductor, penalty, kind):
    before = set(inductor._kernels)
    compare(SHAPES, (torch.float32,), kind, {"gradient": penalty, "proximal": penalty}, 0.8, compile=True)
    made = [inductor._kernels[key] for key in inductor._kernels if key not in before]
    assert all(one is not None for one in made), "nothing was compiled"


@given(st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=9), st.data())
def test_any_shapes(shapes, data):
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=1, max_size=3))
    how = data.draw(st.sampled_from(["gradient", "decoupled", "proximal"]))
    penalty = data.draw(st.sampled_from(PENALTIES[:4]))
    with pytest.MonkeyPatch.context() as patch:
        few_entries(patch)
        compare(
            shapes,
            dtypes,
            torch.optim.SGD,
            {how: penalty},
            compile=data.draw(st.booleans()) and how == "gradient" and penalty is PENALTIES[0],
        )


def test_an_endless_moment_moves_nothing():
    w, second = torch.tensor([0.5, -1e-12, 0.3]), torch.tensor([torch.inf, 1.0, 0.0])
    found = instructions.RootedShrink(scaled=False, soft=True)(w, [second], (1.0, 1e-8, 1e-9))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.2]))
    assert not bool(found.signbit().any())


def test_the_comparison_finds_a_wrong_kernel(small_blocks, monkeypatch):
    monkeypatch.setattr(instructions, "_soft", lambda w, threshold: w.sub_(w.clamp(-threshold, 1.01 * threshold)))
    with pytest.raises(AssertionError, match=r"torch.float32"):
        compare(SHAPES, (torch.float32,), torch.optim.SGD, {"proximal": 0.3 * rs.L1()})


# Groups that are rows

ROWS = [(3, 50), (7, 5), (4, 5), (40, 1), (1, 6), (2, 5)]  # with blocks of 32: longer than one, cut, gathered


def rows_of(shapes, dtype, layout):
    """Parameters with some rows of zeros, of great and of small length."""
    draws, model = torch.Generator().manual_seed(3), nn.Module()
    for number, shape in enumerate(shapes):
        w = torch.randn(shape, generator=draws, dtype=torch.float64)
        w = w * torch.logspace(-1, 1, shape[0], dtype=torch.float64)[torch.randperm(shape[0], generator=draws), None]
        w[shape[0] // 2 : shape[0] // 2 + (shape[0] > 2)] = 0
        w = w[..., None, None].expand(*shape, 2, 2).contiguous().to(memory_format=torch.channels_last) if layout else w
        model.register_parameter(f"p{number}", nn.Parameter(w.to(dtype)))
    return explained(model)


@pytest.fixture
def rows_only(small_blocks, monkeypatch):
    """Nothing may fall back to the formulas."""
    monkeypatch.setattr(formula, "by_formulas", lambda *given: pytest.fail("by_formulas"))


def on_rows(rules, dtype=torch.float32, layout=False, spoil=None, compile=False):
    """The same rules by rows and by the formulas, in float64, at one step of rate 0.1; both results."""
    model = rows_of(ROWS, dtype, layout)
    wanted = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(small changes|Euclidean|attaching)", RestrainWarning)
        reg = rs.attach(model, [what.on("*", how=how) for how, what in rules], optimizer, compile=compile)
    model.load_state_dict(wanted.state_dict())  # attaching has projected them
    gradients(model, 1)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(p.grad)  # in its layout
    if spoil:
        for one in (model, wanted):
            next(one.parameters()).data[0, 3] = spoil
    optimizer.step()
    reg.detach()
    gradients(wanted, 1)
    with torch.no_grad():
        for p in wanted.parameters():
            for how, what in rules:
                if how == "gradient":
                    p.grad += what.gradient(p)
                if how == "decoupled":
                    p.copy_(instructions.decayed(p, what, RATE))
            p.sub_(RATE * p.grad)
            for how, what in rules:
                if how in ("proximal", "project"):
                    instructions.put(p, what.prox(p, RATE) if how == "proximal" else what.project(p))
    return list(model.parameters()), list(wanted.parameters())


BY_ROWS = [
    [("gradient", 0.7 * rs.GroupLasso(0))],
    [("decoupled", 0.7 * rs.GroupLasso(0))],
    [("decoupled", 0.7 * rs.GroupLasso(0) + rs.ElasticNet(0.1, 0.2))],
    [("proximal", 0.7 * rs.GroupLasso(0))],
    [("proximal", rs.ElasticNet(0.5, 0.2) + 0.7 * rs.GroupLasso("row"))],
    [("project", rs.MaxNorm(0.5, per=0))],
    [("project", rs.MaxNorm(0.5, per=None))],
    [("project", rs.UnitNorm(per=0))],
    [("project", rs.MinMaxNorm(0.3, 0.6, per=0))],
    [("proximal", 0.7 * rs.GroupLasso(0)), ("project", rs.MaxNorm(0.5, per=0))],
    [("proximal", 0.7 * rs.L1()), ("project", rs.MaxNorm(0.5, per=0))],
]


@pytest.mark.parametrize("layout", [False, True], ids=["matrices", "channels_last"])
@pytest.mark.parametrize("rules", BY_ROWS, ids=repr)
def test_rows_are_as_by_the_formulas(rows_only, rules, layout):
    for dtype, near in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        for found, wanted in zip(*on_rows(rules, dtype, layout), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)
            assert not bool(((found == 0) & found.signbit()).any()) or rules[0][0] != "proximal"


@pytest.mark.parametrize("number", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_compiled_are_as_by_the_formulas(rows_only, by_inductor, number):
    before = set(inductor._kernels)
    for layout in (False, True):
        for spoil in (None, float("nan"))[: 2 if number == 3 else 1]:
            for found, wanted in zip(*on_rows(BY_ROWS[number], layout=layout, spoil=spoil, compile=True), strict=True):
                torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)
                assert not bool(((found == 0) & found.signbit()).any())
    made = [inductor._kernels[key] for key in inductor._kernels if key not in before]
    assert made, "nothing was compiled"
    assert all(one is not None for one in made)


def test_the_comparison_finds_wrong_rows(rows_only, monkeypatch):
    lengths = groups.lengths
    monkeypatch.setattr(groups, "lengths", lambda one: 1.001 * lengths(one))
    found, wanted = on_rows(BY_ROWS[3])
    assert any(not torch.allclose(a.double(), b, rtol=2e-6, atol=2e-6) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rules", [BY_ROWS[3], BY_ROWS[5], BY_ROWS[7]], ids=repr)
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e30], ids=str)
def test_what_is_not_finite_stays_in_its_place(small_blocks, rules, spoil):
    for found, wanted in zip(*on_rows(rules, spoil=spoil), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


@given(st.integers(1, 9000), st.sampled_from([1e-6, 1.0, 1e6]))
def test_lengths_are_exact_for_any_length(length, size):
    one = size * torch.rand(2, length, generator=torch.Generator().manual_seed(length))
    torch.testing.assert_close(groups.lengths(one).double(), one.double().norm(dim=1, keepdim=True), rtol=4e-7, atol=0)


@pytest.mark.parametrize("constraint", [rs.MaxNorm(0.5, per=0), rs.UnitNorm(per=0)], ids=repr)
def test_rows_that_fit_are_not_touched(small_blocks, constraint):
    fit = groups.fit_of(constraint)
    once = fit(torch.randn(50, 3000), (), ())
    assert torch.equal(once, fit(once.clone(), (), ()))


# Compiling


def trained(model, reg, optimizer, steps):
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        gradients(model, step)
        optimizer.step()


def test_no_schedule_and_no_shape_compiles_anew(small_blocks, by_inductor, monkeypatch):
    made, make = [], inductor._made
    monkeypatch.setattr(inductor, "_made", lambda *given: made.append(given) or make(*given))
    model = model_of(SHAPES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rule = rs.schedules.Linear(0.5, 0.1, steps=6) * rs.L1()
    reg = rs.attach(model, [rule.on("*", how="proximal"), rule.on("*", how="gradient")], optimizer, compile=True)
    trained(model, reg, optimizer, 2)
    counted, dynamo = len(made), dict(torch._dynamo.utils.counters["stats"])
    torch.compiler.reset()
    trained(model, reg, optimizer, 5)
    larger = model_of([(50, 3), (9, 9), (4,)])
    optimizer = torch.optim.Adam(larger.parameters(), lr=0.3)
    reg = rs.attach(larger, 0.7 * rs.L1().on("*", how="proximal"), optimizer, compile=True)
    trained(larger, reg, optimizer, 3)
    assert len(made) == counted <= 2
    assert dict(torch._dynamo.utils.counters["stats"]) == dynamo


def test_a_kernel_is_an_inplace_op_to_autograd_and_draws_nothing(by_inductor, monkeypatch):
    monkeypatch.setattr(inductor, "_kernels", {})
    model = model_of([(40, 40)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.3 * rs.L1().on("*", how="proximal"), optimizer, compile=True)
    gradients(model, 0)
    versions, random = model.p0._version, torch.get_rng_state()
    reg._steppers[0].after(optimizer, (), {})
    assert model.p0._version > versions
    assert torch.equal(torch.get_rng_state(), random)
    assert next(iter(inductor._kernels.values())) is not None


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_of_an_untested_torch_are_compared_with_the_formulas(by_inductor, monkeypatch, wrong):
    def compiled(graph, examples):
        made = make(graph, examples)
        return (lambda w, *given: made(w.mul_(1.01), *given)) if wrong else made

    make = inductor.standalone_compile
    monkeypatch.setattr(inductor, "_kernels", {})
    monkeypatch.setattr(inductor, "untested", lambda version: True)
    monkeypatch.setattr(inductor, "standalone_compile", compiled)
    model = model_of([(40, 40)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.3 * rs.L1().on("*", how="proximal"), optimizer, compile=True)
    gradients(model, 0)
    before = model.p0.detach().clone()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reg._steppers[0].after(optimizer, (), {})
    assert any("to code that gives other numbers" in str(one.message) for one in told) == wrong
    assert (next(iter(inductor._kernels.values())) is None) == wrong
    assert torch.allclose(model.p0, rs.L1().prox(before, 0.03))


def test_compile_is_one_of_three():
    with pytest.raises(PlanError, match="compile= is True, False or 'auto', got 'always'"):
        rs.attach(nn.Linear(2, 2), 0.1 * rs.L1().on("*"), compile="always")


# Changes of the model


def test_what_changes_between_steps_is_noticed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 1e6 * rs.L1().on("*weight", how="proximal"), optimizer)

    def emptied():
        for p in model.parameters():
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return [not bool(model[0].weight.any()), not bool(model[1][0].weight.any())]

    assert emptied() == emptied() == [True, True]
    model[0].weight.requires_grad_(False)
    assert emptied() == [False, True]
    model[0].weight.requires_grad_(True)
    assert emptied() == [True, True]
    model[0].weight = nn.Parameter(torch.ones(3, 3))  # not the optimizer's
    assert emptied() == [False, True]
    optimizer.param_groups[0]["params"][0] = model[0].weight
    assert emptied() == [True, True]
    model[1] = nn.Sequential(nn.Linear(3, 3))
    assert emptied() == [True, False]
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert emptied() == [True, True]
    model[0].weight.data = torch.ones(3, 3, dtype=torch.float64)
    assert emptied() == [True, True]
    reg.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (64, 64), (3, 5000), (20_000_003,)])
def test_the_norm_of_all_entries_loses_no_precision_by_their_number(shape, dtype):
    w = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.5
    expected = float(w.to(torch.complex128).abs().square().sum().sqrt())
    found = groups.norm_of(w)
    assert found.shape == ()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == pytest.approx(expected, rel=2e-6)
    assert w.numel() < 1e7 or dtype != torch.float32 or torch.linalg.vector_norm(w) != pytest.approx(expected, rel=1e-5)
