"""Random plans on random models in random environments: equal to the plain run, or refused before the first step."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import restrain as rs
from mixtures import batch, begin, problems, quiet, trained
from restrain.errors import RestrainError
from test_mixtures import accepted, random, same


def after(run, steps=4, between=lambda run: None):
    """A run after some steps; `between` comes after each."""
    for number in range(steps):
        run.step(number)
        between(run)
    return run


def checkpointed(name, optimizer, plan):
    run = begin(name, optimizer, plan)
    run.call = lambda x, **lengths: checkpoint(run.model, x, use_reentrant=False, **lengths)
    return after(run)


def called_functionally(name, optimizer, plan):
    run = begin(name, optimizer, plan)
    run.call = lambda x, **lengths: functional_call(run.model, dict(run.model.named_parameters()), (x,), lengths)
    return after(run)


def copied(name, optimizer, plan):
    """Copies of the model are made, and used, in between."""

    def use(run):
        x, _ = batch(name)
        twin = pickle.loads(pickle.dumps(run.model))
        twin(x).sum().backward()
        if name != "lstm":
            copy.deepcopy(run.model)(x)

    return after(begin(name, optimizer, plan), between=use)


def evaluated(name, optimizer, plan):
    """Evaluation passes and traces are made in between."""

    def look(run):
        x, _ = batch(name)
        run.model.eval()
        with torch.no_grad():
            run.model(x)
            run.regs[0].values()
        run.model.train()

    return after(begin(name, optimizer, plan), between=look)


def together(name, optimizer, plan):
    """The optimizer moves all tensors in one call."""
    run = begin(name, optimizer, plan)
    for group in run.optimizer.param_groups:
        group["foreach"] = True
    return after(run)


def reloaded(name, optimizer, plan):
    """The optimizer's and the model's states go out and come in again."""

    def reload(run):
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
        run.regs[0].load_state_dict(copy.deepcopy(run.regs[0].state_dict()))

    return after(begin(name, optimizer, plan), between=reload)


def compiled(name, optimizer, plan):
    """Without what draws at random: its order may differ."""
    torch.compiler.reset()
    run = begin(name, optimizer, plan)
    run.call = torch.compile(run.model, backend="aot_eager")
    try:
        return after(run)
    finally:
        torch.compiler.reset()


ENVIRONMENTS = [checkpointed, called_functionally, copied, evaluated, together, reloaded]


@contextmanager
def noting_steps(taken):
    """Notes each step of an optimizer."""
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: taken.append(optimizer))
    try:
        yield
    finally:
        handle.remove()


@quiet
def check(problem, environment):
    name, optimizer, rules = problem
    if environment is compiled:
        rules = [rule for rule in rules if not random(rule)]
    plan = accepted(name, optimizer, rules)
    if not plan:
        return
    taken, found, refusal = [], None, ""
    try:
        with noting_steps(taken):
            found = environment(name, optimizer, plan)
    except RestrainError as error:
        refusal = str(error)
    if found is None:
        assert len(refusal) > 20
        assert not taken, f"refused after a step: {refusal}"
        return
    compare(found, trained(name, optimizer, plan))


def compare(found, expected):
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-8, atol=1e-9)
    theirs, mine = expected.weights(), found.weights()
    for key in [key for key in mine if key.endswith("in_proj_bias")]:
        # the gradient of the keys' bias is nothing but rounding, and Adam makes steps of any size of it
        third = mine[key].numel() // 3
        mine[key][third : 2 * third] = theirs[key][third : 2 * third]
    same(mine, theirs, rtol=1e-8, atol=1e-9)


@given(problem=problems(), environment=st.sampled_from(ENVIRONMENTS))
@settings(max_examples=50, suppress_health_check=list(HealthCheck), deadline=None)
def test_random_mixtures_everywhere(problem, environment):
    check(problem, environment)


@pytest.mark.slow
@given(problem=problems(), environment=st.sampled_from(5 * ENVIRONMENTS + [compiled]))
@settings(max_examples=1000, suppress_health_check=list(HealthCheck), deadline=None)
def test_many_random_mixtures_everywhere(problem, environment):
    check(problem, environment)


def test_a_wrong_strength_is_seen():
    plans = [[strength * rs.L1().on(rs.outputs("1")), rs.L2().on("*", how="gradient")] for strength in (1, 1.001)]
    for environment in ENVIRONMENTS:
        with pytest.raises(AssertionError):
            compare(environment("mlp", "Adam", plans[0]), trained("mlp", "Adam", plans[1]))
        compare(environment("mlp", "Adam", plans[0]), trained("mlp", "Adam", plans[0]))
