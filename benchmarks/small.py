"""What rules cost in the fit of a small table: time an update by each rule, against none.

    OMP_NUM_THREADS=1 python benchmarks/small.py [--quick] [--out folder]

`Classifier(hidden=(100,))` by Adam, batches of 64, float64, on the 150 rows of iris and on 360 rows of 10 columns drawn
from it. Trainings with each rule take turns, epoch by epoch, after 60 epochs each, so that recording an update isn't
counted; an update is an epoch divided by its updates. Whole fits of 1,200 updates, which count it, take turns too.
"""

import itertools
import warnings

import numpy as np
import torch
from measure import Section, digits, judged, keep_to_cpus, options, paired, quartiles, ratios, times
from sklearn.datasets import load_iris

import restrain as rs

PROXIMAL = {"how": "proximal"}
RULES = {
    "none": {},
    "weight_l2": {"weight_l2": 1e-4},
    "weight_l1": {"weight_l1": 1e-4},
    "hidden_dropout": {"hidden_dropout": 0.2},
    "L1, proximal": {"weight_l1": {"strength": 1e-4, **PROXIMAL}},
    "GroupLasso, proximal": {"grouplasso": {"strength": 1e-3, **PROXIMAL}},
    "L2, decoupled": {"weight_l2": {"strength": 1e-3, "how": "decoupled"}},
    "MaxNorm": {"regularizers": [rs.MaxNorm(3.0, per="out").on(rs.weights)]},
}
GOALS = {"weight_l2": 1.1, "hidden_dropout": 1.15, "GroupLasso, proximal": 1.3}
SKIPPED = 60  # epochs


def tables():
    """{name: (x, y)}."""
    x, y = load_iris(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(x), 360)
    wide = np.hstack([x[rows], rng.normal(size=(360, 6))])
    return {"iris, 150 × 4": (x, y), "360 × 10": (wide, y[rows])}


def model(rule, epochs):
    return rs.Classifier(hidden=(100,), random_state=0, epochs=epochs, valid=None, progress=False, **RULES[rule])


def epochs_in_turns(data, rounds):
    """{rule: seconds of each epoch}."""
    runs = {rule: model(rule, SKIPPED + rounds + 2).itertrain(data) for rule in RULES}
    for run in runs.values():
        list(itertools.islice(run, SKIPPED))
    seconds = paired({rule: lambda run=run: next(run) for rule, run in runs.items()}, rounds)
    for run in runs.values():
        run.close()
    return seconds


def compared(section, title, seconds, updates, note):
    rows = []
    for rule, own in seconds.items():
        over = ratios(seconds, rule, "none")
        verdict = judged(over[1], GOALS[rule]) if rule in GOALS else ""
        rows.append([rule, digits(quartiles(own)[1] * 1e6 / updates), "" if rule == "none" else times(over), verdict])
    section.table(title, ["rule", "µs an update", "× none", "goal"], rows, note)


def main():
    given = options(__doc__)
    keep_to_cpus()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = (
        "`Classifier(hidden=(100,))`, Adam, batches of 64, float64, one thread; its updates are recorded, not compiled."
    )
    section = Section(__file__, "Rules on small tables", text)
    for name, (x, y) in tables().items():
        updates = -(-len(x) // 64)
        seconds = epochs_in_turns((x, y), 20 if given.quick else 500)
        compared(section, f"An update, {name}", seconds, updates, "Epochs take turns; recording isn't counted.")
        length = 60 if given.quick else 1200 // updates
        fits = {rule: lambda rule=rule: model(rule, length).fit(x, y) for rule in RULES}  # noqa: B023
        note = f"{length} epochs; fits take turns; recording an update is counted."
        compared(section, f"A fit, {name}", paired(fits, 1 if given.quick else 3), updates * length, note)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
