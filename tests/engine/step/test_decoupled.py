"""how="decoupled": w - lr · gradient of the penalty beside the optimizer's step, as AdamW has it."""

import warnings

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.utils import parametrize

import restrain as rs
from layouts import explained
from restrain.engine.core.memory import BLOCK
from restrain.errors import HowError, OptimizerError, RestrainWarning

X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(9))


def make():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def holder(*tensors):
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_parameter(f"w{number}", nn.Parameter(tensor))
    return explained(module)


def trained(build, plan=None, steps=50, closure=False):
    """The parameters after some steps under a schedule, with groups of different learning rates."""
    model = make()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
    optimizer = build(groups)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if plan is not None:
        rs.attach(model, plan, optimizer)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(model(X), Y)
        value.backward()
        return value

    for _ in range(steps):
        if not closure:
            loss()
        optimizer.step(*[loss] * closure)
        schedule.step()
    return [p.detach() for p in model.parameters()]


DECAY = 0.3
RULE = (DECAY / 2) * rs.L2().on("*", how="decoupled")
OURS_AND_TORCHS = {
    "Adam": (optim.Adam, optim.AdamW, {}),
    "amsgrad": (optim.Adam, optim.AdamW, {"amsgrad": True}),
    "fused": (optim.Adam, optim.AdamW, {"fused": True}),
    "foreach": (optim.Adam, optim.AdamW, {"foreach": True}),
    "rate in a tensor": (optim.Adam, optim.AdamW, {"foreach": False, "tensor": True}),
    "NAdam": (optim.NAdam, lambda p, **k: optim.NAdam(p, decoupled_weight_decay=True, **k), {}),
    "RAdam": (optim.RAdam, lambda p, **k: optim.RAdam(p, decoupled_weight_decay=True, **k), {}),
    "SGD": (optim.SGD, optim.SGD, {}),  # coupled, which without momentum is the same
    "SGD fused": (optim.SGD, optim.SGD, {"fused": True}),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OURS_AND_TORCHS)
def test_half_the_squares_decoupled_are_torchs_decoupled_weight_decay(name, closure):
    ours, torchs, options = OURS_AND_TORCHS[name]
    in_tensor = options.get("tensor", False)
    options = {key: value for key, value in options.items() if key != "tensor"}

    def by(cls, **more):
        rate = torch.tensor(0.1, dtype=torch.float64) if in_tensor else 0.1
        return lambda p: cls(p, **{**options, "lr": rate, **more})

    expected = trained(by(torchs, weight_decay=DECAY), closure=closure)
    got = trained(by(ours), RULE, closure=closure)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    other = trained(by(ours), 1.001 * RULE, closure=closure)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-12)


def test_under_adam_it_is_not_the_coupled_one():
    coupled = trained(lambda p: optim.Adam(p, lr=0.1, weight_decay=DECAY))
    decoupled = trained(lambda p: optim.Adam(p, lr=0.1), RULE)
    gradient = trained(lambda p: optim.Adam(p, lr=0.1), (DECAY / 2) * rs.L2().on("*", how="gradient"))
    torch.testing.assert_close(gradient, coupled, rtol=1e-9, atol=1e-12)
    assert max((a - b).abs().max() for a, b in zip(decoupled, coupled, strict=True)) > 0.1


def one_step(w, penalty, rate, gradient=0.0, build=optim.SGD):
    model = holder(w.clone())
    optimizer = build(model.parameters(), lr=rate)
    rs.attach(model, penalty.on("*", how="decoupled"), optimizer)
    model.w0.grad = torch.full_like(model.w0, gradient)
    optimizer.step()
    return model.w0.detach()


def test_it_shrinks_and_never_past_zero():
    w = torch.tensor([-1.0, -0.1, -0.0, 0.0, 0.1, 1.0])
    expected = torch.tensor([-0.7, 0.0, 0.0, 0.0, 0.0, 0.7])
    torch.testing.assert_close(one_step(w, 0.6 * rs.L1(), 0.5), expected)
    assert (one_step(w, 10 * rs.L2(), 0.5) == 0).all()
    rows = torch.tensor([[3.0, 4.0], [0.1, -0.1]])
    torch.testing.assert_close(
        one_step(rows, rs.GroupLasso(), 0.5), torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * (1 - 0.5 * 2**0.5 / 5)
    )
    z = torch.tensor([3 + 4j, 0.1j, 0j])
    torch.testing.assert_close(one_step(z, rs.L1(), 0.5), torch.tensor([2.7 + 3.6j, 0j, 0j]))


def test_what_does_not_shrink_may_cross_zero():
    class Pulled(rs.Penalty, register=False):
        def __call__(self, w):
            return (w - 2).square().sum() / 2

    torch.testing.assert_close(one_step(torch.tensor([-0.5, 1.0]), Pulled(), 0.8), torch.tensor([1.5, 1.8]))


def test_it_acts_before_the_optimizer_at_the_weights_as_they_were():
    w = torch.randn(6, dtype=torch.float64)
    model = holder(w.clone())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    plan = [0.2 * rs.L2().on("*", how="decoupled"), 0.3 * rs.L2().on("*", how="gradient")]
    rs.attach(model, [*plan, 0.5 * rs.L1().on("*", how="proximal")], optimizer)
    model.w0.grad = torch.ones_like(w)
    optimizer.step()
    moved = w * (1 - 0.1 * 0.4) - 0.1 * (1 + 0.6 * w)
    torch.testing.assert_close(model.w0.detach(), moved - moved.clamp(-0.05, 0.05), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.w0.grad, 1 + 0.6 * w)  # the decay is no part of it


def test_every_and_start_count_real_steps():
    model = holder(torch.ones(2, dtype=torch.float64))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, rs.L2().on("*", how="decoupled", every=3, start=2), optimizer)
    optimizer.step()  # without gradient, not a step
    seen = []
    for _ in range(9):
        model.w0.grad = torch.zeros(2, dtype=torch.float64)
        before = model.w0.detach().clone()
        optimizer.step()
        seen.append(float((model.w0.detach() / before)[0]))
    assert seen == pytest.approx([1, 1, 0.8, 1, 1, 0.8, 1, 1, 0.8])


def test_what_the_step_leaves_alone_is_left_alone():
    model = holder(*torch.ones(4, 2).unbind())
    groups = [{"params": [model.w0, model.w1, model.w2]}, {"params": [model.w3], "lr": 0.0}]
    optimizer = optim.Adam(groups, lr=0.1)
    rs.attach(model, rs.L2().on("*", how="decoupled"), optimizer)
    for p in (model.w0, model.w2, model.w3):
        p.grad = torch.zeros(2)
    model.w2.requires_grad_(False)
    optimizer.step()
    assert [float(p.detach()[0]) for p in model.parameters()] == pytest.approx([0.8, 1, 1, 1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["decoupled", "proximal"])
def test_steps_that_a_scaler_skips_do_nothing(how, fused):
    model, calm = make(), make()
    optimizers = [optim.Adam(m.parameters(), lr=0.1, fused=fused) for m in (model, calm)]
    for m, optimizer in zip((model, calm), optimizers, strict=True):
        rs.attach(m, 0.3 * rs.L2().on("*", how=how, every=2), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        bad = step in (1, 4)
        optimizers[0].zero_grad()
        scaler.scale(F.cross_entropy(model(X), Y) * (torch.inf if bad else 1)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizers[0])
        scaler.update()
        if bad:
            assert all(map(torch.equal, before, model.parameters()))
            continue
        optimizers[1].zero_grad()
        F.cross_entropy(calm(X), Y).backward()
        optimizers[1].step()
    torch.testing.assert_close(list(model.parameters()), list(calm.parameters()), rtol=1e-7, atol=1e-9)


def test_a_closure_that_is_called_twice_decays_once():
    class Twice(optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
                return super().step(closure)

    model = holder(torch.ones(2, dtype=torch.float64))
    optimizer = Twice(model.parameters(), lr=0.1)
    rs.attach(model, rs.L2().on("*", how="decoupled"), optimizer)

    def closure():
        model.w0.grad = torch.zeros_like(model.w0)
        return model.w0.sum()

    optimizer.step(closure)
    assert model.w0.tolist() == pytest.approx([0.8, 0.8])


def test_once_a_step_whatever_is_accumulated():
    model = holder(torch.ones(2, dtype=torch.float64))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.L2().on("*", how="decoupled"), optimizer)
    for _ in range(4):
        (reg.loss(0 * model.w0.sum()) / 4).backward()
    optimizer.step()
    assert model.w0.tolist() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_tensors_of_any_layout(dtype):
    for w in (torch.randn(BLOCK + 5), torch.randn(700, 600).t(), torch.randn(600, 1400)[:, ::2], torch.randn(())):
        w = w.to(dtype)
        wide = w.double()
        expected = wide - 0.1 * (0.3 * wide.sgn() + 0.4 * wide)
        expected = torch.where(expected * wide < 0, 0, expected)
        loose = {torch.bfloat16: 1e-2, torch.float32: 1e-6}.get(dtype, 1e-12)
        model = holder(w.clone())
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        rule = (0.3 * rs.L1() + 0.2 * rs.L2()).on("*", how="decoupled")
        if dtype == torch.bfloat16:
            with pytest.warns(RestrainWarning, match="lost to rounding"):
                rs.attach(model, rule, optimizer)
        else:
            rs.attach(model, rule, optimizer)
        model.w0.grad = torch.zeros_like(model.w0)
        optimizer.step()
        torch.testing.assert_close(model.w0.detach().double(), expected, rtol=loose, atol=loose)


# Refused


STEP_MOMENTS = ("gradient", "decoupled", "proximal")


@pytest.mark.parametrize("how", ["decoupled", "proximal"])
def test_lbfgs_is_refused(how):
    model = make()
    with pytest.raises(OptimizerError, match=r"LBFGS.*Use how='loss' or how='gradient'"):
        rs.attach(model, rs.L2().on("*", how=how), optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("how", STEP_MOMENTS)
def test_optimizers_that_ascend_or_join_the_graph_are_refused(how):
    model = make()
    rule = rs.L2().on("*", how=how)
    with pytest.raises(OptimizerError, match="maximize=True"):
        rs.attach(model, rule, optim.Adam(model.parameters(), maximize=True))
    with pytest.raises(OptimizerError, match=r"differentiable=True.*use how='loss'"):
        rs.attach(model, rule, optim.Adam(model.parameters(), differentiable=True))
    with pytest.raises(OptimizerError, match="differentiable=True"):
        rs.attach(model, rs.NonNegative().on("*"), optim.SGD(model.parameters(), differentiable=True))
    rs.attach(model, rs.L2().on("*"), optim.Adam(model.parameters(), differentiable=True))


@pytest.mark.parametrize("how", STEP_MOMENTS)
def test_sparse_gradients_and_parametrised_weights_are_refused(how):
    rule = rs.L2().on("*", how=how)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    with pytest.raises(HowError, match="sparse=True"):
        rs.attach(model, rule, optim.SGD(model.parameters(), lr=0.1))
    model = nn.Sequential(nn.Embedding(5, 3))
    with pytest.raises(OptimizerError, match="SparseAdam takes sparse gradients"):
        rs.attach(model, rule, optim.SparseAdam(model.parameters()))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rule, optimizer)
    F.embedding(torch.tensor([1, 2]), model[0].weight, sparse=True).sum().backward()
    with pytest.raises(HowError, match=r"'0.weight' has got a sparse gradient"):
        optimizer.step()
    reg.detach()
    model = nn.Sequential(parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Softplus()))
    with pytest.raises(HowError, match="parametrised"):
        rs.attach(model, rs.L2().on("0.weight", how=how), optim.SGD(model.parameters(), lr=0.1))


def test_momentum_that_never_forgets_is_refused():
    model = make()
    with pytest.raises(OptimizerError, match="momentum=1"):
        rs.attach(model, rs.L1().on("*", how="proximal"), optim.SGD(model.parameters(), lr=0.1, momentum=1.0))


def test_a_plan_keeps_it_and_double_decay_is_warned_of():
    plan = rs.Plan.of([0.1 * rs.L2().on("*.weight", how="decoupled")])
    assert rs.Plan.from_dict(plan.to_dict()) == plan
    model = make()
    with pytest.warns(RestrainWarning, match="decays what the optimizer's weight_decay decays"):
        reg = rs.attach(model, plan, optim.AdamW(model.parameters()))
    assert "decoupled" in str(reg)
    with pytest.raises(OptimizerError, match="no given optimizer holds"):
        rs.attach(model, plan)


@pytest.mark.parametrize("how", [*STEP_MOMENTS, "project"])
def test_a_step_that_calls_its_bases_step_is_one(how):
    """torch calls the hooks of both."""
    calls = []

    class Logged(optim.SGD):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    for build in (optim.SGD, Logged):
        model = holder(torch.ones(2, dtype=torch.float64))
        optimizer = build(model.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
        rule = rs.MaxNorm(0.5, per=0).on("*", every=2) if how == "project" else rs.L2().on("*", how=how, every=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)
            reg = rs.attach(model, rule, optimizer)
        for _ in range(3):
            model.w0.grad = torch.ones(2, dtype=torch.float64)
            optimizer.step()
        assert reg.state_dict()["steps"] == 3
        assert reg.state_dict()["optimizer_steps"] == [3]
        if build is optim.SGD:
            expected, _ = model.w0.detach(), calls.clear()
    torch.testing.assert_close(model.w0.detach(), expected)
    assert calls == ["step", "hook", "hook"] * 3, "no longer needed: torch calls each hook once"
