"""The site of `make docs` in Chromium, without a network: quiet, legible, reached by the keyboard, searched."""

import subprocess
import sys
from pathlib import Path

import pytest

from report.browsing import FAINT, Opened, launched
from scripts import loaded

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PAGES = [
    "index",
    "guide",
    "how",
    "gallery",
    "comparison",
    "matrix",
    "tutorials/own-loop",
    "tutorials/language-model",
    "tutorials/smaller",
    "reference/index",
    "reference/group-penalties-entries",
    "reference/L1",
    "reference/GroupLasso",
    "reference/SIGReg",
    "reference/Attachment",
    "reference/Classifier",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site's pages, built as `make docs` does."""
    for name in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(name, reason="the site is built by Sphinx: pip install 'restrain[docs]'")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("site")
    loaded(ROOT / "docs/reference.py").write(folder / "sources")
    folders = ["-d", folder / "doctrees", folder / "sources/docs", folder / "html"]
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs", *folders]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_quietly_and_their_texts_have_contrast(browser, site, scheme):
    with Opened(browser, site / "index.html", scheme=scheme) as one:
        for name in PAGES:
            one.page.goto((site / f"{name}.html").as_uri())
            assert one.page.evaluate("document.documentElement.dataset.theme") == scheme
            count, faint = one.page.evaluate(FAINT)
            assert count > 50, name
            assert faint == [], name
        assert [text for text in one.said if not text.startswith("[PST]")] == []  # the theme says its mode
        assert [url for url in one.asked if not url.startswith((site.as_uri(), "data:"))] == []
        one.page.add_style_tag(content="p { color: #888 !important; background: #999 }")
        assert one.page.evaluate(FAINT)[1]


# Sizes in pixels of the texts that a reader sees; those of a picture as it is scaled
SIZES = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.getBoundingClientRect().width) continue;
    const svg = node.ownerSVGElement;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    found.push([scale * parseFloat(getComputedStyle(node).fontSize), walker.currentNode.textContent.trim()]);
  }
  return found.sort((one, other) => one[0] - other[0]);
}"""


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_screen_and_texts_are_legible(browser, site, width):
    with Opened(browser, site / "index.html", width) as one:
        for name in PAGES:
            one.page.goto((site / f"{name}.html").as_uri())
            assert one.page.evaluate("document.documentElement.scrollWidth") <= width, name
            sizes = one.page.evaluate(SIZES)
            assert len(sizes) > 20
            assert sizes[0][0] >= 8, (name, sizes[0])
            prose = one.page.evaluate("parseFloat(getComputedStyle(document.querySelector('main p')).fontSize)")
            assert prose >= 14
        one.page.evaluate(
            "document.body.append(Object.assign(document.createElement('pre'), {style: 'width: 2000px'}))"
        )
        assert one.page.evaluate("document.documentElement.scrollWidth") > width


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("group lasso", "reference/GroupLasso.html"),
        ("certificate", "paths.html"),
        ("SIGReg", "modern-training.html"),
        ("Attachment", "reference/Attachment.html"),
    ],
)
def test_the_search_works_without_a_network(browser, site, words, page):
    with Opened(browser, site / "search.html") as one:
        one.page.goto(f"{(site / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
        one.page.wait_for_selector("#search-results li a")
        one.page.wait_for_function("!document.querySelector('#search-progress')?.textContent.includes('...')")
        links = [
            link.get_attribute("href").split("?")[0].split("#")[0]
            for link in one.page.query_selector_all("#search-results li a")
        ]
        assert page in links
        assert [text for text in one.said if not text.startswith("[PST]")] == []  # the theme says its mode
        assert all(url.startswith(site.as_uri()) for url in one.asked if not url.startswith("data:"))
        one.page.goto(f"{(site / 'search.html').as_uri()}?q=xyzzyx")
        one.page.wait_for_function("document.querySelector('#search-results').textContent.includes('did not match')")


# What may be reached by the keyboard: [links, buttons, fields], those that are seen, and a name of what has the focus
WANTED = """() => [...document.querySelectorAll("a[href], button, input, summary, [tabindex='0']")]
  .filter((one) => one.tabIndex >= 0 && one.checkVisibility({ visibilityProperty: true, opacityProperty: false })
    && !one.closest("dialog:not([open])"))
  .map((one, number) => { one.dataset.number = number; return number; })"""


# Whether the focus is seen: on the element that has it, or on what it holds, as the theme's folds show it
SEEN = """() => [document.activeElement, ...document.activeElement.querySelectorAll("*")].some((one) => {
  const style = getComputedStyle(one);
  return document.activeElement !== document.body && (style.outlineStyle !== "none" || style.boxShadow !== "none");
})"""


@pytest.mark.parametrize("name", ["tutorials/own-loop", "reference/GroupLasso"])
def test_the_keyboard_reaches_everything(browser, site, name):
    with Opened(browser, site / f"{name}.html") as one:
        wanted = one.page.evaluate(WANTED)
        assert len(wanted) > 50
        reached, unseen = set(), 0
        for _ in range(len(wanted) + 10):
            one.page.keyboard.press("Tab")
            reached.add(one.page.evaluate("document.activeElement.dataset.number"))
            unseen += not one.page.evaluate(SEEN)
        missing = set(map(str, wanted)) - reached
        names = one.page.evaluate(
            "(all) => all.map((n) => document.querySelector(`[data-number='${n}']`).outerHTML)", list(missing)
        )
        assert names == []
        one.page.evaluate("document.querySelector('a[href]').focus()")
        assert one.page.evaluate(SEEN)
        one.page.add_style_tag(content="* { outline: none !important; box-shadow: none !important }")
        assert not one.page.evaluate(SEEN)
        assert unseen <= 2  # the page itself, before and after a round


def test_pictures_have_words_for_those_who_dont_see_them(browser, site):
    with Opened(browser, site / "index.html") as one:
        for name in [*PAGES, "tutorials/table", "tutorials/sparse-autoencoder"]:
            one.page.goto((site / f"{name}.html").as_uri())
            without = one.page.evaluate(
                "[...document.querySelectorAll('main img')].filter((one) => !one.alt || !one.naturalWidth)"
                ".map((one) => one.src)"
            )
            assert without == [], name
            labels = one.page.evaluate(
                "[...document.querySelectorAll('main figure svg')].map((one) => one.getAttribute('aria-label'))"
            )
            assert all(labels)
            if name in ("reference/L1", "reference/GroupLasso", "reference/SIGReg"):
                assert len(labels) == 1
