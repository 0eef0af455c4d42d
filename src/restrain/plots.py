"""Plots of learned features, zeros by layer, loss curves and paths. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restrain import storage
from restrain.errors import FileError
from restrain.extras import needing

_MOST_LINES = 200  # groups drawn of each tensor


def _pyplot() -> Any:
    with needing("demo", "a picture"):
        import matplotlib
        from matplotlib import pyplot
    matplotlib.use("Agg")
    return pyplot


def _written(figure: Any, path: Path) -> Path:
    """Write a picture, whole or not at all.

    Raises:
        FileError: an ending that stands for no format of pictures.
        FileAccessError: there is no such folder, no space or no permission.
    """
    kind, known = path.suffix.removeprefix(".").lower(), figure.canvas.get_supported_filetypes()
    try:
        if kind not in known:
            raise FileError(f"a picture ends in .{', .'.join(sorted(known))}; got {path.name!r}")
        storage.write(path, lambda file: figure.savefig(file, format=kind, dpi=110))
    finally:
        _pyplot().close(figure)
    return path


def features(weights: Mapping[str, Tensor], shape: tuple[int, int], path: Path, shown: int = 40) -> Path:
    """Plot rows of each matrix as images, one panel per matrix; return the path.

    Red is positive, blue negative, white zero.

    Args:
        weights: title → matrix of shape (features, height × width).
        shape: height and width of an image.
        path: the file to write.
        shown: number of rows to plot, from the first.
    """
    plt = _pyplot()
    columns = 20
    rows = {title: -(-min(len(w), shown) // columns) for title, w in weights.items()}
    height = sum(0.62 * n + 0.45 for n in rows.values())
    figure = plt.figure(figsize=(12, height + 0.2), layout="constrained")
    panels = figure.subfigures(len(weights), 1, height_ratios=[0.62 * n + 0.45 for n in rows.values()], squeeze=False)
    for panel, (title, w) in zip(panels[:, 0], weights.items(), strict=True):
        panel.suptitle(title, fontsize=10, x=0.01, ha="left")
        axes = panel.subplots(rows[title], columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, row in zip(axes, w.detach().cpu()[:shown], strict=False):
            bound = max(float(row.abs().max()), 1e-12)
            axis.imshow(row.reshape(shape).numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    return _written(figure, path)


def zeros_by_layer(counts: Mapping[str, Sequence[tuple[str, int, int]]], path: Path) -> Path:
    """Plot the fraction of exact zeros as bars, one group per weight, one color per run.

    Args:
        counts: run → (weight name, zeros, entries) of each weight.
        path: the file to write and return.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(counts)
    for number, (title, rows) in enumerate(counts.items()):
        at = [i + (number - (len(counts) - 1) / 2) * width for i in range(len(rows))]
        bars = axis.bar(at, [100 * zero / size for _, zero, size in rows], width, label=title)
        axis.bar_label(bars, [f"{zero:,}" for _, zero, _ in rows], fontsize=8)
    names = [f"{name}\n{size:,} entries" for name, _, size in next(iter(counts.values()))]
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="exact zeros (%)", ylim=(0, 109))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(counts), frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return _written(figure, path)


def curves(runs: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> Path:
    """Plot data loss and rule values over epochs, one panel per run, on a logarithmic axis.

    Args:
        runs: run → curve name → value after each epoch.
        path: the file to write and return.
    """
    plt = _pyplot()
    columns = 2
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 3.3 * rows), layout="constrained", squeeze=False)
    for axis in axes.ravel()[len(runs) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.ravel(), runs.items(), strict=False):
        for name, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, label=name, lw=2 if name == "data loss" else 1.3)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(yscale="log", xlabel="epoch")
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return _written(figure, path)


def study(gains: Sequence[Any], points: Sequence[tuple[float, float, float]], path: Path) -> Path:
    """Plot accuracy gains, a point per seed and mean ± 2 standard errors; and error against zeros.

    Args:
        gains: objects with `kind`, `differences`, `mean` and `error` (see `demo.Gain`).
        points: (strength, fraction of zeros, error) of each autoencoder.
        path: the file to write and return.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for at, gain in enumerate(gains):
        left.plot([at] * len(gain.differences), [100 * d for d in gain.differences], "o", color="C0", alpha=0.25)
        left.errorbar(at, 100 * gain.mean, 200 * gain.error, fmt="o", color="C3", capsize=5)
    left.axhline(0, color="0.6", lw=1)
    left.set_xticks(range(len(gains)), [gain.kind for gain in gains])
    left.set(ylabel="test accuracy minus plain (%)", title="pairs by seed; mean ± 2 standard errors")
    right.plot([100 * zeros for _, zeros, _ in points], [error for _, _, error in points], "o-")
    for strength, zeros, error in points:
        right.annotate(f"{strength:g}", (100 * zeros, error), textcoords="offset points", xytext=(5, 5), fontsize=8)
    right.set(
        xlabel="exact zeros in the code (%)",
        ylabel="squared error of a pixel",
        title="sparse autoencoder, by hidden_l1",
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return _written(figure, path)


def path(points: Sequence[Any], lengths: Sequence[Mapping[str, Tensor]], chosen: Mapping[str, Any], file: Path) -> Path:
    """Plot group lengths over the strength; scores and numbers of groups below; return the file.

    Args:
        points: the points, in the order of the walk (see `paths.Point`).
        lengths: {tensor: lengths of its groups} of each point.
        chosen: title → point, marked by a line.
        file: the file to write and return.
    """
    plt = _pyplot()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), layout="constrained", sharex=True)
    counts = below.twinx()
    for way, style in (("up", "-"), ("down", "--")):
        own = [number for number, one in enumerate(points) if one.direction == way]
        x = [points[number].strength for number in own]
        for color, name in enumerate(lengths[0] if own else ()):
            lines = torch.stack([lengths[number][name].flatten() for number in own])
            drawn = lines[:, lines.amax(0).argsort(descending=True)[:_MOST_LINES]]
            above.plot(x, drawn.numpy(), style, color=f"C{color % 10}", lw=0.8, alpha=0.7)
        if own:
            scores = [points[number].score for number in own]
            errors = [_error(points[number].scores) for number in own]
            below.errorbar(x, scores, errors, fmt=f"o{style}", ms=3, lw=1, color="C0", label=f"score, {way}")
            counts.plot(x, [points[number].selected for number in own], style, color="C2", lw=1, label=f"groups, {way}")
    for number, (title, point) in enumerate(chosen.items()):
        for axis in (above, below):
            axis.axvline(point.strength, color=f"C{3 + number}", lw=1, label=title if axis is below else None)
    above.set(xscale="log", ylabel="length of each group")
    below.set(xlabel="strength", ylabel="score")
    counts.set_ylabel("groups that aren't zero")
    below.legend(fontsize=8, frameon=False, loc="lower left")
    for axis in (above, below, counts):
        axis.spines["top"].set_visible(False)
    return _written(figure, file)


def _error(scores: Tensor | None) -> float:
    """Return the standard error of a mean score; zero for a single number."""
    return 0.0 if scores is None or len(scores) < 2 else float(scores.std()) / len(scores) ** 0.5
