"""What isn't folded into the optimizer's pass, what is beside other things in a run, and when."""

import copy
import weakref

import pytest
import torch
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

import restrain as rs
from folding import ALL, SHAPES, Run, adam, both, give_gradients, model_of, plain_sgd, same
from restrain.engine.backends import c_compiler
from restrain.engine.step import folded

pytestmark = pytest.mark.skipif(c_compiler.compiled("int something;") is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Folded from the first step on that can be, without a compilation of the rules' own passes."""
    monkeypatch.setattr(folded, "COST", 0)


# What isn't folded


class Subclass(Adam):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def watched(run):
    with Watching():
        run.optimizer.step()


def scaled(run):
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for p in run.model.parameters():
        p.grad.mul_(2)
    run.optimizer.step()
    del run.optimizer.grad_scale, run.optimizer.found_inf


REFUSED = {
    "a subclass": (Subclass, ALL, {}),
    "a loss scaler": (lambda ps: Adam(ps, lr=0.05, fused=True), ALL[0], {"step": scaled}),
    "a mode": (adam, ALL, {"step": watched}),
    "rules that aren't written in C": (adam, (0.1 * rs.MCP(0.5)).on("*", how="gradient"), {}),
    "no learning rate": (lambda ps: SGD([{"params": list(ps), "lr": 0.0}]), ALL[0], {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_left_to_torch(name):
    make, plan, how = REFUSED[name]
    assert not any(both(make, plan, **how).folded)


@pytest.mark.parametrize("when", ["before", "after"])
def test_left_to_torch_where_others_could_tell(when):
    run, seen = Run(plain_sgd, ALL[0]), []
    hook = lambda *_: seen.append(run.model.p0.detach().clone())  # noqa: E731
    run.optimizer.register_step_pre_hook(hook)
    assert not any(run.steps(2).folded)
    run = Run(lambda ps: (made := plain_sgd(ps), made.register_step_post_hook(hook))[0], ALL[0])
    assert not any(run.steps(2).folded)


def test_left_to_torch_where_parameters_share_memory():
    def tied():
        model = model_of([(3, 5), (3, 5), (4,)])
        model.p1.data = model.p0.data
        return model

    runs = [
        Run(adam, (0.02 * rs.L1()).on("p0", how="proximal"), compile, model=tied()).steps(4)
        for compile in ("auto", False)
    ]
    same(*runs)
    assert not any(runs[0].folded)


def test_nothing_is_hidden_from_later_hooks():
    run, seen = Run(adam, ALL[2]), []

    def look(optimizer, args, kwargs):
        groups = [len(group["params"]) for group in optimizer.param_groups]
        seen.append((groups, [p.grad.clone() for p in run.model.parameters()], run.model.p0.detach().clone()))

    run.optimizer.register_step_post_hook(look)
    run.steps(3)
    assert run.folded == [0, 6, 6]
    assert seen[-1][0] == [len(SHAPES)]
    assert torch.equal(seen[-1][2], run.model.p0)
    assert all(torch.equal(p.grad, known) for p, known in zip(run.model.parameters(), seen[-1][1], strict=True))


def test_left_to_torch_where_a_target_goes_by_gradients():
    target = rs.Target(gradient_share=0.3, every=1, start=0.1) * rs.L2()
    run = both(plain_sgd, target.on("p0", how="gradient", name="rule"))
    assert not any(run.folded)
    assert run.reg.strengths()["rule"] != 0.1


# Together with the rest


def test_groups_frozen_ones_and_those_without_gradient():
    def make(ps):
        ps = list(ps)
        groups = [{"params": ps[:2], "lr": 0.02}, {"params": ps[2:4]}, {"params": ps[4:], "lr": 0.0}]
        return Adam(groups, lr=0.05, amsgrad=True)

    def before(run):
        run.model.p0.requires_grad_(run.step != 2)
        if run.step % 2:
            run.model.p3.grad = None
        if run.step == 5:
            run.optimizer.param_groups[2]["lr"] = 0.1

    run = both(make, ALL, 9, before=before)
    assert run.folded == [0, 3, 3, 2, 4, 5, 6, 5, 6]


def test_parameters_without_rules_are_stepped_by_torch():
    run = both(adam, (0.02 * rs.L1()).on(["p0", "p3"], how="proximal"))
    assert run.folded == [0, 2, 2, 2]


def test_schedules_and_rules_that_rest():
    def make(ps):
        optimizer = SGD(ps, lr=0.1, momentum=0.9)
        optimizer.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return optimizer

    plan = [
        (rs.schedules.Linear(0.0, 0.1, steps=5) * rs.L2()).on("*", how="gradient", every=2),
        (0.02 * rs.L1()).on("p[0-3]", how="proximal", every=3),
    ]
    run = both(make, plan, 9, before=lambda run: run.optimizer.schedule.step() if run.step else None)
    assert run.folded == [0, 0, 6, 4, 6, 0, 6, 0, 6]


def test_momentum_that_changes_is_followed():
    def before(run):
        run.optimizer.param_groups[0]["momentum"] = 0.5 + 0.05 * run.step

    run = both(lambda ps: SGD(ps, lr=0.1, momentum=0.5), ALL[2], 6, before=before)
    assert run.reg.state_dict()["metrics"][0][1].keys() == {"gain"}


def test_constraints_that_meet_and_noise_on_gradients():
    plan = [
        rs.GradientNoise(0.1).on("*"),
        (0.1 * rs.L1()).on("p0", how="proximal"),
        rs.NonNegative().on("p0"),
        rs.MaxNorm(0.5, per=0).on("p0"),
    ]
    runs = []
    for compile in ("auto", False):
        torch.manual_seed(0)
        runs.append(Run(adam, plan, compile).steps(4))
    same(*runs)
    assert runs[0].folded == [0, 1, 1, 1]


def test_several_optimizers():
    model = model_of()
    ps, runs = list(model.parameters()), []
    for compile in ("auto", False):
        own = copy.deepcopy(model)
        ps = list(own.parameters())
        given = [SGD(ps[:3], lr=0.1), Adam(ps[3:], lr=0.1)]
        reg = rs.attach(own, ALL[2], given, compile=compile)
        for number in range(4):
            give_gradients(own, number)
            for optimizer in given:
                optimizer.step()
        runs.append(ps)
        assert [bool(stepper._done) for stepper in reg._steppers] == [bool(compile)] * 2
    assert all(torch.allclose(*pair) for pair in zip(*runs, strict=True))


def test_a_rule_that_fails_leaves_all_as_it_was():
    class Failing(rs.Penalty):
        def __call__(self, x):
            if x.numel() == 40:
                raise RuntimeError("on purpose")
            return x.sum()

    plan = [(0.1 * rs.L1()).on("p0", how="proximal"), Failing().on("p4", how="gradient")]
    run = Run(plain_sgd, plan)
    was = run.model.p0.detach().clone()
    with pytest.raises(RuntimeError, match="on purpose"):
        run.steps(1)
    assert torch.equal(run.model.p0, was)


def test_a_hook_that_fails_leaves_a_step_that_was_done_once():
    run, fails = Run(adam, ALL[2]), [False]

    def fail(*_):
        if fails[0]:
            raise RuntimeError("on purpose")

    run.optimizer.register_step_post_hook(fail)
    run.steps(2)
    fails[0] = True
    with pytest.raises(RuntimeError, match="on purpose"):
        run.steps(1)
    known = Run(adam, ALL[2], False).steps(3)
    same(run, known)
    assert all(p.grad is not None for p in run.model.parameters())


def test_no_gradient_is_kept():
    run = Run(adam, ALL[2]).steps(3)
    gone = [weakref.ref(p.grad) for p in run.model.parameters()]
    run.optimizer.zero_grad()
    assert run.folded[-1]
    assert not any(reference() is not None for reference in gone)


def test_the_state_is_that_of_torch():
    run = Run(adam, ALL[2]).steps(3)
    other = adam(copy.deepcopy(run.model).parameters())
    other.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.reg.detach()
    for optimizer in (run.optimizer, other):
        for p in (ps := optimizer.param_groups[0]["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), ps, strict=True))


# When


def test_compiled_at_once(monkeypatch):
    monkeypatch.setattr(folded, "COST", float("inf"))
    assert Run(plain_sgd, ALL, True).steps(2).folded == [6, 6]
    assert Run(plain_sgd, ALL, "auto").steps(2).folded == [0, 0]


def test_auto_folds_when_it_pays_and_a_resumed_run_is_bit_identical(monkeypatch):
    entries = sum(p.numel() for p in model_of().parameters())
    monkeypatch.setattr(folded, "COST", 4 * (folded.EACH + entries))
    whole = Run(adam, ALL, "auto").steps(8)
    assert whole.folded == [0, 0, 0, 0, 6, 6, 6, 6]
    for at in (3, 6):
        first = Run(adam, ALL, "auto").steps(at)
        model = copy.deepcopy(first.model)
        second = Run(adam, ALL, "auto", model=model)
        second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        second.reg.load_state_dict(first.reg.state_dict())
        second.step = at
        second.steps(8 - at)
        assert second.folded == whole.folded[at:]
        assert all(torch.equal(*pair) for pair in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(c_compiler, "loop", lambda *_: None)
    monkeypatch.setattr(folded, "loop", lambda *_: None)
    monkeypatch.setattr(c_compiler, "compiled", lambda *_: None)
    run = Run(adam, ALL[2], "auto").steps(3)
    same(run, Run(adam, ALL[2], False).steps(3))
    assert not any(run.folded)


@pytest.mark.slow
def test_a_compiled_step_is_left_to_torch():
    def make(ps):
        optimizer = SGD(ps, lr=0.1)
        optimizer.compiled = torch.compile(optimizer.step, backend="eager")
        return optimizer

    run = both(make, ALL[2], step=lambda run: run.optimizer.compiled())
    assert not any(run.folded)
