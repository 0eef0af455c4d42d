"""Scale-invariant weights of six architectures, against the loss at scaled weights; traps; nothing stays behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import CaptureError, PenaltyError

transformers = pytest.importorskip("transformers")


class UNet(nn.Module):
    """Two levels with group norms, a skip connection, and a last convolution without a norm."""

    def __init__(self):
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)
        self.down2, self.norm2 = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.join, self.norm3 = nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        a = F.relu(self.norm1(self.down1(x)))
        b = self.up(F.relu(self.norm2(self.down2(a))))
        return self.last(F.relu(self.norm3(self.join(torch.cat([a, b], 1)))))


def mlp():
    net = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 3),
    )
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    return net, lambda: F.cross_entropy(net(x.to(net[0].weight.dtype)), y)


def resnet():
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    net = transformers.ResNetForImageClassification(config)
    x, y = torch.randn(8, 1, 16, 16), torch.randint(3, (8,))
    return net, lambda: net(x.to(net.dtype), labels=y).loss


def unet():
    net, x = UNet(), torch.randn(4, 1, 8, 8)
    return net, lambda: (net(x.to(net.last.weight.dtype)) - x.flip(-1)).square().mean()


def tokens(net):
    ids = torch.randint(50, (4, 12))
    return net, lambda: net(input_ids=ids, labels=ids).loss


def gpt2():
    return tokens(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        )
    )


def llama_like():
    config = transformers.Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    return tokens(transformers.Qwen3ForCausalLM(config))


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_channels=1,
        num_labels=3,
    )
    net = transformers.ViTForImageClassification(config)
    x, y = torch.randn(8, 1, 16, 16), torch.randint(3, (8,))
    return net, lambda: net(pixel_values=x.to(net.dtype), labels=y).loss


MODELS = {f.__name__: f for f in (mlp, resnet, unet, gpt2, llama_like, vit)}
SOME = {
    "mlp": "0.weight",
    "resnet": "resnet.embedder.embedder.convolution.weight",
    "unet": "join.weight",
    "llama_like": "model.layers.1.self_attn.q_proj.weight",
}


def by_scaling(net, loss):
    """The weights that may be halved and tripled: it changes the loss by nothing beside what a new direction does."""
    names = []
    with torch.no_grad():
        for p in net.parameters():
            p.add_((p.abs().mean() if p.dim() > 1 else 0.2) * torch.randn_like(p))
    seed = torch.random.get_rng_state()

    def value():
        torch.random.set_rng_state(seed)  # dropout
        with torch.no_grad():
            return float(loss())

    before = value()
    for name, p in net.named_parameters():
        kept = p.detach().clone()

        def moved(new, p=p, kept=kept):
            p.data.copy_(new)
            change = abs(value() - before)
            p.data.copy_(kept)
            return change

        turned = moved(kept + kept.square().mean().sqrt() * torch.randn_like(kept))
        if turned > 1e-9 * abs(before) and max(moved(kept * 0.5), moved(kept * 3.0)) < 5e-3 * turned:
            names.append(name)
    return names


@pytest.mark.parametrize("name", MODELS)
def test_no_mistake_on_six_architectures(name):
    torch.manual_seed(0)
    net, loss = MODELS[name]()
    net.train()
    found = rs.scale_invariant(net, loss)
    net.double()
    assert found == by_scaling(net, loss)
    assert SOME.get(name) in (*found, None)


def test_the_oracle_and_the_first_point_alone_are_fooled_by_biases_of_zero():
    """A scale of BatchNorm before another norm, with biases at zero, passes Euler's test there and only there."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )
    net[0].weight.data.mul_(10)
    net[3].weight.data.mul_(10)  # far above the eps of the norms
    x = torch.randn(32, 6)
    loss = net(x).square().mean()
    (g,) = torch.autograd.grad(loss, net[1].weight)
    w = net[1].weight.detach()
    assert abs((w * g).sum()) / (w.norm() * g.norm()) < 1e-4
    assert rs.scale_invariant(net, lambda: net(x).square().mean()) == ["0.weight", "3.weight"]


def test_zero_tensors_and_unused_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    net.register_parameter("unused", nn.Parameter(torch.ones(3)))
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[2].weight)
    net[0].bias = None
    x = torch.randn(16, 6)
    assert rs.scale_invariant(net, lambda: (net(x) - 1).square().mean()) == ["0.weight"]


def test_it_leaves_nothing_behind():
    torch.manual_seed(0)
    net, loss = mlp()
    net.append(nn.Dropout(0.2))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    reg = rs.attach(net, 1e-3 * rs.L1().on(rs.outputs("2")))
    rs.scale_invariant(net, loss)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net[0].weight.grad.eq(1).all()
    assert net[6].weight.grad is None
    reg.loss(loss()).backward()
    with pytest.raises(ZeroDivisionError):
        rs.scale_invariant(net, lambda: 1 / 0)
    reg.detach()
    assert torch.equal(net[0].weight, before["0.weight"])


def test_the_table_tells_of_decays_on_them():
    torch.manual_seed(0)
    net, loss = mlp()
    reg = rs.attach(net, [1e-3 * rs.L2().on("*.weight"), 1e-3 * rs.L1().on("*.weight", name="l1")])
    assert "ignores the scale" not in reg.table()
    rs.scale_invariant(net, loss)
    (note,) = [line for line in reg.table().splitlines() if "ignores the scale" in line]
    assert "scale of 0.weight;" in note
    assert "Hyperball" in note


def test_refusals():
    net, loss = mlp()
    with pytest.raises(CaptureError, match=r"call model.train\(\)"):
        rs.scale_invariant(net.eval(), loss)
    net.train()
    with pytest.raises(PenaltyError, match=r"loss is a function that returns the data loss.*; got 0\.5"):
        rs.scale_invariant(nn.Linear(2, 2), 0.5)
    with pytest.raises(PenaltyError, match="scalar data loss"):
        rs.scale_invariant(net, lambda: 1.0)
    with pytest.raises(PenaltyError, match="float32 copy"):
        rs.scale_invariant(net.bfloat16(), loss)
