"""Two gloo processes with half a batch each train as one process with the whole batch does."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import CaptureError
from spawning import spawned

RANKS, STEPS = 2, 4


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.relu, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)

    def block(self, x):
        return self.relu(self.first(x))

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


PLANS = {
    "loss": [
        0.1 * rs.L2().on("*.weight"),
        0.1 * rs.L1().on(rs.outputs("relu")),
        0.1 * rs.DecoderL1("head.weight").on(rs.outputs("relu")),
    ],
    "statistics": [
        0.3 * rs.KLSparsity(0.2, momentum=0.5).on(rs.outputs("first", via=torch.sigmoid)),
        0.1 * rs.Decorrelation().on(rs.outputs("relu")),
    ],
    "gradient": [0.1 * rs.L2().on("*.weight", how="gradient"), 0.1 * rs.L1().on(rs.outputs("relu"))],
    "proximal": [0.1 * rs.L1().on("*.weight", how="proximal"), rs.MaxNorm(0.5).on("head.weight")],
    "moving": [
        rs.schedules.WarmUp(3) * rs.L2().on("*.weight", how="gradient"),
        rs.Target(active=0.2, every=1) * rs.L1().on(rs.outputs("relu")),
    ],
    "derivative": [
        0.1 * rs.Contractive(estimator="exact").on(rs.outputs("relu")),
        0.1 * rs.GradientPenalty(1.0).on(rs.outputs("head")),
        # of a diagonal Jacobian, for which random signs are exact
        *[
            0.1 * rs.JacobianNorm(estimator=e, wrt=rs.outputs("first")).on(rs.outputs("first", via=torch.tanh))
            for e in ("vjp", "jvp", "difference")
        ],
    ],
    "double backpropagation": [0.1 * rs.GradientPenalty(of="loss").on(rs.inputs("head"))],
    "group": [0.1 * rs.GroupLasso().on("first.weight", how="proximal"), rs.NonNegative().on("head.weight")],
}
WRAPS = {"plain": {}, "find_unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def train(plan, reentrant, rank=0, ranks=1, **wrap):
    torch.manual_seed(0)
    model = Net(reentrant).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    x.requires_grad_(reentrant is True)
    x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
    run = DistributedDataParallel(model, **wrap) if ranks > 1 else model
    optimizer = torch.optim.Adam(run.parameters(), lr=0.05)
    reg = rs.attach(run, plan, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        reg.loss(F.cross_entropy(run(x), y)).backward()
        optimizer.step()
    reg.detach()
    return [p.detach() for p in model.parameters()]


def train_with_noise(rank, noise):
    """Ranks whose random states differ, as they should for noise on activations."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net().double())
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, rs.GradientNoise(noise, decay=1).on("*"), optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def statistics(x, compiled=False):
    """Value and gradients of statistics of a batch, alone."""
    torch.manual_seed(1)
    model = Net().double()
    penalty = 0.3 * rs.KLSparsity(0.2) + rs.Decorrelation()
    with rs.attach(model, penalty.on(rs.outputs("first", via=torch.sigmoid))) as reg:
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss = reg.loss(0 * run(x).sum())
        loss.backward()
    torch.compiler.reset()
    return [loss.detach(), *(p.grad for p in model.first.parameters())]


def of_unequal_batches(rank, compiled):
    """Those of two ranks with five and three samples, gradients averaged as DDP does."""
    torch.manual_seed(0)
    value, *gradients = statistics(torch.randn(8, 4, dtype=torch.float64).split([5, 3])[rank], compiled)
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [value, *(gradient / RANKS for gradient in gradients)]


def run_rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    trained = {
        (plan, wrap, reentrant): train(PLANS[plan], reentrant, rank, RANKS, **WRAPS[wrap])
        for plan, wrap, reentrant in cases()
    }
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rs.attach(Net(), rs.GaussianNoise(0.1).on(rs.inputs())).detach()
    shared = [str(w.message) for w in caught]
    with pytest.raises(CaptureError, match="static_graph=True"):
        train(PLANS["double backpropagation"], None, rank, RANKS, static_graph=True)
    torch.manual_seed(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rs.attach(Net(), rs.GaussianNoise(0.1).on(rs.inputs())).detach()
    noisy = [train_with_noise(rank, noise) for noise in (0.0, 0.3)]
    unequal = [of_unequal_batches(rank, compiled) for compiled in (False, True)]
    results[rank] = (trained, shared, [str(w.message) for w in caught], noisy, unequal)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down


def cases():
    """All, but for what DDP itself refuses ("mark a variable ready only once"), with rules or without.

    With reentrant checkpoints: find_unused_parameters; and a parameter used in the loss beside the forward, unless
    static_graph=True.
    """
    return [
        (plan, wrap, reentrant)
        for plan in PLANS
        for wrap in WRAPS
        for reentrant in (None, False, True)
        if reentrant is not True or wrap == "static" or (wrap == "plain" and plan != "loss")
        if plan not in ("derivative", "double backpropagation") or reentrant is None
        if plan != "double backpropagation" or wrap != "static"
    ]


@pytest.fixture(scope="module")
def ranks():
    return spawned(run_rank, RANKS)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_two_ranks_equal_one_process(ranks, case):
    plan, _, _ = case
    expected = train(PLANS[plan], None)
    for rank in range(RANKS):
        torch.testing.assert_close(ranks[rank][0][case], expected)


def test_ranks_that_share_one_random_state_are_warned_of(ranks):
    for _, shared, apart, *_ in ranks.values():
        assert any("share one random state" in message for message in shared)
        assert not apart


def test_gradient_noise_is_the_same_on_all_ranks(ranks):
    (plain, noisy), others = ranks[0][3], ranks[1][3]
    assert torch.equal(plain, others[0])
    assert torch.equal(noisy, others[1])
    assert (noisy - plain).abs().min() > 0


def test_statistics_of_unequal_batches_are_those_of_all_samples(ranks):
    torch.manual_seed(0)
    expected = statistics(torch.randn(8, 4, dtype=torch.float64))
    for *_, unequal in ranks.values():
        for found in unequal:
            torch.testing.assert_close(found, expected)
