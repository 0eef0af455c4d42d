"""Smaller networks have the same outputs, and train on as the large ones do with dead units held at zero."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.compaction import compaction
from restrain.connections.attention import Attention
from restrain.errors import CompactionError


def equal(model, result, args, close=1e-12):
    """Outputs on inputs that compaction hasn't seen."""
    model.eval(), result.model.eval()
    for seed in range(3):
        draws = torch.Generator().manual_seed(100 + seed)
        given = [
            torch.randn(t.shape, generator=draws, dtype=t.dtype) if t.is_floating_point() else t.flip(0) for t in args
        ]
        with torch.no_grad():
            assert torch.allclose(model(*given), result.model(*given), rtol=close, atol=close)


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def mlp(dead=(), unread=(), bias=0.0):
    """4 → 6 → 5 → 2 in float64; some of the six give a constant, some of the five aren't read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].weight[list(dead)] = 0
        model[0].bias[list(dead)] = bias
        model[4].weight[:, list(unread)] = 0
    return model


# What goes


@pytest.mark.parametrize("bias", [0.0, -1.0, 0.7])
def test_units_go_that_give_a_constant_or_are_not_read(bias):
    model, x = mlp((1, 4), (0, 2, 3), bias), torch.randn(3, 4).double()
    before = copy.deepcopy(model.state_dict())
    result = rs.compact(model, x)
    assert [result.model[k].weight.shape for k in (0, 2, 4)] == [(4, 4), (2, 4), (2, 2)]
    assert (result.model[0].out_features, result.model[2].in_features) == (4, 4)
    equal(model, result, [x])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_it_is_repeated_until_nothing_changes():
    """The last layer reads nothing of the second, which then needn't read the first."""
    model = mlp(unread=(0, 1, 2, 3))
    with torch.no_grad():
        model[2].weight[4, 2:] = 0  # the one that stays reads two
    result = rs.compact(model, torch.randn(3, 4).double())
    assert [result.model[k].weight.shape for k in (0, 2, 4)] == [(2, 4), (1, 2), (2, 1)]


def test_constants_go_through_layers():
    """A layer that reads constants only gives constants."""
    model = mlp((0, 1, 2), bias=1.0)
    with torch.no_grad():
        model[2].weight[:3, 3:] = 0
    result = rs.compact(model, torch.randn(3, 4).double())
    assert [result.model[k].weight.shape for k in (0, 2, 4)] == [(3, 4), (2, 3), (2, 2)]
    equal(model, result, [torch.randn(3, 4).double()])


def test_one_unit_of_a_layer_stays():
    model = mlp(range(6))
    result = rs.compact(model, torch.randn(3, 4).double())
    assert result.model[0].weight.shape == (1, 4)
    assert result.model[2].weight.shape == (1, 1)
    equal(model, result, [torch.randn(3, 4).double()])


def test_nothing_goes_of_a_dense_network():
    model = mlp()
    result = rs.compact(model, torch.randn(3, 4).double())
    assert shapes(result.model) == shapes(model)


def test_small_weights_stay():
    model = mlp()
    with torch.no_grad():
        model[0].weight[2] = 1e-30
    assert rs.compact(model, torch.randn(3, 4).double()).model[0].weight.shape == (6, 4)


def test_a_layer_without_bias_gets_one_where_a_constant_is_left():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:2] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = rs.compact(model, torch.randn(3, 4).double(), optimizer)
    equal(model, result, [torch.randn(3, 4).double()])
    assert result.model[2].bias.shape == (2,)
    assert any(p is result.model[2].bias for p in result.optimizer.param_groups[0]["params"])


class Residual(nn.Module):
    """Convolutions with batch normalisation, a residual addition, a depthwise layer, a flattened end."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.scale = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.outer, self.each = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 16, 3, groups=8)
        self.last = nn.Linear(16 * 4, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = x + self.outer(F.relu(self.scale(self.inner(x))))
        x = F.relu(self.each(x))
        return self.last(F.adaptive_avg_pool2d(x, 2).flatten(1))


def residual():
    torch.manual_seed(0)
    model = Residual().double()
    with torch.no_grad():
        for norm in (model.norm, model.scale):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.bias.normal_()
    return model


def test_filters_behind_a_scale_of_zero_go_if_their_constant_can_be_folded():
    model = residual()
    with torch.no_grad():
        model.scale.weight[:5] = 0
    result = rs.compact(model, torch.randn(2, 3, 8, 8).double())
    assert result.model.inner.weight.shape == (7, 8, 3, 3)
    assert (result.model.scale.num_features, result.model.outer.in_channels) == (7, 7)
    assert len(result.model.scale.running_mean) == 7
    equal(model, result, [torch.randn(2, 3, 8, 8).double()])
    assert not result.report.training_exact


def test_a_channel_goes_through_a_residual_addition_and_a_depthwise_layer():
    model = residual()
    with torch.no_grad():
        model.norm.weight[2:4] = 0
        model.norm.bias[2:4] = -1  # then relu gives 0
        model.outer.weight[2:4] = 0
        model.outer.bias[2:4] = 0
        model.each.bias[4:8] = torch.tensor([0.5, -1.0, 0.0, 2.0])
    result = rs.compact(model, torch.randn(2, 3, 8, 8).double())
    assert (result.model.each.groups, result.model.each.in_channels, result.model.each.out_channels) == (6, 6, 12)
    assert result.model.last.weight.shape == (5, 12 * 4)
    equal(model, result, [torch.randn(2, 3, 8, 8).double()])


def test_a_constant_into_a_padded_convolution_stays_with_the_reason():
    model = residual()
    with torch.no_grad():
        model.norm.weight[2] = 0
        model.norm.bias[2] = 1.0
        model.outer.weight[2] = 0
    report = rs.compact(model, torch.randn(2, 3, 8, 8).double()).report
    found = next(layer for layer in report.layers if layer.name == "first.weight")
    assert found.after == found.before
    assert any("padded convolution" in why for why in found.stays)


def test_a_constant_before_dropout_stays():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = torch.tensor([-1.0, 0.0, 2.0])
    result = rs.compact(model, torch.randn(3, 4).double())
    assert result.model[0].weight.shape == (4, 4)  # zeros go
    assert result.report.layers[0].stays["it gives a constant, which dropout makes random in training"] == 1


def test_features_of_a_layer_normalisation_stay():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[2].weight[:, :3] = 0
    result = rs.compact(model, torch.randn(3, 4).double())
    assert shapes(result.model) == shapes(model)
    assert any("layer_norm" in why for why in result.report.layers[0].stays)


def test_a_weight_that_is_computed_stays():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[2].weight[:, :3] = 0
    result = rs.compact(model, torch.randn(3, 4).double())
    assert shapes(result.model) == shapes(model)


@pytest.mark.parametrize("first", [True, False])
def test_heads_of_torchs_attention_go(first):
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.linear1.weight[:7] = 0
            layer.linear1.bias[:7] = -1
        model.layers[0].self_attn.in_proj_weight[18:20] = 0  # values of head 1
        model.layers[0].self_attn.in_proj_bias[18:20] = 0.5
        model.layers[0].self_attn.out_proj.weight[:, 6:] = 0  # head 3 isn't read
    x = torch.randn(2, 3, 8).double()
    result = rs.compact(model, x)
    assert [layer.linear1.weight.shape for layer in result.model.layers] == [(9, 8)] * 2
    assert result.model.layers[0].self_attn.in_proj_weight.shape == (12, 8)
    assert result.model.layers[0].self_attn.num_heads == 2
    assert type(result.model.layers[1].self_attn) is nn.MultiheadAttention
    equal(model, result, [x])
    assert model.state_dict().keys() == result.model.state_dict().keys()


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("masks", ["none", "float", "bool", "padding", "heads"])
def test_attention_is_torchs(weights, dims, first, masks):
    other = nn.MultiheadAttention(8, 4, batch_first=first).double()
    mine, sizes = Attention(other), [(3, 8), (5, 8), (5, 8)]
    given = [torch.randn(s).double() if dims == 2 else torch.randn(2, *s).double() for s in sizes]
    given = given if dims == 2 or first else [x.transpose(0, 1) for x in given]
    made = {
        "none": {},
        "float": {"attn_mask": torch.randn(3, 5).double()},
        "bool": {"attn_mask": torch.ones(3, 5).triu(2).bool()},
        "padding": {"key_padding_mask": torch.tensor([False, False, True, False, True]).expand(*[2] * (dims - 2), 5)},
        "heads": {"attn_mask": torch.randn(4 * (2 if dims == 3 else 1), 3, 5).double()},
    }
    for inputs in (given, [given[0]] * 3 if masks == "none" else given):
        expected, found = (one(*inputs, need_weights=weights, **made[masks]) for one in (other, mine))
        assert torch.allclose(found[0], expected[0])
        assert (found[1] is None) == (not weights)
        assert not weights or torch.allclose(found[1], expected[1])


def test_units_stay_whose_number_is_written_in_the_models_code():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))).view(-1, 8))

    torch.manual_seed(0)
    model = Written().double()
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.b.weight[:3] = 0
    x = torch.randn(3, 4).double()
    result = rs.compact(model, x)
    assert shapes(result.model) == {**shapes(model), "a.weight": (3, 4), "a.bias": (3,), "b.weight": (8, 3)}
    why = next(layer.stays for layer in result.report.layers if layer.name == "b.weight")
    assert any("the model's code needs its size: RuntimeError" in one for one in why)
    equal(model, result, [x])


# Networks by chance


class Drawn(nn.Module):
    """Blocks drawn by a seed: chains, residual additions, concatenations, gates, attention with heads of its own."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.kinds = [("chain", "residual", "cat", "gate", "heads")[k] for k in torch.randint(5, (3,))]
        self.width, self.heads = 12, 3
        sizes = []
        for kind in self.kinds:
            a, b = nn.Linear(self.width, 8), nn.Linear(8, self.width)
            if kind == "cat":
                b = nn.Linear(8 + self.width, self.width)
            if kind == "gate":
                b = nn.Linear(8, self.width, bias=False)
            if kind == "heads":
                a, b = nn.Linear(self.width, 3 * self.width), nn.Linear(self.width, self.width)
            sizes.append(nn.ModuleList([a, b, nn.Linear(self.width, 8)]))
        self.blocks, self.last = nn.ModuleList(sizes), nn.Linear(self.width, 2)
        self.first = nn.Linear(4, self.width)

    def forward(self, x):
        x = self.first(x)
        for kind, (a, b, c) in zip(self.kinds, self.blocks, strict=True):
            if kind == "heads":
                q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in a(x).chunk(3, -1))
                x = x + b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                continue
            h = F.gelu(a(x))
            if kind == "gate":
                x = x + b(h * torch.sigmoid(c(x)))
            elif kind == "cat":
                x = torch.tanh(b(torch.cat([h, x], -1)))
            else:
                x = b(h) + x if kind == "residual" else b(h)
        return self.last(x)


def holed(model, seed):
    """Rows, columns and biases of weights set to zero by chance; whole heads too."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                rows, columns = (torch.rand(n, generator=draws) < 0.35 for n in module.weight.shape)
                if len(rows) == 36:
                    rows = torch.rand(9, generator=draws).lt(0.35).repeat_interleave(4)
                module.weight[rows] = 0
                if torch.rand((), generator=draws) < 0.5:
                    module.weight[:, columns] = 0
                if module.bias is not None and torch.rand((), generator=draws) < 0.7:
                    module.bias[rows] = 0
    return model


def by_chance(seed):
    model, x = holed(Drawn(seed).double(), seed), torch.randn(2, 3, 4).double()
    result = rs.compact(model, x)
    equal(model, result, [x], 1e-10)
    again = rs.compact(result.model, x)
    equal(model, again, [x], 1e-10)
    assert shapes(again.model) == shapes(result.model)  # nothing was left
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in result.model.parameters())


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_networks_by_chance(start):
    assert sum(by_chance(seed) > 0 for seed in range(start, start + 10)) > 6


@pytest.mark.slow
@pytest.mark.parametrize("start", range(40, 500, 20))
def test_many_networks_by_chance(start):
    assert sum(by_chance(seed) > 0 for seed in range(start, start + 20)) > 12


def test_the_comparison_notices_a_constant_that_is_lost(monkeypatch):
    monkeypatch.setattr(compaction, "_folded", lambda *given: [])
    with pytest.raises(CompactionError, match="differ by"):
        rs.compact(mlp((1,), bias=0.7), torch.randn(3, 4).double())


# The optimizer


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
}


def trained(model, optimizer, steps, mask=()):
    draws = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=draws, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for tensor, index in mask:
                tensor[index] = 0


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_on_as_the_large_one_does_with_dead_units_held_at_zero(name, inplace):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    dead = [1, 2, 5]
    mask = [(model[0].weight, dead), (model[0].bias, dead), (model[2].weight, (slice(None), dead))]
    trained(model, optimizer, 10, mask)
    given = (copy.deepcopy(model), None)
    if inplace:
        memo = {}
        given = (copy.deepcopy(model, memo), copy.deepcopy(optimizer, memo))
    result = rs.compact(model, torch.randn(3, 4).double(), optimizer, inplace=inplace)
    assert (result.model is model) == inplace
    assert (result.optimizer is optimizer) == inplace
    large = given if inplace else (model, optimizer)
    mask = [(large[0][0].weight, dead), (large[0][0].bias, dead), (large[0][2].weight, (slice(None), dead))]
    trained(*large, 20, mask)
    trained(result.model, result.optimizer, 20)
    assert result.model[0].weight.shape == (3, 4)
    x = torch.randn(20, 4).double()
    assert torch.allclose(large[0](x), result.model(x), rtol=1e-9, atol=1e-11)


def test_a_state_of_another_shape_is_refused_and_nothing_changed():
    model = mlp((1, 2))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(3, 4).double()).sum().backward()
    model[0].weight.grad[[1, 2]] = 0
    optimizer.step()
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0
        model[0].bias[[1, 2]] = 0
    with pytest.raises(CompactionError, match="leave optimizer= out"):
        rs.compact(model, torch.randn(3, 4).double(), optimizer)
    assert model[0].weight.shape == (6, 4)


def test_modes_of_modules_are_kept():
    model = mlp((1,))
    model.train()
    model[1].eval()
    result = rs.compact(model, torch.randn(3, 4).double())
    assert (model.training, model[1].training) == (True, False)
    assert (result.model.training, result.model[1].training, result.model[0].training) == (True, False, True)


# Models of Hugging Face


def few(count=100):
    return torch.randint(0, count, (2, 7), generator=torch.Generator().manual_seed(0))


def same_last(model, result, ids):
    model.eval(), result.model.eval()
    with torch.no_grad():
        assert torch.allclose(model(ids)[0], result.model(ids)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_heads_and_neurons_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, :64] = 0
            block.mlp.c_fc.bias[:64].normal_()
            block.attn.c_attn.weight[:, 72:80] = 0  # values of head 1
            block.attn.c_attn.bias[72:80].normal_()
            block.attn.c_proj.weight[16:24] = 0  # head 2 isn't read
    result = rs.compact(model, few())
    block = result.model.transformer.h[1]
    assert block.mlp.c_fc.weight.shape == (32, 64)
    assert block.attn.c_attn.weight.shape == (32, 48)
    assert (block.attn.num_heads, block.attn.split_size) == (2, 16)
    same_last(model, result, few().flip(0))


@pytest.mark.filterwarnings("ignore")
def test_groups_of_queries_of_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=100,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight[:32] = 0
            block.mlp.up_proj.weight[32:40] = 0
            block.self_attn.v_proj.weight[8:] = 0
    result = rs.compact(model, few())
    block = result.model.model.layers[0]
    assert block.mlp.down_proj.weight.shape == (32, 24)
    assert [block.self_attn.q_proj.weight.shape[0], block.self_attn.k_proj.weight.shape[0]] == [16, 8]
    same_last(model, result, few().flip(0))


# What is refused


def test_a_model_that_cant_be_exported_is_told():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CompactionError, match=r"torch\.export can.t follow Branches"):
        rs.compact(Branches(), torch.randn(3, 4))


@pytest.mark.parametrize("example", [None, 3, ("x",)])
def test_an_example_without_tensors_is_refused(example):
    with pytest.raises(CompactionError, match="example is a tensor or a tuple of inputs"):
        rs.compact(mlp(), example)


def test_other_optimizers_and_models_without_weights_are_refused():
    model = mlp((1,))
    with pytest.raises(CompactionError, match="holds no parameter of this model"):
        rs.compact(model, torch.randn(3, 4).double(), torch.optim.SGD(mlp().parameters()))
    with pytest.raises(CompactionError, match="on the meta device"):
        rs.compact(model.to("meta"), torch.randn(3, 4).double())


class Pair(nn.Module):
    """A model with an input that may be None, and an output of a kind of its own."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.wrap = nn.Linear(4, 6), nn.Linear(6, 2), wrap

    def forward(self, x, mask=None, scale=1.0):
        return self.wrap(self.b(torch.relu(self.a(x))) * scale)


def pair(wrap=lambda y: y):
    model = Pair(wrap).double()
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.a.bias[:3] = 0.5
    return model


def test_inputs_may_be_none_and_batches_of_one():
    model = pair()
    result = rs.compact(model, (torch.randn(1, 4).double(), None, torch.tensor(2.0).double()))
    assert result.model.a.weight.shape == (3, 4)
    x = torch.randn(5, 4).double()
    assert torch.allclose(model(x), result.model(x))


@dataclass
class Output:
    y: torch.Tensor


def test_outputs_in_a_dataclass_are_compared(monkeypatch):
    if Output not in torch.utils._pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Output)
    model = pair(Output)
    assert rs.compact(model, torch.randn(3, 4).double()).model.a.weight.shape == (3, 4)
    monkeypatch.setattr(compaction, "_folded", lambda *given: [])
    with pytest.raises(CompactionError, match="differ by"):
        rs.compact(model, torch.randn(3, 4).double())


def test_a_model_without_tensors_in_its_output_is_refused():
    with pytest.raises(CompactionError, match="gives no tensor that could be compared"):
        rs.compact(pair(lambda y: None), torch.randn(3, 4).double())


@pytest.mark.parametrize(
    ("found", "reference", "difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([torch.nan, 2.0], [torch.nan, 2.0], 0.0),
        ([torch.inf, 2.0], [torch.inf, 2.0], 0.0),
        ([torch.nan, 2.0], [1.0, 2.0], torch.inf),
        ([1.0, 2.0], [torch.nan, 2.0], torch.inf),
        ([-torch.inf, 2.0], [torch.inf, 2.0], torch.inf),
        ([1j, 2.0], [0.0j, 2.0], 0.5),
        ([1, 2], [1, 3], torch.inf),
        ([0.0], [0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_differences_of_outputs(found, reference, difference):
    assert compaction._difference([torch.tensor(found)], [torch.tensor(reference)]) == difference


def test_rules_go_on_with_a_model_made_smaller_in_place():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, [0.1 * rs.L1().on("0.weight", how="proximal"), 0.1 * rs.L2().on("2.weight")], optimizer)
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = 0
    x = torch.randn(3, 4).double()
    copied = rs.compact(model, x, optimizer, rules=False)
    assert (len(copied.optimizer._optimizer_step_post_hooks), copied.attachment) == (0, None)
    rs.compact(model, x, optimizer, inplace=True)
    assert model[0].weight.shape == (4, 4)
    loss = model(x).square().mean()
    total = reg.loss(loss)
    torch.testing.assert_close(total - loss, 0.1 * model[2].weight.square().sum())
    total.backward()
    expected = rs.L1().prox(model[0].weight - 0.1 * model[0].weight.grad, 0.01)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, expected)


def test_the_report_says_what_went_in_text_and_html():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<script>", mlp((1,)))

        def forward(self, x):
            return self.get_submodule("<script>")(x)

    report = rs.compact(Named(), torch.randn(3, 4).double()).report
    assert "<script>.0.weight  6 × 4   5 × 4" in str(report)
    assert "&lt;script&gt;.0.weight" in report.to_html()
    assert "<script>" not in report.to_html()
    assert report.after.parameters < report.before.parameters
    assert report.after.flops < report.before.flops


@pytest.mark.parametrize("name", ["inplace", "rules", "uniform"])
def test_flags_are_true_or_false(name):
    with pytest.raises(CompactionError, match=f"{name}= is True or False, got 'no'"):
        rs.compact(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), **{name: "no"})
