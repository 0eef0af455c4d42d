"""What README and docs show runs as printed, and the demo does what README says."""

import re
from pathlib import Path

import pytest

import restrain as rs
from restrain import demo, registry

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]


SLOW = {f"docs/tutorials/{name}.md" for name in ("table", "language-model", "sparse-autoencoder", "smaller")}
SLOW |= {"docs/models.md"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def shown():
    """The pages with examples; those that take more than some seconds are marked slow."""
    pages = [page for page in PAGES if blocks(page, "python")]
    assert set(pages) >= SLOW
    return [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in pages]


@pytest.mark.parametrize("page", shown())
@pytest.mark.filterwarnings("ignore:.*compiled before these hooks:restrain.errors.RestrainWarning")
def test_examples_run_as_printed(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for the files that they write
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))  # a page's own classes end with it
    namespace = {"__name__": "example"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    assert capsys.readouterr().out


def test_the_plan_in_the_guide_is_one():
    yaml = pytest.importorskip("yaml")
    (text,) = blocks("docs/guide.md", "yaml")
    plan = rs.Plan.from_dict(yaml.safe_load(text))
    assert plan.rules[0] == 1e-4 * rs.L1().on(plan.rules[0].where, how="proximal")
    assert plan.rules[1].what == rs.Dropout(0.2)


def test_public_names_are_in_the_docs():
    text = "".join((ROOT / page).read_text() for page in [*PAGES, "DESIGN.md"])
    missing = [name for name in rs.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_links_lead_somewhere():
    for page in [*PAGES, "DESIGN.md", "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


def test_readme_is_one_screen():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 72
    assert text.count("![") == 1
    (block,) = blocks("README.md", "python")
    assert "rs.attach(" in block
    assert "reg.loss(" in block
    for page in ("docs/tour.md", "docs/demo.md", "docs/comparison.md", "docs/gallery.md", "docs/guide.md"):
        assert f"]({page})" in text, page
    for name in ("demo", "test", "docs"):
        assert re.search(rf"make {name}\b", text)


def test_readme_and_the_page_of_the_demo_have_the_same_figures():
    found = re.findall(
        r"\d[\d,.]*\d", (ROOT / "README.md").read_text("utf-8").split("What `make demo` draws")[1].split("*\n")[0]
    )
    assert len(found) == 5
    demo_page = (ROOT / "docs/demo.md").read_text("utf-8")
    for number in found:
        assert re.search(rf"(?<![\d,.]){re.escape(number)}(?!\d|,\d)", demo_page), number


def test_the_demo_prints_and_draws(tmp_path, capsys):
    demo.main(["--out", str(tmp_path), "--epochs", "2", "--seeds", "2", "--points", "2"])
    out = capsys.readouterr().out
    for title in ("without rules", "rules in the loss", "proximal rules", "sparse autoencoder"):
        assert title in out
    assert len(re.findall(r"minus plain .*±", out)) == 5
    assert len(re.findall(r"hidden_l1=.*% zeros", out)) == 6
    assert len(re.findall(r"test accuracy \d\d\.\d\d%", out)) == 3
    assert len(re.findall(r"strength 0\.\d+: +\d+ units, +\d+\.\d+%", out)) == 2
    assert re.search(r"ms a forward +\d", out)
    before, after = re.search(r"correct: (\S+) before, (\S+) after", out).groups()
    assert before == after
    for name in ("features.png", "zeros.png", "curves.png", "digits.png", "study.png", "path.png"):
        path = tmp_path / name
        assert str(path) in out
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
