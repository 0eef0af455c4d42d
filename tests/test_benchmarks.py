"""What the benchmark scripts share is tested here; what they measure is no test's matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import loaded

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts import each other by plain names, as they are run from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("measure", "report"):  # the folder of tests/report has the second name, too
        monkeypatch.delitem(sys.modules, name, raising=False)
    import measure

    import report

    return measure, report


class Clock:
    """Time that only passes where somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_jobs_take_turns_and_the_first_round_is_not_counted(scripts):
    measure, _ = scripts
    clock, ran, costs = Clock(), [], {"a": [9, 1, 2, 3], "b": [9, 2, 2, 9]}

    def job(name):
        ran.append(name)
        clock.now += costs[name].pop(0)

    def before(name):  # outside the time
        clock.now += 100

    jobs = {name: lambda name=name: job(name) for name in costs}
    seconds = measure.paired(jobs, 3, before=before, clock=clock)
    assert ran == ["a", "b"] * 4
    assert seconds == {"a": [1, 2, 3], "b": [2, 2, 9]}
    assert measure.ratios(seconds, "b", "a") == (1.5, 2.0, 2.5)  # of 2, 1, 3


def test_a_budget_ends_the_rounds_but_not_before_the_third(scripts):
    measure, _ = scripts
    clock = Clock()

    def job():
        clock.now += 10

    assert measure.paired({"a": job}, 100, budget=15, clock=clock) == {"a": [10.0] * 3}
    assert len(measure.paired({"a": job}, 100, budget=75, clock=clock)["a"]) == 7


def test_spread_is_quartiles(scripts):
    measure, _ = scripts
    assert measure.quartiles([5, 1, 3, 2, 4]) == (2, 3, 4)
    assert measure.quartiles([7]) == (7, 7, 7)
    assert measure.spread([0.001, 0.002, 0.003], 1e3) == "2 (1.5 – 2.5)"


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"at_most": 1.15}, "≤ 1.15: met"),
        ({"at_most": 1.0}, "≤ 1: **not met**"),
        ({"at_least": 1.1}, "≥ 1.1: met"),
        ({"at_least": 5}, "≥ 5: **not met**"),
        ({}, ""),
    ],
)
def test_goals_are_judged(scripts, goal, said):
    assert scripts[0].judged(1.1, **goal) == said


def section(measure, name, out, **kept):
    made = measure.Section(f"benchmarks/{name}.py", f"On {name}", "Text.")
    made.table("A table", ["form", "ms"], [["plain", 1.5], ["rule", "missing: no such peer"]], "A note.")
    made.pictures += kept.get("pictures", [])
    made.finish(out)


def test_sections_compose_a_page(scripts, tmp_path):
    measure, report = scripts
    found, docs = tmp_path / "found", tmp_path / "docs"
    section(measure, "zebra", found)
    section(measure, "fit", found, pictures=[["fit.png", "a curve"]])
    section(measure, "rules", found)
    (found / "fit.png").write_bytes(b"picture")
    report.main(found, docs)
    page = (docs / "benchmarks.md").read_text("utf-8")
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## On rules", "## On fit", "## On zebra"]
    assert "`benchmarks/rules.py`" in page
    assert "| form | ms |\n| --- | --- |\n| plain | 1.5 |\n| rule | missing: no such peer |\n\nA note." in page
    assert "![a curve](images/fit.png)" in page
    assert (docs / "images" / "fit.png").read_bytes() == b"picture"
    assert f"* date: {measure.machine()['date']}" in page
    assert "torch 2" in page


def test_results_of_two_machines_are_no_page(scripts, tmp_path):
    measure, report = scripts
    section(measure, "rules", tmp_path)
    section(measure, "fit", tmp_path)
    path = tmp_path / "fit.json"
    data = json.loads(path.read_text("utf-8"))
    data["machine"]["processor"] = "another"
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(SystemExit, match="different machines"):
        report.main(tmp_path, tmp_path)


def test_tiny_sizes_are_not_published(scripts, tmp_path):
    measure, report = scripts
    measure.Section("rules.py", "On rules").finish(tmp_path / "found", quick=True)
    report.main(tmp_path / "found", tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
    assert (tmp_path / "found" / "benchmarks.md").exists()


def test_no_results_are_no_page(scripts, tmp_path):
    with pytest.raises(SystemExit, match="make bench"):
        scripts[1].read(tmp_path)


def test_a_child_that_fails_is_a_missing_peer(scripts, tmp_path, capsys):
    measure, _ = scripts
    failing, saying = tmp_path / "failing.py", tmp_path / "saying.py"
    failing.write_text("import no_such_module")
    saying.write_text("import os\nprint('noise')\nprint('{\"cpus\": ' + os.environ['OMP_NUM_THREADS'] + '}')")
    assert "no_such_module" in measure.child(failing)["missing"]
    assert "no_such_module" in capsys.readouterr().err
    assert measure.child(saying, cpus=1) == {"cpus": 1}


def test_every_script_of_the_command_is_there():
    makefile = (BENCHMARKS.parent / "Makefile").read_text("utf-8")
    names = next(line.split()[2:] for line in makefile.splitlines() if line.startswith("BENCH :="))
    assert len(names) == 7
    assert [name for name in names if not (BENCHMARKS / f"{name}.py").exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rules", "steps", "attach", "scaling", "fit", "structured", "ablations"])
def test_scripts_run(name, tmp_path):
    """At tiny sizes; peers that aren't installed are said to be missing."""
    script, more = BENCHMARKS / f"{name}.py", ["--only", "restrain", "PyTorch by hand"] if name == "fit" else []
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent / "src")}
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tables = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["tables"]
    assert tables
    assert all(len(row) == len(table["columns"]) for table in tables for row in table["rows"])


# Twenty tables


def test_ranks_and_paired_errors_of_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = loaded(BENCHMARKS / "tables.py")
    ours, other = {0: 0.5, 1: 0.7, 2: 0.6}, {1: 0.8, 2: 0.9}
    difference, error = tables.paired(other, ours)
    assert difference == pytest.approx(0.2)
    assert error == pytest.approx((0.02 * (1 / 2 + 0.3 / 0.7)) ** 0.5)
    own = {tables.OURS: ours, "a": other, "b": dict(ours), "c": {0: 0.1, 1: 0.1, 2: 0.1}}
    assert tables.ranks(own, higher=True) == {"a": 1.0, tables.OURS: 2.5, "b": 2.5, "c": 4.0}
    assert tables.ranks(own, higher=False)["c"] == 1.0
    assert tables.mean_rank([{tables.OURS: 2.5, "a": 1.0}, {tables.OURS: 1.0, "a": 2.0}], "a") == "1.50 (-0.25 ± 1.25)"
    assert len(tables.CHOOSE) == len(tables.REPORT) == 10
    assert not set(tables.CHOOSE) & set(tables.REPORT)
