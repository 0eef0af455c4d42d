"""Layers that hang together otherwise: transposed and grouped convolutions, concatenation, tied embeddings, experts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs


def compacted(model, x):
    """The smaller model, with outputs as before on other inputs."""
    model = model.double().eval()
    result = rs.compact(model, x)
    draw = torch.Generator().manual_seed(3)
    for _ in range(3):
        other = torch.randn(x.shape, generator=draw).double() if x.is_floating_point() else x.flip(0)
        with torch.no_grad():
            torch.testing.assert_close(result.model(other), model(other), rtol=1e-12, atol=1e-12)
    return result.model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def image():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def test_channels_into_a_transposed_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, -1.0
        model[4].weight[:, 5:] = 0
    small = compacted(model, image())
    assert (small[0].out_channels, small[2].in_channels, small[2].out_channels, small[4].in_channels) == (4, 4, 5, 5)


def test_whole_groups_of_a_grouped_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        model[0].weight[2:4], model[0].bias[2:4] = 0, 0  # what the second group reads
        model[4].weight[:, 3:6] = 0  # what it gives
        model[4].weight[:, 0] = 0  # a part of the first group's
    small = compacted(model, image())
    assert (small[2].groups, small[2].in_channels, small[2].out_channels, small[0].out_channels) == (3, 6, 9, 6)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Linear(9 * 4, 2)

    def forward(self, x):
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.last(F.adaptive_avg_pool2d(x, 2).flatten(1))


def test_parts_of_a_concatenation():
    model = Joined()
    with torch.no_grad():
        model.left.weight[1], model.right.weight[3:] = 0, 0  # constants, by their biases
    small = compacted(model, image())
    assert (small.left.out_channels, small.right.out_channels, small.last.in_features) == (3, 3, 24)


class Tied(nn.Module):
    """An embedding that is the last layer, too, around a residual stream."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


def test_features_of_a_tied_embedding():
    model = Tied()
    with torch.no_grad():
        model.embedding.weight[:, :3] = 0
        model.down.weight[:3], model.down.bias[:3] = 0, 0
        model.up.weight[10:] = 0
    small = compacted(model, torch.arange(6).reshape(2, 3))
    assert small.head.weight is small.embedding.weight
    assert (small.embedding.weight.shape, small.embedding.embedding_dim) == ((11, 5), 5)
    assert (small.up.weight.shape, small.down.weight.shape) == ((10, 5), (5, 10))


class Experts(nn.Module):
    """Every expert on every input, weighted by a softmax."""

    def __init__(self, count=3):
        super().__init__()
        self.router = nn.Linear(4, count)
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(count))

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        given = [down(F.relu(up(x))) for up, down in zip(self.up, self.down, strict=True)]
        return torch.stack([share[:, None] * one for share, one in zip(shares.unbind(-1), given, strict=True)]).sum(0)


def test_units_of_each_expert():
    model = Experts()
    with torch.no_grad():
        model.up[0].weight[:4], model.up[0].bias[:4] = 0, 0.5
        model.down[1].weight[:, 2:] = 0
    small = compacted(model, torch.randn(5, 4, dtype=torch.float64))
    assert [one.out_features for one in small.up] == [2, 2, 6]
    assert [one.in_features for one in small.down] == [2, 2, 6]
    assert small.router.out_features == 3


class Stacked(nn.Module):
    """Experts in one tensor, as transformers keep them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.bmm(torch.relu(torch.bmm(x.expand(3, -1, -1), self.up)), self.down).sum(0)


def test_experts_in_one_tensor_stay_as_a_whole():
    model = Stacked()
    with torch.no_grad():
        model.up[:, :, :2], model.down[:, 2:4] = 0, 0
    small = compacted(model, torch.randn(5, 4, dtype=torch.float64))
    assert (small.up.shape, small.down.shape) == ((3, 4, 6), (3, 6, 4))
