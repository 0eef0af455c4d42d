"""Noise on activations: what is drawn, where it acts, and the exact gradient for it under checkpoints and compilers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import TransformError
from restrain.transforms.layout import Layout


class NoiseDrawn(rs.Noise, register=False):
    """Gaussian noise that keeps what it drew."""

    def __init__(self, std):
        self.std, self.drawn = std, []

    def __call__(self, x):
        noise = torch.randn_like(x)
        self.drawn.append(noise.detach())
        return x + self.std * noise


class Net(nn.Module):
    """Two blocks that may be checkpointed."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def run(self, layer, x):
        def block(x):
            return layer(x).tanh() * 2

        return block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.head(self.run(self.second, self.run(self.first, x)))


PLAN = [
    rs.GaussianNoise(0.3).on(rs.inputs()),
    rs.Dropout(0.4).on(rs.outputs("first")),
    rs.GaussianNoise(0.2).on(rs.outputs("second")),
    0.5 * rs.L2().on(rs.outputs("second")),
    0.3 * rs.L1().on(rs.outputs("first")),
    rs.Dropout(0.25).on(rs.inputs("head")),
]


def by_hand(net, x, y):
    """The same draws in the same order; penalties see the layer's own output, before noise at the same place."""
    x = x + 0.3 * torch.randn_like(x)
    first = net.first(x)
    h = F.dropout(first, 0.4).tanh() * 2
    second = net.second(h)
    h = (second + 0.2 * torch.randn_like(second)).tanh() * 2
    loss = F.cross_entropy(net.head(F.dropout(h, 0.25)), y)
    return loss + (0.5 * second.square().sum() + 0.3 * first.abs().sum()) / len(x)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def problem():
    torch.manual_seed(1)
    net = Net().double()
    return net, torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))


@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_exact(net, run, x, y):
    """That three losses and their gradients are those by hand for the same seed."""
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    with rs.attach(net, PLAN) as reg:
        for seed in range(3):
            torch.manual_seed(seed)
            expected = by_hand(plain, x, y)
            torch.manual_seed(seed)
            got = reg.loss(F.cross_entropy(run(x), y))
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(gradients(net, got), gradients(plain, expected))


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_is_that_of_the_noise_that_was_drawn(reentrant, backend):
    net, x, y = problem()
    net.reentrant = reentrant
    x.requires_grad_(backend == "eager")  # needed by reentrant checkpoints; dynamo warns of inputs that are no leaves
    run = net if backend == "eager" else torch.compile(net, backend=backend, fullgraph=True)
    assert_exact(net, run, x, y)


def test_the_oracle_notices_another_draw():
    net, x, y = problem()
    first, second = (by_hand(net, x, y) for _ in range(2))
    assert not torch.isclose(first, second)
    with pytest.raises(AssertionError):
        assert_exact(net, lambda x: net(x + 0 * torch.rand(1)), x, y)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_recomputation_of_a_checkpoint_draws_the_same(reentrant):
    net, x, y = problem()
    net.reentrant = reentrant
    x.requires_grad_()
    noise = NoiseDrawn(0.5)
    rs.attach(net, noise.on(rs.outputs("second")))
    loss = F.cross_entropy(net(x), y)
    (drawn,) = noise.drawn
    got = gradients(net, loss)
    assert len(noise.drawn) == (1 if reentrant is None else 2)
    assert all(torch.equal(again, drawn) for again in noise.drawn)
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    h = plain.second(plain.first(x).tanh() * 2) + 0.5 * drawn
    torch.testing.assert_close(got, gradients(plain, F.cross_entropy(plain.head(h.tanh() * 2), y)))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kept_entries_are_divided_by_the_rate_of_keeping(dtype, rate):
    model = nn.Sequential(nn.Linear(4, 50), nn.Identity()).to(dtype)
    x = torch.randn(200, 4, dtype=dtype)
    clean = model[0](x)
    rs.attach(model, rs.Dropout(rate).on(rs.outputs("0")))
    out = model(x)
    kept = out != 0
    assert out.dtype == dtype
    expected = clean.double() / (1 - rate)
    loose = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double()[kept], expected[kept], rtol=loose, atol=0)
    bound = 4 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - rate)) <= bound


def test_dropout_draws_anew_for_each_call_and_entry_and_not_in_evaluation():
    model = nn.Sequential(nn.Identity())
    rs.attach(model, rs.Dropout(0.5).on(rs.outputs("0")))
    x = torch.ones(30, 40)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    for dim in (0, 1):
        share = (first == 0).double().mean(dim)
        assert 0 < share.min() < share.max() < 1, "neither whole rows nor whole columns"
    assert torch.equal(model.eval()(x), x)
    model[0].train()
    assert not torch.equal(model(x), x), "it goes by the mode of the layer where it acts"


def test_noise_leaves_inputs_and_recorded_tensors_as_they_are():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    plan = [rs.GaussianNoise(1.0).on(rs.outputs("0")), rs.GaussianNoise(1.0).on(rs.inputs("1")), rs.L2().on("1.weight")]
    x = torch.randn(5, 3)
    before, weight = x.clone(), model[1].weight.detach().clone()
    reg = rs.attach(model, plan)
    reg.loss(model(x).sum()).backward()
    assert torch.equal(x, before)
    assert torch.equal(model[1].weight, weight)
    assert x.grad is None


def test_several_noises_at_one_place_act_in_the_order_of_the_plan():
    model = nn.Sequential(nn.Identity())
    x = torch.randn(300, 20, dtype=torch.float64)
    rs.attach(model, [rs.GaussianNoise(0.5).on(rs.outputs("0")), rs.Dropout(0.5).on(rs.outputs("0"))])
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, F.dropout(x + 0.5 * torch.randn_like(x), 0.5), rtol=0, atol=0)
    assert (got == 0).double().mean() > 0.4, "what is dropped stays zero"


def test_noise_on_members_of_tuples_and_on_keyword_inputs():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.inner = nn.LSTM(3, 4, batch_first=True), self.Scale()

        class Scale(nn.Module):
            def forward(self, x, *, scale, ids):
                return x * scale[ids]

        def forward(self, x):
            y, (h, c) = self.lstm(x)
            return y, h, c, self.inner(y, scale=torch.ones(2), ids=torch.tensor(1))

    torch.manual_seed(0)
    model, x = Takes(), torch.randn(5, 6, 3)
    clean = copy.deepcopy(model)(x)
    reg = rs.attach(model, rs.GaussianNoise(1.0).on(rs.outputs("lstm", index=1)))
    y, h, c, out = model(x)
    assert torch.equal(y, clean[0])
    assert torch.equal(c, clean[2])
    assert torch.equal(out, clean[3])
    assert not torch.isclose(h, clean[1]).any()
    reg.detach()
    rs.attach(model, rs.GaussianNoise(1.0).on(rs.inputs("inner", index="scale")))
    y, h, c, out = model(x)
    assert torch.equal(y, clean[0])
    ratio = out / y
    torch.testing.assert_close(ratio, ratio[:1, :1, :1].expand_as(ratio))
    assert abs(float(ratio.detach()[0, 0, 0]) - 1) > 1e-3


def test_relative_noise_is_by_the_deviation_over_the_batch():
    x = torch.randn(500, 3, 3) * torch.tensor([1.0, 10.0, 0.1])
    scale = x.std(0, correction=0, keepdim=True)
    for batch_dim, tensor in ((0, x), (1, x.transpose(0, 1))):
        for noise, bounds in ((rs.UniformNoise(0.5, relative=True), 0.5), (rs.GaussianNoise(0.2, relative=True), None)):
            net = nn.Identity()
            with rs.attach(net, noise.on(rs.outputs(batch_dim=batch_dim))):
                added = (net(tensor) - tensor).movedim(batch_dim, 0) / scale
            if bounds is not None:
                assert added.abs().max() <= bounds * (1 + 1e-3)
                assert added.abs().max() > 0.99 * bounds
            else:
                assert (added.std(0) / 0.2 - 1).abs().max() < 4.5 / 1000**0.5
    alone = torch.randn(1, 7, requires_grad=True)
    assert torch.equal(rs.GaussianNoise(1.0, relative=True)(alone), alone)
    (slope,) = torch.autograd.grad(rs.UniformNoise(1.0, True)(torch.cat([alone, -alone])).sum(), alone)
    assert torch.equal(slope, torch.zeros_like(slope)), "no gradient through the deviation"
    with pytest.raises(TransformError, match="relative="):
        rs.UniformNoise(0.1, relative=0.3)


def test_a_layout_says_where_the_batch_is():
    noise = rs.GaussianNoise(1.0, relative=True)
    x = torch.randn(4, 3)
    assert torch.equal(noise.at(x, Layout(None)), x)


def test_the_same_noise_by_two_attachments_is_refused_in_one_plan_it_is_drawn_twice():
    """A cell of a notebook that is run again."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    rule = rs.Dropout(0.5).on(rs.outputs("1"))
    reg = rs.attach(model, rule)
    with pytest.raises(rs.errors.HowError, match=r"same noise Dropout\(rate=0\.5\) at the outputs of '1'.*detach"):
        rs.attach(model, rule)
    for other in (rs.Dropout(0.4).on(rs.outputs("1")), rs.Dropout(0.5).on(rs.inputs("1"))):
        rs.attach(model, other).detach()
    reg.detach()
    x = torch.ones(4000, 3)
    with rs.attach(model, [rule, rs.Dropout(0.5).on(rs.outputs(nn.ReLU))]):
        clean = torch.relu(model[0](x))
        kept = (model(x)[clean > 0] != 0).float().mean()
    assert kept.item() == pytest.approx(0.25, abs=0.05)
