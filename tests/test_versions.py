"""docs/versions.py: an environment for a release of torch, the tests in it, and the page of what they gave."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from restrain.torch_private import MISSING
from scripts import loaded

ROOT = Path(__file__).parent.parent


@pytest.fixture
def versions(tmp_path):
    """The script, with a copy of what it reads of the project."""
    module = loaded(ROOT / "docs" / "versions.py")
    (tmp_path / "constraints.txt").write_text("# why\nnumpy==2.0\ntorch==2.13.0\ntorchao==0.1\nnvidia-nccl-cu13==2\n")
    (tmp_path / "docs").mkdir()
    module.ROOT, module.FOUND = tmp_path, tmp_path / "build" / "versions"
    return module


REPORT = """<testsuites><testsuite>
<testcase classname="tests.penalties.test_a" name="x"/>
<testcase classname="src.restrain.penalties.entrywise" name="doctest"/>
<testcase classname="tests.test_matrix" name="y"><failure message="no">trace</failure></testcase>
<testcase classname="tests.test_everywhere" name="c">
  <properties><property name="group" value="Compiled"/></properties>
  <skipped type="pytest.skip" message="refused: torch 2.10 lacks it">here</skipped></testcase>
<testcase classname="tests.test_everywhere" name="d">
  <properties><property name="group" value="Optimizers"/></properties>
</testcase>
<testcase classname="tests.models.test_b" name="z"><skipped message="needs a GPU"/></testcase>
<testcase classname="tests.nowhere" name="z"><error message="broken"/></testcase>
</testsuite></testsuites>"""


def test_what_a_report_says(versions):
    found, reasons = versions.outcomes(ElementTree.ElementTree(ElementTree.fromstring(REPORT)))
    assert {title: dict(counts) for title, counts in found.items()} == {
        "penalties": {"equal": 2, "failed": 1},
        "compiled": {"refused": 1},
        "other ways of running": {"equal": 1},
        "models": {"skipped": 1},
        "the rest": {"failed": 1},
    }
    assert reasons == {"torch 2.10 lacks it": 1}


def test_the_page(versions):
    versions.FOUND.mkdir(parents=True)
    for torch, tests in (("2.9.1+cpu", {"loss": {"equal": 3, "refused": 2}}), ("2.10.0", {"loss": {"failed": 1}})):
        data = {"torch": torch, "python": "3.11.7", "date": "2026-01-02", "all": torch == "2.10.0", "tests": tests}
        data |= {"refused": {"it\nlacks": 2}, "missing": [["a name", "slower"]]}
        (versions.FOUND / f"{torch}.json").write_text(json.dumps(data))
    versions.write_page()
    lines = (versions.ROOT / "docs" / "versions.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| 2")]
    column = list(versions.GROUPS).index("loss") + 3
    assert [(row[0], row[2], row[column]) for row in rows] == [
        ("| 2.9.1+cpu", "2026-01-02", "= 3, R 2"),
        ("| 2.10.0", "2026-01-02", "**F 1**"),
    ]
    assert "* **torch 2.9.1+cpu, Python 3.11.7**: a sample of the tests." in lines
    assert "* **torch 2.10.0, Python 3.11.7** lacks a name: slower." in lines
    assert "* **torch 2.10.0, Python 3.11.7** refuses, in 2 tests: it lacks" in lines
    assert sum("a sample" in line for line in lines) == 1


class NoReleaseError(Exception):
    """pip found no such release."""


@pytest.mark.parametrize("fails", [False, True])
def test_the_environment_is_taken_away(versions, monkeypatch, fails):
    ran = []

    def run(command, **options):
        ran.append([str(part) for part in command])
        folder = versions.ROOT / "build" / "torch-9.0.0-python3"
        assert folder.is_dir()
        assert (folder / "constraints.txt").read_text() == "# why\nnumpy==2.0\ntorchao==0.1\ntorch==9.0.0\n"
        if fails and "pip" in ran[-1]:
            raise NoReleaseError

    monkeypatch.setattr(versions.subprocess, "run", run)
    try:
        with versions.environment("9.0.0", "python3") as python:
            assert python.parts[-4:-2] == ("torch-9.0.0-python3", "env")
            assert not fails
    except NoReleaseError:
        assert fails
    assert ran[1][-3:] == ["torch==9.0.0", "-e", f"{versions.ROOT}[test]"]
    assert not (versions.ROOT / "build" / "torch-9.0.0-python3").exists()


@pytest.mark.slow
def test_a_run_by_an_environment_that_is_there(versions, monkeypatch):
    """The tests are run by this Python: one that passes, one that fails."""
    (versions.ROOT / "tests").mkdir()
    (versions.ROOT / "tests" / "refusals.py").write_text("")
    (versions.ROOT / "src").symlink_to(ROOT / "src")
    (versions.ROOT / "tests" / "test_x.py").write_text(
        'def test_a(record_property): record_property("group", "Compiled")\ndef test_b(): assert 0\n'
    )
    assert not versions.run_tests(sys.executable, "9.0.0", ["tests/test_x.py", "-W", "error"])
    assert versions.run_tests(sys.executable, "9.0.0", ["tests/test_x.py::test_a", "-W", "error"])
    (path,) = versions.FOUND.iterdir()
    data = json.loads(path.read_text())
    assert data["tests"] == {"compiled": {"equal": 1}}
    assert data["all"] is False
    assert not versions.run_tests(sys.executable, "9.0.0", ["tests/test_x.py", "-W", "error"], add=True)
    assert json.loads(path.read_text())["tests"] == {"compiled": {"equal": 2}, "the rest": {"failed": 1}}
    assert len(data["missing"]) == len(MISSING)


def test_sigterm_takes_the_environment_away(tmp_path):
    code = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("v", {str(ROOT / "docs" / "versions.py")!r})
v = importlib.util.module_from_spec(spec); spec.loader.exec_module(v)
v.ROOT = pathlib.Path({str(tmp_path)!r}); (v.ROOT / "constraints.txt").write_text("")
def run(*args, **options):
    import time
    print("made", flush=True)
    time.sleep(60)
v.subprocess.run = run
sys.argv = ["versions.py", "run", "9.0.0"]
v.main()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "made\n"
        assert list((tmp_path / "build").iterdir())
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert not list((tmp_path / "build").iterdir())
