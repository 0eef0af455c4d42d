"""Entrywise penalties against brute force in one dimension, against skglm, and at their edges."""

import numpy as np
import pytest
import torch

import restrain as rs
from restrain.errors import PenaltyError

MEMBERS = [
    rs.Huber(0.5),
    rs.LogSum(0.4),
    rs.MCP(2.0),
    rs.SCAD(0.7, 1.6),
    rs.Lp(0.5),
    rs.Lp(2 / 3),
    rs.Lp(0.9),
    rs.Lp(0.1),
]
STEPS = [1e-3, 0.05, 0.16, 0.4, 0.9, 1.0, 2.0, 7.0]  # on both sides of where the proxes begin to jump


def excess(member, x, step, z):
    """By how much the objective at z is above the least that a fine grid finds."""
    grid = torch.cat([torch.linspace(0, 2, 40001, dtype=torch.float64) * x, torch.zeros(1, dtype=torch.float64)])
    objective = [((p - x) ** 2 / (2 * step) + member.entries(p)) for p in (z, grid)]
    return float(objective[0] - objective[1].min())


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
@pytest.mark.parametrize("step", STEPS)
def test_prox_is_the_global_minimizer(member, step):
    for x in torch.linspace(0.01, 4, 60, dtype=torch.float64):
        z = member.prox(x, step)
        assert excess(member, x, step, z) < 1e-14
        torch.testing.assert_close(member.prox(-x, step), -z)
        turned = member.prox(x * (0.6 + 0.8j), step)
        torch.testing.assert_close(turned, z * (0.6 + 0.8j))


def test_prox_oracle():
    x = torch.tensor(2.0, dtype=torch.float64)
    assert excess(rs.Lp(0.5), x, 0.4, rs.Lp(0.5).prox(x, 0.41)) > 1e-6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_roots_are_found_to_rounding(p):
    x = torch.logspace(-6, 6, 2000, dtype=torch.float64)
    for step in (1e-6, 1.0, 1e4):
        z = rs.Lp(p).prox(x, step)
        alive = z > 0
        rest = z + step * p * z.pow(p - 1) - x
        assert (rest / x)[alive].abs().max() < 1e-14
        assert alive.any()


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_prox_of_single_precision_is_that_of_double(member):
    x = torch.linspace(0, 5, 999)
    for step in STEPS:
        wide, narrow = member.prox(x.double(), step), member.prox(x, step)
        jumped = (wide == 0) != (narrow == 0)  # right at a jump, rounding decides
        assert jumped.sum() <= 1
        torch.testing.assert_close(narrow[~jumped], wide[~jumped].float(), rtol=1e-5, atol=1e-5)


def test_values_and_proxes_are_skglms():
    import skglm.penalties as peers

    strength, x, step = 0.7, np.linspace(-4, 4, 81), 0.6
    pairs = [
        (strength * rs.L1(), peers.L1(strength)),
        (strength * rs.MCP(3.0 * strength), peers.MCPenalty(strength, 3.0)),
        (strength * rs.SCAD(strength, 3.7 * strength), peers.SCAD(strength, 3.7)),
        (strength * rs.Lp(0.5), peers.L0_5(strength)),
        (strength * rs.Lp(2 / 3), peers.L2_3(strength)),
        (strength * rs.LogSum(0.8), peers.LogSumPenalty(strength, 0.8)),
        (rs.ElasticNet(strength * 0.4, strength * 0.3), peers.L1_plus_L2(strength, 0.4)),
    ]
    for ours, peer in pairs:
        assert float(ours(torch.tensor(x))) == pytest.approx(peer.value(x), rel=1e-12)
        expected = [peer.prox_1d(one, step, 0) for one in x]
        np.testing.assert_allclose(ours.prox(torch.tensor(x), step).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: rs.Huber(0), "delta="),
        (lambda: rs.LogSum(float("nan")), "epsilon="),
        (lambda: rs.MCP(float("inf")), "knee="),
        (lambda: rs.SCAD(2.0, 1.0), "knee="),
        (lambda: rs.Lp(1), "p="),
        (lambda: rs.Lp(True), "p="),
        (lambda: rs.SoftBox(1.0, -1.0), "low ≤ high"),
        (lambda: rs.SoftBox(None, None), "low ≤ high"),
        (lambda: rs.SoftBox("a", 1.0), "low="),
        (lambda: rs.SoftBox()(torch.ones(1, dtype=torch.complex64)), "no order"),
    ],
)
def test_what_they_refuse(make, what):
    with pytest.raises(PenaltyError, match=what):
        make()


def test_one_sided_box():
    w = torch.tensor([-3.0, 5.0])
    assert rs.SoftBox(0.0, None)(w) == 9
    assert rs.SoftBox(None, 1.0)(w) == 16


def test_a_nonconvex_penalty_finds_the_support_without_bias():
    """A noiseless sparse regression: the lasso's coefficients are too small, MCP's are right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    truth = torch.zeros(20).index_fill_(0, torch.tensor([1, 5, 9]), 2.0)
    fits = {}
    for penalty in (rs.L1(), rs.MCP(1.5)):
        model = torch.nn.Linear(20, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        reg = rs.attach(model, 0.2 * penalty.on("weight", how="proximal"), optimizer)
        for _ in range(300):
            optimizer.zero_grad()
            reg.loss((model(x).squeeze(1) - x @ truth).square().mean() / 2).backward()
            optimizer.step()
        fits[penalty] = model.weight.detach()[0]
    assert all(torch.equal(fit != 0, truth != 0) for fit in fits.values())
    torch.testing.assert_close(fits[rs.MCP(1.5)], truth, atol=1e-4, rtol=0)
    assert (truth - fits[rs.L1()])[truth != 0].min() > 0.1
