"""Rules in the loss are computed for many tensors at once, in blocks; here against one tensor at a time in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

import restrain as rs
from layouts import explained
from restrain.engine.backends import eager
from restrain.engine.core import memory
from restrain.engine.distributed.shards import totals
from restrain.engine.loss import parameters

RULES = [
    rs.L1(),
    0.3 * rs.L2(),
    rs.ElasticNet(0.5, 0.2),
    rs.ElasticNet(0.0, 0.0),
    0.3 * rs.L1() + 0.2 * rs.L2() + 0.1 * rs.LogSum(0.5),
    rs.Huber(0.5),
    rs.LogSum(0.3),
    rs.MCP(1.0),
    0.7 * rs.SCAD(0.5, 2.0),
    rs.Lp(0.5),
    rs.SoftBox(-0.2, 0.4),
    0.3 * rs.GroupLasso(per=0),
    rs.GroupLasso(per=0) + 0.1 * rs.L1(),
]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0), (4, 5), (2, 3, 2, 2), (33,), (6, 11)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.complex64: 2e-6}


def model_of(*tensors):
    model = nn.Module()
    for number, tensor in enumerate(tensors):
        model.register_parameter(f"p{number}", nn.Parameter(tensor))
    return explained(model)


def tensor(shape, dtype=torch.float32, seed=0):
    """Random entries, of which some are zero, in whatever memory layout the seed says."""
    made = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    made = torch.where(made.abs() < 0.2, 0, made)
    if seed % 3 == 1 and len(shape) == 4:
        return made.to(memory_format=torch.channels_last)
    return made.repeat_interleave(2, -1)[..., ::2] if seed % 3 == 2 and shape else made


def by_one(penalty, ps, mean=False):
    """The value and the gradients, one tensor at a time, by the formula in float64."""
    value, gradients = 0.0, []
    for p in ps:
        x = p.detach().to(torch.complex128 if p.is_complex() else torch.float64).requires_grad_()
        v = penalty(x) / (max(p.numel(), 1) * len(ps) if mean else 1)
        gradients.append(torch.autograd.grad(v, x, materialize_grads=True)[0])
        value += float(v.detach())
    return value, gradients


def by_rule(penalty, ps, scale=1.0, **on):
    model = model_of(*ps)
    with rs.attach(model, penalty.on("*", **on)) as reg:
        value = reg.penalty()
        (scale * value).backward()
        assert list(reg.values().values()) == [pytest.approx(float(value.detach()))]
    return float(value.detach()), [p.grad for p in model.parameters()]


def same(ps, found, wanted):
    for p, a, b in zip(ps, found, wanted, strict=True):
        assert a.dtype == p.dtype
        torch.testing.assert_close(a.to(b), b, rtol=TOLERANCE[p.dtype], atol=TOLERANCE[p.dtype])


@pytest.fixture(params=["whole", "blocks", "loops"])
def way(request, monkeypatch):
    """As it is; cut into blocks of few entries, of tensors that don't join; by compiled loops."""
    if request.param == "blocks":
        monkeypatch.setattr(eager._Piece, "block", 6)
        monkeypatch.setattr(parameters, "SMALL", 8)
        monkeypatch.setattr(parameters, "JOINED", 12)
    if request.param == "loops":
        by_loops(monkeypatch)


def by_loops(monkeypatch, least=1):
    """All is done by compiled loops, the gradients of few tensors at a time."""
    monkeypatch.setattr(parameters, "LOOPS", least)
    monkeypatch.setattr(parameters, "JOINED_BY_LOOPS", 12)


TENSORS = st.lists(
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(list(TOLERANCE)), st.integers(0, 5)), min_size=1, max_size=6
)


@pytest.mark.parametrize("penalty", RULES, ids=repr)
@settings(max_examples=15)
@given(drawn=TENSORS, scale=st.sampled_from([1.0, 0.5, 1024.0]), mean=st.booleans(), loops=st.booleans())
def test_equals_one_at_a_time(penalty, drawn, scale, mean, loops):
    grouped = "Group" in repr(penalty)
    fits = [one for one in drawn if (one[0] or not grouped) and not (one[1].is_complex and "Box" in repr(penalty))]
    ps = [tensor(*one) for one in fits] or [tensor((3, 5))]
    mean = mean and not grouped
    wanted, gradients = by_one(penalty, ps, mean)
    with pytest.MonkeyPatch.context() as patched:
        by_loops(patched, 1 if loops else 1 << 60)
        value, found = by_rule(penalty, ps, scale, **({"reduce": "mean"} if mean else {}))
    rough = max(TOLERANCE[p.dtype] for p in ps)
    assert value == pytest.approx(wanted, rel=max(rough, 1e-5), abs=1e-5)
    same(ps, [g / scale for g in found], gradients)


@pytest.mark.parametrize("penalty", RULES, ids=repr)
def test_each_way(penalty, way):
    ps = [tensor(shape, seed=seed) for seed, shape in enumerate(SHAPES[1:])]
    wanted, gradients = by_one(penalty, ps)
    value, found = by_rule(penalty, ps)
    assert value == pytest.approx(wanted, rel=1e-5)
    same(ps, found, gradients)


def test_more_than_a_block_and_a_huge_page(monkeypatch):
    monkeypatch.setattr(memory, "_LARGE", 1 << 22)
    ps = [tensor((1200, 1000)), tensor((70_000,)), tensor((5,))]
    for penalty in (rs.L1(), rs.GroupLasso(per=0), rs.MCP(1.0)):
        wanted, gradients = by_one(penalty, ps)
        value, found = by_rule(penalty, ps)
        assert value == pytest.approx(wanted, rel=1e-6)
        same(ps, found, gradients)


def test_one_function_for_many_small_tensors(monkeypatch):
    monkeypatch.setattr(parameters, "LOOPS", 1 << 60)
    calls = []
    monkeypatch.setattr(
        parameters, "_value", lambda bundle, real=parameters._value: calls.append(len(bundle)) or real(bundle)
    )
    by_rule(0.1 * rs.L1(), [tensor((10, 10)) for _ in range(200)] + [tensor((300, 300))])
    assert calls[:2] == [1, 200]
    calls.clear()
    by_rule(rs.L1(), [tensor((250, 250)) for _ in range(9)])  # so that gradients take no more memory than a few do
    assert calls[:3] == [4, 4, 1]


def test_gradients_have_memory_of_their_own(way):
    ps = [nn.Parameter(tensor((5, 3))) for _ in range(3)]
    _, gradients = by_rule(rs.L1(), ps)
    assert all(g._base is None and g.untyped_storage().nbytes() == g.nbytes for g in gradients)


def attached(penalty, *tensors):
    model = model_of(*tensors)
    return list(model.parameters()), model, rs.attach(model, penalty.on("*"))


CURVED = 0.3 * rs.L2() + rs.LogSum(0.5) + 0.2 * rs.GroupLasso(per=0)


def test_second_derivatives(way):
    ps, _, reg = attached(CURVED, tensor((4, 3), torch.float64), tensor((5,), torch.float64, 1))
    assert isinstance(reg.penalty().grad_fn, torch.autograd.graph.Node)

    def of(*tensors):
        return sum(CURVED(x) for x in tensors)

    first = torch.autograd.grad(reg.penalty(), ps, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), ps)
    plain = torch.autograd.grad(of(*ps), ps, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(sum((g**2).sum() for g in plain), ps))


def test_batched_gradients(way):
    ps, _, reg = attached(CURVED, tensor((4, 3)), tensor((5,)))
    factors = torch.tensor([1.0, 0.5, -2.0])
    found = torch.autograd.grad(reg.penalty(), ps, factors, is_grads_batched=True)
    wanted = torch.autograd.grad(reg.penalty(), ps)
    torch.testing.assert_close(found, tuple(factors.view(-1, *[1] * g.dim()) * g for g in wanted))


FORWARD = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself loads that way


@FORWARD
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transformations_of_functions(transform):
    ps, _, reg = attached(CURVED, tensor((4, 3)), tensor((5,)))
    whats, at = [what for _, what in reg._bounds[0].parameters], tuple(p.detach() for p in ps)

    def value(*tensors):
        return totals([parameters.values(list(zip(tensors, whats, strict=True)))])[0]

    gradients = torch.autograd.grad(reg.penalty(), ps)
    if transform == "grad":
        torch.testing.assert_close(torch.func.grad(value, (0, 1))(*at), gradients)
    elif transform == "jvp":
        found = torch.func.jvp(value, at, gradients)[1]
        torch.testing.assert_close(found.float(), sum((g**2).sum() for g in gradients))
    else:
        found = torch.func.vmap(value)(*(torch.stack([p, 2 * p]) for p in at))
        torch.testing.assert_close(found, torch.stack([value(*at), value(*(2 * p for p in at))]))


@FORWARD
def test_dual_numbers():
    x, direction = tensor((3, 2)), tensor((3, 2), seed=3)
    with forward_ad.dual_level():
        terms = parameters.values([(forward_ad.make_dual(x, direction), rs.L1())])
        found = forward_ad.unpack_dual(terms[0][0]).tangent
    torch.testing.assert_close(found, (x.sign() * direction).sum())


def test_compiles():
    ps, _, reg = attached(CURVED, tensor((4, 3)), tensor((5,)))
    found = torch.compile(lambda: sum(CURVED(p) for p in ps), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(found, reg.penalty())


def test_notices_changes_in_place(way):
    ps, _, reg = attached(rs.L1(), tensor((4, 3)), tensor((5,)))
    value = reg.penalty()
    with torch.no_grad():
        ps[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_twice_backward(way):
    ps, _, reg = attached(rs.L1(), tensor((4, 3)), tensor((5,)))
    value = reg.penalty()
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(ps[0].grad, 2 * ps[0].detach().sign())
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_frozen_tensors_stay_out(way):
    ps, _, reg = attached(rs.L1(), tensor((4, 3)), tensor((5,)))
    ps[0].requires_grad_(False)
    reg.penalty().backward()
    assert ps[0].grad is None
    torch.testing.assert_close(ps[1].grad, ps[1].detach().sign())


def test_strength_is_that_of_the_forward(way):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, (rs.schedules.WarmUp(4) * rs.L1()).on("weight"))
    strengths = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = reg.loss(0.0 * model(torch.ones(1, 3)).sum())
        strengths.append(reg.strengths()["L1"] if "L1" in reg.strengths() else next(iter(reg.strengths().values())))
        loss.backward()
        assert float(model.weight.grad.abs().max()) == pytest.approx(strengths[-1])
        optimizer.step()
    assert strengths == sorted(set(strengths))


class Doubled(rs.L1):
    """Another formula, whose closed forms are those of L1."""

    def __call__(self, w):
        return 2 * w.abs().sum()


def test_formulas_of_users_are_taken_as_they_are(way):
    ps = [tensor((4, 3)), tensor((5,))]
    value, gradients = by_rule(Doubled(), ps)
    assert value == pytest.approx(float(2 * sum(p.abs().sum() for p in ps)))
    same(ps, gradients, [2 * p.sign().double() for p in ps])


class Told(torch.autograd.Function):
    """The identity, whose backward is noted."""

    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes = notes
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.notes.append("model")
        return gradient, None


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_come_last(hooked, monkeypatch):
    monkeypatch.setattr(parameters, "SMALL", 8)
    notes = []
    ps, _, reg = attached(rs.L1(), tensor((4, 3)), tensor((9,)))
    if hooked:  # such a hook may free the gradient, so all should not be there at once
        for p in ps:
            p.register_post_accumulate_grad_hook(lambda p: None)
    real = eager._Sums.gradients
    monkeypatch.setattr(eager._Sums, "gradients", lambda *a, **k: notes.append("ours") or real(*a, **k))
    loss = sum(Told.apply(p, notes).square().sum() for p in ps)
    reg.loss(loss).backward()
    assert notes == (["ours", "ours", "model", "model"] if hooked else ["model", "model", "ours", "ours"])
    for p in ps:
        torch.testing.assert_close(p.grad, 2 * p.detach() + p.detach().sign())


def test_the_comparison_notices_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(eager._Squares, "gradient", lambda self, x, factor, out: torch.mul(x, factor, out=out))
    ps = [tensor((4, 3))]
    with pytest.raises(AssertionError):
        same(ps, by_rule(rs.L2(), ps)[1], by_one(rs.L2(), ps)[1])


def test_inference_mode_leaves_nothing_behind():
    memory.scratch.held.clear()
    ps, _, reg = attached(rs.L1(), tensor((4, 3)))
    with torch.inference_mode():
        reg.values()
    reg.penalty().backward()
    torch.testing.assert_close(ps[0].grad, ps[0].detach().sign())
