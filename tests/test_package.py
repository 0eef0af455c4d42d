"""What a package index shows of the package; `make dist` builds and checks the package itself."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from restrain.torch_private import SEEN
from restrain.versions import OLDEST, TESTED, number
from scripts import loaded

ROOT = Path(__file__).parent.parent
ADDRESS = "https://host/owner/restrain"


@pytest.fixture(scope="module")
def setup():
    return loaded(ROOT / "setup.py")


def test_links_and_pictures_of_readme_get_the_address(setup):
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", setup.absolute(text, ADDRESS))
    assert len(found) == len(re.findall(r"\]\(", text)) > 20
    for picture, link in found:
        path = link.removeprefix(f"{ADDRESS}/{'raw' if picture else 'blob'}/main/")
        assert link.startswith("https://")
        assert path == link or (ROOT / path.partition("#")[0]).exists(), path
    assert setup.absolute(text, "") == text


@pytest.mark.parametrize("link", ["[a](#words)", "[a](https://elsewhere/b)", "[a](mailto:a@b)", "f(x)[0](y z"])
def test_other_links_stay(setup, link):
    assert setup.absolute(link, ADDRESS) == link


def test_addresses_are_those_of_files(setup):
    assert setup.addresses("") == {}
    for link in setup.addresses(ADDRESS).values():
        path = link.removeprefix(f"{ADDRESS}/blob/main/")
        assert path in (ADDRESS, f"{ADDRESS}/issues") or (ROOT / path).exists()


def test_the_version_is_written_once():
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "src/restrain/__init__.py").read_text("utf-8"), re.M)[1]
    assert f'"{version}"' not in (ROOT / "pyproject.toml").read_text("utf-8")


# Versions of torch


@pytest.mark.parametrize(
    ("version", "found"),
    [("2.13.0+cpu", (2, 13)), ("2.15.0a0+git12", (2, 15)), ("3.0.1", (3, 0)), ("made here", OLDEST)],
)
def test_numbers_of_versions(version, found):
    assert number(version) == found


def test_an_old_torch_is_refused_and_a_new_one_warned_of_at_import():
    code = "import torch; torch.__version__ = {!r}; import restrain as rs; print(rs.L1())"
    newest = ".".join(map(str, TESTED[-1]))
    old, new, tested = (imported(code.format(version)) for version in ("1.13.1", "9.0.0", newest))
    assert old.returncode == 1
    assert "VersionError: restrain needs torch" in old.stderr
    assert "pip install 'torch>=" in old.stderr
    assert new.stdout == tested.stdout == "L1()\n"
    assert new.stderr.count("restrain was tested up to torch") == 1
    assert new.stderr.startswith("<string>:1: RestrainWarning")  # the line of the user
    assert tested.stderr == ""


def test_the_least_torch_is_written_alike_everywhere():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert settings["dependencies"] == [f"torch>={'.'.join(map(str, OLDEST))}"]
    assert list(TESTED) == sorted(TESTED)
    releases = re.search(r"^TORCHES := (.+)", (ROOT / "Makefile").read_text("utf-8"), re.M)[1].split()
    assert tuple(map(number, releases)) == TESTED == tuple(map(number, SEEN))


def imported(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
