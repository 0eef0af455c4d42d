"""The house rules that a machine can check; each check is itself tested on something that breaks it."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent

LONG_FILE, MAX_FUNCTION = 600, 39  # lines


def read(*folders):
    """{path relative to src or to the repository: source} of every Python file in the folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix().removeprefix("src/"): path.read_text("utf-8") for path in paths}


# The way of the data


def table(page):
    """{module: (its package, its rank there)} of the table in DESIGN.md."""
    places, package, rank, inside = {}, "", 0, ""
    block = page.partition("## The way of the data")[2].partition("```")[2].partition("```")[0]
    for line in filter(str.strip, block.splitlines()):
        head, rest = line[:23].strip(), line[23:]
        if head:
            inside = "engine." if line.startswith("  ") else ""
            package, rank = ("restrain" if head == "restrain" else f"restrain.{inside}{head}"), 0
        for word in rest.split():
            if word == "→":
                rank += 1
            elif package == "restrain" and word == "__init__":
                places["restrain"] = ("restrain", rank)
            else:
                places[f"{package}.{word}"] = (package, rank)
    return places


def module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def all_imports(path, source, known):
    """Modules of restrain that a file imports, for types too; from package import x may be of a module x."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            inside = package == base or package.startswith(f"{base}.")  # elsewhere, what a front door offers
            found |= {name if name in known and inside else base for name in names}
    return {name for name in found if name.split(".")[0] == "restrain"}


def child(package, module):
    """The member of a package that a module is, or is in; None for the package itself and for modules elsewhere."""
    if not module.startswith(f"{package}."):
        return None
    return ".".join(module.split(".")[: package.count(".") + 2])


OPEN = {"restrain.penalties", "restrain.transforms"}  # packages whose files others may name


def edge_faults(module, target, places):
    """What is wrong with one import: it goes against the table, or past a front door."""
    if child(module, target):  # a front door knows all of its own files
        return
    packages = {package for package, _ in places.values()}
    common = max((p for p in packages if child(p, module) and (child(p, target) or p == target)), key=len, default=None)
    if common is None:
        return
    here, there = child(common, module), child(common, target) or common
    if here in places and there in places and places[there][1] >= places[here][1]:
        yield f"{module} imports {target}, which doesn't stand before it"
    if there == common and common != "restrain":
        yield f"{module} imports the front door of its own package"
    if there != target and there in packages and there not in OPEN:
        yield f"{module} imports {target}, past the front door of {there}"


def layering_faults(sources, page):
    known, places = {module_name(path) for path in sources}, table(page)
    graph = {module_name(path): all_imports(path, text, known) for path, text in sources.items()}
    faults = [f"{module} isn't in the table" for module in sorted(known - set(places))]
    faults += [f"{module} is in the table, but doesn't exist" for module in sorted(set(places) - known)]
    for module, targets in graph.items():
        for target in sorted(targets - {module}):
            faults += edge_faults(module, target, places)
    try:
        TopologicalSorter({module: targets - {module} for module, targets in graph.items()}).prepare()
    except CycleError as error:
        faults.append("import cycle: " + " <- ".join(error.args[1]))
    return faults


def test_imports_go_the_way_of_the_data():
    assert layering_faults(read("src"), (ROOT / "DESIGN.md").read_text("utf-8")) == []


PAGE = """## The way of the data
```
restrain               errors → rules → penalties → engine → models → __init__
penalties              base → l1 other
engine                 core → step
  core                 hooks memory
  step                 clock → stepper
models                 fit
```
"""
FILES = {
    f"restrain/{name}.py": ""
    for name in [
        "__init__",
        "errors",
        "rules",
        "penalties/__init__",
        "penalties/base",
        "penalties/l1",
        "penalties/other",
        "engine/__init__",
        "engine/core/__init__",
        "engine/core/hooks",
        "engine/core/memory",
        "engine/step/__init__",
        "engine/step/clock",
        "engine/step/stepper",
        "models/__init__",
        "models/fit",
    ]
}


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("errors", "from restrain.rules import Rule", "before"),
        ("errors", "from .rules import Rule", "before"),
        ("errors", "from . import rules", "before"),
        ("rules", "from .penalties import L1", "before"),
        ("rules", "if TYPE_CHECKING:\n    from restrain.penalties import L1", "before"),
        ("penalties/__init__", "def f():\n    import restrain.engine", "before"),
        ("penalties/base", "from restrain.penalties.l1 import L1", "before"),
        ("penalties/other", "from restrain.penalties.l1 import L1", "before"),
        ("engine/core/hooks", "from restrain.engine.step import x", "before"),
        ("engine/core/hooks", "from restrain.engine.core.memory import x", "before"),
        (
            "engine/step/clock",
            "from restrain.engine.core.hooks import x",
            "past the front door of restrain.engine.core",
        ),
        ("models/fit", "from restrain.engine.core import x", "past the front door of restrain.engine"),
        ("rules", "import restrain", "before"),
        ("extra", "", "isn't in the table"),
        ("penalties/base", "from restrain.penalties import L1", "cycle"),
    ],
)
def test_layering_check_notices(file, source, fault):
    doors = {"restrain/penalties/__init__.py": "from restrain.penalties.base import x"}
    found = layering_faults(FILES | doors | {f"restrain/{file}.py": source}, PAGE)
    assert any(fault in line for line in found), found


def test_layering_check_misses_a_file():
    assert layering_faults({k: v for k, v in FILES.items() if "fit" not in k}, PAGE) == [
        "restrain.models.fit is in the table, but doesn't exist"
    ]


def test_layering_check_lets_pass():
    sources = {
        "restrain/__init__.py": "from restrain.engine import attach\nfrom .penalties import L1",
        "restrain/rules.py": "import torch.nn\nfrom restrain import errors",
        "restrain/penalties/l1.py": "from . import base\nfrom restrain import errors",
        "restrain/engine/__init__.py": "from restrain.engine.step import x",
        "restrain/engine/step/__init__.py": "from restrain.engine.step.stepper import x",
        "restrain/engine/step/stepper.py": "from .clock import x\nfrom restrain.engine.core import y",
        "restrain/engine/step/clock.py": "from restrain.penalties.base import z",
        "restrain/models/fit.py": "from restrain.engine import attach\nimport restrain.errors as e",
    }
    assert layering_faults(FILES | sources, PAGE) == []


# What another layer needs is a method with a name

ABOVE = ("src/restrain/models", "src/restrain/integrations", "src/restrain/cli")
OF_OTHERS = re.compile(  # private names of torch and of trainers, not of the engine
    r"_optimizer_step_(pre|post)_hooks|_fused_\w+_|_patch_step_function|_linear_pointwise|_inductor|_logger_connector|"
    r"_should_accumulate|_get_output_dir|_trial|_optimizers"
)


def private_faults(sources):
    """Private attributes of anything but the object itself."""
    faults = []
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if private and not OF_OTHERS.fullmatch(node.attr) and ast.unparse(node.value) not in OWN:
                faults.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return faults


OWN = {"self", "cls", "super()"}


def test_no_private_attribute_of_the_engine():
    assert private_faults(read(*ABOVE)) == []
    assert private_faults({"a.py": "def f(reg):\n    return reg._bounds"}) == ["a.py:2 reg._bounds"]
    assert private_faults({"a.py": "self._x = torch._fused_sgd_"}) == []


# Sizes


def function_length(node):
    """Lines from `def` to the end, without the docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def size_faults(sources):
    return [
        f"{path}:{node.lineno} {node.name} has {lines} lines"
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := function_length(node)) > MAX_FUNCTION
    ]


def test_functions_are_short():
    assert size_faults(read("src", "tests", "benchmarks", "examples")) == []


def test_long_files_are_told(capsys):
    """A file is a concept, whatever its length; a long one is worth a look."""
    long = {path: lines for path, source in read("src").items() if (lines := len(source.splitlines())) > LONG_FILE}
    with capsys.disabled():
        for path, lines in long.items():
            print(f"\n{path} has {lines} lines: is it one concept?", end=" ")


def test_size_check_notices():
    doc = '    """One.\n\n    Three.\n    """\n'
    long, short = "    x = 1\n" * MAX_FUNCTION, "    x = 1\n" * (MAX_FUNCTION - 1)
    method = "class C:\n    async def m(self):\n" + "        x = 1\n" * MAX_FUNCTION
    assert len(size_faults({"a.py": f"def f():\n{doc}{long}", "b.py": method})) == 2
    assert size_faults({"a.py": f"@wraps(g)\ndef f():\n{doc}{short}"}) == []


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


def test_warnings_point_to_the_users_line():
    """A number of frames is right on one way only: `level_of_caller` counts them."""
    found = [name for name, source in read("src").items() if re.search(r"stacklevel=\d", source)]
    assert found == ["restrain/versions.py"]  # at import, where the caller is the import statement


MAKERS = [
    "zeros",
    "ones",
    "tensor",
    "arange",
    "empty",
    "full",
    "rand",
    "randn",
    "eye",
    "linspace",
    "randint",
    "randperm",
]


def without_device(source):
    """The lines of calls that make a tensor on the default device, which may be another one than the model's."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in MAKERS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def test_no_tensor_is_made_on_the_default_device():
    found = {module: lines for module, source in read("src").items() if (lines := without_device(source))}
    assert {name for name in found if not name.endswith(("demo.py", "transforms/normalization.py"))} == set()


def test_device_check_notices():
    assert without_device("x = torch.zeros(3)\ny = torch.zeros(3, device=d)\nz = y.new_zeros(3)") == [1]
