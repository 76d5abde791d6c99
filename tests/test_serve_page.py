"""The page of the server in Chromium: a conversation about images, its settings, in both themes, phone and desk."""

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serve_browser import CHROMIUM, DESK, PHONE, Reader, chromium, readers
from serve_fake import LIMITS, TIMINGS, Reply, usage

from onevision_edge.serve.page import csp, page_html

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
Open = Callable[..., Reader]
IMAGES = Path(__file__).parent.parent / "demo" / "images"
SMALL = {name: str(IMAGES / f"{name}.png") for name in ("first", "second", "three")}  # 140 x 100, 160 x 118, …
PHOTO = str(IMAGES / "photo.jpg")  # 1600 x 1200
# Every element with text of its own whose contrast with what lies behind it is below 4.5 (WCAG 2.2, 1.4.3).
CONTRAST = """
() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0.05);
  const opaque = (color) => color !== "transparent" && (channels(color)[3] ?? 1) === 1;
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (opaque(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const owns = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const found = [], low = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (!owns(element) || !element.checkVisibility() || element.closest("script, noscript")) continue;
    const pair = [getComputedStyle(element).color, behind(element)].map(light).sort((a, b) => b - a);
    found.push(pair[0] / pair[1]);
    if (pair[0] / pair[1] < 4.5) low.push([element.outerHTML.slice(0, 80), pair[0] / pair[1]]);
  }
  return { count: found.length, low };
}
"""
DETAILS = {"cached_tokens": 120, "image_tokens": 208, "cached_image_tokens": 100}
MARKDOWN = """Six **digits** and `code`:

1. red 6
2. purple 2
   - a *note*

| digit | count |
|---|---:|
| 6 | 12 |
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    with readers(browser) as new:
        yield new


def sent_images(body: dict[str, Any]) -> list[bytes]:
    """The images of a request's last message, decoded."""
    urls = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def full(opened: Open, viewport: dict[str, int] = DESK, scheme: str = "light") -> Reader:
    """A page with everything on it: answers with images, a refusal, a question that is edited."""
    reader = opened(viewport, scheme)
    reader.add(SMALL["three"])
    reader.ask("List all digits.", Reply(pieces=(MARKDOWN,)))
    reader.add(SMALL["second"], PHOTO)
    reader.ask("What differs?", Reply(usage=usage(600, 3, 260, 400)))
    reader.ask("And now?", Reply(status=400, message="temperature must be at most 2"))
    reader.tab.get_by_role("button", name="Edit the question").nth(1).click()
    return reader


def test_the_policy_names_the_one_style_and_script_of_the_page() -> None:
    html = page_html()
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in csp()
    assert "unsafe" not in csp()
    assert csp().startswith("default-src 'none'; connect-src 'self'; ")
    assert re.findall(r"""\s(?:on\w+|style|src)\s*=\s*["']""", html.partition("<script>")[0]) == []
    assert re.findall(r"https?://|innerHTML|insertAdjacentHTML|\beval\b", html) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(opened: Open, scheme: str) -> None:
    reader = full(opened, scheme=scheme)
    found = reader.tab.evaluate(CONTRAST)
    assert found["count"] > 60
    assert found["low"] == []
    reader.tab.click("#open-settings")
    assert reader.tab.evaluate(CONTRAST)["low"] == []
    paper = reader.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 20, 26)")


@pytest.mark.parametrize("viewport", [{"width": 320, "height": 640}, PHONE, DESK])
def test_the_page_is_as_wide_as_its_window(opened: Open, viewport: dict[str, int]) -> None:
    reader = full(opened, viewport)
    assert reader.tab.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    box = reader.tab.locator("#composer .box").bounding_box()
    assert 0 <= box["x"] < box["x"] + box["width"] <= viewport["width"]
    buttons = reader.tab.locator("button:visible").evaluate_all("(all) => all.map((b) => b.offsetHeight)")
    assert min(buttons) >= 24  # WCAG 2.2, 2.5.8
    reader.tab.click("#open-settings")
    box = reader.tab.locator("#settings").bounding_box()
    assert 0 <= box["x"] < box["x"] + box["width"] <= viewport["width"]


def test_a_question_goes_out_with_its_images_as_they_are(opened: Open) -> None:
    reader = opened()
    reader.add(SMALL["first"], SMALL["second"])
    reader.ask("What differs?")
    [body] = reader.server.requests
    assert (body["model"], body["stream"], body["stream_options"]) == ("demo-int8", True, {"include_usage": True})
    assert sent_images(body) == [Path(SMALL[name]).read_bytes() for name in ("first", "second")]
    assert body["messages"][0]["content"][-1] == {"type": "text", "text": "What differs?"}
    assert reader.text(".answer") == "A photo of six digits."
    assert "temperature" not in body
    assert "max_tokens" not in body


def test_a_larger_image_than_the_server_takes_is_made_smaller(opened: Open) -> None:
    reader = opened()
    reader.add(PHOTO)
    reader.ask("What is it?")
    [image] = [Image.open(io.BytesIO(data)) for data in sent_images(reader.server.requests[0])]
    assert (image.format, image.size) == ("JPEG", (1154, 866))
    assert 1154 * 866 <= LIMITS["max_pixels"] < 1155 * 867
    assert reader.text("figcaption") == "photo.jpg\n1154 × 866, 208 tokens\nmade smaller from 1600 × 1200"


def test_images_stay_within_what_a_request_may_hold(opened: Any, tmp_path: Path) -> None:
    opened.server.limits = LIMITS | {"max_body_bytes": 200_000}
    reader = opened()
    noise = tmp_path / "noise.png"
    Image.effect_noise((600, 500), 90).save(noise)
    assert noise.stat().st_size > 200_000
    reader.add(str(noise))
    reader.ask("What is it?")
    body = reader.server.requests[0]
    [image] = [Image.open(io.BytesIO(data)) for data in sent_images(body)]
    assert image.format == "JPEG"
    assert image.width / image.height == pytest.approx(1.2, abs=0.01)
    assert 100_000 < len(json.dumps(body)) < 200_000  # no smaller than it must be
    reader.tab.set_input_files("#files", [SMALL["first"]])
    reader.tab.wait_for_selector("#notice button")
    assert reader.text("#notice").startswith("The images are together as large as the server takes: ")
    assert reader.tab.locator("#attached li").count() == 0


def test_without_limits_of_the_server_an_image_is_left_alone(opened: Any) -> None:
    opened.server.limits = None
    reader = opened()
    reader.add(PHOTO)
    reader.ask("What is it?")
    assert sent_images(reader.server.requests[0]) == [Path(PHOTO).read_bytes()]


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_images_are_pasted_and_dropped(opened: Open, way: str) -> None:
    reader = opened()
    data = base64.b64encode(Path(SMALL["first"]).read_bytes()).decode()
    script = """([way, data]) => {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer };
      const fire = (name) => document.body.dispatchEvent(way === "paste"
        ? new ClipboardEvent(name, options) : new DragEvent(name, options));
      if (way === "drop") { fire("dragenter"); fire("dragover"); }
      const shown = document.getElementById("drop").hidden;
      fire(way);
      return [shown, document.getElementById("drop").hidden];
    }"""
    assert reader.tab.evaluate(script, [way, data]) == [way == "paste", True]
    reader.tab.wait_for_selector("#attached li")
    reader.ask("What is it?")
    assert sent_images(reader.server.requests[0]) == [Path(SMALL["first"]).read_bytes()]


def test_images_are_removed_counted_and_refused(opened: Open, tmp_path: Path) -> None:
    reader = opened()
    reader.add(SMALL["first"], SMALL["second"], SMALL["three"], PHOTO)
    reader.tab.set_input_files("#files", [PHOTO])
    reader.tab.wait_for_selector("#notice button")
    assert reader.text("#notice").startswith("A conversation takes 4 images on this server.")
    reader.tab.get_by_role("button", name="Remove second.png").click()
    assert reader.tab.locator("#attached .name").all_inner_texts() == ["first.png", "three.png", "photo.jpg"]
    assert reader.focused() == "remove"
    other = tmp_path / "words.png"
    other.write_text("no image")
    reader.tab.set_input_files("#files", [str(other)])
    reader.tab.wait_for_selector("#notice >> text=words.png")
    assert reader.text("#notice").startswith("“words.png” is not an image that this browser can read.")
    reader.press("Close")
    assert reader.text("#notice") == ""
    assert reader.focused() == "question"


def test_an_image_is_looked_at_larger(opened: Open) -> None:
    reader = opened()
    reader.add(PHOTO)
    reader.tab.get_by_role("button", name="photo.jpg").first.click()
    assert reader.text("#picture p") == "photo.jpg, 1154 × 866, made smaller from 1600 × 1200"
    assert reader.tab.locator("#picture img").evaluate("(image) => image.naturalWidth") == 1154
    reader.tab.keyboard.press("Escape")
    assert not reader.tab.locator("#picture").is_visible()


def test_stages_and_tokens_are_told(opened: Open) -> None:
    reader = opened()
    reader.add(SMALL["three"])
    reader.ask("What color is the 4?", Reply(usage=usage() | {"prompt_tokens_details": DETAILS}))
    words = re.sub(r"\s+", " ", reader.text(".measured"))
    assert "first token after 32 ms, 31.2 tokens/s" in words
    stages = (
        "queue 0.20 ms preprocess 1.4 ms vision encoding 10 ms prepare embeddings 0.05 ms prefill 20 ms decode 50 ms"
    )
    assert stages in words
    tokens = "Prompt 231 tokens, 208 of images; answer 42 tokens. Not computed again: 120 of the prompt, 100 of images."
    assert words.endswith(tokens)
    widths = reader.tab.locator(".bar span").evaluate_all("(all) => all.map((s) => s.getBoundingClientRect().width)")
    assert widths[5] / widths[2] == pytest.approx(5, rel=0.05)
    assert sum(widths) + len(widths) - 1 == pytest.approx(reader.tab.locator(".bar").bounding_box()["width"], abs=0.5)


def test_the_time_that_no_stage_took_is_told_too(opened: Open) -> None:
    reader, held = opened(), threading.Event()
    threading.Timer(0.5, held.set).start()
    reader.ask("One", Reply(held=held))
    found = re.match(r"(\d+) ms, .* the rest (\d+) ms", re.sub(r"\s+", " ", reader.text(".measured")))
    assert found
    total, rest = (float(text) for text in found.groups())
    assert rest == pytest.approx(total - 1000 * sum(list(TIMINGS.values())[:6]), abs=1)
    assert rest > 150


@pytest.mark.parametrize("viewport", [PHONE, DESK])
def test_images_keep_their_shape(opened: Open, viewport: dict[str, int]) -> None:
    reader = opened(viewport)
    reader.add(SMALL["first"], PHOTO)
    reader.ask("One")
    script = "(all) => all.map((i) => [i.offsetWidth / i.offsetHeight, i.naturalWidth / i.naturalHeight])"
    for seen, own in reader.tab.locator(".figures img").evaluate_all(script):
        assert seen == pytest.approx(own, rel=0.02)


def test_images_have_their_tokens_where_they_are_certain(opened: Open) -> None:
    reader = opened()
    reader.add(SMALL["three"])
    reader.ask("One", Reply(usage=usage(images=20)))
    reader.add(SMALL["first"], SMALL["second"])  # 5 x 4 and 6 x 4 squares of 28 pixels
    reader.ask("Two more", Reply(usage=usage(images=20 + 20 + 24)))
    captions = reader.tab.locator("figcaption").all_inner_texts()
    assert [caption.splitlines()[1].partition(", ")[2] for caption in captions] == [
        "20 tokens",
        "20 tokens",
        "24 tokens",
    ]
    reader.press("Ask again")
    reader.settle()
    assert reader.text(".figures .note") == "Together 188 tokens."


def test_the_conversation_goes_on_is_edited_and_begun_anew(opened: Open) -> None:
    reader = opened()
    reader.add(SMALL["first"])
    reader.ask("One", Reply(pieces=("First.",)))
    reader.ask("Two", Reply(pieces=("Second.",)))
    messages = reader.server.requests[1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"][0]["type"] == "image_url"
    assert [messages[1]["content"], messages[2]["content"]] == ["First.", "Two"]

    reader.tab.get_by_role("button", name="Edit the question").first.click()
    assert reader.text("#editing span").startswith("Question 1 is written anew")
    assert reader.tab.locator("#attached li").count() == 1
    reader.tab.keyboard.press("Escape")
    assert not reader.tab.locator("#editing").is_visible()
    assert reader.tab.input_value("#question") == ""
    reader.tab.get_by_role("button", name="Edit the question").first.click()
    reader.ask("One, differently", Reply(pieces=("Third.",)))
    assert reader.tab.locator(".turn").count() == 1
    assert len(reader.server.requests[2]["messages"]) == 1
    assert sent_images(reader.server.requests[2]) == [Path(SMALL["first"]).read_bytes()]

    reader.server.replies.append(Reply(pieces=("Fourth.",)))
    reader.press("Ask again")
    reader.settle()
    assert reader.server.requests[3] == reader.server.requests[2]
    assert reader.text(".answer") == "Fourth."
    reader.press("New chat")
    assert reader.tab.locator(".turn, #attached li").count() == 0
    assert reader.tab.locator("#greeting").is_visible()
    assert reader.focused() == "question"


@pytest.mark.parametrize("clipboard", [True, False])
def test_an_answer_is_copied_with_and_without_the_clipboards_interface(opened: Open, clipboard: bool) -> None:
    reader = opened(permissions=["clipboard-read", "clipboard-write"])
    if not clipboard:
        reader.tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    reader.ask("One", Reply(pieces=(f"**Bold** words, {clipboard}",)))
    reader.press("Copy")
    reader.tab.locator(".acts").get_by_text("Copied", exact=True).wait_for()
    reader.tab.evaluate("delete navigator.clipboard")
    assert reader.tab.evaluate("navigator.clipboard.readText()") == f"**Bold** words, {clipboard}"


def test_settings_go_with_the_question_and_stay_in_the_tab(opened: Any) -> None:
    opened.server.api_key = "sesame"
    reader = opened()
    assert reader.text("#notice") == "The server asks for an API key.\nEnter the key"
    reader.press("Enter the key")
    assert reader.focused() == "key"
    reader.tab.keyboard.type("sesame")
    reader.tab.fill("#temperature", "3")
    reader.tab.keyboard.press("Enter")
    assert reader.text("#settings-problem").startswith("Temperature is a number from 0 to 2")
    assert reader.focused() == "temperature"
    reader.tab.fill("#temperature", "0.5")
    reader.tab.fill("#max-tokens", "64")
    reader.tab.fill("#system", "Be brief.")
    reader.press("Done")
    reader.tab.wait_for_selector("#model >> text=demo-int8")
    reader.ask("One")
    [body] = reader.server.requests
    assert (body["temperature"], body["max_tokens"]) == (0.5, 64)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert reader.server.keys == ["Bearer sesame"]
    assert reader.tab.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert json.loads(reader.tab.evaluate("sessionStorage['onevision-edge']"))["key"] == "sesame"
    reader.tab.reload()
    assert reader.tab.input_value("#max-tokens") == "64"


def test_the_keyboard_sends_breaks_lines_and_stops(opened: Open) -> None:
    reader = opened()
    assert reader.focused() == "question"
    reader.tab.keyboard.type("One")
    reader.tab.keyboard.press("Shift+Enter")
    reader.tab.keyboard.type("line")
    assert reader.server.requests == []
    assert reader.tab.input_value("#question") == "One\nline"
    reader.server.replies.append(Reply(pieces=("A ", "never"), held=threading.Event()))
    reader.tab.keyboard.press("Enter")
    reader.tab.wait_for_selector(".answer >> text=A")
    assert reader.tab.input_value("#question") == ""
    reader.tab.keyboard.press("Escape")
    reader.settle()
    assert reader.text(".answer") == "A"
    assert reader.text(".said .note") == "Stopped."
    assert reader.server.left.wait(5)  # the server can give the row to another


def test_focus_goes_from_the_head_over_the_answers_to_the_question(opened: Open) -> None:
    reader = opened()
    reader.add(SMALL["first"])
    reader.ask("One")
    reader.tab.fill("#question", "Two")
    reader.tab.focus("#new")
    order = [reader.focused()]
    for _ in range(8):
        reader.tab.keyboard.press("Tab")
        style = "getComputedStyle(document.activeElement.closest('.box:has(textarea:focus)') ?? document.activeElement)"
        assert reader.tab.evaluate(f"{style}.outlineStyle !== 'none' || {style}.boxShadow !== 'none'")
        order.append(str(reader.tab.evaluate("document.activeElement.id || document.activeElement.textContent")))
    assert order == ["new", "open-settings", "", "Copy", "Ask again", "Edit", "question", "add", "send"]
    name = reader.tab.locator(".look").first.evaluate("(look) => look.firstElementChild.alt")
    assert name == "first.png"


def test_without_scripts_the_page_says_so(browser: Any, opened: Any) -> None:
    reader = opened(java_script_enabled=False)
    assert "This page needs JavaScript." in reader.text("noscript")
    assert not reader.tab.locator("#composer").is_visible()
