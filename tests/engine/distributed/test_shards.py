"""Two gloo processes that share the parameters by FSDP2 train as one process with whole parameters does."""

import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import restrain as rs
from restrain.engine.distributed import ranks, shards
from restrain.errors import HowError, NotCollectedError, OptimizerError, PenaltyError, RestrainWarning
from spawning import spawned

RANKS, STEPS = 2, 3
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    "Adam": (torch.optim.Adam, {"lr": 0.05}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.02, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.05}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


class Net(nn.Module):
    """Layers whose shards are uneven (5 rows), empty on one rank (1 row), and of FSDP's root (the head)."""

    def __init__(self, width=5):
        super().__init__()
        self.first, self.relu = nn.Linear(4, width), nn.ReLU()
        self.thin, self.head = nn.Linear(width, 1), nn.Linear(width + 1, 3)

    def forward(self, x):
        h = self.relu(self.first(x))
        return self.head(torch.cat([h, self.thin(h)], 1))


class Spread(rs.Penalty):
    """A user's penalty, of which nothing is known."""

    def __call__(self, w):
        return w.var()


ENTRYWISE = 0.1 * rs.L1() + 0.05 * rs.L2()
GROUPED = 0.1 * rs.GroupLasso(per="out")
CROSSING = 0.1 * rs.GroupLasso(per="in")
SPECTRAL = 0.1 * rs.NuclearNorm()
WEIGHTED = 0.1 * rs.Weighted(rs.L1(), lambda w: 1 / w.abs())
MOVING = 0.1 * rs.Distance(decay=0.5)
W = "*.weight"
UNITS = rs.units(
    {"first.weight": "out", "first.bias": 0, "thin.weight": "in", "head.weight": ("in", [[0], [1], [2], [3], [4]])}
)
PLANS = {
    "loss": [(0.1 * rs.L1() + rs.LogSum()).on("*"), GROUPED.on(W), CROSSING.on(W), SPECTRAL.on("first.weight")],
    "loss of the whole": [
        WEIGHTED.on("*"),
        MOVING.on(W),
        0.1 * Spread().on("head.*"),
        rs.SparseGroupLasso(0.01, 0.1).on(W),
    ],
    "loss, mean": [0.1 * rs.L2().on("*", reduce="mean"), 0.2 * rs.Huber().on(W, every=2, start=1)],
    "gradient": [p.on(W, how="gradient") for p in (ENTRYWISE, GROUPED, CROSSING, SPECTRAL, WEIGHTED, MOVING)],
    "decoupled": [p.on(W, how="decoupled") for p in (ENTRYWISE, GROUPED, CROSSING)],
    "proximal": [ENTRYWISE.on("*", how="proximal")],
    "proximal by group": [(GROUPED + 0.02 * rs.L1()).on(W, how="proximal")],
    "proximal by block": [
        0.1 * rs.GroupLasso(per=(1, 2)).on("first.weight", how="proximal"),
        0.1 * rs.GroupLasso(per=(1, 5)).on("thin.weight", how="proximal"),
        0.1 * rs.GroupLasso(per=(3, 2)).on("head.weight", how="proximal"),
        rs.MaxNorm(0.3, per=(1, 1)).on("thin.weight"),
    ],
    "proximal across": [CROSSING.on(W, how="proximal"), rs.NonNegative().on("head.weight")],
    "proximal weighted": [WEIGHTED.on(W, how="proximal"), 0.1 * rs.L1().on("head.bias", how="proximal", reduce="mean")],
    "constraints": [
        rs.NonNegative().on("*.bias"),
        rs.Box(-0.2, 0.2).on("thin.weight", momentum="tangent"),
        rs.UnitNorm(per="out").on("first.weight", momentum="tangent"),
        rs.MaxNorm(0.3, per="in").on("head.weight", momentum="tangent"),
        rs.Box(-0.2, 0.3).on("head.weight"),
    ],
    # apart: where a unit is dead, Adam's metric leaves its column of `head` nearly free, and rounding decides it
    "constraints of matrices": [rs.SpectralBall(0.5).on("head.weight")],
    "constraints of entries": [rs.TopK(6).on("first.weight")],
    "constraints by size": [
        rs.TopGroups(2, per="out").on("first.weight"),
        rs.TopGroups(rs.schedules.Linear(1.0, 0.3, steps=3), per="in").on("head.weight"),
    ],
    "units": [
        (0.05 * rs.GroupLasso(per=UNITS)).on(how="proximal"),
        rs.TopK(9, budget="all").on(["thin.bias", "head.bias"]),
    ],
    "units by size": [0.01 * rs.GroupLasso(per=UNITS).on(), rs.TopGroups(3, per=UNITS).on()],
    "units as gradient": [
        0.1 * rs.GroupLasso(per=UNITS).on(how="gradient"),
        0.1 * rs.GroupLasso(per=UNITS).on(how="decoupled"),
    ],
    "outputs": [0.1 * rs.L1().on(rs.outputs("relu")), 0.1 * rs.Decorrelation().on(rs.outputs("first"))],
    "moving": [
        rs.schedules.WarmUp(3) * rs.L2().on(W),
        rs.Target(zeros=0.3, every=1, start=0.05) * rs.L1().on(W, how="proximal"),
        rs.Target(norm=0.5, every=1, start=0.05) * rs.L2().on("*.bias", how="gradient"),
        rs.Target(gradient_share=0.1, every=1, start=0.05) * CROSSING.on("head.weight", how="gradient"),
    ],
}


class Even(rs.Penalty):
    """Its gradient is one number, spread over all entries by a stride of zero."""

    entrywise = True

    def __call__(self, w):
        return w.sum()


class Pair(rs.NetworkPenalty):
    """Of two parameters."""

    def __call__(self, parameters, outputs):
        a, b = parameters.values()
        return (a.sum(0) + b.sum(0)[:4]).square().sum()


PLANS["spread"] = [0.1 * Even().on("*")]
PLANS["network"] = [0.1 * Pair().on(["first.weight", "head.weight"])]
FAST = [(plan, "SGD") for plan in PLANS] + [("proximal", "Adam"), ("proximal across", "Adam"), ("units", "Adam")]
SLOW = [(plan, optimizer) for plan in PLANS for optimizer in OPTIMIZERS if (plan, optimizer) not in FAST]


def shard(model, **options):
    for layer in (model.first, model.thin, model):
        fully_shard(layer, **options)
    return model


def full(t):
    return shards.whole(t.detach()).clone()


def made(ranks, before=None, mesh=None, width=5):
    """The model, sharded if there are several processes, and what `before` gave of the bare one."""
    torch.manual_seed(0)
    model = Net(width).double()
    given = before(model) if before else None
    if ranks > 1:
        shard(model, mesh=mesh and init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards")))
    return model, given


def batch(rank=0, ranks=1):
    torch.manual_seed(1)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    return x.chunk(ranks)[rank], y.chunk(ranks)[rank]


def train(plan, optimizer, rank=0, ranks=1, before=False, mesh=None, width=5):
    """Weights at the end, and what the attachment told: values, what was added to the loss, strengths, measures."""
    model, reg = made(ranks, (lambda bare: rs.attach(bare, plan)) if before else None, mesh, width)
    x, y = batch(rank, ranks)
    cls, options = OPTIMIZERS[optimizer]
    step = cls(model.parameters(), **options)
    reg = reg or rs.attach(model, plan, step)
    told = [list(reg.values().values())]
    for _ in range(STEPS):
        step.zero_grad()
        loss = F.cross_entropy(model(x), y)
        whole = reg.loss(loss)
        whole.backward()
        step.step()
        told.append((whole - loss).item())
    model.eval()
    measured = reg.measure().values()
    told += [[*reg.values().values()], [*reg.strengths().values()], [(m.value, m.gradient, m.share) for m in measured]]
    notes = [note for bound in reg._bounds for note in bound.notes if "needs whole" in note]
    reg.detach()
    return {name: full(p) for name, p in model.named_parameters()}, told, notes


def accumulated(rank=0, ranks=1):
    """Two micro-batches a step, between which gathered weights stay where the shards were."""
    model, _ = made(ranks)
    x, y = batch(rank, ranks)
    reg = rs.attach(model, PLANS["loss"])
    for last, (xs, ys) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        if ranks > 1:
            model.set_reshard_after_backward(bool(last))
            model.set_requires_gradient_sync(bool(last))
        (reg.loss(F.cross_entropy(model(xs), ys)) / 2).backward()
    return {name: full(p.grad) for name, p in model.named_parameters()}


def in_bfloat16(rank):
    """What a penalty adds to the gradients, and the weights, both in float32."""
    gradients = []
    for rules in ([], (0.1 * rs.L2()).on("*")):
        model = shard(Net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        torch.manual_seed(2)
        for p in model.parameters():
            nn.init.normal_(p)
        x, y = batch(rank, RANKS)
        reg = rs.attach(model, rules) if rules else None
        loss = F.cross_entropy(model(x.float()).float(), y)
        (reg.loss(loss) if reg else loss).backward()  # the root's weights stand gathered, in bfloat16, until here
        gradients.append([full(p.grad) for p in model.parameters()])
    return [b - a for a, b in zip(*gradients, strict=True)], [full(p) for p in model.parameters()]


def messages(rank):
    """How many numbers are sent, in how many messages, by a loss and by a look at all values."""
    model, _ = made(RANKS)
    reg = rs.attach(model, [ENTRYWISE.on("*"), GROUPED.on(W), 0.1 * rs.Huber().on("*.bias", reduce="mean")])
    sent, real = [], dist.all_reduce
    shards.dist.all_reduce = lambda t, **options: (sent.append(t.numel()), real(t, **options))[1]
    reg.penalty()
    reg.values()
    shards.dist.all_reduce = real
    return sent


def forgotten(rank):
    model, _ = made(RANKS)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, ENTRYWISE.on("*"), step)
    model(batch(rank, RANKS)[0]).sum().backward()
    with pytest.raises(NotCollectedError):
        step.step()


def noise(rank):
    """Noise on gradients of zero, whole; and what a generator that all ranks share draws."""
    model, _ = made(RANKS)
    step = torch.optim.SGD(model.parameters(), lr=1.0)
    reg = rs.attach(model, rs.GradientNoise(0.5, decay=0).on("first.weight"), step)
    before = full(model.first.weight)
    (0 * model(batch(rank, RANKS)[0]).sum()).backward()
    step.step()
    generator = ranks.common_generator(reg._steppers[0]._seed, "0 first.weight 0", torch.device("cpu"))
    drawn = torch.empty(5, 4, dtype=torch.float64).normal_(generator=generator)
    return before - full(model.first.weight), 0.5 * drawn


def refusals(rank):
    """{what: the message} of what can't be done."""
    found = {}
    cases = {
        "parametrize": (rs.NonNegative().on("*.bias", how="parametrize"), None),
        "both": (Pair().on(W, outputs=rs.outputs("relu")), None),
        "decoder": (rs.DecoderL1("thin.weight").on(rs.outputs("relu")), None),
        "lbfgs": (rs.L2().on("*", how="gradient"), torch.optim.LBFGS),
        "measured": (rs.L1().on("*", how="proximal"), torch.optim.Adafactor),
    }
    for name, (rule, optimizer) in cases.items():
        model, _ = made(RANKS)
        try:
            rs.attach(model, rule, optimizer and optimizer(model.parameters()))
        except (HowError, OptimizerError, PenaltyError) as error:
            found[name] = str(error)
    for name, rule in {"measure": ENTRYWISE.on("*"), "decoder first": cases["decoder"][0]}.items():
        model, reg = made(RANKS, lambda bare, rule=rule: rs.attach(bare, rule))
        try:
            reg.measure(model(batch(rank, RANKS)[0]).sum())
        except PenaltyError as error:
            found[name] = str(error)
        finally:
            reg.detach()
    return found


def emptied(rank):
    """How often a layer is said to be empty: when one rank's part is, and when all are."""
    model, _ = made(RANKS)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    stepper = rs.attach(model, ENTRYWISE.on(W, how="proximal"), step)._steppers[0]
    counts = []
    for zeroed in (rank == 0, True):
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            shards.local(model.head.weight).mul_(not zeroed)
            stepper._warn_of_empty()
            stepper._warn_of_empty()
        counts.append(sum("'head.weight' is all zeros" in str(w.message) for w in caught))
    return counts


def run_rank(rank, port, results, cases):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RestrainWarning)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = {(plan, optimizer): train(PLANS[plan], optimizer, rank, RANKS) for plan, optimizer in cases}
    found["before"] = train(PLANS["loss"], "SGD", rank, RANKS, before=True)
    for mesh in ((1, 2), (2, 1)):
        found[mesh] = train(PLANS["loss"] + PLANS["constraints"], "SGD", rank, RANKS, mesh=mesh)
    found["accumulated"] = accumulated(rank, RANKS)
    found |= {look.__name__: look(rank) for look in (in_bfloat16, messages, forgotten, noise, emptied, refusals)}
    results[rank] = found
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down


@pytest.fixture(scope="module")
def ranks_found():
    return spawned(run_rank, RANKS, FAST)


def equal(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], equal_nan=True)


@pytest.mark.filterwarnings("ignore::restrain.errors.RestrainWarning")
@pytest.mark.parametrize("case", FAST, ids="-".join)
def test_two_ranks_equal_one_process(ranks_found, case):
    expected = train(PLANS[case[0]], case[1])
    for rank in range(RANKS):
        weights, told, _ = ranks_found[rank][case]
        if case[0] == "outputs":  # of each rank's own batch, as the data loss is; gradients of FSDP come in backward()
            told = expected[1]
        equal((weights, told), expected)


def test_rules_attached_before_sharding(ranks_found):
    expected = train(PLANS["loss"], "SGD")
    for found in ranks_found.values():
        equal(found["before"], expected)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)], ids=str)
def test_replicated_and_sharded(ranks_found, mesh):
    expected = train(PLANS["loss"] + PLANS["constraints"], "SGD")
    for found in ranks_found.values():
        equal(found[mesh], expected)


def test_accumulation_with_gathered_weights_in_between(ranks_found):
    for found in ranks_found.values():
        torch.testing.assert_close(found["accumulated"], accumulated())


def test_the_shard_in_float32_is_penalised_not_the_weights_in_bfloat16(ranks_found):
    for found in ranks_found.values():
        added, weights = found["in_bfloat16"]
        torch.testing.assert_close(added, [0.2 * w for w in weights], rtol=1e-5, atol=1e-6)
        assert not all(w.equal(w.bfloat16().float()) for w in weights)


def test_one_message_for_all_rules(ranks_found):
    for found in ranks_found.values():
        assert found["messages"] == [1, 3]  # numbers of each: the sum in the loss, the values


def test_gradient_noise_is_that_of_the_whole_tensor(ranks_found):
    for found in ranks_found.values():
        torch.testing.assert_close(*found["noise"])


def test_a_weight_is_empty_where_all_parts_are(ranks_found):
    for found in ranks_found.values():
        assert found["emptied"] == [0, 1]


def test_what_is_gathered_is_told(ranks_found):
    notes = ranks_found[0]["loss", "SGD"][2]
    assert len(notes) == 2
    assert "GroupLasso(per='in')" in notes[0]
    assert "'first.weight' (160 bytes)" in notes[0]
    assert not ranks_found[0]["proximal by group", "SGD"][2]


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("parametrize", "Attach to the bare model first"),
        ("both", "Leave outputs= out"),
        ("decoder", "UnitNorm"),
        ("decoder first", "UnitNorm"),
        ("lbfgs", "LBFGS: use how='loss'"),
        ("measured", "Adafactor: use how='loss'"),
        ("measure", "reg.measure()"),
    ],
)
def test_refused_with_the_way_out(ranks_found, what, match):
    for found in ranks_found.values():
        assert re.search(re.escape(match), found["refusals"].get(what, "not refused"))
