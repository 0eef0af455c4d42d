"""Optimizers that don't go from weights and .grad to weights (A4), cells run again (A23), interrupted steps (A24)."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import restrain as rs
from faults.helpers import right_or_refused, sgd
from restrain.errors import RestrainError, RestrainWarning
from spawning import spawned
from stand_ins import DPOptimizer, SGDScheduleFree

# A4: optimizers whose weights aren't the parameters they hold


def attached(*given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)  # that steps are measured is no refusal
        return rs.attach(*given)


def test_a_bound_holds_for_the_weights_that_a_schedule_free_optimizer_evaluates():
    def excess():
        model = nn.Linear(6, 1, bias=False).double()
        optimizer = SGDScheduleFree(model.parameters())
        attached(model, rs.MaxNorm(1.0, per=None).on("weight"), optimizer)
        x = torch.randn(64, 6, dtype=torch.float64)
        y = 3 * x.sum(1, keepdim=True)
        for _ in range(100):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        optimizer.eval()
        return max(model.weight.detach().norm().item() - 1, 0.0)

    right_or_refused(excess, 0.0, names="SGDScheduleFree", rtol=0, atol=1e-3)


def test_a_lasso_by_a_schedule_free_optimizer_has_its_zeros_where_it_is_evaluated():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(100, 20, generator=draws, dtype=torch.float64)
    y = x[:, :3].sum(1, keepdim=True)

    def zeros():
        model = nn.Linear(20, 1, bias=False).double()
        optimizer = SGDScheduleFree(model.parameters())
        attached(model, 0.5 * rs.L1().on("weight", how="proximal"), optimizer)
        for _ in range(300):
            optimizer.zero_grad()
            ((model(x) - y).square().mean() / 2).backward()
            optimizer.step()
        optimizer.eval()
        return int((model.weight == 0).sum()) >= 15  # 17 inputs don't matter

    right_or_refused(zeros, True, names="SGDScheduleFree")


class MasterWeights(torch.optim.Optimizer):
    """Holds the model's parameters, steps copies of them, and writes these back, as for half precision."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.pairs = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p, master in self.pairs:
            master.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.copy_(master)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret and others, 2021) with a base optimizer, as it is commonly written."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        members = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in members]).norm()
        before = [p.clone() for p in members]
        for p in members:
            p.add_(p.grad, alpha=self.defaults["rho"] / float(norm))
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p, old in zip(members, before, strict=True):
            p.copy_(old)
        self.base_optimizer.step()


WRAPPERS = {
    "masters": lambda p: MasterWeights(p, lr=0.1),
    "SAM": lambda p: SAM(p, torch.optim.SGD, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", ["SGD", "masters", "SAM"])
def test_decoupled_decay_reaches_the_weights(name):
    """The gradient is constant, so w ← w - lr (g + ∇penalty(w)) wherever it is taken."""
    start, slope = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[0.5, 0.25, -1.0]])

    def moved():
        model = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(start)
        optimizer = WRAPPERS[name](model.parameters())
        attached(model, 0.5 * rs.L2().on("weight", how="decoupled"), optimizer)

        def closure():
            optimizer.zero_grad()
            loss = model(slope).sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure) if name == "SAM" else optimizer.step()
        return model.weight.detach()

    right_or_refused(moved, start - 0.1 * (slope + start), names="weight")


def privately(how):
    """Return the weight after one step from ones, with a gradient of one half by samples."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = DPOptimizer(sgd(model))
    reg = attached(model, 0.5 * rs.L2().on("weight", how=how), optimizer)
    x = torch.full((4, 3), 0.5)
    optimizer.zero_grad()
    reg.loss(model(x).mean()).backward()
    model.weight.grad_sample = x[:, None, :]
    optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled"])
def test_an_optimizer_that_overwrites_gradients_has_the_penalty_or_is_refused(how):
    right_or_refused(lambda: privately(how), torch.full((1, 3), 1 - 0.1 * (0.5 + 1.0)), names="DPOptimizer")


def lasso(make):
    """Train a lasso whose strength aims at a half of zeros; return weights and strength, or how it is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x, optimizer = torch.randn(32, 6), make(model.parameters())
    rule = rs.Target(zeros=0.5, every=2) * rs.L1().on(rs.weights, how="proximal", name="sparse")
    try:
        reg = attached(model, rule, optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            reg.loss((model(x) - x.sum(1, keepdim=True)).square().mean()).backward()
            optimizer.step()
        return [p.tolist() for p in model.parameters()], reg.strengths()["sparse"]
    except RestrainError as error:
        return str(error)


def zero_redundancy(rank, port, results):
    """Train it on each rank with the same data, by an optimizer that shares parameters out among the ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results[rank] = lasso(lambda members: ZeroRedundancyOptimizer(members, torch.optim.Adam, lr=0.01))
    dist.destroy_process_group()


@pytest.mark.slow
def test_an_optimizer_whose_state_is_shared_out_trains_as_the_one_inside():
    found, right = spawned(zero_redundancy, 2), lasso(lambda members: torch.optim.Adam(members, lr=0.01))
    if all(isinstance(one, str) for one in found.values()):
        assert all("ZeroRedundancyOptimizer" in one for one in found.values())
        return
    for rank in (0, 1):
        assert found[rank][1] == pytest.approx(right[1], rel=1e-3)
        for a, b in zip(found[rank][0], right[0], strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-4)


# A23: a cell that is run again


def line():
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    return model


@pytest.mark.parametrize(
    "how",
    [
        "gradient",
        "decoupled",
        "proximal",
    ],
)
def test_a_cell_that_attaches_again_acts_once_or_is_refused(how):
    def moved():
        model = line()
        optimizer = sgd(model)
        for _ in range(2):
            reg = rs.attach(model, 0.5 * rs.L1().on("weight", how=how), optimizer)
        reg.loss(0 * model(torch.ones(1, 3)).sum()).backward()
        optimizer.step()
        return model.weight.detach()

    right_or_refused(moved, torch.full((1, 3), 2 - 0.1 * 0.5), names="weight")


def test_a_cell_that_attaches_again_gives_the_penalty_in_the_loss_once():
    model = line()
    optimizer = sgd(model)
    for _ in range(2):
        reg = rs.attach(model, 0.5 * rs.L1().on("weight"), optimizer)
    assert reg.loss(0 * model(torch.ones(1, 3)).sum()).item() == pytest.approx(3.0)


def test_a_cell_that_attaches_noise_on_gradients_again_draws_it_once_or_is_refused():
    def deviation():
        model = nn.Linear(100, 100, bias=False)
        optimizer = sgd(model, lr=1.0)
        before = model.weight.detach().clone()
        for _ in range(2):
            rs.attach(model, rs.GradientNoise(0.1).on("weight"), optimizer)
        (0 * model(torch.ones(1, 100)).sum()).backward()
        optimizer.step()
        return (model.weight.detach() - before).std()

    right_or_refused(deviation, 0.1, names="weight", rtol=0.05, atol=0)  # ten thousand draws: 0.7 %


# A24: a step that is interrupted and called again


@pytest.mark.parametrize(
    ("how", "redone"),
    [
        ("gradient", "the step"),
        ("decoupled", "the step"),
        ("decoupled", "all of it"),
        ("gradient", "all of it"),
        ("proximal", "the step"),
        ("proximal", "all of it"),
    ],
)
def test_an_interrupted_step_that_is_called_again_has_the_penalty_once(how, redone):
    model = line()
    optimizer, state = sgd(model), {"interrupt": True}
    reg = rs.attach(model, 0.5 * rs.L1().on("weight", how=how), optimizer)

    def stop(*given):
        if state.pop("interrupt", False):
            raise KeyboardInterrupt

    def backward():
        optimizer.zero_grad()
        reg.loss(model(torch.full((1, 3), 0.25)).sum()).backward()

    optimizer.register_step_pre_hook(stop)
    backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    if redone == "all of it":
        backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 2 - 0.1 * (0.5 + 0.25)))


# E7: an optimizer that maximises


def test_an_optimizer_that_maximises_does_not_ascend_the_penalty_in_the_loss():
    """Adding to a reward that is ascended would let weights grow: refused, warned of, or taken off."""
    model = line()
    optimizer = sgd(model, maximize=True)
    try:
        reg = rs.attach(model, 0.5 * rs.L2().on("weight"), optimizer)
        reg.loss(0 * model(torch.ones(1, 3)).sum()).backward()
    except (RestrainError, RestrainWarning) as told:
        message = str(told)
    else:
        optimizer.step()
        assert (model.weight < 2).all()
        message = "maximize"
    assert "maximize" in message


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal"])
def test_an_optimizer_that_maximises_is_refused_for_penalties_at_the_step(how):
    model = line()
    with pytest.raises(RestrainError, match="maximize"):
        rs.attach(model, 0.5 * rs.L2().on("weight", how=how), sgd(model, maximize=True))


def test_reference_of_schedule_free_optimizers_reaches_a_minimum():
    """The optimizer that is written here is one: without rules it fits a line."""
    model = nn.Linear(3, 1).double()
    optimizer = SGDScheduleFree(model.parameters())
    x = torch.randn(64, 3, dtype=torch.float64)
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(model(x), x.sum(1, keepdim=True) + 1).backward()
        optimizer.step()
    optimizer.eval()
    torch.testing.assert_close(model.weight, torch.ones(1, 3, dtype=torch.float64), rtol=0, atol=0.02)
