"""Penalties on activations: what they compute at the edges, over batches, with a memory, with a model."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PenaltyError, SelectionError
from restrain.models import keywords
from restrain.models.specs import resolve


def of(penalty, h, dim=0, mask=None):
    """Value and gradient over a batch."""
    h = h.detach().requires_grad_()
    value = penalty.over_batch(h, dim, mask)
    value.backward()
    return value.detach(), h.grad


# Statistics of a batch


@pytest.mark.parametrize("penalty", [rs.KLSparsity(0.1), rs.Decorrelation()], ids=repr)
def test_statistics_are_not_divided_by_the_batch_size(penalty):
    h = torch.rand(6, 4)
    torch.testing.assert_close(penalty.over_batch(h, 0), penalty(h))
    torch.testing.assert_close(penalty.over_batch(torch.cat([h, h]), 0), penalty(h))


@pytest.mark.parametrize("penalty", [rs.KLSparsity(0.1, per=1), rs.Decorrelation(per=1)], ids=repr)
def test_the_mean_is_over_all_axes_but_the_units(penalty):
    h = torch.rand(3, 4, 5, 2)
    rows = h.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(penalty.over_batch(h, 0), penalty.over_batch(rows, 0))
    with pytest.raises(PenaltyError, match="Write per=1"):
        type(penalty)(*([0.1] if isinstance(penalty, rs.KLSparsity) else [])).over_batch(h, 0)
    with pytest.raises(PenaltyError, match="beside the batch axis 1"):
        penalty.over_batch(h, 1)
    with pytest.raises(PenaltyError, match="batch_dim"):
        penalty.over_batch(h, 4)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, -1e9, torch.inf])
def test_kl_refuses_activations_outside_the_unit_interval(wrong):
    h = torch.rand(5, 3)
    h[2, 1] = wrong
    with pytest.raises(PenaltyError, match=r"via=torch.sigmoid.*\(h \+ 1\) / 2"):
        rs.KLSparsity(0.05)(h)
    net = nn.Sequential(nn.Linear(3, 4))
    rs.attach(net, rs.KLSparsity(0.05).on(rs.outputs("0")))
    with pytest.raises(PenaltyError, match="means of activations"):
        net(10 * torch.randn(5, 3))


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-7, 1e-6, 0.3, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_kl_is_finite_and_pulls_towards_the_rate(rate, level, dtype):
    value, gradient = of(rs.KLSparsity(rate), torch.full((4, 3), level, dtype=dtype))
    assert value.isfinite()
    assert value >= 0
    assert gradient.isfinite().all()
    assert gradient.sign().eq(np.sign(float(torch.tensor(level, dtype=dtype)) - rate)).all()


def test_kl_at_the_rate_is_zero_to_rounding_and_never_negative():
    for offset in torch.linspace(-1e-3, 1e-3, 201):
        assert rs.KLSparsity(0.05)(torch.full((8, 16), 0.05 + float(offset))) > -1e-12


def test_kl_in_compiled_code_stays_finite_where_it_cannot_look():
    value = torch.compile(lambda h: rs.KLSparsity(0.05).over_batch(h, 0), backend="aot_eager", fullgraph=True)
    for level in (-5.0, 3.0):
        h = torch.full((4, 3), level, requires_grad=True)
        found = value(h)
        assert found.isfinite()
        assert found > 1
        (gradient,) = torch.autograd.grad(found, h)
        assert gradient.isfinite().all()
        assert gradient.sign().eq(1 if level > 1 else -1).all()
    torch.compiler.reset()


def test_kl_of_tanh_units_by_a_map():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(6, 3)
    with rs.attach(net, rs.KLSparsity(0.2).on(rs.outputs("1", via=lambda h: (h + 1) / 2))) as reg:
        h = net(x)
        torch.testing.assert_close(reg.penalty(), rs.KLSparsity(0.2)((h + 1) / 2))


@pytest.mark.parametrize(
    "penalty", [rs.KLSparsity(0.1), rs.Decorrelation(), rs.Hoyer(), rs.Entropy(), rs.StateChange()]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_empty_batches_are_zero(penalty, dim):
    value, gradient = of(penalty, torch.rand((0, 4, 3) if dim == 0 else (4, 0, 3)), dim)
    assert value == 0
    assert gradient.numel() == 0
    value, gradient = of(penalty, torch.rand(2, 3, 4), 0, torch.zeros(2, 3, 1, dtype=torch.bool))
    assert value == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: rs.KLSparsity(0.0),
        lambda: rs.KLSparsity(1.0),
        lambda: rs.KLSparsity(float("nan")),
        lambda: rs.KLSparsity("0.1"),
        lambda: rs.KLSparsity(0.1, momentum=1.0),
        lambda: rs.KLSparsity(0.1, momentum=-0.1),
        lambda: rs.KLSparsity(0.1, per="out"),
        lambda: rs.Decorrelation(per=1.5),
        lambda: rs.Entropy(dim=True),
        lambda: rs.Confidence("in"),
        lambda: rs.L0(-0.1, 1.0),
        lambda: rs.L0(0.1, 0.0),
        lambda: rs.L0(0.1, float("inf")),
        lambda: rs.StateChange(per_unit=1),
        lambda: rs.NormChange(dim="1"),
        lambda: rs.DecoderL1(nn.Linear(2, 2).weight),
        lambda: rs.DecoderL1("decoder.weight", per="inward"),
    ],
)
def test_settings_that_cannot_be(make):
    with pytest.raises(PenaltyError):
        make()


# A running mean


def sparse_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()


def test_running_mean():
    net, mu = sparse_net(), 0.75
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg = rs.attach(net, rs.KLSparsity(0.1, momentum=mu).on(rs.outputs("1"), name="kl"), optimizer)
    total, weight = 0.0, 0.0
    for _ in range(5):
        batches = torch.randn(2, 6, 3, dtype=torch.float64)
        optimizer.zero_grad()
        means, expected = [], []
        for x in batches:
            m = net[1](net[0](x)).mean(0)
            mean = (mu * total + (1 - mu) * m) / (mu * weight + 1 - mu)
            expected.append(torch.autograd.grad(rs.KLSparsity(0.1)(mean[None]), net[0].weight)[0] / 2)
            means.append(m.detach())
        for x in batches:  # two micro-batches a step; the memory moves at the step alone
            (reg.loss(0 * net(x).sum()) / 2).backward()
        torch.testing.assert_close(net[0].weight.grad, sum(expected))
        net.eval()
        net(torch.randn(6, 3, dtype=torch.float64))
        net.train()
        optimizer.step()
        total = mu * total + (1 - mu) * sum(means) / 2
        weight = mu * weight + (1 - mu)
    (kept,) = reg.state_dict()["kept"].values()
    torch.testing.assert_close(kept["total"], total)
    torch.testing.assert_close(kept["weight"], torch.tensor([weight], dtype=torch.float64))


def test_running_mean_goes_on_from_a_checkpoint():
    x = torch.randn(8, 6, 3, dtype=torch.float64)

    def train(net, reg, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            reg.loss(net(batch).square().sum()).backward()
            optimizer.step()

    def start(state=None):
        net = sparse_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        penalty = rs.L1() + 3 * rs.KLSparsity(0.1, momentum=0.9)
        reg = rs.attach(net, penalty.on(rs.outputs("1")), optimizer)
        if state is not None:
            net.load_state_dict(state[0])
            reg.load_state_dict(state[1])
        return net, reg, optimizer

    whole = start()
    train(*whole, x)
    half = start()
    train(*half, x[:4])
    rest = start((half[0].state_dict(), half[1].state_dict()))
    train(*rest, x[4:])
    torch.testing.assert_close(rest[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)
    forgotten = start((half[0].state_dict(), {**half[1].state_dict(), "kept": start()[1].state_dict()["kept"]}))
    train(*forgotten, x[4:])
    assert not torch.equal(forgotten[0][0].weight, whole[0][0].weight)


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_running_mean():
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg = rs.attach(net, rs.KLSparsity(0.1, momentum=0.9).on(rs.outputs("1")), optimizer)
    for x in (torch.full((6, 3), torch.nan), torch.randn(6, 3)):
        optimizer.zero_grad()
        reg.loss(net(x.double()).sum()).backward()
    optimizer.step()
    (kept,) = reg.state_dict()["kept"].values()
    assert kept["total"].isfinite().all()


# Sample by sample


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_hoyer_does_not_see_the_scale(scale):
    w = torch.tensor([[3.0, -4.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    value, gradient = of(rs.Hoyer(), scale * w)
    torch.testing.assert_close(value, torch.tensor((1.96 + 1 + 0) / 3))
    assert gradient.isfinite().all()
    assert gradient[2].eq(0).all()


def test_entropies_are_stable_and_of_each_position():
    h = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [2.0, -torch.inf, 2.0]])
    for penalty, expected in ((rs.Entropy(), [0, math.log(3), math.log(2)]), (rs.Confidence(), None)):
        expected = expected or [math.log(3), 0, math.log(1.5)]
        value, gradient = of(penalty, h)
        torch.testing.assert_close(value, torch.tensor(sum(expected) / 3))
        assert gradient.isfinite().all()
    images = torch.randn(2, 3, 4, 5)
    expected = torch.distributions.Categorical(logits=images.movedim(1, -1)).entropy().sum() / 2
    torch.testing.assert_close(rs.Entropy(dim=1).over_batch(images, 0), expected)
    with pytest.raises(PenaltyError, match="dim=1"):
        rs.Entropy().over_batch(images, 0)
    probabilities = images[:, :, 0, 0].softmax(1)
    torch.testing.assert_close(rs.Entropy()(probabilities.log()), rs.Entropy()(images[:, :, 0, 0]))


def test_l0_counts_exactly_and_its_gradient_is_the_kernels():
    h = torch.tensor([[0.0, 0.44, 0.46, 0.5, 0.54, 0.56, -3.0, 7.0]])
    value, gradient = of(rs.L0(0.5, 0.1), h)
    assert value == 3
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0, 10, 10, 10, 0, 0, 0]]))
    big = torch.rand(1000, 1000)
    assert rs.L0(0.5, 1e-3)(big) == (big > 0.5).sum()
    with pytest.raises(PenaltyError, match="via="):
        rs.L0(0.5, 0.1)(torch.ones(2, dtype=torch.complex64))


# Over time


def test_changes_over_time_by_hand():
    h = torch.randn(3, 5, 2, dtype=torch.float64)
    change = (h[:, 1:] - h[:, :-1]).square().sum(2).mean(1)
    lengths = h.norm(dim=2)
    torch.testing.assert_close(rs.StateChange().over_batch(h, 0), change.mean())
    torch.testing.assert_close(rs.StateChange()(h), change.sum())
    torch.testing.assert_close(rs.StateChange().over_batch(h.transpose(0, 1), 1), change.mean())
    torch.testing.assert_close(rs.StateChange(dim=-1).over_batch(h.transpose(1, 2), 0), change.mean())
    torch.testing.assert_close(rs.StateChange().over_batch(h[0], None), change[0])
    torch.testing.assert_close(rs.StateChange(dim=0).over_batch(h[0], None), change[0])
    torch.testing.assert_close(rs.NormChange().over_batch(h, 0), lengths.diff(dim=1).square().mean())
    expected = lengths.square().diff(dim=1).square().mean()
    torch.testing.assert_close(rs.NormChange(squared=True).over_batch(h, 0), expected)
    fastai = (h[:, 1:] - h[:, :-1]).float().pow(2).mean()
    torch.testing.assert_close(rs.StateChange(per_unit=True).over_batch(h, 0), fastai.double(), rtol=1e-6, atol=0)
    images = torch.randn(2, 4, 3, 5)
    expected = images.diff(dim=1).square().sum((2, 3)).mean()
    torch.testing.assert_close(rs.StateChange().over_batch(images, 0), expected)


def test_norm_change_is_neither_negative_nor_telescoping():  # theanets, D1
    h = torch.zeros(1, 3, 2)
    h[0, :, 0] = torch.tensor([1.0, 3.0, 1.0])
    assert rs.NormChange().over_batch(h, 0) == 4


def test_a_single_step_changes_nothing():
    for penalty in (rs.StateChange(), rs.NormChange()):
        for shape in ((4, 1, 3), (4, 0, 3), (4,)):
            value, gradient = of(penalty, torch.randn(shape))
            assert value == 0
            assert gradient.eq(0).all()
        with pytest.raises(PenaltyError, match="axis of the steps"):
            type(penalty)(dim=0).over_batch(torch.randn(4, 5, 3), 0)
        with pytest.raises(PenaltyError, match="axis of the steps"):
            type(penalty)(dim=3).over_batch(torch.randn(4, 5, 3), 0)


# With a decoder


class Sae(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.encoder, self.relu, self.decoder = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)
        self.W_dec = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return self.decoder(self.relu(self.encoder(x))) + self.relu(self.encoder(x)) @ self.W_dec


def test_decoder_l1():
    sae, x = Sae().double(), torch.randn(5, 4, dtype=torch.float64)
    h = sae.encoder(x).relu()
    columns = sae.decoder.weight.norm(dim=0)
    cases = {
        rs.DecoderL1("decoder.weight"): columns,
        rs.DecoderL1("decoder.weight", per=1): columns,
        rs.DecoderL1("W_dec", per=0): sae.W_dec.norm(dim=1),
        rs.DecoderL1("encoder.weight", per="out"): sae.encoder.weight.norm(dim=1),
    }
    for penalty, lengths in cases.items():
        expected = 0.3 * (h * lengths).sum() / 5
        wanted = torch.autograd.grad(expected, list(sae.parameters()), allow_unused=True, retain_graph=True)
        with rs.attach(sae, 0.3 * penalty.on(rs.outputs("relu"))) as reg:
            sae(x)
            value = reg.penalty()
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value, list(sae.parameters()), allow_unused=True), wanted)
            assert rs.Plan.from_dict(reg.plan.to_dict()).rules[0].what == 0.3 * penalty


def test_decoder_l1_looks_the_decoder_up_at_each_use_and_is_smooth_at_zero():
    sae, x = Sae(), torch.randn(5, 4)
    reg = rs.attach(sae, rs.DecoderL1().on(rs.outputs("relu")))
    sae.load_state_dict({k: torch.zeros_like(v) for k, v in sae.state_dict().items()}, assign=True)
    sae.requires_grad_()
    loss = reg.loss(sae(x).sum())
    loss.backward()
    assert loss == 0
    assert sae.decoder.weight.grad.isfinite().all()


def test_decoder_l1_refuses():
    sae = Sae()
    with pytest.raises(SelectionError, match=r"no parameter 'decoder.wieght'.*near it: 'decoder.weight'"):
        rs.attach(sae, rs.DecoderL1("decoder.wieght").on(rs.outputs("relu")))
    with pytest.raises(SelectionError, match="of activations"):
        rs.DecoderL1().on("decoder.weight")
    with pytest.raises(PenaltyError, match="needs its model"):
        rs.DecoderL1()(torch.ones(3, 6))
    rs.attach(sae, rs.DecoderL1(per="out").on(rs.outputs("relu")))
    with pytest.raises(PenaltyError, match=r"4 units, the output .* has 6"):
        sae(torch.randn(5, 4))


# Keywords of the models


KL = {"strength": 0.5, "rate": 0.1, "momentum": 0.5}


def test_keywords_of_the_models_act_on_hidden_layers():
    context = keywords.Context(resolve([5, (7, "sigmoid"), (3, "rnn"), 2]))
    made = keywords.rules({"klsparsity": KL, "statechange": 0.1, "hoyer": 0.2, "entropy": {"on": "out"}}, context)
    assert [repr(rule.where) for rule in made[:2]] == [
        repr(rs.outputs(names)) for names in (["hid1", "hid2"], ["hid2"])
    ]
    assert made[2].where == rs.weights
    assert repr(made[3].where) == repr(rs.outputs(["out"]))


def test_validation_does_not_feed_the_running_mean():
    x = np.random.default_rng(0).random((24, 5)).astype("f4")
    trained = []
    for valid in (None, x[:7]):
        net = rs.Autoencoder([5, (7, "sigmoid"), 5], random_state=0, batch_size=6, shuffle=False)
        net.train(x, epochs=3, klsparsity=KL, valid=valid)
        trained.append(net.module_.state_dict())
    assert net.history_[-1]["klsparsity"] > 0
    torch.testing.assert_close(*trained, rtol=0, atol=0)


PER_TOKEN = {
    "L1": (rs.L1(), lambda h, lengths: h.abs().sum(-1)),
    "Hoyer": (rs.Hoyer(), lambda h, lengths: h.abs().sum(-1).square() / h.square().sum(-1)),
    "DecoderL1": (rs.DecoderL1("decoder.weight"), lambda h, lengths: (h.abs() * lengths).sum(-1)),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_tokens_are_samples_where_both_axes_are_joined(name):
    penalty, of_tokens = PER_TOKEN[name]
    sae, x = Sae().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    right = of_tokens(sae.encoder(x).relu(), sae.decoder.weight.norm(dim=0)).mean()
    with rs.attach(sae, penalty.on(rs.outputs("relu", via=lambda h: h.flatten(0, 1)))) as reg:
        data = 0 * sae(x).sum()
        torch.testing.assert_close(reg.loss(data), right)
