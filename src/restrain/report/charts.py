"""Charts of a report: drawn by `restrain.plots`, written as SVG that follows the page's colors.

Texts stay texts, in the page's font; every color is a CSS variable, so that a chart is light or
dark with the page.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restrain import plots
from restrain.extras import needing
from restrain.report.content import Content, TensorFacts

_INK, _PALE = "#1b1b1f", "#d9d9e0"
_SIZE = (4.8, 3.0)  # inches: narrow, so that text is legible on a phone
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # measured by; the page shows its own
    "font.size": 10.0,
    "grid.color": _PALE,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may have dollar signs
}
_VARIABLES = {
    **{color: f"var(--c{number})" for number, color in enumerate(plots.COLORS)},
    _INK: "var(--ink)",
    _PALE: "var(--line)",
    "#767676": "var(--soft)",
    "#ffffff": "var(--paper)",
}
_MOST_ROWS, _MOST_LINES, _MOST_BARS, _MOST_PANELS = 300, 7, 24, 12


@dataclass(frozen=True)
class Chart:
    """A chart: its name, which its ids begin with, the title, the SVG, and a sentence below."""

    name: str
    title: str
    svg: str
    told: str = ""

    def figure(self) -> str:
        """Return the chart as HTML."""
        told = f'<p class="told">{html.escape(self.told)}</p>' if self.told else ""
        caption = f"<figcaption>{html.escape(self.title)}</figcaption>"
        return f'<figure id="chart-{self.name}">{caption}{self.svg}{told}</figure>'


def drawn(
    name: str, title: str, draw: Callable[[list[Any]], None], size: tuple[float, float] = _SIZE, count: int = 1
) -> tuple[str, list[Any]]:
    """Return (SVG of a figure, its axes, laid out in the SVG's units).

    Args:
        name: what its ids begin with.
        title: the title, for readers who don't see it.
        draw: function of the list of axes, which draws into them.
        size: width and height of each axes, in inches.
        count: the number of axes, in rows of two.
    """
    with needing("plots", "a report"):
        import matplotlib
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = plots.panels(count, 2, size)
        figure.set_dpi(72)
        draw(axes)
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None}, transparent=True)
    return _embedded(buffer.getvalue(), name, title), axes


def _embedded(svg: str, name: str, title: str) -> str:
    """Return matplotlib's SVG as a part of the page: its ids its own, its colors variables."""
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    size = re.search(r'viewBox="([^"]+)"', body)
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", body)
    body = re.sub(r'style="[^"]*"', lambda found: _styled(found[0]), body)
    label = html.escape(title, quote=True)
    box = size[1] if size is not None else "0 0 0 0"
    packed = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{packed}'


def _styled(style: str) -> str:
    """Return a style with variables for colors, and the page's font."""
    style = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), style)
    return re.sub(r" ?font-family: [^;\"]*;?|(?<=px) '[^\";]*", "", style)


# ---------------------------------------------------------------- the training


def trainings(rows: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Return the charts of a training: losses and rules, accuracy, shares, zeros, norms."""
    if not rows:
        return []
    shown = _thinned(rows)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch")))
    if any(name.startswith("penalties/") for name in names) or any("step" in row for row in rows):
        main = [name for name in names if name == "data_loss" or name.startswith("penalties/")]
        parts = {"Data loss and rules": main}
    else:
        bare = {name: name.removeprefix("valid_") for name in names}
        parts = {
            "Loss in training and validation": [name for name in names if bare[name] in ("loss", "data_loss")],
            "Rules in training and validation": [n for n in names if bare[n] not in ("loss", "data_loss", "acc")],
            "Accuracy in training and validation": [name for name in names if bare[name] == "acc"],
        }
    best = best_epoch(rows)
    charts = [
        _curves(f"curves-{place}", title, shown, own, best=best)
        for place, (title, own) in enumerate(parts.items())
        if own
    ]
    for kind, title in _KINDS.items():
        own = [name for name in names if name.startswith(f"{kind}/")]
        charts += [_curves(kind, title, shown, own, log=False if kind != "norms" else None)] if own else []
    moving = [name for name in names if name.startswith("strengths/") and len(set(_finite(shown, name))) > 1]
    return charts + ([_curves("strengths", "Strengths that move", shown, moving)] if moving else [])


_KINDS = {
    "shares": "Share of each rule of the gradient on its weights",
    "zeros": "Fraction of entries that are exactly zero",
    "zero_groups": "Fraction of groups that are exactly zero",
    "dead": "Fraction of units without incoming weights",
    "norms": "Euclidean norms",
}


def _thinned(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return at most some hundred rows, evenly spaced, with the last."""
    every = -(-len(rows) // _MOST_ROWS)
    return list(rows[::-1][::every][::-1])


def _finite(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]


def _curves(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, float]],
    names: Sequence[str],
    log: bool | None = None,
    best: float | None = None,
) -> Chart:
    """Return a chart of the greatest of some columns."""
    first = [one for one in names if one in ("data_loss", "loss", "valid_loss", "valid_data_loss")]
    others = sorted((one for one in names if one not in first), key=lambda one: -max(_finite(rows, one), default=0.0))
    shown = [*first, *others[: _MOST_LINES - len(first)]]
    told = f"{len(names) - len(shown)} more, smaller, are left out." if len(shown) < len(names) else ""
    svg, _ = drawn(
        name, title, lambda axes: _lines(axes[0], rows, shown, log, best), (_SIZE[0], 3.0 + 0.17 * len(shown))
    )
    return Chart(name, title, svg, told)


def best_epoch(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Return the epoch of the least validation loss; None without epochs or validation."""
    held = [row for row in rows if "epoch" in row and math.isfinite(row.get("valid_data_loss", math.nan))]
    return min(held, key=lambda row: row["valid_data_loss"])["epoch"] if held else None


def _lines(
    ax: Any, rows: Sequence[Mapping[str, float]], names: Sequence[str], log: bool | None, best: float | None
) -> None:
    plots.curves([{**row} for row in rows], ax, names=names, log=log)
    for line in ax.lines:  # lines go on through epochs without a validation
        pairs = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)]
        if pairs:
            line.set_data(*zip(*pairs, strict=True))
    if best is not None and any(name.startswith("valid_") for name in names):
        ax.axvline(best, color="#767676", lw=1.0, ls=":", label=f"best epoch, {best:g}")
    legend_below(ax)


def legend_below(ax: Any) -> None:
    """Put the legend below the axes, where it hides no line; long names lose their middle."""
    handles, labels = ax.get_legend_handles_labels()
    if ax.get_legend() is not None:
        ax.get_legend().remove()
    ax.figure.legend(
        handles,
        [short(label, 44) for label in labels],
        loc="outside lower left",
        frameon=False,
        fontsize=9,
        ncols=2 if max(map(len, labels), default=0) < 20 else 1,
    )


def _kept(label: str) -> str:
    """Return a label that matplotlib keeps; it leaves out those that begin with "_"."""
    return f"\u200b{label}" if label.startswith("_") else label


def short(name: str, most: int) -> str:
    """Return a name of at most `most` characters, without its middle if it is longer."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"


# ---------------------------------------------------------------- the weights


def weights(content: Content) -> list[Chart]:
    """Return the charts of the weights: zeros, lengths of groups, histograms."""
    return [*_zeros(content.tensors), *_lengths(content.tensors), *_histograms(content.tensors)]


def _zeros(tensors: Sequence[TensorFacts]) -> list[Chart]:
    own = [one for one in tensors if len(one.shape) > 1 or one.rules]
    shown = own[:_MOST_BARS]
    if not any(one.zeros for one in own):
        return []
    if len(own) > _MOST_BARS:  # those with most zeros, in the order of the model
        most = sorted(own, key=lambda one: -one.zeros / max(1, one.entries))[:_MOST_BARS]
        shown = [one for one in own if any(one is other for other in most)]
    counts = _labelled([(one.name, (one.zeros, one.entries)) for one in shown])
    more = len(shown) < len(own)
    told = f"The {len(shown)} of {len(own)} weights with most zeros; the table has all." if more else ""
    size, title, name = (_SIZE[0], 0.9 + 0.24 * len(shown)), "Exact zeros by layer", "zeros-by-layer"
    svg, _ = drawn(name, title, lambda axes: _bars(axes[0], counts), size)
    return [Chart(name, title, svg, told)]


def _labelled(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return {short name: value}; a name that is short for two keeps both apart by a number."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        label, number = short(name, 24), 2
        while label in found:
            label, number = f"{short(name, 21)} {number}", number + 1
        found[label] = value
    return found


def _bars(ax: Any, counts: Mapping[str, tuple[int, int]]) -> None:
    plots.zeros(counts, ax)
    ax.grid(False, axis="y")


def _lengths(tensors: Sequence[TensorFacts]) -> list[Chart]:
    own = [one for one in tensors if len(one.lengths) > 1]
    if not own:
        return []
    shown = own[:_MOST_LINES]

    def draw(axes: list[Any]) -> None:
        for number, one in enumerate(shown):
            places = [100 * place / (len(one.lengths) - 1) for place in range(len(one.lengths))]
            axes[0].plot(places, one.lengths, color=plots.COLORS[number % len(plots.COLORS)], label=_kept(one.name))
        axes[0].set(xlabel="groups, longest first (%)", ylabel="length", ylim=(0, None))
        axes[0].spines[["top", "right"]].set_visible(False)
        legend_below(axes[0])

    told = f"{len(own) - len(shown)} more tensors are left out." if len(shown) < len(own) else ""
    svg, _ = drawn("lengths", "Lengths of groups", draw, (_SIZE[0], 3.0 + 0.17 * len(shown)))
    return [Chart("lengths", "Lengths of groups", svg, told)]


def _histograms(tensors: Sequence[TensorFacts]) -> list[Chart]:
    own = [one for one in tensors if one.histogram is not None]
    if not own:
        return []
    shown = own[:_MOST_PANELS]

    def draw(axes: list[Any]) -> None:
        for ax, one in zip(axes, shown, strict=True):
            assert one.histogram is not None
            edges, counts = one.histogram
            ax.stairs(counts, edges, fill=True, color=plots.COLORS[0], lw=0)
            ax.set_title(short(one.name, 24), fontsize=9, loc="left")
            ax.tick_params(labelsize=8)
            ax.locator_params(nbins=4)
            ax.spines[["top", "right"]].set_visible(False)

    more = sum(len(one.shape) > 1 and one.zeros < one.entries for one in tensors) - len(shown)
    told = "Entries that are exactly zero are left out." + (f" {more} more tensors aren't drawn." if more > 0 else "")
    title = "Histograms of weights"
    svg, _ = drawn("histograms", title, draw, (_SIZE[0] / 2 if len(shown) > 1 else _SIZE[0], 1.5), len(shown))
    return [Chart("histograms", title, svg, told)]


def features(tensors: Sequence[TensorFacts]) -> list[Chart]:
    """Return a chart of the features of each weight whose inputs or outputs are images."""
    charts = []
    for number, one in enumerate(tensor for tensor in tensors if tensor.images is not None):
        assert one.images is not None
        images, columns = one.images, 8
        rows = -(-len(images) // columns)
        size = (_SIZE[0], _SIZE[0] / columns * rows * images.shape[-2] / images.shape[-1] + 0.1)
        title = f"Features of {one.name}, longest first"
        svg, _ = drawn(f"features-{number}", title, _pictures(images, columns), size)
        charts.append(Chart(f"features-{number}", title, svg, "Red is positive, blue negative, white zero."))
    return charts


def _pictures(images: Any, columns: int) -> Callable[[list[Any]], None]:
    def draw(axes: list[Any]) -> None:
        plots.features(images, None, axes[0], shown=len(images), columns=columns)

    return draw
