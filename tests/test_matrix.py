"""Everything public in penalties and transforms, against references and by definition; see design.md §7.5.

To add a penalty or transform, give it a case in `cases/`: the tests here find it by that.
"""

import copy
import pickle
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch

import references as ref
import restrain as rs
from cases import CONSTRAINTS, NOISES, PENALTIES, TRANSFORMS, Case
from restrain import penalties, transforms
from restrain.errors import NoProxError
from restrain.rules import What

BASES = {"Penalty", "NetworkPenalty", "Transform", "Constraint", "Noise", "Reparametrization"}
HALF = [torch.float16, torch.bfloat16]
REAL = [torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]


def flat(cases, others=()):
    """All cases; `others` are the marks of those beyond the first of a member."""
    return [
        pytest.param(case, id=repr(case), marks=others if number else ())
        for group in cases.values()
        for number, case in enumerate(group)
    ]


each_penalty = pytest.mark.parametrize("case", flat(PENALTIES))
each_prox = pytest.mark.parametrize("case", [case for case in flat(PENALTIES) if case.values[0].member.has_prox])
each_constraint = pytest.mark.parametrize("case", flat(CONSTRAINTS))
each_noise = pytest.mark.parametrize("case", flat(NOISES))
each_member = pytest.mark.parametrize("case", flat(PENALTIES | TRANSFORMS))


ELSEWHERE = {  # what takes no tensor alone, and the tests that hold it to its formula
    "Contractive": "penalties/test_derivative.py",
    "GradientPenalty": "penalties/test_derivative.py",
    "JacobianNorm": "penalties/test_derivative.py",
    "AttentionEntropy": "penalties/test_routing.py",
    "DecoderL1": "penalties/test_activity.py",
    "ProductNorm": "penalties/test_stateful.py",
    "AuxK": "penalties/test_dead_features.py",
    "BatchTopK": "transforms/test_activation.py",
    "Firings": "transforms/test_activation.py",
    "JumpReLU": "transforms/test_activation.py",
    "Hyperball": "engine/step/test_hyperball.py",
    "Sharpness": "engine/step/test_sharpness.py",
    "MomentumSharpness": "engine/step/test_sharpness.py",
    "Invariance": "penalties/test_views.py",
    "CrossCorrelation": "penalties/test_views.py",
    "Tie": "penalties/test_stateful.py",
    "Standardize": "transforms/test_normalization.py",
    "RobustScale": "transforms/test_robust_scale.py",
}


def missing(names, cases):
    """Public members without a case here or tests elsewhere."""
    return set(names) - BASES - set(cases) - set(ELSEWHERE)


def public_classes():
    """The public classes that compute something."""
    kinds = (What, torch.nn.Module)
    return [name for name in rs.__all__ if isinstance(c := getattr(rs, name), type) and issubclass(c, kinds)]


def test_every_public_member_has_a_case():
    assert missing([*penalties.__all__, *transforms.__all__, *public_classes()], PENALTIES | TRANSFORMS) == set()
    assert missing(["L1", "New", "Penalty"], PENALTIES) == {"New"}
    assert {"L1", "MaxNorm", "Tie", "JacobianNorm", "Standardize"} <= set(public_classes())
    for name, file in ELSEWHERE.items():
        assert f"rs.{name}(" in (Path(__file__).parent / file).read_text("utf-8")


def matrices(dtype=torch.float64, shape=(4, 3), count=3):
    return [(torch.randn(shape, dtype=dtype) * 2).requires_grad_() for _ in range(count)]


def inside(case, w):
    """The tensor, taken to where the member is defined."""
    return case.domain(w.detach()).requires_grad_(w.requires_grad)


def supported(case, dtype):
    if dtype.is_complex and not case.complex:
        pytest.skip("real tensors only")


# Penalties


def value_fault(case, w):
    return abs(case.member(w).item() - case.reference(w.detach().numpy()).item())


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_value(case, dtype):
    supported(case, dtype)
    for w in matrices(dtype):
        w = inside(case, w)
        assert value_fault(case, w) < 1e-13 * case.member(w).item()


def test_value_oracle():
    assert value_fault(Case(rs.L2(), ref.l1), torch.ones(2, 2) * 3) > 1


@pytest.mark.thinned(3)
@each_penalty
@pytest.mark.parametrize("dtype", HALF + REAL + COMPLEX)
def test_gradient_is_autograds(case, dtype):
    supported(case, dtype)
    for w in matrices(dtype):
        w = inside(case, w)
        (expected,) = torch.autograd.grad(case.member(w), w)
        found = case.member.gradient(w)
        assert found.dtype == dtype
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)
        assert case.member(w).dtype in (torch.float32, torch.float64)


def slope_fault(case, w, d):
    expected = ref.slope(case.slope or case.reference, w.detach().numpy(), d.numpy())
    found = (case.member.gradient(w).conj() * d).real.sum()
    return abs(float(found) - expected) / (1 + abs(expected))


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_is_the_references_slope(case, dtype):
    supported(case, dtype)
    for w in matrices(dtype):
        w = inside(case, w)
        assert slope_fault(case, w, torch.randn_like(w)) < 1e-8
        assert case.slope or torch.autograd.gradcheck(lambda x: case.member(x), w, fast_mode=dtype.is_complex)


def test_slope_oracle():
    w = torch.ones(2, 2, dtype=torch.float64)
    assert slope_fault(Case(0.5 * rs.L2(), ref.l2), w, torch.ones_like(w)) > 0.1


@each_prox
@pytest.mark.parametrize("step", [0.3, torch.tensor([[0.05, 0.4], [1.0, 0.0002]])])
def test_prox_is_the_brute_minimizer(case, step):
    if isinstance(step, torch.Tensor) and not (case.member.entrywise or case.member.groupwise):
        pytest.skip("the same step for all")
    w = torch.tensor([[1.4, -0.2], [0.3, 0.9]], dtype=torch.float64)
    found = case.member.prox(w, step)
    expected = ref.brute_prox(case.reference, w.numpy(), np.asarray(step))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.thinned(2)
@each_prox
@pytest.mark.parametrize("step", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_prox_is_the_minimizer_in_every_direction(case, step, dtype):
    supported(case, dtype)
    for w in matrices(dtype, (5, 4)):
        z = case.member.prox(w, step).detach()
        assert ref.prox_excess(case.reference, w.detach().numpy(), step, z.numpy(), convex=case.convex) < 1e-14


@pytest.mark.thinned(2)
@each_prox
@pytest.mark.parametrize("spread", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_prox_in_a_diagonal_metric(case, spread, dtype):
    supported(case, dtype)
    if not (case.member.entrywise or case.member.groupwise):
        with pytest.raises(NoProxError):
            case.member.prox(torch.ones(2, 2), torch.ones(2, 2))
        return
    supported(case, dtype)
    for w in matrices(dtype, (5, 4)):
        step = 2 * 10 ** (-spread * torch.rand(w.shape, dtype=torch.float64))
        z = case.member.prox(w, step).detach()
        assert ref.prox_excess(case.reference, w.detach().numpy(), step.numpy(), z.numpy(), convex=case.convex) < 1e-14


def test_prox_oracles():
    w = np.array([[1.4, -0.2], [0.3, 0.9]])
    for strength in (0.98, 1.02):  # the prox of almost the same penalty
        z = (strength * rs.L1() + strength * rs.GroupLasso()).prox(torch.tensor(w), 0.3).numpy()
        value = ref.weighted((1, ref.l1), (1, ref.group_lasso(0)))
        assert np.abs(z - ref.brute_prox(value, w, 0.3)).max() > 1e-3
        assert ref.prox_excess(value, w, 0.3, z) > 1e-6


@each_prox
def test_prox_at_zero_and_at_no_step(case):
    zero = torch.zeros(3, 4)
    for z in (case.member.prox(zero, 0.5), case.member.prox(-zero, torch.tensor(0.5))):
        assert z.eq(0).all()
    w = torch.randn(3, 4)
    z = case.member.prox(w, 0.0)
    assert torch.equal(z, w)
    assert z.data_ptr() != w.data_ptr()
    dead = case.member.prox(w.clamp(-0.01, 0.01), 1e3)
    if case.kills:
        assert dead.eq(0).all()
        assert not dead.signbit().any()


@each_prox
@pytest.mark.parametrize("dtype", HALF + REAL)
def test_prox_computes_wide_and_keeps_the_dtype(case, dtype):
    w, wide = torch.randn(6, 5, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    steps = [0.3] + [torch.rand(6, 5)] * (case.member.entrywise or case.member.groupwise)
    for step in steps:
        z = case.member.prox(w, step)
        assert z.dtype == dtype
        assert torch.equal(z, case.member.prox(w.to(wide), step).to(dtype))


@each_penalty
def test_at_zero(case):
    w = torch.zeros(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(case.member(w), w)
    if case.zero_at_zero:
        assert case.member(w) == 0
        assert expected.eq(0).all()
    torch.testing.assert_close(case.member.gradient(w), expected, rtol=0, atol=0)
    with torch.no_grad():
        w[0, 0] = 1.0
    assert case.member.gradient(w).isfinite().all()


@pytest.mark.thinned(2)
@each_penalty
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()])
def test_empty_and_0d(case, shape):
    if len(shape) < 2 and not case.any_rank:
        pytest.skip("matrices only")
    w = inside(case, torch.full(shape, -2.0, requires_grad=True))
    assert case.member(w).shape == ()
    assert case.member.gradient(w).shape == shape
    if w.numel() == 0:
        assert case.member(w) == 0
    if case.member.has_prox:
        assert case.member.prox(w, 0.1).shape == shape


@each_penalty
def test_nan_is_not_hidden(case):
    w = inside(case, torch.ones(2, 2))
    w[0, 0] = torch.nan
    assert case.member(w).isnan()
    if case.member.has_prox:
        assert case.member.prox(w, 0.1)[0, 0].isnan()


@each_penalty
def test_any_memory_layout(case):
    w = inside(case, torch.randn(3, 4))
    for other in (w.T.contiguous().T, torch.randn(6, 8)[::2, ::2].copy_(w)):
        torch.testing.assert_close(case.member(other), case.member(w))
        torch.testing.assert_close(case.member.gradient(other), case.member.gradient(w))
        if case.member.has_prox:
            torch.testing.assert_close(case.member.prox(other, 0.3), case.member.prox(w, 0.3))


# Constraints


@each_constraint
@pytest.mark.parametrize("dtype", HALF + REAL + COMPLEX)
def test_projection(case, dtype):
    supported(case, dtype)
    for w in matrices(dtype, case.fits((6, 5))):
        w = w.detach()
        before, z = w.clone(), case.member.project(w)
        wide = w.to(torch.complex128 if dtype.is_complex else torch.float64)
        expected = torch.from_numpy(case.reference(wide.numpy()))
        torch.testing.assert_close(z, expected.to(dtype))
        assert torch.equal(case.member.project(z), z)  # idempotent, hence also the identity inside
        assert torch.equal(w, before)
        assert z.dtype == dtype


@each_constraint
def test_projection_is_the_nearest_feasible_point(case):
    w = torch.randn(case.fits((4, 3)), dtype=torch.float64)
    z = case.member.project(w).numpy()
    near = np.linalg.norm(w.numpy() - z)
    others = [case.reference(z + d) for d in ref.directions(z.shape)]
    assert min(np.linalg.norm(w.numpy() - other) for other in others) > near * (1 - 1e-14)


@each_constraint
@pytest.mark.parametrize("shape", [(3, 4), (0, 3), (3, 0), (0,), ()])
def test_projection_at_zero_and_empty(case, shape):
    if len(shape) < 2 and not case.any_rank:
        pytest.skip("matrices only")
    shape = case.fits(shape)
    z = case.member.project(torch.full(shape, -0.0))
    assert z.shape == shape
    assert z.isfinite().all()
    assert torch.equal(case.member.project(z), z)


def test_projection_oracle():
    case = Case(rs.MaxNorm(1.0), ref.project_groups(ref.shorten(1.1), 0))
    with pytest.raises(AssertionError):
        test_projection(case, torch.float64)


# Noise


def noise_fault(case, x, n=4000):
    """The greatest deviation of the mean and of the standard deviation over n draws, in standard errors."""
    draws = torch.stack([case.member(x) for _ in range(n)])
    mean, deviation = (torch.as_tensor(expected) for expected in case.reference(x.numpy()))
    of_mean = (draws.mean(0) - mean).abs() / (deviation / n**0.5 + 1e-12)
    square = (draws - mean).abs().square()
    of_square = (square.mean(0) - deviation**2).abs() / (square.std(0) / n**0.5 + 1e-12)
    return float(torch.maximum(of_mean, of_square).max())


@each_noise
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_noise_has_the_mean_and_deviation(case, dtype):
    supported(case, dtype)
    x = torch.randn(case.shape, dtype=dtype)
    before = x.clone()
    assert noise_fault(case, x) < 4.5  # at most 80 numbers, each beyond 4.5 with a probability of 7e-6
    assert torch.equal(x, before)


def test_noise_oracle():
    wrong = Case(rs.GaussianNoise(0.33), NOISES["GaussianNoise"][0].reference)
    assert noise_fault(wrong, torch.randn(3, 4, dtype=torch.float64)) > 4.5


@pytest.mark.thinned(3)
@each_noise
@pytest.mark.parametrize("dtype", HALF + REAL)
@pytest.mark.parametrize("shape", [(3, 4), (0, 3), (), None])
def test_noise_keeps_shape_and_dtype(case, dtype, shape):
    if shape is not None and not case.any_rank:
        pytest.skip("of one rank only")
    x = torch.ones(case.shape if shape is None else shape, dtype=dtype, requires_grad=True)
    y = case.member(x)
    assert (y.shape, y.dtype, y.requires_grad) == (x.shape, dtype, True)


# All


def everything(member, w, step, prox=True):
    """What a member computes, in one function to compile."""
    if isinstance(member, rs.Constraint):
        return [member.project(w), member.from_free(w)]
    if isinstance(member, rs.Reparametrization):
        return [member.from_free(w)]
    if isinstance(member, rs.Noise):
        return [member(w)]
    results = [member(w)]
    if prox and member.has_prox:
        results.append(member.prox(w, 0.3))
        if member.entrywise or member.groupwise:
            results.append(member.prox(w, step))
    return results


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()  # compiled code makes `attach` warn, in tests to come


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", flat(PENALTIES | TRANSFORMS, others=pytest.mark.slow))
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled(case):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    shape = case.fits(case.shape)
    w, step = inside(case, torch.randn(shape, requires_grad=True)), torch.rand(shape)
    torch.manual_seed(1)
    expected = everything(case.member, w, step, case.compiled_prox)
    torch.manual_seed(1)
    found = compiled(case.member, w, step, case.compiled_prox)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(results[0].sum(), w) for results in (found, expected)]
    torch.testing.assert_close(*slopes)


@each_member
def test_copied_pickled_and_printed(case):
    for twin in (copy.copy(case.member), copy.deepcopy(case.member), pickle.loads(pickle.dumps(case.member))):
        assert twin == case.member
        assert hash(twin) == hash(case.member)
    assert eval(repr(case.member), {**vars(rs), "inf": inf}) == case.member
