"""What `per=` means, judged by what the layers themselves compute with their weights."""

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.axes import Grouping, group_norms, group_size, grouping
from restrain.errors import PenaltyError
from restrain.named_tensors import Location

LAYERS = [
    (nn.Linear(4, 6), (2, 4)),
    (nn.Conv1d(4, 6, 3), (2, 4, 8)),
    (nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
]


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: a linear layer with the weight (in, out)."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


LAYERS.append((Conv1D(6, 4), (2, 4)))


def group(w, groups, index):
    """1 at the entries of one group, 0 elsewhere, in the shape of w."""
    mask = torch.zeros(groups.shape)
    sizes = [groups.shape[dim] for dim in groups.keep]
    place = [slice(None)] * len(groups.shape)
    for dim, i in zip(groups.keep, torch.unravel_index(torch.tensor(index), sizes), strict=True):
        place[dim] = int(i)
    mask[tuple(place)] = 1
    return mask.reshape(w.shape)


@pytest.mark.parametrize("per", ["out", "filter", "in", "channel"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:40])
@torch.no_grad()
def test_groups_are_outputs_and_inputs(layer, shape, per):
    groups = grouping(per, tuple(layer.weight.shape), layer, "weight")
    x, weight = torch.randn(shape), layer.weight.clone()
    before, out = layer(x), per in ("out", "filter")
    channels = before.shape[1] if out else shape[1]
    assert group_size(groups) * channels == weight.numel()
    for i in range(channels):
        layer.weight.copy_(weight * (1 - group(weight, groups, i)))  # without one group ...
        changed = layer(x) - before
        if out:  # ... one output, and no other, is the bias
            assert torch.equal(layer(x)[:, i], torch.full_like(before[:, i], float(layer.bias[i])))
            assert changed.index_fill(1, torch.tensor([i]), 0).eq(0).all()
        else:  # ... one input, and no other, counts for nothing
            layer.weight.copy_(weight)
            torch.testing.assert_close(layer(x.index_fill(1, torch.tensor([i]), 0)), before + changed)
    layer.weight.copy_(weight)


@torch.no_grad()
def test_embeddings():
    for layer in (nn.Embedding(5, 3), nn.EmbeddingBag(5, 3)):
        for per, keep in (("in", 0), ("row", 0), ("channel", 0), ("out", 1), ("column", 1), ("filter", 1)):
            assert grouping(per, (5, 3), layer, "weight") == Grouping((5, 3), (keep,))


def attention(**options):
    return nn.MultiheadAttention(12, 3, bias=False, batch_first=True, **options)


@pytest.mark.parametrize("name", ["in_proj_weight", "q_proj_weight", "k_proj_weight"])
@torch.no_grad()
def test_heads_are_those_of_the_attention(name):
    layer = attention() if name == "in_proj_weight" else attention(kdim=5, vdim=7)
    q = torch.randn(2, 4, 12)
    k, v = (q, q) if name == "in_proj_weight" else (torch.randn(2, 4, 5), torch.randn(2, 4, 7))
    w = getattr(layer, name)
    groups = grouping("head", tuple(w.shape), layer, name)
    assert group_size(groups) * 3 == w.numel()
    weights, before = layer(q, k, v, average_attn_weights=False)[1], w.clone()
    for head in range(3):
        w.copy_(before + group(w, groups, head))
        changed = (layer(q, k, v, average_attn_weights=False)[1] - weights).abs().amax((0, 2, 3)) > 1e-6
        assert changed.tolist() == [i == head for i in range(3)]
        w.copy_(before)


@torch.no_grad()
def test_heads_of_values_and_of_the_output_are_the_same():
    layer = attention(kdim=5, vdim=7)
    q, k, v = torch.randn(2, 4, 12), torch.randn(2, 4, 5), torch.randn(2, 4, 7)
    value = grouping("head", (12, 7), layer, "v_proj_weight")
    output = grouping("head", (12, 12), layer.out_proj, "weight", heads=3)
    for head in range(3):
        twins = []
        for name, groups in (("v_proj_weight", value), ("out_proj.weight", output)):
            w = layer.get_parameter(name)
            before = w.clone()
            w.mul_(1 - group(w, groups, head))
            twins.append(layer(q, k, v)[0])
            w.copy_(before)
        torch.testing.assert_close(*twins)
        assert not torch.allclose(twins[0], layer(q, k, v)[0])


def test_a_whole_head_becomes_zero_by_a_rule():
    layer = attention()
    bound = rs.GroupLasso("head").bound_to(Location(torch.empty(36, 12), owner=layer, attribute="in_proj_weight"))
    w = layer.in_proj_weight.detach().clone()
    w.view(3, 3, 4, 12)[:, 1] *= 1e-3
    z = bound.prox(w, 0.05).view(3, 3, 4, 12)
    assert [bool(z[:, head].any()) for head in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("per", "shape", "keep"),
    [
        (0, (3, 4), 0),
        (-1, (3, 4), 1),
        (0, (5,), 0),
        (2, (3, 4, 5), 2),
        ("row", (3, 4), 0),
        ("column", (3, 4, 5), 1),
    ],
)
def test_plain_tensors(per, shape, keep):
    assert grouping(per, shape) == Grouping(shape, (keep,))


def test_rows_and_columns_ignore_the_layout():
    layer = nn.ConvTranspose1d(4, 6, 3)
    assert grouping("row", (4, 6, 3), layer, "weight").keep == (0,)
    assert grouping("column", (4, 6, 3), layer, "weight").keep == (1,)
    assert grouping("out", (4, 6), layer, "other").keep == (0,)  # only its weight is laid out like that


def test_a_grouping_is_itself():
    groups = Grouping((2, 6), (0,))
    assert grouping(groups, (3, 4)) is groups
    torch.testing.assert_close(group_norms(torch.ones(3, 4), groups), torch.full((2, 1), 6**0.5))
    with pytest.raises(PenaltyError, match=r"\(5, 4\)"):
        groups.view(torch.ones(5, 4))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("out", (5,)), r"shape \(5,\): select rs\.weights, or write per=0"),
        (("out", ()), r"shape \(\): select rs\.weights"),
        (("out", (5,), nn.Linear(2, 5), "bias"), r"\('bias' of Linear\)"),
        ((2, (3, 4)), "per=2 needs a tensor with that dim"),
        ((-3, (3, 4)), "per=-3"),
        ((0, ()), "per=0"),
        (("rows", (3, 4)), "'out', 'in', 'filter'"),
        ((True, (3, 4)), "got True"),
        ((1.0, (3, 4)), r"got 1\.0"),
        ((None, (3, 4)), "got None"),
        (("head", (12, 12)), "MultiheadAttention"),
        (
            ("head", (12, 12), nn.Linear(12, 12), "weight"),
            r"\('weight' of Linear\).*per=\(64,\) for rows, per=\(12, 64\)",
        ),
        (("head", (12, 12), nn.Linear(12, 12), "weight", 5), "MultiheadAttention"),
        (("head", (1, 1, 12), attention(), "bias_k"), "MultiheadAttention"),
        (("in", (3, 4, 5), nn.Bilinear(4, 5, 3), "weight"), "per=1 for the first"),
    ],
)
def test_errors_say_what_to_write(arguments, told):
    with pytest.raises(PenaltyError, match=told):
        grouping(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_group_norms_at_zero(dtype):
    w = torch.randn(3, 4, dtype=dtype)
    w[1] = 0
    w.requires_grad_()
    norms = group_norms(w, grouping(0, (3, 4)))
    torch.testing.assert_close(norms, torch.linalg.vector_norm(w, dim=1, keepdim=True))
    (gradient,) = torch.autograd.grad(norms.sum(), w)
    assert gradient[1].eq(0).all()
    torch.testing.assert_close(gradient[0], (w / norms)[0].detach())
    assert group_norms(torch.tensor([[torch.nan, 0.0]]), grouping(0, (1, 2))).isnan().all()


def test_groups_of_single_entries():
    w = torch.tensor([-3.0, 0.0, 2.0])
    groups = grouping(0, (3,))
    assert group_size(groups) == 1
    torch.testing.assert_close(group_norms(w, groups), w.abs())
    torch.testing.assert_close(rs.GroupLasso(0).prox(w, torch.tensor([1.0, 1.0, 5.0])), torch.tensor([-2.0, 0.0, 0.0]))
