"""Whole numbers and steps that are none (A15), and numbers at the edges of float32 (B)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from faults.helpers import right_or_refused, sgd
from restrain.errors import RestrainError

# A15: integer and bool tensors

PENALTIES = {
    "L1": rs.L1(),
    "L2": rs.L2(),
    "Huber": rs.Huber(1.0),
    "GroupLasso": rs.GroupLasso("row"),
    "Norm": rs.Norm(2),
    "ElasticNet": rs.ElasticNet(1.0, 1.0),
    "SparseGroupLasso": rs.SparseGroupLasso(0.5, 0.5, per="row"),
    "MCP": rs.MCP(3.0),
    "SLOPE": rs.SLOPE(q=0.1),
    "FusedLasso": rs.FusedLasso(0.5, 0.5),
    "NuclearNorm": rs.NuclearNorm(),
    "scaled L1": 0.5 * rs.L1(),
}
WHOLE = {
    "int64": torch.tensor([[3, -4, 1], [0, 2, -5]]),
    "int32": torch.tensor([[3, -4, 1], [0, 2, -5]], dtype=torch.int32),
    "bool": torch.tensor([[True, False, True], [False, False, True]]),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", PENALTIES)
def test_the_prox_of_whole_numbers_is_that_of_the_same_floats_or_refused(name, kind):
    x = WHOLE[kind]
    right = PENALTIES[name].prox(x.double(), 0.3)
    right_or_refused(lambda: PENALTIES[name].prox(x, 0.3).double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", PENALTIES)
def test_the_gradient_at_whole_numbers_is_that_at_the_same_floats_or_refused(name, kind):
    x = WHOLE[kind]
    right = PENALTIES[name].gradient(x.double())
    right_or_refused(lambda: PENALTIES[name].gradient(x).double(), right, rtol=1e-5, atol=1e-6)


def test_the_soft_threshold_of_whole_numbers():
    right_or_refused(lambda: rs.L1().prox(torch.tensor([3, -4, 1]), 0.5), torch.tensor([2.5, -3.5, 0.5]))


BAD_STEPS = {
    "negative": torch.tensor(-0.5),
    "NaN": torch.tensor(math.nan),
    "infinite": torch.tensor(math.inf),
    "complex": torch.tensor(0.5 + 0.5j),
    "one of several negative": torch.tensor([0.5, -0.5, 0.5]),
    "one of several NaN": torch.tensor([0.5, math.nan, 0.5]),
}


@pytest.mark.parametrize("kind", BAD_STEPS)
@pytest.mark.parametrize("penalty", [rs.L1(), rs.L2(), rs.Huber(1.0), rs.MCP(3.0)], ids=repr)
def test_a_step_that_is_no_length_is_refused(penalty, kind):
    with pytest.raises(RestrainError, match="step"):
        penalty.prox(torch.tensor([1.0, -2.0, 3.0]), BAD_STEPS[kind])


@pytest.mark.parametrize("step", [-0.5, math.nan, math.inf, 0.5 + 0.5j])
def test_a_number_that_is_no_length_is_refused_as_a_step(step):
    with pytest.raises((RestrainError, TypeError)):
        rs.L1().prox(torch.tensor([1.0]), step)


# B: rows whose squares vanish or overflow in float32

ROW = np.array([3.0, -4.0, 12.0]) / 13
EXPONENTS = (-44, -40, -38, -30, -25, -22, -19, -10, 0, 10, 18, 19, 20, 25, 30, 37)


def row(exponent):
    """Return a row of about that length in float32, and the same numbers in float64."""
    x = torch.tensor((ROW * 10.0**exponent)[None], dtype=torch.float32)
    return x, x.double().numpy()


def shrunk(x, threshold):
    length = np.sqrt(np.square(x.astype(np.longdouble)).sum())
    return (x * max(0, 1 - threshold / length)).astype(float) if length else x


def close(found, right):
    """Compare to a relative error of float32, and to its smallest number."""
    np.testing.assert_allclose(found.double().numpy(), np.asarray(right, float), rtol=2e-6, atol=3e-45)


GROUPS = {
    "GroupLasso": (lambda: rs.GroupLasso("row"), math.sqrt(3), 0.0),
    "Norm": (lambda: rs.Norm(2), 1.0, 0.0),
    "SparseGroupLasso": (lambda: rs.SparseGroupLasso(0.25, 0.5, per="row"), 0.5 * math.sqrt(3), 0.25),
}


@pytest.mark.parametrize("part", [0.0, 1e-3, 0.3, 0.9])
@pytest.mark.parametrize("name", GROUPS)
def test_a_row_of_any_size_is_shrunk_by_its_length(name, part):
    make, group, single = GROUPS[name]
    for exponent in EXPONENTS:
        x, wide = row(exponent)
        step = part * 10.0**exponent / 2
        if step > 3e38 or (0 < step < 1e-37):
            continue
        step = float(np.float32(step))
        soft = np.sign(wide) * np.maximum(np.abs(wide) - single * step, 0)
        close(make().prox(x, step), shrunk(soft, group * step))


@pytest.mark.parametrize("name", GROUPS)
def test_the_value_of_a_row_of_any_size(name):
    make, group, single = GROUPS[name]
    for exponent in EXPONENTS:
        x, wide = row(exponent)
        length = float(np.sqrt(np.square(wide.astype(np.longdouble)).sum()))
        right = group * length + single * np.abs(wide).sum()
        if right < 3e38:
            np.testing.assert_allclose(make()(x).double().item(), right, rtol=2e-6, atol=1e-44)


@pytest.mark.parametrize("name", GROUPS)
def test_the_gradient_at_a_row_of_any_size(name):
    make, group, single = GROUPS[name]
    for exponent in EXPONENTS[2:]:
        x, wide = row(exponent)
        length = float(np.sqrt(np.square(wide.astype(np.longdouble)).sum()))
        right = group * wide / length + single * np.sign(wide)
        np.testing.assert_allclose(make().gradient(x).double().numpy(), right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["GroupLasso", "SparseGroupLasso"])
def test_the_compiled_and_the_plain_step_on_rows_of_any_size(name):
    """The gradient is zero, so that a step is a prox whose step is the learning rate times the strength."""
    weights = torch.cat([row(exponent)[0] for exponent in (-30, -22, -19, 0, 19, 20, 25)])
    penalty = rs.GroupLasso("out") if name == "GroupLasso" else rs.SparseGroupLasso(0.25, 0.5, per="out")
    group, single = GROUPS[name][1:]
    wide = weights.double().numpy()
    soft = np.sign(wide) * np.maximum(np.abs(wide) - single * 1e-31, 0)
    right = np.concatenate([shrunk(one[None], group * 1e-31) for one in soft])
    for compile in (True, False):
        model = nn.Linear(3, len(weights), bias=False)
        with torch.no_grad():
            model.weight.copy_(weights)
        optimizer = sgd(model, lr=1e-30)
        rs.attach(model, 0.1 * penalty.on("weight", how="proximal"), optimizer, compile=compile)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        np.testing.assert_allclose(model.weight.detach().double().numpy(), right, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("constraint", [rs.MaxNorm(1e-30, per="row"), rs.UnitNorm("row")], ids=repr)
def test_a_row_of_any_size_is_scaled_to_a_length(constraint):
    for exponent in EXPONENTS[1:]:
        x, wide = row(exponent)
        length = float(np.sqrt(np.square(wide.astype(np.longdouble)).sum()))
        wanted = 1.0 if isinstance(constraint, rs.UnitNorm) else min(length, 1e-30)
        np.testing.assert_allclose(constraint.project(x).double().numpy(), wide * (wanted / length), rtol=1e-4)


# B: steps and entries at the edges


POWERS = [(p, x) for p in (0.01, 0.1, 0.5, 0.9) for x in (1e-45, 1e-42, -1e-40, 1e-38, 0.0, 1.0, 3e38)]


@pytest.mark.parametrize(("p", "x"), POWERS)
def test_a_step_of_zero_changes_nothing(p, x):
    given = torch.tensor([x])
    assert rs.Lp(p).prox(given, 0.0).equal(given)


def of_mcp(x, t, knee=3.0):
    """Return the prox for t ≥ knee: what is kept whole is worth more than t times the height."""
    return x if x > knee and x * x / 2 > t * knee / 2 else 0.0


def of_scad(x, t, start=1.0, knee=3.0):
    return x if x > knee and x * x / 2 > t * (start + knee) / 2 else 0.0


def of_log_sum(x, t, epsilon=0.5):
    inside = (x + epsilon) ** 2 - 4 * t
    if inside < 0:
        return 0.0
    z = ((x - epsilon) + math.sqrt(inside)) / 2
    return z if z > 0 and (z - x) ** 2 / 2 + t * math.log1p(z / epsilon) < x * x / 2 else 0.0


def of_lp(x, t, p=0.5):
    z = x
    for _ in range(200):
        z = x - t * p * z ** (p - 1) if z > 0 else 0.0
    return z if z > 0 and (z - x) ** 2 / 2 + t * z**p < x * x / 2 else 0.0


THRESHOLDS = {
    "MCP": (rs.MCP(3.0), of_mcp),
    "SCAD": (rs.SCAD(1.0, 3.0), of_scad),
    "LogSum": (rs.LogSum(0.5), of_log_sum),
    "Lp": (rs.Lp(0.5), of_lp),
}


@pytest.mark.parametrize("step", [10.0, 1e10, 1e30, 3e38])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_large_step_leaves_what_is_worth_more(name, step):
    penalty, reference = THRESHOLDS[name]
    for x in (0.1, 2.0, 1e3, 1e9, 1e16, 1e18, 1e21, 1e25, 1e30, 3e38):
        right = reference(float(np.float32(x)), float(np.float32(step)))
        found = penalty.prox(torch.tensor([x, -x]), step).double().numpy()
        np.testing.assert_allclose(found, [right, -right], rtol=1e-5, atol=1e-6, err_msg=f"x = {x}")


@pytest.mark.parametrize("step", [1.0, 1e20, 1e38, 3e38])
def test_a_soft_box_of_any_strength(step):
    x = torch.tensor([-1e30, -5.0, -1.0, 0.25, 1.0, 5.0, 1e30])
    wide = x.double().numpy()
    box = np.clip(wide, -1, 1)
    right = box + (wide - box) / (1 + 2 * step)
    np.testing.assert_allclose(rs.SoftBox(-1.0, 1.0).prox(x, step).double().numpy(), right, rtol=1e-6, atol=1e-6)


ACTS = {
    "L2": lambda x: rs.L2().prox(x, 0.5),
    "L1": lambda x: rs.L1().prox(x, 0.5),
    "GroupLasso": lambda x: rs.GroupLasso("row").prox(x, 0.1),
    "MaxNorm": lambda x: rs.MaxNorm(1.0).project(x),
    "MaxNorm inside": lambda x: rs.MaxNorm(9.0).project(x),
    "NonNegative": lambda x: rs.NonNegative().project(x),
}


@pytest.mark.parametrize("name", ACTS)
def test_no_zero_is_negative(name):
    found = ACTS[name](torch.tensor([[-0.0, 0.0, 2.0], [-1e-45, -0.0, -3.0]]))
    assert not ((found == 0) & found.signbit()).any()


@pytest.mark.parametrize("penalty", [rs.Norm(1), rs.Norm(2), rs.Norm(math.inf), rs.GroupLInf("row")], ids=repr)
def test_the_prox_beside_a_nan_is_not_finite_and_wrong(penalty):
    found = penalty.prox(torch.tensor([[math.nan, 3.0, 1.0]]), 0.5)
    alone = rs.L1().prox(torch.tensor([[3.0, 1.0]]), 0.5) if penalty == rs.Norm(1) else torch.full((1, 2), math.nan)
    torch.testing.assert_close(found[:, 1:], alone, equal_nan=True)
    assert found[0, 0].isnan()


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4, math.inf])
def test_the_norm_of_something_infinite_is_infinite(p):
    assert rs.Norm(p)(torch.tensor([1.0, -math.inf])).item() == math.inf
    assert math.isnan(rs.Norm(p)(torch.tensor([1.0, math.nan])).item())


def test_a_weighted_l1_and_a_group_lasso_have_the_prox_of_their_sum():
    """The weighted soft threshold, followed by the group's shrinking, is exact (Yu, 2013)."""
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 1.0]])
    x = torch.tensor([[3.0, -1.0, 2.5], [0.4, 2.0, -4.0]])
    penalty = 0.5 * rs.Weighted(rs.L1(), weights) + 0.3 * rs.GroupLasso("row")
    soft = np.sign(x.numpy()) * np.maximum(np.abs(x.numpy()) - 0.7 * 0.5 * weights.numpy(), 0)
    right = np.stack([shrunk(one, 0.7 * 0.3 * math.sqrt(3)) for one in soft])
    np.testing.assert_allclose(penalty.prox(x, 0.7).numpy(), right, rtol=1e-6)

    def objective(z):
        return np.square(z - x.numpy()).sum() / 2 + 0.7 * penalty(torch.tensor(z, dtype=torch.float32)).item()

    draws = np.random.default_rng(0)
    around = [objective(right + 0.05 * draws.normal(size=right.shape)) for _ in range(200)]
    assert objective(right) < min(around)
