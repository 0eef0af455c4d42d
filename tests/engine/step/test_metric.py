"""Constraints end at the constrained minimiser, whatever the optimizer's steps."""

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, PlanError, TransformError

# A convex problem, ½ (p - a)ᵀ Q (p - a), and its minimisers over sets by NumPy alone

SIZE = 6
MIXED = np.random.default_rng(3).normal(size=(SIZE, SIZE))
CURVE = MIXED @ MIXED.T / 20 + np.diag([0.7, 1.0, 3.0, 0.8, 2.0, 1.0])
AIM = np.array([1.5, -0.7, 0.4, -0.2, 0.9, 0.6])


def onto_simplex(x, total=1.0):
    ordered = np.sort(x)[::-1]
    levels = (np.cumsum(ordered) - total) / np.arange(1, x.size + 1)
    return np.maximum(x - levels[ordered > levels][-1], 0)


def onto_l1_ball(x):
    return x if np.abs(x).sum() <= 1 else np.sign(x) * onto_simplex(np.abs(x))


SETS = {
    "nonnegative": (rs.NonNegative(), lambda x: np.maximum(x, 0)),
    "box": (rs.Box(-0.3, 0.5), lambda x: np.clip(x, -0.3, 0.5)),
    "max_norm": (rs.MaxNorm(0.8, per=None), lambda x: x * min(1, 0.8 / np.linalg.norm(x))),
    "min_max_norm": (rs.MinMaxNorm(0.0, 0.7, per=None), lambda x: x * min(1, 0.7 / np.linalg.norm(x))),
    "l1_ball": (rs.L1Ball(1.0), onto_l1_ball),
    "simplex": (rs.Simplex(1.0), onto_simplex),
}


def convex_minimiser(project):
    """Return argmin over a convex set by projected gradients, with Nesterov's momentum and restarts."""
    rate, found, ahead, t = 1 / np.linalg.eigvalsh(CURVE)[-1], np.zeros(SIZE), np.zeros(SIZE), 1.0
    for _ in range(5000):
        new = project(ahead - rate * CURVE @ (ahead - AIM))
        if np.array_equal(new, found):
            break
        if (ahead - new) @ (new - found) > 0:
            t = 1.0
        after = (1 + np.sqrt(1 + 4 * t * t)) / 2
        ahead, found, t = new + (t - 1) / after * (new - found), new, after
    return found


def sphere_minimiser():
    """Return argmin over unit vectors: (Q + μ) p = Q a with the μ above -λ_min for which ‖p‖ = 1, by bisection."""
    values, vectors = np.linalg.eigh(CURVE)
    right = vectors.T @ CURVE @ AIM
    low, high = -values[0], 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(right / (values + middle)) > 1 else (low, middle)
    return vectors @ (right / (values + low))


RIGHT = {name: convex_minimiser(project) for name, (_, project) in SETS.items()} | {"unit_norm": sphere_minimiser()}
CONSTRAINTS = {name: constraint for name, (constraint, _) in SETS.items()} | {"unit_norm": rs.UnitNorm(per=None)}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.03),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.5),
}


class Vectors(nn.Module):
    """A parameter for each constraint, each with the same loss."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.full((SIZE,), 0.3, dtype=torch.float64)))

    def loss(self):
        curve, aim = torch.tensor(CURVE), torch.tensor(AIM)
        return sum((p - aim) @ curve @ (p - aim) for p in self.parameters()) / 2


def settled(optimizer, loss, constant, falling):
    """Train at a constant rate for some steps, and for others at one that falls to zero."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1e-8 ** (max(k - constant, 0) / falling))
    for _ in range(constant + falling):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def trained(constraints, make, steps=(300, 200), **options):
    """Train under constraints, at a constant rate and then one that falls to zero; return the parameters."""
    model = Vectors(constraints)
    optimizer = make(model.parameters())
    reg = rs.attach(model, [what.on(name, **options) for name, what in constraints.items()], optimizer)
    settled(optimizer, model.loss, *steps)
    reg.detach()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_minimiser_over_each_set_is_reached_to_six_digits(name):
    found = trained(CONSTRAINTS, OPTIMIZERS[name])
    for kind, right in RIGHT.items():
        np.testing.assert_allclose(found[kind], right, rtol=0, atol=1e-6, err_msg=kind)


def test_a_euclidean_projection_under_adam_ends_elsewhere():
    found = trained(CONSTRAINTS, OPTIMIZERS["Adam"], metric="euclidean")
    far = {kind: np.abs(found[kind] - right).max() for kind, right in RIGHT.items()}
    assert max(far["nonnegative"], far["box"]) < 1e-3
    assert min(far[kind] for kind in ("max_norm", "l1_ball", "simplex", "unit_norm")) > 1e-2


# Matrices, and sets without a formula

WANTED = np.random.default_rng(0).normal(size=(4, 4)) * 1.5
STIFF = np.random.default_rng(1).uniform(0.5, 2.5, size=(4, 4))


class HalfSpace(rs.Constraint, register=False):
    """Σ x ≤ 1, as a user writes it: its projection, and that it is convex."""

    convex = True

    def project(self, w):
        return w - (w.sum() - 1).clamp_min(0) / w.numel()


def with_values(x, change):
    u, s, v = np.linalg.svd(x)
    return u * change(s) @ v


MATRICES = {
    "spectral": (rs.SpectralBall(1.0), lambda x: with_values(x, lambda s: np.minimum(s, 1))),
    "nuclear": (rs.NuclearBall(2.0), lambda x: with_values(x, lambda s: 2 * onto_l1_ball(s / 2))),
    "symmetric": (rs.Symmetric(), lambda x: (x + x.T) / 2),
    "user's": (HalfSpace(), lambda x: x - max(x.sum() - 1, 0) / x.size),
}


def matrix(constraint, make, **options):
    """Train ½ Σ stiff (w - wanted)² under a constraint; return the weight and the gradient there."""
    layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    optimizer = make(layer.parameters())
    rs.attach(layer, constraint.on("weight", **options), optimizer)
    stiff, wanted = torch.tensor(STIFF), torch.tensor(WANTED)
    settled(optimizer, lambda: (stiff * (layer.weight - wanted).square()).sum().div(2), 300, 300)
    weight = layer.weight.detach()
    return weight, stiff * (weight - wanted)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["SGD", "Adam", pytest.param("Adagrad", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_minimiser_over_each_set_of_matrices_is_reached(kind, name):
    constraint, project = MATRICES[kind]
    right = project(np.zeros((4, 4)))
    for _ in range(5000):
        right = project(right - 0.4 * STIFF * (right - WANTED))
    np.testing.assert_allclose(matrix(constraint, OPTIMIZERS[name])[0], right, rtol=0, atol=1e-5)


NOT_CONVEX = [
    rs.Orthogonal(),
    rs.LowRank(2),
    rs.TopK(5),
    rs.TopGroups(2, "row"),
    rs.NM(2, 4),
    rs.UnitNorm("row"),
    rs.Signs([1, -1, 1, 0]),
]


@pytest.mark.parametrize("constraint", NOT_CONVEX, ids=repr)
def test_other_sets_end_where_no_direction_within_them_descends(constraint):
    weight, gradient = matrix(constraint, OPTIMIZERS["Adam"])
    torch.testing.assert_close(constraint.project(weight), weight, rtol=0, atol=1e-12)
    left = constraint.tangent(weight, -gradient).norm() / gradient.norm()
    assert left < 1e-5


# The projections themselves

STEPS = torch.tensor(10 ** np.random.default_rng(5).uniform(-2, 0, size=(3, 5)))
POINTS = torch.tensor(np.random.default_rng(6).normal(size=(3, 5)) * 2)


@pytest.mark.parametrize(
    "constraint",
    [rs.MaxNorm(1.0, per="row"), rs.L1Ball(1.0, per="row"), rs.Simplex(1.0, per="row"), rs.NuclearBall(1.0)],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_point_of_a_convex_set_is_nearer_in_the_metric(constraint, dtype):
    """That is so if and only if Σ (x - z) (y - z) / t ≤ 0 for every y of the set."""
    x, t = POINTS.to(dtype), STEPS.to(dtype)
    z = constraint.project_by(x, t)
    torch.testing.assert_close(constraint.project(z), z)
    draws = torch.Generator().manual_seed(0)
    for scale in (1e-2, 0.1, 1.0):
        for _ in range(200):
            y = constraint.project(z + scale * torch.randn(3, 5, dtype=dtype, generator=draws))
            assert ((x - z) * (y - z) / t).sum() < 1e-5 * (x.square() / t).sum() * (1 if dtype.itemsize < 8 else 1e-5)


@pytest.mark.parametrize("kind", ["max_norm", "l1_ball", "simplex", "unit_norm", "min_max_norm"])
def test_equal_steps_give_the_euclidean_projection(kind):
    constraint, x = CONSTRAINTS[kind], POINTS[0]
    torch.testing.assert_close(constraint.project_by(x, torch.full_like(x, 0.01)), constraint.project(x))
    torch.testing.assert_close(constraint.project_by(x, 0.01), constraint.project(x), rtol=0, atol=0)


def test_vectors_that_are_too_short_are_lengthened_in_the_metric():
    x, t = POINTS[0] / POINTS[0].norm() / 2, STEPS[0]
    z = rs.MinMaxNorm(1.0, 2.0, per=None).project_by(x, t)
    assert z.norm() == pytest.approx(1)
    ratios = (x / z - 1) / t  # z = x / (1 + λ t)
    torch.testing.assert_close(ratios, ratios[:1].expand(5))
    assert (1 + ratios[0] * t > 0).all()


def test_steps_over_many_decades_and_of_zero_are_taken():
    t = 10 ** torch.linspace(-20, 0, 15, dtype=torch.float64).reshape(3, 5)
    t[0, 0] = 0
    for constraint in CONSTRAINTS.values():
        z = constraint.project_by(POINTS, t)
        torch.testing.assert_close(constraint.project(z), z, rtol=0, atol=1e-9)
        zero = constraint.project_by(POINTS, torch.zeros_like(t))
        torch.testing.assert_close(zero, constraint.project(POINTS))


def test_groups_of_zeros_and_groups_by_list():
    x, per = POINTS.clone(), (0, [[0, 1], [2]])
    x[2] = 0
    z = rs.MaxNorm(0.5, per=per).project_by(x, STEPS)
    assert z[:2].norm() == pytest.approx(0.5)
    assert not z[2].any()
    unit = rs.UnitNorm(per="row").project_by(x, STEPS)
    torch.testing.assert_close(unit[2], torch.full((5,), 5**-0.5, dtype=torch.float64))


# With the rest


def test_a_ridge_and_a_ball_on_one_tensor_have_the_minimiser_of_both():
    """c Σ p² adds 2 c to the curvature; the prox of L1 and the projection on a ball join, too."""
    plans = {
        "ridge": [0.2 * rs.L2().on("max_norm", how="proximal"), CONSTRAINTS["max_norm"].on("max_norm")],
        "lasso": [0.2 * rs.L1().on("max_norm", how="proximal"), CONSTRAINTS["max_norm"].on("max_norm")],
    }
    for kind, plan in plans.items():
        model = Vectors(["max_norm"])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        rs.attach(model, plan, optimizer)
        settled(optimizer, model.loss, 300, 200)
        right, rate = np.zeros(SIZE), 0.2
        for _ in range(5000):
            right = right - rate * CURVE @ (right - AIM)
            if kind == "ridge":
                right = right / (1 + 2 * 0.2 * rate)
            else:
                right = np.sign(right) * np.maximum(np.abs(right) - 0.2 * rate, 0)
            right = SETS["max_norm"][1](right)
        np.testing.assert_allclose(model.max_norm.detach().numpy(), right, rtol=0, atol=1e-6, err_msg=kind)


def test_two_convex_sets_are_held_in_the_metric_together():
    model = Vectors(["p"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    rs.attach(model, [rs.NonNegative().on("p"), rs.MaxNorm(0.8, per=None).on("p")], optimizer)
    settled(optimizer, model.loss, 300, 200)
    right = convex_minimiser(lambda x: SETS["max_norm"][1](np.maximum(x, 0)))
    np.testing.assert_allclose(model.p.detach().numpy(), right, rtol=0, atol=1e-6)


class Disguised(torch.optim.Adam):
    """Adam with a step of its own, whose metric is measured."""

    def step(self, closure=None):
        return torch.optim.Adam.step(self, closure)


def test_steps_of_other_optimizers_are_measured():
    model = Vectors(["p"])
    optimizer = Disguised(model.parameters(), lr=0.05)
    reg = rs.attach(model, rs.MaxNorm(0.8, per=None).on("p"), optimizer)
    assert "the steps of Disguised are measured" in reg.table()
    settled(optimizer, model.loss, 500, 300)
    np.testing.assert_allclose(model.p.detach().numpy(), RIGHT["max_norm"], rtol=0, atol=1e-3)


def test_a_gradient_in_the_tangent_is_an_option_of_its_own():
    p = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        p.weight.copy_(torch.tensor([[0.6, 0.8, 0.0]]))
    optimizer = torch.optim.SGD(p.parameters(), lr=0.1)
    rs.attach(p, rs.UnitNorm().on("weight", gradient="tangent"), optimizer)
    p.weight.grad = torch.tensor([[1.0, 2.0, 3.0]])
    optimizer.step()
    along = 0.6 + 1.6
    torch.testing.assert_close(p.weight.grad, torch.tensor([[1 - 0.6 * along, 2 - 0.8 * along, 3.0]]))
    assert p.weight.detach().norm() == pytest.approx(1)


def test_the_options_stand_in_plans_and_are_refused_where_they_mean_nothing(tmp_path):
    rule = rs.UnitNorm().on("weight", metric="euclidean", gradient="tangent")
    rs.Plan([rule]).save(tmp_path / "plan.yaml")
    assert rs.Plan.load(tmp_path / "plan.yaml").rules == (rule,)
    with pytest.raises(PlanError, match="metric= is 'optimizer' or 'euclidean'"):
        rs.UnitNorm().on("weight", metric="adam")
    with pytest.raises(PlanError, match="by how='loss'"):
        rs.L2().on("weight", metric="euclidean")
    with pytest.raises(PlanError, match="gradient='tangent' goes with"):
        rs.Simplex().on("weight", gradient="tangent")
    with pytest.raises(TransformError, match=r"TopK.*no formula for its projection with a step for each entry"):
        rs.TopK(2).project_by(POINTS, STEPS)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_gradient_under_a_tangent_is_refused_with_the_way_out():
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.Adagrad(layer.parameters(), lr=0.1)
    with rs.attach(layer, rs.UnitNorm("row").on("weight"), optimizer):
        layer(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(HowError, match="metric='euclidean'"):
            optimizer.step()
    with rs.attach(layer, rs.MaxNorm(0.5, per="row").on("weight"), optimizer):
        optimizer.step()
    assert (layer.weight.norm(dim=1) <= 0.5 + 1e-6).all()
