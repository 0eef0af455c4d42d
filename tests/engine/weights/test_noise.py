"""Noise on weights: what the forward sees, what stays stored, and where it can't be."""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain import torch_private
from restrain.errors import HowError, NeverFiredError, SelectionError, TransformError, VersionError
from restrain.versions import number

GAUSSIAN = rs.GaussianNoise(0.3)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def hidden(model):
    """Attributes that hide a parameter; there are none outside a forward."""
    return [key for module in model.modules() for key in module._parameters if key in module.__dict__]


def outcome(way, model, x):
    """The output and all gradients under one seed."""
    model.zero_grad()
    torch.manual_seed(1)
    y = way(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def test_the_forward_sees_a_disturbed_weight():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    before = copy.deepcopy(layer.state_dict())
    with rs.attach(layer, rs.DropConnect(0.25).on("weight")):
        y, *gradients = outcome(layer, layer, x)
        torch.manual_seed(1)
        mask = F.dropout(torch.ones_like(layer.weight), 0.25)
        torch.testing.assert_close(y, F.linear(x, layer.weight * mask, layer.bias))
        torch.testing.assert_close(gradients[0], (2 * y).T @ x * mask)  # masked, and scaled by 1 / (1 - rate)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key])
        assert list(layer.state_dict()) == list(before)
        assert not hidden(layer)
        assert torch.equal(layer.eval()(x), layer(x))
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_a_draw_for_each_call():
    layer, x = nn.Linear(4, 4), torch.randn(5, 4)
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y))
    rs.attach(layer, GAUSSIAN.on("weight"))
    model = nn.Sequential(layer, layer)
    model(x)
    (w0, w1), a = ([torch.linalg.lstsq(i, y - layer.bias).solution for i, y in ((x, seen[0]), (seen[0], seen[1]))], 0.1)
    assert (w0 - w1).abs().max() > a


def test_relative_to_the_weights_own_size():
    w = torch.randn(200, 200) * 50
    noise = rs.GaussianNoise(0.1, relative=True).of_weight(w) - w
    assert (noise.std() / w.square().mean().sqrt()).item() == pytest.approx(0.1, rel=0.02)  # 4 deviations of the std
    assert torch.equal(rs.GaussianNoise(0.1, relative=True).of_weight(torch.zeros(2, 2)), torch.zeros(2, 2))
    v = w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(rs.GaussianNoise(0.1, relative=True).of_weight(v).sum(), v)
    assert slope.eq(1).all()


def test_two_noises_on_one_weight():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    rs.attach(layer, [rs.DropConnect(0.5).on("weight"), GAUSSIAN.on("weight")])
    y = outcome(layer, layer, x)[0]
    torch.manual_seed(1)
    seen = GAUSSIAN(F.dropout(layer.weight, 0.5))
    torch.testing.assert_close(y, F.linear(x, seen, layer.bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_with_the_same_noise(reentrant):
    model, x = network(), torch.randn(5, 4, requires_grad=True)
    rs.attach(model, [GAUSSIAN.on(rs.weights), rs.DropConnect(0.5).on("*.bias")])
    expected = outcome(model, model, x)
    part = lambda x: model[2](checkpoint(model[:2], x, use_reentrant=reentrant))  # noqa: E731
    for way in (lambda x: checkpoint(model, x, use_reentrant=reentrant), part):
        torch.testing.assert_close(outcome(way, model, x), expected)
        assert not hidden(model)


COMPILED = number(torch.__version__) >= (2, 13)
NEWER = pytest.mark.skipif(not COMPILED, reason="refused by torch 2.12 and older")


@pytest.mark.parametrize("old", [True] if not COMPILED else [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_compiled_code_of_an_old_torch_is_refused(monkeypatch, old, fullgraph):
    """torch 2.12 would delete the parameter."""
    if COMPILED:
        monkeypatch.setattr(torch_private, "_NOISE", old)
    model, x = network(), torch.randn(5, 4)
    rs.attach(model, GAUSSIAN.on(rs.weights))
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    error, said = (torch._dynamo.exc.Unsupported, "_refuse_compiled_noise") if fullgraph else (VersionError, "2.13 or")
    try:
        with pytest.raises(error, match=said) if old else nullcontext():
            compiled(x)
        assert not hidden(model)
        assert len(list(model.parameters())) == 4
        model.eval()
        torch.testing.assert_close(compiled(x), model(x))
    finally:
        torch._dynamo.reset()


@NEWER
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled(recomputed):
    model, x = network(), torch.randn(5, 4)
    rs.attach(model, GAUSSIAN.on(rs.weights))
    expected = outcome(model, model, x)
    way = (lambda x: checkpoint(model, x, use_reentrant=False)) if recomputed else model
    try:
        compiled = torch.compile(way, fullgraph=not recomputed, backend="aot_eager")
        torch.testing.assert_close(outcome(compiled, model, x), expected)
        assert not torch.equal(compiled(x), compiled(x))
        model.eval()
        assert torch.equal(compiled(x), compiled(x))
    finally:
        torch._dynamo.reset()
    assert not hidden(model)


@NEWER
@pytest.mark.slow
def test_compiled_by_inductor():
    model, x = network(), torch.randn(5, 4)
    rs.attach(model, GAUSSIAN.on(rs.weights))
    try:
        with torch._inductor.config.patch(fallback_random=True):
            found = outcome(torch.compile(model, fullgraph=True), model, x)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, outcome(model, model, x))


class Failing(nn.Linear):
    error = RuntimeError

    def forward(self, x):
        if x.isnan().any():
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails(error):
    layer = Failing(4, 3)
    layer.error = error
    reg = rs.attach(layer, GAUSSIAN.on("weight"))
    for clean_up in (lambda: layer.eval()(torch.ones(1, 4)), reg.detach):
        layer.train()
        with pytest.raises(error):
            layer(torch.full((1, 4), torch.nan))
        if error is RuntimeError:
            assert not hidden(layer)
        clean_up()
        assert not hidden(layer)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_that_is_interrupted_shows_and_keeps_the_stored_weights(kind):
    torch.manual_seed(0)
    layer, x = kind(3, 4), torch.randn(5, 2, 3)
    right = layer(x)[0].detach()
    model = nn.Sequential(layer)
    reg = rs.attach(model, GAUSSIAN.on("0.weight_ih_l0"))
    with pytest.raises(KeyboardInterrupt), torch.autograd.graph.saved_tensors_hooks(_interrupt, _interrupt):
        model(x)  # in its kernel
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert twin[0].weight_ih_l0.is_leaf
        torch.testing.assert_close(twin.eval()(x)[0], right)
    assert type(model[0]._parameters) is dict
    reg.detach()
    torch.testing.assert_close(layer(x)[0], right)


def _interrupt(*given):
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_forward_that_alone_is_compiled_sees_the_noise():
    layer, x, made = nn.Linear(4, 3), torch.ones(2, 4), []
    model = nn.Sequential(layer)
    rs.attach(model, GAUSSIAN.on("0.weight"))
    layer.forward = torch.compile(
        layer.forward, fullgraph=True, backend=lambda graph, inputs: made.append(graph) or graph.forward
    )
    try:
        for again in range(2):
            torch.manual_seed(1)
            y = model.train()(x)
            torch.manual_seed(1)
            torch.testing.assert_close(y, F.linear(x, GAUSSIAN(layer.weight), layer.bias))
            assert not torch.equal(model(x), model(x))
            torch.testing.assert_close(model.eval()(x), F.linear(x, layer.weight, layer.bias))
            assert len(made) == 2, again
    finally:
        torch._dynamo.reset()


def test_each_of_two_threads_sees_its_own_noise():
    """Each has drawn the noise of its own seed under a lock, and both compute while the other is in the layer."""
    layer, x = Meeting(4, 3), torch.ones(2, 4)
    rs.attach(layer, GAUSSIAN.on("weight"))
    drawing, seeds, found = threading.Lock(), [1, 2], {}
    layer.register_forward_pre_hook(lambda *given: drawing.release())
    layer.met = threading.Barrier(2, timeout=20)

    def work(seed):
        for _ in range(20):
            drawing.acquire()
            torch.manual_seed(seed)
            found.setdefault(seed, []).append(layer(x))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for seed in seeds:
        torch.manual_seed(seed)
        right = F.linear(x, GAUSSIAN(layer.weight), layer.bias)
        assert len(found[seed]) == 20
        for y in found[seed]:
            torch.testing.assert_close(y, right)
    assert type(layer._parameters) is dict


class Meeting(nn.Linear):
    """A layer in which two threads wait for each other, before and after they look at the weight."""

    def forward(self, x):
        self.met.wait()
        weight = self.weight
        self.met.wait()
        return F.linear(x, weight, self.bias)


def test_functional_calls():
    model, x = network(), torch.randn(5, 4)
    rs.attach(model, GAUSSIAN.on(rs.weights))
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}
    torch.manual_seed(1)
    found = functional_call(model, parameters, x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(parameters[name])
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))
    each = vmap(grad(lambda p, x: functional_call(model, p, x).sum()), (None, 0), randomness="different")
    assert each(parameters, x)["0.weight"].shape == (5, 8, 4)
    assert not hidden(model)


def test_copies_are_free_of_it():
    model, x = network(), torch.randn(5, 4)
    rs.attach(model, GAUSSIAN.on(rs.weights))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), twin(x))


def test_tied_weights_are_disturbed_at_both_places():
    model, x = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)), torch.randn(5, 3)
    model[1].weight = model[0].weight
    rs.attach(model, rs.GaussianNoise(1.0).on("0.weight"))
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    first, second = (model[0].weight + torch.randn(3, 3) for _ in range(2))
    torch.testing.assert_close(y, x @ first.T @ second.T)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_weights(kind):
    cell = kind is nn.LSTMCell
    layer, twin = kind(3, 4), kind(3, 4)
    name, x = ("weight_hh" if cell else "weight_hh_l0"), torch.randn(*[5] * (not cell), 2, 3)
    h = (torch.randn(2, 4), torch.randn(2, 4)) if cell else None
    rs.attach(layer, GAUSSIAN.on(name))
    torch.manual_seed(1)
    y = layer(x, h)[0]
    y.sum().backward()
    twin.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        getattr(twin, name).copy_(GAUSSIAN(getattr(layer, name)))
    torch.testing.assert_close(y, twin(x, h)[0])
    assert getattr(layer, name).grad.abs().sum() > 0
    assert not hidden(layer)
    if not cell:
        assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    copy.deepcopy(layer)
    torch.testing.assert_close(layer.eval()(x, h)[0], layer(x, h)[0])


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_attention(name):
    attention, twin, x = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    twin.load_state_dict(attention.state_dict())
    model = nn.Sequential(attention)
    rs.attach(model, GAUSSIAN.on(f"0.{name}"))
    torch.manual_seed(1)
    y = attention(x, x, x)[0]
    torch.manual_seed(1)
    with torch.no_grad():
        twin.get_parameter(name).copy_(GAUSSIAN(attention.get_parameter(name)))
    torch.testing.assert_close(y, twin(x, x, x)[0])
    assert not hidden(model)


class Listed(nn.Module):
    """Parameters that a list holds, and one that the module uses past its layer."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 3), torch.randn(3, 3)])
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(x @ self.weights[0] @ self.weights[1], self.layer.weight)


def test_a_list_of_parameters():
    model, x = Listed(), torch.randn(2, 3)
    rs.attach(model, GAUSSIAN.on("weights.1"))
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, x @ model.weights[0] @ GAUSSIAN(model.weights[1]) @ model.layer.weight.T)


@pytest.mark.parametrize("optional", [False, True])
def test_a_layer_that_is_never_called(optional):
    model = Listed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, GAUSSIAN.on("layer.weight", optional=optional))
    model(torch.randn(2, 3)).sum().backward()
    if optional:
        optimizer.step()
        return
    with pytest.raises(NeverFiredError, match=r"'layer.weight' was trained.* never called"):
        optimizer.step()


def test_trains_beside_other_rules():
    model, x = network(), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = [
        rs.DropConnect(0.5).on("0.weight"),
        rs.L1().on("0.weight", name="l1"),
        (1e-3 * rs.L1()).on("0.weight", how="proximal"),
        rs.MaxNorm(0.5).on("0.weight"),
        rs.GaussianNoise(0.1).on(rs.outputs("0")),
    ]
    reg = rs.attach(model, plan, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        reg.loss(model(x).square().mean()).backward()
        optimizer.step()
    assert (model[0].weight.norm(dim=1) < 0.51).all()
    assert reg.values()["l1"] == pytest.approx(model[0].weight.abs().sum().item())
    assert "DropConnect(rate=0.5) on '0.weight'" in str(reg)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.LazyLinear(3), "no shape yet"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), "is parametrised"),
        (lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(3, 3, sparse=True), "sparse"),
        (lambda: nn.ParameterDict({"weight": torch.zeros(2, 2)}), "no module with a forward"),
    ],
    ids=["lazy", "parametrised", "max_norm", "sparse", "no forward"],
)
def test_refused(make, said):
    with pytest.raises(HowError, match=said):
        rs.attach(make(), GAUSSIAN.on("weight"))


def test_what_goes_where():
    assert rs.DropConnect(0.1).on().how == "forward"
    with pytest.raises(SelectionError, match=r"rs\.Dropout"):
        rs.DropConnect(0.1).on(rs.outputs("0"))
    with pytest.raises(SelectionError, match=r"rs\.DropConnect"):
        rs.Dropout(0.1).on("0.weight")
    for rate in (-0.1, 1, float("nan"), True):
        with pytest.raises(TransformError, match="= is "):
            rs.DropConnect(rate)
    with pytest.raises(TransformError, match="complex64"):
        rs.DropConnect(0.1)(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TransformError, match=r"complex64.*take GaussianNoise"):
        rs.attach(nn.Linear(2, 2, dtype=torch.complex64), rs.DropConnect(0.1).on("weight"))
    plan = rs.Plan.of([rs.DropConnect(0.1).on("0.weight"), rs.GaussianNoise(0.1).on("0.bias")])
    assert rs.Plan.from_dict(plan.to_dict()) == plan
