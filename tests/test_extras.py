"""What is public, and what a part of the library says whose packages aren't installed."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import restrain as rs
from restrain.errors import MissingExtraError
from restrain.extras import needing, stand_in

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "models": ("numpy", "sklearn", "safetensors", "tqdm"),
    "devices": ("lightning_fabric",),
    "cli": ("click",),
    "tables": ("pandas", "pyarrow", "openpyxl"),
    "lightning": ("lightning",),
    "huggingface": ("transformers", "accelerate"),
    "skorch": ("skorch",),
    "plots": ("matplotlib",),
    "plans": ("yaml", "tomli_w"),
}
MODELS = ["Autoencoder", "Classifier", "Regressor"]


def without(packages, code):
    """What the code prints, as JSON, in a process where these packages aren't installed."""
    start = f"import sys, json; sys.modules.update(dict.fromkeys({list(packages)!r}))\n"
    run = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# Public names


def test_dir_shows_what_is_public():
    names = set(dir(rs))
    assert set(rs.__all__) <= names
    assert {name for name in names - set(rs.__all__) if not (name.startswith("__") and name.endswith("__"))} == set()
    assert {"__version__", "__doc__", "__all__"} <= names
    assert set(MODELS) <= set(rs.__all__)
    assert rs.__all__ == sorted(rs.__all__)
    assert len(set(rs.__all__)) == len(rs.__all__)
    members = dict(inspect.getmembers(rs))
    assert all(members[name].__module__.startswith("restrain.models") for name in MODELS)
    with pytest.raises(AttributeError, match="no attribute 'Clasifier'"):
        rs.Clasifier  # noqa: B018


def test_all_of_it_is_imported_by_a_star():
    found = {}
    exec("from restrain import *", found)
    assert {name for name in found if name != "__builtins__"} == set(rs.__all__)


# Without the packages


WITHOUT_SKLEARN = """
import inspect
import restrain as rs
import restrain.integrations

names = ["Autoencoder", "Classifier", "Regressor"]
said = {}
try:
    rs.load("model.safetensors")
except rs.errors.MissingExtraError as error:
    said["load"] = str(error)
for name in names:
    assert hasattr(rs, name) and name in dict(inspect.getmembers(rs))
    try:
        getattr(rs, name)([2, 3, 2])
    except ImportError as error:
        assert isinstance(error, rs.errors.MissingExtraError) and error.name == "sklearn", error
        said[name] = str(error)
from restrain import *
from restrain import Classifier

class Mine(rs.Classifier):
    pass

for make in (Classifier, Mine):
    try:
        make(hidden=(3,))
    except rs.errors.MissingExtraError as error:
        said[make.__name__] = str(error)
assert not isinstance(3, rs.Classifier)
assert Classifier.__doc__ == said["Classifier"]
try:
    import restrain.models
except ImportError as error:
    said["import"] = str(error)
print(json.dumps(said))
"""


def test_models_without_scikit_learn():
    said = without(["sklearn"], WITHOUT_SKLEARN)
    assert set(said.values()) == {"restrain.models needs sklearn: pip install 'restrain[models]'"}
    assert set(said) == {*MODELS, "load", "Mine", "import"}


BARE = """
import importlib
said = {}
def note(name, do):
    try:
        do()
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
for name in ("models", "demo", "cli.commands", *("integrations." + s for s in ("lightning", "huggingface", "skorch"))):
    note(name, lambda: importlib.import_module("restrain." + name))
import torch
import restrain as rs
import restrain.cli

class Table:
    def __array__(self, *args, **kwargs):
        raise AssertionError

note("RobustScale", lambda: rs.RobustScale().fit(Table()))
note("pictures", lambda: rs.plots.penalty(rs.L1()))
note("yaml", lambda: rs.Plan.load("tests/x.yaml"))
try:
    restrain.cli.main(["--help"])
except SystemExit as error:
    said["cli"] = ["SystemExit", str(error)]
rs.attach(torch.nn.Linear(3, 2), rs.L1().on("weight"))  # the rest works
print(json.dumps(said))
"""


def test_every_part_says_what_to_install(tmp_path):
    code = BARE.replace("tests/x.yaml", str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_text("rules: []\n")
    said = without([name for names in PACKAGES.values() for name in names], code)
    extras = {
        "models": "models",
        "demo": "demo",
        "cli.commands": "cli",
        "integrations.lightning": "lightning",
        "integrations.huggingface": "huggingface",
        "integrations.skorch": "skorch",
        "RobustScale": "models",
        "pictures": "plots",
        "yaml": "plans",
        "cli": "cli",
    }
    assert set(said) == set(extras)
    for name, extra in extras.items():
        assert said[name][1].count("pip install ") == 1, said[name]
        assert f"pip install 'restrain[{extra}]'" in said[name][1], said[name]
    assert said["cli"] == ["SystemExit", "Error: the command line needs click: pip install 'restrain[cli]'"]
    assert {kind for kind, _ in said.values()} == {"MissingExtraError", "PlanError", "SystemExit"}


PAGE = """
import contextlib, inspect, io, re, pathlib
blocks = re.findall(r"^```python\\n(.*?)^```", pathlib.Path(FILE).read_text("utf-8"), re.M | re.S)
names, ran, missing = {"__name__": "example"}, 0, None
with contextlib.redirect_stdout(io.StringIO()) as shown:
    for block in blocks:
        try:
            exec(compile(block, FILE, "exec"), names)
        except ImportError as error:
            missing = error.name
            break
        ran += 1
rs = names["rs"]
assert hasattr(rs, "Classifier") and all(hasattr(rs, name) for name in rs.__all__)
print(json.dumps([ran, len(blocks), missing, len(shown.getvalue()), len(inspect.getmembers(rs))]))
"""


def test_readme_and_the_tour_run_with_torch_alone():
    """All of README; of the tour all but the last block, which fits models to scikit-learn's digits."""
    packages = {name for names in PACKAGES.values() for name in names}
    ran, blocks, missing, shown, members = without(packages, PAGE.replace("FILE", repr(str(ROOT / "docs/tour.md"))))
    assert (ran, missing) == (blocks - 1, "sklearn.datasets")
    assert ran > 3
    assert shown > 1000
    assert members > len(rs.__all__)
    ran, blocks, missing, shown, _ = without(packages, PAGE.replace("FILE", repr(str(ROOT / "README.md"))))
    assert (ran, missing) == (blocks, None)
    assert shown > 200


def test_only_missing_packages_of_others_are_relabelled():
    with pytest.raises(MissingExtraError, match=r"^it needs no_such: pip install 'restrain\[cli\]'$"):  # noqa: SIM117
        with needing("cli", "it"):
            import no_such.module
    with pytest.raises(MissingExtraError, match=r"^it needs no_such: pip install 'restrain\[cli\]'$"):  # noqa: SIM117
        with needing("cli", "it"), needing("models", "a part of it"):
            import no_such  # noqa: F401
    for wrong in ("import restrain.no_such", "from torch import no_such", "import restrain.engine.no_such", "1 / 0"):
        with pytest.raises((ImportError, ZeroDivisionError)) as caught, needing("cli", "it"):
            exec(wrong)
        assert not isinstance(caught.value, MissingExtraError)
    made = stand_in("Thing", MissingExtraError("a thing needs x", name="x"))
    with pytest.raises(MissingExtraError, match="a thing needs x"):
        made(1, two=2)
    assert made.__name__ == "Thing"


# Each import of an optional package


def bare_imports(sources):
    """Imports of optional packages that nothing around turns into a line to install."""
    optional, faults = {name for names in PACKAGES.values() for name in names}, []

    def look(node, path, guarded):
        if isinstance(node, ast.Import | ast.ImportFrom) and not guarded:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            faults.extend(f"{path}:{node.lineno} {n}" for n in names if n.partition(".")[0] in optional)
        guards = isinstance(node, ast.With) and any("needing(" in ast.unparse(item) for item in node.items)
        guards = guards or (isinstance(node, ast.Try) and "pip install" in ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            look(child, path, guarded or guards)

    for path, source in sources.items():
        look(ast.parse(source), path, False)
    return faults


BEHIND_A_DOOR = (
    "src/restrain/models/",
    "src/restrain/tables/",
    "src/restrain/cli/",
    "src/restrain/demo.py",
)  # imported with `needing` around


def test_no_bare_import():
    paths = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "src").rglob("*.py"))]
    sources = {path: (ROOT / path).read_text("utf-8") for path in paths if not path.startswith(BEHIND_A_DOOR)}
    assert bare_imports(sources) == []
    assert bare_imports({"a.py": "import numpy.linalg"}) == ["a.py:1 numpy.linalg"]
    assert bare_imports({"a.py": "def f():\n    from skorch import x"}) == ["a.py:2 skorch"]
    assert bare_imports({"a.py": "with needing('cli', 'x'):\n    import click"}) == []
    assert bare_imports({"a.py": "with other():\n    import click"}) == ["a.py:2 click"]


def test_the_packages_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"scikit-learn": "sklearn", "pyyaml": "yaml", "tomli-w": "tomli_w", "lightning-fabric": "lightning_fabric"}
    for extra, packages in PACKAGES.items():
        assert {names.get(n, n) for n in extras[extra] if not n.startswith("restrain[")} == set(packages)
