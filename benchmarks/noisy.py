"""Constraints under the noise of batches: how far the weights end from the constrained optimum, by seeds.

    python benchmarks/noisy.py [--seeds 5] [--steps 2000]

The problem is that of strangers.py, by batches of 20 of its 200 samples, the learning rate falling to zero. A number is
the distance to the optimum over its length: the mean over seeds ± its standard error, for projections in the
optimizer's metric, and Euclidean ones after the same steps.
"""

import argparse
import warnings

import torch
from strangers import fit, optimum, within

import restrain as rs

SETS = {
    "NonNegative": (rs.NonNegative(), lambda w, step: w.clamp_min(0)),
    "Box(0, 1)": (rs.Box(0, 1), lambda w, step: w.clamp(0, 1)),
    "MaxNorm(1)": (rs.MaxNorm(1.0, per="out"), within),
    "UnitNorm": (rs.UnitNorm(per="out"), lambda w, step: w / w.norm(dim=1, keepdim=True)),
    "Simplex": (rs.Simplex(per="row"), lambda w, step: rs.Simplex(per="row").project(w)),
    "L1Ball(1)": (rs.L1Ball(1.0, per="row"), lambda w, step: rs.L1Ball(1.0, per="row").project(w)),
}
OPTIMIZERS = {
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.02),
}


def errors(make, rule, expected, given):
    """The distances of all seeds."""
    found = []
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        found.append((fit(make, rule, given.steps, size=20) - expected).norm() / expected.norm())
    return torch.stack(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("set | optimizer | in its metric | Euclidean")
    for title, (kind, move) in SETS.items():
        expected = optimum(move)
        for name, make in OPTIMIZERS.items():
            cells = []
            for how in ({}, {"metric": "euclidean"}):
                found = errors(make, kind.on("weight", **how), expected, given)
                cells.append(f"{found.mean():.4f} ± {found.std() / len(found) ** 0.5:.4f}")
            print(title, name, *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
