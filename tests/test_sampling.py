"""Noise and dropout in evaluation: what acts inside `rs.sampling`, and that all is as before afterwards."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import SelectionError


def modes(model):
    return [module.training for module in model.modules()]


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    return net, torch.randn(6, 4)


def varies(model, x):
    with torch.no_grad():
        return not torch.equal(model(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_models_own_dropout_acts_and_batch_statistics_do_not(training):
    net, x = network()
    net.train(training)
    net[4].train(not training)
    before, state = modes(net), {key: value.clone() for key, value in net.state_dict().items()}
    with rs.sampling(net):
        assert [m.training for m in net] == [False, False, False, True, False]
        torch.manual_seed(3)
        got = net(x)
        torch.manual_seed(3)
        h = F.batch_norm(net[0](x), net[1].running_mean, net[1].running_var, net[1].weight, net[1].bias).tanh()
        torch.testing.assert_close(got, net[4](F.dropout(h, 0.5)))
    assert modes(net) == before
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_noise_of_rules_acts_and_penalties_record_nothing():
    net, x = network()
    plan = [
        rs.GaussianNoise(0.5).on(rs.inputs()),
        rs.Dropout(0.4).on(rs.outputs("0")),
        rs.L1().on(rs.outputs("3")),
        rs.L2().on(rs.outputs("0")),
    ]
    reg = rs.attach(net, plan)
    loss = reg.loss(net(x).sum())
    values = reg.values()
    net.eval()
    net[3] = nn.Identity()
    assert not varies(net, x)
    with rs.sampling(net):
        torch.manual_seed(1)
        got = net(x)
        torch.manual_seed(1)
        h = F.dropout(net[0].forward(x + 0.5 * torch.randn_like(x)), 0.4)
        torch.testing.assert_close(got, net[4](net[1](h).tanh()))
        assert torch.equal(torch.tensor(list(reg.values().values())), torch.tensor(list(values.values())))
    assert not varies(net, x)
    assert torch.equal(reg.loss(torch.zeros(())), torch.zeros(()))
    loss.backward()


def test_penalties_at_a_dropout_module_that_samples_are_not_counted():
    net, x = network()
    reg = rs.attach(net, rs.L2().on(rs.outputs("3")))
    loss = reg.loss(net(x).sum())
    with rs.sampling(net):
        net(x).sum().backward()
    assert reg.loss(net.train()(x).sum()).isfinite()
    assert len(reg._forwards.current) == 1
    loss.backward()


def test_nested_and_after_an_exception():
    net, x = network()
    reg = rs.attach(net, rs.GaussianNoise(0.1).on(rs.outputs("4")))
    net.eval()
    before = modes(net)
    with rs.sampling(net):
        inside = modes(net)
        with rs.sampling(net):
            assert varies(net, x)
        assert modes(net) == inside
        assert varies(net, x)
        with pytest.raises(ZeroDivisionError), rs.sampling(net[3]):
            1 / 0  # noqa: B018
        assert modes(net) == inside
        with pytest.raises(RuntimeError):
            net(x[:, :2])
    assert modes(net) == before
    assert not varies(net, x)
    reg.detach()
    with rs.sampling(net):
        assert varies(net, x)


def test_put_into_evaluation_within():
    """As `predict` of many libraries does."""
    net, x = network()
    with rs.sampling(net):
        net.eval()
        assert varies(net, x)
        assert not net[1].training
    assert all(modes(net))


def test_nothing_random_is_an_error():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.0), nn.LSTM(3, 3, dropout=0.0))
    reg = rs.attach(net, rs.L2().on("*"))
    before = modes(net)
    with pytest.raises(SelectionError, match="nothing in this Sequential is random"), rs.sampling(net):
        pass
    assert modes(net) == before
    reg.detach()
    for place in (rs.inputs("0"), rs.outputs("0"), rs.inputs()):
        part = net[:2]
        with rs.attach(part, rs.GaussianNoise(1.0).on(place)), rs.sampling(part):
            assert varies(part, torch.ones(2, 3))


def test_other_models_are_left_alone():
    (net, x), (other, _) = network(), network()
    for model in (net, other):
        rs.attach(model, rs.GaussianNoise(0.1).on(rs.outputs("4")))
    reg = rs.attach(other, rs.L2().on(rs.outputs("0")))
    with rs.sampling(net):
        assert varies(net, x)
        assert not varies(other.eval(), x)
        assert reg.loss(other.train()(x).sum()) > other.eval()(x).sum(), "which trains meanwhile"


def test_other_threads():
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    rs.attach(net, rs.GaussianNoise(0.1).on(rs.outputs("0")))
    x, seen = torch.ones(2, 4), []

    def look():
        seen.append(varies(net, x))

    def run():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with rs.sampling(net):
        run()
        assert varies(net, x)
    run()
    assert seen == [False, False]


def test_contexts_that_overlap_in_time():
    """Two threads, one of which leaves while the other is still within."""
    net, x = network()
    net[0].eval()
    before = modes(net)
    first, second = rs.sampling(net), rs.sampling(net)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert varies(net, x)
    assert not net[1].training
    second.__exit__(None, None, None)
    assert modes(net) == before


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 4, num_layers=2, dropout=0.5),
        nn.GRU(4, 4, num_layers=2, dropout=0.5),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), 2),
        nn.Sequential(nn.AlphaDropout(0.5)),
        nn.Sequential(nn.FeatureAlphaDropout(0.5)),
        nn.Sequential(nn.Dropout1d(0.5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_with_dropout_inside(layer):
    def first(x):
        out = layer(x)
        return out[0] if isinstance(out, tuple) else out

    layer.eval()
    x = torch.randn(3, 5, 4)
    assert not varies(first, x)
    with rs.sampling(layer):
        assert varies(first, x), "also without gradients, where fused code may run"
    assert not varies(first, x)


def test_attention_weights_are_dropped():
    layer = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).eval()
    x = torch.randn(2, 3, 4)
    with rs.sampling(layer):
        assert varies(lambda x: layer(x, x, x)[0], x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return F.dropout(self.norm(self.fc(x)), 0.5, training=self.training)


def test_dropout_that_a_layer_calls_itself():
    net, x = nn.Sequential(Functional(), nn.Linear(4, 2)).eval(), torch.randn(5, 4)
    with pytest.raises(SelectionError, match="also="), rs.sampling(net):
        pass
    for also in ("0", Functional, lambda name, module: isinstance(module, Functional)):
        with rs.sampling(net, also=also):
            assert varies(net, x)
            assert not net[0].norm.training
        assert not varies(net, x)


@pytest.mark.parametrize("rules", [True, False])
def test_compiled(rules):
    torch.compiler.reset()
    net, x = network()
    if rules:
        net[3].p = 0.0
        rs.attach(net, rs.Dropout(0.5).on(rs.outputs("2")))
    net.eval()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with torch.no_grad():
        clean = compiled(x)
        for _ in range(3):
            with rs.sampling(compiled):
                torch.manual_seed(1)
                got = compiled(x)
                assert varies(compiled, x)
                torch.manual_seed(1)
                torch.testing.assert_close(got, net(x))
            torch.testing.assert_close(compiled(x), clean)
    assert len(compiles) == 2, "one for each mode"
    torch.compiler.reset()


def test_the_keyword_models():
    x, y = torch.randn(60, 4).numpy(), torch.randn(60).numpy()
    net = rs.Regressor(hidden=(16,), epochs=3, random_state=0).fit(x, y)
    clean = net.predict(x)
    with rs.attach(net.module_, rs.Dropout(0.3).on(rs.outputs("hid1"))), rs.sampling(net.module_):
        draws = torch.stack([torch.as_tensor(net.predict(x)) for _ in range(400)])
    assert (net.predict(x) == clean).all()
    deviation = draws.std(0)
    assert deviation.min() > 0
    error = (draws.mean(0) - torch.as_tensor(clean)).abs() / (deviation / 20)
    assert error.max() < 4.5, "the head is linear, so the mean stays"
