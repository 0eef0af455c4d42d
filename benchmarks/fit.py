"""What a fit costs, by restrain's estimators and by peers: time an update, first update, time to a loss, memory.

    python benchmarks/fit.py [--quick] [--out folder] [--only "scikit-learn"]

Classifier [784, 100, 10] and Autoencoder [784, 1000, 784] on 10,000 digits, batches of 64, SGD with momentum 0.9 and
Adam. An update is an epoch divided by its updates, so that shuffling, slicing and monitors are counted. Each peer runs
in processes of its own, where its epochs take turns with ours; one thread is a process on one processor. At two
threads, scikit-learn's and ours have a pause between them (PAUSE in fit_child.py): they disturb each other without it.
"""

from fit_child import KEYWORDS, TARGETS
from fit_jobs import jobs
from measure import Section, child, digits, judged, options, times
from peers import PEERS

THREADS = (1, 2)
# Milliseconds an update that theanets 0.8.0pre on Theano 1.0.5 took on another 2-core machine, SGD with momentum 0.9.
THEANETS = {
    "classifier": {
        1: dict(zip(list(KEYWORDS)[:6], (0.336, 0.426, 0.427, 0.348, 1.512, 0.427), strict=True)),
        2: dict(zip(list(KEYWORDS)[:6], (0.302, 0.422, 0.440, 0.333, 1.599, 0.474), strict=True)),
    },
    "autoencoder": {
        1: dict(zip(list(KEYWORDS)[:6], (6.64, 8.93, 8.81, 6.84, 8.23, 7.48), strict=True)),
        2: dict(zip(list(KEYWORDS)[:6], (3.92, 6.61, 6.37, 4.04, 5.53, 5.13), strict=True)),
    },
}
RECORDED = "theanets: recorded elsewhere (theanets 0.8.0pre, Theano 1.0.5, 2-core AMD EPYC), not measured in this run."


def shown(triple):
    low, middle, high = triple
    return f"{digits(middle)} ({digits(low)} – {digits(high)})"


def asked(what, peer, threads, quick):
    """What a child says of a peer."""
    more = ["--quick"] if quick else []
    return child("fit_child.py", what, peer, *more, environment=PEERS[peer][1], cpus=threads, timeout=300)


def an_update(section, peers, quick):
    """Time an update beside every peer; returns what was said of the first updates at one thread."""
    firsts, rows = {}, {job: [] for job in TARGETS}
    for threads in THREADS:
        for peer in peers:
            if threads > 1 and peer.startswith("restrain"):
                continue
            got = asked("beside", peer, threads, quick)
            if threads == 1:
                firsts[peer] = got
            for job in () if peer.startswith("restrain") else TARGETS:
                for algo in ("sgd", "adam"):
                    if "missing" in got and algo == "sgd":
                        rows[job].append([threads, algo, peer, "", f"missing: {got['missing']}", "", ""])
                    if f"{job}, {algo}" in got:
                        ours, theirs, over = got[f"{job}, {algo}"]
                        inverse = tuple(1 / value for value in reversed(over))
                        cells = [shown(ours), shown(theirs), times(inverse), judged(inverse[1], 1)]
                        rows[job].append([threads, algo, peer, *cells])
    columns = ["threads", "algo", "peer", "restrain, ms", "peer, ms", "restrain / peer", "goal"]
    for job, found in rows.items():
        known = ", ".join(f"{THEANETS[job][n]['none']} ms at {n} thread{'s' * (n > 1)}" for n in THREADS)
        note = (
            f"{RECORDED} With SGD {known}. At 2 threads, half a second passes between scikit-learn's epochs and ours; "
            "OpenBLAS's threads wait at full speed after their work, and without it took half of our processors."
        )
        section.table(f"An update, {job}", columns, sorted(found, key=lambda row: (row[0], row[1] != "sgd")), note)
    return firsts


def with_rules(section, quick):
    """Time an update with each rule, against none."""
    for threads in THREADS:
        got = asked("keywords", "restrain", threads, quick)
        rows = [[f"missing: {got['missing']}"] + [""] * 7] if "missing" in got else []
        for key in (key for key in got if key not in ("draws", "missing")):
            job, algo = key.split(", ")
            base = got[key]["none"][0][1]
            for rule, (ms, over) in got[key].items():
                name = f"{rule}, autoencoder" if (rule, job) == ("hidden_dropout", "autoencoder") else rule
                drawn = got["draws"].get(name, 0.0)
                allowed = 1.05 + drawn / base
                verdict = "" if rule in ("none", "all together") else judged(over[1], round(allowed, 2))
                old = THEANETS[job][threads].get(rule) if algo == "sgd" else None
                old = f"{old} ({old / THEANETS[job][threads]['none'] - 1:+.0%})" if old else ""
                rows.append([job, algo, rule, shown(ms), times(over), verdict, digits(drawn) if drawn else "", old])
        columns = ["job", "algo", "rule", "ms", "× none", "goal", "draws alone, ms", "theanets, ms"]
        note = (
            "Goal: 5 % over none, and for noise and dropout the time of their draws alone (`torch.randn`, "
            f"`torch.rand` of that size). {RECORDED}"
        )
        section.table(f"An update with rules, {threads} thread{'s' * (threads > 1)}", columns, rows, note)


def alone(section, peers, firsts, quick):
    """First update, time to a test loss, memory; one thread."""
    rows = []
    for peer in peers:
        got = asked("alone", peer, 1, quick)
        if "missing" in got:
            rows.append([peer, f"missing: {got['missing']}"] + [""] * 6)
            continue
        first = firsts.get(peer, {}).get("first", {})
        cells = []
        for job in TARGETS:
            found = got[job]
            said = f"{found['epochs']} epochs" if found["reached"] else f"not reached, {digits(found['loss'])}"
            cells += [digits(first[job]) if job in first else "", f"{digits(found['seconds'])} ({said})"]
            cells += [f"{found['peak']:.0f} (+{found['peak'] - got['before']:.0f})"]
        rows.append([peer, digits(got["imported"]), *cells])
    columns = ["peer", "import, s"]
    for job, (algo, target) in TARGETS.items():
        columns += [f"{job}: first update, s", f"to test loss {target:g} by {algo}, s", "peak memory, MiB"]
    note = (
        "A fresh process each, without compiled code from earlier ones. First update: from nothing to one update done. "
        "Time to a loss: 8,000 digits to train on, 2,000 held out, looked at after each epoch outside the time; "
        "compilation counts. Memory: the most that the process held, and above what it held after its imports; the "
        "autoencoder ran after the classifier."
    )
    section.table("First update, time to a loss, memory", columns, rows, note)


def main():
    given = options(__doc__, ("--only", {"nargs": "*", "choices": list(PEERS), "help": "these peers"}))
    peers = given.only or list(PEERS)
    text = f"On {jobs(True)[1]}. restrain's own epochs are counted with monitors and progress bar."
    section = Section(__file__, "Fitting models", text)
    firsts = an_update(section, peers, given.quick)
    with_rules(section, given.quick)
    alone(section, peers, firsts, given.quick)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
