"""Paths beside their peers: exact linear ones, groups, networks, pixels and features chosen by them.

    python benchmarks/paths.py [--quick] [--only lasso groups logistic network pixels digits] [--splits 0 1]

`mnist10k.npz` is looked for in ../shared/data beside the project, or in the folder that RESTRAIN_DATA names. Peers
that aren't installed are left out: `pip install celer adelie skglm lassonet`. Each job stands beside its peers in one
process, taking turns; ratios are of one round. Networks are timed by the processor's time of one thread. Errors are the
greatest difference of a coefficient, at any point, from the solution polished on its support (lasso) or from ours
(groups, logistic), whose error tests/models/test_peers.py bounds.
"""

import contextlib
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from measure import Section, digits, judged, options, paired, quartiles, ratios, spread, times
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.models.linear import Linear

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
MNIST = Path(os.environ.get("RESTRAIN_DATA", SHARED)) / "mnist10k.npz"
PARTS = ("lasso", "groups", "logistic", "network", "pixels", "digits")


def sparse_problem(n, p, used, seed=0, correlation=0.5):
    """Inputs of correlated neighbours, and targets of a few of them with noise, centred."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, p))
    for k in range(1, p):
        x[:, k] = correlation * x[:, k - 1] + (1 - correlation**2) ** 0.5 * x[:, k]
    w = np.zeros(p)
    w[draw.choice(p, used, replace=False)] = draw.standard_normal(used)
    y = x @ w
    y += draw.standard_normal(n) * np.std(y) / 3
    return np.asfortranarray(x - x.mean(0)), y - y.mean()


def compared(section, title, ours, peers, goal=None, rounds=5, exact=None, note=""):
    """A table of times, ratios ours / theirs in one round, and errors; jobs return coefficients (points, features)."""
    found, jobs = {}, {}
    for name, job in {"restrain": ours, **peers}.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                found[name] = job()
                print(f"{name}: first run {time.perf_counter() - start:.2f} s", flush=True)
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
            continue
        jobs[name] = job
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = paired(jobs, rounds, budget=200)
    truth = exact(found) if exact else found["restrain"]
    rows = []
    for name in jobs:
        error = np.abs(found[name] - truth).max()
        ratio = ratios(seconds, "restrain", name) if name != "restrain" else None
        verdict = judged(ratio[1], at_most=goal[name]) if ratio and goal and name in goal else ""
        rows.append([name, spread(seconds[name], 1e3), times(ratio) if ratio else "", f"{error:.1e}", verdict])
    section.table(title, ["", "ms", "ours / theirs", "greatest error", "goal"], rows, note)


# ---------------------------------------------------------------- lasso


def polished(x, y, alphas, coefs):
    """Lasso coefficients solved on the support and signs that were found, with a check of optimality."""
    found, n = [], len(y)
    for alpha, w in zip(alphas, coefs, strict=True):
        on = np.flatnonzero(np.abs(w) > 1e-9 * max(np.abs(w).max(), 1e-300))
        v = np.zeros_like(w)
        if len(on):
            gram = x[:, on].T @ x[:, on] / n
            v[on] = np.linalg.solve(gram, x[:, on].T @ y / n - alpha * np.sign(w[on]))
        slope = x.T @ (y - x @ v) / n
        assert np.abs(slope).max() <= alpha * (1 + 1e-7), "a zero should not be one"
        assert (np.sign(v[on]) == np.sign(w[on])).all(), "another sign"
        found.append(v)
    return np.array(found)


def lasso(section, quick, splits):
    n, p, points = (60, 100, 10) if quick else (500, 2000, 100)
    x, y = sparse_problem(n, p, p // 40)
    alphas = np.abs(x.T @ y).max() / n * np.geomspace(1, 1e-2, points)

    def ours():
        return np.array([w.numpy()[0] for w, _ in Linear.of(x, y, 0).path(rs.L1(), 2 * alphas)])

    def sklearn():
        from sklearn.linear_model import lasso_path

        return lasso_path(x, y, alphas=alphas, tol=1e-9, max_iter=100_000)[1].T

    def celer():
        from celer import celer_path

        return celer_path(x, y, pb="lasso", alphas=alphas, tol=1e-9)[1].T

    def skglm():
        from skglm.datafits import Quadratic
        from skglm.penalties import L1
        from skglm.solvers import AndersonCD
        from skglm.utils.jit_compilation import compiled_clone

        datafit, penalty = compiled_clone(Quadratic()), compiled_clone(L1(1.0))
        return AndersonCD(tol=1e-8, fit_intercept=False).path(x, y, datafit, penalty, alphas)[1].T

    compared(
        section,
        f"lasso, n = {n}, p = {p}, {points} strengths down to 1/100 of the greatest",
        ours,
        {"celer": celer, "skglm": skglm, "scikit-learn": sklearn},
        {"celer": 3},
        exact=lambda found: polished(x, y, alphas, found["restrain"]),
        note="Tolerances: celer and scikit-learn 1e-9, skglm 1e-8.",
    )


ADELIE = {"progress_bar": False, "early_exit": False, "n_threads": 1, "min_ratio": 1e-4}


# ---------------------------------------------------------------- groups and logistic regression


def groups(section, quick, splits):
    n, p, points, size = (60, 100, 8, 5) if quick else (500, 2000, 100, 10)
    x, y = sparse_problem(n, p, p // 20)
    starts = np.arange(0, p, size)
    slopes = (x.T @ y / n).reshape(-1, size)
    alphas = np.linalg.norm(slopes, axis=1).max() / size**0.5 * np.geomspace(1, 1e-2, points)
    penalty = rs.GroupLasso(per={"in": [list(range(k, k + size)) for k in starts]})

    def ours():
        return np.array([w.numpy()[0] for w, _ in Linear.of(x, y, 0).path(penalty, 2 * alphas)])

    def adelie():
        import adelie as ad

        given = {"groups": starts, "penalty": np.full(len(starts), size**0.5), "tol": 1e-14, "intercept": False}
        return ad.grpnet(x, ad.glm.gaussian(y), lmda_path=alphas, **given, **ADELIE).betas.toarray()

    def celer():
        from celer import celer_path

        weights = np.full(len(starts), size**0.5)
        return celer_path(x, y, pb="grouplasso", groups=size, alphas=alphas, weights=weights, tol=1e-9)[1].T

    compared(
        section,
        f"group lasso, n = {n}, p = {p}, groups of {size}, {points} strengths down to 1/100 of the greatest",
        ours,
        {"adelie": adelie, "celer": celer},
        {"adelie": 10},
        rounds=3,
        note="Errors are differences from ours. Tolerances: adelie 1e-14, celer 1e-9.",
    )


def logistic(section, quick, splits):
    n, p, points = (60, 50, 5) if quick else (500, 500, 20)
    x, y = sparse_problem(n, p, p // 20)
    labels = (y > 0).astype(int)
    top = np.abs(x.T @ (labels - labels.mean())).max() / n
    strengths = top * np.geomspace(1, 5e-2, points)

    def ours():
        found = Linear.of(x, labels, 2).path(rs.L1(), strengths)
        return np.array([(w[1] - w[0]).numpy() for w, _ in found])

    def adelie():
        import adelie as ad

        glm = ad.glm.binomial(labels.astype(float), link="logit")
        return ad.grpnet(x, glm, lmda_path=strengths, tol=1e-14, irls_tol=1e-12, **ADELIE).betas.toarray()

    def sklearn():
        from sklearn.linear_model import LogisticRegression

        found = []
        for s in strengths:
            given = {"l1_ratio": 1.0, "C": 1 / (n * s), "solver": "saga", "tol": 1e-8, "max_iter": 20_000}
            found.append(LogisticRegression(**given).fit(x, labels).coef_[0])
        return np.array(found)

    compared(
        section,
        f"logistic lasso, n = {n}, p = {p}, {points} strengths down to 1/20 of the greatest",
        ours,
        {"adelie": adelie, "scikit-learn (saga)": sklearn} if not quick else {"adelie": adelie},
        rounds=3,
        note="Errors are differences from ours. Tolerances: adelie 1e-14, scikit-learn 1e-8.",
    )


# ---------------------------------------------------------------- networks


class Fit:
    """A training loop for one point: a long first fit, short ones after it."""

    def __init__(self, x, y, first, later, rate=1e-3, batch=128):
        self.x, self.y, self.first, self.later, self.rate, self.batch = x, y, first, later, rate, batch
        self.calls = 0

    def __call__(self, model, reg):
        steps = round((self.later if self.calls else self.first) * len(self.x) / self.batch)
        self.calls += 1
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)
        if reg is not None:
            reg.use(optimizer)
        order = torch.randperm(len(self.x)).split(self.batch)
        for step in range(steps):
            if step and step % len(order) == 0:
                order = torch.randperm(len(self.x)).split(self.batch)
            rows = order[step % len(order)]
            optimizer.zero_grad()
            F.cross_entropy(model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()


def network_of(inputs, hidden, seed, outputs=10):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def walked(model, fit, valid, **given):
    """A path over the inputs of the first layer, from all to none."""
    x, y = valid
    usual = {"points": 50, "ratio": 1e-2, "random_state": 0, "progress": False}
    return rs.path(
        model,
        rs.GroupLasso(per="in").on("0.weight", how="proximal"),
        fit,
        loss=lambda m: F.cross_entropy(m(fit.x), fit.y),
        score=lambda m: (m(x).argmax(1) == y).double(),
        **{**usual, **given},
    )


def mnist():
    data = np.load(MNIST)
    return data["X"].reshape(len(data["X"]), -1).astype(np.float32) / 255, data["y"].astype(np.int64)


def split(x, y, seed, parts=(0.6, 0.2, 0.2)):
    """(train, valid, test), each of tensors (x, y)."""
    order = np.random.default_rng(seed).permutation(len(x))
    ends = np.cumsum([round(part * len(x)) for part in parts])
    rows = np.split(order, ends[:-1])
    return [(torch.from_numpy(x[one]), torch.from_numpy(y[one])) for one in rows]


WALKS = {"up": {"points": 38}, "removal": {"points": 60, "direction": "removal"}}
WALKS |= {"up, certificates of all points": {"points": 38, "certificate": True}}


def network(section, quick, splits):
    """Seconds of a path of 50 points and more over seconds of a dense fit, which the path's first fit is too."""
    x, y = mnist()
    train, valid, _ = split(x[:600] if quick else x, y[:600] if quick else y, 0)
    epochs, rows = 2 if quick else 20, []
    walked(network_of(784, 100, 0), Fit(*train, 0.2, 0.1), valid, points=2)  # what is made at the first use
    for title, given in WALKS.items():
        ways, dense, counts, gains = [], [], [], []
        for seed in splits[: 1 if quick else 3]:
            model = network_of(784, 100, seed)
            start = time.process_time()
            Fit(*train, epochs, 0)(model, None)
            dense.append(time.process_time() - start)
            score = float((model(valid[0]).argmax(1) == valid[1]).double().mean())
            model, fit = network_of(784, 100, seed), Fit(*train, epochs, 0.2)
            start = time.process_time()
            found = walked(model, fit, valid, **given)
            ways.append(time.process_time() - start)
            counts.append(len(found))
            gains.append(found.best().score - score)
            print(f"{title}, {seed}: {counts[-1]} points, {ways[-1]:.2f} s, dense {dense[-1]:.2f} s", flush=True)
        ratio = quartiles([a / b for a, b in zip(ways, dense, strict=True)])
        points, gain = f"{min(counts)} – {max(counts)}", f"{np.mean(gains):+.4f}"
        rows.append([title, points, spread(ways), spread(dense), times(ratio), gain, judged(ratio[1], at_most=3)])
    section.table(
        f"a network 784-100-10 on {len(train[0]):,} digits",
        [
            "way",
            "points",
            "s of the path",
            f"s of a dense fit of {epochs} epochs",
            "path / dense",
            "best - dense",
            "goal",
        ],
        rows,
        "The path's own first fit, dense too, is in its time; a fifth of an epoch for each point. Best - dense: "
        "accuracy on the validation part of the path's best point minus that of the dense fit.",
    )


# ---------------------------------------------------------------- pixels


def trees(train, test, pixels, seed):
    """Accuracy of ExtraTrees on some pixels."""
    from sklearn.ensemble import ExtraTreesClassifier

    judge = ExtraTreesClassifier(n_estimators=100, random_state=seed).fit(train[0][:, pixels], train[1])
    return judge.score(test[0][:, pixels], test[1])


def longest(path, count):
    """The longest groups of the last point that has as many."""
    at = [point for point in path.points if point.selected >= count][-1]
    lengths = torch.linalg.vector_norm(path.model(at)[0].weight.detach(), dim=0)
    return lengths.argsort(descending=True)[:count].numpy()


REMOVAL = {"direction": "removal", "points": 50}
CONTROL = "removal, weight decay (the control)"
# without a decay the weights of pixels that are hardly ever on keep their length, or grow under Adam
VARIANTS = {
    "group lasso": {"points": 50},
    CONTROL: {**REMOVAL, "fixed": 1e-3 * rs.L2().on("0.weight", how="gradient")},
    "removal under L1": {**REMOVAL, "fixed": 3e-4 * rs.L1().on("0.weight", how="proximal")},
    "removal alone": REMOVAL,
}


def timed(name, function, *arguments):
    """What a function gives for a way by name, and the processor's seconds; (None, 0) where a peer isn't installed."""
    start = time.process_time()
    try:
        return function(name, *arguments), time.process_time() - start
    except ImportError as error:
        print(f"{name}: {error}", flush=True)
        return None, 0.0


def mask_of(name, train, valid, seed, quick):
    """50 pixels by a variant."""
    if name == "LassoNet":
        # its own defaults take hours here: fewer steps a strength, and strengths 15 % apart instead of 2 %
        given = {"n_iters": (20, 5) if quick else (200, 10), "path_multiplier": 1.15}
        return lassonet_masks(train, valid, seed, (50,), given)[50]
    given = VARIANTS[name]
    ratio = 50 / 784 if given.get("direction") == "removal" else 1e-2
    fit = Fit(*train, 1 if quick else 10, 0.5)
    return longest(walked(network_of(784, 100, seed), fit, valid, ratio=ratio, **given), 50)


def pixels(section, quick, splits):
    """50 pixels by each variant, judged on fresh splits; the variant of ours is picked by the validation part."""
    x, y = mnist()
    if quick:
        x, y = x[:800], y[:800]
    names = (*VARIANTS, "LassoNet")
    table, seconds, chosen = {name: [] for name in names}, dict.fromkeys(names, 0.0), []
    for seed in splits[: 1 if quick else None]:
        train, valid, test = split(x, y, seed)
        results = {}
        for name in names:
            mask, taken = timed(name, mask_of, train, valid, seed, quick)
            if mask is None:
                continue
            seconds[name] += taken
            results[name] = trees(train, valid, mask, seed), trees(train, test, mask, seed)
            table[name].append(results[name][1])
            print(f"split {seed}, {name}: valid {results[name][0]:.4f}, test {results[name][1]:.4f}", flush=True)
        chosen.append(max(results[name] for name in VARIANTS)[1])
    control = np.mean(table[CONTROL])
    rows = [[name, f"{np.mean(found):.4f}", f"{seconds[name]:.0f}", ""] for name, found in table.items() if found]
    verdict = judged(float(np.mean(chosen) - control), at_least=-0.005)
    rows.append(["ours, picked on validation", f"{np.mean(chosen):.4f}", "", f"minus the control {verdict}"])
    section.table(
        f"50 of 784 pixels, ExtraTrees on {len(test[0]):,} test digits, mean of {len(chosen)} splits",
        ["", "accuracy", "s, all splits", "goal"],
        rows,
    )


# ---------------------------------------------------------------- features of the small digits


COUNTS = (5, 10, 15, 20, 30)


def lassonet_masks(train, valid, seed, counts, given):
    """{count: features}: at each count the first of LassoNet's models with as few features."""
    from lassonet import LassoNetClassifier

    model = LassoNetClassifier(hidden_dims=(100,), M=10, verbose=0, random_state=seed, torch_seed=seed, **given)
    with contextlib.redirect_stdout(None):
        found = model.path(train[0], train[1], X_val=valid[0], y_val=valid[1])
    masks = {}
    for count in counts:
        fits = [one for one in found if one.selected.sum() <= count]
        masks[count] = np.flatnonzero(fits[0].selected.numpy()) if fits else np.arange(0)
    return masks


def refitted(train, test, mask, seed, quick):
    """Mean accuracy of two networks trained on some features alone."""
    if not len(mask):
        return 0.1
    found = []
    for number in (seed, 100 + seed):
        model = network_of(len(mask), 100, number)
        Fit(train[0][:, mask], train[1], 2 if quick else 60, 0, batch=64)(model, None)
        found.append(float((model(test[0][:, mask]).argmax(1) == test[1]).double().mean()))
    return float(np.mean(found))


# strengths were chosen on the validation digits of splits 0 and 1
WAYS = {
    "restrain, removal, decay": {
        **REMOVAL,
        "points": 40,
        "fixed": 1e-2 * rs.L2().on("0.weight", how="gradient"),
    },
    "restrain, removal under L1": {**REMOVAL, "points": 40, "fixed": 3e-3 * rs.L1().on("0.weight", how="proximal")},
    "restrain, up": {"points": 50},
}


def masks_of(name, train, valid, seed, quick):
    """{count: features} of one way."""
    if name == "LassoNet":
        given = {"n_iters": (20, 5) if quick else (1000, 100), "path_multiplier": 1.05}  # its own: 1.02
        return lassonet_masks(train, valid, seed, COUNTS, given)
    fit = Fit(*train, 2 if quick else 40, 0.2 if quick else 3, batch=64)
    found = walked(network_of(64, 100, seed), fit, valid, **{"ratio": 1 / 64, **WAYS[name]})
    return {count: longest(found, count) for count in COUNTS}


def small_digits(section, quick, splits):
    """Test accuracy at 5 to 30 features, the same refits for all, and seconds of the selection."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean()) / x.std()).astype(np.float32)
    scores = {name: {count: [] for count in COUNTS} for name in (*WAYS, "LassoNet")}
    seconds = {name: [] for name in scores}
    splits = splits[: 1 if quick else None]
    for seed in splits:
        train, valid, test = split(x, y, seed)
        for name in scores:
            masks, taken = timed(name, masks_of, train, valid, seed, quick)
            if masks is None:
                continue
            seconds[name].append(taken)
            for count in COUNTS:
                scores[name][count].append(refitted(train, test, masks[count], seed, quick))
            own = [f"{scores[name][count][-1]:.3f}" for count in COUNTS]
            print(f"split {seed}, {name}: {' '.join(own)}, {seconds[name][-1]:.1f} s", flush=True)
    section.table(
        f"8 × 8 digits, test accuracy of a network on so many features, mean of {len(splits)} splits",
        ["", *map(str, COUNTS), "s", "goal"],
        rows_of_digits(scores, seconds),
    )


def rows_of_digits(scores, seconds):
    """Rows of the table, with what is compared with LassoNet."""
    rows = []
    for name, own in scores.items():
        if not seconds[name]:
            continue
        rows.append([name, *(f"{np.mean(own[count]):.3f}" for count in COUNTS), spread(seconds[name]), ""])
        if name != "LassoNet" and seconds["LassoNet"]:
            pairs = [np.subtract(own[count], scores["LassoNet"][count]) for count in COUNTS]
            errors = [float(np.std(one, ddof=1)) / len(one) ** 0.5 if len(one) > 1 else np.nan for one in pairs]
            least = float(min(map(np.mean, pairs)))
            part = quartiles([a / b for a, b in zip(seconds[name], seconds["LassoNet"], strict=True)])[1]
            cells = [f"{np.mean(one):+.3f} ± {error:.3f}" for one, error in zip(pairs, errors, strict=True)]
            verdict = f"accuracy {judged(least, at_least=0)}, time {judged(part, at_most=0.25)}"
            rows.append(["... minus LassoNet", *cells, f"× {digits(part)}", verdict])
    return rows


def main():
    numbers = {"nargs": "+", "type": int, "default": range(5)}  # of splits of the data
    given = options(__doc__, ("--only", {"nargs": "+", "choices": PARTS, "default": PARTS}), ("--splits", numbers))
    torch.set_num_threads(1)  # threads that wait for each other count as the processor's time
    section = Section("benchmarks/paths.py", "Paths")
    jobs = dict(zip(PARTS, (lasso, groups, logistic, network, pixels, small_digits), strict=True))
    for name in given.only:
        jobs[name](section, given.quick, list(given.splits))
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
