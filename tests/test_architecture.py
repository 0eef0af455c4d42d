"""The house rules that a machine can check; each check is itself tested on something that breaks it."""

import ast
import inspect
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent

# A module imports from its own row and from those above. The empty name is restrain/__init__.py.
ROWS = [
    {"errors", "registry", "fields", "garbage"},
    {"sites"},
    {"axes"},
    {"select"},
    {"places", "schedule"},
    {"rules"},
    {"penalties"},
    {"transforms"},
    {"plandata", "plans", "declare"},
    {"engine"},
    {"look", "sampling"},
    {"models"},
    {"integrations"},
    {"plots"},
    {"study", "demo", "cli", "__main__", ""},
]
MAX_FILE, MAX_FUNCTION = 399, 39  # lines


def read(*folders):
    """{path relative to src or to the repository: source} of every Python file in the folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix().removeprefix("src/"): path.read_text("utf-8") for path in paths}


# Layers


def module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def runtime_imports(node):
    """Every import statement below a node, those in functions too, but not those for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from runtime_imports(ast.Module(child.orelse, []))
        else:
            yield from runtime_imports(child)


def imported_modules(path, source, known):
    """Modules of restrain that a file imports; `from package import x` means package.x where that is one."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    found = set()
    for node in runtime_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        parts = package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join([*parts, *filter(None, [node.module])])
        names = {f"{base}.{alias.name}" for alias in node.names}
        found |= {name if name in known else base for name in names}
    return {name for name in found if name.split(".")[0] == "restrain"}


def row(module):
    top = [*module.split("."), ""][1]
    return next((number for number, names in enumerate(ROWS) if top in names), None)


def layering_faults(sources):
    known = {module_name(path) for path in sources}
    graph = {module_name(path): imported_modules(path, text, known) for path, text in sources.items()}
    faults = [f"{module} has no row" for module in sorted(graph) if row(module) is None]
    for module, targets in graph.items():
        if row(module) is not None:
            upward = [target for target in targets if (row(target) or 0) > row(module)]
            faults += [f"{module} imports {target}, which is above it" for target in sorted(upward)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append("import cycle: " + " <- ".join(error.args[1]))
    return faults


def test_modules_import_only_from_rows_above():
    assert layering_faults(read("src")) == []


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"restrain/select.py": "from restrain.rules import Rule", "restrain/rules.py": ""}, "above"),
        ({"restrain/select.py": "from .rules import Rule", "restrain/rules.py": ""}, "above"),
        ({"restrain/select.py": "from . import rules", "restrain/rules.py": ""}, "above"),
        ({"restrain/rules.py": "from .penalties import L1"}, "above"),
        ({"restrain/penalties/__init__.py": "def f():\n    import restrain.engine"}, "above"),
        ({"restrain/rules.py": "if TYPE_CHECKING:\n    pass\nelse:\n    import restrain.cli"}, "above"),
        ({"restrain/rules.py": "import restrain", "restrain/__init__.py": ""}, "above"),
        ({"restrain/misc.py": ""}, "no row"),
        ({"restrain/engine/a.py": "from .b import x", "restrain/engine/b.py": "from .a import x"}, "cycle"),
        ({"restrain/look/__init__.py": "from .a import x", "restrain/look/a.py": "from . import x"}, "cycle"),
    ],
)
def test_layering_check_notices(sources, fault):
    assert any(fault in line for line in layering_faults(sources))


def test_layering_check_lets_pass():
    sources = {
        "restrain/__init__.py": "from .penalties import L1",
        "restrain/errors.py": "import torch.nn",
        "restrain/penalties/__init__.py": "from .base import Penalty\nfrom .entrywise import L1",
        "restrain/penalties/base.py": "if typing.TYPE_CHECKING:\n    from restrain.engine import attach",
        "restrain/penalties/entrywise.py": "from . import base\nfrom restrain import errors",
        "restrain/transforms/base.py": "from ..rules import What\nimport restrain.errors as e",
        "restrain/demo.py": "import restrain as rs",
    }
    assert layering_faults(sources) == []


# Sizes


def function_length(node):
    """Lines from `def` to the end, without the docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def size_faults(sources):
    faults = []
    for path, source in sources.items():
        if (lines := len(source.splitlines())) > MAX_FILE:
            faults.append(f"{path} has {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (lines := function_length(node)) > MAX_FUNCTION:
                faults.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    return faults


def test_files_and_functions_are_short():
    assert size_faults(read("src", "tests", "benchmarks", "examples")) == []


def test_size_check_notices():
    doc = '    """One.\n\n    Three.\n    """\n'
    long, short = "    x = 1\n" * MAX_FUNCTION, "    x = 1\n" * (MAX_FUNCTION - 1)
    method = "class C:\n    async def m(self):\n" + "        x = 1\n" * MAX_FUNCTION
    assert len(size_faults({"a.py": f"def f():\n{doc}{long}", "b.py": method})) == 2
    assert size_faults({"a.py": f"@wraps(g)\ndef f():\n{doc}{short}"}) == []
    assert size_faults({"a.py": "x = 1\n" * MAX_FILE}) == []
    assert size_faults({"a.py": "x = 1\n" * (MAX_FILE + 1)}) == ["a.py has 400 lines"]


# What an import costs


@cache
def loaded_by(modules):
    """Names of the top-level packages that are loaded after `import modules` in a fresh interpreter."""
    code = f"import sys, {modules}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def loaded_beyond_torch(modules):
    return loaded_by(modules) - loaded_by("torch") - sys.stdlib_module_names


def test_import_is_light():
    assert loaded_beyond_torch("restrain") == {"restrain"}


@pytest.mark.parametrize("heavy", ["yaml", "sklearn", "matplotlib"])
def test_import_check_notices(heavy):
    assert heavy in loaded_beyond_torch(f"torch, {heavy}")


# Documentation


def undocumented(package):
    """Public names, and public methods of public classes, without a docstring.

    The signature that a dataclass puts there is none. A method may leave it to the one that it overrides.
    """
    faults = []
    for name in package.__all__:
        thing = getattr(package, name)
        doc = (thing.__doc__ or "").strip()
        if not doc or doc.startswith(f"{name}("):
            faults.append(name)
        if inspect.isclass(thing):
            methods = [key for key, value in vars(thing).items() if key[0] != "_" and is_method(value)]
            faults += [f"{name}.{key}" for key in methods if not any(method_docs(thing, key))]
    return faults


def is_method(value):
    return isinstance(value, FunctionType | property | classmethod | staticmethod)


def method_docs(cls, key):
    return [vars(base)[key].__doc__ for base in cls.__mro__ if key in vars(base)]


def test_public_names_have_docstrings():
    import restrain

    assert undocumented(restrain) == []


def test_docstring_check_notices():
    @dataclass
    class Bare:
        x: int

    class Base:
        """Documented."""

        def method(self):
            """Documented."""

        def missing(self): ...

    @dataclass
    class Leaf(Base):
        """Documented."""

        def __call__(self): ...
        def _private(self): ...
        def method(self): ...
        @property
        def also_missing(self): ...

    things = {"Bare": Bare, "Base": Base, "Leaf": Leaf, "function": lambda: None}
    package = SimpleNamespace(__all__=list(things), **things)
    assert undocumented(package) == ["Bare", "Base.missing", "Leaf.also_missing", "function"]
