"""Penalties of matrices beyond the matrix of tests: unfoldings, ranks, angles, use in training."""

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, NoProxError, PenaltyError
from restrain.named_tensors import Location
from restrain.penalties.unfold import from_matrix, to_matrix, unfolding, unfolding_at


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def at(module, attribute="weight"):
    return Location(getattr(module, attribute), attribute, module, attribute)


# Unfoldings


@pytest.mark.parametrize(
    ("rows", "shape", "matrix"),
    [
        ("out", (8, 4, 3, 3), (8, 36)),
        ("in", (8, 4, 3, 3), (4, 72)),
        (-1, (8, 4, 5), (5, 32)),
        ((0, 1), (8, 4, 3, 3), (32, 9)),
        ((3, 0), (8, 4, 3, 2), (16, 12)),
        ((0, 1), (2, 3), (6, 1)),
    ],
)
def test_unfoldings_go_there_and_back(rows, shape, matrix):
    w = normal(*shape)
    groups = unfolding(rows, shape)
    unfolded = to_matrix(w, groups)
    assert unfolded.shape == matrix
    assert torch.equal(from_matrix(unfolded, groups, shape), w)
    dims = groups.keep
    row = unfolded.reshape([shape[dim] for dim in dims] + [-1])[tuple(0 for _ in dims)]
    assert torch.equal(row, w.movedim(dims, tuple(range(len(dims))))[tuple(0 for _ in dims)].reshape(-1))


@pytest.mark.parametrize(
    ("layer", "rows", "matrix"),
    [
        (nn.Linear(5, 3), "out", (3, 5)),
        (nn.ConvTranspose2d(4, 6, 3), "out", (6, 36)),
        (nn.ConvTranspose2d(4, 6, 3), "in", (4, 54)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "out", (6, 18)),
        (nn.Conv2d(4, 6, 3, groups=2), "in", (4, 27)),
        (nn.Conv2d(4, 6, 3), (2, 3), (9, 24)),
        (nn.Embedding(10, 4), "out", (4, 10)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_rows_are_named_by_meaning(layer, rows, matrix):
    groups = unfolding_at(rows, at(layer))
    unfolded = to_matrix(layer.weight.detach(), groups)
    assert unfolded.shape == matrix
    assert torch.equal(from_matrix(unfolded, groups, tuple(layer.weight.shape)), layer.weight)
    penalty = rs.NuclearNorm(rows).bound_to(at(layer))
    torch.testing.assert_close(penalty(layer.weight), torch.linalg.matrix_norm(unfolded, "nuc"))


@pytest.mark.parametrize("rows", ["out", 0, (0,), (0, 5), (1, 1), (0, -2)])
def test_rows_that_a_tensor_has_not(rows):
    shape = (4,) if rows in ("out", 0, (0,)) else (4, 3)
    with pytest.raises(PenaltyError, match=r"two axes or more|each named once"):
        rs.SpectralNorm(rows)(torch.ones(shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda: rs.NuclearNorm("rows"),
        lambda: rs.SpectralNorm(()),
        lambda: rs.Orthogonality(of="out"),
        lambda: rs.Orthogonality(power=3),
        lambda: rs.Orthogonality(normalized=1),
    ],
)
def test_refuses_settings(make):
    with pytest.raises(PenaltyError, match="="):
        make()


# Singular values


def of_rank(rank, rows=7, columns=5, seed=0):
    return normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_gradient_of_the_nuclear_norm_at_any_rank(rank):
    w = of_rank(rank).requires_grad_()
    (found,) = torch.autograd.grad(rs.NuclearNorm()(w), w)
    u, _, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    torch.testing.assert_close(found, u[:, :rank] @ vh[:rank])
    assert torch.linalg.matrix_rank(found) == rank


def test_gradient_of_the_spectral_norm_where_it_is_tied():
    for w in (torch.eye(4, dtype=torch.float64), torch.zeros(4, 4), torch.ones(3, 3)):
        found = rs.SpectralNorm().gradient(w)
        assert found.isfinite().all()
        s = torch.linalg.svdvals(w)[0]
        torch.testing.assert_close((found * w).sum(), s)  # ⟨gradient, w⟩ is the norm
        assert torch.linalg.svdvals(found).sum() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_proxes_set_singular_values(dtype):
    w = normal(6, 9, dtype=dtype)
    s = torch.linalg.svdvals(w)
    step = float(s[2])
    found = torch.linalg.svdvals(rs.NuclearNorm().prox(w, step))
    torch.testing.assert_close(found, (s - step).clamp_min(0), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(rs.NuclearNorm().prox(w, step * 1.001)) == 2
    lowered = torch.linalg.svdvals(rs.SpectralNorm().prox(w, 1.0))
    assert s[0] - lowered[0] <= 1
    torch.testing.assert_close((s - lowered).sum(), s.new_tensor(1.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(lowered, s.clamp_max(float(lowered[0])), atol=1e-5, rtol=0)


# Angles


def test_products_that_cancel_still_count():
    """Without the absolute value, or the square, Σ_{i≠j} w_i · w_j of these is zero (defect A13)."""
    w = torch.tensor([[1.0, 0.0], [1.0, 0.5], [-1.0, 2.0]])
    products = w @ w.T
    assert products.sum() - products.trace() == 0
    for penalty in (
        rs.Orthogonality(off_diagonal=True),
        rs.Orthogonality(off_diagonal=True, power=1),
        rs.Orthogonality(normalized=True),
        rs.Orthogonality(normalized=True, power=1),
    ):
        assert penalty(w) > 1
        assert penalty(torch.eye(3, 4)) == 0
        assert penalty(-w) == penalty(w)


@pytest.mark.parametrize("of", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 3), (3, 1)])
def test_the_smaller_gram_matrix_gives_the_same(of, shape):
    w = normal(*shape)
    a = w if of == "rows" else w.T
    expected = (a @ a.T - torch.eye(len(a), dtype=a.dtype)).square().sum()
    torch.testing.assert_close(rs.Orthogonality(of=of)(w), expected)
    q = torch.linalg.qr(normal(9, 4)).Q
    assert rs.Orthogonality(of="columns")(q) < 1e-25
    torch.testing.assert_close(rs.Orthogonality()(q), torch.tensor(5.0, dtype=torch.float64))


def test_sonnets_off_diagonal_orthogonal():
    w = normal(3, 3, 2, 6)  # Sonnet's kernels have the outputs last
    product = w.reshape(-1, 6).T @ w.reshape(-1, 6)
    expected = (product * (1 - torch.eye(6))).square().sum()
    torch.testing.assert_close(rs.Orthogonality(rows=-1, off_diagonal=True)(w), expected)


def test_lengths_do_not_count_among_cosines():
    w, lengths = normal(5, 4), torch.tensor([[1e-8], [1.0], [10.0], [1e4], [0.1]])
    for power in (1, 2):
        cosines = rs.Orthogonality(normalized=True, power=power)
        torch.testing.assert_close(cosines(w * lengths), cosines(w))
    w[2] = 0
    gradient = rs.Orthogonality(normalized=True, power=1).gradient(w)
    assert gradient.isfinite().all()
    assert gradient[2].eq(0).all()


def test_wide_also_under_autocast():
    w = normal(64, 64, dtype=torch.float32)
    for penalty in (
        rs.Orthogonality(),
        rs.Orthogonality(normalized=True, power=1),
        rs.NuclearNorm(),
        rs.SpectralNorm(),
    ):
        expected = penalty(w.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert w.matmul(w).dtype == torch.bfloat16
            torch.testing.assert_close(penalty(w).double(), expected, rtol=1e-5, atol=0)
    assert rs.Orthogonality()(torch.full((4, 4), 300.0, dtype=torch.float16)).isfinite()


# In training


def regression(rank=2):
    x, target = normal(60, 8, dtype=torch.float32), of_rank(rank, 6, 8).float()
    return x, x @ target.T + 0.1 * normal(60, 6, dtype=torch.float32, seed=5)


@pytest.mark.parametrize("how", ["loss", "gradient", "proximal"])
def test_nuclear_norm_in_training(how):
    model, (x, y) = nn.Linear(8, 6, bias=False), regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = rs.attach(model, 0.5 * rs.NuclearNorm().on("weight", how=how), optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        reg.loss((model(x) - y).square().sum(1).mean() / 2).backward()
        optimizer.step()
    s = torch.linalg.svdvals(model.weight.detach())
    assert s[1] > 0.5
    assert (s[2:] < (1e-5 if how == "proximal" else 0.1)).all()
    # at the minimiser the gradient of the loss is -0.5 (U Vᵀ + something across, of spectral norm one at most)
    slope = (model.weight.detach() @ x.T - y.T) @ x / len(x)
    torch.testing.assert_close(torch.linalg.svdvals(slope)[0], torch.tensor(0.5), atol=0.03, rtol=0)


def test_orthogonality_in_training_makes_rows_orthogonal():
    model = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    reg = rs.attach(model, rs.Orthogonality().on(rs.weights), optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        reg.penalty().backward()
        reg.loss(torch.zeros(()))
        optimizer.step()
    assert reg.values()[next(iter(reg.values()))] < 1e-4


def test_where_and_how_they_cannot_act():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(PenaltyError, match=r"shape \(3,\) \('bias'\): select rs.weights"):
        rs.attach(model, rs.NuclearNorm().on("bias"))
    with pytest.raises(HowError, match="Use SGD"):
        rs.attach(model, rs.NuclearNorm().on("weight", how="proximal"), optimizer)
    with pytest.raises(PenaltyError, match="select parameters"):
        rs.SpectralNorm().on(rs.outputs("0"))
    with pytest.raises(NoProxError):
        rs.Orthogonality().prox(torch.ones(2, 2))
    with pytest.raises(NoProxError, match="no prox is known for the sum"):
        (rs.NuclearNorm() + rs.L1()).prox(torch.ones(2, 2))


def test_a_square_may_join():
    w = normal(5, 4)
    found = (rs.NuclearNorm() + 0.5 * rs.L2()).prox(w, 0.7)
    torch.testing.assert_close(found, rs.NuclearNorm().prox(w / 1.7, 0.7 / 1.7))


@pytest.mark.parametrize(
    "penalty",
    [rs.NuclearNorm((0, 1)), rs.SpectralNorm("in"), rs.Orthogonality(of="columns", normalized=True, power=1)],
    ids=repr,
)
def test_plans(penalty, tmp_path):
    plan = rs.Plan.of([0.1 * penalty.on("*.weight")])
    for ending in ("yaml", "toml", "json"):
        plan.save(tmp_path / f"plan.{ending}")
        assert rs.Plan.load(tmp_path / f"plan.{ending}") == plan
    assert rs.Plan.of("nuclear_norm:0.1").rules[0].what == 0.1 * rs.NuclearNorm()


# As parametrisations


@pytest.mark.parametrize(
    "member", [rs.Orthogonal(), rs.SpectralBall(1.5), rs.NuclearBall(3.0), rs.LowRank(2)], ids=repr
)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_free_forms_have_the_right_gradient(member, shape, dtype):
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.testing.assert_close(member.from_free(v), member.project(v))
    assert torch.autograd.gradcheck(member.from_free, v)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
def test_the_gradient_is_finite_and_right_where_singular_values_coincide(shape):
    torch.manual_seed(0)
    v = rs.Orthogonal().project(torch.randn(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(rs.Orthogonal().from_free, v)
    g = torch.randn(shape, dtype=torch.float64)
    (slope,) = torch.autograd.grad(rs.Orthogonal().from_free(v), v, g)
    torch.testing.assert_close(slope, rs.Orthogonal().tangent(v.detach(), g))
    for member in (rs.SpectralBall(0.5), rs.SpectralBall(2.0), rs.NuclearBall(1.0), rs.LowRank(2)):
        (slope,) = torch.autograd.grad(member.from_free(v).sum(), v)
        assert slope.isfinite().all()
    assert torch.autograd.gradcheck(rs.SpectralBall(0.5).from_free, v)
    assert torch.autograd.gradcheck(rs.NuclearBall(1.0).from_free, v)
