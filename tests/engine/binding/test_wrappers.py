"""Optimizers around other optimizers: each moment acts as with the inner one alone, or is refused when attached."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import restrain as rs
from restrain.errors import OptimizerError, PlanError, RestrainWarning
from stand_ins import SAM, DPOptimizer

X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :2].sum(1, keepdim=True) + 0.1
RULES = {
    "loss": 0.1 * rs.L2().on("weight"),
    "gradient": 0.1 * rs.L2().on("weight", how="gradient"),
    "decoupled": 0.1 * rs.L2().on("weight", how="decoupled"),
    "proximal": 0.3 * rs.L1().on("weight", how="proximal"),
    "project": rs.MaxNorm(0.5).on("weight"),
}


class Lookahead(torch.optim.Optimizer):
    """Lookahead (Zhang and others, 2019) with k beyond the test's steps: the inner optimizer itself until then."""

    def __init__(self, optimizer, k=1000, alpha=0.5):
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {"lr": 0.0})
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.param_groups = optimizer.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, old in zip(group["params"], slow, strict=True):
                    p.copy_(old.lerp_(p, self.alpha))


class AdamWScheduleFree(torch.optim.Optimizer):
    """The name is what counts here; `stand_ins.SGDScheduleFree` has an algorithm."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "train_mode": True})

    def step(self, closure=None):
        raise AssertionError


def adam(params):
    return torch.optim.Adam(params, lr=0.05)


def zero(params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script, as torch imports it
        from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, torch.optim.Adam, lr=0.05)


WRAPPERS = {
    "SAM": (lambda params: SAM(params, torch.optim.Adam, lr=0.05), ()),
    "DPOptimizer": (lambda params: DPOptimizer(adam(params)), ("loss",)),
    "Lookahead": (lambda params: Lookahead(adam(params)), ("proximal", "project")),
    "ZeroRedundancyOptimizer": (zero, ()),
    "AdamWScheduleFree": (AdamWScheduleFree, ("decoupled", "proximal", "project")),
}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fitted(make, rules, steps=30):
    """Return the weight after some steps, and the attachment."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1).double()
    optimizer = make(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestrainWarning)  # nothing is measured
        reg = rs.attach(model, rules, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = reg.loss((model(X) - Y).square().mean())
        loss.backward()
        for p in model.parameters():
            p.grad_sample = p.grad[None]  # one sample
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure) if isinstance(optimizer, SAM) else optimizer.step()
    return model.weight.detach().clone(), reg


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "AdamWScheduleFree"])
def test_each_moment_is_that_of_the_inner_optimizer_or_refused(name, how, one_process):
    make, refused = WRAPPERS[name]
    if how in refused:
        with pytest.raises(OptimizerError, match=rf"{name} .* so how='{how}' can't be right: (use|for)"):
            fitted(make, [RULES[how]])
        return
    found, reg = fitted(make, [RULES[how]])
    right, _ = fitted(adam, [RULES[how]])
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    assert reg.state_dict()["steps"] == 30


@pytest.mark.parametrize("how", ["decoupled", "proximal", "project"])
def test_what_schedule_free_optimizers_undo_is_refused(how):
    with pytest.raises(OptimizerError, match=rf"AdamWScheduleFree .* so how='{how}' can't be right"):
        fitted(AdamWScheduleFree, [RULES[how]])


def test_strengths_move_once_a_step_of_a_wrapper(one_process):
    for name in ("SAM", "ZeroRedundancyOptimizer"):
        strength = rs.schedules.Linear(0.0, 1.0, 10)
        _, reg = fitted(WRAPPERS[name][0], [(strength * rs.L2()).on("weight", how="gradient", name="grows")], steps=5)
        assert reg.strengths()["grows"] == pytest.approx(0.5)


def test_a_target_is_reached_beneath_a_wrapper(one_process):
    rule = rs.Target(zeros=0.5, every=2) * rs.L1().on("weight", how="proximal", name="sparse")
    found, reg = fitted(zero, [rule], steps=60)
    right, alone = fitted(adam, [rule], steps=60)
    torch.testing.assert_close(found, right)
    assert reg.strengths()["sparse"] == pytest.approx(alone.strengths()["sparse"])


def test_something_else_is_no_optimizer():
    with pytest.raises(PlanError, match="takes a torch optimizer or a list of them, got str"):
        rs.attach(nn.Linear(2, 1), [RULES["decoupled"]], "adam")


# Optimizers that step copies of their own


class Masters(torch.optim.Optimizer):
    """Steps copies in float32 of weights in half precision, kept in the state from the first step on."""

    def __init__(self, params, eager=False):
        super().__init__(params, {"lr": 0.1})
        self.copies = {}
        for p in self.param_groups[0]["params"] if eager else ():
            self.copies[p] = p.detach().float().clone()

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            held = self.copies if p in self.copies else self.state[p]
            master = self.copies.get(p) if p in self.copies else held.setdefault("master", p.detach().float().clone())
            master.sub_(p.grad.float(), alpha=0.1)
            p.copy_(master)


class Averaged(torch.optim.SGD):
    """SGD that keeps an average of the weights, which begins as a copy: it reads the parameters."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, lr=0.1)
        self.average = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p, mean in zip(self.param_groups[0]["params"], self.average, strict=True):
            mean.lerp_(p, 0.1)


def stepped(make, rule, steps=4, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False, dtype=dtype)
    optimizer = make(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestrainWarning)
        rs.attach(model, rule, optimizer)
    for _ in range(steps):
        model.weight.grad = torch.full_like(model.weight, 0.5)
        optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize("eager", [True, False], ids=["from the beginning", "from the first step"])
@pytest.mark.parametrize("how", ["decoupled", "proximal", "project"])
def test_a_step_of_copies_is_found_out(how, eager):
    rule = rs.Box(-0.1, 0.1).on("weight") if how == "project" else RULES[how]
    with pytest.raises(OptimizerError, match="Masters steps a copy of 'weight' and writes it over the parameter"):
        stepped(lambda params: Masters(params, eager), rule)


def test_gradients_reach_copies():
    found = stepped(lambda params: Masters(params, True), RULES["gradient"], steps=1, dtype=torch.float32)
    right = stepped(lambda params: torch.optim.SGD(params, lr=0.1), RULES["gradient"], steps=1, dtype=torch.float32)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("how", ["decoupled", "proximal", "project"])
def test_other_copies_of_weights_are_no_reason_to_refuse(how):
    found = stepped(Averaged, RULES[how], dtype=torch.float64)
    if how != "proximal":  # whose steps are measured
        right = stepped(lambda params: torch.optim.SGD(params, lr=0.1), RULES[how], dtype=torch.float64)
        torch.testing.assert_close(found, right)


class SOAP(torch.optim.Adam):
    """The name is what counts here."""

    def step(self, closure=None):
        return torch.optim.Adam.step(self, closure)


def attached_silently(make, rule):
    model = nn.Linear(4, 3, bias=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rs.attach(model, rule, make(model.parameters()))
    return [str(one.message) for one in told]


@pytest.mark.parametrize("make", [lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0), SOAP], ids=["Muon", "SOAP"])
def test_rules_by_entry_are_warned_of_where_the_optimizer_moves_entries_together(make):
    for rule in (rs.Box(0, 1).on("weight"), 0.1 * rs.L1().on("weight", how="proximal")):
        told = attached_silently(make, rule)
        assert any("moves entries together" in one and "use Adam or SGD" in one for one in told), told
    for rule in (rs.UnitNorm(per="out").on("weight"), 0.1 * rs.L1().on("weight", how="gradient")):
        assert not attached_silently(make, rule)
