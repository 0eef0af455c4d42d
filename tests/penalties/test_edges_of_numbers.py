"""Values, gradients and proxes at zero, at the smallest and greatest numbers, infinity and NaN, in each dtype.

The references are computed with 60 digits, at the numbers that the dtype makes of the grid. Proxes are found among all
stationary points and kinks, by the objective, without a threshold.
"""

import itertools
import math

import pytest
import torch
from mpmath import mp, mpf, sign, sqrt
from torch import nn

import restrain as rs
from restrain.errors import PenaltyError

DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-13}
SIZES = ("smallest", 1e-30, 1.0, 1e19, 1e30)
STEPS = (0.0, "smallest", 1e-30, 0.3, 1.0, 1e19, 1e30)


@pytest.fixture(autouse=True)
def sixty_digits():
    with mp.workdps(60):
        yield


def number(given, dtype):
    """Return the number as the dtype holds it."""
    if given == "smallest":
        given = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.tensor(given, dtype=dtype).item()


def step_in(given, dtype):
    """Return a step as it is held beside a tensor: in float32 or wider."""
    return number(given, torch.promote_types(dtype, torch.float32))


def sizes(dtype):
    """Return the sizes that are numbers above zero in the dtype."""
    return [x for x in dict.fromkeys(number(size, dtype) for size in SIZES) if 0 < x < math.inf]


def agree(found, right, dtype, said, scale=None):
    """Compare with 60 digits, relative to the entry; a right number beyond the dtype must come as infinite."""
    info = torch.finfo(dtype)
    for came, wanted in zip(found.double().tolist(), right, strict=True):
        if abs(wanted) > mpf(info.max):
            assert came == (math.inf if wanted > 0 else -math.inf) or abs(came) >= 0.99 * info.max, (said, came, wanted)
            continue
        allowed = DTYPES[dtype] * abs(wanted if scale is None else scale) + 4 * info.smallest_normal * info.eps
        assert abs(mpf(came) - wanted) <= allowed, (said, came, mp.nstr(wanted, 12))


# Entries: f(|x|), the slope of f, and the points where the objective ½(z - x)² + t f(z) may be least, for x > 0


def roots(a, b, c):
    """Return the real roots of a z² + b z + c, without cancellation."""
    inside = b * b - 4 * a * c
    if inside < 0 or a == 0:
        return [-c / b] if a == 0 and b else []
    q = -(b + sign(b or 1) * sqrt(inside)) / 2
    return [q / a, *([c / q] if q else [])]


def root_of_lp(x, t, p=0.5):
    """Return the greater root of z + t p z^(p - 1) = x, by bisection from where the left is least."""
    least = (t * p * (1 - p)) ** (1 / (2 - p))
    if least + (t * p * least ** (p - 1) if least else 0) > x:
        return []
    low, high = least, x
    for _ in range(220):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + t * p * middle ** (p - 1) < x else (low, middle)
    return [high]


def of_scad(z, start=1, knee=3):
    middle = (2 * knee * z - z * z - start**2) / mpf(2 * (knee - start))
    return z if z <= start else middle if z <= knee else mpf(start + knee) / 2


HALF = mpf(1) / 2
ENTRIES = {
    "L1": (rs.L1(), lambda z: z, lambda x: mpf(1), lambda x, t: [x - t]),
    "L2": (rs.L2(), lambda z: z * z, lambda x: 2 * x, lambda x, t: [x / (1 + 2 * t)]),
    "ElasticNet": (
        rs.ElasticNet(1.0, 2.0),
        lambda z: z + 2 * z * z,
        lambda x: 1 + 4 * x,
        lambda x, t: [(x - t) / (1 + 4 * t)],
    ),
    "Huber": (
        rs.Huber(1.0),
        lambda z: z * z / 2 if z <= 1 else z - HALF,
        lambda x: min(x, mpf(1)),
        lambda x, t: [x / (1 + t), x - t],
    ),
    "LogSum": (
        rs.LogSum(0.5),
        lambda z: mp.log1p(2 * z),
        lambda x: 1 / (HALF + x),
        lambda x, t: roots(mpf(1), HALF - x, t - x * HALF),
    ),
    "MCP": (
        rs.MCP(3.0),
        lambda z: z - z * z / 6 if z <= 3 else mpf(3) / 2,
        lambda x: max(1 - x / 3, mpf(0)),
        lambda x, t: [x, *([(x - t) / (1 - t / 3)] if t != 3 else [])],
    ),
    "SCAD": (
        rs.SCAD(1.0, 3.0),
        of_scad,
        lambda x: min(max((3 - x) / 2, mpf(0)), mpf(1)),
        lambda x, t: [x, x - t, mpf(1), *([(2 * x - 3 * t) / (2 - t)] if t != 2 else [])],
    ),
    "Lp": (rs.Lp(0.5), lambda z: sqrt(z), lambda x: 1 / (2 * sqrt(x)), root_of_lp),
    "SoftBox": (
        rs.SoftBox(-1.0, 1.0),
        lambda z: max(z - 1, mpf(0)) ** 2,
        lambda x: 2 * max(x - 1, mpf(0)),
        lambda x, t: [x, (x + 2 * t) / (1 + 2 * t)],
    ),
    "Weighted": (rs.Weighted(rs.L1(), 2.0), lambda z: 2 * z, lambda x: mpf(2), lambda x, t: [x - 2 * t]),
    "Distance": (rs.Distance(rs.L1(), to=0.0), lambda z: z, lambda x: mpf(1), lambda x, t: [x - t]),
    "scaled": (0.5 * rs.L2() + rs.L1(), lambda z: z + z * z / 2, lambda x: 1 + x, lambda x, t: [(x - t) / (1 + t)]),
}


def nearest(name, x, t):
    """Return argmin_z ½(z - x)² + t f(z) for x ≥ 0: the least of the candidates from zero to x."""
    _, f, _, candidates = ENTRIES[name]
    x, t = mpf(x), mpf(t)
    points = [z for z in (mpf(0), x, *candidates(x, t)) if 0 <= z <= x]
    return min(points, key=lambda z: (z - x) ** 2 / 2 + t * f(z))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_prox_of_an_entry(name, dtype):
    penalty = ENTRIES[name][0]
    for given in STEPS:
        t = step_in(given, dtype)
        for x in sizes(dtype):
            right = nearest(name, x, t)
            both = torch.tensor([x, -x], dtype=dtype)
            steps = (t, torch.full((2,), t, dtype=torch.promote_types(dtype, torch.float32)))
            for step in steps:
                found = penalty.prox(both, step)
                assert found.dtype == dtype
                agree(found, [right, -right], dtype, f"{penalty} at {x}, step {step}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_prox_of_entries_without_an_end(name, dtype):
    penalty = ENTRIES[name][0]
    for given in STEPS:
        found = penalty.prox(
            torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype), step_in(given, dtype)
        )
        assert found[:2].tolist() == [0, 0]
        assert not found[:2].signbit().any()
        assert found[2:4].tolist() == [math.inf, -math.inf]
        assert found[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_value_and_gradient_of_an_entry(name, dtype):
    penalty, f, slope, _ = ENTRIES[name]
    wide = torch.promote_types(dtype, torch.float32)
    for x in sizes(dtype):
        both = torch.tensor([x, -x], dtype=dtype)
        gradient = penalty.gradient(both)
        assert gradient.dtype == dtype
        agree(gradient, [slope(mpf(x)), -slope(mpf(x))], dtype, f"gradient of {penalty} at {x}")
        leaf = both[:1].clone().requires_grad_()
        value = penalty(leaf)
        agree(value.detach()[None], [f(mpf(x))], wide, f"{penalty} at {x}")
        agree(torch.autograd.grad(value, leaf)[0], [slope(mpf(x))], dtype, f"autograd of {penalty} at {x}")
    assert penalty.gradient(torch.zeros(2, dtype=dtype)).tolist() == [0, 0]


# Rows (v, -v/2, v/4)


def objective(z, x, t, value):
    return sum((a - b) ** 2 for a, b in zip(z, x, strict=True)) / 2 + t * value(z)


def soft(x, t):
    return [sign(a) * max(abs(a) - t, mpf(0)) for a in x]


def shortened(x, t):
    length = sqrt(sum(a * a for a in x))
    return [a * max(1 - t / length, mpf(0)) if length else a for a in x]


def cut(x, t):
    """Return x cut at the level that takes t off in all: the best of the levels for each number of cut entries."""
    ordered = sorted(map(abs, x), reverse=True)
    levels = [max((sum(ordered[: k + 1]) - t) / (k + 1), mpf(0)) for k in range(len(x))]
    tried = [[sign(a) * min(abs(a), level) for a in x] for level in levels]
    return min(tried, key=lambda z: objective(z, x, t, lambda z: max(map(abs, z))))


def shared(x, t):
    """Return the soft threshold at 2 t s, s the sum of what is left: the best for each number of entries left."""
    ordered = sorted(map(abs, x), reverse=True)
    sums = [sum(ordered[: k + 1]) / (1 + 2 * t * (k + 1)) for k in range(len(x))]
    return min((soft(x, 2 * t * s) for s in sums), key=lambda z: objective(z, x, t, lambda z: sum(map(abs, z)) ** 2))


def joined(x, t, pulls, value):
    """Return the best sequence of means of neighbours, each pulled by what its ends' differences or weights say."""
    tried = []
    for parts in ([[0], [1], [2]], [[0, 1], [2]], [[0], [1, 2]], [[0, 1, 2]]):
        for pull in pulls(parts):
            means = [(sum(x[i] for i in part) - t * own) / len(part) for part, own in zip(parts, pull, strict=True)]
            tried.append([mean for mean, part in zip(means, parts, strict=True) for _ in part])
    return min(tried, key=lambda z: objective(z, x, t, value))


def varied(x, t):
    def pulls(parts):
        for signs in itertools.product((-1, 1), repeat=len(parts) - 1):
            ends = (0, *signs, 0)
            yield [ends[k] - ends[k + 1] for k in range(len(parts))]

    return joined(x, t, pulls, lambda z: sum(abs(b - a) for a, b in itertools.pairwise(z)))


WEIGHTS = (2.0, 1.0, 0.5)


def sorted_l1(x, t):
    """Return the prox for entries that are sorted by size already: means of blocks, zero where negative."""
    sizes = list(map(abs, x))
    value = lambda z: sum(w * a for w, a in zip(WEIGHTS, sorted(map(abs, z), reverse=True), strict=True))  # noqa: E731
    tried = []
    for parts in ([[0], [1], [2]], [[0, 1], [2]], [[0], [1, 2]], [[0, 1, 2]]):
        means = [max(sum(sizes[i] - t * mpf(WEIGHTS[i]) for i in part) / len(part), mpf(0)) for part in parts]
        tried.append([mean for mean, part in zip(means, parts, strict=True) for _ in part])
    best = min(tried, key=lambda z: objective(z, sizes, t, value))
    return [sign(a) * z for a, z in zip(x, best, strict=True)]


ROOT3 = sqrt(mpf(3))
ROWS = {
    "Norm 1": (rs.Norm(1), soft),
    "Norm 2": (rs.Norm(2), shortened),
    "Norm inf": (rs.Norm(math.inf), cut),
    "GroupLasso": (rs.GroupLasso("row"), lambda x, t: shortened(x, t * ROOT3)),
    "SparseGroupLasso": (
        rs.SparseGroupLasso(0.25, 0.5, per="row"),
        lambda x, t: shortened(soft(x, t / 4), t * ROOT3 / 2),
    ),
    "Weighted + GroupLasso": (
        rs.Weighted(rs.L1(), 0.25) + 0.5 * rs.GroupLasso("row"),
        lambda x, t: shortened(soft(x, t / 4), t * ROOT3 / 2),
    ),
    "GroupLInf": (rs.GroupLInf("row"), cut),
    "ExclusiveLasso": (rs.ExclusiveLasso("row"), shared),
    "TotalVariation": (rs.TotalVariation(), varied),
    "FusedLasso": (rs.FusedLasso(0.25, 0.5), lambda x, t: soft(varied(x, t / 2), t / 4)),
    "SLOPE": (rs.SLOPE(weights=WEIGHTS), sorted_l1),
}


def row(v, dtype):
    return torch.tensor([[v, -v / 2, v / 4]], dtype=dtype) + 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_the_prox_of_a_row(name, dtype):
    penalty, reference = ROWS[name]
    for given in STEPS:
        t = step_in(given, dtype)
        for v in sizes(dtype):
            x = row(v, dtype)
            wide = [mpf(a) for a in x[0].tolist()]
            right = reference(wide, mpf(t))
            steps = [t, torch.full(x.shape, t, dtype=torch.promote_types(dtype, torch.float32))]
            for step in steps[: 1 + penalty.groupwise]:
                found = penalty.prox(x, step)
                assert found.dtype == dtype
                # of numbers that compete, the difference is known to the precision of the numbers
                scale = max(map(abs, wide if name == "ExclusiveLasso" else right))
                agree(found[0], right, dtype, f"{penalty} at {v}, step {step}", scale=scale)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_with_an_entry_without_an_end_has_no_finite_and_wrong_one(name, dtype, bad):
    """Beside NaN all entries of a group are NaN; beside infinity they are NaN, or the limit for a growing entry."""
    penalty, reference = ROWS[name]
    by_entry = name == "Norm 1"
    for given in STEPS:
        t = step_in(given, dtype)
        x = torch.tensor([[bad, -0.5, 0.25]], dtype=dtype)
        found = penalty.prox(x, t)[0].double()
        if math.isnan(bad):
            assert found[0].isnan()
            assert by_entry or t < 1e-300 or found.isnan().all(), (penalty, t, found)
            continue
        limit = reference([mpf(sign(bad)) * mpf(10) ** 400, *map(mpf, x[0, 1:].tolist())], mpf(t))
        assert found[0].isnan() or found[0] == bad
        for came, wanted in zip(found[1:].tolist(), limit[1:], strict=True):
            if not math.isnan(came):
                agree(torch.tensor([came], dtype=torch.float64), [wanted], dtype, f"{penalty} beside {bad}, step {t}")


def lengths(penalty):
    """Return the value and the gradient of a row, for penalties of lengths."""
    length = lambda x: sqrt(sum(a * a for a in x))  # noqa: E731
    l1, of_length = {"Norm 2": (0, 1), "GroupLasso": (0, ROOT3), "SparseGroupLasso": (0.25, ROOT3 / 2)}[penalty]
    value = lambda x: of_length * length(x) + l1 * sum(map(abs, x))  # noqa: E731
    return value, lambda x: [of_length * a / length(x) + l1 * sign(a) for a in x]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Norm 2", "GroupLasso", "SparseGroupLasso"])
def test_the_value_and_gradient_of_a_row(name, dtype):
    penalty, (value, gradient) = ROWS[name][0], lengths(name)
    wide = torch.promote_types(dtype, torch.float32)
    for v in sizes(dtype):
        x = row(v, dtype)
        exact = [mpf(a) for a in x[0].tolist()]
        agree(penalty(x)[None], [value(exact)], wide, f"{penalty} at {v}")
        agree(penalty.gradient(x)[0], gradient(exact), dtype, f"gradient of {penalty} at {v}")


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_norms_of_any_size(p):
    for v in sizes(torch.float32):
        x = row(v, torch.float32)
        wide = [abs(mpf(a)) for a in x[0].tolist()]
        right = max(wide) if p == math.inf else sum(a ** mpf(p) for a in wide) ** (1 / mpf(p))
        agree(rs.Norm(p)(x)[None], [right], torch.float32, f"Norm({p}) at {v}")
    assert rs.Norm(p)(torch.tensor([1.0, -math.inf])).item() == math.inf
    assert rs.Norm(p)(torch.tensor([1.0, math.nan])).isnan()


@pytest.mark.parametrize("penalty", [rs.NuclearNorm(), rs.SpectralNorm()], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_prox_of_a_matrix(penalty, dtype):
    """Singular values (v, v/2) become those of the prox of L1, or of the greatest."""
    for v, given in itertools.product(sizes(dtype), STEPS):
        x, t = torch.tensor([[v, 0.0], [0.0, -v / 2]], dtype=dtype), step_in(given, dtype)
        first, second = (mpf(x[0, 0].item()), mpf(x[1, 1].item()))
        right = soft([first, second], mpf(t)) if penalty == rs.NuclearNorm() else cut([first, second], mpf(t))
        found = penalty.prox(x, t)
        agree(found.flatten(), [right[0], mpf(0), mpf(0), right[1]], dtype, f"{penalty}, {v}, {t}", scale=max(right))


# At an optimizer's step, by each backend

HALVES = pytest.mark.filterwarnings("ignore:.*small changes by.*:restrain.errors.RestrainWarning")

AT_STEPS = {
    **{name: ENTRIES[name][0] for name in ENTRIES},
    **{
        name: ROWS[name][0]
        for name in ("GroupLasso", "SparseGroupLasso", "Norm 2", "GroupLInf", "Weighted + GroupLasso")
    },
}
FAST = ("L1", "L2", "ElasticNet", "scaled", "Huber", "GroupLasso", "SparseGroupLasso", "Norm 2")


def stepped(penalty, rows, how, step, compile):
    """Return weights and gradient of a layer after a step without a data gradient, of that length times 1."""
    model = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=rows.dtype)
    with torch.no_grad():
        model.weight.copy_(rows)
    optimizer = (torch.optim.SGD if how == "proximal" else torch.optim.Adagrad)(model.parameters(), lr=step)
    with rs.attach(model, penalty.on("weight", how=how), optimizer, compile=compile):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    return model.weight.detach(), model.weight.grad


@HALVES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AT_STEPS)
def test_a_step_is_the_prox_whatever_computes_it(name, dtype):
    penalty = AT_STEPS[name]
    rows = torch.cat([row(v, dtype) for v in sizes(dtype)])
    for given in STEPS[1:]:
        t = step_in(given, torch.float64)
        if t > torch.finfo(dtype).max:  # torch.optim.SGD takes no such learning rate
            continue
        right = torch.cat([penalty.prox(one[None], t) for one in rows]) if name != "Norm 2" else penalty.prox(rows, t)
        for compile in (False, True)[: 1 + (name in FAST)]:
            found, _ = stepped(penalty, rows, "proximal", t, compile)
            tiny = 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            torch.testing.assert_close(found, right, rtol=DTYPES[dtype], atol=tiny)
            assert not ((found == 0) & found.signbit()).any(), (penalty, t, found)


@HALVES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AT_STEPS)
def test_a_gradient_at_a_step_is_the_gradient_whatever_computes_it(name, dtype):
    penalty = AT_STEPS[name]
    rows = torch.cat([row(v, dtype) for v in sizes(dtype)])
    right = penalty.gradient(rows)
    for compile in (False, True)[: 1 + (name in FAST)]:
        _, found = stepped(penalty, rows, "gradient", 1e-30, compile)
        tiny = 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(found, right, rtol=DTYPES[dtype], atol=tiny)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["GroupLasso", "SparseGroupLasso"])
def test_the_loss_of_a_row_whatever_computes_it(name, dtype, compile):
    penalty, (value, gradient) = ROWS[name][0], lengths(name)
    for v in sizes(dtype):
        rows = row(v, dtype)
        model = nn.Linear(3, 1, bias=False, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(rows)
        exact = [mpf(a) for a in rows[0].tolist()]
        with rs.attach(model, penalty.on("weight"), compile=compile) as reg:
            total = reg.penalty()
            total.backward()
        agree(total.detach()[None], [value(exact)], torch.promote_types(dtype, torch.float32), f"{penalty} at {v}")
        agree(model.weight.grad[0], gradient(exact), dtype, f"gradient of {penalty} at {v}")


# What is refused


PROXIMAL = {**{name: entry[0] for name, entry in ENTRIES.items()}, **{name: entry[0] for name, entry in ROWS.items()}}
PROXIMAL |= {"NuclearNorm": rs.NuclearNorm(), "SpectralNorm": rs.SpectralNorm()}
NO_STEPS = [-0.5, math.nan, math.inf, -math.inf, 0.5 + 0.5j, None, "1", 10**400]
NO_TENSORS = [torch.tensor(bad) for bad in NO_STEPS[:5]]


@pytest.mark.parametrize("name", PROXIMAL)
def test_a_step_that_is_no_length_is_refused(name):
    penalty, x = PROXIMAL[name], torch.ones(2, 3)
    for bad in [*NO_STEPS, *NO_TENSORS]:
        with pytest.raises(PenaltyError, match="step="):
            penalty.prox(x, bad)
    steps = torch.ones(2, 3)
    steps[1, 1] = math.nan
    with pytest.raises(PenaltyError, match="step="):
        penalty.prox(x, steps)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", PROXIMAL)
def test_whole_numbers_are_refused(name, dtype):
    x = torch.ones(2, 3).to(dtype)
    penalty = PROXIMAL[name]
    for act in (penalty, penalty.gradient, penalty.prox, lambda x: penalty.prox(x, 0.5)):
        with pytest.raises(PenaltyError, match=r"floating-point .*\.float\(\)"):
            act(x)


def test_what_a_user_wrote_refuses_the_same():
    class Mine(rs.Penalty, register=False):
        def __call__(self, w):
            return w.abs().sum()

        def prox(self, w, step=1.0):
            return w - w.clamp(-step, step)

    with pytest.raises(PenaltyError, match="step="):
        Mine().prox(torch.ones(2), -1.0)
    for act in (Mine(), Mine().gradient, Mine().prox):
        with pytest.raises(PenaltyError, match=r"\.float\(\)"):
            act(torch.tensor([1, 2]))
    assert Mine().prox(torch.tensor([3.0]), 1.0).item() == 2
