"""Writes the sources of the site into build/site: the pages of docs, and docstrings as a reference.

    python docs/reference.py

`make docs` calls this script, then Sphinx, which writes docs/_build/html. Each public name has a
page, in one of GROUPS by the module that defines it; a public name without a group is an error.
Penalties and constraints have a picture there (docs/drawings.py). On the pages of docs, names in
code become links to the reference.
"""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import restrain as rs
from restrain import errors

sys.path.insert(0, str(Path(__file__).resolve().parent))
from drawings import drawing

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "build" / "site"

# page: (title, sentence, modules whose public names stand there); of several the longest decides
GROUPS = {
    "penalties-entries": (
        "What: penalties of entries and groups",
        "Tensor → number. [Entrywise](../entrywise.md), [groups](../groups.md).",
        ("restrain.penalties.entrywise", "restrain.penalties.group", "restrain.penalties.structured"),
    ),
    "penalties-matrices": (
        "What: penalties of matrices and between tensors",
        "Tensors → number. [Matrices](../spectral.md), [between tensors](../relations.md).",
        ("restrain.penalties.spectral", "restrain.penalties.parameter_pairs", "restrain.penalties.stateful"),
    ),
    "penalties-activations": (
        "What: penalties of activations",
        "Activations → number. [Activations](../activations.md), [today's training](../modern-training.md).",
        (
            "restrain.penalties.activity",
            "restrain.penalties.dead_features",
            "restrain.penalties.embeddings",
            "restrain.penalties.logits",
            "restrain.penalties.routing",
            "restrain.penalties.sequences",
            "restrain.penalties.statistics",
            "restrain.penalties.views",
        ),
    ),
    "penalties-derivatives": (
        "What: penalties of derivatives",
        "Derivatives of outputs by inputs → number. [Derivatives](../derivatives.md).",
        ("restrain.penalties.jacobian",),
    ),
    "constraints": (
        "What: constraints",
        "Tensor → nearest tensor of a set. [Constraints](../constraints.md).",
        (
            "restrain.transforms.entries",
            "restrain.transforms.hyperball",
            "restrain.transforms.matrices",
            "restrain.transforms.sets",
            "restrain.transforms.sparsity",
        ),
    ),
    "noise": (
        "What: noise and dropout",
        "Tensor → random tensor of the same shape. [Noise](../noise.md), [today's training](../modern-training.md).",
        (
            "restrain.transforms.dropout",
            "restrain.transforms.noise",
            "restrain.transforms.sharpness",
            "restrain.sampling",
        ),
    ),
    "weights-computed": (
        "What: weights computed or disturbed at each forward",
        "Parameter → weight. [Reparametrization](../reparametrization.md).",
        ("restrain.transforms.weights", "restrain.scale_invariance"),
    ),
    "codes": (
        "What: activation functions of sparse codes",
        "Pre-activations → codes. [Activations](../activations.md#activation-functions-of-sparse-codes).",
        ("restrain.transforms.activation",),
    ),
    "data": (
        "What: data",
        "Data → data of comparable scale, tables → numbers. [Normalization](../normalization.md), "
        "[tables](../models.md#tables).",
        ("restrain.transforms.normalization", "restrain.tables"),
    ),
    "bases": (
        "What: base classes and operations",
        "For penalties and transforms of your own. [Guide](../guide.md).",
        ("restrain.penalties.base", "restrain.transforms.base", "restrain.operations"),
    ),
    "where": (
        "Where: selections",
        "Parameters, outputs and inputs of layers, units, axes. [Guide](../guide.md).",
        ("restrain.selections", "restrain.activation_points", "restrain.unit_sets", "restrain.layouts"),
    ),
    "how": (
        "How: rules, plans, attachments",
        "When a rule acts, and how strongly. [How](../how.md), [strength](../strength.md).",
        ("restrain.engine", "restrain.rules", "restrain.plans", "restrain.declare", "restrain.schedule"),
    ),
    "models": (
        "Models",
        "Estimators with scikit-learn's interface, regularised by keyword. [Models](../models.md).",
        ("restrain.models",),
    ),
    "after": (
        "Paths, smaller networks, pictures",
        "Which strength, how small, what is seen. [Paths](../paths.md), [compaction](../compact.md), "
        "[pictures](../plots.md).",
        ("restrain.paths", "restrain.compaction", "restrain.saved", "restrain.look", "restrain.plots"),
    ),
    "errors": ("Errors", "Errors and warnings, by what was wrong.", ("restrain.errors",)),
}

# Methods that have entries on the page of a class; None for all.
METHODS = {
    "Penalty": ("on", "prox", "has_prox", "gradient", "mean", "shrinks"),
    "NetworkPenalty": ("on",),
    "Transform": ("on",),
    "Constraint": ("project", "separable"),
    "Reparametrization": ("to_free", "from_free"),
    "Rule": ("label", "due"),
    "Plan": None,
    "Attachment": None,
    "Classifier": None,
    "Regressor": None,
    "Autoencoder": None,
    "ClassifierCV": None,
    "TableEncoder": ("fit", "transform", "get_feature_names_out"),
    "RegressorCV": None,
}
MADE_BY_FUNCTIONS = ("Attachment",)  # classes that users don't call
MANY = 40  # parameters: the estimators have one for each penalty and transform


# Public names and their groups


def public():
    """{name: object} of everything in `restrain.__all__`."""
    return {name: getattr(rs, name) for name in rs.__all__}


def module_of(thing):
    """The module that defines an object, as a dotted name; of an instance that of its class."""
    return thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", type(thing).__module__)


def group_of(name, thing):
    """The key of a public object in GROUPS; LookupError if no group takes it."""
    path = f"{module_of(thing)}."
    fitting = {of: key for key, (_, _, all_of) in GROUPS.items() for of in all_of if path.startswith(f"{of}.")}
    if not fitting:
        raise LookupError(f"rs.{name} of {path[:-1]} has no group: add the module to GROUPS in docs/reference.py")
    return fitting[max(fitting, key=len)]


def grouped():
    """{group: {name: object}}, names in alphabetical order."""
    found = {key: {} for key in GROUPS}
    for name, thing in sorted(public().items(), key=lambda pair: pair[0].lower()):
        found[group_of(name, thing)][name] = thing
    return found


def members(module):
    """{name: object}: the classes and functions that a public module defines."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {name: thing for name, thing in found.items() if callable(thing) and module_of(thing) == module.__name__}


# Docstrings as Markdown


def signature(thing):
    """Return the parameters of a call as text, without annotations: "(w, step=1.0)".

    Of more than MANY parameters only those that are positional or named in the docstring.
    """
    given = inspect.signature(thing)
    bare = [one.replace(annotation=one.empty) for one in given.parameters.values()]
    if len(bare) > MANY:
        named = {one.name for one in bare if re.search(rf"^ *{one.name}: ", thing.__doc__ or "", re.MULTILINE)}
        bare = [one for one in bare if one.kind is one.POSITIONAL_OR_KEYWORD or one.name in named]
        bare.append(inspect.Parameter("keywords", inspect.Parameter.VAR_KEYWORD))
    text = str(given.replace(parameters=bare, return_annotation=given.empty))
    return re.sub(r"<[^>]*>", "...", text).replace("(self, ", "(").replace("(self)", "()")


def linked(code, here):
    """Inline code, as a link where it starts with a public name that has another page."""
    name = re.match(r"`(?:rs\.)?(\w+)(?=[`(])", code)
    known = name and name[1] in rs.__all__ and name[1] != here and (code[1:4] == "rs." or not name[1].islower())
    return f"[{code}]({name[1]}.md)" if known else code


def escaped(text, here=""):
    """Text as Markdown that shows it as it is; code between backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    special = r"([\\*_<>\[\]#~$|{}])"
    return "".join(linked(p, here) if p.startswith("`") else re.sub(special, r"\\\1", p) for p in parts)


def items(lines, here, named=True):
    """Lines "name: text", with what is indented below them, as a list."""
    joined = []
    for line in lines:
        if line[:1].strip() or not joined:
            joined.append(line.strip())
        else:
            joined[-1] += f" {line.strip()}"
    shown = []
    for item in joined:
        name, colon, text = item.partition(": ")
        if hasattr(errors, name):
            name = f"{{py:exc}}`{name} <rs.errors.{name}>`"
        elif named and colon and re.fullmatch(r"[*\w, ]+", name):
            name = f"`{name}`"
        else:
            name, text = escaped(item, here), ""
        shown.append(f"- {name}: {escaped(text, here)}" if text else f"- {name}")
    return "\n".join(shown)


def markdown(doc, here=""):
    """A docstring as Markdown: sections and bullets as lists, doctests as code."""
    titles = {"Args": "Arguments", "Raises": "Errors", "Returns": "Returns", "Yields": "Yields"}
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.splitlines()
        head = re.fullmatch(r"(Args|Returns|Raises|Yields):", lines[0])
        if head:
            inner = inspect.cleandoc("\n" + "\n".join(lines[1:])).splitlines()
            if head[1] in ("Returns", "Yields"):
                text = escaped(" ".join(line.strip() for line in inner), here)
            else:
                text = items(inner, here)
            found.append(f"**{titles[head[1]]}**\n\n{text}")
        elif lines[0].startswith(">>>"):
            found.append(f"```pycon\n{block}\n```")
        elif lines[0].startswith("* "):
            bare = [line[2:] if line.startswith("* ") else line for line in lines]
            found.append(items(bare, here, named=False))
        else:
            found.append(escaped("\n".join(line.strip() for line in lines), here))
    return "\n\n".join(found)


def summary(thing, here=""):
    """The first sentence of a docstring, as Markdown."""
    return escaped(inspect.cleandoc(thing.__doc__).split("\n\n")[0].replace("\n", " "), here)


# Entries


def described(kind, head, body, depth=8):
    """A directive of Sphinx's Python domain; entries within it have a smaller depth."""
    fence = "`" * depth
    return f"{fence}{{py:{kind}}} {head}\n\n{body}\n{fence}"


def methods(cls):
    """{name: function or property}: the documented methods of a class that restrain wrote."""
    found = {}
    for base in cls.__mro__:
        for name, value in vars(base).items() if base.__module__.startswith("restrain") else ():
            value = getattr(value, "__func__", value)
            if (
                not name.startswith("_")
                and (inspect.isfunction(value) or isinstance(value, property))
                and value.__doc__
            ):
                found.setdefault(name, value)
    return dict(sorted(found.items()))


def bases(cls):
    """The names of the base classes that have pages."""
    return [base.__name__ for base in cls.__mro__[1:] if getattr(rs, base.__name__, None) is base]


def class_body(cls, name):
    """What stands on a class: its docstring, its bases, its methods."""
    parts = [markdown(cls.__doc__ or "", name)]
    above = bases(cls)
    if above:
        parts.append("Has the methods of " + ", ".join(f"[`{base}`]({base}.md)" for base in above) + ".")
    if name in METHODS:
        own = methods(cls)
        for one in METHODS[name] or own:
            value = own[one]
            kind = "property" if isinstance(value, property) else "method"
            call = "" if kind == "property" else signature(value)
            parts.append(described(kind, f"{one}{call}", markdown(value.__doc__, name), depth=6))
    return "\n\n".join(parts)


def entry(shown, name, thing):
    """The directive of one object, `shown` as users write it."""
    if inspect.isclass(thing):
        kind = "exception" if issubclass(thing, BaseException) else "class"
        call = "" if kind == "exception" or name in MADE_BY_FUNCTIONS else signature(thing)
        return described(kind, f"{shown}{call}", class_body(thing, name))
    if inspect.isfunction(thing):
        return described("function", f"{shown}{signature(thing)}", markdown(thing.__doc__, name))
    return described("data", shown, markdown(thing.__doc__, name))


def page(name, thing, picture=""):
    """The page of a public name; that of a module has an entry for each of its members."""
    if not isinstance(thing, ModuleType):
        return f"# {name}\n\n{entry(f'rs.{name}', name, thing)}\n" + (f"\n{picture}\n" if picture else "")
    within = [entry(f"rs.{name}.{one}", one, member) for one, member in members(thing).items()]
    return f"# {name}\n\n{markdown(thing.__doc__, name)}\n\n" + "\n\n".join(within) + "\n"


def group_page(key, things):
    """The page of a group: a table of its names, each with its first sentence."""
    title, sentence, _ = GROUPS[key]
    rows = "\n".join(f"| [`{name}`]({name}.md) | {summary(thing, name)} |" for name, thing in things.items())
    toc = "\n".join(things)
    table = f"| name | meaning |\n|---|---|\n{rows}"
    return f"# {title}\n\n{sentence}\n\n{table}\n\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n"


QUESTIONS = {
    "What": "What is done: penalties give a number for a tensor, transforms another tensor.",
    "Where": "To which tensors: parameters, outputs and inputs of layers.",
    "How": "At which moment of a training step, how strongly, and who keeps it.",
    "Beyond rules": "Models that are fitted by keyword, paths of strengths, smaller networks, pictures, errors.",
}


def questions():
    """Yield (question, sentence, pages of its groups), by the word before a title's colon."""
    for question, sentence in QUESTIONS.items():
        own = [key for key, (title, _, _) in GROUPS.items() if question_of(title) == question]
        yield question, sentence, "\n".join(f"group-{key}" for key in own)


def question_of(title):
    return title.partition(":")[0] if ":" in title else "Beyond rules"


def pages(pictures=True):
    """{file name: text} of the reference; pictures=False leaves out what takes most of the time."""
    found = {}
    for key, things in grouped().items():
        found[f"group-{key}.md"] = group_page(key, things)
        found |= {f"{n}.md": page(n, thing, drawing(n) if pictures else "") for n, thing in things.items()}
    found["index.md"] = "# Reference\n\nEvery public name, with `import restrain as rs`.\n\n" + "\n".join(
        f"## {title}\n\n{sentence}\n\n```{{toctree}}\n:maxdepth: 2\n\n{toc}\n```\n"
        for title, sentence, toc in questions()
    )
    return found


# Links from the pages of docs

# What stays as it is: blocks of code, links and pictures; headings begin a section; code may be
# a name.
_PARTS = re.compile(
    r"(?P<kept>^(`{3,}).*?^\2$|!?\[(?:[^\[\]`]|`[^`]*`|\[[^\]]*\])*\]\([^)]*\))|(?P<head>^#+ .*?$)|(?P<code>`[^`\n]+`)",
    re.MULTILINE | re.DOTALL,
)


def with_links(text, folder="reference"):
    """A page of docs whose code leads to the reference, the first time that a section has a name.

    Args:
        text: the page.
        folder: the folder of the reference, as seen from the page.
    """
    seen = set()

    def part(found):
        if found["head"]:
            seen.clear()
        if not found["code"]:
            return found[0]
        name, link = target(found["code"], folder)
        if name is None or name in seen:
            return found[0]
        seen.add(name)
        return link

    return _PARTS.sub(part, text)


def target(code, folder):
    """(The name that code starts with, the code as a link to its page), or (None, the code)."""
    found = re.match(r"`(rs\.)?(\w+)(?:\.(\w+))?(?=[`(. ])", code)
    if found is None:
        return None, code
    rs_, name, member = found.groups()
    if not rs_ and name == "reg" and member in methods(rs.Attachment) and not re.search(r"[<>|]", code):
        return f"reg.{member}", f"{{py:obj}}`{code[1:-1]} <rs.Attachment.{member}>`"
    if name in rs.__all__ and (rs_ or (not name.islower() and member is None)):
        return name, f"[{code}]({folder}/{name}.md)"
    return None, code


# Files


def sources(pictures=True):
    """Return {path: bytes} of the site: docs, what they link to, the reference, the changelog."""
    kinds = (
        ("docs", "*.md"),
        ("docs/tutorials", "*.md"),
        ("docs/images", "*"),
        ("examples", "*.py"),
    )
    files = [path for folder, pattern in kinds for path in (ROOT / folder).glob(pattern)]
    found = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}
    for name in [name for name in found if name.endswith(".md")]:
        folder = "../reference" if "/tutorials/" in name else "reference"
        found[name] = with_links(found[name].decode(), folder).encode()
    found |= {f"docs/reference/{name}": text.encode() for name, text in pages(pictures).items()}
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "](")
    return found | {"docs/changelog.md": changes.encode()}


def write(folder, pictures=True):
    """Write the sources into a folder and delete all else there.

    Unchanged files keep their time, so that Sphinx reads only what changed.
    """
    new = sources(pictures)
    for old in [path for path in folder.rglob("*") if path.is_file()]:
        if old.relative_to(folder).as_posix() not in new:
            old.unlink()
    for name, content in new.items():
        file = folder / name
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


if __name__ == "__main__":
    write(SOURCES)
