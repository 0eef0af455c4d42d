"""Penalties on derivatives in the ways that a model runs: what they cost, keep, leave behind, and refuse."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import CaptureError, NeverFiredError, PenaltyError, SelectionError
from restrain.penalties import estimators

CODE, ESTIMATORS = rs.outputs("second"), ["exact", "vjp", "jvp", "difference"]


class Net(nn.Module):
    """With a block that may be checkpointed, or attend, or normalise, or drop.

    A sample's input and outputs are single numbers, so that random signs change nothing: all estimators are exact.
    """

    def __init__(self, reentrant=None, mixer=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.mixer, self.second, self.head = nn.Linear(1, 6), mixer, nn.Linear(6, 1), nn.Linear(1, 1)

    def block(self, x):
        h = self.first(x).tanh()
        return self.second(h if self.mixer is None else self.mixer(h)).tanh()

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


class Attend(nn.Module):
    def forward(self, h):
        h = h.view(len(h), 1, 3, 2)
        return F.scaled_dot_product_attention(h, h, h).reshape(len(h), 6)


class Widened(nn.Module):
    """Normalises channels over space."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, h):
        return self.norm(torch.stack([h, h.sin(), h * 2], -1)).sum(-1)


def made(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).double(), torch.randn(5, 1, dtype=torch.float64)


def each_jacobian(f, x):
    return torch.stack([torch.func.jacrev(lambda one: f(one.unsqueeze(0)).squeeze(0))(one) for one in x])


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)


def regularized(model, x, rule, run=None):
    """The regularised loss, its gradient, and the table."""
    with rs.attach(model, rule) as reg:
        loss = reg.loss((run or model)(x).square().mean())
        loss.backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return loss.detach(), found, reg.table()


def reference(x, f=lambda m: m, **options):
    """The same by the Jacobian of each sample, of a plain twin."""
    model, _ = made(**options)
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(x).square().mean() + 0.5 * each_jacobian(f(model), x).square().sum() / len(x)
    return loss.detach(), list(gradients(model, loss))


def equal(found, expected):
    """To rounding, and to the width of a difference."""
    torch.testing.assert_close([found[0], *found[1]], [expected[0], *expected[1]], rtol=1e-6, atol=1e-8)


# Checkpoints


@pytest.mark.parametrize("estimator", ["exact", "vjp", "difference"])
def test_non_reentrant_checkpoints(estimator):
    model, x = made(reentrant=False)
    equal(regularized(model, x, 0.5 * rs.JacobianNorm(estimator=estimator).on()), reference(x))


def test_places_in_a_checkpoint():
    model, x = made(reentrant=False)
    rule = 0.5 * rs.Contractive(estimator="exact", wrt=rs.outputs("first")).on(CODE)
    equal(regularized(model, x, rule), regularized(made()[0], x, rule))
    with pytest.raises(CaptureError, match=r"recomputes without forward mode.*use estimator='difference'"):
        regularized(model, x, rs.JacobianNorm(estimator="jvp").on())
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
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(estimator, whole):
    model, x = made()
    if whole:
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        run, model.second = model, torch.compile(model.second, backend="aot_eager", fullgraph=True)
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


def whole_jacobian(f, x):
    """‖∂ all outputs / ∂ all inputs‖² / batch."""
    return torch.func.jacrev(f)(x).square().sum() / len(x)


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


# What is kept, and what it costs


def test_work_is_done_only_when_it_is_due():
    model, x = made()
    seen = []
    model.first.register_forward_hook(lambda m, args, out: seen.append(args[0].requires_grad))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [rs.Contractive(estimator="exact").on(CODE, every=3, start=1), rs.L1().on(CODE)]
    with rs.attach(model, rules, optimizer) as reg:
        for _ in range(8):
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
    assert seen == [False, True, False, False, True, False, False, True]
    seen.clear()
    rule = rs.Contractive(estimator="difference").on(CODE, every=3, start=1)
    with rs.attach(model, rule, optimizer) as reg:
        for _ in range(4):
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
    assert len(seen) == 4 + 2


@pytest.mark.parametrize("estimator", ["exact", "vjp", "jvp", "difference"])
@pytest.mark.parametrize("end", ["step", "exception", "clear", "detach"])
def test_inputs_are_let_go(estimator, end):
    model, _ = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.Contractive(estimator=estimator).on(CODE), optimizer)
    x = torch.randn(5, 1, dtype=torch.float64)
    gone = weakref.ref(x)
    if end == "exception":
        handle = model.head.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
    else:
        loss = reg.loss(model(x).square().mean()) if end != "clear" else model(x)
        if end == "step":
            loss.backward()
            optimizer.step()
        elif end == "detach":
            reg.detach()
        del loss
    if end == "clear":
        model(torch.randn(5, 1, dtype=torch.float64))  # the forward before is forgotten
    del x
    gc.collect()
    assert gone() is None
    reg.detach()


def test_memory_is_flat():
    model, x = made()
    with rs.attach(model, [rs.Contractive(estimator=e).on(CODE) for e in ("exact", "jvp", "difference")]) as reg:
        counts = []
        for step in range(12):
            reg.loss(model(x).square().mean()).backward()
            if step in (3, 11):
                gc.collect()
                counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]


def test_evaluation_is_left_alone():
    model, x = made()
    with rs.attach(model, rs.Contractive(estimator="jvp").on(CODE)) as reg:
        model.eval()
        assert reg.loss(model(x).square().mean()) == model(x).square().mean()
        model.train()
        with torch.no_grad():
            assert not model(x).requires_grad
            reg.loss(model(x).square().mean())
        with pytest.raises(NeverFiredError):
            reg.loss(torch.ones(()))
        assert torch.func.vmap(model)(x).shape == (5, 1)


def test_copies_are_free_and_detach_leaves_nothing():
    model, x = made()
    keys = list(model.state_dict())
    reg = rs.attach(model, [rs.Contractive().on(CODE), rs.JacobianNorm(wrt=rs.outputs("first")).on()])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
        with pytest.raises(NeverFiredError):
            reg.penalty()
    assert list(model.state_dict()) == keys
    model(x)
    assert reg.penalty() > 0
    reg.detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_measure_has_value_and_gradient():
    model, x = made()
    rules = [rs.Contractive(estimator="exact").on(CODE, name="code"), rs.GradientPenalty(of="loss").on(name="loss")]
    with rs.attach(model, rules) as reg:
        loss = model(x).square().mean()
        found = reg.measure(loss)
        code = each_jacobian(lambda x: model.second(model.first(x).tanh()), x).square().sum() / 5
        assert found["code"].value == pytest.approx(code.item())
        norm = torch.cat([g.flatten() for g in gradients(model, code)]).norm()
        assert found["code"].gradient == pytest.approx(norm.item())
        assert sum(measure.share for measure in found.values()) == pytest.approx(1)
        assert reg.loss(loss) > loss


def test_micro_batches_add_up():
    model, x = made()
    rule = 0.5 * rs.JacobianNorm(estimator="exact").on()
    _, expected, _ = regularized(model, x[:4], rule)
    with rs.attach(model, rule) as reg:
        for part in x[:4].chunk(2):
            (reg.loss(model(part).square().mean()) / 2).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("estimator", ["exact", "jvp"])
def test_of_two_forwards_in_one_loss_the_mean(estimator):
    model, x = made()
    one, other = x[:2], x[2:4]
    with rs.attach(model, rs.Contractive(estimator=estimator).on(CODE)) as reg:
        model(x)  # a look that no loss depends on
        reg.loss(model(one).square().mean() + model(other).square().mean())
        (found,) = reg.values().values()
    expected = each_jacobian(lambda x: model.second(model.first(x).tanh()), x[:4]).square().sum() / 4
    assert found == pytest.approx(expected.item())


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


# Places


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids, *, scale=None):
        h = self.embedding(ids).mean(1)
        return self.head(h.tanh() if scale is None else h.tanh() * scale)


@pytest.mark.parametrize("estimator", ["exact", "jvp", "difference"])
def test_token_ids_have_no_derivative_but_their_embeddings_do(estimator):
    model, ids = Words().double(), torch.randint(9, (5, 3))
    with (
        rs.attach(model, rs.JacobianNorm(estimator=estimator).on()) as reg,
        pytest.raises(CaptureError, match="of token"),
    ):
        model(ids)
    projections = 1 if estimator == "exact" else 300
    rule = rs.JacobianNorm(estimator=estimator, wrt=rs.outputs("embedding"), projections=projections).on()
    with rs.attach(model, rule) as reg:
        model(ids)
        found = reg.penalty()
    h = model.embedding(ids)
    expected = each_jacobian(lambda h: model.head(h.mean(1).tanh()), h).square().sum() / 5
    torch.testing.assert_close(found, expected, rtol=1e-6 if estimator == "exact" else 0.15, atol=0)


def test_an_input_by_keyword():
    model, ids, scale = Words().double(), torch.randint(9, (5, 3)), torch.rand(5, 1, dtype=torch.float64)
    for estimator in ("exact", "jvp", "difference"):  # one entry: signs are exact
        with rs.attach(model, rs.JacobianNorm(estimator=estimator, wrt=rs.inputs(index="scale")).on()) as reg:
            model(ids, scale=scale)
            found = reg.penalty()
        h = model.embedding(ids).mean(1).tanh()
        torch.testing.assert_close(found, (h @ model.head.weight.T).square().sum() / 5)


def test_frozen_parameters_and_inputs_that_need_a_gradient():
    model, x = made()
    model.first.requires_grad_(False)
    x.requires_grad_()
    with rs.attach(model, rs.JacobianNorm(wrt=rs.outputs("first")).on()) as reg:
        reg.loss(model(x).square().mean()).backward()
    assert model.first.weight.grad is None
    assert x.grad is not None
    x.requires_grad_(False)
    with rs.attach(model, rs.JacobianNorm(wrt=rs.outputs("first")).on()) as reg:
        reg.loss(model(x).square().mean()).backward()
    assert reg.values().popitem()[1] > 0


def test_declared_at_a_layer():
    layer = rs.regularized(nn.Linear(4, 3), output=0.1 * rs.Contractive())
    model = nn.Sequential(layer, nn.Tanh())
    with rs.attach(model) as reg:
        model(torch.randn(5, 4))
        torch.testing.assert_close(reg.penalty(), 0.1 * layer.weight.square().sum())


def test_an_optional_place_that_is_not_there():
    model, x = made()
    with rs.attach(model, rs.Contractive().on(rs.outputs("nowhere"), optional=True)) as reg:
        assert reg.loss(model(x).square().mean()) > 0


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (rs.JacobianNorm(wrt=rs.outputs("nowhere")).on(), SelectionError, "matches no layer"),
        (rs.JacobianNorm(wrt=rs.outputs("first", via=torch.tanh)).on(), SelectionError, "via= is for"),
        (rs.JacobianNorm(wrt=rs.outputs("head")).on(CODE), CaptureError, "doesn't depend"),
        (rs.JacobianNorm(wrt=rs.inputs(batch_dim=1)).on(), PenaltyError, "same number of samples"),
        (rs.JacobianNorm(wrt=rs.inputs(batch_dim=7)).on(), PenaltyError, "no batch axis 7"),
    ],
    ids=str,
)
def test_what_cannot_be(rule, error, match):
    model, x = made()
    with pytest.raises(error, match=match):
        regularized(model, x, rule)
    for module in model.modules():
        assert not module._forward_hooks


def test_an_op_that_overwrites_a_place():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    for rule in (rs.Contractive().on(rs.outputs("0")), rs.JacobianNorm(wrt=rs.outputs("0")).on()):
        with rs.attach(model, rule) as reg, pytest.raises(CaptureError, match="overwritten by a later in-place op"):
            reg.loss(model(torch.randn(5, 4)).sum())


@pytest.mark.parametrize("wrt", [rs.inputs(), rs.outputs("first")], ids=repr)
def test_an_input_that_is_changed_before_the_further_forward(wrt):
    model, x = made()
    with rs.attach(model, rs.Contractive(estimator="jvp", wrt=wrt).on(CODE)) as reg:
        model(x)
        x.add_(1)
        with pytest.raises(CaptureError, match=r"in place|in-place"):
            reg.penalty()
