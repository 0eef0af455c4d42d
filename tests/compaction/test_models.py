"""Compaction of whole models: ResNet-18, a U-Net, GPT-2, BERT and Llama, also with one width for all layers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import CompactionError
from scripts import loaded

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def same(model, small, args, close=1e-10):
    model.eval(), small.eval()
    with torch.no_grad():
        expected, found = model(*args), small(*args)
        expected, found = (one if isinstance(one, torch.Tensor) else one[0] for one in (expected, found))
    torch.testing.assert_close(found, expected, rtol=close, atol=close * float(expected.abs().max()))


# Convolutions


@pytest.fixture
def resnet(monkeypatch):
    """The network that the benchmark measures, small."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = loaded(BENCHMARKS / "compact.py")
    model, x = module.resnet(quick=True)
    return model.double(), x.double()


@pytest.mark.slow
def test_half_of_the_inner_channels_of_resnet_18(resnet):
    model, x = resnet
    result = rs.compact(model, x)
    for before, after in zip(model.blocks, result.model.blocks, strict=True):
        assert after.first.out_channels == before.first.out_channels // 2
        assert after.second.weight.shape[1] == before.second.weight.shape[1] // 2
        assert after.second.weight.shape[0] == before.second.weight.shape[0]
    same(model, result.model, [torch.randn(2, 3, 64, 64).double()])


class UNet(nn.Module):
    """Down, middle, up by a transposed convolution, with a concatenation to the side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.middle = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)
        self.join, self.leave = nn.Conv2d(11, 6, 3, padding=1), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        side = F.relu(self.norm(self.enter(x)))
        x = F.relu(self.middle(F.relu(self.down(side))))
        x = torch.cat([F.relu(self.up(x)), side], 1)
        return self.leave(F.relu(self.join(x)))


def test_a_u_net():
    model = UNet().double()
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.bias):
            tensor[1] = 0  # to both sides of the concatenation
        for layer, dead in ((model.down, [0, 5]), (model.middle, [2, 3, 4])):
            layer.weight[dead], layer.bias[dead] = 0, -1.0
        model.up.weight[:, 3], model.up.bias[3] = 0, 0.0
        model.leave.weight[:, [0, 1]] = 0  # nothing reads these
    result = rs.compact(model, torch.randn(1, 2, 8, 8).double())
    small = result.model
    assert small.enter.weight.shape[:2] == (5, 2)
    assert small.down.weight.shape[:2] == (6, 5)
    assert small.middle.weight.shape[:2] == (5, 6)
    assert small.up.weight.shape[:2] == (5, 4)
    assert small.join.weight.shape[:2] == (4, 9)
    assert (small.up.in_channels, small.up.out_channels) == (5, 4)
    same(model, small, [torch.randn(3, 2, 12, 8).double()])


# Hugging Face

pytestmark = pytest.mark.filterwarnings("ignore")


def ids():
    return torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt2(transformers):
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=4, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for number, block in enumerate(model.transformer.h):
            block.mlp.c_fc.weight[:, : 20 + 10 * number] = 0
            block.attn.c_proj.weight[:4] = 0
    return model, lambda model: [block.mlp.c_fc.weight.shape[1] for block in model.transformer.h], [44, 44], "n_inner"


def bert(transformers):
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=4, intermediate_size=24, vocab_size=60
    )
    model = transformers.BertModel(config)
    with torch.no_grad():
        for number, layer in enumerate(model.encoder.layer):
            layer.intermediate.dense.weight[: 8 + 4 * number] = 0
            layer.output.dense.weight[:, 20:] = 0
            layer.attention.self.value.weight[:4] = 0
    return (
        model,
        lambda model: [layer.intermediate.dense.weight.shape[0] for layer in model.encoder.layer],
        [12, 12],
        "intermediate_size",
    )


def llama(transformers):
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=8, num_key_value_heads=4, intermediate_size=24,
        vocab_size=60,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[: 8 + 4 * number] = 0
            layer.self_attn.v_proj.weight[: 4 + 2 * number] = 0
    return (
        model,
        lambda model: [
            (layer.mlp.up_proj.weight.shape[0], layer.self_attn.k_proj.weight.shape[0]) for layer in model.model.layers
        ],
        [(16, 4), (16, 4)],
        "intermediate_size",
    )


@pytest.mark.parametrize("make", [gpt2, bert, llama], ids=lambda make: make.__name__)
def test_one_width_for_all_layers_is_saved_and_loaded_as_ever(make, tmp_path):
    model, widths, expected, field = make(pytest.importorskip("transformers"))
    model.eval()
    result = rs.compact(model, ids(), uniform=True)
    assert widths(result.model) == expected
    same(model, result.model, [ids().flip(0)], 1e-5)
    assert getattr(model.config, field) in (None, 24)  # the given model's is as it was
    assert "from_pretrained work" in str(result.report)
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert widths(again) == expected
    same(model, again, [ids().flip(1)], 1e-5)


@pytest.mark.parametrize("make", [gpt2, bert, llama], ids=lambda make: make.__name__)
def test_each_layer_keeps_its_own_width_else_and_the_report_says_so(make):
    model, widths, *_ = make(pytest.importorskip("transformers"))
    model.eval()
    result = rs.compact(model, ids())
    assert widths(result.model)[0] != widths(result.model)[1]
    assert "uniform=True" in str(result.report)
    assert "uniform=True" in result.report.to_html()
    same(model, result.model, [ids().flip(0)], 1e-5)


def test_a_width_that_the_configuration_refuses_is_rounded_up():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=24,
        vocab_size=60,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:4] = 0
        model.model.layers[0].mlp.gate_proj.weight[:3] = 0
    result = rs.compact(model, ids(), uniform=True)
    heads = result.model.config.num_attention_heads
    assert heads in (3, 4)
    assert result.model.model.layers[0].self_attn.q_proj.weight.shape[0] == 4 * heads
    assert result.model.config.head_dim == 4
    assert result.model.config.intermediate_size == 21
    assert "from_pretrained work" in str(result.report)


def test_a_constant_goes_into_a_bias_that_is_there():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=4, intermediate_size=24, vocab_size=60, mlp_bias=True,
        hidden_act="sigmoid",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight[:5], mlp.gate_proj.weight[:5] = 0, 0
        mlp.up_proj.bias[:5] = 1.0
    result = rs.compact(model, ids(), uniform=True)
    assert result.model.config.intermediate_size == 19
    same(model, result.model, [ids().flip(0)], 1e-5)


def test_other_models_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(CompactionError, match=r"uniform=True is for models of transformers"):
        rs.compact(model, torch.randn(2, 3), uniform=True)
