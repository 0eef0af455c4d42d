"""The sources of the site that `make docs` builds; Sphinx isn't needed here."""

import inspect
import re
import sys
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

import restrain as rs
from report.pages import contrast
from scripts import loaded

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference():
    return loaded(ROOT / "docs/reference.py")


@pytest.fixture(scope="module")
def sources(reference):
    return reference.sources(pictures=False)


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


def test_the_reference_is_grouped_by_what_where_and_how(reference, sources):
    index = text(sources, "docs/reference/index.md")
    assert re.findall(r"^## (.+)", index, re.M) == ["What", "Where", "How", "Beyond rules"]
    listed = re.findall(r"^group-(.+)", index, re.M)
    assert sorted(listed) == sorted(reference.GROUPS)
    what = index.split("## What")[1].split("## Where")[0]
    assert {"group-penalties-entries", "group-constraints", "group-noise"} <= set(what.split())
    assert "group-where" in index.split("## Where")[1].split("## How")[0]


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
    own = {p for p in pages if not p.startswith("reference/")} - {"index"}
    assert sorted(names) == sorted(own | {"reference/index"})
    assert sum(name.startswith("tutorials/") for name in names) == 5


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
    assert reference.signature(rs.Classifier).startswith("(layers=None, *, hidden='auto', activation=")
    assert reference.signature(rs.Classifier).endswith(", **keywords)")


# Links from pages into the reference


WRITTEN = """# `L1` stays in a heading

`rs.L1()` and again `rs.L1`, `L2()`, `path`,
`rs.path(model)`, `a.L1`,
`reg.report("a.html")`, `reg.nothing`, [`L2`](other.md), ![a picture of `L1`](b.png).

## Another section

`rs.L1()`

```python
`rs.L2()`
```
"""
LINKED = """# `L1` stays in a heading

[`rs.L1()`](reference/L1.md) and again `rs.L1`, [`L2()`](reference/L2.md), `path`,
[`rs.path(model)`](reference/path.md), `a.L1`,
{py:obj}`reg.report("a.html") <rs.Attachment.report>`, `reg.nothing`, [`L2`](other.md), ![a picture of `L1`](b.png).

## Another section

[`rs.L1()`](reference/L1.md)

```python
`rs.L2()`
```
"""


def test_code_on_pages_leads_to_the_reference(reference):
    assert reference.with_links(WRITTEN) == LINKED
    assert "](../reference/L1.md)" in reference.with_links(WRITTEN, "../reference")


def test_pages_lead_into_the_reference(sources):
    guide = text(sources, "docs/guide.md")
    assert guide.count("](reference/") > 80
    assert "<rs.Attachment.values>`" in guide
    assert "](../reference/GroupLasso.md)" in text(sources, "docs/tutorials/smaller.md")
    linked = {
        name
        for page, content in sources.items()
        if page.startswith("docs/") and page.endswith(".md")
        for name in re.findall(r"\]\((?:\.\./)?reference/(\w+)\.md\)", content.decode())
    }
    classes = {name for name in rs.__all__ if isinstance(getattr(rs, name), type)}
    assert classes - linked == set()


# Pictures


@pytest.fixture(scope="module")
def drawings(reference):
    pytest.importorskip("matplotlib")
    return sys.modules["drawings"]


def penalties_and_constraints():
    kinds = (rs.Penalty, rs.NetworkPenalty, type(rs.JacobianNorm()).__mro__[2], rs.Constraint)
    found = {name: getattr(rs, name) for name in rs.__all__ if isinstance(getattr(rs, name), type)}
    return {name for name, one in found.items() if issubclass(one, kinds) and not inspect.isabstract(one)}


def test_every_penalty_and_constraint_has_a_picture(drawings):
    assert [name for name in penalties_and_constraints() if drawings.drawing_of(name) is None] == []
    assert set(drawings.DRAWINGS) <= penalties_and_constraints()
    assert len(drawings.DRAWINGS) > 55
    for name in ("Dropout", "Penalty", "path", "plots"):
        assert drawings.drawing_of(name) is None


def test_a_new_entrywise_penalty_needs_no_entry(drawings, monkeypatch):
    monkeypatch.delitem(drawings.DRAWINGS, "Huber")
    monkeypatch.delitem(drawings.DRAWINGS, "GroupLasso")
    assert "value of one entry" in drawings.drawing_of("Huber").caption
    assert drawings.drawing_of("GroupLasso") is None


def numbers(drawing):
    """{label: (x, y)} of the lines that a picture has."""
    figure, (ax,) = rs.plots.panels(1)
    drawing.draw(ax)
    assert figure is ax.figure
    return {line.get_label(): line.get_data() for line in ax.lines}


def test_pictures_show_the_values(drawings):
    x, y = numbers(drawings.DRAWINGS["Contractive"])["value"]
    np.testing.assert_allclose(y, np.square(x), rtol=1e-5)
    x, y = numbers(drawings.DRAWINGS["GradientPenalty"])["value"]
    np.testing.assert_allclose(y, np.square(np.abs(x) - 1), rtol=1e-5, atol=1e-6)
    x, y = numbers(drawings.DRAWINGS["Invariance"])["gradient"]
    np.testing.assert_allclose(y, 2 * np.asarray(x), rtol=1e-5, atol=1e-6)
    x, y = numbers(drawings.DRAWINGS["DecoderL1"])["value"]
    np.testing.assert_allclose(y, 1 + np.abs(x) / 2, rtol=1e-5)
    x, y = numbers(drawings.DRAWINGS["Variance"])["value"]
    np.testing.assert_allclose(y, np.maximum(0, 1 - np.sqrt(np.square(x) + 1e-4)), rtol=0.01, atol=0.01)


def test_a_picture_is_a_small_svg_in_the_pages_colors(drawings):
    for name in ("L1", "GroupLasso"):
        found = drawings.drawing(name)
        assert found.startswith('```{raw} html\n<figure class="drawing"><svg viewBox=')
        assert f'aria-label="{name}: ' in found
        assert len(found) < 60_000
        assert re.findall(r"#[0-9a-f]{6}\b", found) == []
        assert "var(--c1)" in found
    css = (ROOT / "docs/_static/site.css").read_text("utf-8")
    report = resources.files("restrain.report").joinpath("page.css").read_text("utf-8")
    own = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r"^html.*?\{(.*?)\}", css, re.M | re.S)
    ]
    theirs = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", report, re.S)
    ]
    for mine, one in zip(own, theirs, strict=False):
        assert {name: one[name] for name in mine if name != "paper"} == {k: v for k, v in mine.items() if k != "paper"}
        assert contrast(mine["ink"], mine["paper"]) > 7
        assert min(contrast(mine[name], mine["paper"]) for name in ("c0", "c1")) > 4.5


@pytest.mark.slow
def test_all_pictures_are_drawn(drawings, reference):
    for name in drawings.DRAWINGS:
        found = drawings.drawing(name)
        assert 2_000 < len(found) < 60_000, name
        assert found in reference.page(name, getattr(rs, name), found)


# Files


def test_only_what_changed_is_written(reference, tmp_path):
    reference.write(tmp_path, pictures=False)
    page, other = tmp_path / "docs/reference/L1.md", tmp_path / "docs/reference/L2.md"
    (tmp_path / "docs/reference/Gone.md").write_text("old")
    page.write_text("changed")
    before = other.stat().st_mtime_ns
    reference.write(tmp_path, pictures=False)
    assert page.read_text("utf-8").startswith("# L1\n\n````````{py:class} rs.L1()\n\nΣ\\|x\\|")
    assert other.stat().st_mtime_ns == before
    assert not (tmp_path / "docs/reference/Gone.md").exists()
