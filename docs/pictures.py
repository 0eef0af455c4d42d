"""Draws the pictures of these pages into docs/images: python docs/pictures.py [name ...]."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

import restrain as rs

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#a0aec0"


def panels(count, columns, width=2.2, height=2.2):
    """A figure with so many small axes; the ones beyond are blank."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def title(ax, member):
    ax.set_title(repr(member).replace("penalty=", "").replace("weights=", ""), fontsize=8)
    ax.tick_params(labelsize=6)


def curves(members, step=1.0):
    """Value and prox of one entry."""
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    figure, axes = panels(len(members), 3, 2.6, 2.0)
    for ax, member in zip(axes, members, strict=True):
        title(ax, member)
        ax.axhline(0, color=GREY, lw=0.5)
        ax.plot(x, x, color=GREY, lw=0.5, ls=":")
        ax.plot(x, [float(member(one)) for one in x], color=BLUE, label="value")
        prox = member.prox(x, step)
        jumps = (prox.diff().abs() > 0.1).nonzero().flatten() + 1
        for piece_x, piece in zip(x.tensor_split(jumps), prox.tensor_split(jumps), strict=True):
            ax.plot(piece_x, piece, color=ORANGE)
        ax.plot([], [], color=ORANGE, label=f"prox, step {step:g}")
        ax.set_ylim(-3, 4)
    axes[0].legend(fontsize=6, loc="lower right")
    return figure


def entrywise():
    return curves(
        [rs.L1(), rs.L2(), rs.ElasticNet(0.5, 0.25), rs.Huber(1.0), rs.LogSum(0.5), rs.MCP(2.0)]
        + [rs.SCAD(1.0, 2.5), rs.Lp(0.5), rs.SoftBox(-1.0, 1.0)]
    )


def relations():
    return curves([rs.Distance(rs.L1(), to=1.5), rs.Distance(rs.L2(), to=1.5), rs.Distance(rs.MCP(2.0), to=1.5)])


PICTURES = {function.__name__: function for function in (entrywise, relations)}


def main(names):
    for name in names or PICTURES:
        figure = PICTURES[name]()
        figure.tight_layout()
        figure.savefig(IMAGES / f"{name}.png", dpi=100)
        plt.close(figure)
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
