"""Plans that mix all families: in eager code at random, in compiled code by hand."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

import restrain as rs
from mixtures import OPTIMIZERS, batch, begin, fresh, problems, quiet, traces, trained
from restrain.errors import RestrainError

THOROUGH = settings(max_examples=1000, suppress_health_check=list(HealthCheck))


def accepted(name, optimizer, rules):
    """Those rules that can join the ones before, and train with them; a refused one leaves nothing behind."""

    def attached(plan):
        model = fresh(name)
        opt = OPTIMIZERS[optimizer](model.parameters())
        clean = traces(model, opt)
        error = refusal(lambda: rs.attach(model, plan, opt).detach())
        assert traces(model, opt) == clean
        return error

    def training(plan):
        return refusal(lambda: trained(name, optimizer, plan).detach())

    taken = joined(rules, attached)
    return taken if taken and training(taken) is None else joined(taken, training)


def joined(rules, refused):
    """One after the other, those that aren't refused beside the ones before."""
    taken = []
    for rule in rules:
        error = refused([*taken, rule])
        assert error is None or len(error) > 20
        taken += [rule] * (error is None)
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
    twins = [pickle.loads(pickle.dumps(run.model))]
    if not (parametrized and run.name == "lstm"):  # torch doesn't copy such a one: it holds a tensor with a graph
        twins.append(copy.deepcopy(run.model))
    with torch.no_grad():
        expected = run.model(x)
        for twin in twins:
            torch.testing.assert_close(twin(x), expected)
        for twin in twins[: 1 if parametrized else 2]:  # noise and hooks are dead in it
            torch.testing.assert_close(twin.train()(x), expected)
            assert twin.state_dict().keys() == fresh(run.name).state_dict().keys()
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
    found = second.weights()
    for name in [key for key in found if key.endswith("in_proj_bias")]:
        # the gradient of the keys' bias is nothing but rounding, and Adam makes steps of any size of it
        found[name], expected = found[name].clone(), dict(expected)
        third = found[name].numel() // 3
        found[name][third : 2 * third] = expected[name][third : 2 * third]
    same(found, expected, rtol=1e-12, atol=1e-14)  # the first forward of an attachment penalises copies


def random(rule):
    """Noise, and derivatives that may be estimated by chance."""
    return isinstance(rule.what, rs.Noise) or getattr(getattr(rule.what, "leaf", None), "estimator", "exact") != "exact"


def of_loss(rule):
    return bool(getattr(getattr(rule.what, "leaf", None), "of_loss", False))


def halves(plan):
    """Two plans that together are this one, without what is random; of what acts on the weights, all in the second."""
    plan = [rule for rule in plan if not random(rule)]
    late = [rule for rule in plan if rule.how not in ("loss", "gradient")]
    early = [rule for rule in plan if rule.how in ("loss", "gradient")]
    early.sort(key=of_loss, reverse=True)
    first = max(len(early) // 2, sum(map(of_loss, early)))
    return early[:first], early[first:] + late  # the second's loss has the first's penalties in it


def check_halves(name, optimizer, plan):
    """Two attachments are one of both; what acts on the weights themselves stays in one, after all gradients."""
    first, second = halves(plan)
    if not (first and second):
        return
    try:
        split = trained(name, optimizer, first, second)
    except rs.errors.HowError as error:
        if "would act twice" not in str(error):  # the same rule in both is refused
            raise
        return
    same(split.weights(), trained(name, optimizer, [*first, *second]).weights(), rtol=1e-9, atol=1e-9)


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
@example(problem=("lstm", "Adam", [0.1 * rs.Contractive(estimator="jvp").on(rs.outputs("lstm"), every=3)]))
@settings(suppress_health_check=list(HealthCheck))
def test_random_mixtures(problem):
    check(problem)


@pytest.mark.slow
@given(problem=problems())
@THOROUGH
def test_many_random_mixtures(problem):
    check(problem)


def test_oracles():
    right, wrong = (
        [strength * rs.L1().on(rs.outputs("1")), rs.L2().on("*", how="gradient")] for strength in (1, 1.001)
    )
    with pytest.raises(AssertionError):
        same(trained("mlp", "Adam", right).weights(), trained("mlp", "Adam", wrong).weights(), rtol=1e-9, atol=1e-9)
    run = trained("mlp", "SGD", right)
    run.model[2].register_forward_hook(lambda *args: None)
    with pytest.raises(AssertionError):
        check_detached(run)


# Compiled


def compiled(name, optimizer, plan):
    """The same training with the model compiled in one piece."""
    run = begin(name, optimizer, plan)
    run.call = torch.compile(run.model, backend="aot_eager", fullgraph=True)
    for number in range(4):
        run.step(number)
    return run


def everywhere(strength=0.01):
    """What acts at the step, of all kinds at once."""
    return [
        (strength * rs.L1()).on(rs.weights, how="proximal", every=2),
        (strength * rs.L2()).on(rs.biases, how="decoupled"),
        rs.MaxNorm(0.8).on(rs.weights, start=1),
    ]


BY_HAND = {
    "activations and steps": ("mlp", [0.1 * rs.L1().on(rs.outputs("1")), *everywhere()]),
    "group lasso, schedule": (
        "mlp",
        [
            (rs.schedules.Linear(0, 0.1, steps=3) * rs.GroupLasso("in")).on("0.weight", how="proximal"),
            (rs.schedules.Cosine(0.1, 0, steps=3) * rs.Hoyer()).on(rs.outputs("3")),
        ],
    ),
    "target": (
        "mlp",
        [
            (rs.Target(active=0.3, start=0.01, every=1) * rs.L1()).on(rs.outputs("3")),
            (rs.Target(norm=0.5, start=0.01, every=1) * rs.L2()).on("2.weight"),
        ],
    ),
    "contractive and L1": ("mlp", [0.1 * rs.Contractive(estimator="exact").on(rs.outputs("1")), *everywhere()]),
    "gradient penalty and constraint": (
        "mlp",
        [0.1 * rs.GradientPenalty(target=1.0).on(rs.outputs()), rs.NonNegative().on("4.weight")],
    ),
    "parametrised twice over": (
        "mlp",
        [
            rs.WeightNormalization().on("0.weight"),
            rs.SpectralNormalization(None).on("2.weight"),
            0.1 * rs.L1().on("0.weight"),
            0.1 * rs.Decorrelation().on(rs.outputs("1")),
        ],
    ),
    "simplex by parametrize": ("mlp", [rs.Simplex(per="out").on("4.weight", how="parametrize")]),
    "channels": (
        "conv",
        [
            0.1 * rs.Decorrelation(per=1).on(rs.outputs("0")),
            0.1 * rs.GroupLasso("channel").on("0.weight", how="gradient"),
            rs.UnitNorm("filter").on("0.weight"),
        ],
    ),
    "running mean": (
        "conv",
        [0.1 * rs.KLSparsity(0.1, 0.9, per=1).on(rs.outputs("0", via=torch.sigmoid)), *everywhere()],
    ),
    "tied": ("tied", [0.1 * rs.KLSparsity(0.2).on(rs.outputs("act")), rs.Symmetric().on("encoder.weight")]),
    "attention": (
        "transformer",
        [
            0.1 * rs.L1().on(rs.outputs("block", lengths="lengths")),
            0.1 * rs.Orthogonality().on("block.self_attn.in_proj_weight"),
            0.1 * rs.Entropy().on(rs.outputs("head")),
        ],
    ),
    "distances": (
        "transformer",
        [
            0.1 * rs.Distance(decay=0.5).on(rs.weights),
            0.1 * rs.Distance(rs.L1()).on("head.weight", how="proximal"),
            0.1 * rs.StateChange().on(rs.outputs("block", lengths="lengths")),
        ],
    ),
}


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("title", BY_HAND)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_mixtures(title, optimizer):
    name, plan = BY_HAND[title]
    expected, found = trained(name, optimizer, plan), compiled(name, optimizer, plan)
    same(found.weights(), expected.weights(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.losses, expected.losses)
    for key, value in expected.regs[0].values().items():
        assert found.regs[0].values()[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key
