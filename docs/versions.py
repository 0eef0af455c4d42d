"""Runs the tests on a release of torch, in an environment of its own, and writes docs/versions.md.

    python docs/versions.py run 2.15.0 [--python python3.13] [-n 2] [pytest's arguments]
    python docs/versions.py page

`run` makes the environment in build/ and takes it away, also when something fails or is
interrupted. Without arguments for pytest the whole fast suite is run, with the sample of the
matrix. pip takes the build of torch that its configuration gives: for the CPU's alone,
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; where a configuration caps torch,
PIP_CONFIG_FILE=/dev/null. `make test-torch` and `make test-torches` call this script, which needs
nothing but Python.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FOUND = ROOT / "build" / "versions"  # a file of results for each version
GROUPS = {  # title: beginnings of the tests' ids; the first that fits
    "penalties": ("tests.penalties", "tests.test_matrix", "tests.test_operations"),
    "transforms": ("tests.transforms",),
    "selections, plans, declared rules": ("tests.selections", "tests.plans"),
    "loss": ("tests.engine.loss", "tests.engine.forward", "tests.engine.strengths"),
    "optimizer's step": ("tests.engine.step", "tests.engine.ops", "tests.engine.backends"),
    "attachments": ("tests.engine.attach", "tests.engine.binding", "tests.engine.weights"),
    "compiled": ("Compiled",),
    "several processes": ("Several processes", "tests.engine.distributed"),
    "other ways of running": ("tests.test_everywhere", "tests.test_mixtures", "tests.test_situations"),
    "compaction": ("tests.compaction",),
    "models": ("tests.models",),
    "trainers": ("tests.integrations", "tests.test_examples", "tests.test_gpt_example"),
    "command line": ("tests.cli",),
    "the rest": ("",),
}
HEAD = """# Releases of torch and Python

What the tests found, release by release. This page is written by `make test-torches`; `make test-torch TORCH=2.15.0`
runs one release, in an environment of its own.

`=` equal: so many tests passed · `R` refused, by a `VersionError` that names the releases which can · **F** failed ·
empty: not run

"""


# Running


@contextlib.contextmanager
def environment(torch, python):
    """The Python of a new environment with a release of torch and the tests' needs."""
    folder = ROOT / "build" / f"torch-{torch}-{Path(python).name}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        free = folder / "constraints.txt"  # torch brings its own versions of these
        others = [line for line in pinned if not line.lower().startswith(("torch==", "triton", "nvidia", "setuptools"))]
        free.write_text("\n".join([*others, f"torch=={torch}"]) + "\n", "utf-8")
        subprocess.run([python, "-m", "venv", folder / "env"], check=True)
        found = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = [found, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", free]
        subprocess.run([*pip, f"torch=={torch}", "-e", f"{ROOT}[test]"], check=True)
        yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_tests(python, torch, arguments, add=False, jobs=None):
    """Run the tests by this Python; write or add the counts, return whether none failed."""
    FOUND.mkdir(parents=True, exist_ok=True)
    about = "import json, platform, torch; print(json.dumps([torch.__version__, platform.python_version()]))"
    versions = json.loads(subprocess.run([python, "-c", about], check=True, capture_output=True, text=True).stdout)
    report = FOUND / f"{torch}.xml"
    command = [python, "-m", "pytest", "-m", "not slow", "-p", "refusals", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1"]  # the one with the group of a cell
    command += ["-W", "ignore:restrain was tested up to torch", *arguments]  # a newer release is tried by this
    command += ["-n", jobs] if jobs else []
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    with_paths = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=with_paths, check=False)
    tests, refused = outcomes(ElementTree.parse(report))
    path = FOUND / f"{torch}-{'.'.join(versions[1].split('.')[:2])}.json"
    if add and path.exists():
        before = json.loads(path.read_text("utf-8"))
        refused = Counter(refused) + Counter(before["refused"])
        for title, counts in before["tests"].items():
            tests[title] = Counter(counts) + tests.get(title, Counter())
    data = {
        "torch": versions[0],
        "python": versions[1],
        "date": datetime.date.today().isoformat(),
        "all": not arguments,
        "tests": {title: dict(counts) for title, counts in tests.items()},
        "refused": refused,
        "missing": missing(python, with_paths),
    }
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
    report.unlink()
    return done.returncode == 0


def outcomes(report):
    """({group: {outcome: count}}, {reason: count} of the refused tests) of pytest's report."""
    found, reasons = {}, Counter()
    for case in report.iter("testcase"):
        group = next((one.get("value") for one in case.iter("property") if one.get("name") == "group"), "")
        outcome = "equal"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed"
            elif child.tag == "skipped":
                said = child.get("message") or ""
                outcome = "refused" if said.startswith("refused: ") else "skipped"
                reasons.update([said.removeprefix("refused: ")] * (outcome == "refused"))
        found.setdefault(title_of(case.get("classname") or "", group), Counter())[outcome] += 1
    return found, dict(reasons)


def title_of(place, group):
    """The group of a test: by its column in the matrix, or by its place."""
    place = place.replace("src.restrain", "tests")  # doctests
    fits = (title for title, starts in GROUPS.items() if group and group in starts)
    by_place = (title for title, starts in GROUPS.items() if place.startswith(starts))
    return next(fits, None) or next(by_place)


def missing(python, variables):
    """[(what it stands for, what happens without it)] of capabilities that this torch lacks."""
    code = (
        "import json, warnings; warnings.simplefilter('ignore'); import restrain.torch_private as p; "
        "print(json.dumps([p.TABLE[name][1:3] for name in p.TABLE if name in p.MISSING]))"
    )
    done = subprocess.run([python, "-c", code], env=variables, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


# The page


def page(results):
    """docs/versions.md of the results of some versions."""
    yield HEAD + f"| torch | Python | date | {' | '.join(GROUPS)} |\n|---|---|---|{'---|' * len(GROUPS)}"
    for data in results:
        cells = [sign(data["tests"].get(title, {})) for title in GROUPS]
        yield f"| {data['torch']} | {data['python']} | {data['date']} | {' | '.join(cells)} |"
    yield ""
    for data in results:
        name = f"torch {data['torch']}, Python {data['python']}"
        if not data["all"]:
            yield f"* **{name}**: a sample of the tests."
        for stands_for, without in data["missing"]:
            yield f"* **{name}** lacks {stands_for}: {without}."
        for reason, count in data["refused"].items():
            yield f"* **{name}** refuses, in {count} test{'s' * (count > 1)}: {' '.join(reason.split())}"


def sign(counts):
    """A cell: how many tests were equal, refused, failed."""
    shown = {"equal": "= {}", "refused": "R {}", "failed": "**F {}**"}
    return ", ".join(text.format(counts[outcome]) for outcome, text in shown.items() if counts.get(outcome))


def by_version(data):
    """Where a version stands: by its numbers."""
    numbers = [data[name].partition("+")[0].split(".") for name in ("torch", "python")]
    return [[int(part) if part.isdigit() else 0 for part in one] for one in numbers]


def write_page():
    results = [json.loads(path.read_text("utf-8")) for path in FOUND.glob("*.json")]
    text = "\n".join(page(sorted(results, key=by_version))).rstrip() + "\n"
    (ROOT / "docs" / "versions.md").write_text(text, "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("torch", nargs="?", help="a release, such as 2.15.0")
    parser.add_argument("--python", default=sys.executable, help="the interpreter, such as python3.13")
    parser.add_argument("--environment", help="a Python that has it all already; it stays")
    parser.add_argument("--add", action="store_true", help="to what earlier runs of this version gave")
    parser.add_argument("-n", dest="jobs", help="so many processes of pytest")
    given, arguments = parser.parse_known_args()
    if given.what == "page":
        write_page()
        return
    if not given.torch:
        parser.error("which release of torch? Such as: run 2.15.0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the environment is taken away
    ready = contextlib.nullcontext(given.environment) if given.environment else environment(given.torch, given.python)
    with ready as python:
        passed = run_tests(python, given.torch, arguments, given.add, given.jobs)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
