"""Penalties on activations in every way that PyTorch runs a model, as test_environments has it for L1 and L2."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import restrain as rs


class Net(nn.Module):
    """A layer that may be checkpointed, with a decoder behind it; x is (batch, time, features)."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.encoder, self.relu, self.decoder = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)

    def block(self, x):
        return self.relu(self.encoder(x))

    def forward(self, x):
        h = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.decoder(h)


OF_SAMPLES = rs.Hoyer() + 0.5 * rs.Entropy() + 0.1 * rs.Confidence() + rs.L0(0.5, 0.7)
OVER_TIME = rs.StateChange() + 0.2 * rs.NormChange(squared=True) + rs.NormChange()
OF_THE_BATCH = rs.KLSparsity(0.2) + 0.1 * rs.Decorrelation()
DECODER = 0.3 * rs.DecoderL1()


def plan():
    return [
        (OF_SAMPLES + OVER_TIME).on(rs.outputs("relu")),
        OF_THE_BATCH.on(rs.outputs("encoder", via=torch.sigmoid)),
        DECODER.on(rs.outputs("relu")),
    ]


def by_hand(net, x):
    h, z = net.block(x), net.encoder(x)
    samples = torch.stack([(OF_SAMPLES + OVER_TIME).over_batch(row[None], 0) for row in h]).mean()
    decoder = 0.3 * (h * net.decoder.weight.norm(dim=0)).sum() / len(x)
    return net.decoder(h).square().sum() + samples + OF_THE_BATCH(z.sigmoid().flatten(0, 1)) + decoder


def twin(net, **options):
    other = Net(**options).double()
    other.load_state_dict(net.state_dict())
    return other


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("backend", "reentrant"),
    [
        ("eager", None),
        ("eager", False),
        ("eager", True),
        ("aot_eager", None),
        ("aot_eager", True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", None, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_the_hand_written_loss(backend, reentrant):
    net = Net(reentrant).double()
    reg = rs.attach(net, plan())
    run = net if backend == "eager" else torch.compile(net, backend=backend, fullgraph=True)
    for _ in range(3):
        x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
        net.zero_grad()
        loss = reg.loss(run(x).square().sum())
        (4 * loss).backward()
        other = twin(net)
        expected = by_hand(other, x)
        (4 * expected).backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


def trained(backend, reentrant):
    """Weights and running means after five steps; the first are of two micro-batches."""
    torch.manual_seed(2)
    net = Net(reentrant).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    penalty = rs.KLSparsity(0.2, momentum=0.8).on(rs.outputs("encoder", via=torch.sigmoid))
    reg = rs.attach(net, penalty, optimizer)
    run = net if backend == "eager" else torch.compile(net, backend=backend, fullgraph=True)
    for step in range(5):
        optimizer.zero_grad()
        for part in range(2 if step < 2 else 1):
            x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
            # a compiled checkpoint can't make the tensors that hold the mean: the first forward is an eager one
            eager = reentrant is not None and step == part == 0
            reg.loss((net if eager else run)(x).square().mean()).backward()
        optimizer.step()
    reg.detach()
    return [p.detach() for p in net.parameters()], reg.state_dict()["kept"]


@pytest.mark.parametrize(
    ("backend", "reentrant"), [("eager", False), ("eager", True), ("aot_eager", None), ("aot_eager", False)]
)
def test_a_running_mean_is_the_same(backend, reentrant):
    expected = trained("eager", None)
    torch.testing.assert_close(trained(backend, reentrant), expected)


def test_a_mask_does_not_compile_anew():
    net, compiled = Net(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, mask):
            return self.net(x)

    model = Masked()
    reg = rs.attach(model, rs.L1().on(rs.outputs("net.relu", mask="mask")))
    run = torch.compile(model, backend=compiled, fullgraph=True)
    for step in range(6):
        x, mask = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.5
        reg.loss(run(x, mask).square().mean()).backward()
        if step == 1:
            torch.testing.assert_close(reg.penalty(), net.block(x)[mask].abs().sum() / 5)
            first = compiled.frame_count
    assert compiled.frame_count == first
