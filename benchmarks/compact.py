"""What compaction gains, and how long it takes: half of the inner units of each block are zero.

    python benchmarks/compact.py [--quick] [--threads 1]

Latencies of the model before and after are measured in turns, in evaluation. If Torch-Pruning is installed, it is told
to remove the same filters, for the time that takes and for the difference of the outputs.
"""

import copy
import time

import torch
from measure import options, paired, ratios, spread, times
from torch import nn
from torch.nn import functional as F

import restrain as rs


class Block(nn.Module):
    """Two 3 × 3 convolutions with batch normalisation, and a residual addition, as in ResNet-18."""

    def __init__(self, given, width, stride):
        super().__init__()
        self.first, self.norm = nn.Conv2d(given, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        plain = given == width and stride == 1
        self.short = nn.Identity() if plain else nn.Conv2d(given, width, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.last(self.second(F.relu(self.norm(self.first(x))))) + self.short(x))


class ResNet(nn.Module):
    """ResNet-18 on images of 3 channels."""

    def __init__(self, width=64):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        sizes = [width * 2**stage for stage in range(4)]
        pairs = [(sizes[max(stage - 1, 0)], sizes[stage], 1 + (stage > 0)) for stage in range(4)]
        blocks = [block for a, b, stride in pairs for block in (Block(a, b, stride), Block(b, b, 1))]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(sizes[-1], 100)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


@torch.no_grad()
def resnet(quick):
    torch.manual_seed(0)
    model = ResNet(8 if quick else 64).eval()
    for block in model.blocks:
        dead = len(block.norm.weight) // 2
        for tensor in (block.first.weight, block.norm.weight, block.norm.bias):
            tensor[:dead] = 0
    return model, torch.randn(1, 3, 64 if quick else 224, 64 if quick else 224)


@torch.no_grad()
def gpt2(quick):
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    small = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500} if quick else {}
    model = GPT2Model(GPT2Config(**small)).eval()
    width, heads = model.config.n_embd, model.config.n_head
    for block in model.h:
        block.mlp.c_fc.weight[:, : 2 * width], block.mlp.c_fc.bias[: 2 * width] = 0, 0
        dead = width // heads * (heads // 2)  # features of half of the heads
        block.attn.c_attn.weight[:, 2 * width : 2 * width + dead] = 0
        block.attn.c_attn.bias[2 * width : 2 * width + dead] = 0
    return model, torch.randint(0, 500, (1, 16 if quick else 128))


def only_blocks(model, ids):
    """The transformer blocks of GPT-2, without embeddings."""
    hidden = torch.randn(*ids.shape, model.config.n_embd)

    def run():
        x = hidden
        for block in model.h:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x

    return run


def told(name, before, after, rounds):
    with torch.no_grad():
        seconds = paired({"before": before, "after": after}, rounds)
    print(
        f"{name}: {spread(seconds['before'], 1e3)} ms before, {spread(seconds['after'], 1e3)} ms after, "
        f"{times(ratios(seconds, 'before', 'after'))} times as fast"
    )


def peer(model, x):
    """Torch-Pruning, told to remove the filters that are zero."""
    try:
        import torch_pruning
    except ImportError:
        return print("Torch-Pruning isn't installed")
    other, began = copy.deepcopy(model), time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(other, example_inputs=x)
    for block in other.blocks:
        dead = list(range(len(block.norm.weight) // 2))
        graph.get_pruning_group(block.first, torch_pruning.prune_conv_out_channels, idxs=dead).prune()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        difference = float((other(x) - model(x)).abs().max() / model(x).abs().max())
    return print(f"Torch-Pruning, the same filters: {seconds:.1f} s, outputs differ by {difference:.1e} of their scale")


def main():
    given = options(__doc__)
    torch.set_num_threads(given.threads)
    rounds = 3 if given.quick else 15
    print(f"torch {torch.__version__}, {given.threads} threads")
    model, x = resnet(given.quick)
    began = time.perf_counter()
    result = rs.compact(model, x)
    print(f"ResNet-18: compacted in {time.perf_counter() - began:.1f} s, difference {result.report.difference:.1e}")
    told("ResNet-18, half of the inner channels", lambda: model(x), lambda: result.model.eval()(x), rounds)
    peer(model, x)
    model, ids = gpt2(given.quick)
    began = time.perf_counter()
    result = rs.compact(model, ids)
    print(f"GPT-2 small: compacted in {time.perf_counter() - began:.1f} s, difference {result.report.difference:.1e}")
    told("GPT-2 small, half of heads and features", lambda: model(ids), lambda: result.model.eval()(ids), rounds)
    told("its blocks alone", only_blocks(model, ids), only_blocks(result.model.eval(), ids), rounds)


if __name__ == "__main__":
    main()
