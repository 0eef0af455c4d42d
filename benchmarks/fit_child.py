"""A child of fit.py: one peer in a process of its own; the last line that it prints is JSON.

    python benchmarks/fit_child.py alone|beside|keywords PEER [--quick]

alone: time until a test loss is reached, and memory. beside: time to the first update; then epochs of the peer and of
restrain in turns. keywords: epochs of restrain with each rule in turns.
"""

import json
import os
import sys
import tempfile
import time
import warnings

from measure import keep_to_cpus, paired, peak_rss, quartiles

keep_to_cpus()

from fit_jobs import jobs  # noqa: E402
from peers import PEERS, Ours  # noqa: E402

TARGETS = {"classifier": ("sgd", 0.2), "autoencoder": ("adam", 0.005)}
KEYWORDS = {
    "none": {},
    "weight_l2": {"weight_l2": 1e-4},
    "weight_l1": {"weight_l1": 1e-5},
    "hidden_l1": {"hidden_l1": 1e-4},
    "input_noise": {"input_noise": 0.1},
    "hidden_dropout": {"hidden_dropout": 0.5},
}
KEYWORDS["all together"] = {name: value for one in KEYWORDS.values() for name, value in one.items()}
# Seconds between two turns, at two threads: those of OpenBLAS, which scikit-learn uses, go on waiting at full speed for
# a while, and take the processor that ours is to run on.
PAUSE = {"scikit-learn": 0.5}
BUDGET = {"classifier": 3.0, "autoencoder": 4.5}  # seconds of taking turns


def threads():
    import torch

    torch.set_num_threads(int(os.environ.get("BENCH_CPUS", "1")))


def to_target(make, job, quick):
    """Seconds and epochs until the loss of held out digits is reached; evaluations aren't counted."""
    algo, target = TARGETS[job.name]
    size = len(job.x) * 4 // 5
    test, path, state = job.of(slice(size, None)), [], {"spent": 0.0}
    start = time.perf_counter()
    peer = make(job.of(slice(size)), algo)

    def tick():
        state["spent"] += time.perf_counter() - state["start"]
        path.append(test.loss(peer.predict(test.x)))
        going = path[-1] > target and state["spent"] < 20 and not (quick and len(path) > 1)
        state["start"] = time.perf_counter()
        return going

    state["start"] = start
    peer.train(tick)
    reached = path[-1] <= target
    return {"seconds": state["spent"], "epochs": len(path), "reached": reached, "loss": path[-1]}


def alone(name, quick):
    """Time and memory of a fit."""
    make, _ = PEERS[name]
    start = time.perf_counter()
    made, source = jobs(quick)
    warm = made["classifier"].of(slice(1))
    make(warm, "sgd")  # imports what it needs
    threads()
    found = {"imported": time.perf_counter() - start, "before": peak_rss(), "source": source}
    for job in made.values():
        found[job.name] = to_target(make, job, quick) | {"peak": peak_rss()}
    return found


def first_update(make, job):
    """Seconds from nothing to one update."""
    start = time.perf_counter()
    make(job.of(slice(64)), "sgd").train(lambda: False)
    return time.perf_counter() - start


def turns(make, job, algo, quick, pause=0.0):
    """([seconds of our epochs], [of the peer's]), in turns, with a pause between two."""
    ours = Ours(job, algo, compile=True).epochs()
    next(ours)
    mine, theirs, state = [], [], {}
    began = time.perf_counter()

    def tick():
        theirs.append(time.perf_counter() - state["start"])
        time.sleep(pause)
        start = time.perf_counter()
        next(ours)
        mine.append(time.perf_counter() - start)
        time.sleep(pause)
        state["start"] = time.perf_counter()
        late = state["start"] - began - 2 * pause * len(theirs) > BUDGET[job.name] and len(theirs) > 3
        return not (late or len(theirs) > (2 if quick else 15))

    peer = make(job, algo)
    state["start"] = time.perf_counter()
    peer.train(tick)
    return mine[1:], theirs[1:]  # the first of each warms up


def beside(name, quick):
    """Time to the first update, then epochs in turns with ours."""
    make, _ = PEERS[name]
    made, _ = jobs(quick)
    make(made["classifier"].of(slice(1)), "sgd")
    threads()
    found = {"first": {job.name: first_update(make, job) for job in made.values()}}
    if name.startswith("restrain"):
        return found
    alone = os.environ.get("BENCH_CPUS", "1") == "1"
    for job in made.values():
        for algo in ("sgd", "adam") if alone and job.name == "classifier" else ("sgd",):  # it is long enough so
            updates = -(-len(job.x) // 64)
            mine, theirs = turns(make, job, algo, quick, 0.0 if alone else PAUSE.get(name, 0.0))
            scaled = [[1e3 * value / updates for value in values] for values in (mine, theirs)]
            over = quartiles([b / a for a, b in zip(mine, theirs, strict=True)])
            found[f"{job.name}, {algo}"] = [*map(quartiles, scaled), over]
    return found


def draws():
    """Milliseconds of the random numbers that an update takes: noise on the inputs, dropout of the hidden layer."""
    import torch

    sizes = {"input_noise": (64, 784), "hidden_dropout": (64, 100), "hidden_dropout, autoencoder": (64, 1000)}
    kinds = {name: torch.randn if "noise" in name else torch.rand for name in sizes}
    jobs = {name: lambda name=name: kinds[name](sizes[name]) for name in sizes}
    return {name: quartiles(seconds)[1] * 1e3 for name, seconds in paired(jobs, 200).items()}


def keywords(name, quick):
    """Epochs of our estimators with each rule, in turns."""
    made, _ = jobs(quick)
    threads()
    found = {"draws": draws()}
    alone = os.environ.get("BENCH_CPUS", "1") == "1"
    for job in made.values():
        for algo in ("sgd", "adam") if alone and job.name == "classifier" else ("sgd",):
            runs = {rule: Ours(job, algo, compile=True, **given).epochs() for rule, given in KEYWORDS.items()}
            for run in runs.values():
                next(run)
            steps = {rule: lambda run=run: next(run) for rule, run in runs.items()}
            seconds = paired(steps, 2 if quick else 15, budget=2 * BUDGET[job.name])
            updates = -(-len(job.x) // 64)
            found[f"{job.name}, {algo}"] = {
                rule: [
                    quartiles([1e3 * value / updates for value in values]),
                    quartiles([a / b for a, b in zip(values, seconds["none"], strict=True)]),
                ]
                for rule, values in seconds.items()
            }
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, peer = sys.argv[1:3]
    if what == "alone" or "compile" in peer:  # nothing compiled by earlier processes
        cache = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    result = {"alone": alone, "beside": beside, "keywords": keywords}[what](peer, "--quick" in sys.argv)
    print(json.dumps(result))
