"""`make demo`: the main jobs on real data, the 1,797 handwritten digits that scikit-learn ships.

First keyword models on few images (`restrain.study`). Then, with a training loop of one's own, one plain PyTorch
network is trained without rules, with rules in the loss and with proximal ones, and a sparse autoencoder learns
features; the rest is printed and drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import restrain as rs
from restrain import plots, study

BATCH = 64


@dataclass
class Run:
    """One training: the model, what was measured at its end, and the curves of its losses."""

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
    """Images as rows of 64 numbers in [0, 1], labels; 1,000 images to train on, the rest to test with."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls) -> Digits:
        """The digits, shuffled once."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(images, dtype=torch.float32)[order] / 16
        y = torch.tensor(labels)[order]
        return cls(x[:1000], y[:1000], x[1000:], y[1000:])


def network() -> nn.Sequential:
    """A plain network, of which nothing is changed for the rules."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


class SparseAutoencoder(nn.Module):
    """64 pixels → 100 non-negative features, few of them at work → 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.relu, self.decoder = nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 64)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction."""
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
    """The loop that anybody writes, with two lines for the rules: `attach` and `reg.loss`."""
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
        run.curves.setdefault("data loss", []).append(total / len(data.x))
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
    """Cross-entropy."""
    return F.cross_entropy(model(x), y)


def reconstruct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Squared error, summed over pixels."""
    return (model(x) - x).square().sum(1).mean()  # type: ignore[no-any-return]


def zeros(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Of every weight: its name, its exact zeros, its entries."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            yield name, int((p == 0).sum()), p.numel()


def report(run: Run) -> str:
    """What is printed of a run."""
    lines = [f"\n{run.title}", "-" * len(run.title)]
    accuracy = "" if run.accuracy != run.accuracy else f"   test accuracy {run.accuracy:.2%}"
    lines.append(f"data loss {run.data_loss:.4f} (test {run.test_loss:.4f}){accuracy}   {run.seconds:.1f} s")
    lines += [f"  {name}: {value:.5f}" for name, value in run.values.items()]
    lines.append("exact zeros: " + ", ".join(f"{name} {zero}/{size}" for name, zero, size in zeros(run.model)))
    return "\n".join([*lines, *(["", run.table] if run.table else [])])


def main(arguments: list[str] | None = None) -> None:
    """Run the demo; see `--help`."""
    parser = argparse.ArgumentParser(prog="restrain.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the comparison on few images")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the data of each training")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    for line in study.run(given.out, given.seeds, min(given.epochs, 30)):
        print(line, flush=True)
    own_networks(given.out, given.epochs)
    print(f"{time.perf_counter() - started:.1f} s in all")


def own_networks(out: Path, epochs: int) -> None:
    """The second job: networks of one's own, trained, reported and drawn."""
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
    """The pictures, written into a folder."""
    plain, in_loss, proximal, sparse = runs
    features = {run.title: run.model[0].weight for run in (plain, in_loss, proximal)}  # type: ignore[index]
    usage = rs.activations(sparse.model, data.x)["relu"].mean(0)
    decoder = sparse.model.get_parameter("decoder.weight").T
    features["sparse autoencoder (decoder), its most used features"] = decoder[usage.argsort(descending=True)]
    yield plots.features(features, (8, 8), out / "features.png")
    yield plots.zeros_by_layer(
        {run.title: list(zeros(run.model)) for run in (plain, in_loss, proximal)}, out / "zeros.png"
    )
    yield plots.curves({run.title: run.curves for run in runs}, out / "curves.png")
    with torch.no_grad():
        rebuilt = sparse.model(data.x_test[:20])
    yield plots.features({"digits": data.x_test[:20], "rebuilt from few features": rebuilt}, (8, 8), out / "digits.png")


if __name__ == "__main__":
    main()
