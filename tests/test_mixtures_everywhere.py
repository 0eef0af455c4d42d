"""Random plans on random models in random environments: equal to the plain run, or refused before the first step."""

import copy
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.test_mixtures import accepted, halves, of_loss, random, same
from torch import nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import restrain as rs
from mixtures import KINDS, batch, begin, problems, quiet, trained
from restrain.errors import RestrainError
from restrain.penalties.entrywise import Entrywise


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


def accumulated(name, optimizer, plan):
    """In micro-batches of equal size."""
    run = begin(name, optimizer, plan)
    run.parts = 5 if name == "lstm" else 2
    return after(run)


def split(name, optimizer, plan):
    """In two attachments."""
    return after(begin(name, optimizer, *filter(None, halves(plan))))


def freeze(name, model):
    model.get_parameter(KINDS[name].weights[-1]).requires_grad_(False)


def frozen(name, optimizer, plan):
    """The last weight is frozen before the rules are attached."""
    return after(begin(name, optimizer, plan, prepare=partial(freeze, name)))


def frozen_later(name, optimizer, plan):
    """And after."""
    run = begin(name, optimizer, plan)
    freeze(name, run.model)
    return after(run)


def clipped(name, optimizer, plan, clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1)):
    """By the norm of all gradients."""
    run = begin(name, optimizer, plan)
    run.clip = clip
    return after(run)


def by_hand(parameters):
    norm = sum(p.grad.square().sum() for p in parameters).sqrt()
    for p in parameters:
        p.grad.mul_((0.1 / (norm + 1e-6)).clamp(max=1))


def of_samples(rule):
    """Whether a rule is on parameters, or gives the same for the whole batch as for its parts on average."""
    leaf = getattr(rule.what, "leaf", rule.what)
    by_sample = isinstance(leaf, Entrywise | rs.Contractive) and not getattr(rule.where, "padded", False)
    return not random(rule) and not of_loss(rule) and (by_sample or not rule.at_places)


def certain(plan):
    return [rule for rule in plan if not random(rule)]


def any_number_of_forwards(plan):
    """Without the power method, which goes on by a step at each forward, recomputations too (torch's own does so)."""
    return [rule for rule in plan if not getattr(rule.what, "iterations", None)]


def unmoved(plan):
    """Without constraints, which move at attach what isn't frozen, and parametrised weights, whose names go."""
    return [rule for rule in plan if rule.how not in ("parametrize", "project")]


@dataclass(frozen=True)
class Environment:
    run: object  # (name, optimizer, plan) -> the run after some steps
    expected: object = trained
    fits: object = lambda plan: plan  # those rules of a plan that can be compared


ENVIRONMENTS = [
    *map(Environment, (called_functionally, copied, evaluated, together, reloaded)),
    Environment(checkpointed, fits=any_number_of_forwards),
    Environment(accumulated, fits=lambda plan: [rule for rule in any_number_of_forwards(plan) if of_samples(rule)]),
    Environment(split, lambda name, optimizer, plan: trained(name, optimizer, list(chain(*halves(plan)))), certain),
    Environment(frozen_later, frozen, unmoved),
    Environment(clipped, partial(clipped, clip=by_hand)),
]
COMPILED = Environment(compiled, fits=certain)


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
    plan = accepted(name, optimizer, environment.fits(rules))
    if not plan:
        return
    taken, found, refusal = [], None, ""
    try:
        with noting_steps(taken):
            found = environment.run(name, optimizer, plan)
    except RestrainError as error:
        refusal = str(error)
    if found is None:
        assert len(refusal) > 20
        assert not taken, f"refused after a step: {refusal}"
        return
    compare(found, environment.expected(name, optimizer, plan))


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
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch.compile itself
@given(problem=problems(), environment=st.sampled_from(5 * ENVIRONMENTS + [COMPILED]))
@settings(max_examples=1000, suppress_health_check=list(HealthCheck), deadline=None)
def test_many_random_mixtures_everywhere(problem, environment):
    check(problem, environment)


def test_a_wrong_strength_is_seen():
    plans = [[strength * rs.L1().on(rs.outputs("1")), rs.L2().on("*", how="gradient")] for strength in (1, 1.001)]
    for environment in ENVIRONMENTS:
        with pytest.raises(AssertionError):
            compare(environment.run("mlp", "Adam", plans[0]), environment.expected("mlp", "Adam", plans[1]))
        compare(environment.run("mlp", "Adam", plans[0]), environment.expected("mlp", "Adam", plans[0]))
