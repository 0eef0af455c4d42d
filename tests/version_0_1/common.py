"""Numbers that are the same on any machine, and what is remembered of tensors."""

import gzip
import shutil
from math import prod
from pathlib import Path

import torch
from torch import nn

DATA = Path(__file__).parent.parent / "data" / "v0_1"


def numbers(*shape, seed=0):
    """Numbers from -2 to 2 that look like chance, of whole numbers only, so that no generator can change them."""
    k = torch.arange(prod(shape)) + 1000 * seed
    return (((k**3 + 31 * k) % 10007).double() / 10007 - 0.5).mul(4).reshape(shape)


def unpack(folder):
    """All files as they were saved, in another folder."""
    for path in filter(Path.is_file, DATA.rglob("*")):
        place = folder / path.relative_to(DATA)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            place.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        elif path.suffix != ".py":
            shutil.copy(path, place)
    return folder


def settled(module, seed=1):
    """The module with such numbers for parameters."""
    with torch.no_grad():
        for index, p in enumerate(module.parameters()):
            p.copy_(numbers(*p.shape, seed=seed + index) / 4)
    return module


def digest(tensor):
    """What is remembered of a tensor: its length, a product that no two entries share, and how many are zero."""
    flat = torch.as_tensor(tensor).detach().double().flatten()
    return [float(flat.norm()), float(flat @ torch.arange(1.0, len(flat) + 1).double().cos()), int((flat == 0).sum())]


def digests(module):
    return {name: digest(p) for name, p in module.named_parameters()}


def rounded(found):
    """As `expected.json` has it: seven digits of each number."""
    if isinstance(found, dict):
        return {str(key): rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return float(f"{found:.7g}") if isinstance(found, float) else found


def assert_near(found, wanted, *, rtol=1e-5, atol=1e-7, at=""):
    """That two nests of lists and dicts have the same numbers, but for rounding."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), at
        for key, value in wanted.items():
            assert_near(found[key], value, rtol=rtol, atol=atol, at=f"{at}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), at
        for index, value in enumerate(wanted):
            assert_near(found[index], value, rtol=rtol, atol=atol, at=f"{at}/{index}")
    elif isinstance(wanted, float):
        near = abs(found - wanted) <= atol + rtol * abs(wanted) or (found != found and wanted != wanted)
        assert near, f"{at}: {found} instead of {wanted}"
    else:
        assert found == wanted, f"{at}: {found} instead of {wanted}"


class Dense(nn.Sequential):
    """Six numbers in, three out; every layer has a name of one digit."""

    def __init__(self, dtype=torch.float64):
        super().__init__(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        settled(self.to(dtype))


class Tagger(nn.Module):
    """Tokens in, three numbers for each out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.conv = nn.Embedding(11, 4), nn.Conv1d(4, 6, 3, padding=1)
        self.norm, self.gru, self.head = nn.LayerNorm(6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)
        settled(self.double())

    def forward(self, tokens, mask=None, lengths=None):
        h = torch.relu(self.conv(self.embedding(tokens).transpose(1, 2)))
        return self.head(self.gru(self.norm(h.transpose(1, 2)))[0])


class Parallel(nn.Module):
    """Layers of 4 x 4 side by side, for rules that each have a weight of their own; one of them is a LoRA pair."""

    def __init__(self, count=20):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        settled(self.double())
        self.layers[1].weight.data.abs_().add_(0.01)

    def forward(self, x):
        return sum(layer(x) for layer in self.layers) + self.lora_B(self.lora_A(x))
