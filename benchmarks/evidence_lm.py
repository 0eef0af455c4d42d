"""Decay, cautious and corrected decay, Hyperball and load balance on a small language model: test losses over seeds.

    python benchmarks/evidence_lm.py [--results build/evidence_lm.jsonl] [--table] [--quick]

A GPT of one million parameters reads the characters of Python's own documentation (pydoc's topics), cut into 50
contiguous blocks: of each ten, eight are for training, one for validation, one for the test. Every training takes the
same number of steps, with the same batches for the same seed. Each method is tuned on as many points as the others, by
the validation loss of a seed that isn't used again, and then trained with five more seeds; differences are paired by
seed. Rules act on the matrices of the blocks; where these have an optimizer or a learning rate of their own (Muon,
Hyperball), the other parameters take AdamW with the learning rate that was tuned for no decay. The mixture of experts
has four in each block, of which a token takes one.

A run is one line of the results' file; those that stand there are not made again. One thread; some 40 minutes.
"""

import argparse
import contextlib
import json
import math
import pydoc_data.topics
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import measure
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

BLOCKS, CONTEXT, BATCH, STEPS, WARMUP = 50, 64, 8, 300, 30
WIDTH, HEADS, LAYERS, EXPERTS = 144, 4, 4, 4
TUNING, SEEDS = 100, (0, 1, 2, 3, 4)
HIDDEN = rs.weights & rs.glob("blocks.*")
RATES, STRENGTHS, ANGLES = (1e-3, 2e-3), (0.1, 1.0, 10.0), (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16)
BASE = "no decay"
COLUMNS = ["method", "learning rate", "strength", "train", "test", "paired difference", "better in", "mean norm"]
COLUMNS += ["busiest expert"]


class Text:
    """Characters as numbers, in three parts."""

    def __init__(self):
        text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        self.characters = sorted(set(text))
        number = {character: at for at, character in enumerate(self.characters)}
        codes = torch.tensor([number[character] for character in text])
        blocks = codes[: len(codes) // BLOCKS * BLOCKS].view(BLOCKS, -1)
        place = torch.arange(BLOCKS) % 10
        self.train, self.valid, self.test = blocks[place < 8], blocks[place == 8], blocks[place == 9]

    def batch(self, generator):
        """Random windows of the training blocks."""
        block = torch.randint(len(self.train), (BATCH, 1), generator=generator)
        start = torch.randint(self.train.shape[1] - CONTEXT, (BATCH, 1), generator=generator)
        windows = self.train[block, start + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    """Each token's most probable expert, times its probability (Switch)."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            y = y.index_add(0, rows, expert(tokens[rows]))
        return (y * weights.unsqueeze(-1)).view_as(x)


class Block(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attn, self.mlp = Attention(), Mixture() if mixture else Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self, characters, mixture=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(mixture) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 if not residual else 0.02 / math.sqrt(2 * LAYERS))

    def forward(self, x):
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Method:
    """How the matrices of the blocks are trained."""

    points: tuple  # (learning rate, strength) of the grid
    plan: object = lambda strength: []
    decay: bool = False  # the optimizer's own weight_decay
    muon: bool = False
    own_rate: bool = False  # the others take the rate tuned for no decay
    mixture: bool = False


def decayed(**how):
    """The rule that is AdamW's decay by `strength`: Σw² has the gradient 2w."""
    return lambda strength: [strength / 2 * rs.L2().on(HIDDEN, how="decoupled", **how)]


def corrected(strength):
    return [strength / 2 * rs.schedules.LearningRate() * rs.L2().on(HIDDEN, how="decoupled")]


def held(strength):
    return [rs.Hyperball().on(HIDDEN)]


def balanced(strength):
    return [strength * rs.LoadBalance(1).on(rs.outputs("*.router"))]


def grid(rates, strengths=(0.0,)):
    return tuple((rate, strength) for rate in rates for strength in strengths)


WITH_DECAY = grid(RATES, STRENGTHS)
METHODS = {
    BASE: Method(grid((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 6e-3))),
    "AdamW's decay": Method(WITH_DECAY, decay=True),
    "cautious decay": Method(WITH_DECAY, decayed(cautious=True)),
    "corrected decay (AdamC)": Method(WITH_DECAY, corrected),
    "Hyperball, AdamW (AdamH)": Method(grid(ANGLES), held, own_rate=True),
    "Hyperball, Muon (MuonH)": Method(grid(ANGLES), held, muon=True, own_rate=True),
    "Muon, its decay": Method(grid((1e-3, 4e-3), STRENGTHS), decay=True, muon=True, own_rate=True),
    "mixture, no balance": Method(grid((5e-4, 1e-3, 2e-3, 4e-3)), mixture=True),
    "mixture, LoadBalance": Method(grid((1e-3, 2e-3), (1e-2, 1e-1)), balanced, mixture=True),
}
BASES = {name: "mixture, no balance" if method.mixture else BASE for name, method in METHODS.items()}


def optimizers(model, method, rate, strength, others):
    """One for the matrices of the blocks and one for the rest; AdamW takes both as groups."""
    hidden = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if not (name.startswith("blocks") and p.dim() == 2)]
    decay = strength if method.decay else 0.0
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    if method.muon:
        muon = torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, lr=others, **adam)]
    groups = [{"params": hidden, "lr": rate, "weight_decay": decay}, {"params": rest, "lr": others}]
    return [torch.optim.AdamW(groups, **adam)]


def rate_at(step):
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


@torch.no_grad()
def evaluated(model, blocks):
    """Mean loss a character, over windows beside each other."""
    windows = blocks.unfold(1, CONTEXT + 1, CONTEXT).flatten(0, 1)
    total = sum(F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten()) * len(w) for w in windows.split(64))
    return (total / len(windows)).item()


def busiest(model, text):
    """Of the tokens of validation, the part that the busiest expert takes: the mean over layers."""
    routers = [module for name, module in model.named_modules() if name.endswith("router")]
    windows = text.valid.unfold(1, CONTEXT + 1, CONTEXT).flatten(0, 1)[:128, :-1]
    with torch.no_grad(), rs.recording(model, "*.router") as seen:
        model(windows)
    parts = [logits.argmax(-1).bincount(minlength=EXPERTS).max() / windows.numel() for logits in seen.values()]
    assert len(parts) == len(routers)
    return (sum(parts) / len(parts)).item()


def trained(text, name, rate, strength, seed, others):
    """One training: its losses."""
    method = METHODS[name]
    torch.manual_seed(seed)
    model, generator = Gpt(len(text.characters), method.mixture), torch.Generator().manual_seed(seed)
    made = optimizers(model, method, rate, strength, others if method.own_rate else rate)
    plan = method.plan(strength)
    loss_of = rs.attach(model, plan, made).loss if plan else lambda loss: loss
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at) for optimizer in made]
    began, recent = time.process_time(), []
    for _ in range(STEPS):
        x, y = text.batch(generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss_of(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*made, *schedules):
            step.step()
        for optimizer in made:
            optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
    seconds = time.process_time() - began
    model.eval()
    part = "valid" if seed == TUNING else "test"
    found = {"train": statistics.mean(recent), part: evaluated(model, getattr(text, part))}
    norms = [p.norm().item() for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2]
    if method.mixture:
        found["busiest"] = busiest(model, text)
    return {**found, "norm": statistics.mean(norms), "seconds": seconds}


class UnfinishedError(Exception):
    """A run isn't in the results' file, and none is to be made."""


class Runs:
    """The results' file."""

    def __init__(self, path, text, only_read):
        self.path, self.text, self.only_read = path, text, only_read
        self.setting = [BLOCKS, CONTEXT, BATCH, STEPS, WARMUP, WIDTH, LAYERS, len(text.characters)]
        self.found = {}
        if path.exists():
            for line in map(json.loads, path.read_text("utf-8").splitlines()):
                if line["setting"] == self.setting:
                    self.found[line["name"], line["rate"], line["strength"], line["seed"]] = line

    def run(self, name, point, seed, others):
        key = (name, *point, seed)
        if key not in self.found:
            if self.only_read:
                raise UnfinishedError(name)
            line = dict(zip(("name", "rate", "strength", "seed"), key, strict=True))
            line |= {"setting": self.setting, "others": others, **trained(self.text, *key, others)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.found[key] = line
            print(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items() if k != "setting"}, flush=True
            )
        return self.found[key]

    def tuned(self, name, others):
        """The point of the grid with the least validation loss; a loss that isn't finite is none."""
        method = METHODS[name]
        losses = {point: self.run(name, point, TUNING, others)["valid"] for point in method.points}
        return min(losses, key=lambda point: losses[point] if math.isfinite(losses[point]) else math.inf)

    def all(self):
        """{method: (tuned point, lines of all seeds)}; of unfinished ones the seeds that there are, from two on."""
        found, others = {}, None
        for name in METHODS:
            with contextlib.suppress(UnfinishedError):
                point = self.tuned(name, others)
                others = point[0] if name == BASE else others
                lines = []
                found[name] = (point, lines)
                for seed in SEEDS:
                    lines.append(self.run(name, point, seed, others))
        return {name: cells for name, cells in found.items() if len(cells[1]) > 1}


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def row(name, point, lines, base):
    """Cells of one method."""
    method, (rate, strength) = METHODS[name], point
    mean, error = mean_and_error([line["test"] for line in lines])
    difference = [a["test"] - b["test"] for a, b in zip(lines, base[: len(lines)], strict=True)]
    paired, its_error = mean_and_error(difference)
    busy = f"{statistics.mean(line['busiest'] for line in lines):.2f}" if method.mixture else ""
    rates = sorted({rate for rate, _ in method.points})
    edge = len(rates) > 2 and rate in (rates[0], rates[-1])
    return [
        name,
        f"{rate:g}{' (edge of the grid)' * edge}",
        f"{strength:g}" if strength else "",
        f"{statistics.mean(line['train'] for line in lines):.3f}",
        f"{mean:.4f} ± {error:.4f}",
        "" if lines is base else f"{paired:+.4f} ± {its_error:.4f}",
        "" if lines is base else f"{sum(d < 0 for d in difference)} of {len(difference)}",
        f"{statistics.mean(line['norm'] for line in lines):.1f}",
        busy,
    ]


def main():
    global STEPS, WARMUP, SEEDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("build/evidence_lm.jsonl"))
    parser.add_argument("--table", action="store_true", help="only of what the results' file has")
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it runs")
    given = parser.parse_args()
    if given.quick:
        STEPS, WARMUP, SEEDS = 4, 2, (0, 1)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    found = Runs(given.results, Text(), given.table).all()
    lines = [line for _, lines in found.values() for line in lines]
    section = measure.Section(__file__, "Rules on a small language model")
    section.table(
        f"Loss a character, {len(SEEDS)} seeds ± standard error",
        COLUMNS,
        [row(name, *cells, found[BASES[name]][1]) for name, cells in found.items() if BASES[name] in found],
        f"{STEPS} steps of {BATCH} × {CONTEXT} characters, {statistics.mean(x['seconds'] for x in lines):.0f} s a run.",
    )
    print(measure.machine())


if __name__ == "__main__":
    main()
