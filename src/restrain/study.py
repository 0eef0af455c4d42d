"""What regularisation gives on few data: the digits with 200 training images, by keyword models.

Strengths are chosen on a validation split; then each kind is compared with the plain network over seeds, in pairs: the
same training images, the same initial weights. And a sparse autoencoder's zeros against its error.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from restrain import plots
from restrain.models.estimators import Autoencoder, Classifier

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
    """Images as rows of 64 numbers in [0, 1], and labels: to train on, to choose strengths by, to test with."""

    train: tuple[Any, Any]
    valid: tuple[Any, Any]
    test: tuple[Any, Any]


def digits(seed: int) -> Split:
    """The 1,797 digits, shuffled and split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).astype(np.float32), labels[order]
    cut = TRAIN + VALID
    return Split((x[:TRAIN], y[:TRAIN]), (x[TRAIN:cut], y[TRAIN:cut]), (x[cut:], y[cut:]))


def classifier(seed: int, **keywords: Any) -> Classifier:
    """The network of the study, unfitted."""
    fixed = {"hidden": (100,), "epochs": 60, "batch_size": 50, "learning_rate": 5e-3, "progress": False}
    model: Classifier = Classifier(random_state=seed, **fixed, **keywords)
    return model


def chosen() -> dict[str, dict[str, Any]]:
    """Of each kind, and of all scaled together, the strengths of the best mean validation accuracy over two seeds."""
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
    """Test accuracy of a kind less that of the plain network: the mean over seeds, and its standard error."""

    kind: str
    keywords: dict[str, Any]
    differences: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean difference."""
        return statistics.mean(self.differences)

    @property
    def error(self) -> float:
        """Its standard error."""
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))


def gains(seeds: int, step: Any = lambda: None) -> tuple[list[float], list[Gain]]:
    """The plain network's test accuracies, and every kind's differences from them. Calls `step` after each fit."""
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
    """For each strength of an L1 on a relu code: the share of exact zeros in the code, and the mean squared error of a
    pixel, both on images that were not trained on.
    """
    split = digits(0)
    x = np.concatenate([split.train[0], split.valid[0], split.test[0][:600]])
    held_out = split.test[0][600:]
    for strength in CODE_STRENGTHS:
        fixed = {"epochs": epochs, "batch_size": 50, "learning_rate": 5e-3, "random_state": 0, "progress": False}
        model = Autoencoder([64, (100, "relu"), 64], hidden_l1=strength, **fixed).fit(x)
        code = model.encode(held_out)
        error = float(np.square(model.decode(code) - held_out).mean())
        yield strength, float((code == 0).mean()), error


def run(out: Path, seeds: int, epochs: int) -> Iterator[str]:
    """The study, as lines to print; its picture is written into a folder."""
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
    yield f"pictures:\n  {plots.study(found, points, out / 'study.png')}"
