"""Charts of `restrain explain`, `cv` and `compare`, into matplotlib's axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from restrain import plots
from restrain.cli.comparing import Scores
from restrain.cli.evaluation import Calibration, Importance
from restrain.report import best_epoch

_MOST = 20  # bars, and classes whose counts are written


def panels_of(history: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return {title: quantities} of the panels of a training's curves."""
    names = dict.fromkeys(name.removeprefix("valid_") for row in history for name in row if name != "epoch")
    rules = [name for name in names if name not in ("loss", "data_loss", "acc")]
    found = {"data loss": ["data_loss"], "accuracy": ["acc"] * ("acc" in names), "rules": rules}
    return {title: own for title, own in found.items() if own}


def curves(ax: Any, history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw quantities in training and validation on one axis, and mark the best epoch."""
    for number, name in enumerate(names):
        color, alone = plots.COLORS[number % len(plots.COLORS)], len(names) == 1
        for key, style, part in ((name, "-", "training"), (f"valid_{name}", "--", "validation")):
            there = [(row["epoch"], row[key]) for row in history if math.isfinite(row.get(key, math.nan))]
            if there:
                label = part if alone else f"{name}, {part}"
                ax.plot(*zip(*there, strict=True), style, color=color, lw=1.6, label=label)
    best = best_epoch(history)
    if best is not None:
        ax.axvline(best, color="#767676", lw=1, ls=":", label=f"best epoch, {best:.0f}")
    ax.set_xlabel("epoch")
    _framed(ax)
    ax.legend(frameon=False, fontsize=8)


def importances(ax: Any, found: Sequence[Importance], score: str) -> None:
    """Draw the fall of the score by column, greatest on top."""
    shown = list(found[:_MOST])[::-1]
    ax.barh([one.column for one in shown], [one.fall for one in shown], xerr=[one.error for one in shown],
            color=plots.COLORS[0], ecolor="#767676")  # fmt: skip
    ax.axvline(0, color="#767676", lw=0.8)
    ax.set_xlabel(f"fall of {score} when the column is shuffled")
    _framed(ax)


def confusion(ax: Any, names: Sequence[str], counts: Any) -> None:
    """Draw counts by true class (rows) and predicted class (columns), shaded by the row's part."""
    part = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(part, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    if len(names) <= _MOST:
        ax.set_xticks(range(len(names)), names, rotation=45 if len(names) > 5 else 0)
        ax.set_yticks(range(len(names)), names)
        for row, column in np.ndindex(*counts.shape):
            ax.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color="#000000")
    ax.grid(False)
    ax.set(xlabel="predicted", ylabel="true")


def residuals(ax: Any, predicted: Any, rest: Any) -> None:
    """Draw target minus prediction over the prediction, of at most 2,000 rows."""
    every = -(-len(rest) // 2000)
    ax.plot(predicted[::every], rest[::every], ".", color=plots.COLORS[0], ms=4, alpha=0.5)
    ax.axhline(0, color="#767676", lw=0.8)
    ax.set(xlabel="prediction", ylabel="target - prediction")
    _framed(ax)


def calibration(ax: Any, found: Calibration, labels: tuple[str, str]) -> None:
    """Draw what was observed over what was predicted, beside the diagonal."""
    ends = [min(found.predicted.min(), found.observed.min()), max(found.predicted.max(), found.observed.max())]
    ax.plot(ends, ends, color="#767676", lw=0.8)
    ax.plot(found.predicted, found.observed, "o-", color=plots.COLORS[0], ms=4)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    _framed(ax)


def compared(ax: Any, scores: Sequence[Scores], label: str) -> None:
    """Draw each model's mean score with its standard error, and its folds as points."""
    for number, one in enumerate(scores):
        mean, error = one.mean("score")
        place = len(scores) - number
        ax.plot(one.values("score"), [place] * len(one.folds), ".", color="#767676", alpha=0.6, ms=4)
        ax.errorbar([mean], [place], xerr=[error], fmt="o", color=plots.COLORS[0], capsize=3)
    ax.set_yticks(range(1, len(scores) + 1), [str(number) for number in range(len(scores), 0, -1)])
    ax.set(xlabel=label, ylabel="model", ylim=(0.5, len(scores) + 0.5))
    _framed(ax)


def _framed(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
