"""The report's page in Chromium: what is seen, pressed and printed, in both themes, on a phone and on a desk.

Needs Playwright for Python (`pip install playwright`) and a Chromium of the system's (`apt-get install chromium`).
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_records import latency_record, parity_record

from onevision_edge.report.page.page import page as report_page

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# The contrast of every element with text of its own against what lies behind it, those below 4.5 (WCAG 2.2, 1.4.3).
CONTRAST = """
() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = channels(color).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const opaque = (color) => color !== "transparent" && (channels(color)[3] ?? 1) === 1;
  const behind = (element) => {
    const rect = element.closest(".icicle") && element.parentNode.querySelector("rect");
    if (rect) return getComputedStyle(rect).fill;
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (opaque(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const owns = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const found = [], low = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (!owns(element) || !element.checkVisibility() || element.closest("title, script, option")) continue;
    const style = getComputedStyle(element);
    const own = element instanceof SVGElement ? style.fill : style.color;
    const pair = [own, behind(element)].map(light).sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    found.push(contrast);
    if (contrast < 4.5) low.push([element.outerHTML.slice(0, 80), contrast]);
  }
  return { count: found.length, low };
}
"""
# Colours that carry meaning without text: at least 3 against the paper (WCAG 2.2, 1.4.11).
GRAPHICS = """
() => ["line", "own", "pass", "ambiguous", "fail", "s0", "s1", "s2", "s3", "s4"].map((name) => {
  const style = getComputedStyle(document.documentElement);
  const light = (hex) => hex.trim().slice(1).match(/../g).map((c) => parseInt(c, 16) / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0.05);
  const pair = ["--" + name, "--paper"].map((each) => light(style.getPropertyValue(each)));
  return Math.max(...pair) / Math.min(...pair);
})
"""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of three candidates; the answers to the first question are all the reference's."""
    parity = parity_record(3)
    for candidate in parity["candidates"]:
        example = candidate["examples"][0]
        example |= {"candidate": example["reference"], "verdict": "PASS", "first_divergent": None, "margin": None}
    path: Path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(report_page(parity, latency_record(3)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Chromium's sandbox refuses to run as root, which tests in a container do.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Open]:
    """Opens the report; in the end there must have been no error, and no request but for the file itself."""
    problems: list[str] = []
    contexts = []

    def new(viewport: dict[str, int] = DESK, scheme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce", **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
        tab.on("request", lambda request: problems.append(request.url) if not expected(request.url) else None)
        tab.goto(address)
        return tab

    def expected(url: str) -> bool:
        return url.partition("#")[0] == address or url.startswith("data:")

    yield new
    for context in contexts:
        context.close()
    assert problems == []


def seen(tab: Any, selector: str) -> list[int]:
    """Indices of the elements that are visible."""
    every = tab.locator(selector)
    return [i for i in range(every.count()) if every.nth(i).is_visible()]


def test_the_verdict_is_read_first(opened: Open) -> None:
    tab = opened()
    assert re.sub(r"\s+", " ", tab.inner_text("body")).startswith("✕ FAIL 1 of 3 candidates does not match demo-fp32")
    assert tab.title() == "✕ FAIL: 1 of 3 candidates does not match demo-fp32"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_have_contrast_in_both_themes(opened: Open, scheme: str) -> None:
    tab = opened(scheme=scheme)
    tab.select_option("#candidate", "all")
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    found = tab.evaluate(CONTRAST)
    assert found["count"] > 2000
    assert found["low"] == []
    assert min(tab.evaluate(GRAPHICS)) >= 3
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 20, 26)"
    )


@pytest.mark.parametrize("viewport", [{"width": 320, "height": 640}, PHONE, DESK])
def test_the_page_is_as_wide_as_its_window(opened: Open, viewport: dict[str, int]) -> None:
    tab = opened(viewport)
    tab.select_option("#candidate", "all")
    tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert tab.evaluate("document.querySelector('.field').getBoundingClientRect().right") <= viewport["width"]


def test_labels_of_stages_do_not_overlap_on_a_phone(opened: Open) -> None:
    labels = opened(PHONE).locator("#candidate-2 .field text")
    boxes = labels.evaluate_all("(texts) => texts.map((text) => text.getBoundingClientRect().toJSON())")
    assert len(boxes) == 6 + 8 + 2 + 1
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            across = min(a["right"], b["right"]) - max(a["left"], b["left"])
            down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            assert min(across, down) < 2.5  # a line's box is taller than its letters


def test_contents_lead_to_their_sections(opened: Open) -> None:
    tab = opened()
    links = tab.locator("nav a")
    assert links.count() == 8
    for index in range(links.count()):
        name = links.nth(index).get_attribute("href")
        links.nth(index).click()
        assert tab.evaluate("location.hash") == name
        assert tab.locator(name).bounding_box()["y"] < DESK["height"]


def test_a_candidate_is_chosen_by_list_and_by_link(opened: Open) -> None:
    tab = opened()
    assert seen(tab, ".candidate") == [2]  # the one that fails
    tab.select_option("#candidate", "0")
    assert seen(tab, ".candidate") == [0]
    tab.select_option("#candidate", "all")
    assert seen(tab, ".candidate") == [0, 1, 2]
    tab.locator(".verdicts a", has_text="demo-int8").last.click()
    assert seen(tab, ".candidate") == [1]
    tab.locator("#candidate").focus()
    tab.keyboard.press("ArrowDown")
    assert seen(tab, ".candidate") == [2]


def test_the_plot_of_stages_tells_numbers_by_pointer_and_keyboard(opened: Open) -> None:
    tab = opened()
    plot, readout = tab.locator("#candidate-2 .stage-plot"), tab.locator("#candidate-2 .readout")
    assert readout.inner_text().startswith("decoder.layers.18")
    assert plot.get_attribute("role") == "slider"
    plot.focus()
    tab.keyboard.press("ArrowLeft")
    assert (plot.get_attribute("aria-valuetext") or "").startswith("decoder.layers.17, ✓ PASS, error 0.0")
    tab.keyboard.press("Home")
    assert readout.inner_text().startswith("preprocess ✓ PASS error 0")
    tab.keyboard.press("End")
    assert readout.inner_text().startswith("tokens")
    box = tab.locator("#candidate-2 .field").bounding_box()
    middle = tab.evaluate("document.querySelector('#candidate-2 .field').dataset.x.split(' ')[26]")
    tab.mouse.move(box["x"] + box["width"] * float(middle) / 100, box["y"] + 100)
    assert readout.inner_text().startswith("merger ✓ PASS")
    assert tab.locator("#candidate-2 .cursor").get_attribute("x1") == f"{float(middle):g}%"


def test_series_are_chosen_by_mouse_and_keyboard(opened: Open) -> None:
    tab = opened()
    error, own = tab.locator("#candidate-2 .series.error"), tab.locator("#candidate-2 .series.dots")
    tab.get_by_label("what a stage adds itself").click()
    assert (error.is_visible(), own.is_visible()) == (False, True)
    tab.keyboard.press("ArrowLeft")
    assert (error.is_visible(), own.is_visible()) == (True, False)
    tab.keyboard.press("ArrowLeft")
    assert (error.is_visible(), own.is_visible()) == (True, True)


def test_the_frontier_shows_one_metric_at_a_time(opened: Open) -> None:
    tab = opened()
    assert seen(tab, ".frontiers") == [0]
    tab.get_by_role("radio", name="Right answers").click()
    assert seen(tab, ".frontiers") == [1]
    tab.keyboard.press("ArrowLeft")
    assert seen(tab, ".frontiers") == [0]


def test_questions_are_filtered_by_mouse_and_keyboard(opened: Open) -> None:
    tab = opened()
    assert len(seen(tab, ".question")) == 6
    tab.get_by_label("5 with an answer that differs").click()
    assert len(seen(tab, ".question")) == 5
    assert all(tab.locator(".question").nth(i).locator("del, ins").count() for i in seen(tab, ".question"))
    tab.keyboard.press("ArrowLeft")
    assert len(seen(tab, ".question")) == 6


def test_tables_are_sorted_by_mouse_and_keyboard(opened: Open) -> None:
    tab = opened()

    def column(index: int) -> list[str]:
        return tab.locator(f".verdicts tbody tr > :nth-child({index})").all_inner_texts()

    head = tab.locator(".verdicts thead th", has_text="size")
    head.get_by_role("button").click()
    assert column(5) == ["3.91 MB", "4.66 MB", "4.69 MB"]
    assert head.get_attribute("aria-sort") == "ascending"
    tab.keyboard.press("Enter")
    assert column(5) == ["4.69 MB", "4.66 MB", "3.91 MB"]
    assert head.get_attribute("aria-sort") == "descending"
    tab.locator(".verdicts thead th", has_text="verdict").get_by_role("button").click()
    assert column(2) == ["✓ PASS", "✓ PASS", "✕ FAIL"]
    tab.locator(".verdicts thead th", has_text="KLD").get_by_role("button").press("Space")
    assert column(6) == ["5.7e-6", "5.5e-5", "0.081"]
    assert head.get_attribute("aria-sort") is None


def test_the_icicle_is_widened_by_click_and_keyboard(opened: Open) -> None:
    tab = opened()
    icicle = tab.locator(".icicle").first

    def width(name: str) -> float:
        return float((icicle.locator("> svg", has_text=name).first.get_attribute("width") or "").removesuffix("%"))

    assert 0 < width("down_proj") < 20
    icicle.locator("> svg", has_text="self_attn").click()
    assert width("self_attn") == 100
    assert width("layers") == 100
    assert len(seen(tab, ".icicle >> nth=0 >> > svg")) == 1 + 1 + 1 + 1 + 5  # what leads to it, it, what is below it
    tab.keyboard.press("Escape")
    assert width("self_attn") < 100
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    assert width("mlp: ") >= 0
    focused = tab.evaluate("document.activeElement.querySelector('title').textContent")
    assert tab.evaluate("document.activeElement.getAttribute('width')") == "100%", focused
    icicle.locator("> svg", has_text="request").click()
    assert width("vision") < 100


def test_printing_shows_everything(opened: Open) -> None:
    tab = opened()
    tab.select_option("#candidate", "0")
    tab.get_by_label("with an answer that differs").click()
    tab.get_by_label("what a stage adds itself").click()
    assert not tab.locator(".files td").first.is_visible()
    tab.emulate_media(media="print")
    assert seen(tab, ".candidate") == [0, 1, 2]
    assert len(seen(tab, ".question")) == 6
    assert len(seen(tab, ".frontiers")) == 2
    assert len(seen(tab, ".field .series.error")) == 3
    assert seen(tab, ".controls, nav, .readout") == []
    assert all(tab.locator("td").evaluate_all("(cells) => cells.map((cell) => cell.checkVisibility())"))
    assert tab.locator(".files td").first.bounding_box()["height"] > 0
    assert tab.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_everything_is_there_and_no_dead_control(opened: Open) -> None:
    tab = opened(java_script_enabled=False)
    assert seen(tab, ".candidate") == [0, 1, 2]
    assert len(seen(tab, ".frontiers")) == 2
    assert len(seen(tab, ".question")) == 6
    assert seen(tab, ".controls, .readout, .icicle-help, th button, [role=slider]") == []
    tab.locator("summary").first.click()
    assert tab.locator(".stage-table td").first.is_visible()


def test_everything_is_reached_by_keyboard_and_seen_to_be(opened: Open) -> None:
    tab = opened()
    reached: set[str] = set()
    for _ in range(160):
        tab.keyboard.press("Tab")
        at = tab.evaluate(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " return [e.tagName + '.' + (e.getAttribute('class') ?? ''), s.outlineStyle]; })()"
        )
        if at[0].startswith("BODY"):
            break
        reached.add(at[0].split(" ")[0].lower())
        assert at[1] != "none" or "svg" in at[0], at
    assert {"a.", "select.", "input.", "button.", "div.stage-plot", "div.scroll", "summary.", "svg.n"} <= reached
