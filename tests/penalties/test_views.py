"""Penalties of two views: which outputs they get, what they compute, alone and on several processes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import references as ref
import restrain as rs
from everywhere.workers import together
from restrain.errors import CaptureError, PenaltyError, PlanError, SelectionError


class Siamese(nn.Module):
    """Calls its projection twice, or once for a single batch."""

    def __init__(self):
        super().__init__()
        self.body, self.proj, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x, y=None):
        a = self.proj(torch.tanh(self.body(x)))
        return a if y is None else (a, self.proj(torch.tanh(self.body(y))))


def fresh():
    torch.manual_seed(3)
    return Siamese().double()


def views():
    torch.manual_seed(4)
    x = torch.randn(8, 4, dtype=torch.float64)
    return x, x + 0.3 * torch.randn_like(x)


PLAN = [
    0.5 * rs.CrossCorrelation(0.02).on(rs.outputs("proj"), name="cc"),
    2.0 * rs.Invariance().on(rs.outputs("proj"), name="same"),
    rs.Variance().on(rs.outputs("proj"), name="variance"),
    rs.Covariance().on(rs.outputs("proj"), name="covariance"),
]


def expected(model, x, y):
    """The loss of the plan by formulas, at two views."""
    a, b = model(x), model(y)
    left, right = a - a.mean(0), b - b.mean(0)
    c = left.T @ right / (left.square().sum(0)[:, None] * right.square().sum(0)).sqrt()
    off = c - c.diagonal().diag()
    between = 0.5 * ((1 - c.diagonal()).square().sum() + 0.02 * off.square().sum())
    of_each = 0
    for h in (a, b):
        cov = (h - h.mean(0)).T @ (h - h.mean(0)) / (len(h) - 1)
        spread = (1 - (cov.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
        of_each = of_each + (spread + (cov - cov.diagonal().diag()).square().sum() / 3) / 2  # the mean over calls
    return between + 2 * (a - b).square().sum(1).mean() + of_each


def test_cross_correlation_is_the_references():
    a, b = np.random.default_rng(0).normal(size=(2, 7, 4))
    value = rs.CrossCorrelation(0.02)({}, {"a": torch.tensor(a), "b": torch.tensor(b)})
    np.testing.assert_allclose(value, ref.cross_correlation(a, b, 0.02), rtol=1e-13)
    assert abs(value - ref.cross_correlation(a, b, 0.03)) > 1e-4
    a[:, 1] = 2.0  # a constant feature has no correlations
    a = torch.tensor(a, requires_grad=True)
    value = rs.CrossCorrelation(0.0)({}, {"a": a, "b": a.detach()})
    assert float(value.detach()) == pytest.approx(1.0)
    value.backward()
    assert a.grad.isfinite().all()


def test_cross_correlation_can_be_differentiated_twice():
    a, b = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda a, b: rs.CrossCorrelation(0.1)({}, {"a": a, "b": b}), (a, b))
    torch.autograd.gradgradcheck(lambda a: rs.Covariance()(a) + rs.Variance(9.0)(a) + rs.Decorrelation()(a), (a,))


def test_cross_correlation_hides_no_nan_and_has_none_of_one_sample():
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    a[0, 0] = torch.nan
    assert rs.CrossCorrelation()({}, {"a": a, "b": b}).isnan()
    with pytest.raises(PenaltyError, match="got a single sample"):
        rs.CrossCorrelation()({}, {"a": a[:1], "b": b[:1]})


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_two_calls_or_two_forwards(forwards, backend):
    model, (x, y) = fresh(), views()
    reg = rs.attach(model, PLAN)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    outs = run(x, y) if forwards == 1 else (run(x), run(y))
    if backend and forwards == 2:
        torch.compiler.reset()
    loss = reg.loss(0 * sum(out.sum() for out in outs))
    loss.backward()
    twin = fresh()
    by_hand = expected(twin, x, y)
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad if p.grad is not None else torch.zeros_like(p), q.grad if q.grad is not None else torch.zeros_like(q)
        )
    torch.compiler.reset()


SAME = rs.Invariance()


def test_layers_and_calls_are_chosen():
    model, (x, y) = fresh(), views()
    with torch.no_grad():
        a, b = model(x, y)
        other = model.other(torch.tanh(model.body(x)))

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, y):
            self.net.proj(torch.tanh(self.net.body(x + 1)))
            return *self.net(x, y), self.net.other(torch.tanh(self.net.body(x)))

    def penalty(where, what=SAME):
        three = Three()
        with rs.attach(three, what.on(where)) as reg:
            return float(reg.loss(0 * sum(out.sum() for out in three(x, y))).detach())

    of = rs.outputs
    assert penalty(of("net.proj", call=1) | of("net.proj", call=2)) == pytest.approx(
        float((a - b).square().sum(1).mean())
    )
    assert penalty(of("net.proj", call=1) | of("net.other")) == pytest.approx(float((a - other).square().sum(1).mean()))
    assert penalty(of("net.proj", call=2), rs.L1()) == pytest.approx(float(b.abs().sum(1).mean()))
    with pytest.raises(PenaltyError, match=r"got 3 outputs: net.proj, net.proj#2, net.proj#3. Say which two"):
        penalty(of("net.proj"))
    with pytest.raises(CaptureError, match=r"call=3 .* on 3 of them"):
        penalty(of("net.proj", call=3), rs.L1())
    with pytest.raises(PenaltyError, match="of one shape"):
        penalty(of("net.proj", call=0) | of("net.body", call=1))


def test_calls_are_refused_where_they_are_summed():
    model, (x, y) = fresh(), views()
    reg = rs.attach(model, rs.L1().on(rs.outputs("proj", call=0)))
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(x, y)
    with pytest.raises(CaptureError, match="compiled code and reentrant checkpoints give as a sum"):
        reg.loss(out[0].sum())
    torch.compiler.reset()


def test_what_cannot_be():
    model = fresh()
    for bad in (-1, True, "first", 0.0):
        with pytest.raises(SelectionError, match="call= is the number"):
            rs.outputs("proj", call=bad)
    with pytest.raises(SelectionError, match="leave calls= out"):
        rs.outputs("proj", call=0, calls="sum")
    with pytest.raises(SelectionError, match=r"write .on\(rs.outputs"):
        rs.Invariance().on("*")
    with pytest.raises(PlanError, match="join them there"):
        rs.Invariance().on(rs.outputs("proj"), outputs=rs.outputs("other"))
    with pytest.raises(SelectionError, match="average= and call="):
        rs.attach(model, rs.GaussianNoise(0.1).on(rs.outputs("proj", call=0)))
    with pytest.raises(SelectionError, match="sees the whole network"):
        (rs.Invariance() + rs.Tie("a", "b")).on(rs.outputs("proj"))
    with pytest.raises(PenaltyError):
        rs.CrossCorrelation(-1.0)


def test_plans_and_evaluation_know_views():
    plan = rs.Plan.of(
        [(rs.Invariance() + 0.1 * rs.CrossCorrelation()).on(rs.outputs("proj", call=0) | rs.outputs("proj", call=1))]
    )
    again = rs.Plan.from_dict(plan.to_dict())
    assert again.rules[0].what == plan.rules[0].what
    assert repr(again.rules[0].where) == repr(plan.rules[0].where)
    model, (x, y) = fresh(), views()
    reg = rs.attach(model, [*PLAN[:2], rs.L1().on(rs.outputs("proj", call=0), name="first")])
    reg.loss(0 * sum(out.sum() for out in model(x, y)))
    trained = reg.values()
    with reg.evaluating() as evaluation, torch.no_grad():
        model.eval()(x, y)
        found = evaluation.values()
    assert {key: float(value) for key, value in found.items()} == pytest.approx(trained)


def train(rank, ranks, how, reentrant=None):
    """Loss and whole gradient of the plan on this rank's part of the batch."""
    model, (x, y) = fresh(), (v.chunk(ranks)[rank] for v in views())
    if how == "fsdp":
        for layer in (model.body, model.proj, model.other, model):
            fully_shard(layer)
    run = DistributedDataParallel(model, find_unused_parameters=True) if how == "ddp" else model
    reg = rs.attach(run, PLAN)
    loss = reg.loss(0 * sum(out.sum() for out in run(x, y)))
    loss.backward()
    grads = [p.grad for p in (*model.body.parameters(), *model.proj.parameters())]
    return float(loss.detach()), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        ("ddp", 2),
        ("fsdp", 2),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        pytest.param("fsdp", 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_are_one(how, ranks):
    """The gradient isn't off by the number of processes, as in lightly issue 1977."""
    twin = fresh()
    by_hand = expected(twin, *views())
    by_hand.backward()
    wanted = [p.grad for p in (*twin.body.parameters(), *twin.proj.parameters())]
    found = together(ranks, train, how=how)
    assert sum(loss for loss, _ in found) / ranks == pytest.approx(float(by_hand.detach()), rel=1e-12)
    for _, grads in found:
        torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-12)
