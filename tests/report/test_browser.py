"""A report in Chromium, without a network: no errors, the slider, the keyboard, contrast, narrow and wide screens."""

import pytest
import torch

from report.browsing import FAINT, Opened, launched
from report.pages import NAME, lasso, names, trained

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    model, reg = trained()
    file = tmp_path_factory.mktemp("report") / "report.html"
    reg.report(file, path=lasso(), images={"<script>.weight": (8, 8)}, inputs=names())
    assert reg.model is model
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_and_its_texts_have_contrast(browser, file, scheme):
    with Opened(browser, file, scheme=scheme) as one:
        count, faint = one.page.evaluate(FAINT)
        assert one.said == []
        assert one.asked == [file.as_uri()]
        assert count > 150
        assert faint == []
        dark = one.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        one.page.add_style_tag(content=".told { color: #888; background: #999 }")
        assert one.page.evaluate(FAINT)[1]


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_screen_and_texts_are_legible(browser, file, width):
    with Opened(browser, file, width) as one:
        for details in one.page.query_selector_all("summary"):
            details.click()
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = one.page.evaluate(
            """() => [...document.querySelectorAll("svg text")].map((node) => {
              const svg = node.ownerSVGElement;
              const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
              return scale * parseFloat(getComputedStyle(node).fontSize);
            })"""
        )
        assert len(sizes) > 100
        assert min(sizes) >= 8
        columns = one.page.evaluate("getComputedStyle(document.querySelector('.charts')).gridTemplateColumns")
        assert len(columns.split()) == (1 if width == 400 else 3)
        one.page.evaluate(
            "document.body.append(Object.assign(document.createElement('pre'), {style: 'width: 2000px'}))"
        )
        assert one.page.evaluate("document.documentElement.scrollWidth") > width


STATE = """() => ({
  text: document.getElementById("point-now").textContent,
  marks: [...document.querySelectorAll("line.marker")].map((line) => [line.getAttribute("x1"), line.dataset.x]),
  bars: [...document.querySelectorAll("#path-bars li")].map((row) => [
    row.querySelector(".name").textContent, parseFloat(row.querySelector(".fill").style.width),
    row.querySelector(".value").textContent]),
  alive: document.querySelectorAll("#path-left .alive").length,
  names: document.getElementById("path-names").textContent,
  said: document.getElementById("point").getAttribute("aria-valuetext"),
})"""


def from_the_least(page, view):
    """The points in the order of the slider, which is put to the first of them."""
    page.focus("#point")
    page.keyboard.press("Home")
    return sorted(range(len(view.strengths)), key=lambda at: view.strengths[at])


def test_the_slider_moves_all_of_it_by_the_keyboard(browser, file):
    view = lasso().view().named(names())
    (weights,) = view.lines.values()
    with Opened(browser, file) as one:
        page, order = one.page, from_the_least(one.page, view)
        for place, at in enumerate(order):
            found = page.evaluate(STATE)
            assert found["text"].startswith(f"strength {float(f'{view.strengths[at]:.4g}'):g}")
            assert f"{view.selected[at]} of 9 left, {9 - view.selected[at]} zero" in found["text"]
            assert found["said"] == found["text"]
            assert ("(best)" in found["text"]) == (at == view.best)
            assert all(x == places.split()[place] for x, places in found["marks"])
            assert len(found["marks"]) == 2
            assert found["alive"] == view.selected[at]
            used = [names()[number] for number in range(9) if weights[at, number] != 0]
            assert found["names"] == (", ".join(used) or "none")
            for name, width, value in found["bars"]:
                weight = float(weights[at, names().index(name)])
                assert width == pytest.approx(100 * abs(weight) / float(weights.abs().max()), abs=0.1)
                assert float(value) == pytest.approx(weight, rel=1e-3)
            page.keyboard.press("ArrowRight")
        assert NAME in {name for name, _, _ in found["bars"]}
        page.click("button[data-point] >> nth=0")
        assert "(best)" in page.evaluate(STATE)["text"]
        page.click("button[data-point] >> nth=1")
        assert "(one standard error)" in page.evaluate(STATE)["text"]
        assert one.said == []


NETWORK = """() => ({
  alive: [...document.querySelectorAll("#network circle")].map((one) => one.classList.contains("alive")),
  here: [...document.querySelectorAll("#network circle")].findIndex((one) => one.classList.contains("here")),
  edges: [...document.querySelectorAll("#network line")].map((one) => getComputedStyle(one).visibility === "visible"),
  told: document.getElementById("network-told").textContent,
  now: document.getElementById("network-now").textContent,
})"""


def test_the_network_that_is_left_is_drawn_and_walked_by_the_keyboard(browser, file):
    path = lasso()
    view = path.view()
    (weights,) = view.lines.values()
    with Opened(browser, file) as one:
        page, order = one.page, from_the_least(one.page, view)
        for at in order:
            found = page.evaluate(NETWORK)
            used = (weights[at] != 0).tolist()
            assert found["alive"] == [*used, any(used)]
            assert found["edges"] == used
            assert found["told"] == f"inputs: {sum(used)} of 9; out.weight: {int(any(used))} of 1"
            page.keyboard.press("ArrowRight")
        page.focus("#network-drawing")
        page.keyboard.press("ArrowDown")
        found = page.evaluate(NETWORK)
        assert found["here"] == 1
        assert found["now"] == f"inputs, input 1: {'remains' if used[1] else 'gone'}"
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        assert page.evaluate(NETWORK)["now"].startswith("out.weight, 0: ")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowUp")
        assert page.evaluate(NETWORK)["here"] == 0
        page.click("button[data-point] >> nth=0")  # what is chosen is told anew
        state = "remains" if weights[view.best, 0] != 0 else "gone"
        assert page.evaluate(NETWORK)["now"] == f"inputs, {NAME}: {state}"
        assert one.said == []


def test_the_keyboard_reaches_everything(browser, file):
    reached = """() => { const one = document.activeElement;
      return one.id || one.dataset.point && "button" || one.getAttribute("href") || one.tagName; }"""
    with Opened(browser, file) as one:
        wanted = one.page.evaluate("document.querySelectorAll('a, button, input, summary, [tabindex=\"0\"]').length")
        found = []
        for _ in range(wanted + 2):
            one.page.keyboard.press("Tab")
            found.append(one.page.evaluate(reached))
        assert {"#rules", "point", "network-drawing", "button", "SUMMARY", "PRE"} <= set(found)
        outline = one.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or one.page.evaluate("document.activeElement.tagName") == "BODY"


def test_without_scripts_the_numbers_are_there(browser, file):
    with Opened(browser, file, java_script_enabled=False) as one:
        assert "the table of all points" in one.page.inner_text("noscript >> nth=0")
        assert one.page.locator("#path table tr").count() == 13


def test_printed_it_is_dark_on_white(browser, file):
    with Opened(browser, file, scheme="dark") as one:
        one.page.emulate_media(media="print", color_scheme="dark")
        colors = one.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert colors == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
        one.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert one.page.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
        assert len(one.page.pdf()) > 20_000
