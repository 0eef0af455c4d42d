"""Pictures of penalties and constraints for their pages in the reference, drawn with the site.

Each is an SVG in the page itself, whose colors are the page's, light or dark. A public penalty that
`drawing_of` has no picture of is an error of tests/test_site.py.
"""

import html
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import restrain as rs
from restrain.report.charts import drawn

FLAT, PLANE = (4.4, 2.9), (3.4, 3.5)  # inches
BLUE, ORANGE = rs.plots.COLORS[:2]
GREY = "#767676"
REAL = {"dtype": torch.float64}


@dataclass(frozen=True)
class Drawing:
    """A picture: what it shows, the function that draws it into axes, and its size in inches."""

    caption: str
    draw: Callable[[Any], Any]
    size: tuple[float, float] = FLAT

    def figure(self, name):
        """The picture as HTML; `name` is that of the page."""
        title = f"{name}: {self.caption}"
        svg, _ = drawn(f"drawing-{name}", title, lambda axes: self.draw(axes[0]), self.size)
        return f'<figure class="drawing">{svg}<figcaption>{html.escape(self.caption)}</figcaption></figure>'


def plain(ax, xlabel, title):
    """Axes with a title and a name below, without a frame; the legend shows what the lines are."""
    ax.set_xlabel(xlabel)
    ax.set_title(title)
    ax.spines[["top", "right"]].set_visible(False)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(fontsize="small", frameon=False)


# ---------------------------------------------------------------- kinds of pictures


def entry(member, **options):
    """Value and prox of one entry."""
    return Drawing(
        "value of one entry, and its prox: the horizontal axis is the entry",
        lambda ax: rs.plots.penalty(member, ax, **options),
    )


def plane(member, shape=(1, 2), **options):
    """Level lines of two entries, and where the prox takes points."""
    known = member.has_prox
    moved = "; lines lead from points to where the prox takes them, a dot" if known else ""
    return Drawing(
        f"lines of equal value over two entries of a tensor of shape {shape}{moved}",
        lambda ax: rs.plots.penalty(member, ax, shape=shape, **options),
        PLANE,
    )


def singular(member, step=0.6):
    """Level lines over the two singular values, signs included, and where the prox takes them."""

    def draw(ax):
        levels(ax, lambda point: member(torch.diag(point)))
        rs.plots.moves(lambda point: member.prox(torch.diag(point), step).diagonal(), ax)
        plain(ax, "", repr(member))

    return Drawing(
        "of a matrix diag(a, b): lines of equal value; lines lead to where the prox takes points", draw, PLANE
    )


def levels(ax, value, reach=2.0):
    """Lines of equal value of a function of two numbers."""
    grid = torch.linspace(-reach, reach, 41, **REAL)
    values = [[float(value(torch.stack([a, b]))) for a in grid] for b in grid]
    ax.contour(grid.numpy(), grid.numpy(), values, levels=6, colors=GREY, linewidths=0.6)
    ax.set_aspect("equal")


def along(value, xlabel, title, low, high, caption=None, slope=True):
    """Value and its derivative along a line of inputs.

    Args:
        value: function of a 0-d tensor that requires a gradient, giving the penalty of some input.
        xlabel: what the number is.
        title: the penalty as code.
        low, high: the range of the number.
        caption: a sentence; None for the default.
        slope: False to draw the value alone.
    """

    def draw(ax):
        numbers = torch.linspace(low, high, 81, **REAL)
        values, slopes = [], []
        for number in numbers:
            t = number.clone().requires_grad_()
            found = value(t)
            (gradient,) = torch.autograd.grad(found, t, allow_unused=True)
            values.append(float(found.detach()))
            slopes.append(0.0 if gradient is None else float(gradient))
        ax.axhline(0, color=GREY, lw=0.5)
        ax.plot(numbers.numpy(), values, color=BLUE, label="value")
        if slope:
            ax.plot(numbers.numpy(), slopes, "--", color=ORANGE, label="gradient")
        plain(ax, xlabel, title)

    return Drawing(caption or f"value and gradient over the {xlabel}", draw)


def projection(member, shape=(1, 2), **options):
    """Where a constraint takes points of the plane."""
    return Drawing(
        f"two entries of a tensor of shape {shape}: lines lead from points to where the constraint takes them, a dot",
        lambda ax: rs.plots.constraint(member, ax, shape=shape, **options),
        PLANE,
    )


def projected(member, built, read, caption):
    """The same of a constraint of matrices: `built` makes one of a point, `read` a point of one."""

    def draw(ax):
        rs.plots.moves(lambda point: read(member.project(built(point))), ax)
        plain(ax, "", repr(member))

    return Drawing(caption, draw, PLANE)


DIAGONAL = {
    "built": torch.diag,
    "read": lambda w: w.diagonal().clone(),
    "caption": "of a matrix diag(a, b): lines lead from points to where the constraint takes them, a dot",
}

# ---------------------------------------------------------------- inputs along a line


def of_model(rule, model, x):
    """The penalty of a rule in a training forward of a model, differentiable by x."""
    with rs.attach(model.double(), rule) as reg:
        return reg.loss(0 * sum(out.sum() for out in as_list(model(x))))


def as_list(found):
    return list(found) if isinstance(found, (list, tuple)) else [found]


def pair(correlation, count=64):
    """Rows of two units of mean zero and variance one, exactly with this correlation."""
    angle = torch.arange(count, **REAL) * 2 * torch.pi / count
    a, b = 2**0.5 * angle.sin(), 2**0.5 * angle.cos()
    return torch.stack([a, correlation * a + (1 - correlation.square()).clamp_min(1e-12).sqrt() * b], 1)


def logits(z, others=1):
    """One row of logits (z, 0, ...)."""
    return torch.stack([z, *[0 * z] * others]).reshape(1, -1)


def spread(deviation):
    """A column of that deviation, like 256 draws of a normal distribution."""
    quantiles = (torch.arange(256, **REAL) + 0.5) / 256
    draws = torch.erfinv(2 * quantiles - 1) * 2**0.5
    return (deviation * draws / draws.std(correction=0)).reshape(-1, 1)


def steps(change):
    """A sequence of two states of length one and 1 + change, as (batch, time, units)."""
    return torch.stack([torch.ones_like(change), 1 + change]).reshape(1, 2, 1)


def load(shift):
    """Logits of a router of two experts for 64 tokens, the first's raised by a number."""
    first = torch.linspace(-2, 2, 64, **REAL) + shift
    return torch.stack([first, torch.zeros_like(first)], 1)


class Slope(nn.Module):
    """x ↦ slope · x; the slope is no parameter, so that a gradient reaches what it was made of."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return self.slope * x


def derivative(member):
    return lambda slope: of_model(member.on(rs.outputs()), Slope(slope), torch.ones(1, 1, **REAL).requires_grad_())


class Coded(nn.Module):
    """A code of two units and its decoder of fixed columns (1, 0) and (0, 1/2)."""

    def __init__(self):
        super().__init__()
        self.code, self.decoder = nn.Identity(), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.decoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))

    def forward(self, x):
        return self.decoder(self.code(x))


def decoded(first):
    rule = rs.DecoderL1("decoder.weight").on(rs.outputs("code"))
    return of_model(rule, Coded(), torch.stack([0 * first + 1, first]).reshape(1, 2))


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Identity()

    def forward(self, x):
        return self.embed(x[0]), self.embed(x[1])


def views(member, made):
    return lambda t: of_model(member.on(rs.outputs("embed")), Views(), made(t))


def shown_auxk(shown):
    """AuxK of one dead unit with code `shown` and column (1, 0), for an error of (1, 1/2)."""
    return (1 - shown.clamp_min(0)).square() + 0.25


DRAWINGS = {
    # entries
    "ElasticNet": entry(rs.ElasticNet(0.5, 0.25)),
    "Huber": entry(rs.Huber(1.0)),
    "L1": entry(rs.L1()),
    "L2": entry(rs.L2()),
    "LogSum": entry(rs.LogSum(0.5)),
    "Lp": entry(rs.Lp(0.5)),
    "MCP": entry(rs.MCP(2.0)),
    "SCAD": entry(rs.SCAD(1.0, 2.5)),
    "SoftBox": entry(rs.SoftBox(-1.0, 1.0)),
    # groups and sequences
    "ExclusiveLasso": plane(rs.ExclusiveLasso("row"), step=0.6),
    "FusedLasso": plane(rs.FusedLasso(0.4, 0.6, 0), (2, 1), step=0.6),
    "GroupLInf": plane(rs.GroupLInf("row"), step=0.6),
    "GroupLasso": plane(rs.GroupLasso("row"), step=0.6),
    "Norm": plane(rs.Norm(2), step=0.6),
    "SLOPE": plane(rs.SLOPE((1.0, 0.3)), step=0.6),
    "SparseGroupLasso": plane(rs.SparseGroupLasso(0.6, 0.4, "row"), step=0.6),
    "TotalVariation": plane(rs.TotalVariation(0), (2, 1), step=0.6),
    # matrices, and between tensors
    "Distance": entry(rs.Distance(rs.L1(), to=1.5)),
    "NuclearNorm": singular(rs.NuclearNorm()),
    "Orthogonality": along(
        lambda angle: rs.Orthogonality()(
            torch.stack([1 + 0 * angle, 0 * angle, angle.cos(), angle.sin()]).reshape(2, 2)
        ),
        "angle between two rows of length one, in radians",
        "Orthogonality()",
        0.0,
        3.14,
    ),
    "ProductNorm": Drawing(
        "lines of equal value over one entry of each of the two tensors, whose product is penalised",
        lambda ax: (
            levels(ax, lambda p: rs.ProductNorm()({"lora_B": p[:1].reshape(1, 1), "lora_A": p[1:].reshape(1, 1)}, {})),
            plain(ax, "entry of lora_B", "ProductNorm()"),
            ax.set_ylabel("entry of lora_A"),
        ),
        PLANE,
    ),
    "SpectralNorm": singular(rs.SpectralNorm()),
    "Tie": along(
        lambda t: rs.Tie("a", "b", rs.L1())({"a": t.reshape(1), "b": 0 * t.reshape(1)}, {}),
        "difference of two entries",
        "Tie('a', 'b', L1())",
        -2.0,
        2.0,
    ),
    "Weighted": plane(rs.Weighted(rs.L1(), torch.tensor([[1.0, 3.0]], **REAL)), step=0.3),
    # activations
    "AttentionEntropy": along(
        lambda z: rs.AttentionEntropy(0.9)(logits(z, 2).softmax(-1)),
        "first score of three",
        "AttentionEntropy(0.9)",
        -4.0,
        8.0,
    ),
    "AuxK": along(
        shown_auxk,
        "code of a dead unit",
        "AuxK(1, dead_after=...)",
        -1.0,
        3.0,
        "value and gradient over the pre-activation of one dead unit, whose column of the decoder is (1, 0), for an "
        "error of (1, 1/2)",
    ),
    "Confidence": along(lambda z: rs.Confidence()(logits(z)), "first of two logits", "Confidence()", -6.0, 6.0),
    "Covariance": along(lambda r: rs.Covariance()(pair(r)), "correlation of two units", "Covariance()", -0.99, 0.99),
    "CrossCorrelation": along(
        views(rs.CrossCorrelation(), lambda r: torch.stack([pair(r)[:, :1], pair(r)[:, 1:]])),
        "correlation of a feature between two views",
        "CrossCorrelation()",
        -0.99,
        0.99,
    ),
    "DecoderL1": along(decoded, "code of a unit with a column of length 1/2", "DecoderL1()", -2.0, 2.0),
    "Decorrelation": along(
        lambda r: rs.Decorrelation()(pair(r)), "correlation of two units", "Decorrelation()", -0.99, 0.99
    ),
    "Entropy": along(lambda z: rs.Entropy()(logits(z)), "first of two logits", "Entropy()", -6.0, 6.0),
    "Hoyer": plane(rs.Hoyer()),
    "Invariance": along(
        views(rs.Invariance(), lambda d: torch.stack([0 * d.reshape(1, 1), d.reshape(1, 1)])),
        "difference between two views",
        "Invariance()",
        -2.0,
        2.0,
    ),
    "KLSparsity": along(
        lambda rate: rs.KLSparsity(0.2)(rate.reshape(1, 1)), "mean activation", "KLSparsity(0.2)", 0.01, 0.95
    ),
    "L0": along(
        lambda h: rs.L0(0.5, 0.4)(h.reshape(1, 1)),
        "activation",
        "L0(0.5, bandwidth=0.4)",
        -1.0,
        2.0,
        "value, a step at the threshold, and the straight-through gradient around it",
    ),
    "LoadBalance": along(
        lambda z: rs.LoadBalance(1)(load(z)),
        "amount by which one of two experts is preferred",
        "LoadBalance(1)",
        -3.0,
        3.0,
    ),
    "NormChange": along(lambda t: rs.NormChange()(steps(t)), "change of length in a step", "NormChange()", -1.0, 1.0),
    "SIGReg": along(lambda s: rs.SIGReg(16)(spread(s)), "deviation of a normal feature", "SIGReg(16)", 0.1, 3.0),
    "StateChange": along(
        lambda t: rs.StateChange()(steps(t)), "change of the state in a step", "StateChange()", -1.0, 1.0
    ),
    "Variance": along(lambda s: rs.Variance()(spread(s)), "deviation of a feature", "Variance()", 0.05, 2.0),
    "ZLoss": along(lambda z: rs.ZLoss()(logits(z, 2)), "first of three logits", "ZLoss()", -6.0, 6.0),
    # derivatives
    "Contractive": along(derivative(rs.Contractive()), "slope of the function", "Contractive()", -2.0, 2.0),
    "GradientPenalty": along(
        derivative(rs.GradientPenalty(1.0)), "slope of the function", "GradientPenalty(1.0)", -2.5, 2.5
    ),
    "JacobianNorm": along(derivative(rs.JacobianNorm()), "slope of the function", "JacobianNorm()", -2.0, 2.0),
    # constraints
    "Box": projection(rs.Box(-1.0, 1.5)),
    "Fixed": projection(rs.Fixed(torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]]))),
    "Hyperball": projection(rs.Hyperball(1.2)),
    "L1Ball": projection(rs.L1Ball(1.2)),
    "LowRank": projected(rs.LowRank(1), **DIAGONAL),
    "MaxNorm": projection(rs.MaxNorm(1.2, "row")),
    "MinMaxNorm": projection(rs.MinMaxNorm(0.7, 1.4, per="row")),
    "NM": projection(rs.NM(1, 2)),
    "NonNegative": projection(rs.NonNegative()),
    "NuclearBall": projected(rs.NuclearBall(1.2), **DIAGONAL),
    "Orthogonal": projected(rs.Orthogonal(), **DIAGONAL),
    "Signs": projection(rs.Signs(torch.tensor([[1, -1]]))),
    "Simplex": projection(rs.Simplex()),
    "SpectralBall": projected(rs.SpectralBall(1.2), **DIAGONAL),
    "Symmetric": projected(
        rs.Symmetric(),
        lambda point: torch.stack([0 * point[0], point[0], point[1], 0 * point[0]]).reshape(2, 2),
        lambda w: torch.stack([w[0, 1], w[1, 0]]),
        "the two entries beside the diagonal of a 2 × 2 matrix: lines lead to where the constraint takes them, a dot",
    ),
    "TopGroups": projection(rs.TopGroups(1, per="row"), (2, 1)),
    "TopK": projection(rs.TopK(1)),
    "UnitNorm": projection(rs.UnitNorm("row")),
}


def drawing_of(name):
    """The picture of a name, or None; entrywise penalties with defaults need no entry above."""
    what = getattr(rs, name, None)
    if name in DRAWINGS or not inspect.isclass(what) or not issubclass(what, rs.Penalty) or inspect.isabstract(what):
        return DRAWINGS.get(name)
    settings = inspect.signature(what).parameters.values()
    made = what() if all(one.default is not one.empty for one in settings) else None
    return entry(made) if made is not None and made.entrywise else None


def drawing(name):
    """The picture of a name's page as Markdown; "" where there is none."""
    found = drawing_of(name)
    return "" if found is None else f"```{{raw}} html\n{found.figure(name)}\n```"
