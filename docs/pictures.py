"""Draws the pictures of these pages into docs/images: python docs/pictures.py [name ...]."""

import functools
import io
import math
import os
import re
import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from PIL import Image

import restrain as rs

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREY = *rs.plots.COLORS[:2], "#a0aec0"


def panels(count, columns, width=2.2, height=2.2):
    """A figure with so many small axes; the ones beyond are blank."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def title(ax, member):
    ax.set_title(re.sub(r"(, )?\w+=(None|False|0\.0|'row'|'out')|penalty=", "", repr(member)), fontsize=8)
    ax.tick_params(labelsize=6)


def curves(members):
    """Value and prox of one entry."""
    figure, axes = panels(len(members), 3, 2.6, 2.0)
    for ax, member in zip(axes, members, strict=True):
        rs.plots.penalty(member, ax)
        title(ax, member)
        ax.get_legend().remove()
    axes[0].legend(fontsize=6, loc="lower right")
    return figure


def entrywise():
    members = [rs.L1(), rs.L2(), rs.ElasticNet(0.5, 0.25), rs.Huber(1.0), rs.LogSum(0.5), rs.MCP(2.0)]
    return curves([*members, rs.SCAD(1.0, 2.5), rs.Lp(0.5), rs.SoftBox(-1.0, 1.0)])


def relations():
    return curves([rs.Distance(rs.L1(), to=1.5), rs.Distance(rs.L2(), to=1.5), rs.Distance(rs.MCP(2.0), to=1.5)])


def planes(members):
    """Level lines of a value of two entries, and where its prox takes points: to the thick ends."""
    figure, axes = panels(len(members), 3, 2.5, 2.5)
    for ax, (member, shape) in zip(axes, members, strict=True):
        title(rs.plots.penalty(member, ax, step=0.6, shape=shape), member)
    return figure


def groups():
    of_rows = [rs.L1(), rs.GroupLasso("row"), rs.SparseGroupLasso(0.6, 0.4, "row"), rs.GroupLInf("row")]
    of_rows += [rs.ExclusiveLasso("row"), rs.SLOPE((1.0, 0.3)), rs.Norm(2)]
    of_columns = [rs.TotalVariation(0), rs.FusedLasso(0.4, 0.6, 0)]
    return planes([(member, (1, 2)) for member in of_rows] + [(member, (2, 1)) for member in of_columns])


def spectral():
    """Singular values under the two proxes; a Gram matrix before and after descent."""
    figure, axes = panels(4, 4, 2.2, 2.2)
    s = torch.linspace(3, 0.2, 12, dtype=torch.float64)
    for ax, member in zip(axes, (rs.NuclearNorm(), rs.SpectralNorm()), strict=False):
        title(ax, member)
        ax.plot(s, "o-", color=BLUE, ms=3, label="singular values")
        after = torch.linalg.svdvals(member.prox(torch.diag(s), 0.8))
        ax.plot(after, "o-", color=ORANGE, ms=3, label="after prox, step 0.8")
        ax.set_ylim(-0.1, 3.2)
    axes[0].legend(fontsize=6)
    torch.manual_seed(0)
    w = torch.rand(12, 24, dtype=torch.float64) / 3
    for ax, count in zip(axes[2:], (0, 300), strict=True):
        for _ in range(count):
            w = w - 0.01 * rs.Orthogonality().gradient(w)
        ax.imshow(w @ w.T, cmap="RdBu_r", vmin=-1.5, vmax=1.5)
        ax.set_title("W Wᵀ" + (" after descent on\nOrthogonality()" if count else " of random rows"), fontsize=8)
        ax.axis("off")
    return figure


def constraints():
    flat = [rs.NonNegative(), rs.Box(-1.0, 1.5), rs.MaxNorm(1.2, "row"), rs.UnitNorm("row")]
    flat += [rs.MinMaxNorm(0.7, 1.4, per="row"), rs.Simplex(), rs.L1Ball(1.2), rs.TopK(1)]
    figure, axes = panels(12, 4, 2.2, 2.2)
    for ax, member in zip(axes, flat, strict=False):
        title(rs.plots.constraint(member, ax), member)
    torch.manual_seed(0)
    w = torch.randn(8, 8)
    for ax, member in zip(axes[8:], (rs.NM(2, 4), rs.LowRank(1), rs.Symmetric(), rs.Orthogonal()), strict=True):
        title(ax, member)
        z = member.project(w)
        ax.imshow(z.masked_fill(z == 0, torch.nan), cmap="RdBu_r", vmin=-2, vmax=2)
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def noise():
    """A picture of waves, eight channels as a row each, under each kind of noise."""
    torch.manual_seed(3)
    t = torch.linspace(0, 6.3, 48)
    waves = torch.stack([torch.sin(t * (1 + k / 3)) + 1.5 for k in range(8)])
    image = (waves[:, :, None] * waves[:, None, :] / 6)[:1, :, :].repeat(4, 1, 1)
    members = [rs.GaussianNoise(0.15), rs.UniformNoise(0.3), rs.GaussianDropout(0.3), rs.Dropout(0.3)]
    members += [rs.Dropout(0.3, "space"), rs.AlphaDropout(0.3), rs.BlockDropout(0.3, 7), rs.DropPath(0.4)]
    figure, axes = panels(len(members), 4, 2.2, 2.4)
    for ax, member in zip(axes, members, strict=True):
        title(ax, member)
        seen = member(image[:, None])
        ax.imshow(
            torch.cat([torch.cat([*seen[:2, 0]], 1), torch.cat([*seen[2:, 0]], 1)]), cmap="gray", vmin=0, vmax=1.2
        )
        ax.axis("off")
    return figure


def how():
    """The lasso of benchmarks/metric.py: errors over the steps by every optimizer, three ways."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks import metric

    rows = metric.results(2000, optimizers=tuple(metric.OPTIMIZERS))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
    titles = ("proximal, in the optimizer's metric", "threshold = learning rate", "in the loss")
    for ax, way, text in zip(axes, metric.WAYS, titles, strict=True):
        for row in (row for row in rows if row.way == way):
            ax.semilogy(range(20, 20 * len(row.path) + 1, 20), row.path, lw=0.8)
        zeros = sorted({row.zeros for row in rows if row.way == way})
        ax.set_title(f"{text}\nexact zeros: {zeros[0]}" + (f" to {zeros[-1]}" if len(zeros) > 1 else ""), fontsize=8)
        ax.set_xlabel("step", fontsize=7)
        ax.tick_params(labelsize=6)
    axes[0].set_ylabel("largest error of a coefficient", fontsize=7)
    return figure


def activations():
    """KLSparsity over the mean activation; Hoyer of two entries; a code in training."""
    figure, axes = panels(3, 3, 2.9, 2.4)
    rates = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    for rate in (0.05, 0.2, 0.5):
        axes[0].plot(rates, [float(rs.KLSparsity(rate)(r.reshape(1, 1))) for r in rates], label=f"rate {rate}")
    axes[0].set_title("KLSparsity(rate), of the mean activation", fontsize=8)
    axes[0].set_ylim(0, 3)
    axes[0].legend(fontsize=6)
    grid = torch.linspace(-2, 2, 121, dtype=torch.float64)
    values = [[float(rs.Hoyer()(torch.stack([x, y]).reshape(1, 2))) for x in grid] for y in grid]
    lines = axes[1].contour(grid, grid, values, levels=8, cmap="viridis", linewidths=0.8)
    axes[1].clabel(lines, fontsize=5)
    axes[1].set_title("Hoyer(), of two activations", fontsize=8)
    logits = torch.linspace(-6, 6, 200, dtype=torch.float64)
    for member in (rs.Entropy(), rs.Confidence()):
        axes[2].plot(logits, [float(member(torch.stack([z, 0 * z]).reshape(1, 2))) for z in logits], label=repr(member))
    axes[2].set_title("of the logits (z, 0), over z", fontsize=8)
    axes[2].legend(fontsize=6)
    for ax in axes:
        ax.tick_params(labelsize=6)
    return figure


def derivatives():
    """A net fitted to 40 noisy points, without and with a penalty on its slope."""
    figure, axes = panels(3, 3, 2.9, 2.2)
    x = torch.linspace(-3, 3, 40)[:, None]
    y = torch.sin(x) + 0.5 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
    grid = torch.linspace(-3.2, 3.2, 300)[:, None]
    for ax, strength in zip(axes, (0.0, 0.01, 0.1), strict=True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh())
        net = torch.nn.Sequential(net, torch.nn.Linear(64, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        reg = rs.attach(net, strength * rs.JacobianNorm().on(rs.outputs()), optimizer)
        for _ in range(1500):
            optimizer.zero_grad()
            reg.loss((net(x) - y).square().mean()).backward()
            optimizer.step()
        reg.detach()
        ax.plot(grid, torch.sin(grid), color=GREY, lw=0.8)
        ax.plot(x, y, ".", color=BLUE, ms=5)
        ax.plot(grid, net(grid).detach(), color=ORANGE)
        ax.set_title(f"{strength:g} * JacobianNorm()", fontsize=8)
        ax.tick_params(labelsize=6)
    return figure


def strength():
    """Schedules over the steps, and a strength on its way to a target from three starts."""
    figure, axes = panels(3, 3, 2.9, 2.2)
    s = rs.schedules
    for made in (s.Linear(0, 1, 800), s.Cosine(1, 0, 1000), s.Exponential(1, 0.05, 1000), 0.6 * s.WarmUp(300)):
        axes[0].plot([made.at(step) for step in range(1000)], label=repr(made), lw=1)
    axes[0].legend(fontsize=4.5)
    axes[0].set_title("schedules", fontsize=8)
    torch.manual_seed(0)
    x = torch.randn(400, 60)
    y = x @ (torch.randn(60) * (torch.rand(60) < 0.5))
    for start in (1e-4, 1e-1, 10.0):
        model = torch.nn.Linear(60, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        rule = rs.Target(zeros=0.8, start=start, every=5) * rs.L1().on("weight", how="proximal")
        reg = rs.attach(model, rule, optimizer)
        path, zeros = [], []
        for _ in range(1500):
            optimizer.zero_grad()
            (model(x).squeeze(1) - y).square().mean().div(2).backward()
            optimizer.step()
            path.append(next(iter(reg.strengths().values())))
            zeros.append(float((model.weight == 0).float().mean()))
        axes[1].semilogy(path, lw=1)
        axes[2].plot(zeros, lw=1)
    axes[1].set_title("strength under Target(zeros=0.8)", fontsize=8)
    axes[2].set_title("fraction of exact zeros", fontsize=8)
    axes[2].axhline(0.8, color=GREY, lw=0.6)
    for ax in axes:
        ax.tick_params(labelsize=6)
    return figure


def reparametrization():
    """Weights over the free entry that they come from; arrows from free pairs to weights."""
    figure, axes = panels(4, 4)
    v = torch.linspace(-3, 3, 301).reshape(-1, 1)
    for ax, member in zip(axes, [rs.NonNegative(), rs.Box(-1, 1)], strict=False):
        title(ax, member)
        ax.plot(v, v, color=GREY, lw=0.5, ls=":")
        ax.plot(v, member.from_free(v), color=BLUE)
    for ax, member in zip(axes[2:], [rs.UnitNorm("row"), rs.MaxNorm(1.0, "row")], strict=True):
        title(ax, member)
        rs.plots.moves(lambda w, member=member: member.from_free(w.reshape(1, 2))[0], ax)
    return figure


def normalization():
    """Data with outliers, and what the two make of it."""
    torch.manual_seed(0)
    y = torch.cat([torch.randn(500, 1) * 3 + 20, torch.randn(25, 1) * 3 + 70])
    figure, axes = panels(3, 3)
    scales = [rs.Standardize().fit(y), rs.RobustScale().fit(y)]
    names = ["data, one in twenty wrong", "Standardize()", "RobustScale()"]
    for ax, name, z in zip(axes, names, [y, *[scale(y) for scale in scales]], strict=True):
        ax.hist(z.flatten().numpy(), 50, color=BLUE)
        ax.axvspan(-1, 1, color=GREY, alpha=0.4, lw=0) if z is not y else None
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=6)
    return figure


def paths():
    """The lasso of the diabetes data: weights over the strength, scores by cross-validation."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    model = rs.RegressorCV(normalize=True, points=40).fit(x, y)
    figure, axes = panels(2, 2, 4.2, 2.6)
    rs.plots.path(model, axes[0]).set_title("weights of the standardised inputs", fontsize=8)
    rs.plots.scores(model, axes[1]).set_title("minus the squared error, over five folds", fontsize=8)
    for ax in axes:
        ax.set_xlabel("strength", fontsize=7)
        ax.tick_params(labelsize=6)
    axes[0].get_legend().remove()
    return figure


def report():
    """The head of a report on digits, and its explorer, light and dark, as a browser shows them."""
    from tempfile import TemporaryDirectory

    from playwright.sync_api import sync_playwright
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = x[y < 3][:300] / 16, y[y < 3][:300]
    model = rs.ClassifierCV(path={"group_lasso": {"how": "proximal", "per": "in"}}, points=12, cv=3, choice="1se")
    names = [f"{row}, {column}" for row in range(8) for column in range(8)]
    with TemporaryDirectory() as folder, sync_playwright() as driver:
        file = model.fit(x, y).report(Path(folder) / "report.html", images=(8, 8), inputs=names)
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        shots = [shot(browser, file, scheme) for scheme in ("light", "dark")]
    both = Image.new("RGB", (sum(one.width for one in shots), max(one.height for one in shots)), "white")
    for number, one in enumerate(shots):
        both.paste(one, (number * one.width, 0))
    return both


def shot(browser, file, scheme):
    """A picture of the top of a page."""
    page = browser.new_page(viewport={"width": 820, "height": 1100}, color_scheme=scheme)
    page.goto(file.as_uri())
    return Image.open(io.BytesIO(page.screenshot()))


# ---------------------------------------------------------------- pages whose examples are drawn


@functools.cache
def example(page):
    """The names that a page's examples have made, run as its reader would."""
    from tempfile import TemporaryDirectory

    docs = Path(__file__).resolve().parent
    text = (docs / f"{page}.md").read_text("utf-8")
    names, folder = {"__name__": "example"}, Path.cwd()
    with TemporaryDirectory() as made:
        os.chdir(made)  # for the files that they write
        try:
            for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
                exec(compile(block, page, "exec"), names)
        finally:
            os.chdir(folder)
    return names


def small(ax, xlabel, ylabel, text=""):
    ax.set_xlabel(xlabel, fontsize=8)
    ax.set_ylabel(ylabel, fontsize=8)
    ax.set_title(text, fontsize=9)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, frameon=False)


def tutorial_own_loop():
    """Errors on unseen rows without and with rules; lengths of the weights from each input."""
    names = example("tutorials/own-loop")
    figure, (left, right) = panels(2, 2, 4.2, 2.6)
    steps = range(10, 401, 10)
    left.plot(steps, names["plain_errors"], color=GREY, label="without rules")
    left.plot(steps, names["errors"], color=BLUE, label="with them")
    left.axhline(0.09, color=GREY, ls=":", lw=1, label="noise")
    left.set_ylim(0, 1)
    small(left, "step", "error on unseen rows")
    for model, color, shift in ((names["plain"], GREY, -0.2), (names["model"], BLUE, 0.2)):
        lengths = model[0].weight.detach().norm(dim=0)
        right.bar([number + shift for number in range(20)], lengths, 0.4, color=color)
    right.set_xticks([3, 7, 11])
    small(right, "input; the target needs 3, 7 and 11", "length of its weights")
    return figure


def tutorial_table():
    """The lasso of the page: weights over the strength by name, and scores."""
    names = example("tutorials/table")
    figure, (left, right) = panels(2, 2, 4.2, 2.8)
    lasso = names["lasso"]
    rs.plots.path(lasso, left)
    rs.plots.scores(lasso, right)
    view = lasso.view()
    (lines,), (labels,) = view.lines.values(), view.labels.values()
    weakest = min(range(len(view.strengths)), key=lambda at: view.strengths[at])
    for number in lines.abs().amax(0).argsort(descending=True)[:5].tolist():
        place = (view.strengths[weakest], float(lines[weakest, number]))
        left.annotate(labels[number], place, (2, 2), textcoords="offset points", fontsize=7)
    small(left, "strength", "weight, in standard deviations")
    small(right, "strength", "minus the squared error")
    left.get_legend().remove()
    return figure


def tutorial_language_model():
    """The loss, the z-loss, and units that are gone, over the steps."""
    history = example("tutorials/language-model")["reg"].history
    figure, axes = panels(3, 3, 2.9, 2.4)
    axes[0].plot(history["step"], history["data_loss"], color=BLUE)
    small(axes[0], "step", "", "loss")
    axes[1].plot(history["step"], history["penalties/z"], color=BLUE)
    small(axes[1], "step", "", "z-loss")
    for number, color in ((0, BLUE), (1, ORANGE)):
        gone = [100 * part for part in history[f"zero_groups/blocks.layers.{number}.linear1.weight"]]
        axes[2].plot(history["step"], gone, color=color, label=f"layer {number}")
    small(axes[2], "step", "", "units that are gone, %")
    return figure


def tutorial_sparse_autoencoder():
    """Cosines of true features and learned ones, the best pairs along the diagonal."""
    cosines = example("tutorials/sparse-autoencoder")["cosines"]
    figure, axes = panels(len(cosines), len(cosines), 3.0, 2.3)
    for ax, (name, found) in zip(axes, cosines.items(), strict=True):
        order = paired(found)
        ax.imshow(found[:, order], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("learned feature", fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel("true feature", fontsize=8)
    return figure


def paired(cosines):
    """The columns in an order that puts the best partner of row k, taken greedily, at place k."""
    left, order = cosines.clone(), {}
    for _ in range(len(cosines)):
        row, column = divmod(int(left.argmax()), left.shape[1])
        order[row] = column
        left[row], left[:, column] = -2, -2
    first = [order[row] for row in range(len(cosines))]
    return first + [column for column in range(cosines.shape[1]) if column not in first]


def tutorial_smaller():
    """The path of the page: lengths of units and scores over the strength."""
    path = example("tutorials/smaller")["path"]
    figure, (left, right) = panels(2, 2, 4.2, 2.6)
    rs.plots.path(path, left, shown=60)
    rs.plots.scores(path, right)
    small(left, "strength", "length of a unit's weights")
    small(right, "strength", "part of 300 digits that is right")
    left.get_legend().remove()
    return figure


# ---------------------------------------------------------------- the models


def models_classes():
    """What columns are worth, and the probability of the right class."""
    names = example("models")
    figure, (left, right) = panels(2, 2, 4.4, 2.8)
    order = names["importance"].argsort()[-7:]
    left.barh([names["wine"].input_names_[number] for number in order], names["importance"][order], color=BLUE)
    small(left, "fall of the accuracy without the column", "")
    place = {label: number for number, label in enumerate(names["wine"].classes_.tolist())}
    truth = [place[label] for label in names["y_test"].tolist()]
    found = sorted((names["probability"][row, column], column) for row, column in enumerate(truth))
    for label, color in zip(range(3), (BLUE, ORANGE, GREY), strict=True):
        own = [(rank, p) for rank, (p, column) in enumerate(found) if column == label]
        right.plot(*zip(*own, strict=True), "o", color=color, ms=4, label=f"grower {label}")
    right.axhline(1 / 2, color=GREY, ls=":", lw=1)
    right.set_ylim(0, 1.05)
    small(right, "unseen bottles, in order", "probability of the right grower")
    return figure


def models_numbers():
    """True over predicted numbers, with the interval; mean predictions over a column."""
    from sklearn.inspection import partial_dependence

    names = example("models")
    figure, (left, right) = panels(2, 2, 4.4, 2.8)
    predicted, ends = names["network"].predict(names["A_test"]), names["ends"]
    order = predicted.argsort()
    left.fill_between(predicted[order], *ends[order].T, color=BLUE, alpha=0.15, lw=0, label="90 % interval")
    left.plot(predicted[order], predicted[order], color=BLUE, lw=1)
    inside = names["inside"].to_numpy()
    for some, color, label in ((inside, BLUE, "in it"), (~inside, ORANGE, "outside")):
        left.plot(predicted[some], names["b_test"].to_numpy()[some], ".", color=color, ms=5, label=label)
    small(left, "predicted progress", "true progress")
    for model, color, label in ((names["line"], GREY, "line"), (names["network"], BLUE, "network")):
        found = partial_dependence(model, names["A"].astype(float), ["bmi"], kind="average")
        right.plot(found["grid_values"][0], found["average"][0], color=color, label=label)
    right.plot(names["A"]["bmi"], [right.get_ylim()[0]] * len(names["A"]), "|", color=GREY, ms=5)
    small(right, "body mass index", "mean prediction")
    return figure


def models_counts():
    """Rates by a deviation of each column; visits over expected ones in tenths, by two models."""
    names = example("models")
    figure, (left, right) = panels(2, 2, 4.4, 3.0)
    model, spread = names["line_of_rates"], names["P"].std()
    bars = pd.Series(model.coef_ * spread[model.input_names_].to_numpy(), model.input_names_).sort_values()
    left.barh(range(len(bars)), bars, color=[BLUE if bar > 0 else ORANGE for bar in bars], height=0.7)
    left.set_yticks(range(len(bars)), bars.index)
    left.axvline(0, color=GREY, lw=1)
    ticks = [0.9, 1, 1.1, 1.2]
    left.set_xticks([math.log(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    small(left, "times as many visits by a deviation", "")
    for (label, expected), color in zip(names["expected"].items(), (ORANGE, BLUE), strict=True):
        tenths = np.array_split(expected.argsort(), 10)
        means = [(expected[rows].mean(), names["v_test"].to_numpy()[rows].mean()) for rows in tenths]
        right.plot(*zip(*means, strict=True), ".-", color=color, ms=6, lw=1, label=label)
    right.plot([1, 7], [1, 7], color=GREY, ls=":", lw=1)
    small(right, "expected visits, means of tenths", "visits")
    return figure


def models_survival():
    """Kaplan and Meier's curves by predicted risk, and ratios of hazards."""
    names = example("models")
    figure, (left, right) = panels(2, 2, 4.4, 2.8)
    days, seen = names["time"].T
    thirds = names["risk"].argsort().argsort() * 3 // len(days)
    for third, color, label in zip(range(3), (BLUE, GREY, ORANGE), ("least", "middle", "greatest"), strict=True):
        left.step(*survival(days[thirds == third], seen[thirds == third]), where="post", color=color, label=label)
    left.set_ylim(0, 1.02)
    small(left, "days", "part without a recurrence")
    left.get_legend().set_title("third by risk", {"size": 7})
    hazards = names["hazards"]
    labels = {  # (text, units)
        "horTh=yes": ("hormones", 1),
        "age": ("10 years of age", 10),
        "tsize": ("10 mm of size", 10),
        "tgrade=II": ("grade II over I", 1),
        "tgrade=III": ("grade III over I", 1),
        "pnodes": ("5 positive nodes", 5),
        "progrec": ("100 fmol of progesterone receptors", 100),
        "estrec": ("100 fmol of oestrogen receptors", 100),
    }
    base = {"horTh=yes": "horTh=no", "tgrade=II": "tgrade=I", "tgrade=III": "tgrade=I"}
    shown = list(labels)[::-1]
    values = [(hazards[name] - hazards.get(base.get(name), 0)) * labels[name][1] for name in shown]
    right.plot(values, range(len(shown)), "o", color=BLUE)
    right.set_yticks(range(len(shown)), [labels[name][0] for name in shown])
    right.axvline(0, color=GREY, ls=":", lw=1)
    right.set_xticks([-0.69315, 0, 0.69315], ["½", "1", "2"])
    small(right, "ratio of hazards", "")
    return figure


def survival(days, seen):
    """(days, part without the event) after each day, by Kaplan and Meier."""
    found, alive = [(0, 1.0)], 1.0
    for day in sorted(set(days.tolist())):
        alive *= 1 - seen[days == day].sum() / (days >= day).sum()
        found.append((day, alive))
    return zip(*found, strict=True)


def models_sequences():
    """The series, and the predictions of unseen years."""
    names = example("models")
    figure, (ax,) = panels(1, 1, 8.8, 2.6)
    late = names["years"] >= 1880
    ax.plot(names["years"][late], 100 * names["numbers"][late], color=GREY, lw=1.2, label="sunspots")
    unseen = names["year"][~names["old"]]
    ax.plot(unseen, 100 * names["following"], color=BLUE, lw=1.2, label="a year before, of unseen years")
    small(ax, "year", "number")
    return figure


def models_images():
    """Unseen digits that are read rightly and wrongly."""
    names = example("models")
    images, kinds = names["images"][1200:, :, :, 0], names["kinds"][1200:]
    read = names["seeing"].predict(names["images"][1200:])
    wrong, right = (read != kinds).nonzero()[0][:9], [((kinds == k) & (read == k)).argmax() for k in range(9)]
    figure, axes = panels(18, 9, 0.95, 1.15)
    for ax, row in zip(axes, [*right, *wrong], strict=False):
        ax.imshow(images[row], cmap="gray_r", interpolation="nearest")
        said = f"{read[row]}" if read[row] == kinds[row] else f"{read[row]}, is {kinds[row]}"
        ax.set_title(said, fontsize=9, color="black" if read[row] == kinds[row] else "#c53030")
    for ax in axes:
        ax.axis("off")
    return figure


def models_codes():
    """Digits, their reconstructions, and the parts that are used most."""
    names = example("models")
    weights, used = names["parts"].find("hid1").detach(), (names["codes"] > 0).mean(0).argsort()[::-1]
    shown = [(names["digits"][:10], "digits"), (names["again"][:10], "the same after their codes")]
    shown += [(weights[used[k : k + 10].tolist()], "parts, the most used first" if not k else "") for k in (0, 10)]
    figure, axes = panels(40, 10, 0.85, 0.95)
    for number, (pictures, text) in enumerate(shown):
        for ax, picture in zip(axes[10 * number :], pictures, strict=False):
            most = abs(picture).max() if number > 1 else 1
            cmap, least = ("RdBu_r", -most) if number > 1 else ("gray_r", 0)
            ax.imshow(picture.reshape(8, 8), cmap=cmap, vmin=least, vmax=most, interpolation="nearest")
            ax.axis("off")
        axes[10 * number].set_title(text, fontsize=9, loc="left")
    return figure


DRAWN = (entrywise, relations, groups, spectral, activations, derivatives, constraints, noise, how, strength)
DRAWN += (reparametrization, normalization, paths, report)
DRAWN += (tutorial_own_loop, tutorial_table, tutorial_language_model, tutorial_sparse_autoencoder, tutorial_smaller)
DRAWN += (models_classes, models_numbers, models_counts, models_survival, models_sequences, models_images, models_codes)
PICTURES = {function.__name__.replace("tutorial_", "tutorial-").replace("_", "-"): function for function in DRAWN}


def main(names):
    for name in names or PICTURES:
        drawn, path = PICTURES[name](), IMAGES / f"{name}.png"
        if isinstance(drawn, Image.Image):
            drawn.save(path)
        else:
            drawn.tight_layout()
            drawn.savefig(path, dpi=100)
            plt.close(drawn)
        Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=48).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
