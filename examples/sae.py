"""Sparse autoencoders on the activations of a language model: four ways to a sparse code, compared.

    pip install restrain transformers matplotlib
    python examples/sae.py

A small GPT-2, made from its configuration, learns to write like Python's own documentation, so
nothing is downloaded. The outputs of its first MLP are then coded by more features than it has
dimensions, by TopK, BatchTopK, JumpReLU with learned thresholds, and an L1, each at several L0. The
table says of each autoencoder, in evaluation: the mean number of active features (L0), the error as
a part of the variance, the part of the language model's loss that is recovered (of that between the
MLP's outputs zeroed and as they are) when these are replaced by the reconstruction, and the dead
features. A picture shows error against L0.
"""

import argparse
import pydoc_data.topics

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import restrain as rs

LAYER, CONTEXT = "transformer.h.0.mlp", 64
CODE = rs.outputs("relu")
METHODS = ("TopK", "BatchTopK", "JumpReLU", "L1")


def batches(count, size, seed):
    """Bytes of Python's documentation, (count, size, context)."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    data = torch.tensor(list(text.encode()), dtype=torch.long)
    starts = torch.randint(len(data) - CONTEXT, (count, size), generator=torch.Generator().manual_seed(seed))
    return data[starts.unsqueeze(-1) + torch.arange(CONTEXT)]


def language_model(steps, width):
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=width, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for tokens in batches(steps, 16, seed=0):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def activations(model, count, seed):
    """Outputs of the MLP, a row for each token."""
    rows = []
    with rs.recording(model, LAYER) as seen:
        for tokens in batches(count, 32, seed):
            model(tokens)
            rows.append(seen[LAYER].flatten(0, -2))
    return torch.cat(rows)


class Sae(nn.Module):
    """decoder(relu(encoder(x - b))) + b, in units in which a feature of x has the mean square 1."""

    def __init__(self, x, features):
        super().__init__()
        self.encoder = nn.Linear(x.shape[1], features)
        self.relu = nn.ReLU()
        self.decoder = nn.Linear(features, x.shape[1], bias=False)
        self.bias = nn.Parameter(x.mean(0))
        self.scale = nn.Parameter((x - x.mean(0)).square().mean().sqrt(), requires_grad=False)
        with torch.no_grad():
            self.decoder.weight.copy_(F.normalize(self.decoder.weight, dim=0))
            self.encoder.weight.copy_(self.decoder.weight.T)
            self.encoder.bias.zero_()

    def forward(self, x):
        """The reconstruction of x."""
        return self.centred((x - self.bias) / self.scale) * self.scale + self.bias

    def centred(self, x):
        return self.decoder(self.relu(self.encoder(x)))


def plan_of(method, l0, features):
    """What makes a code sparse, at about so many active features."""
    dead_after = 20_000
    auxiliary = 1 / 32 * rs.AuxK(32, dead_after, target=rs.inputs("encoder"), reconstruction=rs.outputs("decoder"))
    towards = rs.Target(active=l0 / features, start=0.1, every=5)
    # thresholds lag behind the strength, and features that die on the way stay dead
    slowly = rs.Target(active=l0 / features, start=0.01, gain=0.05, every=5)
    rules = {
        "TopK": [rs.TopK(l0).on(CODE), auxiliary.on(CODE)],
        "BatchTopK": [rs.BatchTopK(l0).on(CODE), auxiliary.on(CODE)],
        "JumpReLU": [rs.JumpReLU(0.3, 0.3, units=features).on(CODE), slowly * rs.L0("learned").on(CODE, name="L0")],
        "L1": [rs.Firings().on(CODE), towards * rs.L1().on(CODE, name="L1")],
    }
    # unit decoder columns; the gradient's parallel part doesn't reach Adam
    return [*rules[method], rs.UnitNorm("in").on("decoder.weight")]


def train(method, l0, x, features, steps):
    """An autoencoder and its rules; dead features of the L1 are resampled."""
    sae = Sae(x, features)
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=2e-3)
    reg = rs.attach(sae, plan_of(method, l0, features), optimizer)
    if learned := list(reg.parameters()):
        optimizer.add_param_group({"params": learned, "lr": 5e-3})
    for step in range(steps):
        rows = x[torch.randint(len(x), (512,))]
        optimizer.zero_grad()
        error = ((sae(rows) - rows) / sae.scale).square().sum(1)
        reg.loss(error.mean()).backward()
        optimizer.step()
        if method == "L1" and step in (steps // 3, 2 * steps // 3):
            centred = ((rows - sae.bias) / sae.scale).detach()
            reg.resample("relu", centred, error.detach(), encoder="encoder", decoder="decoder", dead_after=20_000)
    return sae.eval(), reg


@torch.no_grad()
def measured(sae, reg, model, x, tokens):
    """L0, error as a part of the variance, part of the loss recovered, dead features."""
    with rs.recording(sae, rs.inputs("decoder")) as seen:
        error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    code = seen["decoder:inputs"]
    losses = []
    for change in (lambda h: h, sae, torch.zeros_like):
        handle = model.get_submodule(LAYER).register_forward_hook(lambda _, args, h, change=change: change(h))
        losses.append(model(tokens, labels=tokens).loss.item())
        handle.remove()
    recovered = (losses[2] - losses[1]) / (losses[2] - losses[0])
    dead = int((reg.tokens_since_fired()["relu"] > 20_000).sum())
    return (code != 0).sum(1).float().mean().item(), error.item(), recovered, dead


def draw(found, path):
    """Error against L0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for method in METHODS:
        points = sorted((l0, error) for name, (l0, error, *_) in found if name == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xlabel="L0: active features of a token", ylabel="error / variance")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--picture", default="sae.png")
    options = parser.parse_args()
    width, features, sizes, lm_steps, steps = (
        (32, 128, (4, 12), 150, 400) if options.quick else (64, 512, (4, 8, 16, 32), 600, 1500)
    )
    torch.manual_seed(0)
    model = language_model(lm_steps, width)
    x, fresh, tokens = activations(model, 25, 1), activations(model, 4, 2), batches(1, 64, 3)[0]
    print(f"loss of the language model: {model(tokens, labels=tokens).loss:.3f}")
    found = []
    for method in METHODS:
        for size in sizes:
            sae, reg = train(method, size, x, features, steps)
            found.append((method, measured(sae, reg, model, fresh, tokens)))
            l0, error, recovered, dead = found[-1][1]
            print(
                f"{method}: L0 {l0:.1f}, error {error:.3f}, loss recovered {recovered:.3f}, dead {dead} of {features}"
            )
    draw(found, options.picture)


if __name__ == "__main__":
    main()
