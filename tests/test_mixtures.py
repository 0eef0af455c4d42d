"""Plans that mix all families: in eager code at random, in compiled code by hand."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import restrain as rs
from mixtures import OPTIMIZERS, batch, begin, fresh, problems, quiet, traces, trained
from restrain.errors import RestrainError

THOROUGH = settings(max_examples=1000, suppress_health_check=list(HealthCheck))


def accepted(name, optimizer, rules):
    """Those rules that can join the ones before; a refused one leaves nothing behind."""
    taken = []
    for rule in rules:
        model = fresh(name)
        opt = OPTIMIZERS[optimizer](model.parameters())
        clean = traces(model, opt)
        error = refusal(lambda rule=rule, model=model, opt=opt: rs.attach(model, [*taken, rule], opt).detach())
        assert traces(model, opt) == clean
        error = error or refusal(lambda rule=rule: trained(name, optimizer, [*taken, rule]).detach())
        assert error is None or len(error) > 20
        if error is None:
            taken.append(rule)
    return taken


def refusal(run):
    """What one of our errors says, or None."""
    try:
        run()
    except RestrainError as error:
        return str(error)
    return None


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def check_training(name, optimizer, plan):
    """Finite, printed, and the same when it is run again, from the plan on file too."""
    run = trained(name, optimizer, plan)
    (reg,) = run.regs
    assert all(tensor.isfinite().all() for tensor in run.weights().values())
    assert torch.tensor(run.losses).isfinite().all()
    number = sum(isinstance(rule.what, rs.Penalty | rs.NetworkPenalty) or hasattr(rule.what, "leaf") for rule in plan)
    assert len(reg.values()) == number
    assert len({rule.name for rule in reg.plan}) == len(plan)
    assert str(reg).count("\n") >= len(plan)
    same(trained(name, optimizer, plan).weights(), run.weights())
    data = reg.plan.to_dict()
    again = rs.Plan.from_dict(data)
    assert again.to_dict() == data
    second = trained(name, optimizer, again)
    same(second.weights(), run.weights())
    return run


def check_copies(run):
    """What is copied or pickled computes the same without us."""
    parametrized = any(rule.how == "parametrize" for rule in run.regs[0].plan)
    x, _ = batch(run.name)
    run.model.eval()
    twins = []
    if not (parametrized and run.name == "lstm"):  # nor does torch copy such a one: it holds a tensor with a graph
        twins.append(copy.deepcopy(run.model))
    if not parametrized:  # torch doesn't pickle these
        twins.append(pickle.loads(pickle.dumps(run.model)))
    with torch.no_grad():
        expected = run.model(x)
        for twin in twins:
            torch.testing.assert_close(twin(x), expected)
            if not parametrized:  # noise and hooks are dead in it
                torch.testing.assert_close(twin.train()(x), expected)
    run.model.train()


def check_detached(run):
    """Nothing is left, and the weights are those that the forward saw."""
    x, _ = batch(run.name)
    clean = fresh(run.name)
    with torch.no_grad():
        before = run.model.eval()(x)
        run.detach()
        torch.testing.assert_close(run.model(x), before)
        run.model.train()
    opt = OPTIMIZERS["SGD"](clean.parameters())
    hooks, _, kept, keys, _ = traces(clean, opt)
    found = traces(run.model, run.optimizer)
    assert found[0] == hooks
    assert found[2:4] == (kept, keys)
    assert all(count == 0 for _, count in found[1])


def check_resumed(name, optimizer, plan, expected):
    """Two steps, everything to a file, and two more in a new model."""
    first = trained(name, optimizer, plan, steps=2)
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.optimizer.state_dict(), first.regs[0].state_dict()], file)
    file.seek(0)
    second, saved = begin(name, optimizer, plan), torch.load(file, weights_only=True)
    for what, state in zip((second.model, second.optimizer, second.regs[0]), saved, strict=True):
        what.load_state_dict(state)
    for number in (2, 3):
        second.step(number)
    same(second.weights(), expected)


def random(rule):
    """Noise, and derivatives that may be estimated by chance."""
    return isinstance(rule.what, rs.Noise) or getattr(getattr(rule.what, "leaf", None), "estimator", "exact") != "exact"


def check_halves(name, optimizer, plan):
    """Two attachments are one of both; what acts on the weights themselves stays in one, after all gradients."""
    plan = [rule for rule in plan if not random(rule)]
    late = [rule for rule in plan if rule.how not in ("loss", "gradient")]
    early = [rule for rule in plan if rule.how in ("loss", "gradient")]
    halves = early[::2], early[1::2] + late
    if all(halves):
        whole, split = trained(name, optimizer, plan), trained(name, optimizer, *halves)
        same(split.weights(), whole.weights(), rtol=1e-9, atol=1e-9)


@quiet
def check(problem):
    name, optimizer, rules = problem
    plan = accepted(name, optimizer, rules)
    if not plan:
        return
    run = check_training(name, optimizer, plan)
    expected = run.weights()
    check_copies(run)
    check_detached(run)
    check_resumed(name, optimizer, plan, expected)
    check_halves(name, optimizer, plan)


@given(problem=problems())
@settings(suppress_health_check=list(HealthCheck))
def test_random_mixtures(problem):
    check(problem)


@pytest.mark.slow
@given(problem=problems())
@THOROUGH
def test_many_random_mixtures(problem):
    check(problem)
