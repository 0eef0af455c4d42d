"""CONTRIBUTING's "A new penalty" is followed to the letter in a copy of the project, and nothing else is done there."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "docs", "pyproject.toml", "README.md", "DESIGN.md", "CONTRIBUTING.md", "conftest.py")
TESTS = ("tests/test_matrix.py", "tests/test_docs.py", "tests/test_architecture.py")


def recipe():
    """[(file, block)] of the section, in its order."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## A new penalty")[1].split("\n## ")[0]
    found = re.findall(r"^   (`[^\n]*`)\n   ```\w+\n(.*?)^   ```", text, re.MULTILINE | re.DOTALL)
    return [(path, textwrap.dedent(block)) for names, block in found for path in re.findall(r"`([^`]+)`", names)]


def exported(text, name):
    """A front door that also imports and lists a name, beside its neighbour of the same file."""
    text = text.replace("ElasticNet,", f"{name}, ElasticNet,", 1)
    return text.replace('    "ElasticNet",', f'    "{name}",\n    "ElasticNet",', 1)


def follow(root):
    """Put each block where it belongs."""
    for path, block in recipe():
        file = root / path
        text = file.read_text("utf-8")
        if path.endswith("__init__.py"):
            text = exported(text, block.strip())
        elif path.startswith("tests/cases"):
            end = text.rindex("}\n")  # of the table of cases
            text = text[:end] + "    " + block.strip() + "\n" + text[end:]
        elif path.endswith(".md"):
            rows = text.index("| `Weighted(")
            text = text[:rows] + block + text[rows:]
        else:
            text += "\n\n" + block
        file.write_text(text, "utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "data")
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(
            ROOT / name, root / name, **({"ignore": skip} if (ROOT / name).is_dir() else {})
        )
    follow(root)
    return root


def ran(root, *command):
    given = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=root, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_recipe_names_five_places():
    assert [Path(path).name for path, _ in recipe()] == [
        "entrywise.py", "__init__.py", "__init__.py", "entrywise.py", "entrywise.md"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_copy_passes_what_is_asked_of_a_penalty(copy):
    out = ran(copy, "pytest", "-vv", "-n", "0", "-p", "no:cacheprovider", "-k", "Cauchy or public or docstring", *TESTS)
    assert len(re.findall(r"test_matrix.*Cauchy.* PASSED", out)) > 15
    ran(
        copy,
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--doctest-modules",
        "src/restrain/penalties/entrywise.py",
    )
    ran(copy, "ruff", "format", "--check", "src/restrain/penalties/entrywise.py", "tests/cases/entrywise.py")


def test_it_works_at_every_moment_by_text_and_by_keyword(copy):
    code = """
        import torch, restrain as rs, numpy as np
        from torch import nn
        for how in ("loss", "gradient", "decoupled"):
            m = nn.Linear(3, 2); o = torch.optim.SGD(m.parameters(), lr=.1)
            before = m.weight.abs().sum().item()
            reg = rs.attach(m, 0.5 * rs.Cauchy(0.7).on("weight", how=how), o)
            for _ in range(20):
                o.zero_grad(); reg.loss(0 * m(torch.ones(1, 3)).sum()).backward(); o.step()
            assert m.weight.abs().sum().item() < before, how
            assert rs.Plan.from_dict(reg.plan.to_dict()).rules[0].what == 0.5 * rs.Cauchy(0.7)
        x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
        model = rs.Classifier(hidden=(4,), epochs=2, cauchy=0.1, random_state=0).fit(x, (x[:, 0] > 0).astype(int))
        assert model.history_[-1]["cauchy"] > 0
    """
    given = {**os.environ, "PYTHONPATH": str(copy / "src")}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
