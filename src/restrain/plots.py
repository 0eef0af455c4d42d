"""Pictures of penalties, constraints, trainings, weights and paths. They need matplotlib.

Each function draws into the axes given as `ax=`, or into a new figure of its own, and returns the
axes; `rs.plots.save(ax, "picture.svg")` writes them. matplotlib's pyplot is never used, so no
figure is kept and no window opens. Colors are those of Okabe and Ito (2008), which people who are
colour-blind tell apart, and lines beyond seven differ by their dashes.

>>> ax = rs.plots.penalty(rs.L1())
>>> ax.get_legend_handles_labels()[1]
['value', 'prox, step 1']
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restrain import storage
from restrain.errors import FileError, NoProxError, PenaltyError, PlanError, TransformError
from restrain.extras import needing
from restrain.fields import brief, check_optional_flags, is_iterable, is_number, is_whole, listed
from restrain.named_tensors import parameters, unwrap
from restrain.path_view import PathView, Viewed
from restrain.penalties import Penalty
from restrain.transforms import Constraint

__all__ = [
    "COLORS",
    "constraint",
    "curves",
    "features",
    "moves",
    "panels",
    "path",
    "penalty",
    "save",
    "scores",
    "shares",
    "zeros",
]

Axes: TypeAlias = Any
"""matplotlib.axes.Axes; the package is imported when the first picture is drawn."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colors without their yellow, which is hard to see on white."""
_DASHES = ("-", "--", ":", "-.")
_GREY = "#767676"
_GAP = 1  # pixels between images


# ---------------------------------------------------------------- figures and files


def panels(count: int, columns: int = 1, size: tuple[float, float] = (6.4, 3.6)) -> tuple[Any, list[Axes]]:
    """Return (figure, its axes) with so many axes, row by row.

    Args:
        count: the number of axes.
        columns: the number of axes in a row.
        size: width and height of each, in inches.

    Raises:
        PlanError: `count` or `columns` isn't a whole number, at least 1.
        MissingExtraError: matplotlib isn't installed.
    """
    if not is_whole(count, 1) or not is_whole(columns, 1):
        raise PlanError(f"panels(count, columns) are whole numbers, at least 1; got {brief(count)}, {brief(columns)}")
    with needing("plots", "a picture"):
        from matplotlib.figure import Figure
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


def save(drawn: Any, file: str | Path) -> Path:
    """Write axes with their figure, or a figure, to a file, whole or not at all; return its path.

    Raises:
        FileError: an ending that stands for no format of pictures.
        FileAccessError: there is no such folder, no space or no permission.
        PlanError: neither axes nor a figure.
    """
    with needing("plots", "a picture"):
        from matplotlib.axes import Axes as Drawn
        from matplotlib.figure import FigureBase
    if not isinstance(drawn, Drawn | FigureBase):
        raise PlanError(f"expected matplotlib's axes or a figure, as rs.plots returns them; got {brief(drawn)}")
    path = storage.as_path(file)
    figure: Any = drawn.figure
    kind, known = path.suffix.removeprefix(".").lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise FileError(f"a picture ends in .{', .'.join(sorted(known))}; got {path.name!r}")
    return storage.write(path, lambda stream: figure.savefig(stream, format=kind, dpi=110))


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 3.6)) -> Axes:
    """Return the given axes, or those of a new figure.

    Raises:
        PlanError: `ax` isn't matplotlib's axes.
    """
    if ax is None:
        return panels(1, 1, size)[1][0]
    with needing("plots", "a picture"):
        from matplotlib.axes import Axes as Drawn
    if not isinstance(ax, Drawn):
        raise PlanError(f"ax= is matplotlib's axes, such as figure.subplots(), or None for new ones; got {brief(ax)}")
    return ax


def _style(number: int) -> dict[str, Any]:
    """Return color and dashes of the line of a number."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": _DASHES[number // len(COLORS) % len(_DASHES)]}


def _plain(ax: Axes, legend: str | None = "best") -> Axes:
    """Return the axes without a frame on top and right, and with a legend if lines have labels."""
    ax.spines[["top", "right"]].set_visible(False)
    if legend is not None and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small", frameon=False, loc=legend)
    return ax


def _logarithmic(ax: Axes, which: str) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    with needing("plots", "a picture"):
        from matplotlib.ticker import NullFormatter
    axis, limits = (ax.xaxis, ax.get_xlim) if which == "x" else (ax.yaxis, ax.get_ylim)
    ax.set(**{f"{which}scale": "log"})
    low, high = limits()
    axis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_minor_formatter(_between if high < 100 * low else NullFormatter())


def _between(value: float, place: int | None = None) -> str:
    """Return the number of a tick between powers of ten: of 2 and 5 alone."""
    text = f"{value:.0e}"
    return f"{value:g}" if text[0] in "25" else ""


# ---------------------------------------------------------------- penalties and constraints


def penalty(
    what: Penalty, ax: Axes | None = None, *, step: float = 1.0, reach: float | None = None, shape: Any = None
) -> Axes:
    """Draw a penalty's value and its prox, of one entry or of two.

    Of one entry: the curves of value(x) and prox(x, step) over x; the prox has a gap where it
    jumps. Of two: lines of equal value over the plane, and lines from points to where the prox
    takes them, with a dot at the end.

    Args:
        what: the penalty.
        ax: the axes to draw into; None for a new figure.
        step: the step of the prox.
        reach: the greatest |x| drawn; None for 4 of one entry, 2 of two.
        shape: the shape of the tensor, of one or two entries, as `per=` sees it; None for () if
            the penalty is a sum over entries, else (1, 2), a row.

    Raises:
        PlanError: it is no penalty of one tensor, or another number of entries.

    >>> rs.plots.penalty(rs.GroupLasso("row"), shape=(1, 2)).get_title()
    "GroupLasso(per='row')"
    """
    if not isinstance(what, Penalty):
        raise PlanError(f"expected a penalty of one tensor, such as rs.L1(), got {brief(what)}")
    if not is_number(step) or step < 0:
        raise PlanError(f"step= is a number, zero or more; got {brief(step)}")
    found = _shape((() if what.entrywise else (1, 2)) if shape is None else shape)
    ax = _axes(ax)
    if math.prod(found) == 1:
        _curve(what, ax, step, _reach(reach, 4.0), found)
    else:
        _levels(what, ax, step, _reach(reach, 2.0), found)
    ax.set_title(repr(what), fontsize="medium")
    return _plain(ax)


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not all(is_whole(size, 1) for size in sizes) or math.prod(sizes) > 2:
        raise PlanError(f"shape= is that of a tensor of one or two entries, such as (), (1, 2) or (2, 1); got {shape}")
    return sizes


def _reach(reach: Any, default: float) -> float:
    if reach is not None and (not is_number(reach) or reach <= 0):
        raise PlanError(f"reach= is a number above zero, the greatest |x| drawn; got {brief(reach)}")
    return default if reach is None else float(reach)


def _curve(what: Penalty, ax: Axes, step: float, reach: float, shape: tuple[int, ...]) -> None:
    """Draw value and prox of one entry."""
    x = torch.linspace(-reach, reach, 801, dtype=torch.float64, device="cpu")
    ax.axhline(0, color=_GREY, lw=0.5)
    values = [float(what(one.reshape(shape))) for one in x]
    ax.plot(x.numpy(), values, label="value", **_style(0))
    prox = _proxes(what, [one.reshape(shape) for one in x], step)
    if prox is not None:
        moved = prox.flatten()
        jumps = moved.diff().abs() > 0.02 * reach
        moved[:-1][jumps] = math.nan  # a gap in the line
        ax.plot(x.numpy(), moved.numpy(), label=f"prox, step {step:g}", **_style(1))
    ax.set_ylim(-0.75 * reach, reach)


def _proxes(what: Penalty, points: Sequence[Tensor], step: float) -> Tensor | None:
    """Return the prox of each tensor, flat; None where none is known."""
    try:
        return torch.stack([what.prox(one, step).flatten() for one in points])
    except NoProxError:
        return None


def _levels(what: Penalty, ax: Axes, step: float, reach: float, shape: tuple[int, ...]) -> None:
    """Draw lines of equal value of two entries, and where the prox takes points."""
    grid = torch.linspace(-reach, reach, 49, dtype=torch.float64, device="cpu")
    try:
        values = [[float(what(torch.stack([x, y]).reshape(shape))) for x in grid] for y in grid]
    except PenaltyError as error:
        raise PlanError(f"{what!r} can't be drawn over a tensor of shape {shape}: {error}") from error
    ax.contour(grid.numpy(), grid.numpy(), values, levels=6, colors=_GREY, linewidths=0.6)
    points = torch.cartesian_prod(*[torch.linspace(-reach, reach, 9, dtype=torch.float64, device="cpu") * 0.95] * 2)
    ends = _proxes(what, [point.reshape(shape) for point in points], step)
    if ends is not None:
        _arrows(ax, points, ends, reach)


def constraint(what: Constraint, ax: Axes | None = None, *, reach: float = 2.0, shape: Any = (1, 2)) -> Axes:
    """Draw where a constraint takes points of the plane: lines, with a dot at the end of each.

    Args:
        what: the constraint.
        ax: the axes to draw into; None for a new figure.
        reach: the greatest |x| drawn.
        shape: the shape of the tensor of two entries, as `per=` sees it: (1, 2), (2, 1) or (2,).

    Raises:
        PlanError: it is no constraint, or none of a tensor of this shape.

    >>> ends = rs.plots.constraint(rs.NonNegative()).lines[1].get_xydata()
    >>> len(ends), bool((ends >= 0).all())
    (81, True)
    """
    if not isinstance(what, Constraint):
        raise PlanError(f"expected a constraint, such as rs.NonNegative(), got {brief(what)}")
    found = _shape(shape)
    if math.prod(found) != 2:
        raise PlanError(f"shape= is that of a tensor of two entries, such as (1, 2); got {shape}")
    ax = moves(lambda point: what.project(point.reshape(found)).flatten(), ax, reach=reach)
    ax.set_title(repr(what), fontsize="medium")
    return ax


def moves(function: Callable[[Tensor], Tensor], ax: Axes | None = None, *, reach: float = 2.0) -> Axes:
    """Draw where a function takes points of the plane: lines, with a dot at the end of each.

    Args:
        function: of a tensor of shape (2,), giving such a tensor.
        ax: the axes to draw into; None for a new figure.
        reach: the greatest |x| drawn.

    Raises:
        PlanError: the function doesn't take or give two numbers.
    """
    most = _reach(reach, 2.0)
    points = torch.cartesian_prod(*[torch.linspace(-most, most, 9, dtype=torch.float64, device="cpu") * 0.95] * 2)
    try:
        ends = [function(point) for point in points]
    except (TransformError, PenaltyError) as error:
        raise PlanError(f"this can't be drawn in the plane: {error}") from error
    wrong = [end for end in ends if not isinstance(end, Tensor) or end.shape != (2,)]
    if wrong:
        raise PlanError(f"the function gives a tensor of two numbers for two; got {brief(wrong[0])}")
    ax = _axes(ax, (4.0, 4.0))
    _arrows(ax, points, torch.stack(ends), most)
    return _plain(ax)


def _arrows(ax: Axes, starts: Tensor, ends: Tensor, reach: float) -> None:
    ends = ends.detach().to(starts)
    ways = torch.stack([starts, ends, torch.full_like(starts, math.nan)], 1)  # one line, with gaps
    ax.plot(*ways.flatten(0, 1).T.numpy(), color=COLORS[1], lw=0.6)
    ax.plot(*ends.T.numpy(), ".", color=COLORS[1], ms=3)
    ax.set_xlim(-1.05 * reach, 1.05 * reach)
    ax.set_ylim(-1.05 * reach, 1.05 * reach)
    ax.set_aspect("equal")


# ---------------------------------------------------------------- weights


def features(
    weights: Tensor, shape: tuple[int, int] | None = None, ax: Axes | None = None, *, shown: int = 40, columns: int = 20
) -> Axes:
    """Draw rows of a matrix, or filters of a convolution, as small images in one picture.

    Each image is scaled by its greatest |entry|: red is positive, blue negative, white zero. Three
    input channels are drawn as red, green and blue, where grey is zero.

    Args:
        weights: (features, height × width), (features, height, width), or (features, channels,
            height, width) with one or three channels.
        shape: height and width of an image; needed for rows.
        ax: the axes to draw into; None for a new figure.
        shown: the number of images, from the first.
        columns: the number of images in a row.

    Raises:
        PlanError: rows that don't fill the shape, or another number of axes or channels.

    >>> ax = rs.plots.features(torch.eye(4), (2, 2), columns=2)
    >>> ax.images[0].get_array().shape
    (5, 5)
    """
    if not is_whole(shown, 1) or not is_whole(columns, 1):
        raise PlanError(f"shown= and columns= are whole numbers, at least 1; got {brief(shown)}, {brief(columns)}")
    images = _images(weights, shape)[:shown]
    picture = _mosaic(images, min(columns, len(images)))
    ax = _axes(ax, (0.6 * min(columns, len(images)), 0.6 * -(-len(images) // columns) + 0.3))
    ax.imshow(picture.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _images(weights: Any, shape: Any) -> Tensor:
    """Return images in [-1, 1]: (features, height, width), or with three colors at the end."""
    if not isinstance(weights, Tensor) or not weights.numel():
        raise PlanError(f"features are a tensor with entries, such as a layer's weight; got {brief(weights)}")
    w = weights.detach().to("cpu", torch.float32)
    if w.dim() == 2:
        sizes = tuple(shape) if isinstance(shape, (tuple, list)) and len(shape) == 2 else None
        if sizes is None or not all(is_whole(size, 1) for size in sizes) or math.prod(sizes) != w.shape[1]:
            raise PlanError(
                f"shape= is height and width of an image, whose product is the length of a row, {w.shape[1]}; "
                f"got {brief(shape)}"
            )
        w = w.reshape(len(w), *sizes)
    elif w.dim() == 4 and w.shape[1] in (1, 3):
        w = w[:, 0] if w.shape[1] == 1 else w.movedim(1, -1)
    if w.dim() != 3 and not (w.dim() == 4 and w.shape[-1] == 3):
        raise PlanError(
            "features are rows, (features, height, width), or filters with one or three channels; got the shape "
            f"{tuple(weights.shape)}"
        )
    bound = w.abs().flatten(1).amax(1).clamp_min(1e-12)
    return w / bound.reshape(-1, *[1] * (w.dim() - 1))


def _mosaic(images: Tensor, columns: int) -> Tensor:
    """Return one picture of all images, with gaps of NaN, or white ones between colors."""
    count, height, width = images.shape[:3]
    rows, colors = -(-count // columns), images.shape[3:]
    size = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP)
    picture = torch.full((*size, *colors), 1.0 if colors else math.nan, device="cpu")
    for number, image in enumerate(images):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        picture[top : top + height, left : left + width] = (image + 1) / 2 if colors else image
    return picture


Counts: TypeAlias = Mapping[str, tuple[int, int]]


def zeros(weights: Any, ax: Axes | None = None) -> Axes:
    """Draw the fraction of exact zeros of each weight as bars, with their number.

    Args:
        weights: a model, whose weights of two axes or more are counted; {name: tensor}, or
            {name: (zeros, entries)}; or {title: any of these} for several bars side by side.
        ax: the axes to draw into; None for a new figure.

    Raises:
        PlanError: something else, or nothing to count.

    >>> float(rs.plots.zeros({"w": torch.tensor([0.0, 1.0])}).patches[0].get_width())
    50.0
    """
    runs = _runs(weights)
    names = list(dict.fromkeys(name for counts in runs.values() for name in counts))
    if not names:
        raise PlanError(f"there are no weights to count zeros of in {brief(weights)}")
    ax = _axes(ax, (6.4, 0.25 * len(names) * len(runs) + 0.9))
    height = 0.8 / len(runs)
    for number, (title, counts) in enumerate(runs.items()):
        own = [(at, *counts[name]) for at, name in enumerate(names) if name in counts]
        places = [at + (number - (len(runs) - 1) / 2) * height for at, _, _ in own]
        parts = [100 * zero / max(size, 1) for _, zero, size in own]
        bars = ax.barh(places, parts, height, label=title, color=COLORS[number % len(COLORS)])
        ax.bar_label(bars, [f"{zero:,}" for _, zero, _ in own], fontsize="small", padding=3)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="exact zeros (%)", xlim=(0, 112), ylim=(len(names) - 0.5, -0.5))
    return _plain(ax, "lower right" if len(runs) > 1 else None)


def _runs(weights: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """Return {title: {name: (zeros, entries)}}."""
    if isinstance(weights, Mapping) and weights and all(_is_run(one) for one in weights.values()):
        return {str(title): _counts(one) for title, one in weights.items()}
    return {"": _counts(weights)}


def _is_run(given: Any) -> bool:
    return isinstance(given, nn.Module | Mapping)


def _counts(given: Any) -> dict[str, tuple[int, int]]:
    if isinstance(given, nn.Module):
        found = ((slot.name, slot.handle.find(unwrap(given))) for slot in parameters(unwrap(given)))
        given = {name: p for name, p in found if p.dim() > 1}
    if not isinstance(given, Mapping):
        raise PlanError(f"zeros are counted in a model, or in {{name: tensor}}; got {brief(given)}")
    counts = {}
    for name, one in given.items():
        pair = (int((one == 0).sum()), one.numel()) if isinstance(one, Tensor) else one
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(is_whole(part, 0) for part in pair):
            raise PlanError(f"zeros are counted in tensors, or given as (zeros, entries); got {brief(one)} at {name!r}")
        counts[str(name)] = (pair[0], pair[1])
    return counts


# ---------------------------------------------------------------- trainings


def curves(
    history: Any, ax: Axes | None = None, *, names: Sequence[str] | None = None, log: bool | None = None
) -> Axes:
    """Draw data loss and values of the rules over the steps or epochs of a training, on one axis.

    Args:
        history: `reg.history`; rows of a training such as `estimator.history_`; or {name: numbers}.
        ax: the axes to draw into; None for a new figure.
        names: the columns to draw, also by globs such as "norms/*"; None for the data loss and all
            penalties, or for all columns where none is called so.
        log: a logarithmic axis; None: if no number is negative.

    Raises:
        PlanError: it is no history, has no such column, or `log` isn't True, False or None.

    >>> ax = rs.plots.curves({"data_loss": [1.0, 0.5], "l2": [0.1, 0.2]})
    >>> [line.get_label() for line in ax.lines]
    ['data loss', 'l2']
    """
    check_optional_flags(PlanError, log=log)
    columns, over = _columns(history)
    shown = _chosen(columns, names)
    ax = _axes(ax)
    for number, name in enumerate(shown):
        wide = 2.0 if name == "data_loss" else 1.3
        ax.plot(over[1], columns[name], label=_title(name), lw=wide, **_style(number))
    numbers = [value for name in shown for value in columns[name] if math.isfinite(value)]
    if numbers and max(numbers) > 0 and (min(numbers) >= 0 if log is None else log):
        _logarithmic(ax, "y")
    ax.set_xlabel(over[0])
    return _plain(ax)


def shares(history: Any, ax: Axes | None = None) -> Axes:
    """Draw each rule's share of the gradient over the steps of a training, in percent.

    Args:
        history: `reg.history` of a training with `reg.track(shares=True)`.
        ax: the axes to draw into; None for a new figure.

    Raises:
        PlanError: no shares were tracked.
    """
    columns, over = _columns(history)
    shown = [name for name in columns if name.startswith("shares/")]
    if not shown:
        raise PlanError("this history has no shares of the gradient: write reg.track(every=10, shares=True)")
    ax = _axes(ax)
    for number, name in enumerate(shown):
        ax.plot(over[1], [100 * value for value in columns[name]], label=_title(name), **_style(number))
    ax.set(xlabel=over[0], ylabel="share of the gradient (%)", ylim=(0, 100))
    return _plain(ax)


def _title(name: str) -> str:
    """Return the label of a column; matplotlib leaves out labels that begin with "_"."""
    title = name.partition("/")[2] or name.replace("_", " ")
    return f"\u200b{title}" if title.startswith("_") else title


def _columns(history: Any) -> tuple[dict[str, list[float]], tuple[str, list[float]]]:
    """Return ({column: numbers}, (title, numbers) of the horizontal axis)."""
    if isinstance(history, Mapping):
        columns = {str(name): _numbers(name, values) for name, values in history.items()}
        most = max((len(values) for values in columns.values()), default=0)
        if any(len(values) != most for values in columns.values()):
            raise PlanError("the columns of a history are of one length; got lengths that differ")
        return columns, ("epoch", [float(number) for number in range(1, most + 1)])
    rows = list(history) if is_iterable(history) else []
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        none = "nothing was tracked yet: call it after some steps" if is_iterable(history) and not rows else ""
        raise PlanError(
            none or f"expected reg.history, rows such as estimator.history_, or {{name: numbers}}; got {brief(history)}"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _numbers(name, [row.get(name, math.nan) for row in rows]) for name in names}
    over = next((name for name in ("step", "epoch") if name in columns), None)
    along = [float(number) for number in range(1, len(rows) + 1)] if over is None else columns.pop(over)
    return columns, (over or "epoch", along)


def _numbers(name: Any, values: Any) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise PlanError(f"a column of a history is a list of numbers; got {brief(values)} at {name!r}") from error


def _chosen(columns: Mapping[str, Sequence[float]], names: Sequence[str] | None) -> list[str]:
    """Return the columns that are drawn."""
    if names is None:
        known = [name for name in columns if name == "data_loss" or name.startswith("penalties/")]
        of_rules = any(name.startswith("penalties/") for name in known)
        return known if of_rules or any("/" in name for name in columns) else list(columns)
    globs = [names] if isinstance(names, str) else list(names)
    found = {glob: [glob] if glob in columns else fnmatch.filter(columns, glob) for glob in globs}
    missing = [glob for glob, matched in found.items() if not matched]
    if missing:
        raise PlanError(f"no column {missing[0]!r}; there are: {listed(list(columns))}")
    return list(dict.fromkeys(name for matched in found.values() for name in matched))


# ---------------------------------------------------------------- paths


def path(result: Viewed, ax: Axes | None = None, *, shown: int = 200) -> Axes:
    """Draw the weights or group lengths of a path over the strength; chosen points are marked.

    Args:
        result: the result of `rs.path`, or a fitted `RegressorCV` or `ClassifierCV`.
        ax: the axes to draw into; None for a new figure.
        shown: the number of lines of each tensor, the greatest first.

    Raises:
        PlanError: it is no path.
    """
    view, ax = _view(result), _axes(ax)
    if not is_whole(shown, 1):
        raise PlanError(f"shown= is a whole number, at least 1; got {brief(shown)}")
    for at, dashes in _ways(view):
        for number, (name, lines) in enumerate(view.lines.items()):
            own = lines[at][:, lines.abs().amax(0).argsort(descending=True)[:shown]]
            color = COLORS[number % len(COLORS)] if len(view.lines) > 1 else None
            for place, line in enumerate(own.T.tolist()):
                ax.plot(
                    [view.strengths[i] for i in at],
                    line,
                    dashes,
                    color=color or COLORS[place % len(COLORS)],
                    lw=0.9,
                    label=name if not place and len(view.lines) > 1 and dashes == "-" else None,
                )
    ax.set_ylabel("weight" if view.signed else "length of each group")
    return _marked(ax, view)


def scores(result: Viewed, ax: Axes | None = None) -> Axes:
    """Draw the score of each point of a path over the strength, in a band of ± one standard error.

    Args:
        result: the result of `rs.path`, or a fitted `RegressorCV` or `ClassifierCV`.
        ax: the axes to draw into; None for a new figure.

    Raises:
        PlanError: it is no path.
    """
    view, ax = _view(result), _axes(ax)
    for at, dashes in _ways(view):
        x = [view.strengths[i] for i in at]
        low, high = ([view.scores[i] + sign * view.errors[i] for i in at] for sign in (-1, 1))
        ax.plot(x, [view.scores[i] for i in at], dashes, marker=".", color=COLORS[0], lw=1)
        ax.fill_between(x, low, high, color=COLORS[0], alpha=0.2, lw=0)
    ax.set_ylabel("score")
    return _marked(ax, view)


def _view(result: Any) -> PathView:
    if not isinstance(result, Viewed):
        raise PlanError(f"expected the result of rs.path, or a fitted RegressorCV or ClassifierCV; got {brief(result)}")
    return result.view()


def _ways(view: PathView) -> list[tuple[list[int], str]]:
    """Return (numbers of the points, dashes) of the ways, in the order of the walk."""
    ways = list(dict.fromkeys(view.ways))
    return [
        ([i for i, one in enumerate(view.ways) if one == way], _DASHES[number % len(_DASHES)])
        for number, way in enumerate(ways)
    ]


def _marked(ax: Axes, view: PathView) -> Axes:
    """Return the axes with lines at the chosen points, and strengths below."""
    ax.axvline(view.strengths[view.best], color=_GREY, lw=1, label="best")
    if view.sparse is not None:
        ax.axvline(view.strengths[view.sparse], color=_GREY, lw=1, ls="--", label="one standard error")
    if view.logarithmic:
        _logarithmic(ax, "x")
    ax.set_xlabel(view.axis)
    return _plain(ax)
