"""Rules on units across tensors and on common budgets: against closed forms, brute force and convex minimisers."""

import copy
import pickle
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import (
    DetachedError,
    HowError,
    OptimizerError,
    PenaltyError,
    PlanError,
    SelectionError,
)

OUT = {"0.weight": "out", "0.bias": 0, "2.weight": "in"}
PER = rs.units(OUT)
X = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(width=6, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def data_loss(model):
    return (model(X) - X[:, :3] * X[:, 1:]).square().mean()


def rows(tensors):
    """The units of `OUT` by hand: a row each, from {name: array}."""
    return np.concatenate([tensors["0.weight"], tensors["0.bias"][:, None], tensors["2.weight"].T], 1)


def arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def shrunk(x, t):
    """argmin_z Σ (z - x)² / (2 t) + ‖z‖ by bisection for ‖z‖; t is the threshold of each entry."""
    some = t > 0
    if not some.any():
        return x
    fixed = (x[~some] ** 2).sum()
    if not fixed and ((x[some] / t[some]) ** 2).sum() <= 1:
        return np.zeros_like(x)

    def excess(r):
        return np.sqrt(((x * (r / (r + t))) ** 2).sum()) - r

    r = brentq(excess, 1e-14, np.linalg.norm(x) + 1e-12, xtol=1e-15, rtol=1e-14)
    return x * (r / (r + t))


def steps_of(optimizer, model):
    """{name: the step of each entry} that Adam or SGD has just taken, by its formula."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = next(n for n, q in model.named_parameters() if q is p)
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
                found[name] = (group["lr"] / (root + group["eps"])).numpy()
            else:
                found[name] = np.full(p.shape, group["lr"])
    return found


def two_rates(model):
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "lr": 0.05}]
    return torch.optim.SGD(groups, lr=0.1)


def two_adams(model):
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.1}]
    return torch.optim.Adam(groups, lr=0.1)


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.2),
    "SGD of two rates": two_rates,
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
    "Adam of two rates": two_adams,
}


# The prox


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("l1", [0.0, 0.02])
def test_a_proximal_step_is_the_prox_in_the_optimizers_metric(make, l1):
    """Each step of a bare optimizer, then the prox by bisection, is a step of the attached one."""
    strength, model = 0.1, net()
    optimizer = make(model)
    what = strength * rs.GroupLasso(per=PER) + l1 * rs.L1() if l1 else strength * rs.GroupLasso(per=PER)
    rs.attach(model, what.on(how="proximal"), optimizer)
    apart = 0.0
    for _ in range(6):
        bare = copy.deepcopy(model)
        other = make(bare)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        data_loss(bare).backward()
        other.step()
        x, t = rows(arrays(bare)), rows(steps_of(other, bare))
        x = np.sign(x) * np.maximum(np.abs(x) - l1 * t, 0)
        size = strength * np.sqrt(x.shape[1])
        expected = np.stack([shrunk(one, size * step) for one, step in zip(x, t, strict=True)])
        data_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        np.testing.assert_allclose(rows(arrays(model)), expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(model[2].bias.detach(), bare[2].bias.detach(), rtol=0, atol=1e-15)
        alone = rs.GroupLasso(per="out").prox(
            bare[0].weight.detach(), strength * torch.tensor(steps_of(other, bare)["0.weight"])
        )
        apart = max(apart, float((alone - model[0].weight.detach()).abs().max()))
    assert apart > 1e-3  # the test of the test: groups of one tensor are others


def test_the_reference_is_the_minimiser():
    draws = np.random.default_rng(0)
    for _ in range(20):
        x, t = draws.normal(size=5), 10 ** draws.uniform(-2, 0.5, size=5)
        z = shrunk(x, t)

        def value(z, x=x, t=t):
            return ((z - x) ** 2 / (2 * t)).sum() + np.linalg.norm(z)

        found = min((minimize(value, start, method="BFGS", tol=1e-12).fun for start in (x, x / 2)), default=0)
        assert value(z) <= min(found, value(np.zeros(5))) + 1e-9


def test_a_member_that_does_not_move_stays_and_its_unit_is_kept():
    """As a prox with a step of zero: without gradient, or with a rate of zero."""
    for way in ("gradient", "rate"):
        model = net()
        optimizer = two_rates(model)
        rs.attach(model, (2.0 * rs.GroupLasso(per=PER)).on(how="proximal"), optimizer)
        before = arrays(model)
        data_loss(model).backward()
        if way == "gradient":
            model[2].weight.grad = None
        else:
            optimizer.param_groups[1]["lr"] = 0.0
        moved = {
            name: w - 0.3 * dict(model.named_parameters())[name].grad.numpy()
            for name, w in before.items()
            if name[0] == "0"
        }
        optimizer.step()
        after = arrays(model)
        np.testing.assert_array_equal(after["2.weight"], before["2.weight"])
        x = rows({**before, **moved})
        t = np.full(x.shape, 0.3)
        t[:, 5:] = 0
        expected = [shrunk(one, 2.0 * np.sqrt(8) * step) for one, step in zip(x, t, strict=True)]
        np.testing.assert_allclose(rows(after), expected, rtol=0, atol=1e-10)
        assert (after["0.weight"] != 0).all()


def sides():
    """y = A x₁ + B x₂ + c: units are the rows of A with those of B and the entries of c."""

    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(3, 5, bias=False)

        def forward(self, x):
            return self.a(x[:, :4]) + self.b(x[:, 4:])

    torch.manual_seed(0)
    return Sides().double()


def minimiser(x, y, strength, rounds=20_000):
    """FISTA in NumPy for ‖x w - y‖² / n + strength √9 Σ_j ‖w_j‖ over columns j of (x, 1) w."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    step = 1 / (2 * np.linalg.eigvalsh(x.T @ x / len(x)).max())
    w = v = np.zeros((x.shape[1], y.shape[1]))
    k = 1.0
    for _ in range(rounds):
        z = v - step * 2 * x.T @ (x @ v - y) / len(x)
        lengths = np.linalg.norm(z, axis=0)
        new = z * np.maximum(0, 1 - step * strength * np.sqrt(len(w)) / lengths)
        if (((v - new) * (new - w)).sum()) > 0:
            k = 1.0
        last, k = k, (1 + np.sqrt(1 + 4 * k * k)) / 2
        v, w = new + (last - 1) / k * (new - w), new
    return w.T


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_training_ends_at_the_convex_minimiser(name):
    draws = np.random.default_rng(3)
    x = draws.normal(size=(60, 7)) * np.array([1, 0.3, 2, 1, 0.5, 1, 1.5])
    truth = draws.normal(size=(7, 5)) * np.array([1, 0, 0.5, 0, 1])
    y = x @ truth + 0.1 * draws.normal(size=(60, 5))
    strength, model = 0.15, sides()
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.05) if name == "Adam" else torch.optim.SGD(model.parameters(), 0.05)
    )
    per = rs.units({"a.weight": "out", "a.bias": 0, "b.weight": "out"})
    rs.attach(model, (strength * rs.GroupLasso(per=per)).on(how="proximal"), optimizer)
    tx, ty = torch.tensor(x), torch.tensor(y)
    steps = 4000 if name == "Adam" else 1500
    for step in range(steps):
        if name == "Adam":
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps) ** 2 + 1e-9
        optimizer.zero_grad()
        ((model(tx) - ty) ** 2).sum(1).mean().backward()
        optimizer.step()
    right = minimiser(x, y, strength)
    found = torch.cat([model.a.weight, model.b.weight, model.a.bias[:, None]], 1).detach().numpy()
    assert 0 < (right == 0).all(1).sum() < 5
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-6)
    np.testing.assert_array_equal((found == 0).all(1), (right == 0).all(1))


# Values and gradients


def formula(tensors, strength=0.1):
    x = torch.cat([tensors["0.weight"], tensors["0.bias"][:, None], tensors["2.weight"].T], 1)
    return strength * 8**0.5 * x.square().sum(1).sqrt().sum()


@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled"])
def test_values_gradients_and_decay_are_those_of_the_formula(how):
    model, other = net(), net()
    optimizer, second = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    reg = rs.attach(model, (0.1 * rs.GroupLasso(per=PER)).on(how=how, name="u"), optimizer)
    assert reg.values()["u"] == pytest.approx(float(formula(dict(model.named_parameters())).detach()), rel=1e-12)
    assert reg.measure()["u"].gradient == pytest.approx(_gradient_norm(net()), rel=1e-9)
    for _ in range(3):
        total = data_loss(other) + formula(dict(other.named_parameters()))
        total.backward()
        second.step()
        second.zero_grad()
        loss = reg.loss(data_loss(model))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def _gradient_norm(model):
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(formula(named), [named[name] for name in OUT])
    return float(torch.cat([g.flatten() for g in gradients]).norm())


def test_loss_scalers_and_accumulation():
    """Gradients scaled by 8 get a penalty scaled by 8, as the optimizer divides by 8; four backwards are one step."""
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    second = torch.optim.SGD(other.parameters(), 0.1)
    rs.attach(model, (0.1 * rs.GroupLasso(per=PER)).on(how="gradient"), optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for _ in range(4):
        (8 * data_loss(model) / 4).backward()
    optimizer.step()
    (data_loss(other) + formula(dict(other.named_parameters()))).backward()
    second.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "penalty",
    [rs.GroupLInf, rs.ExclusiveLasso, lambda per: rs.SparseGroupLasso(0.3, 0.2, per=per)],
    ids=["l-inf", "exclusive", "sparse"],
)
def test_other_penalties_of_groups(penalty):
    """Value and prox by SGD are those of the matrix of units."""
    model = net()
    reg = rs.attach(model, penalty(per=PER).on(name="u"))
    x = torch.tensor(rows(arrays(model)))
    assert reg.values()["u"] == pytest.approx(float(penalty(per="row")(x)), rel=1e-12)
    reg.detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rs.attach(model, penalty(per=PER).on(how="proximal"), optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    np.testing.assert_allclose(rows(arrays(model)), penalty(per="row").prox(x, 0.1), rtol=0, atol=1e-12)


# Projections


def best(tensors, k, units):
    """The k units whose removal of the others costs least, by trying all; units are lists of (name, index)."""

    def cost(kept):
        gone = [unit for unit in units if unit not in kept]
        return sum((tensors[name][index] ** 2).sum() for unit in gone for name, index in unit)

    kept = min(combinations(units, k), key=cost)
    found = {name: w.copy() for name, w in tensors.items()}
    for unit in units:
        for name, index in unit if unit not in kept else ():
            found[name][index] = 0
    return found


def check(model, expected):
    for name, p in model.named_parameters():
        found = p.detach().numpy()
        np.testing.assert_array_equal(found == 0, expected[name] == 0, err_msg=name)
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-15, err_msg=name)


def unit(j):
    return (("0.weight", np.s_[j]), ("0.bias", np.s_[j : j + 1]), ("2.weight", np.s_[:, j]))


def freely(model, optimizer):
    """A step of SGD with drawn gradients; returns the weights before any projection."""
    g = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
    before = {
        name: (p - optimizer.param_groups[0]["lr"] * p.grad).detach().numpy().copy()
        for name, p in model.named_parameters()
    }
    optimizer.step()
    return before


@pytest.mark.parametrize("k", [1, 3, 5])
def test_units_are_kept_by_their_length_over_all_members(k):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    units, start = [unit(j) for j in range(6)], arrays(model)
    reg = rs.attach(model, rs.TopGroups(k, per=PER).on(), optimizer)
    check(model, best(start, k, units))
    check(model, best(freely(model, optimizer), k, units))
    assert "attaching moved its 3 tensors" in str(reg)


def test_a_common_budget_of_rows_of_two_tensors():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    units, start = [(("0.weight", j),) for j in range(6)] + [(("2.weight", j),) for j in range(3)], arrays(model)
    rs.attach(model, rs.TopGroups(4, per="out", budget="all").on("*.weight"), optimizer)
    check(model, best(start, 4, units))
    check(model, best(freely(model, optimizer), 4, units))


@pytest.mark.parametrize("k", [7, 0.25])
def test_a_common_budget_of_entries(k):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.3)
    rs.attach(model, rs.TopK(k, budget="all").on("*.weight"), optimizer)
    for _ in range(3):
        bare = copy.deepcopy(model)
        other = torch.optim.Adam(bare.parameters(), 0.3)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, o in ((bare, other), (model, optimizer)):
            o.zero_grad()
            data_loss(one).backward()
            o.step()
        every = torch.cat([bare[0].weight.flatten(), bare[2].weight.flatten()]).detach()
        count = k if k > 1 else round(k * 42 + 1e-9)
        least = every.abs().sort(descending=True).values[count - 1]
        for number in (0, 2):
            w = bare[number].weight.detach()
            torch.testing.assert_close(model[number].weight.detach(), torch.where(w.abs() >= least, w, 0.0))


def deep():
    torch.manual_seed(2)
    return nn.Sequential(
        *[layer for _ in range(3) for layer in (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())]
    ).double()


@pytest.mark.parametrize("budget", ["each", "all"])
def test_a_schedule_over_several_sets_of_units(budget):
    """Three blocks; of all together, one may keep more than another."""
    sets = [{f"{i}.weight": "out", f"{i}.bias": 0, f"{i + 2}.weight": "in"} for i in (0, 4, 8)]
    model = deep()
    with torch.no_grad():
        model[4].weight.mul_(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    schedule = rs.schedules.Linear(1.0, 1 / 3, steps=4)
    rs.attach(model, rs.TopGroups(schedule, per=rs.units(*sets), budget=budget).on(), optimizer)
    counts = []
    for _ in range(6):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        counts.append([int(model[i].bias.count_nonzero()) for i in (0, 4, 8)])
    whole = [18, 15, 12, 9, 6, 6] if budget == "all" else None
    if whole:
        assert [sum(own) for own in counts] == whole
        assert counts[-1] != [2, 2, 2]
        assert counts[-1][1] > 2
    else:
        assert counts == [[n] * 3 for n in (6, 5, 4, 3, 2, 2)]


def test_units_of_different_sizes_by_lists():
    """Unit 0 has two rows of the first layer and their columns, and one entry more than others of the last bias."""
    per = rs.units({"0.weight": [[0, 3], [1], [4]], "2.weight": ("in", [[0, 3], [1], [4]])})
    units = [
        (("0.weight", [0, 3]), ("2.weight", np.s_[:, [0, 3]])),
        (("0.weight", [1]), ("2.weight", np.s_[:, [1]])),
        (("0.weight", [4]), ("2.weight", np.s_[:, [4]])),
    ]
    for k in (1, 2):
        model = net()
        start = arrays(model)
        rs.attach(model, rs.TopGroups(k, per=per).on(), torch.optim.SGD(model.parameters(), 0.1))
        check(model, best(start, k, units))
    model = net()
    reg = rs.attach(model, rs.GroupLasso(per=per).on(name="u"))
    tensors = arrays(model)
    sizes = [sum(tensors[name][index].size for name, index in own) for own in units]
    lengths = [np.sqrt(sum((tensors[name][index] ** 2).sum() for name, index in own)) for own in units]
    assert sizes == [14, 7, 7]
    assert reg.values()["u"] == pytest.approx(
        sum(np.sqrt(n) * length for n, length in zip(sizes, lengths, strict=True))
    )


# Naming and finding units


class Mlp(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.gate = nn.Linear(4, 6, bias=False) if gated else None

    def forward(self, x):
        h = self.up(x)
        return self.down(F.gelu(h) if self.gate is None else F.silu(self.gate(x)) * h)


class Blocks(nn.Module):
    def __init__(self, gated=False):
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "mlp": Mlp(gated)}) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.h:
            x = x + block["mlp"](block["norm"](x))
        return self.head(x)


def test_stars_make_a_set_for_each_text():
    per = rs.units({"h.*.mlp.up.weight": "out", "h.*.mlp.up.bias": 0, "h.*.mlp.down.weight": "in"})
    named = per.named(Blocks())
    assert len(named.sets) == 3
    assert dict(named.sets[1]) == {"h.1.mlp.up.weight": "out", "h.1.mlp.up.bias": 0, "h.1.mlp.down.weight": "in"}


@pytest.mark.parametrize("gated", [False, True])
def test_units_of_blocks_are_found_in_the_graph(gated):
    model = Blocks(gated)
    named = rs.units("h.*.mlp", example=torch.randn(2, 4)).named(model)
    gate = {"gate.weight": 0} if gated else {}
    for i, members in enumerate(named.sets):
        expected = {"up.weight": 0, "up.bias": 0, "down.weight": 1, **gate}
        assert dict(members) == {f"h.{i}.mlp.{name}": per for name, per in expected.items()}
    assert len(named.sets) == 3
    # LayerNorm keeps the residual stream: no other unit can be removed
    assert rs.units(example=torch.randn(2, 4)).named(model) == named


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(6 * 4, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).flatten(1))


IMAGE = torch.randn(2, 3, 6, 6)


def test_filters_with_their_normalisation_and_columns_behind_a_flattened_image():
    found = rs.units(example=IMAGE).named(Convolutions()).sets
    assert [dict(members) for members in found] == [
        {"conv1.weight": 0, "conv1.bias": 0, "bn1.weight": 0, "bn1.bias": 0, "conv2.weight": 1},
        {"conv2.weight": 0, "conv2.bias": 0, "fc.weight": (5, 4)},
    ]
    alone = rs.units(example=IMAGE, readers=False).named(Convolutions()).sets
    assert [dict(members) for members in alone] == [
        {"conv1.weight": 0, "conv1.bias": 0, "bn1.weight": 0, "bn1.bias": 0},
        {"conv2.weight": 0, "conv2.bias": 0},
    ]
    some = rs.units("conv1", "bn1", "conv2.weight", example=IMAGE).named(Convolutions()).sets
    assert [list(dict(members)) for members in some] == [
        ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "conv2.weight"]
    ]


def test_what_rules_make_zero_is_what_compaction_removes():
    """Units have one definition: of each set, the units that aren't kept go, and the outputs stay."""
    torch.manual_seed(0)
    for model, example, per in (
        (Blocks(True), torch.randn(5, 4), rs.units("h.*.mlp", example=torch.randn(2, 4))),
        (Convolutions().eval(), IMAGE, rs.units("conv1", "bn1", "conv2.weight", example=IMAGE)),
    ):
        rs.attach(model, rs.TopGroups(2, per=per).on(), torch.optim.SGD(model.parameters(), 0.1)).detach()
        small = rs.compact(model, example).model
        torch.testing.assert_close(small(example), model.eval()(example), rtol=1e-5, atol=1e-5)
        before, after = dict(model.named_parameters()), dict(small.named_parameters())
        for members in per.named(model).sets:
            for name, dim in members:
                assert after[name].shape[dim] == 2 < before[name].shape[dim]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


def test_heads_of_attention():
    """A head has rows of queries, keys and values, their biases, and columns of the output."""
    model, x = Attending(), torch.randn(2, 3, 8)
    heads = rs.units("attention", example=x)
    rows = tuple(tuple(part + 2 * head + i for part in (0, 8, 16) for i in (0, 1)) for head in range(4))
    assert [dict(members) for members in heads.named(model).sets] == [
        {
            "attention.in_proj_weight": (0, rows),
            "attention.in_proj_bias": (0, rows),
            "attention.out_proj.weight": (8, 2),
        }
    ]
    with torch.no_grad():
        model.attention.in_proj_bias.normal_()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plan = [rs.TopGroups(3, per=heads).on(), (0.5 * rs.GroupLasso(per=rs.units("mlp", example=x))).on(how="proximal")]
    rs.attach(model, plan, optimizer)
    lengths = [
        float(
            torch.cat([model.attention.in_proj_weight[list(own)].flatten(), model.attention.in_proj_bias[list(own)]])
            .norm()
            .detach()
        )
        for own in rows
    ]
    assert sum(length == 0 for length in lengths) == 1
    small = rs.compact(model, x).model
    assert small.attention.num_heads == 3
    torch.testing.assert_close(small(x), model.eval()(x))


def test_channels_through_residual_additions():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = self.stem(x)
            return self.head(h + self.b(F.relu(self.a(h))))

    found = [dict(members) for members in rs.units(example=torch.randn(2, 3)).named(Residual()).sets]
    stream = {"stem.weight": 0, "stem.bias": 0, "a.weight": 1, "b.weight": 0, "b.bias": 0, "head.weight": 1}
    assert found == [stream, {"a.weight": 0, "a.bias": 0, "b.weight": 1}]
    made = {"stem.weight": 0, "stem.bias": 0, "b.weight": 0, "b.bias": 0}
    alone = rs.units(example=torch.randn(2, 3), readers=False).named(Residual()).sets
    assert [dict(members) for members in alone] == [made, {"a.weight": 0, "a.bias": 0}]


def hugging_face(kind):
    import transformers

    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 12,
    }
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8)
        )
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes))
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=2))


KNOWN = {
    "torch": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2), "layers.*"),
    "gpt2": (lambda: hugging_face("gpt2"), "h.*.mlp"),
    "bert": (lambda: hugging_face("bert"), ("encoder.layer.*.intermediate", "encoder.layer.*.output")),
    "llama": (lambda: hugging_face("llama"), "layers.*.mlp"),
    "llama's heads": (lambda: hugging_face("llama"), "layers.*.self_attn"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_units_of_known_layers_are_those_of_the_graph(kind):
    make, where = KNOWN[kind]
    where, model = (where,) if isinstance(where, str) else where, make()
    example = torch.randn(2, 3, 8) if kind == "torch" else torch.randint(20, (2, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    found = []
    for per in (rs.units(*where), rs.units(*where, example=example)):
        reg = rs.attach(model, [rs.GroupLasso(per).on(name="u"), rs.ExclusiveLasso(per).on(name="v")])
        found.append((reg.values(), {frozenset(name for name, _ in members) for members in per.named(model).sets}))
        reg.detach()
    assert found[0][1] == {
        names for names in found[1][1] if kind != "torch" or not any("attn" in name for name in names)
    }
    if kind != "torch":
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert rs.Plan.from_dict(rs.Plan.of(rs.GroupLasso(rs.units(*where)).on()).to_dict()).rules[0].what.per == rs.units(
        *where
    )


def test_overlapping_units_are_summed_in_the_loss_and_refused_in_a_prox():
    model = Convolutions()
    per = rs.units(example=IMAGE)
    reg = rs.attach(model, rs.GroupLasso(per=per).on(name="u"))
    a = torch.cat(
        [
            t.flatten(1)
            for t in (
                model.conv1.weight,
                model.conv1.bias[:, None],
                model.bn1.weight[:, None],
                model.bn1.bias[:, None],
                model.conv2.weight.movedim(1, 0),
            )
        ],
        1,
    )
    b = torch.cat(
        [
            model.conv2.weight.flatten(1),
            model.conv2.bias[:, None],
            model.fc.weight.reshape(5, 6, 4).movedim(1, 0).flatten(1),
        ],
        1,
    )
    right = sum(float(x.shape[1] ** 0.5 * x.norm(dim=1).sum()) for x in (a.detach(), b.detach()))
    assert reg.values()["u"] == pytest.approx(right, rel=1e-5)
    reg.detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for rule in (
        rs.GroupLasso(per=per).on(how="proximal"),
        rs.TopGroups(2, per=per).on(),
        rs.GroupLasso(per=per).on(how="decoupled"),
    ):
        with pytest.raises(HowError, match=r"entries of 'conv2.weight' belong to several units.*readers=False"):
            rs.attach(model, rule, optimizer)
    rs.attach(model, rs.GroupLasso(per=rs.units(example=IMAGE, readers=False)).on(how="proximal"), optimizer)


def test_a_selection_leaves_members_out():
    model = net()
    reg = rs.attach(model, rs.GroupLasso(per=PER).on("*.weight", name="u"))
    x = np.concatenate([model[0].weight.detach(), model[2].weight.detach().T], 1)
    assert reg.values()["u"] == pytest.approx(np.sqrt(7) * np.linalg.norm(x, axis=1).sum())
    assert reg.rules[0].names == ("0.weight", "2.weight")


# Life of an attachment


def test_plans_name_the_members():
    model = Blocks()
    per = rs.units("h.*.mlp", example=torch.randn(2, 4))
    reg = rs.attach(
        model,
        [(0.1 * rs.GroupLasso(per=per)).on(name="u"), rs.TopGroups(3, per=per).on(name="k")],
        torch.optim.SGD(model.parameters(), 0.1),
    )
    again = rs.Plan.from_dict(reg.plan.to_dict())
    assert again.to_dict() == reg.plan.to_dict()
    assert again.rules[1].what == rs.TopGroups(3, per=per.named(model))
    reg.detach()
    other = rs.attach(model, again, torch.optim.SGD(model.parameters(), 0.1))
    assert other.values() == reg.values()
    with pytest.raises(
        PlanError, match=r"can't be written: it holds an input of the model; write value.named\(model\)"
    ):
        rs.Plan.of(rs.GroupLasso(per=per).on()).to_dict()


def test_a_plan_file_has_units(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "rules:\n  - what: {name: grouplasso, per: {units: {0.weight: out, 0.bias: 0, 2.weight: in}}}\n"
        "    strength: 1e-1\n"
    )
    rule = rs.Plan.load(path).rules[0]
    assert rule.what == 0.1 * rs.GroupLasso(per=PER)
    assert rs.attach(net(), rule).rules[0].names == ("0.weight", "0.bias", "2.weight")


def test_copies_pickles_and_texts():
    for per in (
        PER,
        rs.units("0", "2.weight", example=torch.ones(1, 4)),
        rs.units(example=(torch.ones(2), 3), readers=False),
    ):
        rule = (0.1 * rs.GroupLasso(per=per)).on()
        assert copy.deepcopy(rule) == pickle.loads(pickle.dumps(rule)) == rule
        assert hash(copy.deepcopy(per)) == hash(per)
    assert repr(PER) == "units({'0.weight': 'out', '0.bias': 0, '2.weight': 'in'})"
    assert (
        repr(rs.units("0", example=torch.ones(1, 4), readers=False))
        == "units('0', example=<1 × 4 values>, readers=False)"
    )
    assert rs.units("0", example=torch.ones(1, 4)) != rs.units("0", example=torch.zeros(1, 4)) != PER


def test_the_table_tells_the_units():
    model = net()
    text = str(rs.attach(model, rs.TopGroups(0.5, per=PER).on(name="u"), torch.optim.SGD(model.parameters(), 0.1)))
    assert "u: 6 units over 0.weight (out), 0.bias (0), 2.weight (in)" in text


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_saved_state_goes_on(make):
    def attached():
        model = net()
        optimizer = make(model)
        schedule = rs.schedules.Linear(1.0, 0.5, steps=4)
        plan = [
            (schedule * rs.GroupLasso(per=PER)).on(how="proximal", name="p"),
            rs.TopGroups(schedule, PER).on(name="k"),
        ]
        return model, optimizer, rs.attach(model, plan, optimizer)

    def step(model, optimizer):
        optimizer.zero_grad()
        data_loss(model).backward()
        optimizer.step()

    model, optimizer, reg = attached()
    for _ in range(2):
        step(model, optimizer)
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict(), reg.state_dict()])
    for _ in range(3):
        step(model, optimizer)
    again, second, other = attached()
    for one, state in zip((again, second, other), states, strict=True):
        one.load_state_dict(state)
    for _ in range(3):
        step(again, second)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_compiled_steps_leave_units_to_the_formulas():
    """With compile=True the others are folded, and the result is the same."""
    found = []
    for compile in (True, False):
        model = deep()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        per = rs.units({"0.weight": "out", "2.weight": "in"})
        plan = [
            (0.1 * rs.GroupLasso(per=per)).on(how="proximal"),
            (1e-3 * rs.L1()).on(["4.weight", "6.weight"], how="proximal"),
            (1e-3 * rs.L2()).on("*.weight", how="decoupled"),
        ]
        rs.attach(model, plan, optimizer, compile=compile)
        for _ in range(4):
            optimizer.zero_grad()
            (model(X) - X).square().mean().backward()
            optimizer.step()
        found.append(arrays(model))
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)


def test_a_replaced_layer_is_followed():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = rs.attach(model, (0.1 * rs.GroupLasso(per=PER)).on(name="u"), optimizer)
    model[0] = nn.Linear(4, 6).double()
    assert reg.values()["u"] == pytest.approx(float(formula(dict(model.named_parameters())).detach()), rel=1e-12)
    model[2] = nn.Linear(5, 3).double()
    with pytest.raises(DetachedError, match=r"different numbers of units: '0.weight' 6, '0.bias' 6, '2.weight' 5"):
        reg.values()


def test_nothing_stays_behind():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rs.attach(model, rs.TopGroups(2, PER).on(), optimizer):
        pass
    before = freely(model, optimizer)
    check(model, before)


# Refusals


def refused(error, match, rules, model=None, optimizer=None):
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else optimizer(model)
    with pytest.raises(error, match=match):
        rs.attach(model, rules, optimizer)


def test_units_that_do_not_fit_the_model():
    lasso = rs.GroupLasso
    refused(
        SelectionError,
        r"'0.wieght', a member of units, is no parameter; near it: '0.weight'",
        lasso(rs.units({"0.wieght": 0})).on(),
    )
    refused(
        PenaltyError,
        "different numbers of units: '0.weight' 6, '2.weight' 3",
        lasso(rs.units({"0.weight": "out", "2.weight": "out"})).on(),
    )
    refused(SelectionError, "none of the units' members is selected by '2.bias'", lasso(PER).on("2.bias"))
    refused(
        SelectionError,
        "no unit that could be removed lies wholly in these layers; units are in: 0.bias, 0.weight, 2.weight",
        lasso(rs.units("0", example=X)).on(),
    )
    refused(PenaltyError, "penalties of different groups in one sum", (lasso(PER) + lasso("out")).on("*.weight"))
    with pytest.raises(SelectionError, match=r"torch.export can't follow .* Name the members"):
        rs.units(example=torch.ones(2, 9)).named(net())
    stars = rs.units({"h.*.mlp.up.weight": "out", "h.*.norm.weight": 0, "head.weight": 1})
    refused(SelectionError, "write names with the same stars into one mapping", lasso(stars).on(), Blocks())


def test_units_that_are_missing_may_be_optional():
    model = net()
    rules = [rs.GroupLasso(rs.units({"9.weight": 0})).on(optional=True, name="none"), rs.GroupLasso(PER).on(name="u")]
    reg = rs.attach(model, rules)
    assert reg.values()["none"] == 0
    assert reg.values()["u"] > 0


def test_a_graph_is_made_once_for_all_rules_of_a_plan(monkeypatch):
    from restrain import connections

    made = []
    monkeypatch.setattr(connections, "removable", lambda *given: made.append(1) or found(*given))
    found = sys.modules["restrain.connections.found"].removable
    model, per = net(), rs.units(example=X[:2])
    plan = [(0.1 * rs.GroupLasso(per)).on(how="proximal"), rs.TopGroups(3, rs.units(example=X[:2].clone())).on()]
    rs.attach(model, plan, torch.optim.SGD(model.parameters(), 0.1))
    assert made == [1]


def test_rules_that_units_cannot_have():
    refused(HowError, "isn't known over units; the constraint of units is rs.TopGroups", rs.MaxNorm(1.0, per=PER).on())
    with pytest.raises(HowError, match="acts there by how='project', got how='parametrize'"):
        rs.TopGroups(2, per=PER).on(how="parametrize")
    with pytest.raises(PlanError, match="momentum='tangent' goes with"):
        rs.TopGroups(2, per=PER).on(momentum="tangent")
    with pytest.raises(PenaltyError, match="groups across the tensors of a model, and here is one tensor of shape"):
        rs.GroupLasso(per=PER)(torch.ones(3, 2))
    with pytest.raises(PenaltyError, match="on outputs, per= is a dim"):
        rs.GroupLasso(per=PER).on(rs.outputs("0"))
    refused(
        HowError,
        "isn't known for a penalty on the whole network|use norm=",
        (rs.Target(gradient_share=0.1) * rs.GroupLasso(per=PER)).on(),
    )


def test_cautious_decay_is_of_entries():
    cautious = rs.L2().on("0.bias", how="decoupled", cautious=True)
    with pytest.raises(PlanError, match=r"cautious=True isn't known for .* acts on several tensors together"):
        rs.GroupLasso(PER).on(how="decoupled", cautious=True)
    refused(HowError, "both with how='decoupled'", [rs.GroupLasso(PER).on(how="decoupled"), cautious])


def test_tensors_that_cannot_change_together():
    model = net()
    model[2].weight.requires_grad_(False)
    refused(HowError, "partly frozen: '0.weight' trained, '2.weight' frozen", rs.GroupLasso(PER).on(), model)
    model = net()
    model[2].to("meta")
    refused(HowError, "lie on several devices: '0.weight' cpu, '2.weight' meta", rs.GroupLasso(PER).on(), model)
    model = net()
    many = [torch.optim.SGD(model[i].parameters(), 0.1) for i in (0, 2)]
    for rule in ((0.1 * rs.GroupLasso(PER)).on(how="proximal"), rs.TopGroups(2, PER).on()):
        with pytest.raises(OptimizerError, match="several optimizers hold them"):
            rs.attach(model, rule, many)
    with pytest.raises(OptimizerError, match=r"no given optimizer holds '2.weight'"):
        rs.attach(model, rs.TopGroups(2, PER).on(), many[0])


def test_a_member_that_is_frozen_later():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = rs.attach(model, [(0.1 * rs.GroupLasso(PER)).on(name="u"), rs.TopGroups(3, PER).on()], optimizer)
    model[2].weight.requires_grad_(False)
    with pytest.raises(HowError, match=r"'2.weight' isn't trained"):
        reg.loss(data_loss(model))
    data_loss(model).backward()
    with pytest.raises(HowError, match=r"'2.weight' isn't trained"):
        optimizer.step()
    reg.detach()
    reg = rs.attach(model, [(0.1 * rs.GroupLasso(PER)).on("0.*", name="u")], optimizer)
    model[0].requires_grad_(False)  # all members: left out, as any frozen tensor
    assert reg.values()["u"] == 0
    optimizer.step()


def test_two_rules_on_one_tensor():
    first = (0.1 * rs.GroupLasso(PER)).on(how="proximal")
    both = (
        r"'0.weight': .* acts on it together with other tensors, and .* acts on it, too, both with how='proximal'.*"
        r"\(rs.GroupLasso\(per=units\) \+ rs.L1\(\)\)"
    )
    refused(HowError, both, [first, rs.L1().on("0.weight", how="proximal")])
    refused(
        HowError,
        both.replace("0.weight", "2.weight"),
        [first, rs.GroupLasso(rs.units({"2.weight": "out", "2.bias": 0})).on(how="proximal")],
    )
    refused(
        HowError,
        "both with how='project'.*Leave it out of one of them",
        [rs.TopGroups(2, PER).on(), rs.NonNegative().on("0.weight")],
    )
    refused(HowError, "both with how='project'", [rs.TopGroups(2, PER).on(), rs.TopK(5, budget="all").on()])
    refused(
        HowError,
        "both with how='decoupled'",
        [(0.1 * rs.GroupLasso(PER)).on(how="decoupled"), rs.L2().on("0.bias", how="decoupled")],
    )
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rs.attach(model, rs.TopGroups(2, PER).on(), optimizer)
    with pytest.raises(HowError, match=r"another attachment acts on '0.weight'"):
        rs.attach(model, rs.TopGroups(2, PER).on(), optimizer)


def test_a_prox_after_the_data_and_before_a_projection():
    """A prox of units, then the bounds of one of its tensors: in this order."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    rs.attach(model, [(0.1 * rs.GroupLasso(PER)).on(how="proximal"), rs.Box(-0.2, 0.2).on("0.weight")], optimizer)
    before = freely(model, optimizer)
    x = np.stack([shrunk(one, np.full(8, 0.3 * 0.1 * np.sqrt(8))) for one in rows(before)])
    x[:, :4] = x[:, :4].clip(-0.2, 0.2)
    np.testing.assert_allclose(rows(arrays(model)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (
            lambda: rs.units("h.*.mlp").named(Blocks()),
            SelectionError,
            r"no layer in there has units that are known .*\(none in this model\): give example=, an input",
        ),
        (lambda: rs.units("0", readers=False), SelectionError, "readers=False goes with example="),
        (lambda: rs.units("0", readers=np.ones(2)), SelectionError, "readers= is True or False, got"),
        (rs.units, SelectionError, "to find all units of a model, its graph is needed: give example="),
        (lambda: rs.units({}), SelectionError, "an empty mapping"),
        (lambda: rs.units(OUT, example=X), SelectionError, "not both"),
        (lambda: rs.units(["0.weight"]), SelectionError, r"named by mappings, .* got \['0.weight'\]"),
        (lambda: rs.units({0: "out"}), SelectionError, "named by text, the names of parameters; got 0"),
        (lambda: rs.units({"0.weight": PER}), PenaltyError, "a grouping of that tensor, not units"),
        (lambda: rs.units({"0.weight": 1.5}), PenaltyError, "per= is one of"),
    ],
)
def test_units_that_are_none(make, error, told):
    with pytest.raises(error, match=told):
        make()
