"""Pictures, by what is in their axes: lines, bars, images and labels."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from report.pages import contrast
from restrain.errors import FileError, PlanError
from restrain.path_view import PathView

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


def lines(ax):
    """{label: (x, y)} of the lines with a label."""
    return {line.get_label(): line.get_data() for line in ax.lines if not line.get_label().startswith("_")}


# Penalties and constraints


@pytest.mark.parametrize(
    ("member", "value", "prox"),
    [
        (rs.L1(), np.abs, lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0)),
        (0.5 * rs.L2(), lambda x: 0.5 * x**2, lambda x: x / 1.5),
    ],
)
def test_value_and_prox_of_one_entry(member, value, prox):
    found = lines(rs.plots.penalty(member, step=0.5, reach=3.0))
    x, y = found["value"]
    assert (x.min(), x.max(), len(x)) == (-3, 3, 801)
    np.testing.assert_allclose(y, value(x))
    np.testing.assert_allclose(found["prox, step 0.5"][1], prox(x), atol=1e-12)


def test_a_jump_of_the_prox_is_a_gap():
    _x, y = lines(rs.plots.penalty(rs.Lp(0.5)))["prox, step 1"]
    assert np.isnan(y).sum() == 2  # one on each side
    steps = np.abs(np.diff(y))
    assert np.nanmax(steps) < 0.1
    assert not np.isnan(lines(rs.plots.penalty(rs.L1()))["prox, step 1"][1]).any()


def moves(ax):
    """(Points, where they were taken to) of a picture: one line with gaps, then dots at the ends."""
    ways, dots = [line.get_xydata() for line in ax.lines]
    starts, ends, gaps = ways.reshape(-1, 3, 2).swapaxes(0, 1)
    assert np.isnan(gaps).all()
    assert (ends == dots).all()
    assert len(starts) == 81
    return starts, ends


def test_a_penalty_without_a_prox_has_its_value():
    class Cosh(rs.Penalty, register=False):
        def __call__(self, w):
            return w.cosh().sum()

    ax = rs.plots.penalty(Cosh(), shape=())
    assert list(lines(ax)) == ["value"]


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_lengths_of_two_entries(shape):
    per = "row" if shape == (1, 2) else "column"
    ax = rs.plots.penalty(rs.GroupLasso(per), shape=shape, step=0.3)
    for start, end in zip(*moves(ax), strict=True):
        size = np.linalg.norm(start)
        shrunk = max(0.0, 1 - 0.3 * math.sqrt(2) / size) if size else 0.0
        np.testing.assert_allclose(end, shrunk * start, atol=1e-12)
    assert ax.get_title() == f"GroupLasso(per={per!r})"


def test_what_a_constraint_does_to_points():
    ax = rs.plots.constraint(rs.NonNegative(), reach=1.0)
    starts, ends = moves(ax)
    assert (ends == starts.clip(0)).all()
    assert abs(starts).max() <= 1
    starts, ends = moves(rs.plots.moves(lambda point: -point))
    assert (ends == -starts).all()


# Weights


def test_features_are_scaled_images_with_gaps():
    w = torch.tensor([[1.0, -2.0], [0.0, 0.5], [0.0, 0.0]])
    ax = rs.plots.features(w, (1, 2), columns=2)
    picture = ax.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(
        picture, np.array([[0.5, -1, np.nan, 0, 1], [np.nan] * 5, [0, 0, np.nan, np.nan, np.nan]])
    )
    assert ax.images[0].get_clim() == (-1, 1)
    assert rs.plots.features(w, (1, 2), shown=1).images[0].get_array().shape == (1, 2)


def test_features_of_filters():
    assert rs.plots.features(torch.randn(4, 1, 3, 3), columns=2).images[0].get_array().shape == (7, 7)
    colors = rs.plots.features(torch.randn(4, 3, 3, 3), columns=2).images[0].get_array()
    assert colors.shape == (7, 7, 3)
    assert 0 <= colors.min() <= colors.max() <= 1


def test_zeros_as_bars():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    ax = rs.plots.zeros(model)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.weight", "2.weight"]
    assert [bar.get_width() for bar in ax.patches] == [25.0, 0.0]
    assert [text.get_text() for text in ax.texts] == ["5", "0"]
    both = rs.plots.zeros({"before": model, "after": {"0.weight": torch.zeros(5, 4)}})
    assert [bar.get_width() for bar in both.patches] == [25.0, 0.0, 100.0]
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["before", "after"]
    assert rs.plots.zeros({"w": (1, 3)}).patches[0].get_width() == pytest.approx(100 / 3)


# Trainings


def tracked():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = [0.1 * rs.L1().on("0.weight", name="l1"), 0.2 * rs.L2().on("2.weight", name="_hidden")]
    reg = rs.attach(model, plan, optimizer, track=1)
    reg.track(1, shares=True)
    for _ in range(5):
        optimizer.zero_grad()
        reg.loss(model(torch.ones(2, 3)).square().mean()).backward()
        optimizer.step()
    return reg


def test_curves_of_a_history():
    reg = tracked()
    ax = rs.plots.curves(reg.history)
    found = lines(ax)
    assert list(found) == ["data loss", "l1", "\u200b_hidden"]  # a label that begins with "_" is drawn, too
    assert list(found["l1"][0]) == [1, 2, 3, 4, 5]
    assert list(found["l1"][1]) == reg.history["penalties/l1"]
    assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "step")
    assert ax.get_legend() is not None
    some = rs.plots.curves(reg.history, names=["norms/*", "data_loss"], log=False)
    assert list(lines(some)) == ["0.weight", "2.weight", "data loss"]
    assert some.get_yscale() == "linear"
    shares = rs.plots.shares(reg.history)
    assert list(lines(shares)["l1"][1]) == [100 * share for share in reg.history["shares/l1"]]


def test_curves_of_rows_and_of_columns():
    rows = [{"epoch": 1, "loss": 2.0, "valid_loss": -1.0}, {"epoch": 2, "loss": 1.0}]
    ax = rs.plots.curves(rows)
    assert list(lines(ax)) == ["loss", "valid loss"]
    assert ax.get_yscale() == "linear"  # a number below zero
    assert np.isnan(lines(ax)["valid loss"][1][1])
    assert list(lines(rs.plots.curves({"a[0]": [1.0, 2.0]}, names=["a[0]"]))["a[0]"][0]) == [1, 2]


def test_lines_beyond_seven_differ_by_dashes():
    ax = rs.plots.curves({f"rule {number}": [1.0, 2.0] for number in range(20)})
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 20


# Paths


def view(ways=("up", "up", "up"), sparse=2):
    lines = {"w": torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 0.0]])}
    return PathView(
        [0.1, 1.0, 10.0], [0.5, 0.7, 0.6], [0.1, 0.0, 0.2], [2, 1, 0], lines, {"w": ["a", "b"]}, 1, sparse, ways
    )


def test_a_path_and_its_scores():
    ax = rs.plots.path(view())
    own = [line.get_data() for line in ax.lines if len(line.get_xdata()) == 3]
    assert [list(y) for _, y in own] == [[-2, 0, 0], [1, 0.5, 0]]  # the greatest first
    assert ax.get_ylabel() == "weight"
    marks = {line.get_label(): line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2}
    assert marks == {"best": 1.0, "one standard error": 10.0}
    scores = rs.plots.scores(view(sparse=None))
    assert list(scores.lines[0].get_ydata()) == [0.5, 0.7, 0.6]
    band = scores.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.4, 0.8))
    assert [line.get_label() for line in scores.lines[1:]] == ["best"]


def test_two_ways_are_drawn_apart():
    ax = rs.plots.path(view(("up", "up", "down")), shown=1)
    assert [(line.get_linestyle(), list(line.get_xdata())) for line in ax.lines[:2]] == [
        ("-", [0.1, 1.0]),
        ("--", [10.0]),
    ]


# What is common to all


DRAWN = {
    "penalty": lambda ax: rs.plots.penalty(rs.L1(), ax),
    "constraint": lambda ax: rs.plots.constraint(rs.NonNegative(), ax),
    "moves": lambda ax: rs.plots.moves(lambda point: point, ax),
    "features": lambda ax: rs.plots.features(torch.ones(2, 4), (2, 2), ax),
    "zeros": lambda ax: rs.plots.zeros({"w": torch.zeros(2, 2)}, ax),
    "curves": lambda ax: rs.plots.curves({"loss": [1.0]}, ax),
    "shares": lambda ax: rs.plots.shares([{"step": 1, "shares/a": 0.5}], ax),
    "path": lambda ax: rs.plots.path(view(), ax),
    "scores": lambda ax: rs.plots.scores(view(), ax),
}


def test_every_picture_is_among_them():
    others = {"COLORS", "panels", "save"}
    assert set(DRAWN) == set(rs.plots.__all__) - others


@pytest.mark.parametrize("name", DRAWN)
def test_given_axes_are_drawn_into_and_returned(name):
    figure = Figure()
    one, other = figure.subplots(1, 2)
    assert DRAWN[name](one) is one
    assert one.has_data()
    assert not other.has_data()
    assert DRAWN[name](None).figure is not figure
    with pytest.raises(PlanError, match="ax= is matplotlib's axes"):
        DRAWN[name]("axes")


def test_no_state_is_kept():
    code = "import sys, restrain as rs; rs.plots.penalty(rs.L1()); print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_colors_are_okabe_and_itos():
    published = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"]  # and #f0e442, a yellow
    assert sorted(rs.plots.COLORS) == sorted(published)
    assert all(contrast(color, "#ffffff") > 2 for color in rs.plots.COLORS)
    assert contrast("#f0e442", "#ffffff") < 1.5


def test_saved_whole_or_not_at_all(tmp_path):
    ax = rs.plots.penalty(rs.L1())
    assert rs.plots.save(ax, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in rs.plots.save(ax.figure, str(tmp_path / "a.svg")).read_bytes()
    with pytest.raises(FileError, match=r"a picture ends in \."):
        rs.plots.save(ax, tmp_path / "a.xyz")
    with pytest.raises(PlanError, match="axes or a figure"):
        rs.plots.save("ax", tmp_path / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: rs.plots.penalty("l1"), "a penalty of one tensor"),
        (lambda: rs.plots.penalty(rs.L1(), step=-1), "step="),
        (lambda: rs.plots.penalty(rs.L1(), reach=0), "reach="),
        (lambda: rs.plots.penalty(rs.L1(), shape=(3,)), "one or two entries"),
        (lambda: rs.plots.penalty(rs.GroupLasso("column"), shape=(2,)), "can't be drawn"),
        (lambda: rs.plots.constraint(rs.L1()), "a constraint"),
        (lambda: rs.plots.constraint(rs.Orthogonal(), shape=()), "two entries"),
        (lambda: rs.plots.moves(lambda point: point.sum()), "two numbers"),
        (lambda: rs.plots.features(torch.ones(2, 4)), "whose product is the length of a row, 4"),
        (lambda: rs.plots.features(torch.ones(2, 4), (2, 3)), "whose product"),
        (lambda: rs.plots.features(torch.ones(2, 2, 4, 4)), "one or three channels"),
        (lambda: rs.plots.features([[1.0]], (1, 1)), "a tensor with entries"),
        (lambda: rs.plots.features(torch.ones(2, 4), (2, 2), shown=0), "at least 1"),
        (lambda: rs.plots.zeros("model"), "zeros are counted in"),
        (lambda: rs.plots.zeros({"w": 3}), "at 'w'"),
        (lambda: rs.plots.zeros({}), "no weights"),
        (lambda: rs.plots.zeros(nn.ReLU()), "no weights"),
        (lambda: rs.plots.curves(3), "reg.history"),
        (lambda: rs.plots.curves([]), "nothing was tracked"),
        (lambda: rs.plots.curves({"a": [1.0], "b": [1.0, 2.0]}), "one length"),
        (lambda: rs.plots.curves({"a": ["x"]}), "numbers"),
        (lambda: rs.plots.curves({"a": [1.0]}, names=["b*"]), "no column 'b\\*'; there are: a"),
        (lambda: rs.plots.shares({"a": [1.0]}), "shares=True"),
        (lambda: rs.plots.path([1.0]), "the result of rs.path"),
        (lambda: rs.plots.scores(None), "the result of rs.path"),
        (lambda: rs.plots.path(view(), shown=0), "shown="),
        (lambda: rs.plots.panels(0), "whole numbers"),
    ],
)
def test_wrong_input_is_told(draw, said):
    with pytest.raises(PlanError, match=said):
        draw()
