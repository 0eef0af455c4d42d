"""What README, the tour and the guide show passes mypy and pyright in strict mode, and wrong lines don't."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import restrain as rs

pytest.importorskip("mypy")
pytest.importorskip("pyright")
ROOT = Path(__file__).parent.parent
SOURCE = Path(rs.__file__).parent.parent

USE = """
from collections.abc import Mapping
from typing import assert_type

import torch

import restrain as rs

assert_type(2 * rs.L1(), rs.Penalty)
assert_type(rs.L1() / 2 + rs.L2(), rs.Penalty)
assert_type(rs.Target(zeros=0.5) * rs.L1(), rs.Penalty)
assert_type(rs.L1() * rs.schedules.WarmUp(5) / 3, rs.Penalty)
assert_type(2 * rs.schedules.WarmUp(5) / 3, rs.schedules.Strength)
assert_type((rs.Target(zeros=0.5) * rs.L1()).on("x"), rs.Rule)
assert_type(1e-3 * rs.L1().on("x") / 2, rs.Rule)
assert_type(1e-3 * rs.Tie("a", "b") + rs.ProductNorm(), rs.NetworkPenalty)
assert_type((1e-3 * rs.Contractive() / 2).on(rs.outputs("x")), rs.Rule)
assert_type(rs.L1()(torch.ones(3)), torch.Tensor)
assert_type(rs.Classifier(hidden=(3,)).fit([[1.0]], [1]), rs.Classifier)
assert_type(rs.Regressor([3, 4]).train(([[1.0]], [1])), rs.Regressor)
model = torch.nn.Linear(3, 2)
with rs.attach(model, "l1") as reg:
    assert_type(reg, rs.Attachment)
    assert_type(reg.loss(torch.ones(())), torch.Tensor)
with rs.scope(weight=rs.L2()):
    assert_type(rs.regularized(torch.nn.Linear(2, 3), weight=rs.L2()), torch.nn.Linear)
rs.load("x").predict([[1.0]])
rs.NM(2, 4, dim="in")
rs.Box(None, 2)
print(rs.activations(model, torch.ones(3))["x"].shape)


class Mine(rs.Penalty):
    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return w.sum()


class Energy(rs.NetworkPenalty):
    def __call__(self, parameters: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.ones(())
"""
WRONG = """import restrain as rs
rs.Clasifier()
rs.L1().onn("x")
(2 * rs.L1()).onn("x")
rs.L1(3)
rs.L1() + 1
rs.L1() / "2"
rs.attach(3)
rs.Box("low")
rs.L1().on("x", how="often")
"""
PAGES = {"readme": "README", "tour": "docs/tour", "guide": "docs/guide"}
# What torch and scikit-learn leave without types; nothing of ours
OF_OTHERS = re.compile(
    r'Type of "(backward|step)" is partially unknown|"?sklearn\.datasets|Type of "[Xy]" is partially'
    r"|is imported more than once"  # the pages' pieces, one after the other
)


def shown(page):
    """The Python blocks of a page, one after the other, as its reader would run them."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL))


def names():
    """A line for each public name."""
    return "import restrain as rs\n" + "".join(f"x{i} = rs.{name}\n" for i, name in enumerate(rs.__all__))


def run(words, folder):
    env = {**os.environ, "MYPYPATH": str(SOURCE), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env, check=False)


def by_mypy(folder, files):
    """[(file, line, message)] of what mypy says of the files, with the settings of pyproject.toml, which are strict."""
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        ROOT / ".mypy_cache",
    ]
    out = run([*words, *files], folder).stdout
    found = re.findall(r"^([^:\n]+):(\d+): error: (.*)$", out, re.MULTILINE)
    assert found or "Success" in out, out
    return [(Path(file).name, int(line), message) for file, line, message in found]


def by_pyright(folder, files):
    """The same of pyright."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(SOURCE)], "include": files}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run([sys.executable, "-m", "pyright", "-p", ".", "--outputjson", "--pythonpath", sys.executable], folder)
    found = [entry for entry in json.loads(done.stdout)["generalDiagnostics"] if entry["severity"] == "error"]
    return [(Path(e["file"]).name, e["range"]["start"]["line"] + 1, e["message"]) for e in found]


@pytest.mark.parametrize("check", [by_mypy, pytest.param(by_pyright, marks=pytest.mark.slow)])
def test_what_is_shown_is_typed(check, tmp_path):
    pages = {f"{name}.py": shown(f"{page}.md") for name, page in PAGES.items()}
    texts = {**pages, "public.py": names(), "use.py": USE, "wrong.py": WRONG}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = check(tmp_path, list(texts))
    assert [f for f in found if f[0] != "wrong.py" and not OF_OTHERS.search(f[2])] == []
    assert {line for name, line, _ in found if name == "wrong.py"} == set(range(2, WRONG.count("\n") + 1))
