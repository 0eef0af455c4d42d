"""Rules on activations mean the same in every way that PyTorch runs a model.

Each case compares the gradients of all parameters with those of a hand-written single-process eager loss in float64.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import restrain as rs


class Net(nn.Module):
    """Two blocks that may be checkpointed, with a ReLU that is used twice and may overwrite its input."""

    def __init__(self, reentrant=None, inplace=False):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=inplace)

    def block(self, layer, x):
        h = self.relu(layer(x))
        return h * 2

    def run(self, layer, x):
        if self.reentrant is None:
            return self.block(layer, x)
        return checkpoint(self.block, layer, x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.head(self.run(self.second, self.run(self.first, x)))


def plan():
    return [
        0.3 * rs.L1().on(rs.outputs("relu")),
        0.2 * rs.L2().on(rs.outputs("second")),
        0.1 * rs.L2().on(rs.inputs("head")),
        0.05 * rs.L1().on(rs.outputs("first", via=torch.tanh)),
        0.01 * rs.L2().on("*.weight"),
    ]


def by_hand(net, x, y):
    """The same loss, written out: data loss, then the penalties; also the list of the penalties' values."""
    first = net.first(x)
    a = first.relu()
    second = net.second(a * 2)
    b = second.relu()
    out = net.head(b * 2)
    n = len(x)
    penalties = [
        0.3 * (a.abs().sum() / n + b.abs().sum() / n) / 2,
        0.2 * second.square().sum() / n,
        0.1 * (b * 2).square().sum() / n,
        0.05 * first.tanh().abs().sum() / n,
        0.01 * sum(layer.weight.square().sum() for layer in (net.first, net.second, net.head)),
    ]
    return F.cross_entropy(out, y) + sum(penalties), penalties


def gradients(net):
    return [p.grad for p in net.parameters()]


@pytest.fixture
def problem():
    torch.manual_seed(1)
    net = Net().double()
    x, y = torch.randn(12, 6, dtype=torch.float64, requires_grad=True), torch.randint(3, (12,))
    loss, penalties = by_hand(net, x, y)
    loss.backward()
    return net, x, y, loss.detach(), penalties, gradients(net)


def twin(net, **options):
    other = Net(**options).double()
    other.load_state_dict(net.state_dict())
    return other


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(net, backend):
    return net if backend == "eager" else torch.compile(net, backend=backend, fullgraph=True)


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.filterwarnings("ignore:.*overwritten by a later in-place op:restrain.errors.RestrainWarning")
def test_gradients_equal_the_hand_written_loss(problem, reentrant, inplace, backend):
    net, x, y, loss, penalties, expected = problem
    other = twin(net, reentrant=reentrant, inplace=inplace)
    reg = rs.attach(other, plan())
    run = compiled(other, backend)
    for _ in range(3):
        other.zero_grad()
        got = reg.loss(F.cross_entropy(run(x), y))
        got.backward()
        torch.testing.assert_close(got.detach(), loss)
        torch.testing.assert_close(gradients(other), expected)
    torch.testing.assert_close(
        list(reg.values().values()), [float(p.detach()) for p in penalties], rtol=1e-6, atol=1e-8
    )


def test_rules_attach_to_a_compiled_model_before_and_after_its_first_call(problem):
    net, x, y, loss, _, expected = problem
    for compile_it in (lambda m: torch.compile(m, backend="aot_eager", fullgraph=True), compile_in_place):
        other = twin(net)
        run = compile_it(other)
        with rs.attach(run, plan()) as reg:
            reg.loss(F.cross_entropy(run(x), y)).backward()
            torch.testing.assert_close(gradients(other), expected)
        torch.testing.assert_close(F.cross_entropy(run(x), y), F.cross_entropy(net(x), y))
        with pytest.warns(rs.errors.RestrainWarning, match="compiled before these hooks came"):
            reg = rs.attach(run, plan())
        for _ in range(2):
            other.zero_grad()
            got = reg.loss(F.cross_entropy(run(x), y))
            got.backward()
            torch.testing.assert_close(got.detach(), loss)
            torch.testing.assert_close(gradients(other), expected)
        reg.detach()
        torch.compiler.reset()


def compile_in_place(model):
    model.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_loss_scaling_and_accumulation_reach_injected_penalties(problem, reentrant, backend):
    net, x, y, _, _, expected = problem
    other = twin(net, reentrant=reentrant)
    reg = rs.attach(other, plan())
    run = compiled(other, backend)
    run((3 * x).detach().requires_grad_()).square().sum().backward()  # a backward without the root adds nothing of ours
    plain = twin(net)
    plain(3 * x).square().sum().backward()
    torch.testing.assert_close(gradients(other), gradients(plain))
    other.zero_grad()
    for xs, ys in zip(x.detach().chunk(4), y.chunk(4), strict=True):
        (1024 * reg.loss(F.cross_entropy(run(xs.requires_grad_()), ys)) / 4).backward()
    torch.testing.assert_close([g / 1024 for g in gradients(other)], expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_with_autocast_and_a_scaler(reentrant):
    torch.manual_seed(0)
    net = Net(reentrant)
    x, y = torch.randn(12, 6, requires_grad=True), torch.randint(3, (12,))
    reg = rs.attach(net, plan())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.autograd.grad(by_hand(net, x, y)[0], list(net.parameters()))
    for scale in (1.0, 4096.0):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = reg.loss(F.cross_entropy(net(x), y))
        (loss * scale).backward()
        for got, by_autograd in zip(gradients(net), expected, strict=True):
            assert float((got / scale - by_autograd).norm() / by_autograd.norm()) < 2e-2


def test_a_backward_after_detach_that_would_lose_a_gradient_is_an_error(problem):
    net, x, y, _, _, _ = problem
    other = twin(net, reentrant=True)
    with rs.attach(other, plan()) as reg:
        loss = reg.loss(F.cross_entropy(other(x), y))
    with pytest.raises(rs.errors.DetachedError, match="backward"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_forward_that_nothing_depends_on_is_forgotten_at_once(reentrant):
    net = Net(reentrant)
    reg = rs.attach(net, plan())
    x = torch.randn(12, 6)
    for _ in range(5):
        net(x)
    assert len(reg._forwards.pending) == 1, "the last forward alone"
    out = net(x)
    value = reg.penalty()
    torch.testing.assert_close(
        value, by_hand(net, x, torch.zeros(12).long())[0] - F.cross_entropy(out, torch.zeros(12).long())
    )
