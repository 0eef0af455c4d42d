"""How cost grows: with the entries of a tensor and with the number of tensors, over five decades each.

    python benchmarks/scaling.py [--quick] [--out folder]

L1 by each `how=` on one tensor of 10³ to 10⁸ entries, and on 1 to 10⁵ tensors of ten. The slope is that of
log seconds over log size in the upper half of the range: 1 where the cost grows linearly.
"""

import math

import torch
from lists import STRENGTH, model_of
from measure import Section, digits, options, paired, quartiles
from rules import attached, backward

import restrain as rs

HOWS = ("gradient", "decoupled", "proximal")
FORMS = ("loop in the loss", 'restrain, how="loss"', *(f'restrain, how="{how}"' for how in HOWS), "a += b")


def jobs_of(shapes):
    """{form: function} for L1 on such tensors."""
    model = model_of(shapes)
    ps = list(model.parameters())
    reg = rs.attach(model, STRENGTH * rs.L1().on("*"))
    jobs = {
        "loop in the loss": backward(lambda ps: sum(p.abs().sum() for p in ps), ps),
        'restrain, how="loss"': lambda: reg.penalty().backward(),
        "a += b": lambda: [p.grad.add_(p.detach(), alpha=1e-30) for p in ps],
    }
    return jobs | {f'restrain, how="{how}"': attached(model, rs.L1(), how) for how in HOWS}, model


def curve(sizes, shapes_of, rounds):
    """{form: seconds at each size}."""
    found = {form: [] for form in FORMS}
    for size in sizes:
        jobs, _model = jobs_of(shapes_of(size))
        repeats = max(1 if len(shapes_of(size)) > 10_000 else 3, min(rounds, int(rounds * sizes[-1] / size / 50)))
        for form, seconds in paired(jobs, repeats, budget=6).items():
            found[form].append(quartiles(seconds)[1])
    return found


def slope(sizes, seconds):
    """Of log seconds over log size, by least squares over the upper half of the range."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, seconds, strict=True)][len(sizes) // 2 :]
    middle_x, middle_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / sum((x - middle_x) ** 2 for x, _ in points)


def add(section, title, unit, sizes, found):
    rows = [
        [form, *(digits(value * 1e3) for value in seconds), f"{slope(sizes, seconds):.2f}"]
        for form, seconds in found.items()
    ]
    columns = ["form, ms", *(f"10^{math.log10(size):g} {unit}" for size in sizes), "slope"]
    section.table(title, columns, rows)


def draw(path, curves):
    """Both panels, logarithmic; a picture of few colours, so that it stays small."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (title, sizes, found) in zip(axes, curves, strict=True):
        for form, seconds in found.items():
            style = {"color": "#a0aec0", "ls": "--"} if form == "a += b" else {"ls": "-"}
            axis.loglog(sizes, [value * 1e3 for value in seconds], marker=".", lw=1, ms=4, label=form, **style)
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("ms", fontsize=8)
    axes[0].legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=48).save(path, optimize=True)


def main():
    given = options(__doc__)
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    section = Section(__file__, "How cost grows", f"{given.threads} threads, L1. Slope 1 is linear growth.")
    entries = [10**power for power in range(3, 6 if given.quick else 9)]
    tensors = [10**power for power in range(3 if given.quick else 6)]
    rounds = 3 if given.quick else 25
    by_entries = curve(entries, lambda size: [(size,)], rounds)
    by_tensors = curve(tensors, lambda size: [(10,)] * size, rounds)
    add(section, "Entries of one tensor", "entries", entries, by_entries)
    add(section, "Tensors of ten entries", "tensors", tensors, by_tensors)
    if given.out:
        curves = [("entries", entries, by_entries), ("tensors of ten entries", tensors, by_tensors)]
        draw(given.out / "scaling.png", curves)
        section.pictures.append(["scaling.png", "Time of L1 over entries and over tensors, by each how="])
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
