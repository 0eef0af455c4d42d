"""Attachments over their life: interruptions, passes in between, copies, detaching, long trainings."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tests.engine.attach.test_training import batch, hand_written, make, plan, reference_training, sgd, trained
from tests.engine.distributed.test_ddp import Net
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks

import restrain as rs
from restrain.engine.step.clock import _watchers


def test_validation_and_no_grad_passes_in_between_leave_no_trace():
    model, (x, y) = make(), batch()
    optimizer = sgd(model)
    reg = rs.attach(model, plan(), optimizer)
    for _ in range(5):
        model.eval()
        model(x * 9)
        with torch.no_grad():
            reg.loss(F.cross_entropy(model(x * 8), y))
            model.train()
            model(x * 7)
        with torch.inference_mode():
            model(x * 6)
        model.train()
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    torch.testing.assert_close(trained(model), reference_training())


def test_a_forward_that_fails_leaves_no_trace():
    model, (x, y) = make(), batch()
    optimizer = sgd(model)
    reg = rs.attach(model, plan(), optimizer)
    fails = [False]

    def fail(module, args):
        if fails[0]:
            raise KeyError("by the user")

    model[2].register_forward_pre_hook(fail)
    for _ in range(5):
        fails[0] = True
        with pytest.raises(KeyError):
            model(x * 3)
        fails[0] = False
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    torch.testing.assert_close(trained(model), reference_training())


def test_exceptions_in_backward_and_in_a_users_penalty():
    class Fails(rs.Penalty, register=False):
        broken = False

        def __call__(self, w):
            if Fails.broken:
                raise KeyError("by the user")
            return w.sum() * 0

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyError("in backward")

    model, (x, y) = make(), batch()
    optimizer = sgd(model)
    reg = rs.attach(model, [*plan(), Fails().on(rs.outputs("0"))], optimizer)
    for _ in range(5):
        Fails.broken = True
        with pytest.raises(KeyError):
            model(x * 5)
        Fails.broken = False
        with pytest.raises(KeyError):
            reg.loss(F.cross_entropy(Stop.apply(model(x * 2)), y)).backward()
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    torch.testing.assert_close(trained(model), reference_training())


def test_copies_pickles_and_averages_carry_no_live_hooks():
    model, (x, y) = make(), batch()
    optimizer = sgd(model)
    model.reg = rs.attach(model, [*plan(), rs.GaussianNoise(3.0).on(rs.outputs("0"))], optimizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module):
        assert other.state_dict().keys() == model.state_dict().keys()
        other.train()
        assert torch.equal(other(x), other(x)), "no noise: the copy is free of the rules"
        with pytest.raises(rs.errors.DetachedError, match="copy"):
            other.reg.loss(F.cross_entropy(other(x), y))
        assert len(other.reg.plan) == 3
    assert not torch.equal(model(x), model(x))
    model.reg.loss(F.cross_entropy(model(x), y)).backward()


def test_attach_and_detach_leave_no_trace():
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    before = trained(model)
    keys = set(vars(model))

    def hooks():
        places = [d for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
        steps = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        return sum(map(len, places + steps + [_global_optimizer_post_hooks]))

    for tripwire in list(_watchers.clocks):  # of attachments in other tests
        tripwire.remove()
    rules = [*plan(), *plan("proximal"), rs.Dropout(0.5).on(rs.inputs()), rs.MaxNorm(1e6).on("*.weight")]
    for _ in range(1000):
        with rs.attach(model, rules, optimizer):
            assert hooks() > 0
    with pytest.raises(KeyError), rs.attach(model, rules, optimizer) as reg:
        raise KeyError
    reg.detach()
    assert hooks() == 0
    assert set(vars(model)) == keys
    torch.testing.assert_close(trained(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_two_attachments_add_up_and_declared_rules_count_once():
    model, (x, y) = make(), batch()
    rs.regularized(model[0], weight=0.7 * rs.L2())
    first, second = (
        rs.attach(model, 0.1 * rs.L2().on("*.weight")),
        rs.attach(model, 0.2 * rs.L2().on("*.weight")),
    )
    loss = second.loss(first.loss(F.cross_entropy(model(x), y)))
    weights = [model[0].weight, model[2].weight]
    expected = F.cross_entropy(model(x), y) + 0.3 * rs.L2()(weights) + 0.7 * rs.L2()(model[0].weight)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(rs.errors.PlanError, match="nothing to attach"):
        rs.attach(model)
    first.detach()
    torch.testing.assert_close(rs.attach(model).penalty(), 0.7 * rs.L2()(model[0].weight))


def test_a_constraint_joins_an_earlier_penalty():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, 0.1 * rs.L1().on("*.weight", how="gradient"), optimizer)
    rs.attach(model, rs.MaxNorm(1e-3).on("*.weight"), optimizer)
    assert all(float(layer.weight.detach().norm(dim=1).max()) <= 1.001e-3 for layer in (model[0], model[2]))


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def long_training(steps, run_of=lambda model: model, reentrant=None):
    """Yields the number of the step, after each step."""
    torch.manual_seed(0)
    model = Net(reentrant)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rules = [
        1e-3 * rs.L1().on(rs.outputs("relu")),
        1e-3 * rs.L2().on("*.weight"),
        1e-4 * rs.L2().on("first.weight", how="gradient"),
        1e-4 * rs.L1().on("head.weight", how="proximal"),
        rs.GaussianNoise(0.1).on(rs.outputs("first")),
        rs.MaxNorm(3.0).on("*.weight"),
    ]
    reg = rs.attach(model, rules, optimizer)
    run = run_of(model)
    x, y = torch.randn(8, 4, requires_grad=True), torch.randint(3, (8,))
    for step in range(steps):
        reg.loss(F.cross_entropy(run(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident():
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_memory_is_flat_over_ten_thousand_steps(reentrant, compiled):
    def run_of(model):
        return torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

    marks = {}
    for step in long_training(10_000, run_of, reentrant):
        if step in (1000, 5000, 9999):
            marks[step] = (live_tensors(), resident())
    assert marks[1000][0] >= marks[5000][0] >= marks[9999][0], "tensors; those of earlier tests may go meanwhile"
    assert marks[9999][1] - marks[1000][1] < 2e6, "bytes"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_no_tensor_is_left_over_by_a_step(reentrant):
    counts = [live_tensors() for step in long_training(60, reentrant=reentrant) if step % 10 == 9]
    assert counts[-1] <= min(counts[1:]), counts  # tensors of earlier tests may go meanwhile, none may come


def leak(kept=[]):  # noqa: B006  a list that grows, on purpose
    kept.append(torch.zeros(1))


def test_the_counting_of_tensors_notices_a_leak():
    before = live_tensors()
    leak()
    assert live_tensors() == before + 1


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_nothing_is_compiled_anew_after_the_second_step(reentrant):
    compiled = []

    def counting(graph, inputs):
        compiled.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    after = [
        len(compiled)
        for _ in long_training(12, lambda m: torch.compile(m, backend=counting, fullgraph=True), reentrant)
    ]
    assert after[0] >= 1
    assert after[1] == after[-1], after


def test_a_whole_training_leaves_the_model_free_to_be_collected():
    alive = []

    def remember(model):
        alive.append(weakref.ref(model))
        return model

    for _ in long_training(3, remember):
        pass
    gc.collect()
    assert alive[0]() is None


def test_a_forward_that_no_loss_depends_on_does_not_count():
    model, (x, y) = make(), batch()
    reg = rs.attach(model, plan())
    kept = model(9 * x)  # a look at a batch before training, in train mode and with gradients
    loss = reg.loss(F.cross_entropy(model(x), y))
    torch.testing.assert_close(loss, hand_written(model, x, y))
    assert kept.shape == (8, 3)
    both = reg.loss(F.cross_entropy(model(x), y) + model(2 * x).sum())
    h, k = torch.tanh(model[0](x)), torch.tanh(model[0](2 * x))
    activations = 0.2 * (h.square().sum() + k.square().sum()) / len(x) / 2
    weights = hand_written(model, x, y) - F.cross_entropy(model[2](h), y) - 0.2 * h.square().sum() / len(x)
    torch.testing.assert_close(both, F.cross_entropy(model[2](h), y) + model[2](k).sum() + activations + weights)


def test_an_attachment_that_fails_leaves_no_trace():
    class Fails(rs.Constraint, register=False):
        def project(self, w):
            raise KeyError("by the user")

    model = make()
    optimizer = sgd(model)
    with pytest.raises(KeyError):
        rs.attach(model, [*plan(), Fails().on("0.weight")], optimizer)
    places = [d for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
    assert sum(map(len, [*places, optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks])) == 0
    assert all(tripwire.model() is not model for tripwire in _watchers.clocks)
