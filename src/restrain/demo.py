"""Demo on the 1,797 handwritten digits of scikit-learn (`make demo`, `restrain demo`).

Part 1 compares keyword models on 200 training images. Part 2 is a training loop in plain PyTorch:
one network without rules, with rules in the loss and with proximal rules, and a sparse autoencoder.
Part 3 walks along a path of strengths, and takes the zero units out of the chosen network. Results
are printed and drawn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import restrain as rs
from restrain import demo, plots, storage
from restrain.extras import needing

with needing("demo", __name__):
    import matplotlib  # noqa: F401  # pictures come last: say that it is missing at once
    import numpy as np

    from restrain.models import Autoencoder, Classifier

TRAIN, VALID = 200, 200  # images
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "L2": [{"weight_l2": strength} for strength in (1e-3, 3e-3, 1e-2)],
    "L1": [{"weight_l1": strength, "how": "proximal"} for strength in (3e-5, 1e-4, 3e-4)],
    "dropout": [{"hidden_dropout": rate, "input_dropout": rate / 2} for rate in (0.1, 0.2, 0.4)],
    "noise": [{"input_noise": deviation} for deviation in (0.1, 0.2, 0.3)],
}
CODE_STRENGTHS = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class Split:
    """(images, labels) for training, choice of strengths, test; images are 64 numbers in [0, 1]."""

    train: tuple[Any, Any]
    valid: tuple[Any, Any]
    test: tuple[Any, Any]


def digits(seed: int) -> Split:
    """Return the 1,797 digits, shuffled by the seed and split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).astype(np.float32), labels[order]
    cut = TRAIN + VALID
    return Split((x[:TRAIN], y[:TRAIN]), (x[TRAIN:cut], y[TRAIN:cut]), (x[cut:], y[cut:]))


def classifier(seed: int, **keywords: Any) -> Classifier:
    """Return an unfitted classifier with the fixed settings of part 1."""
    fixed: dict[str, Any] = {"hidden": (100,), "epochs": 60, "batch_size": 50, "learning_rate": 5e-3, "progress": False}
    model: Classifier = Classifier(random_state=seed, normalize=False, **fixed, **keywords)  # pixels are from 0 to 1
    return model


def chosen() -> dict[str, dict[str, Any]]:
    """Return for each kind of rule the keywords with the best mean validation accuracy of 2 seeds.

    "all" is all kinds together, with strengths scaled by 1, 0.5 or 0.25.
    """
    best = {}
    for kind, candidates in CANDIDATES.items():
        scores = [_accuracy(keywords) for keywords in candidates]
        best[kind] = candidates[scores.index(max(scores))]
    joined = {key: value for keywords in best.values() for key, value in keywords.items()}
    together = [
        {key: value * scale if isinstance(value, float) else value for key, value in joined.items()}
        for scale in (1.0, 0.5, 0.25)
    ]
    scores = [_accuracy(keywords) for keywords in together]
    best["all"] = together[scores.index(max(scores))]
    return best


def _accuracy(keywords: dict[str, Any]) -> float:
    splits = [(seed, digits(seed)) for seed in (1000, 1001)]
    scores: list[float] = [classifier(seed, **keywords).fit(*s.train).score(*s.valid) for seed, s in splits]
    return statistics.mean(scores)


@dataclass(frozen=True)
class Gain:
    """Test accuracy of a kind of rule minus the plain network's, for each seed."""

    kind: str
    keywords: dict[str, Any]
    differences: Sequence[float]

    @property
    def mean(self) -> float:
        """Return the mean difference."""
        return statistics.mean(self.differences)

    @property
    def error(self) -> float:
        """Return the standard error of the mean."""
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))


def gains(seeds: int, step: Any = lambda: None) -> tuple[list[float], list[Gain]]:
    """Return the plain network's test accuracies and the gains; call `step` after each fit."""
    kinds = chosen()
    plain: list[float] = []
    differences: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in range(seeds):
        split = digits(seed)
        plain.append(classifier(seed).fit(*split.train).score(*split.test))
        step()
        for kind, keywords in kinds.items():
            score = classifier(seed, **keywords).fit(*split.train).score(*split.test)
            differences[kind].append(score - plain[-1])
            step()
    return plain, [Gain(kind, kinds[kind], differences[kind]) for kind in kinds]


def frontier(epochs: int = 30) -> Iterator[tuple[float, float, float]]:
    """Yield (strength of an L1 on the relu code, fraction of exact zeros, error) of autoencoders.

    The error is the mean squared error of a pixel; both are measured on held-out images.
    """
    split = digits(0)
    x = np.concatenate([split.train[0], split.valid[0], split.test[0][:600]])
    held_out = split.test[0][600:]
    for strength in CODE_STRENGTHS:
        fixed = {"epochs": epochs, "batch_size": 50, "learning_rate": 5e-3, "random_state": 0, "progress": False}
        model = Autoencoder([64, (100, "relu"), 64], hidden_l1=strength, normalize=False, **fixed).fit(x)
        code = model.encode(held_out)
        error = float(np.square(model.decode(code) - held_out).mean())
        yield strength, float((code == 0).mean()), error


def run(out: Path, seeds: int, epochs: int) -> Iterator[str]:
    """Run part 1: yield the lines to print, and write the picture into the folder `out`."""
    from tqdm import tqdm

    with tqdm(total=seeds * (len(CANDIDATES) + 2), unit=" fits", file=sys.stderr, desc="20 seeds") as bar:
        plain, found = gains(seeds, bar.update)
    yield f"{TRAIN} training images, strengths chosen on {VALID} others, {seeds} seeds; test accuracy:"
    yield f"  plain network        {statistics.mean(plain):8.2%}"
    for gain in found:
        how = ", ".join(f"{key}={value}" for key, value in gain.keywords.items())
        yield f"  {gain.kind:8} minus plain {gain.mean:+8.2%} ± {gain.error:.2%}   ({how})"
    points = list(frontier(epochs))
    yield "\nsparse autoencoder, 100 relu features: exact zeros in the code against the squared error of a pixel"
    for strength, zeros, error in points:
        yield f"  hidden_l1={strength:<7g} {zeros:6.1%} zeros   error {error:.4f}"
    yield f"pictures:\n  {draw_comparison(found, points, out / 'study.png')}"


def draw_comparison(found: Sequence[Gain], points: Sequence[tuple[float, float, float]], path: Path) -> Path:
    """Draw accuracy gains, a point a seed and mean ± 2 standard errors; and error against zeros.

    Args:
        found: the gains.
        points: (strength, fraction of zeros, error) of each autoencoder.
        path: the file to write and return.
    """
    figure, (left, right) = plots.panels(2, 2, (5.5, 3.6))
    blue, red, *_ = plots.COLORS
    for at, gain in enumerate(found):
        left.plot([at] * len(gain.differences), [100 * d for d in gain.differences], "o", color=blue, alpha=0.25)
        left.errorbar(at, 100 * gain.mean, 200 * gain.error, fmt="o", color=red, capsize=5)
    left.axhline(0, color="0.6", lw=1)
    left.set_xticks(range(len(found)), [gain.kind for gain in found])
    left.set(ylabel="test accuracy minus plain (%)", title="pairs by seed; mean ± 2 standard errors")
    right.plot([100 * zeros for _, zeros, _ in points], [error for _, _, error in points], "o-", color=blue)
    for strength, zeros, error in points:
        right.annotate(f"{strength:g}", (100 * zeros, error), textcoords="offset points", xytext=(5, 5), fontsize=8)
    right.set(
        xlabel="exact zeros in the code (%)",
        ylabel="squared error of a pixel",
        title="sparse autoencoder, by hidden_l1",
    )
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return plots.save(figure, path)


BATCH = 64


@dataclass
class Run:
    """Training run of part 2: the model, its final results, and its loss curves."""

    title: str
    model: nn.Module
    data_loss: float = 0.0
    test_loss: float = 0.0
    accuracy: float = float("nan")
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    table: str = ""
    seconds: float = 0.0


@dataclass
class Digits:
    """Images as rows of 64 numbers in [0, 1] and labels: 1,000 for training, the rest for test."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls) -> Digits:
        """Return the digits in a fixed random order."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(images, dtype=torch.float32)[order] / 16
        y = torch.tensor(labels)[order]
        return cls(x[:1000], y[:1000], x[1000:], y[1000:])


def network() -> nn.Sequential:
    """Return a plain network; rules need no change in it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


class SparseAutoencoder(nn.Module):
    """64 pixels → 100 non-negative features, few of them active → 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.relu, self.decoder = nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction."""
        return self.decoder(self.relu(self.encoder(x)))  # type: ignore[no-any-return]


IN_LOSS = [
    1e-4 * rs.L2().on(rs.weights, name="l2"),
    3e-4 * rs.L1().on(rs.outputs(nn.ReLU), name="l1 of activations"),
    rs.GaussianNoise(0.1).on(rs.inputs(), name="input noise"),
    rs.Dropout(0.2).on(rs.outputs("1"), name="dropout"),
]
PROXIMAL = [
    1e-4 * rs.L1().on(rs.weights - "0.*", how="proximal", name="l1"),
    3e-4 * rs.GroupLasso(per="in").on("0.weight", how="proximal", name="group lasso per pixel"),
]
SPARSE = [
    2e-1 * rs.L1().on(rs.outputs("relu"), name="l1 of the code"),
    rs.UnitNorm(per="in").on("decoder.weight", name="unit features"),
]


def train(title: str, model: nn.Module, plan: list[rs.Rule], data: Digits, loss_of: Any, bar: Any, epochs: int) -> Run:
    """Train with an ordinary loop and two lines for the rules, `attach` and `reg.loss`."""
    run, started = Run(title, model), time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    reg = rs.attach(model, plan, optimizer) if plan else None
    for _ in range(epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(data.x)).split(BATCH):
            data_loss = loss_of(model, data.x[rows], data.y[rows])
            loss = reg.loss(data_loss) if reg is not None else data_loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += data_loss.item() * len(rows)
        run.curves.setdefault("data_loss", []).append(total / len(data.x))
        for name, value in (reg.values() if reg is not None else {}).items():
            run.curves.setdefault(name, []).append(value)
        bar.update()
    model.eval()
    with torch.no_grad():
        run.data_loss = float(loss_of(model, data.x, data.y))
        run.test_loss = float(loss_of(model, data.x_test, data.y_test))
    if reg is not None:
        run.values, run.table = reg.values(), reg.table(values=True)
        reg.detach()
    run.seconds = time.perf_counter() - started
    return run


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(x), y)


def reconstruct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the squared error, summed over pixels, mean over images."""
    return (model(x) - x).square().sum(1).mean()  # type: ignore[no-any-return]


def zeros(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Yield (name, number of exact zeros, number of entries) of each weight."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            yield name, int((p == 0).sum()), p.numel()


def report(run: Run) -> str:
    """Return the text to print for a run."""
    lines = [f"\n{run.title}", "-" * len(run.title)]
    accuracy = "" if run.accuracy != run.accuracy else f"   test accuracy {run.accuracy:.2%}"
    lines.append(f"data loss {run.data_loss:.4f} (test {run.test_loss:.4f}){accuracy}   {run.seconds:.1f} s")
    lines += [f"  {name}: {value:.5f}" for name, value in run.values.items()]
    lines.append("exact zeros: " + ", ".join(f"{name} {zero}/{size}" for name, zero, size in zeros(run.model)))
    return "\n".join([*lines, *(["", run.table] if run.table else [])])


# ---------------------------------------------------------------- a path, and a smaller network


def shrinking(out: Path, points: int, epochs: int) -> Iterator[str]:
    """Run part 3: yield the lines to print, and draw the path into the folder `out`.

    A path of a group lasso on whole units, the point of the fewest units within one standard error
    of the best, and its network without the units that are zero.
    """
    data, model = Digits.load(), network()
    x, y, x_valid, y_valid = data.x[:700], data.y[:700], data.x[700:], data.y[700:]
    units = rs.units(example=x[:2], readers=False)

    def fit(model: nn.Module, reg: Any) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        reg.use(optimizer)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(175):
                optimizer.zero_grad()
                reg.loss(F.cross_entropy(model(x[rows]), y[rows])).backward()
                optimizer.step()

    path = rs.path(
        model,
        rs.GroupLasso(per=units).on(how="proximal"),
        fit,
        loss=lambda model: F.cross_entropy(model(x), y),
        score=lambda model: (model(x_valid).argmax(1) == y_valid).double(),
        strengths=torch.logspace(-4, -1.3, points).tolist(),
        random_state=0,
    )
    yield f"\nA path: group lasso on the {path[0].groups} units of 64-128-64-10, chosen on {len(x_valid)} digits"
    best, one = path.best(), path.one_se()
    for point in path.points:
        told = " best" * (point is best) + " one standard error" * (point is one)
        yield f"  strength {point.strength:.4f}: {point.selected:3} units, {point.score:.2%}{told}"
    large = path.model(one)
    result = rs.compact(large, data.x_test)
    yield f"without the units that are zero, on {len(data.x_test)} test digits:"
    yield str(result.report)
    with torch.no_grad():
        found = [float((model(data.x_test).argmax(1) == data.y_test).float().mean()) for model in (large, result.model)]
    yield f"correct: {found[0]:.2%} before, {found[1]:.2%} after"
    yield f"picture:\n  {path.plot(out / 'path.png')}"


def main(arguments: list[str] | None = None) -> None:
    """Run the demo; see `--help`."""
    parser = argparse.ArgumentParser(prog="restrain.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the comparison on few images")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the data of each training")
    parser.add_argument("--points", type=int, default=12, help="strengths of the path")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    storage.make_folder(given.out)
    for line in demo.run(given.out, given.seeds, min(given.epochs, 30)):
        print(line, flush=True)
    own_networks(given.out, given.epochs)
    for line in shrinking(given.out, given.points, min(given.epochs, 60)):
        print(line, flush=True)
    print(f"{time.perf_counter() - started:.1f} s in all")


def own_networks(out: Path, epochs: int) -> None:
    """Run part 2: train, print and draw the PyTorch networks."""
    from tqdm import tqdm

    data = Digits.load()
    jobs: list[tuple[str, nn.Module, list[rs.Rule], Any]] = [
        ("without rules", network(), [], classify),
        ("rules in the loss, noise and dropout", network(), IN_LOSS, classify),
        ("proximal rules", network(), PROXIMAL, classify),
        ("sparse autoencoder", SparseAutoencoder(), SPARSE, reconstruct),
    ]
    sizes = f"{len(data.x)} digits to train on, {len(data.x_test)} to test with"
    print(f"\nA PyTorch network of one's own: {sizes}; {epochs} epochs each")
    runs = []
    with tqdm(total=len(jobs) * epochs, unit=" epochs", file=sys.stderr) as bar:
        for title, model, plan, loss_of in jobs:
            bar.set_description(title)
            runs.append(train(title, model, plan, data, loss_of, bar, epochs))
    for run in runs:
        if not isinstance(run.model, SparseAutoencoder):
            with torch.no_grad():
                run.accuracy = float((run.model(data.x_test).argmax(1) == data.y_test).float().mean())
        print(report(run))
    code = rs.activations(runs[-1].model, data.x_test)["relu"]
    print(
        f"code: {(code == 0).float().mean():.1%} of its entries are zero, {(code > 0).float().sum(1).mean():.1f} "
        f"of {code.shape[1]} features at work in an image"
    )
    print("\npictures:")
    for path in draw(runs, data, out):
        print(f"  {path}")


def draw(runs: list[Run], data: Digits, out: Path) -> Iterator[Path]:
    """Write the pictures of part 2 into the folder `out`; yield their paths."""
    plain, in_loss, proximal, sparse = runs
    features = {run.title: run.model[0].weight for run in (plain, in_loss, proximal)}  # type: ignore[index]
    usage = rs.activations(sparse.model, data.x)["relu"].mean(0)
    decoder = sparse.model.get_parameter("decoder.weight").T
    features["sparse autoencoder (decoder), its most used features"] = decoder[usage.argsort(descending=True)]
    yield draw_features(features, out / "features.png")
    yield plots.save(plots.zeros({run.title: run.model for run in (plain, in_loss, proximal)}), out / "zeros.png")
    figure, axes = plots.panels(len(runs), 2, (5.5, 3.3))
    for ax, run in zip(axes, runs, strict=True):
        plots.curves(run.curves, ax).set_title(run.title, fontsize=10, loc="left")
    yield plots.save(figure, out / "curves.png")
    with torch.no_grad():
        rebuilt = sparse.model(data.x_test[:20])
    yield draw_features({"digits": data.x_test[:20], "rebuilt from few features": rebuilt}, out / "digits.png")


def draw_features(weights: dict[str, Tensor], path: Path) -> Path:
    """Draw rows of matrices as digits of 8 × 8 pixels, one matrix above the other."""
    figure, axes = plots.panels(len(weights), 1, (12.0, 1.7 if len(next(iter(weights.values()))) > 20 else 1.1))
    for ax, (title, w) in zip(axes, weights.items(), strict=True):
        plots.features(w, (8, 8), ax).set_title(title, fontsize=10, loc="left")
    return plots.save(figure, path)


if __name__ == "__main__":
    main()
