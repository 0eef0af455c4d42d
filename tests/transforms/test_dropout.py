"""Dropout in its kinds: what lies together, how often, and what it is scaled by, on real layers."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import SelectionError, TransformError


def bound(rate, count):
    """4.5 standard errors of a share: beyond it with a probability of 7e-6."""
    return 4.5 * math.sqrt(rate * (1 - rate) / count)


def factors(model, rule, *args):
    """What a rule on a model's layers multiplies the model's output by, to 9 digits."""
    model, args = model.double(), [x.double() for x in args]
    clean = model(*args)
    with rs.attach(model, rule):
        return (model(*args) / clean).detach().round(decimals=9)


def check_constant(factor, dims, rate):
    """Over these dims the factor is one, drawn at the rate; not over any other."""
    assert torch.equal(factor.amax(dims), factor.amin(dims))
    drawn = factor.amax(dims)
    torch.testing.assert_close(drawn[drawn != 0], torch.full_like(drawn[drawn != 0], 1 / (1 - rate)), rtol=1e-6, atol=0)
    assert abs(float((drawn == 0).double().mean()) - rate) <= bound(rate, drawn.numel())
    for dim in range(drawn.dim()):
        assert not torch.equal(drawn.amax(dim), drawn.amin(dim))


def test_channels_are_dropped_whole():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 30, 3)), torch.randn(20, 2, 8, 7)
    factor = factors(net, rs.Dropout(0.4, same_over="space").on(rs.outputs("0")), x)
    check_constant(factor, (2, 3), 0.4)
    for rank in (3, 5):
        check_constant(rs.Dropout(0.4, "space")(torch.ones(20, 30, *[3] * (rank - 2))), tuple(range(2, rank)), 0.4)


def test_constancy_oracle():
    x = torch.ones(20, 30, 4)
    for wrong in (rs.Dropout(0.4), rs.Dropout(0.2, "space"), rs.DropPath(0.4)):
        with pytest.raises(AssertionError):
            check_constant(wrong(x), (2,), 0.4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "noise", [rs.Dropout(0.4, "time"), rs.GaussianDropout(0.4, "time"), rs.AlphaDropout(0.4, "time")]
)
def test_the_same_mask_over_time(noise, batch_first):
    torch.manual_seed(1)
    net = nn.LSTM(5, 40, batch_first=batch_first)
    x = torch.randn(12, 7, 5) if batch_first else torch.randn(7, 12, 5)
    time = 1 if batch_first else 0
    clean, (h, c) = net(x)
    with rs.attach(net, noise.on(rs.outputs())):
        y, (h2, c2) = net(x)
    assert torch.equal(h, h2)
    assert torch.equal(c, c2)
    if isinstance(noise, rs.AlphaDropout):
        dropped = (y - noise(torch.full_like(y, -1.7580993408473766)).amin()).abs() < 1e-6
        assert torch.equal(dropped.any(time), dropped.all(time))
        return
    factor = (y / clean).detach()
    torch.testing.assert_close(factor, factor.narrow(time, 0, 1).expand_as(factor), rtol=1e-3, atol=1e-4)
    if isinstance(noise, rs.Dropout):
        check_constant((factor * 0.6).round() / 0.6, (time,), 0.4)


def test_the_same_mask_over_time_on_an_embedding_whose_batch_is_second():
    net = nn.Embedding(9, 30)
    with rs.attach(net, rs.Dropout(0.5, "time").on(rs.outputs(batch_dim=1))):
        factor = net(torch.randint(9, (6, 20)))
        assert torch.equal((factor == 0).all(0), (factor == 0).any(0))
        assert 0 < (factor == 0).double().mean() < 1


def test_packed_sequences_have_one_mask_a_sequence():
    torch.manual_seed(0)
    net = nn.GRU(3, 20)
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 6, 2)], enforce_sorted=False)
    clean = pad_packed_sequence(net(packed)[0], padding_value=torch.nan)[0]
    for noise in (rs.Dropout(0.5, "time"), rs.DropPath(0.5)):
        with rs.attach(net, noise.on(rs.outputs())):
            out = net(packed)[0]
            assert isinstance(out, PackedSequence)
            factor = (pad_packed_sequence(out, padding_value=torch.nan)[0] / clean).detach()
        for number, length in enumerate((4, 6, 2)):
            mine = factor[:length, number]
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, mine[:1].expand_as(mine))
            if isinstance(noise, rs.DropPath):
                torch.testing.assert_close(mine, mine[:1, :1].expand_as(mine))
            else:
                assert 0 < (mine[0] == 0).double().mean() < 1
    with rs.attach(net, rs.Dropout(0.5, same_over=0).on(rs.outputs())), pytest.raises(TransformError, match="packed"):
        net(packed)
    with rs.attach(net, rs.BlockDropout(0.5, 2).on(rs.outputs())), pytest.raises(TransformError, match="channels"):
        net(packed)


@pytest.mark.parametrize("x", [torch.ones(3, 4), torch.ones(2, 3, 4, 5), torch.ones(())])
def test_time_that_is_not_clear_is_refused(x):
    with pytest.raises(TransformError, match="give the dim of time"):
        rs.Dropout(0.1, "time")(x)


def test_dims_by_number():
    x = torch.ones(20, 25, 6, 5)
    check_constant(rs.Dropout(0.3, same_over=(0, -1))(x), (0, 3), 0.3)
    check_constant(rs.Dropout(0.3, same_over=2)(x), (2,), 0.3)
    assert rs.Dropout(0.3, [0, -1]) == rs.Dropout(0.3, (0, -1))
    with pytest.raises(TransformError, match="such dims"):
        rs.Dropout(0.3, same_over=4)(x)
    for wrong in ("sample", 1.5, True, (), ("time",), (0, 1.0)):
        with pytest.raises(TransformError, match="same_over= is"):
            rs.Dropout(0.3, wrong)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_drop_path_drops_whole_samples_at_its_rate(rate):
    """Not always, as torchlayers' StochasticDepth did."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    net, x = nn.Sequential(Block(), Block()), torch.randn(4000, 4)
    rs.attach(net, rs.DropPath(rate).on(rs.outputs("0.branch")))
    out, clean = net[0](x) - x, net[0].branch[1](net[0].branch[0](x))
    dropped = (out.abs() < 1e-6).all(1)
    assert abs(float(dropped.double().mean()) - rate) <= bound(rate, 4000)
    torch.testing.assert_close(out[~dropped], clean[~dropped] / (1 - rate), rtol=1e-4, atol=1e-5)


def test_drop_path_honours_the_batch_axis():
    net, x = nn.GRU(3, 5), torch.randn(7, 50, 3)
    factor = factors(SimpleCall(net), rs.DropPath(0.4).on(rs.outputs("inner")), x)
    drawn = factor[0, :, 0]
    torch.testing.assert_close(factor, drawn[None, :, None].expand_as(factor))
    assert 0 < (drawn == 0).double().mean() < 1


class SimpleCall(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def check_blocks(draws, rate, size):
    """Each place in space, at the border too, is zero at the rate, and zeros lie in whole blocks."""
    zero = (draws == 0).double()
    shares = zero.mean((0, 1))
    assert (shares - rate).abs().max() <= bound(rate, zero.numel() / shares.numel())
    largest = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[shares.dim()]
    whole = -largest(-zero, size, stride=1)  # where a block begins of which all is zero
    middle = [slice(size - 1, 1 - size)] * shares.dim()  # beyond, a block may be cut off by the border
    assert torch.equal(largest(whole, size, stride=1), zero[(..., *middle)])


@pytest.mark.parametrize(("shape", "size"), [((1200, 4, 30), 4), ((240, 3, 9, 14), 3), ((160, 2, 5, 4, 6), 2)])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_blocks_cover_each_entry_at_the_rate(shape, size, rate):
    torch.manual_seed(3)
    draws = rs.BlockDropout(rate, size)(torch.ones(shape))
    check_blocks(draws, rate, size)
    torch.testing.assert_close(draws[draws != 0], torch.full_like(draws[draws != 0], 1 / (1 - rate)))


def test_block_oracle():
    """Entries alone, blocks of another size, and blocks that don't reach over the border at a chance that only adds."""
    torch.manual_seed(3)
    x = torch.ones(2000, 2, 12)
    starts = torch.bernoulli(torch.full((2000, 2, 10), 0.3 / 3))
    inside = 1 - F.max_pool1d(F.pad(starts, (2, 2)), 3, 1)
    for wrong in (rs.Dropout(0.3)(x), rs.BlockDropout(0.3, 2)(x), rs.BlockDropout(0.36, 3)(x), inside):
        with pytest.raises(AssertionError):
            check_blocks(wrong, 0.3, 3)


def test_blocks_of_one_are_dropout_and_blocks_reach_each_channel_alone():
    torch.manual_seed(0)
    x = rs.BlockDropout(0.3, 1)(torch.ones(50, 40, 5))
    assert abs(float((x == 0).double().mean()) - 0.3) <= bound(0.3, x.numel())
    wide = rs.BlockDropout(0.3, 50)(torch.ones(1000, 1, 2, 2))
    assert abs(float((wide == 0).double().mean()) - 0.3) <= bound(0.3, 1000), "larger than the map"
    for shape in ((3, 4), (3,), (2, 2, 2, 2, 2, 2)):
        with pytest.raises(TransformError, match=r"\(N, C, L\)"):
            rs.BlockDropout(0.1, 2)(torch.ones(shape))
    for size in (0, -1, 1.5, True, "3"):
        with pytest.raises(TransformError, match="size= is"):
            rs.BlockDropout(0.1, size)


def test_block_dropout_on_a_convolution():
    net, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 12, 12)
    factor = factors(net, rs.BlockDropout(0.3, 3).on(rs.outputs()), x)
    assert 0 < (factor == 0).double().mean() < 1
    net = nn.LSTM(3, 4)
    with rs.attach(net, rs.BlockDropout(0.3, 3).on(rs.outputs())), pytest.raises(TransformError, match="channels"):
        net(torch.ones(2, 5, 3))


@pytest.mark.parametrize("keyword", [False, True])
def test_a_word_is_dropped_wherever_it_stands(keyword):
    """As in AWD-LSTM: by rows of the weight."""
    torch.manual_seed(0)
    net, ids = nn.Embedding(200, 6), torch.randint(200, (30, 50))
    rs.attach(net, rs.EmbeddingDropout(0.3).on(rs.outputs()))
    torch.manual_seed(5)
    out = net(input=ids) if keyword else net(ids)
    torch.manual_seed(5)
    kept = torch.empty(200).bernoulli_(0.7)
    torch.testing.assert_close(out, F.embedding(ids, net.weight * (kept / 0.7)[:, None]))
    (gradient,) = torch.autograd.grad(out.sum(), net.weight)
    assert gradient[kept == 0].eq(0).all()
    assert torch.equal(net.eval()(ids), net.weight[ids])


def test_embedding_dropout_elsewhere_is_refused():
    for place in (rs.outputs("1"), rs.inputs("1"), rs.outputs(nn.Linear)):
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        with pytest.raises(SelectionError, match=r"rs.outputs\(nn.Embedding\)"):
            rs.attach(net, rs.EmbeddingDropout(0.1).on(place))
    x = torch.ones(40, 30, 4)
    check_constant(rs.EmbeddingDropout(0.4)(x), (2,), 0.4)
    assert rs.EmbeddingDropout(0.4)(torch.ones(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 4)


@pytest.mark.parametrize(("same", "peer"), [(None, F.alpha_dropout), ("space", F.feature_alpha_dropout)])
def test_alpha_dropout_is_torchs(same, peer):
    x = torch.randn(6, 5, 4, 3)
    torch.manual_seed(2)
    expected = peer(x, 0.3, training=True)
    torch.manual_seed(2)
    torch.testing.assert_close(rs.AlphaDropout(0.3, same)(x), expected)


def test_alpha_dropout_keeps_mean_and_variance_behind_selu():
    torch.manual_seed(0)
    x = F.selu(torch.randn(400_000, dtype=torch.float64))
    assert abs(x.mean()) < 4.5 / 400_000**0.5
    y = rs.AlphaDropout(0.25)(x)
    assert abs(y.mean()) < 5 / 400_000**0.5
    assert abs(y.var() - 1) < 0.01


def test_gaussian_dropout_has_keras_deviation():
    torch.manual_seed(0)
    y = rs.GaussianDropout(0.36)(torch.ones(100_000, dtype=torch.float64))
    assert abs(y.std() - 0.75) < 4.5 * 0.75 / math.sqrt(200_000)
    assert abs(y.mean() - 1) < 4.5 * 0.75 / math.sqrt(100_000)


EVERY = [
    rs.Dropout(0.0, "space"),
    rs.Dropout(0.0, "time"),
    rs.GaussianDropout(0.0),
    rs.AlphaDropout(0.0),
    rs.DropPath(0.0),
    rs.BlockDropout(0.0, 3),
    rs.EmbeddingDropout(0.0),
]


@pytest.mark.parametrize("noise", EVERY, ids=repr)
def test_rates(noise):
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(noise(x), x, rtol=0, atol=0)
    cls, others = type(noise), [noise.size] if isinstance(noise, rs.BlockDropout) else []
    for rate in (-0.1, 1, 1.5, float("nan"), "0.5", True):
        with pytest.raises(TransformError, match="from 0 to below 1"):
            cls(rate, *others)
    with pytest.raises(TransformError, match="token ids"):
        noise(torch.ones(2, 3, 4, dtype=torch.long))
    with pytest.raises(TransformError, match="complex"):
        noise(torch.ones(2, 3, 4, dtype=torch.complex64))


@pytest.mark.parametrize(
    "noise", [rs.Dropout(0.5, "space"), rs.BlockDropout(0.5, 2), rs.DropPath(0.5), rs.AlphaDropout(0.5)], ids=repr
)
def test_under_vmap_and_checkpoints(noise):
    net, x = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.Tanh()).double(), torch.randn(6, 4, 2, 9).double()
    rs.attach(net, noise.on(rs.outputs("0")))
    drawn = torch.func.vmap(net, randomness="different")(x[:1].expand(6, 4, 2, 9))
    assert drawn.shape == (6, 4, 8, 9)
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(net)(x)

    def gradient(run, **options):
        torch.manual_seed(4)
        net.zero_grad()
        run(x[0].clone().requires_grad_(), **options).square().sum().backward()
        return net[0].weight.grad.clone()

    for reentrant in (False, True):
        again = gradient(functools.partial(checkpoint, net), use_reentrant=reentrant)
        torch.testing.assert_close(again, gradient(net), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*compiled before these hooks:restrain.errors.RestrainWarning")
def test_compiled_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.head = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3), nn.Linear(8, 2)

        def forward(self, ids):
            return self.head(self.conv(self.words(ids).transpose(1, 2)).mean(2))

    plan = [
        rs.EmbeddingDropout(0.3).on(rs.outputs("words")),
        rs.Dropout(0.3, "time").on(rs.outputs("words")),
        rs.BlockDropout(0.3, 2).on(rs.outputs("conv")),
        rs.Dropout(0.3, "space").on(rs.outputs("conv")),
        rs.DropPath(0.3).on(rs.inputs("head")),
        rs.GaussianNoise(0.3, relative=True).on(rs.outputs("head")),
    ]
    torch.compiler.reset()
    net, ids = Net(), torch.randint(20, (4, 9))
    rs.attach(net, plan)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = net(ids)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(ids), expected)
    assert not torch.equal(compiled(ids), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "noise",
    [
        *EVERY,
        rs.Dropout(0.1, (1, 2)),
        rs.UniformNoise(0.1, True),
        rs.GaussianNoise(0.2, True),
        rs.GaussianDropout(0.1, "time"),
    ],
    ids=repr,
)
def test_plans_hold_them(noise, tmp_path):
    plan = rs.Plan((noise.on(rs.outputs("0")),))
    for file in ("plan.yaml", "plan.json", "plan.toml"):
        plan.save(tmp_path / file)
        assert rs.Plan.load(tmp_path / file).rules[0].what == noise


@pytest.mark.slow
def test_keras_has_the_same_moments(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    torch.manual_seed(0)
    x, n = torch.linspace(-2, 2, 24).reshape(1, 2, 3, 4), 4000
    last = (0, 2, 3, 1)  # Keras has channels last
    pairs = [
        (rs.GaussianDropout(0.3), keras.layers.GaussianDropout(0.3, seed=1)),
        (rs.AlphaDropout(0.3), keras.layers.AlphaDropout(0.3, seed=1)),
        (rs.GaussianNoise(0.3), keras.layers.GaussianNoise(0.3, seed=1)),
        (rs.Dropout(0.3, "space"), keras.layers.SpatialDropout2D(0.3, data_format="channels_last", seed=1)),
    ]
    for ours, theirs in pairs:
        many = x.expand(n, 2, 3, 4)
        drawn = [ours(many), torch.as_tensor(theirs(many.permute(last), training=True)).permute(0, 3, 1, 2)]
        for moment in (lambda d: d, lambda d: (d - drawn[0].mean(0)).square()):  # noqa: B023
            a, b = map(moment, drawn)
            error = (a.mean(0) - b.mean(0)).abs() / ((a.var(0) + b.var(0)) / n).sqrt().clamp_min(1e-9)
            assert error.max() < 4.5, ours
    whole = torch.as_tensor(pairs[3][1](torch.ones(50, 3, 3, 8), training=True))
    assert torch.equal(whole.amax((1, 2)), whole.amin((1, 2)))
