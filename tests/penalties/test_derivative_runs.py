"""Penalties on derivatives in the ways that a model runs."""

import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import restrain as rs
from jacobians import CODE, ESTIMATORS, Attend, Widened, equal, gradients, made, reference, regularized
from restrain.errors import CaptureError, PenaltyError
from restrain.penalties import estimators
from spawning import spawned

# Checkpoints


@pytest.mark.parametrize("estimator", ["exact", "vjp", "difference"])
def test_non_reentrant_checkpoints(estimator):
    model, x = made(reentrant=False)
    equal(regularized(model, x, 0.5 * rs.JacobianNorm(estimator=estimator).on()), reference(x))


@pytest.mark.parametrize("estimator", ["exact", "jvp"])
def test_the_whole_model_in_a_checkpoint(estimator):
    """Between its first pass and its recomputation, it becomes known that no twin of the input is needed."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(5, 4).double()
    reg = rs.attach(model, 0.5 * rs.Contractive(estimator=estimator).on(rs.inputs("2")))
    found = []
    for call in (
        partial(checkpoint, model, use_reentrant=False),
        model,
        partial(checkpoint, model, use_reentrant=False),
    ):
        model.zero_grad()
        torch.manual_seed(0)
        reg.loss(call(x).square().mean()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-12, atol=1e-14)


def test_places_in_a_checkpoint():
    model, x = made(reentrant=False)
    rule = 0.5 * rs.Contractive(estimator="exact", wrt=rs.outputs("first")).on(CODE)
    equal(regularized(model, x, rule), regularized(made()[0], x, rule))
    equal(regularized(model, x, 0.5 * rs.JacobianNorm(estimator="jvp").on()), reference(x))
    unknown, _ = made(reentrant=False, mixer=nn.LayerNorm(6))
    # torch 2.10 says it in other words
    with pytest.raises(CaptureError, match=r"(?i)forward mode.*use estimator='difference'"):
        regularized(unknown, x, rs.JacobianNorm(estimator="jvp").on())
    with pytest.raises(CaptureError, match="inside a checkpoint, whose recomputation"):
        regularized(model, x, rs.Contractive(estimator="difference", wrt=rs.outputs("first")).on(CODE))


@pytest.mark.parametrize("estimator", ["auto", "difference"])
def test_reentrant_checkpoints_take_the_difference(estimator):
    model, x = made(reentrant=True)
    found = regularized(model, x.requires_grad_(), 0.5 * rs.JacobianNorm(estimator=estimator).on())
    equal(found, reference(x.detach()))
    if estimator == "auto":
        assert "difference, by two further forwards (a reentrant checkpoint), 1 random direction" in found[2]


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (rs.JacobianNorm(estimator="exact").on(), "use_reentrant=False, or estimator='difference'"),
        (rs.JacobianNorm(estimator="vjp").on(), "use_reentrant=False, or estimator='difference'"),
        (rs.JacobianNorm(estimator="jvp").on(), "use estimator='difference'"),
        (rs.JacobianNorm(estimator="difference").on(CODE), "inside a reentrant checkpoint"),
        (rs.GradientPenalty(target=1.0).on(), "use_reentrant=False"),
        (rs.GradientPenalty(of="loss").on(), "use_reentrant=False"),
    ],
    ids=str,
)
def test_reentrant_checkpoints_refuse_others(rule, match):
    model, x = made(reentrant=True)
    with pytest.raises(CaptureError, match=match):
        regularized(model, x.requires_grad_(), rule)


# Fused kernels, compiled code


@pytest.mark.parametrize("estimator", ["auto", *ESTIMATORS])
def test_fused_attention(estimator):
    model, x = made(mixer=Attend())
    found = regularized(model, x, 0.5 * rs.JacobianNorm(estimator=estimator).on())
    equal(found, reference(x, mixer=Attend()))
    assert ("difference, by two further forwards (fused attention)" if estimator == "auto" else estimator) in found[2]


def test_fused_attention_and_gradients():
    model, x = made(mixer=Attend())
    with pytest.raises(CaptureError, match="sdpa_kernel"):
        regularized(model, x, rs.GradientPenalty(of="loss").on())
    found = regularized(model, x, 0.5 * rs.GradientPenalty(1.0).on())
    with sdpa_kernel(SDPBackend.MATH):
        expected = regularized(model, x, 0.5 * rs.GradientPenalty(1.0).on())
    equal(found, expected)
    assert "exact, by a second forward (fused attention)" in found[2]


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch of its own doing
@pytest.mark.parametrize("estimator", ["auto", *ESTIMATORS])
@pytest.mark.parametrize("what", ["the model", "a part", "in place"])
def test_compiled_models(estimator, what):
    model, x = made()
    run, options = model, {"backend": "aot_eager", "fullgraph": True}
    if what == "the model":
        run = torch.compile(model, **options)
    elif what == "in place":
        model.compile(**options)
    else:
        model.second = torch.compile(model.second, **options)
    rule = rs.Contractive(estimator=estimator).on(rs.outputs("second", via=torch.tanh))
    expected, rules = reference(x, lambda m: m.block), [0.5 * rule, 0 * rs.GradientPenalty(1.0).on()]
    graphs = []
    with rs.attach(run, rules) as reg:
        for _ in range(4):
            run.zero_grad()
            loss = reg.loss(run(x).square().mean())
            loss.backward()
            equal((loss.detach(), [p.grad for p in run.parameters()]), expected)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert (("vjp" if estimator == "auto" else "estimator " + estimator) + ", by ") in reg.table()
    assert graphs[1] == graphs[-1]


# Samples that depend on each other


@pytest.mark.parametrize("estimator", ["auto", "vjp", "jvp", "difference"])
def test_batch_normalisation_is_of_the_whole_batch(estimator, monkeypatch):
    model, x = made(mixer=nn.BatchNorm1d(6))
    twin, plain, x = copy.deepcopy(model), made(mixer=nn.BatchNorm1d(6, track_running_stats=False))[0], x[:3]
    drawn = {}

    def signs(like, generator=None):
        """All that there are, but for the sign of the whole: their mean is the expectation."""
        key = len(drawn) if generator is None else generator.initial_seed()
        pattern = drawn.setdefault(key, [(1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1)][len(drawn) % 4])
        return torch.tensor(pattern, dtype=like.dtype).reshape(like.shape)

    monkeypatch.setattr(estimators, "signs", signs)
    found = regularized(model, x, 0.5 * rs.JacobianNorm(estimator=estimator, projections=4).on())
    expected = plain(x).square().mean() + 0.5 * torch.func.jacrev(plain)(x).square().sum() / 3
    equal(found, (expected.detach(), gradients(plain, expected)))
    assert model.mixer.num_batches_tracked == 1
    twin(x)
    torch.testing.assert_close(model.mixer.running_mean, twin.mixer.running_mean)
    assert estimator != "auto" or "vjp (of the whole batch, whose samples depend on each other)" in found[2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.InstanceNorm1d(6, affine=True), nn.GroupNorm(2, 6)], ids=repr)
def test_normalisation_of_each_sample(estimator, norm):
    """The gradient of torch's own forward-mode derivatives is silently wrong for the first two."""
    mixer = norm if isinstance(norm, nn.LayerNorm) else Widened(norm)
    model, x = made(mixer=mixer)
    found = regularized(model, x, 0.5 * rs.JacobianNorm(estimator=estimator).on())
    equal(found, reference(x, mixer=copy.deepcopy(mixer)))


def test_batch_normalisation_has_no_jacobian_of_each_sample():
    model, x = made(mixer=nn.BatchNorm1d(6))
    with pytest.raises(PenaltyError, match="put it into eval"):
        regularized(model, x, rs.JacobianNorm(estimator="exact").on())
    model.mixer.eval()
    assert "estimator exact" in regularized(model, x, rs.JacobianNorm().on())[2]
    model.mixer.train()
    assert "of the batch's sum" in regularized(model, x, rs.GradientPenalty().on())[2]


def test_packed_sequences():
    lstm = nn.LSTM(3, 2).double()
    parts = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 2)]
    packed = nn.utils.rnn.pack_sequence(parts)
    with rs.attach(lstm, rs.JacobianNorm(projections=600).on()) as reg:
        lstm(packed)
        found = reg.penalty()
        assert "vjp (of the whole batch" in reg.table()
    expected = sum(torch.func.jacrev(lambda x: lstm(x)[0])(part).square().sum() for part in parts) / 2
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0)


# Noise


@pytest.mark.parametrize("estimator", ["jvp", "difference"])
@pytest.mark.parametrize("ours", [True, False])
def test_further_forwards_draw_the_same_noise(estimator, ours):
    model, x = made(mixer=None if ours else nn.Dropout(0.5))
    noise = [rs.Dropout(0.5).on(rs.outputs("first")), rs.GaussianNoise(0.3).on(rs.inputs())] if ours else []
    rules = [rs.JacobianNorm(estimator=e).on() for e in ("exact", estimator)]
    with rs.attach(model, [*noise, *rules]) as reg:
        torch.manual_seed(5)
        model(x)
        state = torch.get_rng_state()
        reg.penalty()
        exact, estimate = reg.values().values()
        assert estimate == pytest.approx(exact)
        torch.manual_seed(5)
        model(x)
        assert torch.equal(torch.get_rng_state(), state)


def test_each_estimate_draws_anew():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(5, 3)
    for estimator in ("vjp", "jvp", "difference"):
        with rs.attach(model, rs.JacobianNorm(estimator=estimator).on()) as reg:
            found = []
            for _ in range(3):
                model(x)
                found.append(reg.penalty().item())
        assert len(set(found)) == 3


# Precision


def test_bfloat16_autocast():
    model, x = made()
    model, x = model.float(), x.float()
    expected = rs.JacobianNorm(estimator="jvp")(model, x)
    for estimator, bound in (("exact", 0.02), ("vjp", 0.02), ("jvp", 1e-5), ("difference", 1e-3)):
        with (
            rs.attach(model, rs.JacobianNorm(estimator=estimator).on()) as reg,
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            loss = reg.loss(model(x).square().mean())
        loss.backward()
        assert reg.values().popitem()[1] == pytest.approx(expected.item(), rel=bound)


# Sharded parameters


def sharded(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for estimator in ("auto", "exact", "jvp", "difference"):
        (model, x), (whole, _) = (made(mixer=nn.LayerNorm(6)) for _ in range(2))
        _, expected, _ = regularized(whole, x[:4], rs.JacobianNorm(estimator="exact").on())
        fully_shard(model.first)
        fully_shard(model)
        try:
            found = regularized(model, x[:4].chunk(2)[rank], rs.JacobianNorm(estimator=estimator).on())
            torch.testing.assert_close([p.full_tensor() for p in found[1]], expected, rtol=1e-6, atol=1e-8)
            results[rank, estimator] = found[2]
        except CaptureError as error:
            results[rank, estimator] = str(error)
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
def test_two_ranks_that_share_the_parameters():
    results = spawned(sharded, 2)
    for rank in range(2):
        assert "jvp, by a second forward (sharded parameters)" in results[rank, "auto"]
        assert "can't be differentiated twice: use estimator='jvp'" in results[rank, "exact"]
        assert "difference, by two" in results[rank, "difference"]


class Scaled(torch.nn.Module):
    """A network with a buffer that the function depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x):
        return self.last(self.scale * torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("estimator", ["exact", "vjp", "jvp", "difference", "auto"])
@pytest.mark.parametrize("buffers", [False, True])
def test_tensors_given_to_functional_call_are_those_of_a_replay(estimator, buffers):
    """Against a model that has them as its own; value, and gradients of the tensors that were given."""
    own, twin, x = Scaled().double(), Scaled().double(), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn_like(p))
        twin.scale.mul_(2)
    given = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters()}
    given |= {name: b.clone() for name, b in twin.named_buffers()} if buffers else {}
    if not buffers:
        own.scale.mul_(2)
    rule = rs.JacobianNorm(estimator=estimator).on()
    before = [p.detach().clone() for p in own.parameters()]
    found, right = [], []
    for model, kept in ((own, found), (twin, right)):
        reg = rs.attach(model, rule)
        for _ in range(2):
            torch.manual_seed(1)
            out = torch.func.functional_call(own, given, (x,)) if model is own else twin(x)
            kept.append(reg.loss(0 * out.sum()))
        kept[-1].backward()
    torch.testing.assert_close(found, right, rtol=1e-6, atol=0)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close([p.detach() for p in own.parameters()], before)
    assert all(p.grad is None for p in own.parameters())
