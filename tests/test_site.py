"""The sources of the site that `make docs` builds; Sphinx isn't needed here."""

import importlib.util
import re
from pathlib import Path, PurePosixPath

import pytest

import restrain as rs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("restrain_reference", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(reference):
    return reference.sources()


def text(sources, path):
    return sources[path].decode()


def test_every_public_name_has_a_page_in_one_group(reference, sources):
    groups = reference.grouped()
    assert sorted(name for names in groups.values() for name in names) == sorted(rs.__all__)
    for key, names in groups.items():
        assert names, key
        listed = re.search(
            r"```{toctree}\n:hidden:\n\n(.*?)\n```", text(sources, f"docs/reference/group-{key}.md"), re.S
        )
        assert listed[1].split("\n") == list(names)
    for name in rs.__all__:
        assert re.match(rf"# {name}\n\n.{{30}}", text(sources, f"docs/reference/{name}.md"), re.S)


def test_a_name_without_a_group_is_an_error(reference):
    for module in ("restrain.elsewhere", "restrain.penalties.entrywise_too", "restrain.penalties"):
        with pytest.raises(LookupError, match=rf"rs\.New of {module} has no group: add"):
            reference.group_of("New", type("New", (), {"__module__": module}))
    assert reference.group_of("New", type("New", (), {"__module__": "restrain.penalties.group"})) == "penalties-entries"


def test_every_module_of_a_group_gives_a_name(reference):
    modules = {reference.module_of(thing) for thing in reference.public().values()}
    for _, _, taken in reference.GROUPS.values():
        for one in taken:
            assert any(f"{module}.".startswith(f"{one}.") for module in modules), one


def test_every_page_is_in_the_contents_once(sources):
    listed = re.findall(
        r"^```{toctree}\n:caption: [^\n]+\n:hidden:\n\n(.*?)\n```", text(sources, "docs/index.md"), re.M | re.S
    )
    names = [name for block in listed for name in block.split("\n")]
    pages = {str(PurePosixPath(p).relative_to("docs").with_suffix("")) for p in sources if p.endswith(".md")}
    assert sorted(names) == sorted({p for p in pages if "/" not in p} - {"index"} | {"reference/index"})


def broken(sources):
    """[(page, link)]: the relative links that lead to no file of the site."""
    found = []
    for page in [path for path in sources if path.endswith(".md")]:
        for link in re.findall(
            r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text(sources, page), flags=re.S)
        ):
            parts = []
            for part in (*PurePosixPath(page).parent.parts, *PurePosixPath(link).parts):
                parts = parts[:-1] if part == ".." else [*parts, part]
            if "/".join(parts) not in sources:
                found.append((page, link))
    return found


def test_relative_links_lead_to_files_of_the_site(sources):
    assert broken(sources) == []
    wrong = {"docs/a.md": b"[x](b.md#c), [y](../a.md), [z](../docs/a.md)"}
    assert broken(wrong) == [("docs/a.md", "b.md"), ("docs/a.md", "../a.md")]


def test_docstrings_become_markdown(reference):
    doc = """Σ_g |x| * 2 <= c, as `L1` and `w[0]`.

    * first of `rs.L2()`,
      continued.
    * second.

    Args:
        a, b: a [number]
            of *any* kind.

    Raises:
        PenaltyError: never.

    >>> rs.L1()
    L1()
    """
    assert reference.markdown(doc, here="L2").split("\n\n") == [
        r"Σ\_g \|x\| \* 2 \<= c, as [`L1`](L1.md) and `w[0]`.",
        "- first of `rs.L2()`, continued.\n- second.",
        "**Arguments**",
        r"- `a, b`: a \[number\] of \*any\* kind.",
        "**Errors**",
        "- {py:exc}`PenaltyError <rs.errors.PenaltyError>`: never.",
        "```pycon\n>>> rs.L1()\nL1()\n```",
    ]


def test_signatures_are_those_of_calls(reference):
    assert reference.signature(rs.L1.prox) == "(w, step=1.0)"
    assert reference.signature(rs.GroupLasso) == "(per='out')"
    assert reference.signature(rs.Classifier).startswith("(layers=None, *, hidden=(100,), activation=")
    assert reference.signature(rs.Classifier).endswith(", **keywords)")


def test_only_what_changed_is_written(reference, tmp_path):
    reference.write(tmp_path)
    page, other = tmp_path / "docs/reference/L1.md", tmp_path / "docs/reference/L2.md"
    (tmp_path / "docs/reference/Gone.md").write_text("old")
    page.write_text("changed")
    before = other.stat().st_mtime_ns
    reference.write(tmp_path)
    assert page.read_text("utf-8").startswith("# L1\n\n````````{py:class} rs.L1()\n\nΣ\\|x\\|")
    assert other.stat().st_mtime_ns == before
    assert not (tmp_path / "docs/reference/Gone.md").exists()
